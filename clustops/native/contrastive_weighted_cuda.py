"""The contrastive loss under any weights on a GPU: how blocks are multiplied and kernels called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import contrastive_weighted_rows as reference
from . import contrastive_weighted_blocks as blocks
from . import extension, stream_of

# Rows and columns of a block: its 32 MB stay in the second cache of a large GPU.
_ROWS = 1024
_COLUMNS = 8192


def weighted_contrastive_rows(features: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``clustops::weighted_contrastive_rows``."""
    if features.dtype == torch.float64:
        return reference.weighted_contrastive_rows(features, *rest)
    with torch.cuda.device(features.device):
        return blocks.losses(_device(stream_of(features)), features, *rest)


def weighted_contrastive_rows_backward(grad: Tensor, features: Tensor, *rest: Any) -> Tensor:
    """``clustops::weighted_contrastive_rows_backward``."""
    if features.dtype == torch.float64:
        return reference.weighted_contrastive_rows_backward(grad, features, *rest)
    with torch.cuda.device(features.device):
        return blocks.gradient(_device(stream_of(features)), grad, features, *rest)


def _device(stream: int) -> blocks.Device:
    return blocks.Device(
        _ROWS,
        _COLUMNS,
        False,
        lambda *given: extension.weighted_sums_cuda(*given[:-1], stream),  # blocks are not mirrored
        lambda *given: extension.weighted_gradient_cuda(*given, stream),
        lambda dtype: dtype,
    )
