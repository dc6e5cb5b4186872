"""The CUDA kernels of the k-means assignment on the CPU, thread by thread (native/simt.h), under the address
and undefined-behaviour sanitizers, in three orders of the threads of a block; tensor cores have twins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import DTYPES, Results, build, needs_compiler
from support import generator, seeds
from torch import Tensor

from clustops.reference.kmeans_ops import accumulator, assign_l2

PRECISIONS = {"medium": 0, "high": 1, "highest": 2}
ROOM = 160 << 10  # of shared memory: the rows of a unit stay there
LITTLE = 70 << 10  # not with two parts and more than one chunk of features
HOPPER = 227 << 10

pytestmark = needs_compiler
orders = st.integers(0, 2)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kernels = (f"kmeans{part}.cu" for part in ("", "_pack", "_score", "_score_sm90"))
    return build(tmp_path_factory.mktemp("simt"), "kmeans_cuda", "../common/kmeans_cuda.cpp", *kernels)


def assign(
    program: Path,
    x: Tensor,
    centroids: Tensor,
    order: int,
    top: int = 1,
    precision: str = "highest",
    padding: int = 0,
    shared: int = ROOM,
    hopper: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, distances, and how many rows of each problem were too close to call."""
    b, n, d = x.shape
    stride = d + padding
    shape = [b, n, centroids.shape[1], d, top]
    sizes = [*shape, DTYPES[x.dtype], PRECISIONS[precision], stride, order, shared, int(hopper)]
    rows = torch.cat([x, x.new_full((b, n, padding), torch.nan)], -1)
    found = Results(program, [], sizes, rows, centroids)
    labels, distances = found.take(torch.int64, b, n, top), found.take(accumulator(x.dtype), b, n, top)
    return labels, distances, found.take(torch.int32, len(found.left) // 4)


def draw(
    b: int, n: int, k: int, d: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    x, centroids = torch.randn(b, n, d, generator=g), torch.randn(b, k, d, generator=g)
    return x.to(dtype), centroids.to(accumulator(dtype))


def squared(x: Tensor, centroids: Tensor) -> Tensor:
    return (x.double().unsqueeze(2) - centroids.double().unsqueeze(1)).square().sum(-1)


def check(x: Tensor, centroids: Tensor, labels: Tensor, distances: Tensor, slack: float = 2e-6) -> None:
    exact = squared(x, centroids)
    chosen = exact.gather(-1, labels)
    torch.testing.assert_close(chosen, exact.min(-1, keepdim=True).values, rtol=slack, atol=1e-30)
    torch.testing.assert_close(distances.double(), chosen, rtol=1e-5, atol=1e-30)


shapes = {
    "b": st.sampled_from([1, 2, 5]),
    "n": st.sampled_from([1, 7, 33, 129, 140]),
    "k": st.sampled_from([1, 2, 63, 65, 129, 200]),
    "d": st.sampled_from([1, 7, 8, 16, 31, 64, 65, 130]),
}


@settings(max_examples=10)
@given(
    **shapes,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    padding=st.sampled_from([0, 1, 4, 8]),
    order=orders,
    shared=st.sampled_from([ROOM, LITTLE]),
    seed=seeds,
)
def test_labels_are_the_fp64_argmin(
    program: Path,
    b: int,
    n: int,
    k: int,
    d: int,
    dtype: torch.dtype,
    padding: int,
    order: int,
    shared: int,
    seed: int,
) -> None:
    x, centroids = draw(b, n, k, d, seed, dtype)
    labels, distances, _ = assign(program, x, centroids, order, padding=padding, shared=shared)
    check(x, centroids, labels, distances, 1e-5)


@settings(max_examples=6)
@given(
    b=st.sampled_from([1, 3]),
    n=st.sampled_from([1, 30, 130]),
    k=st.sampled_from([257, 300]),
    d=st.sampled_from([40, 64, 130]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    precision=st.sampled_from(list(PRECISIONS)),
    order=orders,
    seed=seeds,
)
def test_hopper_gives_the_same_labels(
    program: Path, b: int, n: int, k: int, d: int, dtype: torch.dtype, precision: str, order: int, seed: int
) -> None:
    x, centroids = draw(b, n, k, d, seed, dtype)
    found = assign(program, x, centroids, order, precision=precision, shared=HOPPER, hopper=True)
    others = assign(program, x, centroids, 0, precision=precision)
    # Instructions of one depth add the same products: the twins round alike, the GPUs may not.
    assert torch.equal(found[0], others[0])
    assert torch.equal(found[1], others[1])


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize(
    "apart", [1, 2, 8, 64, 128]
)  # in one thread, in two, in one again, in two warps, in two tiles
def test_every_row_with_a_tie_is_decided_by_distances(program: Path, apart: int, hopper: bool) -> None:
    noise, centroids = draw(1, 70, 384, 64, 0)
    centroids[:, apart : 2 * apart] = centroids[:, :apart]
    own = torch.arange(70) % apart
    x = centroids[:, own] + 0.01 * noise
    labels, _, close = assign(program, x, centroids, apart % 3, shared=HOPPER, hopper=hopper)
    assert torch.equal(labels[0, :, 0], own)
    assert int(close) == 70


def test_hopper_decides_scores_that_cancel(program: Path) -> None:
    g = generator(0)
    x, centroids = (
        0.05 * torch.randn(1, rows, 40, generator=g) + 1e4 * torch.randint(-1, 2, (1, rows, 1), generator=g)
        for rows in (140, 260)
    )
    x[0, 5, 1] = torch.nan
    clean = [i for i in range(140) if i != 5]
    labels, distances, close = assign(program, x, centroids, 2, shared=HOPPER, hopper=True)
    check(x[:, clean], centroids, labels[:, clean], distances[:, clean], 2e-5)
    assert int(labels[0, 5, 0]) == 0
    assert bool(distances[0, 5, 0].isnan())
    assert int(close) > 1


def shifted_by_samples(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """x and centroids less the mean of the centroids that the kernel takes for it."""
    k = centroids.shape[1]
    samples = min(k, 32)
    mean = centroids[:, [i * k // samples for i in range(samples)]].mean(1, keepdim=True)
    return x.float() - mean, centroids - mean


@settings(max_examples=8)
@given(**shapes, order=orders, shared=st.sampled_from([ROOM, LITTLE]), seed=seeds)
def test_medium_multiplies_bf16_exactly(
    program: Path, b: int, n: int, k: int, d: int, order: int, shared: int, seed: int
) -> None:
    x, centroids = draw(b, n, k, d, seed)
    labels, distances, _ = assign(program, x, centroids, order, precision="medium", shared=shared)
    rows, centres = shifted_by_samples(x, centroids)
    products = rows.bfloat16().double() @ centres.bfloat16().double().transpose(1, 2)
    score = products - centres.double().square().sum(-1).unsqueeze(1) / 2
    chosen, best = score.gather(-1, labels), score.max(-1, keepdim=True).values
    size = rows.double().norm(dim=-1, keepdim=True) * centres.double().norm(dim=-1).amax(-1).view(b, 1, 1)
    # The mean may differ in its last bit, and so an operand by a bf16 unit, here and there.
    missing = (best - chosen) / size.clamp_min(1e-12)
    assert missing.numel() == 0 or float(missing.max()) < 1e-2
    assert int((missing > 1e-3).sum()) <= 1 + missing.numel() // 50
    exact = squared(x, centroids).gather(-1, labels)
    torch.testing.assert_close(distances.double(), exact, rtol=1e-5, atol=1e-30)


@settings(max_examples=6)
@given(**shapes, order=orders, seed=seeds)
def test_high_is_as_good_as_tf32(
    program: Path, b: int, n: int, k: int, d: int, order: int, seed: int
) -> None:
    x, centroids = draw(b, n, k, d, seed)
    labels, _, _ = assign(program, x, centroids, order, precision="high")
    exact = squared(x, centroids)
    rows, centres = shifted_by_samples(x, centroids)
    size = rows.double().norm(dim=-1, keepdim=True) * centres.double().norm(dim=-1).amax(-1).view(b, 1, 1)
    assert bool((exact.gather(-1, labels) - exact.min(-1, keepdim=True).values <= 1e-4 * size + 1e-12).all())


@settings(max_examples=6)
@given(
    n=st.sampled_from([40, 130]),
    d=st.sampled_from([4, 17]),
    apart=st.sampled_from([1e2, 1e4]),
    order=orders,
    seed=seeds,
)
def test_scores_that_cancel_are_decided_by_distances(
    program: Path, n: int, d: int, apart: float, order: int, seed: int
) -> None:
    g = generator(seed)

    def groups(rows: int) -> Tensor:
        return 0.05 * torch.randn(2, rows, d, generator=g) + apart * torch.randint(
            -1, 2, (2, rows, 1), generator=g
        )

    x, centroids = groups(n), groups(70)
    labels, distances, close = assign(program, x, centroids, order)
    check(x, centroids, labels, distances, 2e-5)
    assert bool((close > 0).all())


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_few_rows_far_from_the_origin_are_too_close_to_call(program: Path, offset: float) -> None:
    x, centroids = draw(1, 140, 90, 20, 0)
    x, centroids = x + offset, centroids + offset
    labels, distances, close = assign(program, x, centroids, 0)
    check(x, centroids, labels, distances, 1e-5)
    assert int(close) < 7


def integers(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=g).float()


@settings(max_examples=6)
@given(
    n=st.sampled_from([9, 130]),
    k=st.sampled_from([3, 70, 140]),
    d=st.sampled_from([1, 3]),
    order=orders,
    offset=st.sampled_from([0, 1000]),
    seed=seeds,
)
def test_ties_go_to_the_lowest_index(
    program: Path, n: int, k: int, d: int, order: int, offset: int, seed: int
) -> None:
    g = generator(seed)
    x, centroids = integers(g, 1, n, d) + offset, integers(g, 1, k, d) + offset
    exact = squared(x, centroids)
    labels, distances, _ = assign(program, x, centroids, order)
    assert torch.equal(labels[..., 0], exact.argmin(-1))
    assert torch.equal(distances[..., 0].double(), exact.min(-1).values)


@settings(max_examples=6)
@given(copies=st.sampled_from([1, 5]), d=st.sampled_from([1, 3]), order=orders, seed=seeds)
def test_ties_in_bf16_go_to_the_lowest_index(
    program: Path, copies: int, d: int, order: int, seed: int
) -> None:
    g = generator(seed)
    half = integers(g, 1, 16, d)
    x, centroids = integers(g, 1, 130, d), torch.cat([half, -half], 1).repeat(1, copies, 1)
    labels, _, _ = assign(program, x, centroids, order, precision="medium")  # exact if the mean is 0
    assert shifted_by_samples(x, centroids)[1].equal(centroids)
    assert torch.equal(labels[..., 0], squared(x, centroids).argmin(-1))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_with_nan_or_infinity_gets_a_label_in_range(program: Path, precision: str) -> None:
    x, centroids = draw(1, 20, 60, 5, 0)
    broken = [3, 9, 11, 12]
    x[0, 3, 2], x[0, 9, 0], x[0, 11], x[0, 12] = torch.nan, torch.inf, 3e38, torch.nan
    labels, distances, _ = assign(program, x, centroids, 2, precision=precision)
    assert bool(((labels >= 0) & (labels < 60)).all())
    assert not bool(distances[0, broken, 0].isfinite().any())
    clean = [i for i in range(20) if i not in broken]
    assert torch.equal(labels[:, clean], assign(program, x[:, clean], centroids, 0, precision=precision)[0])
    if precision == "highest":
        assert torch.equal(labels[0, broken, 0], torch.zeros(4, dtype=torch.int64))
        assert bool(distances[0, [3, 12], 0].isnan().all())


@settings(max_examples=12)
@given(
    b=st.integers(1, 2),
    n=st.sampled_from([1, 63, 65]),
    k=st.sampled_from([1, 5, 64, 130]),
    d=st.sampled_from([0, 1, 15, 33]),
    top=st.sampled_from([1, 2, 5, 40]),
    dtype=st.sampled_from(list(DTYPES)),
    order=orders,
    seed=seeds,
)
def test_the_nearest_few_are_those_of_the_reference(
    program: Path, b: int, n: int, k: int, d: int, top: int, dtype: torch.dtype, order: int, seed: int
) -> None:
    g = generator(seed)
    x = torch.randint(-9, 10, (b, n, d), generator=g).to(dtype)
    centroids = torch.randint(-9, 10, (b, k, d), generator=g).to(accumulator(dtype))
    if n > 5 and d > 1:
        x[0, 4, 0] = torch.nan
    top = min(top, k)
    labels, distances, _ = assign(program, x, centroids, order, top=top)
    exact = squared(x, centroids)
    ranked = exact.where(~exact.isnan(), torch.inf)
    expected = torch.sort(ranked, dim=-1, stable=True).indices[..., :top]
    assert torch.equal(labels, expected)
    torch.testing.assert_close(distances.double(), exact.gather(-1, expected), rtol=0, atol=0, equal_nan=True)


def test_fp64_is_compared_in_fp64(program: Path) -> None:
    x, centroids = draw(1, 70, 66, 9, 0, torch.float64)
    centroids = torch.cat([centroids, centroids + 1e-9], 1)
    labels, distances, _ = assign(program, x, centroids, 1)
    assert torch.equal(labels, assign_l2(x, centroids, 1)[0])
    torch.testing.assert_close(distances, squared(x, centroids).gather(-1, labels), rtol=1e-13, atol=0)


def test_a_label_depends_on_its_row_alone(program: Path) -> None:
    x, centroids = draw(1, 150, 70, 65, 0)
    centroids[:, 35:] = centroids[:, :35] + 1e-6
    whole, distances, close = assign(program, x, centroids, 0)
    assert int(close) > 0
    for rows in (slice(0, 1), slice(40, 140)):
        labels, parts, _ = assign(program, x[:, rows], centroids, 1, shared=LITTLE)
        assert torch.equal(labels, whole[:, rows])
        assert torch.equal(parts, distances[:, rows])
