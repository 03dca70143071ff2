"""One training, killed again and again at random moments by real signals, and always resumed: still exact."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.nn.modules.module import register_module_forward_pre_hook

from exactness import assert_same, assert_sound, leaves, recorded, untimed
from orchestrator import Trainer
from orchestrator.cli import main
from orchestrator.snapshot.filesystem import Disk
from orchestrator.snapshot.storage import read_checkpoint
from random_trainings import Description, build, run_folders
from states import State, Trigger
from tracking.journal import Journal
from tracking.runs import RunFolder, list_runs

TRAINING = Description(
    dropout=True,
    batchnorm="trained",
    noise="numpy",
    optimizer="AdamW",
    scheduler="warmup then cosine",
    accumulate=2,
    clip=0.5,
    batches=6,
    batch_size=3,
    rest=True,
    sampler="shuffle",
    augmentation="numpy",
    infinite=frozenset({3}),
    validation="epoch",
    loaders=2,
    shuffled_validation=True,
    metrics=("function",),
    callbacks=("diary", "EMA validated", "GradientStatistics"),
    every_batches=1,
    best=True,
)


@dataclass(frozen=True)
class Death:
    """How an attempt ends. Its `where` says what `at` counts, from 1:

    "transition": transitions; the kill comes before the journal has the one at hand.
    "validation": forward passes of validation.
    "disk": the calls by which checkpoints change the disk; the kill comes instead of one.
    "renamed": checkpoints that have just got their name; the journal has no row of the last one.
    "removed": files of checkpoints that retention removes.
    "moment": seconds since the process began.
    """

    where: str
    at: float
    signal: str = "SIGKILL"
    workers: int = 0


# -- in a process of its own -------------------------------------------------------------------------


def nursery(plan: dict[str, Any]) -> None:
    """Train unbroken, then through all deaths: each attempt is a fork of this process, which never trains."""
    torch.set_num_threads(1)
    root, workers = Path(plan["root"]), plan["workers"]
    description = replace(TRAINING, epochs=plan["epochs"])
    build(description, root)  # each child would import anew what torch puts off until it is used
    assert _status(partial(_live, description, root / "unbroken", workers)) == 0
    for number, words in enumerate(plan["deaths"]):
        death = Death(**words)
        attempt = partial(_live, description, root / "killed", death.workers, death)
        status = _status(attempt, *([death.signal, death.at] if death.where == "moment" else []))
        # A signal that comes before fit has its handlers ends the process by itself.
        gentle = {"SIGKILL": [], "SIGTERM": [143], "SIGINT": [130]}[death.signal]
        assert status in (*gentle, -signal.Signals[death.signal]), f"{status} of {number}, {death}"
    assert _status(partial(_live, description, root / "killed", 0)) == 0


def _status(attempt: Callable[[], None], number: str = "", after: float = 0.0) -> int:
    """How a child ends that carries out `attempt`, and is sent a signal after so many seconds if need be."""
    child = os.fork()
    if child == 0:
        try:
            attempt()
            os._exit(0)
        except SystemExit as leaving:
            os._exit(int(leaving.code or 0))
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if number:
        time.sleep(after)
        os.kill(child, signal.Signals[number])
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _live(description: Description, root: Path, workers: int, death: Death | None = None) -> None:
    warnings.simplefilter("error")
    # The first checkpoint was never complete.
    warnings.filterwarnings("ignore", ".*no checkpoint to continue from; a new run begins")
    warnings.filterwarnings("ignore", "calls, a variable that counted encloses")  # this test's own counter
    trainer = build(description, root, workers=workers)
    if death is not None:
        _arm(trainer, death)
    trainer.fit("auto")


def _arm(trainer: Trainer, death: Death) -> None:
    """Let this process be struck at the place that `death` names."""
    strike = _at_the(death.at, lambda: os.kill(os.getpid(), signal.Signals[death.signal]))
    match death.where:
        case "transition":
            for trigger in Trigger:
                trainer.after(trigger)(strike)
        case "validation":
            register_module_forward_pre_hook(
                lambda module, _: (
                    strike() if trainer.validating and module is trainer.validation_model else None
                )
            )
        case "disk":
            for call in ("make_folder", "create", "write", "sync", "sync_folder", "rename", "remove_file"):
                _around(call, before=strike)
        case "renamed":
            _around("rename", after=lambda old, new: None if new.name.startswith(".") else strike())
        case "removed":
            _around("remove_file", after=strike)


def _at_the(count: float, act: Callable[[], None]) -> Callable[..., None]:
    """A function that acts when it is called for the `count`-th time."""
    calls = 0

    def counted(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            act()

    return counted


def _nothing(*_: object) -> None:
    pass


def _around(call: str, before: Callable[..., None] = _nothing, after: Callable[..., None] = _nothing) -> None:
    """Have something happen around every call of the disk of that name, in this process."""
    original = getattr(Disk, call)

    def surrounded(disk: Disk, *arguments: Any) -> Any:
        before(*arguments)
        result = original(disk, *arguments)
        after(*arguments)
        return result

    setattr(Disk, call, surrounded)


# -- and in that of the tests ------------------------------------------------------------------------


_NURSERY = "import json, sys, test_many_kills; test_many_kills.nursery(json.loads(sys.argv[1]))"


def survive(root: Path, deaths: list[Death], *, epochs: int, workers: int = 0) -> None:
    """What went through all these deaths is what it would have been without them."""
    plan = {"root": str(root), "epochs": epochs, "workers": workers, "deaths": [asdict(d) for d in deaths]}
    output = root / "output"
    with output.open("w") as stream:  # not a pipe: orphans, data workers, hold it open for seconds
        done = subprocess.run(
            [sys.executable, "-c", _NURSERY, json.dumps(plan)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            stdout=stream,
            stderr=stream,
        )
    assert done.returncode == 0, f"{output.read_text()}\n{deaths}"
    unbroken, killed = (list_runs(root / name)[0] for name in ("unbroken", "killed"))
    assert_same(final(unbroken), final(killed))
    assert_same(recorded(unbroken), recorded(killed))
    assert_sound(killed)
    checked = CliRunner().invoke(main, ["--root", str(root / "killed"), "check", killed.id])
    assert checked.exit_code == 0, checked.output


def final(run: RunFolder) -> dict[str, Any]:
    """The state that a run ended in, from its last checkpoint; durations left out."""
    with Journal.open(run) as journal:
        last = max(journal.checkpoints(), key=lambda checkpoint: checkpoint.seq)
    _, tree = read_checkpoint(run.checkpoints / last.name)
    assert tree["state"] is State.DONE
    kept = (
        "model",
        "optimizers",
        "place",
        "window",
        "data",
        "metrics",
        "validation_data",
        "callbacks",
        "random",
    )
    history = [untimed(values) for values in tree["history"]]
    return dict(leaves({**{part: tree[part] for part in kept}, "history": history}, ""))


@pytest.mark.long
def test_killed_five_times() -> None:
    seed = os.environ.get("PYTEST_SEED", str(int.from_bytes(os.urandom(4))))
    print(f"PYTEST_SEED={seed}")
    chance = random.Random(seed)
    deaths = [
        # Before the first checkpoint is complete, and when the journal does not know of it yet.
        Death("disk", chance.randint(1, 10)),
        Death("renamed", 1),
        Death("disk", chance.randint(20, 80), workers=2),
        Death("validation", chance.randint(1, 4)),
        Death("transition", chance.randint(1, 40), chance.choice(["SIGTERM", "SIGINT"])),
    ]
    with run_folders() as root:
        survive(root, deaths, epochs=4)


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_twenty_times(workers: int) -> None:
    seed = os.environ.get("PYTEST_SEED", str(int.from_bytes(os.urandom(4))))
    print(f"PYTEST_SEED={seed}")
    chance = random.Random(seed)
    # Each attempt goes on by 20 batches at most, so none comes to the end.
    later = [
        *(("transition", chance.randint(1, 60)) for _ in range(6)),
        *(("validation", chance.randint(1, 8)) for _ in range(3)),
        *(("disk", chance.randint(1, 150)) for _ in range(3)),
        *(("renamed", chance.randint(1, 6)) for _ in range(2)),
        *(("removed", chance.randint(1, 40)) for _ in range(2)),
        *(("moment", chance.uniform(0.02, 0.2)) for _ in range(2)),
    ]
    chance.shuffle(later)
    signals = [*["SIGKILL"] * 4, "SIGTERM", "SIGINT"]
    deaths = [
        # Before the first checkpoint is complete, and when the journal does not know of it yet.
        Death("disk", chance.randint(1, 10), workers=workers),
        Death("renamed", 1, workers=workers),
        *(Death(*place, chance.choice(signals), chance.choice([0, 0, 2])) for place in later),
    ]
    with run_folders() as root:
        survive(root, deaths, epochs=40, workers=workers)
