"""The kernels behind Sinkhorn assignment and its losses, obviously right: plain PyTorch, any device.

Scores here are ``[P, B, K]``: problems, rows, prototypes. One potential per prototype carries the whole plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 input, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scaled(scores: Tensor, epsilon: float, columns: int) -> Tensor:
    """``scores / epsilon``, with the zero-score virtual column when ``columns`` is K + 1."""
    z = scores.to(accumulator(scores.dtype)) / epsilon
    return F.pad(z, (0, columns - z.shape[-1]))


def poison(scores: Tensor) -> Tensor:
    """0 for each row of finite scores, NaN for the others: ``[..., B, K]`` to ``[..., B]``."""
    return (scores.detach() * 0).sum(-1).to(accumulator(scores.dtype))


def with_queue(scores: Tensor, queue: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows ``[P, B, K]`` and those of a queue, ``[P, N, K]``, which have weight 1, as rows of one kind."""
    if queue is None:
        return scores, weights
    if weights is not None:
        weights = torch.cat([weights, weights.new_ones(queue.shape[:2])], dim=1)
    return torch.cat([scores, queue.to(scores.dtype)], dim=1), weights


def column_log_mass(
    scores: Tensor,
    queue: Tensor | None,
    weights: Tensor | None,
    potentials: Tensor,
    epsilon: float,
    normalized: bool,
) -> Tensor:
    """``log sum_b w_b softmax_k(s/eps + a)``; without the softmax's normaliser when ``normalized`` is false.

    Args:
        scores: ``[P, B, K]``. queue: ``[P, N, K]``, further rows of weight 1, or ``None``.
        weights: ``[P, B]`` of the scores, or ``None`` for ones.
        potentials: ``a [P, K]``, or ``[P, K + 1]`` with a virtual column. normalized: whether rows sum to 1.

    Returns:
        ``[P, K]`` or ``[P, K + 1]``; -inf where no row counts or the potential is -inf. All NaN where a score
        of positive weight is not finite.
    """
    scores, weights = with_queue(scores, queue, weights)
    if weights is not None:
        scores = scores.masked_fill((weights == 0).unsqueeze(-1), 0)
    z = scaled(scores, epsilon, potentials.shape[-1])
    z = z + potentials.unsqueeze(-2)
    if normalized:
        z = torch.log_softmax(z, dim=-1)
    if weights is not None:
        z = z + weights.to(z.dtype).log().unsqueeze(-1)
    # The derivative of logsumexp over nothing but -inf is NaN, so such columns are filled in after.
    absent = potentials == -math.inf
    log_mass = z.masked_fill(absent.unsqueeze(-2), 0).logsumexp(dim=-2).masked_fill(absent, -math.inf)
    return log_mass + poison(scores).sum(-1, keepdim=True)


def log_prior(scores: Tensor, prior: Tensor | None, mass: float | None) -> Tensor:
    """``log r [P, K]``, uniform unless given; with ``mass``, ``[P, K + 1]`` of ``rho r`` and ``1 - rho``."""
    dtype = accumulator(scores.dtype)
    r = scores.new_ones(scores.shape[0], scores.shape[-1], dtype=dtype) if prior is None else prior.to(dtype)
    r = r / r.sum(-1, keepdim=True)
    if mass is not None:
        r = torch.cat([mass * r, torch.full_like(r[..., :1], 1 - mass)], dim=-1)
    return r.log()


def iterate(
    column_mass: Callable[[Tensor, int], Tensor],
    log_r: Tensor,
    init: Tensor | None,
    *,
    epsilon: float,
    n_iters: int,
    relax: float | None,
    mass: float | None,
    tol: float | None,
) -> Tensor:
    """``T`` updates ``a <- fi (a + log r - log m)`` from the column masses ``m`` of the current plan.

    ``fi = relax / (relax + eps)`` is 1 when balanced, and always 1 for the virtual column.

    Args:
        column_mass: ``(a, t) -> log m`` up to a constant, as ``column_log_mass`` gives it; not normalised in
            step 0 of a cold start.
        log_r: ``[P, K]``, or ``[P, K + 1]`` with ``mass``.
        init: potentials to start from, or ``None``.

    Returns:
        ``a``, the shape of ``log_r``.
    """
    fi = torch.full_like(log_r, 1.0 if relax is None or relax == math.inf else relax / (relax + epsilon))
    if mass is not None:
        fi[..., -1] = 1.0
    potentials = torch.zeros_like(log_r) if init is None else init.to(log_r.dtype, copy=True)
    never = (log_r == -math.inf) | (potentials == -math.inf)
    log_r = log_r.masked_fill(never, 0)
    active = torch.ones_like(log_r[..., :1], dtype=torch.bool)
    for t in range(n_iters):
        log_mass = column_mass(potentials, t)
        counted = (log_mass != -math.inf).any(-1, keepdim=True)  # false only where all weights are 0
        cold = init is None and t == 0
        if not cold:
            log_mass = log_mass - log_mass.logsumexp(-1, keepdim=True)
        elif mass is not None:
            # The virtual column's scores are 0, so its mass is the number of rows.
            log_mass = log_mass - log_mass[..., -1:]
        log_mass, current = log_mass.masked_fill(never, 0), potentials.masked_fill(never, 0)
        updated = fi * (current + log_r - log_mass)
        if tol is not None and not cold:
            moved = ((log_mass + updated - current).exp() - log_mass.exp()).masked_fill(never, 0)
            active = ~(moved.detach().abs().sum(-1, keepdim=True) <= tol)  # a NaN goes on
        potentials = torch.where(active & counted, updated.masked_fill(never, -math.inf), potentials)
        if (
            tol is not None
            and active.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and not active.any()
        ):
            break
    return potentials


def sinkhorn_potentials(
    scores: Tensor,
    queue: Tensor | None,
    prior: Tensor | None,
    weights: Tensor | None,
    init: Tensor | None,
    epsilon: float,
    n_iters: int,
    relax: float | None,
    mass: float | None,
    tol: float | None,
    bound: float | None,
) -> Tensor:
    """The potentials ``a`` after ``n_iters`` column updates; ``bound`` is only a hint and changes nothing.

    Args:
        scores: ``[P, B, K]``. queue: ``[P, N, K]``, further rows of weight 1. prior: ``[P, K]``.
        weights: ``[P, B]``. init: ``[P, K]``, with ``mass`` ``[P, K + 1]``.

    Returns:
        ``[P, K]``, with ``mass`` ``[P, K + 1]``, in fp32 (fp64 for fp64 scores). NaN, once there was an
        update, where a score of positive weight is not finite.
    """

    def column_mass(potentials: Tensor, t: int) -> Tensor:
        return column_log_mass(scores, queue, weights, potentials, epsilon, init is not None or t > 0)

    return iterate(
        column_mass,
        log_prior(scores, prior, mass),
        init,
        epsilon=epsilon,
        n_iters=n_iters,
        relax=relax,
        mass=mass,
        tol=tol,
    )


def sinkhorn_(
    out: Tensor,
    scores: Tensor,
    queue: Tensor | None,
    prior: Tensor | None,
    weights: Tensor | None,
    init: Tensor | None,
    epsilon: float,
    n_iters: int,
    relax: float | None,
    mass: float | None,
    tol: float | None,
    hard: bool,
) -> Tensor:
    """Writes ``assign_from_potentials`` of ``sinkhorn_potentials`` to ``out [P, B, K]``; the potentials."""
    potentials = sinkhorn_potentials(
        scores, queue, prior, weights, init, epsilon, n_iters, relax, mass, tol, None
    )
    assign_from_potentials_(out, scores, potentials, epsilon, hard)
    return potentials


def assign_from_potentials_(
    out: Tensor, scores: Tensor, potentials: Tensor, epsilon: float, hard: bool
) -> None:
    """Writes ``assign_from_potentials`` to ``out``, ``[P, B, K]`` of any floating dtype."""
    out.copy_(assign_from_potentials(scores, potentials, epsilon, hard, out.dtype))


def assign_from_potentials(
    scores: Tensor, potentials: Tensor, epsilon: float, hard: bool, dtype: torch.dtype
) -> Tensor:
    """``softmax_k(s/eps + a)``, or its one-hot argmax; the virtual column is dropped.

    Args:
        scores: ``[P, B, K]``. potentials: ``[P, K]`` or ``[P, K + 1]``.

    Returns:
        ``[P, B, K]``; a row with a score that is not finite is all NaN.
    """
    k = scores.shape[-1]
    z = scaled(scores, epsilon, potentials.shape[-1]) + potentials.to(accumulator(scores.dtype)).unsqueeze(-2)
    q = F.one_hot(z.argmax(-1), potentials.shape[-1]) if hard else torch.softmax(z, dim=-1)
    return (q[..., :k] + poison(scores).unsqueeze(-1)).to(dtype).contiguous()


def pair_indices(scores: Tensor, views: Sequence[int], targets: Sequence[int]) -> list[tuple[int, int]]:
    """(row of scores, row of targets) of each compared pair; no list means that row p goes with row p."""
    if not views:
        return [(p, p) for p in range(scores.shape[0])]
    return list(zip(views, targets, strict=True))


def soft_cross_entropy(
    scores: Tensor,
    target_scores: Tensor,
    bias: Tensor,
    views: Sequence[int],
    targets: Sequence[int],
    temperature: float,
    target_temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``-sum_k softmax_k(t/target_temperature + bias) log softmax_k(s/temperature)`` of each pair and row.

    Args:
        scores: ``s [V, B, K]``. target_scores: ``t [A, B, K]``. bias: ``[A, K]``.
        views, targets: pair n compares ``scores[views[n]]`` with ``target_scores[targets[n]]``; empty lists
            pair row p with row p.

    Returns:
        losses ``[N, B]``, NaN where a score is not finite, and the log-normalisers of both softmaxes,
        ``[V, B]`` and ``[A, B]``.
    """
    dtype = accumulator(scores.dtype)
    x = scores.to(dtype) / temperature
    y = target_scores.to(dtype) / target_temperature + bias.to(dtype).unsqueeze(-2)
    log_p, q = torch.log_softmax(x, dim=-1), torch.softmax(y, dim=-1)
    finite, finite_targets = poison(scores), poison(target_scores).to(dtype)
    losses = [
        -(q[a] * log_p[v]).sum(-1) + finite[v] + finite_targets[a]
        for v, a in pair_indices(scores, views, targets)
    ]
    return torch.stack(losses), x.logsumexp(-1), y.logsumexp(-1)


def soft_cross_entropy_backward(
    gradient: Tensor,
    scores: Tensor,
    target_scores: Tensor,
    bias: Tensor,
    score_normalizers: Tensor,
    target_normalizers: Tensor,
    views: Sequence[int],
    targets: Sequence[int],
    temperature: float,
    target_temperature: float,
) -> Tensor:
    """``sum over pairs of gradient (p - q) / temperature``, in the dtype of the scores.

    A row whose upstream gradient is 0 gets 0 whatever its scores are, NaN included.

    Args:
        gradient: ``[N, B]`` of the losses; the normalisers are those that the forward returned.
    """
    dtype = accumulator(scores.dtype)
    p = (scores.to(dtype) / temperature - score_normalizers.unsqueeze(-1)).exp()
    y = target_scores.to(dtype) / target_temperature + bias.to(dtype).unsqueeze(-2)
    q = (y - target_normalizers.unsqueeze(-1)).exp()
    result = torch.zeros_like(p)
    for (v, a), g in zip(pair_indices(scores, views, targets), gradient.to(dtype).unsqueeze(-1), strict=True):
        result[v] += torch.where(g == 0, 0, g * (p[v] - q[a]))
    return (result / temperature).to(scores.dtype)


def sinkhorn_matrix(m: Tensor, n_iters: int) -> Tensor:
    """``exp(m)`` with columns, then rows, divided by their sums ``n_iters`` times; rows once if that is 0.

    Args:
        m: ``[P, n, n]``.
    """
    return matrix_steps(m, n_iters)[-1][0].exp().to(m.dtype)


def sinkhorn_matrix_backward(gradient: Tensor, m: Tensor, n_iters: int) -> Tensor:
    """The gradient of ``m``: each step ``y = x - LSE(x)`` in reverse, ``g_x = g_y - exp(y) sum(g_y)``."""
    steps = matrix_steps(m, n_iters)
    g = gradient.to(steps[-1][0].dtype) * steps[-1][0].exp()
    for y, dim in reversed(steps):
        g = g - y.exp() * g.sum(dim, keepdim=True)
    return g.to(m.dtype)


def matrix_steps(m: Tensor, n_iters: int) -> list[tuple[Tensor, int]]:
    """The logarithm of the matrix after each division, with the dimension that was summed."""
    y = m.to(accumulator(m.dtype))
    steps = []
    for dim in [-2, -1] * n_iters or [-1]:
        y = torch.log_softmax(y, dim)
        steps.append((y, dim))
    return steps
