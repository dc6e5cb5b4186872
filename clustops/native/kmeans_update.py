"""clustops::kmeans_sums_, kmeans_means and what else the update of k-means takes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import kmeans_ops as ops
from . import extension, register
from . import kmeans_steps_cpu as cpu
from . import kmeans_steps_cuda as cuda


def _fake_bounds(x: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2] + 1), dtype=torch.float64)


def _fake_sums(
    sums: Tensor,
    counts: Tensor,
    x: Tensor,
    labels: Tensor,
    weights: Tensor,
    grid: Tensor,
    before: Tensor | None = None,
) -> None:
    return None


def _fake_means(sums: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(previous, memory_format=torch.contiguous_format), sums.new_empty(sums.shape[:1])


def _fake_counts(labels: Tensor, weights: Tensor, k: int) -> Tensor:
    return labels.new_empty((labels.shape[0], k))


def _fake_cluster_means(x: Tensor, labels: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    b, _, d = x.shape
    return x.new_empty((b, k, d), dtype=ops.accumulator(x.dtype)), labels.new_empty((b, k))


def _cluster_means(x: Tensor, labels: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``ops.cluster_means`` by the kernels of its steps."""
    (b, n, d), step = x.shape, torch.ops.clustops
    grid = ops.units(step.kmeans_bounds(x, weights), (weights > 0).sum(1))
    total, occupied = x.new_zeros((b, 2, k, d + 1), dtype=torch.float64), labels.new_zeros((b, k))
    step.kmeans_sums_(total, occupied, x, labels, weights, grid)
    means, _ = step.kmeans_means(total, x.new_zeros((b, k, d), dtype=ops.accumulator(x.dtype)))
    return means, step.kmeans_counts(labels, weights.new_ones(()).expand(b, n), k)


_cpu = hasattr(extension, "kmeans_sums")
_cuda = hasattr(extension, "kmeans_sums_cuda")

register(
    "kmeans_bounds(Tensor x, Tensor weights) -> Tensor",
    reference=ops.bounds,
    fake=_fake_bounds,
    cpu=cpu.bounds if _cpu else None,
    cuda=cuda.bounds if _cuda else None,
)
register(
    "kmeans_sums_(Tensor(a!) sums, Tensor(b!) counts, Tensor x, Tensor labels, Tensor weights, Tensor grid, "
    "Tensor? before=None) -> ()",
    reference=ops.sums_,
    fake=_fake_sums,
    cpu=cpu.sums_ if _cpu else None,
    cuda=cuda.sums_ if _cuda else None,
)
register(
    "kmeans_means(Tensor sums, Tensor previous) -> (Tensor means, Tensor shift)",
    reference=ops.means,
    fake=_fake_means,
    cpu=cpu.means if _cpu else None,
    cuda=cuda.means if _cuda else None,
)
register(
    "kmeans_counts(Tensor labels, Tensor weights, SymInt k) -> Tensor",
    reference=ops.counts,
    fake=_fake_counts,
    cpu=cpu.counts if _cpu else None,
    cuda=cuda.counts if _cuda else None,
)
register(
    "cluster_means(Tensor x, Tensor labels, Tensor weights, SymInt k) -> (Tensor means, Tensor counts)",
    reference=ops.cluster_means,
    fake=_fake_cluster_means,
    cpu=_cluster_means if _cpu else None,
    cuda=_cluster_means if _cuda else None,
)
