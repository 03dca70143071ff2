"""Values that arrive late from a device: copied as they are computed, read when the copy is known to be there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["Bundle", "CudaLink", "LateValues", "Link", "Mark", "Sum", "link_to"]

Array = np.ndarray[Any, np.dtype[np.float64]]


class Mark(Protocol):
    """A point in the device's work: what was asked of it before is done once it has got there."""

    def query(self) -> bool:
        """Whether the device has got there; does not wait."""

    def synchronize(self) -> None:
        """Wait until it has."""


class Link(Protocol):
    """How numbers come from a device whose work is queued, without waiting for it."""

    def send(self, values: Tensor) -> Array:
        """Begin to copy `values` (any shape, numbers), as they are at this point of the device's work.

        The array, float64 and flat, holds them once a mark that is set later is reached, and anything until then.
        """

    def mark(self) -> Mark:
        """Mark this point of the device's work."""


class CudaLink:
    """The link to a CUDA device (or ROCm's): copies into pinned memory, and events on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, values: Tensor) -> Array:
        """See `Link`. The pinned memory is reused by torch, and not before the copy is done."""
        # Of one type with the target: torch converts on the processor, at once, what has not been copied yet.
        values = values.detach().reshape(-1).to(torch.float64).contiguous()
        target = torch.empty(values.numel(), dtype=torch.float64, pin_memory=True)
        target.copy_(values, non_blocking=True)
        array: Array = target.numpy()
        return array

    def mark(self) -> Mark:
        """See `Link`."""
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def link_to(device: torch.device) -> Link | None:
    """The link to `device`; None where what is asked of it is done when the call returns, as on a processor."""
    return CudaLink(device) if device.type == "cuda" else None


class Sum:
    """Numbers on their way, one array for each, whose sum is the value."""

    __slots__ = ("arrays",)

    def __init__(self, arrays: list[Array]) -> None:
        self.arrays = arrays

    def read(self) -> float:
        """The value; only after a mark behind all of them was reached."""
        if len(self.arrays) == 1:
            return float(self.arrays[0][0])
        return sum((float(array[0]) for array in self.arrays), 0.0)


class Bundle:
    """Several values that are worked out of one array on its way; `read` names them."""

    __slots__ = ("array", "read")

    def __init__(self, array: Array, read: Callable[[list[float]], Mapping[str, float]]) -> None:
        self.array, self.read = array, read


class LateValues(MutableMapping[str, float]):
    """Named values in their order, some of which are on their way.

    Whoever reads finds floats only: reading waits where something is missing. Setting never waits.
    """

    def __init__(self, values: Mapping[str, float], settle: Callable[[], None]) -> None:
        self._entries: dict[Any, Any] = dict(values)
        self._settle = settle
        self.late = False
        """Whether anything is on its way."""

    def expect(self, name: str, array: Array) -> None:
        """`name` is what arrives in `array`."""
        self._entries[name] = Sum([array])
        self.late = True

    def expect_more(self, name: str, array: Array) -> None:
        """What arrives in `array` is added to `name`, which begins with 0.0."""
        entry = self._entries.get(name, 0.0)
        if isinstance(entry, Sum):
            entry.arrays.append(array)
        elif name in self._entries:
            self._entries[name] = Sum([np.array([entry]), array])
        else:
            self._entries[name] = Sum([np.zeros(1), array])
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
                found = entry.read(entry.array.tolist())
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
