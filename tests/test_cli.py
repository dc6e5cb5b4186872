from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from support import assert_message

from clustops import cli, cli_doctor, cli_train, native
from clustops.cli_settings import UsageError, apply, from_plain, listing
from clustops.kmeans import kmeans

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> int:
    return cli.main(list(arguments))


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


# usage


@pytest.mark.parametrize("command", [[], ["demo"], ["train"], ["doctor"]])
def test_help_is_there(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(*command, "--help")
    assert end.value.code == 0
    assert "usage: clustops" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["train", "mocov3"],
        ["demo", "--seeds", "0"],
        ["demo", "--workers", "two"],
        ["demo", "--workers", "-1"],
        ["doctor", "x"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 2


def test_training_needs_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train") == 2
    assert "train needs the NAME of a system, one of supervised, fixmatch" in complaint(capsys)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run("--version")
    assert end.value.code == 0
    assert capsys.readouterr().out == f"clustops {cli_doctor.version('clustops')}\n"


@pytest.mark.parametrize("command", ["demo", "train"])
def test_help_names_all_data(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(command, "--help")
    assert cli_train.DATA_HELP in " ".join(capsys.readouterr().out.split())


def test_help_says_which_systems_count_steps_and_which_epochs() -> None:
    def counts(name: str, setting: str) -> bool:
        module = importlib.import_module(f"clustops.recipes.{cli_train.SYSTEMS[name][0]}")
        return hasattr(module.Config(), setting)

    by_epochs = ["deepcluster", "deepcluster-v2"]
    assert [name for name in cli_train.SYSTEMS if not counts(name, "steps")] == by_epochs
    assert [name for name in cli_train.SYSTEMS if counts(name, "epochs")] == by_epochs


def test_a_reader_that_stops_reading_gets_no_complaint() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "clustops", "train", "ccssl", "--list"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_module_runs_as_a_program() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "clustops", "train", "supervised", "--set", "colour=red"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("clustops: there is no setting 'colour'")
    assert done.stderr.count("\n") == 1


# settings


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 3


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = 10
    lr: float = 0.1
    name: str = "x"
    flag: bool = False
    method: Literal["a", "b"] = "a"
    limit: float | None = None
    inner: Inner = Inner()
    several: tuple[Inner, ...] = (Inner(), Inner(4))


PRESETS = {"SMALL": Inner(1), "BIG": Inner(9)}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("steps=20", "steps", 20),
        ("lr=1e-3", "lr", 1e-3),
        ("lr=2", "lr", 2.0),
        ("name=a=b", "name", "a=b"),
        ("flag=true", "flag", True),
        ("flag=False", "flag", False),
        ("method=b", "method", "b"),
        ("limit=0.5", "limit", 0.5),
        ("limit=none", "limit", None),
        ("inner.size=7", "inner", Inner(7)),
        ("inner=BIG", "inner", Inner(9)),
        ("several=BIG,SMALL", "several", (Inner(9), Inner(1))),
    ],
)
def test_a_setting_takes_its_type(text: str, name: str, value: object) -> None:
    changed = getattr(apply(Settings(), [text], PRESETS), name)
    assert changed == value
    assert type(changed) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", "--set takes KEY=VALUE, got 'steps'"),
        ("lame=1", "there is no setting 'lame'; did you mean name or flag"),
        ("epochs=1", "there is no setting 'epochs'; did you mean steps?"),
        ("step=1", "there is no setting 'step'; did you mean steps?"),
        ("steps=1.5", "steps must be a whole number, got '1.5'"),
        ("lr=fast", "lr must be a number, got 'fast'"),
        ("flag=1", "flag must be true or false, got '1'"),
        ("method=c", "method must be one of a, b, got 'c'"),
        ("limit=x", "limit must be a number or none, got 'x'"),
        ("steps.a=1", "steps has no parts"),
        ("inner.colour=1", "there is no setting 'colour'"),
        ("inner=HUGE", r"inner must be one of SMALL, BIG \(or set its parts: size\), got 'HUGE'"),
    ],
)
def test_a_bad_setting_is_explained(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        apply(Settings(), [text], PRESETS)


def test_settings_survive_json() -> None:
    settings = apply(Settings(), ["limit=2", "inner=BIG", "flag=true"], PRESETS)
    assert from_plain(Settings, json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


def test_the_listing_has_a_line_for_each_setting() -> None:
    lines = listing(Settings(inner=Inner(9)), PRESETS).splitlines()
    assert len(lines) == len(dataclasses.fields(Settings))
    assert lines[6].split()[:2] == ["inner", "BIG"]


# train

QUICK = ["--steps", "4", "--set", "batch=10", "--set", "log_every=1", "--set", "checkpoint_every=2"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_config_metrics_checkpoint_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "supervised", "--out", str(tmp_path), "--seed", "3", *QUICK) == 0
    assert "supervised on digits: " in capsys.readouterr().out
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["name"], config["data"]) == ("supervised", "digits")
    assert config["config"]["seed"] == 3
    assert config["config"]["method"] == "strong"
    assert [entry["step"] for entry in metrics(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / "checkpoint.pt").is_file()
    assert (tmp_path / "report.png").stat().st_size > 5_000


def test_a_resumed_run_ends_with_the_numbers_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clustops.recipes import supervised, training

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run("train", "supervised", "--out", str(whole), *QUICK) == 0
    steps = []
    plain = training.optimise

    def breaks_at_the_fourth(*arguments: Any) -> None:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        plain(*arguments)

    monkeypatch.setattr(supervised, "optimise", breaks_at_the_fourth)
    assert run("train", "supervised", "--out", str(broken), *QUICK) == 130
    assert run("train", "supervised", "--out", str(broken), "--resume") == 0
    assert len(steps) == 6
    assert metrics(broken) == metrics(whole)


def test_a_run_is_neither_overwritten_nor_mixed_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "supervised", "--out", str(tmp_path / "new"), "--resume") == 2
    assert "there is no run in" in complaint(capsys)
    assert run("train", "supervised", "--out", str(tmp_path), *QUICK) == 0
    capsys.readouterr()
    assert run("train", "supervised", "--out", str(tmp_path)) == 2
    assert "already holds a run; continue it with --resume" in complaint(capsys)
    assert run("train", "fixmatch", "--out", str(tmp_path), "--resume") == 2
    assert "holds a run of supervised on digits, not of fixmatch" in complaint(capsys)
    assert run("train", "supervised", "--out", str(tmp_path), "--resume", "--steps", "20") == 2
    assert "steps must be 4 as in the run to resume, got 20; leave it out, or" in complaint(capsys)
    assert run("train", "supervised", "--out", str(tmp_path), "--resume") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0; "),
        (["--steps", "-3"], "steps must be at least 1, got -3; "),
        (["--set", "batch=0"], "batch must be at least 1, got 0; "),
        (["--set", "mu=0"], "mu must be at least 1, got 0; "),
        (["--set", "weak.size=-1"], "weak.size must be at least 0, got -1; "),
        (["--set", "threshold=1.5"], "threshold must be in [0, 1], got 1.5; "),
        (["--set", "push_threshold=1.1"], "push_threshold must be in [0, 1], got 1.1; "),
        (["--set", "temperature=0"], "temperature must be finite and above 0, got 0.0; "),
        (["--set", "lr=nan"], "lr must be finite and at least 0, got nan; "),
        (["--set", "lr=-1"], "lr must be finite and at least 0, got -1.0; "),
        (["--labels-per-class", "0"], "labels_per_class must be at least 1, got 0; "),
        (["--labels-per-class", "5000"], "labels per class must be at most "),
        (["--device", "gpu"], "device must be cpu or a device of this torch, got 'gpu'; clustops doctor"),
        (["--device", "cuda:99"], "device must be cpu or a device of this torch, got 'cuda:99'; "),
        (["--device", "meta"], "device must be cpu or a device of this torch, got 'meta'; "),
        (["--set", "network=huge"], "network must be one of 'small'"),
        (["--data", "mnist"], "data must be one of digits"),
    ],
)
def test_an_impossible_value_is_explained_before_anything_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "ccssl", "--out", str(tmp_path / "new"), *arguments) == 2
    assert f"clustops: {message}" in complaint(capsys)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", cli_train.SYSTEMS)
def test_the_defaults_are_possible(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", name, "--list") == 0
    assert run("train", name, "--list", "--data", "cifar10") == 0


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_kmeans_explains_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ValueError, match="device must be cpu or") as error:
        kmeans(torch.arange(6.0).view(3, 2), 2, device=device)
    assert_message(error.value, device, "clustops doctor")


def test_a_folder_of_a_failed_run_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clustops.recipes import supervised

    def fails(*arguments: Any) -> None:
        raise ValueError("diverged")

    with monkeypatch.context() as patch:
        patch.setattr(supervised, "optimise", fails)
        assert run("train", "supervised", "--out", str(tmp_path), *QUICK) == 2
    assert run("train", "supervised", "--out", str(tmp_path), "--resume") == 2
    assert "no checkpoint.pt" in complaint(capsys)
    assert run("train", "supervised", "--out", str(tmp_path), *QUICK) == 0


def test_a_checkpoint_of_the_first_stage_holds_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "checkpoint.pt").touch()
    assert run("train", "suave", "--out", str(tmp_path)) == 2
    assert "already holds a run" in complaint(capsys)


def test_missing_data_are_explained_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "train",
        "supervised",
        "--data",
        "cifar10",
        "--data-root",
        str(tmp_path),
        "--out",
        str(tmp_path / "o"),
    ]
    assert run(*arguments) == 1
    assert "cifar-10-batches-py/ with data_batch_1" in complaint(capsys)
    assert not (tmp_path / "o").exists()


def test_settings_are_listed_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "fixmatch", "--list", "--out", str(tmp_path / "o")) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.split()[:2] == ["method", "fixmatch"]
    assert not (tmp_path / "o").exists()
    assert run("train", "--list") == 0
    assert capsys.readouterr().out.split() == list(cli_train.SYSTEMS)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ([], "steps", "400"),
        (["--steps", "7"], "steps", "7"),
        (["--set", "threshold=0.5"], "threshold", "0.5"),
        (["--data", "cifar10"], "network", "wrn-28-2"),
        (["--data", "cifar100", "--published"], "network", "wrn-28-8"),
    ],
)
def test_the_listing_shows_what_the_arguments_set(
    arguments: list[str], name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "ccssl", "--list", *arguments) == 0
    shown = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines())
    assert shown[name] == value


@pytest.mark.slow
def test_two_ranks_under_torchrun_learn_what_one_process_does(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["-m", "clustops", "train", "supervised", *QUICK, "--out"]
    alone = [sys.executable, *command, str(tmp_path / "one")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for arguments in (alone, [*launcher, *command, str(tmp_path / "two")]):
        subprocess.run(arguments, env=environment, check=True, timeout=300)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [entry["step"] for entry in two] == [1, 2, 3, 4]
    for a, b in zip(one, two, strict=True):
        assert a["accuracy"] == pytest.approx(b["accuracy"], abs=0.005)


def test_colour_images_get_settings_for_photographs() -> None:
    from clustops.recipes import augment, deepcluster, photographs, suave

    assert doctest.testmod(photographs).failed == 0
    clusters = photographs.for_photographs(deepcluster.Config(), network="wrn-28-2")
    photo = [value for name, value in photographs.presets().items() if name.startswith("PHOTO_")]
    assert (clusters.sobel, clusters.view in photo, clusters.network) == (True, True, "wrn-28-2")
    views = photographs.for_photographs(suave.Config()).views
    assert views == (augment.PHOTO_CROP, augment.PHOTO_CROP, augment.PHOTO_LOCAL, augment.PHOTO_LOCAL)
    assert photographs.for_photographs(suave.Config(network="small")).network == "small"


# doctor


def test_doctor_names_versions_and_says_what_serves_each_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    text = capsys.readouterr().out
    for word in ("clustops", "torch", "python", "system", "processor", "GPU", "kmeans_assign"):
        assert f"  {word} " in text


def test_doctor_says_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "extension", None)
    monkeypatch.setattr(native, "why_not", "switched off")
    monkeypatch.setattr(cli_doctor, "_build_info", lambda: {"reason": "no compiler"})
    text = "\n".join(cli_doctor._kernels())
    assert "all ops run as plain PyTorch" in text
    assert "switched off" in text
    assert "no compiler" in text


@pytest.mark.parametrize("built", [True, False])
def test_doctor_reports_what_the_extension_says(monkeypatch: pytest.MonkeyPatch, built: bool) -> None:
    extension = SimpleNamespace(
        instruction_set=lambda: "avx2", cuda_built=lambda: built, cuda_archs=lambda: "80, 90a"
    )
    monkeypatch.setattr(native, "extension", extension)
    monkeypatch.setattr(cli_doctor, "_build_info", lambda: {"reason": "no nvcc"})
    text = "\n".join(cli_doctor._kernels())
    assert "avx2" in text
    assert ("built for 80, 90a" in text) is built
    assert ("not built: no nvcc" in text) is not built


def test_doctor_reads_the_build_file_and_survives_its_absence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    assert cli_doctor._build_info() == {}
    (tmp_path / "build_info.json").write_text('{"cuda": false, "reason": "off"}')
    assert cli_doctor._build_info()["reason"] == "off"
    (tmp_path / "build_info.json").write_text("{")
    assert cli_doctor._build_info() == {}


# bench


def test_bench_needs_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("bench", "--suite", "quick") == 1
    assert "change to the top of a checkout" in complaint(capsys)


def test_bench_passes_its_arguments_on(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "__main__.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(3)\n")
    command = [sys.executable, "-m", "clustops", "bench", "--suite", "quick", "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout == "['--suite', 'quick', '--help']\n"


@pytest.mark.parametrize(("end", "code"), [(None, 0), (0, 0), (4, 4), ("no such op", 1)])
def test_bench_ends_with_the_code_of_the_benchmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: object, code: int
) -> None:
    def run_module(name: str, run_name: str) -> None:
        raise SystemExit(end)

    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__main__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(runpy, "run_module", run_module)
    assert run("bench") == code


def test_settings_of_the_demo_are_those_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from clustops.recipes import demo

    seen: dict[str, Any] = {}
    monkeypatch.setattr(demo, "run", lambda spec, jobs, **rest: seen.update(spec=spec, **rest))
    monkeypatch.setitem(sys.modules, "clustops.recipes.demo_systems", SimpleNamespace(JOBS=()))
    assert (
        run("demo", "--seeds", "3", "--labels-per-class", "2", "--out", str(tmp_path), "--workers", "1") == 0
    )
    assert seen["spec"] == "digits"
    assert (seen["seeds"], seen["labels_per_class"], seen["workers"], seen["out"]) == (3, 2, 1, tmp_path)
