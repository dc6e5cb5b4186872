"""Where the rows of k-means come from: memory, a file, anything that gives arrays by slices.

They come in chunks, so that no more than a few chunks of what is not in memory are there at once.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import arrays
from .checks import check_finite, reject, shape_of
from .reference.kmeans_ops import accumulator, unit_rows

_CHUNK = 1 << 24  # numbers in one chunk of rows in memory that must be copied
_READ = 1 << 22  # numbers read at a time
_BLOCK = 1 << 15  # numbers normalised at a time
_PATIENCE = 1.0  # seconds until a pass gets a bar


class Reader:
    """``[N, D]`` rows that are read by slices; to checks it looks like a tensor in host memory."""

    device = torch.device("cpu")
    ndim = 2

    def __init__(self, source: Any, name: str, dtype: torch.dtype | None = None) -> None:
        """Reads nothing yet.

        Args:
            source: has ``shape`` ``[N, D]`` and ``dtype``, and gives an array for ``source[start:stop]``.
            dtype: of the rows where it is not that of ``source``.
        """
        if len(source.shape) != 2:
            cure = "give it the shape of its rows, or pass batches of problems as arrays"
            reject(name, "[N, D] where it is read by slices", list(source.shape), cure)
        self.source, self.name = source, name
        self.shape = torch.Size(int(size) for size in source.shape)
        self.stored = _torch_dtype(source.dtype, name)
        self.dtype = self.stored if dtype is None else dtype

    def read(self, rows: slice) -> Tensor:
        """These rows, in the dtype in which they are stored; a slice inside ``[0, N)``."""
        shape = [rows.stop - rows.start, self.shape[1]]
        if shape[0] == 0:
            return torch.empty(shape, dtype=self.stored)
        array = self.source[rows]
        if isinstance(array, np.memmap):
            array = _touched(array)
        is_array = isinstance(array, Tensor) or hasattr(array, "__dlpack__")
        part = arrays.to_tensor(array if is_array else np.asarray(array), self.name)
        if list(part.shape) != shape or part.dtype != self.stored or part.device != self.device:
            expected = f"{shape} of {self.stored} in host memory at [{rows.start}:{rows.stop}]"
            got = f"{shape_of(part)} of {part.dtype} on {part.device}"
            reject(self.name, expected, got, "let its shape and dtype be those of what its slices give")
        return part.detach()

    def take(self, index: Tensor) -> Tensor:
        """The rows with these indices: ``[m]`` to ``[m, D]``, each read once."""
        distinct, place = index.cpu().unique(return_inverse=True)
        return torch.cat([self.read(slice(n, n + 1)) for n in distinct.tolist()])[place]


def is_read(x: Any) -> bool:
    """Whether ``x`` is read by slices: a memory map of rows, or no array but with what ``Reader`` needs."""
    if isinstance(x, np.memmap):
        return x.ndim == 2
    is_array = isinstance(x, (Tensor, np.ndarray, np.generic)) or hasattr(x, "__dlpack__")
    if is_array or hasattr(x, "toarray"):  # the latter is sparse
        return False
    return all(hasattr(x, name) for name in ("shape", "dtype", "__getitem__"))


class Source:
    """The rows of ``B`` problems on their way to where they are used, in fp32 (fp64 for fp64)."""

    def __init__(
        self,
        x: Tensor | Reader,
        *,
        metric: str = "l2",
        device: torch.device | None = None,
        progress: bool = False,
        narrow: bool = False,
    ) -> None:
        """Reads nothing yet.

        Args:
            x: ``[B, N, D]``, or ``[N, D]`` for one problem.
            metric: ``"cosine"`` normalises the rows.
            device: where they are used; default: where they lie.
            progress: show a bar for each pass of several chunks that takes more than a second.
            narrow: chunks of bf16 or fp16 rows stay so; kernels widen them as they read them.
        """
        self.x = x if isinstance(x, Reader) or x.ndim == 3 else x.unsqueeze(0)
        self.metric, self.progress = metric, progress
        self.name = x.name if isinstance(x, Reader) else "x"
        self.device = x.device if device is None else device
        self.dtype = accumulator(x.dtype)
        self.chunk_dtype = x.dtype if narrow and metric == "l2" else self.dtype
        shape: tuple[int, ...] = (1, *x.shape) if x.ndim == 2 else tuple(x.shape)
        self.batch, self.n, self.d = shape

    def chunks(
        self, copies: int = 1, *, small: bool = False, width: int = 0
    ) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the rows and ``[B, n, D]`` of them; all of ``x`` where that needs no copy.

        A chunk may be overwritten once the next one is asked for.

        Args:
            copies: how often the caller repeats each problem.
            small: never all of ``x``, because the caller makes something of its size.
            width: how many numbers the caller makes of a row, where that is more than D.
        """
        slices = self._slices(self.batch * copies * max(self.d, width), copies, small)
        parts: Iterator[Tensor]
        if isinstance(self.x, Reader):
            parts = (part.unsqueeze(0) for part in read_ahead(self.x.read, slices))
        else:
            rows_in_memory = self.x
            parts = (rows_in_memory[:, rows] for rows in slices)
        if self.device.type == "cuda" and self.x.device.type == "cpu":
            parts = _staged(parts, self.device)
        pairs = zip(slices, parts, strict=True)
        watched = self.progress and len(slices) > 1
        for rows, part in (
            bar(pairs, "chunks", len(slices), leave=False, delay=_PATIENCE) if watched else pairs
        ):
            yield rows, self._prepare(part)

    def at_once(self) -> Tensor | None:
        """``[B, N, D]`` where that is one chunk, otherwise ``None``."""
        if len(self._slices(self.batch * self.d, 1, small=False)) > 1:
            return None
        return next(self.chunks())[1]

    def checked_chunks(self, width: int) -> Iterator[tuple[slice, Tensor]]:
        """``chunks`` without a NaN or an infinity, or an error."""
        for rows, chunk in self.chunks(small=True, width=width):
            check_finite(chunk, self.name)
            yield rows, chunk

    def take(self, index: Tensor) -> Tensor:
        """The rows with these indices in ``[0, N)``: ``[B, m]`` to ``[B, m, D]``."""
        if isinstance(self.x, Reader):
            return self._prepare(self.x.take(index.flatten()).unsqueeze(0)).to(self.dtype)
        where = index.unsqueeze(-1).expand(-1, -1, self.d).to(self.x.device)
        return self._prepare(self.x.gather(1, where)).to(self.dtype)

    def _slices(self, per_row: int, copies: int, small: bool) -> list[slice]:
        read = isinstance(self.x, Reader)
        used_as_it_lies = (
            isinstance(self.x, Tensor)
            and self.x.device == self.device
            and self.x.dtype == self.chunk_dtype
            and (self.x.stride(-1) == 1 or self.d == 1)
            and self.metric != "cosine"
            and min(copies, self.batch) == 1
        )
        if used_as_it_lies and not small:
            return [slice(0, self.n)]
        size = max(1, (_READ if read else _CHUNK) // per_row)
        return [slice(start, min(start + size, self.n)) for start in range(0, max(1, self.n), size)]

    def _prepare(self, part: Tensor) -> Tensor:
        # A copy to the host would be read before it has ended.
        part = part.to(self.device, self.chunk_dtype, non_blocking=self.device.type != "cpu")
        return _normalised(part) if self.metric == "cosine" else part


def _normalised(part: Tensor) -> Tensor:
    """``unit_rows``, on a CPU in blocks whose temporaries stay in a cache."""
    part = part.contiguous()
    if part.device.type != "cpu":
        return unit_rows(part)
    result = torch.empty_like(part)
    size = max(1, _BLOCK // (part.shape[0] * part.shape[2]))
    for start in range(0, part.shape[1], size):
        result[:, start : start + size] = unit_rows(part[:, start : start + size])
    return result


def read_ahead(read: Callable[[slice], Tensor], slices: list[slice]) -> Iterator[Tensor]:
    """``read`` of each slice; while the caller works on one, a thread reads the next.

    What ``read`` raises is raised here. The thread ends with the iterator, however that ends.
    """
    if len(slices) == 1:
        yield read(slices[0])
        return
    with ThreadPoolExecutor(1, "clustops-reader") as thread:
        ahead = thread.submit(read, slices[0])
        for following in slices[1:]:
            part = ahead.result()
            ahead = thread.submit(read, following)
            yield part
        yield ahead.result()


def bar(iterable: Iterable[Any] | None, name: str, total: int, **options: Any) -> Any:
    """A tqdm bar over ``iterable``."""
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm; install it: pip install 'clustops[demo]'") from error
    return tqdm(iterable, desc=name, total=total, **options)


def _torch_dtype(dtype: Any, name: str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    return arrays.to_tensor(np.empty(0, dtype), name).dtype


def _touched(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A part of a memory map once its pages are in memory; its rows side by side."""
    if not array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    array.reshape(-1).view(np.uint8)[:: mmap.PAGESIZE].max()
    return array


def _staged(parts: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Host tensors on a GPU; while the caller's kernels work on one, the next is copied.

    Two pairs of buffers take turns: a pinned one, so that the copy is asynchronous although the rows lie in
    pageable memory, and one on the GPU. No part is larger than those before it.
    """
    copier = torch.cuda.Stream(device)
    pairs: list[_Pair] = []
    for turn, part in enumerate(parts):
        caller = torch.cuda.current_stream(device)
        if turn < 2:
            pairs.append(_Pair(part, device, caller))
        pair = pairs[turn % 2]
        pair.copied.synchronize()  # the pinned buffer is free: what the host wrote last has left it
        pinned = pair.pinned[: part.numel()].view(part.shape)
        pinned.copy_(part)
        moved = pair.moved[: part.numel()].view(part.shape)
        copier.wait_event(pair.used)
        with torch.cuda.stream(copier):
            moved.copy_(pinned, non_blocking=True)
        pair.copied.record(copier)
        caller.wait_event(pair.copied)
        yield moved
        # The caller has enqueued all that reads this part.
        pair.used.record(torch.cuda.current_stream(device))


class _Pair:
    """A pinned buffer, one on the GPU, and the events after which each may be overwritten."""

    def __init__(self, part: Tensor, device: torch.device, caller: torch.cuda.Stream) -> None:
        self.pinned = torch.empty(part.numel(), dtype=part.dtype, pin_memory=True)
        self.moved = torch.empty(part.numel(), dtype=part.dtype, device=device)
        self.copied, self.used = torch.cuda.Event(), torch.cuda.Event()
        # The GPU's memory may have belonged to a tensor that the caller's stream still works on.
        self.used.record(caller)
