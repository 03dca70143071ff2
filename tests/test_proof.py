"""Rows of several transitions are judged as their transitions are one by one, whatever a journal says."""

from collections.abc import Iterator
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.commands.proof import Finding, Question, Step, ask, questions
from states.language import Chain
from states.table import ARCS, State
from tracking.journal import Attempt, Packed

SCOPES = ["train", "validation/val"]


class OneByOne:
    """A question that is never told of a whole row."""

    def __init__(self, question: Question) -> None:
        self.question, self.part = question, question.part

    def see_all(self, row: Packed) -> bool:
        return False

    def see(self, found: Step) -> str | None:
        return self.question.see(found)

    def end(self) -> Iterator[str]:
        return self.question.end()

    def good(self) -> str:
        return self.question.good()


def attempt(number: int, first_seq: int, position: int | None, end: State | None) -> Attempt:
    outcome = None if end is None else "done" if end is State.DONE else "stopped"
    return Attempt(
        number, position, first_seq, 0, None, 1, "host", 0.0, end, outcome, "", "", None, {}, {}, "cpu", None
    )  # fmt: skip


@st.composite
def journals(draw: st.DrawFn) -> tuple[list[Attempt], list[Packed]]:
    """Mostly what a training writes, with slips: moves that are illegal, numbers that are not the next ones."""
    slips = draw(st.sampled_from([0.0, 0.02, 0.1]))
    chance = draw(st.randoms(use_true_random=False))
    attempts, rows, seq = [], [], 1
    epoch, batch = -1, -1
    for number in range(1, draw(st.integers(1, 3)) + 1):
        first_seq = seq
        states = [State.IDLE if number == 1 else State.HALTED, State.IDLE]
        for _ in range(draw(st.integers(0, 30))):
            scope = int(chance.random() < 0.2)
            moves = []
            for _ in range(chance.randint(1, 6)):
                legal = [arc for arc in ARCS if arc.source is states[scope]]
                if not legal or chance.random() < slips:
                    legal = list(ARCS)
                arc = chance.choice(legal)
                moves.append((arc.trigger, arc.source, arc.dest))
                states[scope] = (
                    arc.dest if not scope or arc.dest not in (State.DONE, State.HALTED) else State.IDLE
                )
            chain = Chain(moves)
            batch += chain.fetches
            if chain.turns:
                epoch, batch = epoch + 1, -1
            if chance.random() < slips:
                batch += 1
            seq += chance.random() < slips
            gone, last = chance.random() < slips, seq + len(moves) - 1
            rows.append(Packed(seq, last, number, SCOPES[scope], epoch, batch, chain, gone))
            seq = last + 1
        position = None if number == 1 else chance.randint(0, first_seq)
        attempts.append(attempt(number, first_seq, position, chance.choice([None, *State])))
    return attempts, rows


@given(journals(), st.booleans())
def test_a_row_is_judged_as_its_transitions_are(
    journal: tuple[list[Attempt], list[Packed]], branched: bool
) -> None:
    attempts, rows = journal
    at_once = ask(questions(attempts, branched=branched), rows)
    assert at_once == ask(list(map(OneByOne, questions(attempts, branched=branched))), rows)


def found(chains: list[Chain]) -> tuple[list[Finding], int]:
    """What is found of a first attempt with these rows, and how many times a transition was seen by itself."""
    rows, seq, batch = [], 1, -1
    for chain in chains:
        batch += chain.fetches
        rows.append(Packed(seq, seq + chain.length - 1, 1, "train", 0, batch, chain, False))
        seq += chain.length
    asked = questions([attempt(1, 1, None, None)])
    alone = 0
    for question in asked:

        def see(step: Step, see=question.see) -> str | None:
            nonlocal alone
            alone += 1
            return see(step)

        question.see = see  # type: ignore[method-assign]
    return ask(asked, rows), alone


def test_a_batch_is_not_looked_at_move_by_move_again_and_again() -> None:
    moves = {(arc.source, arc.dest): (arc.trigger, arc.source, arc.dest) for arc in ARCS}

    def through(*states: State) -> Chain:
        return Chain([moves[pair] for pair in pairwise(states)])

    of_batch = State.BATCH_START, State.FORWARD, State.BACKWARD, State.STEP, State.BATCH_END
    begin = through(State.IDLE, State.EPOCH_START)
    first, batch = through(State.EPOCH_START, *of_batch), through(State.BATCH_END, *of_batch)
    findings, alone = found([begin, first] + [batch] * 1000)
    assert all(finding.good for finding in findings), findings
    assert alone < 10
    findings, _ = found([begin, first] + [batch] * 500 + [first] + [batch] * 500)
    assert {finding.part for finding in findings if not finding.good} == {"words"}
