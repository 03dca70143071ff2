"""What is written down by the thousand and in a hurry is what is written down transition by transition."""

import sqlite3
import warnings
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import given, settings

from orchestrator import Trainer
from random_trainings import Description, build, descriptions, run_folders
from states.table import TERMINAL


def journaled(trainer: Trainer) -> list[Any]:
    """All that a journal says, but for times."""
    with closing(sqlite3.connect(trainer.run.journal)) as journal:
        found: list[Any] = []
        for columns in (
            "seq, attempt, scope, epoch, batch, phase, trigger, source, dest, loss, note FROM transitions",
            "scope, epoch, batch, step, key, iif(key IN ('batch_time', 'duration'), 0, value) FROM metrics",
        ):
            found += journal.execute(f"SELECT {columns} ORDER BY 1, 2, 3, 4, 5").fetchall()
        return found


def timed(trainer: Trainer, scope: str) -> list[tuple[int, int]]:
    with closing(sqlite3.connect(trainer.run.journal)) as journal:
        return journal.execute(
            "SELECT time_ns, duration_ns FROM transitions WHERE scope = ? ORDER BY seq", (scope,)
        ).fetchall()


@settings(max_examples=settings().max_examples // 4)
@given(descriptions())
def test_fit_writes_what_advance_writes(description: Description) -> None:
    with run_folders() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        at_once = build(description, folder / "fit")
        at_once.fit()
        with build(description, folder / "advance") as one_by_one:
            one_by_one.start()
            while one_by_one.state not in TERMINAL:
                one_by_one.advance()
        assert journaled(at_once) == journaled(one_by_one)
        for trainer in (at_once, one_by_one):
            for scope in ("train", *trainer._training.validation.scopes):
                times = timed(trainer, scope)
                assert all(duration >= 0 for _, duration in times)
                # A transition begins when the one before is complete, or later: after a save, in another pass.
                assert all(
                    time_ns - duration >= before for (before, _), (time_ns, duration) in pairwise(times)
                )


def test_times_add_up(tmp_path: Path) -> None:
    trainer = build(Description(batches=50), tmp_path)
    trainer.fit()
    times = timed(trainer, "train")
    exact = sum(time_ns - duration == before for (before, _), (time_ns, duration) in pairwise(times))
    assert exact > 0.9 * len(times)
