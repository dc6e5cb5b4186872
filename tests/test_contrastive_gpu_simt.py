"""The CUDA kernels of the class losses on the CPU, thread by thread, in three orders of a block's threads,
under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import DTYPES, Results, needs_compiler
from support import assert_close, generator, seeds
from torch import Tensor
from torch.nn.functional import normalize

from clustops.reference import contrastive_rows as reference

pytestmark = needs_compiler
few = settings(max_examples=8)
orders = st.integers(0, 2)
HALVES = [torch.bfloat16, torch.float16]
KINDS = [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False), (torch.float32, True)]
KIND_NAMES = ["bf16", "fp16", "tf32", "fp32"]
EXACT = (torch.float32, True)
kinds = st.sampled_from(KINDS)


@pytest.fixture(scope="module")
def program(contrastive_gpu: Path) -> Path:
    return contrastive_gpu


@dataclass
class Problem:
    """One call of the op and of its gradient."""

    features: Tensor
    labels: Tensor | None = None
    confidence: Tensor | None = None
    anchors: tuple[int, int] | None = None
    temperature: float = 0.2
    threshold: float = -math.inf
    reweight: bool = True
    own_confidence: bool = False
    normalize: bool = False
    exact: bool = True
    order: int = 0
    before: int = 0
    shared: int = 160 << 10
    hopper: bool = False
    upstream: Tensor | None = None

    @property
    def range(self) -> tuple[int, int]:
        return self.anchors or (0, self.features.shape[0])

    def arguments(self, operation: str) -> list[object]:
        given = -1 if self.confidence is None else DTYPES[self.confidence.dtype]
        flags = [self.threshold, *map(int, (self.reweight, self.own_confidence, self.exact))]
        machine = [self.shared, int(self.hopper)]
        sizes = [*self.features.shape, *self.range, self.temperature, int(self.normalize), self.before]
        labelled = int(self.labels is not None)
        return [operation, self.order, DTYPES[self.features.dtype], *sizes, labelled, given, *flags, *machine]

    def inputs(self) -> list[Tensor]:
        before = torch.full((self.before,), torch.nan, dtype=self.features.dtype)
        rows = torch.cat([before, self.features.flatten()])
        return [rows, *(x for x in (self.labels, self.confidence) if x is not None)]

    def forward(self, program: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = Results(program, self.arguments("loss"), *self.inputs())
        count, views = self.range[1], self.features.shape[1]
        shapes = [(count, views), (count, views), (count,), (2,)]
        loss, lse, weight, norms = (found.take(torch.float32, *shape) for shape in shapes)
        return loss, lse, weight, norms

    def backward(self, program: Path, upstream: Tensor, lse: Tensor) -> Tensor:
        arguments = [*self.arguments("gradient"), *upstream.stride()]
        span = 1 + sum((n - 1) * s for n, s in zip(upstream.shape, upstream.stride(), strict=True))
        found = Results(program, arguments, *self.inputs(), lse, upstream.as_strided((span,), (1,)))
        return found.take(self.features.dtype, self.range[1], *self.features.shape[1:])

    def options(self) -> tuple[Any, ...]:
        return self.temperature, self.threshold, self.reweight, self.own_confidence, self.normalize

    def exactly(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return reference.contrastive_rows(
            self.features.double(), self.labels, self.confidence, *self.range, *self.options()
        )

    def exact_gradient(self, upstream: Tensor, lse: Tensor) -> Tensor:
        given = (self.features.double(), self.labels, self.confidence, lse, *self.range, *self.options())
        return reference.contrastive_rows_backward(upstream.double(), *given)


def assert_is_the_reference(program: Path, problem: Problem, scale: float = 4) -> None:
    # Operands that are not rounded give scores as good as fp32.
    rounded = problem.normalize or problem.features.dtype == torch.float32
    dtype = operand(problem) if rounded else torch.float32
    least = torch.finfo(torch.float32).min  # LSE of nothing
    for got, expected in zip(problem.forward(program), problem.exactly(), strict=True):
        assert_close(got, expected.clamp_min(least), dtype, scale)
    lse = replace(problem, anchors=None).exactly()[1]
    upstream = problem.upstream
    if upstream is None:
        upstream = torch.randn(lse.shape, generator=generator(0))
    gradient = problem.backward(program, upstream, lse.float()).double()
    expected = problem.exact_gradient(upstream, lse)
    # Gradients of scores are differences of numbers of this size, and may cancel.
    size = float(upstream.abs().amax()) / problem.temperature
    assert_close(gradient / size, expected / size, operand(problem), scale)


def operand(problem: Problem) -> torch.dtype:
    """The dtype whose tolerance holds for matrix products: TF32 has as many bits as fp16."""
    dtype = problem.features.dtype
    return dtype if problem.exact or dtype != torch.float32 else torch.float16


def draw(n: int, views: int, d: int, kind: tuple[torch.dtype, bool] = EXACT, seed: int = 0) -> Problem:
    dtype, exact = kind
    features = normalize(torch.randn(n, views, d, generator=generator(seed)), dim=-1)
    labels = torch.randint(-1, 4, (n,), generator=generator(seed + 1))
    confidence = torch.rand(n, generator=generator(seed + 2))
    return Problem(features.to(dtype), labels, confidence, exact=exact)


@few
@given(
    n=st.sampled_from([1, 2, 5, 13, 33]),
    views=st.sampled_from([1, 2, 3]),
    d=st.sampled_from([1, 7, 8, 16, 33]),
    kind=kinds,
    given=st.sampled_from(["labels and confidence", "labels", "neither"]),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    threshold=st.sampled_from([-math.inf, 0.5]),
    order=orders,
    seed=seeds,
)
def test_losses_and_gradients_are_the_reference_s(
    program: Path,
    n: int,
    views: int,
    d: int,
    kind: tuple[torch.dtype, bool],
    given: str,
    options: tuple[bool, bool, bool],
    threshold: float,
    order: int,
    seed: int,
) -> None:
    problem = draw(n, views, d, kind, seed)
    if given == "neither":
        problem.labels = None
    if given != "labels and confidence":
        problem.confidence = None
    problem.reweight, problem.own_confidence, problem.normalize = options
    assert_is_the_reference(program, replace(problem, threshold=threshold, order=order))


# The first two have more row blocks and parts, and from 300 rows on a warp takes 32 of them.
@pytest.mark.parametrize(("n", "views", "d"), [(155, 2, 20), (62, 3, 65), (20, 1, 130), (9, 2, 256)])
@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_every_size_of_tile_is_the_reference_s(
    program: Path, n: int, views: int, d: int, kind: tuple[torch.dtype, bool]
) -> None:
    order = KINDS.index(kind) % 3
    assert_is_the_reference(program, replace(draw(n, views, d, kind), order=order))


@pytest.mark.parametrize("d", [64, 256])
def test_less_shared_memory_has_two_stages(program: Path, d: int) -> None:
    problem = draw(70, 2, d, (torch.bfloat16, True))
    assert_is_the_reference(program, replace(problem, shared=99 << 10 if d == 256 else 30 << 10, order=2))


@pytest.mark.parametrize(("n", "views"), [(2, 70), (27, 5)])  # the last view of five alone in the next tile
def test_views_of_a_sample_may_lie_in_several_tiles(program: Path, n: int, views: int) -> None:
    assert_is_the_reference(program, draw(n, views, 8))


@pytest.mark.parametrize("reweight", [True, False])
def test_own_views_may_count_as_their_confidence_says(program: Path, reweight: bool) -> None:
    assert_is_the_reference(program, replace(draw(20, 3, 8), own_confidence=True, reweight=reweight))


@pytest.mark.parametrize("anchors", [(0, 1), (3, 5), (45, 25), (69, 1), (70, 0)])
def test_anchors_may_be_some_of_the_samples(program: Path, anchors: tuple[int, int]) -> None:
    problem = draw(70, 2, 8)
    assert_is_the_reference(program, replace(problem, anchors=anchors))


def test_rows_that_are_no_anchors_give_no_gradient(program: Path) -> None:
    problem = draw(20, 2, 8)
    lse, upstream = problem.exactly()[1], torch.ones(20, 2)
    lse[5:], upstream[5:] = torch.inf, 0
    gradient = problem.backward(program, upstream, lse.float())
    assert_close(gradient, problem.exact_gradient(upstream, lse), torch.float32, scale=20)


def test_no_samples_have_neutral_norms(program: Path) -> None:
    found = draw(0, 2, 8).forward(program)
    assert [x.numel() for x in found] == [0, 0, 0, 2]
    assert found[3].tolist() == [math.inf, 0]


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("temperature", [0.02, 1e-3])
def test_scores_too_far_apart_for_one_shift_are_fine(
    program: Path, kind: tuple[torch.dtype, bool], temperature: float
) -> None:
    problem = replace(draw(33, 2, 8, kind), temperature=temperature)
    problem.features[3:9] = problem.features[3:4]  # cold rows are sure, but for these
    found, right = problem.forward(program), problem.exactly()
    dtype = operand(problem)
    assert_close(found[1] * temperature, right[1] * temperature, dtype)
    assert_close(found[0] * temperature, right[0] * temperature, dtype)
    if (
        dtype != torch.float16 or problem.features.dtype == dtype
    ):  # TF32 would be compared with other operands
        assert_is_the_reference(program, problem, scale=4 if dtype != torch.float32 else 0.2 / temperature)


def test_long_rows_have_a_maximum_of_their_own(program: Path) -> None:
    problem = draw(210, 2, 8, KINDS[0])  # two tiles for each part of the columns
    problem.features *= torch.linspace(1, 33, 210)[:, None, None]  # the maximum comes late
    assert_is_the_reference(program, replace(problem, temperature=5.0), scale=20)


def test_norms_of_any_size_are_measured(program: Path) -> None:
    problem = replace(draw(5, 2, 8), normalize=True)
    problem.features *= torch.tensor([1e-30, 1e-10, 1.0, 1e20, 1e37])[:, None, None]
    _, _, _, norms = problem.forward(program)
    torch.testing.assert_close(norms, torch.tensor([1e-30, 1e37]))


def test_a_zero_row_stays_zero_without_a_gradient(program: Path) -> None:
    problem = replace(draw(9, 2, 8), normalize=True)
    problem.features[4, 1] = 0
    assert_is_the_reference(program, problem)
    loss, lse, _, norms = problem.forward(program)
    assert not bool(problem.backward(program, torch.ones_like(loss), lse)[4, 1].any())
    assert float(norms[0]) > 0.9


def test_a_single_row_has_no_loss(program: Path) -> None:
    problem = draw(1, 1, 8)
    loss, lse, weight, _ = problem.forward(program)
    assert (float(loss), float(weight)) == (0, 0)
    assert float(lse) == torch.finfo(torch.float32).min
    assert not bool(problem.backward(program, torch.ones(1, 1), lse).any())


def test_rows_without_a_positive_have_no_loss_and_give_no_gradient(program: Path) -> None:
    problem = draw(9, 1, 8)
    problem.labels, problem.confidence = torch.tensor([0, 0, 1, 1, 2, 3, 4, 5, -1]), None
    loss, lse, weight, _ = problem.forward(program)
    assert weight.tolist() == [1] * 4 + [0] * 5
    assert not bool(loss[4:].any())
    upstream = torch.zeros(9, 1)
    upstream[4:] = 1
    assert not bool(problem.backward(program, upstream, lse).any())


def test_a_class_whose_other_members_hardly_count_is_a_class(program: Path) -> None:
    problem = draw(3, 1, 8)
    problem.labels, problem.confidence = torch.tensor([0, 0, -1]), torch.tensor([1, 1e-12, 1])
    assert_is_the_reference(program, problem)
    assert problem.forward(program)[2][0] > 0


def test_labels_may_be_of_any_size(program: Path) -> None:
    problem = draw(70, 1, 8)
    large = torch.tensor([3, 3 + 2**32, 2**62, 2**62 + 2**33, 2**31, 2**31 - 1, -(2**40)])
    problem.labels = large[torch.randint(len(large), (70,), generator=generator(3))]
    assert_is_the_reference(program, problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_the_threshold_is_compared_in_the_dtype_of_confidence(program: Path, dtype: torch.dtype) -> None:
    problem = replace(draw(9, 1, 8), threshold=0.9)
    near = torch.tensor(0.9, dtype=torch.float32)
    below, above = near.nextafter(torch.tensor(0.0)), near.nextafter(torch.tensor(1.0))
    problem.confidence = torch.stack([below, near, above]).repeat(3).to(dtype)
    problem.labels = torch.zeros(9, dtype=torch.int64)
    assert_is_the_reference(program, problem)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 34])
def test_a_feature_that_is_not_finite_makes_all_losses_nan(program: Path, value: float, where: int) -> None:
    problem = draw(35, 2, 8)
    problem.features[where, 1, 7] = value
    loss, _, _, norms = problem.forward(program)
    assert bool(loss.isnan().all())
    assert bool(norms.isnan().all())


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
def test_a_confidence_out_of_range_makes_all_losses_nan(program: Path, value: float) -> None:
    problem = draw(35, 2, 8)
    assert problem.confidence is not None
    problem.confidence[34] = value
    loss, _, _, norms = problem.forward(program)
    assert bool(loss.isnan().all())
    assert bool(norms.isnan().all())


@pytest.mark.parametrize("size", [1e-6, 1e3])
def test_gradients_of_scores_fit_fp16(program: Path, size: float) -> None:
    problem = draw(60, 2, 16, (torch.float16, True))
    upstream = size * torch.rand(60, 2, generator=generator(5))
    if size > 1:
        upstream[0] *= 30  # more than fp16 holds, were it not scaled
    problem.features *= 2.0 if size < 1 else 1.0
    lse = problem.exactly()[1]
    found, expected = problem.backward(program, upstream, lse.float()), problem.exact_gradient(upstream, lse)
    expected = expected.to(torch.float16).double()
    assert_close(found.double() / size, expected / size, torch.float16, scale=20)


def test_upstream_gradients_have_any_strides(program: Path) -> None:
    problem = draw(9, 3, 8)
    for upstream in (torch.ones(1, 1).expand(9, 3), torch.randn(3, 9, generator=generator(0)).T):
        assert_is_the_reference(program, replace(problem, upstream=upstream))


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_features_may_start_anywhere(program: Path, kind: tuple[torch.dtype, bool]) -> None:
    assert_is_the_reference(program, replace(draw(9, 2, 16, kind), before=1))


@pytest.mark.parametrize("kind", [KINDS[0], EXACT], ids=["bf16", "fp32"])
def test_bits_do_not_depend_on_the_order_of_threads(program: Path, kind: tuple[torch.dtype, bool]) -> None:
    runs = []
    for order in range(3):
        problem = replace(draw(40, 2, 16, kind), order=order)
        loss, lse, weight, norms = problem.forward(program)
        runs.append([loss, lse, weight, norms, problem.backward(program, torch.ones_like(loss), lse)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


KB = 1 << 10  # of shared memory that a block may have


@pytest.mark.parametrize(
    ("dtype", "width", "shared", "fits"),
    [
        (torch.bfloat16, 256, 99 * KB, True),
        (torch.float32, 128, 99 * KB, True),
        (torch.float32, 256, 99 * KB, False),
        (torch.float32, 256, 163 * KB, True),
        (torch.float16, 257, 227 * KB, False),
        (torch.float64, 8, 227 * KB, False),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    program: Path, dtype: torch.dtype, width: int, shared: int, fits: bool
) -> None:
    found = Results(program, ["fits", DTYPES[dtype], width, shared])
    assert bool(found.take(torch.uint8, 1)) == fits
