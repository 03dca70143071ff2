"""`interlock launch`: real processes, killed by real signals, and started again by the command."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from exactness import assert_same, assert_sound, recorded
from orchestrator.forked_script import Script, import_ahead
from orchestrator.launched import asked_to_resume, tell_begun
from states import State
from tracking.journal import Journal
from tracking.runs import BEGUN_VARIABLE, RESUME_VARIABLE, RunFolder, create_run, list_runs
from waiting import ENVIRONMENT, HERE, wait_for

LAUNCH = (sys.executable, "-m", "orchestrator.cli", "launch")
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch
import beside
from trainings import make
from orchestrator import Checkpointing
from states import Trigger

torch.set_num_threads(1)
here = Path(sys.argv[1])
deaths = here / "deaths"

def die(trainer, places, number=signal.SIGKILL):
    "Once at each of these places."
    done = deaths.read_text().split() if deaths.exists() else []
    place = f"{trainer.run.name}:{trainer.epoch}:{trainer.batch}"
    if place in places and place not in done:
        deaths.write_text(" ".join([*done, place]))
        os.kill(os.getpid(), number)

die.__module__ = "orchestrator.harness"  # not the training's own code, which is watched

def train(name, *places, number=signal.SIGKILL, **options):
    options = {"checkpoint": Checkpointing(every_batches=1), "epochs": 3, **options}
    trainer = make(here / "runs", name=name, **options)
    hook = lambda: die(trainer, places, number)
    hook.__module__ = "orchestrator.harness"
    trainer.after(Trigger.END_BATCH)(hook)
    return trainer
"""


class Launched:
    """`interlock launch` of a script in a folder."""

    def __init__(self, folder: Path, code: str, *options: str, terminal: int | None = None) -> None:
        self.folder = folder
        (folder / "beside.py").write_text("import os\nprint('beside', os.getpid(), flush=True)\n")
        (folder / "train.py").write_text(SCRIPT + code)
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "orchestrator.cli",
                "launch",
                *options,
                str(folder / "train.py"),
                str(folder),
                "--x",
            ],
            env=ENVIRONMENT,
            cwd=folder,
            stdin=terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=None if terminal is None else self._take_terminal,
        )

    @staticmethod
    def _take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def ended(self) -> tuple[int, str, str]:
        """Exit status, and what was printed."""
        output, error = self.process.communicate(timeout=90)
        assert not psutil.pid_exists(self.process.pid)
        return self.process.returncode, output, error

    def fork(self) -> int:
        """The process that runs the script, once its training has begun."""
        wait_for(lambda: list(self.folder.glob("runs/*/recorder.bin")))
        return psutil.Process(self.process.pid).children()[0].pid

    @property
    def run(self) -> RunFolder:
        (run,) = list_runs(self.folder / "runs")
        return run


@pytest.fixture
def launched(tmp_path: Path) -> Any:
    """Start one; whatever is left of it afterwards is killed."""
    started: list[Launched] = []

    def launch(code: str, *options: str, **more: Any) -> Launched:
        started.append(Launched(tmp_path, code, *options, **more))
        return started[-1]

    yield launch
    for one in started:
        with contextlib.suppress(ProcessLookupError):  # its session's, of which its forks are
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.communicate()


def _attempts(run: RunFolder) -> list[str | None]:
    with Journal.open(run) as journal:
        return [attempt.outcome for attempt in journal.attempts()]


def test_it_is_killed_and_goes_on_to_the_same_end(launched: Callable[..., Launched], tmp_path: Path) -> None:
    one = launched(
        "print('argv', sys.argv[1:], sys.orig_argv[1:], __name__, __file__, sys.path[0], flush=True)\n"
        "import random, numpy\n"
        "print('drawn', torch.initial_seed(), numpy.random.rand(), random.random(), flush=True)\n"
        "train('a', 'a:0:3', 'a:2:1').fit()\n"
        "train('b', 'b:1:1', number=signal.SIGSEGV, model=lambda: __import__('trainings').network(0.1)).fit()"
    )
    status, output, error = one.ended()
    assert status == 0, error
    script = str(tmp_path / "train.py")
    said = re.findall(
        r"interlock process (\d+) was killed by (\w+) after [\d.]+ s, at epoch (\d), batch (\d); (.*)", error
    )
    assert [line[1:] for line in said] == [
        ("SIGKILL", "0", "3", "starting it again"),
        ("SIGKILL", "2", "1", "starting it again"),
        ("SIGSEGV", "1", "1", "starting it again"),
    ]
    expected = f"argv {[str(tmp_path), '--x']} {[script, str(tmp_path), '--x']} __main__ {script} {tmp_path}"
    assert output.count(expected) == 4
    # What lies beside the script is imported by each start.
    beside = re.findall(r"beside (\d+)", output)
    assert len(set(beside)) == 4
    assert beside[:3] == [line[0] for line in said]
    # What seeds itself in a new process does so in a fork.
    drawn = re.findall(r"drawn (\S+) (\S+) (\S+)", output)
    assert all(len(set(column)) == 4 for column in zip(*drawn, strict=True))
    # Each run is one run, and the one that was done was not trained again.
    runs = {run.name: run for run in list_runs(tmp_path / "runs")}
    assert len(list_runs(tmp_path / "runs")) == 2
    assert _attempts(runs["a"]) == ["died", "died", "done"]
    assert _attempts(runs["b"]) == ["died", "done"]
    assert json.loads(runs["a"].command.read_text())["argv"] == [sys.executable, script, str(tmp_path), "--x"]
    # To the same end as one that is left alone, in a process of its own.
    left_alone = tmp_path / "alone"
    left_alone.mkdir()
    (left_alone / "beside.py").write_text("")
    (left_alone / "train.py").write_text(SCRIPT + "train('a').fit()")
    subprocess.run(
        [sys.executable, left_alone / "train.py", left_alone],
        env=ENVIRONMENT,
        check=True,
        cwd=left_alone,
        timeout=90,
    )
    (whole,) = list_runs(left_alone / "runs")
    assert_sound(runs["a"])
    assert_same(recorded(whole), recorded(runs["a"]))


def test_a_run_is_gone_on_with_though_a_start_between_did_not_come_to_it(
    launched: Callable[..., Launched],
) -> None:
    code = """
train('a').fit()
marks = here / "marks"
marks.write_text((marks.read_text() if marks.exists() else "") + ".")
if len(marks.read_text()) == 2:
    os.kill(os.getpid(), signal.SIGKILL)
train('b', 'b:1:1').fit()
"""
    one = launched(code)
    status, _, error = one.ended()
    assert status == 0, error
    runs = list_runs(one.folder / "runs")
    assert [(run.name, _attempts(run)) for run in runs] == [("b", ["died", "done"]), ("a", ["done"])]


def test_one_that_comes_no_further_is_given_up(launched: Callable[..., Launched]) -> None:
    one = launched("deaths = Path('/dev/null')\ntrain('a', 'a:1:2').fit()", "--tries", "2")
    status, _, error = one.ended()
    assert status == 128 + signal.SIGKILL
    assert len(re.findall("at epoch 1, batch 2; starting it again", error)) == 2
    assert error.rstrip().endswith("batch 2; 2 starts in a row came no further than one before: giving up")
    assert _attempts(one.run) == ["died", "died", None]


def test_one_that_dies_before_a_run_begins_is_given_up(launched: Callable[..., Launched]) -> None:
    status, _, error = launched("os.kill(os.getpid(), signal.SIGABRT)", "--tries", "1").ended()
    assert status == 128 + signal.SIGABRT
    assert "was killed by SIGABRT" in error
    assert "before it began a run; 1 starts in a row" in error


def test_a_run_that_has_no_checkpoint_begins_anew(launched: Callable[..., Launched]) -> None:
    one = launched("train('a', 'a:1:2', checkpoint=None).fit()")
    status, _, error = one.ended()
    assert status == 0, error
    assert [_attempts(run) for run in list_runs(one.folder / "runs")] == [["done"], [None]]


def test_an_error_ends_it_as_python_would(launched: Callable[..., Launched], tmp_path: Path) -> None:
    status, _, error = launched("train('a')\nraise ValueError('a typing error')").ended()
    assert status == 1
    assert error.startswith(f'Traceback (most recent call last):\n  File "{tmp_path / "train.py"}", line ')
    assert error.rstrip().endswith("ValueError: a typing error")
    assert "starting it again" not in error


def test_with_errors_it_is_started_again_after_an_error(launched: Callable[..., Launched]) -> None:
    code = """
marks = here / "marks"
marks.write_text((marks.read_text() if marks.exists() else "") + ".")
if len(marks.read_text()) < 3:
    sys.exit(7)
train('a').fit()
"""
    status, _, error = launched(code, "--errors").ended()
    assert status == 0, error
    assert error.count("ended with status 7 after") == 2


def test_sigterm_is_handed_on_and_nothing_is_started_again(launched: Callable[..., Launched]) -> None:
    one = launched("train('a', epochs=100_000).fit()", "--errors")
    one.fork()
    one.process.send_signal(signal.SIGTERM)
    status, _, error = one.ended()
    assert status == 128 + signal.SIGTERM, error
    assert "starting it again" not in error
    assert _attempts(one.run) == ["stopped"]


def test_ctrl_c_reaches_the_script_once(launched: Callable[..., Launched]) -> None:
    ours, theirs = pty.openpty()
    try:
        one = launched("train('a', epochs=100_000).fit()", terminal=theirs)
        one.fork()
        os.write(ours, b"\x03")
        status, _, error = one.ended()
    finally:
        os.close(ours)
        os.close(theirs)
    assert status == 128 + signal.SIGINT, error
    # A second one would have stopped it at once, unsaved.
    assert _attempts(one.run) == ["stopped"]
    with Journal.open(one.run) as journal:
        assert journal.attempts()[-1].end_state is State.HALTED


def test_the_script_halts_where_the_command_is_killed(launched: Callable[..., Launched]) -> None:
    one = launched("train('a', epochs=100_000).fit()")
    fork = one.fork()
    one.process.kill()
    wait_for(lambda: not psutil.pid_exists(fork))
    assert _attempts(one.run) == ["stopped"]


def test_what_cannot_be_shared_is_imported_by_each_start(
    launched: Callable[..., Launched], tmp_path: Path
) -> None:
    (tmp_path / "threading_one.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), name='helper', daemon=True).start()\n"
    )
    one = launched("train('a', 'a:1:2').fit()", "--import", "threading_one")
    status, _, error = one.ended()
    assert status == 0, error
    assert "what was imported has started threads (helper): each start imports everything anew" in error
    assert "at epoch 1, batch 2; starting it again" in error
    assert _attempts(one.run) == ["died", "done"]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_module_beside_the_script_is_the_one_that_it_gets(tmp_path: Path, *, ahead: bool) -> None:
    (tmp_path / "mailbox.py").write_text("")
    (tmp_path / "train.py").write_text("import mailbox\nprint(mailbox.__file__)")
    found = subprocess.run(
        [*LAUNCH, *(["--import", "mailbox"] if ahead else []), tmp_path / "train.py"],
        env=ENVIRONMENT, cwd=HERE, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert found.stdout.strip() == str(tmp_path / "mailbox.py")
    said = "mailbox beside the script has the name of a module that is imported already: each start imports everything"
    assert (said in found.stderr) == ahead


def test_a_module_is_run_as_by_python_m(tmp_path: Path) -> None:
    package = tmp_path / "project"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text(
        "import sys\nfrom . import __name__ as package\n"
        "print(__name__, package, sys.argv[1:], sys.orig_argv[1:], sys.path[0])"
    )
    found = subprocess.run(
        [*LAUNCH, "-m", "project.train", "--epochs", "3"],
        env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    expected = ["--epochs", "3"]
    assert (
        found.stdout.strip() == f"__main__ project {expected} {['-m', 'project.train', *expected]} {tmp_path}"
    )
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["nowhere.py"],
            "nowhere.py: there is no such file; expected a script of Python, or a module's name after -m",
        ),
        (["--tries", "0", "train.py"], "0 is not in the range x>=1"),
        (
            ["--import", "nothing_of_it", "train.py"],
            "--import: No module named 'nothing_of_it'; expected modules",
        ),
        (["--trys", "3", "train.py"], "No such option '--trys'. Did you mean '--tries'?"),
        ([], "Missing argument 'SCRIPT'"),
    ],
)
def test_what_makes_no_sense_is_said(words: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('never')")
    found = subprocess.run(
        [*LAUNCH, *words],
        env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert found.returncode != 0
    assert said in found.stderr
    assert not found.stdout


def test_only_what_is_installed_is_imported_ahead(tmp_path: Path) -> None:
    """In a process that has imported nothing else."""
    (tmp_path / "beside_it.py").write_text("")
    script, wrong = tmp_path / "train.py", tmp_path / "wrong.py"
    script.write_text(
        "import beside_it, there_is_none\nfrom xml.dom import pulldom\nfrom . import a\nimport torch as t\n"
        "if True:\n    import this\n"
    )
    wrong.write_text("import what is it\n")  # running it says so
    code = f"""
import sys
from orchestrator.forked_script import Script, import_ahead
import_ahead(Script({str(wrong)!r}))
assert "torch" in sys.modules and "xml.dom.pulldom" not in sys.modules
import_ahead(Script({str(script)!r}))
assert "xml.dom.pulldom" in sys.modules
assert not {{"beside_it", "there_is_none", "this"}} & set(sys.modules)
"""
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(HERE), str(tmp_path)])}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True, timeout=90)
    with pytest.raises(ImportError, match="there_is_none"):
        import_ahead(Script(str(script)), ["there_is_none"])


def test_each_trainer_gets_the_first_run_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [create_run(tmp_path, name) for name in ("a", "b", "a")]
    monkeypatch.setenv(RESUME_VARIABLE, "\n".join(str(run.path) for run in runs))
    assert asked_to_resume("b") == str(runs[1].path)
    assert asked_to_resume("b") is None
    assert [asked_to_resume("a") for _ in range(3)] == [str(runs[0].path), str(runs[2].path), None]
    assert RESUME_VARIABLE not in os.environ
    tell_begun(runs[0])  # nobody wants to know
    monkeypatch.setenv(BEGUN_VARIABLE, str(tmp_path / "begun"))
    for run in runs:
        tell_begun(run)
    assert (tmp_path / "begun").read_text().splitlines() == [str(run.path) for run in runs]
