"""EpochTable: the epochs' metrics as rows below a head that names them."""

from __future__ import annotations

from rich.text import Text

from orchestrator.callbacks.logs.record import LogRecord, head, is_own

__all__ = ["EpochTable"]

_GAP = 2
_ROWS_BELOW_A_HEAD = 30
_LEAST = {"lr": 9, "duration": 6}
"""Columns of what gets wider in most trainings, so that their tables need no second head for it."""


class EpochTable:
    """Rows of one table, made one at a time; columns only get wider, and then have a head of their own again."""

    def __init__(self) -> None:
        self._widths: dict[str, int] = {}
        self._heads: list[str] = []
        self._below = 0

    def rows(self, record: LogRecord, width: int) -> list[Text]:
        """The row of `record`, with a head where one is due; nothing where it does not fit into `width` columns.

        What interlock adds to the measured values is left out as need be.
        """
        cells = record.cells
        while self._width(cells) > width:
            own = [name for name in cells if is_own(name)]
            if not own:
                return []
            del cells[own[-1]]
        widths = {name: self._cells(name, value) for name, value in cells.items()}
        found = []
        wider = any(widths[name] > self._widths.get(name, 0) for name in widths)
        if list(cells) != self._heads or wider or self._below >= _ROWS_BELOW_A_HEAD:
            self._heads, self._below = list(cells), 0
            self._widths |= widths
            heads = ((head(name).rjust(self._widths[name]), "dim") for name in cells)
            found.append(Text(" " * _GAP).join([Text(*text) for text in heads]))
        self._below += 1
        row = [Text(value.rjust(self._widths[name])) for name, value in cells.items()]
        row[0].stylize("cyan")
        return [*found, Text(" " * _GAP).join(row)]

    def _cells(self, name: str, value: str) -> int:
        least = _LEAST.get(name.split("/")[0], 0)
        return max(len(head(name)), len(value), self._widths.get(name, 0), least)

    def _width(self, cells: dict[str, str]) -> int:
        return sum(self._cells(name, value) + _GAP for name, value in cells.items()) - _GAP
