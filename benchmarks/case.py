"""What a benchmark is made of: a case, its implementations and its work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Result = tuple[Tensor, ...]
Run = Callable[[], Result]

OURS = "clustops"


class Skip(Exception):
    """Raised by a ``build`` or a ``make`` that cannot serve this machine; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One way to do the case. ``build`` prepares, untimed, and returns what is timed."""

    name: str
    build: Callable[[Inputs], Run]
    compiles: bool = False  # torch.compile: seconds of preparation, left out of the quick suite
    same_function: bool = True  # False: the same amount of work for another loss; timed, never compared


@dataclass(frozen=True)
class Work:
    """What one step must do at least: the floor is the slowest of the four at its measured rate."""

    flops: float = 0.0
    exps: float = 0.0
    bytes: float = 0.0
    reads: float = 0.0  # of single numbers anywhere in a table that no cache holds
    matmul: str = "fp32"  # the rate that bounds the flops where it was measured: "tf32" or "bf16"


class Target(NamedTuple):
    """How many times as fast as a peer: with AVX-512-BF16, and with plain AVX-512."""

    bf16: float | None
    avx512: float | None


def both(ratio: float) -> Target:
    """A target that does not depend on the matrix instructions."""
    return Target(ratio, ratio)


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    name: str
    make: Callable[[torch.Generator], Inputs]  # random inputs on the generator's device
    implementations: tuple[Implementation, ...]  # the first is clustops
    oracle: Callable[[Inputs], Any]  # the fp64 answer
    error: Callable[[Inputs, Any, Result], float]  # a result's distance from it
    error_name: str
    tolerance: float
    work: Work  # of one step
    steps: int = 1  # iterations in one run; times are per step
    step_name: str = "call"
    targets: Mapping[str, Target] = field(default_factory=dict)  # CPU, by peer
    target_seconds: float | None = None  # on a GPU, and for the sampler on all cores


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """``|actual - oracle| / |oracle|`` in fp64; NaN in, NaN out."""
    oracle = oracle.double()
    return float((actual.double() - oracle).norm() / oracle.norm())
