"""``clustops train NAME``: one system on one data set, with a folder for its results."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .cli_settings import UsageError, apply, from_plain, listing
from .distributed import joined_ranks, rank
from .recipes.data import load
from .recipes.photographs import for_photographs, presets

# Module of each recipe and the settings that make it the system of that name.
SYSTEMS: dict[str, tuple[str, dict[str, str]]] = {
    "supervised": ("supervised", {"method": "strong"}),
    "fixmatch": ("ccssl", {"method": "fixmatch"}),
    "ccssl": ("ccssl", {"method": "ccssl"}),
    "deepcluster": ("deepcluster", {}),
    "suave": ("suave", {}),
    "daino": ("daino", {}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``clustops train`` takes."""
    parser.description = (
        "Train one system. DIR gets config.json, metrics.jsonl, checkpoint.pt and report.png. A resumed run "
        "ends with the numbers of an uninterrupted one. Under torchrun the ranks share each batch."
    )
    add = parser.add_argument
    add("name", choices=SYSTEMS, metavar="NAME", help=", ".join(SYSTEMS))
    add("--data", metavar="DATA", help="digits (default), cifar10, cifar100, stl10, folder:PATH[@SIZE]")
    add(
        "--data-root", type=Path, metavar="DIR", help="where data files lie (default: $CLUSTOPS_DATA, ./data)"
    )
    add("--out", type=Path, metavar="DIR", help="folder for the results (default: runs/NAME)")
    add("--resume", action="store_true", help="continue the run in DIR, with its data and settings")
    add("--published", action="store_true", help="start from the settings of the paper for this data")
    add("--seed", metavar="N", help="one seed gives one result (default: 0)")
    add("--steps", metavar="N", help="optimiser steps, for systems that count steps")
    add("--epochs", metavar="N", help="passes over the data, for systems that count epochs")
    add("--labels-per-class", metavar="N", help="labels that the system may use")
    add("--device", metavar="NAME", help="cpu (default) or cuda")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting; may be repeated")
    add("--list", action="store_true", help="list the settings of NAME with their defaults, and stop")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train as the options say."""
    recipe, method = SYSTEMS[options.name]
    module = importlib.import_module(f".recipes.{recipe}", __package__)
    if options.list:
        print(listing(dataclasses.replace(module.Config(), **method), presets()))
        return 0
    out = options.out or Path("runs", options.name)
    saved = _saved(out, options)
    spec = options.data or saved.get("data", "digits")
    if saved and (spec, options.name) != (saved["data"], saved["name"]):
        raise UsageError(
            f"{out} holds a run of {saved['name']} on {saved['data']}, not of {options.name} on {spec}; "
            f"choose another --out"
        )
    data = load(spec, options.data_root)
    config = _config(module, method, data, options, saved)
    with joined_ranks() as group:
        first = rank(group) == 0
        if first:
            _write_config(out, options.name, spec, config)
        with _progress(options.name, shown=first) as progress:
            resume = {"out": out, "resume": options.resume}
            result = module.train(data, config, **resume, progress=progress, group=group)
        if first:
            _finish(result, out, options.name, spec)
    return 0


def _saved(out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The config file of the run to resume, else nothing. No run is ever overwritten."""
    path = out / "config.json"
    if not path.exists():
        if options.resume:
            raise UsageError(
                f"there is no run in {out} to resume (no config.json); start one without --resume"
            )
        return {}
    if not options.resume:
        raise UsageError(f"{out} already holds a run; continue it with --resume, or choose another --out")
    saved: dict[str, Any] = json.loads(path.read_text())
    return saved


def _config(
    module: Any, method: dict[str, str], data: Any, options: argparse.Namespace, saved: dict[str, Any]
) -> Any:
    given = {"seed": options.seed, "steps": options.steps, "epochs": options.epochs}
    given |= {"labels_per_class": options.labels_per_class, "device": options.device}
    texts = [f"{key}={value}" for key, value in given.items() if value is not None] + options.set
    if saved:
        return apply(from_plain(module.Config, saved["config"]), texts, presets())
    config = dataclasses.replace(module.Config(), **method)
    if options.published:
        if not hasattr(module, "published"):
            raise UsageError(f"there are no published settings for {options.name}; leave --published out")
        labels = apply(config, texts).labels_per_class
        config = dataclasses.replace(module.published(data.name, labels), **method)
    elif data.train_images.shape[1] == 3:
        config = for_photographs(config, network="wrn-28-2")
    return apply(config, texts, presets())


def _write_config(out: Path, name: str, spec: str, config: Any) -> None:
    content = {"name": name, "data": spec, "config": dataclasses.asdict(config)}
    content["versions"] = {"torch": torch.__version__, "python": platform.python_version()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def _progress(name: str, *, shown: bool) -> Iterator[Any]:
    """A callback (done, total) behind which there is a bar, where tqdm is installed and somebody watches."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    with tqdm(desc=name, unit="step", disable=None if shown else True) as bar:

        def progress(done: int, total: int) -> None:
            # A recipe of two stages counts each from its start.
            if done < bar.n or total != bar.total:
                bar.reset(total)
            bar.update(done - bar.n)

        yield progress


def _finish(result: Any, out: Path, name: str, spec: str) -> None:
    print(f"{name} on {spec}: {100 * result.accuracy:.1f} % of the test set right; results in {out}/")
    try:
        from .recipes.report_picture import draw_run
    except ModuleNotFoundError as error:
        print(f'no picture ({error}): pip install "clustops[demo]"', file=sys.stderr)
        return
    draw_run(result, f"{name} on {spec}", out / "report.png")
