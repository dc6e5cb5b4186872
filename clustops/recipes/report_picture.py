"""The pictures: report.png of a demo, and of a single run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ..plots import BLUE, INK, style
from . import report_panels as panel
from .report import Row
from .training import Result


def draw_demo(rows: Sequence[Row], title: str, path: Path) -> None:
    """Six panels: accuracies, accuracy over training, an embedding, and three looks into DeepCluster."""
    figure = _figure(title, 20, 12)
    (accuracies, training, embedding), (repair, balance, agreement) = figure.subplots(2, 3)
    colours = panel.colours_of(rows)
    panel.draw_accuracies(accuracies, rows, colours)
    panel.draw_training(training, rows, colours)
    embedded = [row for row in rows if "embeddings" in row.extras]
    if embedded:
        panel.draw_embedding(
            embedding, next((row for row in embedded if row.system == "Suave"), embedded[-1])
        )
    clustered = [row for row in rows if "drawn" in row.extras]
    if clustered:
        panel.draw_repair(
            repair, max(clustered, key=lambda row: int((row.extras["sizes_before_repair"] == 0).sum()))
        )
        released = next((row for row in clustered if row.system == "DeepCluster, released"), None)
        panel.draw_balance(balance, clustered[0], released)
        panel.draw_agreement(agreement, clustered[0])
    _save(figure, path)


def draw_run(result: Result, title: str, path: Path) -> None:
    """One panel for each metric of a run over its steps."""
    names = [name for name in (result.history[-1] if result.history else {}) if name != "step"]
    names = sorted(names, key=lambda name: name != "accuracy") or ["accuracy"]
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    figure = _figure(f"{title}: {100 * result.accuracy:.1f} % right", 1 + 6 * columns, 1 + 4.5 * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes, name in zip(panels.flat, names, strict=False):
        points = [(entry["step"], entry[name]) for entry in result.history if name in entry]
        points = points or [(0, result.accuracy)]
        axes.plot(*zip(*points, strict=True), color=BLUE, marker="o")
        style(axes, name.replace("_", " "), "", "step")
    _save(figure, path)


def _figure(title: str, width: float, height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.25, h_pad=0.25)
    figure = Figure(figsize=(width, height), dpi=110, layout=layout)
    figure.suptitle(title, fontsize=20, color=INK, x=0.015, ha="left", weight="bold")
    return figure


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.set_visible(axes.has_data())
    figure.savefig(path)
