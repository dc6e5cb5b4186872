"""PCA whitening, obviously right: one singular value decomposition in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def pca_whiten(x: Tensor, dim: int, *, eps: float = 1e-5) -> Tensor:
    """Rows centred, projected on ``dim`` principal directions, whitened and L2-normalised.

    Args:
        x: ``[N, D]`` or ``[B, N, D]``.

    Returns:
        ``[.., N, dim]`` in the dtype of ``x``; a row at the mean gives zeros.
    """
    return unit_rows(whitened(x, dim, eps)).to(x.dtype)


def whitened(x: Tensor, dim: int, eps: float) -> Tensor:
    """fp64 ``[.., N, dim]``: rows before the L2 step."""
    # From the first row on, so that constant data is exactly zero.
    x = x.double() - x[..., :1, :].double()
    x = x - x.mean(-2, keepdim=True)
    # x = U S V^T, so the covariance is V (S^2 / N) V^T; beyond min(N, D) there is no variance.
    _, s, vt = torch.linalg.svd(x, full_matrices=False)
    variance = s.square() / x.shape[-2]
    spread = torch.maximum(variance, eps * variance[..., :1]).sqrt().unsqueeze(-2)
    y = torch.where(spread > 0, x @ with_fixed_signs(vt.mT) / spread, 0.0)[..., :dim]
    return torch.nn.functional.pad(y, (0, dim - y.shape[-1]))


def with_fixed_signs(vectors: Tensor) -> Tensor:
    """``vectors [.., D, K]`` with the largest entry of each column positive, the first one among equals."""
    size = vectors.abs()
    # Equal up to rounding is equal: rounding must not choose the sign.
    first = (size >= size.amax(-2, keepdim=True) * (1 - 1e-6)).to(torch.int8).argmax(-2, keepdim=True)
    return vectors * vectors.gather(-2, first).sign()


def unit_rows(y: Tensor) -> Tensor:
    """Rows of norm 1, or 0 where a row is within 1e-9 standard deviations of the mean: that is rounding."""
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    return torch.where(norm > 1e-9, y / norm, 0.0)
