"""One picture an op: how many times as fast as each peer clustops is, with the target of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .case import OURS
from .table import seconds

FASTER, SLOWER, TARGET, INK, GREY = "#2b7a78", "#c8553d", "#f2a541", "#222222", "#666666"
PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # keeps the grid out of the words
Bar = tuple[str, float, float | None]  # peer, ratio, target


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the picture of one op's document; nothing where no case has a ratio."""
    mode = document["modes"][0]["name"]
    groups = [(case, bars) for case in document["cases"] if (bars := _bars(case, mode))]
    if not groups:
        return
    rows = sum(len(bars) for _, bars in groups) + 1.3 * len(groups)
    figure, axes = pyplot.subplots(figsize=(10, 0.3 * rows + 1.8), layout="constrained")
    _draw_groups(axes, groups, mode)
    machine = document["machine"]
    place = f"{machine['gpu'] or machine['cpu']}, {mode}, torch {machine['versions'].get('torch', '?')}"
    heading = f"{document['op']}: how many times as fast as each peer clustops is"
    axes.set_title(heading, loc="left", fontsize=12, fontweight="bold", color=INK, pad=22)
    note = f"{place}, commit {machine['commit']}"
    axes.annotate(
        note, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", fontsize=8, color=GREY
    )
    legend = [
        Line2D([], [], color=FASTER, linewidth=6, label="clustops is faster"),
        Line2D([], [], color=SLOWER, linewidth=6, label="the peer is faster"),
        Line2D([], [], color=TARGET, linewidth=3, label="target"),
    ]
    figure.legend(handles=legend, fontsize=8, frameon=False, ncols=3, loc="outside lower center")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(case: dict[str, Any], mode: str) -> list[Bar]:
    """The comparable peers with a ratio, hardest first."""
    rows = [row for row in case["rows"] if row["comparable"] and row["name"] != OURS]
    bars = [(row["name"], row["timings"].get(mode, {}).get("ratio"), row["target"]) for row in rows]
    return sorted((bar for bar in bars if bar[1] is not None), key=lambda bar: bar[1])


def _draw_groups(axes: Axes, groups: list[tuple[dict[str, Any], list[Bar]]], mode: str) -> None:
    ratios = [value for _, bars in groups for _, ratio, target in bars for value in (ratio, target or 1.0)]
    left, right = min(0.7, 0.8 * min(ratios)), 1.5 * max(2.0, *ratios)
    place, ticks, names = 0.0, [], []
    for case, bars in groups:
        axes.text(left, place, _title(case, mode), fontsize=9, fontweight="bold", va="center", bbox=PLAIN)
        place += 1
        for peer, ratio, target in bars:
            colour = FASTER if ratio >= 1 else SLOWER
            axes.barh(place, ratio - 1, left=1, height=0.72, color=colour)
            axes.text(max(ratio, 1) * 1.03, place, f"{ratio:.2f}x", fontsize=8, color=INK, va="center")
            if target is not None:
                axes.plot([target, target], [place - 0.45, place + 0.45], color=TARGET, linewidth=3)
            ticks.append(place)
            names.append(peer)
            place += 1
        place += 0.3
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(place - 0.5, -0.7)
    axes.set_yticks(ticks, names, fontsize=8)
    marks = [mark for mark in (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500) if left <= mark <= right]
    axes.set_xticks(marks, [f"{mark:g}x" for mark in marks], fontsize=8)
    axes.minorticks_off()
    axes.axvline(1, color=INK, linewidth=1)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _title(case: dict[str, Any], mode: str) -> str:
    """The case, our time, its share of the floor, and the target in seconds where there is one."""
    timings = next(row for row in case["rows"] if row["name"] == OURS)["timings"]
    time = f"{seconds(timings[mode]['seconds'])} per {case['step']}, {timings[mode]['of_floor']:.0%} of floor"
    title, target = f"{case['name']}: {time}", case["target_seconds"]
    if target is None:
        return title
    *_, (last, wall) = timings.items()
    return (
        title
        + ("" if last == mode else f"; {seconds(wall['seconds'])} at {last}")
        + f", target {seconds(target)}"
    )
