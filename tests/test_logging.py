"""What a training says: on a pipe, on a real (pseudo-)terminal, in the file, to functions."""

import io
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args
from unittest.mock import ANY

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset, get_worker_info

import trainings
from orchestrator.callbacks.checkpointing import Checkpointing
from orchestrator.callbacks.logs import Logging, LogRecord, callback
from orchestrator.callbacks.logs.callback import headline
from orchestrator.callbacks.logs.live import LiveConsole, paint, styled
from orchestrator.callbacks.logs.progress import Pace, Progress, batches_left
from orchestrator.callbacks.logs.record import Kind, clock, quantity, shown, span
from orchestrator.callbacks.logs.sinks import FileLog, PlainConsole, live_wanted
from orchestrator.callbacks.logs.table import EpochTable
from orchestrator.callbacks.logs.terminal import Terminal
from orchestrator.errors import ConfigurationError
from orchestrator.trainer import Trainer
from states.table import State, Trigger

BATCHES = 4
ERASE = "\r\x1b[2K"


def _trainer(root: Path, log: Logging | None, *, epochs: int = 2, workers: int = 0, **more: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    data = TensorDataset(torch.randn(BATCHES * 2, 3), torch.randn(BATCHES * 2, 1))
    arguments: dict[str, Any] = {
        "epochs": epochs,
        "val_loader": DataLoader(data, batch_size=4),
        "checkpoint": None,
        "track": None,
        "root": root,
        "name": "t",
        "device": "cpu",
        **more,
    }
    loader = DataLoader(data, batch_size=2, num_workers=workers)
    return Trainer(model, SGD(model.parameters(), lr=0.01), nn.MSELoss(), loader, log=log, **arguments)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


class Pty:
    """A pseudo-terminal, and what has been written to it."""

    def __init__(self, columns: int = 100) -> None:
        import fcntl
        import struct
        import termios

        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.stream = open(slave, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._chunks: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while chunk := os.read(self._master, 65536):
                self._chunks.append(chunk)
        except OSError:  # the other end is closed
            pass

    @property
    def raw(self) -> str:
        """So far, or after `close` everything."""
        return b"".join(self._chunks).decode().replace("\r\n", "\n")

    @property
    def screen(self) -> list[str]:
        """The lines as they stand: colours taken out, erasing carried out."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.raw)
        return [line.rsplit(ERASE, 1)[-1] for line in text.split("\n")]

    def close(self) -> None:
        self.stream.close()
        self._reader.join(5)
        os.close(self._master)


@contextmanager
def _on_terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 100) -> Iterator[Pty]:
    pty = Pty(columns)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pty.stream)
        patch.setattr(sys, "stderr", pty.stream)
        yield pty
    pty.close()


def _console_log(trainer: Trainer) -> list[str]:
    assert trainer.run is not None
    return trainer.run.console_log.read_text().splitlines()


# -- values as text -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("loss", 0.0, "0.0000"),
        ("loss", 0.091754, "0.0918"),
        ("loss", 1.5, "1.5000"),
        ("loss", 123.456, "123.5"),
        ("loss", 12345.678, "12345.7"),
        ("loss", 1.2345e-5, "1.234e-05"),
        ("loss", -3.2e9, "-3.2e+09"),
        ("loss", float("nan"), "nan"),
        ("loss", float("-inf"), "-inf"),
        ("lr", 0.001, "0.001"),
        ("lr/1", 3e-4, "0.0003"),
        ("batch_time", 0.01234, "12.3 ms"),
        ("batch_time", 12.34, "12.3 s"),
        ("duration", 125.4, "2 min 05 s"),
        ("skipped", 3.0, "3"),
    ],
)
def test_quantity(name: str, value: float, text: str) -> None:
    assert quantity(name, value) == text


def test_times() -> None:
    assert [span(s) for s in (0.4149, 9.994, 9.996, 59.94, 59.96, 3599, 11220)] == [
        *("0.41 s", "9.99 s", "10.0 s", "59.9 s", "1 min 00 s", "59 min 59 s", "3 h 07 min")
    ]
    assert [clock(s) for s in (-1, 7.4, 754, 11232)] == ["0:00", "0:07", "12:34", "3:07:12"]


def test_what_is_shown_and_in_which_order() -> None:
    metrics = {
        "grad/fc.weight/norm": 1.0,
        "lr": 0.1,
        "duration": 2.0,
        "val/loss": 0.3,
        "loss": 0.5,
        "acc": 0.9,
    }
    assert list(shown(metrics, None)) == ["loss", "val/loss", "acc", "duration", "lr"]
    assert list(shown(metrics, ["acc", "absent", "grad/fc.weight/norm"])) == ["acc", "grad/fc.weight/norm"]
    assert shown(metrics, []) == {}


def test_file_line_is_one_line_with_the_time() -> None:
    record = LogRecord(0.25, "halt", "halted\n  run x", 1, 2, {"loss": 0.5})
    line = record.file_line
    assert "\n" not in line
    assert re.match(
        r"(1970-01-01|1969-12-31)T\d\d:\d\d:00\.250[+-]\d\d:\d\d  halt        halted; run x  loss 0.5000",
        line,
    )


# -- the table of epochs ------------------------------------------------------------------------------


def _row(number: int, **metrics: float) -> LogRecord:
    return LogRecord(0.0, "epoch", f"epoch {number}/99", number - 1, 0, metrics)


def test_epochs_are_a_table_with_a_new_head_where_columns_change_or_scroll_away() -> None:
    table = EpochTable()
    told = [text.plain for number in (1, 2) for text in table.rows(_row(number, loss=0.25, duration=1.5), 80)]
    assert told == ["epoch    loss    time", " 1/99  0.2500  1.50 s", " 2/99  0.2500  1.50 s"]
    told = [text.plain for text in table.rows(_row(3, loss=12345.0, duration=1.5), 80)]
    assert told == ["epoch     loss    time", " 3/99  12345.0  1.50 s"]
    told = [text.plain for text in table.rows(_row(4, loss=0.5, skipped=2.0, duration=1.5), 80)]
    assert told == ["epoch     loss  skipped    time", " 4/99   0.5000        2  1.50 s"]
    heads = [len(table.rows(_row(5, loss=0.5, duration=1.0), 80)) for _ in range(62)]
    assert [number for number, lines in enumerate(heads) if lines == 2] == [0, 30, 60]


def test_a_table_that_does_not_fit_leaves_out_what_is_interlocks_own_and_then_gives_up() -> None:
    row = _row(1, loss=0.25, duration=1.5, grad_norm=1.0)
    assert [len(EpochTable().rows(row, width)) for width in (40, 30, 20, 13, 12)] == [2, 2, 2, 2, 0]
    assert EpochTable().rows(row, 21)[0].plain == "epoch    loss    time"
    assert EpochTable().rows(row, 20)[0].plain == "epoch    loss"


# -- the line of progress -----------------------------------------------------------------------------


def test_line_fits_and_drops_the_least_important_first() -> None:
    progress = Progress(
        epoch=3,
        epochs=10,
        batches=113,
        batches_per_epoch=450,
        seconds_left=83,
        rate=12.5,
        metrics={"loss": 0.25, "accuracy": 0.9},
    )
    wide = paint(progress, 120).plain
    assert wide.startswith("epoch  3/10  ━")
    assert wide.endswith("batch 113/450  eta 1:23  loss 0.2500  accuracy 0.9000  12.5 batches/s")
    lost = None
    for width in range(120, 5, -1):
        line = paint(progress, width)
        assert line.cell_len <= width
        now = [
            word
            for word in ("batches/s", "accuracy", "loss", "eta", "━", "113", "epoch")
            if word in line.plain
        ]
        assert lost is None or now == lost[-len(now) :] or not now
        lost = now
    assert paint(progress, 40).plain.startswith("epoch  3/10")


def test_line_of_unknown_lengths_and_of_what_is_done() -> None:
    line = paint(Progress(2, None, 7, None, doing="validating val 0:03", rate=3.0), 100).plain
    assert line == "epoch 2  batch 7  validating val 0:03  3 batches/s"


def test_line_shows_state_and_where_the_time_goes_while_there_is_room() -> None:
    shares = {"fetch": 0.6, "forward": 0.21, "backward": 0.15, "step": 0.04}
    progress = Progress(2, None, 7, None, rate=3.0, state="FORWARD", shares=shares)
    line = paint(progress, 100).plain
    assert line == "epoch 2  batch 7  3 batches/s  fetch 60%  forward 21%  backward 15%  FORWARD"
    assert paint(progress, 50).plain == "epoch 2  batch 7  3 batches/s  fetch 60%"


def test_line_in_ascii() -> None:
    line = paint(Progress(1, 1, 5, 10), 60, ascii_only=True).plain
    assert line == "epoch 1/1  #####.....  batch  5/10"


def test_pace_is_of_the_last_minute() -> None:
    pace = Pace(window=10)
    assert pace.rate is None
    pace.mark(0.0, 0)
    assert pace.rate is None
    for second in range(1, 101):
        pace.mark(float(second), second if second <= 50 else 50 + (second - 50) * 4)
    assert pace.rate == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "most", "left"),
    [
        (10, 5, None, 43),
        (10, 5, 20, 13),
        (None, 5, 20, 13),
        (None, None, 20, 13),
        (10, None, None, None),
        (2, 5, 100, 3),
    ],
)
def test_batches_left(epochs: int | None, per_epoch: int | None, most: int | None, left: int | None) -> None:
    assert batches_left(7, 1, 2, epochs, per_epoch, most) == left


def test_headline_of_validation_or_else_the_loss() -> None:
    history = [{"loss": 3.0, "val/loss": 2.0, "val/acc": 0.5}, {"loss": 2.0, "val/loss": 2.5, "val/acc": 0.6}]
    assert headline(history, None, 2) == [
        "val/loss: best 2.0000 at epoch 1/2, last 2.5000",
        "val/acc: best 0.6000 at epoch 2/2, last 0.6000",
    ]
    assert headline([{"loss": 3.0}], None) == ["loss: best 3.0000 at epoch 1, last 3.0000"]
    assert headline(history, ["loss"], 2) == ["loss: best 2.0000 at epoch 2/2, last 2.0000"]
    assert headline(history, ["unknown"]) == []
    assert headline([], None) == []


# -- records ------------------------------------------------------------------------------------------


def _kinds(root: Path, log: Logging, records: list[LogRecord], **more: Any) -> list[str]:
    _trainer(root, log, **more).fit()
    return [record.kind for record in records]


def test_levels(tmp_path: Path) -> None:
    records: list[LogRecord] = []
    assert _kinds(tmp_path, Logging("minimal", to=records.append), records) == ["start", "done"]
    records.clear()
    assert _kinds(tmp_path, Logging(to=records.append), records) == ["start", "epoch", "epoch", "done"]
    records.clear()
    kinds = _kinds(tmp_path, Logging("verbose", to=records.append), records)
    assert kinds.count("batch") == 2 * BATCHES
    assert kinds.count("transition") == 2 * (2 + 5 * BATCHES) + 1
    moves = [record.message.split()[:4] for record in records if record.kind == "transition"]
    assert moves[0] == ["begin_epoch", "IDLE", "->", "EPOCH_START"]
    assert moves[-1] == ["finish", "EPOCH_END", "->", "DONE"]
    assert all(one[3] == other[1] for one, other in pairwise(moves))


def test_every_batches_and_every_epochs(tmp_path: Path) -> None:
    records: list[LogRecord] = []
    log = Logging(every_batches=3, every_epochs=2, to=records.append)
    _kinds(tmp_path, log, records, epochs=3)
    batches = [(r.epoch, r.batch) for r in records if r.kind == "batch"]
    assert batches == [(0, 2), (1, 1), (2, 0), (2, 3)]
    assert [r.epoch for r in records if r.kind == "epoch"] == [1, 2]  # the last one always


def test_chosen_metrics(tmp_path: Path) -> None:
    records: list[LogRecord] = []
    _trainer(tmp_path, Logging(metrics=["val/loss", "loss"], to=records.append)).fit()
    assert [list(r.metrics) for r in records if r.kind == "epoch"] == [["val/loss", "loss"]] * 2


def test_chosen_metric_that_does_not_exist_is_told_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="val/f1, which is not among the metrics: .*val/loss") as told:
        _trainer(tmp_path, Logging(metrics=["val/f1", "loss"], to=lambda record: None)).fit()
    assert len(told) == 1


def test_hooks_that_are_not_needed_are_not_registered(tmp_path: Path) -> None:
    def hooks(log: Logging | None) -> dict[Trigger, int]:
        machine = _trainer(tmp_path, log)._training.loop.machine
        return {
            trigger: sum(
                len(transition.before) + len(transition.after)
                for of_source in machine.events[trigger.value].transitions.values()
                for transition in of_source
            )
            for trigger in (Trigger.FETCH, Trigger.FORWARD, Trigger.STEP, Trigger.END_BATCH)
        }

    silent = hooks(None)
    assert hooks(Logging("minimal")) == silent
    assert hooks(Logging("standard")) == silent
    assert hooks(Logging(every_batches=10))[Trigger.END_BATCH] > silent[Trigger.END_BATCH]


def test_what_a_function_raises_is_raised(tmp_path: Path) -> None:
    def fail(record: LogRecord) -> None:
        if record.kind == "epoch":
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        _trainer(tmp_path, Logging(to=fail)).fit()


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"level": "debug"}, "'debug'"),
        ({"every_batches": 0}, "every_batches=0"),
        ({"every_epochs": 0}, "every_epochs=0"),
        ({"metrics": "loss"}, r"\['loss'\]"),
        ({"to": "stdout"}, "'stdout'"),
        ({"to": ["console", 3]}, "was given 3"),
    ],
)
def test_refuses(arguments: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigurationError, match=found):
        Logging(**arguments)


# -- plain console ------------------------------------------------------------------------------------


def test_pipe_gets_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = _trainer(tmp_path, Logging())
    trainer.fit()
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    lines = out.splitlines()
    assert lines[0] == f"run {trainer.run.path}, cpu: 2 epochs of 4 batches"  # type: ignore[union-attr]
    assert lines[1].startswith("epoch 1/2  loss ")
    assert re.search(r"  val/loss \d\.\d{4}  \d\.\d\d s  lr 0\.01    grad_norm \d\.\d{4}$", lines[2])
    assert lines[3].startswith("done after 2 epochs and 8 batches, ")
    assert lines[4].startswith("  val/loss: best ")
    assert lines[5] == f"  run {trainer.run.path}"  # type: ignore[union-attr]
    assert len(lines) == 6


def test_reason_of_a_stop_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = _trainer(tmp_path, Logging("minimal", to="console"))
    trainer.after(Trigger.STEP)(lambda: trainer.stop("enough of it"))
    trainer.fit()
    assert re.search(r"^done after 1 epoch and 1 batch, .* s: enough of it$", capsys.readouterr().out, re.M)


def test_reader_that_goes_away_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w", buffering=1)  # noqa: SIM115
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert _trainer(tmp_path, Logging()).fit().state is State.DONE
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_console_of_another_encoding() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    PlainConsole(stream).write(LogRecord(0.0, "epoch", "größer", 0, 0))
    assert raw.getvalue() == b"gr??er\n"


@pytest.mark.parametrize("variable", [("TERM", "dumb"), ("TERM", ""), ("CI", "true")])
def test_incapable_terminals_get_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str]
) -> None:
    monkeypatch.setenv(*variable)
    with _on_terminal(monkeypatch) as pty:
        assert not live_wanted(pty.stream, os.environ)
        _trainer(tmp_path, Logging()).fit()
    assert "\x1b" not in pty.raw
    assert "epoch 2/2  loss" in pty.raw


# -- a real terminal ----------------------------------------------------------------------------------


def test_terminal_shows_progress_and_ends_with_rows_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _on_terminal(monkeypatch) as pty:
        before = dict(vars(pty.stream))
        trainer = _trainer(tmp_path, Logging())
        # Let each batch be due, whatever the machine's speed.
        trainer.before(Trigger.END_BATCH)(lambda: time.sleep(LiveConsole.INTERVAL))
        trainer.fit()
        assert vars(pty.stream) == before
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", pty.raw).split(ERASE)
    for epoch in (1, 2):
        for batch in range(1, BATCHES + 1):
            assert any(line.startswith(f"epoch {epoch}/2") and f"batch {batch}/4" in line for line in drawn)
    assert any("eta 0:00" in line and "loss " in line for line in drawn)
    assert [line.split()[:2] for line in pty.screen] == [
        ["run", f"{trainer.run.path},"],  # type: ignore[union-attr]
        ["epoch", "loss"],
        ["1/2", ANY],
        ["2/2", ANY],
        ["done", "after"],
        ["val/loss:", "best"],
        ["run", str(trainer.run.path)],  # type: ignore[union-attr]
        [],
    ]
    assert "━" in pty.raw


def test_drawing_is_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiveConsole, "INTERVAL", 3600.0)
    with _on_terminal(monkeypatch) as pty:
        _trainer(tmp_path, Logging(), epochs=1, val_loader=None).fit()
    assert pty.raw.count("batch ") <= 3  # one at the epoch's beginning, one again below its row


def test_whatever_is_said_is_shown_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _on_terminal(monkeypatch) as pty:
        trainer = _trainer(tmp_path, Logging(level="verbose"))
        trainer.after(Trigger.BEGIN_EPOCH)(lambda: trainer.say("something of my own"))
        trainer.fit()
    assert pty.screen.count("something of my own") == 2
    kinds = get_args(Kind)
    assert "message" in kinds
    for kind in kinds:
        assert styled(LogRecord(0.0, kind, "said", -1, -1, {"loss": 1.0}), 80).plain == "said  loss 1.0000"


def test_no_color(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with _on_terminal(monkeypatch) as pty:
        _trainer(tmp_path, Logging()).fit()
    assert not re.search(r"\x1b\[[0-9;]*3\d", pty.raw)
    assert ERASE in pty.raw


def test_narrow_terminal_gets_rows_without_what_can_be_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _on_terminal(monkeypatch, columns=44) as pty:
        trainer = _trainer(tmp_path, Logging())
        trainer.fit()
    head, *rows = pty.screen[1:4]
    assert head.split() == ["epoch", "loss", "val/loss", "time", "lr"]
    assert [row.split()[0] for row in rows] == ["1/2", "2/2"]
    assert all(len(row) == len(head) < 44 for row in rows)
    assert any("grad_norm" in line for line in _console_log(trainer))


def test_prints_warnings_and_loggers_do_not_tear_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _on_terminal(monkeypatch) as pty:
        handler = logging.StreamHandler(pty.stream)  # made before the live line, keeps the stream
        trainer = _trainer(tmp_path, Logging(), epochs=1)

        @trainer.before(Trigger.END_BATCH)
        def speak() -> None:
            time.sleep(LiveConsole.INTERVAL)
            print(f"print {trainer.batch}")
            print("two", "parts", trainer.batch, file=sys.stderr)
            handler.handle(logging.makeLogRecord({"msg": f"logger {trainer.batch}"}))

        trainer.fit()
    for batch in range(BATCHES):
        for line in (f"print {batch}", f"two parts {batch}", f"logger {batch}"):
            assert line in pty.screen


def test_what_a_training_hangs_in_shows_on_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiveConsole, "IDLE", 0.05)
    monkeypatch.setattr(callback, "_LONG", 0.3)
    with _on_terminal(monkeypatch) as pty:
        trainer = _trainer(tmp_path, Logging(), epochs=1)
        trainer.before("forward")(lambda: time.sleep(1.0 if trainer.batch == 1 else 0))
        trainer.after("backward")(lambda: time.sleep(1.0 if trainer.batch == 2 else 0))
        trainer.fit()
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", pty.raw).split(ERASE)
    assert any("batch 1/4" in line and "forward 0:0" in line for line in drawn)
    assert any("batch 2/4" in line and "hooks in BACKWARD 0:0" in line for line in drawn)
    assert any("  forward " in line and "%" in line for line in drawn), "where the time goes"


@pytest.mark.filterwarnings("default")
def test_validation_shows_on_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiveConsole, "IDLE", 0.05)

    def slow(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        time.sleep(0.3 if not torch.is_grad_enabled() and trainer.validating else 0)
        return 0.0

    with _on_terminal(monkeypatch) as pty:
        trainer = _trainer(tmp_path, Logging(), epochs=1, metrics={"slow": slow})
        trainer.fit()
    assert "validating val 0:00" in re.sub(r"\x1b\[[0-9;]*m", "", pty.raw)


def test_terminal_is_restored_after_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _on_terminal(monkeypatch) as pty:
        before, show = dict(vars(pty.stream)), warnings.showwarning
        trainer = _trainer(tmp_path, Logging())

        @trainer.after(Trigger.STEP)
        def fail() -> None:
            if trainer.batches == 5:
                raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"):
            trainer.fit()
        assert vars(pty.stream) == before
        assert warnings.showwarning == show
        assert not [thread for thread in threading.enumerate() if thread.name == "interlock-progress"]
        print("after")
    assert re.match(r"halted at epoch 1, batch 1, .*: RuntimeError: broken", pty.screen[-5])
    assert pty.screen[-4] == "  there is no checkpoint to resume from"
    assert pty.screen[-3:] == [f"  run {trainer.run.path}", "after", ""]  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12
def test_data_workers_say_nothing_and_write_past_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loud(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            if get_worker_info() is not None:
                assert "write" not in vars(sys.stdout)
                print("from a worker")
                warnings.warn("a worker warns", stacklevel=1)
            return super().__getitem__(index)

    with _on_terminal(monkeypatch) as pty:
        data = Loud(torch.randn(8, 3), torch.randn(8, 1))
        loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork")
        trainer = Trainer(
            model := nn.Linear(3, 1),
            SGD(model.parameters(), lr=0.01),
            nn.MSELoss(),
            loader,
            epochs=1,
            checkpoint=None,
            track=None,
            log=Logging(),
            root=tmp_path,
            name="workers",
            device="cpu",
        )
        trainer.fit()
    assert "from a worker" in pty.raw
    assert [line.split()[1] for line in _console_log(trainer)] == ["start", "epoch", "done"]


# -- Terminal itself ----------------------------------------------------------------------------------


def test_terminal_leaves_an_unfinished_line_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    with _on_terminal(monkeypatch) as pty:
        terminal = Terminal(pty.stream)
        terminal.show("progress")
        assert terminal.shown
        print("name? ", end="", flush=True)
        terminal.show("progress")
        assert not terminal.shown
        monkeypatch.setattr("orchestrator.callbacks.logs.terminal._UNFINISHED", 0.0)
        terminal.show("progress")
        assert terminal.shown
        terminal.close()
        terminal.close()
        terminal.show("too late")
    assert pty.screen == ["name? ", ""]


def test_thread_keeps_the_line_going_until_somebody_else_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiveConsole, "IDLE", 0.02)
    numbers = iter(range(1, 1_000_000))
    with _on_terminal(monkeypatch) as pty:
        live = LiveConsole(lambda: Progress(1, None, next(numbers), None), pty.stream)
        live.draw()
        deadline = time.monotonic() + 10
        while "batch 3" not in re.sub(r"\x1b\[[0-9;]*m", "", pty.raw) and time.monotonic() < deadline:
            time.sleep(0.01)
        print("> /somewhere/train.py(12)<module>()")  # a debugger
        drawn = next(numbers)
        time.sleep(0.2)
        assert not live.terminal.shown
        assert next(numbers) == drawn + 1
        live.draw()
        assert live.terminal.shown
        live.close()
    assert drawn > 3
    assert pty.screen == ["> /somewhere/train.py(12)<module>()", ""]


def test_flush_takes_the_line_away_for_who_asks_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    with _on_terminal(monkeypatch) as pty:
        terminal = Terminal(pty.stream)
        terminal.show("progress")
        sys.stdout.flush()
        assert not terminal.shown
        terminal.close()
    assert pty.screen == [""]


def test_live_line_within_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with _on_terminal(monkeypatch) as pty:
        outer = Terminal(pty.stream)
        outer.show("outer")
        inner = Terminal(pty.stream)
        inner.show("inner")
        inner.print("row of inner")
        inner.show("inner")
        inner.close()
        outer.print("row of outer")
        outer.show("outer")
        outer.close()
    assert pty.screen == ["row of inner", "row of outer", ""]


def test_live_lines_that_end_in_the_other_order_leave_the_stream_usable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with _on_terminal(monkeypatch) as pty:
        first, second = Terminal(pty.stream), Terminal(pty.stream)
        first.close()
        second.print("row")
        second.close()
        print("after")
        assert pty.stream.write("the end\n") == 8
    assert pty.screen == ["row", "after", "the end", ""]


def test_rows_and_foreign_writes_from_threads_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    with _on_terminal(monkeypatch) as pty:
        terminal = Terminal(pty.stream)

        def write(letter: str) -> None:
            for _ in range(200):
                pty.stream.write(letter * 20 + "\n")

        threads = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
        for thread in threads:
            thread.start()
        for number in range(200):
            terminal.show(f"line {number}")
        for thread in threads:
            thread.join()
        terminal.close()
    assert sorted(pty.screen) == ["", *["a" * 20] * 200, *["b" * 20] * 200]


# -- the file -----------------------------------------------------------------------------------------


def test_file_is_continued_by_later_attempts(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        return _trainer(tmp_path, Logging(to="file"), checkpoint=Checkpointing())

    first = trainer()
    first.after(Trigger.END_BATCH)(lambda: first.halt("interrupted") if first.batches == 5 else None)
    assert first.fit().state is State.HALTED
    second = trainer()
    second.fit("auto")
    kinds = [line.split()[1] for line in _console_log(second)]
    assert kinds == ["start", "epoch", "halt", "start", "resume", "epoch", "done"]
    lines = _console_log(second)
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d  ", line) for line in lines)
    assert re.search(r"halted at epoch 1, batch 0, .* s: interrupted; run ", lines[2])
    assert ", attempt 2, cpu:" in lines[3]
    assert lines[4].endswith("resumed at epoch 1, batch 0 (BATCH_END), 1 epoch and 5 batches done")


def test_file_can_be_read_along(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, Logging(to="file"))
    trainer.advance(until=State.EPOCH_END)
    assert [line.split()[1] for line in _console_log(trainer)] == ["start", "epoch"]
    trainer.close()


def test_warnings_reach_the_file_and_whoever_caught_them_before(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, Logging(to="file"), epochs=1)
    trainer.after(Trigger.END_EPOCH)(lambda: warnings.warn("mind the gap", stacklevel=1))
    show = warnings.showwarning
    with pytest.warns(UserWarning, match="mind the gap"):
        trainer.fit()
    assert warnings.showwarning == show
    assert re.search(
        r"  warning     UserWarning: mind the gap \(.*test_logging.py:\d+\)", "\n".join(_console_log(trainer))
    )


def test_file_that_cannot_be_written_is_warned_of_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing more is logged to.*No such file") as told:
        _write_twice(tmp_path / "absent" / "console.log")
    assert len(told) == 1
    with pytest.warns(UserWarning, match="nothing more is logged to.*No space left") as told:
        _write_twice(Path("/dev/full"))
    assert len(told) == 1


def _write_twice(path: Path) -> None:
    log = FileLog(path)
    log.write(LogRecord(0.0, "epoch", "e", 0, 0))
    log.write(LogRecord(0.0, "epoch", "e", 0, 0))
    log.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    records: list[LogRecord] = []
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        trainer = _trainer(tmp_path, Logging(to=("console", "file", records.append)), epochs=1)
        trainer.fit()
    finally:
        torch.distributed.destroy_process_group()
    assert trainer.run is not None
    spoke = [bool(capsys.readouterr().out), trainer.run.console_log.exists(), bool(records)]
    assert spoke == [rank == 0] * 3


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_is_answered_at_once_and_the_second_tells_the_way_back(
    presses: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = trainings.make(tmp_path, log=Logging(to="console"))

    @trainer.before("backward")
    def _press() -> None:
        if trainer.batches == 1:
            os.kill(os.getpid(), signal.SIGINT)
            assert "Ctrl-C again stops it at once" in capfd.readouterr().err
            if presses == 2:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    said = "".join(capfd.readouterr())
    if presses == 1:
        assert ": signal SIGINT\n" in said
        assert "resume goes back" not in said
    else:
        assert ": KeyboardInterrupt\n  resume goes back to 000000000-a1-IDLE and does 1 batch again\n" in said
