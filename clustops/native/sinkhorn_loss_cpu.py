"""Losses against Sinkhorn targets and small Sinkhorn matrices on a CPU: results allocated, kernels called."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import sinkhorn_ops as reference
from . import dense_rows, extension, view


def soft_cross_entropy(
    scores: Tensor,
    target_scores: Tensor,
    bias: Tensor,
    views: Sequence[int],
    targets: Sequence[int],
    temperature: float,
    target_temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``clustops::soft_cross_entropy``."""
    given = as_kernels_take(scores, target_scores, bias)
    (v, b, _), a, dtype = scores.shape, target_scores.shape[0], reference.accumulator(scores.dtype)
    losses, p, q = (scores.new_empty((n, b), dtype=dtype) for n in (len(views) or v, v, a))
    extension.soft_cross_entropy(
        *given,
        views,
        targets,
        temperature,
        target_temperature,
        view(losses),
        view(p),
        view(q),
        torch.get_num_threads(),
    )
    return losses, p, q


def soft_cross_entropy_backward(
    gradient: Tensor,
    scores: Tensor,
    target_scores: Tensor,
    bias: Tensor,
    score_normalizers: Tensor,
    target_normalizers: Tensor,
    views: Sequence[int],
    targets: Sequence[int],
    temperature: float,
    target_temperature: float,
) -> Tensor:
    """``clustops::soft_cross_entropy_backward``."""
    result = torch.empty_like(scores, memory_format=torch.contiguous_format)
    extension.soft_cross_entropy_backward(
        view(gradient.to(reference.accumulator(scores.dtype))),
        *as_kernels_take(scores, target_scores, bias),
        view(score_normalizers.contiguous()),
        view(target_normalizers.contiguous()),
        views,
        targets,
        temperature,
        target_temperature,
        view(result),
        torch.get_num_threads(),
    )
    return result


def as_kernels_take(scores: Tensor, target_scores: Tensor, bias: Tensor) -> tuple[object, ...]:
    """Views with neighbouring columns, fp64 all or none."""
    dtype = reference.accumulator(scores.dtype)
    if reference.accumulator(target_scores.dtype) != dtype:
        target_scores = target_scores.to(dtype)
    return tuple(view(dense_rows(t.detach())) for t in (scores, target_scores, bias.to(dtype)))


def sinkhorn_matrix(m: Tensor, n_iters: int) -> Tensor:
    """``clustops::sinkhorn_matrix``."""
    return _project(m, None, n_iters)


def sinkhorn_matrix_backward(gradient: Tensor, m: Tensor, n_iters: int) -> Tensor:
    """``clustops::sinkhorn_matrix_backward``."""
    return _project(m, gradient.to(m.dtype).contiguous(), n_iters)


def _project(m: Tensor, gradient: Tensor | None, n_iters: int) -> Tensor:
    m = m.contiguous()
    result = torch.empty_like(m)
    given = view(m), None if gradient is None else view(gradient)
    extension.sinkhorn_matrix(*given, view(result), n_iters, torch.get_num_threads())
    return result
