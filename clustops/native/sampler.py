"""clustops::largest_label, cluster_members, sampler_order, _range, _batches, _fingerprint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import sampler as reference
from . import extension, register
from . import sampler_cpu as cpu


def _fake_word(labels: Tensor) -> Tensor:
    return labels.new_empty((), dtype=torch.int64)


def _fake_members(labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    dtype = torch.int32 if labels.numel() < 2**31 else torch.int64
    labelled = torch.library.get_ctx().new_dynamic_size()
    return labels.new_empty(labelled, dtype=dtype), labels.new_empty(k + 1, dtype=torch.int64)


def _fake_order(positions: Tensor, *unused: Any) -> Tensor:
    return positions.new_empty(positions.shape)


def _fake_range(start: int, step: int, count: int, members: Tensor, offsets: Tensor, *unused: Any) -> Tensor:
    return offsets.new_empty(count)


def _fake_batches(
    batches: Tensor,
    members: Tensor,
    offsets: Tensor,
    clusters: Tensor,
    clusters_per_batch: int,
    samples_per_cluster: int,
    *unused: Any,
) -> Tensor:
    return batches.new_empty(batches.shape[0], clusters_per_batch * samples_per_cluster)


_cpu = hasattr(extension, "sampler_order")

register(
    "largest_label(Tensor labels) -> Tensor",
    reference=reference.largest_label,
    fake=_fake_word,
    cpu=cpu.largest_label if _cpu else None,
)
register(
    "sampler_fingerprint(Tensor numbers) -> Tensor",
    reference=reference.fingerprint,
    fake=_fake_word,
    cpu=cpu.fingerprint if _cpu else None,
)
register(
    "cluster_members(Tensor labels, int k) -> (Tensor members, Tensor offsets)",
    reference=reference.cluster_members,
    fake=_fake_members,
    cpu=cpu.cluster_members if _cpu else None,
)
register(
    "sampler_order(Tensor positions, Tensor members, Tensor offsets, Tensor bounds, int seed, int epoch, "
    "str replacement) -> Tensor",
    reference=reference.sampler_order,
    fake=_fake_order,
    cpu=cpu.sampler_order if _cpu else None,
)
register(
    "sampler_range(int start, int step, SymInt count, Tensor members, Tensor offsets, Tensor bounds, "
    "int seed, int epoch, str replacement) -> Tensor",
    reference=reference.sampler_range,
    fake=_fake_range,
    cpu=cpu.sampler_range if _cpu else None,
)
register(
    "sampler_batches(Tensor batches, Tensor members, Tensor offsets, Tensor clusters, "
    "int clusters_per_batch, int samples_per_cluster, int seed, int epoch) -> Tensor",
    reference=reference.sampler_batches,
    fake=_fake_batches,
    cpu=cpu.sampler_batches if _cpu else None,
)
