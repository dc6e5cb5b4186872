"""A queue of recent embeddings, so that few rows a step can still use many prototypes evenly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import (
    check_count,
    check_finite,
    check_floating,
    check_same_device,
    check_tensor,
    reject,
    shape_of,
)
from .distributed import Group, all_gather_rows, check_group, rank, world_size


class FeatureQueue(nn.Module):
    """The last ``size`` embeddings that were pushed, of one view or of several.

    Only rows that were really pushed are ever returned: there is no warm-up with zeros; ``len(queue)`` is how
    many there are. Follows ``.to(device)``, is part of ``state_dict``, holds no parameters. A step is: score
    ``rows()`` (``share()`` over ranks), pass that as ``queue_scores``, ``push`` the step's embeddings.

    Args:
        size: most rows to hold, at least 1.
        dim: features of a row, at least 1.
        views: ``None``: rows are ``[B, dim]``. A number: ``[views, B, dim]``, one queue for each assigned
            view.
        group: a process group: each push adds the rows of all ranks in rank order, so that all ranks hold the
            same queue, the one that a single process with the joint batch would hold, and any rank's
            checkpoint serves all. ``None`` is a queue for this process alone: keep it out of a module under
            DistributedDataParallel, which would overwrite it with rank 0's.
        device, dtype: of the buffer.

    >>> queue = FeatureQueue(size=3, dim=2)
    >>> queue.push(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> queue.rows()
    tensor([[1., 0.],
            [0., 1.]])
    >>> len(queue)
    2

    Source: Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments",
    NeurIPS 2020.
    """

    buffer: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        views: int | None = None,
        group: Group = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_count(size, "size", 1, "3840 is usual; leave the queue away for none")
        check_count(dim, "dim", 1, "pass the number of features of a row")
        if views is not None:
            check_count(views, "views", 1, "pass the number of assigned views, or None")
        check_group(group)
        self.size, self.dim, self.views, self.group = size, dim, views, group
        shape = (size, dim) if views is None else (views, size, dim)
        self.register_buffer("buffer", torch.zeros(shape, device=device, dtype=dtype))
        self._filled = 0
        self._next = 0

    def __len__(self) -> int:
        """The number of rows held, at most ``size``."""
        return self._filled

    @torch.no_grad()
    def push(self, features: Tensor) -> None:
        """Add rows in place of the oldest; of more than ``size`` rows the last ``size`` stay.

        Args:
            features: ``[B, dim]``, or ``[views, B, dim]``; any floating dtype, kept without gradient. Under
                ``group`` ranks may push different numbers of rows, none included.
        """
        self._check(features)
        rows, _ = all_gather_rows(features.detach().movedim(-2, 0), self.group)
        rows = rows[-self.size :].to(self.buffer.dtype)
        n = rows.shape[0]
        places = (torch.arange(n, device=self.buffer.device) + self._next) % self.size
        self.buffer.movedim(-2, 0).index_copy_(0, places, rows)
        self._next = (self._next + n) % self.size
        self._filled = min(self._filled + n, self.size)

    def rows(self) -> Tensor:
        """A copy of all rows held, ``[len, dim]`` or ``[views, len, dim]``, in no particular order."""
        return self.buffer[..., : self._filled, :].clone()

    def share(self) -> Tensor:
        """This rank's part of ``rows()``; all ranks' parts make the whole, so that each row counts once.

        Score it with the prototypes and pass it as ``queue_scores`` of :func:`swapped_prediction_loss` with
        the same ``group``.
        """
        return self.buffer[..., rank(self.group) : self._filled : world_size(self.group), :].clone()

    def get_extra_state(self) -> Tensor:
        """Rows held and the next place, as a tensor, so that every checkpoint format takes it."""
        return torch.tensor([self._filled, self._next])

    def set_extra_state(self, state: Tensor) -> None:
        """Take back what ``get_extra_state`` gave."""
        self._filled, self._next = (int(n) for n in state)

    def extra_repr(self) -> str:
        """``size=3840, dim=128``."""
        return f"size={self.size}, dim={self.dim}" + ("" if self.views is None else f", views={self.views}")

    def _check(self, features: Tensor) -> None:
        check_tensor(features, "features")
        check_floating(features, "features")
        check_same_device(features, "features", self.buffer, "the queue")
        leading = () if self.views is None else (self.views,)
        if (
            features.ndim != len(leading) + 2
            or features.shape[:-2] != leading
            or features.shape[-1] != self.dim
        ):
            expected = "[" + ", ".join(map(str, (*leading, "B", self.dim))) + "]"
            reject("features", expected, shape_of(features), "push the embeddings that meet the prototypes")
        check_finite(features, "features")
