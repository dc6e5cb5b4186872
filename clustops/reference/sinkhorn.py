"""Sinkhorn assignment and its losses with the signatures of the public functions, in plain PyTorch.

Nothing is checked, ``group`` must be ``None``: one process sees all rows. Autograd differentiates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import sinkhorn_ops as ops


def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    n_iters: int = 3,
    prior: Tensor | None = None,
    weights: Tensor | None = None,
    relax: float | None = None,
    mass: float | None = None,
    tol: float | None = None,
    init: Tensor | None = None,
    queue_scores: Tensor | None = None,
    hard: bool = False,
    gradient: str | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    group: None = None,
    return_potentials: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax_k(s / epsilon + a)`` with the potentials of ``sinkhorn_potentials``."""
    _alone(group)
    constant = scores.detach()
    potentials = _potentials(
        scores if gradient == "unrolled" else constant,
        epsilon=epsilon,
        n_iters=n_iters,
        prior=prior,
        weights=weights,
        relax=relax,
        mass=mass,
        tol=tol,
        init=init,
        queue_scores=queue_scores,
    )
    dtype = dtype or (ops.accumulator(scores.dtype) if out is None else out.dtype)
    assignments = ops.assign_from_potentials(
        constant if gradient is None else scores, potentials, epsilon, hard, dtype
    )
    assignments = assignments if out is None else out.copy_(assignments)
    return (assignments, potentials) if return_potentials else assignments


def sinkhorn_potentials(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    n_iters: int = 3,
    prior: Tensor | None = None,
    weights: Tensor | None = None,
    relax: float | None = None,
    mass: float | None = None,
    tol: float | None = None,
    init: Tensor | None = None,
    queue_scores: Tensor | None = None,
    bound: float | None = None,
    group: None = None,
) -> Tensor:
    """``a = log r - LSE_b(s / epsilon)``, then ``a += log r - log mean_b softmax_k(s / epsilon + a)``."""
    _alone(group)
    return _potentials(
        scores.detach(),
        epsilon=epsilon,
        n_iters=n_iters,
        prior=prior,
        weights=weights,
        relax=relax,
        mass=mass,
        tol=tol,
        init=init,
        queue_scores=queue_scores,
    )


def assign_from_potentials(
    scores: Tensor,
    potentials: Tensor,
    *,
    epsilon: float = 0.05,
    hard: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``softmax_k(s / epsilon + a)`` without the virtual column, or its one-hot argmax."""
    dtype = dtype or (ops.accumulator(scores.dtype) if out is None else out.dtype)
    result = ops.assign_from_potentials(scores.detach(), potentials, epsilon, hard, dtype)
    return result if out is None else out.copy_(result)


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
    group: None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean over assigned views i and views v != i of ``-sum_k q_ik log softmax_k(s_v / temperature)``."""
    _alone(group)
    if weights is not None:
        scores = scores.masked_fill((weights == 0).unsqueeze(-1), 0)
    losses = []
    for a, i in enumerate(assign_views):
        view = scores[i].detach()
        if potentials is not None:
            bias = potentials.expand(len(assign_views), -1)[a]
        else:
            queue = None if queue_scores is None else queue_scores.expand(len(assign_views), -1, -1)[a]
            bias = _potentials(view, epsilon=epsilon, n_iters=n_iters, weights=weights, queue_scores=queue)
        q = ops.assign_from_potentials(
            scores[i].detach(), bias, epsilon, False, ops.accumulator(scores.dtype)
        )
        log_p = torch.log_softmax(scores.to(q.dtype) / temperature, dim=-1)
        losses += [-(q * log_p[v]).sum(-1) for v in range(len(scores)) if v != i]
    return _reduce(torch.stack(losses).mean(0), weights, reduction)


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
    """``-sum_k softmax_k(t / target_temperature + bias) log softmax_k(s / temperature)``."""
    if weights is not None:
        scores = scores.masked_fill((weights == 0).unsqueeze(-1), 0)
        target_scores = target_scores.masked_fill((weights == 0).unsqueeze(-1), 0)
    dtype = ops.accumulator(scores.dtype)
    log_p = torch.log_softmax(scores.to(dtype) / temperature, dim=-1)
    y = target_scores.detach().to(dtype) / target_temperature
    q = torch.softmax(y if bias is None else y + bias.detach().to(dtype).unsqueeze(-2), dim=-1)
    if pairs is not None:
        log_p, q = torch.stack([log_p[v] for v, _ in pairs]), torch.stack([q[a] for _, a in pairs])
    return _reduce(-(q * log_p).sum(-1), weights, reduction)


def sinkhorn_matrix(m: Tensor, *, n_iters: int = 20) -> Tensor:
    """``exp(m)`` with columns, then rows, divided by their sums ``n_iters`` times; rows once if that is 0."""
    return ops.matrix_steps(m, n_iters)[-1][0].exp().to(m.dtype)


def _alone(group: None) -> None:
    if group is not None:
        raise ValueError("group must be None, got a process group; gather the rows first: all_gather_rows")


def _potentials(
    scores: Tensor,
    *,
    epsilon: float,
    n_iters: int,
    prior: Tensor | None = None,
    weights: Tensor | None = None,
    relax: float | None = None,
    mass: float | None = None,
    tol: float | None = None,
    init: Tensor | None = None,
    queue_scores: Tensor | None = None,
) -> Tensor:
    """The op on ``[..., B, K]``; rows of the other arguments are shared or one for each problem."""
    leading = scores.shape[:-2]
    problems = scores.reshape(-1, *scores.shape[-2:])

    def spread(given: Tensor | None) -> Tensor | None:
        return None if given is None else given.expand(*leading, -1).reshape(-1, given.shape[-1])

    queue = queue_scores
    if queue is not None:
        queue = queue.detach().expand(*leading, *queue.shape[-2:]).reshape(-1, *queue.shape[-2:])
    result = ops.sinkhorn_potentials(
        problems,
        queue,
        spread(prior),
        spread(weights),
        spread(init),
        epsilon,
        n_iters,
        relax,
        mass,
        tol,
        None,
    )
    return result.reshape(*leading, result.shape[-1])


def _reduce(losses: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    weights = losses.new_ones(()) if weights is None else weights.to(losses.dtype)
    weighted = weights * losses
    if reduction == "none":
        return weighted
    return weighted.sum() if reduction == "sum" else weighted.sum() / weights.expand(losses.shape).sum()
