"""The contrastive loss under any weights on a CPU: how blocks are multiplied and kernels called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import contrastive_weighted_blocks as blocks
from . import extension

# Rows and columns of a block: 1 MB in fp32 stays in the second cache of a core.
_ROWS = 256
_COLUMNS = 1024


def weighted_contrastive_rows(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``clustops::weighted_contrastive_rows``."""
    return blocks.losses(_device(), *arguments)


def weighted_contrastive_rows_backward(*arguments: Any) -> Tensor:
    """``clustops::weighted_contrastive_rows_backward``."""
    return blocks.gradient(_device(), *arguments)


def _device() -> blocks.Device:
    return blocks.Device(_ROWS, _COLUMNS, True, _sums, _gradient, _operand)


def _sums(*arguments: Any) -> None:
    extension.weighted_sums(*arguments, torch.get_num_threads())


def _gradient(*arguments: Any) -> None:
    # Gradients take the place of the products.
    extension.weighted_gradient(*arguments[:5], *arguments[6:], torch.get_num_threads())


def _operand(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
