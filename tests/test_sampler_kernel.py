"""The compiled kernels of the samplers against their reference, on every instruction set of this CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import generator, seeds
from torch import Tensor

from clustops import native
from clustops.reference import sampler as reference
from clustops.sampler import cluster_members

pytestmark = pytest.mark.skipif(native.extension is None, reason=f"no extension: {native.why_not}")
ops = torch.ops.clustops

POLICIES = ["cover", "deepcluster", "always"]
# Neighbours of where ranks end, of what lies in a block, of where doubles end to be exact.
cluster_sizes = st.lists(st.sampled_from([0, 1, 2, 3, 15, 16, 17, 18, 100, 1000]), min_size=1, max_size=60)
draws = st.one_of(
    st.integers(1, 3000),
    st.integers(1, 2**60 - 1),
    st.sampled_from([16, 17, 2**31 - 1, 2**31, 2**50 - 1, 2**50, 2**51, 2**60 - 1]),
)
lengths = st.sampled_from([0, 1, 7, 8, 9, 255, 256, 257, 511, 512, 513, 1100])
dtypes = st.sampled_from([torch.int32, torch.int64])
label_dtypes = st.sampled_from(
    [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]
)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def table(sizes: list[int], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Members in any order, so that each stands for its place; offsets."""
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return torch.randperm(int(offsets[-1]), generator=generator(seed)).to(dtype), offsets


def bounds_of(sizes: list[int], total: int, seed: int) -> Tensor:
    """Shares by chance, none for empty clusters."""
    weights = torch.randint(0, 9, (len(sizes),), generator=generator(seed)) * (torch.tensor(sizes) > 0)
    weights[sizes.index(max(sizes))] += 1
    return reference.quota_bounds(torch.nn.functional.pad(weights.cumsum(0), (1, 0)), total, seed)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("replacement", POLICIES)
@given(sizes=cluster_sizes.filter(any), total=draws, count=lengths, dtype=dtypes, seed=seeds)
def test_the_order_is_that_of_the_reference(
    replacement: str, sizes: list[int], total: int, count: int, dtype: torch.dtype, seed: int
) -> None:
    members, offsets = table(sizes, dtype, seed)
    bounds = bounds_of(sizes, total, seed)
    positions = torch.randint(0, min(3 * total, 2**62), (count,), generator=generator(seed))
    given = members, offsets, bounds, seed - 2**30, seed % 999, replacement
    assert torch.equal(ops.sampler_order(positions, *given), reference.sampler_order(positions, *given))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("replacement", POLICIES)
@pytest.mark.parametrize("clusters", [1, 3000])
def test_threads_and_clusters_that_fill_several_units_of_work(clusters: int, replacement: str) -> None:
    sizes = torch.randint(0, 40, (clusters,), generator=generator(0)).square().tolist()
    sizes[0] = 5
    members, offsets = table(sizes, torch.int32, 0)
    given = members, offsets, bounds_of(sizes, 70_001, 0), 3, 5, replacement
    expected = reference.sampler_range(11, 2, 20_000, *given)
    for number in (1, 2, 5):
        with threads(number):
            assert torch.equal(ops.sampler_range(11, 2, 20_000, *given), expected)


@given(start=st.integers(0, 2**61), step=st.integers(1, 2**40), count=lengths, seed=seeds)
def test_a_range_is_the_order_of_its_positions(start: int, step: int, count: int, seed: int) -> None:
    members, offsets = table([40, 0, 7], torch.int32, seed)
    given = members, offsets, bounds_of([40, 0, 7], 10**9, seed), seed, 0, "cover"
    found = ops.sampler_range(start, step, count, *given)
    assert torch.equal(found, ops.sampler_order(start + step * torch.arange(count), *given))
    assert torch.equal(found, reference.sampler_range(start, step, count, *given))


@pytest.mark.usefixtures("instruction_set")
@given(
    sizes=cluster_sizes.filter(any),
    per_batch=st.integers(1, 7),
    per_cluster=st.sampled_from([1, 2, 5, 16, 17, 600]),
    count=st.sampled_from([0, 1, 3, 40]),
    dtype=dtypes,
    seed=seeds,
)
def test_batches_are_those_of_the_reference(
    sizes: list[int], per_batch: int, per_cluster: int, count: int, dtype: torch.dtype, seed: int
) -> None:
    members, offsets = table(sizes, dtype, seed)
    clusters = offsets.diff().nonzero().flatten()
    batches = torch.randint(0, 2**40, (count,), generator=generator(seed))
    given = members, offsets, clusters, min(per_batch, clusters.numel()), per_cluster, seed - 2**30, 7
    expected = reference.sampler_batches(batches, *given)
    for number in (1, 3):
        with threads(number):
            assert torch.equal(ops.sampler_batches(batches, *given), expected)


@pytest.mark.usefixtures("instruction_set")
@given(
    n=st.sampled_from([0, 1, 2, 63, 1000, 1023, 1024, 1025, 5000]),
    k=st.sampled_from([1, 2, 13, 100, 2000]),
    dtype=label_dtypes,
    number=st.sampled_from([1, 2, 3, 7]),
    stride=st.integers(1, 3),
    seed=seeds,
)
def test_members_are_those_of_the_reference(
    n: int, k: int, dtype: torch.dtype, number: int, stride: int, seed: int
) -> None:
    """Few samples for many clusters, too, where threads share the clusters out instead of the samples."""
    k = min(k, 100) if dtype.itemsize == 1 else k
    lowest = -3 if dtype.is_signed else 0
    values = torch.randint(lowest, k, (n * stride,), generator=generator(seed))
    labels = values.to(dtype)[::stride]
    with threads(number):
        found = ops.cluster_members(labels, k)
        assert int(ops.largest_label(labels)) == max([-1, *labels.tolist()])
    for one, other in zip(found, reference.cluster_members(labels.long(), k), strict=True):
        assert (one.dtype, torch.equal(one, other)) == (other.dtype, True)


def test_members_of_many_labels_and_threads() -> None:
    labels = torch.randint(-1, 300, (300_000,), generator=generator(0)).square() // 300
    expected = reference.cluster_members(labels, 300)
    for number in (1, 2, 5):
        with threads(number):
            for one, other in zip(ops.cluster_members(labels, 300), expected, strict=True):
                assert torch.equal(one, other)
            assert int(ops.largest_label(labels)) == 298


def test_labels_without_a_sign_reach_twice_as_far() -> None:
    for dtype, largest in ((torch.uint8, 255), (torch.uint16, 65535), (torch.uint32, 2**32 - 1)):
        assert int(ops.largest_label(torch.tensor([0, largest], dtype=dtype))) == largest
    members, offsets = ops.cluster_members(torch.tensor([255, 128, 255], dtype=torch.uint8), 256)
    assert (members.tolist(), offsets[[128, 129, 255, 256]].tolist()) == ([1, 0, 2], [0, 1, 1, 3])


def test_labels_beyond_two_to_the_63_are_no_cluster() -> None:
    labels = torch.tensor([2**64 - 1, 1, 2**63], dtype=torch.uint64)
    assert [t.tolist() for t in ops.cluster_members(labels, 2)] == [[1], [0, 0, 1]]
    assert int(ops.largest_label(labels)) == 1


@given(
    n=st.sampled_from([0, 1, 7, 8, 9, 131, 65537]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    number=st.integers(1, 3),
    seed=seeds,
)
def test_fingerprints_are_the_reference_s(n: int, dtype: torch.dtype, number: int, seed: int) -> None:
    numbers = torch.randint(-9, 2**31 - 1, (n,), generator=generator(seed)).to(dtype)
    with threads(number):
        found = ops.sampler_fingerprint(numbers)
        assert torch.equal(found, reference.fingerprint(numbers))
        assert torch.equal(ops.sampler_fingerprint(numbers.repeat_interleave(2)[::2]), found)


def test_fingerprints_tell_numbers_and_their_order(cpu_path: str) -> None:
    numbers = torch.arange(300_000, dtype=torch.int32)
    other, swapped = numbers.clone(), numbers.clone()
    other[-1] += 1
    swapped[[5, 299_990]] = swapped[[299_990, 5]]
    words = [
        int(ops.sampler_fingerprint(x)) for x in (numbers, other, swapped, numbers[:-1], numbers.roll(1))
    ]
    assert len(set(words)) == 5
    assert words[0] == 6995900338882587930


@pytest.mark.slow
def test_more_than_two_to_the_31_labels_are_counted() -> None:
    labels = torch.full((1,), -1, dtype=torch.int8).expand(2**31 + 5)
    members, offsets = ops.cluster_members(labels, 3)
    assert (members.dtype, members.numel(), offsets.tolist()) == (torch.int64, 0, [0] * 4)
    assert int(ops.largest_label(labels)) == -1


@pytest.mark.parametrize("replacement", POLICIES)
def test_one_position_and_the_next_are_those_of_the_whole(replacement: str) -> None:
    members, offsets = table([1000, 3, 40, 17], torch.int64, 0)
    given = members, offsets, bounds_of([1000, 3, 40, 17], 2000, 1), 8, 1, replacement
    whole = ops.sampler_range(0, 1, 2000, *given)
    for start in (0, 1, 255, 511, 512, 1999):
        assert ops.sampler_range(start, 1, 1, *given).tolist() == [int(whole[start])]


MEMBERS, OFFSETS = torch.arange(6, dtype=torch.int32), torch.tensor([0, 2, 6])


@pytest.mark.parametrize(
    ("members", "offsets", "bounds"),
    [
        (MEMBERS, torch.tensor([0, 2, 7]), torch.tensor([0, 5, 10])),  # past the table
        (MEMBERS, torch.tensor([-1, 2, 6]), torch.tensor([0, 5, 10])),
        (MEMBERS, torch.tensor([0, 7, 6]), torch.tensor([0, 5, 10])),
        (MEMBERS, torch.tensor([0, 0, 6]), torch.tensor([0, 5, 10])),  # draws from an empty cluster
        (MEMBERS, OFFSETS, torch.tensor([3, 5, 10])),  # slots of no cluster
        (MEMBERS, OFFSETS, torch.tensor([0, 5, 0])),  # no slots at all
        (MEMBERS, OFFSETS, torch.tensor([0, 5, 2**60])),
        (MEMBERS, OFFSETS, torch.tensor([0, 5])),
        (MEMBERS, OFFSETS.int(), torch.tensor([0, 5, 10])),
        (MEMBERS.short(), OFFSETS, torch.tensor([0, 5, 10])),
        (MEMBERS.view(2, 3), OFFSETS, torch.tensor([0, 5, 10])),
        (MEMBERS, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)),
    ],
)
@pytest.mark.parametrize("replacement", POLICIES)
def test_tables_that_contradict_themselves_raise(
    replacement: str, members: Tensor, offsets: Tensor, bounds: Tensor
) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        ops.sampler_range(0, 1, 1000, members, offsets, bounds, 0, 0, replacement)


@pytest.mark.parametrize(
    ("batches", "clusters", "per_batch", "per_cluster"),
    [
        ([0], [0, 1], 3, 1),
        ([0], [0, 1], 0, 1),
        ([0], [0, 1], 1, 0),
        ([-1], [0, 1], 1, 1),
        ([0], [0, 2], 2, 1),
        ([0], [0, -(2**40)], 2, 1),
        ([0], [], 1, 1),
    ],
)
def test_batches_of_no_clusters_raise(
    batches: list[int], clusters: list[int], per_batch: int, per_cluster: int
) -> None:
    given = MEMBERS, OFFSETS, torch.tensor(clusters, dtype=torch.int64), per_batch, per_cluster, 0, 0
    with pytest.raises(ValueError, match="must be"):
        ops.sampler_batches(torch.tensor(batches), *given)


def test_other_replacements_and_labels_raise() -> None:
    bounds = torch.tensor([0, 5, 10])
    with pytest.raises(ValueError, match="replacement must be cover, deepcluster or always, got never"):
        ops.sampler_range(0, 1, 3, MEMBERS, OFFSETS, bounds, 0, 0, "never")
    with pytest.raises(ValueError, match="labels must be below 3"):
        ops.cluster_members(torch.tensor([0, 3]), 3)
    with pytest.raises(ValueError, match="labels must be one dimension of integers"):
        ops.largest_label(torch.rand(3))
    with pytest.raises(ValueError, match="labels must be one dimension of integers"):
        ops.cluster_members(torch.zeros(2, 2, dtype=torch.int64), 3)


def test_read_only_labels_are_not_written() -> None:
    array = np.array([3, 0, -1, 3], dtype=np.int16)
    array.flags.writeable = False
    members, offsets = cluster_members(array, 4)
    assert (members.tolist(), offsets.tolist()) == ([1, 0, 3], [0, 1, 1, 1, 3])
    assert array.tolist() == [3, 0, -1, 3]


def test_new_ops_pass_opcheck() -> None:
    given = MEMBERS, OFFSETS, torch.tensor([0, 5, 10]), 1, 2, "cover"
    torch.library.opcheck(ops.largest_label, (torch.tensor([0, 2, -1]),))
    torch.library.opcheck(ops.sampler_fingerprint, (torch.tensor([0, 2, -1]),))
    torch.library.opcheck(ops.sampler_range, (0, 2, 7, *given))
