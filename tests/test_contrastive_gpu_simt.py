"""The CUDA kernels of the class losses on the CPU, thread by thread, under the address and undefined-behaviour
sanitizers, in three orders of the threads of a block."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from simt import DTYPES, Results, build, needs_compiler
from support import assert_close, generator
from torch import Tensor
from torch.nn.functional import normalize

from clustops.reference import contrastive_rows as reference

pytestmark = needs_compiler
few = settings(max_examples=12)
orders = st.integers(0, 2)
HALVES = [torch.bfloat16, torch.float16]
KINDS = [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False), (torch.float32, True)]
kinds = st.sampled_from(KINDS)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simt")
    kernels = ["contrastive.cu", "contrastive_backward.cu", "contrastive_prepare.cu"]
    return build(folder, "contrastive_gpu", *kernels, optimize="-O1")


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
    upstream: Tensor | None = field(default=None)

    @property
    def range(self) -> tuple[int, int]:
        return self.anchors or (0, self.features.shape[0])

    def arguments(self, operation: str) -> list[object]:
        given = -1 if self.confidence is None else DTYPES[self.confidence.dtype]
        flags = [self.threshold, *map(int, (self.reweight, self.own_confidence, self.exact)), self.shared]
        sizes = [*self.features.shape, *self.range, self.temperature, int(self.normalize), self.before]
        labelled = int(self.labels is not None)
        return [operation, self.order, DTYPES[self.features.dtype], *sizes, labelled, given, *flags]

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
        flat = upstream.as_strided((sum((n - 1) * s for n, s in zip(upstream.shape, upstream.stride())) + 1,), (1,))
        found = Results(program, arguments, *self.inputs(), lse, flat)
        return found.take(self.features.dtype, self.range[1], *self.features.shape[1:])

    def options(self) -> tuple[float, float, bool, bool, bool]:
        return self.temperature, self.threshold, self.reweight, self.own_confidence, self.normalize

    def exactly(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return reference.contrastive_rows(
            self.features.double(), self.labels, self.confidence, *self.range, *self.options()
        )

    def exact_gradient(self, upstream: Tensor, lse: Tensor) -> Tensor:
        return reference.contrastive_rows_backward(
            upstream.double(), self.features.double(), self.labels, self.confidence, lse, *self.range, *self.options()
        )


def everyone(problem: Problem) -> Problem:
    return replace(problem, anchors=None)


def precision(problem: Problem) -> torch.dtype:
    """The dtype whose tolerance holds: operands that were not rounded give scores as good as fp32."""
    if problem.features.dtype == torch.float32:
        return torch.float32 if problem.exact else torch.float16
    return problem.features.dtype if problem.normalize else torch.float32


def assert_is_the_reference(program: Path, problem: Problem, seed: int = 0, scale: float = 4) -> None:
    found, right = problem.forward(program), problem.exactly()
    for got, expected in zip(found, right, strict=True):
        assert_close(got, expected, precision(problem), scale)
    lse = everyone(problem).exactly()[1]
    views, n = problem.features.shape[1], problem.features.shape[0]
    upstream = problem.upstream
    if upstream is None:
        upstream = torch.randn(n, views, generator=generator(seed))
    gradient = problem.backward(program, upstream, lse.float())
    expected = problem.exact_gradient(upstream, lse)
    size = float(expected.abs().amax()) if expected.numel() else 1.0
    size = size or 1.0
    dtype = torch.float16 if problem.features.dtype == torch.float32 and not problem.exact else problem.features.dtype
    assert_close(gradient.double() / size, expected / size, dtype, scale)


def draw(n: int, views: int, d: int, dtype: torch.dtype, seed: int, classes: int = 4) -> Problem:
    features = normalize(torch.randn(n, views, d, generator=generator(seed)), dim=-1)
    labels = torch.randint(-1, classes, (n,), generator=generator(seed + 1))
    confidence = torch.rand(n, generator=generator(seed + 2))
    return Problem(features.to(dtype), labels, confidence)
