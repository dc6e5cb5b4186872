"""STL-10 from its published binary files, memory-mapped."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

_FOLDER = "stl10_binary"
_IMAGE = 3 * 96 * 96
_FILES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")


def read(root: Path) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Training images, labels, test images, labels, 10; images ``[N, 3, 96, 96]`` uint8.

    Where ``unlabeled_X.bin`` is there, its images follow the labelled ones with label -1.
    """
    folder = root / _FOLDER
    missing = [file for file in _FILES if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"stl10 needs {', '.join(missing)} (and unlabeled_X.bin for the unlabelled part) in {folder}/; "
            f"unpack the archive from https://cs.stanford.edu/~acoates/stl10 there, or name another folder "
            f"with --data-root or CLUSTOPS_DATA"
        )
    train_images, train_labels = _pair(folder, "train")
    test_images, test_labels = _pair(folder, "test")
    if (folder / "unlabeled_X.bin").is_file():
        unlabelled = _images(folder / "unlabeled_X.bin")
        train_images = torch.cat((train_images, unlabelled))
        train_labels = torch.cat((train_labels, torch.full((len(unlabelled),), -1)))
    return train_images, train_labels, test_images, test_labels, 10


def _pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images = _images(folder / f"{part}_X.bin")
    path = folder / f"{part}_y.bin"
    labels = _map(path).to(torch.int64) - 1
    if len(labels) != len(images):
        raise ValueError(
            f"{path} must be {len(images)} bytes, one for each image of {part}_X.bin, found {len(labels)}; "
            f"unpack both again"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < 10:
        found = f"{int(labels.min()) + 1} to {int(labels.max()) + 1}"
        raise ValueError(f"{path} must hold labels from 1 to 10, found {found}; unpack it again")
    return images, labels


def _images(path: Path) -> Tensor:
    size = path.stat().st_size
    if size == 0 or size % _IMAGE:
        raise ValueError(
            f"{path} must be a whole number of {_IMAGE}-byte images, found {size} bytes "
            f"({size // _IMAGE} images and {size % _IMAGE} bytes); it is cut or damaged: unpack it again"
        )
    # Pixels are stored column by column.
    return _map(path).view(-1, 3, 96, 96).transpose(2, 3)


def _map(path: Path) -> Tensor:
    # Private and copy-on-write: nobody can write to the file through it.
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
