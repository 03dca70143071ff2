"""RESULTS.svg: the results drawn, from the same rows as the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import NullLocator
from measuring import Figure, Row

__all__ = ["draw"]

_OURS, _OTHERS, _INK = "#0072b2", "#a8b0b9", "#30363d"
_WIDTH_IN, _BAR_IN, _ABOVE_IN, _BELOW_IN = 8.8, 0.27, 0.45, 0.5
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "interlock", "font.size": 9, "axes.edgecolor": _OTHERS}


@dataclass(frozen=True)
class _Panel:
    """Some rows of one part of the results, and which of their figures is drawn."""

    part: str
    says: str
    figure: str
    """`figure`, from 0; or by magnitude `more` or `times`, as in Row."""
    measure: str = ""
    only: tuple[str, ...] = ()
    """The rows, by their names; all where none is named."""


_PANELS = (
    _Panel("Orchestration alone", "µs a batch", "figure", "wall"),
    _Panel("Orchestration alone, instructions", "a batch", "figure"),
    _Panel("Real training", "more than the bare loop, µs a batch", "more", "wall"),
    _Panel("Real training, beside Ignite alone", "more than the bare loop, µs a batch", "more", "wall"),
    _Panel("Real training, convolutions, 5 ms a step", "more than the bare loop, µs a batch", "more", "wall"),
    _Panel("Real training, 4 ms a step", "more than the bare loop, µs a batch", "more", "wall"),
    _Panel(
        "Checkpoints",
        "times a copy into memory that is there",
        "times",
        only=(
            "interlock, stall",
            "dcp.async_save, stall",
            "torch.save, stall",
            "interlock, until durable",
            "raw write and fsync",
            "interlock, load and check",
            "map and copy",
        ),
    ),
)


def draw(results: Mapping[str, Sequence[Row]], file: Path) -> None:
    """Draw what there is of `results`, the rows of each part by its title, a panel for each part."""
    panels = [(panel, rows) for panel in _PANELS if (rows := _rows(panel, results.get(panel.part, ())))]
    heights = [_ABOVE_IN + _BAR_IN * len(rows) + _BELOW_IN for _, rows in panels]
    total = sum(heights)
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(_WIDTH_IN, total))
        FigureCanvasSVG(canvas)
        below = total
        for (panel, rows), height in zip(panels, heights, strict=True):
            below -= height
            size = (height - _ABOVE_IN - _BELOW_IN) / total
            axes = canvas.add_axes((0.42, (below + _BELOW_IN) / total, 0.56, size))
            title = f"{panel.part}: {panel.says}"
            canvas.text(0.01, (below + height - 0.3) / total, title, fontsize=10, fontweight="bold")
            _draw_panel(axes, panel, rows)
        canvas.savefig(file, format="svg", metadata={"Date": None})


def _rows(panel: _Panel, rows: Sequence[Row]) -> list[Row]:
    found = {
        row.name: row
        for row in rows
        if row.measure == panel.measure and getattr(row, panel.figure) is not None
    }
    return [found[name] for name in panel.only or found if name in found]


def _draw_panel(axes: Any, panel: _Panel, rows: Sequence[Row]) -> None:
    """A bar to the median, and a line from the least to the most."""
    bars: list[Figure] = [getattr(row, panel.figure) for row in rows]
    most = max(bar.most for bar in bars)
    start = 0.0
    if panel.figure != "figure":
        unit = 1.0 if panel.figure == "times" else 10.0
        start = min([unit, *(bar.least for bar in bars if bar.least > 0)]) / 2
        axes.set_xscale("log")
    else:
        axes.locator_params(axis="x", nbins=5)
    axes.set_xlim(start, most * 1.4 if start == 0 else max(most, 2 * start) * 6)
    for at, (row, bar) in enumerate(zip(rows, bars, strict=True)):
        colour = _OURS if row.name.startswith("interlock") else _OTHERS
        axes.barh(at, max(bar.median - start, 0), left=start, height=0.62, color=colour)
        axes.plot([max(bar.least, start), max(bar.most, start)], [at, at], color=_INK, linewidth=1)
        axes.annotate(
            _label(panel, row, bar),
            (max(bar.most, start), at),
            (5, 0),
            textcoords="offset points",
            va="center",
        )
    if panel.figure == "times":
        axes.axvline(1.0, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.grid(axis="x", color="#e3e6ea", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _label(panel: _Panel, row: Row, bar: Figure) -> str:
    number = f"{bar.median:.2g}" if abs(bar.median) < 100 else f"{bar.median:,.0f}"
    if panel.figure == "more" and bar.least <= 0:
        return f"{number} (least {bar.least:,.0f})"
    if panel.figure == "figure" and row.times is not None:
        return f"{number}, {row.times.median:.2g} times"
    return number
