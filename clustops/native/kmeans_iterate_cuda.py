"""Whole iterations of k-means on a GPU: results allocated, kernels called."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import kmeans_iterate as reference
from . import extension, view


def _aligned(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


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
    x, e = _aligned(x), centroids.shape[0]
    result = centroids.new_empty(centroids.shape, dtype=torch.float32)
    labels = x.new_empty((e, x.shape[1]), dtype=torch.int64)
    repaired, still = labels.new_empty(e), labels.new_empty(e)
    given = (x, weights, grid.contiguous(), centroids.float().contiguous(), result, labels, repaired, still)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        split = empty == "split"
        extension.kmeans_iterate_cuda(
            *(view(t) for t in given), iterations, cosine, split, seed & (2**64 - 1), stream
        )
    return result, labels, repaired, still
