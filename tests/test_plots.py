"""The picture of cluster sizes shows what is in the data and what is drawn."""

from __future__ import annotations

import doctest
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from support import assert_message

from clustops import plots
from clustops.plots import plot_cluster_sizes
from clustops.sampler import InverseClusterSizeSampler, MPerClusterBatchSampler

LABELS = torch.tensor([4] * 2 + [0] * 5 + [-1] * 7 + [1] * 90 + [2] * 20)


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")


def test_sizes_stand_largest_first_and_draws_in_the_same_order() -> None:
    sampler = InverseClusterSizeSampler(LABELS, 100, cluster_weights=[9, 2, 4, 0, 3])
    drawn = torch.bincount(LABELS[list(sampler)], minlength=5)
    before, after = plot_cluster_sizes(sampler).patches
    assert drawn.tolist() == [50, 11, 22, 0, 17]
    assert before.get_data().values.tolist() == [90, 20, 5, 2, 0]
    assert after.get_data().values.tolist() == drawn[[1, 2, 0, 4, 3]].tolist()


def test_the_scale_is_logarithmic_and_shows_a_cluster_of_one_sample() -> None:
    ax = plot_cluster_sizes(InverseClusterSizeSampler([0] * 1000 + [1]))
    assert ax.get_yscale() == "log"
    assert ax.get_ylim()[0] < 1 < 1000 < ax.get_ylim()[1]


def test_axes_and_both_sides_are_named() -> None:
    ax = plot_cluster_sizes(InverseClusterSizeSampler(LABELS, 100))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("clusters, largest first", "samples in a cluster")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "in the data: 2 to 90, effective clusters 2.0 of 5",
        "drawn in an epoch: 25, effective clusters 4.0 of 5",
    ]


def test_given_axes_are_drawn_on(tmp_path: Path) -> None:
    figure = Figure()
    ax = figure.subplots()
    assert plot_cluster_sizes(InverseClusterSizeSampler(LABELS), ax) is ax
    assert not pyplot.get_fignums()
    figure.savefig(tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 5000


def test_matplotlib_is_loaded_by_the_first_picture_alone() -> None:
    program = "import sys, clustops; clustops.plots.plot_cluster_sizes; print('matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_another_sampler_is_refused() -> None:
    with pytest.raises(TypeError) as caught:
        plot_cluster_sizes(MPerClusterBatchSampler(LABELS, 2, 2))
    assert_message(caught.value, "sampler", "InverseClusterSizeSampler", "MPerClusterBatchSampler")


def test_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(plots, extraglobs={"torch": torch}).failed == 0
