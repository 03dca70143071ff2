"""The drawings show every arc of the table once, with the figures given, and nothing overlaps."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from states.diagram import mermaid, shown_time, svg
from states.table import EVALUATION, TRAINING, Row, State, Trigger, arcs

TABLES = {"training": TRAINING, "evaluation": EVALUATION}
SPACE = "{http://www.w3.org/2000/svg}"
GATHERED = (Trigger.HALT, Trigger.RESUME)
tables = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def drawn(table: tuple[Row, ...] = TRAINING, **figures: object) -> ElementTree.Element:
    return ElementTree.fromstring(svg(table, **figures))  # type: ignore[arg-type]


def texts(root: ElementTree.Element, kind: str) -> list[str]:
    return ["".join(text.itertext()) for text in root.iter(f"{SPACE}text") if text.get("class") == kind]


@tables
def test_mermaid_has_every_arc_once(table: tuple[Row, ...]) -> None:
    lines = mermaid(table).splitlines()
    assert lines[0] == "stateDiagram-v2"
    found = re.findall(r"^ +(\w+) --> (\w+) : (\w+)$", mermaid(table), re.MULTILINE)
    single = [
        (arc.source.value, arc.dest.value, arc.trigger.value)
        for arc in arcs(table)
        if arc.trigger not in GATHERED
    ]
    assert sorted(found) == sorted(single)
    assert sum("--> HALTED : halt" in line for line in lines) == 1
    assert sum("HALTED --> RUN : resume" in line for line in lines) == (table is TRAINING)
    assert mermaid(table).count("{") == mermaid(table).count("}")


def test_mermaid_shows_counts_and_times() -> None:
    fetch = next(arc for arc in arcs(TRAINING) if arc.trigger is Trigger.FETCH)
    drawing = mermaid(TRAINING, {fetch: 12345}, {fetch: 1500.0})
    assert "EPOCH_START --> BATCH_START : fetch ×12,345 1.50 µs" in drawing  # noqa: RUF001
    assert "BATCH_END --> BATCH_START : fetch ×0\n" in drawing  # noqa: RUF001


@tables
def test_svg_has_every_state_and_arc_once(table: tuple[Row, ...]) -> None:
    root = drawn(table)
    states = [
        "".join(group.itertext()) for group in root.iter(f"{SPACE}g") if "node" in group.get("class", "")
    ]
    seen = {state.value for arc in arcs(table) for state in (arc.source, arc.dest)}
    assert sorted(states) == sorted(seen)
    titles = [
        group[0].text for group in root.iter(f"{SPACE}g") if (group.get("class") or "").startswith("edge")
    ]
    single = [arc for arc in arcs(table) if arc.trigger not in GATHERED]
    assert titles == [f"{arc.trigger.value}: {arc.source.value} to {arc.dest.value}" for arc in single]
    assert len(texts(root, "label")) == len(single) + len(
        {arc.trigger for arc in arcs(table)} & set(GATHERED)
    )


def test_svg_is_self_contained_and_knows_dark_grounds() -> None:
    drawing = svg()
    assert not re.search(r"(href|src|@import|url\()", drawing)
    assert "prefers-color-scheme:dark" in drawing


def test_svg_shows_counts_and_times_and_fades_what_was_never_taken() -> None:
    taken = next(arc for arc in arcs(TRAINING) if arc.trigger is Trigger.BACKWARD)
    halts = [arc for arc in arcs(TRAINING) if arc.trigger is Trigger.HALT]
    counts = {taken: 12_345, halts[0]: 2, halts[1]: 1}
    root = drawn(counts=counts, mean_ns={taken: 2.5e6, halts[0]: 1e3, halts[1]: 4e3})
    figures = texts(root, "figure")
    assert {"×12,345", "2.50 ms", "×3 · 2.00 µs"} <= set(figures)  # noqa: RUF001
    faded = [group for group in root.iter(f"{SPACE}g") if group.get("class") == "edge never"]
    assert len(faded) == len([arc for arc in arcs(TRAINING) if arc.trigger not in GATHERED]) - 1
    assert not texts(drawn(), "figure")


@tables
def test_labels_keep_clear_of_each_other_and_of_the_states(table: tuple[Row, ...]) -> None:
    """Boxes estimated at 7.6 units a letter; every arrow with large figures."""
    every = arcs(table)
    root = drawn(table, counts=dict.fromkeys(every, 99_999), mean_ns=dict.fromkeys(every, 999_000.0))
    boxes = []
    for text in root.iter(f"{SPACE}text"):
        words = "".join(text.itertext())
        width = 7.6 * len(words) * (0.85 if text.get("class") != "label" or len(words) > 12 else 1)
        x, y = float(text.get("x", "")), float(text.get("y", ""))
        left = {"middle": x - width / 2, "end": x - width}.get(text.get("text-anchor", ""), x)
        if text.get("class"):
            boxes.append((words, left, y - 10, left + width, y + 2))
    for group in root.iter(f"{SPACE}g"):
        if "node" in (group.get("class") or ""):
            rect = group[0]
            x, y, width, height = (float(rect.get(name, "")) for name in ("x", "y", "width", "height"))
            boxes.append(("".join(group.itertext()), x, y, x + width, y + height))
    for (one, *a), (other, *b) in itertools.combinations(boxes, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, (one, a, other, b)
    view = [float(number) for number in (root.get("viewBox") or "").split()]
    assert all(box[1] >= 0 and box[3] <= view[2] and box[2] >= 0 and box[4] <= view[3] for box in boxes)


def test_an_arc_without_a_route_of_its_own_is_drawn_straight() -> None:
    root = drawn((Row(Trigger.FETCH, (State.IDLE,), State.STEP),))
    assert "fetch: IDLE to STEP" in ElementTree.tostring(root, encoding="unicode")


@pytest.mark.parametrize(
    ("nanoseconds", "shown"),
    [
        (0, "0 ns"),
        (7.4, "7 ns"),
        (999.4, "999 ns"),
        (999.6, "1.00 µs"),
        (12_345, "12.3 µs"),
        (123_456, "123 µs"),
        (999_600, "1.00 ms"),
        (2.5e9, "2.50 s"),
        (1e13, "10,000 s"),
    ],
)
def test_times_are_shown_in_the_unit_that_fits(nanoseconds: float, shown: str) -> None:
    assert shown_time(nanoseconds) == shown


@given(st.floats(1, 9e11))
def test_shown_times_are_right_to_three_digits(nanoseconds: float) -> None:
    number, unit = shown_time(nanoseconds).replace(",", "").split()
    value = float(number) * {"ns": 1, "µs": 1e3, "ms": 1e6, "s": 1e9}[unit]
    assert value == pytest.approx(nanoseconds, rel=0.0051 if unit != "ns" else 0.51)
