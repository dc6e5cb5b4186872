"""The wgmma kernels of the class losses on the CPU, thread by thread, under two sanitizers: copies and matrix
products happen as soon, or as late, as their barriers allow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import needs_compiler
from support import generator, seeds
from test_contrastive_gpu_simt import Problem, assert_is_the_reference, draw

pytestmark = needs_compiler
HALVES = [torch.bfloat16, torch.float16]
WIDTHS = [1, 60, 64, 100, 128, 130, 192, 200, 256]  # one to four chunks of 64 features, whole and not


@pytest.fixture(scope="module")
def program(contrastive_gpu: Path) -> Path:
    return contrastive_gpu


def on_hopper(n: int, views: int, d: int, dtype: torch.dtype, seed: int = 0, **changes: Any) -> Problem:
    return replace(draw(n, views, d, (dtype, True), seed), hopper=True, **changes)


@settings(max_examples=8)
@given(
    n=st.sampled_from([2, 33, 64, 97]),
    views=st.integers(1, 3),
    d=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(HALVES),
    unit=st.booleans(),
    own_confidence=st.booleans(),
    order=st.integers(0, 2),
    seed=seeds,
)
def test_losses_and_gradients_are_the_reference_s(
    program: Path,
    n: int,
    views: int,
    d: int,
    dtype: torch.dtype,
    unit: bool,
    own_confidence: bool,
    order: int,
    seed: int,
) -> None:
    problem = on_hopper(n, views, d, dtype, seed, normalize=not unit, own_confidence=own_confidence)
    assert_is_the_reference(program, replace(problem, order=order))


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize(("d", "dtype"), [(128, torch.bfloat16), (256, torch.float16)])
def test_stages_are_used_again_and_again(program: Path, d: int, dtype: torch.dtype, order: int) -> None:
    # Five tiles of columns for each of two CTAs, of which at most three are there at a time; all rows count.
    n = 640 if d < 256 else 320
    problem = on_hopper(n, 2, d, dtype, order, anchors=(2 * n // 5, 64), order=order)
    assert_is_the_reference(program, problem)


@pytest.mark.parametrize("anchors", [(0, 1), (63, 66), (130, 5), (150, 0)])
def test_anchors_begin_and_end_anywhere(program: Path, anchors: tuple[int, int]) -> None:
    assert_is_the_reference(program, on_hopper(150, 2, 64, torch.bfloat16, anchors=anchors, order=1))


@pytest.mark.parametrize("views", [2, 5])
def test_the_views_of_a_sample_may_lie_in_two_tiles(program: Path, views: int) -> None:
    assert_is_the_reference(program, on_hopper(60, views, 64, torch.float16, order=2))


@pytest.mark.parametrize(("dtype", "order"), [(torch.bfloat16, 1), (torch.float16, 2)])
def test_rows_far_from_unit_norm_and_cold_softmaxes_are_exact(
    program: Path, dtype: torch.dtype, order: int
) -> None:
    problem = on_hopper(100, 2, 128, dtype, order, order=order)
    long = replace(problem, features=problem.features * torch.linspace(0.1, 6, 100)[:, None, None].to(dtype))
    assert_is_the_reference(program, long, scale=40)
    assert_is_the_reference(program, replace(problem, temperature=0.01), scale=40)


@pytest.mark.parametrize("size", [1e-7, 1.0, 3e4])
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_are_as_exact_whatever_the_size_of_the_upstream_ones(
    program: Path, dtype: torch.dtype, size: float
) -> None:
    upstream = size * torch.randn(60, 2, generator=generator(3))
    problem = on_hopper(60, 2, 64, dtype, temperature=0.5, upstream=upstream)
    lse = problem.exactly()[1]
    found = problem.backward(program, upstream, lse.float()).double()
    right = problem.exact_gradient(upstream, lse)
    # fp16 itself ends at 6e-8.
    assert float((found - right).norm()) <= 4e-3 * float(right.norm()) + (6e-8 * right.numel() ** 0.5)


def test_no_upstream_gradient_is_no_gradient(program: Path) -> None:
    problem = on_hopper(40, 2, 64, torch.float16)
    assert not bool(problem.backward(program, torch.zeros(40, 2), problem.exactly()[1].float()).any())


@pytest.mark.parametrize("dtype", HALVES)
def test_results_are_the_same_bits_in_every_order_of_threads(program: Path, dtype: torch.dtype) -> None:
    problem = on_hopper(640, 2, 128, dtype, anchors=(256, 64))
    upstream = torch.randn(640, 2, generator=generator(0))
    lse = replace(problem, anchors=None).exactly()[1].float()
    runs = [replace(problem, order=order) for order in (0, 1, 2)]
    losses = [run.forward(program) for run in runs]
    gradients = [run.backward(program, upstream, lse) for run in runs]
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert all(torch.equal(got, first) for got, first in zip(loss, losses[0], strict=True))
        assert torch.equal(gradient, gradients[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_feature_that_is_not_finite_makes_all_losses_nan(program: Path, bad: float) -> None:
    problem = on_hopper(70, 2, 64, torch.bfloat16)
    problem.features[69, 1, 3] = bad
    loss, _, _, norms = problem.forward(program)
    assert bool(loss.isnan().all())
    assert bool(norms.isnan().all())


@pytest.mark.parametrize("dtype", HALVES)
def test_the_other_tensor_core_kernels_say_the_same(program: Path, dtype: torch.dtype) -> None:
    problem = on_hopper(100, 2, 128, dtype)
    other = replace(problem, hopper=False)
    for found, right in zip(problem.forward(program), other.forward(program), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
