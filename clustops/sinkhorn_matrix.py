"""Doubly stochastic projection of tiny square matrices, with a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_count, check_finite, check_floating, reject, shape_of
from .native import sinkhorn_matrix as _registration  # noqa: F401
from .sinkhorn_solve import as_problems

_LARGEST = 32  # rows that a kernel keeps in registers


def sinkhorn_matrix(m: Tensor, *, n_iters: int = 20) -> Tensor:
    """Tiny square matrices ``exp(m)`` made doubly stochastic by dividing columns, then rows, by their sums.

    Rows sum to 1 exactly, columns as closely as ``n_iters`` allows. ``n_iters=0`` is a softmax of the rows.

    Args:
        m: ``[..., n, n]`` with ``1 <= n <= 32``, fp32, bf16, fp16 or fp64.
        n_iters: number of divisions of columns and rows, at least 0.

    Returns:
        ``[..., n, n]`` in the dtype of ``m``, differentiable once.

    Raises:
        ValueError, TypeError: ``m`` is not a finite floating point ``[..., n, n]`` or ``n`` is above 32.

    Cost: O(n_iters n^2) for each matrix, forward and backward; only ``m`` is kept for the backward pass. Sums
    in fp32 (fp64 for fp64 input).

    >>> sinkhorn_matrix(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    tensor([[0.8808, 0.1192],
            [0.1192, 0.8808]])

    Source: Sinkhorn and Knopp, "Concerning nonnegative matrices and doubly stochastic matrices", 1967.
    """
    check_floating(m, "m")
    if m.ndim < 2 or m.shape[-1] != m.shape[-2] or m.shape[-1] == 0:
        reject("m", "[..., n, n] with n of at least 1", shape_of(m), "pass square matrices")
    if m.shape[-1] > _LARGEST:
        cure = 'use sinkhorn(m, epsilon=1.0, gradient="unrolled")'
        reject("m", f"[..., n, n] with n of at most {_LARGEST}", shape_of(m), cure)
    check_count(n_iters, "n_iters", 0, "20 is usual; 0 is a softmax")
    check_finite(m, "m")
    result: Tensor = torch.ops.clustops.sinkhorn_matrix(as_problems(m), n_iters).view(m.shape)
    return result
