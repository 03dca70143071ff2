"""A processor that behaves as an accelerator whose work is queued: what is copied from it is there only later."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator import late
from orchestrator.data import carrying
from orchestrator.data.batches import _mapped

GARBAGE = 77
"""What memory holds that nothing has been copied to yet."""


class SlowMark:
    """A point in the queue of a SlowLink."""

    def __init__(self, link: SlowLink) -> None:
        self._link, self._at = link, link.sent

    def query(self) -> bool:
        return self._link.moves_on(self._at)

    def synchronize(self) -> None:
        self._link.waits += 1
        self._link.deliver(self._at)


class SlowLink:
    """Numbers arrive when somebody waits for them, or `lag` marks later."""

    def __init__(self, lag: int) -> None:
        self.lag, self.sent, self.waits, self.marks = lag, 0, 0, 0
        self._queue: deque[tuple[int, Tensor, Tensor]] = deque()
        self._marked: deque[tuple[int, int]] = deque()

    def send(self, values: Tensor) -> Tensor:
        values = values.detach().reshape(-1).clone()
        memory = torch.full_like(values, True if values.dtype is torch.bool else GARBAGE)
        self.sent += 1
        self._queue.append((self.sent, memory, values))
        _given[memory.untyped_storage().data_ptr()] = memory
        return memory

    def mark(self) -> SlowMark:
        self.marks += 1
        self._marked.append((self.marks, self.sent))
        return SlowMark(self)

    def moves_on(self, at: int) -> bool:
        while self._marked and self._marked[0][0] <= self.marks - self.lag:
            self.deliver(self._marked.popleft()[1])
        return not self._queue or self._queue[0][0] > at

    def deliver(self, upto: int) -> None:
        while self._queue and self._queue[0][0] <= upto:
            _, memory, values = self._queue.popleft()
            memory.copy_(values)


_given: dict[int, Tensor] = {}
"""The processor's memory that links have given, which may be read, by address; kept, so that no other comes there."""


def force(monkeypatch: pytest.MonkeyPatch, lag: int = 1) -> list[SlowLink]:
    """Let every Trainer made from here on take its device for a slow one; the links that they make."""
    links: list[SlowLink] = []

    def link_to(device: torch.device) -> SlowLink:
        links.append(SlowLink(lag))
        return links[-1]

    monkeypatch.setattr(late, "link_to", link_to)
    monkeypatch.setattr(carrying, "carrier_to", carrier_to)
    return links


def carrier_to(device: torch.device) -> carrying.Carry:
    """A copy of each batch, as one on a device is."""

    def carry(batch: Any) -> Callable[[], Any]:
        copy = _mapped(batch, lambda tensor: tensor.clone(), "clone")
        return lambda: copy

    return carry


_WAITING_CALLS = (
    *(
        "item",
        "tolist",
        "cpu",
        "numpy",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "nonzero",
        "is_nonzero",
    ),
    *("__array__", "__repr__", "unique", "masked_select"),
)
_WAITING_OPERATORS = (
    *("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim"),
    *("item", "_assert_async", "_coalesce"),
)


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in _WAITING_OPERATORS and self.waits.counts_for(args):
            self.waits.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Waits:
    """Counts, while `counting`, what would have to wait for a device."""

    def __init__(self) -> None:
        self.counting = False
        self.counts: Counter[str] = Counter()
        self.of_the_processor: set[int] = set()
        """Addresses of tensors that are never on a device, which may be read."""

    @contextmanager
    def watched(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
        with monkeypatch.context() as patch:
            for name in _WAITING_CALLS:
                patch.setattr(Tensor, name, self._counted(name, getattr(Tensor, name)))
            patch.setattr(torch.cuda, "synchronize", self._counted("synchronize", lambda *_: None))
            with _Operators(self):
                yield self

    def counts_for(self, args: Any) -> bool:
        """Whether what is called with `args` would make the loop wait; the thread that writes checkpoints may."""
        if threading.current_thread() is not threading.main_thread():
            return False
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        return self.counting and not any(
            t.data_ptr() in self.of_the_processor or t.untyped_storage().data_ptr() in _given for t in tensors
        )

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self.counts_for(args):
                self.counts[name] += 1
            return method(*args, **options)

        return call
