"""The steps of k-means other than the assignment, on a GPU: results allocated, kernels called."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import kmeans_ops as ops
from . import dense_rows, extension, stream_of, view


def bounds(x: Tensor, weights: Tensor) -> Tensor:
    """``clustops::kmeans_bounds``."""
    x = dense_rows(x)
    result = x.new_empty((x.shape[0], x.shape[2] + 1), dtype=torch.float64)
    with torch.cuda.device(x.device):
        extension.kmeans_bounds_cuda(view(x), view(weights), view(result), stream_of(x))
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
    x, total, number = dense_rows(x), sums.contiguous(), counts.contiguous()
    with torch.cuda.device(x.device):
        extension.kmeans_sums_cuda(
            view(total),
            view(number),
            view(x),
            view(labels.contiguous()),
            view(weights),
            view(grid.contiguous()),
            None if before is None else view(before.contiguous()),
            stream_of(x),
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
    with torch.cuda.device(sums.device):
        extension.kmeans_means_cuda(
            *(view(t) for t in (sums.contiguous(), previous, result, shift, workspace)), stream_of(sums)
        )
    return result, shift


def counts(labels: Tensor, weights: Tensor, k: int) -> Tensor:
    """``clustops::kmeans_counts``."""
    result = labels.new_empty((labels.shape[0], k))
    with torch.cuda.device(labels.device):
        extension.kmeans_counts_cuda(
            view(labels.contiguous()), view(weights), view(result), stream_of(labels)
        )
    return result


def potentials(
    x: Tensor, candidates: Tensor, closest: Tensor, weights: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """``clustops::kmeans_potentials``."""
    x, dtype = dense_rows(x), ops.accumulator(x.dtype)
    result = candidates.new_empty(candidates.shape[:2], dtype=torch.int64)
    improves = closest.new_empty(closest.shape, dtype=torch.int32)
    given = (candidates.to(dtype).contiguous(), closest.to(dtype).contiguous(), weights, scale.contiguous())
    with torch.cuda.device(x.device):
        extension.kmeans_potentials_cuda(*(view(t) for t in (x, *given, result, improves)), stream_of(x))
    return result, improves


def closest_(
    closest: Tensor,
    x: Tensor,
    centroid: Tensor,
    improves: Tensor | None = None,
    chosen: Tensor | None = None,
) -> None:
    """``clustops::kmeans_closest_``."""
    x = dense_rows(x)
    masked = improves is not None and chosen is not None
    with torch.cuda.device(x.device):
        extension.kmeans_closest_cuda(
            view(closest),
            view(x),
            view(centroid.to(closest.dtype).contiguous()),
            view(improves.contiguous()) if masked and improves is not None else None,
            view(chosen.contiguous()) if masked and chosen is not None else None,
            stream_of(x),
        )


def seed(x: Tensor, weights: Tensor, uniform: Tensor, k: int) -> Tensor:
    """``clustops::kmeans_seed``."""
    x, (n, d) = dense_rows(x), x.shape[1:]
    entries, trials = uniform.shape[0], uniform.shape[1] // max(1, k)
    chosen = uniform.new_empty((entries, k), dtype=torch.int64)
    size = extension.kmeans_seed_workspace(entries, n, d, trials)
    workspace = chosen.new_empty(size)
    given = (x, weights, uniform[:, : k * trials].contiguous(), chosen, workspace)
    with torch.cuda.device(x.device):
        extension.kmeans_seed_cuda(*(view(t) for t in given), stream_of(x))
    return chosen
