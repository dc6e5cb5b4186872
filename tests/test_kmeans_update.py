"""The update of k-means: exact sums and what is made of them, on every instruction set that this CPU runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import DEVICES, assert_close, generator, odd_sizes, seeds, small_sizes
from torch import Tensor

from clustops import kmeans_rows as _registered  # noqa: F401
from clustops import native
from clustops.kmeans import kmeans
from clustops.kmeans_rows import Rows
from clustops.reference import kmeans_ops as reference

needs_extension = pytest.mark.skipif(native.extension is None, reason=f"no extension: {native.why_not}")
ops = torch.ops.clustops

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(FLOATING)
weightings = st.sampled_from(["none", "some", "one"])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(seed: int, b: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Magnitudes over seven decades, so that both grids of a sum are needed."""
    g = generator(seed)
    decade = torch.randint(-7, 1, (b, n, d), generator=g)
    return (torch.randn(b, n, d, generator=g, dtype=torch.float64) * 10.0**decade).to(dtype)


def labels_of(seed: int, b: int, n: int, k: int) -> Tensor:
    return torch.randint(-1, k, (b, n), generator=generator(seed))


def weights_of(kind: str, seed: int, b: int, n: int) -> Tensor:
    """One number for all rows, or one each with every third about 0."""
    if kind == "one":
        return torch.ones((), dtype=torch.float64).expand(b, n)
    g = generator(seed)
    some = torch.rand(b, n, generator=g, dtype=torch.float64)
    return some * (torch.rand(b, n, generator=g) < 0.7) if kind == "some" else some * 0


def grid_of(x: Tensor, weights: Tensor) -> Tensor:
    return reference.units(reference.bounds(x, weights), (weights > 0).sum(1))


def zeros(b: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(b, 2, k, d + 1, dtype=torch.float64), torch.zeros(b, k, dtype=torch.int64)


def summed(
    x: Tensor, labels: Tensor, weights: Tensor, k: int, grid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    sums, counts = zeros(x.shape[0], k, x.shape[2])
    grid = grid_of(x, weights) if grid is None else grid
    ops.kmeans_sums_(sums, counts, x, labels, weights, grid)
    return sums, counts


def summed_by_reference(x: Tensor, labels: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    sums, counts = zeros(x.shape[0], k, x.shape[2])
    reference.sums_(sums, counts, x, labels, weights, grid_of(x, weights))
    return sums, counts


def assert_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@needs_extension
@given(
    seed=seeds,
    b=st.integers(1, 3),
    n=odd_sizes,
    d=odd_sizes,
    k=small_sizes,
    dtype=dtypes,
    weighting=weightings,
)
@pytest.mark.usefixtures("instruction_set")
def test_sums_and_bounds_are_the_reference_s_bit_for_bit(
    seed: int, b: int, n: int, d: int, k: int, dtype: torch.dtype, weighting: str
) -> None:
    x, labels = rows_of(seed, b, n, d, dtype), labels_of(seed, b, n, k)
    weights = weights_of(weighting, seed, b, n)
    assert_bits((ops.kmeans_bounds(x, weights),), (reference.bounds(x, weights),))
    assert_bits(summed(x, labels, weights, k), summed_by_reference(x, labels, weights, k))


@needs_extension
@given(seed=seeds, n=odd_sizes, d=odd_sizes, k=small_sizes, dtype=dtypes, weighting=weightings)
@pytest.mark.usefixtures("instruction_set")
def test_rows_that_moved_turn_old_sums_into_new_ones(
    seed: int, n: int, d: int, k: int, dtype: torch.dtype, weighting: str
) -> None:
    x, weights = rows_of(seed, 2, n, d, dtype), weights_of(weighting, seed, 2, n)
    before, labels = labels_of(seed, 2, n, k), labels_of(seed + 1, 2, n, k)
    labels = torch.where(torch.rand(2, n, generator=generator(seed)) < 0.5, labels, before)
    for step in (ops.kmeans_sums_, reference.sums_):
        sums, counts = summed(x, before, weights, k)
        step(sums, counts, x, labels, weights, grid_of(x, weights), before)
        assert_bits((sums, counts), summed_by_reference(x, labels, weights, k))


@needs_extension
@given(
    seed=seeds, exponent=st.sampled_from([-1060, -1000, -400, 400, 1000, 1020]), n=st.sampled_from([1, 2, 40])
)
@pytest.mark.usefixtures("instruction_set")
def test_sums_are_exact_at_the_ends_of_the_range(seed: int, exponent: int, n: int) -> None:
    x = torch.ldexp(torch.randn(1, n, 19, generator=generator(seed)).double() / 8, torch.tensor(exponent))
    labels, weights = labels_of(seed, 1, n, 3), weights_of("one", seed, 1, n)
    assert_bits(summed(x, labels, weights, 3), summed_by_reference(x, labels, weights, 3))


@needs_extension
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "shifted", "batch slice"])
@pytest.mark.parametrize("dtype", FLOATING)
def test_any_layout_gives_the_same_sums(layout: str, dtype: torch.dtype) -> None:
    dense = rows_of(0, 2, 37, 24, dtype)
    x = {
        "transposed": dense.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": torch.cat([dense, dense], dim=-1)[..., :24],
        "expanded": dense[:, :1].expand(2, 37, 24),
        "shifted": torch.cat([dense.new_zeros(1), dense.flatten()])[1:].view_as(dense),
        "batch slice": torch.stack([dense, dense], dim=1)[:, 1],
    }[layout]
    labels = torch.stack([labels_of(1, 2, 37, 5), labels_of(2, 2, 37, 5)], dim=-1)[..., 0]
    weights = torch.rand(37, 2, generator=generator(3), dtype=torch.float64).T
    before = x.clone()
    assert_bits(summed(x, labels, weights, 5), summed_by_reference(before, labels, weights, 5))
    assert_bits((ops.kmeans_bounds(x, weights),), (reference.bounds(before, weights),))
    assert_bits((ops.kmeans_counts(labels, weights, 5),), (reference.counts(labels, weights, 5),))
    assert torch.equal(x, before)


@needs_extension
@pytest.mark.parametrize(("b", "n", "d", "k"), [(1, 3000, 200, 40), (1, 3000, 5, 2), (3, 2100, 70, 9)])
@pytest.mark.usefixtures("threads", "instruction_set")
def test_bits_do_not_depend_on_threads(b: int, n: int, d: int, k: int) -> None:
    x, labels, before = rows_of(0, b, n, d), labels_of(0, b, n, k), labels_of(1, b, n, k)
    weights = weights_of("some", 0, b, n)
    found = []
    for count in (1, 2, 5, 16):
        torch.set_num_threads(count)
        sums, counts = summed(x, before, weights, k)
        ops.kmeans_sums_(sums, counts, x, labels, weights, grid_of(x, weights), before)
        means = ops.kmeans_means(sums, x[:, :k].contiguous())
        found.append(
            (ops.kmeans_bounds(x, weights), sums, counts, *means, ops.kmeans_counts(labels, weights, k))
        )
    assert_bits(found[0][1:3], summed_by_reference(x, labels, weights, k))
    for other in found[1:]:
        assert_bits(other, found[0])


@needs_extension
@given(seed=seeds, b=st.integers(0, 3), k=odd_sizes, d=odd_sizes, double=st.booleans())
@pytest.mark.usefixtures("instruction_set")
def test_means_are_the_reference_s_and_the_shift_is_their_distance(
    seed: int, b: int, k: int, d: int, double: bool
) -> None:
    dtype = torch.float64 if double else torch.float32
    x = rows_of(seed, b, 40, d, dtype)
    sums, _ = summed(x, labels_of(seed, b, 40, k), weights_of("some", seed, b, 40), k)
    previous = rows_of(seed + 1, b, k, d, dtype)
    means, shift = ops.kmeans_means(sums, previous)
    expected, exact = reference.means(sums, previous)
    assert_bits((means,), (expected,))
    torch.testing.assert_close(shift, exact, rtol=1e-12, atol=0)
    assert torch.equal(ops.kmeans_means(sums, means)[1], torch.zeros(b, dtype=torch.float64))


@needs_extension
@given(seed=seeds, b=st.integers(0, 3), n=odd_sizes, k=small_sizes, weighting=weightings)
@pytest.mark.usefixtures("instruction_set")
def test_counts_are_of_rows_with_a_weight(seed: int, b: int, n: int, k: int, weighting: str) -> None:
    labels, weights = labels_of(seed, b, n, k), weights_of(weighting, seed, b, n)
    assert_bits((ops.kmeans_counts(labels, weights, k),), (reference.counts(labels, weights, k),))


@needs_extension
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("b", "n", "d", "k"), [(0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 0, 2), (2, 3, 2, 1)])
@pytest.mark.parametrize("weighting", ["one", "some"])
def test_empty_sizes(b: int, n: int, d: int, k: int, weighting: str) -> None:
    x, labels, weights = rows_of(0, b, n, d), labels_of(0, b, n, k), weights_of(weighting, 0, b, n)
    if n > 0:
        assert_bits((ops.kmeans_bounds(x, weights),), (reference.bounds(x, weights),))
    grid = torch.ones(b, 2, d + 1, dtype=torch.float64) if n == 0 else grid_of(x, weights)
    sums, counts = summed(x, labels, weights, k, grid)
    if n == 0:
        assert not sums.any()
        assert not counts.any()
    means, shift = ops.kmeans_means(sums, torch.ones(b, k, d))
    assert means.shape == (b, k, d)
    assert shift.shape == (b,)
    assert ops.kmeans_counts(labels, weights, k).shape == (b, k)


@needs_extension
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("weighting", ["one", "some"])
def test_bounds_show_nan_and_infinity_only_of_rows_with_a_weight(dtype: torch.dtype, weighting: str) -> None:
    x = rows_of(0, 1, 40, 3, dtype)
    x[0, 3, 0], x[0, 4, 1], x[0, 5, 2] = torch.nan, -torch.inf, torch.nan
    weights = weights_of(weighting, 0, 1, 40).clone()
    weights[0, 3:5], weights[0, 5] = 1, weighting == "one"
    if weighting == "one":
        weights = torch.ones((), dtype=torch.float64).expand(1, 40)
    found = ops.kmeans_bounds(x, weights)
    assert_bits((found,), (reference.bounds(x, weights),))
    assert bool(found[0, 0].isnan())
    assert float(found[0, 1]) == torch.inf
    assert bool(found[0, 2].isnan()) == (weighting == "one")


@needs_extension
def test_more_than_2_to_the_24_rows_in_one_cluster() -> None:
    n = 2**24 + 1
    x = torch.ones(()).expand(1, n, 1)
    labels = torch.zeros((), dtype=torch.int64).expand(1, n)
    sums, counts = summed(
        x, labels, torch.ones((), dtype=torch.float64).expand(1, n), 1, torch.ones(1, 2, 2).double()
    )
    assert int(counts) == n
    assert sums[0, 0, 0].tolist() == [n, n]


@needs_extension
def test_rows_more_than_2_to_the_31_elements_apart() -> None:
    memory = torch.empty(2**31 // 2 * 2 + 64, dtype=torch.bfloat16)  # never touched, so never there
    x = memory.as_strided((1, 3, 8), (0, 2**30, 1))
    x.copy_(rows_of(0, 1, 3, 8, torch.bfloat16))
    labels, weights = torch.tensor([[0, 1, 0]]), weights_of("one", 0, 1, 3)
    assert_bits(summed(x, labels, weights, 2), summed_by_reference(x.contiguous(), labels, weights, 2))
    assert_bits((ops.kmeans_bounds(x, weights),), (reference.bounds(x.contiguous(), weights),))


@given(seed=seeds, weighting=st.sampled_from(["some", "one"]))
def test_a_total_is_the_same_for_any_cut(seed: int, weighting: str) -> None:
    values, weights = rows_of(seed, 2, 61, 1)[..., 0].abs(), weights_of(weighting, seed, 2, 61)
    rows = Rows(torch.zeros(2, 61, 1), weights, None)
    total = rows.total(values)
    order = torch.randperm(61, generator=generator(seed))
    assert torch.equal(Rows(torch.zeros(2, 61, 1), weights[:, order], None).total(values[:, order]), total)
    assert_close(total, (values.double() * weights).sum(1), torch.float64)


def test_iterations_that_would_repeat_are_reported_all_the_same() -> None:
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    seen: list[tuple[int, float, float]] = []
    result = kmeans(
        x,
        2,
        init=torch.tensor([[0.0], [11.0]]),
        tol=0,
        max_iter=9,
        callback=lambda p: seen.append((p.iteration, float(p.inertia), float(p.shift))),
    )
    assert seen == [(0, 2.0, 0.5)] + [(i, 1.0, 0.0) for i in range(1, 9)]
    assert int(result.n_iter) == 9
    assert bool(result.converged)


def samples(device: str) -> dict[str, tuple[Tensor | int | None, ...]]:
    x, labels, before = (
        t.to(device) for t in (rows_of(0, 2, 9, 3), labels_of(0, 2, 9, 4), labels_of(1, 2, 9, 4))
    )
    weights = torch.ones((), dtype=torch.float64, device=device).expand(2, 9)
    sums, counts = (t.to(device) for t in zeros(2, 4, 3))
    return {
        "kmeans_bounds": (x, weights),
        "kmeans_sums_": (sums, counts, x, labels, weights, grid_of(x, weights), before),
        "kmeans_means": (sums + 1, x[:, :4]),
        "kmeans_counts": (labels, weights, 4),
        "cluster_means": (x, labels, weights, 4),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", samples("cpu"))
def test_registration_passes_opcheck(name: str, device: str) -> None:
    torch.library.opcheck(getattr(ops, name).default, samples(device)[name])


@needs_extension
def test_a_mistake_behind_the_checks_is_an_exception() -> None:
    view, kernel = native.view, native.extension.kmeans_sums
    x, labels, weights = rows_of(0, 1, 4, 3), labels_of(0, 1, 4, 2), weights_of("some", 0, 1, 4)
    sums, counts = zeros(1, 2, 3)
    good = {
        "sums": sums,
        "counts": counts,
        "x": x,
        "labels": labels,
        "weights": weights,
        "grid": grid_of(x, weights),
    }
    bad = {
        "sums": sums[..., :3],
        "counts": counts.int(),
        "x": x[0],
        "labels": labels[:, :3],
        "weights": weights.float(),
        "grid": torch.ones(1, 2, 3, dtype=torch.float64),
    }
    kernel(*(view(t) for t in good.values()), None, 1)
    for name, tensor in bad.items():
        with pytest.raises(ValueError, match=name):
            kernel(*(view(t) for t in {**good, name: tensor}.values()), None, 1)
