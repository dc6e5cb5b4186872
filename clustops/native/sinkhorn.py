"""clustops::sinkhorn_potentials, sinkhorn_, assign_from_potentials_ and what serves them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import sinkhorn_ops as reference
from . import extension, register, sinkhorn_cpu, sinkhorn_cuda

_on_cpu = hasattr(extension, "sinkhorn")
_on_cuda = hasattr(extension, "sinkhorn_cuda")


def _fake_potentials(
    scores: Tensor,
    queue: Tensor | None,
    prior: Tensor | None,
    weights: Tensor | None,
    init: Tensor | None,
    epsilon: float,
    n_iters: int,
    relax: float | None,
    mass: float | None,
    tol: float | None,
    bound: float | None,
) -> Tensor:
    columns = scores.shape[-1] + (mass is not None)
    return scores.new_empty((scores.shape[0], columns), dtype=reference.accumulator(scores.dtype))


register(
    "sinkhorn_potentials(Tensor scores, Tensor? queue, Tensor? prior, Tensor? weights, Tensor? init, "
    "float epsilon, int n_iters, float? relax, float? mass, float? tol, float? bound) -> Tensor",
    reference=reference.sinkhorn_potentials,
    fake=_fake_potentials,
    cpu=sinkhorn_cpu.potentials if _on_cpu else None,
    cuda=sinkhorn_cuda.potentials if _on_cuda else None,
)


def _fake_column_mass(
    scores: Tensor,
    queue: Tensor | None,
    weights: Tensor | None,
    potentials: Tensor,
    epsilon: float,
    normalized: bool,
) -> Tensor:
    return torch.empty_like(potentials, memory_format=torch.contiguous_format)


register(
    "sinkhorn_column_mass(Tensor scores, Tensor? queue, Tensor? weights, Tensor potentials, float epsilon, "
    "bool normalized) -> Tensor",
    reference=reference.column_log_mass,
    fake=_fake_column_mass,
    cpu=sinkhorn_cpu.column_mass if _on_cpu else None,
    cuda=sinkhorn_cuda.column_mass if _on_cuda else None,
)


def _fake_sinkhorn(
    out: Tensor,
    scores: Tensor,
    queue: Tensor | None,
    prior: Tensor | None,
    weights: Tensor | None,
    init: Tensor | None,
    epsilon: float,
    n_iters: int,
    relax: float | None,
    mass: float | None,
    tol: float | None,
    hard: bool,
) -> Tensor:
    return _fake_potentials(scores, queue, prior, weights, init, epsilon, n_iters, relax, mass, tol, None)


register(
    "sinkhorn_(Tensor(a!) out, Tensor scores, Tensor? queue, Tensor? prior, Tensor? weights, Tensor? init, "
    "float epsilon, int n_iters, float? relax, float? mass, float? tol, bool hard) -> Tensor",
    reference=reference.sinkhorn_,
    fake=_fake_sinkhorn,
    cpu=sinkhorn_cpu.plan_ if _on_cpu else None,
    cuda=sinkhorn_cuda.plan_ if _on_cuda else None,
)
register(
    "assign_from_potentials_(Tensor(a!) out, Tensor scores, Tensor potentials, float epsilon, bool hard) "
    "-> ()",
    reference=reference.assign_from_potentials_,
    fake=lambda out, scores, potentials, epsilon, hard: None,
    cpu=sinkhorn_cpu.assign_ if _on_cpu else None,
    cuda=sinkhorn_cuda.assign_ if _on_cuda else None,
)
