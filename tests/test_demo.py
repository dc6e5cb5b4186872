from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from clustops.recipes import demo, report
from clustops.recipes.data import ImageData
from clustops.recipes.demo import System
from clustops.recipes.training import Progress, Result
from clustops.recipes.workers import Task, WorkerError, run_tasks

pytest.importorskip("matplotlib")


# Fake systems; module-level, because they travel to worker processes.


@dataclass(frozen=True)
class Config:
    accuracy: float
    seed: int = 0
    labels_per_class: int = 0


def guess(data: ImageData, config: Config, *, progress: Progress, pretrained: Result | None = None) -> Result:
    for k in range(5):
        progress(k + 1, 5)
    lead = 0.0 if pretrained is None else pretrained.accuracy
    history = [{"step": k, "accuracy": config.accuracy * k / 5} for k in range(1, 6)]
    extras = {"threads": torch.get_num_threads(), "labels": config.labels_per_class}
    return Result("guess", config.accuracy + lead + 0.01 * config.seed, history, extras)


def fail(progress: Progress) -> Result:
    raise ArithmeticError("the loss is not a number")


JOBS = [
    (System("Raw", "one", "control of Better", guess, Config(0.5), 1.0),),
    (
        System("Pre-trained", "two", "control of Full", guess, Config(0.25), 1.0),
        System("Full", "two", "starts from it", guess, Config(0.5), 2.0),
    ),
]


def double(value: int, progress: Progress) -> int:
    progress(1, 2)
    time.sleep(0.15)
    progress(2, 2)
    return 2 * value


def die(progress: Progress) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(progress: Progress) -> None:
    time.sleep(600)


def process_id(path: Path, progress: Progress) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(600)


def interrupted(progress: Progress) -> str:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
    return "goes on"


def unpicklable(progress: Progress) -> object:
    return lambda: 0


# worker processes


def test_every_task_gives_its_result_and_progress_ends_at_one() -> None:
    shares: list[float] = []
    tasks = [Task(str(i), partial(double, i), cost=i + 1) for i in range(4)]
    results = dict(run_tasks(tasks, 2, shares.append))
    assert results == {"0": 0, "1": 2, "2": 4, "3": 6}
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert 0 < shares[0] < 1


def test_the_most_expensive_task_starts_first() -> None:
    tasks = [Task(str(i), partial(double, i), cost=cost) for i, cost in enumerate((1, 9, 5))]
    assert [name for name, _ in run_tasks(tasks, 1, lambda share: None)] == ["1", "2", "0"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fail, r"bad one failed:(.|\n)*ArithmeticError: the loss is not a number"),
        (die, r"bad one: its process died with exit code -9"),
        (unpicklable, r"bad one failed:(.|\n)*[Pp]ickl"),
    ],
    ids=["raises", "dies", "unpicklable result"],
)
def test_a_failing_worker_ends_the_others_with_its_error(function: object, message: str) -> None:
    tasks = [Task("long", sleep, 9.0), Task("bad one", function, 1.0)]  # type: ignore[arg-type]
    start = time.monotonic()
    with pytest.raises(WorkerError, match=message):
        list(run_tasks(tasks, 2, lambda share: None))
    assert time.monotonic() - start < 60


def test_workers_end_when_the_caller_stops_listening(tmp_path: Path) -> None:
    file = tmp_path / "pid"

    def stop(share: float) -> None:
        raise KeyboardInterrupt

    tasks = [Task("sleeper", partial(process_id, file), 1.0), Task("quick", partial(double, 1), 1.0)]
    with pytest.raises(KeyboardInterrupt):
        list(run_tasks(tasks, 2, stop))
    number = file.read_text() if file.exists() else ""  # it may have ended before it could write it
    if number:
        with pytest.raises(ProcessLookupError):
            os.kill(int(number), 0)


def test_ctrl_c_is_left_to_the_caller() -> None:
    assert dict(run_tasks([Task("a", interrupted, 1.0)], 1, lambda share: None)) == {"a": "goes on"}


# the demo


def test_the_demo_prints_one_table_and_writes_a_picture_and_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = demo.run("digits", JOBS, seeds=2, out=tmp_path / "new")
    printed = capsys.readouterr().out
    assert [row.system for row in rows] == ["Raw", "Pre-trained", "Full"]
    assert rows[2].accuracies == [0.75, pytest.approx(0.77)]
    assert rows[0].extras == {"threads": 1, "labels": 4}
    assert report.table(rows) in printed
    assert report.caution("digits", 2) in printed
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content["settings"]["labelled_images"] == 40
    assert content["systems"][1]["accuracies"] == [0.25, pytest.approx(0.26)]
    assert (tmp_path / "new" / "report.png").stat().st_size > 10_000


def test_too_many_labels_are_refused_before_any_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run_tasks", None)
    with pytest.raises(ValueError, match="labels per class must be at most 124"):
        demo.run("digits", JOBS, labels_per_class=500)


def test_missing_packages_are_named_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tqdm", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r'needs matplotlib, tqdm: pip install "clustops\[demo\]"'):
        demo.run("digits", JOBS)


INTERRUPTED = """
import sys, time
from clustops import cli
from clustops.recipes import demo, demo_systems, suave, training

def quick(data, config, *, progress):
    return training.Result("quick", 0.5, [])

def slow(data, config, *, progress):
    time.sleep(600)

if __name__ == "__main__":
    recipes = {"Quick": quick, "Slow": slow}
    jobs = tuple((demo.System(name, "g", "", train, suave.Config(), 1.0),) for name, train in recipes.items())
    demo_systems.JOBS = jobs
    sys.exit(cli.main(["demo", "--out", sys.argv[1]]))
"""


def test_ctrl_c_ends_busy_and_idle_workers_without_a_traceback(tmp_path: Path) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        start_new_session=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "1 of 2 done: Quick, seed 0\n"
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert complaint == "clustops: interrupted\n"
