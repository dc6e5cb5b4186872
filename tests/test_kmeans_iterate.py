"""All iterations of small problems by one kernel, against the same iterations one by one."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import generator, odd_sizes, seeds, small_sizes
from torch import Tensor

from clustops import kmeans_lloyd, native
from clustops.checks import ClustopsWarning
from clustops.kmeans import KMeansResult, kmeans
from clustops.native import kmeans_iterate
from clustops.reference import kmeans_ops as ops
from clustops.reference.kmeans_iterate import iterate

needs_extension = pytest.mark.skipif(native.extension is None, reason=f"no extension: {native.why_not}")


def step_by_step(*args: Any, **options: Any) -> KMeansResult:
    with mock.patch.object(kmeans_lloyd, "fits", return_value=False):
        return kmeans(*args, **options)


def assert_same(a: KMeansResult, b: KMeansResult) -> None:
    for name in vars(a):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def problem(
    b: int, n: int, d: int, seed: int, ties: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weights of which some are zero, and lengths."""
    g = generator(seed)
    x = torch.randint(-1, 2, (b, n, d), generator=g).float() if ties else torch.randn(b, n, d, generator=g)
    weights = torch.randint(0, 3, (b, n), generator=g) / 2
    weights += weights.sum(1, keepdim=True) == 0
    return x.to(dtype), weights, torch.randint(1, n + 1, (b,), generator=g)


@needs_extension
@settings(max_examples=60)
@given(
    b=st.integers(2, 4),
    n=odd_sizes,
    d=small_sizes,
    seed=seeds,
    ties=st.booleans(),
    far=st.booleans(),
    empty=st.sampled_from(["split", "keep"]),
    given_weights=st.sampled_from(["none", "weights", "lengths"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    restarts=st.sampled_from([1, 3]),
)
@pytest.mark.usefixtures("instruction_set")
def test_one_kernel_gives_the_bits_of_single_iterations(
    b: int,
    n: int,
    d: int,
    seed: int,
    ties: bool,
    far: bool,
    empty: str,
    given_weights: str,
    dtype: torch.dtype,
    restarts: int,
) -> None:
    x, weights, lengths = problem(b, n, d, seed, ties, dtype)
    k = 1 if given_weights == "lengths" else 1 + seed % min(n, 30)
    start = x[:, :1].float().expand(-1, k, -1) + 100.0 * torch.arange(k).view(1, k, 1) if far else "random"
    options = {
        "init": start,
        "n_init": 1 if far else restarts,
        "max_iter": 5,
        "tol": 0,
        "empty": empty,
        "seed": seed,
        "weights": weights if given_weights == "weights" else None,
        "lengths": lengths if given_weights == "lengths" else None,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ClustopsWarning)
        with mock.patch.object(kmeans_lloyd, "fits", wraps=kmeans_iterate.fits) as asked:
            found = kmeans(x, k, **options)
        assert asked.call_count == 1
        assert_same(found, step_by_step(x, k, **options))


@needs_extension
@pytest.mark.usefixtures("instruction_set")
def test_each_restart_splits_by_draws_of_its_own() -> None:
    x, weights = torch.randn(2, 60, 3, generator=generator(1)), torch.ones(2, 60, dtype=torch.float64)
    grid = ops.units(ops.bounds(x, weights), torch.tensor([60, 60]))
    start = (x[:, :1] + 100 * torch.arange(8).view(1, 8, 1)).repeat_interleave(3, 0)
    arguments = (x, start, weights, grid, 2, False, "split", 5)
    found = torch.ops.clustops.kmeans_iterate(*arguments)
    for part, expected in zip(found, iterate(*arguments), strict=True):
        assert torch.equal(part, expected)
    assert not torch.equal(found[0][0], found[0][1])


@needs_extension
@pytest.mark.usefixtures("instruction_set")
def test_problems_of_far_apart_scales_are_each_summed_on_a_grid_of_their_own() -> None:
    scale = torch.tensor([1e15, 1.0, 1e-15]).view(3, 1, 1)
    x = torch.randn(3, 40, 5, generator=generator(2)) * scale
    options = {"init": x[:, :4], "max_iter": 4, "tol": 0}
    assert_same(kmeans(x, 4, **options), step_by_step(x, 4, **options))


@needs_extension
@pytest.mark.usefixtures("instruction_set")
def test_the_number_of_threads_changes_no_bit_of_many_problems() -> None:
    x = torch.randn(9, 50, 3, generator=generator(0))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 9, 10):
            torch.set_num_threads(threads)
            results.append(kmeans(x, 7, init=x[:, :1].expand(9, 7, 3), max_iter=6, tol=0))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(results[0], other)


@needs_extension
@pytest.mark.usefixtures("instruction_set")
def test_a_split_of_rows_one_rounding_apart_takes_the_whole_way() -> None:
    x = torch.tensor([[[1.0], [1.0 + 2.0**-23]], [[8.0], [8.0 + 2.0**-20]]])
    options = {"init": x[:, :1].expand(2, 2, 1), "max_iter": 1, "tol": 0}
    assert_same(kmeans(x, 2, **options), step_by_step(x, 2, **options))


@needs_extension
def test_only_small_problems_in_one_process_go_through_it() -> None:
    centroids = torch.zeros(4, 3, 64)
    assert kmeans_iterate.fits(torch.empty(4, 2048, 64), centroids, False)
    assert not kmeans_iterate.fits(torch.empty(4, 2048, 64), centroids, True)
    assert not kmeans_iterate.fits(torch.empty(4, 2048, 64, dtype=torch.float64), centroids, False)
    assert not kmeans_iterate.fits(torch.empty(4, 2**16, 64), centroids, False)


@needs_extension
def test_registration_passes_opcheck() -> None:
    x, weights = torch.randn(2, 9, 3), torch.ones(2, 9, dtype=torch.float64)
    grid = torch.full((2, 2, 4), 2.0**-30, dtype=torch.float64)
    sample = (x, x[:, :2].repeat_interleave(2, 0), weights, grid, 2, False, "split", 0)
    torch.library.opcheck(torch.ops.clustops.kmeans_iterate.default, sample)
