"""What is done to features before they are clustered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from . import arrays
from .checks import check_count, check_finite, check_floating, check_positive, reject, shape_of
from .native import preprocess as _native  # noqa: F401  (registers the op)


def pca_whiten(x: Any, dim: int, *, eps: float = 1e-5) -> Any:
    """Features centred, projected on their first ``dim`` principal directions, whitened and L2-normalised.

    With mean ``m`` and eigenpairs ``(l_j, v_j)`` of the covariance ``sum_n (x_n - m)(x_n - m)^T / N``,
    ``l_1 >= l_2 >= ..``::

        y_nj = v_j . (x_n - m) / sqrt(max(l_j, eps l_1)),    j < dim
        out_n = y_n / ||y_n||

    A row at the mean has no direction: it comes back as zeros, never NaN, and so do all rows of constant
    data. Directions without variance (``dim`` above the rank) come back as zeros, up to rounding. The largest
    entry of each ``v_j`` by magnitude is positive, the first one among equals.

    Args:
        x: ``[N, D]`` or ``[B, N, D]`` (B separate problems), fp32, fp64, bf16 or fp16, ``N >= 1``. A tensor,
            a NumPy array (also a read-only memory map, read in blocks of rows) or any DLPack array.
        dim: in ``[1, D]``.
        eps: above 0; a direction with less than ``eps`` times the largest variance is shrunk towards zero,
            not blown up to unit variance.

    Returns:
        ``[N, dim]`` or ``[B, N, dim]``, the kind, dtype and device of ``x``, each row of norm 1 or 0. It
        carries no gradient.

    Raises:
        TypeError, ValueError: an argument is not as above, or ``x`` has NaN or infinite values.

    Cost: N D^2 multiply-adds and one D x D eigendecomposition a problem, all in fp64; ``x`` is read five
    times. Memory beside the result: O(D^2 + 4096 D) a problem.

    >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 0.5]])
    >>> pca_whiten(x, 2).abs()
    tensor([[0.7071, 0.7071],
            [0.7071, 0.7071],
            [0.7071, 0.7071],
            [0.7071, 0.7071],
            [0.0000, 0.0000]])

    Source: Caron, Bojanowski, Joulin, Douze, "Deep Clustering for Unsupervised Learning of Visual Features",
    ECCV 2018: features are PCA-reduced to 256 dimensions, whitened and L2-normalised.
    """
    out_like = arrays.like(x)
    rows = arrays.to_tensor(x, "x").detach()
    _check(rows, dim, eps)
    problems = rows if rows.ndim == 3 else rows.unsqueeze(0)
    try:
        out: Tensor = torch.ops.clustops.pca_whiten(problems, dim, eps)
    except LinAlgError:
        largest = float(problems.abs().max())
        reject(
            "x",
            "features with a covariance that has eigenvectors in fp64",
            f"values up to {largest:g}",
            "look for a diverged model",
        )
    return out_like(out if rows.ndim == 3 else out.squeeze(0))


def _check(x: Tensor, dim: int, eps: float) -> None:
    check_floating(x, "x")
    if x.ndim not in (2, 3):
        reject("x", "[N, D] or [B, N, D]", shape_of(x), "flatten each sample to one row")
    if x.numel() == 0:
        reject("x", "at least one row of one feature", shape_of(x), "drop empty problems before the call")
    check_count(dim, "dim", 1, "keep one direction or more")
    if dim > x.shape[-1]:
        reject("dim", f"at most the {x.shape[-1]} features of x", dim, "lower dim, or pass wider features")
    check_positive(eps, "eps", "pass the relative variance below which a direction is noise, such as 1e-5")
    check_finite(x, "x")
