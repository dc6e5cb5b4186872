"""What the k-means functions accept: their checks, and one layout, ``[B, N, D]``, for what follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arrays
from .checks import (
    check_choice,
    check_count,
    check_finite,
    check_floating,
    check_floating_dtype,
    check_same_device,
    check_tensor,
    reject,
    shape_of,
    values_are_checked,
)
from .distributed import Group, all_reduce_sum
from .kmeans_source import Reader, is_read

METRICS = ("l2", "cosine")
POLICIES = ("split", "farthest", "random", "keep")
INITS = ("k-means++", "random")


def rows_of(x: Any, name: str = "x") -> Tensor | Reader:
    """``x`` as a floating point tensor ``[N, D]`` or ``[B, N, D]``, without a gradient, or a reader of it."""
    rows = x if isinstance(x, Reader) else Reader(x, name) if is_read(x) else arrays.to_tensor(x, name)
    if isinstance(rows, Reader):
        check_floating_dtype(rows.dtype, name)
    else:
        check_floating(rows, name)
    if rows.ndim not in (2, 3):
        reject(name, "[N, D] or [B, N, D]", shape_of(rows), "reshape it: one row for each point")
    if rows.shape[-1] == 0 or (rows.ndim == 3 and rows.shape[0] == 0):
        reject(name, "at least one feature wide and one problem long", shape_of(rows), "skip the empty batch")
    return rows if isinstance(rows, Reader) else rows.detach()


def batched(tensor: Tensor, ndim: int) -> Tensor:
    """``tensor`` with a leading problem dimension, where it has one dimension less than ``ndim``."""
    return tensor if tensor.ndim == ndim else tensor.unsqueeze(0)


def check_k(k: int, n: int, name: str = "k") -> None:
    """Raise unless ``1 <= k <= n``."""
    check_count(k, name, 1, "ask for one cluster or more")
    if n < k:
        reject(name, f"at most the number of rows, {n}", k, "ask for fewer clusters or pass more rows")


def check_precision(precision: object) -> None:
    """Raise unless ``precision`` is ``None`` or one of torch's three names."""
    if precision is not None:
        check_choice(precision, "precision", ("highest", "high", "medium"))


def check_metric(metric: object) -> None:
    """Raise unless ``metric`` is a known one."""
    check_choice(metric, "metric", METRICS)


def check_seed(seed: int) -> None:
    """Raise unless ``seed`` is an integer."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        reject("seed", "an integer", repr(seed), "pass a plain integer", TypeError)


def weights_of(weights: Any, x: Tensor | Reader, group: Group = None, *, some: bool = True) -> Tensor | None:
    """``weights`` as a tensor of the shape of the rows of ``x``, checked; ``some`` row must have one."""
    if weights is None:
        return None
    result = arrays.to_tensor(weights, "weights")
    check_floating(result, "weights")
    if result.shape != x.shape[:-1]:
        reject(
            "weights",
            f"{list(x.shape[:-1])}, one for each row of x",
            shape_of(result),
            "pass one weight a row",
        )
    check_finite(result, "weights")
    if values_are_checked(result):
        if result.numel() and bool((result < 0).any()):
            reject(
                "weights",
                "at least 0",
                float(result.min()),
                "drop rows with weight 0 instead of negative ones",
            )
        if some and bool((all_reduce_sum(result.double().sum(-1), group) <= 0).any()):
            reject(
                "weights", "above 0 for some row of each problem", "all 0", "give at least one row a weight"
            )
    return result.detach()


def lengths_of(lengths: Any, x: Tensor | Reader, k: int, group: Group = None) -> Tensor | None:
    """``lengths`` as an int64 tensor ``[B]``, checked."""
    if lengths is None:
        return None
    result = arrays.to_tensor(lengths, "lengths")
    _check_integers(result, "lengths")
    if x.ndim != 3 or result.shape != x.shape[:1]:
        expected = f"[B] = {list(x.shape[:1])}" if x.ndim == 3 else "None for one problem [N, D]"
        reject("lengths", expected, shape_of(result), "pass one length for each problem of x [B, N, D]")
    if values_are_checked(result):
        low, high = int(result.min()), int(result.max())
        if low < 0 or high > x.shape[1]:
            reject("lengths", f"in [0, N = {x.shape[1]}]", [low, high], "count the rows of each problem")
        least = int(all_reduce_sum(result.to(torch.int64), group).min())
        if least < k:
            reject("lengths", f"at least k = {k}", least, "ask for fewer clusters or drop the short problems")
    return result.to(torch.int64)


def labels_of(labels: Any, x: Tensor | Reader, k: int) -> Tensor:
    """``labels`` as an int64 tensor of the shape of the rows of ``x``, in ``[-1, k)``, checked."""
    result = arrays.to_tensor(labels, "labels")
    if result.shape != x.shape[:-1]:
        expected = f"{list(x.shape[:-1])}, one for each row of x"
        cure = "pass one label a row, of one-hot rows labels.argmax(-1)"
        reject("labels", expected, shape_of(result), cure)
    _check_integers(result, "labels")
    check_same_device(result, "labels", x, "x")
    if values_are_checked(result) and result.numel():
        low, high = int(result.min()), int(result.max())
        if low < -1 or high >= k:
            reject(
                "labels",
                f"in [0, {k}), or -1 for a row to leave out",
                [low, high],
                "count the clusters again",
            )
    return result.to(torch.int64)


def centroids_of(centroids: Any, x: Tensor | Reader, name: str = "centroids", k: int | None = None) -> Tensor:
    """``centroids`` as a floating point tensor ``[.., K, D]`` that fits ``x``, checked."""
    result = arrays.to_tensor(centroids, name)
    check_floating(result, name)
    fits = result.ndim == x.ndim and result.shape[:-2] == x.shape[:-2] and result.shape[-1] == x.shape[-1]
    if not fits or result.shape[-2] == 0 or (k is not None and result.shape[-2] != k):
        count = "K" if k is None else k
        expected = [*x.shape[:-2], count, x.shape[-1]]
        reject(
            name, f"{expected} to fit x {shape_of(x)}", shape_of(result), "pass K >= 1 centroids a problem"
        )
    check_finite(result, name)
    return result.detach()


def _check_integers(tensor: Any, name: str) -> None:
    check_tensor(tensor, name)
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        reject(name, "an integer tensor", tensor.dtype, "convert it to int64", TypeError)
