"""The compiled contrastive losses of rows against their reference, on every instruction set of this CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import RTOL, assert_close, generator, needs_peak_of, odd_sizes, peak_of, seeds
from torch import Tensor
from torch.nn.functional import normalize

import clustops.contrastive as _registered  # noqa: F401
from clustops import native
from clustops.reference import contrastive_rows as reference

pytestmark = pytest.mark.skipif(native.extension is None, reason=f"no extension: {native.why_not}")
ops = torch.ops.clustops

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(FLOATING)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Options(NamedTuple):
    temperature: float = 0.07
    threshold: float = -math.inf
    reweight: bool = True
    own_confidence: bool = False
    normalize: bool = False


PLAIN = Options()

options = st.builds(
    Options,
    temperature=st.sampled_from([0.02, 0.07, 0.5, 10.0]),
    threshold=st.sampled_from([-math.inf, 0.0, 0.5, 2.0]),
    reweight=st.booleans(),
    own_confidence=st.booleans(),
    normalize=st.booleans(),
)


class Problem(NamedTuple):
    features: Tensor
    labels: Tensor | None
    confidence: Tensor | None
    options: Options = PLAIN

    def double(self) -> Problem:
        return self._replace(features=self.features.double())

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.features.dtype == torch.float64 else torch.float32


def problem_of(
    seed: int,
    n: int,
    v: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    confidence: torch.dtype | None = torch.float32,
    how: Options = PLAIN,
    norm: float = 1.0,
) -> Problem:
    """Rows in loose groups, of norm 1 unless the op is to make them so; labels from -1 on."""
    g = generator(seed)
    labels = torch.randint(-1, max(1, n // 5), (n,), generator=g)
    groups = torch.randn(n + 1, d, generator=g, dtype=torch.float64)
    rows = groups[labels, None] + torch.randn(n, v, d, generator=g, dtype=torch.float64)
    rows = rows if how.normalize else normalize(rows, dim=-1) * norm
    p = None if confidence is None else torch.rand(n, generator=g, dtype=torch.float64).to(confidence)
    return Problem(rows.to(dtype), labels, p, how)


def upstream_of(problem: Problem, seed: int) -> Tensor:
    """Random gradients of the losses, some of them 0."""
    g, shape = generator(seed), problem.features.shape[:2]
    values = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < 0.8)
    return values.to(problem.wide)


def forward(
    problem: Problem, part: tuple[int, int] | None = None, by: Any = ops
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, count = part or (0, len(problem.features))
    result: tuple[Tensor, Tensor, Tensor, Tensor] = by.contrastive_rows(
        *problem[:3], first, count, *problem.options
    )
    return result


def backward(
    problem: Problem,
    upstream: Tensor,
    part: tuple[int, int] | None = None,
    by: Any = ops,
    lse: Tensor | None = None,
) -> Tensor:
    first, count = part or (0, len(problem.features))
    lse = forward(problem, by=by)[1] if lse is None else lse
    result: Tensor = by.contrastive_rows_backward(upstream, *problem[:3], lse, first, count, *problem.options)
    return result


def assert_bits(one: Tensor, other: Tensor) -> None:
    assert one.dtype == other.dtype
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def assert_near(found: Tensor, oracle: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Errors are small beside the largest number."""
    assert found.shape == oracle.shape
    size = oracle.abs().max().item() if oracle.numel() else 0.0
    error = (found.double() - oracle).abs().max().item() if oracle.numel() else 0.0
    assert error <= RTOL[dtype] * scale * size + 1e-300, f"{error:.2e} of {size:.2e}"


def check_forward(problem: Problem, part: tuple[int, int], scale: float = 1.0) -> None:
    found, oracle = forward(problem, part), forward(problem.double(), part, reference)
    for name, one, right in zip(("loss", "lse", "weight", "norms"), found, oracle, strict=True):
        assert one.dtype == problem.wide, name
        if name == "lse" and problem.features[..., 0].numel() == 1:
            assert (one == torch.finfo(problem.wide).min).all()
            continue
        assert_close(one, right, problem.wide, scale)


def check_backward(problem: Problem, part: tuple[int, int], seed: int, scale: float = 1.0) -> None:
    upstream, exact = upstream_of(problem, seed), problem.double()
    lse = forward(exact, by=reference)[1]
    found = backward(problem, upstream, part, lse=lse.to(problem.wide))
    assert found.dtype == problem.features.dtype
    oracle = backward(exact, upstream.double(), part, reference, lse)
    # What is added up may leave little.
    z = reference.unit_rows(exact.features, problem.options.normalize)
    size = upstream.abs().max() * z.abs().max() / problem.options.temperature
    if problem.options.normalize:
        size = size / exact.features.norm(dim=-1).min()
    assert found.shape == oracle.shape
    if found.numel():
        error, largest = (found.double() - oracle).abs().max(), oracle.abs().max()
        allowed = scale * (RTOL[found.dtype] * largest + RTOL[problem.wide] * size)
        assert error <= allowed, f"{error:.2e} of {largest:.2e}, of terms of {size:.2e}"


def part_of(n: int, seed: int) -> tuple[int, int]:
    """All samples, or some of them."""
    first = 0 if seed % 3 == 0 else seed // 3 % n
    return (0, n) if seed % 3 == 0 else (first, seed // 7 % (n - first + 1))


@given(
    seed=seeds,
    n=odd_sizes,
    v=st.integers(1, 3),
    d=odd_sizes,
    dtype=dtypes,
    confidence=st.sampled_from([None, *FLOATING]),
    labelled=st.booleans(),
    how=options,
)
@pytest.mark.usefixtures("instruction_set")
def test_losses_and_gradients_are_those_of_the_reference(
    seed: int,
    n: int,
    v: int,
    d: int,
    dtype: torch.dtype,
    confidence: torch.dtype | None,
    labelled: bool,
    how: Options,
) -> None:
    problem = problem_of(seed, n, v, d, dtype, confidence, how)
    problem = problem if labelled else problem._replace(labels=None)
    part = part_of(n, seed)
    scale = max(1.0, 0.07 / how.temperature)
    check_forward(problem, part, scale)
    check_backward(problem, part, seed, scale)


# Sizes from which rows are cut to blocks, to larger ones, and one that is no multiple of a tile.
@pytest.mark.parametrize("n", [128, 129, 300, 511, 513, 600])
@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.usefixtures("instruction_set")
def test_many_blocks(n: int, temperature: float) -> None:
    problem = problem_of(n, n, 2, 33, how=Options(temperature, normalize=True))
    check_forward(problem, (0, n), 5)
    check_backward(problem, (0, n), n, 5)
    check_forward(problem, (n // 3, n // 2), 5)
    check_backward(problem, (n // 3, n // 2), n, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [9, 129, 300])
@pytest.mark.usefixtures("instruction_set")
def test_blocks_of_half_precision(n: int, dtype: torch.dtype) -> None:
    problem = problem_of(n, n, 2, 40, dtype)
    for part in ((0, n), (n // 3, n // 2)):
        check_forward(problem, part)
        check_backward(problem, part, n)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.usefixtures("instruction_set")
def test_anchors_of_a_part_are_rows_of_the_whole(dtype: torch.dtype) -> None:
    problem = problem_of(0, 300, 2, 40, dtype)
    upstream = upstream_of(problem, 0)
    whole, gradient = forward(problem), backward(problem, upstream)
    for part in ((0, 300), (0, 1), (299, 1), (70, 160), (10, 0)):
        rows = slice(part[0], sum(part))
        for found, one in zip(forward(problem, part)[:3], whole[:3], strict=True):
            assert_close(found, one[rows], problem.wide)
        assert_near(backward(problem, upstream, part), gradient[rows].double(), dtype, 10)
        assert_bits(forward(problem, part)[3], whole[3])


@pytest.mark.parametrize("n", [70, 300, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.usefixtures("threads", "instruction_set")
def test_bits_do_not_depend_on_threads(n: int, dtype: torch.dtype, temperature: float) -> None:
    problem = problem_of(0, n, 2, 33, dtype, how=Options(temperature))
    upstream = upstream_of(problem, 0)
    found = []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        parts = [forward(problem, part) for part in (None, (5, n // 2))]
        gradients = [backward(problem, upstream, part, lse=parts[0][1]) for part in (None, (5, n // 2))]
        found.append([*parts[0], *parts[1], *gradients])
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert_bits(one, same)


def errors(problem: Problem, by: Any) -> list[float]:
    """Of losses and gradients, beside the largest."""
    exact, upstream = problem.double(), torch.ones(problem.features.shape[:2])
    pairs = [
        (forward(problem, by=by)[0], forward(exact, by=reference)[0]),
        (backward(problem, upstream, by=by), backward(exact, upstream.double(), by=reference)),
    ]
    return [((one - right).abs().max() / right.abs().max()).item() for one, right in pairs]


@pytest.mark.parametrize("temperature", [1e-4, 1e-3, 0.01, 0.07, 1.0, 100.0])
@pytest.mark.parametrize(("n", "ties"), [(150, False), (150, True), (530, False)])
@pytest.mark.usefixtures("instruction_set")
def test_errors_are_of_the_order_of_those_of_pytorch(temperature: float, n: int, ties: bool) -> None:
    problem = problem_of(0, n, 2, 64, how=Options(temperature))
    if ties:
        problem.features[75:] = problem.features[:75]
    for ours, theirs in zip(errors(problem, ops), errors(problem, reference), strict=True):
        assert ours <= 3 * theirs + 1e-6


@pytest.mark.parametrize("norm", [1e-3, 30.0, 1e3])
@pytest.mark.usefixtures("instruction_set")
def test_rows_of_any_norm(norm: float) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16):
        problem = problem_of(0, 90, 2, 20, dtype, norm=norm)
        upstream = torch.ones(90, 2, dtype=problem.wide)
        assert forward(problem)[0].isfinite().all()
        assert backward(problem, upstream).isfinite().all()
    problem = problem_of(0, 90, 2, 20, norm=norm)
    for ours, theirs in zip(errors(problem, ops), errors(problem, reference), strict=True):
        assert ours <= 3 * theirs + 1e-6


@pytest.mark.usefixtures("instruction_set")
def test_all_rows_equal_give_the_logarithm_of_their_number() -> None:
    features = torch.zeros(150, 2, 5)
    features[..., 1] = 1
    for temperature in (1e-4, 0.07, 100.0):
        problem = Problem(features, torch.zeros(150, dtype=torch.int64), None, Options(temperature))
        assert_close(forward(problem)[0], torch.full((150, 2), math.log(299)), torch.float32, 1 / temperature)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e25])
@pytest.mark.usefixtures("instruction_set")
def test_upstream_gradients_may_be_tiny_or_huge(scale: float) -> None:
    problem = problem_of(0, 60, 2, 20, how=Options(0.026))
    upstream, lse = upstream_of(problem, 0), forward(problem)[1]
    plain = backward(problem, upstream, lse=lse).double()
    found = backward(problem, upstream * scale, lse=lse).double() / scale
    assert_near(found, plain, torch.float32)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.usefixtures("instruction_set")
def test_zero_rows_stay_zero_and_have_no_gradient(dtype: torch.dtype) -> None:
    problem = problem_of(0, 40, 2, 19, dtype, how=Options(normalize=True))
    problem.features[3] = 0
    problem.features[17, 1] = 0
    if dtype == torch.float32:
        problem.features[9] *= 1e-42  # too short to have an inverse
    for found, expected in zip(forward(problem), forward(problem, by=reference), strict=True):
        assert_close(found, expected, problem.wide)
    gradient = backward(problem, upstream_of(problem, 0))
    assert gradient.isfinite().all()
    assert not gradient[3].any()
    assert not gradient[17, 1].any()
    assert gradient[9].any() == (dtype != torch.float32)
    least = problem.features.double().norm(dim=-1)
    assert_close(forward(problem)[3][0], least[least > 0].min(), problem.wide)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.usefixtures("instruction_set")
def test_a_feature_that_is_not_finite_makes_all_losses_and_norms_nan(
    dtype: torch.dtype, value: float
) -> None:
    for sample, d in ((0, 0), (39, 32), (20, 16)):
        problem = problem_of(0, 40, 2, 33, dtype)
        problem.features[sample, 1, d] = value
        loss, _, weight, norms = forward(problem, (3, 5))
        assert loss.isnan().all()
        assert norms.isnan().all()
        assert_bits(weight, forward(problem_of(0, 40, 2, 33, dtype), (3, 5))[2])


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("value", [math.nan, -0.25, 1.25, math.inf])
@pytest.mark.usefixtures("instruction_set")
def test_a_confidence_that_is_none_makes_all_losses_and_norms_nan(dtype: torch.dtype, value: float) -> None:
    problem = problem_of(0, 40, 2, 9, confidence=dtype, how=Options(reweight=False))
    assert problem.confidence is not None
    problem.confidence[39] = value
    loss, _, _, norms = forward(problem)
    assert loss.isnan().all()
    assert norms.isnan().all()


def test_the_largest_numbers_of_fp64_are_finite() -> None:
    problem = problem_of(0, 4, 2, 3, torch.float64, how=Options(normalize=True))
    problem.features[2] *= 1e200
    assert not forward(problem)[3].isnan().any()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.usefixtures("instruction_set")
def test_the_threshold_is_compared_in_the_dtype_of_the_confidence(dtype: torch.dtype) -> None:
    confidence = torch.full((2,), 0.9, dtype=torch.float64).to(dtype)
    problem = Problem(torch.eye(2)[:, None], torch.zeros(2, dtype=torch.int64), confidence)
    at, above = (problem._replace(options=Options(threshold=t)) for t in (0.9, 0.91))
    assert (forward(at)[2] > 0).all()
    assert not forward(above)[2].any()


@pytest.mark.usefixtures("instruction_set")
def test_labels_may_be_any_integers() -> None:
    problem = problem_of(0, 90, 2, 9)
    assert problem.labels is not None
    far = torch.tensor([2**63 - 1, 2**62, 0, 2**32, 2**32 + 1, 2**40])[problem.labels % 6]
    near = torch.tensor([5, 4, 0, 1, 2, 3])[problem.labels % 6]
    none = torch.tensor([-1, -(2**63)])[problem.labels.clamp(0, 1)]
    upstream = upstream_of(problem, 0)
    for one, other in ((far, near), (none, torch.full_like(none, -1))):
        pair = [problem._replace(labels=labels) for labels in (one, other)]
        assert_close(forward(pair[0])[0], forward(pair[1])[0], torch.float64)
        assert_near(backward(pair[0], upstream), backward(pair[1], upstream).double(), torch.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
@pytest.mark.usefixtures("instruction_set")
def test_a_row_without_a_positive_has_no_loss_and_its_upstream_gradient_counts_for_nothing(
    value: float,
) -> None:
    problem = problem_of(0, 40, 1, 9)
    assert problem.labels is not None
    problem.labels[::3] = torch.arange(1000, 1014)
    upstream = upstream_of(problem, 0)
    expected = backward(problem, upstream.index_fill(0, torch.arange(0, 40, 3), 0))
    loss, _, weight, _ = forward(problem)
    assert not weight[::3].any()
    assert not loss[::3].any()
    assert_bits(backward(problem, upstream.index_fill(0, torch.arange(0, 40, 3), value)), expected)


@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.usefixtures("instruction_set")
def test_rows_that_were_no_anchors_pull_and_push_nobody(temperature: float) -> None:
    problem = problem_of(0, 60, 2, 20, how=Options(temperature))
    upstream, lse = upstream_of(problem, 0), forward(problem)[1]
    upstream[20:] = 0
    expected = backward(problem, upstream, lse=lse)
    assert expected.isfinite().all()
    assert_bits(backward(problem, upstream, lse=lse.index_fill(0, torch.arange(20, 60), torch.inf)), expected)


@pytest.mark.usefixtures("instruction_set")
def test_a_single_row_has_no_loss_and_no_gradient() -> None:
    for how in (Options(), Options(1e-3)):
        problem = problem_of(0, 1, 1, 7, how=how)
        assert not forward(problem)[0].any()
        assert not backward(problem, torch.ones(1, 1)).any()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.usefixtures("instruction_set")
def test_empty_sizes(dtype: torch.dtype) -> None:
    none = Problem(torch.zeros(0, 2, 5, dtype=dtype), torch.zeros(0, dtype=torch.int64), None)
    loss, lse, weight, norms = forward(none)
    assert loss.shape == lse.shape == (0, 2)
    assert weight.shape == (0,)
    assert norms.tolist() == [math.inf, 0]
    assert backward(none, torch.zeros(0, 2, dtype=none.wide)).shape == (0, 2, 5)
    some = problem_of(0, 7, 2, 5, dtype)
    assert forward(some, (3, 0))[0].shape == (0, 2)
    assert backward(some, upstream_of(some, 0), (3, 0)).shape == (0, 2, 5)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The numbers of ``x [n, v, d]``, otherwise in memory."""
    return {
        "transposed": lambda: x.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": lambda: torch.stack([x, x], dim=-1).flatten(2)[..., ::2],
        "shifted": lambda: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
        "padded rows": lambda: torch.cat([x, torch.full_like(x, torch.nan)], dim=-1)[..., : x.shape[2]],
    }[layout]()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "shifted", "padded rows"])
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.usefixtures("instruction_set")
def test_any_layout_gives_the_same_bits_and_is_not_written(layout: str, dtype: torch.dtype) -> None:
    dense = problem_of(0, 40, 2, 37, dtype, dtype, Options(normalize=True))
    assert dense.labels is not None
    assert dense.confidence is not None
    labels, confidence = (t.repeat_interleave(2)[::2] for t in (dense.labels, dense.confidence))
    other = Problem(laid_out(dense.features, layout), labels, confidence, dense.options)
    before = [t.clone() for t in (other.features, labels, confidence)]
    upstream = upstream_of(dense, 0)
    for found, expected in zip(forward(other), forward(dense), strict=True):
        assert_bits(found, expected)
    assert_bits(backward(other, upstream), backward(dense, upstream))
    for one, same in zip((other.features, labels, confidence), before, strict=True):
        assert_bits(one, same)


@pytest.mark.parametrize("kind", ["a number", "of samples", "of views", "transposed", "another dtype"])
@pytest.mark.usefixtures("instruction_set")
def test_upstream_gradients_may_have_any_stride(kind: str) -> None:
    problem = problem_of(0, 30, 3, 11)
    values = torch.randn(30, 3, generator=generator(1)).half().float()
    upstream = {
        "a number": values[0, 0].expand(30, 3),
        "of samples": values[:, :1].expand(30, 3),
        "of views": values[:1].expand(30, 3),
        "transposed": values.T.contiguous().T,
        "another dtype": values.half(),
    }[kind]
    assert_bits(backward(problem, upstream), backward(problem, upstream.float().contiguous()))


@pytest.mark.parametrize("how", [Options(), Options(0.01, 0.5, False, True, True)])
@pytest.mark.usefixtures("instruction_set")
def test_gradient_is_exact(how: Options) -> None:
    problem = problem_of(0, 7, 2, 3, torch.float64, how=how)

    def losses(features: Tensor) -> Tensor:
        return forward(problem._replace(features=features))[0]

    assert torch.autograd.gradcheck(losses, problem.features.requires_grad_())


@pytest.mark.slow
def test_more_pairs_than_2_to_the_31() -> None:
    n, positive = 46_400, 20_000
    features = torch.ones(n, 1, 1)
    features[positive:] = -1
    problem = Problem(features, None, None, Options(1.0))
    lse = forward(problem)[1].flatten()
    for rows, same in ((lse[:positive], positive - 1), (lse[positive:], n - positive - 1)):
        expected = math.log(same * math.e + (n - 1 - same) / math.e)
        assert_close(rows, torch.full_like(rows, expected), torch.float32)


@needs_peak_of
@pytest.mark.parametrize("views", [1, 2])
def test_memory_is_a_few_times_that_of_the_rows(views: int) -> None:
    problem = problem_of(0, 8192 // views, views, 128)
    upstream = upstream_of(problem, 0)
    grown, (_, lse, _, _) = peak_of(lambda: forward(problem))
    assert grown < 12 * 1024
    grown, _ = peak_of(lambda: backward(problem, upstream, lse=lse))
    assert grown < 20 * 1024


def test_a_mistake_behind_the_checks_is_an_exception() -> None:
    view, extension = native.view, native.extension
    x, rows = torch.zeros(4, 2, 5), torch.zeros(4, 2)
    shared: dict[str, Any] = {
        "features": x,
        "labels": torch.zeros(4, dtype=torch.int64),
        "confidence": torch.ones(4),
    }
    after: dict[str, Any] = dict(zip(("first", "count"), (0, 4), strict=True)) | Options()._asdict()
    results: dict[str, Any] = {
        "loss": rows,
        "lse": rows.clone(),
        "weight": torch.zeros(4),
        "norms": torch.zeros(2),
    }
    good = [
        shared | after | results,
        {"upstream": rows} | shared | {"lse": rows} | after | {"gradient": x.clone()},
    ]
    bad: dict[str, Any] = {
        "features": x[0],
        "labels": torch.zeros(4, dtype=torch.int32),
        "confidence": torch.ones(3),
        "first": 1,
        "temperature": 0.0,
        "loss": rows[:1],
        "lse": rows.double(),
        "weight": torch.zeros(4, 1),
        "norms": torch.zeros(3),
        "upstream": rows.half(),
        "gradient": x[:, :1],
    }

    for kernel, arguments in zip(
        (extension.contrastive_rows, extension.contrastive_rows_backward), good, strict=True
    ):

        def call(kernel: Any, arguments: dict[str, Any]) -> None:
            kernel(*(view(t) if isinstance(t, Tensor) else t for t in arguments.values()), 1)

        call(kernel, arguments)
        for name in arguments.keys() & bad.keys():
            with pytest.raises(ValueError, match=name):
                call(kernel, {**arguments, name: bad[name]})
        with pytest.raises(ValueError, match="floating point"):
            call(kernel, {**arguments, "features": x.int()})
