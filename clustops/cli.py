"""The command line: ``clustops demo | train | bench | doctor``."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from . import cli_doctor, cli_train
from .cli_settings import UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 wrong usage or value, 130 interrupted.

    141, as of other programs, where nobody reads the output any more.
    """
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else list(arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(arguments: list[str]) -> int:
    try:
        if arguments[:1] == ["bench"]:
            return _bench(arguments[1:])
        options = _parser().parse_args(arguments)
        code: int = options.run(options)
        return code
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:
        raise
    except (UsageError, ValueError, TypeError) as error:
        return _complain(str(error), 2)
    # What a user can put right, too: missing files and packages.
    except (OSError, ModuleNotFoundError) as error:
        return _complain(str(error), 1)


def _complain(message: str, code: int) -> int:
    print(f"clustops: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clustops", description="Cluster-based self- and semi-supervised learning."
    )
    version = f"clustops {cli_doctor.version('clustops')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="demo | train | bench | doctor")
    _add_demo(commands.add_parser("demo", help="train all systems on 40 labelled digits"))
    cli_train.add_arguments(commands.add_parser("train", help="train one system on a data set of yours"))
    commands.add_parser("bench", help="time the ops against peers (in a source checkout)", add_help=False)
    doctor = commands.add_parser("doctor", help="say what is installed and which code serves which op")
    doctor.set_defaults(run=cli_doctor.run)
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train every system beside its controls, print one table, and write report.png and report.json."
    )
    add = parser.add_argument
    add("--data", default="digits", help=cli_train.DATA_HELP)
    add(
        "--data-root", type=Path, metavar="DIR", help="where data files lie (default: $CLUSTOPS_DATA, ./data)"
    )
    add(
        "--seeds",
        type=_positive,
        default=1,
        metavar="N",
        help="runs of each system, for error bars (default: 1)",
    )
    add(
        "--labels-per-class", type=_positive, default=4, metavar="N", help="labels of each class (default: 4)"
    )
    add("--workers", type=_positive, default=2, metavar="N", help="processes of one thread each (default: 2)")
    add("--out", type=Path, default=Path(), metavar="DIR", help="folder for the report (default: here)")
    parser.set_defaults(run=_demo)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _demo(options: argparse.Namespace) -> int:
    from .recipes import demo, demo_systems, workers

    try:
        demo.run(
            options.data,
            demo_systems.JOBS,
            root=options.data_root,
            seeds=options.seeds,
            labels_per_class=options.labels_per_class,
            workers=options.workers,
            out=options.out,
        )
    except workers.WorkerError as error:
        return _complain(str(error), 1)
    return 0


def _bench(arguments: list[str]) -> int:
    if not Path("benchmarks", "__main__.py").is_file():
        return _complain(
            "bench runs the benchmarks of a source checkout, and there is no benchmarks/ here; "
            "change to the top of a checkout of clustops",
            1,
        )
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = ["clustops bench", *arguments]
    try:
        runpy.run_module("benchmarks", run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            return _complain(end.code, 1)
        return end.code or 0
    return 0
