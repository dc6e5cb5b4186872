"""What the samplers share: the member table, ranks, epochs, and a state that resumes at any position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from .checks import check_count, reject
from .reference.sampler import VERSION
from .sampler_weights import check_labels, fingerprint, largest_label, renumbering

T_co = TypeVar("T_co", covariant=True)

_FIRST, _BLOCK = 1 << 10, 1 << 14  # items computed at a time while iterating: few first, not to be waited for
_LARGEST_CLUSTER = 2**31 - 1
_MOST_CLUSTERS = 1 << 24  # more only with more samples: a table of empty clusters is most likely a mistake


class ResumableSampler(DistributedSampler[T_co], ABC):
    """An order that is a pure function of (seed, epoch, position), cut up over ranks.

    Rank r of W takes the positions r, r + W, ... of the global order. A subclass says how long the order is
    (``_measure``), what stands at given positions (``_take``) and which settings fix it (``_settings``).

    Attributes:
        members, offsets: the table of ``cluster_members``.
        order_size: length of the global order.
        num_samples, total_size: items of this rank in a whole epoch, and of all ranks together.
        num_replicas, rank, epoch, seed, drop_last: as in ``DistributedSampler``.
    """

    members: Tensor
    offsets: Tensor
    order_size: int

    def __init__(
        self,
        labels: Any,
        *,
        seed: int,
        num_replicas: int | None,
        rank: int | None,
        drop_last: bool,
        least_k: int = 1,
    ) -> None:
        if (num_replicas is None) != (rank is None):
            reject(
                "rank",
                "given together with num_replicas",
                f"rank={rank}, num_replicas={num_replicas}",
                "pass both for a share of the order, neither for the whole",
            )
        if num_replicas is not None and rank is not None:
            check_count(num_replicas, "num_replicas", 1, "pass the number of ranks")
            check_count(rank, "rank", 0, "pass this rank's number")
            if rank >= num_replicas:
                reject("rank", f"below num_replicas = {num_replicas}", rank, "pass this rank's number")
        if isinstance(seed, bool) or not hasattr(seed, "__index__"):
            reject("seed", "an integer", repr(seed), "pass the same integer on every rank", TypeError)
        super().__init__(
            range(1),  # type: ignore[arg-type]  # the parent only asks for a length, which set_labels replaces
            num_replicas=num_replicas or 1,
            rank=rank or 0,
            seed=int(seed),
            drop_last=bool(drop_last),
        )
        self._least_k = least_k
        self.set_labels(labels)

    def set_labels(self, labels: Any) -> None:
        """Take new labels, for instance after re-clustering; the epoch's order starts anew.

        Args:
            labels: ``[N]`` integers; negative ones are excluded. Read once, not kept.
        """
        tensor = check_labels(labels).detach().cpu()
        label = largest_label(tensor)
        bound = max(_MOST_CLUSTERS, 64 * tensor.numel(), self._least_k)
        if label >= bound:
            reject("labels", f"below {bound} for {tensor.numel()} samples", label, renumbering(tensor))
        k = max(label + 1, self._least_k)
        members, offsets = torch.ops.clustops.cluster_members(tensor, k)
        if members.numel() == 0:
            reject(
                "labels",
                "0 or more for one sample at least",
                f"{tensor.numel()} without",
                "label samples first",
            )
        counts = offsets.diff()
        largest = int(counts.max())
        if largest > _LARGEST_CLUSTER:
            reject("labels", f"at most {_LARGEST_CLUSTER} equal ones", largest, "split the cluster")
        self._measure(counts)
        self.members, self.offsets = members, offsets
        self._hash: str | None = None
        self._order = object()
        self._start = self._consumed = 0
        self.num_samples = self._share(0)
        self.total_size = self.num_samples * self.num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, in [0, 2^48): each has its own order. Another epoch starts at position 0."""
        check_count(epoch, "epoch", 0, "pass the number of the epoch")
        if epoch >= 2**48:
            reject("epoch", "below 2^48", epoch, "pass the number of the epoch")
        if epoch != self.epoch:
            self._order = object()
            self._start = self._consumed = 0
        self.epoch = int(epoch)

    def __len__(self) -> int:
        """Items that each rank yields in a whole epoch; a resumed one yields what is left of it."""
        return self.num_samples

    def __iter__(self) -> Iterator[T_co]:
        self._consumed = self._start
        return self._items()

    def _items(self) -> Iterator[T_co]:
        # From the first item on: Lightning calls iter(loader) before set_epoch.
        start, self._start = self._start, 0
        order, world, share = self._order, self.num_replicas, self._share(start)
        begin, block, consumed = 0, _FIRST, start
        while begin < share:
            count = min(block, share - begin)
            items = self._take(start + self.rank + world * begin, world, count).tolist()
            begin, block = begin + count, _BLOCK
            for item in items:
                if self._order is not order:
                    raise RuntimeError(
                        "the epoch or the labels changed during iteration; start anew after set_epoch "
                        "and set_labels"
                    )
                self._consumed = consumed = consumed + world
                yield item

    def _share(self, start: int) -> int:
        left = max(self.order_size - start, 0)
        return left // self.num_replicas if self.drop_last else -(-left // self.num_replicas)

    def state_dict(self) -> dict[str, Any]:
        """Where the latest iteration stands, and what fixes its order; equal on all ranks at equal steps.

        ``consumed`` counts positions of the global order that were handed out. A ``DataLoader`` with workers,
        and one that Accelerate has prepared, reads ahead of training: use torchdata's ``StatefulDataLoader``,
        or set ``consumed`` to the samples trained on, over all ranks.
        """
        return {**self._identity(), "epoch": self.epoch, "consumed": min(self._consumed, self.order_size)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, also with another number of ranks.

        The next iteration yields what is left of the epoch, later ones the whole. The state of a finished
        epoch does not take the sampler back from a later one.

        Raises:
            ValueError: the state belongs to another order (version, seed, labels, settings).
        """
        own = self._identity()
        for name in (*own, "epoch", "consumed"):
            if name not in state_dict:
                reject(
                    "state_dict", f"one with {name!r}", sorted(state_dict), "pass what state_dict() returned"
                )
            if name in own and state_dict[name] != own[name]:
                reject(
                    f"state_dict[{name!r}]",
                    f"this sampler's {own[name]!r}",
                    repr(state_dict[name]),
                    "resume with the labels and settings that the state was saved with",
                )
        epoch, consumed = state_dict["epoch"], state_dict["consumed"]
        check_count(consumed, "state_dict['consumed']", 0, "pass what state_dict() returned")
        if self.epoch > epoch and self._share(consumed) == 0:
            return
        self.set_epoch(epoch)
        self._start = self._consumed = int(consumed)

    def _identity(self) -> dict[str, Any]:
        if self._hash is None:
            self._hash = fingerprint(self.offsets, self.members)
        return {"version": VERSION, "seed": self.seed, "labels": self._hash, **self._settings()}

    def _seed(self) -> int:
        """The seed modulo 2^64 as the signed number that an op takes."""
        return (self.seed + 2**63) % 2**64 - 2**63

    @abstractmethod
    def _measure(self, counts: Tensor) -> None:
        """Set ``order_size`` and what else depends on cluster sizes; change nothing where they do not fit."""

    @abstractmethod
    def _take(self, start: int, step: int, count: int) -> Tensor:
        """Items at the positions start, start + step, .. of the global order."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What fixes the order beside version, seed, labels and epoch."""
