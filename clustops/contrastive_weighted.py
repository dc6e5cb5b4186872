"""The contrastive loss under any weights between samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .contrastive_rows import check_features, check_reduction, check_weights, reduce_rows, row_scale
from .distributed import Group, all_gather_rows, all_reduce_sum, rank
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
            ``CLUSTOPS_CHECK_VALUES=1``.

    Cost: 8 M^2 D + 6 N^2 D flops, M = N V, with gradient: use :func:`clustops.ccssl_loss` where weights come
    from classes. Autograd keeps the arguments and 4 M bytes; working memory is O(M D) and two blocks of at
    most max(16 MB, 256 M bytes).

    >>> features = torch.eye(3).repeat_interleave(2, 0).view(3, 2, 3)
    >>> weighted_contrastive_loss(features, torch.eye(3), temperature=1.0)  # log(e + 4) - 1
    tensor(0.9048)

    Source: for weights from a graph Li et al., "CoMatch: Semi-Supervised Learning With Contrastive Graph
    Regularization", ICCV 2021.
    """
    views = check_features(features, group)
    checks.check_finite(views, "features")
    temperature, how = check_reduction(temperature, base_temperature, no_positive, reduction)
    weights = check_weights(weights, views)
    first = 0
    if group is not None:
        # fp32, for gradients are summed over ranks.
        wide = views if views.dtype == torch.float64 else views.float()
        views, first = _RowsOfAllRanks.apply(wide, group)
    pair_weights = _check_pair_weights(pair_weights, features, views)
    rows, _, weight = torch.ops.clustops.weighted_contrastive_rows(
        views, pair_weights, first, temperature, normalize
    )
    loss = reduce_rows(rows, row_scale(rows, weight, weights, views.shape[0], how, group), how)
    return loss.reshape(features.shape[:-1]) if reduction == "none" else loss


def _check_pair_weights(pair_weights: Tensor, features: Tensor, views: Tensor) -> Tensor:
    """``pair_weights``, detached."""
    checks.check_floating(pair_weights, "pair_weights")
    pair_weights = pair_weights.detach()
    expected = (features.shape[0], views.shape[0])
    if pair_weights.ndim != 2 or pair_weights.shape != expected:
        checks.reject(
            "pair_weights",
            f"[N, N] = {list(expected)} with N = features.shape[0], over all ranks in the columns",
            checks.shape_of(pair_weights),
            "pass weights between samples, not rows",
        )
    checks.check_same_device(pair_weights, "pair_weights", features, "features")
    checks.check_finite(pair_weights, "pair_weights")
    if checks.values_are_checked(pair_weights) and pair_weights.numel():
        least = float(pair_weights.min())
        if least < 0:
            checks.reject("pair_weights", "at least 0", least, "clamp them: pair_weights.clamp(min=0)")
    return pair_weights


class _RowsOfAllRanks(torch.autograd.Function):
    """Rows of all ranks and where this rank's begin; every rank's loss adds to the gradient of each row."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, group: Group) -> tuple[Tensor, int]:
        everyone, counts = all_gather_rows(features, group)
        first = sum(counts[: rank(group)])
        ctx.group, ctx.own = group, slice(first, first + features.shape[0])
        return everyone, first

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(gradients[0], ctx.group)[ctx.own], None
