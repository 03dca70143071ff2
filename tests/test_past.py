"""Going back: seek, going on as a run of its own, replay, and divergence when it is not the same again."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trainings
from orchestrator import Callback, Checkpointing, NonFiniteError, Trainer
from orchestrator.divergence import DivergenceError, Expected, same_bits
from orchestrator.errors import ConfigurationError
from orchestrator.past import SeekError
from orchestrator.recovery import CheckpointMismatch, NoCheckpoint
from orchestrator.snapshot.capture import digests
from states import State, Trigger
from states.language import first_illegal_row
from tracking.journal import Journal
from tracking.rows import Loss
from tracking.runs import list_runs


def make(root: Path, **options: Any) -> Trainer:
    return trainings.make(root, val_loader=trainings.loader(16), **options)


def on_disk(root: Path, trainer: Trainer) -> set[Path]:
    moments(
        trainer
    )  # beside a journal that is read SQLite makes two files, whoever reads; who writes removes them
    return {path for path in root.rglob("*") if path.name not in ("lease", "recorder.bin")}


class Watch(Callback):
    """What a question asked afterwards sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on_epoch_begin(self, epoch: int) -> None:
        self.seen.append(("epoch begins", epoch))

    def on_batch_begin(self, batch: int) -> None:
        self.seen.append(("batch begins", self.trainer.epoch, batch))

    def on_batch_end(self, batch: int, metrics: Mapping[str, float]) -> None:
        self.seen.append(("loss", self.trainer.epoch, batch, metrics["loss"]))

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.seen.append(("epoch ends", epoch, metrics["val/loss"]))

    @property
    def losses(self) -> list[float]:
        return [found[3] for found in self.seen if found[0] == "loss"]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, Trainer, list[dict[str, str]], Watch]:
    """A run of 3 epochs of 6 batches, and the digests of its state after each transition."""
    root = tmp_path_factory.mktemp("done")
    watch = Watch()
    trainer = make(root, callbacks=[watch])
    states: list[dict[str, str]] = []
    while trainer.advance() is not None:
        if trainer.state is not State.DONE:
            states.append(state_of(trainer))
    return root, trainer, states, watch


def state_of(trainer: Trainer) -> dict[str, str]:
    tree = trainer._training.snapshots.capture()
    parts = ("model", "optimizers", "gradients", "place", "window", "metrics", "random", "data", "forward")
    return digests({"state": trainer.state.value, **{part: tree[part] for part in parts}})


def moments(trainer: Trainer) -> list[tuple[int, int | None, State]]:
    assert trainer.run is not None
    with Journal.open(trainer.run) as journal:
        rows = [row for row in journal.transitions(scope="train") if row.dest is not State.DONE]
    return [(row.epoch, row.batch if row.batch >= 0 else None, row.dest) for row in rows]


@settings(max_examples=15)
@given(number=st.integers(0, 95))
def test_any_moment_is_reached_bit_for_bit_and_leaves_no_trace(done, number: int) -> None:
    root, trainer, states, _ = done
    epoch, batch, state = moments(trainer)[number]
    files = on_disk(root, trainer)
    again = make(root, callbacks=[Watch()])
    past = again.seek(epoch, batch, state, run=trainer.run.path)
    assert (again.state, again.epoch) == (state, epoch)
    assert state_of(again) == states[number]
    assert again.divergence is None
    assert past.moment.seq <= 133
    again.close()
    assert on_disk(root, trainer) == files


@pytest.mark.parametrize("state", [State.IDLE, State.EPOCH_START, State.FORWARD, State.STEP, State.EPOCH_END])
def test_going_on_is_a_run_of_its_own_linked_to_its_parent(done, state: State, tmp_path: Path) -> None:
    root, trainer, _, _ = done
    again = make(tmp_path)
    per_batch = state in (State.FORWARD, State.STEP)
    moment = () if state is State.IDLE else (1, 4 if per_batch else None)
    past = again.seek(*moment, state=state, run=trainer.run.path)
    before = len(list_runs(root))
    result = again.fit()
    assert result.run != trainer.run.path
    assert len(list_runs(root)) == before
    trainings.assert_equal(trainings.weights(trainer), trainings.weights(again))
    assert again.run is not None
    with Journal.open(again.run) as journal:
        rows = list(journal.transitions())
        assert first_illegal_row(rows) is None
        assert [(row.trigger, row.dest) for row in rows[:2]] == [
            (Trigger.HALT, State.HALTED),
            (Trigger.RESUME, state),
        ]
        assert trainer.run.id in rows[0].note
        parent = journal.run_info().parent
    assert parent is not None
    assert (parent.run, parent.seq, parent.kind) == (trainer.run.id, past.moment.seq, "branch")
    # It can be killed right away: the moment itself is its first checkpoint, and stays.
    first = min(again.run.checkpoints.iterdir(), key=lambda path: path.name)
    assert first.name.startswith("000000002-a1")
    resumed = make(tmp_path)
    resumed.fit(resume=first)
    trainings.assert_equal(trainings.weights(trainer), trainings.weights(resumed))


def test_auto_goes_on_with_the_parent_and_never_with_a_branch(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.advance(until=State.EPOCH_END)
    trainer.advance(until=State.BATCH_END)
    trainer.close()
    branch = make(tmp_path)
    branch.seek(0, 3)
    branch.advance(until=State.BATCH_END)
    branch.close()
    assert len(list_runs(tmp_path)) == 2
    again = make(tmp_path)
    again.start("auto")
    assert again.run == trainer.run
    assert again.batches == 7
    again.close()
    third = make(tmp_path)
    third.fit(resume=branch.run.path)
    assert third.state is State.DONE


def test_saving_in_the_past_begins_the_new_run(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.fit()
    trainer.seek(1, 2, State.BACKWARD)
    assert trainer.run is None
    path = trainer.save().wait()
    assert path.parent.parent == trainer.run.path
    assert trainer.run.path != list_runs(tmp_path)[1].path
    trainer.close()


def test_callbacks_begin_once_more_but_keep_what_the_past_left_them(tmp_path: Path) -> None:
    class Counting(Callback):
        def __init__(self) -> None:
            self.batches = 0

        def on_train_begin(self) -> None:
            self.batches = 0
            torch.rand(1)  # what a beginning draws is no part of what is gone on from

        def on_batch_end(self, batch, metrics) -> None:
            self.batches += 1

        def state_dict(self):
            return {"batches": self.batches}

        def load_state_dict(self, state):
            self.batches = state["batches"]

    trainer = make(tmp_path, callbacks=[Counting()])
    trainer.fit()
    again = make(tmp_path, callbacks=[counting := Counting()])
    again.seek(1, 2)
    assert counting.batches == 8
    again.fit()
    assert counting.batches == 18
    trainings.assert_equal(trainings.weights(trainer), trainings.weights(again))


def test_seek_closes_an_attempt_under_way_and_loses_nothing(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    for _ in range(20):
        trainer.advance()
    trainer.seek(0, 1, State.STEP)
    assert (trainer.state, trainer.batch) == (State.STEP, 1)
    trainer.close()
    whole, again = make(tmp_path / "whole"), make(tmp_path)
    whole.fit()
    again.fit(resume="auto")
    trainings.assert_equal(trainings.weights(whole), trainings.weights(again))


def test_moments_that_never_were(done, tmp_path: Path) -> None:
    root, trainer, _, _ = done
    run = trainer.run.path
    for arguments, words in [
        ({"epoch": 3}, "never in EPOCH_START at epoch 3; .* goes up to epoch 2, batch 5"),
        ({"epoch": 1, "batch": 6}, "never in BATCH_START at epoch 1, batch 6"),
        ({"epoch": 1, "batch": 2, "phase": "g"}, "phase 'g'"),
        ({"epoch": 1, "state": State.DONE}, "a state that training goes on from"),
        ({"batch": 1}, "expected an epoch"),
    ]:
        again = make(root)
        with pytest.raises(SeekError, match=words):
            again.seek(**arguments, run=run)
        assert again.fit  # and it can still be used
        assert again.state is State.IDLE
    with pytest.raises(SeekError, match="no run named"):
        make(tmp_path / "none").seek(1)


def test_seek_needs_the_trainer_of_the_run_and_a_checkpoint_before(done, tmp_path: Path) -> None:
    _, trainer, _, _ = done
    other = trainings.make(tmp_path, model=nn.Linear(6, 3))
    with pytest.raises(CheckpointMismatch, match="model"):
        other.seek(1, run=trainer.run.path)
    sparing = make(tmp_path, checkpoint=Checkpointing(keep_first=False, keep_last=1))
    sparing.fit()
    with pytest.raises(NoCheckpoint, match="keep_first"):
        make(tmp_path).seek(0, 2)
    make(tmp_path).seek(2, None, State.EPOCH_END)


def test_phases_are_told_apart(tmp_path: Path) -> None:
    from orchestrator import Phase

    def build() -> Trainer:
        torch.manual_seed(3)
        model = nn.ModuleDict({"d": trainings.network(), "g": trainings.network()})
        phases = [
            Phase(
                name,
                torch.optim.Adam(model[name].parameters()),
                lambda model, batch, name=name: nn.functional.cross_entropy(model[name](batch[0]), batch[1]),
            )
            for name in ("d", "g")
        ]
        loader = trainings.loader()
        return Trainer(model, phases, None, loader, epochs=2, root=tmp_path, name="gan", log=None, track=None)

    trainer = build()
    trainer.fit()
    again = build()
    again.seek(1, 2, State.BACKWARD, phase="g")
    assert (again.phase, again.state) == ("g", State.BACKWARD)
    again.fit()
    trainings.assert_equal(trainings.weights(trainer), trainings.weights(again))


# -- replay -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "losses", "epochs"),
    [((1, 2), (2, 1), slice(8, 14), 1), (1, 1, slice(6, 12), 1), (0, 2, slice(0, 18), 3),
     ((0, 0), (0, 0), slice(0, 1), 0), ((2, 5), 2, slice(17, 18), 1), ((0, 0), 0, slice(0, 6), 1)],
)  # fmt: skip
def test_a_stretch_again_with_new_hooks(done, first, last, losses: slice, epochs: int) -> None:
    root, trainer, _, watch = done
    files = on_disk(root, trainer)
    question = Watch()
    again = make(root)
    replay = again.replay(first, last, [question], run=trainer.run.path)
    assert question.losses == watch.losses[losses]
    assert replay.batches == len(question.losses)
    assert replay.divergence is None
    assert sum(found[0] == "epoch ends" for found in question.seen) == epochs
    assert (again.state, again.epoch, again.run) == (State.IDLE, -1, None)
    assert on_disk(root, trainer) == files


def test_a_replay_leaves_the_trainer_where_it_stood(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    whole.fit()
    trainer = make(tmp_path)
    question = Watch()
    for number in itertools.count():
        if number % 13 == 3 and trainer.epoch >= 1:
            before = state_of(trainer)
            trainer.replay((0, 1), (0, 2), [question])
            assert state_of(trainer) == before
        if trainer.advance() is None:
            break
    assert len(question.losses) % 2 == 0
    assert question.losses[:2] * (len(question.losses) // 2) == question.losses
    trainings.assert_equal(trainings.weights(whole), trainings.weights(trainer))
    done_state = trainer.replay(1, 2, [question])
    assert (done_state.batches, trainer.state) == (12, State.DONE)
    trainings.assert_equal(trainings.weights(whole), trainings.weights(trainer))
    with Journal.open(trainer.run) as journal:
        assert first_illegal_row(journal.transitions()) is None


def test_hooks_of_a_replay_are_gone_afterwards_also_when_one_raises(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.fit()

    class Failing(Watch):
        def on_batch_end(self, batch, metrics) -> None:
            super().on_batch_end(batch, metrics)
            raise RuntimeError("a wrong question")

    question = Failing()
    weights = trainings.weights(trainer)
    with pytest.raises(RuntimeError, match="a wrong question"):
        trainer.replay(1, 1, [question])
    assert trainer.state is State.DONE
    trainings.assert_equal(weights, trainings.weights(trainer))
    more = make(tmp_path, epochs=4)
    with pytest.raises(RuntimeError, match="a wrong question"):
        more.replay(1, 1, [question])
    more.fit(resume="auto")
    assert len(question.losses) == 2


def test_a_stretch_that_makes_no_sense(done) -> None:
    root, trainer, _, _ = done
    with pytest.raises(SeekError, match="not to come after"):
        make(root).replay((1, 3), (1, 1), run=trainer.run.path)
    with pytest.raises(SeekError, match="never in EPOCH_END at epoch 5"):
        make(root).replay(0, 5, run=trainer.run.path)


# -- divergence ---------------------------------------------------------------------------------------


def drifting(root: Path, drift: list[float], **options: Any) -> Trainer:
    """A training with a part that is in no checkpoint."""

    def forward(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) * (1 + drift[0])

    return trainings.make(root, forward=forward, **options)


def crash(trainer: Trainer, batches: int) -> None:
    class Crash(Exception):
        pass

    def fail() -> None:
        if trainer.batches == batches:
            raise Crash

    trainer.before(Trigger.FORWARD)(fail)
    with pytest.raises(Crash):
        trainer.fit(resume="auto")


@pytest.mark.parametrize("at_once", [1, 16_384])
def test_a_resume_that_is_not_the_same_is_said_at_the_first_loss_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("orchestrator.recovery.LOSSES_AT_ONCE", at_once)  # the others are superseded by then
    drift = [0.0]
    crash(drifting(tmp_path, drift), 10)
    again = drifting(tmp_path, drift)
    again.after(Trigger.STEP)(lambda: drift.__setitem__(0, 1e-6) if again.batch == 1 else None)
    with pytest.warns(UserWarning, match=r"epoch 1, batch 2 \(FORWARD\), done again, has a loss of") as told:
        again.fit(resume="auto")
    assert sum("done again" in str(warning.message) for warning in told) == 1
    assert again.divergence is not None
    assert (again.divergence.epoch, again.divergence.batch) == (1, 2)
    assert again.divergence.recorded != again.divergence.found
    with Journal.open(again.run) as journal:
        assert any("done again" in record.message for record in journal.logs())


def test_a_replay_in_between_does_not_end_the_comparison(tmp_path: Path) -> None:
    drift = [0.0]
    crash(drifting(tmp_path, drift), 10)
    again = drifting(tmp_path, drift)
    again.start(resume="auto")
    again.advance()
    assert again.replay(0, 0).divergence is None
    assert again.divergence is None
    drift[0] = 1e-6
    with pytest.warns(UserWarning, match=r"epoch 1, batch \d+ \(FORWARD\), done again, has a loss of"):
        again.fit()
    assert again.divergence is not None


def test_a_resume_that_is_the_same_says_nothing(tmp_path: Path) -> None:
    crash(drifting(tmp_path, [0.0]), 10)
    again = drifting(tmp_path, [0.0], on_divergence="halt")
    again.fit(resume="auto")
    assert again.divergence is None


def test_a_divergence_halts_where_that_is_asked_for(tmp_path: Path) -> None:
    crash(drifting(tmp_path, [0.0]), 10)
    again = drifting(tmp_path, [1e-6], on_divergence="halt")
    with pytest.raises(DivergenceError, match="epoch 1, batch 0") as raised:
        again.fit(resume="auto")
    assert raised.value.divergence.batch == 0
    assert again.state is State.HALTED
    # The checkpoints from before are there still, and what went wrong can be put right.
    whole, third = drifting(tmp_path / "whole", [0.0]), drifting(tmp_path, [0.0])
    whole.fit()
    third.fit(resume="auto")
    trainings.assert_equal(trainings.weights(whole), trainings.weights(third))


def test_a_forward_that_is_not_the_same_when_it_is_restored(tmp_path: Path) -> None:
    trainer = drifting(tmp_path, [0.0])
    trainer.advance(until=State.FORWARD)
    path = trainer.save().wait()
    trainer.close()
    again = drifting(tmp_path, [1e-6], on_divergence="halt")
    with pytest.raises(DivergenceError, match="epoch 0, batch 0"):
        again.fit(resume=path)
    with pytest.warns(UserWarning, match="done again"):
        drifting(tmp_path, [1e-6]).fit(resume=path)


def test_a_seek_that_is_not_the_same(tmp_path: Path) -> None:
    trainer = drifting(tmp_path, [0.0])
    trainer.fit()
    again = drifting(tmp_path, [1e-6])
    with pytest.warns(UserWarning, match="epoch 0, batch 0"):
        again.seek(0, 4)
    assert again.state is State.BATCH_START
    replay = again.replay(0, 0, run=trainer.run.path)
    assert replay.divergence is not None
    strict = drifting(tmp_path, [1e-6], on_divergence="halt")
    with pytest.raises(DivergenceError):
        strict.seek(0, 4, run=trainer.run.path)


def test_on_divergence_is_checked() -> None:
    with pytest.raises(ConfigurationError, match='expected "warn" or "halt"'):
        trainings.make(Path("unused"), on_divergence="ignore")


@given(
    losses=st.lists(st.floats(), max_size=12),
    start=st.integers(0, 12),
    wrong=st.integers(0, 12),
)
def test_expected_finds_the_first_that_differs(losses: list[float], start: int, wrong: int) -> None:
    recorded = [Loss(n, n // 4, n % 4, "", loss) for n, loss in enumerate(losses)]
    expected = Expected(recorded)
    found = [
        divergence
        for n, loss in list(enumerate([*losses, 1.0]))[start:]
        if (divergence := expected.meet(n // 4, n % 4, "", loss + 1 if n >= wrong else loss)) is not None
    ]
    differ = [n for n, loss in enumerate(losses) if n >= max(start, wrong) and not same_bits(loss, loss + 1)]
    assert [(d.epoch * 4 + d.batch) for d in found] == differ[:1]


# -- a run that halted on a NaN ------------------------------------------------------------------------


def test_a_nan_is_brought_back(tmp_path: Path) -> None:
    batches = list(trainings.loader(shuffle=False))
    batches[2] = (batches[2][0] * float("inf"), batches[2][1])
    trainer = trainings.make(tmp_path, train_loader=batches)
    with pytest.raises(NonFiniteError) as raised:
        trainer.fit()
    error = raised.value
    trainer.seek(error.epoch, error.batch)
    assert trainer.state is State.BATCH_START
    assert not torch.isfinite(trainer.data[0]).all()
    trainer.seek(error.epoch, error.batch, State.FORWARD)
    assert trainer.divergence is None  # a NaN is the NaN that was recorded
    assert trainer.metrics["loss"] != trainer.metrics["loss"]
    trainer.close()
