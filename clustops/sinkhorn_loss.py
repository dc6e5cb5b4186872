"""Cross-entropy against targets that are softmaxes themselves: SwAV, Suave, DINO, Daino."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import (
    check_choice,
    check_count,
    check_floating,
    check_positive,
    check_same_device,
    reject,
    shape_of,
    values_are_checked,
)
from .distributed import Group, all_reduce_max, all_reduce_sum, check_group, world_size
from .native import sinkhorn_loss as _registration  # noqa: F401
from .sinkhorn_solve import (
    Problems,
    Settings,
    as_problems,
    check_counted,
    check_potentials,
    check_scores,
    check_settings,
    check_solved,
    prototype_row,
    queue_problems,
    row_weights,
    solve,
)

_REDUCTIONS = ("mean", "sum", "none")


def swapped_prediction_loss(
    scores: Tensor,
    *,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    n_iters: int = 3,
    assign_views: Sequence[int] = (0, 1),
    queue_scores: Tensor | None = None,
    potentials: Tensor | None = None,
    weights: Tensor | None = None,
    group: Group = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of predicting the Sinkhorn assignment of a view from the other views of the same samples.

    With ``q_i = softmax_k(s_i / epsilon + a_i)`` for each view i of ``assign_views``::

        loss_b = mean over i, mean over views v != i of  -sum_k q_ibk log softmax_k(s_vb / temperature)

    Gradient ``(p - q) / temperature`` through the predictions, none through ``q``.

    Args:
        scores: ``[V, B, K]``, V >= 2 views of B samples against K prototypes; fp32, bf16, fp16 or fp64.
        temperature: of the predictions, above 0.
        epsilon, n_iters: of the assignments, see :func:`sinkhorn_potentials`; each view is its own problem.
        assign_views: the A views that give assignments, without repetition; usually the global crops.
        queue_scores: ``[A, N, K]``, or ``[N, K]`` for all of them: scores of further rows that take part in
            the assignment, not in the loss. N may be 0. With ``group``, this rank's share of the queue.
        potentials: ``[A, K]`` or ``[K]``: ``a_i``, in place of Sinkhorn.
        weights: ``[B]``, at least 0, in assignment and loss: 0 masks a sample (which may hold anything).
        group: a process group whose ranks hold different samples, of any number. The mean of the result over
            ranks, as DistributedDataParallel averages gradients, is then the loss of the joint batch.
        reduction: ``"mean"`` over samples, weighted; ``"sum"``; or ``"none"`` for ``weights * loss_b [B]``.

    Returns:
        A number, or ``[B]``, fp32 (fp64 for fp64 scores). 0 if no sample counts.

    Raises:
        ValueError, TypeError: an argument is out of range, has a wrong shape or dtype, or lies on another
            device.

    Cost: ``n_iters`` passes over the assigned views and one over all views, then one in the backward pass,
    for which the scores and O(V B) numbers are kept. ``assign_views`` that do not follow
    each other copy the assigned views. Sums in fp32 (fp64 for fp64 scores).

    >>> swapped_prediction_loss(torch.eye(4).expand(2, 4, 4))
    tensor(0.0001)

    Source: Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments",
    NeurIPS 2020.
    """
    check_group(group)
    check_positive(temperature, "temperature", "0.1 is usual")
    settings = check_settings(Settings(epsilon, n_iters))
    check_choice(reduction, "reduction", _REDUCTIONS)
    check_floating(scores, "scores")
    if scores.ndim != 3 or scores.shape[0] < 2:
        reject(
            "scores", "[V, B, K] with at least 2 views", shape_of(scores), "stack views: torch.stack(views)"
        )
    weights = row_weights(weights, scores[0], group)
    check_scores(scores, "scores", group)
    _check_views(assign_views, scores.shape[0])
    assigned = _take(scores.detach(), assign_views)
    if potentials is None:
        queue = queue_problems(queue_scores, assigned, group)
        seen = None if weights is None else weights.expand(assigned.shape[:2])
        problems = Problems(assigned, queue, weights=seen)
        bias = solve(problems, group, settings, axes=" (scores are [views, B, K])")
        check_solved(bias, problems._replace(scores=scores, weights=weights), group)
    elif queue_scores is not None:
        reject(
            "queue_scores",
            "None where potentials are given",
            "both",
            "a queue only serves to find potentials",
        )
    else:
        bias = _bias(potentials, "potentials", assigned)
    pairs = [(v, a) for a, i in enumerate(assign_views) for v in range(scores.shape[0]) if v != i]
    losses = _losses(scores, assigned, bias, pairs, temperature, epsilon)
    _check_losses(losses, weights, group, scores=scores)
    return _reduce(losses.mean(0), weights, group, reduction)


def soft_cross_entropy(
    scores: Tensor,
    target_scores: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float,
    target_temperature: float,
    pairs: Sequence[tuple[int, int]] | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the softmax of ``scores`` against the biased softmax of ``target_scores``.

    ``loss_b = -sum_k softmax_k(t_b / target_temperature + bias) log softmax_k(s_b / temperature)``, with
    gradient ``(p - q) / temperature`` to ``scores`` and to nothing else. Centering as in DINO is
    ``bias = -center / target_temperature``; Sinkhorn targets are ``bias = sinkhorn_potentials(...)`` with
    ``target_temperature = epsilon``.

    Args:
        scores: ``[..., B, K]``, or ``[V, B, K]`` with ``pairs``; fp32, bf16, fp16 or fp64.
        target_scores: the shape of ``scores``, or ``[A, B, K]`` with ``pairs``; any floating dtype.
        bias: ``[K]`` or ``[..., K]`` with the leading dimensions of ``target_scores``; ``None`` is 0. -inf
            takes a prototype out of the targets.
        temperature, target_temperature: above 0.
        pairs: (view, target) indices: ``scores[view]`` is compared with ``target_scores[target]``. DINO
            compares each student view with each other teacher view:
            ``[(v, t) for t in range(2) for v in range(V) if v != t]``. ``None`` compares row by row.
        weights: ``[B]``, at least 0: 0 masks a row (which may hold anything), without ``pairs`` also
            ``[..., B]``.
        reduction: ``"mean"`` over all rows and pairs, weighted; ``"sum"``; or ``"none"`` for
            ``weights * loss_b``, ``[..., B]``, with ``pairs`` ``[len(pairs), B]``.

    Returns:
        A number or the losses of the rows, fp32 (fp64 for fp64 scores). 0 if no row counts.

    Raises:
        ValueError, TypeError: an argument is out of range, has a wrong shape or dtype, or lies on another
            device.

    Cost: one pass over both score tensors forward, one backward; they are kept for the backward pass, the
    targets are not. Sums in fp32 (fp64 for fp64 scores).

    >>> scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> soft_cross_entropy(scores, scores, temperature=0.1, target_temperature=0.04)
    tensor(4.5418e-05)

    Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021.
    """
    check_positive(temperature, "temperature", "0.1 is usual")
    check_positive(target_temperature, "target_temperature", "0.04 to 0.07 is usual")
    check_choice(reduction, "reduction", _REDUCTIONS)
    check_floating(scores, "scores")
    check_floating(target_scores, "target_scores")
    check_same_device(target_scores, "target_scores", scores, "scores")
    if pairs is not None:
        _check_pairs(pairs, scores, target_scores)
    elif target_scores.shape != scores.shape:
        reject("target_scores", f"{shape_of(scores)} like scores", shape_of(target_scores), "or pass pairs")
    weights = row_weights(weights, scores if pairs is None else scores[0], None)
    check_scores(scores, "scores", None)
    check_scores(target_scores, "target_scores", None)
    if bias is None:
        bias = target_scores.new_zeros(target_scores.shape[-1])
    bias = _bias(bias, "bias", target_scores)
    targets = as_problems(target_scores.detach())
    losses = _losses(as_problems(scores), targets, bias, pairs, temperature, target_temperature)
    losses = losses if pairs else losses.view(scores.shape[:-1])
    _check_losses(losses, weights, None, scores=scores, target_scores=target_scores)
    return _reduce(losses, weights, None, reduction)


def _bias(row: Tensor, name: str, target_scores: Tensor) -> Tensor:
    """``row`` as a checked ``[A, K]``, one for each target problem."""
    row = prototype_row(row, name, target_scores)
    check_potentials(row, name)
    return row.expand(as_problems(target_scores).shape[0], -1)


def _losses(
    scores: Tensor,
    target_scores: Tensor,
    bias: Tensor,
    pairs: Sequence[tuple[int, int]] | None,
    temperature: float,
    target_temperature: float,
) -> Tensor:
    views, targets = zip(*pairs, strict=True) if pairs else ((), ())
    losses: Tensor = torch.ops.clustops.soft_cross_entropy(
        scores, target_scores, bias, views, targets, temperature, target_temperature
    )[0]
    return losses


def _check_losses(losses: Tensor, weights: Tensor | None, group: Group, **scores: Tensor) -> None:
    """Raise if scores were not finite: looked for only where a loss is NaN, to spare a pass.

    An error on one rank alone would leave the others waiting for its gradients, so all ranks raise.
    """
    if not values_are_checked(losses):
        return
    bad = losses.detach().isnan()
    if weights is not None:
        bad = bad & (weights > 0)
    if not bool(all_reduce_max(bad.any().float(), group)):
        return
    for name, given in scores.items():
        check_counted(given, name, weights)
    if group is not None:
        reject("scores", "finite on all ranks", "others on another rank", "look at that rank's message")


def _reduce(losses: Tensor, weights: Tensor | None, group: Group, reduction: str) -> Tensor:
    """Reduce ``losses [..., B]``; ``weights`` broadcast; a row of weight 0 leaves no trace, NaN included."""
    if weights is not None:
        losses = torch.where(weights > 0, weights * losses, 0)
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    counted = losses.detach().new_ones(losses.shape) if weights is None else weights.expand(losses.shape)
    count = all_reduce_sum(counted.sum(), group) / world_size(group)
    return total / count.clamp_min(torch.finfo(count.dtype).tiny)


def _check_views(assign_views: Sequence[int], n_views: int) -> None:
    if not hasattr(assign_views, "__len__"):
        got = type(assign_views).__name__
        reject("assign_views", "a sequence of view numbers such as (0, 1)", got, "list the views", TypeError)
    if len(assign_views) == 0 or len(set(assign_views)) != len(assign_views):
        reject(
            "assign_views",
            "one or more different views",
            tuple(assign_views),
            "pass the global crops: (0, 1)",
        )
    for view in assign_views:
        check_count(view, "assign_views", 0, "count views from 0")
        if view >= n_views:
            reject("assign_views", f"below V = {n_views}", view, "count views from 0")


def _check_pairs(pairs: Sequence[tuple[int, int]], scores: Tensor, target_scores: Tensor) -> None:
    if scores.ndim != 3:
        reject("scores", "[V, B, K] with pairs", shape_of(scores), "stack the views: torch.stack(views)")
    if target_scores.ndim != 3 or target_scores.shape[1:] != scores.shape[1:]:
        expected = "[A, " + ", ".join(map(str, scores.shape[1:])) + "] with pairs"
        reject("target_scores", expected, shape_of(target_scores), "stack the views: torch.stack(views)")
    if len(pairs) == 0:
        reject("pairs", "one or more (view, target)", "none", "pass None to compare row by row")
    for pair in pairs:
        for index, n in zip(pair, (scores.shape[0], target_scores.shape[0]), strict=True):
            check_count(index, "pairs", 0, "count views and targets from 0")
            if index >= n:
                reject("pairs", f"indices below {n}", index, "count views and targets from 0")


def _take(scores: Tensor, views: Sequence[int]) -> Tensor:
    """``scores[views]``, without a copy where they follow each other."""
    first, n = views[0], len(views)
    if list(views) == list(range(first, first + n)):
        return scores[first : first + n]
    return torch.stack([scores[v] for v in views])
