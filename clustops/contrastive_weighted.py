"""The contrastive loss under any weights between samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .contrastive_rows import (
    Options,
    Reduction,
    check_features,
    check_reduction,
    check_values,
    check_weights,
    reduce_rows,
    row_scale,
)
from .distributed import Group, all_gather_rows, all_reduce_sum, errors_reach_all_ranks, rank
from .native import below_autograd
from .native import contrastive_weighted as _ops  # noqa: F401  defines clustops::weighted_contrastive_rows


def weighted_contrastive_loss(
    features: Tensor,
    pair_weights: Tensor,
    *,
    temperature: float = 0.07,
    base_temperature: float | None = None,
    normalize: bool = False,
    weights: Tensor | None = None,
    no_positive: str = "zero",
    reduction: str = "mean",
    group: Group = None,
) -> Tensor:
    """Contrastive loss whose positives are weighted by a matrix: similarity graphs (CoMatch), soft masks.

    With rows a = (sample i, view), b = (sample j, view), s_ab = z_a.z_b / temperature:

        loss_a = log sum_{b != a} exp s_ab - sum_{b != a} w_ij s_ab / sum_{b != a} w_ij

    Args:
        features: ``[N, V, D]``, N samples in V views, or ``[M, D]``; rows of norm 1, or ``normalize=True``.
        pair_weights: ``[N, N]``, at least 0, need not be symmetric; ``[i, i]`` weighs the other views of i.
            In a group of ranks ``[N, N of all ranks]``, columns in the order of ranks.
        temperature, base_temperature, normalize, weights, no_positive, reduction: as in
            :func:`clustops.ccssl_loss`.
        group: as in :func:`clustops.ccssl_loss`, with one sum of gradients ``[M, D]`` over ranks.

    Returns:
        A scalar; for "none" ``[N, V]`` (``[M]`` for ``[M, D]``). fp32, fp64 for fp64 features. Gradients go
        to ``features`` only, in its dtype.

    Raises:
        ValueError, TypeError: an argument is not as above. Values are checked on the CPU, on a GPU only under
            ``CLUSTOPS_CHECK_VALUES=1``: there a feature that is not finite, or a weight that is not or is
            negative, makes the loss NaN.
        ClustopsWarning: as :func:`clustops.ccssl_loss`.

    Cost: blocks of scores come from matrix products, 4 to 5 M^2 D flops with gradient on a CPU, 6 on a GPU,
    M = N V; each is read once more, with the weights. :func:`clustops.ccssl_loss` is faster where weights
    come from classes. Autograd keeps the arguments and 4 (M + N) bytes; working memory is O(M D) and a block,
    of 1 MB on a CPU and at most 48 MB on a GPU. Sums accumulate in fp32 within a block, then in fp64. There
    is no second derivative.

    >>> features = torch.eye(3).repeat_interleave(2, 0).view(3, 2, 3)
    >>> weighted_contrastive_loss(features, torch.eye(3), temperature=1.0)  # log(e + 4) - 1
    tensor(0.9048)

    Source: for weights from a graph Li et al., "CoMatch: Semi-Supervised Learning With Contrastive Graph
    Regularization", ICCV 2021.
    """
    with errors_reach_all_ranks(group, features):
        views = check_features(features, group)
        temperature, how = check_reduction(temperature, base_temperature, no_positive, reduction)
        weights = check_weights(weights, views)
        pair_weights = _check_pair_weights(pair_weights, views, group)
    options = Options(temperature, normalize=normalize)
    loss: Tensor = _WeightedLoss.apply(views, pair_weights, weights, options, how, group)
    return loss.reshape(features.shape[:-1]) if reduction == "none" else loss


def _check_pair_weights(pair_weights: Tensor, features: Tensor, group: Group) -> Tensor:
    """``pair_weights``, detached, values unseen; how many samples other ranks have is still unknown."""
    checks.check_floating(pair_weights, "pair_weights")
    n = features.shape[0]
    if pair_weights.ndim != 2 or pair_weights.shape[0] != n or (group is None and pair_weights.shape[1] != n):
        _reject_shape(pair_weights, (n, n))
    checks.check_same_device(pair_weights, "pair_weights", features, "features")
    return pair_weights.detach()


def _reject_shape(pair_weights: Tensor, expected: tuple[int, int]) -> None:
    checks.reject(
        "pair_weights",
        f"[N, N] = {list(expected)} with N = features.shape[0], over all ranks in the columns",
        checks.shape_of(pair_weights),
        "pass weights between samples, not rows",
    )


def _check_values(
    norms: Tensor, features: Tensor, pair_weights: Tensor, options: Options, group: Group
) -> None:
    """Raise, on all ranks alike, if a value is out of range, which the op tells by NaN."""
    if group is not None:
        failed = all_reduce_sum(norms[1].isnan().int(), group)
        norms = torch.where(failed > 0, torch.nan, norms)
    if not checks.values_are_checked(features):
        return
    if bool(norms[1].isnan()):
        checks.check_finite(pair_weights, "pair_weights")
        least = float(pair_weights.min()) if pair_weights.numel() else 0
        if least < 0:
            checks.reject("pair_weights", "at least 0", least, "clamp them: pair_weights.clamp(min=0)")
        checks.check_finite(features, "features")
        if group is not None:
            expected, got = "finite, and pair_weights at least 0, on all ranks", "others on another rank"
            checks.reject("features", expected, got, "look at that rank's message")
    check_values(norms, features, None, options, group)


class _WeightedLoss(torch.autograd.Function):
    """The loss of this rank's anchors against the rows of all ranks, reduced: one node.

    Every rank's loss adds to the gradient of each row, so gradients are summed over ranks, in fp32 at least.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        pair_weights: Tensor,
        weights: Tensor | None,
        options: Options,
        reduction: Reduction,
        group: Group,
    ) -> Tensor:
        own, wide = features, features.dtype if group is None else _wide(features)
        features, counts = all_gather_rows(features.to(wide), group)
        first = sum(counts[: rank(group)])
        if group is not None and pair_weights.shape[1] != features.shape[0]:
            all_reduce_sum(torch.ones((), dtype=torch.int32, device=features.device), group)
            _reject_shape(pair_weights, (own.shape[0], features.shape[0]))
        settings = (first, options.temperature, options.normalize)
        with below_autograd():
            rows, lse, weight, norms = torch.ops.clustops.weighted_contrastive_rows(
                features, pair_weights, *settings
            )
        _check_values(norms, own, pair_weights, options, group)
        scale = row_scale(rows, weight, weights, features.shape[0], reduction, group)
        varying = isinstance(scale, Tensor)
        ctx.save_for_backward(features, pair_weights, lse, weight, scale if varying else None)
        ctx.settings = None if varying else scale, settings, own.dtype, group
        return reduce_rows(rows, scale, reduction)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, varying = ctx.saved_tensors
        scale, settings, dtype, group = ctx.settings
        lse = inputs[2]
        grad = gradients[0].expand(lse.shape) * (varying if scale is None else scale)
        with below_autograd():
            gradient = torch.ops.clustops.weighted_contrastive_rows_backward(grad, *inputs, *settings)
        if group is not None:
            gradient = all_reduce_sum(gradient, group)[settings[0] : settings[0] + lse.shape[0]]
        return gradient.to(dtype), None, None, None, None, None


def _wide(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32
