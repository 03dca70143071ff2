"""`Checkpointing(overhead=...)`: the interval that costs lead to, how they are measured, and what is left alone."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import trainings
from orchestrator import Checkpointing, Trainer
from orchestrator.callbacks.logs import Logging
from orchestrator.callbacks.logs.record import LogRecord
from orchestrator.callbacks.rhythm import Costs, Measured, Rhythm, save_interval
from orchestrator.snapshot.storage import list_checkpoints, read_checkpoint
from states import State, Trigger
from tracking.journal import Journal

seconds = st.floats(0.0, 1e4)
steps = st.floats(1e-5, 1e3)
shares = st.floats(1e-3, 0.99)
costs = st.builds(Costs, stall_s=seconds, slowed_s=seconds, write_s=seconds, step_s=steps)
ages = st.floats(0.0, 1e6) | st.just(math.inf)

# -- the interval: a pure function --------------------------------------------------------------------


@given(costs, shares, ages)
def test_it_keeps_the_bounds_and_is_the_shortest_that_does(cost: Costs, overhead: float, age: float) -> None:
    def kept(batches: int, leeway: float) -> bool:
        span = batches * cost.step_s * leeway
        return (
            cost.stall_s + cost.slowed_s <= overhead * span
            and cost.write_s <= 0.25 * span
            and min(1.0, 0.05 * age) <= span
        )

    interval = save_interval(cost, overhead, age)
    assert interval >= 1
    assert kept(interval, 1 + 1e-9)
    assert interval == 1 or not kept(interval - 1, 1 - 1e-9)


@given(costs, shares, ages)
def test_no_write_outlasts_the_interval(cost: Costs, overhead: float, age: float) -> None:
    assert save_interval(cost, overhead, age) * cost.step_s >= cost.write_s


@given(costs, shares, shares, ages, ages)
def test_more_overhead_and_a_younger_attempt_never_mean_fewer_saves(
    cost: Costs, one: float, other: float, age: float, later: float
) -> None:
    assert save_interval(cost, max(one, other), age) <= save_interval(cost, min(one, other), age)
    assert save_interval(cost, one, min(age, later)) <= save_interval(cost, one, max(age, later))


@given(costs, st.floats(1.0, 100.0), shares)
def test_what_costs_more_is_saved_less_often(cost: Costs, factor: float, overhead: float) -> None:
    dearer = Costs(cost.stall_s * factor, cost.slowed_s * factor, cost.write_s * factor, cost.step_s)
    assert save_interval(dearer, overhead) >= save_interval(cost, overhead)


# -- a training in a world whose times are known ----------------------------------------------------------


@dataclass
class World:
    """A clock, and a training that takes these times; `slowed` is how many times as long a batch is during a write."""

    step: float = 0.01
    stall: float = 0.002
    write: float = 0.05
    slowed: float = 1.0
    now: float = 0.0
    waited: int = 0
    """Saves that would have had to wait for the one before."""

    def __post_init__(self) -> None:
        self.saves: list[int] = []
        self.batches = 0
        self._under_way: _Save | None = None

    def run(self, rhythm: Rhythm, batches: int) -> float:
        """The time that training took longer than without a single save, as a share."""
        began, plain = self.now, 0.0
        for _ in range(batches):
            writing = self._under_way is not None and not self._under_way.ended
            self.now += self.step * (self.slowed if writing else 1.0)
            plain += self.step
            self.batches += 1
            rhythm.computed()
            if rhythm.due:
                self.waited += self._under_way is not None and not self._under_way.ended
                self.saves.append(self.batches)
                save = self._under_way = _Save(self)
                rhythm.saved(save)
                rhythm.goes_on()
                self.now += self.stall
                save.stall_s, save.until = self.stall, self.now + self.write
            else:
                rhythm.goes_on()
        return (self.now - began) / plain - 1


class _Save:
    def __init__(self, world: World) -> None:
        self.world = world
        self.stall_s: float | None = None
        self.until = math.inf

    @property
    def ended(self) -> bool:
        return self.world.now >= self.until


def rhythm_of(world: World, overhead: float = 0.03) -> Rhythm:
    rhythm = Rhythm(overhead, lambda: world.now)
    rhythm.begin()
    return rhythm


@given(
    step=st.floats(1e-3, 1.0),
    stall=st.floats(1e-4, 0.5),
    write=st.floats(1e-3, 3.0),
    slowed=st.floats(1.0, 2.0),
    overhead=st.floats(0.01, 0.3),
)
def test_saving_costs_no_more_than_it_may(
    step: float, stall: float, write: float, slowed: float, overhead: float
) -> None:
    world = World(step, stall, write, slowed)
    rhythm = rhythm_of(world, overhead)
    cost = stall + (write + step) * (slowed - 1)
    batches = 20 * math.ceil(max(cost / overhead, 4 * write, 1.0) / step)
    assume(batches < 20_000)
    world.run(rhythm, batches)  # the first few saves are on top, because nobody knows their cost yet
    assert world.run(rhythm, batches) <= overhead * 1.1
    assert world.waited == 0


def test_it_saves_as_often_as_it_may() -> None:
    world = World(step=0.01, stall=0.05, write=0.1, slowed=1.2)
    found = world.run(rhythm_of(world), 20_000)
    assert 0.025 < found < 0.032


def test_a_slower_machine_is_saved_less_often_and_a_slower_step_more_often() -> None:
    world = World(step=0.01, stall=0.06)
    rhythm = rhythm_of(world)
    world.run(rhythm, 2000)
    usual = world.saves[-1] - world.saves[-2]
    world.stall = 0.6
    world.run(rhythm, 20_000)
    assert world.saves[-1] - world.saves[-2] == pytest.approx(10 * usual, rel=0.1)
    world.stall, world.step = 0.06, 0.1
    world.run(rhythm, 20_000)
    assert world.saves[-1] - world.saves[-2] == pytest.approx(usual / 10, rel=0.25)


def test_one_batch_that_takes_an_hour_changes_next_to_nothing() -> None:
    world = World(stall=0.06)
    rhythm = rhythm_of(world)
    world.run(rhythm, 2000)
    usual = world.saves[-1] - world.saves[-2]
    world.now += 3600
    rhythm.computed()
    rhythm.goes_on()
    world.run(rhythm, usual + 1)
    assert usual / 1.3 <= world.saves[-1] - world.saves[-2] <= usual + 1


def measured_of(*stalls: float, earlier: Any = None) -> Measured:
    measured = Measured(earlier)
    for _ in range(10):
        measured.step(0.5)
    for stall in stalls:
        measured.save(stall, 0.1, [0.5, 0.75])
    return measured


def test_the_first_save_of_an_attempt_which_allocates_is_forgotten() -> None:
    assert measured_of(0.7, 0.02, 0.03).costs is None  # the first has gone, and two are too few
    assert measured_of(0.7, 0.02, 0.03, 0.04).costs == Costs(0.03, 0.25, 0.1, 0.5)


def test_what_earlier_attempts_have_found_is_known_at_once_and_gives_way() -> None:
    state = measured_of(0.7, 0.02, 0.03, 0.04).state_dict()
    rhythm = rhythm_of(World())
    rhythm.know(Measured(state))
    assert rhythm.measured.state_dict() == state
    assert rhythm.measured.costs == Costs(0.03, 0.25, 0.1, 0.5)
    assert measured_of(0.9, earlier=state).costs == Costs(0.035, 0.25, 0.1, 0.5)
    assert measured_of(0.9, *[0.5] * 4, earlier=state).costs == Costs(0.5, 0.25, 0.1, 0.5)


def test_nothing_measured_is_no_state() -> None:
    assert Measured().state_dict() is None
    assert Measured(None).costs is None


def test_it_says_what_it_chose_once_and_when_that_doubles() -> None:
    world = World(stall=0.06)
    rhythm = rhythm_of(world)
    said = []
    for stall in (0.06, 0.07, 0.3):
        world.stall = stall
        for _ in range(6000):
            world.run(rhythm, 1)
            said += filter(None, [rhythm.news()])
    assert ["stalls the training for 60 ms" in said[0], "stalls the training for 300 ms" in said[1]] == [
        True,
        True,
    ]
    assert len(said) == 2
    assert "costs 3.0% of the time" in said[0]


# -- in a training ---------------------------------------------------------------------------------------


def weights(trainer: Any) -> list[torch.Tensor]:
    return list(trainer.model.state_dict().values())


def test_a_save_more_or_less_changes_no_bit(tmp_path: Path) -> None:
    plain = trainings.make(tmp_path / "plain", epochs=30)
    plain.fit()
    saving = trainings.make(
        tmp_path / "saving", epochs=30, checkpoint=Checkpointing(overhead=0.2, keep_last=99)
    )
    saving.fit()
    assert len(list_checkpoints(saving.run.checkpoints)) > 3
    assert plain.history[-1]["loss"] == saving.history[-1]["loss"]
    assert all(map(torch.equal, weights(plain), weights(saving)))


SCRIPT = """
import sys, time
from pathlib import Path
import torch
import trainings
from orchestrator import Checkpointing
from states import Trigger
torch.set_num_threads(int(sys.argv[2]))
trainer = trainings.make(Path(sys.argv[1]), epochs=60, checkpoint=Checkpointing(overhead=0.2))
trainer.after(Trigger.STEP)(lambda: time.sleep(0.02))  # there is time to be killed
trainer.fit()
"""


def test_killed_and_resumed_it_is_exact_and_begins_with_the_interval_it_had(tmp_path: Path) -> None:
    def start(root: Path) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        command = [sys.executable, "-c", SCRIPT, str(root), str(torch.get_num_threads())]
        return subprocess.Popen(command, env=environment)

    def trainer(root: Path) -> Trainer:
        return trainings.make(root, epochs=60, checkpoint=Checkpointing(overhead=0.2))

    killed = tmp_path / "killed"
    process = start(killed)
    while process.poll() is None and not any(known(path) for path in checkpoints_in(killed)):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    unbroken, resumed = trainer(tmp_path / "unbroken"), trainer(killed)
    unbroken.fit()
    resumed.start("auto")
    assert resumed.attempt == 2
    assert resumed._settings.checkpoint._rhythm.measured.state_dict()["saves"]
    resumed.fit()
    assert all(map(torch.equal, weights(unbroken), weights(resumed)))


def checkpoints_in(root: Path) -> list[Path]:
    return [path for run in root.glob("*/checkpoints") for path in list_checkpoints(run)]


def known(checkpoint: Path) -> bool:
    """Whether saves had been measured as it was made."""
    try:
        return bool(read_checkpoint(checkpoint)[1]["callbacks"]["Checkpointing"]["measured"]["saves"])
    except Exception:  # removed meanwhile
        return False


@pytest.mark.long
def test_the_choice_is_told_and_kept(tmp_path: Path) -> None:
    """However long that takes: how many batches a write lasts is the disk's affair."""
    messages: list[str] = []

    def told(record: LogRecord) -> None:
        if record.kind == "message":
            messages.append(record.message)
            trainer.stop("told")

    trainer = trainings.make(
        tmp_path, epochs=100_000, checkpoint=Checkpointing(overhead=0.2), log=Logging(to=[told])
    )
    trainer.fit()
    assert messages[0].startswith("a checkpoint every ")
    with Journal.open(trainer.run) as journal:
        assert messages[0] in [log.message for log in journal.logs()]


@pytest.mark.long
def test_it_can_be_turned_on_and_off_between_attempts(tmp_path: Path) -> None:
    settings = [
        Checkpointing(overhead=0.2),
        Checkpointing(),
        Checkpointing(every_batches=2),
        Checkpointing(overhead=0.1),
    ]
    for attempt, checkpoint in enumerate(settings, start=1):
        trainer = trainings.make(tmp_path, epochs=8 * attempt, checkpoint=checkpoint)
        trainer.fit(resume="auto")
        assert trainer.attempt == attempt
    unbroken = trainings.make(tmp_path / "unbroken", epochs=32)
    unbroken.fit()
    assert all(map(torch.equal, weights(trainer), weights(unbroken)))


def test_with_epochs_or_states_named_as_well(tmp_path: Path) -> None:
    saved = Checkpointing(overhead=0.2, at=State.BACKWARD, every_epochs=7, keep_last=999)
    trainer = trainings.make(tmp_path, epochs=30, checkpoint=saved)

    @trainer.before(Trigger.FETCH)
    def disk_is_fast() -> None:
        trainer._training.attempt.wait_for_save()

    trainer.fit()
    states = {read_checkpoint(path)[0]["state"] for path in list_checkpoints(trainer.run.checkpoints)}
    assert states >= {"IDLE", "BACKWARD", "EPOCH_END", "DONE"}


def test_going_back_measures_and_saves_nothing(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, epochs=30, checkpoint=Checkpointing(overhead=0.2))
    trainer.fit()
    before = trainer._settings.checkpoint.state_dict()
    trainer.replay(1, 20)
    assert trainer._settings.checkpoint.state_dict() == before


def test_another_best_metric_is_no_obstacle_and_the_former_is_not_lost(tmp_path: Path) -> None:
    options = {"val_loader": trainings.loader(16)}
    for number, metric in enumerate(["loss", None, "val/loss", "loss"], start=1):
        trainer = trainings.make(
            tmp_path, epochs=2 * number, checkpoint=Checkpointing(best=metric), **options
        )
        trainer.fit(resume="auto")
        assert trainer.attempt == number
        if metric is not None:
            own = trainer.history if metric == "loss" and number == 1 else trainer.history[-2:]
            assert trainer._settings.checkpoint.best_value == min(epoch[metric] for epoch in own)
