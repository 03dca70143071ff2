"""The language of legal words: every walk over a table is legal, and a change in it is found where it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transitions import Machine, MachineError

from states.language import (
    JournalReader,
    Move,
    Reader,
    Violation,
    first_illegal,
    first_illegal_row,
    is_legal,
    legal_triggers,
    words,
)
from states.table import EVALUATION, TERMINAL, TRAINING, Row, State, Trigger, arcs, event_name

TABLES = {"training": TRAINING, "evaluation": EVALUATION}


def move(trigger: str, source: str, dest: str) -> Move:
    return Move(Trigger(trigger), State(source), State(dest))


EPOCH = (
    move("begin_epoch", "IDLE", "EPOCH_START"),
    move("fetch", "EPOCH_START", "BATCH_START"),
    move("forward", "BATCH_START", "FORWARD"),
    move("backward", "FORWARD", "BACKWARD"),
    move("step", "BACKWARD", "STEP"),
    move("end_batch", "STEP", "BATCH_END"),
    move("end_epoch", "BATCH_END", "EPOCH_END"),
    move("finish", "EPOCH_END", "DONE"),
)
PASS = (
    move("begin_epoch", "IDLE", "EPOCH_START"),
    move("fetch", "EPOCH_START", "BATCH_START"),
    move("forward", "BATCH_START", "FORWARD"),
    move("end_batch", "FORWARD", "BATCH_END"),
    move("end_epoch", "BATCH_END", "EPOCH_END"),
    move("finish", "EPOCH_END", "DONE"),
)


def walk(data: st.DataObject, table: tuple[Row, ...], longest: int = 40) -> list[Move]:
    """A random word: from IDLE along the arcs of the table."""
    state, made = State.IDLE, list[Move]()
    for _ in range(data.draw(st.integers(0, longest))):
        onward = [arc for arc in arcs(table) if arc.source is state]
        if not onward:
            break
        arc = data.draw(st.sampled_from(onward))
        made.append(Move(arc.trigger, arc.source, arc.dest))
        state = arc.dest
    return made


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@given(data=st.data())
def test_every_walk_is_legal(table: tuple[Row, ...], data: st.DataObject) -> None:
    word = walk(data, table)
    assert first_illegal(word, table) is None
    assert is_legal(word, table)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@given(data=st.data())
def test_one_changed_move_is_found_at_its_place(table: tuple[Row, ...], data: st.DataObject) -> None:
    """Judged by a machine of `transitions`, not by the reader's own rules; resume is judged further down."""
    word = [m for m in walk(data, table) if m.trigger is not Trigger.RESUME]
    word = word[: next((i + 1 for i, m in enumerate(word) if m.dest is State.HALTED), len(word))]
    if not word:
        return
    index = data.draw(st.integers(0, len(word) - 1))
    triggers = [trigger for trigger in Trigger if trigger is not Trigger.RESUME]
    changed = Move(
        data.draw(st.sampled_from(triggers)),
        data.draw(st.sampled_from(list(State))),
        data.draw(st.sampled_from(list(State))),
    )
    word[index] = changed
    found = first_illegal(word, table)
    assert (found and found.index) == stock_verdict(word, table)


def stock_verdict(word: list[Move], table: tuple[Row, ...]) -> int | None:
    """The index of the first move that a stock machine would not make."""

    class Model:
        state: State

    model = Model()
    machine = Machine(model, states=State, initial=State.IDLE, auto_transitions=False)
    for arc in arcs(table):
        machine.add_transition(event_name(arc.trigger, arc.dest), arc.source, arc.dest)
    for index, (trigger, source, dest) in enumerate(word):
        if model.state is not source:
            return index
        try:
            model.trigger(event_name(trigger, dest))  # type: ignore[attr-defined]
        except (MachineError, AttributeError):
            return index
        if model.state is not dest:
            return index
    return None


@given(data=st.data())
def test_a_dropped_move_is_found_where_it_is_missing(data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(EPOCH) - 2))
    found = first_illegal(EPOCH[:index] + EPOCH[index + 1 :], TRAINING)
    assert found is not None
    assert found.index == index
    assert f"the word stands in {EPOCH[index].source.value}" in found.message
    assert EPOCH[index].trigger.value in found.message  # what was expected


def test_messages_name_found_and_expected() -> None:
    assert first_illegal([move("step", "IDLE", "STEP")]) == Violation(
        0, "step from IDLE to STEP is not in the table; expected from IDLE: begin_epoch, halt"
    )
    after_the_end = first_illegal([*EPOCH, EPOCH[0]])
    assert after_the_end is not None
    assert after_the_end.index == len(EPOCH)
    assert after_the_end.message.endswith("expected from DONE: nothing, the word has ended")


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_legal_triggers_are_those_a_machine_has(table: tuple[Row, ...]) -> None:
    for state in State:
        expected = {arc.trigger for arc in arcs(table) if arc.source is state}
        found = legal_triggers(state, table)
        assert set(found) == expected
        assert len(found) == len(expected)
    assert legal_triggers(State.DONE, table) == ()
    assert legal_triggers(State.FORWARD) == (Trigger.BACKWARD, Trigger.HALT)


# --- resume ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dest", [state for state in State if state not in TERMINAL])
def test_resume_from_halted_leads_to_every_living_state(dest: State) -> None:
    assert is_legal([move("halt", "IDLE", "HALTED"), Move(Trigger.RESUME, State.HALTED, dest)])


@pytest.mark.parametrize("kept", range(len(EPOCH)))
def test_a_new_attempt_resumes_where_the_kept_word_stands(kept: int) -> None:
    """What came after, the halt included, was superseded and is not in the word."""
    stands = EPOCH[kept].source
    for dest in State:
        again = [*EPOCH[:kept], Move(Trigger.RESUME, State.HALTED, dest), *EPOCH[kept:]]
        found = first_illegal(again)
        if dest is stands:
            assert found is None
        else:
            assert found is not None
            assert found.index == kept


def test_only_the_first_move_of_an_attempt_may_take_the_word_up() -> None:
    reader = Reader(TRAINING, state=State.STEP)
    resume = move("resume", "HALTED", "STEP")
    problem = reader.feed(resume, begins_attempt=False)
    assert problem is not None
    assert "the word stands in STEP" in problem
    assert reader.state is State.STEP
    assert reader.feed(resume, begins_attempt=True) is None


def test_validation_cannot_resume_or_touch_weights() -> None:
    for illegal in (move("resume", "HALTED", "IDLE"), *EPOCH[3:5]):
        state = illegal.source if illegal.trigger is not Trigger.RESUME else State.HALTED
        assert Reader(EVALUATION, state=state).feed(illegal) is not None


def test_a_reader_stays_where_it_was_after_an_illegal_move() -> None:
    reader = Reader(TRAINING)
    assert reader.feed(EPOCH[3]) is not None
    assert reader.state is State.IDLE
    assert reader.feed(EPOCH[0]) is None


# --- journals --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row_:
    """A row of a journal, states and triggers by name."""

    attempt: int
    scope: str
    trigger: str
    source: str
    dest: str


def rows(scope: str, moves: tuple[Move, ...], attempt: int = 1) -> list[Row_]:
    return [Row_(attempt, scope, m.trigger.value, m.source.value, m.dest.value) for m in moves]


VALIDATION = rows("validation/val", PASS)
OTHER = rows("validation/test", PASS)
HALT = rows("train", (move("halt", "BATCH_END", "HALTED"),))
LEGAL = [*rows("train", EPOCH[:6]), *VALIDATION, *OTHER, *rows("train", EPOCH[6:])]


def test_scopes_are_read_as_words_of_their_own() -> None:
    assert first_illegal_row(LEGAL) is None
    found = words(LEGAL)
    assert [(word.scope, len(word.moves)) for word in found] == [
        ("train", 8),
        ("validation/val", 6),
        ("validation/test", 6),
    ]
    assert found[0].moves == EPOCH
    assert found[0].places == (0, 1, 2, 3, 4, 5, 18, 19)
    assert all(word.moves == PASS for word in found[1:])


def test_each_pass_of_a_scope_is_a_word() -> None:
    twice = [*LEGAL[:6], *VALIDATION, *VALIDATION]
    assert first_illegal_row(twice) is None
    assert [word.scope for word in words(twice)] == ["train", "validation/val", "validation/val"]


def test_an_abandoned_pass_is_legal() -> None:
    halted = rows("validation/val", (*PASS[:3], move("halt", "FORWARD", "HALTED")))
    assert first_illegal_row([*LEGAL[:6], *halted, *HALT]) is None
    assert first_illegal_row([*LEGAL[:6], *halted, *VALIDATION]) is None


@pytest.mark.parametrize("cut", range(1, len(PASS)))
def test_a_pass_cut_off_is_legal_only_at_the_end_of_its_attempt(cut: int) -> None:
    died = [*LEGAL[:6], *VALIDATION[:cut]]
    again = rows("train", (move("resume", "HALTED", "BATCH_END"), *EPOCH[6:]), attempt=2)
    assert first_illegal_row(died) is None
    assert first_illegal_row([*died, *HALT]) is None  # appended by whoever found the attempt dead
    assert first_illegal_row([*died, again[0], *rows("validation/val", PASS, attempt=2), *again[1:]]) is None
    for onward in (LEGAL[18], VALIDATION[0], OTHER[0]):
        found = first_illegal_row([*died, onward])
        assert found is not None
        assert found.index == len(died)
        assert f"a pass of validation/val stands in {PASS[cut - 1].dest.value}" in found.message
    split = words([*died, again[0], *rows("validation/val", PASS, attempt=2)])
    assert [len(word.moves) for word in split] == [7, cut, 6]


def test_attempts_of_a_journal_decide_about_resume() -> None:
    kept, resume = rows("train", EPOCH[:6]), move("resume", "HALTED", "BATCH_END")
    second = rows("train", (resume, *EPOCH[6:]), attempt=2)
    assert first_illegal_row([*kept, *second]) is None
    found = first_illegal_row([*kept, *(replace(row, attempt=1) for row in second)])
    assert found is not None
    assert found.index == 6


@given(index=st.integers(0, len(LEGAL) - 1), name=st.sampled_from(("trigger", "source", "dest")))
def test_unknown_names_are_found_and_shown(index: int, name: str) -> None:
    broken = [*LEGAL]
    broken[index] = replace(broken[index], **{name: "jump"})
    found = first_illegal_row(broken)
    assert found is not None
    assert found.index == index
    assert "'jump'" in found.message
    assert found.message.startswith(broken[index].scope)


@given(index=st.integers(0, len(LEGAL) - 2))
def test_a_lost_row_is_found(index: int) -> None:
    """At the next row of its scope at the latest, and never before its place."""
    lost = LEGAL[:index] + LEGAL[index + 1 :]
    found = first_illegal_row(lost)
    assert found is not None
    next_of_scope = next(i for i in range(index, len(lost)) if lost[i].scope == LEGAL[index].scope or i >= 17)
    assert index <= found.index <= next_of_scope


def test_a_journal_can_be_read_as_it_grows() -> None:
    reader = JournalReader()
    assert [reader.feed(row) for row in LEGAL] == [None] * len(LEGAL)
    assert reader.training.state is State.DONE
