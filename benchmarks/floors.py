"""The rates this machine reaches today, and the time under which no implementation can go."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .case import Work


@dataclass(frozen=True)
class Floors:
    """Rates a second by name: flops "fp32", "tf32", "bf16", then "exp", "bytes" and random "reads"."""

    threads: int
    rates: dict[str, float]
    source: str

    def of(self, work: Work) -> tuple[float, str]:
        """The least seconds that ``work`` takes, and the rate that says so."""
        matmul = work.matmul if work.matmul in self.rates else "fp32"
        needs = {matmul: work.flops, "exp": work.exps, "bytes": work.bytes, "reads": work.reads}
        times = {name: amount / self.rates[name] for name, amount in needs.items() if name in self.rates}
        limit = max(times, key=lambda name: times[name])
        return times[limit], limit


def amount(work: Work, limit: str) -> float:
    """How much of the limiting resource ``work`` needs."""
    return {"exp": work.exps, "bytes": work.bytes, "reads": work.reads}.get(limit, work.flops)


def measure_cpu(threads: int, seconds: float) -> Floors:
    """FMA, bf16 tile, exp and stream rates by the extension's loops, or by torch where it was not built.

    Random reads are torch's gather from a table of 512 MB.
    """
    from clustops.native import extension

    stream_bytes = 1 << 26
    if extension is not None and hasattr(extension, "measure_fma"):
        rates = {
            "fp32": extension.measure_fma(seconds, threads) * 1e9,
            "exp": extension.measure_exp(seconds, threads) * 1e9,
            "bytes": extension.measure_stream(stream_bytes, seconds, threads) * 1e9,
        }
        tiles = extension.measure_matmul(seconds, threads) * 1e9
        if tiles > 0:
            rates["bf16"] = tiles
        rates["reads"] = _reads(seconds)
        return Floors(threads, rates, "the extension's FMA, bf16 tile, exp and stream loops, torch gather")
    a, b, c = torch.randn(3, 1024, 1024).unbind()
    x, y = torch.randn(2, 1 << 15).unbind()  # 256 KB: stays in the second-level cache
    source, target = torch.randn(2, stream_bytes // 8).unbind()
    rates = {
        "fp32": _rate(2 * 1024**3, lambda: torch.mm(a, b, out=c), seconds),
        "exp": _rate(x.numel(), lambda: torch.exp(x, out=y), seconds),
        "bytes": _rate(stream_bytes, lambda: target.copy_(source), seconds),
        "reads": _reads(seconds),
    }
    return Floors(threads, rates, "torch matmul, exp, copy and gather, because the extension is absent")


def _reads(seconds: float) -> float:
    table = torch.ones(1 << 27, dtype=torch.int32)
    index = torch.randint(table.numel(), (1 << 18,))
    target = torch.empty(index.shape, dtype=torch.int32)
    return _rate(index.numel(), lambda: torch.gather(table, 0, index, out=target), seconds)


def _rate(units: float, run: Callable[[], object], seconds: float) -> float:
    """Units a second of the fastest call: a floor is the best the machine can do."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return units / best


def measure_cuda() -> Floors:
    """A large bf16 and a large TF32 matmul on random data, and a device-to-device copy."""
    n = 8192
    rates = {
        "bf16": _matmul_rate(torch.randn(3, n, n, device="cuda", dtype=torch.bfloat16)),
        "tf32": _tf32_rate(torch.randn(3, n, n, device="cuda")),
    }
    source, target = torch.randn(2, 1 << 29, device="cuda").unbind()
    rates["bytes"] = 2 * source.nbytes / _event_seconds(lambda: target.copy_(source))
    return Floors(0, rates, "torch matmul on random data (bf16, TF32) and a device-to-device copy")


def _matmul_rate(operands: torch.Tensor) -> float:
    a, b, c = operands.unbind()
    return 2 * float(a.shape[0]) ** 3 / _event_seconds(lambda: torch.mm(a, b, out=c))


def _tf32_rate(operands: torch.Tensor) -> float:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return _matmul_rate(operands)
    finally:
        torch.set_float32_matmul_precision(before)


def _event_seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Seconds of the median call between two events."""
    for _ in range(3):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return float(times[repeats // 2]) / 1e3
