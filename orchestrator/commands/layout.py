"""How values and tables are written: for people (columns, units) and for programs (JSON)."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

import click

__all__ = [
    "age",
    "clock",
    "count",
    "date",
    "duration",
    "heading",
    "number",
    "padded",
    "size",
    "table",
    "to_json",
]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: str = "") -> list[str]:
    """Lines of aligned columns; those whose header's position in `right` is 'r' are aligned to the right.

    Cells may be styled. As wide as it needs to be: what is cut off cannot be searched for.
    """
    cells = [[click.style(text, dim=True) for text in header], *map(list, rows)]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    right = right.ljust(len(header), "l")
    return [
        "  ".join(
            padded(cell, width, right=side == "r")
            for cell, width, side in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]


def padded(text: str, width: int, *, right: bool = False) -> str:
    """`text` filled up with spaces to `width` columns of a terminal."""
    if text.isascii() and "\x1b" not in text:
        return text.rjust(width) if right else text.ljust(width)
    fill = " " * max(width - _width(text), 0)
    return fill + text if right else text + fill


def _width(text: str) -> int:
    if text.isascii() and "\x1b" not in text:
        return len(text)
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in click.unstyle(text))


def heading(text: str) -> str:
    """The line above a part of what is shown."""
    return click.style(text, bold=True)


def count(amount: int, noun: str, plural: str = "") -> str:
    """'1 transition', '1,203 transitions', '2 passes'."""
    return f"{amount:,} {noun if amount == 1 else plural or noun + 's'}"


def number(value: float | None, digits: int = 5) -> str:
    """A metric's value in a few digits; '-' for none."""
    return "-" if value is None else f"{value:.{digits}g}"


def size(amount: int) -> str:
    """A number of bytes: '940 B', '1.2 MB'."""
    if amount < 1000:
        return f"{amount} B"
    power = min(int(math.log10(amount) // 3), 5)
    return f"{amount / 1000**power:.1f} {' kMGTP'[power]}B"


def duration(nanoseconds: int) -> str:
    """A length of time: '850 µs', '1.2 ms', '12.3 s', '3m 12s', '2h 05m'."""
    seconds = nanoseconds / 1e9
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m"


def age(nanoseconds: int) -> str:
    """How long ago, in its largest unit: '12 s ago', '3 days ago'."""
    seconds = nanoseconds // 1_000_000_000
    if seconds < 1:
        return "just now"
    for unit, length in (("day", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            amount = seconds // length
            return f"{amount} {unit}{'s' if unit == 'day' and amount > 1 else ''} ago"
    return f"{seconds} s ago"


def date(time_ns: int) -> str:
    """Date and time of day, here: '2026-11-23 22:12:37'."""
    return _second(time_ns // 1_000_000_000)


def clock(time_ns: int) -> str:
    """Time of day, here, in milliseconds: '22:12:37.123'."""
    seconds, rest = divmod(time_ns // 1_000_000, 1000)
    return f"{_second(seconds)[11:]}.{rest:03}"


@lru_cache(maxsize=16)  # a log has thousands of lines of one second
def _second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def to_json(value: object, *, indent: int | None = None) -> str:
    """JSON that any parser reads: numbers that are not finite are the texts 'nan', 'inf' and '-inf'."""
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: object) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Path):
        return str(value)
    assert isinstance(value, list | tuple), type(value)
    return [_plain(entry) for entry in value]
