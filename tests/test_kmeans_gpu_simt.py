"""The CUDA kernels of the k-means update on the CPU, thread by thread (native/simt.h), under the address and
undefined-behaviour sanitizers, in three orders of the threads of a block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import DTYPES, Results, build, needs_compiler
from support import generator, seeds
from torch import Tensor

from clustops.reference import kmeans_ops as ops
from clustops.reference import kmeans_seeding as seeding
from clustops.reference import kmeans_split as splitting
from clustops.reference.kmeans_iterate import iterate

pytestmark = needs_compiler
dtypes = st.sampled_from(list(DTYPES))
orders = st.integers(0, 2)
few = settings(max_examples=12)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kernels = (f"kmeans_{part}.cu" for part in ("update", "seeding", "split", "tiny"))
    return build(tmp_path_factory.mktemp("simt"), "kmeans_gpu", *kernels)


def run(
    program: Path, operation: str, order: int, dtype: torch.dtype, sizes: list[int], *inputs: Tensor
) -> Results:
    return Results(program, [operation, order, DTYPES[dtype], *sizes], *inputs)


def assert_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def draw(b: int, n: int, d: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of magnitudes from 1e-8 to 1, and weights, a third of them 0."""
    g = generator(seed)
    x = torch.randn(b, n, d, generator=g) * 10.0 ** -torch.randint(0, 8, (b, n, d), generator=g)
    weights = torch.rand(b, n, generator=g, dtype=torch.float64) * torch.randint(
        0, 3, (b, n), generator=g
    ).clamp(max=1)
    return x.to(dtype), weights


def labels_of(b: int, n: int, k: int, seed: int) -> Tensor:
    return torch.randint(-1, k, (b, n), generator=generator(seed))


@few
@given(
    b=st.integers(0, 3),
    n=st.sampled_from([0, 1, 7, 300, 4099]),
    d=st.sampled_from([0, 1, 3, 64, 257]),
    dtype=dtypes,
    order=orders,
    seed=seeds,
)
def test_bounds_are_the_reference_s(
    program: Path, b: int, n: int, d: int, dtype: torch.dtype, order: int, seed: int
) -> None:
    x, weights = draw(b, min(n, 300 if d > 3 else n), d, dtype, seed)
    found = run(program, "bounds", order, dtype, [*x.shape], x, weights)
    assert_bits(found.take(torch.float64, b, d + 1), ops.bounds(x, weights))


def test_bounds_show_nan_and_infinity_only_of_rows_with_a_weight(program: Path) -> None:
    x = torch.randn(1, 40, 3)
    x[0, 3, 0], x[0, 4, 1], x[0, 5, 2] = torch.nan, -torch.inf, torch.nan
    weights = torch.ones(1, 40, dtype=torch.float64)
    weights[0, 5] = 0
    found = run(program, "bounds", 0, x.dtype, [1, 40, 3], x, weights).take(torch.float64, 1, 4)
    assert_bits(found, ops.bounds(x, weights))
    assert bool(found[0, 0].isnan())
    assert float(found[0, 1]) == torch.inf


def zeros(b: int, d: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(b, 2, k, d + 1, dtype=torch.float64), torch.zeros(b, k, dtype=torch.int64)


def add(
    program: Path,
    order: int,
    into: tuple[Tensor, Tensor],
    x: Tensor,
    labels: Tensor,
    before: Tensor | None,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    (b, n, d), k = x.shape, into[1].shape[1]
    inputs = [x, weights, labels, *([] if before is None else [before]), grid_of(x, weights), *into]
    found = run(program, "sums", order, x.dtype, [b, n, d, k, int(before is not None)], *inputs)
    return found.take(torch.float64, b, 2, k, d + 1), found.take(torch.int64, b, k)


def grid_of(x: Tensor, weights: Tensor) -> Tensor:
    return ops.units(ops.bounds(x, weights), (weights > 0).sum(1))


def reference_sums(x: Tensor, labels: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    total, counts = zeros(x.shape[0], x.shape[2], k)
    ops.sums_(total, counts, x, labels, weights, grid_of(x, weights))
    return total, counts


@few
@given(
    b=st.integers(0, 3),
    n=st.sampled_from([0, 1, 33, 300]),
    d=st.sampled_from([0, 1, 31, 127, 128, 150]),
    k=st.sampled_from([1, 2, 40]),
    dtype=dtypes,
    order=orders,
    seed=seeds,
)
def test_sums_are_the_reference_s_bit_for_bit(
    program: Path, b: int, n: int, d: int, k: int, dtype: torch.dtype, order: int, seed: int
) -> None:
    x, weights = draw(b, n, d, dtype, seed)
    labels = labels_of(b, n, k, seed)
    expected = reference_sums(x, labels, weights, k)
    for got, right in zip(
        add(program, order, zeros(b, d, k), x, labels, None, weights), expected, strict=True
    ):
        assert_bits(got, right)


def test_sums_over_more_rows_than_one_block_takes(program: Path) -> None:
    x, weights = draw(2, 2500, 5, torch.bfloat16, 0)
    labels, before = labels_of(2, 2500, 7, 1), labels_of(2, 2500, 7, 2)
    for order in range(3):
        first = add(program, order, zeros(2, 5, 7), x, before, None, weights)
        then = add(program, order, first, x, labels, before, weights)
        for got, right in zip(then, reference_sums(x, labels, weights, 7), strict=True):
            assert_bits(got, right)


@few
@given(
    n=st.sampled_from([1, 33, 300]),
    d=st.sampled_from([1, 31, 130]),
    k=st.sampled_from([1, 2, 40]),
    dtype=dtypes,
    order=orders,
    seed=seeds,
)
def test_rows_that_moved_turn_the_sums_of_old_labels_into_those_of_new_ones(
    program: Path, n: int, d: int, k: int, dtype: torch.dtype, order: int, seed: int
) -> None:
    x, weights = draw(2, n, d, dtype, seed)
    labels, other = labels_of(2, n, k, seed), labels_of(2, n, k, seed + 1)
    moved = torch.rand(2, n, generator=generator(seed)) < 0.3
    before = torch.where(moved, other, labels)
    after = add(program, order, reference_sums(x, before, weights, k), x, labels, before, weights)
    for got, right in zip(after, reference_sums(x, labels, weights, k), strict=True):
        assert_bits(got, right)


@few
@given(
    b=st.integers(0, 3),
    n=st.sampled_from([0, 1, 300, 4097]),
    k=st.sampled_from([1, 7, 4096, 4097]),
    order=orders,
    seed=seeds,
)
def test_counts_are_the_reference_s(program: Path, b: int, n: int, k: int, order: int, seed: int) -> None:
    labels = labels_of(b, n, k, seed)
    _, weights = draw(b, n, 1, torch.float32, seed)
    found = run(program, "counts", order, torch.float32, [b, n, k], labels, weights)
    assert_bits(found.take(torch.int64, b, k), ops.counts(labels, weights, k))


@few
@given(
    b=st.integers(0, 3),
    k=st.sampled_from([1, 2, 33]),
    d=st.sampled_from([1, 5, 64]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    order=orders,
    seed=seeds,
)
def test_means_are_the_reference_s_and_the_shift_is_their_distance(
    program: Path, b: int, k: int, d: int, dtype: torch.dtype, order: int, seed: int
) -> None:
    x, weights = draw(b, 40, d, dtype, seed)
    total, _ = reference_sums(x, labels_of(b, 40, k, seed), weights, k)
    previous = torch.randn(b, k, d, generator=generator(seed)).to(dtype)
    found = run(program, "means", order, dtype, [b, k, d], total, previous)
    means, shift = ops.means(total, previous)
    assert_bits(found.take(dtype, b, k, d), means)
    torch.testing.assert_close(found.take(torch.float64, b), shift, rtol=1e-12, atol=0)


def whole(b: int, n: int, d: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Small whole numbers: every distance is exact in fp32."""
    return torch.randint(-4, 5, (b, n, d), generator=generator(seed)).to(dtype)


def squares(x: Tensor, centroids: Tensor) -> Tensor:
    return (x.double().unsqueeze(2) - centroids.double().unsqueeze(1)).square().sum(-1)


@few
@given(
    b=st.integers(0, 2),
    restarts=st.integers(1, 2),
    n=st.sampled_from([1, 255, 257]),
    d=st.sampled_from([0, 1, 31, 33, 70]),
    t=st.sampled_from([1, 4, 5, 9, 32]),
    dtype=dtypes,
    order=orders,
    seed=seeds,
)
def test_potentials_and_improvements_are_exact_on_whole_numbers(
    program: Path,
    b: int,
    restarts: int,
    n: int,
    d: int,
    t: int,
    dtype: torch.dtype,
    order: int,
    seed: int,
) -> None:
    e, wide, g = b * restarts, ops.accumulator(dtype), generator(seed)
    x = whole(b, n, d, dtype, seed)
    candidates = whole(e, t, d, wide, seed + 1)
    closest = torch.randint(0, 20 * d + 1, (e, n), generator=g).to(wide)
    weights = torch.randint(0, 3, (e, n), generator=g).double() / 2
    scale = 2.0 ** torch.randint(0, 9, (e,), generator=g).double()
    inputs = (x, candidates, closest, weights, scale)
    found = run(program, "potentials", order, dtype, [b, n, d, e, t], *inputs)
    exact = squares(x.repeat_interleave(restarts, 0), candidates)
    nearer = exact < closest.unsqueeze(-1)
    left = torch.where(nearer, exact, closest.unsqueeze(-1).double())
    expected = (left * weights.unsqueeze(-1) * scale.view(-1, 1, 1)).round().sum(1).to(torch.int64)
    assert_bits(found.take(torch.int64, e, t), expected)
    improves = found.take(torch.int32, e, n)
    assert torch.equal((improves.unsqueeze(-1) >> torch.arange(t, dtype=torch.int32)) & 1, nearer.int())


@few
@given(
    b=st.integers(0, 2),
    restarts=st.integers(1, 2),
    n=st.sampled_from([1, 255, 257]),
    d=st.sampled_from([0, 1, 33]),
    masked=st.booleans(),
    dtype=dtypes,
    order=orders,
    seed=seeds,
)
def test_the_closest_distance_is_lowered_where_it_may_be(
    program: Path,
    b: int,
    restarts: int,
    n: int,
    d: int,
    masked: bool,
    dtype: torch.dtype,
    order: int,
    seed: int,
) -> None:
    e, wide, g = b * restarts, ops.accumulator(dtype), generator(seed)
    x, centroid = whole(b, n, d, dtype, seed), whole(e, 1, d, wide, seed + 1)
    before = torch.randint(0, 20 * d + 1, (e, n), generator=g).to(wide)
    improves = torch.randint(-(2**31), 2**31, (e, n), generator=g, dtype=torch.int32)
    chosen = torch.randint(0, 32, (e,), generator=g)
    inputs = (before, x, centroid, *((improves, chosen) if masked else ()))
    found = run(program, "closest", order, dtype, [b, n, d, e, int(masked)], *inputs)
    exact = squares(x.repeat_interleave(restarts, 0), centroid)[..., 0].to(wide)
    looked_at = ((improves >> chosen.unsqueeze(1)) & 1 == 1) | (not masked)
    assert_bits(found.take(wide, e, n), torch.where(looked_at & (exact < before), exact, before))


@few
@given(
    b=st.integers(0, 2),
    restarts=st.integers(1, 2),
    n=st.sampled_from([1, 30, 1030]),
    d=st.sampled_from([1, 3]),
    dtype=dtypes,
    order=orders,
    seed=seeds,
)
def test_a_start_is_the_reference_s(
    program: Path, b: int, restarts: int, n: int, d: int, dtype: torch.dtype, order: int, seed: int
) -> None:
    e, k, t = b * restarts, min(n, 5), 3
    g = generator(seed)
    x = torch.randn(b, n, d, generator=g).to(dtype)
    weights = torch.rand(b, n, generator=g, dtype=torch.float64) * torch.randint(0, 2, (b, n), generator=g)
    weights[:, -1] = 1
    uniform = torch.rand(e, k * t, generator=g, dtype=torch.float64)
    found = run(program, "seed", order, dtype, [b, n, d, e, k, t], x, weights, uniform)
    assert_bits(found.take(torch.int64, e, k), seeding.seed(x, weights, uniform, k))


def test_the_first_row_fills_up_where_nothing_is_left_to_draw(program: Path) -> None:
    x = torch.tensor([[[1.0], [3.0], [1.0], [3.0]]])
    uniform = torch.rand(1, 8, generator=generator(0), dtype=torch.float64)
    found = run(program, "seed", 2, x.dtype, [1, 4, 1, 1, 4, 2], x, torch.ones(1, 4).double(), uniform)
    chosen = found.take(torch.int64, 1, 4)
    assert torch.equal(chosen, seeding.seed(x, torch.ones(1, 4).double(), uniform, 4))
    assert chosen[0, 2:].tolist() == [int(chosen[0, 0])] * 2


def assert_iterates(
    program: Path,
    order: int,
    x: Tensor,
    centroids: Tensor,
    weights: Tensor,
    iterations: int,
    cosine: bool,
    empty: str,
    seed: int,
) -> Tensor:
    (b, n, d), (e, k, _) = x.shape, centroids.shape
    grid = grid_of(x, weights)
    sizes = [b, n, d, e, k, iterations, int(cosine), int(empty == "split"), seed]
    found = run(program, "iterate", order, x.dtype, sizes, x, weights, grid, centroids)
    expected = iterate(x, centroids, weights, grid, iterations, cosine, empty, seed)
    assert_bits(found.take(torch.float32, e, k, d), expected[0])
    assert_bits(found.take(torch.int64, e, n), expected[1])
    assert_bits(found.take(torch.int64, e), expected[2])
    assert_bits(found.take(torch.int64, e), expected[3])
    return expected[2]


@few
@given(
    b=st.integers(0, 2),
    restarts=st.integers(1, 2),
    n=st.sampled_from([1, 15, 40, 150]),
    d=st.sampled_from([1, 7, 8, 16, 33]),
    k=st.sampled_from([1, 2, 9, 40]),
    iterations=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    empty=st.sampled_from(["split", "keep"]),
    weighted=st.booleans(),
    order=orders,
    seed=seeds,
)
def test_iterations_in_shared_memory_are_the_reference_s_bit_for_bit(
    program: Path,
    b: int,
    restarts: int,
    n: int,
    d: int,
    k: int,
    iterations: int,
    dtype: torch.dtype,
    empty: str,
    weighted: bool,
    order: int,
    seed: int,
) -> None:
    g = generator(seed)
    x = torch.randn(b, n, d, generator=g).to(dtype)
    weights = torch.ones(b, n, dtype=torch.float64)
    if weighted:
        weights = torch.rand(b, n, generator=g, dtype=torch.float64) * torch.randint(
            0, 3, (b, n), generator=g
        )
        weights[:, 0] = 1
    rows = torch.randint(0, n, (b * restarts, k), generator=g).unsqueeze(-1).expand(-1, -1, d)
    centroids = x.repeat_interleave(restarts, 0).gather(1, rows).float()
    assert_iterates(program, order, x, centroids, weights, iterations, False, empty, seed)


def test_iterations_split_empty_clusters_as_the_reference_does(program: Path) -> None:
    x = torch.randn(2, 60, 5, generator=generator(0))
    centroids = x[:, :1].repeat_interleave(2, 0).repeat(1, 12, 1)  # all equal: eleven of twelve are empty
    weights = torch.ones(2, 60, dtype=torch.float64)
    for order in range(3):
        repaired = assert_iterates(program, order, x, centroids, weights, 6, False, "split", 3)
        assert int(repaired.min()) > 5
    assert int(assert_iterates(program, 0, x, centroids, weights, 6, False, "keep", 3).max()) == 0


def test_of_equally_far_rows_the_first_decides_a_split(program: Path) -> None:
    x, centroids = torch.tensor([[[-1.0], [1.0], [0.0]]]), torch.zeros(1, 2, 1)
    for order in range(3):
        assert_iterates(program, order, x, centroids, torch.ones(1, 3).double(), 1, False, "split", 0)


def test_iterations_stop_early_with_the_result_of_all(program: Path) -> None:
    x = torch.tensor([[[0.0], [1.0], [10.0], [11.0]]])
    assert_iterates(program, 2, x, x[:, [0, 2]], torch.ones(1, 4).double(), 1000, False, "split", 0)


def test_rows_far_from_the_origin_find_their_centroid_by_the_direct_distance(program: Path) -> None:
    g = generator(1)
    x = torch.randn(1, 100, 8, generator=g) * 0.05 + 1000.0
    x = x + torch.randint(0, 4, (1, 100, 1), generator=g)
    assert_iterates(program, 1, x, x[:, :7], torch.ones(1, 100).double(), 5, False, "split", 0)


def test_a_row_with_nan_and_no_weight_changes_nothing(program: Path) -> None:
    x = torch.randn(1, 40, 4, generator=generator(2))
    weights = torch.ones(1, 40, dtype=torch.float64)
    x[0, 7, 2], weights[0, 7] = torch.nan, 0
    assert_iterates(program, 0, x, x[:, :5], weights, 4, False, "split", 0)


@few
@given(
    n=st.sampled_from([1, 40, 100]),
    d=st.sampled_from([1, 7, 33]),
    k=st.sampled_from([1, 3, 20]),
    empty=st.sampled_from(["split", "keep"]),
    order=orders,
    seed=seeds,
)
def test_iterations_on_the_sphere_agree_up_to_the_rounding_of_a_norm(
    program: Path, n: int, d: int, k: int, empty: str, order: int, seed: int
) -> None:
    g = generator(seed)
    x = ops.unit_rows(torch.randn(1, n, d, generator=g))
    centroids = x[:, torch.randint(0, n, (k,), generator=g)]
    weights = torch.ones(1, n, dtype=torch.float64)
    sizes = [1, n, d, 1, k, 2, 1, int(empty == "split"), seed]
    found = run(program, "iterate", order, x.dtype, sizes, x, weights, grid_of(x, weights), centroids)
    expected = iterate(x, centroids, weights, grid_of(x, weights), 2, True, empty, seed)
    torch.testing.assert_close(found.take(torch.float32, 1, k, d), expected[0], rtol=1e-6, atol=1e-6)
    assert_bits(found.take(torch.int64, 1, n), expected[1])


@few
@given(
    b=st.integers(0, 2),
    n=st.sampled_from([0, 1, 300]),
    k=st.sampled_from([1, 5, 40]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    last=st.booleans(),
    order=orders,
    seed=seeds,
)
def test_extreme_members_are_the_reference_s(
    program: Path, b: int, n: int, k: int, dtype: torch.dtype, last: bool, order: int, seed: int
) -> None:
    labels = labels_of(b, n, k, seed)
    _, weights = draw(b, n, 1, torch.float32, seed)
    score = torch.randint(-3, 4, (b, n), generator=generator(seed)).to(dtype) / 3
    sizes = [b, n, k, 1000, int(last)]
    found = run(program, "members", order, dtype, sizes, score, labels, weights)
    best = splitting.highest(score, labels, weights, k)
    assert_bits(found.take(dtype, b, k), best)
    assert_bits(found.take(torch.int64, b, k), splitting.places(score, labels, weights, best, 1000, last))


@few
@given(
    problems=st.integers(0, 2),
    restarts=st.integers(1, 2),
    k=st.sampled_from([1, 2, 40, 300]),
    d=st.sampled_from([1, 5, 40]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    offset=st.sampled_from([0.0, 1e6]),
    order=orders,
    seed=st.integers(0, 2**62),
)
def test_splits_are_the_reference_s_bit_for_bit(
    program: Path,
    problems: int,
    restarts: int,
    k: int,
    d: int,
    dtype: torch.dtype,
    offset: float,
    order: int,
    seed: int,
) -> None:
    e, g = problems * restarts, generator(seed % 2**31)
    means = (torch.randn(e, k, d, generator=g) + offset).to(dtype)
    equal = torch.randint(0, 3, (e, k, 1), generator=g) == 0
    farthest = torch.where(equal, means, (means + torch.randn(e, k, d, generator=g)).to(dtype))
    counts = torch.randint(0, 4, (e, k), generator=g)
    found = run(program, "split", order, dtype, [e, k, d, restarts, 7, seed], means, farthest, counts)
    centroids, child = splitting.split(means, farthest, counts, seed, restarts, 7)
    assert_bits(found.take(dtype, e, k, d), centroids)
    assert_bits(found.take(torch.int64, e, k), child)


def test_a_split_whose_step_is_lost_in_rounding_goes_the_whole_way(program: Path) -> None:
    means = torch.full((1, 2, 1), 1e6)
    farthest, counts = means + 0.0625, torch.tensor([[2, 0]])
    found = run(program, "split", 0, torch.float32, [1, 2, 1, 1, 0, 0], means, farthest, counts)
    assert found.take(torch.float32, 1, 2, 1).flatten().tolist() == [1e6, 1e6 + 0.0625]


def test_a_draw_at_the_upper_end_takes_the_last_row_that_has_a_weight(program: Path) -> None:
    x, weights = torch.arange(40.0).view(1, 40, 1), torch.rand(1, 40, generator=generator(0)).double()
    weights[0, 37:] = 0
    uniform = torch.full((1, 6), 1 - 2.0**-53, dtype=torch.float64)
    chosen = run(program, "seed", 0, x.dtype, [1, 40, 1, 1, 3, 2], x, weights, uniform).take(
        torch.int64, 1, 3
    )
    assert chosen[0, 0] == 36
    assert torch.equal(chosen, seeding.seed(x, weights, uniform, 3))
