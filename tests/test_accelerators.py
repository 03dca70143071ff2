"""What is done where a device queues its work, on a processor that behaves so: nothing waits, and nothing changes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact_property import CUTS, Cut, interrupted
from test_numerics import parameters, poisoned

import late_device
import trainings
from exactness import assert_same, assert_sound, ending, recorded
from late_device import Waits
from orchestrator import EMA, Checkpointing, GradientStatistics, Logging, LRScheduling, NonFiniteError
from orchestrator.data import BatchStream
from orchestrator.errors import NonFiniteAgainError
from random_trainings import Description, build, descriptions, run_folders
from states import State, Trigger
from tracking.journal import Journal


@contextlib.contextmanager
def slow(lag: int = 1) -> Iterator[list[late_device.SlowLink]]:
    """Trainers made meanwhile take the processor for a device that queues its work."""
    with pytest.MonkeyPatch.context() as patch:
        yield late_device.force(patch, lag)


def fused(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def fused_momentum(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, fused=True)


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(1) == targets).float().mean()


def everything(**options: Any) -> dict[str, Any]:
    """A training with all that reads values, as users set it up."""
    return {
        "optimizer": fused,
        "clip_grad_norm": 0.5,
        "metrics": {"accuracy": accuracy},
        "log": Logging(to=("console", "file")),
        "checkpoint": Checkpointing(),
        "callbacks": [GradientStatistics(every_batches=1), EMA(0.9)],
        **options,
    }


@pytest.mark.parametrize(
    "options",
    [
        everything(nonfinite="halt"),
        everything(nonfinite="halt", optimizer=fused_momentum, accumulate=2),
        everything(nonfinite="skip", callbacks=[GradientStatistics(every_batches=1)]),
        everything(nonfinite="halt", precision="bf16"),
    ],
)
def test_no_batch_waits_for_the_device(options: dict[str, Any], tmp_path: Path) -> None:
    waits = Waits()
    known: list[float | None] = []
    with slow() as links:
        trainer = trainings.make(tmp_path, **options)
        link = links[0]
        # Making a batch is the processor's own business, and so is what a first update and an epoch's end wait for.
        trainer.before(Trigger.FETCH)(lambda: setattr(waits, "counting", False))
        trainer.after(Trigger.FETCH)(lambda: setattr(waits, "counting", trainer.batches >= 3))
        trainer.after(Trigger.END_BATCH)(lambda: known.append(trainer.latest.get("loss")))
        trainer.before(Trigger.END_EPOCH)(lambda: setattr(waits, "counting", False))
        waited: list[int] = []
        trainer.after(Trigger.FETCH)(lambda: waited.append(link.waits) if trainer.batch else None)
        trainer.before(Trigger.END_EPOCH)(lambda: waited.append(link.waits))
        for ema in (callback for callback in trainer._callbacks.values() if isinstance(callback, EMA)):
            waits.of_the_processor.add(ema.averaged.n_averaged.data_ptr())
        with waits.watched(pytest.MonkeyPatch()):
            trainer.fit()
    assert trainer.state is State.DONE
    assert waits.counts == {}
    for epoch in range(1, 3):
        of_epoch = waited[6 * epoch : 6 * epoch + 6]
        assert of_epoch[0] == of_epoch[-1]  # what comes one batch late is not waited for
    assert known[0] is None
    assert all(isinstance(loss, float) for loss in known[3:])
    history = trainer.history[-1]
    assert {"loss", "accuracy", "grad_norm", "grad/norm", "grad/4.weight/max"} <= history.keys()
    assert all(abs(value) < 1e3 for value in history.values())
    assert (trainer.run.path / "console.log").read_text().count("epoch") >= 3


def test_the_counter_counts(tmp_path: Path) -> None:
    """An optimizer without kernels that suppress is the control: one reading for each update."""
    waits = Waits()
    with slow():
        trainer = trainings.make(
            tmp_path, max_batches=6, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1)
        )
        trainer.before(Trigger.STEP)(lambda: setattr(waits, "counting", True))
        trainer.after(Trigger.STEP)(lambda: setattr(waits, "counting", False))
        with waits.watched(pytest.MonkeyPatch()):
            trainer.fit()
    assert waits.counts["item"] == 6
    waits = Waits()
    waits.counting = True
    with waits.watched(pytest.MonkeyPatch()):
        value = torch.ones(2)
        _ = (
            value.tolist(),
            bool(value[0]),
            float(value[0]),
            torch.nonzero(value),
            value.cpu(),
            value.numpy(),
        )
    assert {"tolist", "__bool__", "__float__", "nonzero", "cpu", "numpy"} <= waits.counts.keys()


def test_a_device_that_falls_behind_is_waited_for_two_batches_late(tmp_path: Path) -> None:
    with slow(lag=10**9) as links:
        trainer = trainings.make(tmp_path, optimizer=fused, epochs=1, checkpoint=None)
        seen: list[int] = []
        trainer.after(Trigger.FETCH)(lambda: seen.append(links[0].waits))
        trainer.fit()
    assert seen == [0, 0, 0, 1, 2, 3]


@pytest.mark.parametrize("lag", [0, pytest.param(1, marks=pytest.mark.long), 10**9])
@pytest.mark.parametrize(
    "options",
    [
        everything(),
        everything(optimizer=fused_momentum, accumulate=4, accumulate_weighting="samples"),
        everything(val_loader=trainings.loader(shuffle=False), validate_every=4),
        everything(optimizer=None, val_loader=trainings.loader(shuffle=False), precision="bf16"),
        everything(nonfinite="skip", train_loader=poisoned(0, 3), callbacks=[EMA(0.9)]),
        everything(nonfinite="skip", train_loader=poisoned(1, 2), accumulate=2, optimizer=fused_momentum),
        {"nonfinite": "skip", "train_loader": poisoned(0), "optimizer": fused_momentum},
    ],
)
def test_what_comes_late_is_what_came_at_once(options: dict[str, Any], lag: int, tmp_path: Path) -> None:
    found = []
    for number, context in enumerate((contextlib.nullcontext(), slow(lag))):
        chosen = {**options, "log": None, "callbacks": [type(c)() for c in options.get("callbacks", ())]}
        with context:
            trainer = trainings.make(tmp_path / str(number), **chosen)
            trainer.fit()
            found.append((without_statistics(ending(trainer)), journaled(trainer.run)))
            assert_sound(trainer.run)
    (at_once, written_at_once), (late, written_late) = found
    assert_same(at_once, late)
    assert_same(written_at_once, written_late)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_loss_may_have_a_dimension_and_another_type(
    accumulate: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    def forward(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).to(dtype).reshape(1)

    found = []
    for number, context in enumerate((contextlib.nullcontext(), slow())):
        with context:
            trainer = trainings.make(
                tmp_path / str(number), forward=forward, accumulate=accumulate, optimizer=fused
            )
            trainer.fit()
        found.append((ending(trainer), journaled(trainer.run)))
    assert_same(found[0][0], found[1][0])
    assert_same(found[0][1], found[1][1])


def without_statistics(tree: dict[str, Any]) -> dict[str, Any]:
    """A mean over parameters is taken in another order."""
    return {path: value for path, value in tree.items() if "grad/" not in path}


def journaled(run: Any) -> dict[str, Any]:
    """What the journal has, whenever it came; a note about a skipped step is not known in time."""
    found: dict[str, Any] = {}
    for key, row in recorded(run).items():
        if key.startswith("metric"):
            scope, epoch, batch, step, name, value = row
            if not name.startswith("grad/"):
                found[f"{scope} {epoch} {batch} {name}"] = (step, value)
        else:
            found[key] = row[:-1]
    return found


# -- what is not finite ------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1, 10**9])
@pytest.mark.parametrize("make", [fused, fused_momentum, None])
def test_halting_leaves_the_weights_from_before_and_saves_nothing(
    lag: int, make: Any, tmp_path: Path
) -> None:
    with slow(lag):
        trainer = trainings.make(
            tmp_path, optimizer=make, train_loader=poisoned(3), checkpoint=Checkpointing(every_batches=4)
        )
        before: dict[int, dict[str, torch.Tensor]] = {}
        trainer.after(Trigger.END_BATCH)(lambda: before.update({trainer.batch: parameters(trainer)}))
        with pytest.raises(NonFiniteError, match="non-finite loss in epoch 0, batch 3") as caught:
            trainer.fit()
        assert trainer.state is State.HALTED
        trainings.assert_equal(parameters(trainer), before[2])
        assert (caught.value.epoch, caught.value.batch) == (0, 3)
        assert "4.weight" in caught.value.statistics
        with Journal.open(trainer.run) as journal:
            assert [c.batch for c in journal.checkpoints()] == [-1]
            losses = [row.loss for row in journal.transitions() if row.trigger is Trigger.FORWARD]
        assert all(loss == loss for loss in losses[:3])
        assert losses[3] != losses[3]
        with pytest.raises(NonFiniteAgainError, match="only meet it again"):
            trainings.make(tmp_path, optimizer=make, train_loader=poisoned(3)).fit(resume="auto")
        again = trainings.make(tmp_path, optimizer=make, train_loader=poisoned(3), nonfinite="skip")
        assert again.fit(resume="auto").state is State.DONE
        assert again.updates == 15
        found = trainings.make(tmp_path, optimizer=make, train_loader=poisoned(3)).blame()
        assert (found.batch, found.kind) == (3, "batch")


def test_a_skip_is_reported_when_it_is_known(tmp_path: Path) -> None:
    with slow():
        trainer = trainings.make(
            tmp_path, optimizer=fused, train_loader=poisoned(2), epochs=1, nonfinite="skip"
        )
        skipped: list[bool] = []
        trainer.after(Trigger.STEP)(lambda: skipped.append(trainer.skipped))
        trainer.fit()
    assert skipped == [False, False, True, False, False, False]
    with Journal.open(trainer.run) as journal:
        (message,) = [record.message for record in journal.logs() if "non-finite" in record.message]
    assert "epoch 0, batch 2" in message


def test_schedules_by_batch_pass_over_what_was_skipped(tmp_path: Path) -> None:
    rates = []
    for number, context in enumerate((contextlib.nullcontext(), slow())):
        with context:
            model = trainings.network()
            optimizer = fused(model)
            schedule = LRScheduling(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), every="batch")
            trainer = trainings.make(
                tmp_path / str(number),
                model=model,
                optimizer=optimizer,
                scheduler=schedule,
                train_loader=poisoned(2, 4),
                epochs=1,
                nonfinite="skip",
            )
            trainer.fit()
            rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1e-2 / 16] * 2


def test_fp16_scales_and_lowers_the_scale_when_it_overflows(tmp_path: Path) -> None:
    found = []
    for number, context in enumerate((contextlib.nullcontext(), slow(10**9))):
        with context:
            trainer = trainings.make(tmp_path / str(number), precision="fp16", epochs=2, optimizer=fused)
            scaler = trainer._training.work.precision.scalers[0]
            scaler._lazy_init_scale_growth_tracker(trainer.device)
            scaler._scale.fill_(2.0**40)
            trainer.fit()
            found.append((without_statistics(ending(trainer)), journaled(trainer.run), scaler.get_scale()))
    (at_once, written_at_once, scale), (late, written_late, scale_late) = found
    assert scale == scale_late < 2.0**40
    assert_same(at_once, late)
    assert_same(written_at_once, written_late)


# -- data ----


class Items(torch.utils.data.Dataset[Any]):
    """Items that are drawn; which were made is seen in this process only."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        self.made.append(index)
        if index == 9:
            raise ValueError("item 9 is broken")
        return index, torch.rand(())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_batch_is_carried_while_this_one_is_used(workers: int) -> None:
    carried: list[list[int]] = []

    def carry(batch: Any) -> Callable[[], Any]:
        carried.append(batch[0].tolist())
        return lambda: batch

    loader = torch.utils.data.DataLoader(Items(), batch_size=2, num_workers=workers)
    plain, ahead = BatchStream(loader), BatchStream(loader)
    ahead.carry_by(carry)
    found = []
    for stream in (plain, ahead):
        torch.manual_seed(3)
        stream.begin_epoch(0)
        batches = [stream.fetch() for _ in range(2)]
        saved = stream.state_dict()
        batches += [stream.fetch() for _ in range(2)]
        with pytest.raises(ValueError, match="item 9 is broken"):
            stream.fetch()
        assert stream.position == 4
        stream.load_state_dict(saved)
        batches.append(stream.fetch())
        stream.close()
        found.append((saved["position"], batches))
    (position, expected), (again, batches) = found
    assert position == again == 2
    assert torch.equal(
        torch.stack([torch.stack([part.double() for part in batch]) for batch in expected]),
        torch.stack([torch.stack([part.double() for part in batch]) for batch in batches]),
    )
    # Workers make batches ahead, so one is carried ahead; here the data set's own code runs when it is due.
    in_order = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert carried == ([*in_order, [4, 5], [6, 7]] if workers else [*in_order, [4, 5]])


def test_data_that_draws_nothing_is_carried_ahead() -> None:
    carried: list[Any] = []
    stream = BatchStream(trainings.loader(shuffle=False))
    stream.carry_by(lambda batch: carried.append(batch) or (lambda: batch))
    stream.begin_epoch(0)
    counts = []
    while stream.has_next:
        stream.fetch()
        counts.append(len(carried))
    assert counts == [2, 3, 4, 5, 6, 6]


# -- exactness ---------------------------------------------------------------------------------------


def interrupted_equals_unbroken(description: Description, cuts: list[Cut]) -> None:
    with run_folders() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unbroken = build(description, folder / "unbroken")
        unbroken.fit()
        expected = ending(unbroken)
        broken = interrupted(description, cuts, folder / "broken")
        assert_same(expected, ending(broken))
        assert_sound(broken.run)
        assert_same(journaled(unbroken.run), journaled(broken.run))


@settings(max_examples=settings().max_examples // 5)
@given(descriptions(), CUTS, st.sampled_from([0, 1, 10**9]))
def test_interrupted_equals_unbroken(description: Description, cuts: list[Cut], lag: int) -> None:
    with slow(lag):
        interrupted_equals_unbroken(description, cuts)


@pytest.mark.long
@given(descriptions(), CUTS, st.sampled_from([0, 1, 10**9]))
def test_interrupted_equals_unbroken_more_often(description: Description, cuts: list[Cut], lag: int) -> None:
    with slow(lag):
        interrupted_equals_unbroken(description, cuts)


@settings(max_examples=settings().max_examples // 2)
@given(descriptions(), st.sampled_from([0, 1, 10**9]))
def test_any_training_is_the_same_late(description: Description, lag: int) -> None:
    with run_folders() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        at_once = build(description, folder / "at once")
        at_once.fit()
        with slow(lag):
            late = build(replace(description), folder / "late")
            late.fit()
        assert_same(ending(at_once), ending(late))
        assert_same(journaled(at_once.run), journaled(late.run))


# -- what is fast on an accelerator -------------------------------------------------------------------


def images() -> torch.utils.data.DataLoader[Any]:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(24, 3, 6, 6, generator=generator).to(memory_format=torch.channels_last)
    dataset = torch.utils.data.TensorDataset(inputs, inputs.sum((1, 2, 3)).gt(0).long())
    return torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=_channels_last)


def _channels_last(items: list[Any]) -> list[torch.Tensor]:
    inputs, targets = torch.utils.data.default_collate(items)
    return [inputs.to(memory_format=torch.channels_last), targets]


def convolutions() -> torch.nn.Module:
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Dropout(0.2)]
    pooled = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 2)]
    return torch.nn.Sequential(*layers, *pooled).to(memory_format=torch.channels_last)


FAST: dict[str, dict[str, Any]] = {
    "fused AdamW": {"optimizer": fused},
    "fused SGD": {"optimizer": fused_momentum, "accumulate": 2},
    "channels_last": {"model": convolutions, "train_loader": images, "optimizer": fused, "precision": "bf16"},
    "compiled": {"model": lambda: torch.compile(trainings.network(), backend="aot_eager", dynamic=False)},
}


@pytest.mark.parametrize("device", [pytest.param("at once", marks=pytest.mark.long), "late"])
@pytest.mark.parametrize("fast", FAST)
def test_what_is_fast_is_exact(fast: str, device: str, tmp_path: Path) -> None:
    """Interrupted after each of some transitions, in every state: the same end as unbroken."""

    def make(root: Path, seed: int = 1) -> Any:
        options = dict(FAST[fast])
        loader = options.pop("train_loader", trainings.loader)()
        return trainings.make(root, seed=seed, train_loader=loader, clip_grad_norm=0.5, **options)

    with contextlib.nullcontext() if device == "at once" else slow(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unbroken = make(tmp_path / "unbroken")
        unbroken.fit()
        for attempt in range(9):
            broken = make(tmp_path / "broken", seed=attempt + 1)
            broken.start(resume="auto")
            for _ in range(9):
                broken.advance()
            broken.close()
        broken = make(tmp_path / "broken")
        broken.fit(resume="auto")
        if fast == "channels_last":
            assert broken.model[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert_same(ending(unbroken), ending(broken))
        assert_same(journaled(unbroken.run), journaled(broken.run))
