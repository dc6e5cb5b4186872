"""The compiled soft cross-entropy against its reference, on every instruction set that this CPU runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_close, generator, needs_peak_of, odd_sizes, peak_of, seeds, small_sizes
from torch import Tensor

from clustops import native
from clustops import sinkhorn_loss as _registered  # noqa: F401
from clustops.reference import sinkhorn_ops as reference

pytestmark = pytest.mark.skipif(native.extension is None, reason=f"no extension: {native.why_not}")
ops = torch.ops.clustops

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(FLOATING)
TEMPERATURES = (0.1, 0.05)
LAYOUTS = ["transposed", "sliced", "expanded", "shifted", "padded rows"]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Problem(NamedTuple):
    scores: Tensor
    target_scores: Tensor
    bias: Tensor
    views: list[int]
    targets: list[int]

    @property
    def pairs(self) -> int:
        return len(self.views) or self.scores.shape[0]

    def each(self, change: Callable[[Tensor], Tensor]) -> Problem:
        scores, target_scores, bias = (change(t) for t in self[:3])
        return Problem(scores, target_scores, bias, self.views, self.targets)

    def double(self) -> Problem:
        return self.each(Tensor.double)

    def upstream(self, seed: int) -> Tensor:
        """Random gradients of the losses, every third about 0."""
        g = generator(seed)
        shape = self.pairs, self.scores.shape[1]
        values = torch.randn(shape, generator=g, dtype=torch.float64) * (torch.rand(shape, generator=g) < 0.7)
        return values.to(reference.accumulator(self.scores.dtype))


def problem_of(
    seed: int,
    v: int,
    a: int,
    b: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    pairs: int = 3,
    scale: float = 1.0,
) -> Problem:
    """Random scores; ``pairs`` of 0 compares row by row."""
    g = generator(seed)
    a = a if pairs else v
    x, y = ((torch.randn(n, b, k, generator=g, dtype=torch.float64) / 2 * scale) for n in (v, a))
    bias = torch.randn(a, k, generator=g, dtype=torch.float64)
    absent = torch.rand(a, k, generator=g) < 0.1
    absent[:, seed % k] = False
    bias = bias.masked_fill(absent, -torch.inf)
    views, targets = (torch.randint(0, n, (pairs,), generator=g).tolist() for n in (v, a))
    return Problem(
        x.to(dtype), y.to(target_dtype or dtype), bias.to(reference.accumulator(dtype)), views, targets
    )


def forward(problem: Problem, by: Any = ops) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = by.soft_cross_entropy(*problem, *TEMPERATURES)
    return result


def backward(
    problem: Problem, upstream: Tensor, by: Any = ops, normalizers: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    given = forward(problem, by)[1:] if normalizers is None else normalizers
    result: Tensor = by.soft_cross_entropy_backward(
        upstream, *problem[:3], *given, *problem[3:], *TEMPERATURES
    )
    return result


def assert_bits(one: Tensor, other: Tensor) -> None:
    assert one.dtype == other.dtype
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def check_against_fp64(problem: Problem, seed: int) -> None:
    dtype = reference.accumulator(problem.scores.dtype)
    exact = problem.double()
    for found, oracle in zip(forward(problem), forward(exact, reference), strict=True):
        assert found.dtype == dtype
        assert_close(found, oracle, dtype)
    upstream = problem.upstream(seed)
    found, oracle = backward(problem, upstream), backward(exact, upstream.double(), reference)
    assert found.dtype == problem.scores.dtype
    assert_close(found, oracle, found.dtype, scale=10)  # it is divided by the temperature


@given(
    seed=seeds,
    v=st.integers(1, 4),
    a=st.integers(1, 3),
    b=small_sizes,
    k=odd_sizes,
    dtype=dtypes,
    target_dtype=dtypes,
    pairs=st.integers(0, 7),
)
@pytest.mark.usefixtures("instruction_set")
def test_losses_and_gradients_are_those_of_the_reference(
    seed: int, v: int, a: int, b: int, k: int, dtype: torch.dtype, target_dtype: torch.dtype, pairs: int
) -> None:
    check_against_fp64(problem_of(seed, v, a, b, k, dtype, target_dtype, pairs), seed)


@pytest.mark.parametrize("k", [4095, 4097, 65_537])
@pytest.mark.usefixtures("instruction_set")
def test_many_prototypes(k: int) -> None:
    check_against_fp64(problem_of(0, 2, 2, 3, k), 0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 500.0])
@pytest.mark.parametrize("k", [7, 300, 3000])
def test_errors_are_at_most_twice_those_of_pytorch(instruction_set: str, k: int, scale: float) -> None:
    factor = 3 if instruction_set == "sse2" else 2  # it has no fused products
    problem = problem_of(0, 3, 2, 100, k, pairs=5, scale=scale)
    upstream = problem.upstream(1)
    exact = problem.double()
    oracle = forward(exact, reference)
    gradient = backward(exact, upstream.double(), reference)
    for ours, theirs, right in (
        *zip(forward(problem), forward(problem, reference), oracle, strict=True),
        (backward(problem, upstream), backward(problem, upstream, reference), gradient),
    ):
        error, allowed = ((x.double() - right).norm() / right.norm() for x in (ours, theirs))
        assert error <= factor * allowed + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("instruction_set")
def test_scores_of_ten_thousand_temperatures_stay_finite(dtype: torch.dtype) -> None:
    g = generator(0)
    scores = torch.rand(2, 50, 40, generator=g).to(dtype) * 2000 - 1000
    scores[:, 1] += 1e4
    scores[:, 2] -= 1e4
    problem = Problem(scores, scores.flip(0).contiguous(), torch.zeros(2, 40, dtype=dtype), [0, 1], [0, 1])
    for found, oracle in zip(forward(problem), forward(problem.double(), reference), strict=True):
        assert_close(found, oracle, dtype)
    ones = torch.ones(2, 50, dtype=dtype)
    assert_close(
        backward(problem, ones), backward(problem.double(), ones.double(), reference), dtype, scale=1000
    )


@pytest.mark.usefixtures("instruction_set")
def test_a_sure_and_right_prediction_costs_nothing() -> None:
    scores = torch.full((1, 1, 50), -1000.0)
    scores[..., 17] = 1000
    problem = Problem(scores, scores, torch.zeros(1, 50), [], [])
    assert float(forward(problem)[0]) == 0
    assert not backward(problem, torch.ones(1, 1)).any()


@given(seed=seeds, b=small_sizes, k=odd_sizes, value=st.sampled_from([torch.nan, torch.inf, -torch.inf]))
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.usefixtures("instruction_set")
def test_a_loss_is_nan_where_a_score_of_its_row_is_not_finite(
    dtype: torch.dtype, seed: int, b: int, k: int, value: float
) -> None:
    clean = problem_of(seed, 3, 2, b, k, dtype, pairs=6)
    flawed = clean._replace(scores=clean.scores.clone(), target_scores=clean.target_scores.clone())
    # At a prototype that is no target too.
    flawed.scores[1, seed % b, -1 - seed % k] = value
    flawed.target_scores[0, 0, -1 - seed % k] = value
    nan = torch.zeros(6, b, dtype=torch.bool)
    for n, (v, a) in enumerate(zip(*clean[3:], strict=True)):
        nan[n, seed % b] |= v == 1
        nan[n, 0] |= a == 0
    found, expected = forward(flawed)[0], forward(clean)[0]
    assert torch.equal(found.isnan(), nan)
    assert_close(found[~nan], expected[~nan], found.dtype)


@given(seed=seeds, b=small_sizes, k=odd_sizes, dtype=dtypes, pairs=st.sampled_from([0, 1, 2, 6]))
@pytest.mark.usefixtures("instruction_set")
def test_an_upstream_gradient_of_zero_takes_a_row_out_whatever_it_holds(
    seed: int, b: int, k: int, dtype: torch.dtype, pairs: int
) -> None:
    clean = problem_of(seed, 3, 3, b, k, dtype, pairs=pairs)
    out = torch.arange(b) % 3 == seed % 3
    upstream = clean.upstream(seed).masked_fill(out, 0)
    flawed = clean._replace(scores=clean.scores.clone(), target_scores=clean.target_scores.clone())
    flawed.scores[:, out] = torch.nan
    flawed.target_scores[:, out] = torch.inf
    gradient = backward(flawed, upstream)
    assert (gradient[:, out] == 0).all()
    assert_bits(gradient, backward(clean, upstream))


@pytest.mark.usefixtures("instruction_set")
def test_a_pair_of_gradient_zero_does_not_bring_its_target_in() -> None:
    problem = problem_of(0, 1, 2, 4, 9, pairs=1)._replace(views=[0, 0], targets=[0, 1])
    problem.target_scores[1] = torch.nan
    upstream = torch.tensor([[1.0], [0.0]]).expand(2, 4)
    alone = problem._replace(views=[0], targets=[0])
    normalizers = forward(alone)[1:]
    assert_bits(
        backward(problem, upstream, ops, normalizers), backward(alone, upstream[:1], ops, normalizers)
    )


@pytest.mark.usefixtures("instruction_set")
def test_a_view_without_a_pair_has_a_normaliser_and_no_gradient() -> None:
    problem = problem_of(0, 3, 2, 5, 33)._replace(views=[0, 2], targets=[1, 1])
    for found, oracle in zip(forward(problem), forward(problem.double(), reference), strict=True):
        assert_close(found, oracle, torch.float32)
    gradient = backward(problem, torch.ones(2, 5))
    assert not gradient[1].any()
    assert gradient[[0, 2]].any()


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The numbers of ``x [n, b, k]``, otherwise in memory (all views the first one where ``expanded``)."""
    n, b, k = x.shape
    return {
        "transposed": lambda: x.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": lambda: torch.stack([x, x], dim=-1).flatten(2)[..., ::2],
        "expanded": lambda: x[:1].expand(n, b, k),
        "shifted": lambda: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
        "padded rows": lambda: torch.cat([x, x.new_full((n, b, 3), torch.nan)], dim=-1)[..., :k],
    }[layout]()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.usefixtures("instruction_set")
def test_any_layout_gives_the_same_bits_and_is_not_written(layout: str, dtype: torch.dtype) -> None:
    dense = problem_of(0, 3, 2, 5, 37, dtype, pairs=4)
    other = dense._replace(
        scores=laid_out(dense.scores, layout),
        target_scores=laid_out(dense.target_scores, layout),
        bias=dense.bias.T.contiguous().T,
    )
    plain = other.each(Tensor.contiguous)
    before = plain.scores.clone(), plain.target_scores.clone()
    upstream = dense.upstream(0)
    for found, expected in zip(forward(other), forward(plain), strict=True):
        assert_bits(found, expected)
    assert_bits(backward(other, upstream), backward(plain, upstream))
    assert_bits(other.scores.contiguous(), before[0])
    assert_bits(other.target_scores.contiguous(), before[1])


@pytest.mark.parametrize("kind", ["a number", "of pairs", "of rows", "transposed", "another dtype"])
@pytest.mark.usefixtures("instruction_set")
def test_upstream_gradients_may_have_any_stride(kind: str) -> None:
    problem = problem_of(0, 3, 2, 5, 37, pairs=4)
    values = torch.randn(4, 5, generator=generator(1)).half().float()
    upstream = {
        "a number": values[0, 0].expand(4, 5),
        "of pairs": values[:, :1].expand(4, 5),
        "of rows": values[:1].expand(4, 5),
        "transposed": values.T.contiguous().T,
        "another dtype": values.half(),
    }[kind]
    assert_bits(backward(problem, upstream), backward(problem, upstream.float().contiguous()))


@pytest.mark.parametrize(("b", "k", "pairs"), [(67, 130, 5), (600, 131, 0), (3, 5000, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("threads", "instruction_set")
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, b: int, k: int, pairs: int) -> None:
    problem = problem_of(0, 3, 2, b, k, dtype, pairs=pairs)
    found = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        found.append((*forward(problem), backward(problem, problem.upstream(0))))
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert_bits(one, same)


@given(seed=seeds, b=st.integers(2, 40))
@pytest.mark.usefixtures("instruction_set")
def test_a_row_does_not_depend_on_the_others(seed: int, b: int) -> None:
    problem = problem_of(seed, 3, 2, b, 33)
    last = problem._replace(scores=problem.scores[:, -1:], target_scores=problem.target_scores[:, -1:])
    upstream = problem.upstream(seed)
    assert_bits(forward(problem)[0][:, -1:], forward(last)[0])
    assert_bits(backward(problem, upstream)[:, -1:], backward(last, upstream[:, -1:]))


@pytest.mark.parametrize("pairs", [0, 1, 2, 5])
@pytest.mark.usefixtures("instruction_set")
def test_gradient_is_exact(pairs: int) -> None:
    problem = problem_of(0, 3, 2, 4, 11, torch.float64, pairs=pairs)

    def losses(scores: Tensor) -> Tensor:
        return forward(problem._replace(scores=scores))[0]

    assert torch.autograd.gradcheck(losses, problem.scores.requires_grad_())


@pytest.mark.parametrize(("v", "b"), [(0, 3), (2, 0)])
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.usefixtures("instruction_set")
def test_empty_sizes(v: int, b: int, dtype: torch.dtype) -> None:
    shape = (v, b, 5)
    problem = Problem(
        torch.zeros(shape, dtype=dtype),
        torch.zeros(shape, dtype=dtype),
        torch.zeros(v, 5, dtype=reference.accumulator(dtype)),
        [],
        [],
    )
    assert [t.shape for t in forward(problem)] == [(v, b)] * 3
    assert backward(problem, problem.upstream(0)).shape == shape


def test_rows_more_than_2_to_the_31_elements_apart() -> None:
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # never touched, so never there
    near = problem_of(0, 3, 3, 3, 8, torch.bfloat16, pairs=0)
    scores = memory.as_strided((3, 3, 8), (8, 2**30, 1))
    scores.copy_(near.scores)
    far = near._replace(scores=scores, target_scores=scores)
    near = near._replace(target_scores=near.scores)
    assert_bits(forward(far)[0], forward(near)[0])
    assert_bits(backward(far, near.upstream(0)), backward(near, near.upstream(0)))


@needs_peak_of
def test_nothing_of_the_size_of_the_scores_is_allocated_but_the_gradient() -> None:
    problem = problem_of(0, 8, 2, 512, 1500, pairs=14)
    size = problem.scores.numel() * 4 // 1024
    forward(problem)
    grown, (_, p, q) = peak_of(lambda: forward(problem))
    assert grown < size // 12
    grown, gradient = peak_of(lambda: backward(problem, torch.ones(14, 512), ops, (p, q)))
    assert size * 0.9 < grown < size * 1.2
    assert gradient.shape == problem.scores.shape


def test_a_mistake_behind_the_checks_is_an_exception() -> None:
    view, kernel = native.view, native.extension.soft_cross_entropy
    x, bias = torch.zeros(2, 3, 5), torch.zeros(2, 5)
    rows = torch.zeros(2, 3)
    good: dict[str, Any] = {
        "scores": x,
        "targets": x,
        "bias": bias,
        "views": [0, 1],
        "targets of pairs": [1, 0],
        "temperature": 0.1,
        "target_temperature": 0.05,
        "losses": rows,
        "score_normalizers": rows.clone(),
        "target_normalizers": rows.clone(),
    }
    bad: dict[str, Any] = {
        "scores": x[0],
        "targets": x[:, :2],
        "bias": bias.double(),
        "views": [0, 2],
        "targets of pairs": [1, -1],
        "losses": rows[:1],
        "score_normalizers": rows.int(),
        "target_normalizers": rows[:, :2],
    }

    def call(arguments: dict[str, Any]) -> None:
        kernel(*(view(t) if isinstance(t, Tensor) else t for t in arguments.values()), 1)

    call(good)
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            call({**good, name: value})
    with pytest.raises(ValueError, match="float64 just where"):
        call({**good, "targets": x.double()})
    with pytest.raises(ValueError, match="a view and a target each"):
        call({**good, "views": [0]})
