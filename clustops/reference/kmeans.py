"""k-means, obviously right: plain PyTorch, any device, any floating dtype, O(N K) memory."""

from __future__ import annotations

import torch
from torch import Tensor


def assign_l2(x: Tensor, centroids: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The ``top`` nearest centroids of each row, nearest first, ties to the lowest index.

    Args:
        x: ``[B, N, D]``. centroids: ``[B, K, D]``. top: in ``[1, K]``.

    Returns:
        labels ``[B, N, top]`` int64 and squared distances ``[B, N, top]``, fp32 (fp64 for fp64 input).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, centroids = x.to(dtype), centroids.to(dtype)
    # ||x - c||^2 directly: the expansion ||x||^2 - 2 x.c + ||c||^2 cancels.
    distances = torch.stack([(x - c.unsqueeze(-2)).square().sum(-1) for c in centroids.unbind(-2)], dim=-1)
    # A NaN row sorts like a row at infinity: its labels stay in range.
    order = torch.sort(distances.nan_to_num(nan=float("inf")), dim=-1, stable=True).indices[..., :top].contiguous()
    return order, distances.gather(-1, order)
