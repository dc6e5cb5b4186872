"""The steps of k-means as batched ops: plain PyTorch, any device, any floating dtype, a few MB of
temporaries.

Sums do not depend on the order of the rows, so not on chunks, threads or ranks either. Each summand is
rounded to a grid that is coarse enough for float64 to add all rows without any rounding, and what the grid
cut off is summed the same way on a finer grid. Together the two carry about 106 - 2 log2(N) bits below the
largest summand: more than fp32 blocks combined in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import uniform

_ELEMENTS = 1 << 16  # of the largest temporary: it stays in a cache

PLUS_PLUS, RANDOM_ROWS, SPLIT, RELOCATE = range(4)


def draw(seed: int, use: int, restart: int, iteration: int, position: Tensor) -> Tensor:
    """Uniform float64 numbers: each use, restart and iteration has a stream of its own."""
    return uniform(seed, use + 4 * restart + (iteration << 32), position)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 input, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(n: int, per_row: int) -> list[slice]:
    size = max(1, _ELEMENTS // max(1, per_row))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def squared_distances(x: Tensor, centroids: Tensor) -> Tensor:
    """``||x_n - c_k||^2`` as ``[.., N, K]``, directly: ``||x||^2 - 2 x.c + ||c||^2`` cancels.

    The root that ``cdist`` takes costs the last bit; equal distances stay equal, and 0 stays 0.
    """
    direct = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x.contiguous(), centroids.contiguous(), compute_mode=direct).square()


def assign_l2(
    x: Tensor, centroids: Tensor, top: int, warm: Tensor | None = None, precision: str | None = None
) -> tuple[Tensor, Tensor]:
    """The ``top`` nearest centroids of each row, nearest first, ties to the lowest index.

    Args:
        x: ``[B, N, D]``. centroids: ``[B, K, D]``. top: in ``[1, K]``.
        warm: ``[B, N]`` int64, guesses of the labels; they change no result.
        precision: the lowest in which a kernel may multiply; ``None``: torch's setting.

    Returns:
        labels ``[B, N, top]`` int64 and squared distances ``[B, N, top]``, fp32 (fp64 for fp64 input).
    """
    dtype = accumulator(x.dtype)
    (b, n, d), k = x.shape, centroids.shape[1]
    centroids = centroids.to(dtype)
    labels = x.new_empty((b, n, top), dtype=torch.int64)
    distances = x.new_empty((b, n, top), dtype=dtype)
    for rows in _blocks(n, b * (k + d)):
        exact = squared_distances(x[:, rows].to(dtype), centroids)
        # A NaN row sorts like a row at infinity: its labels stay in range.
        ranked = exact.where(~exact.isnan(), torch.inf)
        if top == 1:
            order = ranked.argmin(-1, keepdim=True)
        else:
            order = torch.sort(ranked, dim=-1, stable=True).indices[..., :top]
        labels[:, rows] = order
        distances[:, rows] = exact.gather(-1, order)
    return labels, distances


def power_of_two(exponent: Tensor) -> Tensor:
    """``2^exponent`` in float64 without any rounding, exponents clamped to the normal range."""
    return ((exponent.to(torch.int64).clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


def units(bound: Tensor, n: Tensor) -> Tensor:
    """The two grids on which up to ``n`` numbers of magnitude up to ``bound`` add up exactly.

    With ``bound < 2^e`` and ``n < 2^c`` a sum is below ``2^(e+c)``; float64 holds it exactly when all
    summands are multiples of ``2^(e+c-53)``. What that cuts off is at most half a unit, and so on.

    Args:
        bound: ``[B, ...]`` float64. n: ``[B]`` int64.

    Returns:
        ``[B, 2, ...]`` float64, powers of two.
    """
    e = torch.frexp(bound).exponent.to(torch.int64)
    c = torch.frexp(n.to(torch.float64)).exponent.to(torch.int64).view(-1, *[1] * (bound.ndim - 1))
    return torch.stack([power_of_two(e + c - 53), power_of_two(e + 2 * c - 107)], dim=1)


def fold(values: Tensor, unit: Tensor, finer: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 ``values`` as two parts, each on its grid."""
    high = (values / unit).round_().mul_(unit)
    return high, (values - high).div_(finer).round_().mul_(finer)


def _weighted(x: Tensor, weights: Tensor) -> Tensor:
    """``w_n [x_n, 1]`` in float64, values and weight in one row; zeros for rows of weight 0."""
    values = x.new_ones((*x.shape[:-1], x.shape[-1] + 1), dtype=torch.float64)
    values[..., :-1] = x
    values *= weights.unsqueeze(-1)
    return values.masked_fill_(weights.unsqueeze(-1) <= 0, 0.0)  # also where x is NaN


def bounds(x: Tensor, weights: Tensor) -> Tensor:
    """The largest magnitude of ``w_n [x_n, 1]`` in each column.

    Args:
        x: ``[B, N, D]``. weights: ``[B, N]`` float64.

    Returns:
        ``[B, D + 1]`` float64, NaN where a row of positive weight has a NaN.
    """
    b, n, d = x.shape
    result = x.new_zeros((b, d + 1), dtype=torch.float64)
    for rows in _blocks(n, b * (d + 1)):
        result = torch.maximum(result, _weighted(x[:, rows], weights[:, rows]).abs().amax(1))
    return result


def sums(x: Tensor, labels: Tensor, weights: Tensor, grid: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``sum_n w_n [x_n, 1]`` over the rows of each cluster, and how many rows of positive weight it has.

    Args:
        x: ``[B, N, D]``. labels: ``[B, N]`` int64 in ``[-1, k)``, -1 for rows to leave out.
        weights: ``[B, N]`` float64. grid: ``[B, 2, D + 1]``, from ``units``.

    Returns:
        ``[B, 2, k, D + 1]`` float64, the two parts of each sum, and ``[B, k]`` int64. Results for parts of
        the rows add up, in any order, to the same bits.
    """
    b, n, d = x.shape
    bucket = torch.where((labels >= 0) & (weights > 0), labels, k)  # bucket k is dropped in the end
    bucket = bucket + torch.arange(b, device=x.device).unsqueeze(1) * (k + 1)
    total = x.new_zeros((2, b * (k + 1), d + 1), dtype=torch.float64)
    counts = x.new_zeros(b * (k + 1), dtype=torch.int64)
    for rows in _blocks(n, b * (d + 1)):
        index = bucket[:, rows].reshape(-1)
        for part, values in zip(
            total, fold(_weighted(x[:, rows], weights[:, rows]), grid[:, :1], grid[:, 1:]), strict=True
        ):
            part.index_add_(0, index, values.reshape(-1, d + 1))
        counts.index_add_(0, index, torch.ones_like(index))
    total = total.view(2, b, k + 1, d + 1)[:, :, :k].transpose(0, 1).contiguous()
    return total, counts.view(b, k + 1)[:, :k].contiguous()


def means_of(total: Tensor, previous: Tensor) -> Tensor:
    """Means from ``sums``, in the dtype of ``previous``, which stays where a cluster has no mass."""
    values = total[:, 0] + total[:, 1]
    mass = values[..., -1:]
    return torch.where(mass > 0, values[..., :-1] / mass.where(mass > 0, 1.0), previous).to(previous.dtype)


def cluster_means(x: Tensor, labels: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weighted mean of the rows of each label, zeros for none, and ``bincount(labels)``; label -1 is left
    out.

    Args:
        x: ``[B, N, D]``. labels: ``[B, N]``. weights: ``[B, N]`` float64.

    Returns:
        ``[B, k, D]``, fp32 (fp64 for fp64 input), and ``[B, k]`` int64.
    """
    b, _, d = x.shape
    grid = units(bounds(x, weights), (weights > 0).sum(1))
    total, _ = sums(x, labels, weights, grid, k)
    return means_of(total, x.new_zeros((b, k, d), dtype=accumulator(x.dtype))), count(labels, k)


def count(labels: Tensor, k: int) -> Tensor:
    """``bincount`` of each row of ``labels``, entries of -1 left out."""
    counts = labels.new_zeros((labels.shape[0], k + 1))
    counts.scatter_add_(1, torch.where(labels >= 0, labels, k), torch.ones_like(labels))
    return counts[:, :k].contiguous()


def integer_scale(bound: Tensor, n: Tensor) -> Tensor:
    """The power of two that makes ``n`` numbers in ``[0, bound]`` integers with a sum below ``2^62``."""
    e = torch.frexp(bound).exponent.to(torch.int64)
    return power_of_two(62 - torch.frexp(n.to(torch.float64)).exponent.to(torch.int64) - e)


def to_integer(values: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    """``round(w v scale)`` as int64, 0 for rows of weight 0; ``[B, N, ..]`` with weights ``[B, N, ..]``."""
    product = values.to(torch.float64) * weights * scale.view(-1, *[1] * (values.ndim - 1))
    return torch.where(weights > 0, product, 0.0).round().to(torch.int64)


def potentials(x: Tensor, candidates: Tensor, closest: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    """What the k-means++ potential would be with each candidate added.

    ``p_t = sum_n round(w_n min(closest_n, ||x_n - c_t||^2) scale)``

    Args:
        x: ``[B, N, D]``. candidates: ``[B, T, D]``. closest: ``[B, N]`` squared distances to the centroids so
            far. weights: ``[B, N]`` float64. scale: ``[B]`` float64, from ``integer_scale``.

    Returns:
        ``[B, T]`` int64: integers add up to the same in any order.
    """
    b, n, d = x.shape
    t = candidates.shape[1]
    result = x.new_zeros((b, t), dtype=torch.int64)
    for rows in _blocks(n, b * (t + d)):
        distances = squared_distances(x[:, rows].to(closest.dtype), candidates.to(closest.dtype))
        smaller = torch.minimum(distances, closest[:, rows].unsqueeze(-1))
        result += to_integer(smaller, weights[:, rows].unsqueeze(-1), scale).sum(1)
    return result


def unit_rows(x: Tensor) -> Tensor:
    """``x / ||x||`` in fp32 (fp64 for fp64 input), zero rows as they are; doing it twice changes no bit."""
    dtype = accumulator(x.dtype)
    norm = x.to(torch.float64).square().sum(-1, keepdim=True).sqrt()
    # A row of norm 1 within its own rounding is kept: dividing it again would only move its last bits.
    slack = 2.0**-23 if dtype == torch.float32 else 2.0**-44
    keep = (norm == 0) | ((norm - 1).abs() <= slack)
    return (x.to(torch.float64) / norm.where(~keep, 1.0)).to(dtype)
