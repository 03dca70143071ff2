"""`interlock timeline --trace`: the file follows the rules of the Trace Event Format, and has the journal's numbers."""

import gzip
import json
from collections import defaultdict
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from orchestrator.cli import main
from states.table import Trigger
from tracking.journal import TRAIN, Journal, Transition
from tracking.runs import RunFolder, find_run
from trainings import loader, make, spoilt

PHASES = {"X", "C", "i", "M"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Validated, failed and resumed, so that batches are done twice; a step is skipped for a NaN."""
    root = tmp_path_factory.mktemp("runs")
    options: dict[str, Any] = {
        "model": lambda: spoilt(lambda inputs: inputs * float("nan"), batch=3),
        "nonfinite": "skip",
        "val_loader": {"held": loader(shuffle=False)},
        "epochs": 2,
    }
    trainer = make(root, **options)

    @trainer.before(Trigger.STEP)
    def fail_in_the_second_epoch() -> None:
        if (trainer.epoch, trainer.batch) == (1, 3):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    make(root, **options).fit(resume="auto")
    return find_run("test", root)


def trace(run: RunFolder, file: Path, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["timeline", str(run.path), "--trace", str(file), *options])
    assert result.exit_code == 0, result.output
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    found = json.loads(data, parse_float=Decimal, parse_constant=pytest.fail)
    assert isinstance(found, dict)
    return found


def epochs(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event.get("cat") == "epoch"]


def journaled(run: RunFolder) -> list[Transition]:
    with Journal.open(run) as journal:
        return list(journal.transitions(include_superseded=True))


def check_the_format(events: list[dict[str, Any]]) -> None:
    """The rules for the kinds of events that are used."""
    named: dict[str, set[Any]] = {"process_name": set(), "thread_name": set()}
    slices: dict[tuple[int, int], list[tuple[Decimal, Decimal]]] = defaultdict(list)
    for event in events:
        assert event["ph"] in PHASES
        assert isinstance(event["name"], str)
        assert event["name"]
        assert isinstance(event["pid"], int)
        assert isinstance(event.get("args", {}), dict)
        assert Decimal(event["ts"]) >= 0
        match event["ph"]:
            case "X":
                assert event["dur"] >= 0
                slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
            case "C":
                assert event["args"]
                assert all(isinstance(value, Decimal | int) for value in event["args"].values())
            case "i":
                assert event["s"] in ("g", "p", "t")
            case "M":
                assert set(event["args"]) <= {"name", "sort_index"}
                if event["name"] in named:
                    key = event["pid"] if event["name"] == "process_name" else (event["pid"], event["tid"])
                    assert key not in named[event["name"]]
                    named[event["name"]].add(key)
    assert slices.keys() <= named["thread_name"]
    assert {event["pid"] for event in events} <= named["process_name"]
    for spans in slices.values():
        inside: list[Decimal] = []  # ends of the slices that are open
        for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while inside and inside[-1] <= begin:
                inside.pop()
            assert not inside or end <= inside[-1], "slices of a thread lie within each other, or apart"
            inside.append(end)


def test_it_follows_the_format_and_has_every_transition(run: RunFolder, tmp_path: Path) -> None:
    found = trace(run, tmp_path / "trace.json")
    assert found["displayTimeUnit"] in ("ms", "ns")
    events = found["traceEvents"]
    check_the_format(events)
    rows = journaled(run)
    made = {event["args"]["seq"]: event for event in events if event["ph"] == "X" and "seq" in event["args"]}
    assert len(made) == len(rows)
    first = rows[0]
    begin = made[first.seq]["ts"] * 1000 + first.duration_ns - first.time_ns
    for row in rows:
        event = made[row.seq]
        assert (event["name"], event["pid"]) == (row.trigger.value, row.attempt)
        assert (event["args"]["epoch"], event["args"]["batch"]) == (row.epoch, row.batch)
        assert event["dur"] * 1000 == row.duration_ns
        assert event["ts"] * 1000 + event["dur"] * 1000 - row.time_ns == begin
        assert (event["cat"] == "superseded") == row.superseded
    assert any(row.superseded for row in rows)


def test_losses_epochs_saves_halts_resumes_and_skips(run: RunFolder, tmp_path: Path) -> None:
    events = trace(run, tmp_path / "trace.json.gz")["traceEvents"]
    rows = [row for row in journaled(run) if row.scope == TRAIN]
    counted = [float(event["args"]["value"]) for event in events if event["ph"] == "C"]
    finite = [row.loss for row in rows if row.loss is not None and row.loss == row.loss]
    assert counted == finite
    assert len(finite) < sum(row.trigger is Trigger.FORWARD for row in rows)  # one was NaN
    instants = [event["name"] for event in events if event["ph"] == "i"]
    with Journal.open(run) as journal:
        saves = journal.checkpoints(include_removed=True, include_superseded=True)
    assert instants.count("saved") == len(saves)
    for trigger in (Trigger.HALT, Trigger.RESUME):
        assert instants.count(trigger.value) == sum(row.trigger is trigger for row in rows) > 0
    assert instants.count("skipped") == sum(row.note.startswith("skipped") for row in rows) > 0
    assert {event["tid"] for event in epochs(events)} == {1, 2}  # the main thread of each process
    threads = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert threads == {"training", "validation held"}
    assert [(event["pid"], event["name"]) for event in epochs(events)] == [
        (1, "epoch 0"),
        (1, "epoch 1"),
        (2, "epoch 1"),
    ]


def test_only_some_epochs(run: RunFolder, tmp_path: Path) -> None:
    rows = journaled(run)
    for asked, wanted in (("1", {1}), ("0-1", {0, 1}), ("7", set())):
        events = trace(run, tmp_path / "trace.json", "--epoch", asked)["traceEvents"]
        check_the_format(events)
        seqs = {event["args"]["seq"] for event in events if event["ph"] == "X" and "seq" in event["args"]}
        assert seqs == {row.seq for row in rows if row.epoch in wanted}


def test_what_is_written_where(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def files(*options: str, code: int = 0) -> set[str]:
        for file in tmp_path.iterdir():
            file.unlink()
        result = CliRunner().invoke(main, ["timeline", str(run.path), *options])
        assert result.exit_code == code, result.output
        if "--json" in options:
            said = json.loads(result.stdout)
            assert {said.get("page"), said.get("trace")} - {None} == {f.name for f in tmp_path.iterdir()}
        return {file.name for file in tmp_path.iterdir()}

    assert files() == {"timeline.html"}
    assert files("--json") == {"timeline.html"}
    assert files("--trace", "t.json", "--json") == {"t.json"}
    assert files("--trace", "t.json", "-o", "p.html") == {"t.json", "p.html"}
    assert files("--epoch", "1", code=2) == set()
    assert files("--trace", "t.json", "--epoch", "2-1", code=2) == set()
    assert files("--trace", "nowhere/t.json", code=1) == set()
