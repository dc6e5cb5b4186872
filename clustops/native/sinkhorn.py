"""clustops::sinkhorn_potentials, assign_from_potentials, soft_cross_entropy and what serves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import sinkhorn_ops as reference
from . import extension, register, sinkhorn_cpu, sinkhorn_cuda, sinkhorn_loss_cuda

_on_cpu = hasattr(extension, "sinkhorn")
_on_cuda = hasattr(extension, "sinkhorn_cuda")
_losses_on_cuda = hasattr(extension, "soft_cross_entropy_cuda")


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


def _fake_cross_entropy(
    scores: Tensor,
    target_scores: Tensor,
    bias: Tensor,
    views: Sequence[int],
    targets: Sequence[int],
    temperature: float,
    target_temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.accumulator(scores.dtype)
    pairs = len(views) or scores.shape[0]
    rows = scores.shape[1]
    return (
        scores.new_empty((pairs, rows), dtype=dtype),
        scores.new_empty((scores.shape[0], rows), dtype=dtype),
        scores.new_empty((target_scores.shape[0], rows), dtype=dtype),
    )


def _save_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scores, target_scores, bias, *ctx.settings = inputs
    _, score_normalizers, target_normalizers = output
    ctx.mark_non_differentiable(score_normalizers, target_normalizers)
    ctx.save_for_backward(scores, target_scores, bias, score_normalizers, target_normalizers)


def _cross_entropy_backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    result = torch.ops.clustops.soft_cross_entropy_backward(gradient, *ctx.saved_tensors, *ctx.settings)
    return (result, *[None] * 6)


register(
    "soft_cross_entropy(Tensor scores, Tensor target_scores, Tensor bias, int[] views, int[] targets, "
    "float temperature, float target_temperature) "
    "-> (Tensor losses, Tensor score_normalizers, Tensor target_normalizers)",
    reference=reference.soft_cross_entropy,
    fake=_fake_cross_entropy,
    cuda=sinkhorn_loss_cuda.soft_cross_entropy if _losses_on_cuda else None,
    setup_context=_save_cross_entropy,
    backward=_cross_entropy_backward,
)
register(
    "soft_cross_entropy_backward(Tensor gradient, Tensor scores, Tensor target_scores, Tensor bias, "
    "Tensor score_normalizers, Tensor target_normalizers, int[] views, int[] targets, float temperature, "
    "float target_temperature) -> Tensor",
    reference=reference.soft_cross_entropy_backward,
    fake=lambda gradient, scores, *_: torch.empty_like(scores, memory_format=torch.contiguous_format),
    cuda=sinkhorn_loss_cuda.soft_cross_entropy_backward if _losses_on_cuda else None,
)


def _save_matrix(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    m, ctx.n_iters = inputs
    ctx.save_for_backward(m)


def _matrix_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return torch.ops.clustops.sinkhorn_matrix_backward(gradient, *ctx.saved_tensors, ctx.n_iters), None


register(
    "sinkhorn_matrix(Tensor m, int n_iters) -> Tensor",
    reference=reference.sinkhorn_matrix,
    fake=lambda m, n_iters: torch.empty_like(m, memory_format=torch.contiguous_format),
    cuda=sinkhorn_loss_cuda.sinkhorn_matrix if _losses_on_cuda else None,
    setup_context=_save_matrix,
    backward=_matrix_backward,
)
register(
    "sinkhorn_matrix_backward(Tensor gradient, Tensor m, int n_iters) -> Tensor",
    reference=reference.sinkhorn_matrix_backward,
    fake=lambda gradient, m, n_iters: torch.empty_like(m, memory_format=torch.contiguous_format),
    cuda=sinkhorn_loss_cuda.sinkhorn_matrix_backward if _losses_on_cuda else None,
)
