"""The rows that k-means goes over, wherever they lie: in memory, in a file, on other ranks.

Everything that reads ``x`` or talks to other ranks is here. Rows are seen in chunks on the compute device;
results do not depend on how the rows are cut into chunks or spread over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import reject, values_are_checked
from .distributed import (
    Group,
    all_gather_stack,
    all_reduce_max,
    all_reduce_sum,
    all_reduce_sum_together,
    rank,
)
from .kmeans_source import Reader, Source
from .native import kmeans_seeding as _seeding  # noqa: F401  (registers the ops)
from .native import kmeans_update as _update  # noqa: F401
from .reference.kmeans_ops import units


def repeat(tensor: Tensor, copies: int) -> Tensor:
    """``[B, ...]`` as ``[B * copies, ...]``, a problem's copies side by side; a view where strides allow."""
    return tensor.unsqueeze(1).expand(-1, copies, *[-1] * (tensor.ndim - 1)).flatten(0, 1)


class Assigned(NamedTuple):
    """The nearest centroids of rows and what belongs to these labels, of ``E`` entries.

    Attributes:
        labels, distances: ``[E, N]``.
        sums: ``[E, 2, K, D + 1]`` float64. counts: ``[E, K]``, rows of positive weight.
    """

    labels: Tensor
    distances: Tensor
    sums: Tensor
    counts: Tensor


class Rows:
    """``B`` problems of ``N`` rows each, on this rank.

    Methods take ``E = B * copies`` entries (restarts of a problem side by side) and find ``copies`` from
    their arguments. A row of weight 0 gets a label but counts nowhere else. A row's index is its place in
    the rows of all ranks, in rank order.
    """

    def __init__(
        self,
        x: Tensor | Reader,
        weights: Tensor | None,
        lengths: Tensor | None,
        *,
        metric: str = "l2",
        precision: str | None = None,
        device: torch.device | None = None,
        group: Group = None,
        progress: bool = False,
    ) -> None:
        """Read the rows once for their bounds.

        Args:
            x, metric, device, progress: as in ``Source``.
            weights: ``[B, N]``. lengths: ``[B]``; rows past it have weight 0.
        """
        self.source = source = Source(x, metric=metric, device=device, progress=progress, narrow=True)
        self.metric, self.precision, self.group = metric, precision, group
        self.device, self.dtype = source.device, source.dtype
        self.batch, self.n, self.d = source.batch, source.n, source.d
        self.lengths = None if lengths is None else lengths.to(self.device)
        self.weights = self._effective(weights)
        self.offset, self.n_total = self._place()
        self.n_valid = all_reduce_sum((self.weights > 0).sum(1), group)
        self.bounds = self._bounds()

    def _effective(self, weights: Tensor | None) -> Tensor:
        one = torch.ones((), dtype=torch.float64, device=self.device).expand(self.batch, self.n)
        return self.outside(one if weights is None else weights.to(self.device, torch.float64), 0.0)

    def outside(self, values: Tensor, fill: float) -> Tensor:
        """``values [B, N]`` with ``fill`` in the rows past their problem's length."""
        if self.lengths is None:
            return values
        inside = torch.arange(self.n, device=self.device) < self.lengths.unsqueeze(1)
        return torch.where(inside, values, fill)

    def _place(self) -> tuple[int, int]:
        """How many rows lie on the ranks before this one, and on all ranks."""
        if self.group is None:
            return 0, self.n
        before, total = self.before(torch.full((1,), self.n, device=self.device))
        return int(before), int(total)

    @cached_property
    def grid(self) -> Tensor:
        """The grids of all sums, ``[B, 2, D + 1]``."""
        return units(self.bounds, self.n_valid)

    def _bounds(self) -> Tensor:
        """The largest magnitude in each column over all ranks: ``[B, D + 1]``."""
        bound = torch.zeros((self.batch, self.d + 1), dtype=torch.float64, device=self.device)
        for rows, chunk in self.chunks():
            bound = torch.maximum(bound, torch.ops.clustops.kmeans_bounds(chunk, self.weights[:, rows]))
        # A maximum over ranks may lose a NaN but no infinity: all ranks reject what one has found.
        bound = all_reduce_max(bound.where(~bound.isnan(), torch.inf), self.group)
        if values_are_checked(bound) and not bool(torch.isfinite(bound).all()):
            cure = "remove or mask these rows, or give them weight 0"
            reject(self.source.name, "finite", "NaN or infinite values", cure)
        return bound

    def chunks(self, copies: int = 1, *, small: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the rows and ``[B * copies, n, D]`` of them, as ``Source.chunks`` cuts them."""
        for rows, chunk in self.source.chunks(copies, small=small):
            yield rows, repeat(chunk, copies)

    def copies(self, entries: Tensor) -> int:
        """How many entries there are for each problem."""
        return entries.shape[0] // self.batch

    def at_once(self) -> Tensor | None:
        """``[B, N, D]``, prepared, where all rows are in this process and one chunk; ``None`` elsewhere."""
        if self.group is not None:
            return None
        return self.source.at_once()

    def assign(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest of ``centroids [E, K, D]`` for each row: labels and squared distances ``[E, N]``."""
        parts = [self._nearest(chunk, centroids) for _, chunk in self.chunks(self.copies(centroids))]
        return joined([labels for labels, _ in parts]), joined([distances for _, distances in parts])

    def assign_and_sum(self, centroids: Tensor, before: Assigned | None = None) -> Assigned:
        """``assign`` and, in the same pass, the sums and counts of each cluster, over all ranks.

        Args:
            before: what this returned for other centroids. It is used up: its sums become the new ones, which
                costs a look at those rows only whose label changed. Sums are exact, so the bits are the same.
        """
        copies, (e, k, d) = self.copies(centroids), centroids.shape
        if before is None or self.group is not None:
            sums = torch.zeros((e, 2, k, d + 1), dtype=torch.float64, device=self.device)
            counts = torch.zeros((e, k), dtype=torch.int64, device=self.device)
        else:
            sums, counts = before.sums, before.counts
        old = None if before is None else before.labels
        found, far = [], []
        for rows, chunk in self.chunks(copies):
            labels, distances = self._nearest(chunk, centroids)
            weights = repeat(self.weights[:, rows], copies)
            self.add_rows(sums, counts, chunk, labels, weights, None if old is None else old[:, rows])
            found.append(labels)
            far.append(distances)
        sums, counts = all_reduce_sum_together([sums, counts], self.group)
        if before is not None and self.group is not None:
            sums, counts = sums + before.sums, counts + before.counts
        return Assigned(joined(found), joined(far), sums, counts)

    def _nearest(self, chunk: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        nearest = torch.ops.clustops.kmeans_assign(chunk, centroids, 1, self.precision)
        labels, distances = (t.squeeze(-1) for t in nearest)
        return labels, distances

    def add_rows(
        self,
        sums: Tensor,
        counts: Tensor,
        rows: Tensor,
        labels: Tensor,
        weights: Tensor,
        before: Tensor | None = None,
    ) -> None:
        """Add ``rows [E, n, D]`` by label to sums and counts, on the grid of all rows."""
        grid = repeat(self.grid, self.copies(rows))
        torch.ops.clustops.kmeans_sums_(sums, counts, rows, labels, weights, grid, before)

    def sum_labels(self, labels: Tensor, k: int) -> Tensor:
        """Sums ``[E, 2, K, D + 1]`` of all rows by the given ``labels [E, N]``."""
        copies, e = self.copies(labels), labels.shape[0]
        sums = torch.zeros((e, 2, k, self.d + 1), dtype=torch.float64, device=self.device)
        counts = torch.zeros((e, k), dtype=torch.int64, device=self.device)
        for rows, chunk in self.chunks(copies):
            self.add_rows(sums, counts, chunk, labels[:, rows], repeat(self.weights[:, rows], copies))
        return all_reduce_sum(sums, self.group)

    def own_distances(self, labels: Tensor, centroids: Tensor) -> Tensor:
        """``||x_n - c_label(n)||^2`` for labels that need not be the nearest; ``[E, N]``."""
        parts = []
        for rows, chunk in self.chunks(self.copies(labels), small=True):
            own = centroids.gather(1, labels[:, rows].clamp(min=0).unsqueeze(-1).expand(-1, -1, self.d))
            parts.append((chunk - own).square().sum(-1))
        return torch.cat(parts, 1)

    def count(self, labels: Tensor, k: int, *, weighted: bool = True) -> Tensor:
        """Rows with each label, over all ranks: ``[E, K]``; ``weighted``: only those of positive weight."""
        weights = repeat(self.weights, self.copies(labels)) if weighted else None
        return all_reduce_sum(counts_of(labels, k, weights), self.group)

    def total(self, values: Tensor) -> Tensor:
        """``sum_n w_n v_n`` over all ranks, float64 ``[E]``, the same bits for any sharding."""
        copies = self.copies(values)
        weights, column = repeat(self.weights, copies), values.unsqueeze(-1)
        bound = all_reduce_max(torch.ops.clustops.kmeans_bounds(column, weights), self.group)
        sums = torch.zeros((values.shape[0], 2, 1, 2), dtype=torch.float64, device=self.device)
        counts = torch.zeros((values.shape[0], 1), dtype=torch.int64, device=self.device)
        together = torch.zeros((), dtype=torch.int64, device=self.device).expand(values.shape)
        grid = units(bound, repeat(self.n_valid, copies))
        torch.ops.clustops.kmeans_sums_(sums, counts, column, together, weights, grid)
        return all_reduce_sum(sums, self.group)[:, :, 0, 0].sum(1)

    def take(self, index: Tensor) -> Tensor:
        """The rows with these indices: ``[E, m]`` to ``[E, m, D]``; zeros for an index of -1."""
        local, owned = self._local(index)
        if self.n == 0:
            rows = torch.zeros((*index.shape, self.d), dtype=self.dtype, device=self.device)
        else:
            rows = self.source.take(local.reshape(self.batch, -1)).view(*index.shape, self.d)
        return all_reduce_sum(torch.where(owned.unsqueeze(-1), rows, 0.0), self.group)

    def take_values(self, values: Tensor, index: Tensor) -> Tensor:
        """``values [E, N]`` at these indices ``[E, m]``; 0 for an index of -1."""
        local, owned = self._local(index)
        picked = torch.zeros_like(index, dtype=values.dtype) if self.n == 0 else values.gather(1, local)
        return all_reduce_sum(torch.where(owned, picked, 0), self.group)

    def put_values(self, values: Tensor, index: Tensor, new: Tensor) -> Tensor:
        """``values [E, N]`` with ``new [E, m]`` at these indices; an index of -1 changes nothing."""
        local, owned = self._local(index)
        dump = torch.nn.functional.pad(values, (0, 1))
        return dump.scatter(1, torch.where(owned, local, self.n), new)[:, : self.n]

    def _local(self, index: Tensor) -> tuple[Tensor, Tensor]:
        local = index - self.offset
        return local.clamp(0, max(0, self.n - 1)), (local >= 0) & (local < self.n)

    def positions(self) -> Tensor:
        """The index of each row: ``[N]``."""
        return torch.arange(self.n, device=self.device) + self.offset

    def before(self, count: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of ``count [E]`` over the ranks before this one and over all ranks."""
        if self.group is None:
            return torch.zeros_like(count), count
        gathered = all_gather_stack(count, self.group)
        return gathered[: rank(self.group)].sum(0), gathered.sum(0)

    def potentials(self, candidates: Tensor, closest: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The integer potential with each of ``candidates [E, T, D]`` added to the centroids: ``[E, T]``.

        And ``[E, N]``, which of them would improve which row, for ``lower``.
        """
        copies = self.copies(candidates)
        result = torch.zeros(candidates.shape[:2], dtype=torch.int64, device=self.device)
        improves = []
        for rows, chunk in self.chunks():
            weights = repeat(self.weights[:, rows], copies)
            after, mask = torch.ops.clustops.kmeans_potentials(
                chunk, candidates, closest[:, rows], weights, scale
            )
            result += after
            improves.append(mask)
        return all_reduce_sum(result, self.group), joined(improves)

    def lower(
        self,
        closest: Tensor,
        centroid: Tensor,
        improves: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> None:
        """Lower ``closest [E, N]`` where ``centroid [E, 1, D]`` is nearer.

        Args:
            improves, chosen: from ``potentials``, and ``[E]`` which candidate it is: the rows to look at.
        """
        for rows, chunk in self.chunks():
            mask = None if improves is None else improves[:, rows]
            torch.ops.clustops.kmeans_closest_(closest[:, rows], chunk, centroid, mask, chosen)

    def distances_to(self, centroid: Tensor) -> Tensor:
        """``||x_n - c||^2`` for one ``centroid [E, 1, D]``: ``[E, N]``."""
        closest = torch.full((centroid.shape[0], self.n), torch.inf, dtype=self.dtype, device=self.device)
        self.lower(closest, centroid)
        return closest


def counts_of(labels: Tensor, k: int, weights: Tensor | None = None) -> Tensor:
    """How many rows have each of ``labels [E, N]``, -1 left out, and only those of positive weight."""
    if weights is None:
        weights = torch.ones((), dtype=torch.float64, device=labels.device).expand(labels.shape)
    counts: Tensor = torch.ops.clustops.kmeans_counts(labels, weights, k)
    return counts


def joined(parts: list[Tensor]) -> Tensor:
    """Chunks of ``[E, n, ..]`` side by side; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def largest(values: Tensor) -> Tensor:
    """Largest of each row of ``[E, N]`` and 0."""
    return torch.nn.functional.pad(values, (0, 1)).amax(1)
