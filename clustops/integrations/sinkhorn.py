"""Sinkhorn under the names that training code calls: in place of a copy of the loop, one import.

Here those of SwAV and Suave, DINOv2 and DINOv3; CAPI's and lightly's are in ``sinkhorn_capi`` and
``sinkhorn_lightly``. Each takes ``[B, K]``, returns ``[B, K]`` without gradient, and leaves its input alone.
Where the loops overflow (fp16; scores beyond 88 temperatures), these do not. As in the code that they
replace, the ranks of torch.distributed share one assignment wherever it is initialised; ``group`` names
other ranks. Ranks may have any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ..checks import check_positive, reject, shape_of
from ..distributed import Group, check_group, default_group
from ..reference.sinkhorn_ops import accumulator
from ..sinkhorn_solve import (
    Problems,
    Settings,
    as_problems,
    check_scores,
    check_settings,
    check_solved,
    solve,
)


class SwavSettings(Protocol):
    """What SwAV's command line sets."""

    epsilon: float
    sinkhorn_iterations: int


def distributed_sinkhorn(
    out: Tensor, *, epsilon: float = 0.05, sinkhorn_iterations: int = 3, group: Group = None
) -> Tensor:
    """Assignments of SwAV and Suave: ``q = distributed_sinkhorn(scores)``; see :func:`clustops.sinkhorn`.

    Args:
        out: the scores ``[B, K]``, those of a queue among them if there is one.
        epsilon, sinkhorn_iterations: of ``args`` there.
        group: ``None`` is all ranks of torch.distributed, where that is initialised.

    Returns:
        ``[B, K]`` in the dtype of ``out``; rows sum to 1.

    Raises:
        ValueError, TypeError: an argument is out of range, or has a wrong shape or dtype.

    Cost: that of :func:`clustops.sinkhorn`, and one sum of K floats over ranks for each iteration, plus one
    maximum.

    >>> scores = torch.tensor([[0.9, 0.8], [0.9, 0.1], [0.9, 0.3], [0.9, 0.5]])
    >>> distributed_sinkhorn(scores, sinkhorn_iterations=100).mean(0)
    tensor([0.5000, 0.5000])

    Source: Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments",
    NeurIPS 2020.
    """
    return assign(out, "out", epsilon, sinkhorn_iterations, _all_ranks(group), keep_dtype=True)[0]


def distributed_sinkhorn_of(args: SwavSettings, *, group: Group = None) -> Callable[[Tensor], Tensor]:
    """``distributed_sinkhorn`` of one argument, which reads ``args`` at each call, as SwAV's does.

    >>> from argparse import Namespace
    >>> distributed_sinkhorn = distributed_sinkhorn_of(Namespace(epsilon=0.05, sinkhorn_iterations=3))
    >>> distributed_sinkhorn(torch.eye(2))
    tensor([[1.0000e+00, 2.0612e-09],
            [2.0612e-09, 1.0000e+00]])
    """

    def of_one_argument(out: Tensor) -> Tensor:
        return distributed_sinkhorn(
            out, epsilon=args.epsilon, sinkhorn_iterations=args.sinkhorn_iterations, group=group
        )

    return of_one_argument


def dino_sinkhorn_knopp_teacher(
    teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3, *, group: Group = None
) -> Tensor:
    """Targets of DINOv2's and DINOv3's class tokens.

    In the class ``DINOLoss``: ``sinkhorn_knopp_teacher = staticmethod(dino_sinkhorn_knopp_teacher)``.

    Args:
        teacher_output: ``[B, K]``, fp32, bf16, fp16 or fp64.
        teacher_temp: the epsilon of Sinkhorn, above 0.
        n_iterations: 0 is a softmax.
        group: ``None`` is all ranks of torch.distributed, where that is initialised.

    Returns:
        ``[B, K]`` in fp32 (fp64 for fp64); rows sum to 1.

    Raises:
        ValueError, TypeError: an argument is out of range, or has a wrong shape or dtype.

    Cost: that of :func:`distributed_sinkhorn`. More prototypes than rows raise no warning here.

    >>> dino_sinkhorn_knopp_teacher(torch.tensor([[9.0, 0.0], [9.0, 1.0]]), teacher_temp=0.07).round()
    tensor([[1., 0.],
            [0., 1.]])

    Source: Oquab et al., "DINOv2", TMLR 2024.
    """
    check_positive(teacher_temp, "teacher_temp", "0.04 to 0.07 is usual")
    group = _all_ranks(group)
    return assign(teacher_output, "teacher_output", teacher_temp, n_iterations, group, warn=False)[0]


def ibot_sinkhorn_knopp_teacher(
    teacher_output: Tensor,
    teacher_temp: float,
    n_masked_patches_tensor: Tensor | int | None,
    n_iterations: int = 3,
    *,
    group: Group = None,
) -> Tensor:
    """Targets of DINOv2's masked patches, of which a padded buffer may hold fewer than it has rows.

    In the class ``iBOTPatchLoss``: ``sinkhorn_knopp_teacher = staticmethod(ibot_sinkhorn_knopp_teacher)``.

    Args:
        teacher_output: ``[M, K]``; rows from ``n_masked_patches_tensor`` on are padding, which has no say and
            may hold anything.
        teacher_temp, n_iterations, group: see :func:`dino_sinkhorn_knopp_teacher`.
        n_masked_patches_tensor: how many patches this rank has, a tensor of one entry or a number; ``None``
            for all rows. It is not written (the published code leaves the sum over ranks in it).

    Returns:
        ``[M, K]`` in fp32 (fp64 for fp64); rows sum to 1, those of padding are 0.

    Raises:
        ValueError, TypeError: an argument is out of range, or has a wrong shape or dtype.

    Cost: that of :func:`distributed_sinkhorn`; the number of patches stays on the device.

    >>> padded = torch.tensor([[9.0, 0.0], [9.0, 1.0], [0.0, 0.0]])
    >>> ibot_sinkhorn_knopp_teacher(padded, 0.07, torch.tensor([2])).round()
    tensor([[1., 0.],
            [0., 1.],
            [0., 0.]])

    Source: Oquab et al., "DINOv2", TMLR 2024.
    """
    check_positive(teacher_temp, "teacher_temp", "0.04 to 0.07 is usual")
    group, n = _all_ranks(group), n_masked_patches_tensor
    counted = None if n is None else _first(n, teacher_output, group)
    return assign(
        teacher_output, "teacher_output", teacher_temp, n_iterations, group, counted=counted, warn=False
    )[0]


class SinkhornKnoppTeacher(nn.Module):
    """:func:`ibot_sinkhorn_knopp_teacher` as the module that DINOv3 has, to be compiled on its own.

    In ``iBOTPatchLoss``: ``self.sinkhorn_knopp_teacher = SinkhornKnoppTeacher(get_process_subgroup())``.

    Args:
        group: ``None`` is all ranks of torch.distributed, where that is initialised.

    >>> SinkhornKnoppTeacher()(torch.tensor([[9.0, 0.0], [9.0, 1.0]]), teacher_temp=0.07).round()
    tensor([[1., 0.],
            [0., 1.]])
    """

    def __init__(self, group: Group = None) -> None:
        super().__init__()
        self.group = group

    def forward(
        self,
        teacher_output: Tensor,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor | int | None = None,
        n_iterations: int = 3,
    ) -> Tensor:
        """See :func:`ibot_sinkhorn_knopp_teacher`."""
        return ibot_sinkhorn_knopp_teacher(
            teacher_output, teacher_temp, n_masked_patches_tensor, n_iterations, group=self.group
        )


def assign(
    scores: Tensor,
    name: str,
    epsilon: float,
    n_iters: int,
    group: Group,
    *,
    counted: Tensor | None = None,
    keep_dtype: bool = False,
    warn: bool = True,
) -> tuple[Tensor, Tensor]:
    """Assignments ``[..., B, K]`` and potentials ``[P, K]`` of scores that are the argument ``name``.

    Args:
        counted: ``[B]``, which rows are no padding; rows of padding get 0.
        keep_dtype: whether the assignments have the dtype of the scores; else fp32 (fp64 for fp64).
        warn: whether more prototypes than rows are a surprise.
    """
    check_group(group)
    check_scores(scores, name, group)
    settings = check_settings(Settings(epsilon, n_iters))
    wide = accumulator(scores.dtype)
    result = torch.empty(scores.shape, dtype=scores.dtype if keep_dtype else wide, device=scores.device)
    rows = as_problems(scores.detach())
    weights = None if counted is None else counted.to(wide).expand(rows.shape[:-1])
    problems = Problems(rows, weights=weights)
    potentials = solve(problems, group, settings, out=as_problems(result), axes="" if warn else None)
    check_solved(potentials, problems, group)
    if counted is not None:
        result.masked_fill_(~counted.unsqueeze(-1), 0)
    return result, potentials


def _all_ranks(group: Group) -> Group:
    return default_group() if group is None else group


def _first(n: Tensor | int, scores: Tensor, group: Group) -> Tensor:
    """Which rows of ``scores [..., M, K]`` are among the first ``n``."""
    check_scores(scores, "teacher_output", group)
    if isinstance(n, Tensor):
        if n.numel() != 1:
            cure = "pass the number of patches of this rank"
            reject("n_masked_patches_tensor", "one number", shape_of(n), cure)
        n = n.reshape(())
    return torch.arange(scores.shape[-2], device=scores.device) < n
