"""Everything that has state, part by part: a training cut in mid-epoch and mid-window goes on bit for bit."""

import math
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import trainings
from orchestrator import (
    EMA,
    Callback,
    Checkpointing,
    EarlyStopping,
    Logging,
    LRScheduling,
    Phase,
    Trainer,
    seed_everything,
)
from orchestrator.errors import ConfigurationError
from orchestrator.recovery import RestoreError
from orchestrator.snapshot.capture import digests, first_difference
from states import State, Trigger
from tracking.journal import Journal
from tracking.runs import RunFolder

Options = dict[str, Any]

# --- the table: each entry gives what is other than in trainings.make -----------------------------------------

PARTS: dict[str, Callable[[], Options]] = {}


def part(builder: Callable[[], Options]) -> Callable[[], Options]:
    PARTS[builder.__name__.replace("_", " ")] = builder
    return builder


def trained(model: nn.Module, kind: str = "AdamW", lr: float = 0.01, **settings: Any) -> Options:
    return {"model": model, "optimizer": getattr(torch.optim, kind)(model.parameters(), lr=lr, **settings)}


def adds(name: str, builder: Callable[[], Options]) -> None:
    PARTS[name] = builder


# schedulers

SCHEDULERS: dict[str, tuple[Callable[[Optimizer], Any], Options]] = {
    "OneCycleLR": (lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40), {"every": "batch"}),
    "MultiStepLR": (lambda o: lr_scheduler.MultiStepLR(o, [2, 2, 5], gamma=0.5), {"every": "batch"}),
    "MultiStepLR by epoch": (lambda o: lr_scheduler.MultiStepLR(o, [1], gamma=0.5), {}),
    "ReduceLROnPlateau": (
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
        {"monitor": "val/loss"},
    ),
    "ReduceLROnPlateau by batch": (
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, cooldown=1),
        {"every": "batch", "monitor": "loss"},
    ),
    "warmup then cosine": (
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 20)], [3]
        ),
        {"every": "batch"},
    ),
    "CosineAnnealingWarmRestarts": (
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
        {"every": "batch"},
    ),
    "ChainedScheduler": (
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
        ),
        {"every": "batch"},
    ),
    "LambdaLR": (lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step), {"every": "batch"}),
}


def scheduled(name: str) -> Options:
    make, how = SCHEDULERS[name]
    options = trained(trainings.network(), "SGD", momentum=0.9)
    scheduler = LRScheduling(make(options["optimizer"]), **how)
    return {**options, "scheduler": scheduler, "val_loader": trainings.loader(24)}


for _name in SCHEDULERS:
    adds(_name, lambda name=_name: scheduled(name))


# optimizers

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "SGD foreach": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, foreach=True),
    "SGD fused": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, fused=True),
    "Adam foreach": lambda m: torch.optim.Adam(m.parameters(), amsgrad=True, foreach=True),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), fused=True),
    "Adagrad fused": lambda m: torch.optim.Adagrad(m.parameters(), fused=True),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), momentum=0.5, centered=True),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters()),
    "ASGD": lambda m: torch.optim.ASGD(m.parameters(), lr=0.05, t0=2),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters(), lr=0.01),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters()),
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters()),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
    "several groups": lambda m: torch.optim.AdamW(
        [
            {"params": [p for p in m.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in m.parameters() if p.dim() == 1], "lr": 0.1, "betas": (0.8, 0.9)},
        ],
        lr=0.01,
    ),
}
# On the CPU this kernel's first step on bf16 makes other momentum each time, uninterrupted (torch 2.13).
NOT_REPEATABLE = {"SGD fused"}


def optimized(name: str, dtype: torch.dtype) -> Options:
    model = trainings.network(dropout=0.2).to(dtype)
    return {
        "model": model,
        "optimizer": OPTIMIZERS[name](model),
        "forward": lambda m, b: nn.functional.cross_entropy(m(b[0].to(dtype)).float(), b[1]),
    }


for _name in OPTIMIZERS:
    adds(_name, lambda name=_name: optimized(name, torch.float32))
    if _name not in NOT_REPEATABLE:
        adds(f"{_name}, bf16", lambda name=_name: optimized(name, torch.bfloat16))

if hasattr(torch.optim, "Muon"):

    @part
    def Muon_beside_AdamW() -> Options:
        model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))
        loss = nn.CrossEntropyLoss()

        def forward(m: nn.Module, batch: Any) -> Tensor:
            return loss(m(batch[0]), batch[1])

        muon = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.01)
        others = torch.optim.AdamW([p for p in model.parameters() if p.dim() == 1], lr=0.01)
        phases = [Phase("matrices", muon, forward), Phase("others", others, forward)]
        return {"model": model, "optimizer": phases, "loss_fn": None, "accumulate": 1}


@part
def a_learning_rate_that_is_a_tensor() -> Options:
    return trained(trainings.network(), "AdamW", lr=torch.tensor(0.01))


# models


@part
def tied_weights() -> Options:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
            self.other.weight = self.one.weight
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.other(self.one(x).tanh()))

    return trained(Tied())


@part
def frozen_batchnorm_and_no_gradients() -> Options:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).requires_grad_(False).eval()
            self.head, self.unused = nn.Linear(8, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x))

    return {**trained(Frozen()), "val_loader": trainings.loader(24)}


@part
def buffers_that_are_not_persistent() -> Options:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = trainings.network()
            self.register_buffer("seen", torch.zeros(()), persistent=False)
            self.register_buffer("queue", torch.zeros(0, 3), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            out = self.layers(x) * (1 + 0.01 * self.seen)
            self.queue = torch.cat([self.queue, out[:1].detach()])[-3:]
            return out + self.queue.mean(0)

    return trained(Counting())


@part
def channels_last_with_clipping() -> Options:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 6, 2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            images = x.view(-1, 3, 2, 1).expand(-1, -1, -1, 2).contiguous(memory_format=torch.channels_last)
            return self.layers(images)

    return {**trained(Images().to(memory_format=torch.channels_last)), "clip_grad_norm": 0.1}


@part
def sparse_embeddings() -> Options:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 3, sparse=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.embedding((x.abs() * 5).long().clamp(max=19)).sum(1)

    return {**trained(Words(), "SparseAdam"), "clip_grad_norm": 1.0}


@part
def spectral_norm() -> Options:
    return trained(nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)))


@part
def weight_norm() -> Options:
    return trained(nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)))


@part
def weight_norm_of_old() -> Options:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.utils.spectral_norm(nn.Linear(8, 3)))
    return trained(model)


@part
def lazy_modules() -> Options:
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3))
    return trained(model, "SGD", momentum=0.9)


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.calls = trainings.network(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(x) * (1 + 0.01 * self.calls)

    def get_extra_state(self) -> Any:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


@part
def extra_state() -> Options:
    return trained(Extra())


class Carrying(nn.Module):
    """As tutorials have it: the hidden state of an LSTM carried over from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 3)
        self.hidden: tuple[Tensor, Tensor] | None = None
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        if self.hidden is not None and self.hidden[0].shape[1] != len(x):
            self.hidden = None
        out, hidden = self.lstm(x.view(len(x), 2, 3), self.hidden)
        self.hidden = tuple(h.detach() for h in hidden)
        self.latest = out[:, -1].detach()
        return self.head(out[:, -1]) * (1 + 0.01 * self.steps)


@part
def a_hidden_state_that_is_carried_over() -> Options:
    return {**trained(Carrying()), "val_loader": trainings.loader(8)}


@part
def an_average_with_a_hidden_state_of_its_own() -> Options:
    ema = EMA(decay=0.9, validate=True)
    return {**trained(Carrying()), "val_loader": trainings.loader(8), "callbacks": [ema]}


@part
def dropout_that_a_callback_lowers() -> Options:
    class Lowering(Callback):
        def on_batch_begin(self, batch: int) -> None:
            self.trainer.model[3].p *= 0.9

    return {"callbacks": [Lowering()]}


@part
def a_loss_with_parameters_and_a_counter() -> Options:
    class Weighing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.calls = nn.Parameter(torch.zeros(())), 0

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            loss = nn.functional.cross_entropy(outputs, targets)
            return loss * torch.exp(-self.weight) + self.weight + 0.01 * self.calls * loss

    model, loss = trainings.network(), Weighing()
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=0.01)
    return {"model": model, "optimizer": optimizer, "loss_fn": loss}


@part
def generators_of_the_model_and_of_a_callback() -> Options:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = trainings.network()
            self.noise = torch.Generator().manual_seed(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x + 0.1 * torch.randn(x.shape, generator=self.noise).to(x.device))

    class Shaking(Callback):
        def __init__(self) -> None:
            self.chance = random.Random(4)

        def on_batch_begin(self, batch: int) -> None:
            self.trainer.data[0].mul_(1 + 0.1 * self.chance.random())

    return {**trained(Noisy()), "callbacks": [Shaking()]}


@part
def one_generator_for_training_and_validation() -> Options:
    generator = torch.Generator().manual_seed(5)
    return {
        "train_loader": trainings.loader(generator=generator),
        "val_loader": trainings.loader(generator=generator),
    }


@part
def one_generator_for_both_in_mid_epoch() -> Options:
    return {**one_generator_for_training_and_validation(), "validate_every": 4}


@part
def a_generator_of_the_data_and_of_forward() -> Options:
    chance = np.random.default_rng(3)

    class Noisy(Dataset[Any]):
        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> Any:
            inputs, target = trainings.data()[index]
            return inputs + torch.tensor(chance.standard_normal(6), dtype=torch.float32), target

    def mixup(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        share = chance.beta(1, 1)
        outputs = model(share * inputs + (1 - share) * inputs.flip(0))
        losses = [nn.functional.cross_entropy(outputs, t) for t in (targets, targets.flip(0))]
        return share * losses[0] + (1 - share) * losses[1]

    return {"train_loader": DataLoader(Noisy(), 8, shuffle=True), "forward": mixup}


@part
def a_generator_of_the_loader_and_of_forward() -> Options:
    generator = torch.Generator().manual_seed(6)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        noise = torch.randn(batch[0].shape, generator=generator).to(batch[0].device)
        return nn.functional.cross_entropy(model(batch[0] + 0.1 * noise), batch[1])

    return {"train_loader": trainings.loader(generator=generator), "forward": forward}


@part
def gradients_that_a_hook_reads_after_the_step() -> Options:
    class Following(Callback):
        def on_batch_end(self, batch: int, metrics: Any) -> None:
            total = sum(float(p.grad.norm()) for p in self.trainer.model.parameters())
            self.trainer.optimizers[0].param_groups[0]["lr"] = 0.01 / (1 + total)

    class Before(Callback):
        def attach(self, trainer: Trainer) -> None:
            super().attach(trainer)
            trainer.before(Trigger.FETCH)(self.look)

        def look(self) -> None:
            grads = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
            for grad in grads[:1]:
                self.trainer.model[4].bias.data += 0.01 * grad.mean()

    return {"callbacks": [Following(), Before()], "accumulate": 1}


# the rest


@part
def a_gradient_scaler() -> Options:
    return {"precision": "fp16", "clip_grad_norm": 1.0}


@part
def patience_and_the_best_checkpoint() -> Options:
    return {
        "val_loader": trainings.loader(24),
        "callbacks": [EarlyStopping(patience=1, min_delta=10.0)],
        "checkpoint": Checkpointing(best="val/loss", keep_last=5),
        "epochs": 4,
    }


@part
def torchmetrics_in_mid_epoch() -> Options:
    return {
        "metrics": {
            "accuracy": torchmetrics.classification.MulticlassAccuracy(3),
            "auroc": torchmetrics.classification.MulticlassAUROC(3),
        },
        "val_loader": trainings.loader(24),
        "forward": lambda m, b: (nn.functional.cross_entropy(out := m(b[0]), b[1]), out, b[1]),
    }


class UsersEMA(Callback):
    """A user's own average, with a state_dict."""

    def attach(self, trainer: Trainer) -> None:
        super().attach(trainer)
        self.average = AveragedModel(trainer.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        trainer.after(Trigger.STEP)(lambda: self.average.update_parameters(trainer.model))

    def state_dict(self) -> dict[str, Any]:
        return {"average": dict(self.average.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state["average"])


class SavesEachStep(Callback):
    """As a Checkpointing that is listed first: what it asks for waits for the hooks of all others."""

    def attach(self, trainer: Trainer) -> None:
        super().attach(trainer)
        trainer.after(Trigger.STEP)(trainer.save)


@part
def an_average_listed_after_what_saves() -> Options:
    return {"callbacks": [SavesEachStep(), UsersEMA()]}


@part
def two_phases() -> Options:
    model = nn.ModuleDict({"maker": nn.Linear(4, 6), "judge": trainings.network()})

    def judge(m: nn.Module, batch: Any) -> Tensor:
        fake = m["maker"](torch.randn(len(batch[0]), 4, device=batch[0].device)).detach()
        return m["judge"](batch[0]).square().mean() + m["judge"](fake).exp().mean()

    def make(m: nn.Module, batch: Any) -> Tensor:
        return -m["judge"](m["maker"](torch.randn(len(batch[0]), 4, device=batch[0].device))).mean()

    phases = [
        Phase("judge", torch.optim.Adam(model["judge"].parameters(), lr=0.01), judge),
        Phase("maker", torch.optim.RMSprop(model["maker"].parameters()), make),
    ]
    return {"model": model, "optimizer": phases, "loss_fn": None, "accumulate": 1}


# --- the test -------------------------------------------------------------------------------------------------

STOPS = [State.BACKWARD, State.BATCH_START, State.STEP, State.EPOCH_END]
"""Where attempts are cut, one after the other, each after a full batch more: within and between windows."""


def build(make: Callable[[], Options], root: Path) -> Trainer:
    seed_everything(1)
    options = {"accumulate": 2, "epochs": 2, **make()}
    return trainings.make(root, **options)


def everything(trainer: Trainer) -> dict[str, str]:
    """Digests of all that is captured in the end, the readings of clocks left out."""
    tree = trainer._training.snapshots.capture()
    tree["history"] = [{k: v for k, v in e.items() if k != "duration"} for e in tree["history"]]
    tree["batch"]["metrics"].pop("batch_time", None)
    return digests(tree, ignore=["batch/elapsed", "epoch/elapsed"])


def losses_of(run: RunFolder) -> list[tuple[int, int, str, float | None]]:
    with Journal.open(run) as journal:
        rows = [row for row in journal.transitions() if row.trigger is Trigger.FORWARD]
    return [(row.epoch, row.batch, row.phase, row.loss) for row in rows]


def assert_exact(make: Callable[[], Options], root: Path) -> Trainer:
    unbroken = build(make, root / "unbroken")
    unbroken.fit()
    expected = losses_of(unbroken.run)
    for stop in STOPS:
        attempt = build(make, root / "broken")
        attempt.start("auto")
        attempt.advance(until=State.BATCH_END)
        attempt.advance(until=stop)
        attempt.close()
    last = build(make, root / "broken")
    last.fit(resume="auto")
    assert expected
    assert losses_of(last.run) == expected
    assert all(math.isfinite(loss) for *_, loss in expected if loss is not None)
    assert first_difference(everything(unbroken), everything(last)) is None
    return last


def one_of_each(name: str) -> Any:
    """bf16 for one of the optimizers, foreach and fused for one each; the others take their time."""
    alike = name.endswith((", bf16", " foreach", " fused"))
    short = not alike or name in ("NAdam, bf16", "Adam foreach", "AdamW fused")
    return name if short else pytest.param(name, marks=pytest.mark.long)


@pytest.mark.device
@pytest.mark.parametrize("name", [one_of_each(name) for name in PARTS])
def test_cut_and_resumed_equals_unbroken(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(is in no checkpoint|random generator)")
        assert_exact(PARTS[name], tmp_path)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_model_goes_on_exactly(tmp_path: Path) -> None:
    def compiled() -> Options:
        model = torch.compile(Carrying(), dynamic=False)
        return {**trained(model), "val_loader": trainings.loader(8)}

    assert_exact(compiled, tmp_path)


def test_the_best_checkpoint_and_patience_are_those_of_the_unbroken_run(tmp_path: Path) -> None:
    last = assert_exact(PARTS["patience and the best checkpoint"], tmp_path)
    assert last.reason.startswith("val/loss has not improved")
    values = [epoch["val/loss"] for epoch in last.history]
    found = last._callbacks["Checkpointing"].best_value
    assert found == min(values)


SCALE = {
    "scale": 8.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 9,
    "_growth_tracker": 0,
}


class Meddling(Callback):
    """Changes something while the checkpoint is restored, as a state_dict that leaves something out would."""

    def __init__(self, change: Callable[[Trainer], Any] = lambda trainer: None) -> None:
        self.change = change

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.change(self.trainer)


@pytest.mark.parametrize("entry", ["history", "model", "loss", "scalers", "metrics", "optimizers", "window"])
def test_whatever_is_not_as_it_was_after_restoring_is_an_error(entry: str, tmp_path: Path) -> None:
    changes: dict[str, Callable[[Trainer], Any]] = {
        "history": lambda t: t.history.append({"loss": 1.0}),
        "model": lambda t: setattr(t.model, "calls", 77),
        "loss": lambda t: t._loss.eval(),
        "scalers": lambda t: t._training.work.precision.scalers[0].load_state_dict(SCALE),
        "metrics": lambda t: setattr(t._training.work.epoch_metrics, "samples", 1),
        "optimizers": lambda t: t.optimizers[0].param_groups[0].update(lr=7.0),
        "window": lambda t: setattr(t._training.work.window, "weight", 9.0),
    }

    def options(change: Callable[[Trainer], Any]) -> Options:
        callbacks = [Meddling(change)]
        return {**trained(Extra()), "precision": "fp16", "callbacks": callbacks}

    first = build(lambda: options(lambda t: None), tmp_path)
    first.start()
    first.advance(until=State.EPOCH_END)
    first.close()
    again = build(lambda: options(changes[entry]), tmp_path)
    with pytest.raises(RestoreError, match=f"^{entry}/"):
        again.start("auto")


def test_lbfgs_is_refused_by_name(tmp_path: Path) -> None:
    model = trainings.network()
    with pytest.raises(ConfigurationError, match="LBFGS evaluates the model several times within a step"):
        trainings.make(tmp_path, model=model, optimizer=torch.optim.LBFGS(model.parameters()))


def test_a_batch_that_cannot_be_stored_is_told_where_a_hook_may_change_it(tmp_path: Path) -> None:
    class Pair(NamedTuple):
        inputs: Tensor
        targets: Tensor

    class Looking(Callback):
        def on_batch_begin(self, batch: int) -> None:
            assert self.trainer.data is not None

    def collate(items: list[Any]) -> Pair:
        return Pair(torch.stack([x for x, _ in items]), torch.stack([y for _, y in items]))

    loader = trainings.loader(collate_fn=collate)
    trainer = trainings.make(tmp_path, train_loader=loader, callbacks=[Looking()])
    trainer.start()
    trainer.advance(until=State.BATCH_START)
    with pytest.warns(UserWarning, match="the batch is not in checkpoints, but fetched again"):
        trainer.save()
    trainer.close()


def _hooked(trainer: Trainer) -> None:
    trainer.after(Trigger.FETCH)(lambda: None)


def _on_state(trainer: Trainer) -> None:
    trainer.on(State.BATCH_START)(lambda: None)


class _Beginning(Callback):
    def on_batch_begin(self, batch: int) -> None:
        pass


@pytest.mark.parametrize(
    ("options", "hook", "stored"),
    [
        ({}, None, False),
        ({"log": Logging("verbose", to="file")}, None, False),
        ({"callbacks": [_Beginning()]}, None, True),
        ({}, _hooked, True),
        ({}, _on_state, True),
    ],
    ids=["no hook", "verbose logging", "on_batch_begin", "after fetch", "on BATCH_START"],
)
def test_a_batch_is_stored_only_where_code_of_the_users_may_have_changed_it(
    options: Options, hook: Callable[[Trainer], None] | None, stored: bool, tmp_path: Path
) -> None:
    trainer = trainings.make(tmp_path, **options)
    if hook is not None:
        hook(trainer)
    with trainer:
        trainer.advance(until=State.BATCH_START)
        assert (trainer._training.snapshots.capture()["batch"]["data"] is not None) == stored


def test_a_second_trainer_of_the_same_name_is_told_that_it_is_not_trained(tmp_path: Path) -> None:
    trainings.make(tmp_path, epochs=1).fit("auto")
    with pytest.warns(
        UserWarning, match="trained by another Trainer of this process.*nothing is trained.*name="
    ):
        trainings.make(tmp_path, seed=2, epochs=1).fit("auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainings.make(tmp_path, seed=2, epochs=1, name="other").fit("auto")


def test_a_run_that_is_done_gives_the_generators_of_the_script_back(tmp_path: Path) -> None:
    """So that a second training of the script, which draws from them too, goes on as if the first had just been."""

    def draws(root: Path, chance: random.Random) -> float:
        def forward(model: nn.Module, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1]) * chance.random()

        trainings.make(root, epochs=1, forward=forward).fit("auto")
        return chance.random()

    first = draws(tmp_path, random.Random(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*random generator")
        assert draws(tmp_path, random.Random(1)) == first


# --- batches that are changed in place -----------------------------------------------------------------------


class Dicts(Dataset[Any]):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, targets = trainings.data()[index]
        return {"x": inputs, "y": targets}


class FollowsData(Callback):
    """Sets the learning rate by what has become of the batch."""

    def on_batch_end(self, batch: int, metrics: Any) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 0.05 * float(self.trainer.data["x"].detach().abs().mean())


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def adds_noise(model: nn.Module, batch: Any) -> Tensor:
    batch["x"] += 0.3 * torch.randn_like(batch["x"])
    return loss_of(model, batch)


def puts_others(model: nn.Module, batch: Any) -> Tensor:
    batch["x"] = 2 * batch["x"] + torch.randn_like(batch["x"])
    return loss_of(model, batch)


def puts_a_graph(model: nn.Module, batch: Any) -> Tensor:
    before = batch["x"].detach()
    batch["x"] = before + model[0](before).mean()
    return loss_of(model, batch)


def noise_when(when: str, trigger: Trigger) -> Callable[[Trainer], None]:
    def hooked(trainer: Trainer) -> None:
        def hook() -> None:
            noise = 0.3 * torch.randn_like(trainer.data["x"])
            if trigger is Trigger.FORWARD and when == "before":
                trainer.data["x"].add_(noise)
            else:  # backward needs it as it was
                trainer.data["x"] = trainer.data["x"] + noise

        getattr(trainer, when)(trigger)(hook)

    return hooked


IN_PLACE: dict[str, tuple[Any, Callable[[Trainer], None]]] = {
    "forward": (adds_noise, lambda trainer: None),
    "forward puts others": (puts_others, lambda trainer: None),
    "forward puts a graph": (puts_a_graph, lambda trainer: None),
    "before forward": (loss_of, noise_when("before", Trigger.FORWARD)),
    "after forward": (puts_others, noise_when("after", Trigger.FORWARD)),
    "before backward": (puts_others, noise_when("before", Trigger.BACKWARD)),
    "after backward": (loss_of, noise_when("after", Trigger.BACKWARD)),
    "before step": (loss_of, noise_when("before", Trigger.STEP)),
    "after step": (loss_of, noise_when("after", Trigger.STEP)),
    "before end_batch": (loss_of, noise_when("before", Trigger.END_BATCH)),
}


@pytest.mark.parametrize("phases", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "name",
    [name if name.startswith("before") else pytest.param(name, marks=pytest.mark.long) for name in IN_PLACE],
)
def test_what_has_become_of_a_batch_is_what_it_was_in_an_unbroken_run(
    name: str, phases: int, tmp_path: Path
) -> None:
    forward, hook = IN_PLACE[name]

    def make(root: Path) -> Trainer:
        seed_everything(1)
        model = trainings.network()
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05)
        options: Options = {"forward": forward}
        if phases == 2:
            other = torch.optim.SGD(model.parameters(), lr=0.01)
            optimizer = [Phase("one", optimizer, forward), Phase("two", other, forward)]
            options = {"loss_fn": None}
        trainer = trainings.make(
            root,
            model=model,
            optimizer=optimizer,
            train_loader=DataLoader(Dicts(), batch_size=8, shuffle=True),
            callbacks=[FollowsData()],
            epochs=1,
            **options,
        )
        hook(trainer)
        return trainer

    unbroken = make(tmp_path / "unbroken")
    unbroken.fit()
    for state, again in ((State.FORWARD, 3 * phases), (State.BACKWARD, 0), (State.STEP, 0)):
        root = tmp_path / state.value
        first = make(root)
        first.advance(until=State.BATCH_END)
        first.advance(until=state)
        first.close()
        for _ in range(again):  # each next state, up to the end of the batch, has an attempt of its own
            trainer = make(root)
            trainer.start("auto")
            trainer.advance()
            trainer.close()
        last = make(root)
        last.fit(resume="auto")
        trainings.assert_equal(trainings.weights(last), trainings.weights(unbroken))
        assert [e["loss"] for e in last.history] == [e["loss"] for e in unbroken.history]


def test_a_batch_that_forward_leaves_alone_is_not_stored(tmp_path: Path) -> None:
    with trainings.make(tmp_path) as trainer:
        for state in (State.BATCH_START, State.FORWARD, State.BACKWARD, State.STEP):
            trainer.advance(until=state)
            captured = trainer._training.snapshots.capture()
            assert captured["batch"]["data"] is None
            assert "passed" not in captured["batch"]


def in_place(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    inputs += 0.1 * torch.randn_like(inputs)
    return nn.functional.cross_entropy(model(inputs.reshape(-1, 6)), targets.reshape(-1))


STAYS: dict[str, tuple[Callable[[], Options], str | None]] = {
    "a list": (lambda: {"train_loader": list(trainings.loader())}, "training"),
    "items one by one": (
        lambda: {"train_loader": DataLoader(TensorDataset(*trainings.data().tensors), batch_size=None)},
        "training",
    ),
    "a list for validation": (lambda: {"val_loader": {"held out": list(trainings.loader())}}, "held out"),
    "a loader": (lambda: {"train_loader": trainings.loader(), "val_loader": trainings.loader()}, None),
}


@pytest.mark.parametrize("name", STAYS)
def test_a_forward_that_changes_the_data_themselves_is_told_of_once(name: str, tmp_path: Path) -> None:
    make, role = STAYS[name]
    model = nn.Sequential(nn.Linear(6, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainings.make(tmp_path, model=model, forward=in_place, **make()).fit()
    told = [str(w.message) for w in caught if "changes the batches of the" in str(w.message)]
    assert len(told) == (role is not None), told
    assert all(f"the {role} data in place" in text for text in told)
