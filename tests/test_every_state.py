"""A checkpoint of each of the ten states, taken in each way there is, goes on to the same end."""

from pathlib import Path

import pytest
import torch
from torch import nn

import trainings
from orchestrator import Checkpointing, Phase, Trainer
from orchestrator.errors import ConfigurationError, TaintedError
from orchestrator.snapshot.info import info_of
from states import State, Trigger
from states.language import first_illegal_row
from tracking.journal import Journal

pytestmark = pytest.mark.device
BATCH_STATES = [State.BATCH_START, State.FORWARD, State.BACKWARD, State.STEP, State.BATCH_END]


def make(root: Path, **options) -> Trainer:
    return trainings.make(root, val_loader=trainings.loader(16), epochs=2, **options)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {**dict(trainer.model.named_parameters()), **dict(trainer.model.named_buffers())}


def measured(trainer: Trainer) -> list[dict[str, float]]:
    return [{k: v for k, v in epoch.items() if k != "duration"} for epoch in trainer.history]


def assert_goes_on_to_the_same_end(whole: Trainer, checkpoint: Path, again: Trainer) -> None:
    again.fit(resume=checkpoint)
    trainings.assert_equal(weights(whole), weights(again))
    assert measured(whole) == measured(again)
    assert again.divergence is None
    with Journal.open(again.run) as journal:
        assert first_illegal_row(journal.transitions()) is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Trainer:
    trainer = make(tmp_path_factory.mktemp("whole"))
    trainer.fit()
    return trainer


def save_standing_there(trainer: Trainer, state: State) -> Path:
    if state is not State.IDLE:
        for _ in range(8):  # beyond the first batch
            trainer.advance()
        if state is State.HALTED:
            trainer.halt("enough")
        trainer.advance(until=state)
    return trainer.save().wait()


def save_from_a_hook(trainer: Trainer, state: State) -> Path:
    saves = []
    trainer.on(state)(lambda: saves.append(trainer.save()) if not saves else None)
    for _ in range(8):
        trainer.advance()
    if state is State.HALTED:
        trainer.halt("enough")
    while not saves and trainer.advance():
        pass
    return saves[0].wait()


def save_when_it_gets_there(trainer: Trainer, state: State) -> Path:
    for _ in range(0 if state is State.IDLE else 8):
        trainer.advance()
    save = trainer.save(at=state)
    if state is State.HALTED:
        trainer.halt("enough")
    while trainer.state is not state and trainer.advance(until=state):
        pass
    return save.wait()


@pytest.mark.parametrize("state", list(State))
def test_saved_standing_there(whole: Trainer, state: State, tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.start()
    path = save_standing_there(trainer, state)
    trainer.close()
    assert info_of(path).state is state or state is State.HALTED
    assert_goes_on_to_the_same_end(whole, path, make(tmp_path))


@pytest.mark.parametrize("state", [s for s in State if s is not State.IDLE])
def test_saved_when_it_gets_there(whole: Trainer, state: State, tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.start()
    path = save_when_it_gets_there(trainer, state)
    trainer.close()
    assert info_of(path).state is state
    assert_goes_on_to_the_same_end(whole, path, make(tmp_path))


@pytest.mark.parametrize("state", [s for s in State if s not in (State.IDLE, State.FORWARD)])
def test_saved_from_a_hook(whole: Trainer, state: State, tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.start()
    path = save_from_a_hook(trainer, state)
    trainer.close()
    assert info_of(path).state is state
    assert_goes_on_to_the_same_end(whole, path, make(tmp_path))


@pytest.mark.parametrize("state", [*BATCH_STATES, State.EPOCH_START, State.EPOCH_END])
def test_checkpointing_at_a_state(whole: Trainer, state: State, tmp_path: Path) -> None:
    policy = Checkpointing(every_batches=5 if state in BATCH_STATES else None, at=state, keep_last=9)
    trainer = make(tmp_path, checkpoint=policy)
    result = trainer.fit()
    infos = [info_of(path) for path in sorted((result.run / "checkpoints").iterdir())]
    there = [info for info in infos if info.state is state]
    if state in BATCH_STATES:
        assert [(info.epoch, info.batch) for info in there][:2] == [(0, 4), (1, 3)]
    else:
        assert [info.epoch for info in there] == [0, 1]
    trainings.assert_equal(trainings.weights(whole), trainings.weights(trainer))
    for info in there:
        if info.epoch < 1:  # the one of the last epoch has nothing left to do but to finish
            assert_goes_on_to_the_same_end(whole, info.path, make(tmp_path))


def test_checkpointing_at_halted(whole: Trainer, tmp_path: Path) -> None:
    trainer = make(tmp_path, checkpoint=Checkpointing(at=State.HALTED))
    trainer.start()
    trainer.advance(until=State.BACKWARD)
    trainer.halt("enough")
    trainer.advance()
    newest = max((info_of(path) for path in trainer.run.checkpoints.iterdir()), key=lambda info: info.seq)
    assert newest.state is State.HALTED
    again = make(tmp_path)
    again.start("auto")
    assert again.state is State.BACKWARD
    again.fit()
    trainings.assert_equal(weights(whole), weights(again))


@pytest.mark.parametrize("at", [State.FORWARD, [State.STEP, State.BATCH_END]])
def test_a_state_of_a_batch_needs_a_schedule(at) -> None:
    with pytest.raises(ConfigurationError, match="how often"):
        Checkpointing(at=at)
    with pytest.raises(ConfigurationError, match="at is 'FORWARDS'; expected a State"):
        Checkpointing(every_batches=1, at=["STEP", "FORWARDS"])


class Changes(nn.Module):
    """What a forward pass can change: buffers, extra state, generators; and it logs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = trainings.network()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)
        self.calls = 0

    def forward(self, inputs):
        self.seen += len(inputs)
        self.calls += 1
        return self.inner(inputs + torch.rand(()) * 0.1)

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_forward_is_done_again_once_and_on_what_was_before_it(accumulate: int, tmp_path: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    def build(root: Path) -> Trainer:
        def forward(model, batch):
            outputs = model(batch[0])
            trainer.log("spread", outputs.std())
            return nn.functional.cross_entropy(outputs, batch[1]), outputs, batch[1]

        torch.manual_seed(1)
        trainer = trainings.make(
            root,
            model=Changes(),
            forward=forward,
            metrics={"accuracy": torchmetrics.Accuracy("multiclass", num_classes=3)},
            accumulate=accumulate,
            nonfinite="skip",
            epochs=2,
        )
        trainer.after(Trigger.FORWARD)(lambda: torch.rand(3))  # a hook that draws, too
        trainer.after(Trigger.FORWARD)(lambda: trainer.log("hooked", 1.0))
        return trainer

    whole = build(tmp_path / "whole")
    whole.fit()
    for cut in (1, 4, 9):
        trainer = build(tmp_path / str(cut))
        trainer.start()
        for _ in range(cut):
            trainer.advance(until=State.FORWARD)
        path = trainer.save().wait()
        assert info_of(path).state is State.FORWARD
        again = build(tmp_path / str(cut))
        trainer.close()
        assert_goes_on_to_the_same_end(whole, path, again)
        assert (again.model.calls, int(again.model.seen)) == (whole.model.calls, int(whole.model.seen))


def test_forward_of_a_lazy_module(tmp_path: Path) -> None:
    def build(root: Path) -> Trainer:
        torch.manual_seed(2)
        model = nn.Sequential(nn.LazyLinear(8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        return trainings.make(
            root, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), epochs=1
        )

    whole = build(tmp_path / "whole")
    whole.fit()
    trainer = build(tmp_path / "cut")
    trainer.advance(until=State.FORWARD)
    path = trainer.save().wait()
    trainer.close()
    assert_goes_on_to_the_same_end(whole, path, build(tmp_path / "cut"))


def test_forward_of_the_second_phase(tmp_path: Path) -> None:
    def build(root: Path) -> Trainer:
        torch.manual_seed(3)
        model = nn.ModuleDict({"d": trainings.network(), "g": trainings.network()})

        def phase(name: str) -> Phase:
            def forward(model, batch):
                return nn.functional.cross_entropy(model[name](batch[0]), batch[1])

            return Phase(name, torch.optim.Adam(model[name].parameters()), forward)

        return Trainer(
            model,
            [phase("d"), phase("g")],
            None,
            trainings.loader(),
            epochs=1,
            root=root,
            name="test",
            log=None,
            track=None,
        )

    whole = build(tmp_path / "whole")
    whole.fit()
    trainer = build(tmp_path / "cut")
    trainer.advance(until=State.FORWARD)
    trainer.advance(until=State.FORWARD)
    assert trainer.phase == "g"
    path = trainer.save().wait()
    trainer.close()
    again = build(tmp_path / "cut")
    again.start(resume=path)
    assert (again.state, again.phase, list(again.metrics)) == (
        State.FORWARD,
        "g",
        ["loss/d", "loss", "grad_norm", "loss/g"],
    )
    again.fit()
    trainings.assert_equal(weights(whole), weights(again))
    assert measured(whole) == measured(again)


def test_a_save_that_does_not_name_forward_moves_on(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    saves = []
    trainer.after(Trigger.FORWARD)(lambda: saves.append(trainer.save()) if not saves else None)
    trainer.start()
    trainer.advance(until=State.BATCH_END)
    assert info_of(saves[0].wait()).state is State.BACKWARD
    trainer.close()


def test_a_halt_that_strikes_in_forward_saves_there_or_moves_on(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.advance(until=State.FORWARD)
    trainer.close()  # a copy was kept, as advance stopped here
    assert any("FORWARD" in p.name for p in trainer.run.checkpoints.iterdir())
    trainer = make(tmp_path / "moved")
    trainer.after(Trigger.FORWARD)(lambda: trainer.halt("now"))
    trainer.fit()
    assert any("BACKWARD" in p.name for p in trainer.run.checkpoints.iterdir())


def test_nothing_can_be_saved_of_a_training_that_failed(tmp_path: Path) -> None:
    trainer = make(tmp_path, checkpoint=Checkpointing(at=State.HALTED))
    later = []
    trainer.after(Trigger.FETCH)(
        lambda: later.append(trainer.save(at=State.STEP)) if trainer.batch == 2 else None
    )

    def fail():
        if trainer.batch == 2:
            raise RuntimeError("broken")

    trainer.before(Trigger.BACKWARD)(fail)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit()
    with pytest.raises(TaintedError, match="broken"):
        later[0].wait(5)
    with pytest.raises(TaintedError):
        trainer.save()
    assert not any("HALTED" in path.name for path in trainer.run.checkpoints.iterdir())


def test_a_save_for_a_state_that_is_not_reached_is_answered(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.advance(until=State.BATCH_END)
    save = trainer.save(at=State.EPOCH_END)
    trainer.close()
    with pytest.raises(TaintedError, match="HALTED"):
        save.wait(5)


def test_the_copy_of_forward_is_made_only_where_it_is_asked_for(tmp_path: Path) -> None:
    trainer = make(tmp_path, checkpoint=Checkpointing(every_batches=4, at=State.FORWARD))
    kept = []
    trainer.after(Trigger.FORWARD)(lambda: kept.append(trainer._training.work.before_forward is not None))
    trainer.fit()
    assert kept == [(batch + 1) % 4 == 0 for batch in range(12)]
