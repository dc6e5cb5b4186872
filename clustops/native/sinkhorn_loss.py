"""clustops::soft_cross_entropy and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import sinkhorn_ops as reference
from . import extension, register
from . import sinkhorn_loss_cpu as cpu
from . import sinkhorn_loss_cuda as cuda

_cpu = hasattr(extension, "soft_cross_entropy")
_cuda = hasattr(extension, "soft_cross_entropy_cuda")


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
    cpu=cpu.soft_cross_entropy if _cpu else None,
    cuda=cuda.soft_cross_entropy if _cuda else None,
    setup_context=_save_cross_entropy,
    backward=_cross_entropy_backward,
)
register(
    "soft_cross_entropy_backward(Tensor gradient, Tensor scores, Tensor target_scores, Tensor bias, "
    "Tensor score_normalizers, Tensor target_normalizers, int[] views, int[] targets, float temperature, "
    "float target_temperature) -> Tensor",
    reference=reference.soft_cross_entropy_backward,
    fake=lambda gradient, scores, *_: torch.empty_like(scores, memory_format=torch.contiguous_format),
    cpu=cpu.soft_cross_entropy_backward if _cpu else None,
    cuda=cuda.soft_cross_entropy_backward if _cuda else None,
)
