"""The samplers' kernels on a CPU under the sanitizers of addresses and of threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sanitized import SANITIZED, build_for_addresses, build_for_threads
from simt import Results, needs_compiler
from support import generator, seeds
from test_sampler_kernel import bounds_of
from torch import Tensor

from clustops.reference import sampler as reference

pytestmark = needs_compiler
POLICIES = ["cover", "deepcluster", "always"]


def assert_next(found: Results, expected: Tensor) -> None:
    assert torch.equal(found.take(expected.dtype, *expected.shape), expected)


def check(
    program: Path,
    n: int,
    k: int,
    ranges: int,
    total: int,
    count: int,
    per_cluster: int,
    threads: int,
    seed: int,
) -> None:
    g, epoch = generator(seed), 3
    labels = torch.cat([torch.tensor([0, k - 1]), torch.randint(-1, k, (n,), generator=g)]).int()
    members, offsets = reference.cluster_members(labels, k)
    bounds = bounds_of(offsets.diff().tolist(), total, seed)
    positions = torch.randint(0, 2**62, (count,), generator=g)
    batches = torch.randint(0, 2**40, (5,), generator=g)
    filled = offsets.diff().nonzero().flatten()
    per_batch = min(2, filled.numel())
    sizes = [n + 2, k, ranges, count, 5, per_batch, per_cluster, seed, epoch, threads]
    found = Results(program, [], sizes, labels, bounds, positions, batches)
    assert_next(found, torch.stack([torch.tensor(k - 1), reference.fingerprint(labels)]))
    assert_next(found, offsets)
    assert_next(found, members)
    for replacement in POLICIES:
        assert_next(
            found, reference.sampler_order(positions, members, offsets, bounds, seed, epoch, replacement)
        )
    assert_next(
        found,
        reference.sampler_batches(batches, members, offsets, filled, per_batch, per_cluster, seed, epoch),
    )
    check_far(found)


def check_far(found: Results) -> None:
    """Tables past 2^33 slots and 2^32 members: places without the table; sample numbers past 2^31."""
    offsets = torch.tensor([0, 2**31 - 1, 5, 2**31 - 1, 2**24 + 1]).cumsum(0)
    bounds = torch.tensor([0, 10, 20, 2**34 - 500, 2**34])
    slots = reference.slots_of(torch.arange(2**34 - 1000, 2**34), 2**34, 1, 0)
    for replacement in POLICIES:
        assert_next(found, reference.table_positions(slots, offsets, bounds, 1, 0, replacement))
    assert_next(found, torch.cat([torch.zeros(2, dtype=torch.int64), torch.arange(2**31 - 2, 2**31 + 3)]))
    assert not found.left


@pytest.fixture(scope="module", params=SANITIZED)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_for_addresses(tmp_path_factory.mktemp(request.param), "sampler", request.param)


@settings(max_examples=10)
@given(
    n=st.sampled_from([0, 5, 1023, 3000]),
    k=st.sampled_from([1, 2, 40, 500]),
    ranges=st.integers(1, 3),
    total=st.sampled_from([1, 16, 17, 4000, 2**50 - 1, 2**60 - 1]),
    count=st.sampled_from([0, 1, 9, 600]),
    per_cluster=st.sampled_from([1, 3, 700]),
    seed=seeds,
)
def test_the_samplers_stay_in_bounds(
    program: Path, n: int, k: int, ranges: int, total: int, count: int, per_cluster: int, seed: int
) -> None:
    check(program, n, k, ranges, total, count, per_cluster, 1, seed)


def test_threads_do_not_race(tmp_path: Path) -> None:
    program = build_for_threads(tmp_path, "sampler")
    for ranges in (1, 4):
        check(program, 20_000, 300, ranges, 30_000, 20_000, 700, 4, 0)
