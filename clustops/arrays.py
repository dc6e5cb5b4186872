"""NumPy, CuPy, JAX and any other DLPack array in; the same kind out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import reject


def to_tensor(array: Any, name: str) -> Tensor:
    """A tensor that shares memory with ``array`` where its kind allows (a read-only array is never written).

    Raises:
        TypeError: ``array`` is neither a tensor, nor a NumPy array, nor speaks DLPack, nor is a list of numbers.
    """
    if isinstance(array, Tensor):
        return array
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "biuf":
            reject(name, "an array of numbers", f"dtype {array.dtype}", "convert it with astype", TypeError)
        return _share(array)
    if hasattr(array, "__dlpack__"):
        return torch.utils.dlpack.from_dlpack(array)
    if isinstance(array, (list, tuple)):
        return to_tensor(np.asarray(array), name)
    reject(
        name,
        "a tensor, a NumPy array or a DLPack array",
        type(array).__name__,
        "convert it to one of these",
        TypeError,
    )


def _share(array: np.ndarray[Any, Any]) -> Tensor:
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if array.flags.writeable:
        return torch.from_numpy(array)
    # torch warns about read-only memory because its ops could write to it; ours never write to an input.
    shared = array.view()
    interface = dict(shared.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    holder = type("ReadOnly", (), {"__array_interface__": interface, "owner": array})()
    return torch.from_numpy(np.asarray(holder))


def like(array: Any) -> Callable[[Tensor], Any]:
    """The function that turns a result tensor into the kind of array that ``array`` is.

    Lists and tuples give NumPy arrays. A tensor goes back as it is.
    """
    if isinstance(array, Tensor):
        return lambda tensor: tensor
    if isinstance(array, (np.ndarray, list, tuple)):
        return lambda tensor: tensor.detach().cpu().numpy()
    namespace = type(array).__module__.partition(".")[0]
    if namespace == "cupy":
        import cupy

        return lambda tensor: cupy.from_dlpack(tensor.detach())
    if namespace in ("jax", "jaxlib"):
        import jax

        return lambda tensor: jax.dlpack.from_dlpack(tensor.detach().contiguous())
    return lambda tensor: tensor
