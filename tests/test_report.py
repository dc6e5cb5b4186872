from __future__ import annotations

import doctest
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from clustops.recipes import report, report_panels, report_picture
from clustops.recipes.report import Row, caution, table, write_json
from clustops.recipes.training import Result

HISTORY = [{"step": step, "accuracy": 0.1 * step, "loss": 1 / step} for step in range(1, 6)]


def row(system: str = "A", group: str = "g", note: str = "", accuracies: tuple[float, ...] = (0.5,)) -> Row:
    return Row(system, group, note, accuracies, [1.0] * len(accuracies), HISTORY)


def deepcluster() -> Row:
    generator = torch.Generator().manual_seed(0)
    history = [
        {"step": 9 * e, "epoch": e, "nmi_previous": 0.5, "nmi_labels": 0.1 * e, "accuracy": 0.9}
        for e in range(1, 4)
    ]
    extras = {
        "sizes_before_repair": torch.tensor([5, 3, 0]),
        "sizes_after_repair": torch.tensor([3, 3, 2]),
        "sizes": torch.tensor([3, 3, 2]),
        "drawn": torch.tensor([3, 3, 2]),
        "embeddings": torch.randn(12, 5, generator=generator),
        "labels": torch.arange(12) % 3,
        "clusters": torch.arange(12) % 4,
    }
    return Row("DeepCluster", "d", "", [0.9, 0.8], [1.0, 1.0], history, extras)


def test_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(report).failed == 0


# the table


def test_mean_and_spread_are_those_of_the_seeds() -> None:
    several = row(accuracies=(0.90, 0.92, 0.97))
    assert several.mean == pytest.approx(93)
    assert several.spread == pytest.approx(np.std([90, 92, 97], ddof=1))
    assert "93.0 ± 3.6" in table([several])


def test_one_seed_has_no_spread() -> None:
    assert row().spread is None
    assert "±" not in table([row()])


def test_a_rule_stands_before_each_group_and_nowhere_else() -> None:
    lines = table([row("A", "one"), row("B", "one"), row("C", "two")]).splitlines()
    assert [line[0] for line in lines] == ["s", "-", "A", "B", "-", "C"]


def test_columns_line_up() -> None:
    lines = table(
        [row("short", note="x"), row("a longer name", accuracies=(1.0, 0.9), note="x")]
    ).splitlines()
    assert lines[2].index(" x") == lines[3].index(" x")


def test_the_caution_claims_nothing_that_controls_do_not_allow() -> None:
    for text in (caution("digits", 1), caution("digits", 5), caution("cifar10", 2)):
        assert text.count(". ") == 0
        assert text.endswith(".")
    assert "one seed gives no error bars" in caution("digits", 1)
    assert "within the spreads are chance" in caution("digits", 5)
    assert "cannot show" in caution("digits", 5)
    assert "digits" not in caution("cifar10", 2)


def test_the_json_file_holds_every_number(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", [row(accuracies=(0.5, 0.6))], {"data": "digits"})
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["settings"] == {"data": "digits"}
    assert content["versions"]["torch"] == torch.__version__
    assert content["systems"][0]["accuracies"] == [0.5, 0.6]
    assert content["systems"][0]["history"] == HISTORY


# the pictures


def drawn(monkeypatch: pytest.MonkeyPatch, rows: list[Row], tmp_path: Path) -> Figure:
    figures: list[Figure] = []
    plain = report_picture._figure

    def kept(title: str, width: float, height: float) -> Figure:
        figures.append(plain(title, width, height))
        return figures[-1]

    monkeypatch.setattr(report_picture, "_figure", kept)
    report_picture.draw_demo(rows, "title", tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000
    return figures[0]


ROWS = [row("Supervised", "l", "control"), row("FixMatch", "f"), row("Suave", "s"), deepcluster()]


def test_the_picture_has_six_panels_with_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    panels = drawn(monkeypatch, ROWS, tmp_path).axes
    assert [panel.get_visible() for panel in panels] == [True] * 6


def test_panels_without_data_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    panels = drawn(monkeypatch, [row()], tmp_path).axes
    assert [panel.get_visible() for panel in panels] == [True, True, False, False, False, False]


def test_no_text_of_the_picture_overlaps_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = drawn(monkeypatch, ROWS, tmp_path)
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [figure._suptitle]  # type: ignore[attr-defined]
    for panel in figure.axes:
        texts += [panel._left_title, panel.xaxis.label, *panel.texts]  # type: ignore[attr-defined]
        for axis, limits in ((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim())):
            # Ticks outside the limits exist but are not drawn.
            texts += [t.label1 for t in axis.get_major_ticks() if min(limits) <= t.get_loc() <= max(limits)]
    # Of an annotation the words alone, not the line to what they name.
    boxes = [(text.get_text(), Text.get_window_extent(text, renderer)) for text in texts if text.get_text()]
    clashes = [(a, b) for i, (a, box) in enumerate(boxes) for b, other in boxes[:i] if box.overlaps(other)]
    assert clashes == []


def test_the_plane_keeps_the_two_largest_variances() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9.0, 0.1, 5.0])
    plane = report_panels.principal_plane(x)
    expected = np.linalg.eigvalsh(np.cov(x.double().numpy().T))[::-1][:2]
    assert np.allclose(plane.var(axis=0, ddof=1), expected)


def test_a_run_is_drawn_with_and_without_history(tmp_path: Path) -> None:
    for name, history in (("with", HISTORY), ("without", [])):
        report_picture.draw_run(Result("a", 0.5, history), "A on digits", tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
