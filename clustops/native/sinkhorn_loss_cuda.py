"""Losses against Sinkhorn targets and small Sinkhorn matrices on a GPU: results allocated, kernels called."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import sinkhorn_ops as reference
from . import extension, stream_of, view
from .sinkhorn_loss_cpu import as_kernels_take


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
    (v, b, k), a, dtype = scores.shape, target_scores.shape[0], reference.accumulator(scores.dtype)
    n = len(views) or v
    size = extension.soft_cross_entropy_workspace(n, len(views) > 0, b, k)
    with torch.cuda.device(scores.device):
        losses, p, q = (scores.new_empty((rows, b), dtype=dtype) for rows in (n, v, a))
        extension.soft_cross_entropy_cuda(
            *as_kernels_take(scores, target_scores, bias),
            views,
            targets,
            temperature,
            target_temperature,
            *(view(t) for t in (losses, p, q, losses.new_empty(size))),
            stream_of(scores),
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
    with torch.cuda.device(scores.device):
        extension.soft_cross_entropy_backward_cuda(
            view(gradient.detach().to(reference.accumulator(scores.dtype))),
            *as_kernels_take(scores, target_scores, bias),
            view(score_normalizers.contiguous()),
            view(target_normalizers.contiguous()),
            views,
            targets,
            temperature,
            target_temperature,
            view(result),
            stream_of(scores),
        )
    return result


def sinkhorn_matrix(m: Tensor, n_iters: int) -> Tensor:
    """``clustops::sinkhorn_matrix``."""
    return _project(m, None, n_iters)


def sinkhorn_matrix_backward(gradient: Tensor, m: Tensor, n_iters: int) -> Tensor:
    """``clustops::sinkhorn_matrix_backward``."""
    return _project(m, gradient.detach().to(m.dtype).contiguous(), n_iters)


def _project(m: Tensor, gradient: Tensor | None, n_iters: int) -> Tensor:
    m = m.detach().contiguous()
    result = torch.empty_like(m)
    with torch.cuda.device(m.device):
        given = view(m), None if gradient is None else view(gradient)
        extension.sinkhorn_matrix_cuda(*given, view(result), n_iters, stream_of(m))
    return result
