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


def draws(position: Tensor, seed: int, use: int, restarts: int, iteration: int) -> Tensor:
    """``draw`` for each restart: ``[B, M]`` positions to ``[B * restarts, M]``, restarts side by side."""
    return torch.stack([draw(seed, use, r, iteration, position) for r in range(restarts)], 1).flatten(0, 1)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 input, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def blocks(n: int, per_row: int) -> list[slice]:
    """``n`` rows in blocks whose temporaries of ``per_row`` elements a row stay in a cache."""
    size = max(1, _ELEMENTS // max(1, per_row))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def squared_distances(x: Tensor, centroids: Tensor) -> Tensor:
    """``||x_n - c_k||^2`` as ``[.., N, K]``, directly: ``||x||^2 - 2 x.c + ||c||^2`` cancels.

    The root that ``cdist`` takes costs the last bit; equal distances stay equal, and 0 stays 0.
    """
    direct = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x.contiguous(), centroids.contiguous(), compute_mode=direct).square()


def assign_l2(x: Tensor, centroids: Tensor, top: int, precision: str | None = None) -> tuple[Tensor, Tensor]:
    """The ``top`` nearest centroids of each row, nearest first, ties to the lowest index.

    Args:
        x: ``[B, N, D]``. centroids: ``[B, K, D]``. top: in ``[1, K]``.
        precision: the lowest in which a kernel may multiply; ``None``: torch's setting.

    Returns:
        labels ``[B, N, top]`` int64 and squared distances ``[B, N, top]``, fp32 (fp64 for fp64 input).
    """
    dtype = accumulator(x.dtype)
    (b, n, d), k = x.shape, centroids.shape[1]
    centroids = centroids.to(dtype)
    labels = x.new_empty((b, n, top), dtype=torch.int64)
    distances = x.new_empty((b, n, top), dtype=dtype)
    for rows in blocks(n, b * (k + d)):
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
    for rows in blocks(n, b * (d + 1)):
        result = torch.maximum(result, _weighted(x[:, rows], weights[:, rows]).abs().amax(1))
    return result


def sums_(
    sums: Tensor,
    counts: Tensor,
    x: Tensor,
    labels: Tensor,
    weights: Tensor,
    grid: Tensor,
    before: Tensor | None = None,
) -> None:
    """Add ``sum_n w_n [x_n, 1]`` over the rows of each cluster, and how many rows of positive weight it has.

    Sums of parts of the rows add up, in any order, to the same bits. So does what rows bring to their cluster
    and take from the one they leave: nothing is ever rounded.

    Args:
        sums: ``[B, 2, K, D + 1]`` float64, the two parts of each sum. counts: ``[B, K]`` int64. Both are
            written.
        x: ``[B, N, D]``. labels: ``[B, N]`` int64 in ``[-1, K)``, -1 for rows to leave out.
        weights: ``[B, N]`` float64. grid: ``[B, 2, D + 1]``, from ``units``.
        before: ``[B, N]``, labels whose rows are in ``sums`` already: only rows with another one move.
    """
    b, n, d = x.shape
    k = counts.shape[1]
    first = torch.arange(b, device=x.device).unsqueeze(1) * (k + 1)
    added = sums.new_zeros((2, b * (k + 1), d + 1))
    number = counts.new_zeros(b * (k + 1))
    moves = [(labels, 1), *([] if before is None else [(before, -1)])]
    for rows in blocks(n, b * (d + 1)):
        parts = fold(_weighted(x[:, rows], weights[:, rows]), grid[:, :1], grid[:, 1:])
        for cluster, sign in moves:
            taken = (cluster[:, rows] >= 0) & (weights[:, rows] > 0)
            if before is not None:
                taken &= labels[:, rows] != before[:, rows]
            # Bucket k of each problem is dropped in the end.
            index = (torch.where(taken, cluster[:, rows], k) + first).reshape(-1)
            for part, values in zip(added, parts, strict=True):
                part.index_add_(0, index, values.reshape(-1, d + 1), alpha=sign)
            number.index_add_(0, index, torch.full_like(index, sign))
    sums += added.view(2, b, k + 1, d + 1)[:, :, :k].transpose(0, 1)
    counts += number.view(b, k + 1)[:, :k]


def means(sums: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each cluster from ``sums_``, and the sum of the squared moves of a problem's centroids.

    Args:
        sums: ``[B, 2, K, D + 1]``. previous: ``[B, K, D]``, fp32 or fp64; stays where a cluster has no mass.

    Returns:
        ``[B, K, D]`` in the dtype of ``previous``, and ``[B]`` float64.
    """
    values = sums[:, 0] + sums[:, 1]
    mass = values[..., -1:]
    result = torch.where(mass > 0, values[..., :-1] / mass.where(mass > 0, 1.0), previous).to(previous.dtype)
    return result, squared_shift(result, previous)


def squared_shift(centroids: Tensor, previous: Tensor) -> Tensor:
    """Sum of the squared moves of the centroids ``[B, K, D]``: ``[B]`` float64."""
    return (centroids.double() - previous.double()).square().sum(-1).sum(-1)


def cluster_means(x: Tensor, labels: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weighted mean of the rows of each label, zeros for none, and ``bincount(labels)``; label -1 is left
    out.

    Args:
        x: ``[B, N, D]``. labels: ``[B, N]``. weights: ``[B, N]`` float64.

    Returns:
        ``[B, k, D]``, fp32 (fp64 for fp64 input), and ``[B, k]`` int64.
    """
    b, n, d = x.shape
    grid = units(bounds(x, weights), (weights > 0).sum(1))
    total, occupied = x.new_zeros((b, 2, k, d + 1), dtype=torch.float64), labels.new_zeros((b, k))
    sums_(total, occupied, x, labels, weights, grid)
    nothing = x.new_zeros((b, k, d), dtype=accumulator(x.dtype))
    return means(total, nothing)[0], counts(labels, weights.new_ones(()).expand(b, n), k)


def counts(labels: Tensor, weights: Tensor, k: int) -> Tensor:
    """How many rows of positive weight have each label: ``[B, k]`` int64; entries of -1 are left out."""
    result = labels.new_zeros((labels.shape[0], k + 1))
    bucket = torch.where((labels >= 0) & (weights > 0), labels, k)
    result.scatter_add_(1, bucket, torch.ones_like(bucket))
    return result[:, :k].contiguous()


def unit_rows(x: Tensor) -> Tensor:
    """``x / ||x||`` in fp32 (fp64 for fp64 input), zero rows as they are; doing it twice changes no bit."""
    dtype = accumulator(x.dtype)
    norm = x.to(torch.float64).square().sum(-1, keepdim=True).sqrt()
    # A row of norm 1 within its own rounding is kept: dividing it again would only move its last bits.
    slack = 2.0**-23 if dtype == torch.float32 else 2.0**-44
    keep = (norm == 0) | ((norm - 1).abs() <= slack)
    return (x.to(torch.float64) / norm.where(~keep, 1.0)).to(dtype)
