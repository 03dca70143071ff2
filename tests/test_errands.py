"""`interlock seek`, `replay` and `blame`: handed over to the recorded script, and done there instead of training."""

import io
import json
import os
import pty
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_blame import recorded
from test_cli import process, record_command

import trainings
from orchestrator import InterlockError, NonFiniteError, Trainer
from orchestrator.cli import main
from orchestrator.errands import ERRAND_VARIABLE, Errand, ErrandError
from states import State
from tracking.journal import Journal
from tracking.runs import RunFolder, list_runs

SCRIPT = """
import os
from pathlib import Path
from trainings import make, spoilt
print("before", os.environ["INTERLOCK_ERRAND"][:9])
trainer = make(Path("runs"), model=spoilt(lambda x: (x - x).log() * 0, 9))
trainer.fit(resume="auto")
print("never reached")
"""


def make(root: Path, **options: Any) -> Trainer:
    """Halts in batch 3 of epoch 1, on a log of zero."""
    return trainings.make(root, model=trainings.spoilt(lambda x: (x - x).log() * 0, 9), **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("errands")
    trainer = make(folder / "runs")
    with pytest.raises(NonFiniteError):
        trainer.fit()
    assert trainer.run is not None
    (folder / "train.py").write_text(SCRIPT)
    record_command(trainer.run, "train.py", cwd=folder)
    return trainer.run


@pytest.fixture
def do(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """An errand in this process; its exit status, and what was printed. The run is as it was afterwards."""

    def do(what: Any, code: str = "", start: str = "fit", **options: Any) -> tuple[int, str, str]:
        before = recorded(run)
        monkeypatch.setenv(ERRAND_VARIABLE, Errand(what, str(run.path), **options).to_json())
        monkeypatch.setattr(sys, "stdin", io.StringIO(code))
        trainer = make(run.path.parent)
        with pytest.raises(SystemExit) as left:
            getattr(trainer, start)()
        assert ERRAND_VARIABLE not in os.environ
        assert recorded(run) == before
        return left.value.code, *capsys.readouterr()

    return do


# -- seek ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["fit", "start", "advance"])
def test_code_from_a_pipe_is_run_at_the_moment(do: Any, start: str) -> None:
    code = "print(trainer.state is State.BACKWARD, trainer.epoch, trainer.batch, len(batch[0]), model is trainer.model)"
    found = do("seek", code, start, epoch=1, batch=2, state="BACKWARD")
    assert found[:2] == (0, "True 1 2 8 True\n")
    assert "at epoch 1, batch 2 (BACKWARD): reached from " in found[2]
    assert "2 batches done again, every loss the recorded one, bit for bit" in found[2]


def test_a_script_is_run_at_the_moment(do: Any, tmp_path: Path) -> None:
    script = tmp_path / "look.py"
    script.write_text("if __name__ == '__main__':\n    print(__file__, trainer.batch)\n")
    assert do("seek", epoch=0, batch=4, script=str(script))[:2] == (0, f"{script} 4\n")
    script.write_text("def f():\n    raise ValueError('mine')\nf()\n")
    status, _, errors = do("seek", epoch=0, batch=4, script=str(script))
    assert status == 1
    trace = errors[errors.index("Traceback") :]
    assert trace.splitlines()[1] == f'  File "{script}", line 3, in <module>'
    assert "errands.py" not in trace
    script.write_text("this is no Python")
    status, _, errors = do("seek", epoch=0, batch=4, script=str(script))
    assert (status, "SyntaxError" in errors) == (1, True)


def test_a_moment_that_never_was(do: Any) -> None:
    status, output, errors = do("seek", epoch=7)
    assert (status, output) == (1, "")
    assert errors.startswith("Error: ")
    assert "was never in EPOCH_START at epoch 7" in errors


def test_going_on_is_a_run_of_its_own(do: Any, run: RunFolder, tmp_path: Path) -> None:
    code = f"""
from tracking.runs import list_runs
trainer._settings.root = {str(tmp_path)!r}
trainer.advance(until=State.STEP)
"""
    assert do("seek", code, epoch=1, batch=1)[0] == 0
    (branch,) = list_runs(tmp_path)
    with Journal.open(branch) as journal:
        assert journal.run_info().parent.run == run.id
        assert journal.attempts()[-1].outcome == "stopped"
        assert journal.last_transition().dest is State.HALTED


def test_a_prompt_in_a_real_process(run: RunFolder) -> None:
    """Through the command, the recorded script and a terminal."""
    before = recorded(run)
    ours, theirs = pty.openpty()
    arguments = ["seek", run.path, "--epoch", "1", "--batch", "2", "--state", "forward"]
    with process("-m", "orchestrator.cli", *arguments, stdin=theirs) as child:
        os.write(
            ours, b"print(trainer.state, trainer.batch)\ntrainer.advance().dest.value + '!'\n1 / 0\n\x04"
        )
        output, errors = child.communicate(timeout=120)
    os.close(ours), os.close(theirs)
    assert child.returncode == 0, errors
    assert "before {" in output
    assert "never reached" not in output
    assert "State.FORWARD 2\n" in output
    said = output + errors  # IPython, where it is installed, says all to standard output
    assert "trainer.blame()" in said, "the banner says what to try"
    assert "ZeroDivisionError" in said
    # It went on, one transition, as a run of its own, which was ended properly.
    assert "'BACKWARD!'" in output
    newest = list_runs(run.path.parent)[0]
    with Journal.open(newest) as journal:
        assert journal.run_info().parent.run == run.id
        assert journal.attempts()[-1].outcome == "stopped"
    assert recorded(run)[:3] == before[:3]


# -- replay -------------------------------------------------------------------------------------------

HOOKS = """
from orchestrator import Callback
seen = []
@trainer.after(Trigger.BACKWARD)
def look():
    seen.append((trainer.epoch, trainer.batch))
class Ends(Callback):
    def on_train_begin(self):
        seen.append(self.trainer.state.value)
    def on_epoch_end(self, epoch, metrics):
        seen.append("epoch ends")
callbacks = [Ends()]
def done():
    print(*seen, trainer.state.value, len(trainer.history))
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "IDLE (0, 0) (0, 1) (0, 2) (0, 3) (0, 4) (0, 5) epoch ends EPOCH_END 1"),
        ({"first": (0, 5), "last": (1, 1)}, "BATCH_END (0, 5) epoch ends (1, 0) (1, 1) BATCH_END 1"),
        ({"first": (1, 0), "last": (1, 0)}, "EPOCH_START (1, 0) BATCH_END 1"),
    ],
)
def test_a_stretch_with_the_hooks_of_a_script(
    do: Any, tmp_path: Path, options: dict[str, Any], expected: str
) -> None:
    (tmp_path / "hooks.py").write_text(HOOKS)
    status, output, errors = do("replay", script=str(tmp_path / "hooks.py"), **options)
    assert (status, output.strip()) == (0, expected)
    batches = expected.count("(")
    assert f"replayed {'1 batch' if batches == 1 else f'{batches} batches'}, after " in errors
    assert "every loss the recorded one, bit for bit." in errors


@pytest.mark.parametrize(
    "wrong",
    [
        "raise ValueError('mine')",
        "@trainer.after(Trigger.STEP)\ndef f(): raise ValueError('mine')",
        "def done(): raise ValueError('mine')",
    ],
)
def test_what_a_script_raises_is_shown(do: Any, tmp_path: Path, wrong: str) -> None:
    (tmp_path / "hooks.py").write_text(wrong)
    status, _, errors = do("replay", script=str(tmp_path / "hooks.py"), first=(0, 4), last=(0, 5))
    assert status == 1
    assert errors.count("Traceback") == 1
    assert "ValueError: mine" in errors
    assert "hooks.py" in errors


def test_another_training_than_the_recorded_one_is_said(do: Any, tmp_path: Path) -> None:
    (tmp_path / "hooks.py").write_text(
        "@trainer.after(Trigger.STEP)\ndef f():\n    for p in trainer.model.parameters(): p.data.add_(0.01)"
    )
    with pytest.warns(UserWarning, match="done again"):
        status, _, errors = do("replay", script=str(tmp_path / "hooks.py"), first=(0, 3), last=(0, 5))
    assert status == 0
    assert "not the same as it was: epoch 0, batch 4" in errors


# -- blame --------------------------------------------------------------------------------------------


@pytest.mark.long
def test_blame_in_a_real_process(run: RunFolder) -> None:
    before = recorded(run)
    with process("-m", "orchestrator.cli", "blame", run.path) as child:
        output, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert (
        "epoch 1, batch 3: module 2.1 (At) was given finite values, and its output has 64 NaN of 64" in output
    )
    assert "in torch.Tensor.log, called at " in output
    assert "(x - x).log()" in output
    assert recorded(run) == before


def test_blame_of_a_batch_that_is_innocent(do: Any) -> None:
    status, output, errors = do("blame", epoch=0, batch=2)
    assert (status, output) == (1, "")
    assert "everything is finite from epoch 0, batch 2" in errors


# -- handing over -------------------------------------------------------------------------------------


def test_an_errand_of_another_run_is_left_for_it(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ERRAND_VARIABLE, Errand("seek", str(run.path), epoch=0).to_json())
    trainer = trainings.make(tmp_path, name="other", epochs=1)
    trainer.fit()
    assert trainer.state is State.DONE
    assert ERRAND_VARIABLE in os.environ


def test_an_errand_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("{", "[]", '{"where": 1}', '{"what": "seek", "run": "x", "first": 3}'):
        monkeypatch.setenv(ERRAND_VARIABLE, text)
        with pytest.raises(ErrandError, match="cannot be read"):
            trainings.make(tmp_path).start()
    assert not list_runs(tmp_path)


def interlock(*words: object, code: int) -> str:
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == code, result.output
    return result.output


def test_what_cannot_be_handed_over(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.start()
    run.close()
    folder = run.run
    assert folder is not None
    record_command(folder, "-c", "import os; assert 'INTERLOCK_ERRAND' in os.environ", cwd=tmp_path)
    text = interlock("blame", folder.path, code=2)
    assert "ended with status 0 before a trainer of a run named 'test' had started" in text
    record_command(folder, "-c", "raise SystemExit(3)", cwd=tmp_path)
    assert "ended with status 3 before" in interlock("seek", folder.path, "--state", "idle", code=2)
    record_command(folder, "-m", "ipykernel_launcher", "-f", "x.json", cwd=tmp_path)
    text = interlock("seek", folder.path, "--epoch", 1, code=1)
    assert f"from a notebook ({sys.executable} -m ipykernel_launcher -f x.json)" in text
    assert f"trainer.seek(epoch, batch, state, run={str(folder.path)!r})" in text
    record_command(folder, "train.py", cwd=tmp_path / "gone")
    text = interlock("blame", folder.path, "--epoch", 1, "--batch", 2, code=1)
    by_hand = json.dumps({"what": "blame", "run": str(folder.path), "epoch": 1, "batch": 2})
    assert f"INTERLOCK_ERRAND='{by_hand}'" in text
    assert "expected --epoch, or --state IDLE" in interlock("seek", folder.path, code=2)
    assert "expected both --epoch and --batch" in interlock("blame", folder.path, "--epoch", 1, code=2)
    (tmp_path / "hooks.py").touch()
    refused = interlock("replay", folder.path, tmp_path / "hooks.py", "--first", "1:x", code=2)
    assert "expected an epoch, such as 2, or epoch and batch, such as 2:113" in refused
    assert "does not exist" in interlock("replay", folder.path, tmp_path / "none.py", code=2)


def test_a_run_without_a_complete_epoch_says_what_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make(tmp_path)
    trainer.advance(until=State.BATCH_END)
    trainer.close()
    assert trainer.run is not None
    (tmp_path / "hooks.py").touch()
    errand = Errand("replay", str(trainer.run.path), script=str(tmp_path / "hooks.py"))
    monkeypatch.setenv(ERRAND_VARIABLE, errand.to_json())
    with pytest.raises(SystemExit):
        make(tmp_path).fit()
    assert "has no complete epoch (it goes up to epoch 0, batch 0" in capsys.readouterr().err
    assert issubclass(ErrandError, InterlockError)
