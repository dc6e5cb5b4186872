"""Contrastive losses of rows on a CPU: results allocated, kernels called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import extension, view


def contrastive_rows(
    features: Tensor,
    labels: Tensor | None,
    confidence: Tensor | None,
    first: int,
    count: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``clustops::contrastive_rows``."""
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    loss = torch.empty((count, features.shape[1]), dtype=dtype)
    lse, weight, norms = torch.empty_like(loss), loss.new_empty(count), loss.new_empty(2)
    extension.contrastive_rows(
        *_prepare(features, labels, confidence),
        first,
        count,
        *options,
        view(loss),
        view(lse),
        view(weight),
        view(norms),
        torch.get_num_threads(),
    )
    return loss, lse, weight, norms


def contrastive_rows_backward(
    grad: Tensor,
    features: Tensor,
    labels: Tensor | None,
    confidence: Tensor | None,
    lse: Tensor,
    first: int,
    count: int,
    *options: Any,
) -> Tensor:
    """``clustops::contrastive_rows_backward``."""
    gradient = torch.empty((count, *features.shape[1:]), dtype=features.dtype)
    extension.contrastive_rows_backward(
        view(grad.detach().to(lse.dtype)),
        *_prepare(features, labels, confidence),
        view(lse.contiguous()),
        first,
        count,
        *options,
        view(gradient),
        torch.get_num_threads(),
    )
    return gradient


def _prepare(features: Tensor, labels: Tensor | None, confidence: Tensor | None) -> tuple[object, ...]:
    """The tensors as the kernels take them: contiguous."""
    given = (features.detach(), labels, confidence)
    return tuple(None if t is None else view(t.contiguous()) for t in given)
