"""Tasks in worker processes of one thread each: networks this small gain nothing from more threads."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

Progress = Callable[[int, int], None]

_SECONDS_BETWEEN_REPORTS = 0.1
# A fork of this process could inherit locks of its threads; a fork server has none, and imports torch once.
_START = "forkserver" if sys.platform == "linux" else "spawn"


@dataclass(frozen=True)
class Task:
    """What one worker does in one go.

    Attributes:
        name: as errors call it.
        function: takes a progress callback ``(done, total)``; pickled, so defined at the top of a module.
        cost: expected seconds, or any unit in which tasks compare.
    """

    name: str
    function: Callable[[Progress], Any]
    cost: float


class WorkerError(RuntimeError):
    """A task failed, or its process died; the message holds the task's name and its own error."""


def run_tasks(
    tasks: Sequence[Task], workers: int, progress: Callable[[float], None]
) -> Iterator[tuple[str, Any]]:
    """Names and results of all tasks, as they end; the most expensive start first.

    Args:
        tasks: any number of them.
        workers: processes at once, at least 1.
        progress: called with the share of the total cost that is done, in [0, 1].

    Raises:
        WorkerError: at the first task that fails. No process outlives this call, whatever ends it.
    """
    waiting = sorted(tasks, key=lambda task: task.cost)
    total = sum(task.cost for task in tasks)
    finished, share = 0.0, dict.fromkeys((task.name for task in tasks), 0.0)
    context: Any = multiprocessing.get_context(_START)
    context.set_forkserver_preload([__name__])
    running: dict[Connection, Task] = {}
    processes: dict[Connection, Any] = {}
    try:
        for _ in range(min(workers, len(tasks))):
            ours, theirs = context.Pipe()
            processes[ours] = context.Process(target=_work, args=(theirs,), daemon=True)
            processes[ours].start()
            theirs.close()
            running[ours] = waiting.pop()
            _send(ours, running[ours])
        while running:
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                task = running[pipe]
                kind, content = _receive(pipe, task, processes[pipe])
                if kind == "error":
                    raise WorkerError(f"{task.name} failed:\n{content}")
                share[task.name] = content if kind == "progress" else 0.0
                if kind == "result":
                    finished += task.cost
                    del running[pipe]
                    if waiting:
                        running[pipe] = waiting.pop()
                        _send(pipe, running[pipe])
                    yield task.name, content
                progress((finished + sum(t.cost * share[t.name] for t in running.values())) / total)
    finally:
        for process in processes.values():
            process.kill()
        for pipe, process in processes.items():
            process.join()
            pipe.close()


def _send(pipe: Connection, message: Any) -> None:
    # The plain pickle: torch would otherwise pass tensors by handles that die with their process.
    # A closed pipe shows when we next read from it.
    with suppress(BrokenPipeError):
        pipe.send_bytes(pickle.dumps(message))


def _receive(pipe: Connection, task: Task, process: Any) -> tuple[str, Any]:
    try:
        kind, content = pickle.loads(pipe.recv_bytes())
        return kind, content
    except (EOFError, ConnectionError):
        process.join()
        raise WorkerError(f"{task.name}: its process died with exit code {process.exitcode}") from None


def _work(pipe: Connection) -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides how to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):
        while True:
            task: Task = pickle.loads(pipe.recv_bytes())
            try:
                _send(pipe, ("result", task.function(_Reporter(pipe))))
            except BaseException:
                _send(pipe, ("error", traceback.format_exc()))


class _Reporter:
    """Sends a task's progress, not more often than anyone can see."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= _SECONDS_BETWEEN_REPORTS:
            self.last = now
            self.pipe.send_bytes(pickle.dumps(("progress", done / max(total, 1))))
