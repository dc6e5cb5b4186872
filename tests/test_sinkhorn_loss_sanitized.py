"""The soft cross-entropy and small Sinkhorn matrices on a CPU, under the sanitizers."""

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
TEMPERATURES = (0.1, 0.05)


def check(
    program: Path,
    loss: tuple[int, int, int, int, int],
    matrices: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    threads: int,
    seed: int,
    scale: float = 1.0,
) -> None:
    """``loss``: views, targets, rows, columns, pairs. ``matrices``: their number, rows and iterations."""
    (v, a, b, k, pairs), (p, n, n_iters), (dtype, target_dtype) = loss, matrices, dtypes
    g, wide = generator(seed), reference.accumulator(dtype)
    a = a if pairs else v
    scores, targets = (torch.randn(rows, b, k, generator=g) / 2 * scale for rows in (v, a))
    scores, targets = scores.to(dtype), targets.to(target_dtype)
    bias = torch.randn(a, k, generator=g).to(wide)
    bias[:, k // 2 + 1 :: 5] = -torch.inf
    views, of = (torch.randint(0, rows, (pairs,), generator=g).tolist() for rows in (v, a))
    upstream = torch.randn(pairs or v, b, generator=g).to(wide) * (torch.rand(b, generator=g) < 0.7)
    m, of_result = (torch.randn(p, n, n, generator=g).to(dtype) * s for s in (3 * scale, 1))
    sizes = [v, a, b, k, pairs, DTYPES[dtype], DTYPES[target_dtype], threads]
    given = (scores, targets, bias, views, of, upstream, [p, n, n_iters], m, of_result)
    answer = Results(program, [], sizes, *given)
    exact = (scores.double(), targets.double(), bias.double())
    losses, of_scores, of_targets = reference.soft_cross_entropy(*exact, views, of, *TEMPERATURES)
    gradient = reference.soft_cross_entropy_backward(
        upstream.double(), *exact, of_scores, of_targets, views, of, *TEMPERATURES
    )
    oracles = [(t, wide) for t in (losses, of_scores, of_targets)] + [(gradient * 0.1, dtype)]
    oracles.append((reference.sinkhorn_matrix(m.double(), n_iters), dtype))
    oracles.append((reference.sinkhorn_matrix_backward(of_result.double(), m.double(), n_iters), dtype))
    for i, (oracle, found_in) in enumerate(oracles):
        found = answer.take(found_in, *oracle.shape).double()
        if found.numel():
            found = found * 0.1 if i == 3 else found
            assert_close(found, oracle, found_in, scale=1 if scale == 1 else 100)
    assert not answer.left


@pytest.fixture(scope="module", params=SANITIZED)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_for_addresses(tmp_path_factory.mktemp("build"), "sinkhorn_loss", request.param, *UNOPTIMISED)


@settings(max_examples=25)
@given(
    loss=st.tuples(
        st.integers(1, 3),
        st.integers(1, 3),
        st.sampled_from([0, 1, 5, 17]),
        st.sampled_from([1, 3, 15, 16, 17, 31, 33, 70]),
        st.integers(0, 5),
    ),
    matrices=st.tuples(
        st.sampled_from([0, 1, 33, 65]), st.sampled_from([1, 2, 4, 5, 8, 9, 32]), st.integers(0, 3)
    ),
    dtype=st.sampled_from(list(DTYPES)),
    target_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1.0, 40.0]),
    seed=seeds,
)
def test_the_kernels_stay_in_bounds(
    program: Path,
    loss: tuple[int, int, int, int, int],
    matrices: tuple[int, int, int],
    dtype: torch.dtype,
    target_dtype: torch.dtype,
    scale: float,
    seed: int,
) -> None:
    pair = (dtype, dtype if dtype == torch.float64 else target_dtype)
    check(program, loss, matrices, pair, 1, seed, scale)


def test_rows_longer_than_a_block_stay_in_bounds(program: Path) -> None:
    for dtype in DTYPES:
        check(program, (2, 1, 3, 4099, 2), (0, 1, 0), (dtype, dtype), 1, 0)


def test_threads_do_not_race(tmp_path: Path) -> None:
    program = build_for_threads(tmp_path, "sinkhorn_loss", *UNOPTIMISED)
    for pairs in (0, 2, 7):
        for scale in (1.0, 40.0):
            types = torch.float32, torch.bfloat16
            check(program, (3, 2, 200, 180, pairs), (300, 4, 3), types, 4, 0, scale)
