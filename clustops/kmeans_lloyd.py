"""Lloyd's iteration over a batch of entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .kmeans_repair import move_sums, relocate, relocation_scores, split
from .kmeans_rows import Rows, repeat
from .reference.kmeans import KMeansProgress
from .reference.kmeans_ops import SPLIT, draw, means_of, unit_rows

Report = Callable[[KMeansProgress], None]


class Fit(NamedTuple):
    """Where the iteration ended; all but ``centroids [E, K, D]`` are ``[E]``."""

    centroids: Tensor
    n_iter: Tensor
    converged: Tensor
    n_repaired: Tensor


def mean_variance(rows: Rows) -> Tensor:
    """Weighted variance of the features, mean over features: ``[B]``."""
    zero = torch.zeros((rows.batch, 1, rows.d), dtype=rows.dtype, device=rows.device)
    sums = rows.assign_and_sum(zero)[2]
    mass = (sums[:, 0] + sums[:, 1])[:, 0, -1]
    _, distances = rows.assign(means_of(sums, zero))
    return rows.total(distances) / (mass * rows.d)


def lloyd(
    rows: Rows,
    centroids: Tensor,
    *,
    max_iter: int,
    tolerance: Tensor | None,
    empty: str,
    seed: int,
    look: bool,
    report: Report | None,
) -> Fit:
    """Assign, average, repair, until the centroids of all entries stand still.

    Args:
        centroids: ``[E, K, D]``.
        tolerance: ``[E]``, the largest total squared shift that counts as standing still; ``None`` runs all
            ``max_iter`` iterations. An entry that stands still does not move again while others go on.
        look: whether the host may wait for the device.
    """
    e = centroids.shape[0]
    active = torch.ones(e, dtype=torch.bool, device=rows.device)
    still = ~active
    n_iter = torch.zeros(e, dtype=torch.int64, device=rows.device)
    n_repaired = n_iter
    for iteration in range(max_iter):
        moved, inertia, n_empty, repaired = _step(
            rows, centroids, empty, seed, iteration, look, report is not None
        )
        moved = torch.where(active.view(-1, 1, 1), moved, centroids)
        repaired = torch.where(active, repaired, 0)
        shift = (moved.double() - centroids.double()).square().sum(-1).sum(-1)
        centroids = moved
        n_iter, n_repaired = n_iter + active, n_repaired + repaired
        if report is not None:
            report(KMeansProgress(iteration, inertia, shift, n_empty, repaired))
        still = shift <= (0.0 if tolerance is None else tolerance)
        if tolerance is not None:
            active = active & ~still
            if look and not bool(active.any()):
                break
    return Fit(centroids, n_iter, still if tolerance is None else ~active, n_repaired)


def _step(
    rows: Rows, centroids: Tensor, empty: str, seed: int, iteration: int, look: bool, with_inertia: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One iteration: new centroids, inertia before it, clusters found empty, and how many were repaired."""
    labels, distances, sums, counts = rows.assign_and_sum(centroids)
    n_empty = (counts == 0).sum(1)
    repaired = torch.zeros_like(n_empty)
    act = empty != "keep" and not (look and not bool(n_empty.any()))
    if act and empty != "split":
        score = relocation_scores(rows, distances, empty, seed, iteration)
        cluster, index, _ = relocate(rows, labels, distances, counts, score)
        sums, counts = move_sums(rows, labels, cluster, index, sums, counts)
        repaired = (index >= 0).sum(1)
    means = means_of(sums, centroids)
    if rows.metric == "cosine":
        # Opposite rows may cancel; a centroid without a direction keeps the one it had.
        means = torch.where((means != 0).any(-1, keepdim=True), unit_rows(means), centroids)
    if act and empty == "split":
        k, restarts = counts.shape[1], rows.copies(counts)
        position = torch.arange(k, device=rows.device)
        uniform = torch.stack([draw(seed, SPLIT, r, iteration, position) for r in range(restarts)])
        means, child = split(rows, labels, distances, means, counts, uniform.repeat(rows.batch, 1))
        repaired = (child < k).sum(1)
        if rows.metric == "cosine":
            means = unit_rows(means)
    inertia = rows.total(distances) if with_inertia else distances.new_zeros(centroids.shape[0])
    return means, inertia, n_empty, repaired


def leading(progress: KMeansProgress, batch: int) -> KMeansProgress:
    """Of each problem's restarts, the one with the lowest inertia so far: entries ``[B * R]`` to ``[B]``."""
    best = progress.inertia.view(batch, -1).argmin(1, keepdim=True)
    fields = (progress.inertia, progress.shift, progress.n_empty, progress.n_repaired)
    return KMeansProgress(progress.iteration, *(f.view(batch, -1).gather(1, best).squeeze(1) for f in fields))


def expand_tolerance(rows: Rows, tol: float, restarts: int) -> Tensor | None:
    """scikit-learn's rule: ``tol`` times the mean variance of the features; ``None`` for 0."""
    return None if tol == 0 else repeat(tol * mean_variance(rows), restarts)
