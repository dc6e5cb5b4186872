"""The CPU kernels of Sinkhorn assignment against the reference in fp64, on every instruction set."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import generator, odd_sizes, seeds
from torch import Tensor

from clustops import native
from clustops.reference import sinkhorn_ops as reference

pytestmark = pytest.mark.skipif(native.extension is None, reason=native.why_not)
OPS = torch.ops.clustops
double, inf = torch.float64, math.inf
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, double])
# The instruction set is one for all examples.
examples = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Case(NamedTuple):
    """The arguments of an op, tensors first."""

    scores: Tensor
    queue: Tensor | None = None
    prior: Tensor | None = None
    weights: Tensor | None = None
    init: Tensor | None = None
    epsilon: float = 0.05
    n_iters: int = 3
    relax: float | None = None
    mass: float | None = None
    tol: float | None = None

    def exact(self) -> Case:
        values: list[Any] = [t.double() if isinstance(t, Tensor) else t for t in self]
        return Case(*values)

    @property
    def wide(self) -> torch.dtype:
        return reference.accumulator(self.scores.dtype)

    @property
    def rounding(self) -> float:
        """What a few roundings of the largest exponents and potentials change."""
        largest = float(self.scores.double().nan_to_num(0, 0, 0).abs().max()) / self.epsilon
        return (8 + largest) * 4 * torch.finfo(self.wide).eps


def scores_of(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(*shape, generator=generator(seed), dtype=double) * 2 - 1).to(dtype)


def potentials_of(case: Case) -> Tensor:
    result: Tensor = OPS.sinkhorn_potentials(*case, None)
    return result


def plan_of(case: Case, dtype: torch.dtype | None = None, hard: bool = False) -> tuple[Tensor, Tensor]:
    out = torch.full(case.scores.shape, 7.0, dtype=dtype or case.wide)
    return out, OPS.sinkhorn_(out, *case, hard)


def assert_near(result: Tensor, plain: Tensor, oracle: Tensor, rounding: float) -> None:
    """Equal to the oracle up to twice the error of plain PyTorch in the same dtype, and some roundings."""
    assert torch.equal(result.isnan(), oracle.isnan())
    infinite = oracle.isinf()
    assert torch.equal(result[infinite].double(), oracle[infinite])

    def error(t: Tensor) -> float:
        difference = (t.double() - oracle)[~infinite & ~oracle.isnan()].abs()
        return float(difference.nan_to_num(0.0).max()) if difference.numel() else 0.0

    assert error(result) <= 2 * error(plain) + rounding


def check(case: Case, hard: bool = False) -> None:
    exact = reference.sinkhorn_potentials(*case.exact(), None)
    plain = reference.sinkhorn_potentials(*case, None)
    assert_near(potentials_of(case), plain, exact, case.rounding)
    narrow = 0.0 if case.scores.dtype == case.wide else 2 * float(torch.finfo(case.scores.dtype).eps)
    for dtype, rounding in ((case.wide, case.rounding), (case.scores.dtype, case.rounding + narrow)):
        result, potentials = plan_of(case, dtype)
        assert_near(potentials, plain, exact, case.rounding)
        oracle = reference.assign_from_potentials(case.scores.double(), exact, case.epsilon, False, double)
        other = reference.assign_from_potentials(case.scores, plain, case.epsilon, False, dtype)
        assert_near(result, other, oracle, rounding)


def draw_case(seed: int, p: int, b: int, k: int, n: int, dtype: torch.dtype, options: set[str]) -> Case:
    g = generator(seed)
    weights = torch.rand(p, b, generator=g, dtype=double) * (torch.rand(p, b, generator=g) < 0.6) * 3
    weights[:, 0] = 1.0
    prior = torch.rand(p, k, generator=g, dtype=double) * (torch.rand(p, k, generator=g) < 0.7)
    prior[:, k // 2] = 1.0
    wide = reference.accumulator(dtype)
    given: dict[str, dict[str, Any]] = {
        "queue": {"queue": scores_of(seed + 1, 1, n, k, dtype=dtype).expand(p, -1, -1)},
        "weights": {"weights": weights.to(wide)},
        "prior": {"prior": prior.to(wide)},
        "init": {"init": (torch.randn(p, k + ("mass" in options), generator=g, dtype=double) * 3).to(wide)},
        "relax": {"relax": 0.3},
        "mass": {"mass": 0.6},
        "long": {"n_iters": 7},
        "one": {"n_iters": 1},
        "warm": {"epsilon": 0.5},
    }
    chosen: dict[str, Any] = {}
    for option in sorted(options):
        chosen |= given[option]
    return Case(scores_of(seed, p, b, k, dtype=dtype), **chosen)


options = st.sets(
    st.sampled_from(["queue", "weights", "prior", "init", "relax", "mass", "long", "one", "warm"])
)


@examples
@given(st.integers(1, 3), odd_sizes, odd_sizes, st.integers(0, 9), dtypes, options, seeds)
def test_potentials_and_plan_are_those_of_the_reference(
    instruction_set: str, p: int, b: int, k: int, n: int, dtype: torch.dtype, options: set[str], seed: int
) -> None:
    check(draw_case(seed, p, b, k, n, dtype, options))


@pytest.mark.parametrize("options", [set(), {"weights", "prior"}, {"queue", "mass"}, {"init", "relax"}])
@pytest.mark.parametrize("b", [70, 515, 2100])
def test_stripes_and_long_rows_lose_nothing(instruction_set: str, b: int, options: set[str]) -> None:
    for k in (1, 300, 1003) if b < 2000 else (5, 257):
        check(draw_case(b + k, 1, b, k, 9, torch.float32, options))


@pytest.mark.parametrize("options", [set(), {"weights", "mass"}])
def test_very_many_prototypes(options: set[str]) -> None:
    check(draw_case(0, 1, 11, 70_001, 3, torch.float32, options))


@examples
@given(st.integers(1, 3), odd_sizes, odd_sizes, dtypes, options, st.booleans(), seeds)
def test_column_masses_are_those_of_the_reference(
    instruction_set: str,
    p: int,
    b: int,
    k: int,
    dtype: torch.dtype,
    options: set[str],
    normalized: bool,
    seed: int,
) -> None:
    case = draw_case(seed, p, b, k, 3, dtype, options)
    a = torch.randn(p, k + ("mass" in options), generator=generator(seed), dtype=double).to(case.wide)
    a[:, 1:2] = -inf if k > 1 else 0
    given = (case.scores, case.queue, case.weights, a)
    exact = case.exact()
    oracle = reference.column_log_mass(*exact[:2], exact.weights, a.double(), case.epsilon, normalized)
    plain = reference.column_log_mass(*given, case.epsilon, normalized)
    result = OPS.sinkhorn_column_mass(*given, case.epsilon, normalized)
    assert_near(result, plain, oracle, case.rounding)


@pytest.mark.parametrize("counted", [0, 1])
def test_without_a_counted_row_nothing_changes(counted: int) -> None:
    scores, init = scores_of(0, 1, 4, 5), scores_of(1, 1, 5)
    weights = torch.full((1, 4), float(counted))
    result = potentials_of(Case(scores, weights=weights, init=init))
    assert torch.equal(result, init) == (counted == 0)
    assert torch.equal(potentials_of(Case(scores[:, :0], init=init)), init)
    assert torch.equal(potentials_of(Case(scores, init=init, n_iters=0)), init)
    for rows, w in ((scores, weights), (scores[:, :0], None)):
        mass = OPS.sinkhorn_column_mass(rows, None, w, init, 0.05, True)
        assert bool((mass == -inf).all()) == (counted == 0 or w is None)


@examples
@given(odd_sizes, odd_sizes, dtypes, st.sampled_from([300.0, 3e3, 1e4]), options, seeds)
def test_exponents_far_beyond_the_range_of_powers(
    instruction_set: str, b: int, k: int, dtype: torch.dtype, ratio: float, options: set[str], seed: int
) -> None:
    case = draw_case(seed, 1, b, k, 3, dtype, options - {"warm"})
    check(case._replace(epsilon=1 / ratio))


@pytest.mark.parametrize("n_iters", [1, 4])
@pytest.mark.parametrize("place", ["rows", "columns", "last row"])
def test_scores_that_grow_past_the_first_rows(instruction_set: str, place: str, n_iters: int) -> None:
    scores = scores_of(0, 1, 300, 40)
    if place == "rows":
        scores[:, 8:] += 30
    elif place == "columns":
        scores += torch.linspace(-60, 60, 40)
    else:
        scores[:, -1] += 100
    check(Case(scores, n_iters=n_iters))
    check(Case(scores.double(), n_iters=n_iters))


@pytest.mark.parametrize("virtual", [False, True])
def test_a_start_far_away(instruction_set: str, virtual: bool) -> None:
    init = torch.tensor([[1e4, -1e4, 0, 500, -3000, 20, 7.0]])
    for n_iters in (1, 2, 9):
        scores = scores_of(0, 1, 40, 7 - virtual)
        check(Case(scores, init=init, n_iters=n_iters, mass=0.5 if virtual else None))


def test_columns_that_hardly_any_row_wants(instruction_set: str) -> None:
    scores = scores_of(0, 1, 200, 20)
    scores[..., 3] -= 9
    for relax in (0.0, 0.01, 0.2):
        check(Case(scores, relax=relax, n_iters=5))


def test_a_virtual_column_that_hardly_any_row_wants(instruction_set: str) -> None:
    scores, init = scores_of(0, 1, 200, 20) + 1, torch.zeros(1, 21)
    for epsilon in (0.05, 1e-3):
        check(Case(scores, init=init, epsilon=epsilon, mass=0.5))
        check(Case(scores, epsilon=epsilon, mass=1.0 - 1e-7, n_iters=2))


def test_weights_of_any_scale(instruction_set: str) -> None:
    weights = torch.rand(1, 100, generator=generator(0)) + 0.1
    for scale in (1e-30, 1e-6, 1e30):
        for queue in (None, scores_of(2, 1, 9, 17)):
            for mass in (None, 0.6):
                check(Case(scores_of(1, 1, 100, 17), queue=queue, weights=weights * scale, mass=mass))


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("options", [set(), {"weights"}, {"mass", "relax"}, {"prior"}])
def test_tol_stops_at_the_same_update(instruction_set: str, options: set[str], tol: float) -> None:
    case = draw_case(3, 3, 60, 9, 0, double, options)._replace(n_iters=200, tol=tol)
    torch.testing.assert_close(
        potentials_of(case), reference.sinkhorn_potentials(*case, None), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        plan_of(case)[1], reference.sinkhorn_potentials(*case, None), rtol=1e-12, atol=1e-12
    )


@examples
@given(st.integers(1, 3), odd_sizes, odd_sizes, dtypes, st.booleans(), seeds)
def test_assignments_are_those_of_the_reference(
    instruction_set: str, p: int, b: int, k: int, dtype: torch.dtype, virtual: bool, seed: int
) -> None:
    case = Case(scores_of(seed, p, b, k, dtype=dtype))
    a = scores_of(seed + 1, p, k + virtual, dtype=case.wide) * 20
    a[:, k // 2] = -inf if k > 1 else 0.0
    oracle = reference.assign_from_potentials(case.scores.double(), a.double(), 0.05, False, double)
    for out_dtype in {case.wide, dtype}:
        plain = reference.assign_from_potentials(case.scores, a, 0.05, False, out_dtype)
        out = torch.full_like(plain, 7.0)
        OPS.assign_from_potentials_(out, case.scores, a, 0.05, False)
        assert_near(out, plain, oracle, case.rounding + 2 * float(torch.finfo(out_dtype).eps))
        # Of few values, so that there are ties between unequal columns.
        for s, potentials, epsilon in ((case.scores, a, 0.05), ((case.scores * 4).round(), a.round(), 0.5)):
            OPS.assign_from_potentials_(out, s, potentials, epsilon, True)
            expected = reference.assign_from_potentials(s, potentials, epsilon, True, out_dtype)
            assert torch.equal(out, expected)


def test_ties_of_hard_assignments_go_to_the_lowest_index(instruction_set: str) -> None:
    for k in (1, 3, 16, 17, 40):
        scores = torch.zeros(1, 5, k)
        scores[0, 1, k // 2 :] = 1
        scores[0, 2, -1] = 1
        out = torch.empty_like(scores)
        OPS.assign_from_potentials_(out, scores, torch.zeros(1, k), 0.05, True)
        assert out.sum() == 5
        assert out[0].argmax(-1).tolist() == [0, k // 2, k - 1, 0, 0]
        OPS.assign_from_potentials_(out, scores, torch.zeros(1, k + 1), 0.05, True)
        assert out.sum() == 5  # the virtual column comes last
        OPS.assign_from_potentials_(out, scores, torch.tensor([[*[0.0] * k, 1.0]]), 0.05, True)
        assert out[0].sum(-1).tolist() == [0, 1, 1, 0, 0]


@pytest.mark.parametrize("bad", [math.nan, inf, -inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, double])
def test_a_score_that_is_not_finite_is_never_missed(
    instruction_set: str, dtype: torch.dtype, bad: float
) -> None:
    for b, k, row, column in ((1, 1, 0, 0), (5, 17, 4, 16), (70, 33, 64, 0), (9, 20, 8, 19), (9, 20, 0, 3)):
        scores = scores_of(0, 2, b, k, dtype=dtype)
        prior = torch.ones(2, k).to(reference.accumulator(dtype))
        prior[:, column] = 0 if k > 1 else 1
        clean = potentials_of(Case(scores, prior=prior))
        scores[1, row, column] = bad
        for case in (
            Case(scores),
            Case(scores, prior=prior),
            Case(scores, init=prior),
            Case(scores, mass=0.5),
        ):
            for potentials in (potentials_of(case), plan_of(case)[1]):
                assert potentials[1].isnan().all()
                assert potentials[0].isfinite().sum() >= k - 1
        assert plan_of(Case(scores))[0][1].isnan().all()
        assert OPS.sinkhorn_column_mass(scores, None, None, prior, 0.05, True)[1].isnan().all()
        queued = Case(scores_of(1, 2, b, k, dtype=dtype), queue=scores, prior=prior)
        assert potentials_of(queued)[1].isnan().all()
        for hard in (False, True):
            out = torch.full(scores.shape, 7.0, dtype=dtype)
            OPS.assign_from_potentials_(out, scores, clean, 0.05, hard)
            wrong = torch.zeros(2, b, k, dtype=torch.bool)
            wrong[1, row] = True
            assert torch.equal(out.isnan(), wrong)


@pytest.mark.parametrize("bad", [math.nan, inf, -inf, 3e38, -3e38])
def test_a_row_of_weight_zero_may_hold_anything(instruction_set: str, bad: float) -> None:
    for b, k in ((9, 5), (70, 40)):
        scores = scores_of(0, 1, b, k)
        masked = torch.arange(b) % 3 == 1
        weights = (~masked).float()[None]
        expected = potentials_of(Case(scores[:, ~masked]))
        scores[:, masked, ::2] = bad
        result, potentials = plan_of(Case(scores, weights=weights))
        torch.testing.assert_close(potentials, expected, rtol=1e-6, atol=4e-6)
        assert result[:, ~masked].isfinite().all()
        if not math.isfinite(bad):
            assert result[:, masked].isnan().all()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "shifted", "rows apart"])
def test_any_layout_gives_the_same_bits(instruction_set: str, layout: str) -> None:
    base = scores_of(0, 3, 40, 70)
    scores = {
        "transposed": base.transpose(1, 2),
        "sliced": base[:, ::2, 1:60],
        "expanded": base[:1].expand(3, 40, 70),
        "shifted": base.flatten()[1 : 1 + 2 * 40 * 70].view(2, 40, 70),
        "rows apart": base[::2, 5:, :33],
    }[layout]
    p, b, k = scores.shape
    prior, weights = torch.rand(1, k).expand(p, k), torch.rand(b, p).T
    plain = Case(scores.contiguous(), scores.contiguous(), prior.contiguous(), weights.contiguous())
    queue = scores[:1].expand(p, b, k) if layout == "expanded" else scores
    apart = Case(scores, queue, prior, weights)
    for one, other in zip(plan_of(plain), plan_of(apart), strict=True):
        assert torch.equal(one, other)
    a = OPS.sinkhorn_column_mass(scores, queue, weights, prior, 0.05, True)
    assert torch.equal(a, OPS.sinkhorn_column_mass(*plain[:2], plain.weights, plain.prior, 0.05, True))
    assert torch.equal(potentials_of(Case(scores)), potentials_of(Case(scores.contiguous())))


def test_an_output_with_gaps_is_written(instruction_set: str) -> None:
    scores, room = scores_of(0, 2, 9, 20), torch.full((2, 9, 40), 7.0)
    case = Case(scores)
    expected, a = plan_of(case)
    OPS.sinkhorn_(room[..., ::2], *case, False)
    assert torch.equal(room[..., ::2], expected)
    OPS.assign_from_potentials_(room[..., 1::2], scores, a, 0.05, False)
    torch.testing.assert_close(room[..., 1::2], expected)


SHAPES = [(1, 700, 97), (1, 130, 5000), (1, 3, 9000), (5, 200, 40), (9, 33, 17), (1, 1, 1)]


@pytest.mark.parametrize("options", [set(), {"weights", "queue"}, {"mass", "init"}])
@pytest.mark.parametrize(("p", "b", "k"), SHAPES)
def test_same_bits_in_every_run_and_for_every_thread_count(p: int, b: int, k: int, options: set[str]) -> None:
    threads = torch.get_num_threads()
    far = draw_case(1, p, b, k, 70, torch.float32, options)._replace(epsilon=1e-3, relax=0.1)
    for case in (draw_case(0, p, b, k, 70, torch.float32, options), far):
        results = []
        try:
            for n in (1, 2, 3, 8, 1):
                torch.set_num_threads(n)
                mass = OPS.sinkhorn_column_mass(
                    case.scores, case.queue, case.weights, potentials_of(case), case.epsilon, True
                )
                results.append((*plan_of(case), potentials_of(case), plan_of(case, hard=True)[0], mass))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            for one, two in zip(results[0], other, strict=True):
                assert torch.equal(one, two)
                assert not one.isnan().any()


def test_inputs_are_never_written(instruction_set: str) -> None:
    case = draw_case(0, 2, 70, 33, 5, torch.float32, {"queue", "weights", "prior", "init"})
    before = [t.clone() for t in case if isinstance(t, Tensor)]
    plan_of(case)
    plan_of(case._replace(n_iters=0))
    for now, then in zip((t for t in case if isinstance(t, Tensor)), before, strict=True):
        assert torch.equal(now, then)


def test_a_mistake_behind_the_checks_is_an_exception() -> None:
    scores, a = scores_of(0, 2, 5, 4), torch.zeros(2, 4)
    for wrong in (
        Case(scores, queue=scores[:, :, :3]),
        Case(scores, prior=a[:, :3]),
        Case(scores, weights=a),
        Case(scores, init=a[:1]),
        Case(scores, init=a, mass=0.5),
        Case(scores[0]),
        Case(scores.int()),
    ):
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            potentials_of(wrong)
    for out in (torch.empty(2, 5, 3), torch.empty(2, 5, 4, dtype=double)):
        with pytest.raises(ValueError, match="assignments must"):
            OPS.assign_from_potentials_(out, scores, a, 0.05, False)
    with pytest.raises(ValueError, match="potentials must have shape"):
        OPS.assign_from_potentials_(torch.empty(2, 5, 4), scores, a[:, :2], 0.05, False)
