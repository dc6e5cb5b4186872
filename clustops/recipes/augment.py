"""Random views of a batch of images: one affine resampling and a few operations on pixels.

All draws are made for the joint batch of all ranks and each rank takes its rows of them, so that a run over
two ranks sees the images that a run in one process sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .training import to_float

WHOLE = slice(None)


@dataclass(frozen=True)
class Strength:
    """How far a random view may be from its image.

    Attributes:
        shift: pixels, each way. rotation: degrees. scale, shear: relative; log-uniform and uniform.
        crop: least share of the side that a random square crop keeps; 1 keeps all.
        elastic: standard deviation in pixels of a smooth random displacement.
        flip: mirror half of the images.
        gamma: pixel values to the power ``exp(u)``, ``|u| <= gamma``. contrast, brightness: relative,
            absolute.
        grey: probability that colours are dropped. noise: standard deviation.
        cutout: side in pixels of the square that is blanked.
        size: side of the output, 0 for that of the input.
    """

    shift: float = 0.0
    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    crop: float = 1.0
    elastic: float = 0.0
    flip: bool = False
    gamma: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0
    grey: float = 0.0
    noise: float = 0.0
    cutout: int = 0
    size: int = 0


# 8x8 digits: a flip makes another symbol.
DIGITS_WEAK = Strength(shift=0.7, rotation=8.0)
DIGITS_STRONG = Strength(
    shift=1.0, rotation=20.0, scale=0.15, shear=0.2, elastic=0.35, gamma=0.5, noise=0.1, cutout=3
)
DIGITS_CROP = Strength(shift=0.5, rotation=15.0, crop=0.7, shear=0.1, elastic=0.3, gamma=0.4, noise=0.1)
DIGITS_LOCAL = Strength(shift=0.5, rotation=15.0, crop=0.5, shear=0.1, gamma=0.4, noise=0.1, size=6)

# Colour photographs of 32x32 and more.
PHOTO_WEAK = Strength(shift=4.0, flip=True)
PHOTO_STRONG = Strength(
    shift=4.0,
    flip=True,
    rotation=30.0,
    scale=0.15,
    shear=0.3,
    gamma=0.7,
    contrast=0.5,
    brightness=0.3,
    cutout=16,
)
PHOTO_CROP = Strength(crop=0.4, flip=True, gamma=0.4, contrast=0.4, brightness=0.2, grey=0.2)
PHOTO_LOCAL = Strength(crop=0.25, flip=True, gamma=0.4, contrast=0.4, brightness=0.2, grey=0.2, size=18)


class _Draws:
    """Uniform and normal numbers for ``total`` rows of which this rank keeps ``rows``."""

    def __init__(self, total: int, rows: slice, generator: torch.Generator, device: torch.device) -> None:
        self.total, self.rows, self.generator, self.device = total, rows, generator, device

    def uniform(self, *shape: int) -> Tensor:
        drawn = torch.rand(self.total, *shape, generator=self.generator)
        return drawn[self.rows].mul_(2).sub_(1).to(self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.total, *shape, generator=self.generator)[self.rows].to(self.device)


def augment(
    images: Tensor,
    strength: Strength,
    generator: torch.Generator,
    *,
    rows: slice = WHOLE,
    total: int | None = None,
) -> Tensor:
    """Random views of ``images``, float32.

    Args:
        images: ``[N, C, H, W]``, float in [0, 1] or bytes: this rank's rows of the joint batch.
        rows: which rows of the joint batch they are. total: rows of the joint batch; ``None`` for N.
    """
    draws = _Draws(images.shape[0] if total is None else total, rows, generator, images.device)
    return _change_pixels(_resample(to_float(images), strength, draws), strength, draws)


def _resample(images: Tensor, strength: Strength, draws: _Draws) -> Tensor:
    n, channels, height, width = images.shape
    angle = draws.uniform() * (strength.rotation * torch.pi / 180)
    zoom = torch.exp(draws.uniform(2) * strength.scale)
    shear = draws.uniform() * strength.shear
    # The grid spans [-1, 1]: one pixel is 2 / side.
    shift = draws.uniform(2) * (2 * strength.shift / torch.tensor([width, height], device=images.device))
    if strength.crop < 1:
        keep = strength.crop + (1 - strength.crop) * (draws.uniform() + 1) / 2
        shift = shift + draws.uniform(2) * (1 - keep).unsqueeze(1)
        zoom = zoom * keep.unsqueeze(1)
    if strength.flip:
        zoom = zoom * torch.stack([draws.uniform().sign(), torch.ones(n, device=images.device)], 1)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([cos * zoom[:, 0], (cos * shear - sin) * zoom[:, 1], shift[:, 0]], 1),
            torch.stack([sin * zoom[:, 0], (sin * shear + cos) * zoom[:, 1], shift[:, 1]], 1),
        ],
        1,
    )
    out = (n, channels, strength.size or height, strength.size or width)
    grid = F.affine_grid(theta, list(out), align_corners=False)
    if strength.elastic:
        coarse = draws.normal(2, 3, 3) * (2 * strength.elastic / width)
        grid = grid + F.interpolate(coarse, out[2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    # Photographs have no empty border to fill with.
    padding = "reflection" if strength.flip else "zeros"
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def _change_pixels(images: Tensor, strength: Strength, draws: _Draws) -> Tensor:
    height, width = images.shape[2:]
    if strength.gamma:
        images = images.clamp(1e-4, 1) ** torch.exp(draws.uniform(1, 1, 1) * strength.gamma)
    if strength.contrast or strength.brightness:
        mean = images.mean((1, 2, 3), keepdim=True)
        images = mean + (images - mean) * (1 + draws.uniform(1, 1, 1) * strength.contrast)
        images = (images + draws.uniform(1, 1, 1) * strength.brightness).clamp(0, 1)
    if strength.grey:
        chosen = draws.uniform(1, 1, 1) < 2 * strength.grey - 1
        images = torch.where(chosen, images.mean(1, keepdim=True), images)
    if strength.noise:
        images = images + draws.normal(*images.shape[1:]) * strength.noise
    if strength.cutout:
        # Corners from just outside to just inside: a square may lie partly past the border.
        corner = (draws.uniform(2, 1) + 1) / 2 * torch.tensor([[height], [width]], device=images.device)
        corner = corner.floor() - strength.cutout // 2
        y = torch.arange(height, device=images.device) - corner[:, 0]
        x = torch.arange(width, device=images.device) - corner[:, 1]
        inside = ((y >= 0) & (y < strength.cutout)).unsqueeze(2) & (
            (x >= 0) & (x < strength.cutout)
        ).unsqueeze(1)
        images = images.masked_fill(inside.unsqueeze(1), 0.0)
    return images


def multi_crop(
    images: Tensor,
    views: Sequence[Strength],
    generator: torch.Generator,
    *,
    rows: slice = WHOLE,
    total: int | None = None,
) -> list[Tensor]:
    """One random view of the whole batch for each of ``views``."""
    return [augment(images, view, generator, rows=rows, total=total) for view in views]


def mix_images(
    images: Tensor,
    targets: Tensor,
    generator: torch.Generator,
    *,
    how: str,
    rows: slice = WHOLE,
) -> tuple[Tensor, Tensor]:
    """Each row of a batch mixed with another random row: ``"mixup"`` blends, ``"cutmix"`` pastes a rectangle.

    Args:
        images: ``[N, C, H, W]``: the joint batch, float. targets: ``[N, K]``: label distributions.
        rows: which rows of the mixed batch to return.
    """
    n, _, height, width = images.shape
    partner = torch.randperm(n, generator=generator)[rows].to(images.device)
    share = torch.rand(n, generator=generator)[rows].to(images.device)
    left, right = images[rows], images[partner]
    if how == "mixup":
        keep = share.view(-1, 1, 1, 1)
    else:
        side = (1 - share).sqrt()
        centre = torch.rand(n, 2, generator=generator)[rows].to(images.device)
        y = (torch.arange(height, device=images.device) + 0.5) / height - centre[:, :1]
        x = (torch.arange(width, device=images.device) + 0.5) / width - centre[:, 1:]
        half = side.unsqueeze(1) / 2
        keep = 1 - ((y.abs() < half).unsqueeze(2) & (x.abs() < half).unsqueeze(1)).float().unsqueeze(1)
        share = keep.mean((1, 2, 3))
    mixed = keep * left + (1 - keep) * right
    weight = share.view(-1, 1)
    return mixed, weight * targets[rows] + (1 - weight) * targets[partner]


def half_mixtures(images: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """``n`` images that belong to no class: the left half of one image beside the right half of another."""
    left, right = torch.randint(images.shape[0], (2, n), generator=generator).to(images.device)
    middle = images.shape[3] // 2
    return torch.cat([images[left, :, :, :middle], images[right, :, :, middle:]], 3)
