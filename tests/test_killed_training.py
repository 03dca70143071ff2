"""SIGKILL of a real training at 50 random moments: what its hooks have seen done, the record holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# One process imports torch and forks a training for each kill, so that many of them take seconds.
SCRIPT = """
import mmap, os, random, signal, struct, sys, time
from pathlib import Path
import torch, torch._dynamo, trainings  # what the first optimizer imports, once and not in each child
from states import Trigger
from tracking.journal import Journal, settle
from tracking.runs import list_runs

torch.set_num_threads(1)
chance = random.Random(int(sys.argv[2]))
losses = 0
kills = int(sys.argv[3])
for kill in range(kills):
    root = Path(sys.argv[1], str(kill))
    marks = mmap.mmap(-1, 8)
    child = os.fork()
    if child == 0:
        trainer = trainings.make(root, epochs=1000)
        done = 0
        def mark():
            global done
            done += 1
            struct.pack_into("q", marks, 0, done)
        for trigger in Trigger:
            trainer.after(trigger)(mark)
        trainer.fit()
        os._exit(1)
    count = lambda: struct.unpack_from("q", marks, 0)[0]
    while not count():
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    marked = count()
    (run,) = list_runs(root)
    with Journal.open(run) as journal:
        recorded = sum(1 for _ in journal.transitions(live=True))
    # The after-hooks of a transition come before its record: the very last may have been cut in between.
    assert recorded in (marked, marked - 1), (kill, marked, recorded)
    settled = settle(run)
    with Journal.open(run) as journal:
        rows = list(journal.transitions())
    assert len(rows) == recorded + 1 and rows[-1].trigger is Trigger.HALT, (kill, settled)
    losses += marked - recorded
print("recorded", kills, "kills,", losses, "of them between hook and record")
"""


@pytest.mark.parametrize("kills", [15, pytest.param(50, marks=pytest.mark.long)])
def test_no_completed_transition_is_lost(kills: int, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    seed = str(int.from_bytes(os.urandom(4)))
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), seed, str(kills)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.stdout.startswith(f"recorded {kills} kills"), f"seed {seed}\n{found.stdout}\n{found.stderr}"
