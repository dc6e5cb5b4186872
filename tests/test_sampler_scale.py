"""The samplers at sizes where 32-bit offsets, copies of the table and lists would show."""

from __future__ import annotations

import math
import multiprocessing.reduction
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import needs_peak_of, peak_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from clustops.recipes.clustering import epoch_order
from clustops.sampler import InverseClusterSizeSampler, MPerClusterBatchSampler, cluster_members

SMALL = [*range(1, 70), *range(120, 131), *range(253, 260), 1023, 1024, 1025, 4095, 4096, 4097]


def test_an_epoch_of_each_small_size_is_a_permutation(path: str) -> None:
    for n in SMALL:
        labels = torch.arange(n).square() % 13 % 7
        whole = InverseClusterSizeSampler(labels, power=0, seed=n).indices(0, n)
        assert whole.sort().values.tolist() == list(range(n)), n
        even = InverseClusterSizeSampler(labels, 3 * n, seed=n, cluster_weights=labels.bincount() * 0 + 1)
        drawn = even.indices(0, 3 * n).bincount(minlength=n)
        share, rest = even.quotas() // labels.bincount().clamp(min=1), even.quotas()
        assert bool((drawn >= share[labels]).all() & (drawn <= share[labels] + 1).all()), n
        assert labels.bincount(drawn, minlength=len(rest)).long().tolist() == rest.tolist(), n


def test_a_batch_of_each_small_size_is_a_permutation(path: str) -> None:
    for n in SMALL:
        batches = MPerClusterBatchSampler(torch.zeros(n, dtype=torch.int32), 1, n, seed=n).batches(0, 2)
        assert batches.sort(1).values.tolist() == [list(range(n))] * 2, n


@pytest.mark.parametrize("clusters", [1, 1000])
def test_an_epoch_of_more_samples_than_torch_can_weigh(clusters: int) -> None:
    n = 2**24 + 3
    with pytest.raises(RuntimeError, match=r"2\^24"):
        torch.multinomial(torch.ones(1).expand(n), 1)
    sampler = InverseClusterSizeSampler(torch.arange(n, dtype=torch.int32) % clusters, power=0)
    seen = torch.zeros(n, dtype=torch.bool)
    for start in range(0, n, 2**22):
        seen[sampler.indices(start, min(start + 2**22, n))] = True
    assert bool(seen.all())


@pytest.mark.slow
def test_as_many_clusters_as_samples_beyond_two_to_the_24() -> None:
    n = 2**24 + 3
    sampler = InverseClusterSizeSampler(torch.arange(n, dtype=torch.int32))
    drawn = torch.cat([sampler.indices(0, 2**17), sampler.indices(n - 2**17, n)])
    assert drawn.unique().numel() == drawn.numel()
    assert (drawn % 2).double().mean() == pytest.approx(0.5, abs=0.01)
    assert int(drawn.max()) > 0.999 * n


def sparse_table(folder: Path, dtype: str, first: int, own: Tensor) -> Tensor:
    """A member table that ends with ``own`` from place ``first`` on; the rest is a hole in a file."""
    table = np.memmap(folder / "table", dtype, mode="w+", shape=(first + own.numel(),))
    table[first:] = own.numpy()
    return torch.from_numpy(table)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_members_beyond_two_to_the_31_are_read_where_they_lie(
    dtype: str, tmp_path: Path, cpu_path: str
) -> None:
    first = 2**31 + 5
    own = torch.arange(5003) + (2**33 if dtype == "int64" else 7)
    members = sparse_table(tmp_path, dtype, first, own)
    offsets = torch.tensor([0, 2**31 - 1, first, first + 5003])
    positions = torch.arange(5003)
    for replacement in ("cover", "deepcluster", "always"):
        drawn = torch.ops.clustops.sampler_order(
            positions, members, offsets, torch.tensor([0, 0, 0, 5003]), 1, 0, replacement
        )
        assert set(drawn.tolist()) <= set(own.tolist())
        if replacement == "cover":
            assert drawn.sort().values.tolist() == own.tolist()
    batches = torch.ops.clustops.sampler_batches(
        torch.arange(2), members, offsets, torch.tensor([2]), 1, 5003, 1, 0
    )
    assert batches.sort(1).values.tolist() == [own.tolist()] * 2


needs_kernels = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("clustops::cluster_members", "CPU"),
    reason="minutes without a kernel",
)


@pytest.mark.slow
@needs_kernels
def test_the_table_of_more_than_two_to_the_31_labels_has_64_bits() -> None:
    n = 2**31 + 9
    labels = torch.full((n,), -1, dtype=torch.int8)
    labels[torch.tensor([5, 2**31, n - 1])] = torch.tensor([0, 1, 0], dtype=torch.int8)
    members, offsets = cluster_members(labels, 2)
    assert (members.dtype, members.tolist()) == (torch.int64, [5, n - 1, 2**31])
    assert offsets.tolist() == [0, 2, 3]
    sampler = InverseClusterSizeSampler(labels, 40)
    assert torch.bincount(labels[sampler.indices(0, 40)].long()).tolist() == [20, 20]


@pytest.mark.slow
@needs_kernels
@needs_peak_of
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_expanded_labels_are_not_copied(dtype: torch.dtype) -> None:
    labels = torch.tensor([-1], dtype=dtype).expand(2**31 + 1)
    kilobytes, (members, offsets) = peak_of(lambda: cluster_members(labels, 3))
    assert (members.dtype, members.numel(), offsets.tolist()) == (torch.int64, 0, [0] * 4)
    assert kilobytes < 400_000


MAPPED = """
import resource, sys
import numpy as np, torch
from clustops import InverseClusterSizeSampler, native
from clustops.reference import sampler as reference

reference._LABELS_CHUNK = 1 << 20
n, k = 64_000_000, 1000
labels = np.memmap(sys.argv[1], dtype=np.int32, mode="w+", shape=(n,))
for start in range(0, n, 4_000_000):
    labels[start:start + 4_000_000] = np.random.default_rng(start).integers(-1, k, 4_000_000, dtype=np.int32)
labels = np.memmap(sys.argv[1], dtype=np.int32, mode="r", shape=(n,))
list(InverseClusterSizeSampler(labels[:1000]))
now = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
table, piece = 4 * n, 200 * 2**20
limit = now * 1024 + table + piece
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    np.empty(table + piece + 2**25, np.uint8)
    print("the limit does not hold")
except MemoryError:
    pass
sampler = InverseClusterSizeSampler(labels)
drawn = sampler.indices(len(sampler) - 100_000, len(sampler))
print(len(sampler) == sampler.members.numel(), int(torch.from_numpy(labels[drawn.numpy()]).min()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("without_kernels", ["0", "1"])
def test_memory_mapped_labels_take_their_table_and_a_piece(
    without_kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUSTOPS_DISABLE_NATIVE", without_kernels)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-c", MAPPED, str(tmp_path / "labels.bin")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.stdout.strip() == "True 0", run.stdout + run.stderr


class Weighed(Dataset[Tensor]):
    """An item is how much of the sampler's table is in this process's memory, and in no other's, in kB."""

    def __init__(self, sampler: InverseClusterSizeSampler) -> None:
        self.sampler = sampler

    def __getitem__(self, index: int) -> Tensor:
        table = self.sampler.members
        assert int(table.sum()) == table.numel() * (table.numel() - 1) // 2  # every page is looked at
        return torch.tensor(memory_of(table))

    def __len__(self) -> int:
        return 2


def memory_of(tensor: Tensor) -> tuple[int, int]:
    """Kilobytes in memory, and those that no other process has, of the mappings that hold the tensor."""
    first, sizes, inside = tensor.data_ptr(), {"Rss": 0, "Private": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) < first + tensor.nbytes and int(found[2], 16) > first
        elif inside and (name := re.split("[:_]", line)[0]) in sizes:
            sizes[name] += int(line.split()[1])
    return sizes["Rss"], sizes["Private"]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_share_one_table(context: str, workers: int) -> None:
    n = 5_000_000
    sampler = InverseClusterSizeSampler(torch.arange(n, dtype=torch.int32) % 100)
    loader = DataLoader(Weighed(sampler), num_workers=workers, multiprocessing_context=context)
    for resident, private in torch.cat(list(loader)).tolist():
        assert resident >= 4 * n // 1024
        assert private < resident // 10


def test_what_a_process_is_handed_does_not_grow_with_the_labels() -> None:
    sampler = InverseClusterSizeSampler(torch.arange(3_000_000, dtype=torch.int32) % 5000)
    next(iter(sampler))
    handed = multiprocessing.reduction.ForkingPickler.dumps(sampler)
    assert len(bytes(handed)) < 10_000


class Largest(TorchDispatchMode):
    """Remembers the most elements that an op returned."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.most = max([self.most, *sizes])
        return result


@pytest.mark.parametrize("world", [1, 8])
def test_resuming_at_nine_tenths_of_a_billion_computes_a_block(world: int) -> None:
    at, total = 900_000_000, 1_000_000_000
    labels = torch.arange(1000) % 7
    saved = InverseClusterSizeSampler(labels, total, seed=3).state_dict()
    for rank in range(0, world, 7):
        sampler = InverseClusterSizeSampler(labels, total, seed=3, num_replicas=world, rank=rank)
        with Largest() as largest:
            sampler.load_state_dict({**saved, "consumed": at})
            items = iter(sampler)
            found = [next(items) for _ in range(3)]
        assert largest.most <= 2**14
        assert found == sampler.indices(at, at + 3 * world)[rank::world].tolist()
        assert sampler.state_dict()["consumed"] == at + 3 * world


def test_the_published_index_mix_up_draws_by_cluster_size() -> None:
    sizes = (200 / torch.arange(1, 301).sqrt()).long().square() + 5
    labels = torch.repeat_interleave(torch.arange(300), sizes)
    labels = labels[torch.randperm(labels.numel(), generator=torch.Generator().manual_seed(0))]
    n = labels.numel()
    drawn = {}
    for published in (False, True):
        order = epoch_order(labels, n, balance=True, published_indices=published, seed=0, epoch=0)
        drawn[published] = labels[order].bincount()
    assert drawn[False].max() - drawn[False].min() <= 1
    correlation = float(torch.corrcoef(torch.stack([drawn[True], sizes]).double())[0, 1])
    assert correlation > 0.997
    assert math.isclose(float(drawn[True].double().mean()), n / 300)
