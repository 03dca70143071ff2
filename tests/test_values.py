"""Measured values that wait: what is put in is taken in its order, whatever is released meanwhile."""

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracking.values import ROW, VALUES_AT, Values

moments = st.tuples(
    st.sampled_from(["train", "validation/val"]),
    st.sampled_from([0, 1, 1, 2, 3, 8, 9, 17, 9000]),  # keys: the last are more than a page
    st.integers(1, 30) | st.sampled_from([700, 1500]),  # how often
)
parts = st.floats(0, 1)  # how much of what was taken is released


def told(rows: bytes, values: Values) -> list[tuple[Any, ...]]:
    """Each value that `rows` hold."""
    found = []
    for row in ROW.iter_unpack(rows):
        scope, keys, _ = values.kinds[row[VALUES_AT - 1]]
        found += [
            (scope, *row[: VALUES_AT - 1], *named) for named in zip(keys, row[VALUES_AT:], strict=False)
        ]
    return found


@given(st.lists(moments | parts, max_size=12))
def test_what_is_put_in_is_taken_in_its_order(what: list[tuple[str, int, int] | float]) -> None:
    values, waits, seq = Values(lambda: None), [], 0
    for one in what:
        if isinstance(one, float):
            rows = values.take()
            assert told(rows, values) == waits
            assert len(values) == len(rows) // ROW.size
            done = int(one * len(values)) * ROW.size
            values.release(done)
            waits = waits[len(told(rows[:done], values)) :]
            continue
        scope, keys, times = one
        for _ in range(times if keys < 100 else 2):
            seq += 1
            named = {f"k{key}": seq + key / 16384 for key in range(keys)}
            values.put(seq, scope, seq // 9, seq % 9, seq + 7, seq * 1000, named)
            place = (scope, seq, seq // 9, seq % 9, seq + 7, seq * 1000)
            waits += [(*place, key, value) for key, value in named.items()]
    assert told(values.take(), values) == waits


def test_one_thread_puts_in_what_another_takes() -> None:
    values, count = Values(lambda: None), 60_000

    def put() -> None:
        for number in range(count):
            keys = ("a", "b") if number % 1000 else ("a", "b", "c")
            values.put(number, "train", 0, number, number, number, dict.fromkeys(keys, float(number)))

    thread = threading.Thread(target=put)
    thread.start()
    found: list[tuple[Any, ...]] = []
    while thread.is_alive() or len(values):
        rows = values.take()
        found += told(rows, values)
        values.release(len(rows))
    thread.join()
    assert [row[1] for row in found if row[-2] == "a"] == list(range(count))
    assert all(row[-1] == row[1] for row in found)
    assert sum(row[-2] == "c" for row in found) == count / 1000
    assert len(values) == 0


def test_a_page_that_is_just_begun_is_not_forgotten() -> None:
    class Interrupted(list[Any]):
        """The other thread comes in at once."""

        def append(self, page: Any) -> None:
            super().append(page)
            values.release(0)

    values = Values(lambda: None)
    values._pages = Interrupted()
    for number in range(3000):
        if number % 1024 == 0:
            values.release(len(values.take()))
        values.put(number, "train", 0, number, number, 0, {"a": 1.0})
    assert [row[1] for row in told(values.take(), values)] == list(range(2048, 3000))


def test_memory_is_asked_for_first_and_no_part_of_a_moment_is_left() -> None:
    def no_room() -> None:
        raise MemoryError("full")

    asked: list[int] = []
    values = Values(lambda: asked.append(len(values)))
    for number in range(5000):
        values.put(number, "train", 0, number, number, 0, {"a": 1.0})
    assert asked == [0, 1024, 2048, 3072, 4096]

    full = Values(no_room)
    with pytest.raises(MemoryError):
        full.put(0, "train", 0, 0, 0, 0, {f"k{key}": 1.0 for key in range(20)})
    assert full.take() == b""
    assert len(full) == 0


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("wrong", ["low", None])
def test_what_is_no_number_is_refused(known: bool, wrong: Any) -> None:
    values = Values(lambda: None)
    if known:
        values.put(1, "train", 0, 0, 0, 0, {"a": 0.5, "b": 0.5})
    with pytest.raises((TypeError, ValueError)):
        values.put(2, "train", 0, 1, 1, 0, {"a": 1.0, "b": wrong})
    values.put(3, "train", 0, 2, 2, 0, {"a": 2, "b": True})  # these are
    assert [row[-1] for row in told(values.take(), values)] == [*[0.5, 0.5][: 2 * known], 2.0, 1.0]
