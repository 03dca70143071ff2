"""A checkpoint and a trainer that differ: each difference named, refused, or overridden; nothing half-way."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.optim import SGD, AdamW, RMSprop
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, RandomSampler, Subset

import trainings
from orchestrator import EMA, Callback, Checkpointing, LRScheduling, Phase, Trainer
from orchestrator.cli import main
from orchestrator.compatibility import PARTS, CheckpointMismatch, agree
from orchestrator.errors import ConfigurationError
from orchestrator.recovery import RestoreError
from orchestrator.snapshot import manifest
from orchestrator.snapshot.storage import list_checkpoints, read_checkpoint
from states import State, Trigger
from tracking.journal import Journal


def stop_at(
    trainer: Trainer, epoch: int = 0, batch: int = 3, state: State = State.BATCH_END, **start: Any
) -> Trainer:
    """Go on up to there; it is saved and halted."""
    trainer.start(**start)
    while (trainer.epoch, trainer.batch, trainer.state) != (epoch, batch, state):
        assert trainer.advance() is not None
    trainer.close()
    return trainer


@contextmanager
def told() -> Iterator[list[str]]:
    """What is said about compatibility meanwhile."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    begins = ("overrid", "the checkpoint's value is used", "results may")
    texts += [str(found.message) for found in caught if str(found.message).startswith(begins)]


def rates(trainer: Trainer) -> list[float]:
    """The learning rate that each batch from now on is trained with, and in the end the last one."""
    found: list[float] = []
    trainer.before(Trigger.STEP)(lambda: found.append(float(trainer.optimizers[0].param_groups[0]["lr"])))
    trainer.on(State.DONE)(lambda: found.append(float(trainer.optimizers[0].param_groups[0]["lr"])))
    return found


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


def wide() -> nn.Sequential:
    """`trainings.network` with another head, and a layer more."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 5), nn.Linear(5, 3)
    )


def part(count: int, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    """A loader of the first samples."""
    return DataLoader(Subset(trainings.data(), range(count)), batch_size, shuffle=True, **options)


def scheduled(
    make: Callable[[Any], Any], lr: float = 1e-2, kind: Any = AdamW, **options: Any
) -> dict[str, Any]:
    """Model, optimizer and scheduler for `trainings.make`."""
    model = trainings.network()
    optimizer = kind(model.parameters(), lr=lr)
    return {"model": model, "optimizer": optimizer, "scheduler": make(optimizer), **options}


class Seen:
    """A metric with state: how many samples there were."""

    def __init__(self) -> None:
        self.count = 0

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.count += len(targets)

    def compute(self) -> int:
        return self.count

    def reset(self) -> None:
        self.count = 0


def weigh_twice(batch: Any) -> float:
    return 2.0


# -- every part: refused by name and nothing changed; overridden, once -----------------------------------

CHANGES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "model": (
        lambda: {"model": wide()},
        r"model: parameter '4\.weight': checkpoint has \(3, 8\).*the model has \(5, 8\)",
    ),
    "optimizer": (lambda: {"optimizer": sgd}, "optimizer: checkpoint has AdamW, the trainer has SGD"),
    "scheduler": (
        lambda: scheduled(lambda optimizer: schedulers.StepLR(optimizer, 1)),
        "scheduler: the checkpoint has none, this trainer StepLR",
    ),
    "metrics": (
        lambda: {"metrics": {"seen": Seen()}},
        r"metrics: the checkpoint has \[\], this trainer \['seen'\]",
    ),
    "data": (lambda: {"train_loader": trainings.loader(4)}, "data: batch size: 8 when saved, 4 now"),
    "accumulate": (lambda: {"accumulate": 2}, "accumulate: the checkpoint has 1, this trainer 2"),
    "accumulate_weighting": (
        lambda: {"accumulate_weighting": weigh_twice},
        "accumulate_weighting: the checkpoint has 'batches', this trainer 'weigh_twice'",
    ),
    "clip_grad_norm": (
        lambda: {"clip_grad_norm": 0.5},
        r"clip_grad_norm: the checkpoint has None, this trainer 0\.5",
    ),
    "precision": (
        lambda: {"precision": "bf16"},
        "precision: the checkpoint has 'fp32', this trainer 'bf16'",
    ),
    "validate_every": (
        lambda: {"validate_every": 2, "val_loader": trainings.loader(16)},
        "validate_every: the checkpoint has None, this trainer 2",
    ),
}


def test_every_part_is_tried() -> None:
    assert list(CHANGES) == list(PARTS)


@pytest.mark.parametrize("name", CHANGES)
def test_a_part_that_differs_is_refused_or_overridden(name: str, tmp_path: Path) -> None:
    changes, message = CHANGES[name]
    stop_at(trainings.make(tmp_path))
    refused = trainings.make(tmp_path, **changes())
    before = refused._training.snapshots.constructed()
    before_weights = trainings.weights(refused)
    with pytest.raises(CheckpointMismatch, match=message) as caught:
        refused.start("auto")
    assert f'override={{"{name}"}}' in str(caught.value)
    assert (refused.state, refused.attempt) == (State.IDLE, 0)
    trainings.assert_equal(trainings.weights(refused), before_weights)
    assert (
        refused._training.snapshots.constructed()["optimizers"][0]["groups"]
        == before["optimizers"][0]["groups"]
    )
    refused.close()

    with told() as texts:
        stop_at(trainings.make(tmp_path, **changes()), batch=5, resume="auto", override={name})
    assert [text for text in texts if text.startswith(f"overridden: {name}")]
    assert all(text.startswith(f"overridden: {name}") for text in texts), texts

    again = trainings.make(tmp_path, **changes())
    with told() as texts:
        result = again.fit("auto", {name})
    assert texts == [
        f"override has {name}, of which nothing differs from the checkpoint; what differs: nothing"
    ]
    assert (result.state, len(result.history)) == (State.DONE, 3)
    assert CliRunner().invoke(main, ["check", str(result.run)]).exit_code == 0
    with Journal.open(again.run) as journal:
        attempts = journal.attempts()
        assert ["override" in attempt.params for attempt in attempts] == [False, True, False]
        assert name in attempts[1].params["override"]
        said = [log.message for log in journal.logs() if log.level == "INFO"]
        assert "; ".join(text.removeprefix("overridden: ") for text in said) == attempts[1].params["override"]
        notes = [row.note or "" for row in journal.transitions() if row.trigger is Trigger.RESUME]
        assert [note.endswith(f", overridden: {name}") for note in notes] == [True, False]


OTHER_VALIDATION: dict[str, tuple[Callable[[], Any], Callable[[], Any], str | None]] = {
    "other items": (
        lambda: DataLoader(trainings.data(16, seed=1), 8),
        lambda: DataLoader(trainings.data(16, seed=2), 8),
        "the validation data of 'val' .* first item: ",
    ),
    "other batches": (
        lambda: {"mine": list(trainings.loader(shuffle=False)), "same": part(8)},
        lambda: {"mine": list(trainings.loader(shuffle=False))[::-1], "same": part(8)},
        "the validation data of 'mine' .* first batch: .*; last batch: ",
    ),
    "another loader": (lambda: {"one": part(8)}, lambda: {"two": part(16), "one": part(8)}, None),
    "the same": (lambda: part(16), lambda: part(16, num_workers=1), None),
}


@pytest.mark.parametrize("name", OTHER_VALIDATION)
def test_other_validation_data_is_warned_of_by_the_name_of_its_loader(name: str, tmp_path: Path) -> None:
    saved, now, message = OTHER_VALIDATION[name]
    stop_at(trainings.make(tmp_path, val_loader=saved()))
    trainer = trainings.make(tmp_path, val_loader=now())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.start("auto")
    trainer.close()
    texts = [str(w.message) for w in caught if "the validation data of" in str(w.message)]
    assert len(texts) == (message is not None)
    assert all(re.match(str(message), text) for text in texts), texts


def test_checkpoints_from_before_it_was_known_do_not_tell_of_validation_data(tmp_path: Path) -> None:
    stop_at(trainings.make(tmp_path, val_loader=part(16)))
    trainer = trainings.make(tmp_path, val_loader=part(24))
    path = list_checkpoints(next(tmp_path.iterdir()) / "checkpoints")[0]
    manifest, tree = read_checkpoint(path)
    state, stream = trainer._training.snapshots, trainer._training.work.stream
    for known in (True, False):
        if not known:
            del manifest["validation_data"]
        said = agree(path, manifest, tree, state, stream, trainer._settings.binding).warnings
        assert bool(said) == known, said


def test_data_that_is_made_anew_is_told_of_with_the_likely_cause(tmp_path: Path) -> None:
    def unseeded(seed: int) -> DataLoader[Any]:
        return DataLoader(trainings.data(seed=seed), batch_size=8)

    stop_at(trainings.make(tmp_path, train_loader=unseeded(1), val_loader=unseeded(1)))
    with pytest.raises(CheckpointMismatch, match=r"first item: .* when saved") as caught:
        trainings.make(tmp_path, train_loader=unseeded(2), val_loader=unseeded(1)).fit("auto")
    causes = "without a seed \\(call seed_everything.*a file that was changed.*another order"
    assert re.search(f"\nThe data has other contents.*{causes}.*\nMake them equal", str(caught.value))
    with pytest.raises(CheckpointMismatch, match="batch size") as caught:
        trainings.make(tmp_path, train_loader=DataLoader(trainings.data(seed=1), batch_size=4)).fit("auto")
    assert "seed" not in str(caught.value)
    trainer = trainings.make(tmp_path, train_loader=unseeded(1), val_loader=unseeded(2))
    with pytest.warns(UserWarning, match=f"the validation data of 'val' is other than it was.*{causes}"):
        trainer.start("auto")
    trainer.close()


def test_everything_that_differs_is_listed_at_once(tmp_path: Path) -> None:
    stop_at(trainings.make(tmp_path))
    other = trainings.make(tmp_path, optimizer=sgd, accumulate=2, train_loader=part(40))
    with pytest.raises(CheckpointMismatch) as caught:
        other.fit("auto", {"optimizer"})
    text = str(caught.value)
    assert "SGD" not in text
    assert "length of the data set: 48 when saved, 40 now" in text
    assert "accumulate: the checkpoint has 1, this trainer 2" in text
    assert 'override={"accumulate", "data"}' in text
    with told() as texts:
        other.fit("auto", {"optimizer", "accumulate", "data"})
    assert {text.split(": ")[1].split()[0] for text in texts} == {"optimizer", "accumulate", "data"}


def test_phases_cannot_be_overridden(tmp_path: Path) -> None:
    def forward(model: nn.Module, batch: Any) -> Any:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def phases(*names: str) -> dict[str, Any]:
        model = trainings.network()
        return {
            "model": model,
            "optimizer": [Phase(name, SGD(model.parameters(), lr=0.1), forward) for name in names],
            "loss_fn": None,
        }

    stop_at(trainings.make(tmp_path, **phases("one", "two")))
    for names in (("one", "other"), ("one",)):
        trainer = trainings.make(tmp_path, **phases(*names))
        with pytest.raises(
            CheckpointMismatch, match=r"phases: the checkpoint has \['one', 'two'\]"
        ) as caught:
            trainer.fit("auto", {"model", "scheduler"})
        assert "override=" not in str(caught.value)
        with pytest.raises(ConfigurationError, match=r"phases.*cannot be overridden"):
            trainer.fit("auto", {"phases"})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"learning_rate"}, r"'learning_rate'; expected .*model, optimizer.*amsgrad.*weight_decay"),
        ("lr", r"override is 'lr'; expected a set of names"),
        (3, "override is 3; expected a set of names"),
        ({"initial_lr"}, "'initial_lr'"),
        ({"lr": 0.1}, None),
    ],
)
def test_names_that_there_are_not(override: Any, message: str | None, tmp_path: Path) -> None:
    stop_at(trainings.make(tmp_path))
    trainer = trainings.make(tmp_path)
    if message is None:
        trainer.start("auto", override)
        trainer.close()
        return
    for resume in ("auto", "test"):
        with pytest.raises(ConfigurationError, match=message):
            trainer.start(resume, override)
    assert trainer.attempt == 0


def test_an_override_without_a_resume(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path)
    with pytest.raises(ConfigurationError, match="resume=False, a new run"):
        trainer.fit(override={"lr"})
    assert not list(tmp_path.iterdir())
    with told() as texts:
        trainer.fit(
            "auto", override={"lr"}
        )  # the first of a script's runs, of which the next will be resumed
    assert texts == []
    trainer = trainings.make(tmp_path)
    trainer.start()
    with pytest.raises(ConfigurationError, match="on a training that has started"):
        trainer.fit(override={"lr"})
    trainer.close()


# -- hyper-parameters ----------------------------------------------------------------------------------

SCHEDULES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "StepLR": (lambda o: schedulers.StepLR(o, 2, gamma=0.5), "batch"),
    "StepLR by epoch": (lambda o: schedulers.StepLR(o, 1, gamma=0.5), "epoch"),
    "MultiStepLR": (lambda o: schedulers.MultiStepLR(o, [3, 9], gamma=0.5), "batch"),
    "ExponentialLR": (lambda o: schedulers.ExponentialLR(o, 0.9), "batch"),
    "CosineAnnealingLR": (lambda o: schedulers.CosineAnnealingLR(o, T_max=18), "batch"),
    "CosineAnnealingLR, eta_min": (
        lambda o: schedulers.CosineAnnealingLR(o, T_max=18, eta_min=5e-3),
        "batch",
    ),
    "CosineAnnealingWarmRestarts": (
        lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4, eta_min=5e-3),
        "batch",
    ),
    "LambdaLR": (lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)), "batch"),
    "LinearLR": (lambda o: schedulers.LinearLR(o, 0.1, total_iters=8), "batch"),
    "PolynomialLR": (lambda o: schedulers.PolynomialLR(o, 18, power=2.0), "batch"),
    "OneCycleLR": (
        lambda o: schedulers.OneCycleLR(o, 10 * o.defaults["lr"], total_steps=18),
        "batch",
    ),
    "SequentialLR in its first": (
        lambda o: schedulers.SequentialLR(
            o,
            [
                schedulers.LinearLR(o, 0.1, total_iters=8),
                schedulers.CosineAnnealingLR(o, 10, eta_min=5e-3),
            ],
            [8],
        ),
        "batch",
    ),
    "SequentialLR in its second": (
        lambda o: schedulers.SequentialLR(
            o,
            [
                schedulers.LinearLR(o, 0.1, total_iters=2),
                schedulers.CosineAnnealingLR(o, 16, eta_min=5e-3),
            ],
            [2],
        ),
        "batch",
    ),
    "ChainedScheduler": (
        lambda o: schedulers.ChainedScheduler(
            [schedulers.LinearLR(o, 0.1, total_iters=8), schedulers.ExponentialLR(o, 0.9)], optimizer=o
        ),
        "batch",
    ),
}


@pytest.mark.parametrize(
    "place",
    [
        (0, 3, State.BATCH_END),
        pytest.param((1, 0, State.BATCH_START), marks=pytest.mark.long),
        pytest.param((0, 5, State.EPOCH_END), marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_new_learning_rate_takes_its_place_on_the_schedule(name: str, place: Any, tmp_path: Path) -> None:
    """From there on it is what it would be, had the training had it from the start; and no step undoes it."""
    make, every = SCHEDULES[name]

    def build(root: Path, lr: float) -> Trainer:
        # Adam's rate alone is looked at: the schedule's business, whatever the weights do.
        return trainings.make(root, **scheduled(lambda o: LRScheduling(make(o), every), lr=lr))

    unbroken = build(tmp_path / "unbroken", 0.04)
    expected = rates(unbroken)
    unbroken.fit()
    first = stop_at(build(tmp_path / "broken", 0.01), *place)
    done = first.updates
    trainer = build(tmp_path / "broken", 0.04)
    found = rates(trainer)
    with told() as texts:
        trainer.fit("auto", {"lr"})
    assert any(text.startswith("overridden: lr: checkpoint has") for text in texts)
    assert found == pytest.approx(expected[done:], rel=1e-6)
    (scheduling,) = trainer._training.snapshots.schedulings.values()
    assert scheduling[0].scheduler.get_last_lr() == pytest.approx([expected[-1]], rel=1e-6)


def test_a_rate_that_is_reduced_on_a_plateau_keeps_what_it_was_reduced_by(tmp_path: Path) -> None:
    def build(lr: float) -> Trainer:
        def make(optimizer: Any) -> LRScheduling:
            plateau = schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)
            return LRScheduling(plateau, "batch", monitor="loss")

        return trainings.make(tmp_path, **scheduled(make, lr=lr))

    stopped = stop_at(build(0.01))
    reduced = stopped.optimizers[0].param_groups[0]["lr"]
    trainer = build(0.04)
    found = rates(trainer)
    with told() as texts:
        trainer.fit("auto", {"lr"})
    assert any(text.startswith("overridden: lr") for text in texts)
    # Every batch reduces it: the new rate is where the old one had come to, in proportion.
    assert reduced < 0.01
    assert found == pytest.approx([4 * reduced * 0.5**step for step in range(len(found))])


def test_a_rate_without_a_schedule(tmp_path: Path) -> None:
    def build(lr: float) -> Trainer:
        return trainings.make(tmp_path, optimizer=lambda model: AdamW(model.parameters(), lr=lr))

    stop_at(build(0.01))
    trainer = build(0.04)
    found = rates(trainer)
    with told() as texts:
        stop_at(trainer, batch=4, resume="auto")
    assert set(found) == {0.01}
    assert texts == [
        "the checkpoint's value is used: lr: checkpoint has 0.01, the optimizer was given 0.04",
    ]
    trainer = build(0.04)
    found = rates(trainer)
    with told() as texts:
        stop_at(trainer, batch=5, resume="auto", override={"lr"})
    assert set(found) == {0.04}
    assert texts == ["overridden: lr: checkpoint has 0.01, the optimizer was given 0.04"]
    with told() as texts:
        build(0.04).fit("auto")
    assert texts == []


def test_the_rate_of_one_group_alone(tmp_path: Path) -> None:
    def build(*lrs: float) -> Trainer:
        model = trainings.network()
        groups = [
            {"params": list(model[i].parameters()), "lr": lr} for i, lr in zip((0, 1, 4), lrs, strict=True)
        ]
        optimizer = SGD(groups, lr=0.5)
        return trainings.make(
            tmp_path,
            model=model,
            optimizer=optimizer,
            scheduler=LRScheduling(schedulers.ExponentialLR(optimizer, 0.9), "batch"),
        )

    stopped = stop_at(build(0.1, 0.2, 0.3))
    trainer = build(0.1, 0.4, 0.3)
    with told() as texts:
        trainer.start("auto", {"lr"})
    (text,) = texts
    assert text.startswith("overridden: lr of parameter group 1: checkpoint has 0.2")
    before, after = ([group["lr"] for group in t.optimizers[0].param_groups] for t in (stopped, trainer))
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1] == pytest.approx(2 * before[1])
    trainer.close()


def test_other_settings_one_by_one(tmp_path: Path) -> None:
    def build(gamma: float = 0.5, size: int = 1, **settings: Any) -> Trainer:
        def kind(parameters: Any, lr: float) -> AdamW:
            return AdamW(parameters, lr=lr, **settings)

        return trainings.make(
            tmp_path, **scheduled(lambda o: schedulers.StepLR(o, size, gamma=gamma), kind=kind)
        )

    stop_at(build())
    given = {"gamma": 0.1, "size": 2, "weight_decay": 0.3, "betas": (0.5, 0.6), "eps": 1e-4}
    trainer = build(**given)
    with told() as texts:
        trainer.start("auto", {"gamma", "betas", "weight_decay"})
    assert texts == [
        "overridden: betas: checkpoint has (0.9, 0.999), the optimizer was given (0.5, 0.6)",
        "overridden: gamma of StepLR: checkpoint has 0.5, the scheduler was given 0.1",
        "overridden: weight_decay: checkpoint has 0.01, the optimizer was given 0.3",
        "the checkpoint's value is used: eps: checkpoint has 1e-08, the optimizer was given 0.0001",
        "the checkpoint's value is used: step_size of StepLR: checkpoint has 1, the scheduler was given 2",
    ]
    (group,) = trainer.optimizers[0].param_groups
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.5, 0.6), 0.3, 1e-8)
    found = rates(trainer)
    trainer.fit()
    assert sorted(set(found), reverse=True) == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5])


def test_a_longer_cycle(tmp_path: Path) -> None:
    """What a scheduler works out from a setting follows it."""

    def build(root: Path, steps: int, peak: float) -> Trainer:
        return trainings.make(
            root,
            **scheduled(lambda o: LRScheduling(schedulers.OneCycleLR(o, peak, total_steps=steps), "batch")),
        )

    unbroken = build(tmp_path / "unbroken", 36, 0.1)
    expected = rates(unbroken)
    unbroken.fit()
    stop_at(build(tmp_path / "broken", 18, 0.1))
    trainer = build(tmp_path / "broken", 36, 0.1)
    found = rates(trainer)
    trainer.fit("auto", {"total_steps"})
    assert found[1:] == pytest.approx(
        expected[5:]
    )  # the batch after the place has the rate that was set before

    stop_at(build(tmp_path / "peak", 18, 0.1))
    trainer = trainings.make(
        tmp_path / "peak",
        **scheduled(
            lambda o: LRScheduling(schedulers.OneCycleLR(o, 0.2, total_steps=18, div_factor=50), "batch")
        ),
    )
    found = rates(trainer)
    with told() as texts:
        trainer.fit("auto", {"max_lr"})
    assert texts == [
        "overridden: max_lr: checkpoint has 0.1, the scheduler was given 0.2",
    ]
    assert max(found) == pytest.approx(0.2, rel=0.05)


def test_settings_inside_a_sequence(tmp_path: Path) -> None:
    def build(milestone: int, gamma: float) -> Trainer:
        def make(optimizer: Any) -> LRScheduling:
            parts = [
                schedulers.LinearLR(optimizer, 0.1, total_iters=2),
                schedulers.ExponentialLR(optimizer, gamma),
            ]
            return LRScheduling(schedulers.SequentialLR(optimizer, parts, [milestone]), "batch")

        return trainings.make(tmp_path, **scheduled(make))

    stop_at(build(10, 0.9))
    trainer = build(6, 0.5)
    with told() as texts:
        trainer.start("auto", {"gamma", "milestones"})
    assert [text.split(":")[1] for text in texts] == [
        " gamma of SequentialLR, scheduler 1",
        " milestones of SequentialLR",
    ]
    found = rates(trainer)
    trainer.fit()
    assert found == pytest.approx([0.01] * 2 + [0.01 * 0.5**step for step in range(13)])


def test_settings_that_only_this_torch_has_are_the_trainers(tmp_path: Path) -> None:
    """As when a later version of torch adds one."""
    stop_at(trainings.make(tmp_path))
    trainer = trainings.make(tmp_path)
    trainer.optimizers[0].param_groups[0]["added_later"] = True
    trainer.fit("auto")
    assert trainer.optimizers[0].param_groups[0]["added_later"] is True


# -- optimizer and scheduler ---------------------------------------------------------------------------


def test_another_schedule_starts_as_it_was_constructed(tmp_path: Path) -> None:
    def build(root: Path, make: Callable[[Any], Any], lr: float = 0.01) -> Trainer:
        return trainings.make(root, **scheduled(make, lr=lr), epochs=8)

    stop_at(build(tmp_path, lambda o: schedulers.StepLR(o, 1, gamma=0.1)), 2, 0)
    trainer = build(tmp_path, lambda o: schedulers.CosineAnnealingLR(o, 6))
    found = rates(trainer)
    with told() as texts:
        trainer.fit("auto", {"scheduler"})
    assert texts == ["overridden: scheduler: the checkpoint has StepLR, this trainer CosineAnnealingLR"]
    other = build(tmp_path / "other", lambda o: schedulers.CosineAnnealingLR(o, 6))
    expected = rates(other)
    other.fit()
    assert found[5:] == pytest.approx(expected[6 : 6 + len(found) - 5])


def test_a_schedule_with_other_settings_starts_anew_if_the_whole_of_it_is_overridden(tmp_path: Path) -> None:
    def build(gamma: float) -> Trainer:
        return trainings.make(
            tmp_path, **scheduled(lambda o: LRScheduling(schedulers.ExponentialLR(o, gamma), "batch"))
        )

    stop_at(build(0.5))
    trainer = build(0.9)
    found = rates(trainer)
    with told() as texts:
        trainer.fit("auto", {"scheduler"})
    assert texts == [
        "overridden: scheduler: gamma of ExponentialLR: checkpoint has 0.5, the scheduler was given 0.9"
    ]
    assert found == pytest.approx([0.01 * 0.9**step for step in range(15)])


def test_a_schedule_that_is_taken_away(tmp_path: Path) -> None:
    stop_at(
        trainings.make(
            tmp_path, **scheduled(lambda o: LRScheduling(schedulers.ExponentialLR(o, 0.5), "batch"))
        )
    )
    trainer = trainings.make(tmp_path)
    found = rates(trainer)
    trainer.fit("auto", {"scheduler"})
    assert set(found) == {0.01}
    assert "initial_lr" not in trainer.optimizers[0].param_groups[0]


def test_the_schedule_of_one_of_two_optimizers(tmp_path: Path) -> None:
    def forward(model: nn.Module, batch: Any) -> Any:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def build(first: Callable[[Any], Any]) -> Trainer:
        model = trainings.network()
        optimizers = [SGD(model[0].parameters(), lr=0.1), SGD(model[4].parameters(), lr=0.1)]
        return trainings.make(
            tmp_path,
            model=model,
            optimizer=[Phase(name, o, forward) for name, o in zip(("one", "two"), optimizers, strict=True)],
            loss_fn=None,
            callbacks=[
                LRScheduling(first(optimizers[0]), "batch"),
                LRScheduling(schedulers.ExponentialLR(optimizers[1], 0.9), "batch"),
            ],
        )

    stop_at(build(lambda o: schedulers.StepLR(o, 1, gamma=0.5)))
    trainer = build(lambda o: schedulers.CosineAnnealingLR(o, 100))
    trainer.start("auto", {"scheduler"})
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == pytest.approx([0.1, 0.1 * 0.9**4])
    trainer.close()


def test_another_optimizer_begins_with_no_state_and_its_schedule_anew(tmp_path: Path) -> None:
    def build(kind: Any) -> Trainer:
        return trainings.make(
            tmp_path,
            **scheduled(lambda o: LRScheduling(schedulers.ExponentialLR(o, 0.5), "batch"), kind=kind),
        )

    stopped = stop_at(build(AdamW))
    trainer = build(RMSprop)
    with told() as texts:
        trainer.start("auto", {"optimizer"})
    assert texts == [
        "overridden: optimizer: checkpoint has AdamW, the trainer has RMSprop",
        "overridden: optimizer: its ExponentialLR starts anew with another optimizer",
    ]
    assert not trainer.optimizers[0].state
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01
    trainings.assert_equal(trainings.weights(trainer), trainings.weights(stopped))
    assert trainer.fit().state is State.DONE


@pytest.mark.parametrize("state", [State.BACKWARD, State.STEP])
def test_another_optimizer_takes_the_gradients_at_hand(state: State, tmp_path: Path) -> None:
    stopped = stop_at(trainings.make(tmp_path, accumulate=2), state=state)
    gradients = [p.grad.clone() for p in stopped.model.parameters()]
    trainer = trainings.make(tmp_path, accumulate=2, optimizer=sgd)
    trainer.start("auto", {"optimizer"})
    for found, expected in zip(trainer.model.parameters(), gradients, strict=True):
        assert state is State.STEP or torch.equal(found.grad, expected)
    assert trainer.fit().state is State.DONE


def test_other_groups(tmp_path: Path) -> None:
    def two(model: nn.Module) -> AdamW:
        weights = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() == 1]
        return AdamW([{"params": weights}, {"params": rest, "weight_decay": 0.0}], lr=1e-2)

    stop_at(trainings.make(tmp_path))
    trainer = trainings.make(tmp_path, optimizer=two)
    with pytest.raises(CheckpointMismatch, match="checkpoint has 1 parameter groups, the trainer's has 2"):
        trainer.start("auto", {"model"})
    trainer.start("auto", {"optimizer"})
    assert not trainer.optimizers[0].state
    trainer.close()


# -- model ---------------------------------------------------------------------------------------------


def test_what_matches_of_a_model_is_restored_and_the_optimizer_follows(tmp_path: Path) -> None:
    stopped = stop_at(trainings.make(tmp_path, callbacks=[EMA(decay=0.9)]))
    trainer = trainings.make(tmp_path, model=wide(), callbacks=[EMA(decay=0.9)])
    initial, saved = trainings.weights(trainer), trainings.weights(stopped)
    averaged = dict(stopped._callbacks["EMA"].model.state_dict())  # type: ignore[attr-defined]
    with told() as texts:
        trainer.start("auto", {"model"})
    assert all(text.startswith("overridden: model: ") for text in texts)
    for name, value in trainings.weights(trainer).items():
        matches = name in saved and saved[name].shape == value.shape
        assert matches == (not name.startswith(("4", "5"))), name
        assert torch.equal(value, (saved if matches else initial)[name]), name
    state = trainer.optimizers[0].state
    of = {name: state.get(parameter) for name, parameter in trainer.model.named_parameters()}
    assert [name for name, found in of.items() if found] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    before = {name: stopped.optimizers[0].state[p] for name, p in stopped.model.named_parameters()}
    assert torch.equal(of["0.weight"]["exp_avg"], before["0.weight"]["exp_avg"])
    average = trainer._callbacks["EMA"].model.state_dict()  # type: ignore[attr-defined]
    assert torch.equal(average["0.weight"], averaged["0.weight"])
    assert torch.equal(average["5.weight"], initial["5.weight"])
    assert trainer.fit().state is State.DONE


def test_a_model_with_fewer_parts_and_other_classes(tmp_path: Path) -> None:
    stop_at(trainings.make(tmp_path, model=wide()))
    small = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Identity(), nn.Linear(8, 3))
    trainer = trainings.make(tmp_path, model=small)
    trainer.model[1].eval()
    with pytest.raises(CheckpointMismatch, match="module '2': checkpoint has ReLU, the model has GELU"):
        trainer.start("auto")
    assert trainer.fit("auto", {"model"}).state is State.DONE
    assert trainer.model[1].training  # as it was saved: it is of the same class


def test_a_loss_function_with_state(tmp_path: Path) -> None:
    weighted = {"loss_fn": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))}
    stop_at(trainings.make(tmp_path))
    trainer = trainings.make(tmp_path, **weighted)
    with pytest.raises(CheckpointMismatch, match="loss_fn: buffer 'weight': checkpoint has None"):
        trainer.start("auto")
    stop_at(trainer, 1, resume="auto", override={"model"})
    back = trainings.make(tmp_path)
    assert back.fit("auto", {"model"}).state is State.DONE


# -- data ----------------------------------------------------------------------------------------------


def places(trainer: Trainer) -> list[tuple[int, int, int]]:
    """Epoch, batch and size of each batch trained from now on."""
    found: list[tuple[int, int, int]] = []
    trainer.after(Trigger.FORWARD)(lambda: found.append((trainer.epoch, trainer.batch, len(trainer.data[0]))))
    return found


@pytest.mark.parametrize(
    ("loader", "state", "expected"),
    [
        # the position is there: the epoch goes on with it
        (lambda: part(40), State.BATCH_END, [(0, 4, 8)]),
        (lambda: part(40), State.BATCH_START, [(0, 3, 8), (0, 4, 8)]),
        (lambda: part(40), State.BACKWARD, [(0, 4, 8)]),
        (lambda: trainings.loader(4), State.BATCH_END, [(0, batch, 4) for batch in range(4, 12)]),
        (lambda: list(part(40)), State.BATCH_END, [(0, 4, 8)]),
        (lambda: trainings.loader(shuffle=False), State.STEP, [(0, 4, 8), (0, 5, 8)]),
        # it is not: the epoch ends
        (lambda: part(16), State.BATCH_END, []),
        (lambda: part(16), State.BACKWARD, []),
        (lambda: list(part(16)), State.STEP, []),
        # the batch at hand is not: the last one there is takes its place
        (lambda: part(20), State.BATCH_START, [(0, 3, 4)]),
    ],
)
def test_where_other_data_goes_on(
    loader: Callable[[], Any], state: State, expected: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    stop_at(trainings.make(tmp_path), state=state)
    trainer = trainings.make(tmp_path, train_loader=loader(), epochs=2)
    found = places(trainer)
    result = trainer.fit("auto", {"data"})
    batches = len(loader())
    sizes = [len(inputs) for inputs, _ in loader()]
    assert found == [*expected, *((1, batch, sizes[batch]) for batch in range(batches))]
    assert (result.state, len(result.history)) == (State.DONE, 2)
    assert CliRunner().invoke(main, ["check", str(result.run)]).exit_code == 0


def test_more_data_after_an_epoch_is_for_the_next(tmp_path: Path) -> None:
    stop_at(trainings.make(tmp_path, train_loader=part(24)), 0, 2, State.EPOCH_END)
    trainer = trainings.make(tmp_path, epochs=2, checkpoint=Checkpointing(keep_last=9))
    found = places(trainer)
    trainer.fit("auto", {"data"})
    assert found == [(1, batch, 8) for batch in range(6)]


def test_no_data_at_all_where_a_batch_is_at_hand(tmp_path: Path) -> None:
    stop_at(trainings.make(tmp_path), state=State.BATCH_START)
    trainer = trainings.make(tmp_path, train_loader=[])
    with pytest.raises(CheckpointMismatch, match=r"an epoch has no batch now.*checkpoint of an EPOCH_END"):
        trainer.fit("auto", {"data"})


def test_the_new_order_is_the_same_one_after_every_resume(tmp_path: Path) -> None:
    def build() -> Trainer:
        return trainings.make(
            tmp_path / "run", train_loader=part(40), epochs=2, checkpoint=Checkpointing(keep_last=99)
        )

    def losses(trainer: Trainer) -> list[float]:
        found: list[float] = []
        trainings.record_losses(trainer, found)
        return found

    first = stop_at(trainings.make(tmp_path / "run"), batch=1)
    assert first.run is not None
    checkpoint = list_checkpoints(first.run.checkpoints)[0]
    trainer = build()
    expected = losses(trainer)
    trainer.fit(checkpoint, {"data"})
    trainer = build()
    found = losses(trainer)
    stop_at(trainer, 0, 3, resume=checkpoint, override={"data"})
    trainer = build()
    found_later = losses(trainer)
    trainer.fit("auto")
    assert found + found_later == expected


def test_a_generator_of_the_data_goes_on_where_the_new_loader_has_the_same(tmp_path: Path) -> None:
    def loader(count: int, seed: int | None) -> DataLoader[Any]:
        data = Subset(trainings.data(), range(count))
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return DataLoader(data, 8, sampler=RandomSampler(data, generator=generator))

    stopped = stop_at(trainings.make(tmp_path, train_loader=loader(48, 1)))
    assert stopped.run is not None
    checkpoint = list_checkpoints(stopped.run.checkpoints)[0]

    def order(seed: int | None) -> list[torch.Tensor]:
        trainer = trainings.make(
            tmp_path, train_loader=loader(40, seed), checkpoint=Checkpointing(keep_last=99)
        )
        found: list[torch.Tensor] = []
        trainer.after(Trigger.FETCH)(lambda: found.append(trainer.data[0].clone()))
        stop_at(trainer, 1, 4, resume=checkpoint, override={"data"})
        return found

    one, other, none = order(5), order(6), order(None)
    assert len(one) == len(other) == len(none) == 6
    assert all(map(torch.equal, one, other))
    assert not all(map(torch.equal, one, none))


# -- metrics, settings, versions -------------------------------------------------------------------------


def test_metrics_that_come_and_go(tmp_path: Path) -> None:
    stop_at(trainings.make(tmp_path, metrics={"seen": Seen(), "gone": Seen()}))
    trainer = trainings.make(tmp_path, metrics={"seen": Seen(), "new": Seen()})
    result = trainer.fit("auto", {"metrics"})
    counts = [(epoch["seen"], epoch["new"]) for epoch in result.history]
    assert counts == [(48, 16), (48, 48), (48, 48)]
    assert "gone" not in result.history[0]


def test_a_metric_of_the_same_name_with_other_states(tmp_path: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    one = torchmetrics.classification.MulticlassAccuracy(3)
    stop_at(trainings.make(tmp_path, metrics={"found": Seen()}))
    trainer = trainings.make(tmp_path, metrics={"found": one})
    with pytest.raises(
        CheckpointMismatch, match="metrics: found: checkpoint has its attributes, the metric has states"
    ):
        trainer.fit("auto", {"data"})
    assert trainer.fit("auto", {"metrics"}).state is State.DONE


@pytest.mark.parametrize("name", ["model", "accumulate", "accumulate_weighting"])
def test_gradients_that_wait_are_neither_lost_nor_mixed(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate": 3}
    other = {
        "model": {**options, "model": wide()},
        "accumulate": {"accumulate": 2},
        "accumulate_weighting": {**options, "accumulate_weighting": "samples"},
    }[name]
    first = trainings.make(tmp_path, checkpoint=Checkpointing(keep_last=9), **options)
    first.start()
    closed = None
    while (first.batch, first.state) != (4, State.BACKWARD):
        first.advance()
        if (first.batch, first.state) == (2, State.STEP):
            closed = first.save().wait()
    first.close()
    trainer = trainings.make(tmp_path, **other)
    before = trainings.weights(trainer)
    with pytest.raises(
        CheckpointMismatch, match=f"{name}: .*BACKWARD with the gradients of 2 batches.*EPOCH_END"
    ):
        trainer.fit("auto", {name})
    trainings.assert_equal(trainings.weights(trainer), before)
    assert closed is not None
    assert trainer.fit(closed, {name}).state is State.DONE


@pytest.mark.parametrize("name", ["model", "metrics", "data", "precision"])
def test_a_forward_pass_is_done_again_with_the_same_or_not_at_all(name: str, tmp_path: Path) -> None:
    stopped = stop_at(trainings.make(tmp_path), state=State.BATCH_START)
    assert stopped.run is not None
    path = list_checkpoints(stopped.run.checkpoints)[0]
    found, tree = read_checkpoint(path)
    trainer = trainings.make(tmp_path, **CHANGES[name][0]())
    work, settings = trainer._training.work, trainer._settings
    for state in (State.BATCH_START, State.FORWARD):
        given = (
            path,
            found,
            {**tree, "state": state},
            trainer._training.snapshots,
            work.stream,
            settings.binding,
        )
        if state is State.BATCH_START:
            agree(*given, frozenset({name}))
            continue
        with pytest.raises(CheckpointMismatch, match=f"{name}: the checkpoint stands in FORWARD"):
            agree(*given, frozenset({name}))


def test_what_accumulates_from_a_windows_end_on(tmp_path: Path) -> None:
    stop_at(trainings.make(tmp_path, accumulate=2))
    trainer = trainings.make(tmp_path, accumulate=1)
    result = trainer.fit("auto", {"accumulate"})
    assert (result.state, trainer.updates) == (State.DONE, 2 + 2 + 6 + 6)


@pytest.mark.parametrize("precisions", [("fp32", "fp16"), ("fp16", "fp32"), ("bf16", "fp16")])
def test_scaled_gradients_are_not_mixed_with_others(precisions: tuple[str, str], tmp_path: Path) -> None:
    try:
        first = trainings.make(tmp_path, precision=precisions[0], checkpoint=Checkpointing(every_batches=1))
        trainer = trainings.make(tmp_path, precision=precisions[1])
    except ConfigurationError as error:
        pytest.skip(str(error))
    stop_at(first, state=State.BACKWARD)
    with pytest.raises(
        CheckpointMismatch, match=r"precision: .*BACKWARD with the gradients of 1 batch that wait"
    ):
        trainer.fit("auto", {"precision"})
    assert first.run is not None
    assert trainer.fit(list_checkpoints(first.run.checkpoints)[1], {"precision"}).state is State.DONE
    assert [scaler is None for scaler in trainer._training.work.precision.scalers] == [
        precisions[1] != "fp16"
    ]


def test_gradients_of_one_scale_go_into_another_precision(tmp_path: Path) -> None:
    stop_at(trainings.make(tmp_path), state=State.BACKWARD)
    assert trainings.make(tmp_path, precision="bf16").fit("auto", {"precision"}).state is State.DONE


def test_other_versions_are_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as then:
        then.setattr(
            manifest,
            "versions",
            lambda: {"python": "3.9.1", "torch": "1.0", "numpy": manifest.np.__version__},
        )
        stop_at(trainings.make(tmp_path))
    trainer = trainings.make(tmp_path)
    with told() as texts:
        trainer.fit("auto")
    assert [text.partition(", now it is ")[0] for text in texts] == [
        "results may differ in the last bits: python: it was 3.9.1",
        "results may differ in the last bits: torch: it was 1.0",
    ]


def test_what_is_restored_under_an_override_is_verified(tmp_path: Path) -> None:
    """The digests of what was agreed upon are compared, as without any override."""

    class Forgetful(Callback):
        def __init__(self) -> None:
            self.count = 0

        def on_batch_end(self, batch: int, metrics: Any) -> None:
            self.count += 1

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

    stop_at(trainings.make(tmp_path, callbacks=[Forgetful()]))
    trainer = trainings.make(tmp_path, callbacks=[Forgetful()], optimizer=sgd)
    with pytest.raises(RestoreError, match="callbacks/values"):
        trainer.fit("auto", {"optimizer"})


def test_nothing_changes_where_nothing_differs(tmp_path: Path) -> None:
    """An override that has nothing to do leaves the resume as exact as it is without."""
    whole = trainings.make(tmp_path / "whole")
    whole.fit()
    stop_at(trainings.make(tmp_path / "broken"))
    again = trainings.make(tmp_path / "broken")
    with told() as texts:
        again.fit("auto", set(PARTS) | {"lr"})
    assert len(texts) == 1
    trainings.assert_equal(trainings.weights(whole), trainings.weights(again))
