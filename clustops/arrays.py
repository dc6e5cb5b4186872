"""NumPy, CuPy, JAX and any other DLPack array in; the same kind out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import check_tensor, reject


def to_tensor(array: Any, name: str) -> Tensor:
    """A tensor that shares memory with ``array`` where its kind allows (a read-only array is never written).

    Raises:
        TypeError, ValueError: ``array`` is no tensor, no array or list of real numbers, and has no DLPack.
    """
    if isinstance(array, Tensor):
        check_tensor(array, name)
        return array
    if isinstance(array, np.ndarray):
        if array.dtype.name == "bfloat16":  # of the package ml_dtypes, as in JAX
            return _share(array.view(np.uint16)).view(torch.bfloat16)
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            reject(
                name, "an array of real numbers", f"dtype {array.dtype}", "convert it with astype", TypeError
            )
        return _share(array)
    if hasattr(array, "__dlpack__"):
        return torch.utils.dlpack.from_dlpack(array)
    if isinstance(array, (list, tuple)):
        return to_tensor(_rectangular(array, name), name)
    reject(
        name,
        "a tensor, a NumPy array or a DLPack array",
        type(array).__name__,
        "convert it to one of these",
        TypeError,
    )


def _rectangular(rows: list[Any] | tuple[Any, ...], name: str) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(rows)
    except ValueError:
        reject(name, "a list of rows of one length", "rows of several lengths", "pad or cut the rows")


def _share(array: np.ndarray[Any, Any]) -> Tensor:
    # torch has no negative strides, no foreign byte order, no strides between elements.
    size = array.dtype.itemsize
    if not array.dtype.isnative or any(stride < 0 or stride % size for stride in array.strides):
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if array.flags.writeable:
        return torch.from_numpy(array)
    return torch.from_numpy(np.asarray(_Writeable(array)))


class _Writeable:
    """A read-only array that says it is not, and lives as long as what is made of it.

    torch warns about read-only memory because its ops could write to it; ours never write to an input.
    """

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def like(array: Any) -> Callable[[Tensor], Any]:
    """The function that turns a result tensor into the kind of array that ``array`` is.

    Lists and tuples give NumPy arrays. A tensor goes back as it is. JAX holds 64-bit results in 32 bits
    unless ``jax_enable_x64`` is set.
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
