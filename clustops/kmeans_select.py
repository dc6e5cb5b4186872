"""Choosing rows of all ranks: the extreme of each cluster, the first by a score, random ones.

Indices and draws do not depend on how the rows are spread over ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .distributed import all_gather_rows, all_reduce_max
from .kmeans_rows import Rows, largest, repeat
from .native import kmeans_iterate as _iterate  # noqa: F401  (registers the ops)
from .reference.kmeans_seeding import integer_scale, to_integer
from .reference.kmeans_split import NOWHERE


def int64(seed: int) -> int:
    """``seed`` mod 2^64, as an op takes it."""
    return (seed + 2**63) % 2**64 - 2**63


def draws(position: Tensor, seed: int, use: int, restarts: int, iteration: int = 0) -> Tensor:
    """Uniform float64 numbers ``[B * restarts, M]`` for ``[B, M]`` positions, another stream a restart."""
    uniform: Tensor = torch.ops.clustops.kmeans_draws(position, int64(seed), use, restarts, iteration)
    return uniform


def ordinals(rows: Rows) -> Tensor:
    """How many rows of positive weight come before each row: ``[B, N]``."""
    valid = (rows.weights > 0).to(torch.int64)
    before, _ = rows.before(valid.sum(1))
    return valid.cumsum(1) - valid + before.unsqueeze(1)


def extreme_members(
    rows: Rows, score: Tensor, labels: Tensor, k: int, *, last: bool = False
) -> tuple[Tensor, Tensor]:
    """The highest ``score [E, N]`` in each cluster and the index of the first (or last) row that has it.

    Returns:
        ``[E, K]`` scores, -inf where a cluster has no row of positive weight, and indices, -1 there.
    """
    weights = repeat(rows.weights, rows.copies(labels))
    best = torch.ops.clustops.kmeans_highest(score, labels, weights, k)
    best = all_reduce_max(best, rows.group)
    place = torch.ops.clustops.kmeans_places(score, labels, weights, best, rows.offset, last)
    place = all_reduce_max(place, rows.group)
    return best, torch.where(place == NOWHERE, -1, place if last else -place)


def top_rows(rows: Rows, score: Tensor, m: int) -> Tensor:
    """Indices ``[E, m]`` of the rows with the highest ``score [E, N]``, ties to the lowest index.

    Rows of score -inf are not taken; -1 stands where fewer are left.
    """
    best, order = score.sort(dim=1, descending=True, stable=True)
    best, order = best[:, :m].T, (order[:, :m] + rows.offset).T
    best, _ = all_gather_rows(best.contiguous(), rows.group)
    order, _ = all_gather_rows(order.contiguous(), rows.group)
    best, again = best.sort(dim=0, descending=True, stable=True)
    index = torch.where(best > -torch.inf, order.gather(0, again), -1)[:m].T
    return torch.nn.functional.pad(index, (0, m - index.shape[1]), value=-1)


def integer_potential(rows: Rows, values: Tensor) -> tuple[Tensor, Tensor]:
    """``w_n v_n`` as integers ``[E, N]`` whose sum stays below 2^62, and their scale ``[E]``."""
    copies = rows.copies(values)
    weights = repeat(rows.weights, copies)
    weighted = torch.where(weights > 0, values.to(torch.float64) * weights, 0.0)
    bound = all_reduce_max(largest(weighted), rows.group)
    scale = integer_scale(bound, repeat(rows.n_valid, copies))
    return to_integer(values, weights, scale), scale


def pick(rows: Rows, potential: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw rows with probability proportional to the integer ``potential [E, N]``.

    Args:
        potential: from ``integer_potential``.
        uniform: ``[E, m]`` in [0, 1).

    Returns:
        ``[E, m]`` indices, -1 where the potential is all zero, and the total potential ``[E]``.
    """
    before, total = rows.before(potential.sum(1))
    target = (uniform * total.unsqueeze(1)).to(torch.int64).minimum(total.unsqueeze(1) - 1)
    cumulative = potential.cumsum(1)
    local = target - before.unsqueeze(1)
    place = torch.searchsorted(cumulative, local, right=True)
    owned = (local >= 0) & (place < rows.n)
    index = torch.where(owned, place + rows.offset, -1)
    return all_reduce_max(index, rows.group), total
