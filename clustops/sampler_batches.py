"""Batches of P clusters with m samples each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_count, reject
from .sampler_resume import ResumableSampler


class MPerClusterBatchSampler(ResumableSampler[list[int]]):
    """Batches of ``samples_per_cluster`` samples from each of ``clusters_per_batch`` distinct clusters.

    For losses that need several samples of a cluster in a batch. A pass takes the clusters in a shuffled
    order, as many batches as they fill; what is left of a pass that does not divide is dropped, another part
    each pass. Of n members a batch takes distinct ones, or, where n < m, each m div n times and some once
    more. Batch b is a pure function of (seed, epoch, b), written down in ``clustops/reference/sampler.py``.
    Give it to ``DataLoader`` as ``batch_sampler``; over ranks Lightning then wants
    ``Trainer(use_distributed_sampler=False)``.

    The same epoch gives the same order, pass after pass: call ``set_epoch(epoch)`` before each pass.

    Args:
        labels: ``[N]`` integers below 2^24 or 64 N, the cluster of each sample; negative ones and empty
            clusters are excluded.
        clusters_per_batch: P >= 1, at most the number of non-empty clusters.
        samples_per_cluster: m >= 1.
        num_batches: batches in an epoch, over all ranks; the default is ``labelled samples div (P m)``, 1 at
            least.
        seed: any integer, the same on all ranks.
        num_replicas, rank: number of ranks and this one's; both or neither. Rank r takes the batches r, r +
            W, ...
        drop_last: where W does not divide ``num_batches``, leave the rest out; else ranks go on to later
            batches.

    Raises:
        TypeError, ValueError: an argument is out of its range.

    Cost: a counting sort when labels are set; O(P m) a batch; memory 4 bytes a sample and 16 a cluster.

    Example:
        >>> batch = next(iter(MPerClusterBatchSampler(torch.tensor([0, 0, 1, 1, 2, 2]), 2, 2)))
        >>> [batch[0] // 2 == batch[1] // 2, batch[2] // 2 == batch[3] // 2, len(set(batch))]
        [True, True, 4]
    """

    def __init__(
        self,
        labels: Any,
        clusters_per_batch: int,
        samples_per_cluster: int,
        *,
        num_batches: int | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
    ) -> None:
        check_count(clusters_per_batch, "clusters_per_batch", 1, "pass the number of clusters in a batch")
        check_count(
            samples_per_cluster, "samples_per_cluster", 1, "pass the number of samples of each cluster"
        )
        if num_batches is not None:
            check_count(num_batches, "num_batches", 1, "pass the number of batches in an epoch, or None")
        self.clusters_per_batch, self.samples_per_cluster = int(clusters_per_batch), int(samples_per_cluster)
        self.batch_size = self.clusters_per_batch * self.samples_per_cluster
        self._given = num_batches
        super().__init__(labels, seed=seed, num_replicas=num_replicas, rank=rank, drop_last=drop_last)

    @property
    def sampler(self) -> MPerClusterBatchSampler:
        """This sampler: where trainers look for the ``set_epoch`` of a batch sampler."""
        return self

    def batches(self, start: int, stop: int) -> Tensor:
        """Batches ``start`` to before ``stop`` of the global order: int64 ``[stop - start, P m]``."""
        check_count(start, "start", 0, "pass the number of a batch")
        check_count(stop, "stop", start, "pass a number from start on")
        return self._take(start, 1, stop - start)

    def _measure(self, counts: Tensor) -> None:
        clusters = counts.nonzero().flatten()
        if self.clusters_per_batch > clusters.numel():
            reject(
                "clusters_per_batch",
                f"at most the {clusters.numel()} clusters with samples",
                self.clusters_per_batch,
                "put fewer clusters in a batch",
            )
        self._clusters = clusters
        self.order_size = int(self._given or max(int(counts.sum()) // self.batch_size, 1))

    def _take(self, start: int, step: int, count: int) -> Tensor:
        result: Tensor = torch.ops.clustops.sampler_batches(
            start + step * torch.arange(count),
            self.members,
            self.offsets,
            self._clusters,
            self.clusters_per_batch,
            self.samples_per_cluster,
            self._seed(),
            self.epoch,
        )
        return result

    def _settings(self) -> dict[str, Any]:
        return {
            "clusters_per_batch": self.clusters_per_batch,
            "samples_per_cluster": self.samples_per_cluster,
        }
