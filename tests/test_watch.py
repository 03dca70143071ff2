"""`interlock watch` over real trainings: while they wait for data, after SIGKILL, at the end; on a terminal, too."""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli import main
from orchestrator.commands.moment import seize
from orchestrator.commands.watch import spark
from states.table import Trigger
from tracking.journal import TRAIN, Journal
from tracking.recorder_view import read_recorder
from tracking.runs import RunFolder, find_run
from trainings import loader, make
from waiting import ENVIRONMENT, wait_for, waiting


def watch(run: RunFolder, *options: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["watch", str(run.path), *options])
    assert result.exit_code == code, result.output
    return result.output


def test_a_stall_is_seen_and_so_is_a_kill(tmp_path: Path) -> None:
    with waiting(tmp_path) as (child, run):
        time.sleep(1.2)
        seen = json.loads(watch(run, "--json"))
        assert (seen["kind"], seen["state"], seen["epoch"], seen["batch"]) == ("running", "BATCH_END", 0, 2)
        assert seen["work"]["trigger"] == "fetch"
        assert seen["work"]["unusual"]
        assert seen["work"]["for_ns"] > 1e9 > seen["work"]["usual_ns"]
        assert (seen["epochs"], seen["batches_per_epoch"], seen["batches_in_epoch"]) == (2, 6, 3)
        assert seen["holder"]["pid"] == child.pid == seen["attempts"][0]["pid"]
        assert seen["process"]["state"] in "SR"
        frame = watch(run)  # to a pipe: one frame
        assert "BATCH_END → fetch for " in frame
        assert f"process {child.pid}" in frame
        assert "batch 3/6" in frame
        assert "\x1b" not in frame

        child.send_signal(signal.SIGSTOP)
        wait_for(lambda: json.loads(watch(run, "--json"))["process"]["state"] == "T")
        assert "the process is stopped" in watch(run, "--once")
        child.kill()
        child.wait()
        frame = watch(run, "--once", code=4)
        assert "the process died in BATCH_END at epoch 0, batch 2" in frame
        assert "Where the time went: the last 3 batches" in frame
        assert json.loads(watch(run, "--json", code=4))["work"] is None


@contextmanager
def terminal(run: RunFolder, *options: str) -> Iterator[tuple["subprocess.Popen[bytes]", Callable[[], str]]]:
    """`interlock watch` on a terminal of its own, and what it has drawn there so far."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    command = [sys.executable, "-m", "orchestrator.cli", "watch", str(run.path), "--every", "0.1", *options]
    drawn = bytearray()

    def read() -> str:
        while select.select([ours], [], [], 0)[0]:
            drawn.extend(os.read(ours, 65536))
        return drawn.decode(errors="replace")

    try:
        with subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT, start_new_session=True
        ) as child:
            try:
                yield child, read
            finally:
                child.kill()
    finally:
        os.close(ours)
        os.close(theirs)


def test_it_is_live_on_a_terminal_and_ends_with_the_training(tmp_path: Path) -> None:
    with waiting(tmp_path) as (child, run), terminal(run) as (seen, drawn), terminal(run) as (left, other):
        wait_for(lambda: "fetch" in drawn() and "fetch" in other())
        left.send_signal(signal.SIGINT)
        assert left.wait(10) == 130
        (tmp_path / "go").touch()
        assert child.wait(60) == 0
        assert seen.wait(10) == 0
        text = drawn()
        assert "fetch for" in text.split("finished")[0]
        assert "now       finished" in text.replace("\x1b[2m", "").replace("\x1b[0m", "")
        assert "Traceback" not in text


def test_how_a_run_ended_is_the_exit_status(tmp_path: Path) -> None:
    done = make(tmp_path, name="done").fit()
    assert done.run is not None
    assert "DONE" in watch(RunFolder(done.run))

    halted = make(tmp_path, name="halted")
    with halted:
        halted.advance("STEP")
        halted.halt("enough")
    frame = watch(find_run("halted", tmp_path), code=3)
    assert "halted in STEP at epoch 0, batch 0" in frame
    assert "enough" in frame

    broken = make(tmp_path, name="broken", callbacks=())

    @broken.before(Trigger.BACKWARD)
    def strike() -> None:
        raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError):
        broken.fit()
    assert "ZeroDivisionError: on purpose" in watch(find_run("broken", tmp_path), code=1)


def test_where_the_time_goes_adds_up(tmp_path: Path) -> None:
    """To what passed between the first transition and the last, validation set apart from what it is part of."""
    trainer = make(tmp_path, val_loader=loader(), validate_every=4)
    trainer.fit()
    run = find_run("test", tmp_path)
    with Journal.open(run) as journal:
        moment = seize(run, journal)
        rows = list(journal.transitions())
    assert len(moment.newest) == len(rows)
    elapsed = rows[-1].time_ns - rows[0].time_ns + rows[0].duration_ns
    assert abs(sum(total.ns for total in moment.spent.values()) - elapsed) <= 1
    steps = [row.duration_ns for row in rows if row.trigger is Trigger.STEP]
    assert (moment.spent["step"].count, moment.spent["step"].ns) == (len(steps), sum(steps))
    assert moment.losses == [row.loss for row in rows if row.scope == TRAIN and row.loss is not None]


def test_the_newest_transitions_are_those_of_journal_and_recorder_together(tmp_path: Path) -> None:
    trainer = make(tmp_path, epochs=5)
    with trainer:
        trainer.advance("EPOCH_END")
        run = find_run("test", tmp_path)
        with Journal.open(run) as journal:
            for _ in range(40):
                trainer.advance()
                rows = list(journal.transitions(live=True))
                for amount in (1, 7, 1000):
                    assert journal.newest(amount) == rows[-amount:]
                assert journal.last_transition() == rows[-1]


def test_the_newest_frames_alone_are_read(tmp_path: Path) -> None:
    trainer = make(tmp_path, epochs=2)
    with trainer:
        trainer.advance("EPOCH_END")
        recorder = find_run("test", tmp_path).recorder
        everything = read_recorder(recorder).records
        for frames in (0, 1, 3, 10_000_000):
            found = read_recorder(recorder, frames).records
            assert found == everything[len(everything) - len(found) :]
            assert (len(found) >= frames) or frames > len(everything)


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 5, ""),
        ([1.0], 5, "▁"),
        ([0.0, 7.0, 3.0], 5, "▁█▄"),
        ([0.0, 0.0, 7.0, 7.0], 2, "▁█"),
        ([0.0, float("nan"), 7.0], 5, "▁!█"),
        ([float("inf")], 5, "!"),
    ],
)
def test_sparkline(values: list[float], width: int, line: str) -> None:
    assert spark(values, width) == line
