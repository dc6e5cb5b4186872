"""The contrastive losses on a CPU, under the sanitizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sanitized import SANITIZED, UNOPTIMISED, build_for_addresses, build_for_threads
from simt import DTYPES, Results, needs_compiler
from support import RTOL, assert_close, generator, seeds
from torch.nn.functional import normalize

from clustops.reference import contrastive_rows as reference

pytestmark = needs_compiler


def check(
    program: Path,
    shape: tuple[int, int, int],
    part: tuple[int, int],
    dtype: torch.dtype,
    temperature: float = 0.07,
    norm: bool = False,
    threads: int = 1,
    seed: int = 0,
) -> None:
    """``shape``: samples, views, features."""
    g, wide = generator(seed), torch.float64 if dtype == torch.float64 else torch.float32
    n, v, d = shape
    rows = torch.randn(shape, generator=g)
    features = (rows if norm else normalize(rows, dim=-1)).to(dtype)
    labels = torch.randint(-1, n // 3 + 1, (n,), generator=g)
    confidence = torch.rand(n, generator=g)
    upstream = torch.randn(n, v, generator=g).to(wide)
    given = features.double(), labels, confidence
    options = temperature, 0.2, True, False, norm
    by: Any = reference
    every = by.contrastive_rows(*given, 0, n, *options)[1]
    oracles = by.contrastive_rows(*given, *part, *options)
    gradient = by.contrastive_rows_backward(upstream.double(), *given, every, *part, *options)
    sizes = [n, v, d, *part, DTYPES[dtype], norm, threads]
    numbers = torch.tensor([temperature, 0.2], dtype=torch.float64)
    inputs = features, labels, confidence, upstream, every.to(wide)
    answer = Results(program, [], sizes, numbers, *inputs)
    scale = max(1.0, 0.07 / temperature)
    for oracle, found_in in [*((t, wide) for t in oracles), (gradient, dtype)]:
        found = answer.take(found_in, *oracle.shape).double()
        if not found.numel() or n * v == 1:
            continue
        if oracle is gradient:
            assert (found - oracle).abs().max() <= RTOL[
                dtype
            ] * 10 * scale * upstream.abs().max() / temperature
        else:
            assert_close(found, oracle, found_in, scale)
    assert not answer.left


@pytest.fixture(scope="module", params=SANITIZED)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_for_addresses(tmp_path_factory.mktemp("build"), "contrastive", request.param, *UNOPTIMISED)


@settings(max_examples=25)
@given(
    n=st.sampled_from([1, 2, 5, 15, 16, 17, 33, 70]),
    v=st.integers(1, 3),
    d=st.sampled_from([1, 3, 15, 16, 17, 31, 33, 65]),
    dtype=st.sampled_from(list(DTYPES)),
    temperature=st.sampled_from([0.07, 0.01]),
    norm=st.booleans(),
    seed=seeds,
)
def test_the_kernels_stay_in_bounds(
    program: Path, n: int, v: int, d: int, dtype: torch.dtype, temperature: float, norm: bool, seed: int
) -> None:
    first = seed % n
    part = (0, n) if seed % 2 else (first, seed // 7 % (n - first + 1))
    check(program, (n, v, d), part, dtype, temperature, norm, seed=seed)


@pytest.mark.parametrize("part", [(0, 280), (50, 100)])
def test_several_blocks_stay_in_bounds(program: Path, part: tuple[int, int]) -> None:
    check(program, (280, 2, 5), part, torch.float32)


def test_threads_do_not_race(tmp_path: Path) -> None:
    program = build_for_threads(tmp_path, "contrastive", *UNOPTIMISED)
    for temperature in (0.07, 0.01):
        for part in ((0, 230), (40, 150)):
            check(program, (230, 2, 9), part, torch.float32, temperature, threads=4)
