"""The CUDA kernels of the soft cross-entropy and of small matrices on the CPU, thread by thread, under the
address and undefined-behaviour sanitizers, in three orders of the threads of a block."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import DTYPES, Results, build, needs_compiler
from support import assert_close, generator, seeds
from torch import Tensor

from clustops.reference import sinkhorn_ops as ops

pytestmark = needs_compiler
dtypes = st.sampled_from(list(DTYPES))
orders = st.integers(0, 2)
few = settings(max_examples=15)
HALVES = [torch.bfloat16, torch.float16]
SWAPPED = [(v, a) for a in range(2) for v in range(8) if v != a]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simt")
    kernels = ["sinkhorn_loss.cu", "sinkhorn_loss_backward.cu", "sinkhorn_matrix.cu"]
    return build(folder, "sinkhorn_loss_gpu", *kernels, optimize="-O0")


@dataclass(frozen=True)
class Layout:
    """Elements before the first score, and behind each row, in memory."""

    before: int = 0
    behind: int = 0


@dataclass
class Problem:
    """One call. The tensors may have any strides but those of their last dimension."""

    scores: Tensor
    targets: Tensor
    bias: Tensor
    pairs: list[tuple[int, int]] | None
    temperature: float = 0.1
    target_temperature: float = 0.05
    order: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return ops.accumulator(self.scores.dtype)

    @property
    def views_targets(self) -> tuple[list[int], list[int]]:
        pairs = self.pairs or []
        return [v for v, _ in pairs], [a for _, a in pairs]

    def arguments(self) -> list[object]:
        (v, b, k), s, t = self.scores.shape, self.scores.stride(), self.targets.stride()
        sizes = [v, self.targets.shape[0], b, k, s[0], s[1], t[0], t[1], self.bias.stride(0)]
        pairs = -1 if self.pairs is None else len(self.pairs)
        before = self.scores.storage_offset()
        temperatures = [self.temperature, self.target_temperature]
        return [DTYPES[self.targets.dtype], *sizes, before, pairs, *temperatures]

    def inputs(self) -> list[Tensor]:
        indices = [torch.tensor(x, dtype=torch.int64) for x in self.views_targets]
        return [memory(self.scores, 0), memory(self.targets), memory(self.bias), *indices]

    def forward(self, program: Path) -> tuple[Tensor, Tensor, Tensor]:
        order = [self.order, DTYPES[self.scores.dtype]]
        found = Results(program, ["loss", *order, *self.arguments()], *self.inputs())
        (v, b, _), a = self.scores.shape, self.targets.shape[0]
        n = v if self.pairs is None else len(self.pairs)
        losses, z, target_z = (found.take(self.dtype, rows, b) for rows in (n, v, a))
        return losses, z, target_z

    def backward(self, program: Path, upstream: Tensor, z: Tensor, target_z: Tensor) -> Tensor:
        order = [self.order, DTYPES[self.scores.dtype]]
        arguments = ["loss gradient", *order, *self.arguments(), *upstream.stride()]
        found = Results(program, arguments, *self.inputs(), z, target_z, memory(upstream))
        return found.take(self.scores.dtype, *self.scores.shape)

    def reference(self) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (self.scores, self.targets, self.bias)
        return ops.soft_cross_entropy(*inputs, *self.views_targets, self.temperature, self.target_temperature)

    def reference_gradient(self, upstream: Tensor, z: Tensor, target_z: Tensor) -> Tensor:
        inputs = (upstream, self.scores, self.targets, self.bias, z, target_z)
        return ops.soft_cross_entropy_backward(
            *inputs, *self.views_targets, self.temperature, self.target_temperature
        )

    def double(self) -> Problem:
        return replace(
            self, scores=self.scores.double(), targets=self.targets.double(), bias=self.bias.double()
        )


def memory(x: Tensor, offset: int | None = None) -> Tensor:
    """The elements from the first (or from ``offset`` on) to the last that a view spans."""
    if x.numel() == 0:
        return x.flatten()
    start = int(x.storage_offset())
    first = start if offset is None else offset
    last = start + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((last + 1 - first,), (1,), first)


def laid_out(x: Tensor, layout: Layout) -> Tensor:
    outer, rows, k = x.shape
    wide = k + layout.behind
    room = torch.full((layout.before + outer * rows * wide,), torch.nan).to(x.dtype)
    view = room.as_strided((outer, rows, k), (rows * wide, wide, 1), layout.before)
    return view.copy_(x)


def draw(
    v: int,
    a: int,
    b: int,
    k: int,
    dtype: torch.dtype,
    seed: int,
    *,
    pairs: list[tuple[int, int]] | None = None,
    target_dtype: torch.dtype | None = None,
    layout: Layout | None = None,
    order: int = 0,
    spread: float = 1.0,
) -> Problem:
    g, layout = generator(seed), layout or Layout()
    scores, targets = (torch.randn(n, b, k, generator=g).mul(spread).to(dtype) for n in (v, a))
    bias = torch.randn(a, k, generator=g).to(ops.accumulator(dtype))
    targets = laid_out(targets.to(target_dtype or dtype), replace(layout, before=0))
    return Problem(laid_out(scores, layout), targets, bias, pairs, order=order)


def assert_is_the_reference(program: Path, problem: Problem, seed: int = 0, spread: float = 1.0) -> None:
    """Both directions against the reference in fp64."""
    oracle, found = problem.double().reference(), problem.forward(program)
    for got, right in zip(found, oracle, strict=True):
        assert_close(got, right, problem.dtype, scale=10 * spread)
    upstream = torch.randn(2 * oracle[0].shape[0], oracle[0].shape[1], generator=generator(seed))[::2]
    upstream = upstream.to(problem.dtype)
    exact = problem.double().reference_gradient(upstream.double(), *oracle[1:])
    gradient = problem.backward(program, upstream, *found[1:])
    assert gradient.dtype == problem.scores.dtype
    assert_close(gradient, exact, problem.scores.dtype, scale=10 * spread)


sizes = st.sampled_from([1, 2, 3, 7, 31, 33, 64, 97, 131, 260])


@few
@given(
    p=st.integers(1, 3),
    b=st.sampled_from([0, 1, 2, 5, 9]),
    k=sizes,
    dtype=dtypes,
    layout=st.sampled_from([Layout(), Layout(1, 3), Layout(0, 16), Layout(8, 5)]),
    order=orders,
    seed=seeds,
)
def test_row_with_row_is_the_reference_s(
    program: Path, p: int, b: int, k: int, dtype: torch.dtype, layout: Layout, order: int, seed: int
) -> None:
    problem = draw(p, p, b, k, dtype, seed, layout=layout, order=order)
    assert_is_the_reference(program, problem, seed)


@st.composite
def listed(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]]]:
    """Views, targets and pairs, some twice, while some views and targets may be in none."""
    v, a = draw(st.sampled_from([1, 2, 4, 5, 10, 13])), draw(st.integers(1, 4))
    pair = st.tuples(st.integers(0, v - 1), st.integers(0, a - 1))
    return v, a, draw(st.lists(pair, min_size=1, max_size=12))


@few
@given(
    shape=listed(),
    b=st.sampled_from([1, 2, 5]),
    k=st.sampled_from([1, 3, 33, 64, 97]),
    dtype=dtypes,
    target_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from([Layout(), Layout(1, 3), Layout(0, 16)]),
    order=orders,
    seed=seeds,
)
def test_pairs_are_the_reference_s(
    program: Path,
    shape: tuple[int, int, list[tuple[int, int]]],
    b: int,
    k: int,
    dtype: torch.dtype,
    target_dtype: torch.dtype,
    layout: Layout,
    order: int,
    seed: int,
) -> None:
    v, a, pairs = shape
    target_dtype = torch.float64 if dtype == torch.float64 else target_dtype
    problem = draw(
        v, a, b, k, dtype, seed, pairs=pairs, target_dtype=target_dtype, layout=layout, order=order
    )
    assert_is_the_reference(program, problem, seed)


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_longer_than_a_warp_takes(program: Path, dtype: torch.dtype, order: int) -> None:
    assert_is_the_reference(program, draw(8, 2, 3, 1029, dtype, order, pairs=SWAPPED, order=order))


@pytest.mark.parametrize("pairs", [None, [(1, 0)]])
def test_few_long_rows_are_cut_into_slices(program: Path, pairs: list[tuple[int, int]] | None) -> None:
    views = 1 if pairs is None else 2
    assert_is_the_reference(program, draw(views, 1, 2, 8195, torch.float16, 0, pairs=pairs, order=2))


def test_every_view_against_every_target(program: Path) -> None:
    pairs = [(v, a) for v in range(6) for a in range(6) if v != a]
    assert_is_the_reference(program, draw(6, 6, 2, 33, torch.float32, 0, pairs=pairs, order=1))


def test_a_view_with_more_targets_than_one_launch_takes(program: Path) -> None:
    pairs = [(1, a) for a in range(19)] + [(0, 3)]
    assert_is_the_reference(program, draw(3, 19, 2, 33, torch.float32, 0, pairs=pairs, order=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [30, 1029])
@pytest.mark.parametrize("before", [0, 1])
def test_rows_that_are_padded_to_whole_vectors_are_used_as_they_lie(
    program: Path, dtype: torch.dtype, k: int, before: int
) -> None:
    problem = draw(2, 2, 3, k, dtype, 0, layout=Layout(before, -k % 16))
    assert_is_the_reference(program, replace(problem, bias=problem.bias[:1].expand(2, k)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_may_stand_for_all(program: Path, dtype: torch.dtype) -> None:
    problem = draw(2, 2, 4, 40, dtype, 0)
    scores, targets, bias = problem.scores[:1, :1], problem.targets[:1, :1], problem.bias[:1]
    one = Problem(scores.expand(3, 4, 40), targets.expand(3, 4, 40), bias.expand(3, 40), None)
    losses, z, target_z = one.forward(program)
    for found in (losses, z, target_z):
        assert bool((found == found[0, 0]).all())
    assert_is_the_reference(program, one)


def test_results_are_the_same_bits_again_and_in_every_order_of_threads(program: Path) -> None:
    runs = [
        draw(8, 2, 3, 1029, torch.float32, 0, pairs=SWAPPED, order=o).forward(program) for o in (0, 1, 2, 0)
    ]
    for run in runs[1:]:
        for got, right in zip(run, runs[0], strict=True):
            assert torch.equal(got, right)


@pytest.mark.parametrize("where", ["scores", "targets"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", [40, 1029])
def test_a_score_that_is_not_finite_makes_the_losses_of_its_row_nan(
    program: Path, where: str, value: float, k: int
) -> None:
    problem = draw(3, 2, 4, k, torch.float32, 0, pairs=[(1, 0), (2, 0), (0, 1)])
    getattr(problem, where)[1, 2, 17] = value
    found, right = problem.forward(program), problem.reference()
    assert torch.equal(found[0].isnan(), right[0].isnan())
    assert int(found[0].isnan().sum()) == 1
    for got, expected in zip(found, right, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    upstream = torch.ones_like(found[0])
    gradient = problem.backward(program, upstream, *found[1:])
    expected = problem.reference_gradient(upstream, *right[1:])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("where", ["scores", "targets"])
@pytest.mark.parametrize("values", [[-math.inf], [-math.inf] * 20 + [0.0] * 20, [math.inf, math.nan] * 20])
def test_rows_of_many_infinities_are_the_reference_s(program: Path, where: str, values: list[float]) -> None:
    problem = draw(2, 2, 3, 40, torch.float32, 0)
    getattr(problem, where)[1, 2] = torch.tensor(values)
    for got, expected in zip(problem.forward(program), problem.reference(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("pairs", [None, [(0, 1), (1, 0), (1, 1)], [(1, a) for a in (0, 1, 1, 0)] * 3])
def test_no_upstream_gradient_is_no_gradient_whatever_the_row_holds(
    program: Path, pairs: list[tuple[int, int]] | None
) -> None:
    problem = draw(2, 2, 3, 40, torch.bfloat16, 0, pairs=pairs)
    problem.scores[:, 1, 3], problem.targets[:, 1, 5] = torch.nan, torch.inf
    losses, z, target_z = problem.forward(program)
    upstream = torch.ones_like(losses)
    upstream[:, 1] = 0
    gradient = problem.backward(program, upstream, z, target_z)
    assert not bool(gradient.isnan().any())
    assert not bool(gradient[:, 1].any())
    assert bool(gradient[1, 0].any())


def test_upstream_gradients_that_cancel_let_nan_through(program: Path) -> None:
    problem = draw(1, 2, 1, 8, torch.float32, 0, pairs=[(0, 0), (0, 1)])
    problem.scores[0, 0, 3] = torch.nan
    _, z, target_z = problem.forward(program)
    assert bool(problem.backward(program, torch.tensor([[1.0], [-1.0]]), z, target_z).isnan().all())


@pytest.mark.parametrize("k", [5, 40, 1029])
def test_a_bias_of_minus_infinity_takes_a_prototype_out(program: Path, k: int) -> None:
    problem = draw(2, 2, 3, k, torch.float32, 0)
    problem.bias[0, : k // 2] = -math.inf
    assert_is_the_reference(program, problem)
    problem.bias[1] = -math.inf
    losses, _, target_z = problem.forward(program)
    assert bool(losses[1].isnan().all())
    assert bool((target_z[1] == -math.inf).all())


@pytest.mark.parametrize("k", [40, 1029])
def test_scores_of_any_size_are_fine(program: Path, k: int) -> None:
    problem = draw(3, 3, 2, k, torch.float32, 0, spread=300)
    problem = replace(problem, scores=problem.scores + 1e4 * torch.arange(3.0).view(3, 1, 1))
    assert_is_the_reference(program, problem, spread=300)
    huge = replace(problem, scores=problem.scores * 1e30)
    assert bool(huge.forward(program)[0].isfinite().any())


def test_a_sure_and_right_prediction_costs_nothing_at_all(program: Path) -> None:
    scores = torch.full((1, 2, 40), 100.0)
    scores[..., 7] = 1000.0 / 3
    losses, _, _ = Problem(scores, scores, torch.zeros(1, 40), None).forward(program)
    assert bool((losses == 0).all())


matrix_sizes = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 32])


def project(program: Path, m: Tensor, n_iters: int, gradient: Tensor | None = None, order: int = 0) -> Tensor:
    operation = "matrix" if gradient is None else "matrix gradient"
    arguments = [operation, order, DTYPES[m.dtype], *m.shape[:2], n_iters]
    found = Results(program, arguments, m, *([] if gradient is None else [gradient]))
    return found.take(m.dtype, *m.shape)


def assert_projects(program: Path, m: Tensor, n_iters: int, order: int = 0, scale: float = 1.0) -> None:
    exact = ops.sinkhorn_matrix(m.double(), n_iters)
    assert_close(project(program, m, n_iters, order=order), exact, m.dtype, scale)
    upstream = torch.randn(m.shape, generator=generator(1)).to(m.dtype)
    right = ops.sinkhorn_matrix_backward(upstream.double(), m.double(), n_iters)
    found = project(program, m, n_iters, upstream, order)
    assert_close(found, right, m.dtype, 4 * scale)


@few
@given(
    matrices=st.sampled_from([0, 1, 3, 20]),
    n=matrix_sizes,
    n_iters=st.sampled_from([0, 1, 2, 5]),
    dtype=dtypes,
    order=orders,
    seed=seeds,
)
def test_small_matrices_are_the_reference_s(
    program: Path, matrices: int, n: int, n_iters: int, dtype: torch.dtype, order: int, seed: int
) -> None:
    m = (3 * torch.randn(matrices, n, n, generator=generator(seed))).to(dtype)
    assert_projects(program, m, n_iters, order)


@pytest.mark.parametrize("n", [3, 8, 13, 32])
def test_more_matrices_than_the_blocks_take_at_once(program: Path, n: int) -> None:
    matrices = {3: 400, 8: 150, 13: 40, 32: 11}[n]
    assert_projects(program, torch.randn(matrices, n, n, generator=generator(n)), 3, order=2)


@pytest.mark.parametrize("n", [4, 7, 16, 20])
def test_more_steps_than_are_kept_are_redone_on_the_way_back(program: Path, n: int) -> None:
    assert_projects(program, torch.randn(2, n, n, generator=generator(n)), 70, order=1)


@pytest.mark.parametrize("n", [2, 4, 5, 16, 32])
@pytest.mark.parametrize("spread", [60.0, 1e4])
def test_matrices_whose_exponentials_vanish_are_exact(program: Path, n: int, spread: float) -> None:
    m = spread * torch.randn(5, n, n, generator=generator(n))
    m[0] /= spread
    m[1, 0] -= 1000
    assert_projects(program, m, 6, order=2, scale=spread / 10)


@pytest.mark.parametrize("n", [4, 9])
@pytest.mark.parametrize("n_iters", [0, 2])
def test_a_matrix_with_nan_leaves_its_neighbours_alone(program: Path, n: int, n_iters: int) -> None:
    m = torch.randn(3, n, n, generator=generator(0))
    m[1, 2, 1] = torch.nan
    expected = ops.sinkhorn_matrix(m, n_iters)
    torch.testing.assert_close(project(program, m, n_iters), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_rows_sum_to_one(program: Path) -> None:
    rows = project(program, torch.randn(9, 6, 6, generator=generator(0)), 4).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-6)
