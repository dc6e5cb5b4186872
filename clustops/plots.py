"""Pictures of clusters; they need matplotlib, ``pip install "clustops[demo]"``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .checks import reject
from .metrics import effective_clusters
from .sampler import InverseClusterSizeSampler

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that stay apart for colour-blind eyes: Petroff, "Accessible color sequences", 2021.
BLUE, ORANGE, RED, GREY, PURPLE = "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"
INK, PALE = "#2b2b2b", "#e4e4e4"


def plot_cluster_sizes(sampler: Any, ax: Axes | None = None) -> Axes:
    """Axes that show how many samples each cluster has, and how often the sampler's epoch draws from it.

    The clusters stand in the order of their sizes, the largest first, on a logarithmic scale.

    Args:
        sampler: an ``InverseClusterSizeSampler``; its labels and its epoch are what is drawn.
        ax: matplotlib axes to draw on; the default is a new figure.

    Returns:
        The axes: ``ax.figure.savefig("sizes.png")``.

    Raises:
        TypeError: ``sampler`` is no ``InverseClusterSizeSampler``.
        ImportError: matplotlib is missing.

    Cost: a sort of K numbers, and the drawing of K steps.

    Example:
        >>> sampler = InverseClusterSizeSampler(torch.tensor([0, 0, 0, 0, 0, 1]))
        >>> plot_cluster_sizes(sampler).get_ylabel()
        'samples in a cluster'
    """
    if not isinstance(sampler, InverseClusterSizeSampler):
        cure = "pass clustops.InverseClusterSizeSampler(labels)"
        reject("sampler", "an InverseClusterSizeSampler", type(sampler).__name__, cure, TypeError)
    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.figure(figsize=(8, 5), layout="constrained").add_subplot()
    sizes, drawn = sampler.offsets.diff(), sampler.quotas()
    order = sizes.argsort(descending=True, stable=True)
    for counts, colour, name in ((sizes, GREY, "in the data"), (drawn, BLUE, "drawn in an epoch")):
        steps(ax, counts[order].numpy(), colour, f"{name}: {_summary(counts)}", filled=counts is sizes)
    style(ax, "Cluster sizes before and after balancing", "", "clusters, largest first")
    ax.set_ylabel("samples in a cluster", fontsize=12, color=INK)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:,g}")
    ax.minorticks_off()
    ax.locator_params(axis="x", integer=True)
    # Room above for the legend, and for a cluster of one sample below.
    ax.set_ylim(0.7, 4.0 * float(max(sizes.max(), drawn.max())))
    ax.set_xlim(0, sizes.numel())
    ax.legend(frameon=False, fontsize=12, labelcolor=INK, loc="upper right")
    return ax


def _summary(counts: Tensor) -> str:
    """Sizes of the filled clusters, and to how many even ones they come."""
    filled = counts[counts > 0]
    least, most = int(filled.min()), int(filled.max())
    sizes = f"{least:,} to {most:,}" if least < most else f"{most:,}"
    return f"{sizes}, effective clusters {effective_clusters(counts):,.1f} of {counts.numel():,}"


def steps(ax: Axes, heights: Any, colour: str, label: str, *, filled: bool = False) -> None:
    """One step for each cluster."""
    ax.stairs(heights, color=colour, fill=filled, alpha=0.45 if filled else 1, linewidth=2.4, label=label)


def style(ax: Axes, title: str, subtitle: str = "", x: str = "") -> None:
    """The look that all pictures share."""
    ax.set_title(title, loc="left", fontsize=15, color=INK, weight="bold", pad=28 if subtitle else 12)
    ax.text(0, 1.02, subtitle, transform=ax.transAxes, fontsize=12, color="#5c5c5c")
    ax.set_xlabel(x, fontsize=12, color=INK)
    ax.tick_params(labelsize=12, labelcolor=INK, color=PALE)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(PALE)
    ax.grid(color=PALE, linewidth=0.8)
    ax.set_axisbelow(True)
