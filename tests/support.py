"""What the tests share: tolerances, shapes, ranks."""

from __future__ import annotations

import os
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import strategies as st

# One table: what "equal to the fp64 oracle" means for results computed in each dtype.
RTOL = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
ATOL = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}

# 0, 1, primes and neighbours of tile sizes.
odd_sizes = st.sampled_from([1, 2, 3, 5, 7, 13, 16, 17, 31, 33, 48, 63, 65, 97, 127, 131])
small_sizes = st.sampled_from([1, 2, 3, 5, 7, 13, 16, 17])
seeds = st.integers(0, 2**31 - 1)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_close(actual: torch.Tensor, oracle: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """``actual`` equals the fp64 ``oracle`` within ``scale`` times the table's tolerance for ``dtype``."""
    torch.testing.assert_close(
        actual.double().cpu(), oracle.double().cpu(), rtol=RTOL[dtype] * scale, atol=ATOL[dtype] * scale
    )


def assert_message(error: BaseException, *parts: str) -> None:
    """The message of a bad-input error names the argument, what was expected, what came and the cure."""
    text = str(error)
    for part in parts:
        assert part in text, f"{part!r} is not in the message: {text}"
    for part in (" must be ", ", got ", "; "):
        assert part in text, f"not argument/expected/got/cure: {text}"


@contextmanager
def no_waits() -> Iterator[None]:
    """An error where the host waits for a GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


needs_peak_of = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


def _kilobytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def peak_of(work: Any) -> tuple[int, Any]:
    """Kilobytes by which the memory of this process grew at most, and the result."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _kilobytes("VmRSS")
    result = work()
    return _kilobytes("VmHWM") - before, result


def _rank_main(
    rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    dist.barrier()  # a rank with little to do could leave before others have connected to it
    try:
        torch.save(function(rank, world, *args), f"{folder}/{rank}.pt")
    except BaseException:
        Path(f"{folder}/{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, world, *args)`` in ``world`` Gloo processes; the results in rank order.

    ``function`` must be importable (defined at the top of a test module).
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        mp.start_processes(_rank_main, (world, folder, function, args), nprocs=world, start_method="fork")
        return [torch.load(f"{folder}/{r}.pt", weights_only=False) for r in range(world)]


def tell_trainers(rank: int, world: int) -> None:
    """What torchrun puts into the environment of a rank, for a process of ``run_ranks``."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(number) for name, number in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def woven(parts: Sequence[Sequence[Sequence[int]]]) -> list[int]:
    """The order that ranks have drawn: of each step, the first item of each rank, the second of each, ..."""
    return [item for step in zip(*parts, strict=False) for row in zip(*step, strict=True) for item in row]
