"""The only file that talks to torch.distributed.

Every function takes ``group``: ``None`` means this process alone, anything else is a process group.
All reductions are deterministic for a fixed number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
    parts = [torch.empty_like(tensor) for _ in range(world_size(group))]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    return torch.stack(parts)


def all_gather_rows(tensor: Tensor, group: Group) -> tuple[Tensor, list[int]]:
    """Rows of all ranks in rank order, and how many each rank gave. Shards may differ in size, or be empty.

    Args:
        tensor: ``[N_rank, ...]`` with trailing sizes and dtype equal on all ranks.
    """
    if group is None:
        return tensor, [tensor.shape[0]]
    size = torch.tensor(tensor.shape[0], dtype=torch.int64, device=tensor.device)
    counts: list[int] = all_gather_stack(size, group).tolist()
    longest = max(counts)
    # Collectives want equal shapes: pad to the longest shard, cut after.
    padded = tensor.detach().new_zeros((longest, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor.detach()
    parts = all_gather_stack(padded, group)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]), counts


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
