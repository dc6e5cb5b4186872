"""Image folders: one folder for each class."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ENDINGS = (".png", ".jpg", ".jpeg")


def read(spec: str) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Training images, labels, test images, labels, number of classes; images ``[N, C, H, W]`` uint8.

    Classes are numbered in the order of their folder names. C is 1 where all images are grey, else 3.
    Images in ``PATH/unlabelled/``, if there is such a folder, join the training part with label -1.

    Args:
        spec: ``PATH`` with ``train/CLASS/*.png`` (or .jpg, .jpeg) and ``test/CLASS/``; ``PATH@32`` resizes
            all images to 32 x 32.
    """
    asked = re.fullmatch(r"(.+)@(\d+)", spec)
    path, size = (Path(asked[1]), int(asked[2])) if asked else (Path(spec), None)
    if size == 0:
        raise ValueError(f"the size after @ must be at least 1, got {spec!r}; write for example {path}@32")
    classes = _classes(path / "train")
    unknown = sorted(set(_classes(path / "test")) - set(classes))
    if unknown:
        raise ValueError(f"{path / 'test'} has classes that {path / 'train'} lacks: {', '.join(unknown)}")
    train, train_labels = _list(path / "train", classes)
    test, test_labels = _list(path / "test", classes)
    unlabelled = _files(path / "unlabelled")
    images = _decode(train + unlabelled + test, size, path)
    labels = torch.tensor(train_labels + [-1] * len(unlabelled))
    n_train = len(labels)
    return images[:n_train], labels, images[n_train:], torch.tensor(test_labels), len(classes)


def _classes(folder: Path) -> list[str]:
    names = sorted(f.name for f in folder.iterdir() if f.is_dir()) if folder.is_dir() else []
    if not names:
        raise FileNotFoundError(
            f"{folder} must hold one folder of images for each class, found none; "
            f"put files at {folder}/CLASS/NAME.png (or .jpg)"
        )
    return names


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in _ENDINGS) if folder.is_dir() else []


def _list(folder: Path, classes: list[str]) -> tuple[list[Path], list[int]]:
    files, labels = [], []
    for label, name in enumerate(classes):
        found = _files(folder / name)
        files += found
        labels += [label] * len(found)
    if not files:
        raise FileNotFoundError(f"{folder} holds no image; put files at {folder}/CLASS/NAME.png (or .jpg)")
    return files, labels


def _decode(files: list[Path], size: int | None, path: Path) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise ModuleNotFoundError("image folders need Pillow: pip install pillow", name="PIL") from error
    arrays: list[np.ndarray[Any, Any]] = []
    first: tuple[int, int] | None = None
    for file in files:
        try:
            with Image.open(file) as opened:
                image = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
                if size is not None:
                    image = image.resize((size, size), Image.Resampling.BILINEAR)
        except (OSError, SyntaxError) as error:
            found = f"{file.stat().st_size} bytes that do not decode ({error})"
            raise ValueError(f"{file} must be a whole image, found {found}; replace or remove it") from error
        first = first or image.size
        if image.size != first:
            raise ValueError(
                f"{file} must be {first[0]} x {first[1]} like {files[0].name}, found {image.size[0]} x "
                f"{image.size[1]}; ask for a resize to one size: folder:{path}@{min(first)}"
            )
        arrays.append(np.asarray(image))
    grey = all(a.ndim == 2 for a in arrays)
    stack = np.stack([a[None] if grey else np.moveaxis(_in_colour(a), 2, 0) for a in arrays])
    return torch.from_numpy(stack)


def _in_colour(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array if array.ndim == 3 else np.repeat(array[:, :, None], 3, axis=2)
