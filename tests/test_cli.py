"""The `interlock` command, over journals written by the real writer, and over children that are really killed."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

import tracking
import trainings
from mlflow_server import Database
from orchestrator.cli import main
from states.table import State, Trigger
from tracking.journal import CheckpointRow, Journal, JournalWriter, Parent
from tracking.mlflow_delivery import MLflow
from tracking.recorder import Recorder
from tracking.runs import Lease, RunFolder, create_run
from tracking.shipper import start_shipper
from walk import BATCH, Walk, begin

HERE = Path(tracking.__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE / "tests")])}
COMMANDS = [
    *("runs", "show", "watch", "log", "check", "diff", "diagram", "timeline", "curves"),
    *("resume", "seek", "replay", "blame", "sync", "doctor"),
]


def interlock(*arguments: object, root: Path | None = None, code: int = 0, **options: Any) -> Result:
    """Run a command in this process; its exit status must be `code`."""
    words = [*(["--root", root] if root else []), *arguments]
    result = CliRunner().invoke(main, list(map(str, words)), **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@contextmanager
def process(*command: object, **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """A child of this interpreter, killed at the end."""
    words = [sys.executable, *map(str, command)]
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": ENVIRONMENT,
        **options,
    }
    with subprocess.Popen(words, **pipes) as child:
        try:
            yield child
        finally:
            child.kill()


def validate(recorder: Recorder, training: Walk) -> None:
    """A pass of two batches over the validation loader, in the middle of the training's `end_epoch`."""
    walk = Walk(recorder, scope=1)
    walk.epoch = training.epoch - 1
    walk.go(Trigger.BEGIN_EPOCH)
    for _ in range(2):
        walk.go(Trigger.FETCH)
        walk.go(Trigger.FORWARD, loss=0.25)
        walk.go(Trigger.END_BATCH)
    walk.go(Trigger.END_EPOCH)
    walk.go(Trigger.FINISH)


def epoch(walk: Walk, writer: JournalWriter, batches: int = 3) -> int:
    """An epoch with its metrics and validation; the seq of its `end_epoch`."""
    walk.go(Trigger.BEGIN_EPOCH)
    for _ in range(batches):
        for trigger in BATCH:
            seq = walk.go(trigger, loss=0.5 if trigger is Trigger.FORWARD else float("nan"))
        done = walk.epoch * batches + walk.batch + 1
        writer.metrics("train", walk.epoch, walk.batch, done, {"loss": 0.5, "batch_time": 0.01}, 1, seq=seq)
    validate(walk.recorder, walk)
    seq = walk.go(Trigger.END_EPOCH)
    writer.metrics(
        "train", walk.epoch, -1, walk.epoch, {"loss": 0.75 - walk.epoch / 4, "lr": 0.1}, 1, seq=seq
    )
    writer.metrics("validation/val", walk.epoch, -1, walk.epoch, {"loss": 1.5, "accuracy": 0.875}, 1, seq=seq)
    return seq


def stopped(root: Path, name: str = "digits") -> tuple[RunFolder, int]:
    """A run halted in its second epoch, and the seq at which its first ended."""
    run = create_run(root, name)
    with Lease.acquire(run) as lease:
        recorder, writer = begin(run, lease)
        with writer:
            walk = Walk(recorder)
            position = epoch(walk, writer)
            walk.go(Trigger.BEGIN_EPOCH)
            for trigger in BATCH:
                walk.go(trigger)
            walk.go(Trigger.HALT, note="signal SIGTERM")
            writer.end("stopped", "signal SIGTERM")
    return run, position


def done(root: Path, name: str = "digits") -> RunFolder:
    """A run of two epochs: halted in the second, resumed at the end of the first, DONE."""
    run, position = stopped(root, name)
    with Lease.acquire(run) as lease:
        recorder, writer = begin(run, lease, position)
        with writer:
            walk = Walk(recorder, State.HALTED)
            walk.epoch, walk.batch = 0, 2
            walk.go(Trigger.RESUME, State.EPOCH_END)
            epoch(walk, writer)
            walk.go(Trigger.FINISH)
            writer.end("done", "finished")
    return run


REACHED = (State.BATCH_START, State.FORWARD, State.BACKWARD, State.STEP, State.BATCH_END)


def branch(root: Path, parent: RunFolder, state: State = State.FORWARD, *, kept: bool = True) -> RunFolder:
    """A run that goes on from epoch 2, batch 113 of `parent`, halts, and goes on from its HALTED to DONE.

    `kept`: whether its journal says that it is a branch.
    """
    link = Parent(parent.id, str(parent.path), 1234, "00001234-a1", "branch")
    run = create_run(root, "branch", link if kept else None)
    with Lease.acquire(run) as lease:
        recorder, writer = begin(run, lease)
        with writer:
            walk = Walk(recorder)
            walk.go(Trigger.HALT, note=f"branched from {parent.id}")
            walk.epoch, walk.batch = 2, 113
            walk.go(Trigger.RESUME, state, note="from 00001234-a1")
            if state is not State.EPOCH_END:
                for trigger in BATCH[REACHED.index(state) + 1 :]:
                    walk.go(trigger)
            position = walk.go(Trigger.HALT, note="signal SIGTERM")
            writer.end("stopped", "signal SIGTERM")
        epoch, batch, stood = walk.epoch, walk.batch, walk.recorded[-1].source
        recorder, writer = begin(run, lease, position)
        with writer:
            walk = Walk(recorder, State.HALTED)
            walk.epoch, walk.batch = epoch, batch
            walk.go(Trigger.RESUME, stood)
            if stood is State.BATCH_END:
                for trigger in BATCH:
                    walk.go(trigger)
                walk.go(Trigger.END_EPOCH)
            walk.epochs(1, 2)
            walk.go(Trigger.FINISH)
            writer.end("done", "finished")
    return run


def change(run: RunFolder, sql: str) -> None:
    """What somebody with an SQLite shell could do."""
    connection = sqlite3.connect(run.journal)
    with connection:
        assert connection.execute(sql).rowcount > 0
    connection.close()


# -- help, errors, colours ---------------------------------------------------------------------------


def test_help_tells_of_every_command() -> None:
    text = interlock("--help").output
    for command in COMMANDS:
        assert f"\n  {command} " in text
        assert "Example:\n    interlock " in interlock(command, "--help").output


def test_version() -> None:
    assert interlock("--version").output.startswith("interlock")


def test_errors_are_one_message(tmp_path: Path) -> None:
    done(tmp_path)
    message = interlock("show", "digit", root=tmp_path, code=1).output
    assert message.startswith("Error: no run 'digit' in ")
    assert "there is digits" in message
    assert message.count("\n") == 1
    assert "Missing argument 'RUN'" in interlock("show", code=2).output
    mistyped = interlock("shwo", code=2).output
    assert (
        "No such command 'shwo'. Did you mean 'show'? Expected one of launch, runs, show, watch" in mistyped
    )
    nothing = interlock("log", "digits", "--epoch", "99", root=tmp_path).output
    assert "has no such transition; `interlock show digits-" in nothing
    assert "--state" in interlock("log", "digits", "--state", "nowhere", root=tmp_path, code=2).output


def test_a_file_that_is_no_journal(tmp_path: Path) -> None:
    run = done(tmp_path)
    run.journal.write_bytes(b"nothing of the kind" * 1000)
    assert "no journal" in interlock("show", "digits", root=tmp_path, code=1).output
    assert "WRONG" in interlock("check", "digits", root=tmp_path, code=1).output
    assert "unreadable" in interlock("runs", root=tmp_path).output


def test_root_before_and_after_the_command(tmp_path: Path) -> None:
    run = done(tmp_path)
    for words in (
        ["--root", tmp_path, "show", "digits"],
        ["show", "--root", tmp_path, run.id],
        ["show", run.path],
    ):
        assert interlock(*words).output.startswith(run.id)


def test_colours_only_where_they_are_seen(tmp_path: Path) -> None:
    done(tmp_path)
    assert "\x1b[" in interlock("runs", root=tmp_path, color=True).output
    assert "\x1b[" not in interlock("runs", root=tmp_path, color=True, env={"NO_COLOR": "1"}).output
    assert "\x1b[" not in interlock("show", "digits", root=tmp_path).output


def test_needs_neither_torch_nor_mlflow(tmp_path: Path) -> None:
    run, other = done(tmp_path), done(tmp_path)
    script = """
import sys
from orchestrator.cli import main
root, run, other = sys.argv[1:]
for command in (["runs"], ["show", run], ["watch", run], ["log", run], ["diagram", run], ["diff", run, other]):
    main(["--root", root, *command], standalone_mode=False)
    assert not {"torch", "mlflow", "numpy"} & sys.modules.keys(), command
"""
    with process("-c", script, tmp_path, run.path, other.path) as child:
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors


def test_json_is_json_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = done(tmp_path), done(tmp_path, "other")
    monkeypatch.chdir(tmp_path)
    for words in (
        *(
            ["runs"],
            ["show", run.path],
            ["watch", run.path],
            ["check", run.path],
            ["diff", run.path, other.path],
        ),
        *(
            ["diagram"],
            ["diagram", run.path],
            ["timeline", run.path],
            ["curves", run.path],
            ["sync", "--all"],
        ),
    ):
        json.loads(interlock(*words, "--json", root=tmp_path).stdout)
    for line in interlock("log", run.path, "--json").stdout.splitlines():
        json.loads(line)


def test_what_check_and_diagram_have_for_programs(tmp_path: Path) -> None:
    run = done(tmp_path)
    found = json.loads(interlock("check", run.path, "--json").stdout)
    assert (found["run"], found["wrong"]) == (run.id, 0)
    assert all(finding["good"] for finding in found["findings"])
    with closing(sqlite3.connect(run.journal)) as journal:
        journal.execute("UPDATE packed_transitions SET epoch = 7 WHERE seq = 2")
        journal.commit()
        steps = journal.execute("SELECT count(*) FROM transitions WHERE trigger = 'step'").fetchone()[0]
    found = json.loads(interlock("check", run.path, "--json", code=1).stdout)
    assert found["wrong"] == sum(not finding["good"] for finding in found["findings"]) > 0
    arcs = json.loads(interlock("diagram", run.path, "--json").stdout)
    assert sum(arc["count"] for arc in arcs if arc["trigger"] == "step") == steps
    assert {arc["mean_ns"] is None for arc in arcs if not arc["count"]} == {True}


# -- runs and show -----------------------------------------------------------------------------------


def test_runs(tmp_path: Path) -> None:
    older, newer = done(tmp_path, "first"), stopped(tmp_path, "second")[0]
    header, *lines = interlock("runs", root=tmp_path).output.splitlines()
    assert header.split() == ["RUN", "STATE", "ATTEMPTS", "EPOCHS", "BATCHES", "LOSS", "VALIDATION", "BEGUN"]
    assert lines[0].split()[:6] == [newer.id, "HALTED,", "stopped", "1", "1", "3"]
    assert lines[1].split()[:8] == [older.id, "DONE", "2", "2", "6", "0.5", "val/accuracy", "0.875"]
    second, first = json.loads(interlock("runs", "--json", root=tmp_path).stdout)
    assert (second["id"], second["state"], second["outcome"], second["kind"]) == (
        *(newer.id, "HALTED", "stopped"),
        "ended",
    )
    assert (first["epochs"], first["batches"], first["attempts"], first["loss"]) == (2, 6, 2, 0.5)


def test_no_runs_yet(tmp_path: Path) -> None:
    assert "no runs" in interlock("runs", root=tmp_path / "none").stderr
    assert json.loads(interlock("runs", "--json", root=tmp_path / "none").stdout) == []


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    run = create_run(tmp_path, "digits")
    assert "nothing has begun yet" in interlock("show", "digits", root=tmp_path).output
    assert interlock("log", "digits", root=tmp_path).output == ""
    assert "all is well" in interlock("check", "digits", root=tmp_path).output
    assert f"{run.id}  new " in interlock("runs", root=tmp_path).output


def test_show(tmp_path: Path) -> None:
    run = done(tmp_path)
    text = interlock("show", "digits", root=tmp_path).output
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == run.id
    assert "state DONE: finished" in lines
    assert "done 2 epochs, 6 batches" in lines
    assert any(line.startswith("1 ") and "stopped the beginning signal SIGTERM" in line for line in lines)
    assert any(
        line.startswith("2 ") and "done EPOCH_END at epoch 0, batch 2 finished" in line for line in lines
    )
    at = lines.index("Metrics of epoch 1")
    assert lines[at + 1 : at + 5] == ["metric train val", "loss 0.5 1.5", "lr 0.1 -", "accuracy - 0.875"]


def test_validations_come_in_the_order_of_their_loaders(tmp_path: Path) -> None:
    loaders = {"val": trainings.loader(16), "again": trainings.loader(16)}
    trainings.make(tmp_path, epochs=1, val_loader=loaders).fit()
    assert " val/loss " in interlock("runs", root=tmp_path).output
    heads = [line.split() for line in interlock("show", "test", root=tmp_path).output.splitlines()]
    assert ["metric", "train", "val", "again"] in heads


def test_where_a_run_comes_from(tmp_path: Path) -> None:
    mother = done(tmp_path, "mother")
    alone = interlock("runs", root=tmp_path).output
    assert "ORIGIN" not in alone
    child = branch(tmp_path, mother)
    said = f"branched from {mother.id} at epoch 2, batch 113 (FORWARD)"
    assert f"origin   {said}" in interlock("show", child.id, root=tmp_path).output
    assert "origin " not in interlock("show", mother.id, root=tmp_path).output
    header, newest, oldest = interlock("runs", root=tmp_path).output.splitlines()
    assert header.split()[-1] == "ORIGIN"
    assert newest.endswith(said)
    assert oldest.endswith(("ago", "now"))
    origin = json.loads(interlock("show", child.id, "--json", root=tmp_path).stdout)["origin"]
    assert origin["parent"]["seq"] == 1234
    assert origin["place"] == {"epoch": 2, "batch": 113, "state": "FORWARD"}
    found = json.loads(interlock("runs", "--json", root=tmp_path).stdout)
    assert [line["origin"] for line in found] == [origin, None]
    warm = create_run(tmp_path, "warm", Parent(mother.id, str(mother.path), None, "x", "warm start"))
    assert f"warm start from {mother.id}\n" in interlock("show", warm.id, root=tmp_path).output
    begun = create_run(tmp_path, "begun", Parent(mother.id, str(mother.path), 9, "x", "branch"))
    assert f"branched from {mother.id}\n" in interlock("show", begun.id, root=tmp_path).output


def test_what_failed_on_a_nan_is_to_be_blamed(tmp_path: Path) -> None:
    run, position = stopped(tmp_path)
    assert "interlock blame" not in interlock("show", "digits", root=tmp_path).output
    with Lease.acquire(run) as lease:
        recorder, writer = begin(run, lease, position)
        with writer:
            Walk(recorder, State.HALTED).go(Trigger.RESUME, State.EPOCH_END)
            writer.end("failed", "non-finite loss", "NonFiniteError: non-finite loss in epoch 1, batch 0")
    text = " ".join(interlock("show", "digits", root=tmp_path).output.split())
    assert f"interlock blame {tmp_path / run.id} name the module" in text


def test_show_for_programs(tmp_path: Path) -> None:
    run, _ = stopped(tmp_path)
    found = json.loads(interlock("show", "digits", "--json", root=tmp_path).stdout)
    assert (found["id"], found["kind"], found["state"], found["epoch"], found["batch"]) == (
        *(run.id, "ended", "HALTED"),
        *(1, 0),
    )
    assert found["attempts"][0]["outcome"] == "stopped"
    assert found["metrics"][1]["values"] == {"loss": 1.5, "accuracy": 0.875}


def test_checkpoints_are_shown(tmp_path: Path) -> None:
    run, position = stopped(tmp_path)
    with Lease.acquire(run) as lease:
        recorder, writer = begin(run, lease, position)
        with writer:
            for number in range(6):
                row = CheckpointRow(
                    f"number{number}", position, 0, 2, State.EPOCH_END, 1_234_567, 1, metrics={"loss": 0.5}
                )
                writer.checkpoint(row)
                if number < 5:
                    writer.checkpoint_removed(f"number{number}")
            (run.checkpoints / "number5").mkdir()
            Walk(recorder, State.HALTED).go(Trigger.RESUME, State.EPOCH_END)
    text = interlock("show", "digits", root=tmp_path).output
    assert "number5  1.2 MB  kept     loss 0.5" in text
    assert "number4  1.2 MB  removed  loss 0.5" in text
    assert "and 2 more that retention removed" in text
    assert "number0" not in text
    assert "number1" not in text


# -- log ---------------------------------------------------------------------------------------------


def test_log_has_a_line_for_each_transition(tmp_path: Path) -> None:
    run = done(tmp_path)
    header, *lines = interlock("log", "digits", root=tmp_path).output.splitlines()
    with Journal.open(run) as journal:
        rows = list(journal.transitions())
    assert header.split()[0] == "seq"
    assert [int(line.split()[0]) for line in lines] == [row.seq for row in rows]
    assert "BATCH_START → FORWARD (forward)" in lines[2]
    assert lines[2].split()[-1] == "0.5"
    assert lines[-1].split()[-4:-2] == ["DONE", "(finish)"]
    assert max(map(len, lines)) <= 100


def seqs(tmp_path: Path, *filters: object) -> list[int]:
    lines = interlock("log", "digits", "--json", *filters, root=tmp_path).stdout.splitlines()
    return [json.loads(line)["seq"] for line in lines]


def test_log_filters(tmp_path: Path) -> None:
    run = done(tmp_path)
    with Journal.open(run) as journal:
        rows = list(journal.transitions(include_superseded=True))
    kept = [row for row in rows if not row.superseded]
    assert len(kept) < len(rows)
    assert seqs(tmp_path) == [row.seq for row in kept]
    assert seqs(tmp_path, "--all") == [row.seq for row in rows]
    assert seqs(tmp_path, "--state", "step") == [row.seq for row in kept if row.dest is State.STEP]
    assert seqs(tmp_path, "--epoch", 1) == [row.seq for row in kept if row.epoch == 1]
    assert seqs(tmp_path, "--scope", "train") == [row.seq for row in kept if row.scope == "train"]
    for name in ("val", "validation/val"):
        assert seqs(tmp_path, "--scope", name) == [row.seq for row in kept if row.scope == "validation/val"]
    assert seqs(tmp_path, "--attempt", 1, "--all") == [row.seq for row in rows if row.attempt == 1]
    assert seqs(tmp_path, "--tail", 4) == [row.seq for row in kept][-4:]
    assert seqs(tmp_path, "--tail", 0) == []
    assert seqs(tmp_path, "--tail", 3, "--state", "HALTED", "--all") == [
        row.seq for row in rows if row.dest is State.HALTED
    ]
    halted = interlock("log", "digits", "--all", "--state", "HALTED", root=tmp_path).output
    assert "superseded signal SIGTERM" in halted


def test_tail_looks_back_as_far_as_it_must(tmp_path: Path) -> None:
    run = create_run(tmp_path, "digits")
    with Lease.acquire(run) as lease:
        recorder, writer = begin(run, lease)
        with writer:
            Walk(recorder).epochs(1, 2).epochs(1, 2000)
    assert seqs(tmp_path, "--tail", 2, "--state", "EPOCH_START") == [1, 13]


def test_a_loss_that_is_no_number_is_json_all_the_same(tmp_path: Path) -> None:
    run = create_run(tmp_path, "digits")
    with Lease.acquire(run) as lease:
        recorder, writer = begin(run, lease)
        with writer:
            walk = Walk(recorder)
            walk.go(Trigger.BEGIN_EPOCH)
            walk.go(Trigger.FETCH)
            walk.go(Trigger.FORWARD, loss=float("nan"), note="non-finite")
    begun, _, forward = interlock("log", "digits", "--json", root=tmp_path).stdout.splitlines()
    assert json.loads(forward)["loss"] == "nan"
    assert json.loads(begun)["loss"] is None
    assert list(json.loads(forward))[:4] == ["seq", "attempt", "scope", "epoch"]


LIVE = """
import sys, time
from pathlib import Path
from walk import BATCH, Walk, begin
from tracking.runs import Lease, RunFolder
from states.table import Trigger
run = RunFolder(Path(sys.argv[1]))
lease = Lease.acquire(run)
recorder, writer = begin(run, lease)
walk = Walk(recorder)
walk.after = lambda seq: print(seq, flush=True)
walk.go(Trigger.BEGIN_EPOCH)
for line in sys.stdin:
    if line == "end\\n":
        walk.go(Trigger.END_EPOCH)
        walk.go(Trigger.FINISH)
        writer.end("done", "finished")
        writer.close()
        lease.release()
        break
    for trigger in BATCH:
        walk.go(trigger)
time.sleep(60)
"""


@contextmanager
def training(run: RunFolder) -> Iterator["subprocess.Popen[str]"]:
    """A live training, which does a batch for each line that it is given; it prints the seq of each transition."""
    with process("-c", LIVE, run.path, stdin=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "1\n"
        yield child


def batch(child: "subprocess.Popen[str]") -> int:
    """Let it do a batch; the seq of its last transition."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("batch\n")
    child.stdin.flush()
    return [int(child.stdout.readline()) for _ in BATCH][-1]


@contextmanager
def following(run: RunFolder, *filters: object) -> Iterator["subprocess.Popen[str]"]:
    with process("-m", "orchestrator.cli", "log", run.path, "--follow", "--json", *filters) as child:
        yield child


def read_to(follower: "subprocess.Popen[str]", seq: int) -> list[int]:
    assert follower.stdout is not None
    found: list[int] = []
    while not found or found[-1] < seq:
        found.append(json.loads(follower.stdout.readline())["seq"])
    return found


def test_a_training_is_followed_killed_shown_and_checked(tmp_path: Path) -> None:
    run = create_run(tmp_path, "digits")
    with training(run) as child, following(run) as follower:
        assert read_to(follower, 1) == [1]
        lags = []
        for _ in range(4):
            newest = batch(child)
            began = time.monotonic()
            read_to(follower, newest)
            lags.append(time.monotonic() - began)
        assert min(lags) < 0.6  # 0.3 s, and what a busy machine adds

        shown = interlock("show", "digits", root=tmp_path).output
        assert "BATCH_END at epoch 0, batch 3, " in shown
        assert f"process {child.pid} on " in shown
        assert "running" in shown
        assert "--follow" in shown
        assert f"{run.id}  BATCH_END " in interlock("runs", root=tmp_path).output
        checked = interlock("check", "digits", root=tmp_path).output
        assert f"process {child.pid}" in checked
        assert "up to BATCH_END" in checked

        newest = batch(child)
        child.send_signal(signal.SIGKILL)
        child.wait()
        rest, errors = follower.communicate(timeout=30)
    assert follower.returncode == 0
    assert json.loads(rest.splitlines()[-1])["seq"] == newest
    assert errors == f"the process died; `interlock check {run.id}` writes down its end\n"

    assert (
        "died in BATCH_END at epoch 0, batch 4; no end is written down yet"
        in interlock("show", "digits", root=tmp_path).output
    )
    found = json.loads(interlock("runs", "--json", root=tmp_path).stdout)
    assert (found[0]["kind"], found[0]["state"], found[0]["outcome"]) == ("died", "BATCH_END", None)
    checked = interlock("check", "digits", root=tmp_path).output
    assert "attempt 1 died in BATCH_END: " in checked
    assert "wrote down its halt" in checked
    assert f"{newest + 1} transitions of 1 attempt, none is missing" in checked
    shown = interlock("show", "digits", root=tmp_path).output
    assert "HALTED, died in BATCH_END at epoch 0, batch 4: the process died" in shown
    assert "attempt 1 died" not in interlock("check", "digits", root=tmp_path).output


def test_following_ends_with_the_training(tmp_path: Path) -> None:
    run = create_run(tmp_path, "digits")
    with training(run) as child, following(run, "--state", "DONE") as follower:
        batch(child)
        output, errors = "", ""
        assert child.stdin is not None
        child.stdin.write("end\n")
        child.stdin.flush()
        output, errors = follower.communicate(timeout=30)
        assert child.poll() is None  # the process lives on, the training does not
    assert (follower.returncode, errors) == (0, "")
    assert [json.loads(line)["seq"] for line in output.splitlines()] == [8]


def test_following_one_that_has_ended_prints_its_last_lines(tmp_path: Path) -> None:
    run = done(tmp_path)
    with Journal.open(run) as journal:
        newest = [row.seq for row in journal.transitions()][-10:]
    assert seqs(tmp_path, "--follow") == newest
    assert seqs(tmp_path, "--follow", "--tail", 3) == newest[-3:]


def test_control_c_and_a_closed_pipe_are_quiet(tmp_path: Path) -> None:
    run = create_run(tmp_path, "digits")
    with training(run) as child, following(run) as follower:
        read_to(follower, 1)
        follower.send_signal(signal.SIGINT)
        assert follower.wait(30) == 130
        assert follower.stderr is not None
        assert follower.stderr.read() == ""
        with following(run) as second:
            read_to(second, 1)
            assert second.stdout is not None
            assert second.stderr is not None
            second.stdout.close()
            batch(child)
            second.wait(30)
            assert second.stderr.read() == ""


# -- check -------------------------------------------------------------------------------------------


def test_a_sound_run(tmp_path: Path) -> None:
    done(tmp_path)
    text = " ".join(interlock("check", "digits", root=tmp_path).output.split())
    for line in (
        "61 transitions of 2 attempts, none is missing",
        "are a legal word, up to DONE; 2 validation passes",
        "7 transitions superseded by 1 resume, the rest stands",
        "6 batches of 2 epochs in order, none skipped or repeated",
        "2 attempts (stopped, done), each ends where its transitions do",
        "all is well",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (State.FORWARD, "3 batches of 2 epochs"),
        (State.BATCH_END, "3 batches of 2 epochs"),
        (State.EPOCH_END, "2 batches of 1 epoch "),
    ],
)
def test_a_branch_is_sound_from_where_it_began(tmp_path: Path, state: State, said: str) -> None:
    """It halts and goes on from its own HALTED, too: then the `halt` itself is gone back to, and stands."""
    mother = done(tmp_path, "mother")
    run = branch(tmp_path, mother, state)
    text = " ".join(interlock("check", run.id, root=tmp_path).output.split())
    assert f"branched from {mother.id} at epoch 2, batch 113 ({state.value})" in text
    assert f"{said.strip()} in order, none skipped or repeated" in text
    assert "0 transitions superseded by 1 resume, the rest stands" in text
    assert "up to DONE" in text
    assert "all is well" in text
    change(run, "UPDATE packed_transitions SET batch = batch + 1 WHERE epoch = 3 AND batch >= 0")
    assert (
        "fetch of epoch 3, batch 1; expected epoch 3, batch 0"
        in interlock("check", run.id, root=tmp_path, code=1).output
    )


def test_only_a_branch_may_begin_in_the_middle(tmp_path: Path) -> None:
    run = branch(tmp_path, done(tmp_path, "mother"), kept=False)
    text = interlock("check", run.id, root=tmp_path, code=1).output
    assert "fetch of epoch 2, batch 114; expected epoch -1, batch 0" in text


TRAINING = "(SELECT scope FROM scopes WHERE name = 'train')"
FIRST_BATCH = f"(SELECT min(seq) FROM packed_transitions WHERE batch = 0 AND scope = {TRAINING})"


@pytest.mark.parametrize(
    ("tampering", "said"),
    [
        (f"DELETE FROM packed_transitions WHERE seq = {FIRST_BATCH}", "expected 2 here; missing: 2 to 6"),
        (
            "DELETE FROM packed_transitions WHERE seq = (SELECT max(seq) FROM packed_transitions)",
            "ended in DONE",
        ),
        ("UPDATE words SET source = 'STEP' WHERE dest = 'BACKWARD'", "backward from STEP"),
        ("UPDATE words SET dest = 'STEP' WHERE dest = 'BACKWARD'", "is not in the table"),
        (f"UPDATE packed_transitions SET batch = 5 WHERE seq = {FIRST_BATCH}", "fetch of epoch 0, batch 5"),
        (f"UPDATE packed_transitions SET attempt = 2 WHERE seq = {FIRST_BATCH}", "but falls to attempt 1"),
        ("UPDATE attempts SET kept_until = NULL", "the attempts' positions say otherwise"),
        (
            "UPDATE attempts SET kept_until = kept_until - 1 WHERE attempt = 1",
            "the attempts' positions say otherwise",
        ),
        (
            "UPDATE attempts SET position = position - 1 WHERE attempt = 2",
            "expected a training transition that stood",
        ),
        ("UPDATE attempts SET position = 9999 WHERE attempt = 2", "which is missing"),
        ("UPDATE attempts SET outcome = 'done' WHERE attempt = 1", "is said to be done"),
        ("UPDATE attempts SET outcome = NULL WHERE attempt = 1", "has no end, though a later one"),
        ("UPDATE attempts SET end_state = 'EPOCH_END' WHERE attempt = 1", "ended in EPOCH_END"),
    ],
)
def test_tampering_is_found(tmp_path: Path, tampering: str, said: str) -> None:
    run = done(tmp_path)
    change(run, tampering)
    text = interlock("check", "digits", root=tmp_path, code=1).output
    assert "WRONG" in text
    assert said in text
    assert "all is well" not in text


def test_a_hole_in_the_file_is_found(tmp_path: Path) -> None:
    run = done(tmp_path)
    with run.journal.open("r+b") as file:
        file.seek(3 * 4096)
        file.write(b"\x7f" * 4096)
    assert "WRONG" in interlock("check", "digits", root=tmp_path, code=1).output


def checkpoint(run: RunFolder, seq: int, epoch: int, batch: int, state: State) -> Path:
    """A checkpoint written as the trainer writes them."""
    import torch

    from orchestrator.snapshot.encoding import encode
    from orchestrator.snapshot.staging import Staging
    from orchestrator.snapshot.storage import checkpoint_name, write_checkpoint

    name = checkpoint_name(seq, 1, epoch, batch, state)
    tree = {"model": {"parameters": {"weight": torch.arange(1000.0)}}, "place": {"epoch": epoch}}
    staged = Staging().copy(encode(tree))
    return write_checkpoint(run.checkpoints, name, manifest={"seq": seq}, staged=staged)


def test_every_byte_of_a_checkpoint_is_checked(tmp_path: Path) -> None:
    run, position = stopped(tmp_path)
    path = checkpoint(run, position, 0, 2, State.EPOCH_END)
    assert "1 checkpoint, every hash holds" in interlock("check", "digits", root=tmp_path).output
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(2000)
        file.write(b"!")
    text = interlock("check", "digits", root=tmp_path, code=1).output
    assert path.name in text
    assert "model.safetensors" in text
    assert "found sha256" in text


def test_a_checkpoint_of_another_place_is_found(tmp_path: Path) -> None:
    run, position = stopped(tmp_path)
    checkpoint(run, position, 0, 2, State.BATCH_END)
    text = interlock("check", "digits", root=tmp_path, code=1).output
    assert f"transition {position} leads to EPOCH_END at epoch 0, batch 2" in text


def test_a_checkpoint_that_is_missing(tmp_path: Path) -> None:
    run, position = stopped(tmp_path)
    with Lease.acquire(run) as lease:
        _, writer = begin(run, lease, position)
        with writer:
            row = CheckpointRow("000000001-a1-e0-EPOCH_START", 1, 0, -1, State.EPOCH_START, 9, 1)
            writer.checkpoint(row)
    # That attempt had no end: it was settled as one that died.
    text = interlock("check", "digits", root=tmp_path, code=1).output
    assert f"{row.name} is missing, and the journal does not say that it was removed" in text
    checkpoint(run, position, 0, 2, State.EPOCH_END)
    assert f"{row.name} is gone" in interlock("check", "digits", root=tmp_path).output


# -- resume ------------------------------------------------------------------------------------------


def record_command(run: RunFolder, *argv: str, cwd: Path, executable: str = sys.executable) -> None:
    run.command.write_text(
        json.dumps({"argv": [sys.executable, *argv], "executable": executable, "cwd": str(cwd)})
    )


def test_resume_starts_the_recorded_command(tmp_path: Path) -> None:
    run, _ = stopped(tmp_path / "runs")
    (tmp_path / "train.py").write_text(
        "import os, sys; print(os.getcwd(), os.environ['INTERLOCK_RESUME'], sys.argv, os.getpid()); sys.exit(7)"
    )
    record_command(run, "train.py", "--lr", "a b", cwd=tmp_path)
    with process("-m", "orchestrator.cli", "resume", run.path) as child:
        output, errors = child.communicate(timeout=60)
    assert output == f"{tmp_path} {run.path} {['train.py', '--lr', 'a b']} {child.pid}\n"
    assert f"in {tmp_path}\n" in errors
    assert "train.py --lr 'a b'" in errors
    assert child.returncode == 7
    assert "interlock resume" in interlock("show", run.path).output


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    run, _ = stopped(tmp_path)

    def refused() -> str:
        return interlock("resume", "digits", root=tmp_path, code=1).output

    assert "expected the command that started the run, found that there is none" in refused()
    run.command.write_text("{")
    assert "it cannot be read" in refused()
    record_command(run, cwd=tmp_path)
    assert "from an interactive session" in refused()
    record_command(run, "-m", "ipykernel_launcher", "-f", "x.json", cwd=tmp_path)
    assert "from a notebook" in refused()
    record_command(run, "train.py", cwd=tmp_path / "gone")
    assert f"was started in {tmp_path / 'gone'}, which is not there any more" in refused()
    record_command(run, "train.py", cwd=tmp_path, executable="/no/python")
    assert "was started with /no/python" in refused()
    assert "interlock resume" not in interlock("show", "digits", root=tmp_path).output
    done(tmp_path)
    assert "is DONE, there is nothing left to do" in refused()


def test_a_run_that_is_being_trained_is_not_resumed(tmp_path: Path) -> None:
    run = create_run(tmp_path, "digits")
    record_command(run, "-c", "raise SystemExit('started twice')", cwd=tmp_path)
    with training(run) as child:
        text = interlock("resume", "digits", root=tmp_path, code=1).output
        assert f"is being trained by process {child.pid} on " in text


# -- diagram -----------------------------------------------------------------------------------------


def test_diagram_of_the_machine_and_of_a_run(tmp_path: Path) -> None:
    done(tmp_path)
    plain = interlock("diagram", "--format", "mermaid").stdout
    assert "FORWARD --> BACKWARD : backward\n" in plain
    counted = interlock("diagram", "digits", "--format", "mermaid", root=tmp_path).stdout
    # Seven batches were trained, of which one is superseded; a transition took 1,000,003 ns each.
    assert "FORWARD --> BACKWARD : backward \N{MULTIPLICATION SIGN}6 1.00 ms\n" in counted
    assert ElementTree.fromstring(interlock("diagram", "digits", root=tmp_path).stdout).tag.endswith("svg")


def test_a_diagram_is_written_to_a_file(tmp_path: Path) -> None:
    file = tmp_path / "machine.svg"
    result = interlock("diagram", "-o", file)
    assert (result.stdout, result.stderr) == ("", f"drawn: {file}\n")
    assert ElementTree.parse(file).getroot().tag.endswith("svg")
    interlock("diagram", "-o", tmp_path / "machine.mmd")
    assert (tmp_path / "machine.mmd").read_text().startswith("stateDiagram")
    refused = interlock("diagram", "-o", tmp_path / "none" / "machine.svg", code=1).output
    assert "cannot be written (No such file" in refused


# -- sync --------------------------------------------------------------------------------------------


def test_sync_delivers_what_was_left(tmp_path: Path, own_store: Database) -> None:
    run = done(tmp_path / "runs")
    shipper = start_shipper(run, MLflow(tracking_uri=own_store.uri, experiment_name="digits"))
    assert shipper is not None
    shipper.kill()
    shipper.wait()
    shown = interlock("show", run.path).output
    assert "nobody is delivering it" in shown
    assert "interlock sync " in shown
    delivered = interlock("sync", "--all", root=tmp_path / "runs").output
    assert f"{run.id}: delivered " in delivered
    assert "see it " in delivered
    assert "nothing was left to deliver" in interlock("sync", run.path).output
    found = json.loads(interlock("show", run.path, "--json").stdout)["delivery"]
    assert found["points_waiting"] == 0
    assert found["points_delivered"] > 0
    assert found["remote_run_id"]
    store = sqlite3.connect(own_store.path)
    assert store.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
    store.close()
    lost = done(tmp_path / "runs", name="lost")
    checkpoint = lost.checkpoints / "000000001-a1-IDLE"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").touch()
    shutil.copy(run.path / "tracker.json", lost.path)
    for file in lost.path.glob("journal.sqlite*"):
        file.unlink()
    both = interlock("sync", "--all", root=tmp_path / "runs", code=1).output
    assert f"{lost.path}: found checkpoints, but no journal.sqlite" in both
    assert f"{run.id}: nothing was left to deliver" in both, "one that cannot be read is in nobody's way"


def test_what_cannot_be_delivered(tmp_path: Path) -> None:
    done(tmp_path)
    assert "track=None" in interlock("sync", "digits", root=tmp_path, code=1).output
    assert "no run to deliver" in interlock("sync", "--all", root=tmp_path).output
    assert "either a RUN or --all" in interlock("sync", root=tmp_path, code=2).output
    assert "either a RUN or --all" in interlock("sync", "digits", "--all", root=tmp_path, code=2).output


def test_passwords_are_not_shown(tmp_path: Path) -> None:
    run = done(tmp_path)
    # A port that nobody listens on: it is never asked.
    shipper = start_shipper(run, MLflow(tracking_uri="http://user:secret@127.0.0.1:9"))
    assert shipper is not None
    shipper.kill()
    shipper.wait()
    for words in (["show", "digits"], ["show", "digits", "--json"]):
        text = interlock(*words, root=tmp_path).output
        assert "http://user:***@127.0.0.1:9" in text
        assert "secret" not in text


# -- a real training ---------------------------------------------------------------------------------

TRAIN = """
import os, signal
from pathlib import Path
from orchestrator import Checkpointing
from states import Trigger
from trainings import loader, make
trainer = make(Path("runs"), val_loader=loader(shuffle=False), checkpoint=Checkpointing(every_batches=2))
resumed = "INTERLOCK_RESUME" in os.environ
@trainer.after(Trigger.FORWARD)
def be_killed_once():
    if not resumed and (trainer.epoch, trainer.batch) == (1, 4):
        os.kill(os.getpid(), signal.SIGKILL)
print(trainer.fit().reason)
"""


def test_a_real_training_killed_resumed_and_checked(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    with process("train.py", cwd=tmp_path) as child:
        _, errors = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, errors
    root = tmp_path / "runs"
    assert "died in BATCH_START at epoch 1, batch 4" in interlock("show", "test", root=root).output
    assert "up to HALTED" in interlock("check", "test", root=root).output
    with process("-m", "orchestrator.cli", "--root", root, "resume", "test") as child:
        output, errors = child.communicate(timeout=120)
    assert (child.returncode, output) == (0, "finished\n"), errors
    checked = interlock("check", "test", root=root).output
    assert "18 batches of 3 epochs in order, none skipped or repeated" in checked
    assert "2 attempts (died, done)" in checked
    assert "every hash holds" in checked
    shown = interlock("show", "test", root=root).output
    assert "DONE: finished" in shown
    assert "3 of 3 epochs, 18 batches" in shown
