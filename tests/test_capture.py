"""Captured, stored, restored into a new model and optimizer, and trained on: bit for bit the unbroken training."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from orchestrator.seeding import seed_everything
from orchestrator.snapshot.capture import (
    capture_gradients,
    capture_module,
    capture_optimizer,
    capture_random,
    capture_scheduler,
    digests,
    first_difference,
    parameter_names,
    restore_gradients,
    restore_module,
    restore_optimizer,
    restore_random,
    restore_scheduler,
)
from orchestrator.snapshot.encoding import decode, encode

# --- models: each takes no argument, reads a batch of shape (6, 8) and gives one output per row ----------------


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.into.weight
        self.same_memory = nn.Linear(8, 8, bias=False)
        self.same_memory.weight = nn.Parameter(self.into.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        return self.same_memory(self.again(self.into(x).tanh()).tanh()).sum(1, keepdim=True)


class Frozen(nn.Module):
    """A frozen backbone whose BatchNorm stays in eval mode, and a branch that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)).requires_grad_(False)
        self.head = nn.Linear(6, 1)
        self.unused = nn.Linear(3, 3)
        self.backbone.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Buffered(nn.Module):
    """Buffers of every kind: non-persistent, None at first, growing, replaced, registered in forward."""

    made: Tensor | None
    queue: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("made", None)
        self.register_buffer("queue", torch.zeros(0, 8))
        self.register_buffer("expanded", torch.ones(1, 1).expand(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        self.made = x.mean(0).detach() if self.made is None else 0.9 * self.made + 0.1 * x.mean(0)
        self.queue = torch.cat([self.queue, x[:1].detach()])[-5:]
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros(8), persistent=False)
        self.late += self.queue.sum(0)
        return self.layer(x + self.made + self.queue.mean(0) + self.late * 1e-3 / self.seen)


class Convolution(nn.Module):
    """In channels_last: the gradients' strides decide the last bits of their norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        image = x.view(-1, 2, 2, 2).contiguous(memory_format=torch.channels_last)
        return self.norm(self.convolution(image)).square().mean((1, 2, 3))[:, None]


class Bf16(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(torch.bfloat16)).float()


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Remembers(nn.Module):
    """State that is no tensor, given by get_extra_state; train and eval mode are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = plain()
        self.counts: Counter[int] = Counter()
        self.layers[3].eval()

    def forward(self, x: Tensor) -> Tensor:
        self.counts[len(self.counts) % 3] += 1
        return self.layers(x) * (1 + 1e-3 * self.counts[0])

    def get_extra_state(self) -> Any:
        return {"counts": self.counts}

    def set_extra_state(self, state: Any) -> None:
        self.counts = Counter(state["counts"])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "tied": Tied,
    "frozen": Frozen,
    "buffered": Buffered,
    "channels_last": Convolution,
    "bf16": Bf16,
    "lazy": Lazy,
    "extra_state": Remembers,
}

# --- optimizers ------------------------------------------------------------------------------------------------

Parameters = list[dict[str, Any]]
OPTIMIZERS: dict[str, Callable[[Parameters], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95)),
    "AdamW lr tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, lr_decay=0.01, initial_accumulator_value=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05, t0=3),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda p: torch.optim.Muon(p, lr=0.01)

NO_MOMENTUM = ("Adagrad", "Adadelta", "ASGD", "Rprop", "Adafactor")

# On the CPU this kernel's first step makes other momentum each time, without any interruption (torch 2.13).
NOT_REPEATABLE = {("bf16", "SGD fused")}

# --- schedulers ------------------------------------------------------------------------------------------------


class Warmup:
    """A callable object: torch keeps its __dict__, here also a counter and a function."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.calls = 0
        self.shape = lambda x: x**2

    def __call__(self, step: int) -> float:
        self.calls += 1
        return min(1.0, self.shape((step + 1) / self.batches)) * (1 + 1e-3 * self.calls)


class AfterWarmup(lr_scheduler.LRScheduler):
    """A scheduler as people write them: it holds another one, and a function."""

    def __init__(self, optimizer: Optimizer, after: lr_scheduler.LRScheduler) -> None:
        self.after = after
        self.factor = lambda step: 0.5 + 0.1 * step
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        if self.last_epoch < 3:
            return [base * self.factor(self.last_epoch) for base in self.base_lrs]
        self.after.step()
        return self.after.get_last_lr()


def one_after_another(o: Optimizer) -> lr_scheduler.LRScheduler:
    warmup = lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=3)
    return lr_scheduler.SequentialLR(o, [warmup, lr_scheduler.CosineAnnealingLR(o, T_max=20)], [3])


SCHEDULERS: dict[str, Callable[[Optimizer], lr_scheduler.LRScheduler]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 2, 5], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 20, 2.0),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, mode="exp_range", gamma=0.9),
    "LambdaLR function": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "LambdaLR object": lambda o: lr_scheduler.LambdaLR(o, Warmup(6)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "SequentialLR": one_after_another,
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, cooldown=1),
    "one inside another": lambda o: AfterWarmup(o, lr_scheduler.ExponentialLR(o, 0.9)),
}


# --- a training that can be cut anywhere -----------------------------------------------------------------------


@dataclass
class Training:
    """A hand-written loop; the weight of its loss is a parameter outside the model."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: lr_scheduler.LRScheduler | None
    loss_weight: nn.Parameter
    losses: list[bytes] = field(default_factory=list)

    @classmethod
    def build(cls, model: str, optimizer: str, scheduler: str | None, seed: int = 0) -> "Training":
        seed_everything(seed)
        net = MODELS[model]()
        loss_weight = nn.Parameter(torch.tensor([[1.0]]))
        groups = [
            {"params": list(net.parameters())[:1], "weight_decay": 0.01},
            {"params": [*list(net.parameters())[1:], loss_weight]},
        ]
        if optimizer == "Muon":  # which takes matrices only
            groups = [{"params": [p for p in group["params"] if p.dim() == 2]} for group in groups]
            groups = [group for group in groups if group["params"]]
        made = OPTIMIZERS[optimizer](groups)
        return cls(net, made, SCHEDULERS[scheduler](made) if scheduler else None, loss_weight)

    def forward_and_backward(self, batch: int) -> None:
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(batch))
        loss = (self.model(x) - x[:, :1]).square().mean() * self.loss_weight.squeeze() + torch.rand(()) * 1e-3
        loss.backward()
        self.losses.append(loss.detach().numpy().tobytes())

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5, foreach=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(float(self.loss_weight.detach()))
        elif self.scheduler is not None:
            self.scheduler.step()

    def train(self, first: int, last: int) -> None:
        for batch in range(first, last):
            self.forward_and_backward(batch)
            self.step()

    def capture(self) -> dict[str, Any]:
        names = parameter_names(self.model)
        return {
            "model": capture_module(self.model),
            "optimizer": capture_optimizer(self.optimizer, names),
            "gradients": capture_gradients(self.model, [self.optimizer]),
            "scheduler": None if self.scheduler is None else capture_scheduler(self.scheduler),
            "random": capture_random(),
        }

    def restore(self, tree: dict[str, Any]) -> None:
        restore_module(self.model, tree["model"])
        restore_optimizer(self.optimizer, tree["optimizer"], parameter_names(self.model))
        restore_gradients(self.model, tree["gradients"], [self.optimizer])
        if self.scheduler is not None:
            restore_scheduler(self.scheduler, tree["scheduler"])
        restore_random(tree["random"])


def stored(tree: dict[str, Any]) -> dict[str, Any]:
    """What comes back from a checkpoint: nothing of it is shared with the training that was captured."""
    encoded = encode(tree)
    document = json.loads(json.dumps(encoded.document))
    return decode(
        document,
        {name: t.clone(memory_format=torch.contiguous_format) for name, t in encoded.tensors.items()},
    )


def assert_resumes_exactly(
    model: str, optimizer: str, scheduler: str | None, before: int, after: int, in_window: bool, used: bool
) -> None:
    """Train, capture (in an open accumulation window or between), go on; then the same in a new training.

    One that is `used` has trained already, and has state of its own that is to be replaced.
    """
    unbroken = Training.build(model, optimizer, scheduler)
    unbroken.train(0, before)
    if in_window:
        unbroken.forward_and_backward(before)
    tree = stored(unbroken.capture())
    captured = digests(tree)
    unbroken.losses.clear()
    unbroken.train(before, before + after)

    resumed = Training.build(model, optimizer, scheduler, seed=1)
    if used:
        resumed.train(50, 53)
        resumed.losses.clear()
    resumed.restore(tree)
    assert first_difference(captured, digests(resumed.capture())) is None
    resumed.train(before, before + after)
    assert resumed.losses == unbroken.losses
    assert first_difference(digests(unbroken.capture()), digests(resumed.capture())) is None
    assert digests(tree) == captured, "what was restored from must not be written to later"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["plain", "bf16"])
def test_every_optimizer_resumes_exactly(model: str, optimizer: str) -> None:
    if (model, optimizer) in NOT_REPEATABLE:
        pytest.skip("torch does not repeat itself here")
    assert_resumes_exactly(model, optimizer, None, 3, 3, False, False)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("in_window", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_every_model_resumes_exactly(model: str, in_window: bool, used: bool) -> None:
    assert_resumes_exactly(model, "AdamW", "OneCycleLR", 3, 3, in_window, used)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", ["SGD momentum", "AdamW lr tensor"])
def test_every_scheduler_resumes_exactly(scheduler: str, optimizer: str) -> None:
    assert_resumes_exactly("plain", optimizer, scheduler, 4, 6, False, False)


SPARSE: dict[str, Callable[[Any], Optimizer]] = {
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, lr=0.01),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),  # its momentum is sparse too
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


@pytest.mark.parametrize("optimizer", SPARSE)
@pytest.mark.parametrize("in_window", [False, True])
def test_sparse_embeddings_resume_exactly(optimizer: str, in_window: bool) -> None:
    def build(seed: int) -> Training:
        seed_everything(seed)
        model = nn.Embedding(20, 4, sparse=True)
        return Training(model, SPARSE[optimizer](model.parameters()), None, nn.Parameter(torch.zeros(())))

    def train(training: Training, batches: range) -> None:
        for batch in batches:
            gather(training, batch)
            training.optimizer.step()
            training.optimizer.zero_grad()

    def gather(training: Training, batch: int) -> None:
        rows = torch.randint(20, (9,), generator=torch.Generator().manual_seed(batch))
        loss = training.model(rows).square().sum()
        loss.backward()
        training.losses.append(loss.detach().numpy().tobytes())

    unbroken, resumed = build(0), build(1)
    train(unbroken, range(3))
    if in_window:
        gather(unbroken, 3)
        gather(unbroken, 4)
    tree = stored(unbroken.capture())
    unbroken.losses.clear()
    train(unbroken, range(3, 6))
    resumed.restore(tree)
    assert first_difference(digests(tree), digests(resumed.capture())) is None
    train(resumed, range(3, 6))
    assert resumed.losses == unbroken.losses
    assert first_difference(digests(unbroken.capture()), digests(resumed.capture())) is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(sorted(OPTIMIZERS)),
    st.none() | st.sampled_from(sorted(SCHEDULERS)),
    st.integers(0, 4),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
)
def test_any_training_resumes_exactly(
    model: str, optimizer: str, scheduler: str | None, before: int, after: int, in_window: bool, used: bool
) -> None:
    if scheduler in ("CyclicLR", "OneCycleLR") and optimizer in NO_MOMENTUM:
        scheduler = None  # torch refuses them
    if model == "lazy":  # some optimizers ask for shapes; and what has a shape cannot lose it again
        before, optimizer = max(before, 1), "NAdam" if optimizer in ("Muon", "Adagrad") else optimizer
    if (model, optimizer) in NOT_REPEATABLE:
        optimizer = "SGD"
    assert_resumes_exactly(model, optimizer, scheduler, before, after, in_window, used)
