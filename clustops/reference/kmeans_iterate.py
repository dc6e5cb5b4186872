"""Whole iterations of k-means as one batched op."""

from __future__ import annotations

import torch
from torch import Tensor

from .kmeans_ops import assign_l2, means, squared_shift, sums_, unit_rows
from .kmeans_split import highest, places, split


def iterate(
    x: Tensor,
    centroids: Tensor,
    weights: Tensor,
    grid: Tensor,
    iterations: int,
    cosine: bool,
    empty: str,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assign, average and split empty clusters, a fixed number of times.

    Args:
        x: ``[B, N, D]``, of norm 1 for ``cosine``. centroids: ``[E, K, D]`` with ``E`` a multiple of ``B``, a
            problem's restarts side by side.
        weights: ``[B, N]`` float64. grid: ``[B, 2, D + 1]``, from ``units``.
        iterations: at least 1.
        cosine: centroids keep norm 1. empty: ``"split"`` or ``"keep"``.

    Returns:
        centroids ``[E, K, D]``, fp32 (fp64 for fp64 ``x``); the labels of the last assignment ``[E, N]``; and
        ``[E]`` int64: how many clusters were split, and 1 where the last iteration moved nothing.
    """
    (e, k, d), n = centroids.shape, x.shape[1]
    restarts = max(1, e // max(1, x.shape[0]))
    x, weights, grid = (t.repeat_interleave(restarts, 0) for t in (x, weights, grid))
    sums, counts = x.new_zeros((e, 2, k, d + 1), dtype=torch.float64), x.new_zeros((e, k), dtype=torch.int64)
    before, repaired = None, x.new_zeros(e, dtype=torch.int64)
    for iteration in range(iterations):
        labels, distances = (t[..., 0] for t in assign_l2(x, centroids, 1))
        sums_(sums, counts, x, labels, weights, grid, before)
        moved, shift = means(sums, centroids)
        if cosine:
            moved = unit_means(moved, centroids)
        if empty == "split":
            best = highest(distances, labels, weights, k)
            farthest = (-places(distances, labels, weights, best, 0, False)).clamp(0, max(0, n - 1))
            rows = x.gather(1, farthest.unsqueeze(-1).expand(-1, -1, d)).to(moved.dtype)
            moved, child = split(moved, rows, counts, seed, restarts, iteration)
            moved = unit_rows(moved) if cosine else moved
            repaired = repaired + (child < k).sum(1)
        shift = squared_shift(moved, centroids)
        centroids, before = moved, labels
    return centroids, labels, repaired, (shift <= 0).to(torch.int64)


def unit_means(means: Tensor, previous: Tensor) -> Tensor:
    """``means`` of norm 1; where opposite rows cancel, the previous one stays."""
    return torch.where((means != 0).any(-1, keepdim=True), unit_rows(means), previous)
