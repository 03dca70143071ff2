"""The watch: state that changes and is in no checkpoint is told once, by name; what is no state, never."""

import argparse
import copy
import datetime
import functools
import io
import itertools
import logging
import math
import random
import time
import types
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchmetrics
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.dataloader import default_collate

import trainings
from orchestrator import EMA, Callback, EarlyStopping, Trainer
from orchestrator.snapshot.fingerprints import Fingerprints
from orchestrator.snapshot.reach import Reach
from orchestrator.snapshot.users_code import is_users, only_written
from orchestrator.snapshot.watch import Watch
from states import Trigger

Options = dict[str, Any]


def told(root: Path, options: Options, *hooks: Callable[[Trainer], None]) -> list[str]:
    """What the trainer warns of, in a training of two epochs."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer = trainings.make(root, **{"epochs": 2, **options})
        for hook in hooks:
            hook(trainer)
        trainer.fit()
    return [str(warning.message) for warning in found if "checkpoint" in str(warning.message)]


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


# --- what is told: each builder gives options and the name that the message begins with -----------------------

HIDDEN: Any = None
STEP = 0
BUFFER = torch.zeros(4)


def forward_with_a_global(model: nn.Module, batch: Any) -> Tensor:
    global HIDDEN
    loss = loss_of(model, batch)
    HIDDEN = loss.detach() if HIDDEN is None else HIDDEN * 0.9 + loss.detach()
    return loss + 0.01 * HIDDEN


def count() -> int:
    global STEP
    STEP += 1
    return STEP


def forward_that_calls(model: nn.Module, batch: Any) -> Tensor:
    return loss_of(model, batch) * count()


def forward_in_place(model: nn.Module, batch: Any) -> Tensor:
    loss = loss_of(model, batch)
    BUFFER[0] += float(loss)
    return loss + BUFFER.mean()


def forward_with_a_default(model: nn.Module, batch: Any, memory: list[float] = []) -> Tensor:  # noqa: B006
    loss = loss_of(model, batch)
    memory.append(float(loss))
    return loss * len(memory)


def forward_with_an_attribute(model: nn.Module, batch: Any) -> Tensor:
    forward_with_an_attribute.calls += 1  # type: ignore[attr-defined]
    return loss_of(model, batch)


forward_with_an_attribute.calls = 0  # type: ignore[attr-defined]


def a_closure() -> tuple[Options, str]:
    scale = 1.0

    def forward(model: nn.Module, batch: Any) -> Tensor:
        nonlocal scale
        scale *= 0.9
        return loss_of(model, batch) * scale

    return {"forward": forward}, "scale, a variable that forward encloses"


def a_teacher() -> tuple[Options, str]:
    teacher = trainings.network()

    def forward(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            for mine, trained in zip(teacher.parameters(), model.parameters(), strict=True):
                mine.data.mul_(0.9).add_(trained.data, alpha=0.1)
        return loss_of(model, batch) + (teacher(batch[0]) - model(batch[0])).square().mean()

    return {"forward": forward}, "teacher, a variable"


def an_object_whose_method_is_forward() -> tuple[Options, str]:
    class Experiment:
        def __init__(self) -> None:
            self.recent: deque[float] = deque(maxlen=4)

        def forward(self, model: nn.Module, batch: Any) -> Tensor:
            loss = loss_of(model, batch)
            self.recent.append(float(loss))
            return loss * max(self.recent)

    return {"forward": Experiment().forward}, "Experiment.recent, an attribute of a Experiment"


def an_object_with_slots() -> tuple[Options, str]:
    class Meter:
        __slots__ = ("total",)

        def __init__(self) -> None:
            self.total = 0.0

        def take(self, value: float) -> float:
            self.total += value
            return self.total

    meter = Meter()
    forward = functools.partial(_forward_with_meter, meter=meter)
    return {"forward": forward}, "partial.total, an attribute of a Meter"


def _forward_with_meter(model: nn.Module, batch: Any, meter: Any) -> Tensor:
    loss = loss_of(model, batch)
    return loss * meter.take(float(loss))


def a_callback_without_state_dict() -> tuple[Options, str]:
    class Halving(Callback):
        def __init__(self) -> None:
            self.best = 9.0

        def on_batch_end(self, batch: int, metrics: Any) -> None:
            if metrics["loss"] < self.best:
                self.best = metrics["loss"]

    return {"callbacks": [Halving()]}, "Halving.best, an attribute of a callback that has no state_dict"


def a_callback_whose_state_dict_leaves_it_out() -> tuple[Options, str]:
    class Warm(Callback):
        """All but what sets the rate is kept, in one way or another."""

        kept = ("best", "losses", "always")

        def __init__(self) -> None:
            self.best, self.bad, self.losses = 9.0, False, list[float]()
            self.always = True
            self.seen, self.mean = torch.zeros(2), torch.zeros(())

        def on_batch_end(self, batch: int, metrics: Any) -> None:
            self.best = min(metrics["loss"], self.best)
            self.bad = True
            self.losses = [*self.losses[-3:], metrics["loss"]]
            self.seen += 1
            self.mean = torch.as_tensor(self.losses).mean()
            self.trainer.optimizers[0].param_groups[0]["lr"] = 1e-2 / (1 + self.bad + self.always)

        def state_dict(self) -> Options:
            return {name: getattr(self, name) for name in self.kept} | {"tensors": self._tensors()}

        def _tensors(self) -> Any:
            return [self.seen.clone(), float(self.mean)]

        def load_state_dict(self, state: Options) -> None:
            self.best, self.losses, self.seen = state["best"], state["losses"], state["tensors"][0]

    return {"callbacks": [Warm()]}, "Warm.bad, an attribute of a callback whose state_dict leaves it out,"


def a_callback_that_adds_to_a_built_in_one() -> tuple[Options, str]:
    class Mine(EMA):
        taken = 0

        def on_batch_end(self, batch: int, metrics: Any) -> None:
            self.taken += 1

    return {"callbacks": [Mine()]}, "Mine.taken, an attribute"


def an_attribute_that_cannot_be_captured() -> tuple[Options, str]:
    class State(NamedTuple):
        hidden: Tensor

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.carried = trainings.network(), None

        def forward(self, x: Tensor) -> Tensor:
            out = self.layers(x)
            self.carried = State(out.mean(0).detach())
            return out + self.carried.hidden

    return {"model": Named()}, "model.carried, an attribute of a module"


def an_object_in_the_model() -> tuple[Options, str]:
    @dataclass
    class Memory:
        count: int = 0

    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.memory = trainings.network(), Memory()

        def forward(self, x: Tensor) -> Tensor:
            self.memory.count += 1
            return self.layers(x) * self.memory.count

    return {"model": Remembering()}, "model.memory.count, an attribute of a Memory"


def a_count_in_the_class() -> tuple[Options, str]:
    class Classy(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.layers = trainings.network()

        def forward(self, x: Tensor) -> Tensor:
            Classy.calls += 1
            return self.layers(x) * (1 + 0.01 * Classy.calls)

    return {"model": Classy()}, "Classy.calls, an attribute of a class"


def a_metric_function() -> tuple[Options, str]:
    class Smoothed:
        def __init__(self) -> None:
            self.value = 0.0

        def __call__(self, outputs: Tensor, targets: Tensor) -> float:
            self.value = 0.9 * self.value + 0.1 * float((outputs.argmax(1) == targets).float().mean())
            return self.value

    return {"metrics": {"smooth": Smoothed()}}, "Smoothed.value, an attribute of a Smoothed"


def a_loss_function() -> tuple[Options, str]:
    history = np.zeros(3)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(outputs, targets)
        history[:] = [*history[1:], float(loss)]
        return loss * float(1 + history.mean())

    return {"loss_fn": loss_fn}, "history, a variable that loss_fn encloses"


def a_hook_of_a_module() -> tuple[Options, str]:
    model, seen = trainings.network(), {"calls": 0}

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        seen["calls"] += 1
        return output * (1 + 0.01 * seen["calls"])

    model[0].register_forward_hook(hook)
    return {"model": model}, "seen, a variable that hook encloses"


def an_optimizer_of_its_own() -> tuple[Options, str]:
    model, other = trainings.network(), nn.Linear(6, 3)
    optimizer: Optimizer = torch.optim.Adam(other.parameters())

    class Stepping(Callback):
        def on_batch_end(self, batch: int, metrics: Any) -> None:
            other(torch.ones(6)).sum().backward()
            optimizer.step()

    return {"model": model, "callbacks": [Stepping()]}, "other, a variable"


def an_iterator() -> tuple[Options, str]:
    more = itertools.cycle([0.9, 1.1])

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return loss_of(model, batch) * next(more)

    return {"forward": forward}, "more, a variable that forward encloses, is a cycle"


class Graded(Dataset[Any]):
    """Reading it counts, and what a hook sets makes it harder."""

    def __init__(self) -> None:
        self.samples, self.difficulty, self.reads = trainings.data(), 0.0, 0
        self.cache: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        inputs, target = self.cache[index] = self.samples[index]
        return inputs * (1 + self.difficulty), target


def an_attribute_of_the_data_set() -> tuple[Options, str]:
    data = Graded()

    class Harder(Callback):
        def on_epoch_begin(self, epoch: int) -> None:
            data.difficulty = epoch + 1.0

    loader = DataLoader(Subset(data, range(24)), batch_size=8, shuffle=True)
    return {"train_loader": loader, "callbacks": [Harder()]}, "Graded.difficulty, an attribute of the data,"


def weights_of_a_sampler() -> tuple[Options, str]:
    sampler = WeightedRandomSampler(torch.ones(48).tolist(), 48)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        loss = loss_of(model, batch)
        sampler.weights[0] = loss.detach()
        return loss

    loader = DataLoader(trainings.data(), batch_size=8, sampler=sampler)
    return {
        "train_loader": loader,
        "forward": forward,
    }, "WeightedRandomSampler.weights, an attribute of the data,"


# read by the data's code only


MEMORY: deque[tuple[Tensor, Tensor]] = deque(maxlen=60)
SIZE = {"side": 3}
NOISE = 0.0
LOGGED: list[float] = []


class Replay(Dataset[Any]):
    """Gives what lies in a memory, cut to a size."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Any:
        inputs, target = trainings.data()[index] if index >= len(MEMORY) else MEMORY[index]
        return torch.cat([inputs[: SIZE["side"]], torch.zeros(6 - SIZE["side"])]), target


def with_noise(items: Any) -> Any:
    return _noisy(*default_collate(items))


def _noisy(inputs: Tensor, targets: Tensor) -> Any:
    return inputs + NOISE, targets


def hook_of(function: Callable[[], Any], trigger: str = "on_batch_end") -> list[Callback]:
    """A callback that calls `function`, of which is looked at what it names."""

    class Calling(Callback):
        pass

    setattr(Calling, trigger, lambda self, *_: function())
    return [Calling()]


def _play() -> None:
    LOGGED.append(1.0)
    MEMORY.append((torch.ones(6), torch.tensor(1)))


def _resize() -> None:
    SIZE["side"] = 4


def _louder() -> None:
    global NOISE
    NOISE = 0.1


def a_memory_that_the_data_set_names() -> tuple[Options, str]:
    return {
        "train_loader": DataLoader(Replay(), batch_size=8),
        "callbacks": hook_of(_play),
    }, "MEMORY, a global"


def a_setting_that_the_data_set_names() -> tuple[Options, str]:
    return {
        "train_loader": DataLoader(Replay(), batch_size=8),
        "callbacks": hook_of(_resize),
    }, "SIZE, a global"


def a_global_that_the_collate_function_names() -> tuple[Options, str]:
    loader = DataLoader(trainings.data(), batch_size=8, collate_fn=with_noise)
    return {"train_loader": loader, "callbacks": hook_of(_louder)}, "NOISE, a global"


def a_memory_that_is_an_attribute_of_the_data_set() -> tuple[Options, str]:
    memory = deque(trainings.data())

    class Holding(Dataset[Any]):
        def __init__(self, given: Any) -> None:
            self.buffer = given

        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> Any:
            return self.buffer[index]

    loader = DataLoader(Holding(memory), batch_size=8)
    callbacks = hook_of(lambda: memory.append((torch.ones(6), torch.tensor(1))))
    return {"train_loader": loader, "callbacks": callbacks}, "memory, a variable that "


def labels_of_a_data_set() -> tuple[Options, str]:
    inputs, labels = trainings.data().tensors

    def relabel() -> None:
        labels[:3] = 1

    loader = DataLoader(TensorDataset(inputs, labels), batch_size=8)
    return {"train_loader": loader, "callbacks": hook_of(relabel)}, "labels, a variable that relabel encloses"


def weights_that_are_the_samplers() -> tuple[Options, str]:
    weights = np.ones(48)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        loss = loss_of(model, batch)
        weights[3] = float(loss.detach())
        return loss

    sampler = WeightedRandomSampler(torch.from_numpy(weights), 48)  # type: ignore[arg-type]
    loader = DataLoader(trainings.data(), batch_size=8, sampler=sampler)
    return {"train_loader": loader, "forward": forward}, "weights, a variable that forward encloses"


class Ordered(Dataset[Any]):
    """Looks its order up, which methods change."""

    def __init__(self) -> None:
        self.samples, self.cache = trainings.data(), dict[int, Any]()
        self.epoch, self.order, self.transform = 0, np.arange(48), _weak
        self.reshuffle()

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Any:
        self.load(index)
        inputs, target = self.cache[index]
        return self.transform(inputs) * (1 + self.epoch), target

    def load(self, index: int) -> None:
        self.cache[index] = self.samples[int(self.order[index])]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def reshuffle(self) -> None:
        self._shuffle()

    def _shuffle(self) -> None:
        np.random.shuffle(self.order)


def _weak(inputs: Tensor) -> Tensor:
    return inputs


def an_order_that_a_method_of_the_data_changes() -> tuple[Options, str]:
    data = Ordered()
    return {
        "train_loader": DataLoader(data, batch_size=8),
        "callbacks": hook_of(lambda: data.reshuffle(), "on_epoch_end"),
    }, "Ordered.order, an attribute of the data,"


def an_epoch_that_a_method_of_the_data_sets() -> tuple[Options, str]:
    data = Ordered()
    return {
        "train_loader": DataLoader(data, batch_size=8),
        "callbacks": hook_of(lambda: data.set_epoch(1), "on_epoch_begin"),
    }, "Ordered.epoch, an attribute of the data,"


def a_list_that_a_sampler_shuffles() -> tuple[Options, str]:
    class Buckets(Sampler[list[int]]):
        def __init__(self) -> None:
            self.batches = [list(range(i, i + 8)) for i in range(0, 48, 8)]
            self.order: Any = None

        def __len__(self) -> int:
            return 6

        def __iter__(self) -> Any:
            self.order = torch.randperm(6).tolist()
            random.shuffle(self.batches)
            return iter(self.batches)

    loader = DataLoader(trainings.data(), batch_sampler=Buckets())
    return {"train_loader": loader}, "Buckets.batches, an attribute of the data,"


def an_array_that_an_iterable_data_set_shuffles() -> tuple[Options, str]:
    class Lines(IterableDataset[Any]):
        def __init__(self) -> None:
            self.order, self.buffer, self.samples = np.arange(48), list[Any](), trainings.data()

        def __iter__(self) -> Any:
            np.random.shuffle(self.order)
            for index in self.order:
                self.buffer.append(index)
                yield self.samples[self.buffer[-1]]

    return {"train_loader": DataLoader(Lines(), batch_size=8)}, "Lines.order, an attribute of the data,"


def weights_that_a_method_of_the_sampler_sets() -> tuple[Options, str]:
    class Hard(Sampler[int]):
        def __init__(self) -> None:
            self.weights = [1.0] * 48

        def __len__(self) -> int:
            return 48

        def __iter__(self) -> Any:
            return iter(torch.multinomial(torch.tensor(self.weights), 48).tolist())

        def update(self, index: int, loss: float) -> None:
            self.weights[index] = loss

    sampler = Hard()

    def forward(model: nn.Module, batch: Any) -> Tensor:
        loss = loss_of(model, batch)
        sampler.update(3, float(loss.detach()))
        return loss

    loader = DataLoader(trainings.data(), batch_size=8, sampler=sampler)
    return {"train_loader": loader, "forward": forward}, "Hard.weights, an attribute of the data,"


def what_a_function_of_the_scheduler_reads() -> tuple[Options, str]:
    plateaus: list[int] = []

    def make(model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def schedule(optimizer: Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5 ** len(plateaus))

    model = trainings.network()
    optimizer = make(model)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": schedule(optimizer),
        "callbacks": hook_of(lambda: plateaus.append(1)),
    }, "plateaus, a variable that "


def what_a_function_of_the_scheduler_keeps() -> tuple[Options, str]:
    factor = 1.0

    def smaller(epoch: int) -> float:
        nonlocal factor
        factor *= 0.8
        return factor

    model = trainings.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, smaller)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
    }, "factor, a variable that smaller encloses"


# of other kinds than containers and tensors


def a_namespace() -> tuple[Options, str]:
    state = types.SimpleNamespace(temperature=1.0)

    def cool() -> None:
        state.temperature = 0.9

    return {
        "forward": lambda model, batch: loss_of(model, batch) / state.temperature,
        "callbacks": hook_of(cool),
    }, "state.temperature, an attribute of a SimpleNamespace,"


def arguments_of_the_command_line() -> tuple[Options, str]:
    args = argparse.Namespace(eps=1.0, lr=0.1)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        args.eps = max(0.01, args.eps * 0.95)
        return loss_of(model, batch) * args.eps * args.lr

    return {"forward": forward}, "args.eps, an attribute of a Namespace,"


def _smooth(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.3)


def a_function_that_is_exchanged() -> tuple[Options, str]:
    criterion: Any = nn.functional.cross_entropy

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return criterion(model(batch[0]), batch[1])  # type: ignore[no-any-return]

    def switch() -> None:
        nonlocal criterion
        criterion = _smooth

    return {"forward": forward, "callbacks": hook_of(switch)}, "criterion, a variable that "


def arguments_of_a_function_that_are_exchanged() -> tuple[Options, str]:
    criterion = functools.partial(nn.functional.cross_entropy, label_smoothing=0.0)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return criterion(model(batch[0]), batch[1])

    def switch() -> None:
        nonlocal criterion
        criterion = functools.partial(nn.functional.cross_entropy, label_smoothing=0.1)

    return {"forward": forward, "callbacks": hook_of(switch)}, "criterion, a variable that "


def a_transform_that_is_exchanged() -> tuple[Options, str]:
    data = Ordered()

    def switch() -> None:
        data.transform = lambda inputs: inputs + 1

    loader = DataLoader(data, batch_size=8)
    return {
        "train_loader": loader,
        "callbacks": hook_of(switch),
    }, "Ordered.transform, an attribute of the data,"


def an_activation_that_is_exchanged() -> tuple[Options, str]:
    class Acting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.act = trainings.network(), torch.relu

        def forward(self, inputs: Tensor) -> Tensor:
            return self.act(self.layers(inputs))

    model = Acting()

    def switch() -> None:
        model.act = torch.tanh  # type: ignore[assignment]

    return {"model": model, "callbacks": hook_of(switch)}, "model.act, an attribute of a module,"


def a_hook_that_is_registered_while_training() -> tuple[Options, str]:
    model = trainings.network()

    def register() -> None:
        if not model[0]._forward_hooks:
            model[0].register_forward_hook(lambda module, inputs, output: output + 1)

    return {"model": model, "callbacks": hook_of(register)}, "model.0.hooks, registered with a module"


def a_hook_that_is_taken_away_while_training() -> tuple[Options, str]:
    model = trainings.network()
    handle = model[0].register_forward_hook(lambda module, inputs, output: output + 1)
    return {"model": model, "callbacks": hook_of(handle.remove)}, "model.0.hooks, registered with a module"


def a_hook_of_a_tensor() -> tuple[Options, str]:
    model, scale = trainings.network(), {"of": 1.0}
    model[0].weight.register_hook(lambda gradient: gradient * scale["of"])

    def smaller() -> None:
        scale["of"] = 0.5

    return {"model": model, "callbacks": hook_of(smaller)}, "scale, a variable that "


def an_optimizer_that_a_tensor_calls() -> tuple[Options, str]:
    model = trainings.network()
    weight = model[0].weight
    own = torch.optim.Adam([weight])

    def step(parameter: Tensor) -> None:
        own.step()
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(step)
    trained = [parameter for parameter in model.parameters() if parameter is not weight]
    return {
        "model": model,
        "optimizer": torch.optim.SGD(trained, lr=0.1),
    }, "own, a variable that step encloses,"


def an_object_of_a_library() -> tuple[Options, str]:
    scaler = StandardScaler()

    def forward(model: nn.Module, batch: Any) -> Tensor:
        scaler.partial_fit(batch[0].numpy())
        inputs = torch.from_numpy(scaler.transform(batch[0].numpy())).float()
        return loss_of(model, (inputs, batch[1]))

    return {"forward": forward}, "scaler, a variable that forward encloses,"


def what_a_collating_object_keeps() -> tuple[Options, str]:
    class Scaled:
        def __init__(self) -> None:
            self.largest = 0.0

        def __call__(self, items: list[Any]) -> Any:
            inputs, targets = default_collate(items)
            self.largest = max(self.largest, float(inputs.max()))
            return inputs / self.largest, targets

    return {
        "train_loader": trainings.loader(collate_fn=Scaled())
    }, "Scaled.largest, an attribute of the data,"


def a_list_of_samples() -> tuple[Options, str]:
    samples = list(trainings.data())

    def relabel() -> None:
        samples[5] = (samples[5][0], torch.tensor(2))

    loader = DataLoader(samples, batch_size=8)  # type: ignore[arg-type]
    return {"train_loader": loader, "callbacks": hook_of(relabel)}, "list, given as data,"


def an_attribute_of_an_optimizer() -> tuple[Options, str]:
    class Every(torch.optim.Adam):
        """Steps with twice the rate every other time."""

        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=1e-3)
            self.count, self.log = 0, list[float]()

        def step(self, closure: Any = None) -> Any:
            self.count += 1
            self.log.append(time.time())
            self.param_groups[0]["lr"] = 1e-3 * (1 + self.count % 2)
            return super().step(closure)

    return {
        "optimizer": lambda model: Every(model.parameters())
    }, "Every.count, an attribute of an optimizer,"


TOLD: dict[str, Callable[[], tuple[Options, str]]] = {
    "a global": lambda: (
        {"forward": forward_with_a_global},
        "HIDDEN, a global variable of test_capture_watch",
    ),
    "a global of a function that forward calls": lambda: ({"forward": forward_that_calls}, "STEP, a global"),
    "a tensor written in place": lambda: ({"forward": forward_in_place}, "BUFFER, a global variable"),
    "a default argument": lambda: (
        {"forward": forward_with_a_default},
        "memory, a default argument of forward_with_a_default",
    ),
    "an attribute of a function": lambda: (
        {"forward": forward_with_an_attribute},
        "forward_with_an_attribute.calls, an attribute of a function",
    ),
    **{
        made.__name__.replace("_", " "): made
        for made in (
            *(a_closure, a_teacher, an_object_whose_method_is_forward, an_object_with_slots),
            *(a_callback_without_state_dict, a_callback_that_adds_to_a_built_in_one, a_metric_function),
            a_callback_whose_state_dict_leaves_it_out,
            *(an_attribute_that_cannot_be_captured, an_object_in_the_model, a_count_in_the_class),
            *(a_loss_function, a_hook_of_a_module, an_optimizer_of_its_own, an_iterator),
        )
    },
}
TOLD |= {
    made.__name__.replace("_", " "): made
    for made in (
        *(an_attribute_of_the_data_set, weights_of_a_sampler, an_attribute_of_an_optimizer),
        *(a_memory_that_the_data_set_names, a_setting_that_the_data_set_names),
        *(a_global_that_the_collate_function_names, a_memory_that_is_an_attribute_of_the_data_set),
        *(labels_of_a_data_set, weights_that_are_the_samplers),
        *(an_order_that_a_method_of_the_data_changes, an_epoch_that_a_method_of_the_data_sets),
        *(a_list_that_a_sampler_shuffles, an_array_that_an_iterable_data_set_shuffles),
        weights_that_a_method_of_the_sampler_sets,
        *(a_namespace, arguments_of_the_command_line, a_function_that_is_exchanged),
        *(arguments_of_a_function_that_are_exchanged, a_transform_that_is_exchanged),
        *(an_activation_that_is_exchanged, a_hook_of_a_tensor),
        *(a_hook_that_is_registered_while_training, a_hook_that_is_taken_away_while_training),
        *(an_optimizer_that_a_tensor_calls, an_object_of_a_library),
        *(a_list_of_samples, what_a_collating_object_keeps),
        *(what_a_function_of_the_scheduler_reads, what_a_function_of_the_scheduler_keeps),
    )
}


@pytest.mark.parametrize("name", TOLD)
def test_what_changes_and_is_in_no_checkpoint_is_told_once_by_name(name: str, tmp_path: Path) -> None:
    options, begin = TOLD[name]()
    found = told(tmp_path, options)
    assert len([message for message in found if message.startswith(begin)]) == 1, found
    assert all("will not be exact" in message for message in found)
    assert len(found) == (2 if name == "an optimizer of its own" else 1), found


def test_what_is_first_set_while_training_is_told_to_be_missing_after_a_resume(tmp_path: Path) -> None:
    class Timer(Callback):
        started = 0.0

        def on_epoch_begin(self, epoch: int) -> None:
            self.began = self.started = time.time()
            self.since, self.note = datetime.datetime.now(), time.time()

        def on_epoch_end(self, epoch: int, metrics: Any) -> None:
            print(self.started, time.time() - self.began, self.since)

    found = told(tmp_path, {"callbacks": [Timer()]})
    assert [message.partition(" and ")[0] for message in found] == [
        f"Timer.{name}, an attribute of a callback that has no state_dict, was first set while training"
        for name in ("began", "since")
    ]


# --- what is not told -----------------------------------------------------------------------------------------


def test_nothing_is_told_of_a_script_as_people_write_them(tmp_path: Path) -> None:
    logger, lines, losses = logging.getLogger("mine"), io.StringIO(), []
    records: dict[tuple[int, int], float] = {}
    config = {"lr": 0.1, "layers": [8, 3]}
    device = torch.device("cpu")
    model = trainings.network()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    accuracy = torchmetrics.classification.MulticlassAccuracy(3)
    loader = trainings.loader()

    class Timing(Callback):
        def __init__(self) -> None:
            self.began = time.perf_counter()
            self.losses: list[float] = []

        def on_batch_begin(self, batch: int) -> None:
            self.began = time.perf_counter()

        def on_batch_end(self, batch: int, metrics: Any) -> None:
            logger.debug("%s", time.perf_counter() - self.began)
            self.losses.append(metrics["loss"])

    class Counting(Callback):
        def __init__(self) -> None:
            self.count = 0

        def on_batch_end(self, batch: int, metrics: Any) -> None:
            self.count += 1
            losses.append(metrics["loss"])
            print(self.count, file=lines)

        def state_dict(self) -> Options:
            return {"count": self.count}

        def load_state_dict(self, state: Options) -> None:
            self.count = state["count"]

    def forward(net: nn.Module, batch: Any) -> Any:
        inputs, targets = batch[0].to(device), batch[1].to(device)
        outputs = model(inputs)
        assert len(loader) == 6
        assert config["layers"] == [8, 3]
        return criterion(outputs, targets), outputs, targets

    def hooks(trainer: Trainer) -> None:
        @trainer.after(Trigger.END_BATCH)
        def note() -> None:
            records[trainer.epoch, trainer.batch + 0] = trainer.metrics["loss"]
            assert scheduler.last_epoch >= 0

    options = {
        "model": model,
        "optimizer": optimizer,
        "forward": forward,
        "scheduler": scheduler,
        "train_loader": loader,
        "val_loader": trainings.loader(24),
        "metrics": {"accuracy": accuracy, "wrong": lambda o, t: (o.argmax(1) != t).float().mean()},
        "callbacks": [Timing(), Counting(), EMA(), EarlyStopping("val/loss", patience=9)],
    }
    assert told(tmp_path, options, hooks) == []
    assert len(losses) == len(records) == 12


HISTORY: dict[str, list[float]] = {"loss": []}


class Augmented(Dataset[Any]):
    """A cache of its own, filled by a method, and attributes named as hooks name their logs."""

    def __init__(self) -> None:
        self.HISTORY, self.cache, self.calls = list(trainings.data()), dict[int, Any](), 0
        self.transform: Any = self.noisy

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Any:
        inputs, target = self.load(index)
        return {"LOGGED": self.transform(inputs), "HISTORY": target}

    def load(self, index: int) -> Any:
        if index not in self.cache:
            self.cache[index] = self.HISTORY[index]
        return self.cache[index]

    def noisy(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return inputs + 0.1 * torch.randn(6)


class Bucketed(Sampler[list[int]]):
    """Makes its batches anew for each epoch, and is told which."""

    def __init__(self) -> None:
        self.epoch, self.batches = 0, list[list[int]]()
        self.make()

    def make(self) -> None:
        order = torch.randperm(48, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        self.batches = [order[i : i + 8] for i in range(0, 48, 8)]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Any:
        self.make()
        return iter(self.batches)


def test_nothing_is_told_of_data_as_people_write_it(tmp_path: Path) -> None:
    sampler = Bucketed()

    def note() -> None:
        LOGGED.append(0.5)
        HISTORY["loss"].append(0.5)
        sampler.set_epoch(1)
        torch.load(io.BytesIO(saved))

    stream = io.BytesIO()
    torch.save({}, stream)
    saved = stream.getvalue()

    def collate(items: Any) -> Any:
        return default_collate([tuple(item.values()) for item in items])

    loader = DataLoader(Augmented(), batch_sampler=sampler, collate_fn=collate)
    assert told(tmp_path, {"train_loader": loader, "callbacks": hook_of(note)}) == []
    assert told(tmp_path, {"train_loader": list(trainings.loader()), "callbacks": hook_of(note)}) == []


def test_nothing_is_told_of_callbacks_that_save_in_ways_of_their_own(tmp_path: Path) -> None:
    class Meter:
        def __init__(self) -> None:
            self.sum, self.count = 0.0, 0

        def update(self, value: float) -> None:
            self.sum, self.count = self.sum + value, self.count + 1

        def state_dict(self) -> Options:
            return dict(vars(self))

    class Metered(Callback):
        def __init__(self) -> None:
            self.meter, self.began = Meter(), time.time()

        def on_epoch_begin(self, epoch: int) -> None:
            self.began = time.time()

        def on_batch_end(self, batch: int, metrics: Any) -> None:
            self.meter.update(metrics["loss"])
            print(time.time() - self.began, self.meter.sum)

        def state_dict(self) -> Options:
            return {"meter": self.meter.state_dict()}

        def load_state_dict(self, state: Options) -> None:
            vars(self.meter).update(state["meter"])

    class Best(Callback):
        def __init__(self) -> None:
            self.best, self.state, self.recent = 9.0, None, deque[float](maxlen=3)

        def on_train_begin(self) -> None:
            self.began = time.time()

        def on_batch_end(self, batch: int, metrics: Any) -> None:
            self.recent.append(metrics["loss"])
            if max(self.recent) < self.best:
                self.best = metrics["loss"]
                self.state = copy.deepcopy(self.trainer.model.state_dict())

        def state_dict(self) -> Options:
            return {
                name: value for name, value in vars(self).items() if name not in ("trainer", "recent")
            } | {"last": list(self.recent)}

        def load_state_dict(self, state: Options) -> None:
            self.recent.extend(state.pop("last"))
            vars(self).update(state)

    assert told(tmp_path, {"callbacks": [Metered(), Best()]}) == []


def test_nothing_is_told_of_hooks_and_objects_that_stay_as_they_were(tmp_path: Path) -> None:
    model, norms = trainings.network(), list[float]()
    inputs = trainings.data().tensors[0].numpy()
    scaler, args = StandardScaler().fit(inputs), argparse.Namespace(device="cpu", log=[])
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: norms.append(float(gradient.norm())))
    nn.utils.parametrizations.spectral_norm(model[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)
    act: Any = nn.functional.relu

    def forward(model: nn.Module, batch: Any) -> Tensor:
        scaled = torch.from_numpy(scaler.transform(batch[0].numpy())).float()
        loss = loss_of(model, (act(scaled.to(args.device)), batch[1]))
        args.log.append(float(loss.detach()))
        return loss

    options = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "forward": forward}
    assert told(tmp_path, options) == []


def test_reading_what_was_added_makes_it_state() -> None:
    log: list[float] = []
    table: dict[Any, Any] = {}
    history: dict[str, list[float]] = {"loss": []}

    def adds() -> None:
        log.append(1.0)
        table[len("ab"), "x"] = max(1, 2)
        history["loss"].append(2.0)

    def reads() -> float:
        return log[-1]

    def changes() -> None:
        table["n"] += 1

    def reads_an_item() -> float:
        return history["loss"][-1]

    def by_name() -> Any:
        return getattr(reads, "log")  # noqa: B009

    assert only_written("log", [adds.__code__])
    assert only_written("table", [adds.__code__])
    assert only_written("history", [adds.__code__])
    assert not only_written("history", [reads_an_item.__code__])
    assert not only_written("log", [adds.__code__, reads.__code__])
    assert not only_written("log", [adds.__code__, by_name.__code__])
    assert not only_written("table", [changes.__code__])


def test_users_code_is_told_from_libraries() -> None:
    assert is_users(Options) is False
    assert is_users(told)
    assert not any(map(is_users, (torch.nn.Linear, torchmetrics.Metric, Trainer, random.Random, json_like())))


def test_what_a_data_set_does_to_itself_is_not_told(tmp_path: Path) -> None:
    """Though hooks have to do with attributes of these names elsewhere, and read those of the data."""

    class Counted(Graded):
        def __init__(self) -> None:
            super().__init__()
            self.epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    class Shuffled(Sampler[int]):
        def __init__(self) -> None:
            self.epoch = self.samples = 0

        def __iter__(self) -> Any:
            self.samples += 48
            return iter(torch.randperm(48, generator=torch.Generator().manual_seed(self.epoch)).tolist())

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    data, sampler = Counted(), Shuffled()

    class Reading(Callback):
        def on_epoch_end(self, epoch: int, metrics: Any) -> None:
            sampler.set_epoch(self.trainer.epoch)
            assert self.trainer.epoch == sampler.epoch
            assert data.reads >= sampler.samples - 48

    loader = DataLoader(data, batch_size=8, sampler=sampler)
    assert told(tmp_path, {"train_loader": loader, "callbacks": [Reading()]}) == []


def json_like() -> Any:
    import json

    return json.loads


def test_what_shares_memory_with_a_parameter_or_is_the_loaders_is_not_told() -> None:
    model = trainings.network()
    view, loader = model[0].weight.detach()[0], trainings.loader()
    dataset = loader.dataset

    def forward() -> Any:
        return view, dataset.tensors, model[0].weight

    watch = Watch(
        functions=[forward], modules={"model": model}, hooked=[], callbacks={}, outside=[loader, dataset]
    )
    watch.begin()
    with torch.no_grad():
        model[0].weight.add_(1)
        dataset.tensors[0].add_(1)
    assert watch.look() == []


def test_a_large_value_is_looked_at_in_part_and_in_little_time() -> None:
    table = torch.zeros(3_000_000)
    words = dict.fromkeys(range(100_000), 0)

    def forward() -> Any:
        return table, words

    watch = Watch(functions=[forward], modules={}, hooked=[], callbacks={}, outside=[])
    watch.begin()
    table[12_345] = 1
    words["new"] = 1
    assert [message.partition(",")[0] for message in watch.look()] == ["table", "words"]
    assert watch.look() == []


def test_fingerprints_tell_numbers_by_type_and_bits() -> None:
    of = Fingerprints((), ()).of
    lists: list[list[object]] = [
        [0.0, 1.0],
        [-0.0, 1.0],
        [0, 1],
        [False, True],
        [math.nan, 1.0],
        [0.0, 1.0, 2.0],
        [],
    ]
    assert len({of(values) for values in lists}) == len(lists)
    assert of([math.nan, -0.0]) == of([math.nan, -0.0])
    long = [float(number) for number in range(1_000)]
    assert of(long) == of(long.copy()) != of([*long, 0.0])
    assert of(torch.zeros(0)) != of(torch.zeros(0, 3)) != of(torch.zeros(1))


# --- generators -----------------------------------------------------------------------------------------------


def test_generators_wherever_user_code_has_them_are_restored(tmp_path: Path) -> None:
    def build(root: Path) -> Trainer:
        chance = random.Random(3)
        noise = np.random.default_rng(4)

        class Old(Callback):
            def __init__(self) -> None:
                self.state = np.random.RandomState(5)

            def on_batch_begin(self, batch: int) -> None:
                self.trainer.data[0].add_(self.state.rand())

        def forward(model: nn.Module, batch: Any) -> Tensor:
            return loss_of(model, batch) * (chance.random() + noise.random())

        return trainings.make(root, forward=forward, callbacks=[Old()], epochs=2)

    whole, losses = build(tmp_path / "whole"), []
    trainings.record_losses(whole, losses)
    whole.fit()
    found: list[float] = []
    for transitions in (7, 12, 5, 99):
        trainer = build(tmp_path / "broken")
        trainings.record_losses(trainer, found)
        trainer.start("auto")
        for _ in range(transitions):
            if trainer.advance() is None:
                break
        trainer.close()
    assert found == losses


def test_a_generator_made_while_training_is_named_on_resume(tmp_path: Path) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.noise = trainings.network(), None

        def forward(self, x: Tensor) -> Tensor:
            self.noise = self.noise or torch.Generator().manual_seed(1)
            return self.layers(x + torch.rand(1, generator=self.noise))

    trainer = trainings.make(tmp_path, model=Late())
    trainer.start()
    for _ in range(9):
        trainer.advance()
    trainer.close()
    with pytest.warns(UserWarning, match=r"a random generator model\.noise, which is not there"):
        trainings.make(tmp_path, model=Late()).fit("auto")


def test_a_generator_whose_state_cannot_be_read_is_named(tmp_path: Path) -> None:
    chance = random.SystemRandom()

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return loss_of(model, batch) * chance.random()

    assert "chance (SystemRandom)" in told(tmp_path, {"forward": forward})[0]


def test_hooks_are_read_in_the_order_of_modules_whenever_they_were_registered() -> None:
    """Generators are named by the first path to them, which is to be the same in a process that goes on."""
    model, reach = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12))), Reach(())
    reach.add_module("model", model, lambda: {"values": {}, "shared": {}})
    (owner,) = (owner for owner in reach.owners if owner.kind.startswith("registered"))
    assert owner.read() == {}
    for at in (7, 2, 11, 0):
        model[at].register_forward_hook(lambda module, inputs, output: None)
        owner.read()
    assert list(owner.read()) == ["0.hooks", "2.hooks", "7.hooks", "11.hooks"]
