"""PCA whitening in blocks of rows, by the covariance: memory does not grow with the number of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .preprocess import unit_rows, with_fixed_signs

# Rows converted to fp64 at a time: enough to keep a matmul busy, small beside any data set.
_BLOCK = 4096


def pca_whiten(x: Tensor, dim: int, eps: float) -> Tensor:
    """``[B, N, dim]`` unit (or zero) rows from ``x`` ``[B, N, D]``."""
    shift, scale, mean, matrix = whitening(x, dim, eps)
    out = x.new_empty((*x.shape[:2], dim))
    for block, target in zip(x.split(_BLOCK, 1), out.split(_BLOCK, 1), strict=True):
        target.copy_(unit_rows((_centred(block, shift, scale) - mean) @ matrix))
    return out


def whitening(x: Tensor, dim: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(shift, scale, mean, matrix)``: the rows of ``((x - shift) / scale - mean) @ matrix`` are whitened.

    The shift (the first row) keeps constant data exactly constant; the scale (a power of two near the largest
    magnitude) keeps squares inside the range of fp64.

    Args:
        x: ``[B, N, D]``.

    Returns:
        fp64 ``[B, 1, D]``, ``[B, 1, 1]``, ``[B, 1, D]``, ``[B, D, dim]``.
    """
    b, n, d = x.shape
    largest = torch.stack([block.abs().amax((1, 2), keepdim=True) for block in x.split(_BLOCK, 1)]).amax(0)
    scale = torch.exp2(torch.frexp(largest.double()).exponent.double() - 1)
    shift = x[:, :1].double()
    mean = x.new_zeros((b, 1, d), dtype=torch.float64)
    for block in x.split(_BLOCK, 1):
        mean += _centred(block, shift, scale).sum(1, keepdim=True) / n
    covariance = x.new_zeros((b, d, d), dtype=torch.float64)
    for block in x.split(_BLOCK, 1):
        rows = _centred(block, shift, scale) - mean
        covariance += rows.mT @ rows / n
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(-1), vectors.flip(-1)[..., :dim]
    spread = torch.maximum(values[:, :dim], eps * values[:, :1]).sqrt().unsqueeze(-2)
    matrix = with_fixed_signs(vectors) / torch.where(spread > 0, spread, 1.0)
    return shift, scale, mean, matrix


def _centred(block: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return block.double() / scale - shift / scale
