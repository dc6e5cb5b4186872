"""Lloyd's iteration over a batch of entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .kmeans_repair import move_sums, relocate, relocation_scores, split
from .kmeans_rows import Assigned, Rows, repeat
from .kmeans_select import int64
from .native.kmeans_iterate import fits
from .reference.kmeans import KMeansProgress
from .reference.kmeans_iterate import unit_means
from .reference.kmeans_ops import squared_shift, unit_rows

Report = Callable[[KMeansProgress], None]


class Fit(NamedTuple):
    """Where the iteration ended; all but ``centroids [E, K, D]`` are ``[E]``."""

    centroids: Tensor
    n_iter: Tensor
    converged: Tensor
    n_repaired: Tensor


class _Step(NamedTuple):
    """One iteration: new centroids, their squared shift, what was assigned, found empty and repaired."""

    centroids: Tensor
    shift: Tensor
    assigned: Assigned
    n_empty: Tensor
    n_repaired: Tensor


def mean_variance(rows: Rows) -> Tensor:
    """Weighted variance of the features, mean over features: ``[B]``."""
    together = torch.zeros((), dtype=torch.int64, device=rows.device).expand(rows.batch, rows.n)
    sums = rows.sum_labels(together, 1)
    nowhere = torch.zeros((rows.batch, 1, rows.d), dtype=rows.dtype, device=rows.device)
    mean, _ = torch.ops.clustops.kmeans_means(sums, nowhere)
    mass = sums[:, :, 0, -1].sum(1)
    return rows.total(rows.distances_to(mean)) / (mass * rows.d)


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
    x = _small(rows, centroids, empty) if tolerance is None and report is None and max_iter > 0 else None
    if x is not None:
        centroids, _, repaired, still = torch.ops.clustops.kmeans_iterate(
            x, centroids, rows.weights, rows.grid, max_iter, rows.metric == "cosine", empty, int64(seed)
        )
        return Fit(centroids, torch.full_like(repaired, max_iter), still == 1, repaired)
    active = torch.ones(e, dtype=torch.bool, device=rows.device)
    still = ~active
    n_iter = torch.zeros(e, dtype=torch.int64, device=rows.device)
    n_repaired = n_iter
    assigned = None
    for iteration in range(max_iter):
        step = _step(rows, centroids, assigned, empty, seed, iteration, look)
        moved, shift, assigned, n_empty, repaired = step
        if tolerance is not None:
            moved = torch.where(active.view(-1, 1, 1), moved, centroids)
            shift, repaired = torch.where(active, shift, 0.0), torch.where(active, repaired, 0)
        centroids = moved
        n_iter, n_repaired = n_iter + active, n_repaired + repaired
        if report is not None:
            progress = KMeansProgress(iteration, rows.total(assigned.distances), shift, n_empty, repaired)
            report(progress)
        still = shift <= (0.0 if tolerance is None else tolerance)
        if tolerance is not None:
            active = active & ~still
            if look and not bool(active.any()):
                break
        elif look and bool(((shift == 0) & (repaired == 0)).all()):
            # Nothing moved, so what is left would repeat this iteration.
            if report is not None:
                for again in range(iteration + 1, max_iter):
                    report(replace(progress, iteration=again))
            n_iter = torch.full_like(n_iter, max_iter)
            break
    return Fit(centroids, n_iter, still if tolerance is None else ~active, n_repaired)


def _small(rows: Rows, centroids: Tensor, empty: str) -> Tensor | None:
    """All rows, where one op does all iterations of small problems; ``None`` elsewhere."""
    x = rows.at_once() if empty in ("split", "keep") else None
    return x if x is not None and fits(x, centroids, rows.metric == "cosine") else None


def _step(
    rows: Rows,
    centroids: Tensor,
    before: Assigned | None,
    empty: str,
    seed: int,
    iteration: int,
    look: bool,
) -> _Step:
    assigned = rows.assign_and_sum(centroids, before)
    labels, distances, sums, counts = assigned
    n_empty = (counts == 0).sum(1)
    repaired = torch.zeros_like(n_empty)
    act = empty != "keep" and not (look and not bool(n_empty.any()))
    if act and empty != "split":
        score = relocation_scores(rows, distances, empty, seed, iteration)
        cluster, index, _ = relocate(rows, labels, distances, counts, score)
        sums, counts = move_sums(rows, labels, cluster, index, sums, counts)
        repaired = (index >= 0).sum(1)
    means, shift = torch.ops.clustops.kmeans_means(sums, centroids)
    if rows.metric == "cosine":
        means = unit_means(means, centroids)
    if act and empty == "split":
        means, child = split(rows, labels, distances, means, counts, seed, iteration)
        repaired = (child < counts.shape[1]).sum(1)
        if rows.metric == "cosine":
            means = unit_rows(means)
    if rows.metric == "cosine" or act:
        shift = squared_shift(means, centroids)
    return _Step(means, shift, assigned, n_empty, repaired)


def leading(progress: KMeansProgress, batch: int) -> KMeansProgress:
    """Of each problem's restarts, the one with the lowest inertia so far: entries ``[B * R]`` to ``[B]``."""
    best = progress.inertia.view(batch, -1).argmin(1, keepdim=True)
    fields = (progress.inertia, progress.shift, progress.n_empty, progress.n_repaired)
    return KMeansProgress(progress.iteration, *(f.view(batch, -1).gather(1, best).squeeze(1) for f in fields))


def expand_tolerance(rows: Rows, tol: float, restarts: int) -> Tensor | None:
    """scikit-learn's rule: ``tol`` times the mean variance of the features; ``None`` for 0."""
    return None if tol == 0 else repeat(tol * mean_variance(rows), restarts)
