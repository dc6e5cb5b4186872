"""The Sinkhorn kernels on a GPU against the reference, in a captured graph, without waits, at large sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_close, generator, odd_sizes, seeds
from torch import Tensor

from clustops.reference import sinkhorn_ops as ops

pytestmark = pytest.mark.cuda

kernels = torch.ops.clustops
few = settings(max_examples=40)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
NOTHING = (None, None, None, None)  # no queue, prior, weights, init

# In the shared memory of one block, of several blocks, in neither with rows of few and of many columns.
SHAPES = {
    "one block": (3, 50, 40, torch.float32),
    "blocks": (2, 700, 1000, torch.bfloat16),
    "streaming": (1, 4000, 3000, torch.float32),
    "long rows": (1, 700, 20_000, torch.float32),
    "double": (2, 300, 500, torch.float64),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def cosines(p: int, b: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.rand(p, b, k, generator=generator(seed), dtype=torch.float32) * 2 - 1).to(dtype)


def plan(scores: Tensor, *tensors: Tensor | None, hard: bool = False, tol: float | None = None) -> Any:
    out = torch.empty(scores.shape, dtype=ops.accumulator(scores.dtype), device=scores.device)
    given = (*tensors, *NOTHING)[:4]
    return kernels.sinkhorn_(out, scores, *given, 0.05, 3, None, None, tol, hard), out


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def gpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cuda()


def assert_equal(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """As close as sums in the accumulator of ``dtype`` are, in the dtype found; NaN where expected."""
    found = found.cpu()
    assert torch.equal(found.isnan(), expected.isnan())
    coarse = found.dtype if found.dtype in (torch.bfloat16, torch.float16) else ops.accumulator(dtype)
    assert_close(found.masked_fill(found.isnan(), 0), expected.masked_fill(expected.isnan(), 0), coarse, 2)


def assert_bits(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@contextmanager
def no_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@few
@given(
    p=st.integers(1, 3),
    b=odd_sizes,
    k=st.sampled_from([1, 2, 17, 63, 130, 260, 1031, 5000]),
    queued=st.sampled_from([0, 0, 9]),
    dtype=dtypes,
    out_dtype=dtypes,
    weighted=st.booleans(),
    with_prior=st.booleans(),
    warm=st.booleans(),
    n_iters=st.integers(0, 4),
    relax=st.sampled_from([None, None, 0.1]),
    mass=st.sampled_from([None, None, 0.4]),
    tol=st.sampled_from([None, None, 1e-2]),
    seed=seeds,
)
def test_plans_are_the_reference_s(
    p: int,
    b: int,
    k: int,
    queued: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    weighted: bool,
    with_prior: bool,
    warm: bool,
    n_iters: int,
    relax: float | None,
    mass: float | None,
    tol: float | None,
    seed: int,
) -> None:
    g, wide = generator(seed), ops.accumulator(dtype)
    scores = cosines(p, b, k, dtype, seed)
    queue = cosines(1, queued, k, dtype, seed + 1).expand(p, -1, -1) if queued else None
    weights = prior = init = None
    if weighted:
        weights = (torch.rand(p, b, generator=g) * torch.randint(0, 3, (p, b), generator=g)).to(wide)
        weights[:, 0] = 1
        scores[weights == 0] = torch.nan
    if with_prior:
        prior = torch.rand(p, k, generator=g).to(wide) + 0.01
    if warm:
        init = torch.randn(p, k + (mass is not None), generator=g).to(wide)
    scalars = (0.05, n_iters, relax, mass, tol)
    out = torch.empty(p, b, k, dtype=out_dtype, device="cuda")
    found = kernels.sinkhorn_(
        out, scores.cuda(), gpu(queue), gpu(prior), gpu(weights), gpu(init), *scalars, False
    )
    right = ops.sinkhorn_potentials(
        scores.double(),
        double(queue),
        double(prior),
        double(weights),
        double(init),
        0.05,
        n_iters,
        relax,
        mass,
        tol,
        None,
    )
    assert_equal(found, right, dtype)
    assigned = ops.assign_from_potentials(scores.double(), right, 0.05, False, torch.float64)
    assert_equal(out, assigned, dtype)
    alone = kernels.sinkhorn_potentials(
        scores.cuda(), gpu(queue), gpu(prior), gpu(weights), gpu(init), *scalars, 1.0
    )
    assert_bits((alone,), (found,))


@few
@given(
    b=odd_sizes,
    k=st.sampled_from([1, 2, 17, 130, 1031, 20_000]),
    dtype=dtypes,
    virtual=st.booleans(),
    normalized=st.booleans(),
    spread=st.sampled_from([1.0, 40.0]),
    seed=seeds,
)
def test_column_masses_are_the_reference_s_however_small(
    b: int, k: int, dtype: torch.dtype, virtual: bool, normalized: bool, spread: float, seed: int
) -> None:
    scores, queue = cosines(2, b, k, dtype, seed), cosines(2, 5, k, dtype, seed + 1)
    potentials = torch.randn(2, k + virtual, generator=generator(seed)).to(ops.accumulator(dtype)) * spread
    found = kernels.sinkhorn_column_mass(
        scores.cuda(), queue.cuda(), None, potentials.cuda(), 0.05, normalized
    )
    right = ops.column_log_mass(scores.double(), queue.double(), None, potentials.double(), 0.05, normalized)
    assert_equal(found, right, dtype)


@few
@given(b=odd_sizes, k=st.sampled_from([1, 2, 17, 131, 1031, 13_000]), dtype=dtypes, seed=seeds)
def test_hard_assignments_are_the_reference_s_ties_included(
    b: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    scores = cosines(2, b, k, torch.float32, seed).mul(2).round().to(dtype)
    scores[1, b // 2, k // 2] = -torch.inf
    potentials = torch.randint(-3, 3, (2, k), generator=generator(seed)).to(ops.accumulator(dtype))
    out = torch.empty(2, b, k, dtype=dtype, device="cuda")
    kernels.assign_from_potentials_(out, scores.cuda(), potentials.cuda(), 0.05, True)
    assert_bits((out.cpu(),), (ops.assign_from_potentials(scores, potentials, 0.05, True, dtype),))


@shapes
def test_shapes_of_each_path_are_the_reference_s(shape: tuple[int, int, int, torch.dtype]) -> None:
    scores = cosines(*shape).cuda()
    found, out = plan(scores)
    right = ops.sinkhorn_potentials(scores.double(), *NOTHING, 0.05, 3, None, None, None, None)
    assert_equal(found, right.cpu(), shape[3])
    assigned = ops.assign_from_potentials(scores.double(), right, 0.05, False, torch.float64)
    assert_equal(out, assigned.cpu(), shape[3])


@shapes
def test_runs_give_the_same_bits(shape: tuple[int, int, int, torch.dtype]) -> None:
    scores = cosines(*shape).cuda()
    first = plan(scores, tol=1e-3)
    for _ in range(5):
        assert_bits(plan(scores, tol=1e-3), first)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@shapes
def test_a_score_that_is_not_finite_makes_its_problem_s_potentials_nan(
    shape: tuple[int, int, int, torch.dtype], odd: float
) -> None:
    scores = cosines(*shape)
    scores[-1, 7, 3] = odd
    potentials, out = plan(scores.cuda())
    assert potentials.isnan().all(-1).tolist() == [False] * (shape[0] - 1) + [True]
    assert bool(out[-1].isnan().all())


@shapes
def test_a_call_is_captured_and_replayed_with_other_scores(shape: tuple[int, int, int, torch.dtype]) -> None:
    scores, other = cosines(*shape).cuda(), cosines(*shape, seed=1).cuda()
    expected = plan(other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        plan(scores)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = plan(scores)
    scores.copy_(other)
    for _ in range(3):
        graph.replay()
    assert_bits(captured, expected)


@shapes
def test_nothing_waits_for_the_host(shape: tuple[int, int, int, torch.dtype]) -> None:
    scores = cosines(*shape).cuda()
    potentials, _ = plan(scores)
    with no_waits():
        plan(scores, tol=1e-3)
        kernels.sinkhorn_column_mass(scores, None, None, potentials, 0.05, True)


@shapes
def test_kernels_run_on_the_current_stream(shape: tuple[int, int, int, torch.dtype]) -> None:
    scores = cosines(*shape).cuda()
    expected = plan(scores)
    torch.cuda.synchronize()
    late, side = torch.zeros_like(scores), torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # what runs elsewhere sees zeros
        late.copy_(scores)
        found = plan(late)
    side.synchronize()
    assert_bits(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@shapes
def test_kernels_run_on_the_device_of_their_tensors(shape: tuple[int, int, int, torch.dtype]) -> None:
    scores = cosines(*shape)
    expected = plan(scores.cuda(0))
    found = plan(scores.cuda(1))
    assert torch.cuda.current_device() == 0
    assert_bits(tuple(t.cpu() for t in found), tuple(t.cpu() for t in expected))


def test_two_streams_solve_at_once() -> None:
    scores = [cosines(1, 512, 1000, torch.bfloat16, seed).cuda() for seed in range(2)]
    expected = [plan(s) for s in scores]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in scores]
    found: list[Any] = [None, None]
    for _ in range(50):
        for i, (stream, s) in enumerate(zip(streams, scores, strict=True)):
            with torch.cuda.stream(stream):
                found[i] = plan(s)
    torch.cuda.synchronize()
    for one, right in zip(found, expected, strict=True):
        assert_bits(one, right)


def test_more_problems_than_a_grid_has_rows() -> None:
    scores = cosines(70_001, 5, 3, torch.float32)
    found, out = plan(scores.cuda())
    right = ops.sinkhorn_potentials(scores.double(), *NOTHING, 0.05, 3, None, None, None, None)
    assert_equal(found, right, torch.float32)
    assigned = ops.assign_from_potentials(scores.double(), right, 0.05, False, torch.float64)
    assert_equal(out, assigned, torch.float32)


def test_more_than_two_to_the_31_scores() -> None:
    b, k = 2**31 // 1024 + 999, 1024
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of GPU memory")
    scores = torch.zeros(1, b, k, dtype=torch.bfloat16, device="cuda")
    scores[0, -b // 2 :, 5] = 1.0
    out = torch.empty_like(scores)
    potentials = kernels.sinkhorn_(out, scores, *NOTHING, 0.25, 3, None, None, None, False)
    halves = torch.zeros(1, 2, k, dtype=torch.float64)  # the same problem: half the rows of each kind
    halves[0, 1, 5] = 1.0
    weights = torch.tensor([[b - b // 2 - b % 2, b // 2 + b % 2]], dtype=torch.float64)
    right = ops.sinkhorn_potentials(halves, None, None, weights, None, 0.25, 3, None, None, None, None)
    assert_close(potentials, right, torch.float32, 2)
    rows = ops.assign_from_potentials(halves, right, 0.25, False, torch.float64)[0]
    assert_close(out[0, [0, -1]], rows, torch.bfloat16)
