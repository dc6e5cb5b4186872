"""clustops::kmeans_seed, kmeans_draws, kmeans_potentials, kmeans_closest_: where k-means starts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import kmeans_ops
from ..reference import kmeans_seeding as reference
from . import extension, register
from . import kmeans_steps_cpu as cpu
from . import kmeans_steps_cuda as cuda


def _fake_draws(position: Tensor, seed: int, use: int, restarts: int, iteration: int) -> Tensor:
    return position.new_empty((position.shape[0] * restarts, position.shape[1]), dtype=torch.float64)


def _fake_seed(x: Tensor, weights: Tensor, uniform: Tensor, k: int) -> Tensor:
    return x.new_empty((uniform.shape[0], k), dtype=torch.int64)


def _fake_potentials(
    x: Tensor, candidates: Tensor, closest: Tensor, weights: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    totals = closest.new_empty(candidates.shape[:2], dtype=torch.int64)
    return totals, closest.new_empty(closest.shape, dtype=torch.int32)


def _fake_closest(
    closest: Tensor,
    x: Tensor,
    centroid: Tensor,
    improves: Tensor | None = None,
    chosen: Tensor | None = None,
) -> None:
    return None


_cpu = hasattr(extension, "kmeans_seed")
_cuda = hasattr(extension, "kmeans_seed_cuda")

register(
    "kmeans_draws(Tensor position, int seed, int use, int restarts, int iteration) -> Tensor",
    reference=kmeans_ops.draws,
    fake=_fake_draws,
    cpu=cpu.draws if _cpu else None,
)
register(
    "kmeans_seed(Tensor x, Tensor weights, Tensor uniform, SymInt k) -> Tensor",
    reference=reference.seed,
    fake=_fake_seed,
    cpu=cpu.seed if _cpu else None,
    cuda=cuda.seed if _cuda else None,
)
register(
    "kmeans_potentials(Tensor x, Tensor candidates, Tensor closest, Tensor weights, Tensor scale) "
    "-> (Tensor potentials, Tensor improves)",
    reference=reference.potentials,
    fake=_fake_potentials,
    cpu=cpu.potentials if _cpu else None,
    cuda=cuda.potentials if _cuda else None,
)
register(
    "kmeans_closest_(Tensor(a!) closest, Tensor x, Tensor centroid, Tensor? improves=None, "
    "Tensor? chosen=None) -> ()",
    reference=reference.closest_,
    fake=_fake_closest,
    cpu=cpu.closest_ if _cpu else None,
    cuda=cuda.closest_ if _cuda else None,
)
