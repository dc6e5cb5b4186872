"""What the estimator accepts as ``X`` and ``sample_weight``: what scikit-learn takes, and tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import arrays
from ..checks import FLOATING, check_finite, reject, shape_of, values_are_checked
from ..kmeans_source import Reader, is_read

# Up to so many numbers are read into memory at once.
_SMALL = 1 << 24


def as_numbers(array: Any, name: str) -> Tensor:
    """A floating point tensor, shared with ``array`` where its kind allows; integers become fp64."""
    if not isinstance(array, Tensor) and not hasattr(array, "__dlpack__"):
        if hasattr(array, "toarray"):
            reject(name, "dense", f"a sparse {type(array).__name__}", f"pass {name}.toarray()", TypeError)
        array = np.asarray(array)
    if isinstance(array, np.ndarray) and array.dtype.kind == "O":
        array = array.astype(np.float64)
    if isinstance(array, Tensor) and array.layout != torch.strided:
        reject(name, "dense", f"a sparse tensor, {array.layout}", f"pass {name}.to_dense()", TypeError)
    if "complex" in str(getattr(array, "dtype", "")):
        reject(name, "real", f"{array.dtype} (Complex data not supported)", "pass its parts as columns")
    numbers = arrays.to_tensor(array, name).detach()
    return numbers if numbers.dtype in FLOATING else numbers.double()


def rows_of(array: Any, owner: str, n_features: int | None) -> Tensor | Reader:
    """``X [N, D]`` as a tensor; a large one that is read by slices as their reader.

    Args:
        owner: the estimator's name, for messages.
        n_features: the D of the fit; ``None`` while fitting.
    """
    rows = _read(array) if is_read(array) and len(array.shape) == 2 else as_numbers(array, "X")
    if rows.ndim != 2:
        reject(
            "X",
            "[n_samples, n_features]",
            shape_of(rows),
            "Reshape your data: X.reshape(-1, 1) for one feature, X.reshape(1, -1) for one sample",
        )
    n, d = rows.shape
    if d == 0 or n == 0:
        empty = "sample(s)" if n == 0 else "feature(s)"
        got = f"0 {empty} (shape=({n}, {d})) while a minimum of 1 is required."
        reject("X", "at least one row of one feature", got, "skip the empty batch")
    if n_features is not None and d != n_features:
        got = f"X has {d} features, but {owner} is expecting {n_features} features as input"
        reject(
            "X", f"[n_samples, {n_features}], as it was in fit", got, "pass the same columns, or fit again"
        )
    if isinstance(rows, Tensor):
        check_finite(rows, "X")
    return rows


def _read(source: Any) -> Tensor | Reader:
    reader = Reader(source, "X")
    if reader.dtype not in FLOATING:
        reader = Reader(source, "X", torch.float64)
    if reader.shape.numel() > _SMALL:
        return reader
    return reader.read(slice(0, reader.shape[0])).to(reader.dtype)


def weights_of(sample_weight: Any, rows: Tensor | Reader) -> Tensor | None:
    """``sample_weight [N]`` as a tensor beside ``rows``; ``None`` stays."""
    if sample_weight is None:
        return None
    weights = as_numbers(sample_weight, "sample_weight").to(rows.device)
    if weights.shape != rows.shape[:1]:
        reject(
            "sample_weight", f"[{rows.shape[0]}], one for each row of X", shape_of(weights), "pass one a row"
        )
    check_finite(weights, "sample_weight")
    if values_are_checked(weights) and weights.numel():
        if bool((weights < 0).any()):
            reject("sample_weight", "at least 0", float(weights.min()), "drop a row with weight 0")
        if not bool(weights.any()):
            reject("sample_weight", "above zero for some row", "all zero weights", "give a row some weight")
    return weights


def kind_of(array: Any) -> Callable[[Tensor], Any]:
    """The function that turns a result into the kind of ``array``; data frames and lists get NumPy arrays."""
    return arrays.like(array if isinstance(array, Tensor) or hasattr(array, "__dlpack__") else [])


def names_of(array: Any) -> Any:
    """Column names of a data frame as an object array; ``None`` without such, or where one is no string."""
    columns = getattr(array, "columns", None)
    if columns is None or not all(isinstance(name, str) for name in columns):
        return None
    return np.asarray(columns, dtype=object)


def check_names(names: Any, fitted: Any) -> None:
    """Raise ``ValueError`` if both are names and differ, in scikit-learn's words."""
    if names is None or fitted is None or list(names) == list(fitted):
        return
    unseen, missing = sorted(set(names) - set(fitted)), sorted(set(fitted) - set(names))
    message = "The feature names should match those that were passed during fit.\n"
    if unseen:
        message += "Feature names unseen at fit time:\n" + "".join(f"- {name}\n" for name in unseen)
    if missing:
        message += "Feature names seen at fit time, yet now missing:\n" + "".join(f"- {n}\n" for n in missing)
    if not unseen and not missing:
        message += "Feature names must be in the same order as they were in fit.\n"
    raise ValueError(message)


def not_fitted() -> type[Exception]:
    """scikit-learn's own exception where there is scikit-learn."""
    try:
        from sklearn.exceptions import NotFittedError
    except ImportError:
        return AttributeError
    error: type[Exception] = NotFittedError
    return error
