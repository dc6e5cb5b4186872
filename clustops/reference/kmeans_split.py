"""Empty clusters split off others, as batched ops."""

from __future__ import annotations

import torch
from torch import Tensor

from .kmeans_ops import SPLIT, draw

# How far a split moves the two centroids, as a part of the way to the donor's farthest row.
STEP = 2.0**-5

NOWHERE = torch.iinfo(torch.int64).min


def split(
    means: Tensor, farthest: Tensor, counts: Tensor, seed: int, restarts: int, iteration: int
) -> tuple[Tensor, Tensor]:
    """Empty clusters next to the centroids of others, one child a donor.

    Each empty cluster draws a donor with probability proportional to ``count - 1``; of several that drew the
    same donor the first gets it. The two centroids stand ``mean +- STEP (farthest row - mean)``: some rows
    are on either side, because the projections on that direction have mean zero and are not all zero. A donor
    all of whose rows are equal has no such direction and is not drawn.

    Args:
        means: ``[E, K, D]``. counts: ``[E, K]``.
        farthest: ``[E, K, D]``, of each cluster the row farthest from the centroid that it was assigned to.
        seed, restarts, iteration: of the draws; entry ``e`` is restart ``e % restarts`` of its problem.

    Returns:
        centroids ``[E, K, D]`` and ``[E, K]`` the child of each donor, K for the others.
    """
    e, k = counts.shape
    cluster = torch.arange(k, device=counts.device)
    uniform = torch.stack([draw(seed, SPLIT, r, iteration, cluster) for r in range(restarts)])
    uniform = uniform.repeat(e // restarts, 1)
    direction = farthest - means
    divisible = (counts > 1) & (direction != 0).any(-1)
    tickets = torch.where(divisible, counts - 1, 0).cumsum(1)
    total = tickets[:, -1:]
    target = (uniform * total).to(torch.int64).minimum(total - 1)
    donor = torch.searchsorted(tickets, target, right=True).clamp(max=k - 1)
    wants = torch.where((counts == 0) & (total > 0), cluster, k)
    child = torch.full_like(counts, k).scatter_reduce(1, donor, wants, "amin")

    up, down = means + STEP * direction, means - STEP * direction
    # Where the step is lost in rounding the child takes the whole way.
    lost = (up == down).all(-1, keepdim=True)
    up, down = torch.where(lost, means + direction, up), torch.where(lost, means, down)
    centroids = torch.where((child < k).unsqueeze(-1), down, means)
    return replace(centroids, child, up), child


def replace(centroids: Tensor, cluster: Tensor, new: Tensor) -> Tensor:
    """``centroids [E, K, D]`` with ``new [E, m, D]`` at ``cluster [E, m]``; an entry of K goes nowhere."""
    padded = torch.nn.functional.pad(centroids, (0, 0, 0, 1))
    return padded.scatter(1, cluster.unsqueeze(-1).expand_as(new), new)[:, :-1].contiguous()


def highest(score: Tensor, labels: Tensor, weights: Tensor, k: int) -> Tensor:
    """The highest ``score [E, N]`` of each cluster's rows of positive weight: ``[E, k]``, -inf for none."""
    score = torch.where((weights > 0) & (labels >= 0), score, -torch.inf)
    best = score.new_full((score.shape[0], k), -torch.inf)
    return best.scatter_reduce(1, labels.clamp(min=0), score, "amax")


def places(score: Tensor, labels: Tensor, weights: Tensor, best: Tensor, offset: int, last: bool) -> Tensor:
    """Where each cluster's rows of positive weight have the score ``best [E, K]``.

    Returns:
        ``[E, K]`` int64, the largest of ``n + offset`` for ``last``, of ``-(n + offset)`` if not; ``NOWHERE``
        where there is no such row.
    """
    bucket = labels.clamp(min=0)
    position = torch.arange(score.shape[1], device=score.device) + offset
    found = (weights > 0) & (labels >= 0) & (score == best.gather(1, bucket))
    place = torch.where(found, position if last else -position, NOWHERE)
    return torch.full_like(best, NOWHERE, dtype=torch.int64).scatter_reduce(1, bucket, place, "amax")
