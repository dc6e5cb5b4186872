"""The samplers' kernels on a CPU under the sanitizers of addresses and of threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import generator, seeds
from test_kmeans_sanitized import Results
from test_sampler_kernel import bounds_of
from test_sanitized import ADDRESS, COMPILER, SANITIZED, SETS, build

from clustops.reference import sampler as reference

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")
POLICIES = ["cover", "deepcluster", "always"]


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
    found = Results(program, sizes, labels, bounds, positions, batches)
    found.assert_next(torch.tensor([k - 1]))
    found.assert_next(offsets)
    found.assert_next(members)
    for replacement in POLICIES:
        found.assert_next(
            reference.sampler_order(positions, members, offsets, bounds, seed, epoch, replacement)
        )
    found.assert_next(
        reference.sampler_batches(batches, members, offsets, filled, per_batch, per_cluster, seed, epoch)
    )
    check_far(found)


def check_far(found: Results) -> None:
    """Tables past 2^33 slots and 2^32 members: places without the table; sample numbers past 2^31."""
    offsets = torch.tensor([0, 2**31 - 1, 5, 2**31 - 1, 2**24 + 1]).cumsum(0)
    bounds = torch.tensor([0, 10, 20, 2**34 - 500, 2**34])
    slots = reference.slots_of(torch.arange(2**34 - 1000, 2**34), 2**34, 1, 0)
    for replacement in POLICIES:
        found.assert_next(reference.table_positions(slots, offsets, bounds, 1, 0, replacement))
    found.assert_next(torch.cat([torch.zeros(2, dtype=torch.int64), torch.arange(2**31 - 2, 2**31 + 3)]))
    assert not found.left


@pytest.fixture(scope="module", params=SANITIZED)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = [f"-DCLUSTOPS_ISA={request.param}", *SETS[request.param], *ADDRESS]
    return build(tmp_path_factory.mktemp(request.param), "sampler.cpp", *flags)


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
    flags = ["-fsanitize=thread", "-DCLUSTOPS_STD_THREADS", "-DCLUSTOPS_ISA=baseline"]
    program = build(tmp_path, "sampler.cpp", *flags)
    for ranges in (1, 4):
        check(program, 20_000, 300, ranges, 30_000, 20_000, 700, 4, 0)
