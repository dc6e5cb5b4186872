"""k-means as its definition reads: one problem at a time, one row after the other where order matters.

Same names and signatures as the public functions, in the dtype of the input (fp64 when asked). All rows are
in one process and ``N K D`` numbers fit in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kmeans_ops import PLUS_PLUS, RANDOM_ROWS, accumulator, assign_l2, draw, squared_distances, unit_rows
from .kmeans_repair import repair_empty_clusters, repair_step, settle

__all__ = [
    "KMeansProgress",
    "KMeansResult",
    "assign_l2",
    "cluster_means",
    "kmeans",
    "kmeans_assign",
    "kmeans_plus_plus",
    "repair_empty_clusters",
]


@dataclass(frozen=True)
class KMeansProgress:
    """One iteration, as a callback sees it. Tensors have one entry for each problem, none for a single one.

    Attributes:
        iteration: from 0.
        inertia: weighted sum of squared distances to the centroids that the iteration began with.
        shift: sum of the squared moves of the centroids.
        n_empty: clusters found empty.
        n_repaired: how many of those were given a new centroid.
    """

    iteration: int
    inertia: Any
    shift: Any
    n_empty: Any
    n_repaired: Any


@dataclass(frozen=True)
class KMeansResult:
    """What k-means found; ``..`` is ``B`` for a batch and nothing for one problem.

    Attributes:
        centroids: ``[.., K, D]``, fp32 (fp64 for fp64 input).
        labels: ``[.., N]`` int64, the nearest of ``centroids``, ties to the lowest index; -1 past a length.
        counts: ``[.., K]`` int64, ``bincount(labels)``.
        inertia: ``[..]`` float64, ``sum_n w_n ||x_n - c_label(n)||^2``.
        n_iter: ``[..]`` int64.
        converged: ``[..]`` bool, whether the centroids stood still within ``tol``.
        n_repaired: ``[..]`` int64, empty clusters given a new centroid, over all iterations.
        n_empty: ``[..]`` int64, clusters without a row of positive weight.
    """

    centroids: Any
    labels: Any
    counts: Any
    inertia: Any
    n_iter: Any
    converged: Any
    n_repaired: Any
    n_empty: Any


def kmeans(
    x: Tensor,
    k: int,
    *,
    weights: Tensor | None = None,
    lengths: Tensor | None = None,
    metric: str = "l2",
    init: str | Tensor = "k-means++",
    n_init: int = 1,
    max_iter: int = 25,
    tol: float = 1e-4,
    empty: str = "split",
    precision: str | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    group: None = None,
    callback: Callable[[KMeansProgress], None] | None = None,
    progress: bool = False,
) -> KMeansResult:
    """``clustops.kmeans``, one problem after the other.

    ``empty="faiss"`` is the rule of faiss, which reports what it leaves empty. A callback sees the problems
    and restarts in turn. ``group`` must be ``None``; ``precision`` and ``progress`` change nothing.
    """
    if group is not None:
        raise ValueError("group must be None, got a process group; the reference runs in one process")
    x = x.detach() if device is None else x.detach().to(device)
    problems = x if x.ndim == 3 else x.unsqueeze(0)
    results = []
    for b, rows in enumerate(problems):
        n = rows.shape[0] if lengths is None else int(lengths[b])
        w = rows.new_ones(n, dtype=torch.float64)
        if weights is not None:
            w = (weights if x.ndim == 2 else weights[b])[:n].to(rows.device, torch.float64)
        start = init if isinstance(init, str) or x.ndim == 2 else init[b]
        starts = n_init if isinstance(start, str) else 1
        fits = [
            _one(rows[:n], w, k, metric, start, max_iter, tol, empty, seed, restart, callback)
            for restart in range(starts)
        ]
        best = min(fits, key=lambda fit: float(fit.inertia))
        padding = best.labels.new_full((rows.shape[0] - n,), -1)
        results.append({**vars(best), "labels": torch.cat([best.labels, padding])})
    stacked = {name: torch.stack([r[name] for r in results]) for name in results[0]}
    return KMeansResult(**(stacked if x.ndim == 3 else results[0]))


def _one(
    x: Tensor,
    w: Tensor,
    k: int,
    metric: str,
    init: str | Tensor,
    max_iter: int,
    tol: float,
    empty: str,
    seed: int,
    restart: int,
    callback: Callable[[KMeansProgress], None] | None,
) -> KMeansResult:
    """One problem from one start. Rows of weight 0 are taken out and get a label in the end."""
    everything = x = unit_rows(x) if metric == "cosine" else x.to(accumulator(x.dtype))
    x, w = x[w > 0], w[w > 0]
    if isinstance(init, Tensor):
        centroids = init.detach().to(x)
    else:
        centroids = (_greedy if init == "k-means++" else _random)(x, w, k, seed, restart)
    if metric == "cosine":
        centroids = unit_rows(centroids)
    mean = (w.unsqueeze(1) * x.double()).sum(0) / w.sum()
    variance = (w.unsqueeze(1) * (x.double() - mean).square()).sum() / (w.sum() * x.shape[1])
    n_iter, converged, n_repaired = 0, False, 0
    while n_iter < max_iter and not (converged and tol > 0):
        labels, distances = _nearest(x, centroids)
        step = repair_step(x, w, labels, distances, centroids, empty, metric, (seed, restart, n_iter))
        shift = (step.centroids.double() - centroids.double()).square().sum()
        if callback is not None:
            inertia = (w * distances.double()).sum()
            counts = torch.tensor([step.n_empty, step.n_repaired])
            callback(KMeansProgress(n_iter, inertia, shift, counts[0], counts[1]))
        centroids = step.centroids
        n_iter, n_repaired = n_iter + 1, n_repaired + step.n_repaired
        converged = bool(shift <= tol * variance)
    if empty not in ("keep", "faiss"):
        centroids, more = settle(x, centroids)
        n_repaired += more
    labels, distances = _nearest(x, centroids)
    all_labels = _nearest(everything, centroids)[0]
    return KMeansResult(
        centroids,
        all_labels,
        torch.bincount(all_labels, minlength=k),
        (w * distances.double()).sum(),
        torch.tensor(n_iter),
        torch.tensor(converged),
        torch.tensor(n_repaired),
        (torch.bincount(labels, minlength=k) == 0).sum(),
    )


def _nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    labels, distances = assign_l2(x.unsqueeze(0), centroids.unsqueeze(0), 1)
    return labels[0, :, 0], distances[0, :, 0]


def kmeans_assign(
    x: Tensor, centroids: Tensor, *, metric: str = "l2", precision: str | None = None, top: int = 1
) -> tuple[Tensor, Tensor]:
    """``clustops.kmeans_assign``: all distances, sorted. ``precision`` changes nothing."""
    if metric == "cosine":
        x, centroids = unit_rows(x), unit_rows(centroids)
    dtype = accumulator(x.dtype)
    distances, labels = squared_distances(x.to(dtype), centroids.to(dtype)).sort(dim=-1, stable=True)
    if top == 1:
        return labels[..., 0], distances[..., 0]
    return labels[..., :top], distances[..., :top]


def cluster_means(
    x: Tensor, labels: Tensor, k: int, *, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``clustops.cluster_means``: a mean for each label, zeros where there is none."""
    if x.ndim == 3:
        each = [
            cluster_means(x[b], labels[b], k, weights=None if weights is None else weights[b])
            for b in range(x.shape[0])
        ]
        return torch.stack([m for m, _ in each]), torch.stack([c for _, c in each])
    w = torch.ones(x.shape[0], dtype=torch.float64) if weights is None else weights.double()
    means = x.new_zeros((k, x.shape[1]), dtype=torch.float64)
    for j in range(k):
        mine = (labels == j) & (w > 0)
        if mine.any():
            means[j] = (w[mine].unsqueeze(1) * x[mine].double()).sum(0) / w[mine].sum()
    return means.to(accumulator(x.dtype)), torch.bincount(labels[labels >= 0], minlength=k)


def kmeans_plus_plus(x: Tensor, k: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
    """``clustops.kmeans_plus_plus``: greedy k-means++, one draw after the other."""
    if x.ndim == 3:
        each = [None] * x.shape[0] if weights is None else list(weights)
        return torch.stack(
            [kmeans_plus_plus(p, k, weights=w, seed=seed) for p, w in zip(x, each, strict=True)]
        )
    w = torch.ones(x.shape[0], dtype=torch.float64) if weights is None else weights.double()
    return _greedy(x.to(accumulator(x.dtype)), w, k, seed, 0)


def _greedy(x: Tensor, w: Tensor, k: int, seed: int, restart: int) -> Tensor:
    """Arthur and Vassilvitskii 2007, with the best of ``2 + log k`` draws in each step."""
    trials = 2 + int(math.log(k))
    uniform = draw(seed, PLUS_PLUS, restart, 0, torch.arange(k * trials)).view(k, trials)
    first = _drawn(w, uniform[0, :1])
    centroids = x[first]
    for step in range(1, k):
        closest = squared_distances(x, centroids).amin(1)
        potential = w * closest
        if potential.sum() == 0:
            centroids = torch.cat([centroids, x[first]])
            continue
        candidates = _drawn(potential, uniform[step])
        after = torch.minimum(closest.unsqueeze(1), squared_distances(x, x[candidates])).double()
        total = (w.unsqueeze(1) * after).sum(0)
        # Two candidates nearest to each other leave the same potential, up to rounding: the first drawn wins.
        best = candidates[(total <= total.min() * (1 + 1e-12)).int().argmax()]
        centroids = torch.cat([centroids, x[best].unsqueeze(0)])
    return centroids


def _drawn(weight: Tensor, uniform: Tensor) -> Tensor:
    """Indices with probability proportional to ``weight``, by its running sum."""
    cumulative = weight.double().cumsum(0)
    index = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
    return index.clamp(max=int((weight > 0).nonzero().max()))


def _random(x: Tensor, w: Tensor, k: int, seed: int, restart: int) -> Tensor:
    """``k`` distinct rows: those with the highest random numbers."""
    score = draw(seed, RANDOM_ROWS, restart, 0, torch.arange(x.shape[0]))
    index = score.sort(descending=True, stable=True).indices[:k]
    return x[torch.cat([index, index[:1].expand(k - index.numel())])]
