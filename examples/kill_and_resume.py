"""Kill a training with SIGKILL in mid-epoch, start it again, and compare it with one that was never touched.

Each training is a process of its own. The weights, the optimizer's state and the loss of every single batch
must be equal, bit for bit; the exit status is 1 if anything differs.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KILLS = 3
EPOCHS = 4
BATCHES = 60


def train(root: Path, slow: float) -> None:
    """One attempt: dropout, BatchNorm, AdamW, shuffling, a scheduler and two data workers."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from orchestrator import Checkpointing, Trainer, seed_everything

    seed_everything(3)
    inputs = torch.randn(BATCHES * 16, 20)
    targets = inputs[:, :3].argmax(1)
    model = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=16, shuffle=True, num_workers=2)
    trainer = Trainer(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        loader,
        epochs=EPOCHS,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7),
        checkpoint=Checkpointing(every_batches=7),
        log=None,
        track=None,
        name="kill",
        root=root,
    )
    if slow:
        from states import Trigger

        trainer.after(Trigger.STEP)(lambda: time.sleep(slow))
    trainer.fit(resume="auto")


def attempt(root: Path, slow: float) -> subprocess.Popen:
    command = [sys.executable, __file__, "--train", str(root), "--slow", str(slow)]
    return subprocess.Popen(command)


def fingerprint(root: Path) -> dict[str, str]:
    """SHA-256 of the final weights, of the optimizer's state, and of the loss of every batch."""
    from orchestrator.snapshot.storage import read_checkpoint
    from tracking.journal import Journal
    from tracking.runs import find_run

    run = find_run("kill", root)
    with Journal.open(run) as journal:
        rows = [t for t in journal.transitions(scope="train") if t.trigger.value == "forward"]
        attempts = len(journal.attempts())
        last = max(journal.checkpoints(), key=lambda checkpoint: checkpoint.seq)
    _, tree = read_checkpoint(run.checkpoints / last.name)
    losses = [(t.epoch, t.batch, t.loss.hex()) for t in rows]
    assert len(losses) == EPOCHS * BATCHES, f"{len(losses)} losses, expected {EPOCHS * BATCHES}"
    return {
        "weights": digest(tree["model"]),
        "optimizer": digest(tree["optimizers"]),
        "losses": hashlib.sha256(repr(losses).encode()).hexdigest(),
        "attempts": str(attempts),
    }


def digest(tree: object) -> str:
    from orchestrator.snapshot.capture import digests

    return hashlib.sha256(repr(sorted(digests({"": tree}).items())).encode()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--slow", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=os.getpid(), help="for the moments of the kills")
    options = parser.parse_args()
    if options.train:
        train(options.train, options.slow)
        return 0
    chance = random.Random(options.seed)
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        assert attempt(whole, 0).wait() == 0
        for kill in range(KILLS):
            process = attempt(killed, slow=0.02)
            wait_for_progress(killed, more_than=chance.randint(20, 60), before=process)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            print(f"kill {kill + 1}: SIGKILL", flush=True)
        assert attempt(killed, 0).wait() == 0
        one, other = fingerprint(whole), fingerprint(killed)
    for what in ("weights", "optimizer", "losses"):
        verdict = "equal" if one[what] == other[what] else "DIFFERENT"
        print(f"{what:10} {one[what][:16]}  {other[what][:16]}  {verdict}")
    print(f"attempts   {one['attempts']:16}  {other['attempts']}")
    same = all(one[what] == other[what] for what in ("weights", "optimizer", "losses"))
    return 0 if same and other["attempts"] == str(KILLS + 1) else 1


def wait_for_progress(root: Path, more_than: int, before: subprocess.Popen) -> None:
    """Until this attempt has made `more_than` transitions, read from outside through the recorder."""
    from states.errors import InterlockError
    from tracking.journal import Journal
    from tracking.runs import find_run

    while before.poll() is None:
        time.sleep(0.01)
        try:
            with Journal.open(find_run("kill", root)) as journal:
                newest = journal.attempts()[-1]
                last = journal.last_transition()
        except (InterlockError, IndexError):
            continue
        if newest.pid == before.pid and last and last.seq - newest.first_seq > more_than:
            return
    raise SystemExit("the training ended before it could be killed")


if __name__ == "__main__":
    sys.exit(main())
