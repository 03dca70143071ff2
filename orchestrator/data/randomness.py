"""Random streams: the global generators lifted out of the way, seeded for a while, and put back."""

import ctypes
import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = [
    "GlobalStreams",
    "SideStream",
    "mixed",
    "put_globals",
    "record_globals",
    "seed_globals",
    "take_globals",
]

_MASK = (1 << 64) - 1


# NumPy documents these two, but its type stubs do not export them.
_get_bit_generator: Callable[[], np.random.BitGenerator] = vars(np.random)["get_bit_generator"]
_set_bit_generator: Callable[[np.random.BitGenerator], None] = vars(np.random)["set_bit_generator"]


def mixed(*parts: int) -> int:
    """One well-mixed unsigned 64-bit seed made of `parts` (SplitMix64; Steele, Lea, Flood 2014).

    Neighbouring parts give unrelated seeds, in all of the 64 bits.
    """
    z = 0
    for part in parts:
        z = ((z ^ (part & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z ^= z >> 31
    return z


class GlobalStreams(NamedTuple):
    """Torch's CPU, Python's and NumPy's legacy global generator, as `take_globals` found them."""

    torch: torch.Tensor
    python: tuple[Any, ...]
    bits: np.random.BitGenerator
    gauss: float | None


def take_globals() -> GlobalStreams:
    """Lift the global generators' states out, to be put back by `put_globals`.

    NumPy's bit generator is taken as the object it is, so the caller installs another one before anything
    draws (`seed_globals` and `put_globals` do). About 10 µs.
    """
    bits = _get_bit_generator()
    return GlobalStreams(torch.default_generator.get_state(), random.getstate(), bits, _take_gauss(bits))


def put_globals(streams: GlobalStreams) -> None:
    """Set the global generators to what `take_globals` returned. About 3 µs."""
    torch.default_generator.set_state(streams.torch)
    random.setstate(streams.python)
    _set_bit_generator(streams.bits)
    if streams.gauss is not None:
        state = np.random.get_state(legacy=False)
        np.random.set_state({**state, "has_gauss": 1, "gauss": streams.gauss})


def seed_globals(seed: int, bits: np.random.BitGenerator) -> None:
    """Seed the three global generators; NumPy's draws from `bits` (an MT19937) from now on.

    `bits` is an MT19937 because user code may call `np.random.seed`, which takes no other. About 7 µs.
    """
    # torch.manual_seed would also go through every device: 100 times as long.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    _set_bit_generator(bits)
    # torch keeps the low half of a seed and has the same algorithm: the high half makes NumPy's stream
    # another.
    np.random.seed(seed >> 32)


def record_globals() -> dict[str, Any]:
    """The states of the three global generators as a tree of plain values, arrays and a tensor."""
    return {
        "torch": torch.default_generator.get_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
    }


def restore_globals(recorded: dict[str, Any]) -> None:
    """Set the global generators to what `record_globals` returned, as far as `recorded` names them.

    Called between `take_globals` and `put_globals`: a bit generator of its own is installed for NumPy.
    """
    torch.default_generator.set_state(recorded["torch"])
    if "python" in recorded:
        random.setstate(_as_tuple(recorded["python"]))
    if "numpy" in recorded:
        _set_bit_generator(getattr(np.random, recorded["numpy"]["bit_generator"])())
        np.random.set_state(recorded["numpy"])


class SideStream:
    """A stream of the three global generators that runs beside the main one.

    `with stream:` draws from it, and goes on where the last `with` ended; the main states do not move.
    """

    def __init__(self, seed: int) -> None:
        self._main = take_globals()
        try:
            seed_globals(seed, np.random.MT19937(0))
            self._own = take_globals()
        finally:
            put_globals(self._main)

    def __enter__(self) -> None:
        self._main = take_globals()
        put_globals(self._own)

    def __exit__(self, *exception: object) -> None:
        self._own = take_globals()
        put_globals(self._main)


def _as_tuple(state: Any) -> tuple[Any, ...]:
    """Python's state with its tuples again, where a file's format has made lists of them."""
    version, words, gauss = state
    return version, tuple(words), gauss


# NumPy's legacy generator makes normals in pairs and keeps the second; installing another bit generator
# throws it away, and get_state, the documented way to see it, copies 624 words for 32 µs. Drawing one normal
# shows it in 2: a kept one is given out without a draw from the bit generator, whose words then have not
# moved.

_WORDS = 625 * 4  # MT19937's 624 words and the position among them


def _take_gauss(bits: np.random.BitGenerator) -> float | None:
    """The kept second normal of NumPy's legacy generator, or None; `bits` itself does not move."""
    if type(bits) is not np.random.MT19937 or not _is_known_layout():
        state = np.random.get_state(legacy=False)
        return float(state["gauss"]) if state["has_gauss"] else None
    address = bits.ctypes.state_address
    before = ctypes.string_at(address, _WORDS)
    gauss: float = np.random.standard_normal()
    if ctypes.string_at(address, _WORDS) == before:
        return gauss
    ctypes.memmove(address, before, _WORDS)
    return None


@functools.cache
def _is_known_layout() -> bool:
    """Whether this NumPy lays an MT19937's memory out as `_take_gauss` expects."""
    bits = np.random.MT19937(1)
    state: Any = bits.state["state"]
    words = ctypes.string_at(bits.ctypes.state_address, _WORDS)
    return bool(words == state["key"].astype(np.uint32).tobytes() + np.int32(state["pos"]).tobytes())
