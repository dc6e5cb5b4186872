"""The contrastive loss under any weights on a CPU: blocks of inner products by torch, all else by kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference import contrastive_rows as reference
from . import dense_rows, extension, view

# Rows and columns of a block of inner products: 1 MB in fp32 stays in the second cache of a core.
_ROWS = 256
_COLUMNS = 1024

# Scores between +-_SPREAD have exponentials whose sums and quotients are normal numbers of fp32.
_SPREAD = 40.0


def weighted_contrastive_rows(
    features: Tensor, pair_weights: Tensor, first: int, temperature: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``clustops::weighted_contrastive_rows``."""
    rows = _rows(features, normalize)
    norms = reference.extreme_norms(features, None, rows.dtype)
    (count, n), views = pair_weights.shape, features.shape[1]
    bound = (1.0 if normalize else float(norms[1]) ** 2) / temperature
    # Under one shift for all scores, that of a pair serves both of its rows.
    mirrored = bound <= _SPREAD
    shift = rows.new_full(
        (count * views,), bound / math.log(2) if mirrored else -math.inf, dtype=torch.double
    )
    partition, weighted = torch.zeros_like(shift), torch.zeros_like(shift)
    total = shift.new_zeros(count)
    blocks = _Blocks(rows, views)
    given = [
        view(t) for t in (blocks.room, dense_rows(pair_weights.detach()), shift, partition, weighted, total)
    ]
    for place in blocks.places(first, count, n, triangle=mirrored):
        blocks.multiply(*place)
        extension.weighted_sums(
            *given, (views, first, *place), temperature, mirrored, torch.get_num_threads()
        )
    lse = partition.log2_().add_(shift).mul_(math.log(2)).view(count, views)
    lse.clamp_min_(torch.finfo(rows.dtype).min)
    mean = weighted.view(count, views) / (temperature * total[:, None])
    norms = torch.where(total.isnan().any(), torch.nan, norms)
    loss = torch.where(total[:, None] > 0, lse - mean, 0) + torch.where(norms[1].isnan(), torch.nan, 0)
    return loss.to(rows.dtype), lse.to(rows.dtype), total.to(rows.dtype), norms


def weighted_contrastive_rows_backward(
    grad: Tensor,
    features: Tensor,
    pair_weights: Tensor,
    lse: Tensor,
    weight: Tensor,
    first: int,
    temperature: float,
    normalize: bool,
) -> Tensor:
    """``clustops::weighted_contrastive_rows_backward``."""
    rows, (count, n), views = _rows(features, normalize), pair_weights.shape, features.shape[1]
    grad = torch.where(weight[:, None] > 0, grad, 0).to(rows.dtype)
    share = torch.where(weight[:, None] > 0, grad / weight[:, None], 0)
    per_row = [t.flatten() for t in (grad, lse / math.log(2), share)]
    blocks, gradient = _Blocks(rows, views), torch.zeros_like(rows)
    given = [view(t) for t in (blocks.room, dense_rows(pair_weights), *per_row)]
    for place in blocks.places(first, count, n, triangle=True):
        g = blocks.multiply(*place)
        extension.weighted_gradient(*given, (views, first, *place), temperature, torch.get_num_threads())
        row, height, column, width = place
        anchors, columns = (
            slice(row * views, (row + height) * views),
            slice(column * views, (column + width) * views),
        )
        gradient[anchors].addmm_(g, rows[columns])
        # Columns that are rows of no other block: beyond those of this one, or of no anchor.
        is_anchor = first <= column < first + count
        beyond = max(0, row + height - column) * views if is_anchor else 0
        gradient[columns][beyond:].addmm_(g[:, beyond:].T, rows[anchors])
    gradient = gradient.div_(temperature).view(features.shape)
    return reference.through_norm(gradient, features, rows.view(features.shape), normalize)


def _rows(features: Tensor, normalize: bool) -> Tensor:
    """z ``[N V, D]``."""
    return reference.unit_rows(features.detach(), normalize).flatten(0, 1).contiguous()


class _Blocks:
    """Blocks of inner products of rows, one after the other in the same memory."""

    def __init__(self, rows: Tensor, views: int) -> None:
        self.rows, self.views = rows, views
        self.height, self.width = (max(1, most // views) for most in (_ROWS, _COLUMNS))
        samples = rows.shape[0] // views
        size = min(self.height, samples) * min(self.width, samples) * views**2
        self.room = rows.new_empty((size,))

    def places(
        self, first: int, count: int, n: int, *, triangle: bool
    ) -> Iterator[tuple[int, int, int, int]]:
        """Samples as (row, rows, column, columns): anchors against all, or those above the diagonal.

        The columns of a block are all anchors or none.
        """
        for row in range(first, first + count, self.height):
            rows = min(self.height, first + count - row)
            for begin, end in ((0, first), (row if triangle else first, first + count), (first + count, n)):
                for column in range(begin, end, self.width):
                    yield row, rows, column, min(self.width, end - column)

    def multiply(self, row: int, rows: int, column: int, columns: int) -> Tensor:
        """The products of a block ``[rows V, columns V]``."""
        v = self.views
        a, b = self.rows[row * v : (row + rows) * v], self.rows[column * v : (column + columns) * v]
        return torch.mm(a, b.T, out=self.room[: a.shape[0] * b.shape[0]].view(a.shape[0], b.shape[0]))
