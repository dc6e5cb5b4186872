"""The contrastive loss under any weights on a CPU: kernels give the reference's results."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_close, assert_message, generator, run_ranks, seeds
from torch import Tensor
from torch.nn.functional import normalize as unit

from clustops import native
from clustops.contrastive_weighted import weighted_contrastive_loss
from clustops.native import contrastive_weighted_cpu as kernel
from clustops.reference import contrastive_weighted_rows as reference

pytestmark = pytest.mark.skipif(native.extension is None, reason="needs the extension")

ops = torch.ops.clustops
FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(FLOATING)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples take many blocks: on the diagonal, above it, and of samples that are no anchors."""
    monkeypatch.setattr(kernel, "_ROWS", 48)
    monkeypatch.setattr(kernel, "_COLUMNS", 80)


class Problem(NamedTuple):
    features: Tensor  # [N, V, D]
    pair_weights: Tensor  # [A, N]
    first: int
    temperature: float = 0.2
    normalize: bool = True

    def double(self) -> Problem:
        return self._replace(features=self.features.double(), pair_weights=self.pair_weights.double())


def draw(
    seed: int,
    n: int,
    views: int,
    d: int,
    *,
    anchors: slice = slice(None),
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype = torch.float32,
) -> Problem:
    g = generator(seed)
    length = 0.5 + torch.rand(n, views, 1, generator=g)
    features = (unit(torch.randn(n, views, d, generator=g), dim=-1) * length).to(dtype)
    pair_weights = torch.rand(n, n, generator=g)
    pair_weights = torch.where(pair_weights > 0.6, pair_weights, 0).to(weights_dtype)
    return Problem(features, pair_weights[anchors], anchors.indices(n)[0])


def assert_is_the_reference(problem: Problem, scale: float = 5.0) -> None:
    """Both directions against the reference in fp64."""
    dtype = torch.float64 if problem.features.dtype == torch.float64 else torch.float32
    exact = reference.weighted_contrastive_rows(*problem.double())
    found = ops.weighted_contrastive_rows(*problem)
    for got, right in zip(found, exact, strict=True):
        assert got.dtype == dtype
        assert_close(got, right.clamp_min(torch.finfo(dtype).min), dtype, scale)
    features, pair_weights, first, temperature, normalize = problem
    options = (first, temperature, normalize)
    upstream = torch.randn(exact[0].shape, dtype=dtype, generator=generator(1))
    right = reference.weighted_contrastive_rows_backward(
        upstream.double(),
        features.double(),
        pair_weights.double(),
        *exact[1:3],
        first,
        temperature,
        normalize,
    )
    got = ops.weighted_contrastive_rows_backward(upstream, features, pair_weights, *found[1:3], *options)
    assert got.dtype == features.dtype
    largest = max(1.0, float(right.abs().max())) if right.numel() else 1.0
    assert_close(got / largest, right / largest, features.dtype, scale)


@st.composite
def anchors(draw: st.DrawFn, n: int) -> slice:
    first = draw(st.integers(0, n))
    return draw(st.sampled_from([slice(0, n), slice(first, draw(st.integers(first, n)))]))


@given(
    n=st.sampled_from([1, 2, 3, 15, 16, 17, 33, 61, 97]),
    views=st.sampled_from([1, 2, 3, 5]),
    d=st.sampled_from([1, 3, 16, 33]),
    dtype=dtypes,
    weights_dtype=dtypes,
    data=st.data(),
    seed=seeds,
)
@pytest.mark.usefixtures("small_blocks", "instruction_set")
def test_kernels_are_the_reference_s(
    n: int, views: int, d: int, dtype: torch.dtype, weights_dtype: torch.dtype, data: st.DataObject, seed: int
) -> None:
    some = data.draw(anchors(n))
    assert_is_the_reference(draw(seed, n, views, d, anchors=some, dtype=dtype, weights_dtype=weights_dtype))


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("temperature", [1 / 39, 1 / 41, 1e-3, 50.0])
@pytest.mark.usefixtures("instruction_set")
def test_blocks_of_the_usual_size_at_any_temperature(views: int, temperature: float) -> None:
    problem = draw(0, 700, views, 24, anchors=slice(20, 690))._replace(temperature=temperature)
    assert_is_the_reference(problem, scale=5 + 0.5 / temperature)


@pytest.mark.parametrize("length", [1e-3, 7.0, 300.0])
@pytest.mark.usefixtures("small_blocks", "instruction_set")
def test_rows_of_any_length(length: float) -> None:
    problem = draw(0, 70, 2, 24, dtype=torch.float64)
    features = unit(problem.features, dim=-1) * length
    features[3, 1] *= 3
    assert_is_the_reference(problem._replace(features=features, normalize=False), scale=5 + length**2)


@pytest.mark.usefixtures("small_blocks")
def test_more_views_than_a_block_has_rows() -> None:
    assert_is_the_reference(draw(0, 3, 90, 5))


@pytest.mark.usefixtures("small_blocks", "instruction_set")
@pytest.mark.parametrize("weights_dtype", FLOATING)
def test_weights_may_lie_in_a_larger_matrix(weights_dtype: torch.dtype) -> None:
    problem = draw(0, 50, 2, 8, weights_dtype=weights_dtype)
    room = torch.full((60, 77), torch.nan).to(weights_dtype)
    view = room[5:55, 9:59].copy_(problem.pair_weights)
    for weights in (view, problem.pair_weights.T.contiguous().T, problem.pair_weights[:1].expand(50, 50)):
        strided = problem._replace(pair_weights=weights)
        compact = problem._replace(pair_weights=weights.contiguous())
        results = zip(
            ops.weighted_contrastive_rows(*strided), ops.weighted_contrastive_rows(*compact), strict=True
        )
        assert all(torch.equal(one, other) for one, other in results)
    assert not ops.weighted_contrastive_rows(*problem._replace(pair_weights=view))[0].isnan().any()


@pytest.mark.usefixtures("instruction_set")
def test_a_row_alone_has_loss_and_gradient_zero() -> None:
    features = torch.ones(1, 1, 3, requires_grad=True)
    for temperature in (1.0, 1e-3):
        problem = Problem(features, torch.ones(1, 1), 0, temperature)
        loss, lse, weight, norms = ops.weighted_contrastive_rows(*problem)
        assert (loss.item(), weight.item()) == (0, 0)
        assert float(lse) == torch.finfo(torch.float32).min
        assert norms.tolist() == pytest.approx([3**0.5] * 2)
        assert torch.equal(torch.autograd.grad(loss.sum(), features)[0], torch.zeros(1, 1, 3))


@pytest.mark.usefixtures("instruction_set")
def test_a_row_without_positives_pushes_nobody() -> None:
    problem = draw(0, 20, 2, 8, dtype=torch.float64)
    problem.pair_weights[7] = 0
    features = problem.features.requires_grad_()
    loss, _, weight, _ = ops.weighted_contrastive_rows(*problem)
    assert not loss[7].any()
    assert float(weight[7]) == 0
    assert not torch.autograd.grad(loss[7].sum(), features)[0].any()


@pytest.mark.parametrize("where", [(0, 0), (3, 30), (30, 3), (44, 44)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-30])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("temperature", [0.2, 1e-3])
@pytest.mark.usefixtures("small_blocks", "instruction_set")
def test_a_bad_weight_makes_all_losses_nan(
    where: tuple[int, int], value: float, views: int, temperature: float
) -> None:
    problem = draw(0, 45, views, 8)._replace(temperature=temperature)
    problem.pair_weights[where] = value
    for path in (ops.weighted_contrastive_rows, reference.weighted_contrastive_rows):
        loss, _, _, norms = path(*problem)
        assert loss.isnan().all()
        assert norms.isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.usefixtures("small_blocks")
def test_a_bad_feature_makes_all_losses_nan(value: float, dtype: torch.dtype) -> None:
    problem = draw(0, 45, 2, 8, dtype=dtype)
    problem.features[40, 1, 3] = value
    for path in (ops.weighted_contrastive_rows, reference.weighted_contrastive_rows):
        loss, _, _, norms = path(*problem)
        assert loss.isnan().all()
        assert norms.isnan().all()


@pytest.mark.usefixtures("small_blocks", "instruction_set")
@pytest.mark.parametrize("temperature", [0.2, 1e-3])
@pytest.mark.parametrize("views", [1, 2])
def test_bits_do_not_depend_on_threads(views: int, temperature: float) -> None:
    problem = draw(0, 150, views, 16)._replace(temperature=temperature)
    upstream = torch.randn(150, views, generator=generator(1))

    def both() -> list[Tensor]:
        found = ops.weighted_contrastive_rows(*problem)
        features, pair_weights, *options = problem
        return [
            *found,
            ops.weighted_contrastive_rows_backward(upstream, features, pair_weights, *found[1:3], *options),
        ]

    before, right = torch.get_num_threads(), both()
    try:
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert all(torch.equal(one, other) for one, other in zip(both(), right, strict=True))
    finally:
        torch.set_num_threads(before)


def test_gradient_is_exact() -> None:
    problem = draw(0, 6, 2, 3, anchors=slice(1, 5), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: ops.weighted_contrastive_rows(z, *problem[1:])[0], problem.features.requires_grad_()
    )


PEAK = """
import re, torch
from clustops.contrastive_weighted import weighted_contrastive_loss

def peak(n):
    features = torch.nn.functional.normalize(torch.randn(n, 2, 64), dim=-1).requires_grad_()
    pair_weights = torch.rand(n, n)
    open("/proc/self/clear_refs", "w").write("5")
    status = lambda name: int(re.search(name + r":\\s*(\\d+)", open("/proc/self/status").read())[1])
    before = status("VmRSS")
    weighted_contrastive_loss(features, pair_weights).backward()
    return status("VmHWM") - before

peak(64)
print(peak(2048) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_working_memory_is_that_of_rows_and_a_block() -> None:
    # Freed blocks go back to the system at once, so that the resident set is what was in use.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, env=env)
    m, d = 4096, 64
    # A block of scores, units of it, and at most four fp32 copies of the rows; all scores are 67 MB.
    assert int(run.stdout) < 2**20 + 2**20 + 4 * 4 * m * d + 2**20, f"{int(run.stdout) / 2**20:.1f} MB"


def bad_on_one(rank: int, world: int, name: str) -> str:
    import torch.distributed as dist

    features, pair_weights = unit(torch.randn(3, 2, 4, generator=generator(rank)), dim=-1), torch.ones(3, 6)
    if rank == 1:
        {"features": features, "pair_weights": pair_weights}[name].view(-1)[5] = -math.inf
    try:
        weighted_contrastive_loss(features, pair_weights, group=dist.group.WORLD)
    except ValueError as error:
        assert_message(error)
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", ["features", "pair_weights"])
def test_all_ranks_reject_what_is_bad_on_one(name: str) -> None:
    first, second = run_ranks(2, bad_on_one, name)
    assert "pair_weights at least 0, on all ranks, got others on another rank" in first
    assert f"{name} must be finite, got 1 NaN or infinite" in second


def test_a_mistake_behind_the_checks_is_an_exception() -> None:
    rows = torch.zeros(8, dtype=torch.float64)
    good: dict[str, Any] = {
        "products": torch.zeros(32),
        "weights": torch.zeros(4, 6),
        "shift": rows,
        "partition": rows.clone(),
        "weighted": rows.clone(),
        "total": rows[:4].clone(),
        "block": (2, 1, 1, 2, 1, 4),
    }
    bad: dict[str, list[Any]] = {
        "products": [torch.zeros(31), torch.zeros(32).int(), torch.zeros(4, 8)],
        "weights": [torch.zeros(4, 6).int(), torch.zeros(24), torch.zeros(4, 12)[:, ::2]],
        "shift": [rows[:7]],
        "partition": [rows.float()],
        "weighted": [rows[::2]],
        "total": [rows],
        "block": [
            (2, 3, 3, 2, 3, 3),
            (2, 1, 0, 2, 1, 4),
            (2, 1, 1, 2, 0, 2),
            (0, 1, 1, 2, 1, 4),
            (2, 1, 4, 2, 1, 4),
        ],
    }

    def call(arguments: dict[str, Any]) -> None:
        given = [native.view(t) if isinstance(t, Tensor) else t for t in arguments.values()]
        native.extension.weighted_sums(*given, 1.0, True, 1)

    call(good)
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                call({**good, name: value})
