"""Images and labels of the data sets that the recipes know, read from files in their published formats.

Nothing is downloaded: where files are missing, the error says which ones to put where.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..checks import check_count, check_tensor, reject, shape_of
from ..reference.philox import uniform
from . import data_cifar, data_folder, data_stl10

NAMES = ("digits", "cifar10", "cifar100", "stl10", "folder:PATH")

# One use, one stream: draws never overlap, whatever the seed.
_LABELLED_STREAM = int.from_bytes(b"labelled", "big")
_SPLIT_STREAM = int.from_bytes(b"splitted", "big")


@dataclass(frozen=True)
class ImageData:
    """A training set, a test set and how many classes they have.

    Attributes:
        name: as it is shown in reports.
        train_images: ``[N, C, H, W]``, float32 in [0, 1] or uint8.
        train_labels: ``[N]`` int64; -1 where no label was ever given (STL-10's unlabelled part).
        test_images: ``[N_test, C, H, W]``, like ``train_images``.
        test_labels: ``[N_test]`` int64, all given.
        n_classes: labels are below it.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    n_classes: int

    def __post_init__(self) -> None:
        check_count(self.n_classes, "n_classes", 1, "count the classes, not the last label")
        _check_part(self.train_images, self.train_labels, "train", -1, self.n_classes)
        _check_part(self.test_images, self.test_labels, "test", 0, self.n_classes)
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            reject(
                "test_images",
                f"of the size of train_images, {shape_of(self.train_images[:0])}",
                shape_of(self.test_images),
                "bring both to one size",
            )


def _check_part(images: Tensor, labels: Tensor, part: str, least: int, n_classes: int) -> None:
    check_tensor(images, f"{part}_images")
    check_tensor(labels, f"{part}_labels")
    if images.ndim != 4:
        reject(
            f"{part}_images", "[N, C, H, W]", shape_of(images), "add the missing dimension: images[:, None]"
        )
    if images.dtype not in (torch.float32, torch.uint8):
        reject(f"{part}_images", "float32 or uint8", images.dtype, "convert: images.float() / 255", TypeError)
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        got = f"{labels.dtype} {shape_of(labels)}"
        reject(f"{part}_labels", f"int64 [N] with N = {len(images)}", got, "pass one label for each image")
    if len(labels) and not least <= int(labels.min()) <= int(labels.max()) < n_classes:
        got = f"{int(labels.min())} to {int(labels.max())}"
        reject(f"{part}_labels", f"from {least} to {n_classes - 1}", got, "number the classes from 0")


def load(spec: str, root: Path | None = None) -> ImageData:
    """The data set that ``spec`` names.

    Args:
        spec: ``"digits"`` (scikit-learn's, no file needed), ``"cifar10"``, ``"cifar100"``, ``"stl10"``, or
            ``"folder:PATH"`` for ``PATH/train/CLASS/*.png`` and ``PATH/test/CLASS/*.png``
            (``"folder:PATH@32"`` resizes to 32 x 32).
        root: where the files of the named sets lie; default ``$CLUSTOPS_DATA``, else ``./data``.

    Raises:
        ValueError: an unknown name, or a file whose content is not what its format says.
        FileNotFoundError: files are missing; the message lists them.
        ModuleNotFoundError: digits needs scikit-learn, folders need Pillow.

    Cost: CIFAR and folders are held in memory as uint8. STL-10 is memory-mapped, but for its training part
    when ``unlabeled_X.bin`` is there (2.9 GB, joined in memory).

    >>> data = load("digits")
    >>> data.train_images.shape, len(data.test_labels)
    (torch.Size([1257, 1, 8, 8]), 540)
    """
    if root is None:
        root = Path(os.environ.get("CLUSTOPS_DATA", "data"))
    kind, _, path = spec.partition(":")
    if kind == "folder" and path:
        return ImageData(Path(path).name, *data_folder.read(path))
    if spec == "digits":
        return _digits()
    if spec in ("cifar10", "cifar100"):
        return ImageData(spec, *data_cifar.read(root, spec))
    if spec == "stl10":
        return ImageData(spec, *data_stl10.read(root))
    reject("data", f"one of {', '.join(NAMES)}", repr(spec), "pick one of these names")


def _digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = 'the digits data set comes with scikit-learn: pip install "clustops[demo]"'
        raise ModuleNotFoundError(message, name="sklearn") from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32)[:, None] / 16
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    train, test = stratified_split(labels, 540, seed=0)
    return ImageData("digits", images[train], labels[train], images[test], labels[test], 10)


def labelled_subset(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Row indices of ``per_class`` labelled samples of each class, class by class.

    The same on every platform; the subset for a larger ``per_class`` contains the one for a smaller.

    Args:
        labels: ``[N]`` int64; negative rows are never drawn.
        per_class: at least 1, at most the size of the smallest class.
        seed: any integer.

    Returns:
        ``[C * per_class]`` int64, C the number of classes that occur.

    >>> labels = torch.tensor([1, 0, -1, 1, 0])
    >>> labels[labelled_subset(labels, 1, seed=0)]
    tensor([0, 1])
    """
    check_count(per_class, "labels per class", 1, "ask for one label or more")
    order = _shuffled(torch.arange(len(labels)), seed, _LABELLED_STREAM)
    parts = []
    for c in labels[labels >= 0].unique().tolist():
        rows = order[labels[order] == c]
        if len(rows) < per_class:
            reject(
                "labels per class", f"at most {len(rows)}, the size of class {c}", per_class, "ask for fewer"
            )
        parts.append(rows[:per_class])
    if not parts:
        reject(
            "labels", "non-negative for some sample", f"{len(labels)} unlabelled ones", "pass known labels"
        )
    return torch.cat(parts)


def stratified_split(labels: Tensor, n_test: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of a training and a test part with equal class proportions, both ascending.

    Unlabelled rows (negative) stay in the training part. Class quotas are n_test n_c / n, rounded by largest
    remainder (the smaller class number first in a tie).
    """
    classes, counts = labels[labels >= 0].unique(return_counts=True)
    total = int(counts.sum())
    quotas = counts * n_test // max(total, 1)
    remainder = counts * n_test - quotas * total
    quotas[remainder.argsort(descending=True, stable=True)[: n_test - int(quotas.sum())]] += 1
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    order = _shuffled(torch.arange(len(labels)), seed, _SPLIT_STREAM)
    for c, quota in zip(classes.tolist(), quotas.tolist(), strict=True):
        is_test[order[labels[order] == c][:quota]] = True
    return (~is_test).nonzero()[:, 0], is_test.nonzero()[:, 0]


def validation_split(data: ImageData, fraction: float, seed: int) -> ImageData:
    """``data`` whose test part is cut, stratified, out of its training part; the real test part is gone.

    Args:
        data: any data set.
        fraction: of the labelled training samples, in (0, 1).
        seed: any integer.

    >>> tuned = validation_split(load("digits"), 0.25, seed=1)
    >>> len(tuned.train_labels), len(tuned.test_labels)
    (943, 314)
    """
    n_labelled = int((data.train_labels >= 0).sum())
    n_test = round(n_labelled * fraction)
    if not 0 < n_test < n_labelled:
        got = f"{fraction} of {n_labelled} labelled samples"
        reject("fraction", "in (0, 1) and leave samples on both sides", got, "pass for example 0.2")
    train, test = stratified_split(data.train_labels, n_test, seed)
    return replace(
        data,
        name=f"{data.name} (validation)",
        train_images=data.train_images[train],
        train_labels=data.train_labels[train],
        test_images=data.train_images[test],
        test_labels=data.train_labels[test],
    )


def _shuffled(rows: Tensor, seed: int, stream: int) -> Tensor:
    return rows[uniform(seed, stream, rows).argsort(stable=True)]
