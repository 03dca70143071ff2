"""Values that arrive late from a device: copied as they are computed, read when the copy is known to be there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Bundle", "CudaLink", "LateValues", "Link", "Mark", "Parcel", "Sum", "link_to"]


class Mark(Protocol):
    """A point in the device's work: what was asked of it before is done once it has got there."""

    def query(self) -> bool:
        """Whether the device has got there; does not wait."""

    def synchronize(self) -> None:
        """Wait until it has."""


class Link(Protocol):
    """How numbers come from a device whose work is queued, without waiting for it."""

    def send(self, values: Tensor) -> Tensor:
        """Begin to copy `values` (any shape, numbers), as they are at this point of the device's work.

        The tensor, on the processor, flat and of their type, holds them once a mark that is set later is reached, and
        anything until then.
        """

    def mark(self) -> Mark:
        """Mark this point of the device's work."""


class CudaLink:
    """The link to a CUDA device (or ROCm's): copies into pinned memory, and events on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, values: Tensor) -> Tensor:
        """See `Link`. The pinned memory is reused by torch, and not before the copy is done."""
        # Of one type with the target: torch converts on the processor, at once, what has not been copied yet.
        target = torch.empty(values.numel(), dtype=values.dtype, pin_memory=True)
        return target.copy_(values.detach().reshape(-1), non_blocking=True)

    def mark(self) -> Mark:
        """See `Link`."""
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def link_to(device: torch.device) -> Link | None:
    """The link to `device`; None where what is asked of it is done when the call returns, as on a processor."""
    return CudaLink(device) if device.type == "cuda" else None


class Parcel:
    """Numbers on their way, or still to be sent: some of those that are sent together."""

    __slots__ = ("_end", "_memory", "_start")

    def __init__(self, memory: Tensor | None = None) -> None:
        self._memory = memory
        self._start, self._end = 0, 0 if memory is None else memory.numel()

    def sent(self, memory: Tensor, start: int, end: int) -> None:
        """They are in `memory`, which a `Link` gave, from `start` to before `end`."""
        self._memory, self._start, self._end = memory, start, end

    def read(self) -> list[float]:
        """The numbers; only after a mark behind their sending was reached."""
        assert self._memory is not None
        return list(map(float, self._memory[self._start : self._end].tolist()))

    def first(self) -> float:
        """The first of them, as `read` gives it."""
        assert self._memory is not None
        return float(self._memory[self._start].item())


class Sum:
    """Numbers on their way, whose sum with `known` is the value."""

    __slots__ = ("known", "parcels")

    def __init__(self, parcels: list[Parcel], known: float | None = None) -> None:
        self.parcels, self.known = parcels, known

    def read(self) -> float:
        """The value; only after a mark behind all of them was reached."""
        if len(self.parcels) == 1 and self.known is None:
            return self.parcels[0].first()
        return sum((parcel.first() for parcel in self.parcels), 0.0 if self.known is None else self.known)


class Bundle:
    """Several values that are worked out of numbers on their way; `read` names them."""

    __slots__ = ("parcel", "read")

    def __init__(self, parcel: Parcel, read: Callable[[list[float]], Mapping[str, float]]) -> None:
        self.parcel, self.read = parcel, read


class LateValues(MutableMapping[str, float]):
    """Named values in their order, some of which are on their way.

    Whoever reads finds floats only: reading waits where something is missing. Setting never waits.
    """

    def __init__(self, values: Mapping[str, float], settle: Callable[[], None]) -> None:
        self._entries: dict[Any, Any] = dict(values)
        self._settle = settle
        self.late = False
        """Whether anything is on its way."""

    def expect(self, name: str, parcel: Parcel) -> None:
        """`name` is what arrives in `parcel`."""
        self._entries[name] = Sum([parcel])
        self.late = True

    def expect_more(self, name: str, parcel: Parcel) -> None:
        """What arrives in `parcel` is added to `name`, which begins with 0.0."""
        entry = self._entries.get(name, 0.0)
        if isinstance(entry, Sum):
            entry.parcels.append(parcel)
        else:
            self._entries[name] = Sum([parcel], entry)
        self.late = True

    def expect_all(self, bundle: Bundle) -> None:
        """The values that `bundle` names."""
        self._entries[bundle] = bundle
        self.late = True

    def known(self) -> dict[str, float]:
        """Those that are here."""
        return {name: value for name, value in self._entries.items() if type(value) is float}

    def arrive(self) -> dict[str, float]:
        """Read what was on its way, which has arrived; those values."""
        if not self.late:
            return {}
        entries: dict[Any, Any] = {}
        arrived: dict[str, float] = {}
        for name, entry in self._entries.items():
            if isinstance(entry, Sum):
                arrived[name] = entries[name] = entry.read()
            elif isinstance(entry, Bundle):
                found = entry.read(entry.parcel.read())
                entries.update(found)
                arrived.update(found)
            else:
                entries[name] = entry
        self._entries, self.late = entries, False
        return arrived

    def forget(self, name: str) -> None:
        """Leave `name` out, if it is there; only where nothing is on its way."""
        self._entries.pop(name, None)

    def __getitem__(self, name: str) -> float:
        self._wait()
        value: float = self._entries[name]
        return value

    def __setitem__(self, name: str, value: float) -> None:
        self._entries[name] = value

    def __delitem__(self, name: str) -> None:
        self._wait()
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._wait()
        return iter(self._entries)

    def __len__(self) -> int:
        self._wait()
        return len(self._entries)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _wait(self) -> None:
        if self.late:
            self._settle()
