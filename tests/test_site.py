"""The documentation as a site: every page is in its menu, every public name has an entry that says all of it.

mkdocs itself is not needed here; `make docs` builds the site, strictly.
"""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import orchestrator
import states
from states.table import TRAINING, State, Trigger
from tracking.runs import RunFolder

HERE = Path(__file__).parent.parent
DOCS = HERE / "docs"
ENTRIES = re.findall(
    r"^::: (\S+)$", "".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.md"))), re.M
)
SPACE = "{http://www.w3.org/2000/svg}"


def test_every_page_is_in_the_menu_once() -> None:
    menu = (HERE / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\n\n")[0]
    listed = re.findall(r"([\w/-]+\.md)$", menu, re.M)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_every_public_name_has_an_entry() -> None:
    assert len(ENTRIES) == len(set(ENTRIES))
    of_orchestrator = {f"orchestrator.{name}" for name in orchestrator.__all__}
    of_states = {f"states.{name}" for name in states.__all__ if name not in orchestrator.__all__}
    assert of_orchestrator | of_states <= set(ENTRIES)


def found(entry: str) -> Any:
    module, _, name = entry.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


OBJECTS = {entry: found(entry) for entry in ENTRIES}
DESCRIBED = [entry for entry, thing in OBJECTS.items() if inspect.isclass(thing) or inspect.isfunction(thing)]


def source_docs(kind: type) -> set[str]:
    """The attributes of a class that have a string of their own below them."""
    lines = inspect.getsource(kind)
    return set(re.findall(r"^    (\w+)[:=\s][^\n]*\n    \"\"\"", lines, re.M))


@pytest.mark.parametrize("entry", DESCRIBED)
def test_entries_describe_what_they_take(entry: str) -> None:
    """Each argument, field and public method is described: as one of `Args`, in words, or by a string of its own.

    Of what lies behind the names of `orchestrator` and `states`, in `tracking`, only that it has a docstring.
    """
    thing = OBJECTS[entry]
    doc = inspect.getdoc(thing)
    assert doc, entry
    if entry.startswith("tracking."):
        return
    if inspect.isfunction(thing):
        wanted = set(inspect.signature(thing).parameters)
        assert {name for name in wanted if not re.search(rf"\b{name}\b", doc)} == set()
        return
    fields = {f.name for f in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
    if not fields and "__init__" in vars(thing) and not issubclass(thing, BaseException):
        fields = {
            name
            for name, parameter in inspect.signature(thing).parameters.items()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        }
    methods = {
        name: value
        for name, value in vars(thing).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
    }
    if issubclass(thing, State | Trigger):
        fields = {member.name for member in thing}
    said = source_docs(thing)
    assert {name for name in fields - said if not re.search(rf"\b{name}\b", doc)} == set()
    assert {name for name, value in methods.items() if not inspect.getdoc(value)} == set()


def test_table_of_the_machine() -> None:
    """docs/architecture.md shows the table that machines are built from."""
    text = (DOCS / "architecture.md").read_text()
    shown = {}
    for line in text[text.index("| trigger | from | to |") :].splitlines()[2:]:
        if not line.startswith("|"):
            break
        trigger, sources, dest = (cell.strip() for cell in line.split("|")[1:4])
        shown[trigger] = (set(re.findall(r"\b[A-Z_]{4,}\b", sources)), dest)
    live = {state.value for state in State} - {"DONE", "HALTED"}
    assert shown.keys() == {trigger.value for trigger in Trigger}
    for row in TRAINING:
        sources, dest = shown[row.trigger.value]
        if row.trigger is Trigger.HALT:
            assert live == {state.value for state in row.sources}
        elif row.trigger is not Trigger.RESUME:
            evaluation = {"FORWARD"} if row.trigger is Trigger.END_BATCH else set()
            assert (sources - evaluation, dest) == ({state.value for state in row.sources}, row.dest.value)


def words_in(drawing: str, kind: str) -> list[str]:
    root = ElementTree.parse(DOCS / drawing).getroot()
    texts = root.iter(f"{SPACE}text")
    return ["".join(text.itertext()) for text in texts if kind in (text.get("class") or "").split()]


def test_drawings_name_what_there_is(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    files = {name for name in words_in("components.svg", "code") if "→" not in name}
    assert files == {
        folder.journal.name,
        folder.recorder.name,
        f"{folder.checkpoints.name}/",
        folder.outbox.name,
    }
    code = "".join(path.read_text() for path in (HERE / "orchestrator").glob("*.py"))
    for drawing in ("components.svg", "batch.svg"):
        for name in words_in(drawing, "name"):
            if re.fullmatch(r"([A-Z][a-z]+)+", name):
                assert f"class {name}" in code, name
    batch = next(note for note in words_in("batch.svg", "note") if "→ backward →" in note)
    assert re.findall(r"\w+", batch.partition(": ")[2]) == [
        "fetch",
        "forward",
        "backward",
        "step",
        "end_batch",
    ]
