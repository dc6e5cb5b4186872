"""clustops::kmeans_iterate, and clustops::kmeans_highest, kmeans_places, kmeans_split for empty clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import kmeans_iterate as reference
from ..reference import kmeans_ops as ops
from ..reference import kmeans_split
from . import dense_rows, extension, register, view
from . import kmeans_iterate_cuda as cuda

_CACHE = 1 << 20  # bytes of a problem that stay in a level 2 cache


def fits(x: Tensor, centroids: Tensor, cosine: bool) -> bool:
    """Whether one kernel does all iterations of ``centroids [E, K, D]`` on ``x [B, N, D]``.

    On a GPU, where a problem fits in the shared memory of a block; on a CPU, where it fits in a cache and
    there are enough entries for all threads.
    """
    if x.is_cuda:
        return _cuda and cuda.fits(x, centroids.shape[1])
    small = x.shape[1] * x.shape[2] * x.element_size() <= _CACHE
    busy = centroids.shape[0] >= torch.get_num_threads()
    return _cpu and x.device.type == "cpu" and x.dtype != torch.float64 and not cosine and small and busy


def _iterate(
    x: Tensor,
    centroids: Tensor,
    weights: Tensor,
    grid: Tensor,
    iterations: int,
    cosine: bool,
    empty: str,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if cosine or x.dtype == torch.float64:
        return reference.iterate(x, centroids, weights, grid, iterations, cosine, empty, seed)
    x, e = dense_rows(x), centroids.shape[0]
    result = centroids.new_empty(centroids.shape, dtype=torch.float32)
    labels = x.new_empty((e, x.shape[1]), dtype=torch.int64)
    repaired, still = labels.new_empty(e), labels.new_empty(e)
    given = (x, weights, grid.contiguous(), centroids.float().contiguous(), result, labels, repaired, still)
    bits, threads = seed & (2**64 - 1), torch.get_num_threads()
    extension.kmeans_iterate(*(view(t) for t in given), iterations, empty == "split", bits, threads)
    return result, labels, repaired, still


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


_cpu = hasattr(extension, "kmeans_iterate")
_cuda = hasattr(extension, "kmeans_iterate_cuda")

register(
    "kmeans_iterate(Tensor x, Tensor centroids, Tensor weights, Tensor grid, int iterations, bool cosine, "
    "str empty, int seed) -> (Tensor centroids, Tensor labels, Tensor repaired, Tensor still)",
    reference=reference.iterate,
    fake=_fake_iterate,
    cpu=_iterate if _cpu else None,
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
