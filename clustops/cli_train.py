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

from .cli_settings import UsageError, apply, check, from_plain, listing
from .distributed import joined_ranks, rank
from .recipes.data import labelled_subset, load
from .recipes.photographs import for_photographs, presets

# Module of each recipe and the settings that make it the system of that name.
SYSTEMS: dict[str, tuple[str, dict[str, str]]] = {
    "supervised": ("supervised", {"method": "strong"}),
    "fixmatch": ("ccssl", {"method": "fixmatch"}),
    "ccssl": ("ccssl", {"method": "ccssl"}),
    "deepcluster": ("deepcluster", {}),
    "deepcluster-v2": ("deepcluster_v2", {}),
    "suave": ("suave", {}),
    "daino": ("daino", {}),
}

DATA_HELP = "digits (default), cifar10, cifar100, stl10, folder:PATH[@SIZE]"
COLOUR = {"digits": False, "cifar10": True, "cifar100": True, "stl10": True}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``clustops train`` takes."""
    parser.description = (
        "Train one system. DIR gets config.json, metrics.jsonl, checkpoint.pt and report.png. A resumed run "
        "ends with the numbers of an uninterrupted one. Under torchrun the ranks share each batch."
    )
    add = parser.add_argument
    add("name", nargs="?", choices=SYSTEMS, metavar="NAME", help=", ".join(SYSTEMS))
    add("--data", metavar="DATA", help=DATA_HELP)
    add(
        "--data-root", type=Path, metavar="DIR", help="where data files lie (default: $CLUSTOPS_DATA, ./data)"
    )
    add("--out", type=Path, metavar="DIR", help="folder for the results (default: runs/NAME)")
    add("--resume", action="store_true", help="continue the run in DIR, with its data and settings")
    add("--published", action="store_true", help="start from the settings of the paper for this data")
    add("--seed", metavar="N", help="one seed gives one result (default: 0)")
    add("--steps", metavar="N", help="optimiser steps (all systems but deepcluster)")
    add("--epochs", metavar="N", help="passes over the data (deepcluster)")
    add("--labels-per-class", metavar="N", help="labels that the system may use")
    add("--device", metavar="NAME", help="cpu (default) or cuda")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting; may be repeated")
    add("--list", action="store_true", help="list what these arguments set, or the names, and stop")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train as the options say."""
    if options.name is None:
        if not options.list:
            raise UsageError(f"train needs the NAME of a system, one of {', '.join(SYSTEMS)}")
        print("\n".join(SYSTEMS))
        return 0
    recipe, method = SYSTEMS[options.name]
    module = importlib.import_module(f".recipes.{recipe}", __package__)
    out = options.out or Path("runs", options.name)
    saved = {} if options.list and not options.resume else _saved(out, options)
    spec = options.data or saved.get("data", "digits")
    if saved and (spec, options.name) != (saved["data"], saved["name"]):
        raise UsageError(
            f"{out} holds a run of {saved['name']} on {saved['data']}, not of {options.name} on {spec}; "
            f"choose another --out"
        )
    if options.list and spec in COLOUR:
        config = _config(module, method, spec, COLOUR[spec], options, saved)
    else:
        data = load(spec, options.data_root)
        config = _config(module, method, data.name, data.train_images.shape[1] == 3, options, saved)
    # Whatever is wrong shows before anything is written.
    check(config)
    if options.list:
        print(listing(config, presets()))
        return 0
    labelled_subset(data.train_labels, config.labels_per_class, config.seed)
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
    # A run of two stages starts in pretrain/.
    if not any((folder / "checkpoint.pt").exists() for folder in (out, out / "pretrain")):
        if options.resume:
            raise UsageError(
                f"there is no run in {out} to resume (no checkpoint.pt); start one without --resume"
            )
        return {}
    if not options.resume:
        raise UsageError(f"{out} already holds a run; continue it with --resume, or choose another --out")
    saved: dict[str, Any] = json.loads((out / "config.json").read_text())
    return saved


def _config(
    module: Any,
    method: dict[str, str],
    data: str,
    colour: bool,
    options: argparse.Namespace,
    saved: dict[str, Any],
) -> Any:
    given = {"seed": options.seed, "steps": options.steps, "epochs": options.epochs}
    given |= {"labels_per_class": options.labels_per_class, "device": options.device}
    texts = [f"{key}={value}" for key, value in given.items() if value is not None] + options.set
    if saved:
        return _unchanged(from_plain(module.Config, saved["config"]), texts)
    config = dataclasses.replace(module.Config(), **method)
    if options.published:
        if not hasattr(module, "published"):
            raise UsageError(f"there are no published settings for {options.name}; leave --published out")
        labels = apply(config, texts).labels_per_class
        config = dataclasses.replace(module.published(data, labels), **method)
    elif colour:
        config = for_photographs(config, network="wrn-28-2")
    return apply(config, texts, presets())


def _unchanged(config: Any, texts: list[str]) -> Any:
    """``config``, which the settings must not change: its run is to be continued."""
    asked = apply(config, texts, presets())
    for field in dataclasses.fields(config):
        then, now = getattr(config, field.name), getattr(asked, field.name)
        if now != then:
            cure = "leave it out, or choose another --out for a new run"
            raise UsageError(f"{field.name} must be {then} as in the run to resume, got {now}; {cure}")
    return config


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
