"""Interrupted and resumed, in process or by SIGKILL, equals unbroken, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trainings
from orchestrator import EMA, Checkpointing, EarlyStopping, LRScheduling, MemoryMonitor, Trainer
from orchestrator.recovery import CheckpointMismatch
from states import State, Trigger
from states.language import Move, first_illegal
from states.table import TRAINING
from tracking.journal import Journal, JournalError
from tracking.runs import list_runs

TIMES = ("duration", "batch_time")


def history(result) -> list[dict[str, float]]:
    return [{k: v for k, v in epoch.items() if k not in TIMES} for epoch in result.history]


def optimizer_state(trainer: Trainer) -> list[torch.Tensor]:
    return [
        value
        for optimizer in trainer.optimizers
        for state in optimizer.state_dict()["state"].values()
        for value in state.values()
    ]


def journaled(trainer: Trainer) -> list[tuple]:
    with Journal.open(trainer.run) as journal:
        found = list(journal.transitions())
    words = [Move(r.trigger, r.source, r.dest) for r in found if r.scope == "train"]
    assert first_illegal(words, TRAINING) is None
    return [
        (r.epoch, r.batch, r.phase, r.loss)
        for r in found
        if r.trigger is Trigger.FORWARD and r.scope == "train"
    ]


def assert_same(one: Trainer, other: Trainer) -> None:
    trainings.assert_equal(trainings.weights(one), trainings.weights(other))
    for a, b in zip(optimizer_state(one), optimizer_state(other), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert torch.equal(torch.get_rng_state(), torch.get_rng_state())
    assert journaled(one) == journaled(other)


def options(**more):
    """Much of what has state, all at once."""

    def scheduled(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    given = {
        "optimizer": scheduled,
        "val_loader": trainings.loader(16),
        "metrics": {"right": lambda outputs, targets: (outputs.argmax(1) == targets).float().mean()},
        "checkpoint": Checkpointing(keep_last=3, best="val/loss"),
    }
    given.update(more)
    return given


def interrupted(root: Path, cuts: list[int], build) -> Trainer:
    """Halt after so many transitions of each attempt, and go on in a new trainer."""
    for cut in cuts:
        trainer = build(root)
        trainer.start("auto")
        for _ in range(cut):
            if trainer.state is State.DONE or trainer.advance() is None:
                break
        if trainer.state is State.DONE:
            return trainer
        trainer.close()
    trainer = build(root)
    trainer.fit(resume="auto")
    return trainer


@pytest.mark.long  # tests/test_exact_property.py says more, and less of it takes as long
@settings(max_examples=12)
@given(
    cuts=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    accumulate=st.integers(1, 3),
    optimizer=st.sampled_from(["AdamW", "SGD", "RMSprop"]),
    precision=st.sampled_from(["fp32", "bf16"]),
    nonfinite=st.sampled_from(["halt", "skip"]),
    by_batch=st.booleans(),
)
def test_cut_anywhere_equals_unbroken(
    tmp_path_factory, cuts, accumulate, optimizer, precision, nonfinite, by_batch
) -> None:
    def build(root: Path) -> Trainer:
        model = None
        from orchestrator import seed_everything

        seed_everything(1)
        model = trainings.network()
        opt = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-2)
        torch.manual_seed(1)
        return trainings.make(
            root,
            model=model,
            **options(
                optimizer=opt,
                accumulate=accumulate,
                precision=precision,
                nonfinite=nonfinite,
                clip_grad_norm=1.0,
                scheduler=LRScheduling(
                    torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=40)
                    if by_batch
                    else torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0),
                    every="batch" if by_batch else "epoch",
                    monitor=None if by_batch else "val/loss",
                ),
                callbacks=[EMA(decay=0.9, validate=True), EarlyStopping(patience=2), MemoryMonitor()],
            ),
        )

    root = tmp_path_factory.mktemp("runs")
    whole = build(root / "whole")
    expected = whole.fit()
    broken = interrupted(root / "broken", cuts, build)
    assert_same(whole, broken)
    keep = lambda h: [{k: v for k, v in e.items() if not k.startswith("memory")} for e in h]  # noqa: E731
    assert keep(history(expected)) == keep([*map(dict, broken_history(broken))])
    for (_, a), (_, b) in zip(callback_states(whole), callback_states(broken), strict=True):
        assert a == b


def broken_history(trainer: Trainer) -> list[dict[str, float]]:
    return [{k: v for k, v in epoch.items() if k not in TIMES} for epoch in trainer.history]


def callback_states(trainer: Trainer) -> list[tuple[str, dict[str, str]]]:
    from orchestrator.snapshot.capture import digests

    return [(n, digests(c.state_dict())) for n, c in trainer._callbacks.items() if n != "MemoryMonitor"]


@pytest.mark.long
def test_every_batch_boundary(tmp_path: Path) -> None:
    """Stopped at each boundary in turn, always the same end."""
    whole = trainings.make(tmp_path / "whole", epochs=1)
    whole.fit()
    transitions = 2 + 6 * 5
    for cut in range(1, transitions):
        broken = interrupted(tmp_path / f"cut-{cut}", [cut], lambda root: trainings.make(root, epochs=1))
        assert_same(whole, broken)


def test_results_of_runs_that_are_done_and_extending(tmp_path: Path) -> None:
    long = trainings.make(tmp_path / "long", epochs=4)
    expected = long.fit()
    short = trainings.make(tmp_path / "short", epochs=2)
    short.fit(resume="auto")
    again = trainings.make(tmp_path / "short", epochs=2)
    result = again.fit(resume="auto")
    assert (result.state, result.reason) == (State.DONE, "finished")
    assert history(result) == history(expected)[:2]
    trainings.assert_equal(trainings.weights(again), trainings.weights(short))
    assert len(list_runs(tmp_path / "short")) == 1
    extended = trainings.make(tmp_path / "short", epochs=4)
    assert history(extended.fit(resume="auto")) == history(expected)
    assert_same(long, extended)
    assert len(list_runs(tmp_path / "short")) == 1


@pytest.mark.parametrize(("first", "then"), [(4, 9), (6, 8), (3, 4)])
def test_extending_max_batches_from_mid_epoch(first: int, then: int, tmp_path: Path) -> None:
    for accumulate in (1, 2):
        root = tmp_path / str(accumulate)
        whole = trainings.make(root / "whole", max_batches=then, accumulate=accumulate)
        whole.fit()
        trainings.make(root / "more", max_batches=first, accumulate=accumulate).fit(resume="auto")
        more = trainings.make(root / "more", max_batches=then, accumulate=accumulate)
        more.fit(resume="auto")
        assert_same(whole, more)


def test_extending_max_batches_within_the_last_epoch(tmp_path: Path) -> None:
    """Where `epochs` is reached too, what is left of the last epoch is left all the same; after it, nothing is."""
    whole = trainings.make(tmp_path / "whole", epochs=2)
    whole.fit()

    def more(max_batches: int, epochs: int = 2) -> Trainer:
        trainer = trainings.make(tmp_path / "more", epochs=epochs, max_batches=max_batches)
        trainer.fit(resume="auto")
        return trainer

    assert more(9).batches == 9
    assert more(9, epochs=3).batches == 9
    assert more(11).batches == 11
    last = more(99)
    assert last.batches == 12
    assert_same(whole, last)
    assert more(999).batches == 12
    assert len(list_runs(tmp_path / "more")) == 1


def test_a_request_to_stop_is_honoured_after_a_resume(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path)
    trainer.start()
    trainer.advance(until=State.BATCH_END)
    trainer.stop("enough")
    trainer.close()
    again = trainings.make(tmp_path)
    result = again.fit(resume="auto")
    assert (result.state, result.reason, again.batches) == (State.DONE, "enough", 1)


def test_resume_by_folder_by_checkpoint_and_superseded_rows(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, checkpoint=Checkpointing(every_batches=2, keep_last=99))
    whole = trainer.fit()
    with Journal.open(trainer.run) as journal:
        early = next(c for c in journal.checkpoints() if (c.epoch, c.batch) == (0, 3))
    again = trainings.make(tmp_path, checkpoint=Checkpointing(keep_last=99))
    result = again.fit(resume=trainer.run.checkpoints / early.name)
    assert result.run == whole.run
    assert history(result) == history(whole)
    assert_same(trainer, again)
    with Journal.open(again.run) as journal:
        attempts = journal.attempts()
        assert [a.position for a in attempts] == [None, early.seq]
        assert any(r.superseded for r in journal.transitions(include_superseded=True))
    by_folder = trainings.make(tmp_path, epochs=4)
    assert len(by_folder.fit(resume=whole.run).history) == 4


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, checkpoint=Checkpointing(every_batches=2, keep_last=99))
    trainer.start()
    trainer.advance(until=State.EPOCH_END)
    trainer.close()
    with Journal.open(trainer.run) as journal:
        newest = max(journal.checkpoints(), key=lambda c: c.seq)
    file = trainer.run.checkpoints / newest.name / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    whole = trainings.make(tmp_path / "whole")
    whole.fit()
    again = trainings.make(tmp_path)
    with pytest.warns(UserWarning, match=f"passing over checkpoint {newest.name}") as said:
        again.fit(resume="auto")
    assert str(said[0].message).count(newest.name) == 1, "named once"
    assert "found xxh3_128" in str(said[0].message)
    assert_same(whole, again)


@pytest.mark.parametrize("by", ["auto", "name", "folder", "checkpoint"])
def test_a_run_whose_journal_is_gone_is_refused_and_nothing_is_lost(by: str, tmp_path: Path) -> None:
    trainings.make(tmp_path, epochs=1).fit()
    earlier = trainings.make(tmp_path, epochs=1)
    earlier.fit()
    for file in earlier.run.path.glob("journal.sqlite*"):
        file.unlink()
    newest = max(earlier.run.checkpoints.iterdir())
    before = {path for path in tmp_path.rglob("*") if "lease" not in path.name}
    named = {"auto": "auto", "name": "test", "folder": earlier.run.path, "checkpoint": newest}[by]
    with pytest.raises(
        JournalError, match=f"{earlier.run.path}: found checkpoints, but no journal.sqlite; expected both"
    ) as told:
        trainings.make(tmp_path).fit(resume=named)
    assert f'init_from=".../checkpoints/{newest.name}' in str(told.value)
    assert {path for path in tmp_path.rglob("*") if "lease" not in path.name} == before
    moved = tmp_path / "moved"
    earlier.run.path.rename(moved)
    anew = trainings.make(tmp_path, name="anew", init_from=moved / "checkpoints" / newest.name)
    anew.start()
    trainings.assert_equal(trainings.weights(earlier), trainings.weights(anew))
    anew.close()


def test_a_folder_that_only_looks_like_a_run_is_none(tmp_path: Path) -> None:
    (tmp_path / "test-20260101-000000-abcd").mkdir()
    assert list_runs(tmp_path) == []
    assert trainings.make(tmp_path, epochs=1).fit(resume="auto").state is State.DONE


def test_another_architecture_optimizer_or_data_is_refused_by_name(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, epochs=1)
    run = trainer.fit().run
    wide = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3))
    cases = [
        ({"model": wide}, r"0\.weight.*\(8, 6\).*\(16, 6\)"),
        ({"optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1)}, "AdamW.*SGD|SGD.*AdamW"),
        ({"train_loader": trainings.loader(4)}, "batch"),
        ({"accumulate": 2}, "accumulate: the checkpoint has 1, this trainer 2"),
        ({"clip_grad_norm": 1.0}, "clip_grad_norm"),
    ]
    for changed, message in cases:
        other = trainings.make(tmp_path, epochs=2, **changed)
        before = trainings.weights(other)
        with pytest.raises(CheckpointMismatch, match=message):
            other.fit(resume=run)
        trainings.assert_equal(trainings.weights(other), before)
    # The lease was let go each time.
    with pytest.warns(UserWarning, match="lr"):
        trainings.make(
            tmp_path, epochs=2, optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=5e-1)
        ).fit(resume=run)


def test_retention_keeps_the_last_the_best_and_every_kth(tmp_path: Path) -> None:
    trainer = trainings.make(
        tmp_path,
        epochs=6,
        val_loader=trainings.loader(16),
        checkpoint=Checkpointing(keep_last=1, best="val/loss", keep_every_epochs=3),
    )
    result = trainer.fit()
    losses = [epoch["val/loss"] for epoch in result.history]
    best = losses.index(min(losses))
    kept = {path.name for path in trainer.run.checkpoints.iterdir()}
    epochs = {int(name.split("-e")[1].split("-")[0]) for name in kept if name.endswith("EPOCH_END")}
    assert epochs == {2, 5, best}
    assert result.best_checkpoint is not None
    assert f"-e{best}-" in result.best_checkpoint.name
    assert result.last_checkpoint is not None
    assert result.last_checkpoint.name.endswith("DONE")
    fresh = trainings.make(tmp_path / "fresh", val_loader=trainings.loader(16))
    result.load_best(fresh.model)
    assert fresh.evaluate(trainings.loader(16, shuffle=False))["loss"] == pytest.approx(min(losses))


CHILD = """
import sys, time, json, torch
from pathlib import Path
import trainings
from orchestrator import Checkpointing, Callback
from states import Trigger
from torch.utils.data import DataLoader

class Slow(Callback):
    def attach(self, trainer):
        super().attach(trainer)
        trainer.after(Trigger.STEP)(lambda: time.sleep(float(sys.argv[2])))

torch.set_num_threads(1)
loader = DataLoader(trainings.data(), batch_size=8, shuffle=True, num_workers=int(sys.argv[3]))
trainer = trainings.make(Path(sys.argv[1]), train_loader=loader, val_loader=trainings.loader(16),
    callbacks=[Slow()], checkpoint=Checkpointing(every_batches=2))
print("ready", flush=True)
trainer.fit(resume="auto")
print("done", flush=True)
"""


def child(root: Path, slow: float = 0.01, workers: int = 0) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root), str(slow), str(workers)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    chance = random.Random(os.environ.get("PYTEST_SEED"))
    for _ in range(3):
        process = child(tmp_path, slow=0.03)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0.05, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = child(tmp_path, slow=0.0, workers=2)
    assert process.communicate()[0].endswith("done\n")
    again = trainings.make(
        tmp_path, val_loader=trainings.loader(16), checkpoint=Checkpointing(every_batches=2)
    )
    again.fit(resume="auto")
    whole = trainings.make(tmp_path / "whole", val_loader=trainings.loader(16))
    whole.fit()
    assert_same(whole, again)
    with Journal.open(again.run) as journal:
        assert {a.outcome for a in journal.attempts()} <= {"died", "done"}


@pytest.mark.parametrize(
    ("number", "status", "workers"),
    [
        (signal.SIGTERM, 143, 2),
        (signal.SIGINT, None, 0),
        pytest.param(signal.SIGTERM, 143, 0, marks=pytest.mark.long),
        pytest.param(signal.SIGINT, None, 2, marks=pytest.mark.long),
    ],
)
def test_signals_save_halt_and_leave(
    number: signal.Signals, status: int | None, workers: int, tmp_path: Path
) -> None:
    process = child(tmp_path, slow=0.05, workers=workers)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.6)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == (status if status is not None else -signal.SIGINT) or (
        number is signal.SIGINT and process.returncode == 1
    )
    (run,) = list_runs(tmp_path)
    with Journal.open(run) as journal:
        (attempt,) = journal.attempts()
        assert (attempt.outcome, attempt.end_state) == ("stopped", State.HALTED)
        assert number.name in attempt.reason
        left, _ = list(journal.transitions(scope="train"))[-2:]
        newest = max(journal.checkpoints(), key=lambda c: c.seq)
    assert newest.seq == left.seq  # nothing is done twice, but for a validation pass that was under way
    assert json.loads(run.command.read_text())["argv"]
    assert (
        trainings.make(tmp_path, val_loader=trainings.loader(16), checkpoint=Checkpointing(every_batches=2))
        .fit(resume="auto")
        .state
        is State.DONE
    )
