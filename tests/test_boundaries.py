"""Requests that come at awkward moments, parts that fail, and what a resume must and must not take along."""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainings
from orchestrator import Callback, Checkpointing, NonFiniteError, Trainer
from orchestrator.errors import ConfigurationError, TaintedError
from orchestrator.loop import NestedTriggerError
from orchestrator.recovery import CheckpointMismatch
from orchestrator.snapshot.encoding import EncodingError
from states import State, Trigger
from states.language import first_illegal_row
from tracking.journal import Journal
from tracking.runs import list_runs


def end_of(trainer: Trainer) -> tuple[str | None, str, State | None]:
    assert trainer.run is not None
    with Journal.open(trainer.run) as journal:
        assert first_illegal_row(journal.transitions()) is None
        attempt = journal.attempts()[-1]
    return attempt.outcome, attempt.reason, attempt.end_state


def losses(trainer: Trainer) -> list[list[float]]:
    return [[epoch["loss"], epoch.get("val/loss", 0.0)] for epoch in trainer.history]


def test_a_signal_while_the_run_is_opened_is_not_lost(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path)
    take = trainer._training.work.stream.fingerprint

    def interrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        return take()

    trainer._training.work.stream.fingerprint = interrupted  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        trainer.fit()
    assert left.value.code == 143
    assert end_of(trainer) == ("stopped", "signal SIGTERM", State.HALTED)
    assert trainer.batches == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_halt_asked_for_before_fit_is_honoured(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path)
    trainer.halt("not now")
    assert trainer.fit().state is State.HALTED
    assert trainer.fit().state is State.DONE  # and only once


def test_a_signal_in_the_last_moment_still_leaves(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, epochs=1)
    trainer.on(State.DONE)(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert end_of(trainer)[0] == "done"


def test_a_halt_within_validation_leaves_its_generator_as_it_was(tmp_path: Path) -> None:
    def build(root: Path, halts: bool) -> Trainer:
        own = torch.Generator().manual_seed(3)

        def forward(model, batch):
            if halts and trainer.validating and trainer.epoch == 1:
                trainer.halt("in validation")
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        loaders = {"one": trainings.loader(7, generator=own), "two": trainings.loader(16)}
        trainer = trainings.make(root, forward=forward, val_loader=loaders, checkpoint=Checkpointing())
        return trainer

    whole = build(tmp_path / "whole", halts=False)
    whole.fit()
    first = build(tmp_path / "cut", halts=True)
    first.fit()
    assert first.state is State.HALTED
    assert end_of(first)[2] is State.HALTED
    again = build(tmp_path / "cut", halts=False)
    again.fit(resume="auto")
    keys = [k for k in whole.history[0] if k.endswith("loss")]
    assert [[e[k] for k in keys] for e in again.history] == [[e[k] for k in keys] for e in whole.history]
    end_of(again)


def test_evaluate_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    def build(root: Path, evaluates: bool) -> Trainer:
        own = trainings.loader(generator=torch.Generator().manual_seed(3))

        def forward(model, batch):
            loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
            trainer.log("seen", loss)
            return loss

        trainer = trainings.make(root, train_loader=own, forward=forward)
        with trainer:
            while trainer.advance() is not None:
                if evaluates and trainer.state in (State.BATCH_END, State.EPOCH_END, State.BACKWARD):
                    assert "seen" in trainer.evaluate(own)
        return trainer

    plain, evaluating = build(tmp_path / "a", False), build(tmp_path / "b", True)
    trainings.assert_equal(trainings.weights(plain), trainings.weights(evaluating))
    assert [e["seen"] for e in plain.history] == [e["seen"] for e in evaluating.history]


def test_nothing_is_saved_when_halting_on_a_nan(tmp_path: Path) -> None:
    batches = list(trainings.loader(shuffle=False))
    batches[2] = (batches[2][0] * float("nan"), batches[2][1])
    trainer = trainings.make(tmp_path, train_loader=batches)
    asked = []
    trainer.after(Trigger.STEP)(lambda: asked.append(trainer.save()) if trainer.skipped else None)
    with pytest.raises(NonFiniteError):
        trainer.fit()
    with pytest.raises(TaintedError):
        asked[0].wait(10)
    assert [path.name for path in trainer.run.checkpoints.iterdir()] == ["000000000-a1-IDLE"]


def test_going_back_behind_the_best_makes_a_new_best(tmp_path: Path) -> None:
    class Score(Callback):
        def __init__(self, scores: list[float]) -> None:
            self.scores = scores

        def on_epoch_end(self, epoch, metrics) -> None:
            self.trainer.log("score_loss", self.scores[epoch])

    def run(scores: list[float], resume=False):
        checkpoint = Checkpointing(best="score_loss", keep_last=9)
        trainer = trainings.make(tmp_path, callbacks=[Score(scores)], checkpoint=checkpoint, epochs=3)
        return trainer, trainer.fit(resume=resume)

    first, result = run([3.0, 1.0, 2.0])
    assert "-e1-" in result.best_checkpoint.name
    start = next(p for p in first.run.checkpoints.iterdir() if p.name.endswith("e0-b5-EPOCH_END"))
    second, result = run([9.0, 2.0, 1.0], resume=start)
    assert "-a2-e2-" in result.best_checkpoint.name
    end_of(second)


def test_extending_after_an_end_that_was_cut_short_twice(tmp_path: Path) -> None:
    """Halted between the early end of the epoch and DONE; the longer run goes on within the epoch."""
    whole = trainings.make(tmp_path / "whole", max_batches=18)
    whole.fit()
    short = trainings.make(tmp_path / "short", max_batches=8)
    short.after(Trigger.END_EPOCH)(lambda: short.halt("now") if short.epoch == 1 else None)
    assert short.fit().state is State.HALTED
    long = trainings.make(tmp_path / "short", max_batches=18)
    long.fit(resume="auto")
    assert losses(long) == losses(whole)
    trainings.assert_equal(trainings.weights(long), trainings.weights(whole))


def test_an_epoch_without_batches_cannot_go_on_for_ever(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no batch"):
        trainings.make(tmp_path, train_loader=[], max_batches=3).fit()


def scheduled(factory):
    model = trainings.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer, "scheduler": factory(optimizer) if factory else None}


def test_another_scheduler_is_refused_and_other_settings_of_it_are_listed(tmp_path: Path) -> None:
    lr = torch.optim.lr_scheduler
    run = trainings.make(tmp_path, epochs=1, **scheduled(lambda o: lr.StepLR(o, 1, 0.5))).fit().run
    for factory in (lambda o: lr.CosineAnnealingLR(o, 5), None):
        other = trainings.make(tmp_path, epochs=2, **scheduled(factory))
        before = trainings.weights(other)
        with pytest.raises(CheckpointMismatch, match="scheduler"):
            other.fit(resume=run)
        trainings.assert_equal(trainings.weights(other), before)
    with pytest.warns(UserWarning, match="gamma"):
        trainings.make(tmp_path, epochs=2, **scheduled(lambda o: lr.StepLR(o, 1, 0.1))).fit(resume=run)


def test_a_callback_whose_state_cannot_be_stored(tmp_path: Path) -> None:
    class Bad(Callback):
        def state_dict(self):
            return {"f": print} if self.trainer.batches else {}

    trainer = trainings.make(tmp_path, callbacks=[Bad()], checkpoint=Checkpointing(every_batches=2))
    with pytest.raises(EncodingError, match="callbacks/Bad/f"):
        trainer.fit()
    outcome, reason, state = end_of(trainer)
    assert (outcome, state) == ("failed", State.HALTED)
    assert "EncodingError" in reason


class Keeps(Callback):
    """Keeps something deep in its state."""

    def __init__(self, kept: Any) -> None:
        self.kept = kept

    def state_dict(self) -> dict[str, Any]:
        return {"seen": {"last": [self.kept]}}


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"lock": threading.Lock()}


def keeping(where: str) -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if where == "optimizer":
        optimizer.state[model[0].bias]["note"] = lambda: None
        return {"model": model, "optimizer": optimizer}
    if where == "group":
        optimizer.param_groups[0]["decide"] = lambda step: step
        return {"model": model, "optimizer": optimizer}
    if where == "scheduler":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        scheduler.file = sys.stderr
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    if where == "module":
        return {"model": nn.Sequential(Extra(6, 3))}
    return {"callbacks": [Keeps(threading.Lock())]}


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("callback", "callbacks/Keeps/seen/last/0: an object of _thread.lock"),
        ("optimizer", "optimizers/0/state/0.bias/note: a function"),
        ("group", "optimizers/0/groups/0/settings/decide: a function"),
        ("scheduler", "callbacks/LRScheduling/StepLR/scheduler/state/file: an object of"),
        ("module", "model/extra/0/lock: an object of _thread.lock"),
    ],
)
def test_what_no_checkpoint_can_have_is_refused_before_anything_is_written(
    where: str, named: str, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    with pytest.raises(EncodingError, match=f"^{named}.*Leave it out"):
        trainings.make(root, **keeping(where)).fit()
    assert not root.exists()
    result = trainings.make(root, checkpoint=None, epochs=1, **keeping(where)).fit()
    assert result.state is State.DONE, "without checkpoints nothing has to be stored"


def test_a_callback_that_on_train_begin_prepares_is_asked_for_its_state_later(tmp_path: Path) -> None:
    class Prepared(Callback):
        def on_train_begin(self) -> None:
            self.seen = 0

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

    assert trainings.make(tmp_path, callbacks=[Prepared()], epochs=1).fit().state is State.DONE


def test_a_hook_on_halted_that_raises_does_not_take_the_record_along(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path)

    @trainer.on(State.HALTED)
    def _fail() -> None:
        raise RuntimeError("in the hook")

    @trainer.after(Trigger.STEP)
    def _halt() -> None:
        raise ValueError("in the step")

    with pytest.warns(UserWarning, match="in the hook"), pytest.raises(ValueError, match="in the step"):
        trainer.fit()
    assert end_of(trainer) == ("failed", "ValueError: in the step", State.HALTED)


def test_resuming_a_finished_run_by_its_last_checkpoint(tmp_path: Path) -> None:
    result = trainings.make(tmp_path, epochs=1).fit()
    again = trainings.make(tmp_path, epochs=1)
    assert again.fit(resume=result.last_checkpoint).state is State.DONE
    assert again.advance() is None
    longer = trainings.make(tmp_path, epochs=2)
    assert len(longer.fit(resume=result.last_checkpoint).history) == 2
    assert len(list_runs(tmp_path)) == 1


def test_another_validation_set_may_be_given_on_resume(tmp_path: Path) -> None:
    run = trainings.make(tmp_path, epochs=1, val_loader=trainings.loader(4)).fit().run
    longer = trainings.make(
        tmp_path, epochs=2, val_loader={"val": trainings.loader(24), "more": trainings.loader(7)}
    )
    assert "more/loss" in longer.fit(resume=run).history[-1]


def test_close_and_fit_from_a_hook_are_refused(tmp_path: Path) -> None:
    for name in ("close", "fit"):
        trainer = trainings.make(tmp_path / name)
        trainer.after(Trigger.FETCH)(getattr(trainer, name))
        with pytest.raises(NestedTriggerError):
            trainer.fit()
        assert end_of(trainer)[2] is State.HALTED


def test_a_save_asked_for_in_halted_is_answered(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path)
    asked = []
    trainer.on(State.HALTED)(lambda: asked.append(trainer.save()))
    trainer.after(Trigger.STEP)(lambda: trainer.halt("now"))
    trainer.fit()
    assert asked[0].wait(10).name == "000000006-a1-e0-b0-HALTED"
    batches = list(trainings.loader(shuffle=False))
    batches[2] = (batches[2][0] * float("nan"), batches[2][1])
    spoilt = trainings.make(tmp_path, train_loader=batches)
    spoilt.on(State.HALTED)(lambda: asked.append(spoilt.save()))
    with pytest.raises(NonFiniteError):
        spoilt.fit()
    with pytest.raises(TaintedError, match="not made"):
        asked[1].wait(10)


def test_requests_in_on_train_begin_of_a_resumed_attempt(tmp_path: Path) -> None:
    class Asks(Callback):
        def on_train_begin(self) -> None:
            if self.trainer.attempt == 2:
                self.saved = self.trainer.save()
                self.trainer.stop("enough")

    first = trainings.make(tmp_path, callbacks=[Asks()])
    first.start()
    first.advance(until=State.BATCH_END)
    first.close()
    asks = Asks()
    second = trainings.make(tmp_path, callbacks=[asks])
    assert second.fit(resume="auto").reason == "enough"
    assert second.batches == 1
    assert asks.saved.wait(10).name.endswith("BATCH_END")


def test_a_loss_function_with_state_is_part_of_the_training(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, outputs, targets):
            self.seen += 1
            return nn.functional.cross_entropy(outputs, targets) * (1 + self.seen / 10)

    whole = trainings.make(tmp_path / "whole", loss_fn=Counting())
    whole.fit()
    first = trainings.make(tmp_path / "cut", loss_fn=Counting())
    first.start()
    for _ in range(33):
        first.advance()
    first.close()
    again = trainings.make(tmp_path / "cut", loss_fn=Counting())
    again.fit(resume="auto")
    assert losses(again) == losses(whole)


def test_batch_time_goes_on_after_a_resume_within_a_batch(tmp_path: Path) -> None:
    first = trainings.make(tmp_path)
    first.start()
    first.advance(until=State.BACKWARD)
    first.close()
    again = trainings.make(tmp_path, max_batches=1)
    seen = []
    again.after(Trigger.END_BATCH)(lambda: seen.append(again.metrics["batch_time"]))
    again.fit(resume="auto")
    assert 0 < seen[0] < 60


def test_metrics_need_outputs(tmp_path: Path) -> None:
    def forward(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ConfigurationError, match="returns a loss alone"):
        trainings.make(tmp_path, forward=forward, metrics={"a": lambda outputs, targets: 1.0}).fit()


@pytest.mark.parametrize("name", ["lr/0", "val/loss", "loss"])
def test_names_that_are_taken_cannot_be_logged(name: str, tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, val_loader=trainings.loader(16))
    trainer.after(Trigger.STEP)(lambda: trainer.log(name, 1.0))
    with pytest.raises(ConfigurationError, match="by another"):
        trainer.fit()


def test_extending_passes_over_a_damaged_checkpoint_from_before_the_end(tmp_path: Path) -> None:
    whole = trainings.make(tmp_path / "whole", epochs=4)
    whole.fit()
    short = trainings.make(tmp_path / "short", checkpoint=Checkpointing(keep_last=9))
    short.fit()
    (newest,) = short.run.checkpoints.glob("*-e2-b5-EPOCH_END")
    file = newest / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    longer = trainings.make(tmp_path / "short", epochs=4, checkpoint=Checkpointing(keep_last=9))
    with pytest.warns(UserWarning, match=f"passing over checkpoint {newest.name}"):
        longer.fit(resume="auto")
    assert losses(longer) == losses(whole)
    trainings.assert_equal(trainings.weights(longer), trainings.weights(whole))
    end_of(longer)
