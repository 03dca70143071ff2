"""curves.png: the values that a run logged, drawn."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tracking.packed import NEWEST_METRICS, ROW_LENGTH, metrics_between, one_of_metrics
from tracking.rows import TRAIN
from tracking.runs import RunFolder
from tracking.schema import Connection, connect_to_read

__all__ = ["Curve", "Resume", "curves", "resumes", "write_curves"]

_MOST_POINTS = 600  # a curve
_CHUNK = 20_000  # packed rows a read
_MOST_PANELS = 12
_FIRST = ("loss", "accuracy", "lr", "grad_norm")
_SECONDS = {"batch_time", "duration"}
_LEFT_OUT = {"skipped"}
_STYLES = {  # colours that stay apart for colour-blind readers: Okabe and Ito (2008)
    "batch": {"color": "#56b4e9", "linewidth": 1.0},
    "train": {"color": "#0072b2", "linewidth": 1.8, "marker": "o", "markersize": 3.5},
}
_MARK, _ODD = "#6a51a3", "#c0392b"
_BEFORE = {"died": "died", "stopped": "been stopped", "failed": "failed", "done": "been done"}
_VALIDATION = (("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#e69f00", "v"))

_FINITE = "typeof({0}) = 'real' AND {0} - {0} = 0"
_STANDS = "(attempts.kept_until IS NULL OR packed.seq <= attempts.kept_until)"
_FROM = f"""
    FROM {metrics_between("?1", "?2 - 1")} AS packed
        CROSS JOIN attempts ON attempts.attempt = packed.attempt
        CROSS JOIN scopes ON scopes.scope = packed.scope
    WHERE {_STANDS}
"""
_EPOCHS = f"""
    SELECT scopes.name, keyset, packed.seq, {", ".join(f"v{pos}" for pos in range(ROW_LENGTH))}
    {_FROM} AND batch < 0 AND epoch % ?3 = 0
"""


_ENDED = one_of_metrics("1", "packed.batch >= 0 AND packed.seq < ?1", "step")


def _batches(width: int) -> str:
    """Of each of the first `width` values sum, number, least, most, and how many are not finite.

    By scope, keyset and stretch of steps.
    """
    values = [
        f"{function} FILTER (WHERE {finite})"
        for pos in range(width)
        for finite in (_FINITE.format(f"v{pos}"),)
        for function in (f"sum(v{pos})", "count(*)", f"min(v{pos})", f"max(v{pos})")
    ]
    for pos in range(width):
        values.insert(5 * pos + 4, f"count(v{pos}) FILTER (WHERE NOT ({_FINITE.format(f'v{pos}')}))")
    return (
        f"SELECT scopes.name, keyset, step / ?3, {', '.join(values)} {_FROM} AND batch >= 0 GROUP BY 1, 2, 3"
    )


@dataclass
class Curve:
    """Values of one metric over batches since the beginning: means, and the bounds of what they are means of."""

    x: list[float] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    least: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)
    odd: list[float] = field(default_factory=list)
    """Where there are values that are not finite."""

    def add(self, x: float, mean: float, least: float, most: float) -> None:
        """A point to the right of the others."""
        for values, value in ((self.x, x), (self.mean, mean), (self.least, least), (self.most, most)):
            values.append(value)


@dataclass
class Resume:
    """Where an attempt went on: after so many `batches` since the beginning; how the one before had ended."""

    attempt: int
    batches: int
    after: str


@dataclass
class _Mean:
    sum: float = 0.0
    count: int = 0
    odd: int = 0
    least: float = math.inf
    most: float = -math.inf


def curves(run: RunFolder) -> dict[str, dict[str, Curve]]:
    """The run's curves by metric and, within, by `batch`, `train` or the validation's name.

    At most about 600 points each: of more batches they are means over consecutive ones. Values that are not finite
    are left out of them; `odd` says where they are. Values of an epoch stand where the epoch ended. Reads the
    journal in short pieces.
    """
    with closing(connect_to_read(run.journal)) as connection:
        return _Reading(connection).all()


class _Reading:
    def __init__(self, connection: Connection):
        self._connection = connection
        self._keys: dict[int, list[str]] = defaultdict(list)
        for keyset, key in connection.execute("SELECT keyset, key FROM keysets ORDER BY keyset, pos"):
            self._keys[keyset].append(key)
        self._batches = _batches(max(map(len, self._keys.values()), default=1))
        self._end = connection.execute(NEWEST_METRICS).fetchone()[0] + 1
        self._per_point = 1 + self._newest_of("step", "packed.batch >= 0") // _MOST_POINTS
        self._per_epoch = 1 + self._newest_of("epoch", "packed.batch < 0") // _MOST_POINTS
        self._means: dict[tuple[str, str], dict[int, _Mean]] = defaultdict(lambda: defaultdict(_Mean))
        self._found: dict[str, dict[str, Curve]] = defaultdict(lambda: defaultdict(Curve))

    def _newest_of(self, column: str, where: str) -> int:
        """The newest row's; steps and epochs go up, but for the attempts that went back in them."""
        row = self._connection.execute(one_of_metrics("1", where, column)).fetchone()
        return int(row[1]) if row else 0

    def all(self) -> dict[str, dict[str, Curve]]:
        step_at = 0
        for first in range(1, self._end, _CHUNK):
            until = min(first + _CHUNK, self._end)
            for row in self._connection.execute(self._batches, (first, until, self._per_point)):
                self._add_batches(row[0], row[1], row[2], row[3:])
            for row in self._connection.execute(_EPOCHS, (first, until, self._per_epoch)).fetchall():
                step_at = self._add_epoch(row[0], row[1], row[2], row[3:], step_at)
        for (scope, key), points in self._means.items():
            curve = self._found[key]["batch" if scope == TRAIN else _name(scope)]
            for place in sorted(points):
                mean = points[place]
                x = min((place + 0.5) * self._per_point, max(1, (place + 1) * self._per_point - 1))
                if mean.count:
                    curve.add(x, mean.sum / mean.count, mean.least, mean.most)
                if mean.odd:
                    curve.odd.append(x)
        return {key: dict(lines) for key, lines in self._found.items()}

    def _add_batches(self, scope: str, keyset: int, place: int, values: Sequence[Any]) -> None:
        for pos, key in enumerate(self._keys[keyset]):
            total, count, least, most, odd = values[5 * pos : 5 * pos + 5]
            if (count or odd) and key not in _LEFT_OUT:
                mean = self._means[scope, key][place]
                mean.odd += odd
                if count:
                    mean.sum, mean.count = mean.sum + total, mean.count + count
                    mean.least, mean.most = min(mean.least, least), max(mean.most, most)

    def _add_epoch(self, scope: str, keyset: int, seq: int, values: Sequence[Any], step_at: int) -> int:
        """`step_at` is where the epoch before ended; where this one did."""
        ended = self._connection.execute(_ENDED, (seq,)).fetchone()
        step_at = max(step_at, ended[1]) if ended else step_at
        for key, value in zip(self._keys[keyset], values, strict=False):
            if isinstance(value, float) and math.isfinite(value) and key not in _LEFT_OUT:
                curve = self._found[key]["train" if scope == TRAIN else _name(scope)]
                if not curve.x or curve.x[-1] <= step_at:
                    curve.add(step_at, value, value, value)
        return step_at


def _name(scope: str) -> str:
    return scope.removeprefix("validation/")


def resumes(run: RunFolder) -> list[Resume]:
    """Where attempts went on with the run, of what stands; the oldest first."""
    found = []
    with closing(connect_to_read(run.journal)) as connection:
        attempts = connection.execute(
            "SELECT attempt, position, first_seq, kept_until, outcome FROM attempts ORDER BY attempt"
        ).fetchall()
        after = {attempt: outcome or "died" for attempt, *_, outcome in attempts}
        for attempt, position, first_seq, kept_until, _ in attempts:
            if not position or (kept_until is not None and kept_until < first_seq):
                continue
            condition = f"packed.batch >= 0 AND packed.attempt = ?2 AND {_STANDS}"
            first = connection.execute(
                one_of_metrics("?1", condition, "step", oldest=True),
                (_first_of(connection, attempt), attempt),
            ).fetchone()
            if first is not None:
                found.append(Resume(attempt, first[1] - 1, after.get(attempt - 1, "")))
    return found


def _first_of(connection: Connection, attempt: int) -> int:
    """The first id of the attempt's values, by bisection: attempts go up with ids."""
    low, high = 1, connection.execute(NEWEST_METRICS).fetchone()[0] + 1
    while low < high:
        middle = (low + high) // 2
        row = connection.execute(one_of_metrics("?1", "TRUE", "attempt", oldest=True), (middle,)).fetchone()
        if row is not None and row[1] < attempt:
            low = middle + 1
        else:
            high = middle
    return int(low)


def write_curves(run: RunFolder, file: Path) -> None:
    """Draw the run's curves, a panel for each metric, as PNG, or what else `file` ends in (.svg, .pdf).

    Broken lines mark resumes, crosses at the lower edge values that are not finite. Raises JournalError, OSError;
    ImportError without matplotlib, ValueError for an ending that it does not know.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found, marks = curves(run), resumes(run)
    order = sorted(found, key=lambda key: (_FIRST.index(key) if key in _FIRST else len(_FIRST), key))
    shown, rest = order[:_MOST_PANELS], order[_MOST_PANELS:]
    columns = min(2, max(1, len(shown)))  # a viewer of artifacts is not wide
    rows = max(1, -(-len(shown) // columns))
    width, height = 4.5 * columns + 0.3, 2.8 * rows + 0.6
    figure = Figure(figsize=(width, height), dpi=120)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(  # measured in inches: laying it out by what is drawn would draw it twice
        left=0.7 / width,
        right=1 - 0.2 / width,
        top=1 - 0.75 / height,
        bottom=0.7 / height,
        wspace=0.2,
        hspace=0.42,
    )
    figure.text(0.7 / width, 1 - 0.28 / height, run.id, fontsize=11)
    if marks:
        figure.text(1 - 0.2 / width, 1 - 0.28 / height, _said(marks), fontsize=9, color=_MARK, ha="right")
    if not shown:
        figure.text(0.5, 0.5, "no values yet", ha="center", color="#59626e")
    most = max((x for key in shown for c in found[key].values() for x in (*c.x, *c.odd)), default=1)
    for number, key in enumerate(shown):
        axes = figure.add_subplot(rows, columns, number + 1)
        _draw(axes, key, found[key], marks)
        axes.set_xlim(-0.02 * most, 1.02 * most)  # alike, so that one looks from panel to panel
    if rest:
        names = f"not shown: {', '.join(rest[:20])}{'…' if len(rest) > 20 else ''}"
        figure.text(0.7 / width, 0.12 / height, names, fontsize=8.5, color="#59626e")
    form = file.suffix.lstrip(".") or "png"
    figure.savefig(file, format=form, metadata={"Software": None} if form == "png" else None)


def _said(marks: Sequence[Resume]) -> str:
    """'┆ 3 resumes: it had died', as the legend of the lines."""
    before = dict.fromkeys(_BEFORE[mark.after] for mark in marks if mark.after in _BEFORE)
    return f"┆ {len(marks)} resume{'s' if len(marks) > 1 else ''}: it had {', or '.join(before)}"


def _draw(axes: Any, key: str, lines: dict[str, Curve], marks: Sequence[Resume]) -> None:
    for mark in marks:
        axes.axvline(mark.batches, color=_MARK, linewidth=0.9, linestyle=(0, (3, 2)), zorder=0)
    validations = sorted(lines.keys() - {"batch", "train"})
    for name in [*(n for n in ("batch", "train") if n in lines), *validations]:
        curve = lines[name]
        if name in _STYLES:
            style: dict[str, Any] = dict(_STYLES[name])
        else:
            colour, marker = _VALIDATION[validations.index(name) % len(_VALIDATION)]
            style = {"color": colour, "linewidth": 1.8, "marker": marker, "markersize": 4}
        if len(curve.x) > 60 or name == "batch":
            style.pop("marker", None)
        if len(curve.x) == 1:
            style["marker"] = style.get("marker", "o")
        axes.plot(curve.x, curve.mean, label=name, **style)
        if curve.least != curve.most and curve.least != curve.mean:
            axes.fill_between(curve.x, curve.least, curve.most, color=style["color"], alpha=0.22, linewidth=0)
        if curve.odd:
            # Along the lower edge, whatever the scale is.
            across = axes.get_xaxis_transform()
            axes.plot(
                curve.odd,
                [0.03] * len(curve.odd),
                "x",
                transform=across,
                color=_ODD,
                markersize=5,
                label="not finite",
            )
    axes.set_title(f"{key} (s)" if key in _SECONDS else key, fontsize=10.5, loc="left", fontweight="bold")
    axes.set_xlabel("batches", fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(color="#d7dbe0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda x, _: _short(x))
    if _by_magnitude(lines):
        axes.set_yscale("log")
        # A range may reach down to almost nothing; what the means do is what is looked at.
        least = min(value for curve in lines.values() for value in curve.mean)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], least / 10))
    if len(lines) > 1:
        axes.legend(fontsize=8.5, frameon=False)


def _short(number: float) -> str:
    """12500 as '12.5k'."""
    for letter, size in (("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def _by_magnitude(lines: dict[str, Curve]) -> bool:
    """Do the means stretch over so many magnitudes that a logarithmic scale shows more?"""
    values = [value for curve in lines.values() for value in curve.mean]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 50
