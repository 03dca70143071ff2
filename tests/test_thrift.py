"""When the shipper delivers again."""

from tracking.thrift import Thrift


class Machine:
    """A clock, and the processor time that was spent by it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.spent = 7.0  # what starting took

    def passes(self, seconds: float, spent: float = 0.0) -> None:
        self.now += seconds
        self.spent += spent


def test_a_pause_is_four_hundred_times_as_long_as_what_delivering_took() -> None:
    machine = Machine()
    thrift = Thrift(lambda: machine.now, lambda: machine.spent)
    assert thrift.due
    machine.passes(0.02, spent=0.01)
    thrift.rest()
    machine.passes(3.99)
    assert not thrift.due
    machine.passes(0.02)
    assert thrift.due


def test_no_pause_is_longer_than_ten_seconds() -> None:
    machine = Machine()
    thrift = Thrift(lambda: machine.now, lambda: machine.spent)
    machine.passes(4.0, spent=4.0)
    thrift.rest()
    machine.passes(9.9)
    assert not thrift.due
    machine.passes(0.2)
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
