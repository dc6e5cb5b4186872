"""The pictures: report.png of a demo, and of a single run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
except ImportError as error:
    raise ModuleNotFoundError(
        'pictures need matplotlib: pip install "clustops[demo]"', name="matplotlib"
    ) from error

from .report import Row
from .training import Result

# Colours that stay apart for colour-blind eyes: Petroff, "Accessible color sequences", 2021.
BLUE, ORANGE, RED, GREY, PURPLE = "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"
COLOURS = (BLUE, ORANGE, RED, GREY, PURPLE, "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")
INK, PALE = "#2b2b2b", "#e4e4e4"


def draw_demo(rows: Sequence[Row], title: str, path: Path) -> None:
    """Six panels: accuracies, accuracy over training, an embedding, and three looks into DeepCluster."""
    figure = _figure(title, 19, 12)
    panels = figure.subplots(2, 3)
    colours = _colours(rows)
    draw_accuracies(panels[0, 0], rows, colours)
    draw_training(panels[0, 1], rows, colours)
    seen = [row for row in rows if "embeddings" in row.extras]
    if seen:
        draw_embedding(panels[0, 2], next((row for row in seen if row.system == "Suave"), seen[-1]))
    clustered = next((row for row in rows if "sizes_before_repair" in row.extras), None)
    if clustered is not None:
        draw_repair(panels[1, 0], clustered.extras)
        draw_balance(panels[1, 1], clustered.extras)
        draw_agreement(panels[1, 2], clustered)
    for panel in panels.flat:
        panel.set_visible(panel.has_data())
    figure.savefig(path, dpi=110)


def draw_run(result: Result, title: str, path: Path) -> None:
    """One panel for each metric of a run over its steps."""
    names = [name for name in (result.history[-1] if result.history else {}) if name != "step"]
    names = sorted(names, key=lambda name: name != "accuracy") or ["accuracy"]
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    figure = _figure(f"{title}: {100 * result.accuracy:.1f} % right", 1 + 6 * columns, 1 + 4.5 * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel, name in zip(panels.flat, names, strict=False):
        points = [(entry["step"], entry[name]) for entry in result.history if name in entry]
        panel.plot(*zip(*points, strict=True) if points else ([0], [result.accuracy]), color=BLUE, marker="o")
        style(panel, name.replace("_", " "), "", "step")
    for panel in panels.flat:
        panel.set_visible(panel.has_data())
    figure.savefig(path, dpi=110)


def _figure(title: str, width: float, height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.25, h_pad=0.25)
    figure = Figure(figsize=(width, height), facecolor="white", layout=layout)
    figure.suptitle(title, fontsize=20, color=INK, x=0.015, ha="left", weight="bold")
    return figure


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """By system: a hue for each group, darker from its second system on (controls look different anyway)."""
    hues = iter(
        cycle(((GREY, INK), (BLUE, "#17508c"), (RED, "#6d0a00"), (PURPLE, "#43125f"), (ORANGE, "#9c6200")))
    )
    by_group = {group: next(hues) for group in dict.fromkeys(row.group for row in rows)}
    colours, started = {}, set()
    for row in rows:
        colours[row.system] = by_group[row.group][not row.is_control and row.group in started]
        started |= set() if row.is_control else {row.group}
    return colours


def draw_accuracies(ax: Axes, rows: Sequence[Row], colours: dict[str, str]) -> None:
    """A dot for the mean, a tick for each seed; controls hollow, groups apart."""
    heights = [float(i) for i in range(len(rows))]
    for i in range(1, len(rows)):
        if rows[i].group != rows[i - 1].group:
            heights[i:] = [height + 0.7 for height in heights[i:]]
    for row, height in zip(rows, heights, strict=True):
        colour = colours[row.system]
        values = [100 * accuracy for accuracy in row.accuracies]
        if len(values) > 1:
            ax.plot([min(values), max(values)], [height, height], color=colour, linewidth=2, alpha=0.6)
            ax.plot(values, [height] * len(values), "|", color=colour, markersize=9)
        face = "white" if row.is_control else colour
        ax.plot(row.mean, height, "o", markersize=10, markeredgewidth=2.2, color=colour, markerfacecolor=face)
        offset = (max(values), height)
        ax.annotate(
            f"{row.mean:.1f}",
            offset,
            (10, 0),
            textcoords="offset points",
            va="center",
            fontsize=12,
            color=INK,
        )
    ax.set_yticks(heights, [row.system for row in rows])
    ax.invert_yaxis()
    ax.margins(x=0.12)
    style(ax, "Accuracy on the test images", "per cent; hollow dots are controls, ticks are seeds")
    ax.grid(axis="y", visible=False)


def draw_training(ax: Axes, rows: Sequence[Row], colours: dict[str, str]) -> None:
    """Accuracy against the share of training; controls dashed."""
    for row in rows:
        points = [(entry["step"], 100 * entry["accuracy"]) for entry in row.history if "accuracy" in entry]
        if len(points) < 2:
            continue
        steps, values = np.array(points).T
        line = "--" if row.is_control else "-"
        ax.plot(
            100 * steps / steps[-1], values, line, color=colours[row.system], linewidth=2.2, label=row.system
        )
    subtitle = "per cent of the test images, first seed; controls dashed"
    style(ax, "Accuracy while they learn", subtitle, "per cent of training")
    if ax.has_data():
        ax.legend(frameon=False, fontsize=11.5, loc="lower right", labelcolor=INK)


def draw_embedding(ax: Axes, row: Row) -> None:
    """Test images in the plane of largest variance, each drawn as its class, coloured by its cluster."""
    plane = principal_plane(row.extras["embeddings"])
    labels, clusters = row.extras["labels"].cpu().numpy(), row.extras["clusters"].cpu().numpy()
    for cluster, label in np.unique(np.stack((clusters, labels)), axis=1).T:
        here = plane[(clusters == cluster) & (labels == label)]
        colour = COLOURS[cluster % len(COLOURS)]
        ax.scatter(here[:, 0], here[:, 1], marker=f"${label}$", s=55, color=colour, linewidths=0.3)
    subtitle = "each drawn as its class, coloured by its cluster; PCA to a plane"
    style(ax, f"Test images as {row.system} sees them", subtitle)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[["left", "bottom"]].set_visible(False)


def principal_plane(x: Tensor) -> np.ndarray[Any, Any]:
    """``[N, 2]``: the rows of ``x`` ``[N, D]`` along their two directions of largest variance."""
    centred = x.detach().cpu().double()
    centred = centred - centred.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    plane: np.ndarray[Any, Any] = (centred @ directions[:2].T).numpy()
    return plane


def draw_repair(ax: Axes, extras: dict[str, Any]) -> None:
    """Cluster sizes, largest first, before and after empty clusters are refilled."""
    before, after = (_sorted(extras[name]) for name in ("sizes_before_repair", "sizes_after_repair"))
    _steps(ax, before, GREY, f"before: {(before == 0).sum()} empty", filled=True)
    _steps(ax, after, BLUE, f"after: {(after == 0).sum()} empty")
    style(
        ax,
        "DeepCluster refills empty clusters",
        "images in each cluster",
        "clusters, largest first",
    )
    ax.legend(frameon=False, fontsize=12, labelcolor=INK)


def draw_balance(ax: Axes, extras: dict[str, Any]) -> None:
    """How often each cluster was drawn in one epoch, beside its size."""
    order = np.argsort(-np.asarray(extras["sizes"]), kind="stable")
    sizes, drawn = (np.asarray(extras[name])[order] for name in ("sizes", "drawn"))
    _steps(ax, sizes, GREY, "without balancing: the cluster's size", filled=True)
    _steps(ax, drawn, BLUE, "balanced: what the loader drew")
    style(ax, "DeepCluster draws clusters evenly", "images drawn in one epoch", "clusters, largest first")
    ax.legend(frameon=False, fontsize=12, labelcolor=INK)


def draw_agreement(ax: Axes, row: Row) -> None:
    """Normalised mutual information of the clusters with the last epoch's and with the classes."""
    for name, colour, label in (
        ("nmi_previous", BLUE, "with the clusters one epoch before"),
        ("nmi_labels", ORANGE, "with the classes (never shown to it)"),
    ):
        points = [(entry["step"], entry[name]) for entry in row.history if name in entry]
        ax.plot(*zip(*points, strict=True), color=colour, linewidth=2.2, label=label)
    style(ax, "Do DeepCluster's clusters settle?", "normalised mutual information of the clusters", "epoch")
    ax.legend(frameon=False, fontsize=12, labelcolor=INK)


def _sorted(sizes: Any) -> np.ndarray[Any, Any]:
    return np.sort(np.asarray(sizes))[::-1]


def _steps(ax: Axes, heights: np.ndarray[Any, Any], colour: str, label: str, *, filled: bool = False) -> None:
    ax.stairs(heights, color=colour, fill=filled, alpha=0.45 if filled else 1, linewidth=2.4, label=label)


def style(ax: Axes, title: str, subtitle: str = "", x: str = "") -> None:
    """The look that all panels share."""
    ax.set_title(title, loc="left", fontsize=15, color=INK, weight="bold", pad=28)
    ax.text(0, 1.02, subtitle, transform=ax.transAxes, fontsize=12, color="#5c5c5c")
    ax.set_xlabel(x, fontsize=12, color=INK)
    ax.tick_params(labelsize=12, labelcolor=INK, color=PALE)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(PALE)
    ax.grid(color=PALE, linewidth=0.8)
    ax.set_axisbelow(True)
