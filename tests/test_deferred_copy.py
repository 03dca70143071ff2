"""Weights and optimizers' state are copied while training goes on, and are nevertheless those of the boundary."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator import Callback, Checkpointing, Trainer
from orchestrator.snapshot import deferred, writer
from orchestrator.snapshot.deferred import Deferred, Due, can_wait
from orchestrator.snapshot.info import readable
from orchestrator.snapshot.storage import read_checkpoint
from orchestrator.snapshot.writer import OPTIMIZER_STATE, PARAMETERS, ChangedMeanwhileError, _kind
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

    for each in all_due:
        each.place.copy_(each.tensor)
    made = Deferred([one._replace(made=True) for one in all_due])
    assert not made.waits
    all_due[2].tensor.zero_()
    made.finish()
    assert (made.changed, made.unsteady) == ([], ["t2"])


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("who", ["thread", "loop"])
def test_what_is_compared_is_found_where_torch_does_not_count(who: str) -> None:
    all_due = [one._replace(compared=True) for one in due(10, 300, 1000)]
    one = Deferred(all_due)
    all_due[2].tensor.data[777] += 1
    assert all_due[2].tensor._version == 0
    if who == "thread":
        one.work_through()
    one.finish()
    assert one.changed == ["t2"]
    assert copied(all_due)

    after = Deferred(all_due)
    after.work_through()
    all_due[0].tensor.data.zero_()
    after.finish()
    assert after.changed == []

    same = Deferred(all_due)
    all_due[1].tensor.mul_(1)  # is counted, and changes nothing
    same.finish()
    assert same.changed == []

    for each in all_due:
        each.place.copy_(each.tensor)
    made = Deferred([one._replace(made=True) for one in all_due])
    all_due[1].tensor.data[299] += 1
    made.finish()
    assert (made.changed, made.unsteady) == ([], ["t1"])


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
    assert can_wait(torch.zeros(100), compared=True)


def test_what_waits_are_parameters_and_the_state_of_optimizers() -> None:
    kinds = {
        "model/parameters/optimizers/0/state/weight": PARAMETERS,
        "optimizers/0/state/0.weight/exp_avg": OPTIMIZER_STATE,
        "optimizers/1/shared/buffer": OPTIMIZER_STATE,
        "optimizers/0/parameters/optimizer/group0/param0": "",
        "optimizers/0/groups/0/settings/lr": "",
        "model/buffers/0.running_mean": "",
        "model/modes": "",
        "callbacks/EMA/weights/state/0": "",
    }
    assert {path: _kind(path) for path in kinds} == kinds


class Records(Callback):
    """Copies of weights and the optimizer's state at the end of each batch."""

    def __init__(self) -> None:
        self.found: dict[int, list[Tensor]] = {}

    def on_batch_end(self, batch: int, metrics: dict[str, float]) -> None:
        self.found[self.trainer.batches] = large(self.trainer)


def large(trainer: Trainer) -> list[Tensor]:
    state, parameters = trainer.optimizers[0].state, list(trainer.model.parameters())
    moments = [state[p][key].clone() for p in parameters if p in state for key in ("exp_avg", "exp_avg_sq")]
    return [*(p.detach().clone() for p in parameters), *moments]


def made(
    root: Path, *callbacks: Callback, every: int = 1, model: nn.Module | None = None, **options: Any
) -> Trainer:
    torch.manual_seed(0)
    model = model or nn.Linear(64, 8)
    data = [(torch.randn(4, 64), torch.randn(4, 8)) for _ in range(BATCHES)]
    return Trainer(
        model,
        options.pop("optimizer", None) or torch.optim.Adam(model.parameters()),
        nn.MSELoss(),
        data,
        epochs=options.pop("epochs", 1),
        checkpoint=Checkpointing(every_batches=every, keep_last=99),
        callbacks=callbacks,
        log=None,
        track=None,
        root=root,
        **options,
    )


def saved(trainer: Trainer) -> dict[int, list[Tensor]]:
    found = {}
    for info in readable(trainer.run.checkpoints):
        tree = read_checkpoint(info.path)[1]
        state, weights = tree["optimizers"][0]["state"], tree["model"]["parameters"]
        names = [name for name, _ in trainer.model.named_parameters()]
        if info.state in (State.STEP, State.BATCH_END):
            found[info.batches + (info.state is State.STEP)] = [
                *(weights[n] for n in names),
                *(state[n][key] for n in names if n in state for key in ("exp_avg", "exp_avg_sq")),
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
    assert [one.waits for one in observed] == [False] + [True] * BATCHES  # the last: of the epoch
    if trainer.device.type == "cpu":
        assert [
            f"model/parameters/{name}" in one.paths for one in observed for name in ("weight", "bias")
        ] == [
            # not where the epoch ends: there callbacks may write to them
            *[True] * 2 * (BATCHES - 1),
            *[False] * 4,
        ]
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
    deferred_since = [path for one in observed if one.waits for path in one.paths]
    assert not any(path.startswith("optimizers/") for path in deferred_since)
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
    assert [one.waits for one in observed] == [False, True]
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


class Meddling(nn.Linear):
    """A layer whose forward pass writes to its weights in ways that torch does not count, in training."""

    def __init__(self, *batches: int) -> None:
        super().__init__(64, 8)
        self.batches = batches
        self.batch = -1

    def forward(self, inputs: Tensor) -> Tensor:
        self.batch += 1
        if self.batch in self.batches:
            before = self.weight._version
            self.weight.data.mul_(0.9)
            assert self.weight._version == before
        return super().forward(inputs)


@pytest.mark.usefixtures("thread_gets_no_turn")
def test_weights_that_every_forward_pass_writes_to_are_copied_at_once(
    observed: list[Deferred], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    records = Records()
    with made(tmp_path, records, model=Meddling(*range(BATCHES))) as trainer:
        trainer.fit()
    assert_same(saved(trainer), records.found)
    assert observed[0].unsteady == ["model/parameters/weight"]
    waited_for = [path for one in observed if one.waits for path in one.paths]
    assert {path.partition("/")[0] for path in waited_for} == {"optimizers"}
    assert not any("was not made" in str(warning.message) for warning in recwarn)


@pytest.mark.usefixtures("thread_gets_no_turn")
def test_a_save_whose_weights_were_written_to_unseen_is_made_at_the_next_boundary(
    observed: list[Deferred], tmp_path: Path
) -> None:
    records = Records()
    with (
        made(tmp_path, records, every=2, model=Meddling(4)) as trainer,
        pytest.warns(UserWarning, match="was not made: found that model/parameters/weight changed"),
    ):
        trainer.fit()
    found = saved(trainer)
    assert sorted(found) == [2, 5, 6]
    assert_same(found, records.found)


@pytest.mark.usefixtures("thread_gets_no_turn")
@pytest.mark.parametrize(
    "state", [State.BATCH_START, State.FORWARD, State.BACKWARD, State.STEP, State.BATCH_END]
)
def test_weights_are_those_of_any_state_that_is_saved(
    state: State, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Also where a hook at the end of batch or epoch writes to them."""
    expected: dict[int, Tensor] = {}
    trainer = made(tmp_path, every=99, epochs=2)

    @(trainer.before(Trigger.FORWARD) if state is State.FORWARD else trainer.on(state))
    def asks() -> None:
        trainer.save(at=state)
        expected[trainer.batches] = trainer.model.weight.detach().clone()

    @trainer.after(Trigger.END_BATCH)
    def clips() -> None:
        trainer.model.weight.data.clamp_(-0.05, 0.05)
        if state is State.BATCH_END:
            expected[trainer.batches] = trainer.model.weight.detach().clone()

    @trainer.before(Trigger.BEGIN_EPOCH)
    @trainer.before(Trigger.END_EPOCH)
    def shrinks() -> None:
        trainer.model.weight.data.mul_(0.5)

    with trainer:
        trainer.fit()
    found = {
        info.batches: read_checkpoint(info.path)[1]["model"]["parameters"]["weight"]
        for info in readable(trainer.run.checkpoints)
        if info.state is state
    }
    assert len(found) == 2 * BATCHES
    assert all(torch.equal(found[batches], expected[batches]) for batches in found)
    assert not any("was not made" in str(warning.message) for warning in recwarn)


class Swapping(nn.Linear):
    """A layer that has other weights in a validation."""

    swapped = threading.Event()

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            return super().forward(inputs)
        kept = self.weight.detach().clone()
        self.weight.data.zero_()
        self.swapped.set()
        time.sleep(0.2)  # for whoever would copy them now
        outputs = super().forward(inputs)
        self.weight.data.copy_(kept)
        self.swapped.clear()
        return outputs


def test_a_validation_with_other_weights_does_not_meet_a_copy_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    work_through = Deferred.work_through

    def when_swapped(self: Deferred) -> None:
        Swapping.swapped.wait(0.5)
        work_through(self)

    monkeypatch.setattr(Deferred, "work_through", when_swapped)
    records, batch = Records(), (torch.randn(4, 64), torch.randn(4, 8))
    options = {"accumulate": 3, "validate_every": 2, "val_loader": [batch]}
    with made(tmp_path, records, model=Swapping(64, 8), **options) as trainer:
        trainer.fit()
    found = saved(trainer)
    assert sorted(found) == list(range(1, BATCHES + 1))
    assert_same(found, records.found)
    assert not any("was not made" in str(warning.message) for warning in recwarn)


def test_weights_are_copied_at_once_where_torch_uses_every_processor(
    observed: list[Deferred], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "processors", torch.get_num_threads)
    with made(tmp_path) as trainer:
        trainer.fit()
    assert {path.partition("/")[0] for one in observed for path in one.paths} == {"optimizers"}


@pytest.mark.usefixtures("thread_gets_no_turn")
def test_a_save_that_comes_before_the_next_update_ends_the_copy_of_the_one_before(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """In an open window, at whose batches' ends something writes to the weights: told once, and none is lost after."""
    records = Records()
    trainer = made(tmp_path, records, accumulate=2)

    @trainer.before(Trigger.END_BATCH)
    def shrinks() -> None:
        if trainer.batches in (2, 4):
            trainer.model.weight.data.mul_(0.9)

    with trainer:
        trainer.fit()
    assert sum("was not made" in str(warning.message) for warning in recwarn) == 1
    found = saved(trainer)
    assert sorted(found) == [1, 3, 4, 5, 6]
    assert_same(found, records.found)


@pytest.mark.usefixtures("thread_gets_no_turn")
def test_what_fused_kernels_write_is_found_though_torch_does_not_count_it(
    observed: list[Deferred], tmp_path: Path
) -> None:
    records, model = Records(), nn.Linear(64, 8)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    trainer = made(tmp_path, records, model=model, optimizer=optimizer)
    trainer.after(Trigger.BACKWARD)(optimizer.step)
    with trainer:
        trainer.fit()
    assert any("exp_avg" in path for path in observed[0].unsteady)
    assert_same(saved(trainer), records.found)


class Raises(nn.Linear):
    """Writes to its weights unseen in its fifth forward pass, and raises."""

    calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 5:
            self.weight.data.mul_(0.9)
            raise ArithmeticError("and that is all")
        return super().forward(inputs)


@pytest.mark.usefixtures("thread_gets_no_turn")
def test_a_save_that_is_lost_as_training_fails_is_told(tmp_path: Path) -> None:
    records = Records()
    with (
        made(tmp_path, records, model=Raises(64, 8)) as trainer,
        pytest.warns(UserWarning, match="-e0-b3-BATCH_END was not made: found that model/parameters/weight"),
        pytest.raises(ArithmeticError),
    ):
        trainer.fit()
    assert sorted(saved(trainer)) == [1, 2, 3]
    with Journal.open(trainer.run) as journal:
        assert "b2-BATCH_END" in journal.last_transition().note


@pytest.mark.usefixtures("thread_gets_no_turn")
def test_an_evaluation_with_other_weights_does_not_spoil_a_save(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    records, batch = Records(), (torch.randn(4, 64), torch.randn(4, 8))
    trainer = made(tmp_path, records)

    @trainer.after(Trigger.FETCH)
    def evaluates() -> None:
        kept = trainer.model.weight.detach().clone()
        trainer.evaluate([batch])
        assert torch.equal(trainer.model.weight, kept)
        assert trainer._training.work.copying is None

    with trainer:
        trainer.fit()
    assert_same(saved(trainer), records.found)
    assert not any("was not made" in str(warning.message) for warning in recwarn)


def test_at_a_halt_everything_is_copied_at_once(observed: list[Deferred], tmp_path: Path) -> None:
    trainer = made(tmp_path, every=99)

    @trainer.on(State.BACKWARD)
    def halts() -> None:
        if trainer.batches == 3:
            trainer.halt("enough")

    with trainer:
        assert trainer.fit().state is State.HALTED
    assert observed == []
    assert readable(trainer.run.checkpoints)[0].state is State.BACKWARD


def test_storages_can_be_resized_after_a_save(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    with trainer:
        trainer.fit()
    for tensor in [trainer.model.weight.data, trainer.optimizers[0].state[trainer.model.weight]["exp_avg"]]:
        tensor.resize_(4 * tensor.numel())
