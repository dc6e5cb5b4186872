"""The only file that talks to torch.distributed.

Every function takes ``group``: ``None`` means this process alone, anything else is a process group.
All reductions are deterministic for a fixed number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import reject

Group = Any  # a torch.distributed.ProcessGroup; its stubs vary between torch builds


@contextmanager
def joined_ranks() -> Iterator[Group]:
    """The group of all ranks that torchrun started, until the context ends; ``None`` without torchrun.

    Gloo carries CPU tensors, NCCL those on GPUs where torch has it; a rank gets the GPU of its local number.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield None
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group()
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def check_group(group: Group) -> None:
    """Raise unless ``group`` is ``None`` or a process group of an initialised torch.distributed."""
    if group is None:
        return
    if not dist.is_available() or not dist.is_initialized():
        reject(
            "group",
            "None where torch.distributed is not initialised",
            type(group).__name__,
            "call torch.distributed.init_process_group first, or pass group=None",
        )
    if not isinstance(group, dist.ProcessGroup):
        reject("group", "a ProcessGroup or None", type(group).__name__, "pass dist.group.WORLD", TypeError)


def default_group() -> Group:
    """The group of all ranks; ``None`` where torch.distributed is not initialised."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def world_size(group: Group) -> int:
    """Number of ranks in ``group``; 1 for ``None``."""
    return 1 if group is None else dist.get_world_size(group)


def rank(group: Group) -> int:
    """This process's rank in ``group``; 0 for ``None``."""
    return 0 if group is None else dist.get_rank(group)


def all_reduce_sum(tensor: Tensor, group: Group) -> Tensor:
    """Sum over ranks, the same bits on each. The input is not written."""
    if group is None:
        return tensor
    result = tensor.detach().clone().contiguous()
    dist.all_reduce(result, op=dist.ReduceOp.SUM, group=group)
    return result


def all_reduce_sum_together(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """``all_reduce_sum`` of each tensor in one collective, in float64: integers must stay below 2^53."""
    if group is None:
        return list(tensors)
    flat = all_reduce_sum(torch.cat([t.detach().to(torch.float64).flatten() for t in tensors]), group)
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]


def all_reduce_max(tensor: Tensor, group: Group) -> Tensor:
    """Elementwise maximum over ranks. The input is not written."""
    if group is None:
        return tensor
    result = tensor.detach().clone().contiguous()
    dist.all_reduce(result, op=dist.ReduceOp.MAX, group=group)
    return result


def all_gather_stack(tensor: Tensor, group: Group) -> Tensor:
    """``[ranks, ...]``: the tensors of all ranks, which have one shape and dtype."""
    if group is None:
        return tensor.unsqueeze(0)
    result = tensor.detach().new_empty((world_size(group), *tensor.shape))
    dist.all_gather(list(result), tensor.detach().contiguous(), group=group)
    return result


def errors_reach_all_ranks(group: Group, rows: Any) -> AbstractContextManager[None]:
    """An error of this rank's arguments becomes one of the ranks that wait for its ``rows``.

    For checks before ``all_gather_rows``: without it the other ranks wait until this process ends. It costs
    no collective.
    """
    check_group(group)
    return nullcontext() if group is None else _telling(group, getattr(rows, "device", None))


@contextmanager
def _telling(group: Group, device: torch.device | None) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError):
        all_gather_stack(torch.tensor([-1, -1], device=device), group)
        raise


def _counts_of_rows(tensor: Tensor, group: Group) -> list[int]:
    n, row_bytes = tensor.shape[0], tensor.shape[1:].numel() * tensor.element_size()
    sizes = all_gather_stack(torch.tensor([n, row_bytes], device=tensor.device), group).tolist()
    failed = [r for r, (count, _) in enumerate(sizes) if count < 0]
    if failed:
        got = f"an error on rank {failed[0]}"
        reject("arguments", "valid on all ranks", got, "look at the message of that rank")
    if len({size for _, size in sizes}) > 1:
        got = f"rows of {', '.join(str(size) for _, size in sizes)} bytes"
        cure = "pass the same arguments, of one dtype and one shape but for their number, on each rank"
        reject("rows", "of one size on all ranks", got, cure)
    return [count for count, _ in sizes]


def all_gather_rows(
    tensor: Tensor, group: Group, counts: list[int] | None = None
) -> tuple[Tensor, list[int]]:
    """Rows of all ranks in rank order, and how many each rank gave. Shards may differ in size, or be empty.

    Args:
        tensor: ``[N_rank, ...]`` with trailing sizes and dtype equal on all ranks.
        counts: how many rows each rank gives, where that is known: one collective less.
    """
    if group is None:
        return tensor, [tensor.shape[0]]
    if counts is None:
        counts = _counts_of_rows(tensor, group)
    longest = max(counts)
    if min(counts) == longest:
        return all_gather_stack(tensor, group).flatten(0, 1), counts
    # Collectives want equal shapes: pad to the longest shard, cut after.
    padded = tensor.detach().new_zeros((longest, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor.detach()
    parts = all_gather_stack(padded, group)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]), counts


def all_gather_rows_together(tensors: Sequence[Any], group: Group) -> tuple[list[Any], list[int]]:
    """``all_gather_rows`` of tensors in one collective, as bytes; all but the first may be ``None``."""
    if group is None:
        return list(tensors), [tensors[0].shape[0]]
    flat = [_packed(t.detach()).flatten(1).view(torch.uint8) for t in tensors if t is not None]
    rows, counts = all_gather_rows(torch.cat(flat, 1), group)
    parts = iter(rows.split([t.shape[1] for t in flat], 1))
    return [
        None if t is None else _packed(next(parts)).view(t.dtype).view(rows.shape[0], *t.shape[1:])
        for t in tensors
    ], counts


def _packed(rows: Tensor) -> Tensor:
    # contiguous() would leave a single row at any stride and offset, where it cannot be read as bytes.
    rows = rows.clone(memory_format=torch.contiguous_format)
    return rows[:, None] if rows.ndim == 1 else rows


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_reduce_sum(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Every rank's loss depends on this rank's summand.
        return all_reduce_sum(gradients[0], ctx.group), None


def all_reduce_sum_differentiable(tensor: Tensor, group: Group) -> Tensor:
    """Sum over ranks through which gradients flow: each rank gets the summed ones of all ranks' losses."""
    if group is None:
        return tensor
    result: Tensor = _SumOverRanks.apply(tensor, group)
    return result


def average_gradients(parameters: Iterable[Tensor], group: Group) -> None:
    """Replace each gradient by its mean over ranks, in one collective; all ranks must have the same ones."""
    if group is None:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = all_reduce_sum(torch.cat([g.flatten() for g in gradients]), group) / world_size(group)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
