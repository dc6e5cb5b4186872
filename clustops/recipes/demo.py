"""All systems beside their controls: worker processes, one table, one picture."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .data import ImageData, labelled_subset, load
from .report import Row, caution, table, write_json
from .training import Progress, Result
from .workers import Task, run_tasks


@dataclass(frozen=True)
class System:
    """One row of the table.

    Attributes:
        name, group, note: as the table shows them; see ``Row``.
        train: a recipe's ``train(data, config, *, progress, pretrained)``; at the top of a module, as it
            travels to a worker process.
        config: of that recipe; its seed and labels per class are set by the demo.
        cost: expected CPU seconds.
    """

    name: str
    group: str
    note: str
    train: Callable[..., Result]
    config: Any
    cost: float


# Systems of one job run in one process, each starting from the result of the one before.
Job = tuple[System, ...]


def run(
    spec: str,
    jobs: Sequence[Job],
    *,
    root: Path | None = None,
    seeds: int = 1,
    labels_per_class: int = 4,
    workers: int = 2,
    out: Path = Path(),
) -> list[Row]:
    """Train every system, print the table, write ``report.png`` and ``report.json`` into ``out``; the rows.

    Raises:
        ModuleNotFoundError: the packages of the ``demo`` extra are not all there.
        ValueError, FileNotFoundError: the data cannot be read, or have too few labels.
        WorkerError: a system failed.
    """
    if missing := missing_extras():
        raise ModuleNotFoundError(f'the demo needs {", ".join(missing)}: pip install "clustops[demo]"')
    data = load(spec, root)
    labelled = labelled_subset(data.train_labels, labels_per_class, 0)
    out.mkdir(parents=True, exist_ok=True)
    print(
        f"{data.name}: {len(data.train_labels)} training images of which {len(labelled)} have a label, "
        f"{len(data.test_labels)} test images; {seeds} seed{'s' if seeds > 1 else ''}, {workers} processes."
    )
    tasks = [
        Task(
            f"{' + '.join(system.name for system in job)}, seed {seed}",
            partial(_run_job, job, spec, root, labels_per_class, seed),
            sum(system.cost for system in job),
        )
        for seed in range(seeds)
        for job in jobs
    ]
    outcomes = _collect(tasks, workers)
    rows = _rows(jobs, outcomes, seeds)
    print(f"\n{table(rows)}\n\n{caution(spec, seeds)}")
    _write(rows, data, seeds, len(labelled), out)
    return rows


def missing_extras() -> list[str]:
    """The packages of the ``demo`` extra that are not installed."""
    packages = {"scikit-learn": "sklearn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
    return [name for name, module in packages.items() if not _installed(module)]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:
        return False


@dataclass(frozen=True)
class _Outcome:
    system: str
    seed: int
    seconds: float
    result: Result


def _run_job(
    job: Job, spec: str, root: Path | None, labels_per_class: int, seed: int, progress: Progress
) -> list[_Outcome]:
    """Runs in a worker process."""
    data = load(spec, root)
    total = sum(system.cost for system in job)
    outcomes: list[_Outcome] = []
    for i, system in enumerate(job):
        before = sum(s.cost for s in job[:i])

        def share(done: int, steps: int, before: float = before, cost: float = system.cost) -> None:
            progress(round(1e6 * (before + cost * done / max(steps, 1))), round(1e6 * total))

        config = replace(system.config, seed=seed, labels_per_class=labels_per_class)
        start_from = {"pretrained": outcomes[-1].result} if outcomes else {}
        start = time.process_time()
        result = system.train(data, config, progress=share, **start_from)
        outcomes.append(_Outcome(system.name, seed, time.process_time() - start, result))
    return outcomes


def _collect(tasks: Sequence[Task], workers: int) -> list[_Outcome]:
    """Outcomes of all tasks; a bar where somebody watches, else a line for each system that is done."""
    from tqdm import tqdm

    outcomes: list[_Outcome] = []
    watched = sys.stderr.isatty()
    layout = "{desc} |{bar}| {percentage:3.0f} % [{elapsed}, {remaining} to go]"
    with tqdm(total=1.0, desc="training", bar_format=layout, disable=not watched, leave=False) as bar:
        for i, (name, finished) in enumerate(run_tasks(tasks, workers, lambda share: _move(bar, share))):
            outcomes += finished
            if watched:
                bar.set_description_str(f"training, {i + 1} of {len(tasks)} done")
            else:
                print(f"{i + 1} of {len(tasks)} done: {name}", file=sys.stderr)
    return outcomes


def _move(bar: Any, share: float) -> None:
    bar.update(max(share - bar.n, 0.0))


def _rows(jobs: Sequence[Job], outcomes: Iterable[_Outcome], seeds: int) -> list[Row]:
    found = {(outcome.system, outcome.seed): outcome for outcome in outcomes}
    rows = []
    for system in (system for job in jobs for system in job):
        mine = [found[system.name, seed] for seed in range(seeds)]
        accuracies = [outcome.result.accuracy for outcome in mine]
        seconds = [outcome.seconds for outcome in mine]
        first = mine[0].result
        rows.append(
            Row(system.name, system.group, system.note, accuracies, seconds, first.history, first.extras)
        )
    return rows


def _write(rows: Sequence[Row], data: ImageData, seeds: int, n_labelled: int, out: Path) -> None:
    from .report_picture import draw_demo

    settings = {"data": data.name, "labelled_images": n_labelled, "seeds": seeds}
    write_json(out / "report.json", rows, settings)
    title = f"{data.name}: {n_labelled} labelled of {len(data.train_labels)} training images"
    draw_demo(rows, title, out / "report.png")
    print(f"Written: {out / 'report.png'} and {out / 'report.json'}")
