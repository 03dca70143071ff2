"""The examples as users run them, killed in the middle and run again; `make examples` runs each whole."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.snapshot.capture import digests
from orchestrator.snapshot.storage import list_checkpoints, read_checkpoint
from states import Trigger
from states.errors import InterlockError
from tracking.journal import Journal
from tracking.runs import RunFolder, find_run

EXAMPLES = Path(__file__).parent.parent / "examples"

SMALL = {
    "char_gpt": ["--epochs", "3", "--characters", "60000", "--width", "16", "--precision", "bf16"],
    "vae": ["--epochs", "10"],
}
"""Sizes at which a training lasts long enough to be struck."""


def start(name: str, folder: Path) -> "subprocess.Popen[bytes]":
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *SMALL[name], "--name", "example"]
    with (folder / "output").open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
        )


def strike(process: "subprocess.Popen[bytes]", folder: Path, transitions: int) -> None:
    """SIGKILL once the attempt has made so many transitions, and there is a checkpoint, seen from outside."""
    while process.poll() is None:
        time.sleep(0.01)
        try:
            with Journal.open(find_run("example", folder / "runs")) as journal:
                newest, last = journal.attempts()[-1], journal.last_transition()
                saved = journal.checkpoints()
        except (InterlockError, IndexError):
            continue
        if saved and newest.pid == process.pid and last and last.seq - newest.first_seq > transitions:
            break
    assert process.poll() is None, "it ended before it was struck"
    process.kill()
    process.wait()


def found(run: RunFolder) -> dict[str, object]:
    """What must be the same: weights, average, optimizer, every loss, the metrics of each epoch, the user's files."""
    _, tree = read_checkpoint(list_checkpoints(run.checkpoints)[0])
    with Journal.open(run) as journal:
        losses = [
            (row.epoch, row.batch, row.loss)
            for row in journal.transitions()
            if row.trigger is Trigger.FORWARD
        ]
    history = [{k: v for k, v in epoch.items() if k != "duration"} for epoch in tree["history"]]
    callbacks = {key: value for key, value in tree["callbacks"].items() if key == "EMA"}
    return {
        "state": digests({key: tree[key] for key in ("model", "optimizers")} | callbacks),
        "losses": losses,
        "history": json.dumps(history, sort_keys=True),
        "files": {
            file.relative_to(run.artifacts).as_posix(): file.read_bytes()
            for file in run.artifacts.rglob("*")
            if file.is_file()
        },
    }


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(SMALL))
def test_an_example_that_is_killed_and_run_again_ends_as_if_it_had_not_been(
    name: str, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(name, whole).wait() == 0, (whole / "output").read_text()
    chance = random.Random(name)
    for _ in range(3):
        strike(start(name, killed), killed, chance.randint(60, 250))
    assert start(name, killed).wait() == 0, (killed / "output").read_text()
    assert "Warning" not in (killed / "output").read_text()
    run = find_run("example", killed / "runs")
    with Journal.open(run) as journal:
        assert [attempt.outcome for attempt in journal.attempts()] == ["died", "died", "died", "done"]
    one, other = found(find_run("example", whole / "runs")), found(run)
    for what in one:
        assert one[what] == other[what], what
    assert one["files"], "it keeps some"
    assert len(one["losses"]) > 100  # type: ignore[arg-type]
