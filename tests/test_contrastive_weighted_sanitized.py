"""Blocks of the contrastive loss under any weights on a CPU, under the sanitizers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sanitized import SANITIZED, UNOPTIMISED, build_for_addresses, build_for_threads
from simt import DTYPES, Results, needs_compiler
from support import assert_close, generator, seeds
from torch import Tensor

pytestmark = needs_compiler
# Samples: first anchor, anchors, all; row, rows, column, columns of the block.
ON_THE_DIAGONAL, ABOVE, OUTSIDE = (
    (2, 40, 45, 5, 20, 5, 37),
    (0, 70, 70, 0, 33, 33, 37),
    (9, 20, 60, 9, 17, 29, 31),
)
PLACES = [
    ON_THE_DIAGONAL,
    ABOVE,
    OUTSIDE,
    (0, 1, 1, 0, 1, 0, 1),
    (0, 18, 18, 1, 17, 0, 17),
    (3, 5, 9, 4, 2, 0, 3),
]


def oracle(
    products: Tensor,
    w: Tensor,
    numbers: Tensor,
    place: tuple[int, ...],
    views: int,
    scale: float,
    mirrored: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shifts, sums, totals and gradients; ``numbers`` are shift, gradient, LSE and share of anchors."""
    first, anchors, _, row, rows, column, columns = place
    a, b = (torch.arange(start * views, (start + n) * views) for start, n in ((row, rows), (column, columns)))
    local = first <= column < first + anchors
    shift, grad, lse, share = numbers
    base = first * views
    apart = a[:, None] != b
    weights = w[a // views - first][:, b // views] * apart
    sums = torch.zeros(3, anchors * views, dtype=torch.float64)
    scores = (products * scale).masked_fill(~apart, -math.inf)
    shift = shift.clone()
    if not mirrored and (columns > 1 or views > 1 or row != column):
        shift[a - base] = scores.amax(1)
    sums[0, a - base] = (scores - shift[a - base, None]).exp2().nan_to_num().sum(1)
    sums[1, a - base] = (weights * products).sum(1)
    sums[2, a - base] = weights.sum(1)
    if local:
        back = w[b // views - first][:, a // views].T * apart
        beyond = b >= (row + rows) * views
        if mirrored:
            at = b[beyond] - base
            sums[0, at] += (scores[:, beyond] - shift[at]).exp2().sum(0)
            sums[1, at] += (back * products)[:, beyond].sum(0)
            sums[2, at] += back[:, beyond].sum(0)
    g = grad[a - base, None] * (scores - lse[a - base, None]).exp2() - share[a - base, None] * weights
    if local:
        g += grad[b - base] * (scores - lse[b - base]).exp2() - share[b - base] * back
    return shift, sums[0], sums[1], sums[2].view(anchors, views)[:, 0], g * apart


def check(
    program: Path,
    place: tuple[int, ...],
    views: int,
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
    mirrored: bool,
    threads: int = 1,
    seed: int = 0,
) -> None:
    g, temperature = generator(seed), 0.5
    scale = 1 / (math.log(2) * temperature)
    first, anchors, samples, _, rows, column, columns = place
    mirrored = mirrored and first <= column < first + anchors
    products = (2 * torch.rand(rows * views, columns * views, generator=g) - 1).to(dtype)
    w = torch.rand(anchors, samples, generator=g).to(weights_dtype)
    numbers = torch.randn(4, anchors * views, generator=g).to(dtype)
    numbers[0] = scale if mirrored else -math.inf
    numbers[2] = 3
    zeros = torch.zeros(anchors * views * 2 + anchors, dtype=torch.float64)
    head = [DTYPES[dtype], DTYPES[weights_dtype], views, *place, mirrored, threads]
    given = (
        torch.tensor([temperature], dtype=torch.float64),
        products,
        w,
        numbers[0].double(),
        zeros,
        numbers[1:],
    )
    answer = Results(program, [], head, *given)
    right = oracle(products.double(), w.double(), numbers.double(), place, views, scale, mirrored)
    for exact, found_in in zip(right, [*[torch.float64] * 4, dtype], strict=True):
        assert_close(answer.take(found_in, *exact.shape), exact, dtype, scale=5)
    assert not answer.left


@pytest.fixture(scope="module", params=SANITIZED)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_for_addresses(
        tmp_path_factory.mktemp("build"), "contrastive_weighted", request.param, *UNOPTIMISED
    )


@settings(max_examples=25)
@given(
    place=st.sampled_from(PLACES),
    views=st.sampled_from([1, 2, 3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    weights_dtype=st.sampled_from(list(DTYPES)),
    mirrored=st.booleans(),
    seed=seeds,
)
def test_the_kernels_stay_in_bounds(
    program: Path,
    place: tuple[int, ...],
    views: int,
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
    mirrored: bool,
    seed: int,
) -> None:
    # A mirrored block begins on the diagonal or beyond it.
    mirrored = mirrored and place[5] >= place[3]
    check(program, place, views, dtype, weights_dtype, mirrored, seed=seed)


def test_threads_do_not_race(tmp_path: Path) -> None:
    program = build_for_threads(tmp_path, "contrastive_weighted", *UNOPTIMISED)
    for place in (ON_THE_DIAGONAL, ABOVE, OUTSIDE):
        for mirrored in (False, True):
            check(program, place, 2, torch.float32, torch.float32, mirrored, threads=4)
