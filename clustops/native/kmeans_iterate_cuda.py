"""Whole iterations of k-means on a GPU: results allocated, kernels called."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import kmeans_iterate as reference
from . import dense_rows, extension, stream_of, view


def fits(x: Tensor, k: int) -> bool:
    """Whether a block's shared memory holds a problem of ``x [B, N, D]``."""
    if x.dtype == torch.float64:
        return False
    with torch.cuda.device(x.device):
        return bool(extension.kmeans_iterate_fits(x.shape[1], x.shape[2], k, x.element_size()))


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
    """``clustops::kmeans_iterate``."""
    if not fits(x, centroids.shape[1]):
        return reference.iterate(x, centroids, weights, grid, iterations, cosine, empty, seed)
    x, e = dense_rows(x), centroids.shape[0]
    result = centroids.new_empty(centroids.shape, dtype=torch.float32)
    labels = x.new_empty((e, x.shape[1]), dtype=torch.int64)
    repaired, still = labels.new_empty(e), labels.new_empty(e)
    given = (x, weights, grid.contiguous(), centroids.float().contiguous(), result, labels, repaired, still)
    with torch.cuda.device(x.device):
        split = empty == "split"
        extension.kmeans_iterate_cuda(
            *(view(t) for t in given), iterations, cosine, split, seed & (2**64 - 1), stream_of(x)
        )
    return result, labels, repaired, still


def highest(score: Tensor, labels: Tensor, weights: Tensor, k: int) -> Tensor:
    """``clustops::kmeans_highest``."""
    best = score.new_empty((score.shape[0], k))
    _members(score, labels, weights, best, None, 0, False)
    return best


def places(score: Tensor, labels: Tensor, weights: Tensor, best: Tensor, offset: int, last: bool) -> Tensor:
    """``clustops::kmeans_places``."""
    result = best.new_empty(best.shape, dtype=torch.int64)
    _members(score, labels, weights, best.contiguous(), result, offset, last)
    return result


def _members(
    score: Tensor,
    labels: Tensor,
    weights: Tensor,
    best: Tensor,
    result: Tensor | None,
    offset: int,
    last: bool,
) -> None:
    given = (score.contiguous(), labels.contiguous(), weights, best)
    with torch.cuda.device(score.device):
        found = None if result is None else view(result)
        extension.kmeans_members_cuda(*(view(t) for t in given), found, offset, last, stream_of(score))


def split(
    means: Tensor, farthest: Tensor, counts: Tensor, seed: int, restarts: int, iteration: int
) -> tuple[Tensor, Tensor]:
    """``clustops::kmeans_split``."""
    counts = counts.contiguous()
    centroids = means.new_empty(means.shape)
    child, tickets = torch.empty_like(counts), torch.empty_like(counts)
    given = (means.contiguous(), farthest.contiguous(), counts, centroids, child, tickets)
    with torch.cuda.device(means.device):
        extension.kmeans_split_cuda(
            *(view(t) for t in given), seed & (2**64 - 1), restarts, iteration, stream_of(means)
        )
    return centroids, child
