"""The optimizers' state is copied while training goes on, and is nevertheless that of the boundary."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from orchestrator import Callback, Checkpointing, Trainer
from orchestrator.snapshot import deferred
from orchestrator.snapshot.deferred import Deferred, Due, can_wait
from orchestrator.snapshot.info import readable
from orchestrator.snapshot.storage import read_checkpoint
from orchestrator.snapshot.writer import ChangedMeanwhileError, _is_state_of_optimizer
from states import State, Trigger
from tracking.journal import Journal

BATCHES = 6


def due(*sizes: int) -> list[Due]:
    return [Due(f"t{at}", torch.zeros(size), torch.randn(size)) for at, size in enumerate(sizes)]


def copied(all_due: list[Due]) -> bool:
    return all(torch.equal(one.place, one.tensor) for one in all_due)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "_PIECE", 400)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("who", ["thread", "loop", "both"])
def test_either_makes_all_copies_or_both_together(who: str) -> None:
    all_due = due(1, 99, 100, 101, 1000)
    one = Deferred(all_due)
    threads = [
        threading.Thread(target=action)
        for name, action in (("thread", one.work_through), ("loop", one.finish))
        if who in (name, "both")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert copied(all_due)
    assert one.changed == []


@pytest.mark.usefixtures("small_pieces")
def test_what_the_loop_was_broken_off_at_is_copied_by_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "_PATIENCE_S", 0.1)
    all_due = due(300)
    one = Deferred(all_due)
    assert one._take() is not None  # and there a KeyboardInterrupt struck
    thread = threading.Thread(target=one.work_through)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert copied(all_due)


def test_the_loop_does_not_wait_for_a_thread_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Deferred(due(300))
    monkeypatch.setattr(deferred, "memory", lambda tensor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one.work_through()
    one.finish()


def test_what_was_written_to_is_named() -> None:
    all_due = due(10, 20, 30)
    one = Deferred(all_due)
    all_due[1].tensor.mul_(2)
    one.finish()
    assert one.changed == ["t1"]

    after = Deferred(all_due)
    after.finish()
    all_due[0].tensor.zero_()
    assert after.changed == []

    made = Deferred(all_due, made=True)
    all_due[2].tensor.zero_()
    made.finish()
    assert made.changed == ["t2"]


def test_only_large_contiguous_tensors_that_torch_counts_writes_to_can_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deferred, "_LEAST", 400)
    with torch.inference_mode():
        uncounted = torch.zeros(100)
    assert can_wait(torch.zeros(100))
    assert not can_wait(torch.zeros(99))
    assert not can_wait(torch.zeros(10, 20).t())
    assert not can_wait(uncounted)


def test_of_an_optimizer_only_its_state_waits_not_its_parameters() -> None:
    paths = [
        "optimizers/0/state/0.weight/exp_avg",
        "optimizers/1/shared/buffer",
        "optimizers/0/parameters/optimizer/group0/param0",
        "optimizers/0/groups/0/settings/lr",
        "model/parameters/optimizers/0/state/weight",
        "callbacks/EMA/weights/state/0",
    ]
    assert [path for path in paths if _is_state_of_optimizer(path)] == paths[:2]


class Records(Callback):
    """Copies of the optimizer's state at the end of each batch."""

    def __init__(self) -> None:
        self.found: dict[int, list[Tensor]] = {}

    def on_batch_end(self, batch: int, metrics: dict[str, float]) -> None:
        self.found[self.trainer.batches] = moments(self.trainer)


def moments(trainer: Trainer) -> list[Tensor]:
    state = trainer.optimizers[0].state
    return [state[p][key].clone() for p in trainer.model.parameters() for key in ("exp_avg", "exp_avg_sq")]


def made(root: Path, *callbacks: Callback, every: int = 1) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(64, 8)
    data = [(torch.randn(4, 64), torch.randn(4, 8)) for _ in range(BATCHES)]
    return Trainer(
        model,
        torch.optim.Adam(model.parameters()),
        nn.MSELoss(),
        data,
        epochs=1,
        checkpoint=Checkpointing(every_batches=every, keep_last=BATCHES + 1),
        callbacks=callbacks,
        log=None,
        track=None,
        root=root,
    )


def saved(trainer: Trainer) -> dict[int, list[Tensor]]:
    found = {}
    for info in readable(trainer.run.checkpoints):
        state = read_checkpoint(info.path)[1]["optimizers"][0]["state"]
        names = [name for name, _ in trainer.model.named_parameters()]
        if info.state in (State.STEP, State.BATCH_END):
            found[info.batches + (info.state is State.STEP)] = [
                state[n][key] for n in names for key in ("exp_avg", "exp_avg_sq")
            ]
    return found


def assert_same(one: dict[int, list[Tensor]], other: dict[int, list[Tensor]]) -> None:
    for batches, tensors in one.items():
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(tensors, other[batches], strict=True)), (
            batches
        )


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> list[Deferred]:
    found: list[Deferred] = []
    begin = Deferred.__init__

    def init(self: Deferred, *args: object, **options: object) -> None:
        begin(self, *args, **options)  # type: ignore[arg-type]
        found.append(self)

    monkeypatch.setattr(Deferred, "__init__", init)
    return found


@pytest.fixture
def thread_gets_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine all of whose processors are busy: the loop makes every copy before it goes on."""
    work_through = Deferred.work_through

    def starved(self: Deferred) -> None:
        self._complete.wait(0.5)
        work_through(self)

    monkeypatch.setattr(Deferred, "work_through", starved)


@pytest.mark.device
@pytest.mark.parametrize("starved", [False, True])
def test_each_checkpoint_has_the_state_of_its_boundary(
    starved: bool, request: pytest.FixtureRequest, observed: list[Deferred], tmp_path: Path
) -> None:
    if starved:
        request.getfixturevalue("thread_gets_no_turn")
    records = Records()
    with made(tmp_path, records) as trainer:
        trainer.fit()
    assert [one.made for one in observed] == [True] + [False] * BATCHES  # the last: of the epoch
    found = saved(trainer)
    assert sorted(found) == list(range(1, BATCHES + 1))
    assert_same(found, records.found)


@pytest.mark.device
def test_an_optimizer_that_updates_in_backward_is_copied_at_once(
    observed: list[Deferred], tmp_path: Path
) -> None:
    records = Records()
    trainer = made(tmp_path, records)
    state = trainer.optimizers[0].state

    def earlier(parameter: Tensor) -> None:
        if state[parameter]:
            state[parameter]["exp_avg"].mul_(0.5)

    for parameter in trainer.model.parameters():
        parameter.register_post_accumulate_grad_hook(earlier)
    with trainer:
        trainer.fit()
    assert [one.made for one in observed] == [True]
    assert_same(saved(trainer), records.found)


@pytest.mark.device
@pytest.mark.usefixtures("thread_gets_no_turn")
def test_a_save_whose_state_changed_meanwhile_is_made_at_the_next_boundary(
    observed: list[Deferred], tmp_path: Path
) -> None:
    records, handles = Records(), []
    trainer = made(tmp_path, records, every=2)

    @trainer.after(Trigger.FETCH)
    def meddles() -> None:
        if trainer.batches == 4:
            handles.append(trainer._training.attempt._saved[1])
            for state in trainer.optimizers[0].state.values():
                state["exp_avg"].zero_()

    with (
        trainer,
        pytest.warns(UserWarning, match="was not made: found that optimizers/0/state/.* and 1 more"),
    ):
        trainer.fit()
    with pytest.raises(ChangedMeanwhileError):
        handles[0].wait()
    found = saved(trainer)
    # Batch 4's was spoilt while batch 5 was computed: the next is of batch 5's STEP.
    assert sorted(found) == [2, 5, 6]
    assert_same(found, records.found)
    assert [one.made for one in observed] == [True, False]
    with Journal.open(trainer.run) as journal:
        assert any("was not made" in line.message for line in journal.logs())


@pytest.mark.device
def test_between_transitions_that_are_fired_one_by_one_nothing_is_left_to_copy(
    observed: list[Deferred], tmp_path: Path
) -> None:
    trainer = made(tmp_path)
    with trainer:
        trainer.advance(until=State.BATCH_END)
        trainer.save()
        for state in trainer.optimizers[0].state.values():
            state["exp_avg"].zero_()
        trainer.advance(until=State.EPOCH_END)
    assert observed == []
    assert any(moment.any() for moment in saved(trainer)[1])
