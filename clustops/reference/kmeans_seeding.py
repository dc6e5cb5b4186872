"""Greedy k-means++ as batched ops.

Rows are drawn by integer potentials: these add up to the same in any order, so draws do not depend on how
rows are cut into chunks or spread over threads and ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kmeans_ops import accumulator, blocks, power_of_two, squared_distances


def integer_scale(bound: Tensor, n: Tensor) -> Tensor:
    """The power of two that makes ``n`` numbers in ``[0, bound]`` integers with a sum below ``2^62``."""
    e = torch.frexp(bound).exponent.to(torch.int64)
    return power_of_two(62 - torch.frexp(n.to(torch.float64)).exponent.to(torch.int64) - e)


def to_integer(values: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    """``round(w v scale)`` as int64, 0 for rows of weight 0; ``[E, N, ..]`` with weights ``[E, N, ..]``."""
    product = values.to(torch.float64) * weights * scale.view(-1, *[1] * (values.ndim - 1))
    return torch.where(weights > 0, product, 0.0).round().to(torch.int64)


def potentials(
    x: Tensor, candidates: Tensor, closest: Tensor, weights: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """What the k-means++ potential would be with each candidate added, and the rows it would move.

    ``p_t = sum_n round(w_n min(closest_n, ||x_n - c_t||^2) scale)``

    Args:
        x: ``[B, N, D]``. candidates: ``[E, T, D]``, ``T <= 32``, ``E`` a multiple of ``B``: a problem's
            entries side by side.
        closest: ``[E, N]`` squared distances to the centroids so far, fp32 (fp64 for fp64 ``x``).
        weights: ``[E, N]`` float64. scale: ``[E]`` float64, from ``integer_scale``.

    Returns:
        ``[E, T]`` int64: integers add up to the same in any order. ``[E, N]`` int32: bit ``t`` is set where
        candidate ``t`` is nearer than ``closest``.
    """
    (_, n, d), (e, t, _) = x.shape, candidates.shape
    result = closest.new_zeros((e, t), dtype=torch.int64)
    improves = closest.new_zeros((e, n), dtype=torch.int32)
    bit = 1 << torch.arange(t, device=x.device)
    for rows in blocks(n, e * (t + d)):
        distances = squared_distances(_entries(x[:, rows], e).to(closest.dtype), candidates.to(closest.dtype))
        before = closest[:, rows].unsqueeze(-1)
        nearer = distances < before
        smaller = torch.where(nearer, distances, before)
        result += to_integer(smaller, weights[:, rows].unsqueeze(-1), scale).sum(1)
        mask = (nearer * bit).sum(-1)
        improves[:, rows] = torch.where(mask < 1 << 31, mask, mask - (1 << 32)).to(torch.int32)
    return result, improves


def closest_(
    closest: Tensor,
    x: Tensor,
    centroid: Tensor,
    improves: Tensor | None = None,
    chosen: Tensor | None = None,
) -> None:
    """Lower ``closest`` to ``||x_n - c||^2`` where that is less.

    Args:
        closest: ``[E, N]``, written. x: ``[B, N, D]``. centroid: ``[E, 1, D]``.
        improves, chosen: ``[E, N]`` from ``potentials``, and ``[E]`` int64, which of its candidates is
            ``centroid``: only rows with that bit are looked at. ``None``: all rows.
    """
    (_, n, d), e = x.shape, centroid.shape[0]
    for rows in blocks(n, e * d):
        distances = squared_distances(_entries(x[:, rows], e).to(closest.dtype), centroid.to(closest.dtype))
        nearer = distances[..., 0] < closest[:, rows]
        if improves is not None and chosen is not None:
            nearer &= (improves[:, rows] >> chosen.unsqueeze(1)) & 1 == 1
        closest[:, rows] = torch.where(nearer, distances[..., 0], closest[:, rows])


def seed(x: Tensor, weights: Tensor, uniform: Tensor, k: int) -> Tensor:
    """Rows to start from, by greedy k-means++.

    The first is drawn in proportion to the weights. A further step draws ``T`` rows in proportion to the
    potential ``w_n closest_n`` and keeps the one that leaves the smallest one, the first drawn of equals.
    Once the potential is 0, which is with fewer distinct rows than ``k``, the first row fills up.

    Args:
        x: ``[B, N, D]``, ``N >= 1``. weights: ``[B, N]`` float64.
        uniform: ``[E, k T]`` float64 in [0, 1), ``E`` a multiple of ``B``: a problem's restarts side by side.
            Step ``s`` uses ``[s T, (s + 1) T)``, the first only the first of them.

    Returns:
        ``[E, k]`` int64 indices of rows.
    """
    b, n, _ = x.shape
    e, t = uniform.shape[0], uniform.shape[1] // max(1, k)
    weights = _entries(weights, e)
    valid = (weights > 0).sum(1)
    closest = x.new_ones((e, n), dtype=accumulator(x.dtype))
    problem = torch.arange(b, device=x.device).repeat_interleave(e // max(1, b)).unsqueeze(1)
    chosen: list[Tensor] = []
    for step in range(k):
        weighted = torch.where(weights > 0, closest.to(torch.float64) * weights, 0.0)
        scale = integer_scale(weighted.amax(1), valid)
        index, total = drawn(to_integer(closest, weights, scale), uniform[:, step * t : (step + 1) * t])
        if step == 0:
            chosen.append(index[:, 0])
            closest.fill_(torch.inf)
            closest_(closest, x, x[problem, index[:, :1]])
            continue
        candidates = x[problem, index]
        after, improves = potentials(x, candidates, closest, weights, scale)
        best = after.argmin(1)
        chosen.append(torch.where(total > 0, index.gather(1, best.unsqueeze(1))[:, 0], chosen[0]))
        closest_(closest, x, x[problem, chosen[-1].unsqueeze(1)], improves, best)
    return torch.stack(chosen, 1) if chosen else valid.new_zeros((e, 0))


def drawn(potential: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Rows drawn with probability proportional to the integer ``potential [E, N]``.

    Args:
        uniform: ``[E, m]`` in [0, 1).

    Returns:
        ``[E, m]`` indices, any in range where the potential is all zero, and the total potential ``[E]``.
    """
    total = potential.sum(1)
    target = (uniform * total.unsqueeze(1)).to(torch.int64).minimum(total.unsqueeze(1) - 1)
    index = torch.searchsorted(potential.cumsum(1), target, right=True)
    return index.clamp(max=potential.shape[1] - 1), total


def _entries(problems: Tensor, e: int) -> Tensor:
    """``[B, ...]`` as ``[E, ...]``, the entries of a problem side by side."""
    return problems.repeat_interleave(e // max(1, problems.shape[0]), 0)
