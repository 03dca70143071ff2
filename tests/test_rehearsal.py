"""Rehearsal: a training with one equals a training without, bit for bit; what would fail later fails in it."""

import errno
import os
import resource
import signal
import socket
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import trainings
from exactness import assert_same, assert_sound, ending, recorded
from late_device import force
from orchestrator import (
    EMA,
    Callback,
    Checkpointing,
    EarlyStopping,
    Logging,
    LRScheduling,
    NonFiniteError,
    Phase,
    Trainer,
    seed_everything,
)
from orchestrator.aside import RehearsalError
from orchestrator.errors import ConfigurationError, TaintedError
from orchestrator.rehearsal import DiskFullError, checkpoints_at_once
from orchestrator.snapshot.capture import digests
from orchestrator.snapshot.encoding import EncodingError
from orchestrator.snapshot.storage import read_manifest
from random_trainings import build, descriptions, run_folders
from states import State, Trigger
from states.table import TERMINAL
from tracking.journal import Journal
from tracking.runs import list_runs

Make = Callable[[Path], Trainer]


def make(root: Path, **options: Any) -> Trainer:
    return trainings.make(root, **{"val_loader": trainings.loader(16), **options})


def everything(trainer: Trainer) -> dict[str, str]:
    """Digests of all of the training's state, gradients too, and not of the clocks."""
    tree = trainer._training.snapshots.capture()
    tree["gradients"] = {name: p.grad for name, p in trainer.model.named_parameters()}
    return digests(tree, ignore=("batch/elapsed", "epoch/elapsed"))


def assert_equal_trainings(root: Path, make: Make) -> None:
    """With and without a rehearsal the same: what is left in memory, the journal, the checkpoints."""
    torch.manual_seed(0)
    plain = make(root / "plain")
    plain.fit()
    whole = _unmeasured(ending(plain))
    torch.manual_seed(0)
    rehearsed = make(root / "rehearsed")
    rehearsed.fit(rehearse=True)
    assert_same(whole, _unmeasured(ending(rehearsed)))
    assert plain.run is not None
    assert rehearsed.run is not None
    assert_same(recorded(plain.run), recorded(rehearsed.run))
    assert_sound(rehearsed.run)
    if (
        plain._settings.checkpoint is None or plain._settings.checkpoint.overhead is None
    ):  # then they depend on time
        runs = (plain.run, rehearsed.run)
        checkpoints = [sorted(path.name for path in run.checkpoints.iterdir()) for run in runs]
        assert checkpoints[0] == checkpoints[1]


def _unmeasured(found: dict[str, Any]) -> dict[str, Any]:
    """Without what saving was found to cost."""
    return {path: value for path, value in found.items() if "/measured" not in path}


# -- undone, bit for bit -----------------------------------------------------------------------------


class _Stream(IterableDataset[Any]):
    """Samples drawn from the global generator; it counts, and knows where it is."""

    def __iter__(self) -> Iterator[Any]:
        for number in range(24):
            inputs = torch.rand(6) + number
            yield inputs, inputs[:3].argmax()


class _Augmented(Dataset[Any]):
    def __init__(self) -> None:
        self.data = trainings.data()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        inputs, target = self.data[index]
        return inputs + 0.1 * torch.randn(6), target


def _gan(root: Path) -> Trainer:
    seed_everything(3)
    model = nn.ModuleDict({"g": nn.Linear(2, 6), "d": trainings.network()})
    g, d = model["g"], model["d"]

    def discriminate(model: nn.Module, batch: Any) -> Any:
        return (d(g(torch.randn(8, 2)).detach()) - d(batch[0])).mean()

    def generate(model: nn.Module, batch: Any) -> Any:
        return -d(g(torch.randn(8, 2))).mean()

    phases = [
        Phase("discriminator", torch.optim.Adam(d.parameters()), discriminate),
        Phase("generator", torch.optim.SGD(g.parameters(), lr=0.1, momentum=0.9), generate),
    ]
    return Trainer(
        model, phases, None, trainings.loader(), epochs=2, log=None, track=None, root=root, name="test"
    )


def _scheduled(root: Path) -> Trainer:
    model = trainings.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40)
    return make(
        root,
        model=model,
        optimizer=optimizer,
        scheduler=LRScheduling(schedule, every="batch"),
        callbacks=[EMA(validate=True), EarlyStopping("val/loss")],
        clip_grad_norm=0.5,
    )


def _half(root: Path) -> Trainer:
    return make(root, precision="fp16", epochs=2)


KINDS: dict[str, Make] = {
    "plain": make,
    "accumulated": lambda root: make(root, accumulate=4, accumulate_weighting="samples"),
    "phases": _gan,
    "schedule, EMA, early stopping": _scheduled,
    "bf16": lambda root: make(root, precision="bf16"),
    "fp16": _half,
    "every two batches": lambda root: make(
        root, validate_every=2, val_loader={"a": trainings.loader(16), "b": trainings.loader(5)}
    ),
    "iterable": lambda root: make(root, train_loader=DataLoader(_Stream(), 4)),
    "augmented": lambda root: make(root, train_loader=DataLoader(_Augmented(), 8, shuffle=True)),
    "list of batches": lambda root: make(root, train_loader=[next(iter(trainings.loader()))] * 3),
    "one batch": lambda root: make(root, max_batches=1),
    "no checkpoints": lambda root: make(root, checkpoint=None),
    "saving by cost": lambda root: make(root, checkpoint=Checkpointing(overhead=0.5, every_epochs=1)),
    "deterministic": lambda root: make(root, deterministic=True),
}


LONG = {"plain", "bf16", "list of batches", "one batch", "no checkpoints", "saving by cost", "deterministic"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.long] if kind in LONG else []) for kind in KINDS]
)
def test_a_training_with_a_rehearsal_equals_one_without(kind: str, tmp_path: Path) -> None:
    assert_equal_trainings(tmp_path, KINDS[kind])


@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=pytest.mark.long), {"persistent_workers": True}], ids=str
)
def test_with_data_workers(options: dict[str, Any], tmp_path: Path) -> None:
    def training(root: Path) -> Trainer:
        loader = DataLoader(_Augmented(), 8, shuffle=True, num_workers=2, **options)
        return make(root, train_loader=loader, epochs=2)

    assert_equal_trainings(tmp_path, training)


def test_on_a_device_whose_values_arrive_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch)
    assert_equal_trainings(tmp_path, make)


def _at_random(d: Any, at: int) -> None:
    with run_folders() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = build(d, root / "plain")
        plain.fit()
        whole = ending(plain)
        rehearsed = build(d, root / "rehearsed")
        if at == 0:
            rehearsed.fit(rehearse=True)
        else:
            rehearsed.start()
            for _ in range(at):
                if rehearsed.state not in TERMINAL:
                    rehearsed.advance()
            if rehearsed.state not in TERMINAL:
                before = everything(rehearsed)
                rehearsed.rehearse()
                assert everything(rehearsed) == before
            rehearsed.fit()
        assert_same(whole, ending(rehearsed))
        assert plain.run is not None
        assert rehearsed.run is not None
        assert_same(recorded(plain.run), recorded(rehearsed.run))


@settings(max_examples=3)
@given(d=descriptions(), at=st.integers(0, 40))
def test_random_trainings_rehearsed_anywhere(d: Any, at: int) -> None:
    _at_random(d, at)


@pytest.mark.long
@settings(max_examples=100)
@given(d=descriptions(), at=st.integers(0, 40))
def test_many_random_trainings_rehearsed_anywhere(d: Any, at: int) -> None:
    _at_random(d, at)


def test_memory_is_what_it_was_and_nothing_is_left_on_disk(tmp_path: Path) -> None:
    trainer = make(tmp_path / "a" / "runs")
    for parameter in trainer.model[0].parameters():
        parameter.grad = torch.zeros_like(parameter)  # zero is not None
    before = everything(trainer)
    found = trainer.rehearse()
    assert everything(trainer) == before
    assert not trainer.optimizers[0].state
    assert trainer.model[4].weight.grad is None
    assert (trainer.state, trainer.run, trainer.attempt, trainer.history) == (State.IDLE, None, 0, [])
    assert not trainer.rehearsing
    assert list(tmp_path.iterdir()) == []
    assert found.batches == 2
    assert set(found.validation) == {"val"}
    assert found.checkpoint_bytes is not None
    assert found.estimate_s is not None


def test_what_a_killed_rehearsal_left_is_removed_by_the_next(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = [tmp_path / f".rehearsal-{socket.gethostname()}-{pid}-abc" for pid in (ended.pid, os.getppid())]
    for path in left:
        (path / "test" / "checkpoints").mkdir(parents=True)
    make(tmp_path).rehearse()
    assert list(tmp_path.iterdir()) == left[1:]  # the other's process lives


def test_a_rehearsal_of_accumulation_makes_a_step(tmp_path: Path) -> None:
    updates: tuple[int, ...] = ()  # a list would be emptied again

    def note() -> None:
        nonlocal updates
        updates += (trainer.updates,)

    trainer = make(tmp_path, accumulate=5)
    trainer.after("step")(note)
    assert trainer.rehearse().batches == 5
    assert updates == (1,)
    assert trainer.updates == 0


def test_callbacks_and_lists_of_hooks_are_what_they_were(tmp_path: Path) -> None:
    class Keeping(Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.total = torch.zeros(1)
            self.seen: dict[str, list[int]] = {"epochs": []}

        def on_train_begin(self) -> None:
            call("begin")
            assert self.trainer.run is not None
            (self.trainer.run.path / "notes.txt").write_text("begun")
            self.trainer.after("step")(lambda: call("step"))
            self.begun = True

        def on_batch_end(self, batch, metrics) -> None:
            self.losses.append(metrics["loss"])
            self.total += 1

        def on_epoch_end(self, epoch, metrics) -> None:
            self.seen["epochs"].append(epoch)

        def on_train_end(self, metrics) -> None:
            call("end")

    calls: tuple[str, ...] = ()

    def call(name: str) -> None:
        nonlocal calls
        calls += (name,)

    losses: list[float] = []
    trainer = make(tmp_path, callbacks=[keeping := Keeping()])
    trainer.after("end_batch")(lambda: losses.append(trainer.metrics["loss"]))
    trainer.rehearse()
    assert (keeping.losses, keeping.seen, losses) == ([], {"epochs": []}, [])
    assert keeping.total.item() == 0
    assert not hasattr(keeping, "begun")
    assert calls == ("begin", "step", "step")
    assert list(tmp_path.iterdir()) == []
    trainer.fit()
    assert calls[3:] == ("begin", *["step"] * 18, "end")  # the hook of the rehearsal is gone
    assert len(losses) == len(keeping.losses) == 18


def test_what_hooks_change_in_place_beside_the_model_is_what_it_was(tmp_path: Path) -> None:
    """A teacher that follows the model, as in a script: told as being in no checkpoint, and put back all the same."""
    teacher = trainings.network()
    mean = torch.zeros(3)

    class Follow(Callback):
        def __init__(self) -> None:
            self.average = trainings.network()

        def on_batch_end(self, batch, metrics) -> None:
            with torch.no_grad():
                for module in (teacher, self.average):
                    for one, other in zip(module.parameters(), self.trainer.model.parameters(), strict=True):
                        one.lerp_(other, 0.1)
                mean.add_(1.0)

    follow = Follow()
    trainer = make(tmp_path, callbacks=[follow])

    def values() -> list[torch.Tensor]:
        tensors = [*teacher.state_dict().values(), *follow.average.state_dict().values(), mean]
        return [tensor.clone() for tensor in tensors]

    before = values()
    with pytest.warns(UserWarning, match="teacher, a variable .* is in no checkpoint"):
        trainer.rehearse()
    for one, other in zip(before, values(), strict=True):
        assert torch.equal(one, other)


def test_what_optimizer_and_data_keep_for_themselves_is_what_it_was(tmp_path: Path) -> None:
    class Lookahead(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.1)
            self.calls = 0
            self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

        def step(self, closure: Any = None) -> Any:
            found = super().step(closure)
            self.calls += 1
            for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                p.data.copy_(slow.lerp_(p.data, 0.5))
            return found

    class Curriculum(_Augmented):
        difficulty = 0.0

        def __getitem__(self, index: int) -> Any:
            inputs, target = super().__getitem__(index)
            return inputs * (1 + self.difficulty), target

    def training(root: Path) -> Trainer:
        samples = Curriculum()
        trainer = make(
            root, train_loader=DataLoader(samples, 8), optimizer=lambda m: Lookahead(m.parameters())
        )
        trainer.after("end_epoch")(lambda: setattr(samples, "difficulty", trainer.epoch + 1))
        return trainer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # neither is in a checkpoint, which is told
        assert_equal_trainings(tmp_path, training)


def test_nothing_counts_as_changed_that_was_only_looked_at(tmp_path: Path) -> None:
    tensors = trainings.data().tensors
    batches = [(tensors[0][at : at + 8], tensors[1][at : at + 8]) for at in (0, 8, 16)]

    def forward(model: nn.Module, batch: Any) -> Any:
        return nn.functional.cross_entropy(model(batch[0] - tensors[0].mean(0)), batch[1])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tmp_path, train_loader=batches, val_loader=batches, forward=forward).fit(rehearse=True)


def test_what_hooks_ask_for_in_a_rehearsal_is_not_done(tmp_path: Path) -> None:
    class Asking(Callback):
        def on_batch_end(self, batch, metrics) -> None:
            if self.trainer.rehearsing:
                self.trainer.save()
                self.trainer.stop("in the rehearsal")
                self.trainer.halt("in the rehearsal")

    trainer = make(tmp_path, callbacks=[Asking()])
    result = trainer.fit(rehearse=True)
    assert (result.state, result.reason, trainer.batches) == (State.DONE, "finished", 18)


@pytest.mark.parametrize(
    "state",
    [
        State.FORWARD,
        State.EPOCH_END,
        *(
            pytest.param(state, marks=pytest.mark.long)
            for state in (State.EPOCH_START, State.BATCH_START, State.BACKWARD, State.STEP)
        ),
    ],
)
def test_resumed_and_rehearsed_from_any_state(state: State, tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", accumulate=2)
    whole.fit()
    begun = make(tmp_path / "begun", accumulate=2)
    begun.advance(until=State.EPOCH_END)
    begun.advance(until=state)
    path = begun.save().wait() if state is not State.EPOCH_END else None
    begun.close()
    resumed = make(tmp_path / "begun", accumulate=2, seed=8)
    resumed.fit(resume=path or "auto", rehearse=True)
    assert_same(ending(whole), ending(resumed))
    assert resumed.divergence is None
    assert resumed.run is not None
    assert_sound(resumed.run)
    with Journal.open(resumed.run) as journal:
        assert [log.message[:9] for log in journal.logs() if "rehearsed" in log.message] == ["rehearsed"]
    assert not [path for path in resumed.run.checkpoints.iterdir() if path.name.startswith(".")]


def test_auto_rehearses_a_new_run_and_a_resumed_one_and_returns_a_done_one(tmp_path: Path) -> None:
    rehearsals: tuple[int, ...] = ()

    def trainer() -> Trainer:
        def note() -> None:
            nonlocal rehearsals
            rehearsals += (made.epoch,) if made.rehearsing else ()

        made = make(tmp_path)
        made.after("begin_epoch")(note)
        return made

    first = trainer()
    first.start("auto", rehearse=True)
    assert rehearsals == (0,)
    first.advance(until=State.EPOCH_END)
    first.close()
    second = trainer()
    second.fit("auto", rehearse=True)
    assert rehearsals == (0, 1)
    trainer().fit("auto", rehearse=True)
    assert rehearsals == (0, 1)


def test_the_weights_of_init_from_are_rehearsed_with(tmp_path: Path) -> None:
    other = make(tmp_path / "other")
    other.fit()
    assert other.run is not None
    losses: tuple[float, ...] = ()

    def note() -> None:
        nonlocal losses
        losses += (trainer.metrics["loss"],)

    trainer = make(tmp_path / "runs", init_from=other.run.path, seed=9)
    trainer.after("forward")(note)
    trainer.fit(rehearse=True)
    assert losses[:2] == losses[2:4]


def test_a_trainer_that_has_gone_back_is_rehearsed_there(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.fit()
    trainer.seek(1, 2, State.BACKWARD)
    before = everything(trainer)
    trainer.rehearse()
    assert everything(trainer) == before
    trainer.close()


# -- what fails --------------------------------------------------------------------------------------


def _fails(trainer: Trainer, error: type[BaseException], during: str) -> BaseException:
    """The rehearsal raises the error with a note, and the training stands as before; no run is made."""
    before, runs = everything(trainer), list_runs(trainer._settings.root)
    with pytest.raises(error) as raised:
        trainer.fit(rehearse=True)
    assert during in "".join(raised.value.__notes__)
    assert everything(trainer) == before
    assert (trainer.state, trainer.tainted, trainer.rehearsing) == (State.IDLE, False, False)
    assert list_runs(trainer._settings.root) == runs
    return raised.value


class _Fails(Callback):
    """Raises in one of its hooks."""

    def __init__(self, hook: str) -> None:
        def fail(*_: object) -> None:
            raise ZeroDivisionError(hook)

        setattr(self, hook, fail)


class _OnlyTrains(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self.training:
            raise RuntimeError("not while validating")
        return inputs


def _metric(outputs: Any, targets: Any) -> Any:
    if not outputs.requires_grad and len(outputs) == 16:  # of validation only
        raise IndexError("a metric")
    return 0.0


def _short(root: Path) -> Trainer:
    short = DataLoader([(torch.zeros(5), torch.tensor(0))] * 4, 2)
    return make(root, val_loader={"val": trainings.loader(16), "short": short})


def _wrong_targets(root: Path) -> Trainer:
    return make(root, loss_fn=lambda outputs, targets: ((outputs - targets) ** 2).mean())


class _Unstorable(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"function": print} if getattr(self, "seen", False) else {}

    def on_epoch_end(self, epoch, metrics) -> None:
        self.seen = True


class _Forgetful(Callback):
    """Does not take back what it gave."""

    count = 0

    def on_batch_end(self, batch, metrics) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}


def _epoch_scheduler(root: Path) -> Trainer:
    model = trainings.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 / (1 - epoch))
    return make(root, model=model, optimizer=optimizer, scheduler=schedule)


def _frozen(root: Path) -> Trainer:
    trainer = make(root)
    trainer.before("forward")(lambda: trainer.model.requires_grad_(False))
    return trainer


FAILURES: dict[str, tuple[Make, type[BaseException], str]] = {
    "data": (
        lambda root: make(root, train_loader=DataLoader([(torch.zeros(6),), ()], 2)),
        Exception,
        "a training batch: taking it from the loader",
    ),
    "targets": (_wrong_targets, RuntimeError, "a training batch: its forward pass"),
    "frozen": (_frozen, TypeError, "a training batch: its forward pass"),
    "NaN": (
        lambda root: make(root, model=trainings.spoilt(lambda x: x * torch.nan, 0)),
        NonFiniteError,
        "a training batch: the optimizer's step",
    ),
    "batch hook": (
        lambda root: make(root, callbacks=[_Fails("on_batch_end")]),
        ZeroDivisionError,
        "a training batch: its end",
    ),
    "validation": (
        lambda root: make(root, model=nn.Sequential(_OnlyTrains(), trainings.network())),
        RuntimeError,
        "validation loader 'val', its first batches",
    ),
    "another loader": (_short, RuntimeError, "validation loader 'short', its first batches"),
    "metric": (
        lambda root: make(root, metrics={"metric": _metric}),
        IndexError,
        "validation loader 'val', its first batches",
    ),
    "best": (
        lambda root: make(root, checkpoint=Checkpointing(best="val/accuracy")),
        ConfigurationError,
        "the end of an epoch",
    ),
    "early stopping": (
        lambda root: make(root, callbacks=[EarlyStopping("val/acuracy", mode="max")]),
        ConfigurationError,
        "the end of an epoch",
    ),
    "scheduler": (_epoch_scheduler, ZeroDivisionError, "the end of an epoch"),
    "epoch hook": (
        lambda root: make(root, callbacks=[_Fails("on_epoch_end")]),
        ZeroDivisionError,
        "the end of an epoch",
    ),
    "beginning": (
        lambda root: make(root, callbacks=[_Fails("on_train_begin")]),
        ZeroDivisionError,
        "the beginning",
    ),
    "state": (lambda root: make(root, callbacks=[_Unstorable()]), EncodingError, "writing"),
    "restoring": (lambda root: make(root, callbacks=[_Forgetful()]), Exception, "restoring"),
    "room": (
        lambda root: make(root, epochs=10**12, checkpoint=Checkpointing(keep_every_epochs=1)),
        DiskFullError,
        "a checkpoint",
    ),
}


@pytest.mark.parametrize("what", FAILURES)
def test_what_would_fail_later_fails_now_and_leaves_no_trace(what: str, tmp_path: Path) -> None:
    make, error, during = FAILURES[what]
    _fails(make(tmp_path / "runs"), error, during)
    assert not (tmp_path / "runs").exists()


def test_the_same_trainer_trains_after_the_fix(tmp_path: Path) -> None:
    """In a notebook: a loader for validation whose samples had the wrong shape."""
    samples = [(torch.zeros(5), torch.tensor(0))] * 4
    trainer = make(tmp_path, val_loader=DataLoader(samples, 2), precision="fp16")
    _fails(trainer, RuntimeError, "validation loader 'val'")
    samples[:] = [(torch.zeros(6), torch.tensor(0))] * 4
    trainer.fit(rehearse=True)
    fixed = make(tmp_path / "fixed", val_loader=DataLoader(samples, 2), precision="fp16")
    fixed.fit()
    assert_same(ending(fixed), ending(trainer))


def test_data_that_are_mended_after_a_rehearsal_are_told_as_they_are(tmp_path: Path) -> None:
    samples = [(torch.zeros(6), torch.tensor(0))] * 4
    trainer = make(tmp_path / "a", train_loader=DataLoader(samples, 2))
    trainer.rehearse()
    samples[:] = [(torch.ones(6), torch.tensor(0))] * 6
    found, fresh = trainer.fit(), make(tmp_path / "b", train_loader=DataLoader(samples, 2)).fit()
    assert found.last_checkpoint is not None
    assert fresh.last_checkpoint is not None
    assert read_manifest(found.last_checkpoint)["data"] == read_manifest(fresh.last_checkpoint)["data"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_failure_within_the_step_is_undone(precision: str, tmp_path: Path) -> None:
    class Failing(torch.optim.SGD):
        broken = True

        def step(self, closure: Any = None) -> Any:
            found = super().step(closure)
            if self.broken and len(self.state) > 2:
                raise RuntimeError("in the step")
            return found

    def training(root: Path) -> Trainer:
        return make(
            root,
            optimizer=lambda model: Failing(model.parameters(), lr=0.1, momentum=0.9),
            precision=precision,
            epochs=1,
        )

    trainer = training(tmp_path / "a")
    _fails(trainer, RuntimeError, "the optimizer's step")
    Failing.broken = False
    trainer.fit()
    other = training(tmp_path / "b")
    other.fit()
    assert_same(ending(other), ending(trainer))


def test_a_failed_rehearsal_of_a_resumed_run_loses_nothing(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    whole.fit()
    begun = make(tmp_path / "begun")
    begun.advance(until=State.EPOCH_END)
    begun.advance(until=State.STEP)
    begun.close()
    failing = make(tmp_path / "begun", callbacks=[_Fails("on_epoch_end")])
    with pytest.raises(ZeroDivisionError) as raised:
        failing.fit("auto", rehearse=True)
    assert "the end of an epoch" in raised.value.__notes__[0]
    assert failing.state is State.HALTED
    assert failing.reason.startswith("the rehearsal failed: ZeroDivisionError")
    assert failing.run is not None
    with Journal.open(failing.run) as journal:
        assert journal.attempts()[-1].outcome == "failed"
    resumed = make(tmp_path / "begun")
    resumed.fit("auto", rehearse=True)
    assert resumed.run == begun.run
    assert_same(ending(whole), ending(resumed))
    assert_sound(failing.run)


def test_a_disk_that_takes_no_checkpoint(tmp_path: Path) -> None:
    """A limit of the system's on the size of files stands in for it: the same call fails, in the same place."""
    trainer = make(tmp_path, model=lambda: nn.Sequential(nn.Linear(6, 200_000), nn.Linear(200_000, 3)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, hard))
    try:
        error = _fails(trainer, OSError, "writing")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(error, OSError)
    assert error.errno == errno.EFBIG


def test_what_cannot_be_put_back_is_said(tmp_path: Path) -> None:
    class Stubborn(Callback):
        """Keeps what it has done where a state_dict cannot reach it, and shows it there."""

        __slots__ = ()
        done: list[list[int]] = []

        def on_train_begin(self) -> None:
            type(self).done = [*self.done, [1]]

        def state_dict(self) -> dict[str, Any]:
            return {"done": len(type(self).done)}

    trainer = make(tmp_path, callbacks=[Stubborn()], checkpoint=None)
    with pytest.raises(RehearsalError, match="callbacks/values is not what it was"):
        trainer.rehearse()
    assert trainer.tainted
    with pytest.raises(TaintedError):
        trainer.rehearse()


def test_where_there_is_nothing_to_rehearse(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.fit()
    with pytest.raises(ConfigurationError, match="DONE, where the attempt has ended"):
        trainer.rehearse()
    lazy = make(tmp_path, model=nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3)))
    with pytest.raises(ConfigurationError, match=r"0.weight, 0.bias of the model have no shape"):
        lazy.rehearse()


@pytest.mark.parametrize("where", ["forward", "validation"])
def test_a_signal_during_a_rehearsal_halts_the_training_before_it_begins(where: str, tmp_path: Path) -> None:
    class Struck(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if trainer.rehearsing and self.training == (where == "forward"):
                os.kill(os.getpid(), signal.SIGTERM)
            return inputs

    trainer = make(tmp_path, model=nn.Sequential(Struck(), trainings.network()))
    with pytest.raises(SystemExit):
        trainer.fit(rehearse=True)
    assert (trainer.state, trainer.batches, trainer.reason) == (State.HALTED, 0, "signal SIGTERM")
    assert trainer.run is not None
    assert (trainer.run.checkpoints / "000000000-a1-IDLE").is_dir()
    assert trainer.fit("auto").state is State.DONE
    assert trainer.batches == 18


# -- what is said ------------------------------------------------------------------------------------


def test_one_line_is_said_and_no_hook_of_logging_speaks(tmp_path: Path, capsys) -> None:
    told: list[str] = []
    log = Logging("verbose", to=["console", lambda record: told.append(record.message)])
    trainer = make(tmp_path, log=log)
    found = trainer.rehearse()
    assert told == [str(found)]
    assert capsys.readouterr().out == f"{found}\n"
    assert "rehearsed in" in told[0]
    assert "2 batches of" in told[0]
    assert "training takes about" in told[0]
    told.clear()
    trainer.fit(rehearse=True)
    assert [message[:9] for message in told].count("rehearsed") == 1
    transitions = [message for message in told if "->" in message]
    assert transitions[0].split()[:4] == ["begin_epoch", "IDLE", "->", "EPOCH_START"]
    assert len(transitions) == 3 * (1 + 5 * 6 + 1) + 1


def test_nothing_of_it_is_in_the_journal_but_the_line(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.fit(rehearse=True)
    assert trainer.run is not None
    with Journal.open(trainer.run) as journal:
        rows = list(journal.transitions(scope="train"))
        assert rows[0].seq == 1
        assert (rows[0].trigger, rows[0].epoch) == (Trigger.BEGIN_EPOCH, 0)
        assert [log.level for log in journal.logs() if log.message.startswith("rehearsed")] == ["INFO"]


@pytest.mark.parametrize(
    ("settings", "batches", "epochs", "count"),
    [
        ({}, 60, 10, 3),
        ({}, 6, 1, 2),
        ({"keep_last": 9}, 60, 3, 4),
        ({"keep_last": 9, "every_batches": 10}, 60, 3, 10),
        ({"every_epochs": None}, None, None, 1),
        ({"every_seconds": 60}, None, None, 3),
        ({"overhead": 0.1}, 60, 3, 3),
        ({"best": "val/loss"}, 60, 10, 4),
        ({"keep_every_epochs": 2}, 60, 10, 6),
    ],
)
def test_how_many_checkpoints_need_room(
    settings: dict[str, Any], batches: int | None, epochs: int | None, count: int
) -> None:
    assert checkpoints_at_once(Checkpointing(**settings), batches, epochs)[0] == count
