"""Contrastive losses of rows on a CPU: results allocated, kernels called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import extension, view, views


def new_results(features: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for loss, LSE, W and norms of the rows of ``count`` samples."""
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    loss = features.new_empty((count, features.shape[1]), dtype=dtype)
    return loss, torch.empty_like(loss), loss.new_empty((count,)), loss.new_empty((2,))


def contrastive_rows(
    features: Tensor,
    labels: Tensor | None,
    confidence: Tensor | None,
    first: int,
    count: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``clustops::contrastive_rows``."""
    results = new_results(features, count)
    extension.contrastive_rows(
        *views(features.detach(), labels, confidence),
        first,
        count,
        *options,
        *map(view, results),
        torch.get_num_threads(),
    )
    return results


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
        *views(features.detach(), labels, confidence),
        view(lse.contiguous()),
        first,
        count,
        *options,
        view(gradient),
        torch.get_num_threads(),
    )
    return gradient
