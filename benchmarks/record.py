"""The results of one case, the ratios drawn from them, and their JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from .case import OURS, Case
from .floors import Floors, amount
from .measure import Timing


class Mode(NamedTuple):
    """How a pass is timed: ``"process_time"``, ``"wall"`` or ``"events"``."""

    name: str
    threads: int
    clock: str


@dataclass
class Row:
    """One implementation of one case."""

    name: str
    error: float | None  # from the fp64 answer; None where it computes another function
    peak_bytes: int | None
    wrong: bool = False
    timings: dict[str, Timing] = field(default_factory=dict)  # by mode

    @property
    def comparable(self) -> bool:
        """Whether this may be the best peer: it computes the same function, correctly."""
        return self.error is not None and not self.wrong


@dataclass
class CaseResult:
    """Everything measured for one case; ``skipped`` maps an implementation to the reason."""

    case: Case
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    loads: dict[str, float] = field(default_factory=dict)  # load average as each mode began

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def ratios(self, mode: str) -> dict[str, float]:
        """How many times as fast as each other row clustops is; under its own name, as the best peer."""
        ours = self.row(OURS)
        if ours is None or mode not in ours.timings:
            return {}
        mine = ours.timings[mode].seconds
        others = [row for row in self.rows if row.name != OURS and mode in row.timings]
        ratios = {row.name: row.timings[mode].seconds / mine for row in others}
        if peers := [ratios[row.name] for row in others if row.comparable]:
            ratios[OURS] = min(peers)
        return ratios

    @property
    def failed(self) -> bool:
        """Whether clustops itself broke here, or came out wrong."""
        ours = self.row(OURS)
        return self.skipped.get(OURS, "").startswith("failed") or (ours is not None and ours.wrong)


def target_for(case: Case, peer: str, instruction_sets: list[str]) -> float | None:
    """The ratio to reach against this peer on a processor with these instructions."""
    target = case.targets.get(peer)
    if target is None:
        return None
    if "avx512_bf16" in instruction_sets:
        return target.bf16
    return target.avx512 if "avx512f" in instruction_sets else None


def case_json(
    result: CaseResult, modes: list[Mode], floors: dict[str, Floors], machine: dict[str, Any]
) -> dict[str, Any]:
    """One case: its floors by mode, its rows, what was skipped and why."""
    case = result.case
    bounds = {mode.name: floors[mode.name].of(case.work) for mode in modes}
    ratios = {mode.name: result.ratios(mode.name) for mode in modes}
    rows = []
    for row in result.rows:
        timings = {}
        for mode, timing in row.timings.items():
            seconds, limit = bounds[mode]
            timings[mode] = {
                "seconds": timing.seconds,
                "spread": timing.spread,
                "samples": timing.samples,
                "rate": amount(case.work, limit) / timing.seconds,
                "of_floor": seconds / timing.seconds,
                "ratio": ratios[mode].get(row.name),
            }
        rows.append(
            {
                "name": row.name,
                "error": row.error if row.error is not None and math.isfinite(row.error) else None,
                "wrong": row.wrong,
                "comparable": row.comparable,
                "peak_bytes": row.peak_bytes,
                "target": target_for(case, row.name, machine["instruction_sets"]),
                "timings": timings,
            }
        )
    return {
        "name": case.name,
        "step": case.step_name,
        "steps": case.steps,
        "error_name": case.error_name,
        "tolerance": case.tolerance,
        "target_seconds": case.target_seconds,
        "work": {name: getattr(case.work, name) for name in ("flops", "exps", "bytes", "reads")},
        "floors": {mode: {"seconds": bound[0], "limit": bound[1]} for mode, bound in bounds.items()},
        "load_averages": result.loads,
        "failed": result.failed,
        "rows": rows,
        "skipped": result.skipped,
    }


def header(
    op: str, suite: str, machine: dict[str, Any], modes: list[Mode], floors: dict[str, Floors]
) -> dict[str, Any]:
    """What one op's JSON file holds before the first case; the first mode is the one to quote."""
    return {
        "schema": 1,
        "op": op,
        "suite": suite,
        "machine": machine,
        "modes": [mode._asdict() for mode in modes],
        "floors": {name: asdict(floor) for name, floor in floors.items()},
        "cases": [],
    }
