"""What may serve the ops on tensors of the CPU: each set of instructions, the reference, a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from clustops import native


def instruction_sets() -> list[str]:
    """Those that this machine can run, the best first."""
    return native.extension.instruction_sets() if native.extension else []


# Kernels have tests of their own on every set; of whole functions, the default suite runs the two ends.
ON_CPU = [
    *instruction_sets()[:1],
    *(pytest.param(name, marks=pytest.mark.slow) for name in instruction_sets()[1:]),
    "reference",
]
EVERYWHERE = [*ON_CPU, pytest.param("cuda", marks=pytest.mark.cuda)]


@contextmanager
def served_by(path: str) -> Iterator[None]:
    """Every op is served by ``path``, also in processes that are forked meanwhile."""
    library = torch.library.Library("clustops", "IMPL")
    before = native.extension.instruction_set() if native.extension else ""
    if path in instruction_sets():
        native.extension.use_instruction_set(path)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name, reference in native.references.items():
                op = getattr(torch.ops.clustops, name).default
                serve = on_gpu(op) if path == "cuda" else reference
                library.impl(name, serve, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
        if native.extension:
            native.extension.use_instruction_set(before)


def on_gpu(op: Any) -> Callable[..., Any]:
    """The op with tensors moved to the GPU, and what it writes and returns moved back."""
    written = [i for i, argument in enumerate(op._schema.arguments) if argument.is_write]

    def serve(*args: Any) -> Any:
        there = tree_map_only(Tensor, lambda t: t.cuda(), args)
        result = op(*there)
        for i in written:
            args[i].copy_(there[i])
        return tree_map_only(Tensor, lambda t: t.cpu(), result)

    return serve
