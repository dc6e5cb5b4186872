"""The CUDA kernels of Sinkhorn assignment on the CPU, thread by thread (native/simt.h), under the address and
undefined-behaviour sanitizers, in three orders of the threads of a block."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_close, generator, seeds
from torch import Tensor

from clustops.reference import sinkhorn_ops as ops

TESTS = Path(__file__).parent
CUDA = TESTS.parent / "csrc" / "cuda"
COMPILER = shutil.which("g++")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
STREAMING, RESIDENT = 1, 200 << 10  # bytes of shared memory: no problem fits, all do

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")
dtypes = st.sampled_from(list(DTYPES))
orders = st.integers(0, 2)
few = settings(max_examples=int(__import__("os").environ.get("EX","20")))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("simt") / "sinkhorn_gpu"
    flags = ["-std=c++17", "-O1", "-g", "-w", "-DCLUSTOPS_SIMT", f"-I{TESTS / 'native'}"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [TESTS / "native" / "sinkhorn_gpu.cpp", *(CUDA / name for name in SOURCES)]
    subprocess.run(
        [str(COMPILER), *flags, *sanitize, "-x", "c++", *map(str, sources), "-o", str(built)], check=True
    )
    return built


SOURCES = ["sinkhorn.cu", "sinkhorn_resident.cu"]


class Rows(NamedTuple):
    scores: Tensor  # [P, B, K]
    queue: Tensor | None = None  # [P, N, K], or [1, N, K] for all problems
    weights: Tensor | None = None  # [P, B]
    padding: int = 0  # elements between rows

    @property
    def whole_queue(self) -> Tensor | None:
        return None if self.queue is None else self.queue.expand(len(self.scores), -1, -1)


def bytes_of(tensor: Tensor | None) -> bytes:
    if tensor is None or not tensor.numel():
        return b""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def run(
    program: Path,
    operation: str,
    rows: Rows,
    numbers: list[float],
    inputs: list[Tensor | None],
    flags: list[object],
    *,
    virtual: bool,
    order: int,
    shared: int,
    out: torch.dtype,
) -> bytes:
    (p, b, k), queue = rows.scores.shape, rows.queue
    queued = 0 if queue is None else queue.shape[1]
    one_queue = queue is not None and len(queue) != p
    sizes = [p, b, queued, k, rows.padding, virtual, rows.weights is not None, one_queue, *map(bool, flags)]
    types = [order, DTYPES[rows.scores.dtype], DTYPES[out], shared]
    padded = [None if t is None else torch.nn.functional.pad(t, (0, rows.padding)) for t in rows[:2]]
    given = torch.tensor(numbers + [0.0] * (8 - len(numbers)), dtype=torch.float64)
    found = subprocess.run(
        [str(program), operation, *(str(int(n)) for n in types + sizes)],
        input=b"".join(map(bytes_of, [given, *padded, rows.weights, *inputs])),
        capture_output=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr.decode()
    return found.stdout


def tensor_of(data: bytes, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(dtype).view(shape)


class Settings(NamedTuple):
    epsilon: float = 0.05
    n_iters: int = 3
    relax: float | None = None
    mass: float | None = None
    tol: float | None = None


def solve(
    program: Path,
    rows: Rows,
    given: Settings = Settings(),  # noqa: B008
    *,
    prior: Tensor | None = None,
    init: Tensor | None = None,
    hard: bool = False,
    out: torch.dtype | None = None,
    order: int = 0,
    shared: int = RESIDENT,
) -> tuple[Tensor, Tensor]:
    """Potentials, and assignments of dtype ``out``."""
    p, b, k = rows.scores.shape
    wide, virtual = ops.accumulator(rows.scores.dtype), given.mass is not None
    fi = 1.0 if given.relax is None else given.relax / (given.relax + given.epsilon)
    numbers = [given.epsilon, given.n_iters, fi, *(-1.0 if x is None else x for x in given[3:]), -1.0, hard]
    flags = [prior is not None, init is not None, True]
    options = {"virtual": virtual, "order": order, "shared": shared, "out": out or wide}
    data = run(program, "solve", rows, numbers, [prior, init], flags, **options)
    split = p * (k + virtual) * wide.itemsize
    potentials = tensor_of(data[:split], wide, p, k + virtual)
    return potentials, tensor_of(data[split:], out or wide, p, b, k)


def oracle(
    rows: Rows, given: Settings, *, prior: Tensor | None = None, init: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    double = [None if t is None else t.double() for t in (rows.whole_queue, prior, rows.weights, init)]
    scores = rows.scores.double()
    potentials = ops.sinkhorn_potentials(scores, *double, *given, None)
    return potentials, ops.assign_from_potentials(scores, potentials, given.epsilon, False, torch.float64)


def cosines(p: int, b: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (torch.rand(p, b, k, generator=generator(seed), dtype=torch.float64) * 2 - 1).to(dtype)


def assert_solved(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], scale: float = 1) -> None:
    """Potentials in fp32 and what follows from them, in the dtype that was asked for."""
    wide = found[0].dtype
    assert_close(found[0], expected[0], wide, 2 * scale)
    assert_close(found[1], expected[1], found[1].dtype, 2 * scale)


SHAPES = [
    (1, 1, 1),
    (1, 5, 3),
    (2, 33, 8),
    (3, 9, 17),
    (1, 70, 63),
    (2, 13, 257),
    (1, 40, 260),
    (1, 11, 1031),
]


@few
@given(
    shape=st.sampled_from(SHAPES),
    dtype=dtypes,
    queued=st.sampled_from([0, 0, 5]),
    one_queue=st.booleans(),
    padding=st.sampled_from([0, 3, 8]),
    weighted=st.booleans(),
    with_prior=st.booleans(),
    warm=st.booleans(),
    n_iters=st.integers(1, 4),
    relax=st.sampled_from([None, None, 0.1, 2.0]),
    mass=st.sampled_from([None, None, 0.4, 1.0]),
    tol=st.sampled_from([None, None, 1e-2]),
    narrow=st.booleans(),
    shared=st.sampled_from([STREAMING, RESIDENT, 12 << 10]),
    order=orders,
    seed=seeds,
)
def test_solutions_are_the_reference_s(
    program: Path,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    queued: int,
    one_queue: bool,
    padding: int,
    weighted: bool,
    with_prior: bool,
    warm: bool,
    n_iters: int,
    relax: float | None,
    mass: float | None,
    tol: float | None,
    narrow: bool,
    shared: int,
    order: int,
    seed: int,
) -> None:
    (p, b, k), g, wide = shape, generator(seed), ops.accumulator(dtype)
    scores, weights = cosines(p, b, k, dtype, seed), None
    if weighted:
        weights = (torch.rand(p, b, generator=g) * torch.randint(0, 3, (p, b), generator=g)).to(wide)
        weights[:, 0] = 1
        scores[weights == 0] = torch.nan
    queue = cosines(1 if one_queue else p, queued, k, dtype, seed + 1) if queued else None
    prior = torch.rand(p, k, generator=g).to(wide) if with_prior else None
    if prior is not None and k > 3:
        prior[:, 1] = 0
    init = torch.randn(p, k + (mass is not None), generator=g).to(wide) if warm else None
    rows, given = Rows(scores, queue, weights, padding), Settings(0.05, n_iters, relax, mass, tol)
    found = solve(
        program,
        rows,
        given,
        prior=prior,
        init=init,
        out=dtype if narrow else None,
        order=order,
        shared=shared,
    )
    expected = oracle(rows, given, prior=prior, init=init)
    expected[1][rows.scores.isnan().any(-1)] = torch.nan
    torch.testing.assert_close(found[1].isnan(), expected[1].isnan())
    assert_solved(
        (found[0], found[1].nan_to_num()), (expected[0], expected[1].nan_to_num()), 1 if wide == dtype else 2
    )
