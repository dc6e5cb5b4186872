"""Samplers that draw clusters evenly, and the weights that do the same to a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_choice, check_count, reject
from .reference.sampler import ORDER, keys, quota_bounds
from .sampler_batches import MPerClusterBatchSampler
from .sampler_resume import ResumableSampler
from .sampler_weights import (
    balanced_quota,
    check_counts,
    check_number,
    cluster_members,
    cluster_weights,
    draw_weights,
    fingerprint,
    given_weights,
)

__all__ = [
    "InverseClusterSizeSampler",
    "MPerClusterBatchSampler",
    "balanced_quota",
    "cluster_members",
    "cluster_weights",
]


class InverseClusterSizeSampler(ResumableSampler[int]):
    r"""Data set indices drawn with :math:`p(\text{cluster}) \propto n^{1 - power}`, in a stateless order.

    Each epoch, cluster k gets an integer quota: ``num_samples`` times its share, rounded up or down (at
    random by epoch, so that the mean over epochs is the share itself), with the sum ``num_samples``. The
    quotas' slots are shuffled over the epoch. ``order[position]`` is a pure function of (seed, epoch,
    position), bit-stable over platforms, threads and ranks, written down in
    ``clustops/reference/sampler.py``. So it resumes at any position at once, ranks are disjoint without
    talking to each other, and no global random state is touched.

    The same epoch gives the same order, pass after pass: call ``set_epoch(epoch)`` before each pass.

    Without ``num_replicas`` every process iterates the same whole order: right for one process, Accelerate
    and Hugging Face's Trainer, which cut it up themselves. With it, rank r takes positions r, r + W, ...:
    right for plain DDP and Lightning. If W does not divide the epoch, its first indices come again at the
    end (or, with ``drop_last``, the last ones are left out), so that all ranks have the same number.

    Args:
        labels: ``[N]`` integers, the cluster of each sample; negative ones are excluded, and so are empty
            clusters. Below 2^24, 64 N or the length of ``cluster_weights``, whichever is largest. Tensor,
            NumPy array (memory-mapped too) or DLPack array. At most 2^31 - 1 samples a cluster.
        num_samples: draws in an epoch, over all ranks; the default is the number of samples with a label.
        power: 1 draws clusters evenly (DeepCluster), 0.5 by the root of their size, 0 samples evenly.
        cluster_weights: ``[K]`` shares >= 0 in place of ``power``'s; an excluded cluster has share 0.
        replacement: how a quota q is drawn from n members.
            "cover": q div n times all of them, and q mod n without replacement.
            "deepcluster": the published rule, without replacement if n > q, else q independent draws.
            "always": q independent draws.
        seed: any integer, the same on all ranks.
        num_replicas, rank: number of ranks and this one's; both or neither.
        drop_last: see above.

    Raises:
        TypeError, ValueError: an argument is out of its range.

    Cost: a counting sort when labels are set; for each index about 55 products of 64 bits, a search among the
    clusters and one read of the table at random; memory 4 bytes a sample (8 beyond 2^31) and 24 a cluster.
    Processes that get the sampler from torch.multiprocessing, by fork or spawn, share the table.

    Example:
        >>> sampler = InverseClusterSizeSampler(torch.tensor([0, 0, 0, 0, 0, 1]), seed=1)
        >>> sorted(list(sampler)[i] == 5 for i in range(len(sampler)))
        [False, False, False, True, True, True]

    Source: Caron et al., DeepCluster, ECCV 2018, section 3.3, "trivial parametrization".
    """

    def __init__(
        self,
        labels: Any,
        num_samples: int | None = None,
        *,
        power: float = 1.0,
        cluster_weights: Any = None,
        replacement: str = "cover",
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
    ) -> None:
        if num_samples is not None:
            check_count(num_samples, "num_samples", 1, "pass the number of draws in an epoch, or None")
            if num_samples >= 2**60:
                reject(
                    "num_samples", "below 2^60", num_samples, "pass the number of draws in an epoch, or None"
                )
        power = check_number(power, "power", "pass 1 for even clusters, 0 for even samples")
        if cluster_weights is not None and power != 1:
            reject("power", "1 where cluster_weights are given", power, "pass one of the two")
        check_choice(replacement, "replacement", ("cover", "deepcluster", "always"))
        self.power, self.cluster_weights, self.replacement = power, cluster_weights, replacement
        self._given = num_samples
        least_k = 1 if cluster_weights is None else check_counts(cluster_weights, "cluster_weights").numel()
        super().__init__(
            labels, seed=seed, num_replicas=num_replicas, rank=rank, drop_last=drop_last, least_k=least_k
        )

    def indices(self, start: int, stop: int) -> Tensor:
        """Data set indices at positions ``start`` to before ``stop`` of the global order, int64."""
        check_count(start, "start", 0, "pass a position of the epoch")
        check_count(stop, "stop", start, "pass a position from start on")
        if stop > self.order_size:
            reject(
                "stop",
                f"at most the epoch's {self.order_size} draws",
                stop,
                "go on in the next epoch: set_epoch",
            )
        return self._take(start, 1, stop - start)

    def quotas(self) -> Tensor:
        """``[K]`` int64: how often this epoch draws from each cluster; the sum is ``order_size``."""
        return self._bounds().diff()

    def expected_counts(self) -> Tensor:
        """``[K]`` fp64: draws from each cluster in an epoch, as the mean over epochs."""
        return self._probabilities() * self.order_size

    def importance_weights(self) -> Tensor:
        """``[K]`` fp64: weights that make the mean over draws estimate the mean over labelled samples.

        ``(n_k / N) / p(k)``, 0 for a cluster that is never drawn. The loss of index i is multiplied by
        ``importance_weights()[labels[i]]``.
        """
        share = self.offsets.diff().double() / self.members.numel()
        p = self._probabilities()
        return torch.where(p > 0, share / p, 0.0)

    def _probabilities(self) -> Tensor:
        return self._cumulative.diff().double() / float(self._cumulative[-1])

    def _measure(self, counts: Tensor) -> None:
        if self.cluster_weights is None:
            weights = draw_weights(counts, self.power)
        else:
            weights = given_weights(self.cluster_weights, counts)
        self._cumulative = torch.nn.functional.pad(weights.cumsum(0), (1, 0))
        self._epoch_bounds: tuple[int, Tensor] | None = None
        self.order_size = int(counts.sum()) if self._given is None else int(self._given)

    def _bounds(self) -> Tensor:
        if self._epoch_bounds is None or self._epoch_bounds[0] != self.epoch:
            offset = keys(self._seed(), self.epoch, ORDER).offset % 2**64
            self._epoch_bounds = self.epoch, quota_bounds(self._cumulative, self.order_size, offset)
        return self._epoch_bounds[1]

    def _take(self, start: int, step: int, count: int) -> Tensor:
        table = self.members, self.offsets, self._bounds()
        result: Tensor = torch.ops.clustops.sampler_range(
            start, step, count, *table, self._seed(), self.epoch, self.replacement
        )
        return result

    def _settings(self) -> dict[str, Any]:
        shares = fingerprint(self._cumulative)
        return {"num_samples": self.order_size, "shares": shares, "replacement": self.replacement}
