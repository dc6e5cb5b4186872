from __future__ import annotations

import ast
import doctest
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_message, generator, run_ranks, seeds
from torch import Tensor

import clustops
from clustops import arrays, checks, distributed
from clustops.native import register
from clustops.reference import philox

PACKAGE = Path(clustops.__file__).parent
INTEGERS = st.integers(-(2**70), 2**70)


# Philox


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    key: tuple[int, ...], counter: tuple[int, ...], words: tuple[int, ...]
) -> None:
    position = counter[0] | counter[1] << 32
    signed = torch.tensor([position - 2**64 if position >= 2**63 else position])
    drawn = philox.philox(key[0] | key[1] << 32, counter[2] | counter[3] << 32, signed)
    assert tuple(int(word) for word in drawn) == words


def plain_philox(seed: int, stream: int, position: int) -> tuple[int, ...]:
    """The same function in Python's unbounded integers."""
    mask = 2**32 - 1
    key = [seed & mask, seed >> 32 & mask]
    c = [position & mask, position >> 32 & mask, stream & mask, stream >> 32 & mask]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ key[0], b & mask, a >> 32 ^ c[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return tuple(c)


@given(INTEGERS, INTEGERS, st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5))
def test_philox_equals_unbounded_integers(seed: int, stream: int, positions: list[int]) -> None:
    words = torch.stack(philox.philox(seed, stream, torch.tensor(positions)), dim=-1)
    assert [tuple(row) for row in words.tolist()] == [plain_philox(seed, stream, p) for p in positions]


@given(INTEGERS, seeds)
def test_a_draw_depends_on_its_position_alone(seed: int, start: int) -> None:
    positions = torch.arange(start, start + 60)
    whole = philox.normal(seed, 3, positions)
    parts = [philox.normal(seed, 3, part) for part in positions.split([1, 7, 52])]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole.view(3, 20), philox.normal(seed, 3, positions.view(3, 20)))


def test_streams_and_seeds_are_different_sequences() -> None:
    positions = torch.arange(1000)
    drawn = torch.stack([philox.uniform(s, t, positions) for s in range(4) for t in range(4)])
    assert drawn.unique().numel() == drawn.numel()
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.15


def test_uniform_draws_are_uniform_on_0_1() -> None:
    stats = pytest.importorskip("scipy.stats")
    u = philox.uniform(1, 2, torch.arange(200_000))
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


def test_uniform_draws_reach_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(philox, "philox", lambda *_: (torch.tensor([0, 2**32 - 1]),) * 4)
    assert philox.uniform(0, 0, torch.arange(2)).tolist() == [0.0, 1 - 2.0**-53]
    assert torch.isfinite(philox.normal(0, 0, torch.arange(2))).all()


@given(INTEGERS, seeds)
def test_normal_draws_are_box_muller(seed: int, position: int) -> None:
    a, b, c, d = plain_philox(seed, 5, position)
    u, v = ((a >> 5 << 26 | b >> 6) + 1) / 2**53, (c >> 5 << 26 | d >> 6) / 2**53
    expected = math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v)
    assert float(philox.normal(seed, 5, torch.tensor(position))) == pytest.approx(
        expected, rel=1e-12, abs=1e-15
    )


def test_normal_draws_are_normal() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert stats.kstest(philox.normal(1, 2, torch.arange(200_000)).numpy(), "norm").pvalue > 1e-3


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    philox.normal(0, 0, torch.arange(100))
    assert torch.equal(torch.get_rng_state(), before)


# Arrays


def assert_shared(tensor: Tensor, array: np.ndarray[Any, Any]) -> None:
    assert tensor.data_ptr() == array.ctypes.data
    np.testing.assert_array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?"])
def test_a_numpy_array_is_shared_and_keeps_its_dtype(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    tensor = arrays.to_tensor(array, "x")
    assert_shared(tensor, array)
    assert tensor.numpy().dtype == array.dtype


@pytest.mark.filterwarnings("error")
def test_a_read_only_array_is_shared_without_a_warning_and_stays_read_only() -> None:
    array = np.arange(6.0).reshape(2, 3)
    array.flags.writeable = False
    assert_shared(arrays.to_tensor(array, "x"), array)
    assert not array.flags.writeable


@pytest.mark.filterwarnings("error")
def test_a_read_only_memory_map_is_shared_and_unwritten(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(24, dtype=np.float32).reshape(6, 4))
    bytes_before = (tmp_path / "x.npy").read_bytes()
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    tensor = arrays.to_tensor(mapped[1:, ::2], "x")
    assert_shared(tensor, mapped[1:, ::2])
    assert float(tensor.sum()) == float(mapped[1:, ::2].sum())
    assert (tmp_path / "x.npy").read_bytes() == bytes_before


def test_a_read_only_array_lives_as_long_as_its_tensor(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(100_000.0))
    tensor = arrays.to_tensor(np.load(tmp_path / "x.npy", mmap_mode="r"), "x")
    assert float(tensor[-1]) == 99_999.0
    array = np.full(100_000, 7.0)
    array.flags.writeable = False
    tensor = arrays.to_tensor(array, "x")
    del array
    np.zeros(100_000).fill(1.0)
    assert (tensor == 7).all()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0)[::-1],
        np.arange(12.0).reshape(3, 4)[:, ::-2],
        np.arange(12.0).astype(">f8"),
        np.arange(12).astype(">i4"),
        np.array([(1.5, 1), (2.5, 2)], dtype=[("a", "f4"), ("b", "u1")])["a"],
        np.broadcast_to(np.arange(3.0), (4, 3)),
        np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
        np.zeros((0, 3), dtype=np.float32),
    ],
    ids=[
        "reversed",
        "negative step",
        "foreign floats",
        "foreign ints",
        "field",
        "broadcast",
        "transposed",
        "empty",
    ],
)
def test_any_layout_gives_the_same_values(array: np.ndarray[Any, Any]) -> None:
    tensor = arrays.to_tensor(array, "x")
    np.testing.assert_array_equal(tensor.numpy(), array)
    assert tensor.numpy().dtype == array.dtype.newbyteorder("=")


def test_a_tensor_goes_through_untouched() -> None:
    tensor = torch.ones(3, requires_grad=True)
    assert arrays.to_tensor(tensor, "x") is tensor
    assert arrays.like(tensor)(tensor) is tensor


class Foreign:
    """An array of another library: DLPack and nothing else."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def test_a_dlpack_array_is_shared() -> None:
    tensor = torch.arange(6.0)
    assert arrays.to_tensor(Foreign(tensor), "x").data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("rows", [[[1.0, 2.0], [3.0, 4.0]], ((1.0, 2.0), (3.0, 4.0))])
def test_a_list_gives_a_tensor_and_a_numpy_result(rows: Any) -> None:
    tensor = arrays.to_tensor(rows, "x")
    assert tensor.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert isinstance(arrays.like(rows)(tensor), np.ndarray)


def test_numpy_results_carry_no_gradient() -> None:
    out = arrays.like(np.ones(2))(torch.ones(2, requires_grad=True))
    assert isinstance(out, np.ndarray)
    assert out.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("array", "error", "got"),
    [
        ("text", TypeError, "got str"),
        (None, TypeError, "got NoneType"),
        (np.array([1j]), TypeError, "got dtype complex128"),
        (np.array([None]), TypeError, "got dtype object"),
        (np.array(["a"]), TypeError, "got dtype <U1"),
        (np.zeros(2, dtype=np.longdouble), TypeError, "got dtype"),
        ([[1.0], [2.0, 3.0]], ValueError, "got rows of several lengths"),
        (torch.eye(2).to_sparse(), TypeError, "got torch.sparse_coo"),
    ],
)
def test_what_is_no_array_of_numbers_is_named(array: Any, error: type[Exception], got: str) -> None:
    with pytest.raises(error) as raised:
        arrays.to_tensor(array, "features")
    assert_message(raised.value, "features must be", got)


# Checks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 63, 126])
def test_one_bad_value_anywhere_is_found(dtype: torch.dtype, bad: float, place: int) -> None:
    x = torch.ones(127, dtype=dtype)
    checks.check_finite(x, "x")
    x[place] = bad
    with pytest.raises(ValueError, match="x must be finite, got 1 NaN or infinite values of 127"):
        checks.check_finite(x, "x")


def test_infinities_that_cancel_are_found() -> None:
    with pytest.raises(ValueError, match="got 2 NaN"):
        checks.check_finite(torch.tensor([torch.inf, -torch.inf]), "x")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_that_overflows_is_not_a_bad_value(dtype: torch.dtype) -> None:
    checks.check_finite(torch.full((9,), torch.finfo(dtype).max, dtype=dtype), "x")


def test_values_are_not_looked_at_while_tracing() -> None:
    def traced(x: Tensor) -> Tensor:
        checks.check_finite(x, "x")
        return x + 1

    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    assert torch.isnan(compiled(torch.tensor([torch.nan]))).all()
    assert not checks.values_are_checked(torch.ones(1, device="meta"))


def test_values_on_other_devices_are_checked_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECK_VALUES_EVERYWHERE", True)
    assert checks.values_are_checked(torch.ones(1, device="meta"))


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.5), np.float64(0.5), 1e-300])
def test_positive_numbers_are_accepted(value: Any) -> None:
    checks.check_positive(value, "tau", "cure")


@pytest.mark.parametrize("value", [1, 2**40, np.int64(3), np.uint8(3)])
def test_counts_are_accepted(value: Any) -> None:
    checks.check_count(value, "k", 1, "cure")


ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("check", "args", "error", "parts"),
    [
        (
            checks.check_positive,
            (0.0, "tau", "cure"),
            ValueError,
            ("tau must be finite and above 0", "got 0.0"),
        ),
        (checks.check_positive, (-1, "tau", "cure"), ValueError, ("got -1",)),
        (checks.check_positive, (float("nan"), "tau", "cure"), ValueError, ("got nan",)),
        (checks.check_positive, (float("inf"), "tau", "cure"), ValueError, ("got inf",)),
        (checks.check_positive, (True, "tau", "cure"), TypeError, ("got bool",)),
        (checks.check_positive, ("1", "tau", "cure"), TypeError, ("got str",)),
        (checks.check_count, (0, "k", 1, "cure"), ValueError, ("k must be at least 1", "got 0")),
        (checks.check_count, (1.0, "k", 1, "cure"), TypeError, ("an integer", "got 1.0")),
        (checks.check_count, (True, "k", 1, "cure"), TypeError, ("got True",)),
        (checks.check_choice, ("c", "mode", ("a", "b")), ValueError, ("one of 'a', 'b'", "got 'c'")),
        (checks.check_choice, (None, "mode", ("a", "b")), ValueError, ("got None",)),
        (checks.check_tensor, ([1], "x"), TypeError, ("x must be a tensor", "got list")),
        (
            checks.check_floating,
            (ONES.int(), "x"),
            TypeError,
            ("x must be float32", "got torch.int32", "convert it to float32"),
        ),
        (
            checks.check_tensor,
            ([ONES, ONES], "x"),
            TypeError,
            ("x must be one tensor", "got a list of tensors", "torch.stack(views)"),
        ),
        (
            checks.check_tensor,
            (ONES.to_sparse(), "x"),
            TypeError,
            ("dense", "torch.sparse_coo", "x.to_dense()"),
        ),
        (
            checks.check_same_device,
            (ONES, "x", ONES.to("meta"), "y"),
            ValueError,
            ("on the device of y, meta", "cpu"),
        ),
        (distributed.check_group, ("world",), ValueError, ("group must be None", "init_process_group")),
    ],
)
def test_bad_input_says_what_and_how_to_cure_it(
    check: Any, args: tuple[Any, ...], error: type[Exception], parts: tuple[str, ...]
) -> None:
    with pytest.raises(error) as raised:
        check(*args)
    assert_message(raised.value, *parts)


# Ranks


def gathered(rank: int, world: int, sizes: list[int]) -> tuple[Tensor, list[int]]:
    group = torch.distributed.group.WORLD
    shard = torch.arange(sum(sizes) * 2).view(-1, 2)[sum(sizes[:rank]) : sum(sizes[: rank + 1])]
    return distributed.all_gather_rows(shard.t().contiguous().t(), group)


@pytest.mark.parametrize(
    "sizes", [[3], [2, 2], [0, 3], [5, 0], [0, 0], [1, 7, 0, 4]], ids=lambda s: "-".join(map(str, s))
)
def test_rows_of_unequal_and_empty_shards_arrive_in_rank_order(sizes: list[int]) -> None:
    for rows, counts in run_ranks(len(sizes), gathered, sizes):
        assert counts == sizes
        assert torch.equal(rows, torch.arange(sum(sizes) * 2).view(-1, 2))


def reduced(rank: int, world: int) -> dict[str, Any]:
    group = torch.distributed.group.WORLD
    distributed.check_group(group)
    mine = torch.randn(2, 5, generator=generator(rank)).t()
    kept = mine.clone()
    with pytest.raises(TypeError) as raised:
        distributed.check_group("world")
    assert_message(raised.value, "group must be a ProcessGroup or None", "got str")
    return {
        "mine": mine,
        "unwritten": torch.equal(mine, kept),
        "sum": distributed.all_reduce_sum(mine, group),
        "max": distributed.all_reduce_max(mine, group),
        "rank": distributed.rank(group),
        "world": distributed.world_size(group),
    }


@pytest.mark.parametrize("world", [1, 2, 4])
def test_reductions_are_the_same_bits_on_all_ranks_and_leave_inputs_alone(world: int) -> None:
    results = run_ranks(world, reduced)
    all_of_them = torch.stack([result["mine"] for result in results])
    for i, result in enumerate(results):
        assert (result["rank"], result["world"], result["unwritten"]) == (i, world, True)
        assert torch.equal(result["sum"], results[0]["sum"])
        torch.testing.assert_close(result["sum"], all_of_them.sum(0))
        assert torch.equal(result["max"], all_of_them.amax(0))


def test_no_group_is_this_process_alone() -> None:
    x = torch.arange(6).view(3, 2)
    distributed.check_group(None)
    assert (distributed.world_size(None), distributed.rank(None)) == (1, 0)
    assert distributed.all_reduce_sum(x, None) is x
    assert distributed.all_reduce_max(x, None) is x
    rows, counts = distributed.all_gather_rows(x, None)
    assert (rows is x, counts) == (True, [3])


# Registration of ops


def cube(x: Tensor) -> Tensor:
    return x**3


def cube_setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def cube_backward(ctx: Any, upstream: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    gradient: Tensor = torch.ops.clustops.test_cube_backward(x, upstream)
    return gradient


def test_a_registered_op_runs_differentiates_and_compiles(cubes: None) -> None:
    x = torch.randn(5, dtype=torch.float64, generator=generator(0), requires_grad=True)
    assert torch.autograd.gradcheck(torch.ops.clustops.test_cube, (x,))
    torch.library.opcheck(torch.ops.clustops.test_cube.default, (x,))
    compiled = torch.compile(
        lambda x: torch.ops.clustops.test_cube(x).sum(), fullgraph=True, backend="aot_eager"
    )
    (gradient,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(gradient, 3 * x.detach() ** 2)


def test_a_second_derivative_says_that_there_is_none(cubes: None) -> None:
    x = torch.ones(2, requires_grad=True)
    (gradient,) = torch.autograd.grad(torch.ops.clustops.test_cube(x).sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"clustops::test_cube_backward has no derivative.*clustops\.reference"
    ):
        gradient.sum().backward()


def test_a_kernel_takes_over_on_its_device_only() -> None:
    name = "test_taken(Tensor x) -> Tensor"
    register(name, reference=lambda x: x + 1, fake=torch.empty_like, cpu=lambda x: x + 2)
    assert float(torch.ops.clustops.test_taken(torch.zeros(1))) == 2
    assert torch.ops.clustops.test_taken(torch.zeros(1, device="meta")).device.type == "meta"


@pytest.fixture(scope="module")
def cubes() -> None:
    """The op test_cube with its backward, registered as the ops of the package are."""
    register(
        "test_cube(Tensor x) -> Tensor",
        reference=cube,
        fake=torch.empty_like,
        setup_context=cube_setup,
        backward=cube_backward,
    )
    register(
        "test_cube_backward(Tensor x, Tensor upstream) -> Tensor",
        reference=lambda x, upstream: 3 * x**2 * upstream,
        fake=lambda x, upstream: torch.empty_like(x),
    )


def test_the_extension_can_be_switched_off() -> None:
    out = subprocess.run(
        [sys.executable, "-c", "from clustops import native; print(native.extension, native.why_not)"],
        env={**os.environ, "CLUSTOPS_DISABLE_NATIVE": "1", "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "None switched off by CLUSTOPS_DISABLE_NATIVE=1"


# Which file may import what


def imported_by(file: Path) -> set[str]:
    """Absolute names of the modules that a file of the package imports."""
    package = ("clustops", *file.relative_to(PACKAGE).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_run_one_way(file: Path) -> None:
    folder = file.relative_to(PACKAGE).parts[0]
    imports = imported_by(file)
    ours = {name for name in imports if name.startswith("clustops.")}
    if file != PACKAGE / "distributed.py":
        assert not {name for name in imports if name.startswith("torch.distributed")}
    if folder == "reference":
        assert {name for name in ours if not name.startswith("clustops.reference")} == set()
    if not folder.startswith(("recipes", "cli", "__main__")):
        assert {name for name in ours if name.startswith("clustops.recipes")} == set()


def test_examples_in_docstrings() -> None:
    for module in (arrays, checks, distributed, philox):
        assert doctest.testmod(module).failed == 0
