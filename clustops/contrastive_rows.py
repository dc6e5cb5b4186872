"""What the contrastive losses share: argument checks, rows of all ranks, and the reduction of row losses."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from . import checks
from .distributed import Group, all_gather_rows, all_reduce_sum, check_group, rank, world_size
from .native import contrastive as _ops  # noqa: F401  defines clustops::contrastive_rows

_warned = False


def check_features(features: Tensor, group: Group) -> Tensor:
    """``features`` as contiguous ``[N, V, D]``; a matrix is rows of one view each."""
    checks.check_floating(features, "features", "torch.stack(views, dim=1)")
    if features.ndim not in (2, 3):
        checks.reject(
            "features",
            "[N, V, D] (samples, views, features) or [M, D]",
            checks.shape_of(features),
            "stack the views: torch.stack([view_1, view_2], dim=1)",
        )
    check_group(group)
    # A rank may have no samples; the views and features of none are still known.
    if 0 in features.shape[1 if group is not None else 0 :]:
        checks.reject("features", "not empty", checks.shape_of(features), "skip empty batches")
    checks.check_finite(features, "features")
    return (features if features.ndim == 3 else features[:, None]).contiguous()


def warn_if_unnormalized(features: Tensor, normalize: bool) -> None:
    """Warn, once a process, of rows whose norm is far from 1, where values are checked; zero rows may be."""
    global _warned
    if normalize or not checks.values_are_checked(features) or _warned or features.numel() == 0:
        return
    norms = torch.linalg.vector_norm(features.detach(), dim=-1)
    if bool(((norms > 0) & ((norms - 1).abs() > 0.1)).any()):
        _warned = True
        warnings.warn(
            f"features have rows of norm up to {float(norms.max()):.3g}, but the loss is one of cosines: "
            "pass normalize=True or normalise them. This is said once.",
            checks.ClustopsWarning,
            stacklevel=3,
        )


def check_options(
    temperature: float, base_temperature: float | None, no_positive: str, reduction: str
) -> tuple[float, float]:
    """The temperature, and the factor of the loss: temperature / base_temperature or 1."""
    checks.check_positive(temperature, "temperature", "0.07 to 0.5 are usual")
    checks.check_choice(no_positive, "no_positive", ("zero", "ignore", "raise"))
    checks.check_choice(reduction, "reduction", ("mean", "sum", "none"))
    if base_temperature is None:
        return float(temperature), 1.0
    checks.check_positive(base_temperature, "base_temperature", "pass None for a factor of 1")
    return float(temperature), temperature / base_temperature


def check_per_sample(tensor: Tensor, name: str, features: Tensor) -> None:
    """Raise unless ``tensor`` is ``[N]`` on the device of ``features``."""
    n = features.shape[0]
    if tensor.ndim != 1 or tensor.shape[0] != n:
        checks.reject(
            name,
            f"[N] with N = features.shape[0] = {n}",
            checks.shape_of(tensor),
            _cure_of_shape(tensor, features),
        )
    checks.check_same_device(tensor, name, features, "features")


def _cure_of_shape(tensor: Tensor, features: Tensor) -> str:
    """What to do about a tensor that is not ``[N]``; ``features`` are ``[N, V, D]``."""
    cure = "pass one number per sample, not per view"
    if tensor.ndim != 1 or tensor.shape[0] == 0:
        return cure
    n, v, _ = features.shape
    if tensor.shape[0] == v:
        return f"{cure}, or did you mean features.transpose(0, 1)? views are the second axis"
    if v == 1 and n % tensor.shape[0] == 0:
        return f"{cure}, and stack the views to [N, V, D]: torch.stack(views, dim=1)"
    return cure


def check_labels(labels: Tensor, features: Tensor) -> Tensor:
    """``labels`` as int64."""
    checks.check_tensor(labels, "labels")
    if labels.ndim == 2:
        checks.reject(
            "labels",
            "[N] class indices, one per sample",
            f"{labels.dtype} {checks.shape_of(labels)}",
            "pass class indices, of one-hot rows labels.argmax(1)",
        )
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        checks.reject("labels", "integers", labels.dtype, "pass class indices: labels.long()", TypeError)
    check_per_sample(labels, "labels", features)
    if checks.values_are_checked(labels) and labels.numel() and int(labels.min()) < -1:
        checks.reject("labels", "at least -1", int(labels.min()), "give a sample without a class -1")
    return labels.detach().to(torch.int64)


def check_confidence(confidence: Tensor | None, features: Tensor) -> Tensor | None:
    """``confidence``, detached."""
    if confidence is None:
        return None
    checks.check_floating(confidence, "confidence")
    confidence = confidence.detach()
    check_per_sample(confidence, "confidence", features)
    checks.check_finite(confidence, "confidence")
    if checks.values_are_checked(confidence) and confidence.numel():
        low, high = float(confidence.min()), float(confidence.max())
        if low < 0 or high > 1:
            value = low if low < 0 else high
            checks.reject("confidence", "in [0, 1]", value, "pass probabilities, as pseudo_labels gives them")
    return confidence


def check_threshold(threshold: float | None) -> float:
    """``threshold`` as a number, -inf for ``None``."""
    if threshold is None:
        return -math.inf
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        checks.reject("threshold", "a number or None", type(threshold).__name__, "0.9 is usual", TypeError)
    if not threshold >= 0:
        checks.reject("threshold", "at least 0", threshold, "pass None to switch it off")
    return float(threshold)


def check_weights(weights: Tensor | None, features: Tensor) -> Tensor | None:
    """``weights``, detached."""
    if weights is None:
        return None
    checks.check_floating(weights, "weights")
    check_per_sample(weights, "weights", features)
    weights = weights.detach()
    checks.check_finite(weights, "weights")
    if checks.values_are_checked(weights) and weights.numel() and float(weights.min()) < 0:
        checks.reject("weights", "at least 0", float(weights.min()), "0 leaves a sample out as an anchor")
    return weights


class _ShardedRows(torch.autograd.Function):
    """contrastive_rows of this rank's anchors against the rows of all ranks.

    A rank knows all rows, so its gradient is complete after one exchange of numbers per row: log-sum-exp on
    the way forward, upstream gradients on the way back. No gradient of ``[M, D]`` travels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        labels: Tensor | None,
        confidence: Tensor | None,
        group: Group,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        count = features.shape[0]
        features, counts = all_gather_rows(features, group)
        labels = None if labels is None else all_gather_rows(labels, group)[0]
        confidence = None if confidence is None else all_gather_rows(confidence, group)[0]
        first = sum(counts[: rank(group)])
        rows, lse, weight = torch.ops.clustops.contrastive_rows(
            features, labels, confidence, first, count, *options
        )
        ctx.save_for_backward(features, labels, confidence, all_gather_rows(lse, group)[0])
        ctx.group, ctx.anchors, ctx.options = group, (first, count), options
        ctx.mark_non_differentiable(weight)
        return rows, weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
        features, labels, confidence, lse = ctx.saved_tensors
        grad, _ = all_gather_rows(grad, ctx.group)
        gradient = torch.ops.clustops.contrastive_rows_backward(
            grad, features, labels, confidence, lse, *ctx.anchors, *ctx.options
        )
        return gradient, None, None, None, None


def class_rows(
    features: Tensor, labels: Tensor | None, confidence: Tensor | None, options: tuple[Any, ...], group: Group
) -> tuple[Tensor, Tensor]:
    """Losses ``[N, V]`` and total weights ``[N]`` of this rank's anchors."""
    if group is not None:
        rows, weight = _ShardedRows.apply(features, labels, confidence, group, options)
        return rows, weight
    rows, _, weight = torch.ops.clustops.contrastive_rows(
        features, labels, confidence, 0, features.shape[0], *options
    )
    return rows, weight


def reduce_rows(
    rows: Tensor,
    weight: Tensor,
    factor: float,
    weights: Tensor | None,
    no_positive: str,
    reduction: str,
    group: Group,
) -> Tensor:
    """The loss from losses of rows ``[N, V]``; over ranks, scalars average to the loss of one process."""
    has_positive = weight > 0
    if no_positive == "raise":
        _check_positives(has_positive, group)
    if factor != 1:
        rows = rows * factor
    if weights is not None:
        rows = rows * weights.to(rows.dtype)[:, None]
    if reduction == "none":
        return rows
    loss = rows.sum() * world_size(group)
    if reduction == "sum":
        return loss
    if no_positive != "ignore" and group is None:
        return loss / rows.numel()
    samples = has_positive if no_positive == "ignore" else torch.ones_like(has_positive)
    anchors = all_reduce_sum(samples.sum(), group) * rows.shape[1]
    return loss / anchors.clamp_min(1)


def _check_positives(has_positive: Tensor, group: Group) -> None:
    # All ranks hear of it, or those without such a row would wait for the others in the backward pass.
    missing = all_reduce_sum((~has_positive).sum(), group)
    if torch.compiler.is_compiling():
        torch._assert_async(missing == 0, "no_positive='raise': there are samples without a positive")
        return
    if int(missing):
        checks.reject(
            "features",
            "rows with at least one positive each, as no_positive='raise' asks",
            f"{int(missing)} samples without one",
            "pass two views of each sample, or no_positive='zero' or 'ignore'",
        )
