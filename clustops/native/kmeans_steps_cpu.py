"""The steps of k-means other than the assignment on a CPU: results and workspace, calls of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import kmeans_ops as ops
from . import dense_rows, extension, view


def bounds(x: Tensor, weights: Tensor) -> Tensor:
    """``clustops::kmeans_bounds``."""
    result = x.new_empty((x.shape[0], x.shape[2] + 1), dtype=torch.float64)
    extension.kmeans_bounds(view(dense_rows(x)), view(weights), view(result), torch.get_num_threads())
    return result


def sums_(
    sums: Tensor,
    counts: Tensor,
    x: Tensor,
    labels: Tensor,
    weights: Tensor,
    grid: Tensor,
    before: Tensor | None = None,
) -> None:
    """``clustops::kmeans_sums_``."""
    total, number = sums.contiguous(), counts.contiguous()
    extension.kmeans_sums(
        view(total),
        view(number),
        view(dense_rows(x)),
        view(labels.contiguous()),
        view(weights),
        view(grid.contiguous()),
        None if before is None else view(before.contiguous()),
        torch.get_num_threads(),
    )
    for given, written in ((sums, total), (counts, number)):
        if given is not written:
            given.copy_(written)


def means(sums: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """``clustops::kmeans_means``."""
    previous = previous.contiguous()
    b, k, d = previous.shape
    result, shift = torch.empty_like(previous), sums.new_empty(b)
    workspace = sums.new_empty((b, extension.kmeans_means_blocks(k * d)))
    given = (sums.contiguous(), previous, result, shift, workspace)
    extension.kmeans_means(*(view(t) for t in given), torch.get_num_threads())
    return result, shift


def counts(labels: Tensor, weights: Tensor, k: int) -> Tensor:
    """``clustops::kmeans_counts``."""
    result = labels.new_empty((labels.shape[0], k))
    extension.kmeans_counts(view(labels.contiguous()), view(weights), view(result), torch.get_num_threads())
    return result


def potentials(
    x: Tensor, candidates: Tensor, closest: Tensor, weights: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """``clustops::kmeans_potentials``."""
    dtype = ops.accumulator(x.dtype)
    result = candidates.new_empty(candidates.shape[:2], dtype=torch.int64)
    improves = closest.new_empty(closest.shape, dtype=torch.int32)
    given = (candidates.to(dtype).contiguous(), closest.to(dtype).contiguous(), weights, scale.contiguous())
    arguments = (view(t) for t in (dense_rows(x), *given, result, improves))
    extension.kmeans_potentials(*arguments, torch.get_num_threads())
    return result, improves


def closest_(
    closest: Tensor,
    x: Tensor,
    centroid: Tensor,
    improves: Tensor | None = None,
    chosen: Tensor | None = None,
) -> None:
    """``clustops::kmeans_closest_``."""
    lowered = closest if closest.stride(-1) == 1 else closest.contiguous()
    extension.kmeans_closest(
        view(lowered),
        view(dense_rows(x)),
        view(centroid.to(closest.dtype).contiguous()),
        None if improves is None else view(improves.contiguous()),
        None if chosen is None else view(chosen.contiguous()),
        torch.get_num_threads(),
    )
    if lowered is not closest:
        closest.copy_(lowered)


def draws(position: Tensor, seed: int, use: int, restarts: int, iteration: int) -> Tensor:
    """``clustops::kmeans_draws``."""
    b, m = position.shape
    result = position.new_empty((b * restarts, m), dtype=torch.float64)
    given = (view(position.contiguous()), view(result), seed, use + (iteration << 32), 4)
    extension.kmeans_draws(*given, torch.get_num_threads())
    return result


def seed(x: Tensor, weights: Tensor, uniform: Tensor, k: int) -> Tensor:
    """``clustops::kmeans_seed``."""
    trials, threads = uniform.shape[1] // max(1, k), torch.get_num_threads()
    rows, draws = view(dense_rows(x)), view(uniform[:, : k * trials].contiguous())
    chosen = uniform.new_empty((uniform.shape[0], k), dtype=torch.int64)
    workspace = chosen.new_empty(extension.kmeans_seed_workspace_cpu(rows, draws, k, threads))
    extension.kmeans_seed(rows, view(weights), draws, view(chosen), view(workspace), threads)
    return chosen
