"""Class losses on a GPU of rows too wide for its kernels: torch multiplies blocks, kernels do all else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import extension, stream_of, view, views
from .contrastive_cpu import new_results
from .contrastive_weighted_blocks import multiply

# Rows and columns of a block: its scores, 32 MB, and their gradients stay in the second cache of a large GPU.
_ROWS = 1024
_COLUMNS = 8192
_TILE = 128  # blocks are of whole tiles, the last of which is padded with zeros


def contrastive_rows(
    features: Tensor,
    labels: Tensor | None,
    confidence: Tensor | None,
    first: int,
    count: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``clustops::contrastive_rows``."""
    results = new_results(features, count)
    blocks = _Blocks(features, first, count)
    workspace = _workspace(features, backward=False)
    chunks = extension.ContrastiveChunks(
        *views(features, labels, confidence),
        first,
        count,
        *options,
        *views(*results, workspace, blocks.z),
        stream_of(features),
    )
    for block in blocks:
        chunks.sums(view(blocks.scores(*block)), block)
    return results


def contrastive_rows_backward(
    grad: Tensor,
    features: Tensor,
    labels: Tensor | None,
    confidence: Tensor | None,
    lse: Tensor,
    first: int,
    count: int,
    *options: Any,
) -> Tensor:
    """``clustops::contrastive_rows_backward``."""
    gradient = features.new_empty((count, *features.shape[1:]))
    blocks = _Blocks(features, first, count)
    workspace = _workspace(features, backward=True)
    chunks = extension.ContrastiveChunksBackward(
        view(grad.detach().to(lse.dtype)),
        *views(features, labels, confidence, lse),
        first,
        count,
        *options,
        *views(gradient, workspace, blocks.z),
        stream_of(features),
    )
    sums = blocks.z.new_empty((blocks.last - blocks.first, features.shape[2]), dtype=torch.float32)
    room = None if features.dtype == torch.float32 else torch.empty_like(blocks.room, dtype=features.dtype)
    for row, rows, column, columns in blocks:
        scores = blocks.scores(row, rows, column, columns)
        turned = scores if room is None else room[: scores.numel()].view_as(scores)
        chunks.turn(view(scores), view(turned), (row, rows, column, columns))
        into = sums[row - blocks.first :][:rows]
        multiply(turned, blocks.z[column : column + columns], into, add=column > 0)
    chunks.end(view(sums), blocks.first)
    return gradient


class _Blocks:
    """Blocks of scores, (row, rows, column, columns), one after the other in the same memory."""

    def __init__(self, features: Tensor, first: int, count: int) -> None:
        n, views, width = features.shape
        self.padded = _whole_tiles(n * views)
        self.z = features.new_empty((self.padded, width))
        self.first = first * views // _TILE * _TILE
        self.last = _whole_tiles((first + count) * views) if count else self.first
        size = min(_ROWS, self.last - self.first) * min(_COLUMNS, self.padded)
        self.room = features.new_empty((size,), dtype=torch.float32)

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        for row in range(self.first, self.last, _ROWS):
            for column in range(0, self.padded, _COLUMNS):
                yield row, min(_ROWS, self.last - row), column, min(_COLUMNS, self.padded - column)

    def scores(self, row: int, rows: int, column: int, columns: int) -> Tensor:
        """z z' of a block."""
        out = self.room[: rows * columns].view(rows, columns)
        return multiply(self.z[row : row + rows], self.z[column : column + columns].T, out)


def _whole_tiles(rows: int) -> int:
    return -(-rows // _TILE) * _TILE


def _workspace(features: Tensor, *, backward: bool) -> Tensor:
    size = extension.contrastive_chunked_workspace(view(features), backward)
    return features.new_empty(size // 4, dtype=torch.int32)
