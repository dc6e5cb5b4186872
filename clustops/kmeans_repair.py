"""What happens to empty clusters.

A cluster is empty when it has no row of positive weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .kmeans_rows import Rows, repeat
from .kmeans_select import draws, extreme_members, int64, ordinals, top_rows
from .reference.kmeans_ops import RELOCATE
from .reference.kmeans_split import replace


def split(
    rows: Rows,
    labels: Tensor,
    distances: Tensor,
    means: Tensor,
    counts: Tensor,
    seed: int,
    iteration: int,
) -> tuple[Tensor, Tensor]:
    """Empty clusters next to the centroids of others, one child a donor, as ``clustops::kmeans_split`` does.

    Args:
        labels, distances: ``[E, N]``, the assignment behind ``means [E, K, D]`` and ``counts [E, K]``.

    Returns:
        centroids ``[E, K, D]`` and ``[E, K]`` the child of each donor, K for the others.
    """
    _, farthest = extreme_members(rows, distances, labels, counts.shape[1])
    halves: tuple[Tensor, Tensor] = torch.ops.clustops.kmeans_split(
        means, rows.take(farthest), counts, int64(seed), rows.copies(counts), iteration
    )
    return halves


def relocate(
    rows: Rows, labels: Tensor, distances: Tensor, counts: Tensor, score: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that become clusters of their own: those with the highest ``score [E, N]``, first row first.

    A row at its centroid is not taken, nor is the last row of a cluster (the one nearest its centroid stays).

    Returns:
        ``[E, K]``: the i-th empty cluster and the row it gets, K and -1 where there is none; and the new
        ``labels [E, N]``.
    """
    k = counts.shape[1]
    _, keeper = extreme_members(rows, -distances, labels, k, last=True)
    kept = keeper.gather(1, labels.clamp(min=0)) == rows.positions()
    valid = (repeat(rows.weights, rows.copies(labels)) > 0) & (labels >= 0)
    index = top_rows(rows, torch.where(valid & ~kept & (distances > 0), score, -torch.inf), k)
    empty = empty_first(counts)
    used = (index >= 0) & (empty < k)
    cluster, index = torch.where(used, empty, k), torch.where(used, index, -1)
    return cluster, index, rows.put_values(labels, index, cluster)


def move_sums(
    rows: Rows, labels: Tensor, cluster: Tensor, index: Tensor, sums: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """``sums`` and ``counts`` after the rows ``index`` left the clusters of ``labels`` for ``cluster``."""
    k = counts.shape[1]
    taken, old = rows.take(index), rows.take_values(labels, index)
    weights = rows.take_values(repeat(rows.weights, rows.copies(labels)), index)
    sums, counts = sums.clone(), counts.clone()
    rows.add_rows(sums, counts, taken, torch.where(cluster < k, cluster, -1), weights, old)
    return sums, counts


class Settled(NamedTuple):
    """The final centroids ``[E, K, D]`` and what belongs to them.

    Labels and distances are ``[E, N]``, counts (rows of positive weight) ``[E, K]``, ``n_repaired`` ``[E]``.
    """

    centroids: Tensor
    labels: Tensor
    distances: Tensor
    counts: Tensor
    n_repaired: Tensor


def settle(rows: Rows, centroids: Tensor, *, rounds: int, look: bool) -> Settled:
    """The final assignment, repaired until no cluster is empty that need not be.

    Each round the farthest rows, at most one of each cluster, become the centroids of empty clusters, and all
    rows are assigned anew. An empty cluster owns no row, so nothing moves away from its centroid, and each
    round at least one more distinct row has a centroid exactly on it: no more than ``K`` rounds. With fewer
    distinct rows than clusters this ends with every row on a centroid and the surplus empty.

    Args:
        rounds: at most so many; ``K`` always suffice.
        look: stop early, which asks the host.
    """
    k = centroids.shape[1]
    repaired = torch.zeros(centroids.shape[0], dtype=torch.int64, device=centroids.device)
    labels, distances = rows.assign(centroids)
    counts = rows.count(labels, k)
    for _ in range(rounds):
        if look and not bool((counts == 0).any()):
            break
        best, farthest = extreme_members(rows, distances, labels, k)
        best, donor = torch.where(counts > 1, best, 0.0).sort(dim=1, descending=True, stable=True)
        empty = empty_first(counts)
        used = (best > 0) & (empty < k)
        if look and not bool(used.any()):
            break
        index = torch.where(used, farthest.gather(1, donor), -1)
        centroids = replace(centroids, torch.where(used, empty, k), rows.take(index))
        repaired = repaired + used.sum(1)
        labels, distances = rows.assign(centroids)
        counts = rows.count(labels, k)
    return Settled(centroids, labels, distances, counts, repaired)


def relocation_scores(rows: Rows, distances: Tensor, policy: str, seed: int, iteration: int) -> Tensor:
    """By what ``relocate`` chooses: the distance for ``"farthest"``, random numbers for ``"random"``."""
    if policy == "farthest":
        return distances
    return draws(ordinals(rows), seed, RELOCATE, rows.copies(distances), iteration)


def split_rounds(
    rows: Rows, labels: Tensor, centroids: Tensor, counts: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rounds of ``split`` in which each row of a donor goes to the nearer of donor and child.

    They end when no cluster is empty, or nothing is left to split.

    Returns:
        labels, centroids, counts and how many clusters were repaired, ``[E]``.
    """
    k = counts.shape[1]
    empty = (counts == 0).sum(1)
    for iteration in range(k):
        if not bool((counts == 0).any()):
            break
        means, _ = torch.ops.clustops.kmeans_means(rows.sum_labels(labels, k), centroids)
        own = rows.own_distances(labels, means)
        halves, child = split(rows, labels, own, means, counts, seed, iteration)
        donates = (child < k).unsqueeze(-1)
        if not bool(donates.any()):
            break
        centroids = torch.where(replace(donates, child, donates), halves, centroids)

        its_child = child.gather(1, labels.clamp(min=0))
        to_donor = rows.own_distances(labels, halves)
        to_child = rows.own_distances(its_child.clamp(max=k - 1), halves)
        nearer = (to_child < to_donor) | ((to_child == to_donor) & (its_child < labels))
        labels = torch.where((labels >= 0) & (its_child < k) & nearer, its_child, labels)
        counts = rows.count(labels, k)
    return labels, centroids, counts, empty - (counts == 0).sum(1)


def empty_first(counts: Tensor) -> Tensor:
    """The empty clusters in ascending order, then K for the rest: ``[E, K]``."""
    k = counts.shape[1]
    cluster = torch.arange(k, device=counts.device).expand_as(counts)
    return torch.where(counts == 0, cluster, k).sort(dim=1).values
