"""What the contrastive losses share: argument checks, rows of all ranks, and the reduction of row losses."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .distributed import (
    Group,
    all_gather_rows,
    all_gather_rows_together,
    all_reduce_sum,
    check_group,
    rank,
    world_size,
)
from .native import below_autograd
from .native import contrastive as _ops  # noqa: F401  defines clustops::contrastive_rows

_warned = False


def check_features(features: Tensor, group: Group) -> Tensor:
    """``features`` as contiguous ``[N, V, D]``, values unseen; a matrix is rows of one view each."""
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
    return (features if features.ndim == 3 else features[:, None]).contiguous()


class Options(NamedTuple):
    """The options of ``clustops::contrastive_rows``, in its order."""

    temperature: float
    threshold: float = -math.inf
    reweight: bool = True
    own_confidence: bool = False
    normalize: bool = False


class Reduction(NamedTuple):
    """How losses of rows become the loss."""

    kind: str  # "mean", "sum" or "none"
    no_positive: str  # "zero", "ignore" or "raise"
    factor: float  # of all losses


def check_reduction(
    temperature: float, base_temperature: float | None, no_positive: str, reduction: str
) -> tuple[float, Reduction]:
    """The temperature, and the reduction with a factor of temperature / base_temperature or 1."""
    checks.check_positive(temperature, "temperature", "0.07 to 0.5 are usual")
    checks.check_choice(no_positive, "no_positive", ("zero", "ignore", "raise"))
    checks.check_choice(reduction, "reduction", ("mean", "sum", "none"))
    factor = 1.0
    if base_temperature is not None:
        checks.check_positive(base_temperature, "base_temperature", "pass None for a factor of 1")
        factor = temperature / base_temperature
    return float(temperature), Reduction(reduction, no_positive, factor)


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
    return labels.long()


def check_confidence(confidence: Tensor | None, features: Tensor) -> Tensor | None:
    """``confidence``, detached, values unseen."""
    if confidence is None:
        return None
    checks.check_floating(confidence, "confidence")
    confidence = confidence.detach()
    check_per_sample(confidence, "confidence", features)
    return confidence


def _check_probabilities(confidence: Tensor) -> None:
    checks.check_finite(confidence, "confidence")
    low, high = float(confidence.min()), float(confidence.max())
    if low < 0 or high > 1:
        value = low if low < 0 else high
        checks.reject("confidence", "in [0, 1]", value, "pass probabilities, as pseudo_labels gives them")


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


class _ClassLoss(torch.autograd.Function):
    """The loss of this rank's anchors against the rows of all ranks, reduced: one node.

    A rank knows all rows, so its gradient is complete after one exchange of numbers per row: log-sum-exp on
    the way forward, upstream gradients on the way back. No gradient of ``[M, D]`` travels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        labels: Tensor | None,
        confidence: Tensor | None,
        weights: Tensor | None,
        options: Options,
        reduction: Reduction,
        group: Group,
    ) -> Tensor:
        own, count = (features, confidence), features.shape[0]
        everyone, counts = all_gather_rows_together((features, labels, confidence), group)
        features, labels, confidence = everyone
        first = sum(counts[: rank(group)])
        with below_autograd():
            rows, lse, weight, norms = torch.ops.clustops.contrastive_rows(
                features, labels, confidence, first, count, *options
            )
        if checks.values_are_checked(features):
            check_values(norms, *own, options, group)
        scale = row_scale(rows, weight, weights, features.shape[0], reduction, group)
        lse, _ = all_gather_rows(lse, group, counts)
        varying = isinstance(scale, Tensor)
        ctx.save_for_backward(features, labels, confidence, lse, scale if varying else None)
        ctx.settings = None if varying else scale, counts, first, count, options, group
        return reduce_rows(rows, scale, reduction)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, lse, varying = ctx.saved_tensors
        scale, counts, first, count, options, group = ctx.settings
        grad = gradients[0].expand(count, inputs[0].shape[1]) * (varying if scale is None else scale)
        grad, _ = all_gather_rows(grad, group, counts)
        with below_autograd():
            gradient = torch.ops.clustops.contrastive_rows_backward(
                grad, *inputs, lse, first, count, *options
            )
        return gradient, None, None, None, None, None, None


def class_loss(
    features: Tensor,
    labels: Tensor | None,
    confidence: Tensor | None,
    weights: Tensor | None,
    options: Options,
    reduction: Reduction,
    group: Group,
) -> Tensor:
    """The loss of checked arguments: a scalar, or that of rows ``[N, V]``."""
    loss: Tensor = _ClassLoss.apply(features, labels, confidence, weights, options, reduction, group)
    return loss


def check_values(
    norms: Tensor, features: Tensor, confidence: Tensor | None, options: Options, group: Group
) -> None:
    """Raise if a value is out of range, which the op tells by NaN; warn, once a process, of odd norms."""
    global _warned
    least, greatest = norms.tolist()
    if math.isnan(greatest):
        checks.check_finite(features, "features")
        if confidence is not None:
            _check_probabilities(confidence)
        if group is not None:
            expected, cure = "finite, and confidence in [0, 1], on all ranks", "look at that rank's message"
            checks.reject("features", expected, "others on another rank", cure)
    elif not (_warned or options.normalize) and (least < 0.9 or greatest > 1.1):
        _warned = True
        warnings.warn(
            f"features have rows of norm {least:.3g} to {greatest:.3g}, but the loss is one of cosines: "
            "pass normalize=True or normalise them. This is said once.",
            checks.ClustopsWarning,
            stacklevel=4,
        )


def row_scale(
    rows: Tensor,
    weight: Tensor,
    weights: Tensor | None,
    samples: int,
    reduction: Reduction,
    group: Group,
) -> float | Tensor:
    """What losses of rows ``[N, V]`` are multiplied by, so that over ranks the mean is that of one process.

    Args:
        weight: ``[N]``, W of each sample; 0: its rows have no positive.
        samples: of all ranks.
    """
    scale: float | Tensor = reduction.factor
    if reduction.no_positive == "raise":
        _check_positives(weight > 0, group)
    if reduction.kind != "none":
        scale = scale * world_size(group)
    if reduction.kind == "mean" and reduction.no_positive != "ignore":
        scale = scale / max(1, samples * rows.shape[1])
    elif reduction.kind == "mean":
        anchors = all_reduce_sum((weight > 0).sum(), group) * rows.shape[1]
        scale = scale / anchors.clamp_min(1).to(rows.dtype)
    return scale if weights is None else weights.to(rows.dtype)[:, None] * scale


def reduce_rows(rows: Tensor, scale: float | Tensor, reduction: Reduction) -> Tensor:
    """The loss from losses of rows ``[N, V]``."""
    if reduction.kind == "none":
        return rows * scale
    if isinstance(scale, Tensor) and scale.ndim:
        return (rows * scale).sum()
    return rows.sum() * scale


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
