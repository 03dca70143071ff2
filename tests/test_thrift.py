"""When the shipper delivers again."""

import os
import time
from pathlib import Path

import pytest

from deliveries import Training, until
from tracking.delivery import Target
from tracking.journal import Journal
from tracking.outbox import Outbox
from tracking.runs import RunFolder
from tracking.shipment import Shipment
from tracking.thrift import Thrift


class Machine:
    """A clock, and the processor time that was spent by it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.spent = 7.0  # what starting took

    def passes(self, seconds: float, spent: float = 0.0) -> None:
        self.now += seconds
        self.spent += spent


@pytest.mark.parametrize(
    ("spent", "pause"),
    [
        pytest.param(0.01, 4.0, id="four hundred times as long as what it took"),
        pytest.param(4.0, 10.0, id="ten seconds at most"),
    ],
)
def test_how_long_the_pause_after_a_delivery_is(spent: float, pause: float) -> None:
    machine = Machine()
    thrift = Thrift(lambda: machine.now, lambda: machine.spent)
    assert thrift.due
    machine.passes(2 * spent, spent=spent)
    thrift.rest()
    machine.passes(pause - 0.01)
    assert not thrift.due
    machine.passes(0.02)
    assert thrift.due


def test_looking_whether_the_training_lives_is_counted_too() -> None:
    machine = Machine()
    thrift = Thrift(lambda: machine.now, lambda: machine.spent)
    machine.passes(0.01, spent=0.001)
    thrift.rest()
    machine.passes(0.41, spent=0.004)
    assert thrift.due
    machine.passes(0.01, spent=0.001)
    thrift.rest()
    machine.passes(1.99)
    assert not thrift.due
    machine.passes(0.02)
    assert thrift.due


def test_what_is_measured_during_a_sending_waits_for_the_next_but_at_the_end(
    run: RunFolder, tmp_path: Path
) -> None:
    training = Training(run)
    with Outbox.open(run.outbox) as outbox, Journal.open(run) as journal:
        shipment = Shipment(run, to_events(tmp_path), outbox, journal, print)

        def sendings() -> int:
            """How often `deliver` says that it should be called again, while more is measured each time."""
            for number in range(5):
                training.batch()
                training.writer.sync()
                if not shipment.deliver(journal.attempts()[-1]):
                    return number
            return 5

        assert sendings() == 1  # finding the run
        before = outbox.view().points
        assert sendings() == 0
        assert outbox.view().points > before
        training.batch()
        training.end()
        (attempt,) = journal.attempts()
        assert shipment.deliver(attempt)
        while shipment.deliver(attempt):
            pass
        assert not shipment.waiting().points


def test_reports_are_made_again_when_they_have_become_a_small_part_of_the_time(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracking.uploads._REPORTS_EVERY_S", 0.0)
    training = Training(run)
    training.batch()
    training.writer.sync()
    with Outbox.open(run.outbox) as outbox, Journal.open(run) as journal:
        shipment = Shipment(run, to_events(tmp_path), outbox, journal, print)
        (attempt,) = journal.attempts()
        while shipment.deliver(attempt):
            pass
        spent_s, began = children_s(), time.monotonic()
        for done in (True, False):  # they are begun, and then there is nothing left
            until(lambda done=done: shipment.upload(attempt) is done)
        made_s = children_s() - spent_s
        assert "curves.png" in outbox.artifacts
        assert made_s > 0.05
        left_s = shipment._uploads._next_reports - time.monotonic()
        assert 400 * made_s - (time.monotonic() - began) < left_s <= 400 * made_s
    training.end()


def to_events(folder: Path) -> Target:
    """Delivery to files of TensorBoard's, which needs no server and no store."""
    place = str(folder / "events")
    backend = "tracking.tensorboard_delivery:open_delivery"
    return Target(backend, place, {"folder": place}, "none", 0.0, "", "1")


def children_s() -> float:
    """The processor time of this process's children that have ended."""
    return os.times().children_user + os.times().children_system
