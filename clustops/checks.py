"""Argument checks shared by every public function.

Each message names the argument, what was expected, what came, and the cure.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# On a GPU a check of values would synchronise with the host, so there it runs only when asked for.
CHECK_VALUES_EVERYWHERE = os.environ.get("CLUSTOPS_CHECK_VALUES", "0") == "1"


class ClustopsWarning(UserWarning):
    """The category of every warning that this package raises."""


def reject(
    name: str, expected: str, got: object, cure: str, error: type[ValueError] | type[TypeError] = ValueError
) -> NoReturn:
    """Raise ``error`` with the one sentence that all bad arguments get.

    >>> reject("k", "at least 1", 0, "ask for one cluster or more")
    Traceback (most recent call last):
    ValueError: k must be at least 1, got 0; ask for one cluster or more
    """
    raise error(f"{name} must be {expected}, got {got}; {cure}")


def shape_of(array: Any) -> str:
    """``[2, 3]``, as shapes are written in messages; of all that has a shape."""
    return str(list(array.shape))


def values_are_checked(tensor: Tensor) -> bool:
    """Whether this tensor's values may be looked at: never while tracing, on a GPU only when asked for."""
    if torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor):
        return False
    return tensor.is_cpu or CHECK_VALUES_EVERYWHERE


def check_tensor(tensor: Any, name: str, stack: str = "torch.stack(views)") -> None:
    """Raise ``TypeError`` unless ``tensor`` is a dense tensor; ``stack`` makes one of a list of tensors."""
    if isinstance(tensor, (list, tuple)) and any(isinstance(part, Tensor) for part in tensor):
        reject(name, "one tensor", f"a {type(tensor).__name__} of tensors", f"stack them: {stack}", TypeError)
    if not isinstance(tensor, Tensor):
        reject(name, "a tensor", type(tensor).__name__, "pass torch.as_tensor(...) of it", TypeError)
    if tensor.layout != torch.strided:
        reject(name, "a dense tensor", tensor.layout, f"convert it: {name}.to_dense()", TypeError)


def check_floating(tensor: Tensor, name: str, stack: str = "torch.stack(views)") -> None:
    """Raise ``TypeError`` unless ``tensor`` is a floating point tensor of a supported dtype."""
    check_tensor(tensor, name, stack)
    check_floating_dtype(tensor.dtype, name)


def check_floating_dtype(dtype: torch.dtype, name: str) -> None:
    """Raise ``TypeError`` unless ``dtype`` is a supported floating point one."""
    if dtype not in FLOATING:
        reject(name, "float32, float64, bfloat16 or float16", dtype, "convert it to float32", TypeError)


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise ``ValueError`` if any value is NaN or infinite, where values are checked."""
    if not values_are_checked(tensor) or tensor.numel() == 0:
        return
    # One pass without a temporary: a NaN or an infinity always makes the sum non-finite. Only a sum that
    # overflows by itself (or a real fault) pays for the exact look.
    if bool(torch.isfinite(tensor.detach().sum())):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        reject(
            name,
            "finite",
            f"{bad} NaN or infinite values of {tensor.numel()}",
            "remove or mask these rows, or look for a diverged model",
        )


def check_same_device(tensor: Tensor, name: str, other: Any, other_name: str) -> None:
    """Raise ``ValueError`` unless both lie on one device; ``other`` is all that has a device."""
    if tensor.device != other.device:
        reject(
            name,
            f"on the device of {other_name}, {other.device}",
            tensor.device,
            f"move it: {name}.to({other_name}.device)",
        )


def check_device(device: torch.device | str, name: str) -> None:
    """Raise ``ValueError`` unless tensors with values can lie on ``device`` here."""
    # Torch asserts where it is built without the device.
    with suppress(RuntimeError, AssertionError):
        if torch.empty(0, device=device).device.type != "meta":
            return
    cure = "clustops doctor shows what there is"
    reject(name, "cpu or a device of this torch", repr(str(device)), cure)


def check_positive(value: float, name: str, cure: str) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number above 0 (``TypeError`` if it is no number)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
        reject(name, "a number above 0", type(value).__name__, cure, TypeError)
    if not 0 < value < float("inf"):
        reject(name, "finite and above 0", value, cure)


def check_count(value: int, name: str, least: int, cure: str) -> None:
    """Raise unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        reject(name, f"an integer of at least {least}", repr(value), cure, TypeError)
    if value < least:
        reject(name, f"at least {least}", value, cure)


def check_choice(value: object, name: str, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        quoted = ", ".join(repr(c) for c in choices)
        reject(name, f"one of {quoted}", repr(value), "pick one of these names")
