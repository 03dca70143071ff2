"""Where a run stands, read from its lease, journal and flight recorder without holding anyone up."""

from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from states.table import State
from tracking.journal import TRAIN, Attempt, Journal, Parent, Transition
from tracking.packed import ROW_LENGTH, one_of_metrics, unpacked_metrics, unpacked_transitions
from tracking.runs import Holder, RunFolder, lease_holder
from tracking.schema import Connection, connect_to_read

__all__ = [
    "Life",
    "Measured",
    "Origin",
    "Place",
    "Standing",
    "newest_metrics",
    "origin_of",
    "places_of",
    "read_life",
    "standing_of",
]

_MOST_ROWS = 64  # in which the values of one moment are looked for
_KEPT = "(attempts.kept_until IS NULL OR packed.seq <= attempts.kept_until)"


@dataclass(frozen=True)
class Life:
    """Is somebody at work on the run? `died`: the last attempt has no end, and nobody holds the lease."""

    holder: Holder | None
    attempts: tuple[Attempt, ...]

    @property
    def running(self) -> bool:
        """An attempt is under way."""
        return self.holder is not None and self._open

    @property
    def died(self) -> bool:
        """The last attempt's process died, and nothing has settled it yet."""
        return self.holder is None and self._open

    @property
    def _open(self) -> bool:
        return bool(self.attempts) and self.attempts[-1].outcome is None


def read_life(run: RunFolder, journal: Journal) -> Life:
    """Read lease and attempts so that neither an attempt's beginning nor its end looks like a death."""
    # The lease first: an attempt that ends in between has its end by then. One that begins in between
    # took the lease before it wrote its row, so that a second look finds it.
    holder = lease_holder(run)
    life = Life(holder, tuple(journal.attempts()))
    return Life(lease_holder(run), life.attempts) if life.died else life


@dataclass(frozen=True)
class Measured:
    """The newest values of one scope: of an epoch, or (`batch` is not -1) of a validation in mid-epoch."""

    scope: str
    epoch: int
    batch: int
    values: dict[str, float]


@dataclass(frozen=True)
class Place:
    """Where a transition led to; `epoch` and `batch` are -1 where there is none."""

    epoch: int
    batch: int
    state: State

    def __str__(self) -> str:
        if self.epoch < 0:
            return "before epoch 0"
        return f"at epoch {self.epoch}" + (f", batch {self.batch}" if self.batch >= 0 else "")


@dataclass(frozen=True)
class Standing:
    """Where the training of a run stands; `last` is its newest transition that is not superseded."""

    run: RunFolder
    life: Life
    last: Transition | None
    batches: int | None
    """Batches done over all epochs; None where none has been measured."""
    loss: float | None
    """Of the newest batch."""

    @property
    def kind(self) -> Literal["new", "running", "died", "ended"]:
        """What is going on with the run."""
        if not self.life.attempts:
            return "new"
        if self.life.running:
            return "running"
        return "died" if self.life.died else "ended"

    @property
    def state(self) -> State:
        """The state of the training; of one that died, the state it died in."""
        if self.life.attempts and self.life.attempts[-1].end_state is not None:
            return self.life.attempts[-1].end_state
        # A later attempt begins in HALTED, before its first transition.
        if self.last is None or self.last.attempt != self.life.attempts[-1].attempt:
            return State.IDLE if len(self.life.attempts) <= 1 else State.HALTED
        return self.last.dest

    @property
    def place(self) -> Place:
        """State, epoch, and the index of the batch within it."""
        return Place(self.last.epoch, self.last.batch, self.state) if self.last else Place(-1, -1, self.state)

    @property
    def epochs(self) -> int:
        """How many epochs are complete."""
        if self.last is None:
            return 0
        ended = {self.last.source, self.last.dest} & {State.EPOCH_END, State.DONE}
        begun_anew = self.last.dest is State.EPOCH_START
        return self.last.epoch + (1 if ended and not begun_anew else 0)


def standing_of(run: RunFolder, journal: Journal) -> Standing:
    """Where the run stands now: of an attempt that has no end, the flight recorder is asked as well."""
    life = read_life(run, journal)
    last = journal.last_transition(TRAIN, live=life.running or life.died)
    batches, loss = _newest_batch(run)
    return Standing(run, life, last, batches, loss)


def _newest_batch(run: RunFolder) -> tuple[int | None, float | None]:
    """The step and the loss of the newest batch that has been measured."""
    with closing(connect_to_read(run.journal)) as connection:
        condition = (
            f"packed.scope = (SELECT scope FROM scopes WHERE name = ?1) AND packed.batch >= 0 AND {_KEPT}"
        )
        newest = connection.execute(
            one_of_metrics("1", condition, "step", "epoch", "batch", "scope"), (TRAIN,)
        ).fetchone()
        if newest is None:
            return None, None
        last, step, epoch, batch, scope = newest
        return step, _measured(connection, last, scope, epoch, batch).get("loss")


def newest_metrics(run: RunFolder) -> list[Measured]:
    """For each scope the newest epoch's metrics; training first, then validations in the order of their loaders."""
    with closing(connect_to_read(run.journal)) as connection:
        scopes = connection.execute("SELECT scope, name FROM scopes ORDER BY scope").fetchall()
        found = [_newest_of_scope(connection, scope, name) for scope, name in scopes]
    return sorted((one for one in found if one is not None), key=lambda measured: measured.scope != TRAIN)


def _newest_of_scope(connection: Connection, scope: int, name: str) -> Measured | None:
    # Of the training, batches stand between the epochs; packed rows are small, so that these are soon passed over.
    condition = f"packed.scope = ?1 AND (packed.batch = -1 OR ?2) AND {_KEPT}"
    newest = connection.execute(
        one_of_metrics("1", condition, "epoch", "batch"), (scope, name != TRAIN)
    ).fetchone()
    if newest is None:
        return None
    last, epoch, batch = newest
    return Measured(name, epoch, batch, _measured(connection, last, scope, epoch, batch))


def _measured(connection: Connection, last: int, scope: int, epoch: int, batch: int) -> dict[str, float]:
    """What was measured at one moment; `last` is its last packed row."""
    rows = connection.execute(
        f"""{unpacked_metrics(f"?1 - {_MOST_ROWS - 1}", "?1")}
            WHERE packed.scope = ?2 AND packed.epoch = ?3 AND packed.batch = ?4 AND {_KEPT} ORDER BY 1""",
        (last, scope, epoch, batch),
    )
    return {key: float(value) for *_, key, value, _, _, _ in rows}


@dataclass(frozen=True)
class Origin:
    """Where a run comes from; `place` is where in its parent's training a branch began."""

    parent: Parent
    place: Place | None

    def __str__(self) -> str:
        if self.parent.kind != "branch":
            return f"warm start from {self.parent.run}"
        place = f" {self.place} ({self.place.state.value})" if self.place else ""
        return f"branched from {self.parent.run}{place}"


def origin_of(run: RunFolder, parent: Parent | None) -> Origin | None:
    """Where the run with this parent comes from; None where it has none."""
    if parent is None:
        return None
    # A branch's first moves are `halt` from IDLE, and `resume` to where it begins.
    first = places_of(run, (1, 2)) if parent.kind == "branch" else {}
    began = first.get(1) == Place(-1, -1, State.HALTED)
    return Origin(parent, first.get(2) if began else None)


def places_of(run: RunFolder, seqs: Collection[int]) -> dict[int, Place]:
    """Where the transitions `seqs` led to, superseded or not; those that the journal lacks are left out."""
    with closing(connect_to_read(run.journal)) as connection:
        found = (
            connection.execute(
                f"""SELECT epoch, batch, dest FROM ({unpacked_transitions(f"?1 - {ROW_LENGTH - 1}", "?1")})
                    WHERE seq = ?1""",
                (seq,),
            ).fetchone()
            for seq in seqs
        )
        return {
            seq: Place(row[0], row[1], State(row[2])) for seq, row in zip(seqs, found, strict=True) if row
        }
