"""clustops::weighted_contrastive_rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import contrastive_weighted_rows as reference
from . import contrastive_weighted_cpu as cpu
from . import contrastive_weighted_cuda as cuda
from . import extension, register
from .contrastive_cpu import new_results

_cpu = hasattr(extension, "weighted_sums")
_cuda = hasattr(extension, "weighted_sums_cuda")


def _rows_fake(
    features: Tensor, pair_weights: Tensor, first: int, temperature: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return new_results(features, pair_weights.shape[0])


def _backward_fake(grad: Tensor, features: Tensor, *unused: Any) -> Tensor:
    return features.new_empty(features.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, pair_weights, *ctx.options = inputs
    _, lse, weight, norms = output
    ctx.mark_non_differentiable(lse, weight, norms)
    ctx.save_for_backward(features, pair_weights, lse, weight)


def _differentiate(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.clustops.weighted_contrastive_rows_backward(
        grad.contiguous(), *ctx.saved_tensors, *ctx.options
    )
    return (gradient, None, None, None, None)


register(
    "weighted_contrastive_rows_backward(Tensor grad, Tensor features, Tensor pair_weights, Tensor lse, "
    "Tensor weight, SymInt first, float temperature, bool normalize) -> Tensor",
    reference=reference.weighted_contrastive_rows_backward,
    fake=_backward_fake,
    cpu=cpu.weighted_contrastive_rows_backward if _cpu else None,
    cuda=cuda.weighted_contrastive_rows_backward if _cuda else None,
)
register(
    "weighted_contrastive_rows(Tensor features, Tensor pair_weights, SymInt first, float temperature, "
    "bool normalize) -> (Tensor loss, Tensor lse, Tensor weight, Tensor norms)",
    reference=reference.weighted_contrastive_rows,
    fake=_rows_fake,
    cpu=cpu.weighted_contrastive_rows if _cpu else None,
    cuda=cuda.weighted_contrastive_rows if _cuda else None,
    setup_context=_save,
    backward=_differentiate,
)
