"""Where k-means starts: greedy k-means++ or distinct random rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kmeans_rows import Rows, repeat
from .kmeans_select import draws, integer_potential, ordinals, pick, top_rows
from .reference.kmeans_ops import PLUS_PLUS, RANDOM_ROWS


def trials(k: int) -> int:
    """How many candidates greedy k-means++ compares in each step."""
    return 2 + int(math.log(k))


def random_rows(rows: Rows, k: int, *, seed: int, restarts: int) -> Tensor:
    """``k`` distinct rows of positive weight for each restart, every set equally likely: ``[E, K, D]``.

    Where a problem has fewer rows than that, its first choice fills up.
    """
    score = draws(ordinals(rows), seed, RANDOM_ROWS, restarts)
    index = top_rows(rows, torch.where(repeat(rows.weights, restarts) > 0, score, -torch.inf), k)
    return rows.take(torch.where(index >= 0, index, index[:, :1]))


def plus_plus(rows: Rows, k: int, *, seed: int, restarts: int) -> Tensor:
    """Greedy k-means++ for each restart: ``[E, K, D]``.

    A step draws ``trials(k)`` rows with probability proportional to the weighted squared distance to the
    centroids so far, and keeps the one that leaves the smallest potential. With nothing left to draw (fewer
    distinct rows than ``k``) the first centroid fills up.
    """
    t = trials(k)
    position = torch.arange(k * t, device=rows.device).unsqueeze(0)
    uniform = draws(position, seed, PLUS_PLUS, restarts).repeat(rows.batch, 1)
    x = rows.at_once()
    if x is not None:
        return rows.take(torch.ops.clustops.kmeans_seed(x, rows.weights, uniform, k))
    weight_only, _ = integer_potential(rows, torch.ones_like(repeat(rows.weights, restarts)))
    index, _ = pick(rows, weight_only, uniform[:, :1])
    first = rows.take(index)
    chosen, closest = [first], rows.distances_to(first)
    for step in range(1, k):
        potential, scale = integer_potential(rows, closest)
        index, total = pick(rows, potential, uniform[:, step * t : (step + 1) * t])
        candidates = rows.take(index)
        after, improves = rows.potentials(candidates, closest, scale)
        best = after.argmin(1)
        winner = candidates.gather(1, best.view(-1, 1, 1).expand(-1, 1, rows.d))
        new = torch.where(total.view(-1, 1, 1) > 0, winner, first)
        chosen.append(new)
        rows.lower(closest, new, improves, best)
    return torch.cat(chosen, dim=1)
