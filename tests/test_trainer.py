"""The loop: order within a transition, requests at boundaries, phases, empty batches, what raises."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainings
from orchestrator import (
    Callback,
    Checkpointing,
    InterlockError,
    LRScheduling,
    Phase,
    Trainer,
    seed_everything,
)
from orchestrator.errors import ConfigurationError, LossError, TaintedError
from orchestrator.loop import NestedTriggerError
from orchestrator.snapshot.storage import list_checkpoints
from states import State, Trigger
from states.language import Move, first_illegal
from states.table import TRAINING
from tracking.journal import Journal
from tracking.runs import RunFolder


def rows(trainer: Trainer, **options):
    with Journal.open(trainer.run) as journal:
        return list(journal.transitions(**options))


def assert_legal(trainer: Trainer) -> None:
    moves = [Move(r.trigger, r.source, r.dest) for r in rows(trainer, scope="train")]
    assert first_illegal(moves, TRAINING) is None


class Recording(Callback):
    """Writes down every classic hook with its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def on_train_begin(self) -> None:
        self.calls.append(("train_begin",))

    def on_epoch_begin(self, epoch: int) -> None:
        self.calls.append(("epoch_begin", epoch))

    def on_batch_begin(self, batch: int) -> None:
        assert len(self.trainer.data) == 2
        self.calls.append(("batch_begin", batch))

    def on_batch_end(self, batch: int, metrics) -> None:
        self.calls.append(("batch_end", batch, set(metrics)))

    def on_epoch_end(self, epoch: int, metrics) -> None:
        self.calls.append(("epoch_end", epoch, set(metrics)))

    def on_train_end(self, metrics) -> None:
        assert self.trainer.state is State.DONE
        self.calls.append(("train_end", set(metrics)))


def test_the_six_hooks(tmp_path: Path) -> None:
    recording = Recording()
    trainings.make(
        tmp_path,
        epochs=1,
        callbacks=[recording],
        train_loader=trainings.loader(24),
        val_loader=trainings.loader(24),
    ).fit()
    batch = {"loss", "batch_time", "grad_norm"}
    epoch = {"loss", "duration", "lr", "grad_norm", "val/loss"}
    assert recording.calls == [
        ("train_begin",),
        ("epoch_begin", 0),
        ("batch_begin", 0),
        ("batch_end", 0, batch),
        ("batch_begin", 1),
        ("batch_end", 1, batch),
        ("epoch_end", 0, epoch),
        ("train_end", epoch),
    ]


def test_order_within_a_transition(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, max_batches=1)
    order: list[object] = []

    @trainer.before(Trigger.STEP)
    def _before() -> None:
        order.append(("before", trainer.state, trainer.updates))

    @trainer.on(State.STEP)
    def _on() -> None:
        order.append(("on", trainer.state, trainer.updates))

    @trainer.after(Trigger.STEP)
    def _after() -> None:
        order.append(("after", trainer.state, trainer.updates))

    trainer.fit()
    assert order == [("before", State.BACKWARD, 0), ("on", State.STEP, 1), ("after", State.STEP, 1)]


def test_a_save_waits_for_every_hook_of_the_transition(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, max_batches=2, checkpoint=Checkpointing(keep_last=9))
    saves = []

    @trainer.after(Trigger.END_BATCH)
    def _ask() -> None:
        saves.append(trainer.save())

    @trainer.after(Trigger.END_BATCH)
    def _change() -> None:
        with torch.no_grad():
            trainer.model[0].bias.fill_(float(trainer.batches))

    trainer.fit()
    from orchestrator.snapshot.storage import read_checkpoint

    _, tree = read_checkpoint(saves[0].wait())
    assert tree["model"]["parameters"]["0.bias"].tolist() == [1.0] * 8
    assert tree["state"] is State.BATCH_END


def test_advance_goes_one_transition_or_up_to_a_state(tmp_path: Path) -> None:
    with trainings.make(tmp_path) as trainer:
        assert repr(trainer) == "<Trainer in IDLE>"
        trainer.start()
        assert trainer.state is State.IDLE
        first = trainer.advance()
        assert repr(first) == "<IDLE → EPOCH_START (begin_epoch)>"
        assert (first.trigger, first.source, first.dest) == (
            Trigger.BEGIN_EPOCH,
            State.IDLE,
            State.EPOCH_START,
        )
        last = trainer.advance(until=State.BACKWARD)
        assert last.trigger is Trigger.BACKWARD
        assert (trainer.epoch, trainer.batch) == (0, 0)
        assert repr(trainer) == f"<Trainer of {trainer.run.id} in BACKWARD, epoch 0, batch 0>"
        assert trainer.model[0].weight.grad is not None
        trainer.advance(until=State.EPOCH_END)
        assert len(trainer.history) == 1
        trainer.advance(until=State.DONE)
        assert trainer.state is State.DONE
        assert trainer.advance() is None
    assert_legal(trainer)


def test_leaving_the_with_block_halts(tmp_path: Path) -> None:
    with trainings.make(tmp_path) as trainer:
        trainer.advance(until=State.FORWARD)
    assert trainer.state is State.HALTED
    assert trainer.reason == "closed before the end"
    assert_legal(trainer)
    last = rows(trainer, scope="train")
    assert [r.dest for r in last[-2:]] == [State.FORWARD, State.HALTED]


def test_a_trigger_from_inside_a_transition_raises(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path)
    trainer.after(Trigger.FETCH)(lambda: trainer.advance())
    with pytest.raises(NestedTriggerError, match="only request"):
        trainer.fit()


def test_stop_goes_to_done_and_halt_to_halted(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path)
    trainer.after(Trigger.STEP)(lambda: trainer.stop("enough"))
    result = trainer.fit()
    assert (result.state, result.reason, trainer.batches) == (State.DONE, "enough", 1)

    trainer = trainings.make(tmp_path)
    trainer.after(Trigger.STEP)(lambda: trainer.halt("for now"))
    result = trainer.fit()
    assert (result.state, result.reason, trainer.batches) == (State.HALTED, "for now", 0)
    assert rows(trainer)[-1].note == "for now"
    assert_legal(trainer)


def test_stop_in_idle_makes_no_batch(tmp_path: Path) -> None:
    class Never(Callback):
        def on_train_begin(self) -> None:
            self.trainer.stop("never mind")

    trainer = trainings.make(tmp_path, callbacks=[Never()])
    assert trainer.fit().state is State.DONE
    assert trainer.batches == 0
    assert_legal(trainer)


def test_work_that_raises_leaves_no_checkpoint_of_tainted_memory(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, checkpoint=Checkpointing(every_batches=2, keep_last=99))

    @trainer.before(Trigger.STEP)
    def _fail() -> None:
        if trainer.batches == 3:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.fit()
    assert trainer.state is State.HALTED
    last = rows(trainer)[-1]
    assert (last.source, last.trigger) == (State.BACKWARD, Trigger.HALT)
    assert "RuntimeError: out of luck" in last.note
    assert "does 1 batch again" in last.note
    with pytest.raises(TaintedError):
        trainer.save()
    with Journal.open(trainer.run) as journal:
        assert [c.state for c in journal.checkpoints()] == [State.IDLE, State.BATCH_END]
        assert journal.attempts()[-1].outcome == "failed"
    assert_legal(trainer)


def test_an_after_hook_that_raises_undoes_its_transition(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path)

    @trainer.after(Trigger.STEP)
    def _fail() -> None:
        raise ValueError("after")

    with pytest.raises(ValueError, match="after"):
        trainer.fit()
    assert rows(trainer)[-1].source is State.BACKWARD
    assert_legal(trainer)


def test_max_batches_and_epochs_end_the_training(tmp_path: Path) -> None:
    assert len(trainings.make(tmp_path, epochs=2).fit().history) == 2
    trainer = trainings.make(tmp_path, max_batches=8)
    trainer.fit()
    assert (trainer.batches, trainer.epoch) == (8, 1)


def test_max_time_halts_and_exits_with_75(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, epochs=10**6, max_time=0.3)
    with pytest.raises(SystemExit) as left:
        trainer.fit()
    assert left.value.code == 75
    assert trainer.state is State.HALTED
    assert "max_time" in trainer.reason


def test_batches_that_are_dicts_and_a_custom_forward(tmp_path: Path) -> None:
    batches = [{"x": x, "y": y} for x, y in trainings.loader(shuffle=False)]

    def forward(model, batch):
        outputs = model(batch["x"])
        loss = nn.functional.cross_entropy(outputs, batch["y"])
        trainer.log("part", loss * 2)
        return loss, outputs, batch["y"]

    trainer = trainings.make(
        tmp_path,
        train_loader=batches,
        val_loader={"one": batches[:2], "two": batches[2:]},
        forward=forward,
        metrics={"right": lambda outputs, targets: (outputs.argmax(1) == targets).float().mean()},
    )
    last = trainer.fit().history[-1]
    assert last["part"] == pytest.approx(2 * last["loss"])
    assert {"one/loss", "two/loss", "one/right", "two/part", "right"} <= last.keys()


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(), nn.Linear(8, 1))


def gan_losses():
    bce = nn.functional.binary_cross_entropy_with_logits

    def discriminate(model, batch):
        real, _ = batch
        fake = model.generator(torch.randn(len(real), 2)).detach()
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        return bce(model.discriminator(real), ones) + bce(model.discriminator(fake), zeros)

    def generate(model, batch):
        fake = model.generator(torch.randn(len(batch[0]), 2))
        return bce(model.discriminator(fake), torch.ones(len(fake), 1))

    return discriminate, generate


def test_a_gan_in_two_phases_equals_the_hand_written_loop(tmp_path: Path) -> None:
    discriminate, generate = gan_losses()

    def build():
        seed_everything(4)
        model = Gan()
        return (
            model,
            torch.optim.Adam(model.discriminator.parameters(), lr=1e-2),
            torch.optim.Adam(model.generator.parameters(), lr=1e-2),
        )

    model, d, g = build()
    for _ in range(2):
        for batch in trainings.loader():
            for optimizer, loss in ((d, discriminate), (g, generate)):
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()
    expected = {name: value.clone() for name, value in model.state_dict().items()}

    model, d, g = build()
    trainer = trainings.make(
        tmp_path,
        seed=4,
        model=model,
        optimizer=[Phase("discriminator", d, discriminate), Phase("generator", g, generate)],
        loss_fn=None,
        epochs=2,
    )
    seed_everything(4)
    Gan()  # the draws that building the model made
    history = trainer.fit().history
    trainings.assert_equal(trainings.weights(trainer), expected)
    assert {"loss/discriminator", "loss/generator"} <= history[-1].keys()
    one = [r for r in rows(trainer, scope="train") if (r.epoch, r.batch) == (0, 0)]
    assert [(r.phase, r.trigger.value) for r in one] == [
        ("discriminator", "fetch"),
        ("discriminator", "forward"),
        ("discriminator", "backward"),
        ("discriminator", "step"),
        ("generator", "forward"),
        ("generator", "backward"),
        ("generator", "step"),
        ("generator", "end_batch"),
    ]
    assert_legal(trainer)


def with_empty(*positions: int):
    batches = list(trainings.loader(shuffle=False))
    for position in positions:
        batches[position] = (torch.empty(0, 6), torch.empty(0, dtype=torch.long))
    return batches


def test_empty_batches_are_skipped_with_a_warning(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, train_loader=with_empty(1, 5), epochs=1)
    with pytest.warns(UserWarning, match="batch 1 of epoch 0 is empty"):
        trainer.fit()
    assert (trainer.batches, trainer.updates) == (6, 4)
    assert [r.note for r in rows(trainer, scope="train") if r.batch == 1 and r.note] == ["empty"]
    assert_legal(trainer)


def test_an_empty_last_batch_closes_the_window(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, train_loader=with_empty(5), epochs=1, accumulate=3)
    with pytest.warns(UserWarning, match="empty"):
        trainer.fit()
    assert trainer.updates == 2  # batches 0-2, and 3-4 closed by the empty one
    last = [r.trigger for r in rows(trainer, scope="train") if r.batch == 5]
    assert last == [Trigger.FETCH, Trigger.STEP, Trigger.END_BATCH, Trigger.END_EPOCH, Trigger.FINISH]


def test_a_schedule_by_a_batch_s_metric_passes_over_an_empty_one(tmp_path: Path) -> None:
    """A batch that is empty closes a window, and has no loss."""
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    seen: list[float] = []
    plateau.step = seen.append  # type: ignore[method-assign]
    trainer = trainings.make(
        tmp_path, model=model, optimizer=optimizer, train_loader=with_empty(5), epochs=1, accumulate=3,
        scheduler=LRScheduling(plateau, every="batch", monitor="loss"),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="empty"):
        trainer.fit()
    losses = [row.loss for row in rows(trainer, scope="train") if row.trigger is Trigger.FORWARD]
    assert seen == [losses[2]]
    assert trainer.updates == 2


def test_an_epoch_without_any_batch(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, train_loader=[], epochs=2)
    assert trainer.fit().state is State.DONE
    assert_legal(trainer)


@pytest.mark.parametrize(
    ("weighting", "weights"),
    [("batches", [1, 1, 1]), ("samples", [8, 8, 2]), (lambda batch: float(batch[1].sum() + 1), None)],
)
def test_accumulation_weights_and_a_short_last_window(weighting, weights, tmp_path: Path) -> None:
    """The update is that of the weighted mean of the micro-batches' losses, over the real length."""
    batches = list(trainings.loader(shuffle=False))[:2]
    batches = [*batches, (batches[0][0][:2], batches[0][1][:2])]
    weights = weights or [float(y.sum() + 1) for _, y in batches]
    seed_everything(3)
    model = nn.Linear(6, 3).double()
    batches = [(x.double(), y) for x, y in batches]
    expected = model.weight.detach().clone()
    losses = [nn.functional.cross_entropy(model(x), y) for x, y in batches]
    mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    (gradient,) = torch.autograd.grad(mean, [model.weight])
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        nn.CrossEntropyLoss(),
        batches,
        epochs=1,
        accumulate=4,
        accumulate_weighting=weighting,
        log=None,
        track=None,
        root=tmp_path,
    )
    trainer.fit()
    torch.testing.assert_close(model.weight.detach(), expected - gradient, rtol=1e-12, atol=1e-15)


def test_frozen_batchnorm_stays_frozen_and_validation_leaves_no_trace(tmp_path: Path) -> None:
    """Modes are put back one by one, and the random state is as if validation had not been."""
    found = []
    for val in (None, DataLoader(trainings.data(20), batch_size=5, shuffle=True)):
        seed_everything(1)
        model = trainings.network()
        model[1].eval()
        trainer = trainings.make(tmp_path, model=model, val_loader=val)
        trainer.fit()
        assert not model[1].training
        assert model[3].training
        found.append((trainings.weights(trainer), torch.get_rng_state()))
    trainings.assert_equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    scopes = {r.scope for r in rows(trainer)}
    assert scopes == {"train", "validation/val"}


def test_evaluate_changes_nothing(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, epochs=1)
    before, random = trainings.weights(trainer), torch.get_rng_state()
    values = trainer.evaluate(trainings.loader())
    assert values.keys() == {"loss"}
    trainings.assert_equal(trainings.weights(trainer), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert trainer.model.training


def test_the_table_is_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take any row that a plain training needs away, and it fails."""
    import orchestrator.training as module

    needed = [row for row in TRAINING if row.trigger not in (Trigger.HALT, Trigger.RESUME)]
    for gone in needed:
        monkeypatch.setattr(module, "TRAINING", tuple(row for row in TRAINING if row is not gone))
        with pytest.raises((KeyError, ValueError)):
            trainings.make(tmp_path / gone.trigger.value, epochs=1).fit()


def test_work_is_called_by_the_machine_alone() -> None:
    """No other module calls a method of the work that a trigger is named for."""
    import re

    import orchestrator

    folder = Path(orchestrator.__file__).parent
    names = "|".join(trigger.value for trigger in Trigger if trigger is not Trigger.HALT)
    call = re.compile(rf"work\.({names})\(")
    offenders = [path.name for path in folder.rglob("*.py") if call.search(path.read_text())]
    assert offenders == []


def test_two_processes_cannot_work_on_one_run(tmp_path: Path) -> None:
    with trainings.make(tmp_path) as trainer:
        trainer.advance()
        other = trainings.make(tmp_path)
        with pytest.raises(InterlockError, match="held by"):
            other.fit(resume="auto")


def test_memory_of_a_folder(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, epochs=1)
    result = trainer.fit()
    run = RunFolder(result.run)
    assert run.name == "test"
    assert run.journal.exists()
    assert run.command.stat().st_mode & 0o777 == 0o600
    fresh = trainings.network()
    result.load_last(fresh)
    trainings.assert_equal(fresh.state_dict(), trainer.model.state_dict())


BAD = {
    "no end": ({"epochs": None}, "neither epochs nor max_batches"),
    "metric named twice": ({"metrics": {"loss": lambda o, t: 0.0}}, "'loss'"),
    "unknown nonfinite": ({"nonfinite": "ignore"}, "expected"),
    "unknown precision": ({"precision": "fp8"}, "expected one of fp32"),
    "negative accumulate": ({"accumulate": 0}, "at least 1"),
    "validate_every without a loader": ({"validate_every": 5}, "no val_loader"),
    "path in the name": ({"name": "runs/digits"}, "path separator"),
    "no callback": ({"callbacks": [print]}, "Callback"),
    "weighting": ({"accumulate_weighting": "tokens"}, "expected"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    options, message = BAD[case]
    with pytest.raises(InterlockError, match=message):
        trainings.make(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_bad_optimizers_and_schedulers(tmp_path: Path) -> None:
    other = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match="no parameter of this model"):
        trainings.make(tmp_path, optimizer=torch.optim.SGD(other.parameters(), lr=1.0))
    with pytest.raises(ConfigurationError, match="LBFGS"):
        trainings.make(tmp_path, optimizer=lambda model: torch.optim.LBFGS(model.parameters()))
    model = trainings.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ConfigurationError, match="given twice"):
        trainings.make(
            tmp_path,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            callbacks=[LRScheduling(scheduler)],
        )


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (nn.CrossEntropyLoss(reduction="none"), r"shape \(8,\)"),
        (lambda outputs, targets: 1.0, "a float as the loss"),
        (lambda outputs, targets: nn.functional.cross_entropy(outputs.detach(), targets), "does not depend"),
    ],
)
def test_a_loss_that_is_none(loss_fn, message: str, tmp_path: Path) -> None:
    with pytest.raises(LossError, match=message):
        trainings.make(tmp_path, loss_fn=loss_fn).fit()


def test_batches_that_forward_cannot_take(tmp_path: Path) -> None:
    batches = [{"x": torch.ones(2, 6)}]
    with pytest.raises(ConfigurationError, match="yields a dict with keys 'x'"):
        trainings.make(tmp_path, train_loader=batches).fit()


def test_resume_auto_without_a_name_and_unknown_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no name="):
        trainings.make(tmp_path, name=None).fit(resume="auto")
    with pytest.raises(InterlockError, match="nobody"):
        trainings.make(tmp_path).fit(resume="nobody")


def test_an_unwritable_root(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InterlockError, match="root"):
        trainings.make(file / "runs").fit()


def test_states_and_triggers_by_name(tmp_path: Path) -> None:
    trainer = trainings.make(
        tmp_path, checkpoint=Checkpointing(at=["STEP", State.BACKWARD], every_batches=1, keep_last=9)
    )
    seen: list[str] = []
    trainer.before("step")(lambda: seen.append("before"))
    trainer.after("step")(lambda: seen.append("after"))
    trainer.on("STEP")(lambda: seen.append("on"))
    arc = trainer.advance("STEP")
    assert arc is not None
    assert (arc.dest, seen) == (State.STEP, ["before", "on", "after"])
    save = trainer.save("BATCH_END")
    assert trainer.advance() is not None
    assert save.wait().name.endswith("BATCH_END")
    trainer.close()
    states = {path.name.rsplit("-", 1)[1] for path in list_checkpoints(trainer.run.checkpoints)}
    assert {"STEP", "BACKWARD"} <= states
    trainer.seek(0, 0, "FORWARD")
    assert trainer.state is State.FORWARD
    trainer.close()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda trainer: trainer.before("steps"),
            "before.trigger. is 'steps'; expected a Trigger, or the name of",
        ),
        (lambda trainer: trainer.after(State.STEP), "after.trigger. is .*'step', 'end_batch'"),
        (
            lambda trainer: trainer.on("step"),
            "on.state. is 'step'; expected a State, or .*'STEP', 'BATCH_END'",
        ),
        (lambda trainer: trainer.advance("END"), "advance.until. is 'END'"),
        (lambda trainer: trainer.save("END"), "save.at. is 'END'"),
        (lambda trainer: trainer.seek(0, 0, "END"), "seek.state. is 'END'"),
        (lambda trainer: Checkpointing(at="END"), "Checkpointing: at is 'END'"),
    ],
)
def test_names_that_there_are_not(call: Callable[[Trainer], object], message: str, tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        call(trainer)
    assert trainer.batches == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("forward", "raised in forward, epoch 0, batch 2, which has [float32 [8, 4], int64 [8]]"),
        ("hook", "raised in a hook in BACKWARD, epoch 0, batch 2, which has [float32 [8, 4], int64 [8]]"),
        ("data", "raised in fetch, epoch 0, after batch 1"),
        (
            "validation",
            "raised in forward, epoch 0, validating 'val', batch 1, which has [float32 [8, 4], int64 [8]]",
        ),
        ("epoch", "raised in a hook in EPOCH_END, epoch 0"),
    ],
)
def test_what_is_raised_says_where_and_with_which_batch(where: str, told: str, tmp_path: Path) -> None:
    class Data(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            return 1 / 0 if where == "data" and index == 16 else super().__getitem__(index)

    inputs, targets = torch.randn(40, 4), torch.randint(3, (40,))
    calls = {True: 0, False: 0}

    class Model(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            calls[self.training] += 1
            wrong = (where == "forward" and calls[True] == 3) or (where == "validation" and calls[False] == 2)
            return super().forward(inputs) * (1 if not wrong else None)  # type: ignore[operator]

    model = Model(4, 3)
    loader = DataLoader(Data(inputs, targets), batch_size=8)
    val_loader = DataLoader(TensorDataset(inputs, targets), batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(
        model, optimizer, lambda outputs, targets: outputs.sum(), loader, val_loader,
        epochs=1, log=None, track=None, root=tmp_path,
    )  # fmt: skip
    trainer.after("backward")(lambda: 1 / 0 if where == "hook" and trainer.batch == 2 else None)
    trainer.after("end_epoch")(lambda: 1 / 0 if where == "epoch" else None)
    with pytest.raises((ZeroDivisionError, TypeError)) as raised:
        trainer.fit()
    assert raised.value.__notes__ == [told]
