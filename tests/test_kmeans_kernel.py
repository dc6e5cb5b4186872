"""The compiled k-means assignment against fp64, on every instruction set that this CPU runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import DEVICES, generator, odd_sizes, seeds, small_sizes
from torch import Tensor

from clustops import native
from clustops.native import kmeans as _registered  # noqa: F401
from clustops.reference.kmeans_ops import assign_l2

needs_extension = pytest.mark.skipif(native.extension is None, reason=f"no extension: {native.why_not}")
assign = torch.ops.clustops.kmeans_assign


def check_against_fp64(x: Tensor, centroids: Tensor) -> None:
    """Each label is an fp64 argmin up to a tie below fp32 resolution; each distance is that of its label."""
    labels, distances = assign(x, centroids, 1)
    exact = (x.double().cpu().unsqueeze(2) - centroids.double().cpu().unsqueeze(1)).square().sum(-1)
    chosen = exact.gather(-1, labels.cpu())
    torch.testing.assert_close(chosen, exact.min(-1, keepdim=True).values, rtol=2e-5, atol=1e-30)
    torch.testing.assert_close(distances.double().cpu(), chosen, rtol=2e-5, atol=1e-30)


@needs_extension
@given(b=st.sampled_from([1, 2, 3]), n=odd_sizes, k=odd_sizes, d=odd_sizes, seed=seeds)
@pytest.mark.usefixtures("instruction_set")
def test_labels_are_the_fp64_argmin(b: int, n: int, k: int, d: int, seed: int) -> None:
    g = generator(seed)
    check_against_fp64(torch.randn(b, n, d, generator=g), torch.randn(b, k, d, generator=g))


@needs_extension
@given(n=small_sizes, k=odd_sizes, d=small_sizes, seed=seeds, offset=st.sampled_from([1e2, 1e4]))
@pytest.mark.usefixtures("instruction_set")
def test_labels_are_right_far_from_the_origin(n: int, k: int, d: int, seed: int, offset: float) -> None:
    g = generator(seed)
    check_against_fp64(torch.randn(1, n, d, generator=g) + offset, torch.randn(1, k, d, generator=g) + offset)


@needs_extension
@given(n=odd_sizes, k=odd_sizes, d=small_sizes, seed=seeds, apart=st.sampled_from([1e1, 1e3, 1e5]))
@pytest.mark.usefixtures("instruction_set")
def test_labels_are_right_in_tight_groups_far_apart(n: int, k: int, d: int, seed: int, apart: float) -> None:
    g = generator(seed)

    def draw(rows: int) -> Tensor:
        group = torch.randint(-1, 2, (1, rows, 1), generator=g)
        return 0.05 * torch.randn(1, rows, d, generator=g) + apart * group

    check_against_fp64(draw(n), draw(k))


def decaying(rows: int, d: int, generator: torch.Generator) -> Tensor:
    """A few directions carry nearly everything, as in images."""
    scale = 8.0 ** -torch.arange(d).double()
    x = torch.randn(1, rows, d, generator=generator, dtype=torch.float64) * scale.clamp(min=1e-3)
    turn, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(d)).double())
    return x @ turn


def grouped(rows: int, d: int, generator: torch.Generator) -> Tensor:
    """Tight groups far apart."""
    group = torch.randint(-1, 2, (1, rows, 1), generator=generator)
    return 1e-4 * torch.randn(1, rows, d, generator=generator).double() + group


def gaussian(rows: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.randn(1, rows, d, generator=generator).double()


@needs_extension
@settings(max_examples=40)
@example(n=5, k=17, d=16, seed=0, draw=gaussian, scale=3e17, dtype=torch.float32)  # squares nearly overflow
@given(
    n=odd_sizes,
    k=st.sampled_from([1, 4, 5, 16, 17, 63, 130, 300]),
    d=st.sampled_from([1, 3, 16, 20, 32, 33, 70, 257]),
    seed=seeds,
    draw=st.sampled_from([decaying, grouped, gaussian]),
    scale=st.sampled_from([1.0, 1e-15, 1e-25, 1e15, 3e17]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
@pytest.mark.usefixtures("instruction_set")
def test_the_label_is_the_argmin_of_direct_distances_bit_for_bit(
    n: int,
    k: int,
    d: int,
    seed: int,
    draw: Callable[[int, int, torch.Generator], Tensor],
    scale: float,
    dtype: torch.dtype,
) -> None:
    g = generator(seed)
    scale = 1.0 if dtype == torch.float16 else scale
    x, centroids = (draw(n, d, g) * scale).to(dtype), (draw(k, d, g) * scale).to(dtype)
    nearest, distances = assign(x, centroids, 1)
    ranked, sorted_distances = assign(x, centroids, k)
    assert torch.equal(nearest, ranked[..., :1])
    assert torch.equal(distances, sorted_distances[..., :1])


@needs_extension
@pytest.mark.usefixtures("instruction_set")
def test_thousands_of_centroids_in_images_of_few_directions() -> None:
    g = generator(0)
    x, centroids = decaying(300, 24, g).float(), decaying(2100, 24, g).float()
    nearest, distances = assign(x, centroids, 1)
    ranked, sorted_distances = assign(x, centroids, 2)
    assert torch.equal(nearest, ranked[..., :1])
    assert torch.equal(distances, sorted_distances[..., :1])
    check_against_fp64(x, centroids)


@needs_extension
@given(n=small_sizes, k=odd_sizes, d=small_sizes, seed=seeds)
@pytest.mark.usefixtures("instruction_set")
def test_float64_rows_tell_centroids_apart_that_float32_cannot(n: int, k: int, d: int, seed: int) -> None:
    g = generator(seed)
    centroids = 1 + 1e-11 * torch.randn(1, k, d, generator=g).double()
    x = 1 + 1e-11 * torch.randn(1, n, d, generator=g).double()
    exact = (x.unsqueeze(2) - centroids.unsqueeze(1)).square().sum(-1)
    labels, distances = assign(x, centroids, 1)
    torch.testing.assert_close(
        exact.gather(-1, labels), exact.min(-1, keepdim=True).values, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(distances, exact.min(-1, keepdim=True).values, rtol=1e-12, atol=0)


@needs_extension
@given(n=small_sizes, k=odd_sizes, d=odd_sizes, seed=seeds, top=st.integers(1, 9), half=st.booleans())
@pytest.mark.usefixtures("instruction_set")
def test_the_few_nearest_equal_the_reference(n: int, k: int, d: int, seed: int, top: int, half: bool) -> None:
    g = generator(seed)
    top = min(top, k)
    x, centroids = torch.randint(-3, 4, (2, n, d), generator=g), torch.randint(-3, 4, (2, k, d), generator=g)
    x, centroids = (t.to(torch.bfloat16 if half else torch.float32) for t in (x, centroids))
    if n > 1:
        x[0, 1] = torch.nan
    labels, distances = assign(x, centroids, top)
    expected, squares = assign_l2(x, centroids, top)
    assert torch.equal(labels, expected)
    torch.testing.assert_close(distances, squares, equal_nan=True, rtol=1e-5, atol=0)


@needs_extension
@given(n=small_sizes, k=odd_sizes, d=small_sizes, copies=st.integers(2, 4), seed=seeds)
@pytest.mark.usefixtures("instruction_set")
def test_ties_go_to_the_lowest_index(n: int, k: int, d: int, copies: int, seed: int) -> None:
    g = generator(seed)
    x, centroids = torch.randn(1, n, d, generator=g), torch.randn(1, k, d, generator=g)
    order = torch.randperm(k * copies, generator=g)
    many = centroids.repeat(1, copies, 1)[:, order]
    labels, _ = assign(x, many, 1)
    first = (many.unsqueeze(1) == many.gather(1, labels.expand(-1, -1, d)).unsqueeze(2)).all(-1)
    assert torch.equal(labels[..., 0], first.int().argmax(-1))


@needs_extension
@given(n=odd_sizes, k=odd_sizes, d=small_sizes, seed=seeds, offset=st.sampled_from([0, 1000]))
@pytest.mark.usefixtures("instruction_set")
def test_equal_distances_between_integers_go_to_the_lowest_index(
    n: int, k: int, d: int, seed: int, offset: int
) -> None:
    g = generator(seed)
    x = (torch.randint(-4, 5, (1, n, d), generator=g) + offset).float()
    centroids = (torch.randint(-4, 5, (1, k, d), generator=g) + offset).float()
    exact = (x.unsqueeze(2) - centroids.unsqueeze(1)).square().sum(-1)
    labels, distances = assign(x, centroids, 1)
    assert torch.equal(labels[..., 0], exact.argmin(-1))
    assert torch.equal(distances[..., 0], exact.min(-1).values)


@needs_extension
@pytest.mark.usefixtures("instruction_set")
def test_labels_do_not_depend_on_threads_or_other_rows() -> None:
    x, centroids = torch.randn(2, 1500, 19), torch.randn(2, 70, 19)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(assign(x, centroids, 1))
        torch.set_num_threads(1)
        pieces = [assign(x[:, i : i + 101], centroids, 1) for i in range(0, 1500, 101)]
    finally:
        torch.set_num_threads(before)
    results.append(tuple(torch.cat(part, 1) for part in zip(*pieces, strict=True)))
    for labels, distances in results[1:]:
        assert torch.equal(labels, results[0][0])
        assert torch.equal(distances, results[0][1])


@needs_extension
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("b", "n", "k", "d"),
    [(0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 2, 0), (1, 1, 1, 1), (1, 513, 1, 3), (70000, 1, 2, 1)],
)
def test_empty_and_single_sizes(b: int, n: int, k: int, d: int, device: str) -> None:
    x, centroids = torch.randn(b, n, d, device=device), torch.randn(b, k, d, device=device)
    for got, expected in zip(assign(x, centroids, 1), assign_l2(x, centroids, 1), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@needs_extension
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "shifted", "batch slice"])
def test_any_layout_gives_the_same_labels(layout: str, device: str) -> None:
    dense = torch.randn(2, 37, 24, device=device)
    centroids = torch.randn(2, 11, 24, device=device)
    x = {
        "transposed": dense.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": torch.cat([dense, dense], dim=-1)[..., :24],
        "expanded": dense[:, :1].expand(2, 37, 24),
        "shifted": torch.cat([dense.new_zeros(1), dense.flatten()])[1:].view_as(dense),
        "batch slice": torch.stack([dense, dense], dim=1)[:, 1],
    }[layout]
    before = x.clone()
    for got, expected in zip(assign(x, centroids, 1), assign(x.contiguous(), centroids, 1), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(x, before)


@needs_extension
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_equal_their_wider_twin(dtype: torch.dtype, device: str) -> None:
    x, centroids = (
        torch.randn(1, 50, 16, device=device).to(dtype),
        torch.randn(1, 7, 16, device=device).to(dtype),
    )
    labels, distances = assign(x, centroids, 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = assign_l2(x.to(wide), centroids.to(wide), 1)
    assert distances.dtype == wide
    assert torch.equal(labels, expected[0])
    torch.testing.assert_close(distances, expected[1], rtol=1e-5, atol=1e-6)


@needs_extension
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_with_nan_or_infinity_gets_a_label_in_range(device: str) -> None:
    x = torch.randn(1, 20, 5, device=device)
    x[0, 3, 2], x[0, 9, 0], x[0, 11] = torch.nan, torch.inf, 3e38
    centroids = torch.randn(1, 6, 5, device=device)
    labels, distances = assign(x, centroids, 1)
    assert ((labels >= 0) & (labels < 6)).all()
    assert not torch.isfinite(distances[0, [3, 9, 11], 0]).any()
    clean = [i for i in range(20) if i not in (3, 9, 11)]
    assert torch.equal(labels[:, clean], assign(x[:, clean], centroids, 1)[0])


@pytest.mark.cuda
@given(n=odd_sizes, k=odd_sizes, d=odd_sizes, seed=seeds)
def test_small_shapes_on_the_gpu_agree_with_fp64(n: int, k: int, d: int, seed: int) -> None:
    g = generator(seed)
    check_against_fp64(torch.randn(2, n, d, generator=g).cuda(), torch.randn(2, k, d, generator=g).cuda())


@pytest.mark.cuda
def test_the_gpu_kernel_is_capturable_and_never_waits() -> None:
    x, centroids = torch.randn(1, 999, 33, device="cuda"), torch.randn(1, 77, 33, device="cuda")
    expected = assign(x, centroids, 1)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = assign(x, centroids, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    captured[0].fill_(-1)
    graph.replay()
    assert torch.equal(captured[0], expected[0])
    assert torch.equal(captured[1], expected[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("top", [1, 3])
def test_registration_passes_opcheck(top: int, device: str) -> None:
    sample = (torch.randn(2, 9, 4, device=device), torch.randn(2, 5, 4, device=device), top)
    torch.library.opcheck(assign.default, sample)


@needs_extension
def test_a_mistake_behind_the_checks_is_an_exception() -> None:
    view, kernel = native.view, native.extension.kmeans_assign
    x, centroids = torch.randn(1, 4, 3), torch.randn(1, 2, 3)
    labels, distances = torch.empty(1, 4, 1, dtype=torch.int64), torch.empty(1, 4, 1)
    workspace = torch.empty(native.extension.kmeans_assign_workspace(view(x), view(centroids), 1))
    good = {"x": x, "centroids": centroids, "labels": labels, "distances": distances, "workspace": workspace}
    bad = {
        "x": torch.randn(4, 3),
        "centroids": torch.randn(1, 2, 4),
        "labels": labels.int(),
        "distances": torch.empty(1, 8, 1)[:, ::2],
        "workspace": workspace[1:],
    }
    kernel(*(view(t) for t in good.values()), 1)
    for name, tensor in bad.items():
        with pytest.raises(ValueError, match=name):
            kernel(*(view(t) for t in {**good, name: tensor}.values()), 1)
    with pytest.raises(TypeError):
        kernel(x, *(view(t) for t in list(good.values())[1:]), 1)
