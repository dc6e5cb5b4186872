"""The contrastive loss under any weights, a block of inner products at a time: the same on each device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import contrastive_rows as reference
from . import dense_rows, view

# Under one shift for all of them, scores between +-_SPREAD have exponentials whose sums are normal numbers.
_SPREAD = 40.0

Place = tuple[int, int, int, int]  # samples: row, rows, column, columns


class Device(NamedTuple):
    """How a device does it."""

    rows: int  # of a block
    columns: int
    triangle: bool  # whether a block above the diagonal stands for its mirror image as well
    sums: Callable[..., None]
    gradient: Callable[..., None]
    operand: Callable[[torch.dtype], torch.dtype]  # of matrix products, from that of the features


def losses(
    device: Device, features: Tensor, pair_weights: Tensor, first: int, temperature: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results of ``clustops::weighted_contrastive_rows``."""
    rows = _rows(features, normalize)
    norms = reference.extreme_norms(features, None, rows.dtype)
    (count, n), views = pair_weights.shape, features.shape[1]
    shift = rows.new_full((count * views,), -math.inf, dtype=torch.float64)
    triangle = False
    if device.triangle:
        bound = (1.0 if normalize else float(norms[1]) ** 2) / temperature
        triangle = bound <= _SPREAD
        shift.fill_(bound / math.log(2) if triangle else -math.inf)
    partition, weighted, total = torch.zeros_like(shift), torch.zeros_like(shift), shift.new_zeros(count)
    blocks = _Blocks(device, rows.to(device.operand(features.dtype)), rows.dtype, views)
    w = dense_rows(pair_weights.detach())
    given = [view(t) for t in (blocks.room, w, shift, partition, weighted, total)]
    for place in blocks.places(first, count, n, triangle=triangle):
        blocks.products(*place)
        device.sums(*given, (views, first, *place), temperature, triangle)
    lse = partition.log2_().add_(shift).mul_(math.log(2)).view(count, views)
    lse.clamp_min_(torch.finfo(rows.dtype).min)
    mean = weighted.view(count, views) / (temperature * total[:, None])
    norms = torch.where(total.isnan().any(), torch.nan, norms)
    loss = torch.where(total[:, None] > 0, lse - mean, 0) + torch.where(norms[1].isnan(), torch.nan, 0)
    return loss.to(rows.dtype), lse.to(rows.dtype), total.to(rows.dtype), norms


def gradient(
    device: Device,
    grad: Tensor,
    features: Tensor,
    pair_weights: Tensor,
    lse: Tensor,
    weight: Tensor,
    first: int,
    temperature: float,
    normalize: bool,
) -> Tensor:
    """Result of ``clustops::weighted_contrastive_rows_backward``."""
    rows, (count, n), views = _rows(features, normalize), pair_weights.shape, features.shape[1]
    operands = rows.to(device.operand(features.dtype))
    grad = torch.where(weight[:, None] > 0, grad, 0).to(rows.dtype)
    factor = _factor(grad) if operands.dtype == torch.float16 and grad.numel() else None
    grad = grad if factor is None else grad * factor
    share = torch.where(weight[:, None] > 0, grad / weight[:, None], 0)
    blocks, result = _Blocks(device, operands, rows.dtype, views), torch.zeros_like(rows)
    same = operands.dtype == rows.dtype
    turned = blocks.room if same else torch.empty_like(blocks.room, dtype=operands.dtype)
    per_row = [t.flatten() for t in (grad, lse / math.log(2), share)]
    given = [view(t) for t in (blocks.room, dense_rows(pair_weights), *per_row, turned)]
    for place in blocks.places(first, count, n, triangle=device.triangle):
        row, height, column, width = place
        products = blocks.products(*place)
        g = turned[: products.numel()].view_as(products)
        device.gradient(*given, (views, first, *place), temperature)
        anchors, columns = blocks.rows_of(row, height), blocks.rows_of(column, width)
        multiply(g, operands[columns], result[anchors], add=True)
        # Columns that are rows of no other block: of no anchor, or beyond the diagonal.
        beyond = 0
        if first <= column < first + count:
            beyond = max(0, row + height - column) * views if device.triangle else products.shape[1]
        if beyond < products.shape[1]:
            multiply(g[:, beyond:].T, operands[anchors], result[columns][beyond:], add=True)
    result = result.div_(temperature if factor is None else temperature * factor).view(features.shape)
    return reference.through_norm(result, features, rows.view(features.shape), normalize)


def _rows(features: Tensor, normalize: bool) -> Tensor:
    """z ``[N V, D]``."""
    return reference.unit_rows(features.detach(), normalize).flatten(0, 1).contiguous()


def _factor(grad: Tensor) -> Tensor:
    """A power of two that brings products with gradients into the range of fp16, where none is above 4."""
    largest = grad.abs().amax().clamp(1e-30, 1e30)
    return torch.exp2(12 - largest.log2().ceil())


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """``a b`` in ``out``, or added to it: in fp32 whatever the operands are."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    if add:
        return out.add_(multiply(a, b, torch.empty_like(out)))
    return torch.mm(a, b, out.dtype, out=out)


class _Blocks:
    """Blocks of inner products of rows, one after the other in the same memory."""

    def __init__(self, device: Device, rows: Tensor, dtype: torch.dtype, views: int) -> None:
        self.device, self.rows, self.views = device, rows, views
        self.height, self.width = (max(1, most // views) for most in (device.rows, device.columns))
        samples = rows.shape[0] // views
        size = min(self.height, samples) * min(self.width, samples) * views**2
        self.room = rows.new_empty((size,), dtype=dtype)

    def places(self, first: int, count: int, n: int, *, triangle: bool) -> Iterator[Place]:
        """Anchors against all samples, or those above the diagonal. Columns are all anchors or none."""
        for row in range(first, first + count, self.height):
            rows = min(self.height, first + count - row)
            for begin, end in ((0, first), (row if triangle else first, first + count), (first + count, n)):
                for column in range(begin, end, self.width):
                    yield row, rows, column, min(self.width, end - column)

    def rows_of(self, sample: int, samples: int) -> slice:
        """Rows of these samples."""
        return slice(sample * self.views, (sample + samples) * self.views)

    def products(self, row: int, rows: int, column: int, columns: int) -> Tensor:
        """The inner products of a block ``[rows V, columns V]``."""
        a, b = self.rows[self.rows_of(row, rows)], self.rows[self.rows_of(column, columns)]
        out = self.room[: a.shape[0] * b.shape[0]].view(a.shape[0], b.shape[0])
        return multiply(a, b.T, out)
