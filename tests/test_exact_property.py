"""The property above all: a random training that is cut at random points equals the unbroken one, bit for bit."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.modules.module import register_module_forward_pre_hook

from exactness import Standing, assert_same, assert_sound, ending, recorded
from orchestrator import Trainer
from orchestrator.errors import TaintedError
from orchestrator.requests import Save
from orchestrator.snapshot.storage import parse_checkpoint_name
from random_trainings import Description, Short, build, descriptions, run_folders
from states import State, Trigger
from states.table import TERMINAL
from tracking.runs import RunFolder, list_runs

EVERY_STATE_IS_SAVED = True
"""Whether FORWARD and HALTED are saved as such. If not, a save in FORWARD moves on to BACKWARD, and none is
made in HALTED beyond that of the state it halted in."""


@dataclass(frozen=True, repr=False)
class Cut(Short):
    """Where an attempt ends, and how.

    place "between": after `at` transitions and from there up to state `until`, by `how`:
        "close": Trainer.close();
        "crash": save, wait, and what is on disk then is all there is, `lag` transitions later.
    place "hook", "forward": in the after-hook of the `at`-th transition, or at the `at`-th forward of
        the model (that of validation counts too), by `how`: "raise", "halt", "SIGTERM" or "SIGINT".
    """

    at: int = 1
    until: State | None = None
    place: str = "between"
    how: str = "close"
    lag: int = 0
    workers: int = 0
    """Of the attempt that follows, where the description has any."""


_until = st.none() | st.sampled_from(State)
_workers = st.sampled_from([0, 2])
_inside = {"how": st.sampled_from(["halt", "raise", "SIGTERM", "SIGINT"]), "workers": _workers}
_cuts = st.one_of(
    st.builds(Cut, at=st.integers(1, 30), until=_until, workers=_workers),
    st.builds(
        Cut,
        at=st.integers(1, 30),
        until=_until,
        how=st.just("crash"),
        lag=st.sampled_from([0, 0, 1, 3, 9]),
        workers=_workers,
    ),
    st.builds(Cut, at=st.integers(1, 30), place=st.just("hook"), **_inside),
    st.builds(Cut, at=st.integers(1, 10), place=st.just("forward"), **_inside),
)
CUTS = st.lists(_cuts, min_size=1, max_size=3)


class Interruption(Exception):
    """What a hook raises."""


# -- ending an attempt -------------------------------------------------------------------------------


def carry_out(cut: Cut, trainer: Trainer) -> Standing | None:
    """Train up to the cut; the run's folder is then what the next process would find.

    Returns where the next attempt has to stand, where nothing may be done twice.
    """
    if cut.place != "between":
        with _struck(cut, trainer), contextlib.suppress(Interruption, SystemExit, KeyboardInterrupt):
            trainer.fit("auto")
        return None
    trainer.start("auto")
    for _ in range(cut.at):
        if trainer.state not in TERMINAL:
            trainer.advance()
    if trainer.state in TERMINAL:
        return None
    if cut.until is State.HALTED:
        return _halt_and_save(trainer)
    if cut.until is not None:
        trainer.advance(until=cut.until)
    if trainer.state in TERMINAL:
        return None
    return _crash(cut.lag, trainer) if cut.how == "crash" else _close(trainer)


def _saved_as(trainer: Trainer) -> Standing:
    """Where a save of this moment stands."""
    there = Standing.of(trainer)
    moves_on = there.state is State.FORWARD and not EVERY_STATE_IS_SAVED
    return replace(there, state=State.BACKWARD) if moves_on else there


def _close(trainer: Trainer) -> Standing:
    there = _saved_as(trainer)
    trainer.close()
    assert replace(Standing.of(trainer), state=there.state) == there
    return there


def _halt_and_save(trainer: Trainer) -> Standing:
    there = _saved_as(trainer)
    saves: list[Save] = []
    trainer.on(State.HALTED)(lambda: saves.append(trainer.save()))
    trainer.halt("a cut in HALTED")
    trainer.advance(until=State.HALTED)
    (save,) = saves
    if EVERY_STATE_IS_SAVED:
        assert save.wait().is_dir()
    else:
        with pytest.raises(TaintedError, match="stands in HALTED"):
            save.wait()
    return there


def _crash(lag: int, trainer: Trainer) -> Standing | None:
    """Leave of the run what a kill at this moment would, and let the attempt end unseen."""
    there = _saved_as(trainer)
    saved = parse_checkpoint_name(trainer.save().wait().name)
    assert saved is not None
    assert (saved.state, saved.epoch, saved.batch) == (there.state, there.epoch, there.batch)
    assert Standing.of(trainer) == there
    for _ in range(lag):
        if trainer.state not in TERMINAL:
            trainer.advance()
    if trainer.state in TERMINAL:
        return None
    run, attempt = trainer.run, trainer._training.attempt
    assert run is not None
    assert attempt is not None
    # The copy is not made at one moment, as a kill is: what is being written is waited for.
    attempt.wait_for_save()
    copy = run.path.parent.with_name("left by a crash")
    _copy(run, copy)
    trainer.close()
    shutil.rmtree(run.path)
    copy.rename(run.path)
    return there if lag == 0 else None


def _copy(run: RunFolder, copy: Path) -> None:
    """Copy the run's folder between two transactions of the journal's writer.

    By another process: this one would lose its locks on the files by closing them after reading.
    """
    with contextlib.closing(sqlite3.connect(run.journal, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        subprocess.run(["cp", "-a", str(run.path), str(copy)], check=True)
        connection.execute("ROLLBACK")


@contextlib.contextmanager
def _struck(cut: Cut, trainer: Trainer) -> Iterator[None]:
    """See to it that the attempt is interrupted from inside."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls != cut.at:
            return
        if cut.how == "raise":
            raise Interruption
        if cut.how == "halt":
            trainer.halt("a cut")
        else:
            os.kill(os.getpid(), signal.Signals[cut.how])

    if cut.place == "hook":
        for trigger in Trigger:
            trainer.after(trigger)(count)
        yield
        return
    # Of all modules, as the one that is validated may be another than the one that is trained.
    handle = register_module_forward_pre_hook(
        lambda module, _: count() if module in (trainer.model, trainer.validation_model) else None
    )
    try:
        yield
    finally:
        handle.remove()


# -- the property ----------------------------------------------------------------------------------


def check(description: Description, cuts: list[Cut]) -> None:
    """Interrupted at each of the cuts in turn equals unbroken."""
    with run_folders() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", r"batch \d+ of epoch \d+ is empty")
        warnings.filterwarnings("ignore", "calls, a variable that count encloses")  # the test's own counter
        warnings.filterwarnings("ignore", ".*was trained by another Trainer of this process")  # so it was
        unbroken = build(description, folder / "unbroken")
        unbroken.fit()
        expected = ending(unbroken)
        assert unbroken.run is not None
        broken = interrupted(description, cuts, folder / "broken")
        assert_same(expected, ending(broken))
        (run,) = list_runs(folder / "broken")
        assert_sound(unbroken.run)
        assert_sound(run)
        assert_same(recorded(unbroken.run), recorded(run))


def interrupted(description: Description, cuts: list[Cut], root: Path) -> Trainer:
    """Each attempt is a trainer of its own, whose global generators and first weights are unlike the others'."""
    workers, expected = description.workers, None
    for seed, cut in enumerate([*cuts, None], start=1):
        trainer = build(description, root, seed=seed, workers=workers)
        stood: list[Standing] = []
        trainer.after(Trigger.RESUME)(partial(_stand, trainer, stood))
        there = carry_out(cut, trainer) if cut is not None else None
        if cut is None:
            trainer.fit("auto")
        broken_off = cut is not None and cut.place == "forward" and not stood  # as a forward was done again
        assert expected is None or broken_off or stood == [expected]
        expected = expected if broken_off else there
        workers = cut.workers if cut is not None and description.workers else 0
    return trainer


def _stand(trainer: Trainer, stood: list[Standing]) -> None:
    stood.append(Standing.of(trainer))


@given(descriptions(), CUTS)
def test_interrupted_equals_unbroken(description: Description, cuts: list[Cut]) -> None:
    check(description, cuts)


@pytest.mark.parametrize(
    ("description", "cuts"),
    [
        # Resuming warned of a learning rate that the scheduler, not the user, had changed.
        (Description(two_groups=True, optimizer="Adagrad", scheduler="plateau by batch"), [Cut(at=40)]),
        # The forward that a resume does again raises: the next attempt stands there all the same.
        (Description(), [Cut(until=State.FORWARD), Cut(place="forward", how="raise")]),
    ],
)
def test_what_the_property_found(description: Description, cuts: list[Cut]) -> None:
    check(description, cuts)


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(max_examples=2000)
@given(descriptions(), CUTS)
def test_interrupted_equals_unbroken_two_thousand_times(description: Description, cuts: list[Cut]) -> None:
    check(description, cuts)
