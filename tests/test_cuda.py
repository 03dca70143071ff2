"""On a real CUDA device, by `make test-cuda`: nothing waits, and however a training is interrupted, it is exact."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from test_accelerators import (
    accuracy,
    everything,
    fused,
    fused_momentum,
    interrupted_equals_unbroken,
    journaled,
    without_statistics,
)
from test_exact_property import CUTS, Cut
from test_numerics import parameters, poisoned
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, TensorDataset

import trainings
from exactness import assert_same, assert_sound, ending
from orchestrator import EMA, Checkpointing, GradientStatistics, NonFiniteError, late
from orchestrator.data import BatchStream
from orchestrator.data.carrying import CudaCarrier
from orchestrator.snapshot.info import readable
from orchestrator.snapshot.storage import read_checkpoint
from orchestrator.snapshot.writer import CheckpointWriter
from random_trainings import Description, descriptions
from states import State, Trigger
from tracking.runs import list_runs

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("nonfinite", ["halt", "skip"])
def test_cuda_never_waits_within_an_epoch(nonfinite: str, tmp_path: Path) -> None:
    """torch raises at every call that synchronises; pageable memory is left to the processor's batches."""
    loader = trainings.loader(pin_memory=True)
    trainer = trainings.make(
        tmp_path, device="cuda", optimizer=fused, nonfinite=nonfinite, train_loader=loader, clip_grad_norm=0.5,
        metrics={"accuracy": accuracy}, callbacks=[GradientStatistics(every_batches=1)], checkpoint=None,
    )  # fmt: skip
    strictly = torch.cuda.set_sync_debug_mode
    trainer.after(Trigger.FETCH)(lambda: strictly("error" if trainer.batches >= 2 else "default"))
    trainer.before(Trigger.END_EPOCH)(lambda: strictly("default"))
    try:
        assert trainer.fit().state is State.DONE
    finally:
        strictly("default")


def test_cuda_sends_numbers_as_they_are_at_that_point() -> None:
    link = late.CudaLink(torch.device("cuda"))
    big = torch.randn(4096, 4096, device="cuda")
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool):
        value = torch.ones(3, 2, device="cuda").to(dtype).t()
        for _ in range(20):
            big = big @ big / 4096  # keeps the device busy
        array = link.send(value)
        value.zero_()
        mark = link.mark()
        mark.synchronize()
        assert mark.query()
        assert array.tolist() == [1.0] * 6


@pytest.mark.parametrize("make", [fused, fused_momentum, None])
def test_cuda_halts_with_the_weights_from_before(make: Any, tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, device="cuda", optimizer=make, train_loader=poisoned(3))
    before: dict[int, dict[str, torch.Tensor]] = {}
    trainer.after(Trigger.END_BATCH)(lambda: before.update({trainer.batch: parameters(trainer)}))
    with pytest.raises(NonFiniteError, match="epoch 0, batch 3"):
        trainer.fit()
    trainings.assert_equal(parameters(trainer), before[2])


def test_cuda_carries_batches_whole(tmp_path: Path) -> None:
    """By their own stream, used at once: what is computed from them is what the processor would."""
    dataset = TensorDataset(torch.randn(512, 4096))
    for workers, pins in ((0, False), (0, True), (2, True)):
        loader = DataLoader(dataset, 32, num_workers=workers, pin_memory=pins)
        stream = BatchStream(loader)
        stream.carry_by(CudaCarrier(torch.device("cuda")))
        stream.begin_epoch(0)
        sums = []
        while stream.has_next:
            (inputs,) = stream.fetch()
            sums.append((inputs @ inputs.T).sum())
            del inputs  # its memory may be given to the next one
        expected = [(part @ part.T).sum() for part in dataset.tensors[0].cuda().split(32)]
        assert torch.equal(torch.stack(sums), torch.stack(expected))
        stream.close()


def test_copies_from_a_device_are_complete(tmp_path: Path) -> None:
    weight = torch.ones(4_000_000, device="cuda")
    image = torch.randn(4, 3, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    expected = image.cpu()
    with CheckpointWriter(tmp_path) as writer:
        for seq in range(1, 4):
            weight.fill_(seq)
            handle = writer.submit(f"{seq:09}-a1-IDLE", {"w": weight, "i": image}, {})
            weight.fill_(-1)
            assert writer._staging._memory.is_pinned()
            _, found = read_checkpoint(handle.wait())
            assert found["w"].eq(seq).all()
            assert torch.equal(found["i"], expected)


@pytest.mark.parametrize(
    "options",
    [
        everything(),
        everything(optimizer=fused_momentum, accumulate=4, accumulate_weighting="samples"),
        everything(
            optimizer=None, val_loader=trainings.loader(shuffle=False), validate_every=4, precision="bf16"
        ),
        everything(nonfinite="skip", train_loader=poisoned(0, 3), callbacks=[EMA(0.9)]),
        everything(precision="fp16"),
    ],
)
def test_what_comes_late_is_what_came_at_once(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for way in ("late", "at once"):
        if way == "at once":
            monkeypatch.setattr(late, "link_to", lambda device: None)
        chosen = {**options, "log": None, "callbacks": [type(c)() for c in options["callbacks"]]}
        trainer = trainings.make(tmp_path / way, **chosen)
        assert trainer.device.type == "cuda"
        if options.get("precision") == "fp16":  # begins with overflows
            scaler = trainer._training.work.precision.scalers[0]
            scaler._lazy_init_scale_growth_tracker(trainer.device)
            scaler._scale.fill_(2.0**40)
        trainer.fit()
        assert_sound(trainer.run)
        found.append((without_statistics(ending(trainer)), journaled(trainer.run)))
    (came_late, written_late), (at_once, written_at_once) = found
    assert_same(at_once, came_late)
    assert_same(written_at_once, written_late)


def convolutions() -> torch.nn.Module:
    return torch.nn.Sequential(
        *(torch.nn.Unflatten(1, (6, 1, 1)), torch.nn.Conv2d(6, 16, 3, padding=1), torch.nn.BatchNorm2d(16)),
        *(torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Flatten(), torch.nn.Linear(16, 3)),
    ).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "options",
    [
        {"model": convolutions, "precision": "bf16"},
        {"model": lambda: torch.compile(trainings.network(), dynamic=False)},
        {"model": lambda: torch.compile(trainings.network(), dynamic=False), "precision": "fp16"},
        {"train_loader": trainings.loader(num_workers=2, pin_memory=True), "callbacks": [EMA(0.9)]},
    ],
    ids=["channels_last", "compile", "compile, fp16", "workers, EMA"],
)
def test_what_is_fast_is_exact(options: dict[str, Any], tmp_path: Path) -> None:
    def made(root: Path) -> Any:
        callbacks = [EMA(0.9)] if "callbacks" in options else []
        return trainings.make(root, **{"optimizer": fused, **options, "callbacks": callbacks})

    unbroken = made(tmp_path / "unbroken")
    unbroken.fit()
    for stop in (State.BACKWARD, State.STEP, State.EPOCH_END):
        broken = made(tmp_path / "broken")
        broken.start("auto")
        broken.advance(until=State.BATCH_END)
        broken.advance(until=stop)
        broken.close()
    broken = made(tmp_path / "broken")
    broken.fit(resume="auto")
    assert_same(ending(unbroken), ending(broken))
    assert_same(journaled(unbroken.run), journaled(broken.run))


_TRAINING = """
import os, pickle, signal, sys
from pathlib import Path
import torch, trainings
from exactness import ending
from orchestrator import EMA, Checkpointing
from states import Trigger
root, dies_at = Path(sys.argv[1]), int(sys.argv[2])
trainer = trainings.make(
    root, optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True), precision="fp16",
    callbacks=[EMA(0.9)], checkpoint=Checkpointing(every_batches=2), clip_grad_norm=0.5, accumulate=2,
    train_loader=trainings.loader(num_workers=2, pin_memory=True), val_loader=trainings.loader(16),
)
assert trainer.device.type == "cuda"
done = 0
def count():
    global done
    done += 1
    if done == dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
for trigger in Trigger:
    trainer.after(trigger)(count)
trainer.fit("auto")
(root / "ending").write_bytes(pickle.dumps(ending(trainer)))
"""


def test_a_training_killed_again_and_again_is_exact(tmp_path: Path) -> None:
    def process(root: Path, dies_at: int) -> int:
        command = [sys.executable, "-W", "ignore", "-c", _TRAINING, str(root), str(dies_at)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(command, env=environment).returncode

    assert process(tmp_path / "unbroken", 0) == 0
    for dies_at in (23, 17, 41, 30):
        assert process(tmp_path / "killed", dies_at) == -signal.SIGKILL
    assert process(tmp_path / "killed", 0) == 0
    unbroken, killed = (
        pickle.loads((tmp_path / name / "ending").read_bytes()) for name in ("unbroken", "killed")
    )
    assert_same(unbroken, killed)
    (run,) = list_runs(tmp_path / "killed")
    assert_sound(run)


def test_workers_outlive_what_trainings_before_left_behind(tmp_path: Path) -> None:
    """A worker is a fork of this process; it must not take apart what it cannot: memory and events of the device."""
    for number in range(2):
        trainer = trainings.make(
            tmp_path / str(number), optimizer=fused, train_loader=trainings.loader(pin_memory=True), epochs=1
        )
        trainer.around = trainer  # garbage that only the collector finds
        trainer.fit()
        del trainer
        loader = DataLoader(Collecting(), 4, num_workers=2, pin_memory=True)
        again = trainings.make(tmp_path / f"{number} again", optimizer=fused, train_loader=loader, epochs=2)
        assert again.fit().state is State.DONE


class Collecting(Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        import gc

        gc.collect()
        return trainings.data()[index]


@pytest.mark.parametrize("makes", [fused, None])
def test_each_checkpoint_has_the_state_of_its_boundary(makes: Any, tmp_path: Path) -> None:
    """Large enough that the device still copies when the next update is asked for, and busy with other things."""
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048) for _ in range(8)))
    batch = torch.randn(512, 2048), torch.randn(512, 2048)
    trainer = trainings.make(
        tmp_path, model=model, optimizer=makes, loss_fn=torch.nn.MSELoss(), train_loader=[batch] * 8, epochs=1,
        checkpoint=Checkpointing(every_batches=1, keep_last=20),
    )  # fmt: skip

    def state() -> list[torch.Tensor]:
        of_optimizer = trainer.optimizers[0].state
        return [
            tensor.clone()
            for parameter in trainer.model.parameters()
            for tensor in (
                parameter.detach(),
                *(of_optimizer[parameter][k] for k in ("exp_avg", "exp_avg_sq")),
            )
        ]

    expected: dict[int, list[torch.Tensor]] = {}
    trainer.after(Trigger.END_BATCH)(lambda: expected.update({trainer.batches: state()}))
    trainer.fit()
    found = 0
    for info in readable(trainer.run.checkpoints):
        if info.state is State.BATCH_END:
            tree = read_checkpoint(info.path)[1]
            names = [name for name, _ in trainer.model.named_parameters()]
            of_optimizer = tree["optimizers"][0]["state"]
            saved = [
                tensor
                for name in names
                for tensor in (
                    tree["model"]["parameters"][name],
                    *(of_optimizer[name][k] for k in ("exp_avg", "exp_avg_sq")),
                )
            ]
            for one, other in zip(saved, expected[info.batches], strict=True):
                assert torch.equal(one, other.cpu()), info.path.name
            found += 1
    assert found == 8


@settings(max_examples=12)
@given(descriptions(), CUTS)
def test_interrupted_equals_unbroken(description: Description, cuts: list[Cut]) -> None:
    interrupted_equals_unbroken(description, cuts)


def test_few_operations_of_the_device_are_added(tmp_path: Path) -> None:
    """Each costs the processor as much as one of a small layer: those of a bare loop that reads nothing, and these."""
    batch = torch.randn(32, 6).pin_memory(), torch.randint(3, (32,)).pin_memory()
    model = trainings.network(dropout=0.0).cuda()
    optimizer = fused_momentum(model)

    def step() -> None:
        inputs, targets = (tensor.cuda(non_blocking=True) for tensor in batch)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    counted: dict[str, dict[int, Counter[str]]] = {"bare": {}, "ours": {}}
    for batches in (10, 30):
        counted["bare"][batches] = operations(lambda times=batches: [step() for _ in range(times)])
        trainer = trainings.make(
            tmp_path / str(batches), model=lambda: trainings.network(dropout=0.0), optimizer=fused_momentum,
            train_loader=[batch] * batches, epochs=1, checkpoint=None,
        )  # fmt: skip
        counted["ours"][batches] = operations(trainer.fit)
    bare, ours = (counts[30] - counts[10] for counts in counted.values())
    more = {name: (ours[name] - bare[name]) / 20 for name in {*bare, *ours} if ours[name] != bare[name]}
    assert sum(bare.values()) >= 20 * 10
    assert {name for name, number in more.items() if number > 0} == {
        "_foreach_norm", "stack", "_amp_foreach_non_finite_check_and_unscale_", "copy_"
    }  # fmt: skip
    assert sum(more.values()) <= 4


class Operations(TorchDispatchMode):
    """Counts those that a device is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in _MERELY_ALLOCATE:
            tensors = pytree.tree_leaves((args, kwargs, found))
            if any(isinstance(tensor, torch.Tensor) and tensor.is_cuda for tensor in tensors):
                self.names[func.overloadpacket.__name__] += 1
        return found


_MERELY_ALLOCATE = {
    "empty",
    "empty_like",
    "empty_strided",
    "detach",
    "record_stream",
    "is_pinned",
    "_to_copy",
}


def operations(action: Callable[[], object]) -> Counter[str]:
    with Operations() as counting:
        action()
    return counting.names
