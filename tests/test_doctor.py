"""`interlock doctor`: a sign for each thing that is wrong, on this machine and of real runs; nothing is changed."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from orchestrator import MLflow, NonFiniteError
from orchestrator.cli import main
from orchestrator.commands import health
from orchestrator.commands.environment import allows, clock, disk, store, threads
from states.table import Trigger
from tracking.journal import Journal
from tracking.runs import RunFolder, create_run, find_run, lease_holder
from tracking.shipper import status
from trainings import make, spoilt
from waiting import wait_for, waiting


def doctor(*arguments: object, code: int) -> dict[str, Any]:
    """What `--json` prints, by part; what people are shown says the same."""
    words = ["doctor", *map(str, arguments)]
    result: Result = CliRunner().invoke(main, [*words, "--json"])
    assert result.exit_code == code, result.output
    found = json.loads(result.stdout)
    assert found["wrong"] == sum(sign["severity"] == "wrong" for sign in found["signs"])
    for sign in found["signs"]:
        assert sign["severity"] == "fine" or (sign["expected"] and sign["do"]), sign
    return {sign["part"]: sign for sign in found["signs"]}


# -- the machine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "version", "allowed"),
    [
        (">=2.6", "2.13.0+cpu", True),
        (">=2.6", "2.5.1", False),
        (">=2.6", "2.6rc1", True),
        (">=0.9.2,<0.10", "0.9.3", True),
        (">=0.9.2,<0.10", "0.10", False),
        (">=3.0", "3", True),
        ("", "1", True),
    ],
)
def test_versions_are_compared(bounds: str, version: str, allowed: bool) -> None:
    assert allows(bounds, version) is allowed


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")  # nobody is there
    shown = CliRunner().invoke(main, ["doctor", "--timeout", "1"])
    assert shown.exit_code == 1
    assert "secret" not in shown.output
    assert "WRONG  mlflow at" in shown.output
    assert "1 thing wrong" in shown.output
    for part in ("python", "torch", "device", "threads", "sqlite", "disk", "file system", "clock"):
        assert f"  {part} " in shown.output
    assert list(tmp_path.iterdir()) == []


def test_a_torch_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sign = doctor(code=1)["torch"]
    assert "libcudart.so.12" in sign["found"]


def test_a_disk_without_room_and_a_root_that_is_a_file(tmp_path: Path) -> None:
    found = {sign.part: sign for sign in disk(tmp_path / "not" / "yet", room=10**18)}
    assert found["disk"].severity == "wrong"
    assert found["locks"].severity != "wrong"
    (tmp_path / "file").touch()
    assert [sign.severity for sign in disk(tmp_path / "file")] == ["wrong"]


def test_more_threads_than_cores() -> None:
    assert threads(1).severity == "fine"
    assert "OMP_NUM_THREADS" in threads(10_000).do


def test_a_clock_that_went_back(tmp_path: Path) -> None:
    create_run(tmp_path, "digits")
    assert clock(tmp_path).severity == "fine"
    later = create_run(tmp_path, "digits", created_ns=time.time_ns() + 3600 * 10**9)
    assert clock(tmp_path).severity == "wrong"
    assert later.id in clock(tmp_path).found


@contextmanager
def server(status: int, delay_s: float = 0.0) -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(delay_s)
            self.send_response(status if self.path == "/health" else 500)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://user:secret@127.0.0.1:{found.server_port}"
        finally:
            found.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("answer", "severity", "said"),
    [(200, "fine", "answers"), (401, "note", "credentials"), (404, "wrong", "status 404")],
)
def test_servers(answer: int, severity: str, said: str) -> None:
    with server(answer) as uri:
        sign = store(uri, 5.0)
    assert sign.severity == severity
    assert said in sign.found + sign.expected
    assert "secret" not in sign.found


def test_a_server_that_does_not_answer_in_time() -> None:
    with server(200, delay_s=1.0) as uri:
        began = time.monotonic()
        assert store(uri, 0.2).severity == "wrong"
        assert time.monotonic() - began < 1.0


def test_other_stores(tmp_path: Path) -> None:
    assert store(f"sqlite:///{tmp_path}/mlflow.db", 1.0).severity == "fine"
    assert store((tmp_path / "mlruns").as_uri(), 1.0).severity == "fine"
    assert store("postgresql://user:secret@127.0.0.1:9/mlflow", 1.0).severity == "wrong"
    assert store("databricks", 1.0).severity == "fine"


# -- runs ------------------------------------------------------------------------------------------------------


def test_a_sound_run(tmp_path: Path) -> None:
    make(tmp_path).fit()
    found = doctor(find_run("test", tmp_path).path, code=0)
    assert {sign["severity"] for sign in found.values()} <= {"fine", "note"}
    assert "every hash holds" in found["checkpoints"]["found"]


@pytest.mark.long
def test_a_process_that_is_stopped_and_one_that_is_killed(tmp_path: Path) -> None:
    with waiting(tmp_path) as (child, run):
        assert doctor(run.path, code=0)["process"]["severity"] == "fine"
        child.send_signal(signal.SIGSTOP)
        wait_for(lambda: "(SIGSTOP" in CliRunner().invoke(main, ["doctor", str(run.path)]).output)
        assert f"kill -CONT {child.pid}" in doctor(run.path, code=1)["process"]["do"]
        child.kill()
        child.wait()
        ending = doctor(run.path, code=1)["ending"]
        assert "died without a word, in BATCH_END at epoch 0, batch 2" in ending["found"]
        assert "interlock resume" in ending["do"]
        with Journal.open(run) as journal:  # which `check` would have settled
            assert journal.attempts()[-1].outcome is None
        assert lease_holder(run) is None


def test_a_training_that_waits_for_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_STALL_S", 0.5)
    with waiting(tmp_path) as (child, run):
        time.sleep(1.2)
        found = doctor(run.path, code=0)["process"]
        assert found["severity"] == "note"
        assert found["found"].startswith("at fetch for 1.")
        assert f"--pid {child.pid}" in found["do"]


def test_what_halted_on_a_nan(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        make(tmp_path, model=lambda: spoilt(lambda inputs: inputs * float("nan"))).fit()
    ending = doctor(find_run("test", tmp_path).path, code=1)["ending"]
    assert "NaN or infinite" in ending["found"]
    assert "interlock blame" in ending["do"]
    assert "--epoch 1 --batch 2" in ending["do"]
    assert 'nonfinite="skip"' in ending["do"]


def test_what_failed_and_what_was_stopped(tmp_path: Path) -> None:
    trainer = make(tmp_path, name="failed", checkpoint=None)

    @trainer.before(Trigger.BACKWARD)
    def strike() -> None:
        raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    found = doctor(find_run("failed", tmp_path).path, code=1)
    assert "ZeroDivisionError: on purpose" in found["ending"]["found"]
    assert found["way on"]["severity"] == "wrong"
    assert "no checkpoint" in found["way on"]["found"]

    with make(tmp_path, name="stopped") as stopped:
        stopped.advance("STEP")
        stopped.halt("enough")
    assert doctor(find_run("stopped", tmp_path).path, code=0)["ending"]["severity"] == "note"


def test_a_damaged_checkpoint_and_a_damaged_journal(tmp_path: Path) -> None:
    make(tmp_path).fit()
    run = find_run("test", tmp_path)
    file = next(run.checkpoints.glob("*-DONE/*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    sign = doctor(run.path, code=1)["checkpoints"]
    assert file.parent.name in sign["found"]
    for name in ("journal.sqlite-wal", "journal.sqlite-shm"):
        (run.path / name).unlink(missing_ok=True)
    run.journal.write_bytes(b"nothing of the kind" * 1000)
    assert "no journal" in doctor(run.path, code=1)["journal"]["found"]


def test_what_is_not_delivered_and_why(tmp_path: Path) -> None:
    tracker = MLflow(tracking_uri="http://user:secret@127.0.0.1:9", patience_s=0.0)
    make(tmp_path, track=tracker).fit()
    run = find_run("test", tmp_path)
    wait_for(lambda: lease_holder(run.outbox_lease) is None and _trouble(run))
    sign = doctor(run.path, code=1)["delivery"]
    assert "points" in sign["found"]
    assert "127.0.0.1" in sign["found"]
    assert "secret" not in json.dumps(sign)
    assert "interlock sync" in sign["do"]


def _trouble(run: RunFolder) -> bool:
    return bool(status(run).trouble)


def test_imports_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom orchestrator.cli import main\n"
        "main(['--root', sys.argv[1], 'doctor', '--json'], standalone_mode=False)\n"
        "assert not {'torch', 'mlflow', 'numpy'} & sys.modules.keys()"
    )
    child = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
