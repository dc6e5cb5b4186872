"""What a demo says: one table, one honest sentence, one JSON file."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One system over all seeds.

    Attributes:
        system: its name. group: rows of one group belong side by side, a system beside its controls.
        note: what it is; it opens with "control: " for a control and with "ablation: " for a system with
            a part changed.
        accuracies: share of the test set that is right, a number for each seed.
        seconds: CPU seconds of one run, a number for each seed.
        history: metrics over the training of the first seed.
        extras: what else there is to look at, from the first seed.
    """

    system: str
    group: str
    note: str
    accuracies: Sequence[float]
    seconds: Sequence[float]
    history: Sequence[dict[str, float]] = ()
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def is_control(self) -> bool:
        """Whether this row is there for comparison."""
        return self.note.startswith("control") or self.is_ablation

    @property
    def is_ablation(self) -> bool:
        """Whether this row is another one with a part changed."""
        return self.note.startswith("ablation")

    @property
    def mean(self) -> float:
        """Mean accuracy in percent."""
        return 100 * statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds in percent; ``None`` for one seed."""
        return 100 * statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


def table(rows: Sequence[Row]) -> str:
    """The rows as text, a rule between groups.

    >>> row = Row("FixMatch", "FixMatch", "weak to strong", [0.96, 0.98], [7.0, 9.0])
    >>> print(table([row]))
    system    accuracy %  CPU s  note
    -------------------------------------------
    FixMatch  97.0 ± 1.4    8.0  weak to strong
    """
    cells = [("system", "accuracy %", "CPU s", "note")]
    for row in rows:
        spread = "" if row.spread is None else f" ± {row.spread:.1f}"
        seconds = statistics.fmean(row.seconds)
        cells.append((row.system, f"{row.mean:.1f}{spread}", f"{seconds:.1f}", row.note))
    widths = [max(len(line[i]) for line in cells) for i in range(4)]
    lines = [_aligned(line, widths) for line in cells]
    ruled = lines[:1]
    for before, row, line in zip([None, *rows], rows, lines[1:], strict=False):
        if before is None or before.group != row.group:
            ruled.append("-" * sum(widths, 6))
        ruled.append(line)
    return "\n".join(ruled)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    system, accuracy, seconds, note = widths
    return f"{cells[0]:<{system}}  {cells[1]:>{accuracy}}  {cells[2]:>{seconds}}  {cells[3]:<{note}}".rstrip()


def caution(data: str, n_seeds: int) -> str:
    """What the table does not show, in one sentence."""
    chance = (
        "one seed gives no error bars, so small differences here are chance"
        if n_seeds == 1
        else "differences within the spreads are chance"
    )
    if data != "digits":
        return f"Read with care: {chance}."
    return (
        "What digits cannot show: that the contrastive loss lifts accuracy over its two-view control, or "
        "that its threshold T_push, balanced sampling or more clusters than classes do, as the classes "
        "are few and even; "
        f"and {chance}."
    )


def write_json(path: Path, rows: Sequence[Row], settings: dict[str, Any]) -> None:
    """Accuracies, seconds, metrics over training, and what they were made with."""
    content = {
        "settings": settings,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "systems": [
            {
                "system": row.system,
                "group": row.group,
                "note": row.note,
                "accuracies": list(row.accuracies),
                "cpu_seconds": list(row.seconds),
                "history": list(row.history),
            }
            for row in rows
        ],
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
