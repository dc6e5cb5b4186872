"""Sinkhorn assignment: the laws of the plan, the published algorithms as judges."""

from __future__ import annotations

import doctest
import itertools
import math
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_close, generator, odd_sizes, seeds, small_sizes
from torch import Tensor

from clustops import reference, sinkhorn_solve
from clustops.checks import ClustopsWarning
from clustops.sinkhorn import assign_from_potentials, sinkhorn, sinkhorn_potentials
from clustops.sinkhorn_matrix import sinkhorn_matrix

pytestmark = [
    pytest.mark.usefixtures("path"),
    pytest.mark.filterwarnings("ignore::clustops.checks.ClustopsWarning"),
]

double = torch.float64


def cosine_scores(seed: int, *shape: int, dtype: torch.dtype = double) -> Tensor:
    return (torch.rand(*shape, generator=generator(seed), dtype=double) * 2 - 1).to(dtype)


def published_loop(scores: Tensor, epsilon: float, n_iters: int) -> Tensor:
    """The algorithm as its authors print it: exponentiate, then divide rows and columns in place."""
    plan = torch.exp(scores / epsilon).t().contiguous()
    k, b = plan.shape
    plan /= plan.sum()
    for _ in range(n_iters):
        plan /= plan.sum(dim=1, keepdim=True)
        plan /= k
        plan /= plan.sum(dim=0, keepdim=True)
        plan /= b
    return (plan * b).t()


def partial_unbalanced_scaling(
    scores: Tensor, prior: Tensor, epsilon: float, gamma: float, rho: float, n_iters: int
) -> Tensor:
    """Scaling algorithm for KL-relaxed prototypes and a hard virtual column (P2OT), with vectors u and v."""
    b, _ = scores.shape
    kernel = torch.exp(torch.cat([scores, torch.zeros(b, 1, dtype=scores.dtype)], dim=1) / epsilon)
    columns = torch.cat([rho * prior, torch.tensor([1 - rho], dtype=scores.dtype)])
    power = torch.full_like(columns, gamma / (gamma + epsilon))
    power[-1] = 1
    v = torch.ones_like(columns)
    for _ in range(n_iters):
        u = (1 / b) / (kernel @ v)
        v = (columns / (kernel.t() @ u)) ** power
    u = (1 / b) / (kernel @ v)
    return (b * u[:, None] * kernel * v[None, :])[:, :-1]


def column_error(assignments: Tensor) -> float:
    return float((assignments.mean(0) - 1 / assignments.shape[1]).abs().sum())


@given(odd_sizes, odd_sizes, st.integers(1, 6), st.sampled_from([0.05, 0.1, 1.0]), seeds)
def test_equals_the_published_loop(b: int, k: int, n_iters: int, epsilon: float, seed: int) -> None:
    scores = cosine_scores(seed, b, k)
    expected = published_loop(scores, epsilon, n_iters)
    torch.testing.assert_close(
        sinkhorn(scores, epsilon=epsilon, n_iters=n_iters), expected, rtol=1e-12, atol=1e-14
    )
    single = scores.float()
    expected = published_loop(single.double(), epsilon, n_iters)
    result = sinkhorn(single, epsilon=epsilon, n_iters=n_iters)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


@given(small_sizes, small_sizes, st.floats(0.3, 10), st.floats(0.1, 0.95), st.integers(1, 40), seeds)
def test_relax_and_mass_reproduce_partial_unbalanced_transport(
    b: int, k: int, gamma: float, rho: float, n_iters: int, seed: int
) -> None:
    scores = cosine_scores(seed, b, k)
    prior = torch.rand(k, generator=generator(seed), dtype=double) + 0.1
    prior /= prior.sum()
    expected = partial_unbalanced_scaling(scores, prior, 0.1, gamma, rho, n_iters)
    # That algorithm starts with the rows, as zero potentials do.
    start = torch.zeros(k + 1, dtype=double)
    result = sinkhorn(scores, epsilon=0.1, n_iters=n_iters, prior=prior, relax=gamma, mass=rho, init=start)
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-14)


def test_relax_and_mass_converge_to_partial_unbalanced_transport_from_a_cold_start() -> None:
    scores = cosine_scores(0, 40, 7)
    prior = torch.arange(1.0, 8.0, dtype=double) / 28
    expected = partial_unbalanced_scaling(scores, prior, 0.1, 1.0, 0.3, 3000)
    result = sinkhorn(scores, epsilon=0.1, n_iters=3000, prior=prior, relax=1.0, mass=0.3)
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=2e-15)


def transport_problem(seed: int, b: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, row weights of sum 1, and a prior of sum 1."""
    g = generator(seed)
    weights, prior = (torch.rand(n, generator=g, dtype=double) + 0.1 for n in (b, k))
    return cosine_scores(seed, b, k), weights / weights.sum(), prior / prior.sum()


@given(small_sizes, small_sizes, seeds)
def test_converges_to_entropic_optimal_transport(b: int, k: int, seed: int) -> None:
    ot = pytest.importorskip("ot")
    scores, weights, prior = transport_problem(seed, b, k)
    # The error shrinks by a factor of tanh(1)^2 or better in each iteration, for scores differ by 2 at most.
    epsilon = 1.0
    for w, r in ((None, None), (None, prior), (weights, None), (weights, prior)):
        result = sinkhorn(scores, epsilon=epsilon, n_iters=500, tol=1e-13, prior=r, weights=w)
        rows = torch.full((b,), 1 / b, dtype=double) if w is None else w
        columns = np.full(k, 1 / k) if r is None else r.numpy()
        plan = ot.sinkhorn(rows.numpy(), columns, -scores.numpy(), epsilon, numItermax=20000, stopThr=1e-13)
        np.testing.assert_allclose((result * rows[:, None]).numpy(), plan, rtol=1e-8, atol=1e-11)


@pytest.mark.filterwarnings("ignore:If reg_type = entropy:UserWarning")
@pytest.mark.parametrize("gamma", [0.05, 0.5, 5.0])
@given(small_sizes, small_sizes, seeds)
def test_relax_converges_to_unbalanced_optimal_transport(gamma: float, b: int, k: int, seed: int) -> None:
    ot = pytest.importorskip("ot")
    scores, weights, prior = transport_problem(seed, b, k)
    result = sinkhorn(scores, epsilon=0.2, n_iters=5000, tol=1e-12, relax=gamma, prior=prior, weights=weights)
    plan = ot.unbalanced.sinkhorn_unbalanced(
        weights.numpy(),
        prior.numpy(),
        -scores.numpy(),
        0.2,
        (float("inf"), gamma),
        reg_type="entropy",
        numItermax=20000,
        stopThr=1e-12,
    )
    np.testing.assert_allclose((result * weights[:, None]).numpy(), plan, rtol=1e-7, atol=1e-10)


@given(small_sizes, small_sizes, st.floats(0.1, 0.9), seeds)
def test_mass_converges_to_transport_with_a_column_for_what_stays(
    b: int, k: int, rho: float, seed: int
) -> None:
    ot = pytest.importorskip("ot")
    scores, weights, prior = transport_problem(seed, b, k)
    result = sinkhorn(scores, epsilon=0.2, n_iters=5000, tol=1e-13, mass=rho, prior=prior, weights=weights)
    cost = np.pad(-scores.numpy(), ((0, 0), (0, 1)))
    columns = np.append(rho * prior.numpy(), 1 - rho)
    plan = ot.sinkhorn(weights.numpy(), columns, cost, 0.2, numItermax=20000, stopThr=1e-13)
    np.testing.assert_allclose((result * weights[:, None]).numpy(), plan[:, :-1], rtol=1e-8, atol=1e-11)


def test_mass_assigns_the_rows_that_exact_partial_transport_assigns() -> None:
    ot = pytest.importorskip("ot")
    scores, _, prior = transport_problem(3, 30, 4)
    exact = ot.partial.partial_wasserstein(np.full(30, 1 / 30), 0.4 * prior.numpy(), -scores.numpy(), m=0.4)
    result = sinkhorn(scores, epsilon=1e-3, n_iters=20000, tol=1e-9, mass=0.4, prior=prior) / 30
    best, ours = (float((scores * torch.as_tensor(plan)).sum()) for plan in (exact, result))
    assert abs(best - ours) < 5e-3 * best
    np.testing.assert_allclose(result.sum(0).numpy(), exact.sum(0), atol=1e-6)


@given(odd_sizes, odd_sizes, st.integers(0, 5), seeds)
def test_rows_sum_to_one(b: int, k: int, n_iters: int, seed: int) -> None:
    rows = sinkhorn(cosine_scores(seed, b, k), n_iters=n_iters).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-13)


def test_zero_updates_are_a_softmax() -> None:
    scores = cosine_scores(0, 9, 5)
    torch.testing.assert_close(sinkhorn(scores, n_iters=0), torch.softmax(scores / 0.05, -1))


@given(odd_sizes, odd_sizes, seeds)
def test_a_shift_of_all_scores_or_of_a_prototype_changes_nothing(b: int, k: int, seed: int) -> None:
    scores = cosine_scores(seed, b, k)
    shift = cosine_scores(seed + 1, 1, k) * 3 + 7
    torch.testing.assert_close(sinkhorn(scores + shift), sinkhorn(scores), rtol=1e-9, atol=1e-12)


def test_a_shift_of_a_row_changes_the_result_until_convergence() -> None:
    scores, shift = cosine_scores(0, 64, 8), cosine_scores(1, 64, 1)
    assert (sinkhorn(scores + shift) - sinkhorn(scores)).abs().max() > 0.1
    converged = [sinkhorn(s, epsilon=0.2, n_iters=3000) for s in (scores, scores + shift)]
    torch.testing.assert_close(*converged, rtol=1e-9, atol=1e-12)


@given(odd_sizes, odd_sizes, seeds)
def test_column_error_never_grows_with_iterations(b: int, k: int, seed: int) -> None:
    scores = cosine_scores(seed, b, k)
    errors = [column_error(sinkhorn(scores, n_iters=t)) for t in range(1, 8)]
    assert all(later <= earlier + 1e-13 for earlier, later in itertools.pairwise(errors))


def test_column_error_falls_to_zero() -> None:
    scores = cosine_scores(0, 200, 10)
    assert column_error(sinkhorn(scores, n_iters=0)) > 0.05
    assert column_error(sinkhorn(scores, n_iters=500)) < 1e-12


@given(odd_sizes, odd_sizes, seeds)
def test_permutations_pass_through(b: int, k: int, seed: int) -> None:
    scores, g = cosine_scores(seed, b, k), generator(seed)
    rows, columns = torch.randperm(b, generator=g), torch.randperm(k, generator=g)
    permuted = sinkhorn(scores[rows][:, columns])
    torch.testing.assert_close(permuted, sinkhorn(scores)[rows][:, columns], rtol=1e-11, atol=1e-14)


@given(small_sizes, small_sizes, seeds)
def test_weight_two_is_a_row_twice_and_weight_zero_is_no_row(b: int, k: int, seed: int) -> None:
    scores = cosine_scores(seed, b + 1, k)
    weights = torch.randint(0, 3, (b + 1,), generator=generator(seed))
    weights[0] = 1
    repeated = scores.repeat_interleave(weights, dim=0)
    variants: list[dict[str, Any]] = [{}, {"relax": 0.3}, {"mass": 0.6}, {"relax": 0.3, "mass": 0.6}]
    for settings in variants:
        weighted = sinkhorn_potentials(scores, weights=weights, **settings)
        torch.testing.assert_close(
            weighted, sinkhorn_potentials(repeated, **settings), rtol=1e-11, atol=1e-12
        )


@pytest.mark.parametrize("settings", [{}, {"relax": 0.3}, {"mass": 0.6}, {"relax": 0.3, "mass": 0.6}])
def test_only_ratios_of_weights_matter(settings: dict[str, Any]) -> None:
    scores, weights = cosine_scores(0, 30, 5), torch.rand(30, generator=generator(1), dtype=double)
    result = sinkhorn(scores, weights=weights, **settings)
    torch.testing.assert_close(
        sinkhorn(scores, weights=10 * weights, **settings), result, rtol=1e-11, atol=1e-14
    )


def test_a_masked_row_may_hold_nan() -> None:
    scores = cosine_scores(0, 12, 4)
    scores[5] = math.nan
    kept = torch.arange(12) != 5
    result = sinkhorn(scores, weights=kept)
    torch.testing.assert_close(result[kept], sinkhorn(scores[kept]))


@given(small_sizes, st.integers(0, 9), small_sizes, st.booleans(), seeds)
def test_rows_of_a_queue_have_a_say_and_no_assignment(
    b: int, n: int, k: int, weighted: bool, seed: int
) -> None:
    scores, queue = cosine_scores(seed, 2, b, k), cosine_scores(seed + 1, n, k)
    weights = torch.rand(b, generator=generator(seed), dtype=double) + 0.1 if weighted else None
    joint = torch.cat([scores, queue.expand(2, -1, -1)], dim=1)
    joint_weights = None if weights is None else torch.cat([weights, torch.ones(n, dtype=double)])
    result, a = sinkhorn(scores, queue_scores=queue, weights=weights, return_potentials=True)
    expected = sinkhorn(joint, weights=joint_weights)[:, :b]
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(
        a, sinkhorn_potentials(scores, queue_scores=queue.expand(2, -1, -1), weights=weights)
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["scores", "queue_scores"])
def test_one_score_that_is_not_finite_is_found_wherever_it_is(place: str, bad: float) -> None:
    for b, k, settings in ((5, 3, {}), (70, 1000, {"tol": 1e-3}), (40, 70, {"init": torch.zeros(70)})):
        rows = {name: cosine_scores(0, b, k, dtype=torch.float32) for name in ("scores", "queue_scores")}
        rows[place][b - 2, k - 1] = bad
        for call in (sinkhorn, sinkhorn_potentials):
            with pytest.raises(ValueError, match=f"{place} must be finite, got 1 NaN"):
                call(rows["scores"], queue_scores=rows["queue_scores"], **settings)


def test_out_receives_the_assignments() -> None:
    scores = cosine_scores(0, 2, 9, 4, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full(scores.shape, math.nan, dtype=dtype)
        assert sinkhorn(scores, out=out) is out
        torch.testing.assert_close(out, sinkhorn(scores, dtype=dtype), rtol=0, atol=0)
        a = sinkhorn_potentials(scores)
        assert assign_from_potentials(scores, a, out=out.zero_()) is out
        torch.testing.assert_close(out, sinkhorn(scores, dtype=dtype))


def test_prior_is_reached() -> None:
    prior = 1.0 / torch.arange(1, 11, dtype=double)
    masses = sinkhorn(cosine_scores(0, 300, 10), prior=prior, n_iters=2000).mean(0)
    torch.testing.assert_close(masses, prior / prior.sum(), rtol=1e-10, atol=1e-12)


def test_a_prototype_with_prior_zero_is_never_assigned() -> None:
    scores, prior = cosine_scores(0, 20, 5), torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0])
    variants: list[dict[str, Any]] = [{}, {"relax": 1.0}, {"mass": 0.5}]
    for settings in variants:
        result, potentials = sinkhorn(scores, prior=prior, return_potentials=True, **settings)
        assert (result[:, prior == 0] == 0).all()
        assert (potentials[[1, 4]] == -math.inf).all()
        assert result.isfinite().all()
    kept = prior > 0
    expected = sinkhorn(scores[:, kept], prior=prior[kept])
    torch.testing.assert_close(sinkhorn(scores, prior=prior)[:, kept], expected)


def test_relax_goes_from_softmax_to_balanced() -> None:
    scores = cosine_scores(0, 50, 6)
    balanced = sinkhorn(scores, n_iters=400)
    torch.testing.assert_close(sinkhorn(scores, n_iters=400, relax=0), torch.softmax(scores / 0.05, -1))
    torch.testing.assert_close(sinkhorn(scores, n_iters=400, relax=math.inf), balanced, rtol=0, atol=0)
    torch.testing.assert_close(sinkhorn(scores, n_iters=400, relax=1e9), balanced, rtol=1e-6, atol=1e-8)
    errors = [column_error(sinkhorn(scores, n_iters=400, relax=gamma)) for gamma in (0, 0.01, 0.1, 1, 10)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[3] > 2 * errors[4] > 0


def test_mass_is_the_assigned_share() -> None:
    scores = cosine_scores(0, 80, 6)
    result, potentials = sinkhorn(scores, n_iters=2000, mass=0.35, return_potentials=True)
    assert potentials.shape == (7,)
    torch.testing.assert_close(result.sum(), torch.tensor(0.35 * 80, dtype=double))
    torch.testing.assert_close(result.mean(0), torch.full((6,), 0.35 / 6, dtype=double))
    torch.testing.assert_close(sinkhorn(scores, mass=1.0), sinkhorn(scores))


@pytest.mark.parametrize(("b", "k"), [(1, 1), (1, 7), (7, 1), (3, 50)])
@pytest.mark.parametrize("settings", [{}, {"relax": 0.5}, {"mass": 0.5}, {"tol": 1e-6}, {"hard": True}])
def test_small_and_wide_problems_are_fine(b: int, k: int, settings: dict[str, Any]) -> None:
    result = sinkhorn(cosine_scores(0, b, k), **settings)
    assert result.shape == (b, k)
    assert result.isfinite().all()


def test_one_row_is_spread_as_the_prior_and_one_prototype_takes_all() -> None:
    prior = torch.tensor([0.1, 0.2, 0.7], dtype=double)
    torch.testing.assert_close(sinkhorn(cosine_scores(0, 1, 3), prior=prior), prior[None])
    torch.testing.assert_close(sinkhorn(cosine_scores(0, 9, 1)), torch.ones(9, 1, dtype=double))


@given(small_sizes, small_sizes, st.sampled_from([100.0, 1e3, 1e4]), seeds)
@pytest.mark.parametrize("settings", [{}, {"relax": 1.0}, {"mass": 0.5}, {"init": True}, {"n_iters": 50}])
def test_large_scores_stay_finite(settings: dict[str, Any], b: int, k: int, ratio: float, seed: int) -> None:
    scores = cosine_scores(seed, b, k, dtype=torch.float32)
    if "init" in settings:
        settings = {"init": torch.zeros(k)}
    result, potentials = sinkhorn(scores, epsilon=1 / ratio, return_potentials=True, **settings)
    assert potentials.isfinite().all()
    assert result.isfinite().all()
    if "mass" not in settings:
        torch.testing.assert_close(result.sum(-1), torch.ones(b), rtol=0, atol=1e-5)


def test_unnormalised_and_half_precision_scores_do_not_overflow_as_the_published_loop_does() -> None:
    unnormalised = cosine_scores(0, 32, 8, dtype=torch.float32) * 5
    assert published_loop(unnormalised, 0.05, 3).isnan().any()
    assert_close(sinkhorn(unnormalised), sinkhorn(unnormalised.double()), torch.float32)
    half = cosine_scores(0, 32, 8, dtype=torch.float16)
    assert published_loop(half, 0.05, 3).isnan().any()
    assert_close(sinkhorn(half), sinkhorn(half.double()), torch.float32)


@given(small_sizes, small_sizes, seeds)
def test_entropy_of_rows_is_at_least_that_of_an_even_share(b: int, k: int, seed: int) -> None:
    result = sinkhorn(cosine_scores(seed, b, k), epsilon=0.2, n_iters=4000, tol=1e-12)
    entropy = -torch.special.xlogy(result, result).sum(-1).mean()
    assert entropy >= math.log(k / b) - 1e-9


def test_tol_stops_each_problem_on_its_own() -> None:
    easy, hard = cosine_scores(0, 60, 5) * 0.05, cosine_scores(1, 60, 5)
    both = torch.stack([easy, hard])
    stopped = sinkhorn_potentials(both, n_iters=1000, tol=1e-4)
    for problem, scores in zip(stopped, both, strict=True):
        torch.testing.assert_close(
            problem, sinkhorn_potentials(scores, n_iters=1000, tol=1e-4), rtol=0, atol=0
        )
        updates = next(t for t in range(1, 1000) if column_error(sinkhorn(scores, n_iters=t)) <= 1e-4)
        torch.testing.assert_close(
            problem, sinkhorn_potentials(scores, n_iters=updates), rtol=1e-12, atol=1e-12
        )
    first = next(t for t in range(1, 1000) if column_error(sinkhorn(easy, n_iters=t)) <= 1e-4)
    assert column_error(sinkhorn(hard, n_iters=first)) > 1e-4


def test_tol_with_relax_stops_when_little_mass_moves() -> None:
    scores = cosine_scores(0, 60, 5)
    stopped = sinkhorn(scores, n_iters=5000, relax=0.5, mass=0.7, tol=1e-9)
    torch.testing.assert_close(
        stopped, sinkhorn(scores, n_iters=5000, relax=0.5, mass=0.7), rtol=1e-6, atol=1e-8
    )
    loose = sinkhorn(scores, n_iters=5000, relax=0.5, mass=0.7, tol=0.1)
    assert (loose - stopped).abs().max() > 1e-5


@given(small_sizes, small_sizes, st.integers(0, 4), st.integers(0, 4), seeds)
@pytest.mark.parametrize("settings", [{}, {"relax": 0.5}, {"mass": 0.5}, {"relax": 0.5, "mass": 0.5}])
def test_warm_start_goes_on_where_it_stopped(
    settings: dict[str, Any], b: int, k: int, first: int, then: int, seed: int
) -> None:
    scores = cosine_scores(seed, b, k)
    init = sinkhorn_potentials(scores, n_iters=1 + first, **settings)
    resumed = sinkhorn_potentials(scores, n_iters=then, init=init, **settings)
    whole = sinkhorn_potentials(scores, n_iters=1 + first + then, **settings)
    torch.testing.assert_close(resumed, whole, rtol=1e-12, atol=1e-12)


def test_a_far_away_warm_start_recovers() -> None:
    scores = cosine_scores(0, 40, 6)
    init = torch.tensor([1e4, -1e4, 0, 500, -3000, 20])
    torch.testing.assert_close(sinkhorn(scores, n_iters=500, init=init), sinkhorn(scores, n_iters=500))


def test_hard_is_the_one_hot_argmax() -> None:
    scores = cosine_scores(0, 50, 7)
    soft, hard = sinkhorn(scores), sinkhorn(scores, hard=True)
    assert (hard.sum(-1) == 1).all()
    assert (hard.argmax(-1) == soft.argmax(-1)).all()
    assert (sinkhorn(torch.zeros(4, 3), hard=True) == torch.tensor([1.0, 0, 0])).all()


def test_hard_rows_of_the_virtual_column_are_empty() -> None:
    scores = cosine_scores(0, 60, 5)
    soft = sinkhorn(scores, mass=0.4, n_iters=200)
    hard = sinkhorn(scores, mass=0.4, n_iters=200, hard=True)
    virtual = 1 - soft.sum(-1) > soft.max(-1).values
    assert 0 < virtual.sum() < 60
    assert (hard.sum(-1) == (~virtual)).all()


@pytest.mark.parametrize("bound", [1.0, 50.0])
def test_bound_changes_nothing(bound: float) -> None:
    scores = cosine_scores(0, 40, 6)
    torch.testing.assert_close(sinkhorn_potentials(scores, bound=bound), sinkhorn_potentials(scores))


def test_leading_dimensions_are_independent_problems() -> None:
    scores = cosine_scores(0, 2, 3, 20, 5)
    prior = torch.rand(2, 3, 5, generator=generator(1), dtype=double) + 0.1
    weights = torch.rand(2, 3, 20, generator=generator(2), dtype=double)
    settings: dict[str, Any] = {"relax": 0.5, "mass": 0.8, "return_potentials": True}
    result, potentials = sinkhorn(scores, prior=prior, weights=weights, **settings)
    assert potentials.shape == (2, 3, 6)
    for i in range(2):
        for j in range(3):
            alone, a = sinkhorn(scores[i, j], prior=prior[i, j], weights=weights[i, j], **settings)
            torch.testing.assert_close(result[i, j], alone)
            torch.testing.assert_close(potentials[i, j], a)
    shared = sinkhorn(scores, prior=prior[0, 0], weights=weights[0, 0], init=potentials[0, 0, :5])
    torch.testing.assert_close(
        shared[1, 2],
        sinkhorn(scores[1, 2], prior=prior[0, 0], weights=weights[0, 0], init=potentials[0, 0, :5]),
    )


def test_potentials_serve_rows_that_come_later() -> None:
    scores = cosine_scores(0, 100, 6)
    result, potentials = sinkhorn(scores, return_potentials=True)
    torch.testing.assert_close(assign_from_potentials(scores[:7], potentials, epsilon=0.05), result[:7])
    partial, potentials = sinkhorn(scores, mass=0.5, return_potentials=True)
    torch.testing.assert_close(assign_from_potentials(scores[:7], potentials, epsilon=0.05), partial[:7])


@given(small_sizes, small_sizes, seeds)
def test_equals_the_reference(b: int, k: int, seed: int) -> None:
    scores = cosine_scores(seed, 2, b, k, dtype=torch.float32)
    settings: dict[str, Any] = {
        "prior": torch.rand(k, generator=generator(seed)) + 0.1,
        "weights": torch.rand(b, generator=generator(seed)) + 0.01,
        "return_potentials": True,
    }
    for more in ({}, {"relax": 0.4, "mass": 0.7}, {"tol": 1e-3, "n_iters": 9}, {"init": torch.ones(k)}):
        for result, oracle in zip(
            sinkhorn(scores, **settings, **more),
            reference.sinkhorn(scores.double(), **settings, **more),
            strict=True,
        ):
            assert_close(result, oracle, torch.float32, scale=5)


def test_no_gradient_by_default() -> None:
    scores = cosine_scores(0, 8, 3).requires_grad_()
    assert not sinkhorn(scores).requires_grad
    assert not reference.sinkhorn_potentials(scores).requires_grad
    plain = reference.sinkhorn(scores)
    assert isinstance(plain, Tensor)
    assert not plain.requires_grad
    assert not sinkhorn_potentials(scores).requires_grad


def test_last_step_gradient_is_that_of_the_final_softmax() -> None:
    scores, upstream = cosine_scores(0, 8, 3).requires_grad_(), cosine_scores(1, 8, 3)
    result, potentials = sinkhorn(scores, gradient="last_step", return_potentials=True)
    (gradient,) = torch.autograd.grad((result * upstream).sum(), scores)
    q = result.detach()
    torch.testing.assert_close(gradient, q * (upstream - (q * upstream).sum(-1, keepdim=True)) / 0.05)
    assert not potentials.requires_grad


def gradient_settings() -> dict[str, dict[str, Any]]:
    prior = torch.tensor([1.0, 2.0, 1.0, 0.0], dtype=double)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 1.0], dtype=double)
    queue = cosine_scores(1, 2, 5, 4)
    return {
        "plain": {},
        "no update": {"n_iters": 0},
        "weights": {"weights": weights},
        "prior": {"prior": prior},
        "relax": {"relax": 0.4},
        "mass": {"mass": 0.6},
        "tol": {"tol": 1e-3, "n_iters": 9},
        "init": {"init": torch.tensor([0.3, -1.0, 0.0, 2.0])},
        "queue": {"queue_scores": queue},
        "all": {
            "weights": weights,
            "prior": prior,
            "relax": 0.4,
            "mass": 0.6,
            "tol": 1e-9,
            "init": torch.tensor([0.3, -1.0, 0.0, 2.0, 0.1]),
            "queue_scores": queue,
        },
    }


@pytest.mark.parametrize("name", gradient_settings())
def test_unrolled_gradient_is_exact(name: str) -> None:
    scores, settings = cosine_scores(0, 2, 6, 4).requires_grad_(), gradient_settings()[name]
    assert torch.autograd.gradcheck(
        lambda s: sinkhorn(s, epsilon=0.5, gradient="unrolled", **settings), scores
    )


@pytest.mark.parametrize("name", gradient_settings())
def test_last_step_gradient_is_exact_with_constant_potentials(name: str) -> None:
    scores, settings = cosine_scores(0, 2, 6, 4).requires_grad_(), gradient_settings()[name]
    result, a = sinkhorn(scores, epsilon=0.5, gradient="last_step", return_potentials=True, **settings)

    def constant(s: Tensor) -> Tensor:
        q = sinkhorn(s, epsilon=0.5, gradient="last_step", n_iters=0, init=a, mass=settings.get("mass"))
        assert isinstance(q, Tensor)
        return q

    torch.testing.assert_close(constant(scores), result)
    assert torch.autograd.gradcheck(constant, scores)
    upstream = cosine_scores(2, 2, 6, 4)
    (ours,), (plain,) = (torch.autograd.grad(q, scores, upstream) for q in (result, constant(scores)))
    torch.testing.assert_close(ours, plain)


def test_dtypes_of_the_result() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        scores = cosine_scores(0, 8, 3, dtype=dtype)
        wide = double if dtype == double else torch.float32
        result, potentials = sinkhorn(scores, return_potentials=True)
        assert (result.dtype, potentials.dtype) == (wide, wide)
        assert sinkhorn(scores, dtype=dtype).dtype == dtype
        assert_close(result, sinkhorn(scores.double()), torch.float32)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "offset"])
def test_layouts_of_the_input_do_not_matter(layout: str) -> None:
    base = cosine_scores(0, 3, 24, 10)
    scores = {
        "transposed": base.transpose(1, 2),
        "sliced": base[:, ::2, 1:8],
        "expanded": base[:1].expand(3, 24, 10),
        "offset": base.flatten()[1 : 1 + 2 * 24 * 10].view(2, 24, 10),
    }[layout]
    result = sinkhorn(scores)
    assert result.is_contiguous()
    torch.testing.assert_close(
        result, sinkhorn(scores.clone(memory_format=torch.contiguous_format)), rtol=0, atol=0
    )


def test_inputs_are_never_written() -> None:
    scores, prior, weights, init = cosine_scores(0, 9, 4), torch.rand(4), torch.rand(9), torch.rand(4)
    before = [t.clone() for t in (scores, prior, weights, init)]
    _, potentials = sinkhorn(
        scores, prior=prior, weights=weights, init=init, n_iters=0, return_potentials=True
    )
    potentials += 1
    sinkhorn(scores, prior=prior, weights=weights, init=init, hard=True)
    for now, then in zip((scores, prior, weights, init), before, strict=True):
        assert torch.equal(now, then)


def test_numpy_in_numpy_out() -> None:
    scores = cosine_scores(0, 9, 4).numpy()
    scores.flags.writeable = False
    result, potentials = sinkhorn(scores, prior=np.ones(4), weights=[1.0] * 9, return_potentials=True)
    assert isinstance(result, np.ndarray)
    assert isinstance(potentials, np.ndarray)
    assert isinstance(sinkhorn_potentials(scores), np.ndarray)
    np.testing.assert_allclose(assign_from_potentials(scores, potentials, epsilon=0.05), result)
    np.testing.assert_allclose(result, sinkhorn(torch.tensor(scores)).numpy())


def test_same_bits_in_every_run_and_for_every_thread_count() -> None:
    scores = cosine_scores(0, 700, 97, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            results.append(sinkhorn(scores, return_potentials=True))
    finally:
        torch.set_num_threads(threads)
    for result, potentials in results[1:]:
        assert torch.equal(result, results[0][0])
        assert torch.equal(potentials, results[0][1])


def test_warns_once_when_there_are_more_prototypes_than_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinkhorn_solve, "_warned", False)
    with pytest.warns(ClustopsWarning, match=r"20 prototypes .* 5 rows.*ln\(20\) = 3.00; use a queue"):
        sinkhorn(cosine_scores(0, 5, 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "warn", lambda *_, **__: pytest.fail("warned twice"))
        sinkhorn(cosine_scores(0, 5, 20))


def test_enough_rows_do_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinkhorn_solve, "_warned", False)
    sinkhorn(cosine_scores(0, 20, 20))
    sinkhorn(cosine_scores(0, 5, 20), n_iters=0)
    assert not sinkhorn_solve._warned


@given(st.integers(1, 32), st.integers(1, 20), seeds)
def test_matrix_is_the_assignment_of_a_square(n: int, n_iters: int, seed: int) -> None:
    m = cosine_scores(seed, 2, n, n) * 3
    result = sinkhorn_matrix(m, n_iters=n_iters)
    torch.testing.assert_close(result, sinkhorn(m, epsilon=1.0, n_iters=n_iters), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(result, reference.sinkhorn_matrix(m, n_iters=n_iters), rtol=1e-12, atol=1e-14)


def test_matrix_becomes_doubly_stochastic() -> None:
    result = sinkhorn_matrix(cosine_scores(0, 4, 5, 6, 6) * 4, n_iters=500)
    assert result.shape == (4, 5, 6, 6)
    torch.testing.assert_close(result.sum(-1), torch.ones(4, 5, 6, dtype=double))
    torch.testing.assert_close(result.sum(-2), torch.ones(4, 5, 6, dtype=double))


@pytest.mark.parametrize("n_iters", [0, 1, 3, 20])
def test_matrix_gradient_is_exact(n_iters: int) -> None:
    m = (cosine_scores(0, 3, 4, 4) * 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: sinkhorn_matrix(m, n_iters=n_iters), m)
    upstream = cosine_scores(1, 3, 4, 4)
    (ours,) = torch.autograd.grad(sinkhorn_matrix(m, n_iters=n_iters), m, upstream)
    (plain,) = torch.autograd.grad(reference.sinkhorn_matrix(m, n_iters=n_iters), m, upstream)
    torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-13)


def test_matrix_keeps_the_dtype_and_computes_in_single_precision() -> None:
    m = cosine_scores(0, 8, 8, dtype=torch.bfloat16).requires_grad_()
    result = sinkhorn_matrix(m)
    result[0, 0].backward()
    assert m.grad is not None
    assert (result.dtype, m.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert_close(result.detach(), sinkhorn_matrix(m.detach().double()), torch.bfloat16)


@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn_loss", "sinkhorn_matrix", "sinkhorn_queue"])
def test_examples_in_the_documentation_run(name: str) -> None:
    module = __import__(f"clustops.{name}", fromlist=["_"])
    failed, ran = doctest.testmod(sys.modules.get(f"clustops.{name}", module))
    assert ran > 0
    assert failed == 0
