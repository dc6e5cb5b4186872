"""clustops::contrastive_rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..reference import contrastive_rows as reference
from . import contrastive_cpu as cpu
from . import contrastive_cuda as cuda
from . import extension, register

_cpu = hasattr(extension, "contrastive_rows")
_cuda = hasattr(extension, "contrastive_rows_cuda")

_OPTIONS = "float temperature, float threshold, bool reweight, bool own_confidence, bool normalize"


def _rows_fake(
    features: Tensor, labels: Tensor | None, confidence: Tensor | None, first: int, count: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cpu.new_results(features, count)


def _backward_fake(
    grad: Tensor,
    features: Tensor,
    labels: Tensor | None,
    confidence: Tensor | None,
    lse: Tensor,
    first: int,
    count: int,
    *options: Any,
) -> Tensor:
    return features.new_empty((count, *features.shape[1:]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, labels, confidence, ctx.first, ctx.count, *ctx.options = inputs
    _, lse, weight, norms = output
    ctx.mark_non_differentiable(lse, weight, norms)
    ctx.save_for_backward(features, labels, confidence, lse)


def _differentiate(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    features, labels, confidence, lse = ctx.saved_tensors
    # Rows that were no anchors: no gradient comes from them, and exp(s - inf) = 0 stays clear of overflow.
    beyond = (0, 0, ctx.first, features.shape[0] - ctx.first - ctx.count)
    grad, lse = pad(grad, beyond), pad(lse, beyond, value=torch.inf)
    gradient = torch.ops.clustops.contrastive_rows_backward(
        grad, features, labels, confidence, lse, 0, features.shape[0], *ctx.options
    )
    return (gradient, *[None] * (4 + len(ctx.options)))


register(
    "contrastive_rows_backward(Tensor grad, Tensor features, Tensor? labels, Tensor? confidence, Tensor lse, "
    f"SymInt first, SymInt count, {_OPTIONS}) -> Tensor",
    reference=reference.contrastive_rows_backward,
    fake=_backward_fake,
    cpu=cpu.contrastive_rows_backward if _cpu else None,
    cuda=cuda.contrastive_rows_backward if _cuda else None,
)
register(
    "contrastive_rows(Tensor features, Tensor? labels, Tensor? confidence, SymInt first, SymInt count, "
    f"{_OPTIONS}) -> (Tensor loss, Tensor lse, Tensor weight, Tensor norms)",
    reference=reference.contrastive_rows,
    fake=_rows_fake,
    cpu=cpu.contrastive_rows if _cpu else None,
    cuda=cuda.contrastive_rows if _cuda else None,
    setup_context=_save,
    backward=_differentiate,
)
