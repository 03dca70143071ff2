"""Random small trainings: a frozen description that prints short, strategies for it, what it builds, and where."""

from __future__ import annotations

import contextlib
import math
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from orchestrator import (
    EMA,
    Callback,
    Checkpointing,
    EarlyStopping,
    GradientStatistics,
    LRScheduling,
    Phase,
    Trainer,
    seed_everything,
)
from states import Trigger

__all__ = ["Description", "Diary", "Short", "build", "descriptions", "run_folders"]


class Short:
    """A dataclass that shows only those of its fields that are not at their defaults."""

    def __repr__(self) -> str:
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # or Hypothesis would show all of them


@dataclass(frozen=True, repr=False)
class Description(Short):
    """A training in plain values; the first values of all fields make the simplest."""

    # the network
    dropout: bool = False
    batchnorm: str = "none"
    noise: str = "none"
    """A layer whose forward draws from this global generator and changes a non-persistent buffer."""
    tied: bool = False
    parameters: str = "fp32"
    # the optimizer
    optimizer: str = "SGD"
    two_groups: bool = False
    phases: int = 1
    scheduler: str = "none"
    accumulate: int = 1
    weighting: str = "batches"
    precision: str = "fp32"
    clip: float | None = None
    # the data
    batches: int = 3
    batch_size: int = 2
    rest: bool = False
    """A shorter last batch."""
    drop_last: bool = False
    sampler: str = "sequential"
    augmentation: str = "none"
    where: str = "item"
    """Where augmentation happens: in __getitem__ ("item") or in the collate function ("collate")."""
    empty: frozenset[int] = frozenset()
    """A batch that begins with one of these items is None."""
    infinite: frozenset[int] = frozenset()
    """A batch that has one of these items has a NaN in it; nonfinite="skip" then."""
    workers: int = 0
    persistent: bool = False
    # how far, and what is looked at meanwhile
    epochs: int | None = 2
    max_batches: int | None = None
    validation: int | str = "none"
    """"epoch", or every so many batches."""
    loaders: int = 1
    shuffled_validation: bool = False
    metrics: tuple[str, ...] = ()
    callbacks: tuple[str, ...] = ()
    stop_after: int | None = None
    """Batches after which the diary asks to stop."""
    saves_after: Trigger | None = None
    """The diary asks for a checkpoint after every such transition of an odd batch."""
    every_batches: int | None = None
    keep_last: int = 2
    best: bool = False

    @property
    def samples(self) -> int:
        """The length of the data set; no batch has one sample, of which BatchNorm knows no variance."""
        return self.batches * self.batch_size + (2 if self.rest else 0)


_OPTIMIZERS = ("SGD", "AdamW", "RMSprop", "NAdam", "ASGD", "Adagrad", "Adafactor", "Adam-amsgrad")
_OPTIMIZERS += ("SGD-fused", "AdamW-fused")
_SCHEDULERS = (
    *("none", "StepLR", "MultiStepLR", "OneCycleLR", "warmup then cosine"),
    *("CosineAnnealingWarmRestarts", "plateau by epoch", "plateau by batch"),
)
_SAMPLERS = ("sequential", "shuffle", "weighted", "generator", "batch sampler", "own sampler", "list")
_AUGMENTATIONS = ("none", "torch", "numpy", "python", "own torch", "own numpy", "own python")
_CALLBACKS = ("diary", "EMA", "EMA validated", "EarlyStopping", "GradientStatistics")


@st.composite
def descriptions(draw: st.DrawFn) -> Description:
    """A random training; what cannot go together is not drawn."""
    of = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    phases = of(1, 1, 1, 2)
    sampler = of(*_SAMPLERS)
    items = st.frozensets(st.integers(0, 5), max_size=2)
    empty, infinite = draw(items), draw(items)
    validation = of("none", "epoch", 2, 3)
    # An epoch may have no finite loss at all: only that of validation is always there to go by.
    watched = validation == "epoch" or not (empty or infinite)
    callbacks = draw(st.lists(st.sampled_from(_CALLBACKS), unique=True, max_size=3))
    if not watched:
        callbacks = [name for name in callbacks if name != "EarlyStopping"]
    if {"EMA", "EMA validated"} <= set(callbacks):
        callbacks.remove("EMA")
    batch_size = of(2, 3)
    workers = of(*[0] * 39, 2) if sampler != "list" else 0
    epochs, max_batches = of((2, None), (1, None), (3, None), (None, 5), (2, 5), (2, 3))
    return Description(
        dropout=of(False, True),
        batchnorm=of("none", "trained", "frozen"),
        noise=of("none", "python", "numpy"),
        tied=of(False, True),
        parameters=of("fp32", "fp32", "fp32", "bf16"),
        optimizer=of(*_OPTIMIZERS),
        two_groups=of(False, True),
        phases=phases,
        scheduler=of(*_SCHEDULERS[: None if watched else -2]),
        accumulate=of(1, 2, 3) if phases == 1 else 1,
        weighting=of("batches", "samples", "callable"),
        precision=of("fp32", "bf16"),
        clip=of(None, 0.5),
        batches=of(3, 3, 4, 5),
        batch_size=batch_size,
        rest=batch_size == 3 and of(False, True),
        drop_last=sampler != "batch sampler" and of(False, True),
        sampler=sampler,
        augmentation="none" if sampler == "list" else of(*_AUGMENTATIONS),
        where=of("item", "collate"),
        empty=empty,
        infinite=infinite,
        workers=workers,
        persistent=workers > 0 and of(False, True),
        epochs=epochs,
        max_batches=max_batches,
        validation=validation,
        loaders=of(1, 2) if validation != "none" else 1,
        shuffled_validation=of(False, True),
        metrics=tuple(sorted(draw(st.sets(st.sampled_from(["accumulating", "function"]))))),
        callbacks=tuple(callbacks),
        stop_after=of(None, None, 2, 4) if "diary" in callbacks else None,
        saves_after=of(*[None] * 7, *_SAVED_AFTER) if "diary" in callbacks else None,
        every_batches=of(None, None, None, None, 2, 1),
        keep_last=of(2, 1, 3),
        best=watched and of(False, True),
    )


_SAVED_AFTER = (
    *(Trigger.FETCH, Trigger.FORWARD, Trigger.BACKWARD, Trigger.STEP, Trigger.END_BATCH),
    *(Trigger.BEGIN_EPOCH, Trigger.END_EPOCH),
)


def build(
    description: Description, root: Path, *, seed: int = 1, workers: int | None = None, **options: Any
) -> Trainer:
    """The training of `description` under the name "random", silent and untracked.

    `seed` is that of the global generators: with another one everything that a checkpoint does not put back
    is different. `workers` makes the same batches by another number of data workers.
    """
    d = description
    seed_everything(seed)
    network = _Network(d)
    optimizers = [_optimizer(d, parameters) for parameters in _by_phase(network, d.phases)]
    scheduler = _scheduler(d, optimizers[-1])
    given: dict[str, Any] = {
        "epochs": d.epochs,
        "max_batches": d.max_batches,
        "forward": _forward if d.phases > 1 else None,
        "metrics": {name: _METRICS[name]() for name in d.metrics},
        "scheduler": scheduler,
        "accumulate": d.accumulate,
        "accumulate_weighting": _weight if d.weighting == "callable" else d.weighting,
        "clip_grad_norm": d.clip,
        "precision": d.precision,
        "nonfinite": "skip" if d.infinite else "halt",
        "validate_every": d.validation if isinstance(d.validation, int) else None,
        "callbacks": [_callback(name, d) for name in d.callbacks],
        "checkpoint": Checkpointing(
            every_batches=d.every_batches, keep_last=d.keep_last, best=_watched(d) if d.best else None
        ),
        "deterministic": torch.cuda.is_available(),
        "log": None,
        "track": None,
        "name": "random",
        "root": root,
    }
    phases = [Phase(f"phase-{i}", optimizer, _forward) for i, optimizer in enumerate(optimizers)]
    return Trainer(
        network,
        optimizers[0] if d.phases == 1 else phases,
        nn.CrossEntropyLoss() if d.phases == 1 else None,
        _loader(d, d.workers if workers is None else workers),
        _validation_loaders(d),
        **{**given, **options},
    )


@contextlib.contextmanager
def run_folders() -> Iterator[Path]:
    """A folder for the many runs of one example, in memory where there is room for them."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2**28
    with tempfile.TemporaryDirectory(dir=memory if roomy else None, prefix="interlock-") as root:
        yield Path(root)


# -- the network and what trains it ------------------------------------------------------------------


class _Noise(nn.Module):
    """Draws in forward, from a generator that is not torch's, and counts in a buffer that no one saves."""

    seen: Tensor

    def __init__(self, source: str) -> None:
        super().__init__()
        self._draw = {"python": random.random, "numpy": np.random.random, "none": lambda: 0.0}[source]
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.seen += 0.125
            inputs = inputs * (1.0 + 0.1 * self._draw())
        return inputs + self.seen.to(inputs.dtype)


class _Network(nn.Module):
    def __init__(self, d: Description) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)
        self.norm = nn.Identity() if d.batchnorm == "none" else nn.BatchNorm1d(4)
        self.noise = nn.Identity() if d.noise == "none" else _Noise(d.noise)
        self.dropout = nn.Dropout(0.5 if d.dropout else 0.0)
        if d.tied:
            self.second.weight = self.first.weight
        if d.batchnorm == "frozen":
            self.norm.eval()
        if d.parameters == "bf16":
            self.bfloat16()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.first(inputs.to(self.last.weight.dtype)))
        hidden = self.noise(self.second(torch.relu(hidden)))
        outputs: Tensor = self.last(self.dropout(hidden))
        return outputs


def _forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, targets = batch
    outputs = model(inputs)
    return nn.functional.cross_entropy(outputs, targets), outputs, targets


def _by_phase(network: _Network, phases: int) -> list[list[nn.Parameter]]:
    last = list(network.last.parameters())
    if phases == 1:
        return [list(network.parameters())]
    return [[p for p in network.parameters() if not any(p is one for one in last)], last]


def _optimizer(d: Description, parameters: list[nn.Parameter]) -> Optimizer:
    groups: Any = parameters
    if d.two_groups:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "lr": 0.003, "weight_decay": 0.01},
        ]
    make = {
        "SGD": partial(torch.optim.SGD, momentum=0.9),
        "Adam-amsgrad": partial(torch.optim.Adam, amsgrad=True),
        # For bfloat16 torch's kernel reads momentum that it has not written yet (2.13, on the processor).
        "SGD-fused": partial(torch.optim.SGD, momentum=0.9, fused=d.parameters != "bf16"),
        "AdamW-fused": partial(torch.optim.AdamW, fused=True),
    }
    found: Optimizer = make.get(d.optimizer, getattr(torch.optim, d.optimizer.split("-")[0]))(groups, lr=0.02)
    return found


def _scheduler(d: Description, optimizer: Optimizer) -> LRScheduling | None:
    match d.scheduler:
        case "StepLR":
            return LRScheduling(schedulers.StepLR(optimizer, 1, 0.5))
        case "MultiStepLR":
            return LRScheduling(schedulers.MultiStepLR(optimizer, [1, 2, 2], 0.5))
        case "OneCycleLR":
            has_momentum = not {"momentum", "betas"}.isdisjoint(optimizer.defaults)
            one_cycle = schedulers.OneCycleLR(optimizer, 0.1, total_steps=40, cycle_momentum=has_momentum)
            return LRScheduling(one_cycle, every="batch")
        case "warmup then cosine":
            warmup = schedulers.LinearLR(optimizer, 0.1, total_iters=3)
            cosine = schedulers.CosineAnnealingLR(optimizer, T_max=8)
            return LRScheduling(schedulers.SequentialLR(optimizer, [warmup, cosine], [3]), every="batch")
        case "CosineAnnealingWarmRestarts":
            return LRScheduling(schedulers.CosineAnnealingWarmRestarts(optimizer, T_0=3), every="batch")
        case "plateau by epoch":
            plateau = schedulers.ReduceLROnPlateau(optimizer, patience=0)
            return LRScheduling(plateau, monitor=_watched(d))
        case "plateau by batch":
            plateau = schedulers.ReduceLROnPlateau(optimizer, patience=1)
            return LRScheduling(plateau, every="batch", monitor="loss")
    return None


def _watched(d: Description) -> str:
    return "val/loss" if d.validation == "epoch" else "loss"


def _weight(batch: Any) -> float:
    return 1.0 + float(batch[1].float().mean())


def _right(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float().mean()


def _torchmetrics_accuracy() -> Any:
    from torchmetrics.classification import MulticlassAccuracy  # slow to import

    return MulticlassAccuracy(3, average="macro")


_METRICS = {"accumulating": _torchmetrics_accuracy, "function": lambda: _right}


# -- the data ----------------------------------------------------------------------------------------


class _Draws:
    """One number from the generator of that name, global or this object's own."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.torch = torch.Generator().manual_seed(3) if source == "own torch" else None
        self.numpy = np.random.default_rng(3) if source == "own numpy" else None
        self.python = random.Random(3) if source == "own python" else None

    def __call__(self) -> float:
        if self.source.endswith("torch"):
            return float(torch.rand((), generator=self.torch))
        if self.source.endswith("numpy"):
            return float(np.random.normal() if self.numpy is None else self.numpy.normal())
        if self.source.endswith("python"):
            return random.random() if self.python is None else self.python.random()
        return 0.0


class _Samples(Dataset[tuple[int, Tensor, Tensor]]):
    """Numbered samples, each drawn anew a little where `draws` does."""

    def __init__(self, tensors: Sequence[Tensor], draws: _Draws) -> None:
        self.inputs, self.targets = tensors
        self.draws = draws

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        return index, self.inputs[index] + self.draws(), self.targets[index]


class _Collate:
    """Numbered samples to a pair, with what is wrong with some of them."""

    def __init__(self, d: Description, draws: _Draws) -> None:
        self.empty, self.infinite = d.empty, d.infinite
        self.draws = draws

    def __call__(self, items: list[tuple[int, Tensor, Tensor]]) -> list[Tensor] | None:
        numbers = [number for number, *_ in items]
        if numbers[0] in self.empty:
            return None
        _, inputs, targets = default_collate(items)
        inputs = inputs + self.draws()
        if not self.infinite.isdisjoint(numbers):
            inputs[0, 0] = math.nan
        return [inputs, targets]


class _RandomBatches:
    """A batch sampler that draws from Python's global generator while it is iterated."""

    def __init__(self, samples: int, size: int) -> None:
        self.samples, self.size = samples, size

    def __len__(self) -> int:
        return self.samples // self.size

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(len(self)):
            yield random.sample(range(self.samples), self.size)


class _OwnSampler:
    """A sampler with a generator and a counter of its own, which is told the epoch."""

    def __init__(self, samples: int) -> None:
        self.samples, self.passes, self.epoch = samples, 0, 0
        self.generator = np.random.default_rng(9)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        order = self.generator.permutation(self.samples)
        return iter(np.roll(order, self.passes + self.epoch).tolist())


def _tensors(samples: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 4, generator=generator)
    return inputs, inputs[:, :3].argmax(1)


def _loader(d: Description, workers: int) -> Any:
    still = _Draws("none")
    draws = _Draws(d.augmentation)
    tensors = _tensors(d.samples)
    samples = _Samples(tensors, draws if d.where == "item" else still)
    collate = _Collate(d, draws if d.where == "collate" else still)
    if d.sampler == "list":
        indices = BatchSampler(SequentialSampler(samples), d.batch_size, d.drop_last)
        return [collate([samples[index] for index in batch]) for batch in indices]
    dataset: Dataset[Any] = samples
    options: dict[str, Any] = {"collate_fn": collate}
    if d.augmentation == "none" and not (d.empty or d.infinite):
        dataset, options = TensorDataset(*tensors), {}
    options |= {"num_workers": workers, "persistent_workers": d.persistent and workers > 0}
    if d.sampler == "batch sampler":
        return DataLoader(dataset, batch_sampler=_RandomBatches(d.samples, d.batch_size), **options)
    return DataLoader(dataset, d.batch_size, drop_last=d.drop_last, **_order(d), **options)


def _order(d: Description) -> dict[str, Any]:
    match d.sampler:
        case "shuffle":
            return {"shuffle": True}
        case "generator":
            return {"shuffle": True, "generator": torch.Generator().manual_seed(11)}
        case "weighted":
            weights = [1.0 + index % 3 for index in range(d.samples)]
            return {"sampler": WeightedRandomSampler(weights, d.samples)}
        case "own sampler":
            return {"sampler": _OwnSampler(d.samples)}
    return {}


def _validation_loaders(d: Description) -> Any:
    if d.validation == "none":
        return None

    def loader(seed: int) -> DataLoader[Any]:
        own = torch.Generator().manual_seed(seed) if seed % 2 else None
        return DataLoader(TensorDataset(*_tensors(5, seed)), 3, shuffle=d.shuffled_validation, generator=own)

    return loader(6) if d.loaders == 1 else {"val": loader(6), "other": loader(7)}


# -- callbacks ---------------------------------------------------------------------------------------


class Diary(Callback):
    """A user's callback with much to keep: numbers, a tensor, and draws from all global generators."""

    def __init__(self, d: Description) -> None:
        self.stop_after, self.saves_after = d.stop_after, d.saves_after
        self.recent: list[float] = []
        self.total = torch.zeros(2, dtype=torch.float64)
        self.epochs: dict[int, float] = {}

    def attach(self, trainer: Trainer) -> None:
        super().attach(trainer)
        trainer.after(Trigger.STEP)(self._after_step)
        if self.saves_after is not None:
            trainer.after(self.saves_after)(self._save)

    def _save(self) -> None:
        if self.trainer.batch % 2:
            self.trainer.save()

    def _after_step(self) -> None:
        self.trainer.log("drawn", torch.rand(()))
        self.total[0] += random.random()

    def on_batch_end(self, batch: int, metrics: Mapping[str, float]) -> None:
        self.recent = [*self.recent[-2:], metrics.get("loss", -1.0) + np.random.normal()]
        self.total[1] += self.recent[-1]
        if self.trainer.batches == self.stop_after:
            self.trainer.stop("the diary is full")

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.epochs[epoch] = np.random.normal()
        self.trainer.log("epoch's own", self.epochs[epoch])

    def state_dict(self) -> dict[str, Any]:
        return {"recent": list(self.recent), "total": self.total, "epochs": dict(self.epochs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recent, self.epochs = list(state["recent"]), dict(state["epochs"])
        self.total.copy_(state["total"])


def _callback(name: str, d: Description) -> Callback:
    match name:
        case "diary":
            return Diary(d)
        case "EMA":
            return EMA(decay=0.8, start=1)
        case "EMA validated":
            return EMA(decay=0.8, every_updates=2, validate=True, use_buffers=False)
        case "EarlyStopping":
            return EarlyStopping(monitor=_watched(d), patience=1)
        case "GradientStatistics":
            return GradientStatistics(every_batches=2, per_parameter=False)
    raise ValueError(name)
