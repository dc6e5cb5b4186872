"""The CUDA kernels of Sinkhorn assignment on the CPU, in three orders of the threads of a block."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import DTYPES, Results, build, needs_compiler
from support import assert_close, generator, seeds
from torch import Tensor

from clustops.reference import sinkhorn_ops as ops

STREAMING, RESIDENT = 1, 200 << 10  # bytes of shared memory: no problem fits, all do

pytestmark = needs_compiler
dtypes = st.sampled_from(list(DTYPES))
orders = st.integers(0, 2)
few = settings(max_examples=20)
PATHS = [STREAMING, RESIDENT]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simt")
    return build(folder, "sinkhorn_gpu", "sinkhorn.cu", "sinkhorn_resident.cu", "sinkhorn_split.cu")


class Rows(NamedTuple):
    scores: Tensor  # [P, B, K]
    queue: Tensor | None = None  # [P, N, K], or [1, N, K] for all problems
    weights: Tensor | None = None  # [P, B]
    padding: int = 0  # elements between rows

    @property
    def whole_queue(self) -> Tensor | None:
        return None if self.queue is None else self.queue.expand(len(self.scores), -1, -1)


class Machine(NamedTuple):
    order: int = 0
    shared: int = RESIDENT
    processors: int = 2


class Settings(NamedTuple):
    epsilon: float = 0.05
    n_iters: int = 3
    relax: float | None = None
    mass: float | None = None
    tol: float | None = None


def run(
    program: Path,
    operation: str,
    machine: Machine,
    rows: Rows,
    out: torch.dtype,
    virtual: bool,
    numbers: list[float],
    flags: list[bool],
    *inputs: Tensor | None,
) -> Results:
    (p, b, k), queue = rows.scores.shape, rows.queue
    queued, one_queue = (0, False) if queue is None else (queue.shape[1], len(queue) != p)
    sizes = [p, b, queued, k, rows.padding, virtual, rows.weights is not None, one_queue, *flags]
    arguments = [machine.order, DTYPES[rows.scores.dtype], DTYPES[out], *machine[1:], *map(int, sizes)]
    padded = [None if t is None else F.pad(t, (0, rows.padding), value=torch.nan) for t in rows[:2]]
    given = torch.tensor([*numbers, *[0.0] * 8][:8], dtype=torch.float64)
    tensors = [t for t in (given, *padded, rows.weights, *inputs) if t is not None]
    return Results(program, [operation, *arguments], *tensors)


def solve(
    program: Path,
    rows: Rows,
    given: Settings,
    machine: Machine,
    *,
    prior: Tensor | None = None,
    init: Tensor | None = None,
    hard: bool = False,
    out: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Potentials, and assignments of dtype ``out``."""
    p, b, k = rows.scores.shape
    wide, virtual = ops.accumulator(rows.scores.dtype), given.mass is not None
    fi = 1.0 if given.relax is None else given.relax / (given.relax + given.epsilon)
    numbers = [given.epsilon, given.n_iters, fi, *(-1.0 if x is None else x for x in given[3:]), -1.0, hard]
    flags = [prior is not None, init is not None, True]
    found = run(program, "solve", machine, rows, out or wide, virtual, numbers, flags, prior, init)
    return found.take(wide, p, k + virtual), found.take(out or wide, p, b, k)


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def oracle(
    rows: Rows, given: Settings, *, prior: Tensor | None = None, init: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    scores = rows.scores.double()
    queue, weights = double(rows.whole_queue), double(rows.weights)
    potentials = ops.sinkhorn_potentials(
        scores, queue, double(prior), weights, double(init), *given, bound=None
    )
    return potentials, ops.assign_from_potentials(scores, potentials, given.epsilon, False, torch.float64)


def cosines(p: int, b: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (torch.rand(p, b, k, generator=generator(seed), dtype=torch.float64) * 2 - 1).to(dtype)


def draw_weights(p: int, b: int, dtype: torch.dtype, seed: int) -> Tensor:
    """From 0 to 2, a third of them 0."""
    g = generator(seed)
    weights = torch.rand(p, b, generator=g) * torch.randint(0, 3, (p, b), generator=g)
    weights[:, 0] = 1
    return weights.to(ops.accumulator(dtype))


def assert_equal(found: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 2) -> None:
    """As close as sums in the accumulator of ``dtype`` are, in the dtype found; NaN where expected."""
    assert torch.equal(found.isnan(), expected.isnan())
    coarse = found.dtype if found.dtype in (torch.bfloat16, torch.float16) else ops.accumulator(dtype)
    assert_close(
        found.masked_fill(found.isnan(), 0), expected.masked_fill(expected.isnan(), 0), coarse, scale
    )


def assert_bits(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


SHAPES = [
    (1, 1, 1),
    (1, 5, 3),
    (2, 33, 8),
    (7, 9, 17),
    (1, 70, 63),
    (2, 13, 257),
    (3, 40, 260),
    (1, 11, 1031),
]


@few
@given(
    shape=st.sampled_from(SHAPES),
    dtype=dtypes,
    queued=st.sampled_from([0, 0, 5]),
    one_queue=st.booleans(),
    padding=st.sampled_from([0, 3, 8]),
    weighted=st.booleans(),
    with_prior=st.booleans(),
    warm=st.booleans(),
    n_iters=st.integers(1, 4),
    relax=st.sampled_from([None, None, 0.1, 2.0]),
    mass=st.sampled_from([None, None, 0.4, 1.0]),
    tol=st.sampled_from([None, None, 1e-2]),
    narrow=st.booleans(),
    shared=st.sampled_from([STREAMING, RESIDENT, 12 << 10]),
    processors=st.sampled_from([2, 5]),
    order=orders,
    seed=seeds,
)
def test_solutions_are_the_reference_s(
    program: Path,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    queued: int,
    one_queue: bool,
    padding: int,
    weighted: bool,
    with_prior: bool,
    warm: bool,
    n_iters: int,
    relax: float | None,
    mass: float | None,
    tol: float | None,
    narrow: bool,
    shared: int,
    processors: int,
    order: int,
    seed: int,
) -> None:
    (p, b, k), g, wide = shape, generator(seed), ops.accumulator(dtype)
    scores, weights = cosines(p, b, k, dtype, seed), None
    if weighted:
        weights = draw_weights(p, b, dtype, seed)
        scores[weights == 0] = torch.nan
    queue = cosines(1 if one_queue else p, queued, k, dtype, seed + 1) if queued else None
    prior = torch.rand(p, k, generator=g).to(wide) if with_prior else None
    if prior is not None and k > 3:
        prior[:, 1] = 0
    init = torch.randn(p, k + (mass is not None), generator=g).to(wide) if warm else None
    rows, given = Rows(scores, queue, weights, padding), Settings(0.05, n_iters, relax, mass, tol)
    machine = Machine(order, shared, processors)
    out = dtype if narrow else None
    found = solve(program, rows, given, machine, prior=prior, init=init, out=out)
    for one, right in zip(found, oracle(rows, given, prior=prior, init=init), strict=True):
        assert_equal(one, right, dtype)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("shared", PATHS, ids=["streaming", "resident"])
@pytest.mark.parametrize("shape", [(1, 9, 4100), (1, 3, 16400)])
def test_rows_of_many_columns(program: Path, shape: tuple[int, int, int], shared: int, warm: bool) -> None:
    rows, given = Rows(cosines(*shape, torch.bfloat16, 0)), Settings(n_iters=2)
    init = torch.zeros(1, shape[2]) if warm else None
    found = solve(program, rows, given, Machine(2, shared), init=init)
    for one, right in zip(found, oracle(rows, given, init=init), strict=True):
        assert_equal(one, right, torch.bfloat16)


LONG = 200 << 10  # bytes of shared memory that a slice of a long row needs
LONG_ONLY = Machine(2, 30 << 10, 5)  # 40 rows do not fit, a slice does


@few
@given(
    shape=st.sampled_from([(1, 1, 1024), (3, 7, 1025), (1, 23, 2050), (2, 9, 3100)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    queued=st.sampled_from([0, 5]),
    padding=st.sampled_from([0, 3, 8]),
    weighted=st.booleans(),
    virtual=st.booleans(),
    processors=st.sampled_from([4, 9]),
    order=orders,
    seed=seeds,
)
def test_ctas_share_long_rows(
    program: Path,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    queued: int,
    padding: int,
    weighted: bool,
    virtual: bool,
    processors: int,
    order: int,
    seed: int,
) -> None:
    p, b, k = shape
    scores, weights = cosines(p, b, k, dtype, seed), None
    if weighted:
        weights = draw_weights(p, b, dtype, seed)
        scores[weights == 0] = torch.nan
    queue = cosines(p, queued, k, dtype, seed + 1) if queued else None
    rows, potentials = (
        Rows(scores, queue, weights, padding),
        torch.randn(p, k + virtual, generator=generator(seed)),
    )
    arguments = ("mass", Machine(order, LONG, processors), rows, dtype, virtual, [0.05, True], [], potentials)
    found = run(program, *arguments).take(torch.float32, p, k + virtual)
    right = ops.column_log_mass(
        scores.double(), double(queue), double(weights), potentials.double(), 0.05, True
    )
    assert_equal(found, right, dtype)
    assert_bits((found,), (run(program, *arguments).take(torch.float32, p, k + virtual),))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordinary_long_rows_are_read_once(program: Path, dtype: torch.dtype, order: int) -> None:
    """The passes that stand in where a slice's numbers run out of range would hide faults of this one."""
    scores, potentials = cosines(2, 23, 3100, dtype, 0), torch.randn(2, 3101, generator=generator(0))
    found = run(program, "split", Machine(order, LONG, 17), Rows(scores), dtype, True, [0.05], [], potentials)
    assert found.take(torch.float32).item() == 0
    partials = found.take(torch.float32, 2, len(found.left) // (4 * 2 * 3101), 3101)
    assert partials.shape[1] > 1
    right = ops.column_log_mass(scores.double(), None, None, potentials.double(), 0.05, True)
    assert_equal(torch.logsumexp(partials * math.log(2), 1), right, dtype)


@pytest.mark.parametrize("far", [0.0, 60.0], ids=["near", "far apart"])
@pytest.mark.parametrize("tol", [None, 1e9])
def test_solutions_of_long_rows(program: Path, tol: float | None, far: float) -> None:
    """Far apart, powers vanish: then each row is read twice."""
    scores = cosines(2, 40, 2050, torch.float32, 0)
    scores[0, :, 7] -= far
    rows, given = Rows(scores), Settings(n_iters=3, mass=0.7, tol=tol)
    init = torch.zeros(2, 2051)
    found = solve(program, rows, given, LONG_ONLY, init=init)
    for one, right in zip(found, oracle(rows, given, init=init), strict=True):
        assert_equal(one, right, torch.float32)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_a_score_in_one_slice_makes_potentials_of_long_rows_nan(program: Path, odd: float) -> None:
    scores = cosines(2, 40, 2050, torch.float32, 0)
    scores[1, 4, 2049] = odd
    rows, given = Rows(scores), Settings(n_iters=2)
    found, _ = solve(program, rows, given, LONG_ONLY, init=torch.zeros(2, 2050))
    assert found.isnan().all(-1).tolist() == [False, True]


@few
@given(
    shape=st.sampled_from(SHAPES),
    dtype=dtypes,
    queued=st.sampled_from([0, 4]),
    one_queue=st.booleans(),
    virtual=st.booleans(),
    weighted=st.booleans(),
    normalized=st.booleans(),
    spread=st.sampled_from([1.0, 40.0]),
    order=orders,
    seed=seeds,
)
def test_column_masses_are_the_reference_s_however_small(
    program: Path,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    queued: int,
    one_queue: bool,
    virtual: bool,
    weighted: bool,
    normalized: bool,
    spread: float,
    order: int,
    seed: int,
) -> None:
    p, b, k = shape
    scores, weights = cosines(p, b, k, dtype, seed), draw_weights(p, b, dtype, seed) if weighted else None
    queue = cosines(1 if one_queue else p, queued, k, dtype, seed + 1) if queued else None
    rows = Rows(scores, queue, weights)
    potentials = torch.randn(p, k + virtual, generator=generator(seed)).to(ops.accumulator(dtype)) * spread
    potentials[:, k // 2] = -torch.inf if k > 1 else 0.0
    found = run(
        program, "mass", Machine(order), rows, dtype, virtual, [0.05, normalized], [], potentials
    ).take(potentials.dtype, p, k + virtual)
    right = ops.column_log_mass(
        scores.double(), double(rows.whole_queue), double(weights), potentials.double(), 0.05, normalized
    )
    assert_equal(found, right, dtype)


@few
@given(
    shape=st.sampled_from(SHAPES),
    dtype=dtypes,
    narrow=st.booleans(),
    virtual=st.booleans(),
    hard=st.booleans(),
    padding=st.sampled_from([0, 3, 8]),
    levels=st.sampled_from([2, 1000]),
    order=orders,
    seed=seeds,
)
def test_assignments_are_the_reference_s(
    program: Path,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    narrow: bool,
    virtual: bool,
    hard: bool,
    padding: int,
    levels: int,
    order: int,
    seed: int,
) -> None:
    p, b, k = shape
    scores = ((cosines(p, b, k, torch.float64, seed) * levels).round() / levels).to(dtype)  # with ties
    for row, odd in enumerate((torch.nan, torch.inf, -torch.inf)):
        scores[-1, row : row + 1, k // 2] = odd
    potentials = torch.randint(-3, 3, (p, k + virtual), generator=generator(seed)).to(ops.accumulator(dtype))
    if k > 1:
        potentials[0, 0] = -torch.inf
    out = dtype if narrow else potentials.dtype
    rows = Rows(scores, padding=padding)
    found = run(program, "assign", Machine(order), rows, out, virtual, [0.05, hard], [], potentials)
    result = found.take(out, p, b, k)
    if hard:
        right = ops.assign_from_potentials(scores, potentials, 0.05, True, out)
        torch.testing.assert_close(result, right, rtol=0, atol=0, equal_nan=True)
    else:
        right = ops.assign_from_potentials(scores.double(), potentials.double(), 0.05, False, torch.float64)
        assert_equal(result, right, dtype)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("queued", [False, True], ids=["row", "queued"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("shared", PATHS, ids=["streaming", "resident"])
def test_a_counted_score_that_is_not_finite_makes_its_problem_s_potentials_nan(
    program: Path, shared: int, warm: bool, queued: bool, odd: float
) -> None:
    scores, queue = cosines(3, 21, 11, torch.float32, 0), cosines(3, 5, 11, torch.float32, 1)
    scores[0, 3] = odd  # of weight 0
    (queue if queued else scores)[1, 4, 10] = odd
    weights = torch.ones(3, 21)
    weights[0, 3] = 0
    init = torch.zeros(3, 11) if warm else None
    rows, given = Rows(scores, queue, weights), Settings(n_iters=2)
    found = solve(program, rows, given, Machine(2, shared), init=init)
    assert found[0].isnan().all(-1).tolist() == [False, True, False]
    for one, right in zip(found, oracle(rows, given, init=init), strict=True):
        assert_equal(one, right, torch.float32)


@pytest.mark.parametrize("shared", PATHS, ids=["streaming", "resident"])
@pytest.mark.parametrize("relax", [None, 0.5])
@pytest.mark.parametrize("n_iters", [1, 3])
def test_scores_far_apart(program: Path, shared: int, relax: float | None, n_iters: int) -> None:
    """Rows and columns that underflow beside others, with |s| / epsilon up to 1e4."""
    scores = torch.randint(-8, 9, (2, 40, 19), generator=generator(0)).float() * 32
    scores[0, :20] -= 200
    scores[1, :, 3] -= 200
    rows, given = Rows(scores), Settings(2**-5, n_iters, relax)
    for init in (None, torch.zeros(2, 19)):
        found = solve(program, rows, given, Machine(1, shared), init=init)
        right = oracle(rows, given, init=init)
        torch.testing.assert_close(found[0].double(), right[0], rtol=0, atol=2e-3)
        torch.testing.assert_close(found[1].double(), right[1], rtol=0, atol=5e-3)


@pytest.mark.parametrize("shared", PATHS, ids=["streaming", "resident"])
def test_problems_stop_one_by_one_at_the_tolerance(program: Path, shared: int) -> None:
    scores = cosines(3, 31, 7, torch.float32, 0) * torch.tensor([0.02, 0.3, 1.0]).view(3, 1, 1)
    whole = [solve(program, Rows(scores), Settings(n_iters=n), Machine(0, shared))[0] for n in range(1, 9)]
    errors = []
    for a in whole:
        mass = ops.assign_from_potentials(scores, a, 0.05, False, torch.float32).mean(1)
        errors.append((mass - 1 / 7).abs().sum(-1))
    tol = (
        float(errors[2][1]) * 1.01
    )  # the second problem stops after 3 updates, the first before, the third later
    stopped = [min(n for n in range(8) if errors[n][p] <= tol or n == 7) for p in range(3)]
    assert stopped[0] < stopped[1] == 2 < stopped[2]
    found, _ = solve(program, Rows(scores), Settings(n_iters=8, tol=tol), Machine(0, shared))
    assert_bits((found,), (torch.stack([whole[n][p] for p, n in enumerate(stopped)]),))


@pytest.mark.parametrize("shared", PATHS, ids=["streaming", "resident"])
def test_rows_that_all_weigh_nothing_change_no_potential(program: Path, shared: int) -> None:
    rows = Rows(cosines(2, 20, 5, torch.float32, 0), weights=torch.ones(2, 20))
    rows.weights[1] = 0  # type: ignore[index]
    init = torch.randn(2, 5, generator=generator(0))
    found, _ = solve(program, rows, Settings(), Machine(0, shared), init=init)
    torch.testing.assert_close(found[1], init[1], rtol=1e-6, atol=0)
    assert not torch.allclose(found[0], init[0], rtol=1e-3)


@pytest.mark.parametrize("shared", PATHS, ids=["streaming", "resident"])
@pytest.mark.parametrize("shape", [(1, 70, 63), (3, 40, 260)])
def test_the_order_of_threads_and_blocks_changes_no_bit(
    program: Path, shape: tuple[int, int, int], shared: int
) -> None:
    rows = Rows(cosines(*shape, torch.float32, 0), weights=draw_weights(*shape[:2], torch.float32, 0))
    given = Settings(relax=1.0, mass=0.5, tol=1e-4)
    first, *others = (solve(program, rows, given, Machine(order, shared, 5)) for order in range(3))
    for other in others:
        assert_bits(first, other)


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("processors", [4, 7])
def test_groups_of_blocks_solve_problem_after_problem(program: Path, processors: int, order: int) -> None:
    rows = Rows(cosines(6, 70, 63, torch.float32, 0))  # a problem takes two blocks
    found = solve(program, rows, Settings(tol=0.05), Machine(order, 12 << 10, processors))
    for one, right in zip(found, oracle(rows, Settings(tol=0.05)), strict=True):
        assert_equal(one, right, torch.float32)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("shared", PATHS, ids=["streaming", "resident"])
def test_assignments_of_a_solution_are_those_of_its_potentials(
    program: Path, shared: int, hard: bool
) -> None:
    rows = Rows(cosines(2, 30, 21, torch.float16, 0))
    potentials, found = solve(program, rows, Settings(), Machine(0, shared), hard=hard)
    right = run(program, "assign", Machine(), rows, torch.float32, False, [0.05, hard], [], potentials)
    assert_bits((found,), (right.take(torch.float32, 2, 30, 21),))
