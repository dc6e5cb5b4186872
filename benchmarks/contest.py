"""One case: build every implementation, check it against fp64, then time those that run."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import measure
from .case import OURS, Case, Implementation, Inputs, Run, Skip
from .machine import load_average
from .record import CaseResult, Mode, Row

CLOCKS: dict[str, Callable[[], float]] = {"process_time": time.process_time, "wall": time.perf_counter}
SAMPLE_SECONDS = {"cpu": 0.02, "cuda": 0.002}  # shorter calls are timed in groups, of CALLS at most
CALLS = 200
ROUNDS = (3, 50)
SHORT = 2.0  # seconds: the first run of a shorter call is mostly lazy set-up, so it is looked at twice


@dataclass(frozen=True)
class Setting:
    """What all cases of a run share."""

    suite: str
    device: torch.device
    modes: list[Mode]
    peers: list[str]  # parts of names; empty for all
    seconds: float  # of timing, for each case and mode


def run_case(case: Case, setting: Setting) -> CaseResult:
    """The rows of one case, each checked before it was timed, and the reasons of those that are missing."""
    result = CaseResult(case)
    try:
        sets = _input_sets(case, setting.device)
        oracle = case.oracle(sets[0])
    except Exception as error:
        for implementation in case.implementations:
            _skip(result, implementation.name, error)
        return result
    for mode in setting.modes:
        result.loads[mode.name] = load_average()
        measure.set_threads(mode.threads)
        torch.compiler.reset()  # else many cases reach the recompile limit, and peers fall back to eager
        runs = _build_all(result, sets, setting)
        measure.set_threads(mode.threads)  # again, for the libraries that building loaded
        gc.collect()
        estimates = {}
        for name, built in list(runs.items()):
            try:
                estimates[name] = _check(result, name, built[0], sets[0], oracle, setting.device)
            except Exception as error:
                _skip(result, name, error)
                del runs[name]
        if runs:
            _time(result, runs, estimates, sets, mode, setting)
    return result


def _input_sets(case: Case, device: torch.device) -> list[Inputs]:
    """One set on a CPU; on a GPU as many as it takes to leave the second-level cache, 64 at most."""
    first = case.make(torch.Generator(device).manual_seed(0))
    if device.type == "cpu":
        return [first]
    gc.collect()
    torch.cuda.empty_cache()
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    copies = min(64, math.ceil(3 * cache / sum(tensor.nbytes for tensor in first.values())))
    return [first] + [case.make(torch.Generator(device).manual_seed(seed)) for seed in range(1, copies)]


def _build_all(result: CaseResult, sets: list[Inputs], setting: Setting) -> dict[str, list[Run]]:
    runs = {}
    for implementation in result.case.implementations:
        name = implementation.name
        if name in result.skipped:
            continue
        try:
            _refuse_left_out(implementation, setting)
            runs[name] = [implementation.build(inputs) for inputs in sets]
        except Exception as error:
            _skip(result, name, error)
    return runs


def _refuse_left_out(implementation: Implementation, setting: Setting) -> None:
    name = implementation.name.lower()
    if name != OURS and setting.peers and not any(peer.lower() in name for peer in setting.peers):
        raise Skip("not among --peers")
    if implementation.compiles and setting.suite == "quick":
        raise Skip("takes seconds to compile, left out of the quick suite")


def _skip(result: CaseResult, name: str, error: Exception) -> None:
    """Name a missing implementation, or one that broke, with the reason; it has no row."""
    reason = (str(error).strip().splitlines() or [""])[0][:160]
    if isinstance(error, ImportError) and name != OURS:
        reason = f"not installed: {reason}"
    elif not isinstance(error, Skip):
        reason = f"failed: {type(error).__name__}: {reason}"
    result.skipped[name] = reason
    result.rows = [row for row in result.rows if row.name != name]


def _check(
    result: CaseResult, name: str, run: Run, inputs: Inputs, oracle: Any, device: torch.device
) -> float:
    """Seconds of one run, once its answer was compared with fp64 and looked through for gaps."""
    case = result.case
    seen = measure.observe(run, device)
    same_function = next(i.same_function for i in case.implementations if i.name == name)
    error = case.error(inputs, oracle, seen.result) if same_function else None
    if seen.seconds < SHORT:
        measure.poison(seen.result, inputs)
        del seen
        seen = measure.observe(run, device)
        if measure.unwritten(seen.result):
            raise RuntimeError("left elements of its result unwritten, or NaN")
    row = result.row(name)
    if row is None:
        row = Row(name, error, seen.peak_bytes)
        result.rows.append(row)
    row.wrong |= error is not None and not error <= case.tolerance
    return seen.seconds


def _time(
    result: CaseResult,
    runs: dict[str, list[Run]],
    estimates: dict[str, float],
    sets: list[Inputs],
    mode: Mode,
    setting: Setting,
) -> None:
    contestants, per_round = {}, 0.0
    for name, built in runs.items():
        wanted = math.ceil(SAMPLE_SECONDS[setting.device.type] / max(estimates[name], 1e-9))
        calls = min(max(wanted, 1), CALLS)
        per_round += calls * estimates[name]
        if mode.clock == "events":
            sample = measure.cuda_sampler(built, sets, calls)
        else:
            sample = measure.cpu_sampler(built[0], calls, CLOCKS[mode.clock])
        contestants[name] = _guarded(result, name, sample)
    rounds = min(max(ROUNDS[0], int(setting.seconds / per_round)), ROUNDS[1])
    for name, samples in measure.interleave(contestants, rounds).items():
        if row := result.row(name):
            row.timings[mode.name] = measure.summarise([sample / result.case.steps for sample in samples])


def _guarded(result: CaseResult, name: str, sample: Callable[[], float]) -> Callable[[], float]:
    """The same sampler, except that one which breaks midway only drops out."""

    def guarded() -> float:
        if name not in result.skipped:
            try:
                return sample()
            except Exception as error:
                _skip(result, name, error)
        return math.nan

    return guarded
