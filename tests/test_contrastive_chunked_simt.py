"""Class losses of wide rows, and losses under any weights, as a GPU computes them.

The Python around the kernels runs as it is; the kernels run on the CPU, thread by thread, under the address
and undefined-behaviour sanitizers, in three orders of the threads of a block; matrix products are torch's.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import DTYPES, Results, build, needs_compiler
from support import assert_close, generator, seeds
from torch import Tensor

from clustops.native import contrastive_chunked as chunked
from clustops.native import contrastive_weighted_blocks as blocks
from clustops.native import contrastive_weighted_cuda as weighted
from clustops.reference import contrastive_rows as reference
from clustops.reference import contrastive_weighted_rows as weighted_reference

pytestmark = [needs_compiler, pytest.mark.usefixtures("gpu")]
few = settings(max_examples=6)
orders = st.integers(0, 2)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kernels = ["contrastive_chunked.cu", "contrastive_prepare.cu", "contrastive_weighted.cu"]
    return build(tmp_path_factory.mktemp("simt"), "contrastive_chunked", *kernels)


class Kernels:
    """The extension, whose kernels are runs of the program; tensors stand for their views."""

    order = 0  # of threads

    def __init__(self, program: Path) -> None:
        self.program = program

    def run(self, command: str, arguments: list[Any], *inputs: Any) -> Results:
        given = [x.contiguous() for x in inputs if x is not None]
        return Results(self.program, [command, self.order, *arguments], *given)

    def contrastive_chunked_workspace(self, features: Tensor, backward: bool) -> int:
        n = features.shape[0]
        sizes = [DTYPES[features.dtype], *features.shape, 0, n, 1.0, 0, 0, -1, 0.0, 1, 0]
        return int(self.run("workspace", sizes).left.split()[backward])

    def ContrastiveChunks(self, *arguments: Any) -> Chunks:
        return Chunks(self, *arguments)

    def ContrastiveChunksBackward(self, *arguments: Any) -> ChunksBackward:
        return ChunksBackward(self, *arguments)

    def weighted_sums_cuda(self, products: Tensor, w: Tensor, *rest: Any) -> None:
        *sums, place, temperature, _ = rest
        size, arguments = self.weighted(w, place, torch.float32, temperature)
        found = self.run("weighted sums", arguments, products[:size], rows_of(w), *sums)
        for tensor in sums:
            tensor.copy_(found.take(torch.float64, *tensor.shape))

    def weighted_gradient_cuda(self, products: Tensor, w: Tensor, *rest: Any) -> None:
        *per_row, gradients, place, temperature, _ = rest
        size, arguments = self.weighted(w, place, gradients.dtype, temperature)
        found = self.run("weighted gradient", arguments, products[:size], rows_of(w), *per_row)
        gradients[:size] = found.take(gradients.dtype, size)

    def weighted(
        self, w: Tensor, place: tuple[int, ...], dtype: torch.dtype, temperature: float
    ) -> tuple[int, list[Any]]:
        views, first, _, rows, _, columns = place
        arguments = [
            DTYPES[w.dtype],
            DTYPES[dtype],
            views,
            first,
            *w.shape,
            w.stride(0),
            *place[2:],
            temperature,
        ]
        return rows * columns * views**2, arguments


def rows_of(w: Tensor) -> Tensor:
    """The memory from the first weight to the last."""
    return w.as_strided(((w.shape[0] - 1) * w.stride(0) + w.shape[1],), (1,))


def settings_of(
    features: Tensor, labels: Any, confidence: Any, first: int, count: int, *options: Any
) -> list[Any]:
    temperature, threshold, reweight, own_confidence, normalize = options
    dtype = -1 if confidence is None else DTYPES[confidence.dtype]
    sizes = [DTYPES[features.dtype], *features.shape, first, count, temperature, int(normalize)]
    return [*sizes, int(labels is not None), dtype, threshold, int(reweight), int(own_confidence)]


class Chunks:
    def __init__(self, kernels: Kernels, *arguments: Any) -> None:
        *given, loss, lse, weight, norms, self.workspace, z, _ = arguments
        self.kernels, self.settings, self.results = kernels, settings_of(*given), (loss, lse, weight)
        found = kernels.run("prepare", self.settings, *given[:3])
        self.workspace.copy_(found.take(torch.int32, *self.workspace.shape))
        z.copy_(found.take(z.dtype, *z.shape))
        norms.copy_(found.take(torch.float32, 2))

    def sums(self, scores: Tensor, block: tuple[int, ...]) -> None:
        found = self.kernels.run("sums", [*self.settings, *block], self.workspace, scores, *self.results)
        for tensor in (self.workspace, *self.results):
            tensor.copy_(found.take(tensor.dtype, *tensor.shape))


class ChunksBackward:
    def __init__(self, kernels: Kernels, upstream: Tensor, *arguments: Any) -> None:
        features, labels, confidence, lse, *rest, self.gradient, self.workspace, z, _ = arguments
        self.kernels, self.features = kernels, features
        self.settings = settings_of(features, labels, confidence, *rest)
        found = kernels.run("prepare backward", self.settings, features, labels, confidence, upstream, lse)
        self.workspace.copy_(found.take(torch.int32, *self.workspace.shape))
        z.copy_(found.take(z.dtype, *z.shape))

    def turn(self, scores: Tensor, gradients: Tensor, block: tuple[int, ...]) -> None:
        found = self.kernels.run("turn", [*self.settings, *block], self.workspace, scores)
        gradients.copy_(found.take(gradients.dtype, *gradients.shape))

    def end(self, sums: Tensor, row: int) -> None:
        arguments = [*self.settings, row, sums.shape[0]]
        found = self.kernels.run("end", arguments, self.features, self.workspace, sums)
        self.gradient.copy_(found.take(self.gradient.dtype, *self.gradient.shape))


def in_fp32(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """What multiplies operands of sixteen bits on a GPU."""
    return out.add_(a.float() @ b.float()) if add else out.copy_(a.float() @ b.float())


@pytest.fixture
def gpu(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels in their place; blocks are so small that few rows take several."""
    kernels = Kernels(program)
    for module in (chunked, weighted):
        monkeypatch.setattr(module, "extension", kernels)
    for module in (chunked, blocks):
        monkeypatch.setattr(module, "multiply", in_fp32)
        monkeypatch.setattr(module, "view", lambda tensor: tensor)
    monkeypatch.setattr(chunked, "views", lambda *tensors: tensors)
    monkeypatch.setattr(chunked, "stream_of", lambda tensor: 0)
    monkeypatch.setattr(chunked, "_ROWS", 128)
    monkeypatch.setattr(chunked, "_COLUMNS", 128)
    monkeypatch.setattr(weighted, "_ROWS", 40)
    monkeypatch.setattr(weighted, "_COLUMNS", 100)


def run_in(order: int) -> None:
    """Threads of a block run forward, in reverse, or shuffled."""
    Kernels.order = order


def batch(seed: int, n: int, views: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(seed)
    features = torch.nn.functional.normalize(torch.randn(n, views, d, generator=g), dim=-1)
    features = features * (0.5 + torch.rand(n, views, 1, generator=g))
    return features.to(dtype), torch.randint(-1, 4, (n,), generator=g), torch.rand(n, generator=g)


def assert_near(got: Tensor, exact: Tensor, dtype: torch.dtype, scale: float) -> None:
    largest = max(1e-3, float(exact.abs().max())) if exact.numel() else 1.0
    assert_close(got / largest, exact / largest, dtype, scale)


def class_losses(problem: tuple[Any, ...], scale: float = 5.0) -> None:
    """Both directions against the reference in fp64."""
    features, labels, confidence, first, count, *options = problem
    wide = (features.double(), labels, confidence)
    exact = reference.contrastive_rows(*wide, first, count, *options)
    found = chunked.contrastive_rows(*problem)
    for got, right in zip(found, exact, strict=True):
        assert_near(got, right.clamp_min(torch.finfo(torch.float32).min), features.dtype, scale)
    shape = features.shape[:2]
    upstream = torch.randn(shape, generator=generator(1))
    lse = reference.contrastive_rows(*wide, 0, shape[0], *options)[1]
    right = reference.contrastive_rows_backward(upstream.double(), *wide, lse, first, count, *options)
    got = chunked.contrastive_rows_backward(upstream, *problem[:3], lse.float(), *problem[3:])
    assert got.dtype == features.dtype
    assert_near(got, right, features.dtype, scale)


@few
@given(
    shape=st.sampled_from([(1, 1), (3, 1), (130, 1), (70, 2), (43, 3), (150, 2), (129, 3)]),
    part=st.sampled_from([(0.0, 1.0), (0.3, 0.7), (0.9, 1.0), (0.5, 0.5)]),
    d=st.sampled_from([1, 7, 40, 300]),
    dtype=dtypes,
    own_confidence=st.booleans(),
    normalize=st.booleans(),
    temperature=st.sampled_from([0.3, 1e-2]),
    order=orders,
    seed=seeds,
)
def test_class_losses_of_wide_rows_are_the_reference_s(
    shape: tuple[int, int],
    part: tuple[float, float],
    d: int,
    dtype: torch.dtype,
    own_confidence: bool,
    normalize: bool,
    temperature: float,
    order: int,
    seed: int,
) -> None:
    run_in(order)
    n, views = shape
    first = int(part[0] * n)
    count = int(part[1] * n) - first
    options = (temperature, 0.3, True, own_confidence, normalize)
    scale = 5 if dtype == torch.float32 else 1 + 0.1 / temperature
    class_losses((*batch(seed, n, views, d, dtype), first, count, *options), scale)


def test_without_labels_and_confidence() -> None:
    run_in(2)
    features, _, _ = batch(0, 70, 2, 20, torch.float32)
    class_losses((features, None, None, 0, 70, 0.2, -math.inf, True, False, True))


@pytest.mark.parametrize("temperature", [0.2, 0.02])
def test_more_columns_than_a_cta_takes_at_once(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in(2)
    for module in (chunked, weighted):
        monkeypatch.setattr(module, "_COLUMNS", 2048)
    features, labels, confidence = batch(0, 1100, 1, 8, torch.float32)
    options = (temperature, 0.3, True, False, True)
    class_losses((features, labels, confidence, 5, 3, *options), 1 / temperature)
    w = torch.rand(2, 1100, generator=generator(1))
    weighted_losses(features, w, 0, temperature, True)


def test_small_upstream_gradients_do_not_vanish_in_fp16() -> None:
    run_in(0)
    features, labels, confidence = batch(0, 60, 2, 16, torch.float16)
    options: tuple[Any, ...] = (0.2, 0.3, True, False, False)
    given = (features.double(), labels, confidence)
    lse = reference.contrastive_rows(*given, 0, 60, *options)[1]
    upstream = torch.full((60, 2), 1e-4)
    right = reference.contrastive_rows_backward(upstream.double(), *given, lse, 0, 60, *options)
    got = chunked.contrastive_rows_backward(
        upstream, features, labels, confidence, lse.float(), 0, 60, *options
    )
    assert float((got.double() - right).norm() / right.norm()) < 4e-3


@pytest.mark.parametrize("where", ["features", "confidence"])
def test_a_bad_value_makes_class_losses_nan(where: str) -> None:
    run_in(0)
    features, labels, confidence = batch(0, 70, 2, 300, torch.float32)
    {"features": features, "confidence": confidence}[where].view(-1)[-1] = math.inf
    loss, _, _, norms = chunked.contrastive_rows(
        features, labels, confidence, 0, 70, 0.2, 0.3, True, False, True
    )
    assert loss.isnan().all()
    assert norms.isnan().all()


def test_class_losses_are_the_same_bits_in_every_order_of_threads() -> None:
    features, labels, confidence = batch(0, 70, 2, 40, torch.bfloat16)
    given: tuple[Any, ...] = (features, labels, confidence, 0, 70, 0.2, 0.3, True, False, True)
    runs = []
    for order in (0, 1, 2):
        run_in(order)
        loss, lse, _, _ = chunked.contrastive_rows(*given)
        upstream = torch.linspace(-1, 1, 140).view(70, 2)
        gradient = chunked.contrastive_rows_backward(upstream, *given[:3], lse, *given[3:])
        runs.append((loss, lse, gradient))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


def weighted_losses(features: Tensor, w: Tensor, first: int, temperature: float, normalize: bool) -> None:
    """Both directions against the reference in fp64."""
    dtype = features.dtype
    options: tuple[Any, ...] = (first, temperature, normalize)
    # Sixteen bits: inner products of rows that were rounded after they were normalised.
    scale = 5 if dtype == torch.float32 else 1 + 0.2 / temperature
    exact = weighted_reference.weighted_contrastive_rows(features.double(), w.double(), *options)
    found = blocks.losses(weighted._device(0), features, w, *options)
    for got, right in zip(found, exact, strict=True):
        assert got.dtype == torch.float32
        assert_near(got, right.clamp_min(torch.finfo(torch.float32).min), dtype, scale)
    upstream = torch.randn(exact[0].shape, generator=generator(1)) * 1e-4
    right = weighted_reference.weighted_contrastive_rows_backward(
        upstream.double(), features.double(), w.double(), *exact[1:3], *options
    )
    got = blocks.gradient(weighted._device(0), upstream, features, w, *found[1:3], *options)
    assert got.dtype == dtype
    assert_near(got * 1e4, right * 1e4, dtype, scale)


@few
@given(
    shape=st.sampled_from([(1, 1), (2, 1), (90, 1), (60, 2), (33, 3), (7, 17)]),
    part=st.sampled_from([(0.0, 1.0), (0.3, 0.7), (0.5, 0.5)]),
    dtype=dtypes,
    weights_dtype=st.sampled_from(FLOATING),
    normalize=st.booleans(),
    temperature=st.sampled_from([0.3, 1e-2]),
    order=orders,
    seed=seeds,
)
def test_losses_under_any_weights_are_the_reference_s(
    shape: tuple[int, int],
    part: tuple[float, float],
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
    normalize: bool,
    temperature: float,
    order: int,
    seed: int,
) -> None:
    run_in(order)
    n, views = shape
    first, last = (int(p * n) for p in part)
    room = torch.rand(n, n + 3, generator=generator(seed))
    w = torch.where(room > 0.6, room, 0).to(weights_dtype)[first:last, 2 : n + 2]
    weighted_losses(batch(seed, n, views, 24, dtype)[0], w, first, temperature, normalize)


@pytest.mark.parametrize(("value", "where"), [(math.nan, (0, 0)), (math.inf, (28, 3)), (-1e-30, (3, 28))])
def test_a_bad_weight_makes_all_losses_nan(value: float, where: tuple[int, int]) -> None:
    run_in(0)
    w = torch.ones(30, 30)
    w[where] = value
    loss, _, _, norms = blocks.losses(
        weighted._device(0), batch(0, 30, 2, 8, torch.float32)[0], w, 0, 0.2, True
    )
    assert loss.isnan().all()
    assert norms.isnan().all()


def test_losses_under_any_weights_are_the_same_bits_in_every_order_of_threads() -> None:
    features, w = batch(0, 30, 2, 16, torch.bfloat16)[0], torch.rand(30, 30, generator=generator(1))
    runs = []
    for order in (0, 1, 2):
        run_in(order)
        loss, lse, weight, _ = blocks.losses(weighted._device(0), features, w, 0, 0.2, True)
        gradient = blocks.gradient(weighted._device(0), loss, features, w, lse, weight, 0, 0.2, True)
        runs.append((loss, lse, weight, gradient))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))
