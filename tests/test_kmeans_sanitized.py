"""The update of k-means and k-means++ on a CPU under the sanitizers of addresses and of threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sanitized import SANITIZED, build_for_addresses, build_for_threads
from simt import DTYPES, Results, needs_compiler
from support import generator, seeds
from torch import Tensor

from clustops.reference import kmeans_ops, kmeans_seeding

pytestmark = needs_compiler
dtypes = st.sampled_from(list(DTYPES))
EXACT = "-ffp-contract=off"


def assert_next(found: Results, expected: Tensor) -> None:
    torch.testing.assert_close(found.take(expected.dtype, *expected.shape), expected, rtol=0, atol=0)


def check_update(
    program: Path, b: int, n: int, k: int, d: int, dtype: torch.dtype, threads: int, seed: int
) -> None:
    g = generator(seed)
    x = (torch.randn(b, n, d, generator=g) * 10.0 ** -torch.randint(0, 8, (b, n, d), generator=g)).to(dtype)
    weights = torch.rand(b, n, generator=g, dtype=torch.float64) * (torch.rand(b, n, generator=g) < 0.7)
    labels, before = (torch.randint(-1, k, (b, n), generator=g) for _ in range(2))
    bounds = kmeans_ops.bounds(x, weights)
    grid = kmeans_ops.units(bounds, (weights > 0).sum(1))
    sums, counts = torch.zeros(b, 2, k, d + 1).double(), torch.zeros(b, k, dtype=torch.int64)
    kmeans_ops.sums_(sums, counts, x, labels, weights, grid)
    means, _ = kmeans_ops.means(sums, torch.zeros(b, k, d, dtype=kmeans_ops.accumulator(dtype)))
    found = Results(program, [], [b, n, k, d, DTYPES[dtype], threads], x, weights, labels, before, grid)
    for expected in (bounds, sums, counts, means):
        assert_next(found, expected)
    found.left = found.left[8 * b :]  # the shift
    assert_next(found, kmeans_ops.counts(labels, weights, k))


def check_seeding(
    program: Path,
    b: int,
    restarts: int,
    n: int,
    d: int,
    trials: int,
    dtype: torch.dtype,
    threads: int,
    seed: int,
) -> None:
    """On a line of whole numbers, where the reference's distances are exact."""
    g, k, e = generator(seed), min(5, n), b * restarts
    x = torch.zeros(b, n, d, dtype=dtype)
    x[..., d // 2] = torch.randint(-20, 20, (b, n), generator=g).to(dtype)
    weights = torch.rand(b, n, generator=g, dtype=torch.float64) + 0.1
    uniform = torch.rand(e, k * trials, generator=g, dtype=torch.float64)
    candidates, of_entry = (
        x.repeat_interleave(restarts, 0)[:, :trials],
        weights.repeat_interleave(restarts, 0),
    )
    closest = torch.full((e, n), 9, dtype=kmeans_ops.accumulator(dtype))
    scale = torch.full((e,), 1024.0, dtype=torch.float64)
    potentials, improves = kmeans_seeding.potentials(x, candidates, closest, of_entry, scale)
    lowered = closest.clone()
    kmeans_seeding.closest_(lowered, x, candidates[:, :1])
    found = Results(program, [], [b, e, n, k, trials, d, DTYPES[dtype], threads], x, weights, uniform)
    for expected in (kmeans_seeding.seed(x, weights, uniform, k), potentials, improves, lowered):
        assert_next(found, expected)


@pytest.fixture(scope="module", params=SANITIZED)
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("build")
    update, seeding = (
        build_for_addresses(folder, f"kmeans_{name}", request.param, EXACT) for name in ("update", "seeding")
    )
    return update, seeding


@settings(max_examples=10)
@given(
    b=st.integers(0, 3),
    n=st.sampled_from([1, 5, 131, 1030]),
    k=st.sampled_from([1, 3, 17]),
    d=st.sampled_from([1, 15, 16, 17, 33, 70]),
    dtype=dtypes,
    seed=seeds,
)
def test_the_update_stays_in_bounds(
    programs: tuple[Path, Path], b: int, n: int, k: int, d: int, dtype: torch.dtype, seed: int
) -> None:
    check_update(programs[0], b, n, k, d, dtype, 1, seed)


@settings(max_examples=10)
@given(
    b=st.integers(1, 2),
    restarts=st.integers(1, 2),
    n=st.sampled_from([33, 131, 1030]),
    d=st.sampled_from([1, 15, 16, 17, 33]),
    trials=st.sampled_from([1, 4, 6, 8, 9, 17, 32]),
    dtype=dtypes,
    seed=seeds,
)
def test_seeding_stays_in_bounds(
    programs: tuple[Path, Path],
    b: int,
    restarts: int,
    n: int,
    d: int,
    trials: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    check_seeding(programs[1], b, restarts, n, d, trials, dtype, 1, seed)


def test_threads_do_not_race(tmp_path: Path) -> None:
    update, seeding = (build_for_threads(tmp_path, f"kmeans_{name}", EXACT) for name in ("update", "seeding"))
    for b in (1, 5):
        check_update(update, b, 3000, 9, 70, torch.float32, 4, 0)
        check_seeding(seeding, b, 1, 3000, 7, 4, torch.float32, 4, 0)
