"""clustops::sinkhorn_matrix and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import sinkhorn_ops as reference
from . import extension, register
from . import sinkhorn_loss_cpu as cpu
from . import sinkhorn_loss_cuda as cuda

_cpu = hasattr(extension, "sinkhorn_matrix")
_cuda = hasattr(extension, "sinkhorn_matrix_cuda")


def _save_matrix(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    m, ctx.n_iters = inputs
    ctx.save_for_backward(m)


def _matrix_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return torch.ops.clustops.sinkhorn_matrix_backward(gradient, *ctx.saved_tensors, ctx.n_iters), None


register(
    "sinkhorn_matrix(Tensor m, int n_iters) -> Tensor",
    reference=reference.sinkhorn_matrix,
    fake=lambda m, n_iters: torch.empty_like(m, memory_format=torch.contiguous_format),
    cpu=cpu.sinkhorn_matrix if _cpu else None,
    cuda=cuda.sinkhorn_matrix if _cuda else None,
    setup_context=_save_matrix,
    backward=_matrix_backward,
)
register(
    "sinkhorn_matrix_backward(Tensor gradient, Tensor m, int n_iters) -> Tensor",
    reference=reference.sinkhorn_matrix_backward,
    fake=lambda gradient, m, n_iters: torch.empty_like(m, memory_format=torch.contiguous_format),
    cpu=cpu.sinkhorn_matrix_backward if _cpu else None,
    cuda=cuda.sinkhorn_matrix_backward if _cuda else None,
)
