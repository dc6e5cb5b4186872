"""Sinkhorn assignment on a CPU under the sanitizers of addresses and of threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sanitized import SANITIZED, UNOPTIMISED, build_for_addresses, build_for_threads
from simt import DTYPES, Results, needs_compiler
from support import assert_close, generator, seeds

from clustops.reference import sinkhorn_ops as reference

pytestmark = needs_compiler


def check(
    program: Path,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    options: set[str],
    threads: int,
    seed: int,
    epsilon: float = 0.05,
) -> None:
    (p, b, k, n), g, wide = shape, generator(seed), reference.accumulator(dtype)
    scores, queue = ((torch.rand(p, rows, k, generator=g) * 2 - 1).to(dtype) for rows in (b, n))
    weights = ((torch.rand(p, b, generator=g) + 0.1) * (torch.rand(p, b, generator=g) < 0.7)).to(wide)
    weighted, with_mass, hard = ("weights" in options, "mass" in options, "hard" in options)
    sizes = [p, b, k, n, DTYPES[dtype], 3, weighted, with_mass, hard, threads]
    given = [scores, queue, *([weights] if weighted else [])]
    found = Results(program, [], sizes, torch.tensor([epsilon], dtype=torch.float64), *given)
    potentials, plan = found.take(wide, p, k + with_mass), found.take(wide, p, b, k)
    again, masses = found.take(dtype, p, b, k), found.take(wide, p, k + with_mass)
    assert not found.left
    if epsilon < 0.05:  # exponents of which fp32 knows only the size
        assert not any(t.isnan().any() for t in (potentials, plan, again, masses))
        return
    exactly = (scores, queue if n else None, weights if weighted else None)
    mass = 0.5 if with_mass else None
    oracle = reference.sinkhorn_potentials(
        exactly[0].double(),
        None if exactly[1] is None else exactly[1].double(),
        None,
        None if exactly[2] is None else exactly[2].double(),
        None, epsilon, 3, None, mass, None, None,
    )  # fmt: skip
    assert_close(potentials, oracle, wide)
    exact = reference.assign_from_potentials(scores, potentials, epsilon, hard, wide)
    assert_close(plan, exact, wide)
    assert_close(again, exact, dtype)
    assert_close(masses, reference.column_log_mass(*exactly, potentials, epsilon, True), wide)


@pytest.fixture(scope="module", params=SANITIZED)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_for_addresses(tmp_path_factory.mktemp("build"), "sinkhorn", request.param, *UNOPTIMISED)


@settings(max_examples=25)
@given(
    p=st.integers(0, 3),
    b=st.sampled_from([0, 1, 3, 4, 5, 64, 67, 131]),
    k=st.sampled_from([1, 3, 15, 16, 17, 33, 70]),
    n=st.sampled_from([0, 1, 66]),
    dtype=st.sampled_from(list(DTYPES)),
    options=st.sets(st.sampled_from(["weights", "mass", "hard"])),
    epsilon=st.sampled_from([0.05, 1e-4]),
    seed=seeds,
)
def test_the_kernels_stay_in_bounds(
    program: Path,
    p: int,
    b: int,
    k: int,
    n: int,
    dtype: torch.dtype,
    options: set[str],
    epsilon: float,
    seed: int,
) -> None:
    check(program, (p, b, k, n), dtype, options, 1, seed, epsilon)


def test_rows_longer_than_a_chunk_stay_in_bounds(program: Path) -> None:
    for dtype in DTYPES:
        check(program, (1, 5, 4099, 2), dtype, {"mass"}, 1, 0)


def test_threads_do_not_race(tmp_path: Path) -> None:
    program = build_for_threads(tmp_path, "sinkhorn", *UNOPTIMISED)
    for shape in ((1, 300, 70, 0), (1, 300, 70, 70), (5, 70, 9, 0), (1, 70, 4200, 0)):
        for epsilon in (0.05, 1e-4):
            check(program, shape, torch.float32, set(), 4, 0, epsilon)
            check(program, shape, torch.float32, {"weights", "mass", "hard"}, 4, 0, epsilon)
