"""Timing, peak memory and the check that every element of a result is written."""

from __future__ import annotations

import ctypes
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .case import Inputs, Result, Run


@dataclass(frozen=True)
class Timing:
    """Seconds of one step: the median of the samples, and the middle half's width over it."""

    seconds: float
    spread: float
    samples: int


def summarise(samples: Sequence[float]) -> Timing:
    """The median and the relative interquartile range."""
    median = statistics.median(samples)
    if len(samples) < 3:
        return Timing(median, (max(samples) - min(samples)) / median, len(samples))
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, (high - low) / median, len(samples))


def interleave(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """One sample of each contestant a round, so that a noisy machine hurts all alike.

    Each round starts one further on: nobody always follows the same neighbour's cache.
    """
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(contestants[name]())
    return samples


def set_threads(threads: int) -> None:
    """One thread count for torch, faiss and every OpenMP or BLAS library loaded so far."""
    torch.set_num_threads(threads)
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(threads)
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:  # then scikit-learn, which needs it, is not here either
        return
    threadpool_limits(limits=threads)


def cpu_sampler(run: Run, calls: int, clock: Callable[[], float]) -> Callable[[], float]:
    """Seconds a call, over ``calls`` calls, by ``clock``."""

    def sample() -> float:
        start = clock()
        for _ in range(calls):
            run()
        return (clock() - start) / calls

    return sample


def cuda_sampler(runs: Sequence[Run], inputs: Sequence[Inputs], calls: int) -> Callable[[], float]:
    """Seconds a call between two events, the inputs rotated; each sample's last result must be written."""
    turns = itertools.cycle(range(len(runs)))

    def sample() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            turn = next(turns)
            result = runs[turn]()
        end.record()
        end.synchronize()
        if unwritten(result):
            raise RuntimeError("left elements of its result unwritten, or NaN")
        poison(result, inputs[turn])  # the caching allocator hands this memory to a later run
        return float(start.elapsed_time(end)) / 1e3 / calls

    return sample


def poison(result: Result, inputs: Inputs) -> None:
    """Fill a result that is no longer needed with NaN or an impossible integer, never an input."""
    kept = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    for tensor in result:
        if tensor.untyped_storage().data_ptr() not in kept:
            tensor.detach().fill_(_poison(tensor))


def unwritten(result: Result) -> bool:
    """Whether an element still holds the poison."""

    def bad(tensor: Tensor) -> Tensor:
        return tensor.isnan().any() if tensor.is_floating_point() else (tensor == _poison(tensor)).any()

    return any(bool(bad(tensor.detach())) for tensor in result)


def _poison(tensor: Tensor) -> float:
    """No index, label or count is ever this."""
    return float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min + 7


@dataclass(frozen=True)
class Observation:
    """One run, looked at: what came back, how long it took, what it allocated at its peak."""

    result: Result
    seconds: float
    peak_bytes: int | None


def observe(run: Run, device: torch.device) -> Observation:
    """Run once. Memory is the process's on a CPU, and what torch allocated on a GPU."""
    before = _reset_peak(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    after = _peak(device)
    peak = None if before is None or after is None else max(0, after - before)
    return Observation(result, seconds, peak)


def _reset_peak(device: torch.device) -> int | None:
    """Forget the peak so far; the bytes in use now, ``None`` where the system cannot say."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else freed memory that the heap keeps would hide the next peak
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)
