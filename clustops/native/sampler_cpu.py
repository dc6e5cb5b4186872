"""The samplers' ops on a CPU: results and workspace, calls of kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import extension, view, views


def largest_label(labels: Tensor) -> Tensor:
    """``clustops::largest_label``."""
    return torch.tensor(extension.largest_label(view(labels), torch.get_num_threads()))


def fingerprint(numbers: Tensor) -> Tensor:
    """``clustops::sampler_fingerprint``."""
    return torch.tensor(extension.fingerprint(view(numbers.contiguous()), torch.get_num_threads()))


def cluster_members(labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``clustops::cluster_members``."""
    n, threads = labels.numel(), torch.get_num_threads()
    dtype = torch.int32 if n < 2**31 else torch.int64
    # Counts of a range of samples each: together no larger than the table.
    ranges = max(1, min(threads, n // max(1, k)))
    cursors = labels.new_zeros((ranges, k), dtype=dtype)
    offsets = labels.new_empty(k + 1, dtype=torch.int64)
    given = view(labels), view(cursors), view(offsets)
    extension.count_members(*given, threads)
    members = labels.new_empty(int(offsets[-1]), dtype=dtype)
    extension.place_members(*given, view(members), threads)
    return members, offsets


def sampler_order(positions: Tensor, *rest: Any) -> Tensor:
    """``clustops::sampler_order``."""
    result = torch.empty_like(positions, memory_format=torch.contiguous_format)
    return _order(result, view(positions.contiguous()), 0, 1, *rest)


def sampler_range(start: int, step: int, count: int, members: Tensor, offsets: Tensor, *rest: Any) -> Tensor:
    """``clustops::sampler_range``."""
    return _order(offsets.new_empty(count), None, start, step, members, offsets, *rest)


def _order(
    result: Tensor,
    positions: Any,
    start: int,
    step: int,
    members: Tensor,
    offsets: Tensor,
    bounds: Tensor,
    *rest: Any,
) -> Tensor:
    given = views(members, offsets, bounds)
    extension.sampler_order(view(result), positions, start, step, *given, *rest, torch.get_num_threads())
    return result


def sampler_batches(
    batches: Tensor,
    members: Tensor,
    offsets: Tensor,
    clusters: Tensor,
    clusters_per_batch: int,
    samples_per_cluster: int,
    seed: int,
    epoch: int,
) -> Tensor:
    """``clustops::sampler_batches``."""
    result = batches.new_empty(batches.shape[0], clusters_per_batch * samples_per_cluster)
    given = views(batches, members, offsets, clusters)
    sizes = clusters_per_batch, samples_per_cluster
    extension.sampler_batches(view(result), *given, *sizes, seed, epoch, torch.get_num_threads())
    return result
