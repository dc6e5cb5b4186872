"""The panels of report.png."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from ..plots import BLUE, GREY, INK, ORANGE, PURPLE, RED, steps, style
from .report import Row

COLOURS = (BLUE, ORANGE, RED, GREY, PURPLE, "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")


def colours_of(rows: Sequence[Row]) -> dict[str, str]:
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
    """Accuracy against the share of training, from well below the worst end to 100; controls dashed."""
    shown = [(row, points) for row in rows if not row.is_ablation and len(points := _accuracies(row)) > 1]
    for row, points in shown:
        share = 100 * points[:, 0] / points[-1, 0]
        line = "--" if row.is_control else "-"
        ax.plot(share, points[:, 1], line, color=colours[row.system], linewidth=2.2)
    subtitle = "per cent of the test images, first seed; controls dashed"
    style(ax, "Accuracy while they learn", subtitle, "per cent of training")
    if shown:
        ax.set_ylim(min(points[-1, 1] for _, points in shown) - 25, 101)
        # The right third is for the names.
        ax.set_xlim(0, 158)
        ax.set_xticks(range(0, 101, 20))
        ax.spines["bottom"].set_bounds(0, 100)
        _label_ends(ax, [(row.system, points[-1, 1], colours[row.system]) for row, points in shown])


def _accuracies(row: Row) -> np.ndarray[Any, Any]:
    points = [(entry["step"], 100 * entry["accuracy"]) for entry in row.history if "accuracy" in entry]
    return np.array(points).reshape(-1, 2)


def _label_ends(ax: Axes, ends: list[tuple[str, float, str]]) -> None:
    """A name beside the end of each curve, the best on top, with a thin line to it where they crowd."""
    for place, (name, value, colour) in enumerate(sorted(ends, key=lambda end: -end[1])):
        ax.annotate(
            name,
            (100, value),
            (109, 0.95 - 0.075 * place),
            textcoords=("data", "axes fraction"),
            va="center",
            fontsize=12,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "relpos": (0, 0.5)},
        )


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


def draw_repair(ax: Axes, row: Row) -> None:
    """Sizes of the clusters of one set of features, largest first, without and with repair of empty ones."""
    before, after = (_counts(row, name) for name in ("sizes_before_repair", "sizes_after_repair"))
    steps(ax, before, GREY, f"without repair: {(before == 0).sum()} of {len(before)} empty", filled=True)
    steps(ax, after, BLUE, f"with repair: {(after == 0).sum()} empty")
    style(
        ax,
        "Empty clusters and their repair",
        f"images in each cluster; {row.system}",
        "clusters, largest first",
    )
    ax.legend(frameon=False, fontsize=12, labelcolor=INK)


def draw_balance(ax: Axes, row: Row, released: Row | None) -> None:
    """How often an epoch draws from each cluster, beside the clusters' sizes."""
    order = np.argsort(-np.asarray(row.extras["sizes"]), kind="stable")
    sizes, drawn = (np.asarray(row.extras[name])[order] for name in ("sizes", "drawn"))
    steps(ax, sizes, GREY, "not balanced: the clusters' sizes", filled=True)
    if released is not None:
        steps(ax, _counts(released, "drawn"), RED, "the released code's index mix-up (own run)")
    steps(ax, drawn, BLUE, "balanced: drawn by the loader")
    style(
        ax,
        "What DeepCluster learns from",
        "images drawn from each cluster in an epoch",
        "clusters, largest first",
    )
    ax.set_ylim(top=1.35 * max(ax.get_ylim()[1] / 1.05, 1))
    ax.legend(frameon=False, fontsize=12, labelcolor=INK)


def draw_agreement(ax: Axes, row: Row) -> None:
    """Normalised mutual information of the clusters with the last epoch's and with the classes."""
    for name, colour, label in (
        ("nmi_previous", BLUE, "with the clusters one epoch before"),
        ("nmi_labels", ORANGE, "with the classes, which it never sees"),
    ):
        points = [(entry["epoch"], entry[name]) for entry in row.history if name in entry]
        ax.plot(*zip(*points, strict=True), color=colour, linewidth=2.2, label=label)
    style(ax, "Do the clusters settle?", f"normalised mutual information; {row.system}", "epoch")
    ax.legend(frameon=False, fontsize=12, labelcolor=INK, loc="lower right")


def _counts(row: Row, name: str) -> np.ndarray[Any, Any]:
    return np.sort(np.asarray(row.extras[name]))[::-1]
