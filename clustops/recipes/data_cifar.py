"""CIFAR-10 and CIFAR-100 from their published files, the Python and the binary version."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

_PIXELS = 3 * 32 * 32


class _Version(NamedTuple):
    folder: str
    train: tuple[str, ...]
    test: str


_SETS = {
    "cifar10": (
        _Version("cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch"),
        _Version("cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
    ),
    "cifar100": (
        _Version("cifar-100-python", ("train",), "test"),
        _Version("cifar-100-binary", ("train.bin",), "test.bin"),
    ),
}


def read(root: Path, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Training images, labels, test images, labels, number of classes; images ``[N, 3, 32, 32]`` uint8.

    Args:
        root: holds the unpacked folder (``cifar-10-batches-py`` or the like).
        name: ``"cifar10"`` or ``"cifar100"``.
    """
    version = _find(root, name)
    folder = root / version.folder
    classes = 10 if name == "cifar10" else 100
    parts = [_read_file(folder / file, classes) for file in version.train]
    test_images, test_labels = _read_file(folder / version.test, classes)
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return images, labels, test_images, test_labels, classes


def _find(root: Path, name: str) -> _Version:
    for version in _SETS[name]:
        if all((root / version.folder / file).is_file() for file in (*version.train, version.test)):
            return version
    started = [version for version in _SETS[name] if (root / version.folder).is_dir()]
    wanted = " or ".join(
        f"{root / version.folder}/ with {', '.join(_missing(root, version))}"
        for version in started or _SETS[name]
    )
    raise FileNotFoundError(
        f"{name} needs {wanted}; unpack the archive from https://www.cs.toronto.edu/~kriz/cifar.html there, "
        f"or name another folder with --data-root or CLUSTOPS_DATA"
    )


def _missing(root: Path, version: _Version) -> list[str]:
    files = (*version.train, version.test)
    return [file for file in files if not (root / version.folder / file).is_file()]


def _read_file(path: Path, classes: int) -> tuple[Tensor, Tensor]:
    pixels, labels = _read_binary(path, classes) if path.suffix == ".bin" else _read_pickle(path, classes)
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        found = f"{labels.min()} to {labels.max()}"
        raise ValueError(f"{path} must hold labels from 0 to {classes - 1}, found {found}; unpack it again")
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32)), torch.from_numpy(labels.astype(np.int64))


def _read_binary(path: Path, classes: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    # CIFAR-100 rows open with the coarse label, then the fine one.
    n_labels = 1 if classes == 10 else 2
    size, row = path.stat().st_size, n_labels + _PIXELS
    if size == 0 or size % row:
        raise ValueError(
            f"{path} must be a whole number of {row}-byte rows, found {size} bytes "
            f"({size // row} rows and {size % row} bytes); the file is cut or damaged: unpack it again"
        )
    rows = np.fromfile(path, dtype=np.uint8).reshape(-1, row)
    return rows[:, n_labels:].copy(), rows[:, n_labels - 1]


def _read_pickle(path: Path, classes: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    with path.open("rb") as file:
        try:
            batch = _NumbersOnly(file, encoding="bytes").load()
        except _RefusedError as error:
            raise ValueError(
                f"{path} must be a CIFAR batch, found a pickle that {error}; unpack it again"
            ) from error
        # Damaged bytes can fail anywhere in the decoder.
        except Exception as error:
            found = f"{path.stat().st_size} bytes that do not decode ({type(error).__name__}: {error})"
            raise ValueError(
                f"{path} must be a whole pickle, found {found}; the file is cut or damaged: unpack it again"
            ) from error
    key = b"labels" if classes == 10 else b"fine_labels"
    if not isinstance(batch, dict) or b"data" not in batch or key not in batch:
        entries = sorted(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(
            f"{path} must hold the entries data and {key.decode()}, found {entries}; unpack it again"
        )
    pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[key])
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _PIXELS) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path} must hold uint8 data [{len(labels)}, {_PIXELS}] for its {len(labels)} labels, "
            f"found {pixels.dtype} {list(pixels.shape)}; unpack it again"
        )
    return pixels, labels


class _RefusedError(Exception):
    pass


class _NumbersOnly(pickle.Unpickler):
    """Builds arrays, bytes, strings, numbers and containers, and refuses all else: pickles can run code."""

    _ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        | {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
        | {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}
    )

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        super().__init__(file, encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        """The class, if it is one of the few that a CIFAR batch needs."""
        if (module, name) not in self._ALLOWED:
            raise _RefusedError(f"asks for {module}.{name}, which no batch holds")
        return super().find_class(module, name)
