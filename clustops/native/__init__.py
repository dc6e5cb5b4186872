"""Loads the compiled extension and gives each kernel to torch's dispatcher.

One file here for each op. ``register`` is the whole pattern: the schema, the reference as the
implementation that works on every device, and, where the extension was built, kernels that take over.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

LIBRARY = torch.library.Library("clustops", "DEF")


def _load() -> tuple[Any, str]:
    if os.environ.get("CLUSTOPS_DISABLE_NATIVE", "0") == "1":
        return None, "switched off by CLUSTOPS_DISABLE_NATIVE=1"
    try:
        return importlib.import_module("clustops.native._kernels"), ""
    except ImportError as error:
        return None, str(error)


extension, why_not = _load()

#: The reference of each op, which serves where there is no kernel.
references: dict[str, Callable[..., Any]] = {}


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Define ``clustops::<schema>``.

    Args:
        schema: ``"name(Tensor x, ...) -> Tensor"``.
        reference: plain PyTorch; serves every device that has no kernel.
        fake: shapes and dtypes of the result, from fake tensors.
        cpu, cuda: the kernels; ``None`` where the extension lacks them.
        setup_context, backward: the autograd formula. An op whose name ends in ``_backward`` gets one that
            says that there is no second derivative. An op without a formula must not be called on tensors
            that require a gradient.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    references[name] = reference
    torch.library.register_fake(f"clustops::{name}", fake, lib=LIBRARY)
    if cpu is not None:
        LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None:
        LIBRARY.impl(name, cuda, "CUDA")
    if backward is None and name.endswith("_backward"):
        backward = _no_second_derivative(name)
    if backward is not None:
        torch.library.register_autograd(
            f"clustops::{name}", backward, setup_context=setup_context, lib=LIBRARY
        )


def below_autograd() -> AbstractContextManager[Any]:
    """Ops skip the dispatcher's autograd, 6 microseconds of Python a call, where no gradient is recorded."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return nullcontext()
    guard: AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return guard


def view(tensor: torch.Tensor) -> Any:
    """``tensor`` as the extension takes it: a DLPack capsule, which shares its memory."""
    return to_dlpack(tensor)


def views(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """``view`` of each tensor, made contiguous where it is not; ``None`` stays."""
    return tuple(None if t is None else view(t.contiguous()) for t in tensors)


def stream_of(x: torch.Tensor) -> int:
    """The current stream of the GPU of ``x``, as the extension takes it."""
    return int(torch.cuda.current_stream(x.device).cuda_stream)


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` with neighbouring features, at any stride otherwise: a copy only where they are apart."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _no_second_derivative(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            f"clustops::{name} has no derivative of its own (double backward); "
            f"use clustops.reference for second derivatives"
        )

    return backward
