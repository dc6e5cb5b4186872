from __future__ import annotations

import json
import math
import os
import shutil
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import contrastive, kmeans, measure, record, run, sampler, sampler_peers, sinkhorn, table
from benchmarks.case import OURS, Case, Implementation, Inputs, Result, Run, Skip, Target, Work, both
from benchmarks.contest import Setting, run_case
from benchmarks.floors import Floors
from benchmarks.measure import Timing
from benchmarks.record import CaseResult, Mode, Row

ONE = Mode("1 thread", 1, "process_time")
FLOORS = {"1 thread": Floors(1, {"fp32": 100e9, "exp": 1e9, "bytes": 10e9, "reads": 50e6}, "a test")}
MACHINE = {"instruction_sets": ["avx512f", "avx512_bf16"], "commit": "abc", "cpu": "test", "gpu": None}
GPU_SH = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"


def fixed(value: float) -> Implementation:
    return Implementation(f"gives {value}", lambda inputs: lambda: (torch.full((4,), value),))


def raises(name: str, error: Exception) -> Implementation:
    def build(inputs: Inputs) -> Run:
        raise error

    return Implementation(name, build)


def toy(*peers: Implementation) -> Case:
    """The answer is four ones."""
    return Case(
        name="toy",
        make=lambda generator: {"x": torch.rand(4, generator=generator)},
        implementations=(replace(fixed(1.0), name=OURS), *peers),
        oracle=lambda inputs: torch.ones(4),
        error=lambda inputs, oracle, result: float((result[0] - oracle).abs().max()),
        error_name="difference",
        tolerance=0.1,
        work=Work(flops=1e6, bytes=8.0),
        targets={"slow": Target(2.2, 1.2)},
    )


def setting(suite: str = "cpu", peers: tuple[str, ...] = (), modes: tuple[Mode, ...] = (ONE,)) -> Setting:
    return Setting(suite, torch.device("cpu"), list(modes), list(peers), 0.001)


@pytest.fixture(autouse=True)
def _keep_threads():
    threads = torch.get_num_threads()
    yield
    measure.set_threads(threads)


def timed(name: str, seconds: float, *, error: float | None = 0.0, wrong: bool = False) -> Row:
    return Row(name, error, 0, wrong, {"1 thread": Timing(seconds, 0.01, 5)})


def timed_case(*rows: Row) -> CaseResult:
    return CaseResult(toy(), list(rows))


def test_each_round_times_everyone_once_and_starts_one_further_on():
    order: list[str] = []

    def contestant(name: str):
        return lambda: order.append(name) or float(len(order))

    samples = measure.interleave({name: contestant(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abc" + "bca" + "cab"
    assert samples == {"a": [1.0, 6.0, 8.0], "b": [2.0, 4.0, 9.0], "c": [3.0, 5.0, 7.0]}


def test_a_summary_is_the_median_and_the_middle_half():
    assert measure.summarise([1.0, 100.0, 2.0, 3.0, 4.0]) == Timing(3.0, 2 / 3, 5)
    assert measure.summarise([2.0]) == Timing(2.0, 0.0, 1)


def test_the_cpu_sampler_divides_by_its_calls():
    ticks = iter([10.0, 16.0])
    calls: list[int] = []
    sample = measure.cpu_sampler(lambda: calls.append(1) or (), 3, lambda: next(ticks))
    assert sample() == 2.0
    assert len(calls) == 3


def test_the_ratio_is_peer_time_over_ours_and_ours_is_against_the_best_peer():
    ratios = timed_case(timed(OURS, 2.0), timed("slow", 8.0), timed("fast", 3.0)).ratios("1 thread")
    assert ratios == {"slow": 4.0, "fast": 1.5, OURS: 1.5}


def test_a_wrong_peer_and_another_function_are_never_the_best_peer():
    rows = [timed("wrong", 1.0, wrong=True), timed("other", 1.0, error=None), timed("right", 6.0)]
    ratios = timed_case(timed(OURS, 2.0), *rows).ratios("1 thread")
    assert ratios[OURS] == 3.0
    assert ratios["wrong"] == 0.5


def test_without_our_own_time_there_is_no_ratio():
    assert timed_case(timed("peer", 1.0)).ratios("1 thread") == {}


def test_the_floor_is_the_slowest_of_arithmetic_exps_bytes_and_reads():
    floors = FLOORS["1 thread"]
    assert floors.of(Work(flops=1e9, exps=1e6, bytes=1e6)) == (0.01, "fp32")
    assert floors.of(Work(flops=1e6, exps=1e9, bytes=1e6)) == (1.0, "exp")
    assert floors.of(Work(flops=1e6, exps=1e6, bytes=1e9)) == (0.1, "bytes")
    assert floors.of(Work(bytes=1e6, reads=1e6)) == (0.02, "reads")
    assert record.amount(Work(bytes=1e6, reads=1e3), "reads") == 1e3


def test_a_gpu_case_is_bounded_by_its_own_matrix_rate_and_no_exp_rate():
    floors = Floors(0, {"bf16": 1e12, "tf32": 1e11, "bytes": 1e12}, "a test")
    assert floors.of(Work(flops=1e12, exps=1e30, matmul="bf16")) == (1.0, "bf16")
    assert floors.of(Work(flops=1e12, matmul="tf32")) == (10.0, "tf32")


@pytest.mark.parametrize(
    ("instructions", "expected"), [(["avx512f", "avx512_bf16"], 2.2), (["avx512f"], 1.2), (["avx2"], None)]
)
def test_the_target_is_that_of_the_processor(instructions: list[str], expected: float | None):
    assert record.target_for(toy(), "slow", instructions) == expected
    assert record.target_for(toy(), "a peer without one", instructions) is None


def test_a_skipped_peer_is_named_with_its_reason():
    missing = raises("absent", ModuleNotFoundError("No module named 'absent'"))
    picky = raises("picky", Skip("takes one problem at a time"))
    broken = raises("broken", RuntimeError("number of categories cannot exceed 2^24\nand a trace"))
    result = run_case(toy(missing, picky, broken), setting())
    assert result.skipped == {
        "absent": "not installed: No module named 'absent'",
        "picky": "takes one problem at a time",
        "broken": "failed: RuntimeError: number of categories cannot exceed 2^24",
    }
    assert not result.failed
    lines = table.case_lines(record.case_json(result, [ONE], FLOORS, MACHINE), [ONE._asdict()])
    assert all(name in lines and reason in lines for name, reason in result.skipped.items())


def test_only_the_peers_asked_for_run_and_ours_always_does():
    result = run_case(toy(fixed(1.0), fixed(1.01)), setting(peers=("1.01",)))
    assert [row.name for row in result.rows] == [OURS, "gives 1.01"]
    assert result.skipped == {"gives 1.0": "not among --peers"}


def test_the_quick_suite_does_not_wait_for_a_compiler():
    compiled = replace(fixed(1.0), name="compiled", compiles=True)
    assert "compiled" in run_case(toy(compiled), setting("quick")).skipped
    assert run_case(toy(compiled), setting("cpu")).row("compiled") is not None


def test_a_wrong_peer_is_shown_as_wrong_and_ours_fails_the_run():
    result = run_case(toy(fixed(1.5)), setting())
    row = result.row("gives 1.5")
    assert row is not None
    assert row.wrong
    assert row.error == 0.5
    assert not result.failed
    ours_wrong = replace(toy(), oracle=lambda inputs: torch.zeros(4))
    assert run_case(ours_wrong, setting()).failed


def test_a_nan_result_is_wrong():
    row = run_case(toy(fixed(math.nan)), setting()).row("gives nan")
    assert row is None or row.wrong


def test_ours_missing_or_broken_fails_the_run():
    case = toy()
    for error in (ImportError("no kernel"), RuntimeError("broke")):
        broken = replace(case, implementations=(raises(OURS, error), fixed(1.0)))
        result = run_case(broken, setting())
        assert result.failed
        assert result.row("gives 1.0") is not None


def test_a_case_without_its_data_is_skipped_and_one_that_breaks_fails():
    def no_data(generator: torch.Generator) -> Inputs:
        raise Skip("no photographs")

    def no_memory(inputs: Inputs) -> None:
        raise RuntimeError("out of memory")

    skipped = run_case(replace(toy(), make=no_data), setting())
    assert skipped.skipped == {OURS: "no photographs"}
    assert not skipped.failed
    assert run_case(replace(toy(), oracle=no_memory), setting()).failed


def test_a_peer_that_breaks_while_timed_drops_out_alone():
    def build(inputs: Inputs) -> Run:
        calls = iter(range(3))

        def one() -> Result:
            next(calls)  # StopIteration in the fourth call
            return (torch.ones(4),)

        return one

    result = run_case(toy(Implementation("tires", build)), setting())
    assert result.skipped["tires"].startswith("failed: StopIteration")
    assert [row.name for row in result.rows] == [OURS]


def test_unwritten_elements_are_found_and_inputs_are_never_poisoned():
    inputs = {"x": torch.ones(4)}
    result = (inputs["x"][1:], torch.ones(3), torch.arange(3), torch.arange(3).int())
    assert not measure.unwritten(result)
    measure.poison(result, inputs)
    assert inputs["x"].tolist() == [1.0] * 4
    assert measure.unwritten(result[1:2])
    assert measure.unwritten(result[2:3])
    assert measure.unwritten(result[3:])
    assert not measure.unwritten(result[:1])


def test_an_implementation_that_leaves_gaps_is_refused():
    def build(inputs: Inputs) -> Run:
        memory = torch.ones(4)

        def half() -> Result:
            memory[:2] = 1.0
            return (memory,)

        return half

    assert "unwritten" in run_case(toy(Implementation("half", build)), setting()).skipped["half"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak counter")
def test_peak_memory_counts_what_was_freed_again():
    def run_once() -> Result:
        return (torch.ones(16, 1 << 20).sum(0, keepdim=True)[:, :1].clone(),)

    peak = measure.observe(run_once, torch.device("cpu")).peak_bytes
    assert peak is not None
    assert 64e6 < peak < 128e6


def test_a_thread_count_means_every_library():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    for threads in (2, 1):
        measure.set_threads(threads)
        assert torch.get_num_threads() == threads
        assert {pool["num_threads"] for pool in threadpoolctl.threadpool_info()} == {threads}


def test_the_quoted_pass_is_one_thread_of_cpu_time():
    modes = run.modes_for(torch.device("cpu"), 2)
    assert modes == [ONE, Mode("2 threads", 2, "wall")]
    assert run.modes_for(torch.device("cpu"), 1) == [ONE]
    assert [mode.clock for mode in run.modes_for(torch.device("cuda"), 2)] == ["events"]


def test_json_and_table_carry_the_same_numbers(tmp_path: Path):
    case = replace(toy(), targets={"slow": both(5.0), "fast": both(2.0)}, steps=1)
    result = CaseResult(case, [timed(OURS, 2e-5), timed("slow", 8e-5), timed("fast", 1e-5)])
    result.loads["1 thread"] = 0.25
    report = record.header("toy", "cpu", machine_facts(), [ONE], FLOORS)
    report["cases"].append(record.case_json(result, [ONE], FLOORS, report["machine"]))
    run.write(report, tmp_path)
    read = json.loads((tmp_path / "cpu-toy.json").read_text())
    assert read["schema"] == 1
    assert {"cpu", "instruction_sets", "versions", "commit", "native"} <= read["machine"].keys()
    assert read["floors"]["1 thread"]["rates"]["fp32"] == 100e9
    ours, slow, _ = read["cases"][0]["rows"]
    assert ours["timings"]["1 thread"]["of_floor"] == pytest.approx(0.5)  # 1 MFLOP at 100 GFLOP/s is 10 us
    assert ours["timings"]["1 thread"]["ratio"] == 0.5
    assert (slow["timings"]["1 thread"]["ratio"], slow["target"]) == (4.0, 5.0)
    verdict = table.verdict(read)
    assert "targets met 0, missed 2; faster peers 1" in verdict
    assert "slower  toy: 0.50x fast" in verdict
    lines = table.heading(read) + table.case_lines(read["cases"][0], read["modes"])
    assert "5x MISS" in lines
    assert "load average 0.25" in lines


@pytest.mark.parametrize(("wall", "met"), [(0.02, True), (0.03, False)])
def test_a_target_in_seconds_is_for_all_threads(wall: float, met: bool):
    two = Mode("2 threads", 2, "wall")
    row = timed(OURS, 0.04)
    row.timings["2 threads"] = Timing(wall, 0.0, 3)
    result = CaseResult(replace(toy(), target_seconds=0.025), [row])
    result.loads["1 thread"] = 0.0
    floors = FLOORS | {"2 threads": FLOORS["1 thread"]}
    report = record.header("toy", "cpu", machine_facts(), [ONE, two], floors)
    report["cases"].append(record.case_json(result, [ONE, two], floors, report["machine"]))
    lines = table.case_lines(report["cases"][0], report["modes"])
    assert "25 ms wall" in lines
    assert ("25 ms wall MISS" in lines) is not met
    assert (f"targets met {int(met)}" in table.verdict(report)) is True
    assert ("30 ms of 25 ms" in table.verdict(report)) is not met


def machine_facts() -> dict[str, object]:
    from benchmarks import machine

    return machine.describe()


def test_a_nan_error_is_still_valid_json(tmp_path: Path):
    report = record.header("toy", "cpu", machine_facts(), [ONE], FLOORS)
    result = timed_case(timed(OURS, 1.0), timed("bad", 1.0, error=math.nan, wrong=True))
    report["cases"].append(record.case_json(result, [ONE], FLOORS, report["machine"]))
    run.write(report, tmp_path)
    assert json.loads((tmp_path / "cpu-toy.json").read_text())["cases"][0]["rows"][1]["wrong"]
    assert "NaN WRONG" in table.case_lines(report["cases"][0], report["modes"])


def test_the_picture_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    report = record.header("toy", "cpu", machine_facts(), [ONE], FLOORS)
    result = timed_case(timed(OURS, 2.0), timed("slow", 8.0), timed("fast", 1.0))
    report["cases"].append(record.case_json(result, [ONE], FLOORS, report["machine"]))
    run.picture(report, tmp_path)
    assert (tmp_path / "cpu-toy.png").stat().st_size > 10_000


def test_the_cuda_suite_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert run.main(["--suite", "cuda", "--out", str(tmp_path / "none")]) == 2
    assert "no GPU visible" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


MODULES = {"kmeans": kmeans, "sinkhorn": sinkhorn, "contrastive": contrastive, "sampler": sampler}


@pytest.mark.parametrize("suite", run.SUITES)
@pytest.mark.parametrize("op", run.OPS)
def test_every_target_names_an_implementation_of_its_case(op: str, suite: str):
    for case in MODULES[op].cases(suite):
        names = [implementation.name for implementation in case.implementations]
        assert names[0] == OURS, case.name
        assert len(set(names)) == len(names), case.name
        assert set(case.targets) <= set(names), case.name


ON_ANY_DEVICE = [
    kmeans.assign("Gaussian", kmeans.gaussian, 600, 64, 20),
    kmeans.lloyd("mixture", kmeans.mixture, 600, 64, 20, iterations=3),
    kmeans.lloyd("many", kmeans.gaussian, 100, 64, 5, b=3, iterations=3),
    kmeans.seeding(500, 8, 6),
    sinkhorn.plan(40, 30),
    sinkhorn.potentials(40, 30),
    sinkhorn.swapped(3, 40, 30),
    contrastive.ccssl(64, 16),
    contrastive.supcon(64, 16),
    contrastive.weighted(64, 16),
]
LABELS = sampler.uneven(3000, 50)
ON_THE_CPU = [
    sampler.epoch(3000, 50, LABELS, "as one tensor", sampler.TENSORS),
    sampler.epoch(3000, 50, LABELS, "as Python integers", sampler.ITERATORS),
    sampler.first_index(3000, 50, LABELS),
    sampler.members(3000, 50, LABELS),
    sampler.resume(3000, 50, LABELS),
    sampler.places(3000, 50, sampler.mapped(3000, 50)),
    sampler.stream(3000, 50, sampler.mapped(3000, 50)),
]
SMALL = [*ON_ANY_DEVICE, *ON_THE_CPU]
OURS_SMALL = [pytest.param(case, "cpu", id=f"{case.name}, cpu") for case in SMALL] + [
    pytest.param(case, "cuda", id=f"{case.name}, cuda", marks=pytest.mark.cuda) for case in ON_ANY_DEVICE
]


def answers_well(case: Case, implementation: Implementation, device: str) -> None:
    inputs = case.make(torch.Generator(device).manual_seed(1))
    error = case.error(inputs, case.oracle(inputs), implementation.build(inputs)())
    assert error <= case.tolerance


@pytest.mark.parametrize(("case", "device"), OURS_SMALL)
@pytest.mark.filterwarnings("ignore::clustops.checks.ClustopsWarning")
def test_clustops_agrees_with_fp64_on_small_shapes(case: Case, device: str):
    answers_well(case, case.implementations[0], device)


PEERS = [
    pytest.param(case, peer, id=f"{case.name}: {peer.name}")
    for case in SMALL
    for peer in case.implementations[1:]
    if not peer.compiles and peer.same_function
]


@pytest.mark.parametrize(("case", "peer"), PEERS)
def test_each_peer_agrees_with_fp64_on_small_shapes(case: Case, peer: Implementation):
    try:
        answers_well(case, peer, "cpu")
    except ImportError as missing:
        pytest.skip(str(missing))


def test_a_peer_that_cannot_take_the_labels_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampler_peers, "PART", 1 << 12)
    labels = torch.zeros(1, dtype=torch.int32).expand(2**24 + 1)
    case = replace(sampler.first_index(labels.numel(), 1, lambda generator: {"labels": labels}))
    outcome = run_case(replace(case, implementations=case.implementations[1:]), setting()).skipped
    assert outcome[sampler_peers.WEIGHTED].startswith("failed: RuntimeError: number of categories cannot")
    assert "s to the first index, 1 GB of Python integers" in outcome[sampler_peers.PUBLISHED]


def test_a_member_table_out_of_order_is_wrong():
    case = sampler.members(3000, 50, LABELS)
    inputs = case.make(torch.Generator().manual_seed(1))
    table, offsets = case.implementations[0].build(inputs)()
    for wrong in (table.flip(0), table[:-1], table[torch.tensor([1, 0, *range(2, 3000)])]):
        assert case.error(inputs, 3000, (wrong, offsets)) > case.tolerance


def test_the_mapped_labels_leave_no_file_and_no_cluster_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sampler.tempfile, "tempdir", str(tmp_path))
    labels = sampler.mapped(3001, 1500)(torch.Generator().manual_seed(2))["labels"]
    assert not list(tmp_path.iterdir())
    assert (labels.dtype, int(labels.bincount(minlength=1500).min()) > 0) == (torch.int32, True)
    sampler._file.cache_clear()
    monkeypatch.setattr(sampler.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 15_000}))
    with pytest.raises(Skip, match="GB"):
        sampler.mapped(3001, 1500)(torch.Generator().manual_seed(2))


def test_the_big_suite_is_the_samplers_alone():
    for op, module in MODULES.items():
        assert bool(module.cases("big")) == (op == "sampler")


def stub(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text("#!/bin/bash\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def gpu_sh(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path, "PYTHON": "python3"}
    return subprocess.run(["bash", str(GPU_SH), *arguments], env=environment, capture_output=True, text=True)


def test_gpu_script_without_a_gpu_stops_before_any_work(tmp_path: Path):
    stub(tmp_path, "nvidia-smi", "exit 9")
    done = gpu_sh(str(tmp_path / "out"), path=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 3
    assert done.stderr.strip() == "no GPU visible: nvidia-smi lists none"
    assert not (tmp_path / "out").exists()


def test_gpu_script_lists_its_steps_and_they_fit_in_ten_minutes(tmp_path: Path):
    done = gpu_sh("--dry-run", str(tmp_path / "out"), path=os.environ["PATH"])
    assert done.returncode == 0
    limits = [int(line.split("at most")[1].split()[0]) for line in done.stdout.splitlines()]
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "build",
        "cuda-tests",
        "sanitizer",
        "benchmarks",
        "cpu-tests",
    ]
    assert sum(limits) + 5 * len(limits) <= 600
    assert not (tmp_path / "out").exists()


def test_gpu_script_goes_on_after_a_failed_step_and_reports_it(tmp_path: Path):
    stub(tmp_path, "nvidia-smi", "echo 'GPU 0: stub'")
    stub(tmp_path, "compute-sanitizer", "exit 0")
    stub(
        tmp_path,
        "python3",
        """case "$*" in
            *pip*) echo 'a compiler error' >&2; exit 4 ;;
            *benchmarks*) echo 'kmeans: targets met 1, missed 1; faster peers 0'; echo '  missed  a case' ;;
        esac""",
    )
    done = gpu_sh(str(tmp_path / "out"), path=f"{tmp_path}:{os.environ['PATH']}")
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert done.returncode == 1
    assert done.stdout.endswith(summary)
    verdicts = {line.split()[0]: line for line in summary.splitlines() if " s  " in line}
    assert verdicts.keys() == {"build", "cuda-tests", "sanitizer", "benchmarks", "cpu-tests"}
    assert "FAILED, status 4" in verdicts.pop("build")
    assert all("passed" in line for line in verdicts.values())
    assert "a compiler error" in summary
    assert "  missed  a case" in summary


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_gpu_script_is_clean():
    subprocess.run(["shellcheck", str(GPU_SH)], check=True)
