"""The documentation, run: its code, its tables against what is on disk, its links, the command line's help.

`python tests/test_docs.py --write` writes docs/command-line.md and docs/machine.svg anew.
"""

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import migrations
import orchestrator
import states
import trainings
from orchestrator import attempt
from orchestrator.cli import main
from orchestrator.snapshot.encoding import decode, encode
from orchestrator.snapshot.storage import list_checkpoints
from states.diagram import svg
from tracking.outbox import Outbox
from tracking.runs import RunFolder
from tracking.shipper import sync

HERE = Path(__file__).parent.parent
DOCUMENTS = [HERE / "README.md", *sorted((HERE / "docs").rglob("*.md"))]
COMMAND_LINE = HERE / "docs" / "command-line.md"
MACHINE = HERE / "docs" / "machine.svg"
FORMATS = (HERE / "docs" / "formats.md").read_text()
TRACKING = (HERE / "docs" / "tracking.md").read_text()

# -- blocks of code --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block of a document.

    An HTML comment on the line before it says what it needs: `<!-- setup: NAME -->`, one of SETUPS; or
    `<!-- fragment: WHY -->`, that it is compiled only. `<!-- file: NAME -->`: it is saved under that name, and begins a
    page that is gone through as a reader does: `<!-- setup: continue -->` is what comes next there, Python with the
    names of the block before, or commands of a shell.
    """

    document: Path
    line: int
    language: str
    code: str
    setup: str
    fragment: bool
    file: str = ""

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"

    def run(self, namespace: dict[str, Any]) -> None:
        """Execute it; errors point into the document."""
        source = "\n" * self.line + self.code
        exec(compile(source, str(self.document), "exec"), namespace)


_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>setup|fragment|file): (?P<text>[^\n]+) -->\n)?"
    r"^```(?P<language>[\w-]*)\n(?P<code>.*?)^```$",
    re.S | re.M,
)


def blocks(*languages: str) -> list[Block]:
    found = []
    for document in DOCUMENTS:
        text = document.read_text()
        for match in _BLOCK.finditer(text):
            if match["language"] in languages:
                line = text.count("\n", 0, match.start("code"))
                setup = match["text"] if match["mark"] == "setup" else ""
                fragment = match["mark"] == "fragment"
                file = match["text"] if match["mark"] == "file" else ""
                found.append(Block(document, line, match["language"], match["code"], setup, fragment, file))
    return found


def page_of(document: Path) -> list[Block]:
    """The blocks of a page that is gone through as a reader does, in order."""
    every = blocks("python", "sh")
    return [b for b in every if b.document == document and (b.file or b.setup == "continue")]


PAGES = sorted({block.document for block in blocks("python", "sh") if block.file})


# -- what blocks take for granted ------------------------------------------------------------------

EVERYTHING = {name: getattr(orchestrator, name) for name in orchestrator.__all__} | {
    name: getattr(states, name) for name in states.__all__
}


def classification() -> dict[str, Any]:
    """A network of 64 inputs, its optimizer, loaders, and a trainer that has not started."""

    def loader() -> DataLoader[Any]:
        inputs = torch.randn(16, 64)
        return DataLoader(TensorDataset(inputs, inputs[:, :10].argmax(1)), batch_size=8)

    def build_model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))

    model, loss_fn, train_loader = build_model(), nn.CrossEntropyLoss(), loader()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = orchestrator.Trainer(model, optimizer, loss_fn, train_loader, epochs=2, log=None)
    return {**locals(), "val_loader": loader(), "test_loader": loader()}


def text() -> dict[str, Any]:
    """A model of token ids and an attention mask, and batches that are dicts."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 4)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return (self.embedding(input_ids) * attention_mask[..., None]).mean(1)

    model = Tagger()
    batch = {
        "input_ids": torch.randint(20, (3, 5)),
        "attention_mask": torch.ones(3, 5),
        "labels": torch.randint(4, (3,)),
    }
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "train_loader": [batch, batch],
    }


def gan() -> dict[str, Any]:
    """Two players and their optimizers."""
    gan = nn.ModuleDict({"generator": nn.Linear(2, 3), "discriminator": nn.Linear(3, 1)})
    discriminator, generator = gan["discriminator"], gan["generator"]

    def discriminate(model: nn.Module, batch: torch.Tensor) -> Any:
        return (discriminator(generator(torch.randn(4, 2)).detach()) - discriminator(batch)).mean()

    def generate(model: nn.Module, batch: torch.Tensor) -> Any:
        return -discriminator(generator(torch.randn(4, 2))).mean()

    return {
        **locals(),
        "d_optimizer": torch.optim.SGD(discriminator.parameters(), lr=0.1),
        "g_optimizer": torch.optim.SGD(generator.parameters(), lr=0.1),
        "train_loader": [torch.randn(4, 3), torch.randn(4, 3)],
    }


def with_run() -> dict[str, Any]:
    """`runs/digits-...`, and a model that its weights fit."""
    return {"model": trainings.network()}


def with_past() -> dict[str, Any]:
    """The same as `classification`, trained."""
    names = classification()
    names["trainer"].fit()
    return names


def replaying() -> dict[str, Any]:
    """What a script of `interlock replay` has."""
    return {"trainer": classification()["trainer"]}


def halting() -> dict[str, Any]:
    """A trainer that will halt on a NaN."""
    return {"trainer": trainings.make(Path("runs"), model=trainings.spoilt(lambda x: torch.log(x - x) * 0))}


SETUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "": classification,
    "text": text,
    "gan": gan,
    "migrating": migrations.classification,
    "hugging-face": migrations.text,
    "run": with_run,
    "backend": dict,
    "past": with_past,
    "script": replaying,
    "nan": halting,
}

RUN_NAME = "digits"


def make_run(root: Path) -> RunFolder:
    """A run of three attempts, the last of which went back behind rows of the second; one batch's loss is NaN."""
    inputs, targets = trainings.data().tensors
    inputs[10] = float("nan")
    options = {
        "train_loader": DataLoader(TensorDataset(inputs, targets), batch_size=8),
        "nonfinite": "skip",
        "name": RUN_NAME,
        "max_batches": 14,
        "checkpoint": orchestrator.Checkpointing(best="val/loss", every_batches=4, keep_last=9),
        "log": orchestrator.Logging("minimal", to="file"),
    }

    def trainer() -> orchestrator.Trainer:
        return trainings.make(root, val_loader=trainings.loader(), **options)

    with trainer() as first:
        first.advance(until=states.State.STEP)
        run = first.run
    assert run is not None
    with trainer() as second:
        second.start(run.id)
        while second.batches < 9:
            second.advance()
    behind = next(path for path in list_checkpoints(run.checkpoints) if "EPOCH_END" in path.name)
    trainer().fit(behind)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("docs") / "runs")


@pytest.fixture
def untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs stay here: starting MLflow for each block takes seconds, and delivery has tests of its own."""
    monkeypatch.setattr(attempt, "start_shipper", lambda run, tracker: None)


def test_every_block_is_found() -> None:
    fences = sum(document.read_text().count("\n```python\n") for document in DOCUMENTS)
    assert len(blocks("python")) == fences
    assert len(shell_lines()) >= 9
    assert blocks("sql")


# -- code runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block", [b for b in blocks("python") if not b.file and b.setup != "continue"], ids=str
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of schedulers that are made and not used
def test_python(
    block: Block, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untracked: None
) -> None:
    monkeypatch.chdir(run.path.parent.parent if block.setup == "run" else tmp_path)
    if block.fragment:
        compile(block.code, str(block.document), "exec")
        return
    namespace = EVERYTHING | {"torch": torch, "nn": nn, "DataLoader": DataLoader} | SETUPS[block.setup]()
    before = dict(namespace)
    try:
        block.run(namespace)
        use({name: value for name, value in namespace.items() if before.get(name) is not value}, before)
    finally:
        for value in namespace.values():
            if isinstance(value, orchestrator.Trainer):
                value.close()


def use(made: dict[str, Any], before: dict[str, Any]) -> None:
    """What a block has made must do what it is for: trainers train, with its callbacks and schedulers."""
    trainer = made.get("trainer")
    if trainer is None:
        is_callback = [isinstance(v, type) and issubclass(v, orchestrator.Callback) for v in made.values()]
        callbacks = [kind() for kind, is_it in zip(made.values(), is_callback, strict=True) if is_it]
        scheduler = made.get("scheduler")
        if not callbacks and scheduler is None:
            return
        names = ("model", "optimizer", "loss_fn", "train_loader", "val_loader")
        trainer = orchestrator.Trainer(
            *(before[name] for name in names), epochs=2, callbacks=callbacks, scheduler=scheduler, log=None
        )
    if trainer.state is states.State.IDLE:
        trainer.fit()
    assert trainer.state in (states.State.DONE, states.State.HALTED)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("document", PAGES, ids=lambda document: document.name)
def test_page_from_its_beginning_to_its_end(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    threads, modules = torch.get_num_threads(), set(sys.modules)
    try:
        for block in page_of(document):
            if block.file:
                Path(block.file).write_text(block.code)
            elif block.language == "sh":
                done = subprocess.run(["bash", "-e"], input=block.code, capture_output=True, text=True)
                assert done.returncode == 0, f"{block}: {done.stdout}{done.stderr}"
            else:
                block.run(namespace)
    finally:
        torch.set_num_threads(threads)
        for block in page_of(document):
            if (module := Path(block.file).stem) not in modules:
                sys.modules.pop(module, None)
        for value in namespace.values():
            if isinstance(value, orchestrator.Trainer):
                value.close()


def statements(code: str) -> Iterator[str]:
    yield from filter(None, map(str.strip, code.split(";")))


@pytest.mark.parametrize("block", blocks("sql"), ids=str)
def test_sql(block: Block, run: RunFolder) -> None:
    with closing(sqlite3.connect(f"{run.journal.as_uri()}?mode=ro", uri=True)) as journal:
        for statement in statements(block.code):
            assert journal.execute(statement).fetchall(), statement


def test_the_run_has_superseded_rows(run: RunFolder) -> None:
    """Otherwise what is said of them would not be tested."""
    with closing(sqlite3.connect(run.journal)) as journal:
        rule = """SELECT count(*), sum(superseded), sum(superseded != EXISTS (
                      SELECT 1 FROM attempts AS later
                      WHERE later.attempt > all_transitions.attempt AND later.position < seq))
                  FROM all_transitions"""
        rows, superseded, otherwise = journal.execute(rule).fetchone()
    assert 0 < superseded < rows
    assert otherwise == 0


def shell_lines() -> list[tuple[str, str]]:
    found = []
    for block in blocks("", "sh"):
        for line in block.code.splitlines():
            if line.startswith("interlock "):
                found.append((str(block), line.partition("#")[0]))
    return found


@pytest.mark.parametrize(("where", "line"), shell_lines())
def test_commands_and_their_options_exist(where: str, line: str) -> None:
    name, *words = line.split()[1:]
    command = main.get_command(click.Context(main), name)
    assert command is not None, where
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known, where


# -- tables are what is on disk --------------------------------------------------------------------


def table_after(text: str, heading: str, column: int = 0) -> list[str]:
    """The names in backticks in a column of the first table after a line."""
    lines = text[text.index(f"\n{heading}\n") :].splitlines()[2:]
    start = next(number for number, line in enumerate(lines) if line.startswith("|--"))
    cells = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        cells += re.findall(r"`([^`]+)`", line.split("|")[1 + column])
    return cells


@pytest.mark.parametrize("name", ["transitions", "metrics", "attempts", "checkpoints", "logs"])
def test_columns_of_the_journal(name: str, run: RunFolder) -> None:
    with closing(sqlite3.connect(run.journal)) as journal:
        columns = [row[1] for row in journal.execute(f"PRAGMA table_info({name})")]
        every = [row[1] for row in journal.execute(f"PRAGMA table_info(all_{name})")]
    documented = table_after(FORMATS, f"### `{name}`")
    assert sorted(documented) == sorted(columns)
    if every:
        assert sorted(documented + table_after(FORMATS, f"### `all_{name}`")) == sorted(every)


def test_tables_of_the_journal(run: RunFolder) -> None:
    with closing(sqlite3.connect(run.journal)) as journal:
        found = {name for (name,) in journal.execute("SELECT name FROM sqlite_master WHERE sql NOT NULL")}
        about = dict(journal.execute("SELECT key, value FROM run"))
    assert {name for name in found if f"`{name}`" not in FORMATS} == set()
    assert about.keys() == {"id", "name", "created_ns", "format"}
    assert about["format"] == "3"


def test_files_of_a_run(run: RunFolder) -> None:
    documented = {name.rstrip("/") for name in table_after(FORMATS, "## The run's folder")}
    assert {path.name for path in run.path.iterdir()} <= documented
    assert json.loads(run.command.read_text()).keys() == {"argv", "executable", "cwd"}
    assert run.command.stat().st_mode & 0o777 == 0o600


def test_tables_of_the_outbox(tmp_path: Path) -> None:
    Outbox.open(tmp_path / "outbox.sqlite").close()
    with closing(sqlite3.connect(tmp_path / "outbox.sqlite")) as outbox:
        tables = [name for (name,) in outbox.execute("SELECT name FROM sqlite_master WHERE sql NOT NULL")]
        columns = [row[1] for name in tables for row in outbox.execute(f"PRAGMA table_info({name})")]
    assert sorted(table_after(FORMATS, "## outbox.sqlite")) == sorted(tables)
    assert sorted(table_after(FORMATS, "## outbox.sqlite", 1)) == sorted(columns)


def test_files_and_fields_of_a_checkpoint(run: RunFolder) -> None:
    newest = list_checkpoints(run.checkpoints)[0]
    manifest = json.loads((newest / "manifest.json").read_text())
    tree = json.loads((newest / "state.json").read_text())["tree"]
    assert sorted(table_after(FORMATS, "## Checkpoints")) == sorted(path.name for path in newest.iterdir())
    assert set(table_after(FORMATS, "### `manifest.json`")) == manifest.keys()
    assert set(table_after(FORMATS, "### `state.json`")) == tree.keys()


def test_tags_of_the_encoding() -> None:
    from orchestrator.snapshot.encoding import _DECODERS

    lines = FORMATS[FORMATS.index("| `$` |") :].partition("\n\n")[0].splitlines()[2:]
    documented = [tag for line in lines for tag in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(documented) == sorted(_DECODERS)
    # The examples of the table: what is not JSON's own comes back, and says its tag.
    for value, tag in [(2**70, "int"), (float("-inf"), "float"), ({1: 2}, "dict"), (np.float32(1), "scalar")]:
        encoded = encode(value)
        assert encoded.document["$"] == tag
        assert decode(encoded.document, {}) == value


# -- a backend of one's own, through the real shipper -----------------------------------------------


def test_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [block for block in blocks("python") if block.setup == "backend"]
    (tmp_path / "json_lines.py").write_text(block.code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    from json_lines import JsonLines

    run = make_run(tmp_path / "runs")
    assert isinstance(JsonLines("there"), orchestrator.Tracker)
    report = sync(run, tracker=JsonLines(str(tmp_path / "there")), timeout=20)
    assert report.complete, report
    assert sync(run, timeout=20).points_delivered == 0

    delivered = tmp_path / "there" / run.id
    lines = [json.loads(line) for line in (delivered / "lines.jsonl").read_text().splitlines()]
    points = [(p["key"], p["step"]) for line in lines for p in line.get("points", [])]
    assert len(points) == len(set(points)) == report.points_delivered > 0
    assert {key.partition("/")[0] for key, _ in points} == {"batch", "train", "val"}
    assert [line["status"] for line in lines if "status" in line] == ["finished"]
    tags = {re.sub(r"attempt\.\d+", "attempt.N", tag) for line in lines for tag in line.get("tags", {})}
    assert tags <= set(table_after(TRACKING, "**Tags**:"))
    assert "interlock.checkpoint.best" in tags
    (params,) = [line["params"] for line in lines if "params" in line]
    documented = set(table_after(TRACKING, "**Parameters**: those of the first attempt."))
    assert {name for name in params if not name.startswith("optimizer.")} <= documented
    assert (delivered / "transitions.jsonl.gz").is_file()
    uploaded = {path.name for path in (delivered / "checkpoints").iterdir()}
    assert list_checkpoints(run.checkpoints)[0].name in uploaded
    # The files that only a run with a tracker has.
    files = {name.rstrip("/") for name in table_after(FORMATS, "## The run's folder")}
    assert {path.name for path in run.path.iterdir()} <= files


# -- links, names, the command line ------------------------------------------------------------------


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = document.parent / path if path else document
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_public_names_are_documented() -> None:
    words = set(re.findall(r"\w+", "".join(d.read_text() for d in DOCUMENTS if d.parent.name == "docs")))
    assert {*orchestrator.__all__, *states.__all__} - words == set()


HELP = "<!-- What follows is printed by `interlock COMMAND --help`: python tests/test_docs.py --write -->"


def command_line() -> str:
    """docs/command-line.md: what is written there by hand, then what the commands say of themselves."""
    parts = [COMMAND_LINE.read_text().partition(f"\n{HELP}\n")[0], HELP, ""]
    for name in ("", *main.list_commands(click.Context(main))):
        result = CliRunner().invoke(
            main, [name, "--help"] if name else ["--help"], prog_name="interlock", terminal_width=100
        )
        assert result.exit_code == 0, result.output
        help_text = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
        parts.append(f"## {f'interlock {name}'.strip()}\n\n```text\n{help_text}\n```\n")
    return "\n".join(parts)


def test_exit_statuses_of_every_command() -> None:
    told = table_after(COMMAND_LINE.read_text(), "## Exit status")
    assert told == main.list_commands(click.Context(main))


def test_command_line() -> None:
    assert COMMAND_LINE.read_text() == command_line(), "run: python tests/test_docs.py --write"


def test_drawing_of_the_machine() -> None:
    assert MACHINE.read_text() == svg(), "run: python tests/test_docs.py --write"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_docs.py --write")
    COMMAND_LINE.write_text(command_line())
    MACHINE.write_text(svg())
    print(f"written: {COMMAND_LINE}, {MACHINE}")
