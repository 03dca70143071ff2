"""Measured values on their way to the journal: rows of plain numbers, which the loop writes and a thread takes."""

import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

from tracking.packed import ROW_LENGTH

__all__ = ["ROW", "ROW_WORDS", "VALUES_AT", "Kind", "Values"]

VALUES_AT, ROW_WORDS = 6, 6 + ROW_LENGTH
"""Words of 64 bits of a row before its values (seq, epoch, batch, step, time, the number of its kind), and in all."""

ROW = struct.Struct(f"<{VALUES_AT}q{ROW_LENGTH}d")
"""A row. Values that its kind has no keys for mean nothing."""

_PAGE = 1024 * ROW.size
_PACK = [struct.Struct(f"<{VALUES_AT}q{length}d").pack_into for length in range(ROW_LENGTH + 1)]


class Kind(NamedTuple):
    """What rows have in common. `part`: they hold some of the values of one moment, the rows beside them the others."""

    scope: str
    keys: tuple[str, ...]
    part: bool


class _Page(bytearray):
    """Memory for rows, of which there are `at` bytes."""

    __slots__ = ("at",)

    def __init__(self, size: int, at: int) -> None:
        super().__init__(size)
        self.at = at


class Values:
    """A queue of measured values. One thread puts them in, and one takes and releases them; nothing waits.

    A row is bytes: no object that one thread made is for the other to look at and to free.
    """

    def __init__(self, make_room: Callable[[], None]) -> None:
        self.kinds: list[Kind] = []
        """By their numbers."""
        self._numbers: dict[Kind, int] = {}
        self._make_room = make_room
        self._pages: list[_Page] = []
        self._page = _Page(0, _PAGE)
        self._released = 0  # bytes of the first page
        # Of the newest row:
        self._scope, self._kind, self._pack = "", -1, _PACK[0]
        self._keys: tuple[str, ...] | None = None

    def put(
        self,
        seq: int,
        scope: str,
        epoch: int,
        batch: int,
        step: int,
        time_ns: int,
        values: Mapping[str, float],
    ) -> None:
        """Append what was measured at one moment, in the work of transition `seq`.

        Raises TypeError or ValueError for what is no number, and what `make_room` raises, which is asked before more
        memory is taken.
        """
        page, keys = self._page, tuple(values)
        at = page.at
        if keys == self._keys and scope == self._scope and at < _PAGE:
            try:
                self._pack(page, at, seq, epoch, batch, step, time_ns, self._kind, *values.values())
            except struct.error:  # a value is none; the long way says so
                pass
            else:
                page.at = at + ROW.size
                return
        self._put_any(scope, values, seq, epoch, batch, step, time_ns)

    def take(self) -> bytes:
        """The rows that wait, which stay until they are released."""
        begin, parts = self._released, []
        for page in self._pages[:]:
            parts.append(page[begin : page.at])
            begin = 0
        return b"".join(parts)

    def release(self, size: int) -> None:
        """Forget the first `size` bytes of what waits."""
        self._released += size
        while self._pages and self._pages[0] is not self._page and self._released >= self._pages[0].at:
            # In this order, so that there never seem to be fewer than none.
            self._released -= self._pages[0].at
            del self._pages[0]

    def __len__(self) -> int:
        return (sum(page.at for page in self._pages[:]) - self._released) // ROW.size

    def _put_any(self, scope: str, values: Mapping[str, float], *place: int) -> None:
        """The same of any kind, in as many rows as it takes; `place` is what stands before a row's kind."""
        keys, numbers = tuple(values), tuple(map(float, values.values()))
        cuts = [slice(first, first + ROW_LENGTH) for first in range(0, len(keys), ROW_LENGTH)]
        page = self._page_for(len(cuts) * ROW.size)
        at = page.at
        for cut in cuts:
            kind = self._number(Kind(scope, keys[cut], part=len(cuts) > 1))
            _PACK[len(keys[cut])](page, at, *place, kind, *numbers[cut])
            at += ROW.size
        page.at = at  # at once: no part of a moment is taken without the others
        if len(cuts) == 1:
            self._scope, self._keys, self._kind, self._pack = scope, keys, kind, _PACK[len(keys)]

    def _page_for(self, size: int) -> _Page:
        """A page with room for so many bytes."""
        page = self._page
        if page.at + size > len(page):
            self._make_room()
            # The one at hand before it waits with the others: `release`, which may come between, leaves that alone.
            page = self._page = _Page(max(size, _PAGE), 0)
            self._pages.append(page)
        return page

    def _number(self, kind: Kind) -> int:
        if kind not in self._numbers:
            self._numbers[kind] = len(self.kinds)
            self.kinds.append(kind)
        return self._numbers[kind]
