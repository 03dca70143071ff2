"""`interlock diff`: where two trainings part, as a property of words, over journals, and in real trainings."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import ParameterDigests
from orchestrator.cli import main
from orchestrator.commands.comparison import compare, compare_values, digest_of, same_number
from orchestrator.commands.lineage import END, Stretch, shared, stretches
from states.table import TERMINAL, TRAINING, State, Trigger, arcs
from tracking.journal import Attempt, Journal, Metric, Parent, Transition
from tracking.runs import Lease, RunFolder, create_run
from trainings import loader, make
from walk import Walk, begin

ARCS = [arc for arc in arcs(TRAINING) if arc.trigger not in (Trigger.HALT, Trigger.RESUME)]


def interlock(*arguments: object, code: int) -> Result:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


# -- words -------------------------------------------------------------------------------------------

losses = st.one_of(st.floats(), st.sampled_from([math.nan, 0.0, -0.0, 0.5]))
notes = st.sampled_from(
    ["", "", "skipped", "parameters xor64:ab", "empty; parameters xor64:ab", "parameters blake2:cd"]
)


@st.composite
def words(draw: st.DrawFn, shortest: int = 0) -> list[Transition]:
    """A word of a training that was never interrupted."""
    state, epoch, batch = State.IDLE, -1, -1
    made: list[Transition] = []
    for seq in range(1, 1 + draw(st.integers(shortest, 40))):
        arc = draw(st.sampled_from([arc for arc in ARCS if arc.source is state] or [None]))
        if arc is None:
            break
        if arc.trigger is Trigger.BEGIN_EPOCH:
            epoch, batch = epoch + 1, -1
        batch += arc.trigger is Trigger.FETCH
        loss = draw(losses) if arc.trigger is Trigger.FORWARD else None
        phase = draw(st.sampled_from(["", "", "generator"]))
        # fmt: off
        made.append(Transition(seq, 1, "train", epoch, batch, phase, arc.trigger, arc.source, arc.dest,
                               seq, 1, loss, draw(notes)))
        # fmt: on
        state = arc.dest
    return made


@st.composite
def interrupted(draw: st.DrawFn, word: list[Transition]) -> list[Transition]:
    """The same word as a run made it that was halted and resumed, at other times, with validation."""
    made: list[Transition] = []
    attempt = 1
    for row in word:  # times are no part of what is compared
        made.append(
            row._replace(seq=len(made) + 1, attempt=attempt, time_ns=draw(st.integers(0, 9)), duration_ns=7)
        )
        if row.dest not in TERMINAL and draw(st.booleans()):
            there = row._replace(
                trigger=Trigger.HALT, source=row.dest, dest=State.HALTED, loss=None, note="Ctrl-C"
            )
            attempt += 1
            made += [there, there._replace(trigger=Trigger.RESUME, source=State.HALTED, dest=row.dest)]
        if draw(st.booleans()):
            made.append(row._replace(scope="validation/val", loss=draw(losses)))
    return made


@given(st.data())
def test_an_interruption_is_no_difference(data: st.DataObject) -> None:
    word = data.draw(words())
    one, other = data.draw(interrupted(word)), data.draw(interrupted(word))
    found = compare(one, other)
    assert (found.same, found.parting, found.longer, found.beyond) == (len(word), None, None, None)
    digests = [row for row in word if digest_of(row.note)]
    assert found.digests == len(digests)
    assert (found.last_digest is None) == (not digests)
    if digests and found.last_digest:
        assert (found.last_digest.epoch, found.last_digest.batch) == (digests[-1].epoch, digests[-1].batch)


@given(st.data())
def test_of_two_lengths_the_shorter_is_compared(data: st.DataObject) -> None:
    word = data.draw(words(shortest=1))
    cut = data.draw(st.integers(0, len(word) - 1))
    for one, other, longer in ((word, word[:cut], "left"), (word[:cut], word, "right")):
        found = compare(data.draw(interrupted(one)), data.draw(interrupted(other)))
        assert (found.same, found.parting, found.longer) == (cut, None, longer)
        assert found.beyond is not None
        assert found.beyond.trigger is word[cut].trigger


def changed(row: Transition, data: st.DataObject) -> tuple[Transition, str]:
    """A transition that differs from `row` in one thing, and what that is called."""
    choices: list[Callable[[], tuple[Transition, str]]] = [
        lambda: (row._replace(epoch=row.epoch + 1), "transition"),
        lambda: (row._replace(batch=row.batch + 1), "transition"),
        lambda: (row._replace(phase=row.phase + "x"), "transition"),
        lambda: (row._replace(dest=State.STEP if row.dest is not State.STEP else State.IDLE), "transition"),
    ]
    loss = row.loss
    if loss is not None:
        other = data.draw(losses.filter(lambda value: repr(value) != repr(loss)))
        choices.append(lambda: (row._replace(loss=other), "loss"))
    digest = digest_of(row.note)
    if digest:
        choices.append(
            lambda: (row._replace(note=f"parameters {digest.method}:{digest.value}0"), "parameters")
        )
    return data.draw(st.sampled_from(choices))()


@given(st.data())
def test_the_first_difference_is_found(data: st.DataObject) -> None:
    """Whatever comes after it, and on whichever side."""
    word = data.draw(words(shortest=1))
    place = data.draw(st.integers(0, len(word) - 1))
    row, what = changed(word[place], data)
    other = [*word[:place], row, *data.draw(words())]
    for left, right in ((word, other), (other, word)):
        found = compare(data.draw(interrupted(left)), data.draw(interrupted(right)))
        assert (found.same, found.longer) == (place, None)
        assert found.parting is not None
        assert found.parting.what == what
        sides = [found.parting.left, found.parting.right]
        assert [repr(side.loss) for side in sides] == [repr(left[place].loss), repr(right[place].loss)]
        assert [side.note for side in sides] == [left[place].note, right[place].note]
        assert found.digests == sum(digest_of(row.note) is not None for row in word[:place])


def test_what_is_not_known_on_both_sides_is_no_difference() -> None:
    begun = Transition(
        1, 1, "train", 0, -1, "", Trigger.BEGIN_EPOCH, State.IDLE, State.EPOCH_START, 1, 1, None, ""
    )
    forward = begun._replace(batch=0, trigger=Trigger.FORWARD, source=State.BATCH_START, dest=State.FORWARD)
    for one, other in (
        (forward._replace(loss=0.5), forward._replace(loss=None)),  # it has not arrived
        (forward._replace(note="parameters xor64:1"), forward),
        (forward._replace(note="parameters xor64:1"), forward._replace(note="parameters blake2:2")),
        (forward._replace(note="x"), forward._replace(note="y")),
    ):
        found = compare([begun, one], [begun, other])
        assert (found.same, found.digests, found.parting) == (2, 0, None)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        *[(0.5, 0.5, True), (0.5, math.nextafter(0.5, 1), False), (0.0, -0.0, False), (math.nan, 0.0, False)],
        *[(math.nan, -math.nan, True), (math.inf, math.inf, True), (math.inf, -math.inf, False)],
    ],
)
def test_numbers_are_compared_to_the_bit(one: float, other: float, same: bool) -> None:
    assert same_number(one, other) is same
    assert same_number(other, one) is same


def test_values_that_both_have_are_compared() -> None:
    def values(*given: tuple[int, str, float]) -> list[Metric]:
        return [
            Metric(1, 1, "validation/val", epoch, -1, epoch, key, value, 1) for epoch, key, value in given
        ]

    one = values((0, "loss", 0.5), (0, "acc", math.nan), (1, "loss", 0.25), (2, "loss", 1.0))
    assert compare_values(one, values((1, "loss", 0.25), (0, "acc", math.nan))).same == 2
    found = compare_values(one, values((2, "loss", 3.0), (1, "loss", 0.5), (0, "loss", 0.5)))
    assert found.same == 1
    assert found.parting is not None
    assert [metric.value for metric in found.parting] == [0.25, 0.5]
    assert compare_values(one, []).parting is None


# -- what runs have behind them ----------------------------------------------------------------------


def scalar(epoch: int, batch: int) -> float:
    return 1 / (1 + epoch + batch / 8)


class Training:
    """A training whose losses follow from its place, with two batches an epoch; written as a trainer would."""

    def __init__(self, run: RunFolder, position: int | None = None, row: Transition | None = None):
        """`row` is what is gone on from: of this run if there is a `position`, else of another."""
        self.run = run
        self.lease = Lease.acquire(run)
        self.recorder, self.writer = begin(run, self.lease, position)
        self.walk = Walk(self.recorder, State.IDLE if position is None else State.HALTED)
        if row is not None:
            if position is None:
                self.walk.go(Trigger.HALT)
            self.walk.epoch, self.walk.batch = row.epoch, row.batch
            stood = row.source if row.dest is State.HALTED else row.dest
            self.walk.go(Trigger.RESUME, stood)

    def go(self, transitions: int, shift: float = 0.0) -> "Training":
        """So many transitions more; losses differ by `shift` from what they should be."""
        follows = {
            State.IDLE: Trigger.BEGIN_EPOCH,
            State.EPOCH_START: Trigger.FETCH,
            State.BATCH_START: Trigger.FORWARD,
            State.FORWARD: Trigger.BACKWARD,
            State.BACKWARD: Trigger.STEP,
            State.STEP: Trigger.END_BATCH,
            State.EPOCH_END: Trigger.BEGIN_EPOCH,
        }
        walk = self.walk
        for _ in range(transitions):
            ends = walk.state is State.BATCH_END and walk.batch == 1
            trigger = Trigger.END_EPOCH if ends else follows.get(walk.state, Trigger.FETCH)
            forward = trigger is Trigger.FORWARD
            walk.go(trigger, loss=scalar(walk.epoch, walk.batch) + shift if forward else math.nan)
        return self

    def end(self) -> RunFolder:
        self.walk.go(Trigger.HALT)
        self.writer.end("stopped")
        self.writer.close()
        self.lease.release()
        return self.run


def rows(run: RunFolder) -> dict[int, Transition]:
    with Journal.open(run) as journal:
        return {row.seq: row for row in journal.transitions(include_superseded=True)}


def train(root: Path, transitions: int, shift: float = 0.0, name: str = "run") -> RunFolder:
    return Training(create_run(root, name)).go(transitions, shift).end()


def go_on(run: RunFolder, position: int, transitions: int, shift: float = 0.0) -> RunFolder:
    return Training(run, position, rows(run)[position]).go(transitions, shift).end()


def branch(parent: RunFolder, seq: int, transitions: int, shift: float = 0.0) -> RunFolder:
    link = Parent(parent.id, str(parent.path), seq, "x", "branch")
    run = create_run(parent.path.parent, "branch", link)
    return Training(run, None, rows(parent)[seq]).go(transitions, shift).end()


def found_by(one: RunFolder, other: RunFolder, code: int = 0) -> dict:
    return json.loads(interlock("diff", one.path, other.path, "--json", code=code).stdout)


def test_two_runs_that_are_the_same(tmp_path: Path) -> None:
    one, other = train(tmp_path, 30), go_on(train(tmp_path, 20), 15, 15)
    assert found_by(one, other)["same"] == 30
    text = interlock("diff", one.path, other.path, code=0).output
    assert "the same for 30 transitions, to the end of both (no digests of the parameters to compare)" in text


def test_two_runs_that_part(tmp_path: Path) -> None:
    one = train(tmp_path, 30)
    other = go_on(train(tmp_path, 20), 15, 15, shift=1e-16)
    found = found_by(one, other, code=1)
    assert (found["same"], found["longer"], found["parting"]["what"]) == (19, None, "loss")
    left, right = found["parting"]["left"], found["parting"]["right"]
    assert (left["seq"], right["seq"], right["attempt"]) == (20, 27, 2)
    assert (left["loss"], right["loss"]) == (scalar(1, 1), scalar(1, 1) + 1e-16)
    text = interlock("diff", one.path, other.path, code=1).output
    assert "the same for 19 transitions\n" in text
    assert "They part at forward of epoch 1, batch 1: the losses differ" in text
    assert f"loss        {scalar(1, 1)!r}" in text
    assert repr(scalar(1, 1) + 1e-16) in text


def test_a_shorter_run(tmp_path: Path) -> None:
    one, other = train(tmp_path, 30), train(tmp_path, 12)
    for pair, longer in (((one, other), "left"), ((other, one), "right")):
        found = found_by(*pair)
        assert (found["same"], found["longer"], found["beyond"]["seq"]) == (12, longer, 13)
        text = interlock("diff", *(run.path for run in pair), code=0).output
        assert "the same for 12 transitions, as far as both go (no digests" in text
        assert f"; {one.id} goes on" in text


def test_one_run_is_not_two(tmp_path: Path) -> None:
    run = train(tmp_path, 3)
    assert "is given twice" in interlock("diff", run.path, run.path, code=2).output


def test_a_branch_is_compared_from_where_it_began(tmp_path: Path) -> None:
    mother = train(tmp_path, 30)
    child, stray = branch(mother, 15, 15), branch(mother, 15, 15, shift=0.5)
    for pair in ((mother, child), (child, mother)):
        found = found_by(*pair)
        assert (found["same"], found["longer"]) == (15, None)
        assert found["shared"] == {
            "run": mother.id,
            "seq": 15,
            "place": {"epoch": 1, "batch": 0, "state": "FORWARD"},
        }
        text = interlock("diff", *(run.path for run in pair), code=0).output
        at = f"FORWARD at epoch 1, batch 0, transition 15 of {mother.id}"
        assert f"{child.id} goes on from {at}: compared from there" in text
    found = found_by(mother, stray, code=1)
    assert (found["same"], found["parting"]["left"]["seq"]) == (4, 20)


def test_siblings_and_their_children(tmp_path: Path) -> None:
    """They are compared from where their histories part, which may lie in an ancestor of one of them."""
    mother = train(tmp_path, 30)
    one, other = branch(mother, 15, 15), branch(mother, 20, 10)
    assert [found_by(one, other)[key] for key in ("same", "longer")] == [15, None]
    text = interlock("diff", one.path, other.path, code=0).output
    assert (
        f"both go on from {mother.id}; they share all up to FORWARD at epoch 1, batch 0, transition 15"
        in text
    )
    grandchild = branch(one, 7, 10)  # its own halt and resume, then 16 to 20 of the training
    assert [found_by(grandchild, one)[key] for key in ("same", "longer")] == [10, None]
    assert [found_by(grandchild, mother)[key] for key in ("same", "longer")] == [15, None]
    found = found_by(branch(one, 7, 10, shift=0.5), branch(other, 3, 9), code=1)
    assert (found["shared"]["run"], found["shared"]["seq"]) == (mother.id, 15)
    assert (found["same"], found["parting"]["left"]["epoch"], found["parting"]["left"]["batch"]) == (11, 2, 0)


def test_a_parent_that_has_gone_back_since(tmp_path: Path) -> None:
    """What its child has behind it stays what it was."""
    mother = train(tmp_path, 20)
    child = branch(mother, 18, 12)
    go_on(mother, 3, 27, shift=0.5)
    found = found_by(mother, child, code=1)
    assert (found["shared"]["seq"], found["same"]) == (3, 4)
    assert (found["parting"]["left"]["seq"], found["parting"]["right"]["seq"]) == (27, 8)
    assert found_by(child, train(tmp_path, 30))["same"] == 30


def test_an_ancestor_that_is_gone(tmp_path: Path) -> None:
    mother = train(tmp_path, 30)
    one, other, later = branch(mother, 15, 15), branch(mother, 15, 12), branch(mother, 20, 10)
    mother.path.rename(tmp_path / "elsewhere")
    assert [found_by(one, other)[key] for key in ("same", "longer")] == [12, "left"]
    text = interlock("diff", one.path, later.path, code=1).output
    assert f"transitions 16 to 20 of {mother.id} are needed" in text
    assert "put it back" in text


def test_a_warm_start_begins_anew(tmp_path: Path) -> None:
    mother = train(tmp_path, 30)
    run = create_run(tmp_path, "warm", Parent(mother.id, str(mother.path), 30, "x", "warm start"))
    found = found_by(mother, Training(run).go(8, shift=0.5).end(), code=1)
    assert (found["shared"], found["same"]) == (None, 2)


@given(st.data())
def test_what_stood_at_a_moment(data: st.DataObject) -> None:
    """Against the rule itself: a row stands if no later attempt that had begun went back behind it."""
    attempts: list[Attempt] = []
    newest = 0
    for number in range(1, 1 + data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, newest)) if number > 1 else None
        attempts.append(attempt(number, position, newest + 1))
        newest += data.draw(st.integers(0, 6))
    until = data.draw(st.integers(0, newest + 2))
    begun = [one for one in attempts if one.first_seq <= until]
    standing = [
        seq
        for seq in range(1, until + 1)
        if all(
            later.position >= seq for later in begun if later.first_seq > seq and later.position is not None
        )
    ]
    found = stretches("x", attempts, until)
    assert seqs_in(found) == standing
    other = stretches("x", attempts, data.draw(st.integers(0, newest + 2)))
    common, left, right = shared(found, other)
    assert seqs_in(common) + seqs_in(left) == seqs_in(found)
    assert seqs_in(common) + seqs_in(right) == seqs_in(other)
    assert not (left and right) or seqs_in(left)[0] != seqs_in(right)[0]
    assert stretches("x", attempts)[-1].last == END


def seqs_in(some: list[Stretch]) -> list[int]:
    return [seq for one in some for seq in range(one.first, one.last + 1)]


def attempt(number: int, position: int | None, first_seq: int) -> Attempt:
    # fmt: off
    return Attempt(number, position, first_seq, 0, 0, 1, "host", 0.0, None, "stopped", "", "", None, {}, {}, "cpu",
                   None)
    # fmt: on


# -- real trainings ----------------------------------------------------------------------------------


def test_the_weights_part_before_any_loss_does(tmp_path: Path) -> None:
    """One bit of one weight, changed after a step: the digests name the batch, the losses only the one after."""
    one = make(tmp_path, callbacks=[ParameterDigests(every_batches=1)])
    one.fit()
    other = make(tmp_path, callbacks=[ParameterDigests(every_batches=1)])

    @other.after(Trigger.STEP)
    def disturb() -> None:
        if (other.epoch, other.batch) == (1, 3):
            parameter = next(other.model.parameters())
            parameter.detach().view(torch.int32)[0, 0] ^= 1

    other.fit()
    assert one.run is not None
    assert other.run is not None
    found = found_by(one.run, other.run, code=1)
    parting = found["parting"]
    assert (parting["what"], parting["left"]["trigger"]) == ("parameters", "end_batch")
    assert (parting["left"]["epoch"], parting["left"]["batch"]) == (1, 3)
    assert (found["last_digest"]["epoch"], found["last_digest"]["batch"]) == (1, 2)
    assert found["settings"] == {}
    text = interlock("diff", one.run.path, other.run.path, code=1).output
    assert "digests of the parameters were equal last at end_batch of epoch 1, batch 2: xor64:" in text


def test_other_settings_are_named(tmp_path: Path) -> None:
    runs = []
    for lr in (1e-2, 2e-2):
        trainer = make(tmp_path, optimizer=lambda model, lr=lr: torch.optim.AdamW(model.parameters(), lr=lr))
        trainer.fit()
        assert trainer.run is not None
        runs.append(trainer.run)
    text = interlock("diff", *(run.path for run in runs), code=1).output
    assert "They part at forward of epoch 0, batch 1: the losses differ" in text
    said = text[text.index("What was set differently") :]
    assert "0.01" in said
    assert "0.02" in said


def test_validation_is_compared_if_asked_for(tmp_path: Path) -> None:
    runs = []
    for samples in (16, 24):
        trainer = make(tmp_path, epochs=1, val_loader=loader(samples, shuffle=False))
        trainer.fit()
        assert trainer.run is not None
        runs.append(trainer.run.path)
    interlock("diff", *runs, code=0)
    text = interlock("diff", *runs, "--validation", code=1).output
    assert "Validations part at val/loss of epoch 0: " in text
    assert "to the end of both" in text
