"""clustops::kmeans_iterate, and clustops::kmeans_highest, kmeans_places, kmeans_split for empty clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import kmeans_iterate as reference
from ..reference import kmeans_ops as ops
from ..reference import kmeans_split
from . import extension, register
from . import kmeans_iterate_cuda as cuda


def fits(x: Tensor, k: int) -> bool:
    """Whether all iterations of a problem of ``x [B, N, D]`` may run in the shared memory of one block."""
    return _cuda and x.is_cuda and cuda.fits(x, k)


def _fake_iterate(
    x: Tensor,
    centroids: Tensor,
    weights: Tensor,
    grid: Tensor,
    iterations: int,
    cosine: bool,
    empty: str,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    e = centroids.shape[0]
    return (
        centroids.new_empty(centroids.shape, dtype=ops.accumulator(x.dtype)),
        x.new_empty((e, x.shape[1]), dtype=torch.int64),
        x.new_empty(e, dtype=torch.int64),
        x.new_empty(e, dtype=torch.int64),
    )


def _fake_highest(score: Tensor, labels: Tensor, weights: Tensor, k: int) -> Tensor:
    return score.new_empty((score.shape[0], k))


def _fake_places(
    score: Tensor, labels: Tensor, weights: Tensor, best: Tensor, offset: int, last: bool
) -> Tensor:
    return best.new_empty(best.shape, dtype=torch.int64)


def _fake_split(
    means: Tensor, farthest: Tensor, counts: Tensor, seed: int, restarts: int, iteration: int
) -> tuple[Tensor, Tensor]:
    return means.new_empty(means.shape), counts.new_empty(counts.shape)


_cuda = hasattr(extension, "kmeans_iterate_cuda")

register(
    "kmeans_iterate(Tensor x, Tensor centroids, Tensor weights, Tensor grid, int iterations, bool cosine, "
    "str empty, int seed) -> (Tensor centroids, Tensor labels, Tensor repaired, Tensor still)",
    reference=reference.iterate,
    fake=_fake_iterate,
    cuda=cuda.iterate if _cuda else None,
)
register(
    "kmeans_highest(Tensor score, Tensor labels, Tensor weights, SymInt k) -> Tensor",
    reference=kmeans_split.highest,
    fake=_fake_highest,
    cuda=cuda.highest if _cuda else None,
)
register(
    "kmeans_places(Tensor score, Tensor labels, Tensor weights, Tensor best, SymInt offset, bool last) "
    "-> Tensor",
    reference=kmeans_split.places,
    fake=_fake_places,
    cuda=cuda.places if _cuda else None,
)
register(
    "kmeans_split(Tensor means, Tensor farthest, Tensor counts, int seed, int restarts, int iteration) "
    "-> (Tensor centroids, Tensor child)",
    reference=kmeans_split.split,
    fake=_fake_split,
    cuda=cuda.split if _cuda else None,
)
