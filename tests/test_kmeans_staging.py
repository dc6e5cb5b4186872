"""Host rows on their way to a GPU, whose streams are played here in every order that their events allow."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import seeds
from torch import Tensor

from clustops import kmeans_source


class Gpu:
    """Streams of work that is done later, in an order drawn at random; stands where ``torch`` does."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.streams: list[Stream] = []
        self.cuda = self
        self.caller = self.current = Stream(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def Stream(self, device: torch.device) -> Stream:
        return Stream(self)

    def Event(self) -> Event:
        return Event(self)

    def current_stream(self, device: torch.device) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def empty(self, n: int, *, dtype: torch.dtype, **where: Any) -> Tensor:
        memory = torch.full((n,), -1, dtype=dtype)
        if where.get("pin_memory"):
            return memory
        # Memory of an earlier tensor on which the caller's stream still works.
        self.caller.queue.append((lambda: True, lambda: memory.fill_(-2)))
        late = memory.as_subclass(Late)
        late.gpu = self
        return late

    def work(self) -> bool:
        """Do one thing that may be done now."""
        ready = [stream for stream in self.streams if stream.queue and stream.queue[0][0]()]
        if not ready:
            return False
        self.draw.choice(ready).queue.popleft()[1]()
        return True


class Stream:
    def __init__(self, gpu: Gpu) -> None:
        self.queue: deque[tuple[Callable[[], bool], Callable[[], Any]]] = deque()
        gpu.streams.append(self)

    def wait_event(self, event: Event) -> None:
        mark = event.recorded
        self.queue.append((lambda: event.passed >= mark, lambda: None))


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.recorded, self.passed = gpu, 0, 0

    def record(self, stream: Stream) -> None:
        self.recorded += 1
        mark = self.recorded
        stream.queue.append((lambda: True, lambda: setattr(self, "passed", max(self.passed, mark))))

    def synchronize(self) -> None:
        while self.passed < self.recorded:
            assert self.gpu.work(), "the host waits for ever"


class Late(Tensor):
    """GPU memory: copies into it are done when their stream comes to them."""

    gpu: Gpu

    def __getitem__(self, index: Any) -> Late:
        return self._alike(super().__getitem__(index))

    def view(self, *shape: Any) -> Late:
        return self._alike(super().view(*shape))

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Late:
        assert non_blocking
        into = self.as_subclass(Tensor)
        self.gpu.current.queue.append((lambda: True, lambda: into.copy_(source)))
        return self

    def _alike(self, part: Any) -> Late:
        part.gpu = self.gpu
        return part


@given(st.integers(0, 6), st.integers(0, 3), st.integers(0, 6), seeds)
def test_the_caller_s_kernels_see_what_was_on_the_host(
    whole: int, last: int, patience: int, seed: int
) -> None:
    gpu = Gpu(seed)
    parts = [torch.full((1, n, 2), float(i)) for i, n in enumerate([3] * whole + [last])]
    seen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans_source, "torch", gpu)
        for chunk in kmeans_source._staged(iter(parts), torch.device("cpu")):
            memory = chunk.as_subclass(Tensor)
            gpu.caller.queue.append((lambda: True, lambda memory=memory: seen.append(memory.clone())))
            for _ in range(gpu.draw.randint(0, patience)):
                gpu.work()
        while gpu.work():
            pass
    assert not any(stream.queue for stream in gpu.streams)
    assert len(seen) == len(parts)
    assert all(torch.equal(a, b) for a, b in zip(seen, parts, strict=True))


@given(seeds)
def test_the_host_is_at_most_three_parts_ahead(seed: int) -> None:
    gpu, done = Gpu(seed), [0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans_source, "torch", gpu)
        parts = (torch.zeros(1, 1, 1) for _ in range(9))
        for turn, _ in enumerate(kmeans_source._staged(parts, torch.device("cpu"))):
            assert turn - done[0] <= 3
            gpu.caller.queue.append((lambda: True, lambda: done.__setitem__(0, done[0] + 1)))
