"""The table drawn: as Mermaid and as SVG, with the counts and mean times of a run if they are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from states.table import TERMINAL, TRAINING, Arc, Row, State, Trigger, arcs

__all__ = ["mermaid", "shown_time", "svg"]

# halt and resume connect HALTED with every other state: one arrow each says as much as sixteen.
_GATHERED = frozenset({Trigger.HALT, Trigger.RESUME})


@dataclass(frozen=True)
class _Figure:
    """What is known of one arrow: how often it was taken and how long that took on average."""

    count: int | None
    mean_ns: float | None

    def lines(self) -> tuple[str, ...]:
        """The figures as they are shown: count, mean time, each if known."""
        count = () if self.count is None else (f"\N{MULTIPLICATION SIGN}{self.count:,}",)
        time = () if self.mean_ns is None else (shown_time(self.mean_ns),)
        return (*count, *time)


def shown_time(nanoseconds: float) -> str:
    """A duration in the unit that fits it, with three significant digits: '12.3 µs'."""
    value, unit = float(nanoseconds), "ns"
    for larger in ("µs", "ms", "s"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    digits = 0 if value >= 99.95 or unit == "ns" else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f} {unit}"


def _figure(
    of: Sequence[Arc], counts: Mapping[Arc, int] | None, mean_ns: Mapping[Arc, float] | None
) -> _Figure:
    """The figures of several arcs as one: counts add up, times are averaged by count."""
    times = {} if mean_ns is None else mean_ns
    count = None if counts is None else sum(counts.get(arc, 0) for arc in of)
    weights = {arc: 1 if counts is None else counts.get(arc, 0) for arc in of if arc in times}
    total = sum(weights.values())
    mean = sum(times[arc] * weight for arc, weight in weights.items()) / total if total else None
    return _Figure(count, mean)


def _split(table: tuple[Row, ...]) -> tuple[list[Arc], dict[Trigger, list[Arc]]]:
    """The arcs that are drawn one by one, and those that are gathered."""
    single: list[Arc] = []
    gathered: dict[Trigger, list[Arc]] = {}
    for arc in arcs(table):
        if arc.trigger in _GATHERED:
            gathered.setdefault(arc.trigger, []).append(arc)
        else:
            single.append(arc)
    return single, gathered


def mermaid(
    table: tuple[Row, ...] = TRAINING,
    counts: Mapping[Arc, int] | None = None,
    times: Mapping[Arc, float] | None = None,
) -> str:
    """The table as a Mermaid `stateDiagram-v2`.

    `counts`: how often each arc was taken. `times`: its mean duration in nanoseconds.
    """
    single, gathered = _split(table)

    def label(trigger: Trigger, of: Sequence[Arc], note: str = "") -> str:
        return " ".join((trigger.value + note, *_figure(of, counts, times).lines()))

    lines = ["stateDiagram-v2", '    state "one run" as RUN {', f"        [*] --> {State.IDLE.value}"]
    lines += [
        f"        {arc.source.value} --> {arc.dest.value} : {label(arc.trigger, [arc])}" for arc in single
    ]
    lines += [f"        {State.DONE.value} --> [*]", "    }"]
    if Trigger.HALT in gathered:
        note = " (from any state but DONE)"
        lines.append(
            f"    RUN --> {State.HALTED.value} : {label(Trigger.HALT, gathered[Trigger.HALT], note)}"
        )
    if Trigger.RESUME in gathered:
        note = " (to the state of the snapshot)"
        lines.append(
            f"    {State.HALTED.value} --> RUN : {label(Trigger.RESUME, gathered[Trigger.RESUME], note)}"
        )
    return "\n".join(lines) + "\n"


# --- SVG -------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 1392, 572
_NODE_WIDTH, _NODE_HEIGHT, _RADIUS = 116, 44, 12
_UPPER, _LOWER = 110, 330
_CENTRES: Mapping[State, tuple[int, int]] = {
    State.IDLE: (86, _UPPER),
    State.EPOCH_START: (292, _UPPER),
    State.BATCH_START: (292, _LOWER),
    State.FORWARD: (492, _LOWER),
    State.BACKWARD: (692, _LOWER),
    State.STEP: (892, _LOWER),
    State.BATCH_END: (1092, _LOWER),
    State.EPOCH_END: (1092, _UPPER),
    State.DONE: (1312, _UPPER),
    State.HALTED: (1312, _LOWER),
}
# Around all states that can halt: left, top, right, bottom.
_FRAME = (16, 16, 1208, 556)


@dataclass(frozen=True)
class _Route:
    """The way of one arrow: corners from start to end, and where its label stands."""

    corners: tuple[tuple[int, int], ...]
    label: tuple[int, int]
    anchor: str = "middle"
    stacked: bool = False  # figures in lines of their own: the arrow is short
    note: str = ""


def _beside(source: State, dest: State, note: str = "", label_x: int | None = None) -> _Route:
    """Straight along the row."""
    (x1, y), (x2, _) = _CENTRES[source], _CENTRES[dest]
    half = _NODE_WIDTH // 2 if x1 < x2 else -_NODE_WIDTH // 2
    start, end = x1 + half, x2 - half
    middle = (start + end) // 2 if label_x is None else label_x
    return _Route(((start, y), (end, y)), (middle, y - 8), stacked=not note, note=note)


def _upright(source: State, dest: State, shift: int) -> _Route:
    """Straight up or down the column, `shift` beside its middle, the label on that side."""
    (x, y1), (_, y2) = _CENTRES[source], _CENTRES[dest]
    half = _NODE_HEIGHT // 2 if y1 < y2 else -_NODE_HEIGHT // 2
    anchor = "end" if shift < 0 else "start"
    label = (x + shift + (-10 if shift < 0 else 10), (y1 + y2) // 2 - 14)
    return _Route(((x + shift, y1 + half), (x + shift, y2 - half)), label, anchor, stacked=True)


def _around(source: State, dest: State, lane: int, leave: int, arrive: int, note: str) -> _Route:
    """Out of the row to the height `lane`, along it, and back; `leave`, `arrive`: beside the middles."""
    (x1, y), (x2, _) = _CENTRES[source], _CENTRES[dest]
    edge = y + (_NODE_HEIGHT // 2 if lane > y else -_NODE_HEIGHT // 2)
    start, end = x1 + leave, x2 + arrive
    corners = ((start, edge), (start, lane), (end, lane), (end, edge))
    return _Route(corners, ((start + end) // 2, lane - 7), note=note)


_ROUTES: Mapping[tuple[State, State], _Route] = {
    (State.IDLE, State.EPOCH_START): _beside(State.IDLE, State.EPOCH_START),
    (State.EPOCH_END, State.EPOCH_START): _beside(State.EPOCH_END, State.EPOCH_START, "next epoch"),
    (State.EPOCH_START, State.EPOCH_END): _around(
        State.EPOCH_START, State.EPOCH_END, 48, 0, 0, "not one batch"
    ),
    (State.EPOCH_END, State.DONE): _beside(State.EPOCH_END, State.DONE, label_x=1180),
    (State.EPOCH_START, State.BATCH_START): _upright(State.EPOCH_START, State.BATCH_START, -26),
    (State.BATCH_END, State.EPOCH_END): _upright(State.BATCH_END, State.EPOCH_END, 26),
    (State.BATCH_START, State.FORWARD): _beside(State.BATCH_START, State.FORWARD),
    (State.FORWARD, State.BACKWARD): _beside(State.FORWARD, State.BACKWARD),
    (State.BACKWARD, State.STEP): _beside(State.BACKWARD, State.STEP),
    (State.STEP, State.BATCH_END): _beside(State.STEP, State.BATCH_END),
    (State.BATCH_END, State.BATCH_START): _around(
        State.BATCH_END, State.BATCH_START, 198, 0, 16, "next batch"
    ),
    (State.BACKWARD, State.BATCH_END): _around(
        State.BACKWARD, State.BATCH_END, 262, 0, -28, "the window stays open"
    ),
    (State.FORWARD, State.BATCH_END): _around(State.FORWARD, State.BATCH_END, 262, 0, -28, ""),
    (State.STEP, State.FORWARD): _around(State.STEP, State.FORWARD, 398, -16, 0, "next phase"),
    (State.BATCH_START, State.STEP): _around(
        State.BATCH_START, State.STEP, 456, 16, 16, "an empty batch closes the window"
    ),
    (State.BATCH_START, State.BATCH_END): _around(
        State.BATCH_START, State.BATCH_END, 514, -16, 0, "an empty batch"
    ),
}

_STYLE = """
.ground{fill:#fff}
.node rect{fill:#eef4fb;stroke:#2f6db3;stroke-width:1.6}
.node text{fill:#12304f;font:600 13px system-ui,"DejaVu Sans",sans-serif;text-anchor:middle}
.end rect{fill:#e9f6ec;stroke:#2f8a4c}.end text{fill:#14432a}
.halted rect{fill:#f4f4f4;stroke:#8a8f98;stroke-dasharray:5 4}.halted text{fill:#5a6069}
.arrow{fill:none;stroke:#2f6db3;stroke-linejoin:round}
.head{fill:#2f6db3}
.label{fill:#12304f;font:12.5px ui-monospace,"DejaVu Sans Mono",monospace}
.note,.figure{fill:#5a6069;font:12px system-ui,"DejaVu Sans",sans-serif}
.figure{font-variant-numeric:tabular-nums}
.label,.note,.figure{stroke:#fff;stroke-width:4px;paint-order:stroke;stroke-linejoin:round}
.never{opacity:.42}
.muted .arrow,.frame{stroke:#9aa0a8;stroke-dasharray:5 4;fill:none}.muted .head{fill:#9aa0a8}
.muted .label{fill:#5a6069}
@media (prefers-color-scheme:dark){
.ground{fill:#14181d}
.node rect{fill:#1b2a3a;stroke:#6aa5e3}.node text{fill:#dcebfb}
.end rect{fill:#18301f;stroke:#5fbf7d}.end text{fill:#d5f2de}
.halted rect{fill:#20242a;stroke:#7b828c}.halted text{fill:#a9b0ba}
.arrow{stroke:#6aa5e3}.head{fill:#6aa5e3}
.label{fill:#dcebfb}.note,.figure,.muted .label{fill:#a9b0ba}
.label,.note,.figure{stroke:#14181d}
.muted .arrow,.frame{stroke:#6b727c}.muted .head{fill:#6b727c}
}
"""


def svg(
    table: tuple[Row, ...] = TRAINING,
    counts: Mapping[Arc, int] | None = None,
    mean_ns: Mapping[Arc, float] | None = None,
) -> str:
    """The table as one self-contained SVG document, readable on light and dark grounds.

    `counts`: how often each arc was taken; arrows grow with it, and fade where it is 0. `mean_ns`: the mean
    duration of each arc in nanoseconds.
    """
    single, gathered = _split(table)
    most = max((counts or {}).values(), default=0)

    def weight(figure: _Figure) -> float:
        return 1.6 if not figure.count else 1.6 + 2.2 * math.log1p(figure.count) / math.log1p(max(most, 1))

    parts = ['<rect class="ground" width="100%" height="100%"/>']
    if gathered:
        parts += _halts(gathered, lambda of: _figure(of, counts, mean_ns))
    for arc in single:
        figure = _figure([arc], counts, mean_ns)
        parts.append(_arrow(arc, _route(arc), figure, weight(figure)))
    seen = {state for arc in arcs(table) for state in (arc.source, arc.dest)}
    parts += [_node(state) for state in _CENTRES if state in seen]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'width="{_WIDTH}" height="{_HEIGHT}">\n<title>The states of a run and its transitions</title>\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _route(arc: Arc) -> _Route:
    """The way drawn by hand, or for an arc of an unusual table a straight line between the middles."""
    known = _ROUTES.get((arc.source, arc.dest))
    if known is not None:
        return known
    (x1, y1), (x2, y2) = _CENTRES[arc.source], _CENTRES[arc.dest]
    return _Route(((x1, y1), (x2, y2)), ((x1 + x2) // 2, (y1 + y2) // 2))


def _node(state: State) -> str:
    x, y = _CENTRES[state]
    kind = " end" if state is State.DONE else " halted" if state is State.HALTED else ""
    rounding = _NODE_HEIGHT // 2 if state in TERMINAL or state is State.IDLE else 8
    return (
        f'<g class="node{kind}"><rect x="{x - _NODE_WIDTH // 2}" y="{y - _NODE_HEIGHT // 2}" '
        f'width="{_NODE_WIDTH}" height="{_NODE_HEIGHT}" rx="{rounding}"/>'
        f'<text x="{x}" y="{y + 5}">{state.value}</text></g>'
    )


def _line(corners: Sequence[tuple[int, int]], width: float) -> str:
    """A line with rounded corners and a head at its end."""
    head = 6 + 1.6 * width
    (x0, y0), (x, y) = corners[-2], corners[-1]
    length = math.hypot(x - x0, y - y0)
    dx, dy = (x - x0) / length, (y - y0) / length
    stop = (x - dx * head * 0.8, y - dy * head * 0.8)  # the line must not show beside the head's point
    path = f"M{corners[0][0]} {corners[0][1]}"
    for before, corner, after in zip(corners, corners[1:], corners[2:], strict=False):
        path += "L{:g} {:g}Q{} {} {:g} {:g}".format(
            *_toward(corner, before), *corner, *_toward(corner, after)
        )
    path += f"L{stop[0]:g} {stop[1]:g}"
    half = head * 0.45
    left = (x - dx * head - dy * half, y - dy * head + dx * half)
    right = (x - dx * head + dy * half, y - dy * head - dx * half)
    return (
        f'<path class="arrow" stroke-width="{width:.2g}" d="{path}"/>'
        f'<path class="head" d="M{x:g} {y:g}L{left[0]:.5g} {left[1]:.5g}L{right[0]:.5g} {right[1]:.5g}Z"/>'
    )


def _toward(corner: tuple[int, int], other: tuple[int, int]) -> tuple[float, float]:
    """The point where a rounded corner begins, on the way to the other."""
    length = math.dist(corner, other)
    share = min(_RADIUS, length / 2) / length
    return corner[0] + (other[0] - corner[0]) * share, corner[1] + (other[1] - corner[1]) * share


def _arrow(arc: Arc, route: _Route, figure: _Figure, width: float) -> str:
    never = " never" if figure.count == 0 else ""
    shown = [f"{arc.trigger.value}: {arc.source.value} to {arc.dest.value}", *figure.lines()]
    return (
        f'<g class="edge{never}"><title>{escape(", ".join(shown))}</title>'
        + _line(route.corners, width)
        + _label(route, arc.trigger, figure)
        + "</g>"
    )


def _label(route: _Route, trigger: Trigger, figure: _Figure) -> str:
    x, y = route.label
    lines = figure.lines()
    note = f'<tspan class="note" dx="9">{escape(route.note)}</tspan>' if route.note else ""
    text = f'<text class="label" x="{x}" y="{y}" text-anchor="{route.anchor}">{trigger.value}{note}</text>'
    below = lines if route.stacked else ((" · ".join(lines),) if lines else ())
    # Beside an upright arrow the figures follow the label; under a level one they clear the line.
    first = y + (16 if route.anchor != "middle" else 26)
    for number, line in enumerate(below):
        text += (
            f'<text class="figure" x="{x}" y="{first + 15 * number}" text-anchor="{route.anchor}">'
            f"{escape(line)}</text>"
        )
    return text


def _halts(gathered: Mapping[Trigger, list[Arc]], figure: Callable[[Sequence[Arc]], _Figure]) -> list[str]:
    """A frame around the states that can halt, and one arrow each for halt and resume."""
    left, top, right, bottom = _FRAME
    x, y = _CENTRES[State.HALTED]
    edge = x - _NODE_WIDTH // 2
    parts = [
        f'<rect class="frame" x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" rx="18"/>',
        f'<text class="note" x="{left + 16}" y="{bottom - 14}">halt leads out of every state in the frame'
        f"{', resume back to the state of the snapshot' if Trigger.RESUME in gathered else ''}</text>",
    ]
    rows = {
        Trigger.HALT: (((right, y - 11), (edge, y - 11)), y - 44),
        Trigger.RESUME: (((edge, y + 11), (right, y + 11)), y + 40),
    }
    for trigger, of in gathered.items():
        corners, first = rows[trigger]
        lines = figure(of).lines()
        text = f'<text class="label" x="{right + 8}" y="{first}">{trigger.value}</text>'
        if lines:
            text += (
                f'<text class="figure" x="{right + 8}" y="{first + 15}">{escape(" · ".join(lines))}</text>'
            )
        parts.append(f'<g class="muted">{_line(corners, 1.6)}{text}</g>')
    return parts
