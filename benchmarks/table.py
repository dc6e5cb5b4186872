"""The printed table: one op, its cases, a line an implementation, from the same document as the JSON."""

from __future__ import annotations

from typing import Any

from .case import OURS

UNITS = {"exp": "Gexp/s", "bytes": "GB/s", "reads": "Gread/s"}
COLUMNS = ("", "median", "spread", "rate", "of floor", "faster", "target", "wall", "memory", "error")
LINE = "  {:<32}{:>9} {:>6} {:>14} {:>8} {:>7} {:>15} {:>7} {:>9} {:>7}"


def heading(document: dict[str, Any]) -> str:
    """The machine, the clock to quote, the floors, and the columns."""
    machine, modes = document["machine"], document["modes"]
    faster = "faster: how many times as fast as that row clustops is (its own row: as the best peer)"
    if len(modes) > 1:
        faster += f"; wall: the same by {_clock(modes[1])}"
    return "\n".join(
        [
            f"== {document['op']}, suite {document['suite']}, commit {machine['commit']} ==",
            f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, "
            + f"{' '.join(machine['instruction_sets'])}; extension {machine['native']}",
            *(f"floor, {name}: {_rates(floor)}" for name, floor in document["floors"].items()),
            f"median: {_clock(modes[0])}; of floor: the floor's share of it",
            faster,
            LINE.format(*COLUMNS).rstrip(),
        ]
    )


def case_lines(case: dict[str, Any], modes: list[dict[str, Any]]) -> str:
    """One case: its title, a line an implementation, and the skipped ones by name."""
    floor = case["floors"][modes[0]["name"]]
    loads = ", ".join(f"{load:.2f}" for load in case["load_averages"].values())
    lines = [
        case["name"],
        f"  per {case['step']}; floor {seconds(floor['seconds'])} by {floor['limit']}; load average {loads}; "
        f"error: {case['error_name']}",
        *(_row(case, row, modes) for row in case["rows"]),
    ]
    for name, reason in case["skipped"].items():
        lines.append(f"  {name:<32}{reason if reason.startswith('failed') else 'skipped: ' + reason}")
    return "\n".join(lines)


def verdict(document: dict[str, Any]) -> str:
    """Targets met and missed, every peer that is faster, every case that clustops failed."""
    mode = document["modes"][0]["name"]
    rows = [(case, row) for case in document["cases"] for row in case["rows"]]
    reached = [(case, row, hit) for case, row in rows if (hit := reaches(case, row, mode)) is not None]
    missed = [_sentence(case, row, mode, aim=True) for case, row, hit in reached if not hit]
    slower = [_sentence(case, row, mode) for case, row in rows if _loses(row, mode)]
    failed = [case["name"] for case in document["cases"] if case["failed"]]
    counts = f"targets met {len(reached) - len(missed)}, missed {len(missed)}; faster peers {len(slower)}"
    return "\n".join(
        [f"{document['op']}: {counts}"]
        + [f"  missed  {text}" for text in missed]
        + [f"  slower  {text}" for text in slower]
        + [f"  FAILED  {text}" for text in failed]
    )


def reaches(case: dict[str, Any], row: dict[str, Any], mode: str) -> bool | None:
    """Whether a row's target is met: the seconds on clustops' own row, the ratio on a peer's; else None.

    The seconds are those of the whole machine: by the last mode, the wall clock at all threads.
    """
    if mode not in row["timings"]:
        return None
    if row["name"] == OURS:
        limit = case["target_seconds"]
        return None if limit is None else bool(_whole_machine(row) <= limit)
    ratio = _ratio(row, mode)
    return None if row["target"] is None or ratio is None else bool(ratio >= row["target"])


def _whole_machine(row: dict[str, Any]) -> float:
    *_, last = row["timings"].values()
    return float(last["seconds"])


def seconds(value: float) -> str:
    """Three figures and a unit."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _row(case: dict[str, Any], row: dict[str, Any], modes: list[dict[str, Any]]) -> str:
    quoted = modes[0]["name"]
    timing = row["timings"].get(quoted)
    if timing is None:
        return f"  {row['name']:<32}not timed"
    unit = UNITS.get(case["floors"][quoted]["limit"], "GFLOP/s")
    error = "other" if not row["comparable"] and not row["wrong"] else _error(row["error"])
    return LINE.format(
        row["name"],
        seconds(timing["seconds"]),
        f"{timing['spread']:.0%}",
        f"{timing['rate'] / 1e9:.3g} {unit}",
        f"{timing['of_floor']:.0%}",
        _times(_ratio(row, quoted)),
        _target(case, row, quoted),
        _times(_ratio(row, modes[1]["name"]) if len(modes) > 1 else None),
        "" if row["peak_bytes"] is None else _bytes(row["peak_bytes"]),
        error + (" WRONG" if row["wrong"] else ""),
    ).rstrip()


def _target(case: dict[str, Any], row: dict[str, Any], mode: str) -> str:
    hit = reaches(case, row, mode)
    if hit is None:
        return ""
    text = f"{row['target']:g}x" if row["name"] != OURS else seconds(case["target_seconds"])
    if row["name"] == OURS and len(row["timings"]) > 1:
        text += " wall"
    return text if hit else f"{text} MISS"


def _sentence(case: dict[str, Any], row: dict[str, Any], mode: str, aim: bool = False) -> str:
    if row["name"] == OURS:
        reached = f"{seconds(_whole_machine(row))} of {seconds(case['target_seconds'])}"
        return f"{case['name']}: {reached}"
    target = f" of {row['target']:g}x" if aim else ""
    return f"{case['name']}: {_times(_ratio(row, mode))}{target} {row['name']}"


def _loses(row: dict[str, Any], mode: str) -> bool:
    ratio = _ratio(row, mode)
    return row["name"] != OURS and row["comparable"] and ratio is not None and ratio < 1


def _ratio(row: dict[str, Any], mode: str) -> float | None:
    ratio: float | None = row["timings"].get(mode, {}).get("ratio")
    return ratio


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _error(error: float | None) -> str:
    return "NaN" if error is None else f"{error:.0e}"


def _rates(floor: dict[str, Any]) -> str:
    rates = [f"{name} {rate / 1e9:.3g} {UNITS.get(name, 'GFLOP/s')}" for name, rate in floor["rates"].items()]
    return f"{', '.join(rates)} ({floor['source']})"


def _clock(mode: dict[str, Any]) -> str:
    kinds = {"process_time": "CPU seconds of the process", "wall": "wall clock", "events": "CUDA events"}
    return f"{kinds[mode['clock']]} at {mode['name']}"


def _bytes(count: int) -> str:
    for scale, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
