"""Contrastive losses of rows on a GPU: results allocated, kernels called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import contrastive_rows as reference
from . import contrastive_chunked as chunked
from . import extension, stream_of, view, views
from .contrastive_cpu import new_results


def contrastive_rows(
    features: Tensor,
    labels: Tensor | None,
    confidence: Tensor | None,
    first: int,
    count: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``clustops::contrastive_rows``."""
    features, exact = features.detach().contiguous(), _exact()
    with torch.cuda.device(features.device):
        size = extension.contrastive_cuda_workspace(view(features), first, count, exact, False)
        if size == 0 and features.dtype != torch.float64:
            given = (features, labels, confidence, first, count)
            return chunked.contrastive_rows(*given, *options)
        if size == 0:
            return reference.contrastive_rows(features, labels, confidence, first, count, *options)
        results = new_results(features, count)
        extension.contrastive_rows_cuda(
            *views(features, labels, confidence),
            first,
            count,
            *options,
            *views(*results, _workspace(features, size)),
            exact,
            stream_of(features),
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
    features, exact = features.detach().contiguous(), _exact()
    with torch.cuda.device(features.device):
        size = extension.contrastive_cuda_workspace(view(features), first, count, exact, True)
        if size == 0 and features.dtype != torch.float64:
            given = (grad, features, labels, confidence, lse, first, count)
            return chunked.contrastive_rows_backward(*given, *options)
        if size == 0:
            return reference.contrastive_rows_backward(
                grad, features, labels, confidence, lse, first, count, *options
            )
        gradient = features.new_empty((count, *features.shape[1:]))
        extension.contrastive_rows_backward_cuda(
            view(grad.detach().to(lse.dtype)),
            *views(features, labels, confidence, lse),
            first,
            count,
            *options,
            *views(gradient, _workspace(features, size)),
            exact,
            stream_of(features),
        )
    return gradient


def _workspace(features: Tensor, size: int) -> Tensor:
    return features.new_empty(size // 4, dtype=torch.int32)


def _exact() -> bool:
    """Whether fp32 products keep all bits; TF32 has eleven."""
    return torch.get_float32_matmul_precision() == "highest"
