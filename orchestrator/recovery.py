"""Find the checkpoint to go on from, see that it fits, put it back, and prove that it is back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from orchestrator.callbacks.checkpointing import Checkpointing, best_of
from orchestrator.compatibility import CheckpointMismatch, agree
from orchestrator.configuration import Settings
from orchestrator.data import BatchStream
from orchestrator.divergence import Divergence, Expected, same_bits
from orchestrator.errors import ConfigurationError, NonFiniteAgainError, NonFiniteError
from orchestrator.policy import Situation
from orchestrator.result import Result
from orchestrator.snapshot import capture
from orchestrator.snapshot.info import (
    BEFORE_THE_END,
    CUT_SHORT,
    CheckpointInfo,
    info_of,
    not_superseded,
    readable,
)
from orchestrator.snapshot.manifest import versions
from orchestrator.snapshot.storage import CheckpointDamaged, read_checkpoint
from orchestrator.state import TrainingState
from orchestrator.warning import warn
from orchestrator.work import Limits, Place
from states.errors import InterlockError
from states.table import State
from tracking.journal import Journal, JournalError, settle
from tracking.outbox import read_outbox
from tracking.places import LOSSES_AT_ONCE, Stretch
from tracking.rows import Attempt, Loss
from tracking.runs import Lease, RunFolder, RunNotFound, find_run, list_runs

__all__ = [
    "CLOCKS",
    "CheckpointMismatch",
    "Found",
    "NoCheckpoint",
    "Plan",
    "RestoreError",
    "check",
    "losses_after",
    "nearest",
    "newest_of_name",
    "plan",
    "read",
    "restore",
    "result",
]


class NoCheckpoint(InterlockError):
    """The run has no checkpoint that could be continued from."""


class RestoreError(InterlockError):
    """What was restored is not what was saved."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read, its hashes verified."""

    info: CheckpointInfo
    manifest: Mapping[str, Any]
    tree: dict[str, Any]
    overridden: tuple[str, ...] = ()
    """What of it is not what was saved, a line each: `override` says so."""

    @property
    def state(self) -> State:
        """The state to go on in: that of the checkpoint, or the one that a checkpoint of HALTED carries."""
        state: State = self.tree["state"]
        return state

    def surroundings(self) -> tuple[str, ...]:
        """What is different here from where it was saved, and may change the last bits of a result."""
        saved = self.manifest["versions"]
        now = versions()
        return (
            *(
                f"{name} was {saved[name]}, now it is {now[name]}"
                for name in now
                if saved.get(name) != now[name]
            ),
            *capture.compare_flags(self.tree["flags"]),
        )


@dataclass(frozen=True)
class Plan:
    """What `start` is to do: a new run (no folder), or a run to continue, extend, or only report."""

    run: RunFolder | None = None
    checkpoint: Found | None = None
    lease: Lease | None = None
    finished: bool = False
    expected: Expected | None = None
    """The losses of what came after the checkpoint, which will be done again."""

    def release(self) -> None:
        """Let go of the run."""
        if self.lease is not None:
            self.lease.release()


def plan(resume: bool | str | os.PathLike[str], settings: Settings, limits: Limits) -> Plan:
    """Find the run and the checkpoint that `resume` means.

    Raises:
        ConfigurationError: `resume` is not one of the forms that `fit` takes.
        RunNotFound, NoCheckpoint: there is nothing of that name to go on from.
        FetchError: the tracking server does not have it, or cannot be reached.
        LeaseHeldError: another process works on that run.
        NonFiniteAgainError: "auto" would only meet the NaN again that the run ended with.
    """
    if resume is False or resume is None:
        return Plan()
    from orchestrator.retrieval import retrieve  # a new run needs neither
    from tracking.fetching import is_reference

    if resume is True or not isinstance(resume, str | os.PathLike):
        raise ConfigurationError(
            f"resume is {resume!r}; expected False, \"auto\", a run's name or folder, a checkpoint's path, or "
            '"mlflow:RUN_ID"'
        )
    auto = resume == "auto"
    checkpoint: Path | None = None
    if auto:
        if not settings.named:
            raise ConfigurationError(
                'resume="auto" continues the run of this name, but no name= was given: Trainer(..., name=...)'
            )
        run = newest_of_name(settings)
        if run is None:
            return Plan()
    elif is_reference(resume):
        found = retrieve(str(resume), settings.track, settings.root)
        run, checkpoint = found.run, found.checkpoint
    elif (Path(resume) / "manifest.json").is_file():
        checkpoint = Path(resume).resolve()
        run = _run_of(checkpoint, settings)
    else:
        if Path(resume).is_file():
            raise ConfigurationError(
                f"resume is {os.fspath(resume)!r}, a file; expected a run's name or folder, or a checkpoint's folder. "
                "A file of weights is where a new run may begin: Trainer(..., init_from=...)"
            )
        run = find_run(os.fspath(resume), settings.root)
    lease = Lease.acquire(run)
    try:
        settle(run, lease)
        return _plan_for(run, lease, checkpoint, auto, settings, limits)
    except BaseException:
        lease.release()
        raise


def _run_of(checkpoint: Path, settings: Settings) -> RunFolder:
    try:
        return find_run(checkpoint.parent.parent, settings.root)
    except RunNotFound:
        raise RunNotFound(
            f"resume is {str(checkpoint)!r}, a folder with a manifest.json, but not in a run's folder; expected "
            "RUN/checkpoints/NAME, since it is the run that is gone on with. Put it back there; or take the weights "
            "of a checkpoint that was copied for a new run: Trainer(init_from=...)"
        ) from None


def newest_of_name(settings: Settings) -> RunFolder | None:
    """The newest run of the trainer's name; not one that branched off, which is gone on with by its own name only."""
    runs = (run for run in list_runs(settings.root) if run.name == settings.name)
    return next((run for run in runs if not _branched(run)), None)


def _branched(run: RunFolder) -> bool:
    try:
        with Journal.open(run) as journal:
            parent = journal.run_info().parent
    except JournalError:
        return False  # what is wrong with it is said when it is opened
    return parent is not None and parent.kind == "branch"


def _plan_for(
    run: RunFolder, lease: Lease, checkpoint: Path | None, auto: bool, settings: Settings, limits: Limits
) -> Plan:
    with Journal.open(run) as journal:
        attempts = journal.attempts()
    positions = {attempt.attempt: attempt.position for attempt in attempts}
    if auto and settings.nonfinite == "halt" and attempts:
        _refuse_to_meet_again(run, attempts[-1])
    infos = not_superseded(readable(run.checkpoints), positions)
    found = read(checkpoint) if checkpoint is not None else _newest(infos)
    if found is None:
        if auto:
            warn(f"{run.id} has no checkpoint to continue from; a new run begins")
            lease.release()
            return Plan()
        raise NoCheckpoint(
            f"{run.id} has no checkpoint that can be read, so it cannot be continued; begin a new run: build a new "
            "Trainer and call fit()"
        )
    ended = found.info.state is State.DONE
    if not ended and found.info.purpose != CUT_SHORT:
        return Plan(run, found, lease, expected=losses_after(run, found))
    place = Place(**found.tree["place"])
    if found.tree["stop"] is None and _left(place, limits, within_epoch=_ended_within_epoch(place, infos)):
        # Any checkpoint from before the end will do; the newest that is whole has the least to do again.
        earlier = _newest([i for i in infos if i.state is not State.DONE and i.purpose != CUT_SHORT])
        if earlier is None:
            raise NoCheckpoint(
                f"{run.id} is done, and no checkpoint from before its end can be read, so it cannot be extended; "
                "begin a new run with resume=False"
            )
        return Plan(run, earlier, lease, expected=losses_after(run, earlier))
    if not ended:
        return Plan(run, found, lease)
    lease.release()
    return Plan(run, found, None, finished=True)


def losses_after(run: RunFolder, found: Found, until: int | None = None) -> Expected:
    """The losses that the journal has of what comes after the checkpoint."""
    with Journal.open(run) as journal:
        stands = journal.standing()  # now: once they are done again they are superseded
    return Expected(_losses(run, stands, found.info.seq, until), found.surroundings())


def _losses(run: RunFolder, stands: Sequence[Stretch], after: int, until: int | None) -> Iterator[Loss]:
    """Page by page, between which the journal is closed: a run that goes far back has millions to compare."""
    while True:
        with Journal.open(run) as journal:
            page = list(islice(journal.losses(after, until, stands=stands), LOSSES_AT_ONCE))
        yield from page
        if len(page) < LOSSES_AT_ONCE:
            return
        after = page[-1].seq


def nearest(run: RunFolder, seq: int) -> Found:
    """The newest checkpoint of the run that is whole and not after transition `seq`.

    Raises NoCheckpoint.
    """
    with Journal.open(run) as journal:
        positions = {attempt.attempt: attempt.position for attempt in journal.attempts()}
    infos = not_superseded(readable(run.checkpoints), positions)
    found = _newest([info for info in infos if info.seq <= seq and info.state is not State.DONE])
    if found is None:
        there = ", ".join(info.name for info in reversed(infos)) or "none"
        raise NoCheckpoint(
            f"{run.id} has no checkpoint from before transition {seq} to start from (it has: {there}); expected one. "
            "Keep more of them: Checkpointing(keep_first=True) lets seek reach everything, "
            "keep_every_epochs=1 makes it quick"
        )
    return found


def _refuse_to_meet_again(run: RunFolder, last: Attempt) -> None:
    if last.exception.startswith(NonFiniteError.__name__):
        raise NonFiniteAgainError(
            f'{run.id} halted on a value that was not finite, and resume="auto" would only meet it again '
            f'({last.exception}). To go on, pass nonfinite="skip"; or change what makes it and resume the run by name'
        )


def _ended_within_epoch(place: Place, infos: Sequence[CheckpointInfo]) -> bool:
    """Whether the run that ended at `place` left batches of its last epoch undone."""
    return any(
        info.batches == place.batches
        and (info.purpose == CUT_SHORT or (info.purpose == BEFORE_THE_END and info.state is State.BATCH_END))
        for info in infos
    )


def _left(place: Place, limits: Limits, *, within_epoch: bool) -> bool:
    situation = Situation()
    limits.apply(situation, place)
    return situation.batches_left and (situation.epochs_left or within_epoch)


def _newest(infos: Sequence[CheckpointInfo]) -> Found | None:
    """The newest checkpoint that is whole; damaged ones are named and passed over."""
    for info in infos:
        try:
            return read(info.path)
        except CheckpointDamaged as error:
            warn(error.passed_over)
    return None


def read(path: Path) -> Found:
    """The checkpoint at `path`; raises what `read_checkpoint` raises."""
    manifest, tree = read_checkpoint(path)
    return Found(info_of(path), manifest, tree)


def check(
    found: Found,
    state: TrainingState,
    settings: Settings,
    stream: BatchStream,
    override: frozenset[str] = frozenset(),
) -> Found:
    """The checkpoint as it is to be restored: as it is, but for what is overridden. Nothing is changed.

    Raises CheckpointMismatch, listing everything, if it does not fit. Differences that do not stand in the way are
    warned of: hyper-parameters, where the checkpoint wins, and numeric settings and versions, under which results
    may differ in the last bits.
    """
    agreed = agree(found.info.path, found.manifest, found.tree, state, stream, settings.binding, override)
    for text in (*(f"overridden: {text}" for text in agreed.overridden), *agreed.warnings):
        warn(text)
    return replace(found, tree=agreed.tree, overridden=agreed.overridden)


_UNVERIFIED = {
    "flags": "compared beforehand; they are the process's own",
    "built": "how the script built its modules, not what became of them",
    "stop": "asked for in this attempt, it stays",
    "validation_data": "another loader for validation is warned of, and may be",
}
"""Parts of a tree that need not be the same after restoring, and why."""

CLOCKS = ("batch/elapsed", "epoch/elapsed")
"""Parts of a tree that are durations up to now."""


def restore(found: Found, state: TrainingState) -> Divergence | None:
    """Put the training state back, capture it again, and compare the two by digest.

    In FORWARD the forward pass is done again. Where its loss is another one, that is returned, and nothing is
    compared: this is another machine, or a training that cannot be repeated.

    Raises RestoreError, naming the first entry that differs.
    """
    loss = state.restore(found.tree)
    if loss is not None and not same_bits(loss, found.tree["batch"]["loss"]):
        return Divergence(
            found.info.epoch,
            found.info.batch,
            state.phase,
            State.FORWARD,
            found.tree["batch"]["loss"],
            loss,
            found.surroundings(),
        )
    again = state.capture(found.state)
    lacking = found.tree["callbacks"].keys() ^ again["callbacks"].keys()
    for name in sorted(lacking):
        warn(f"the checkpoint has state of a callback {name} that this trainer lacks")
    other_data = any(line.startswith("data:") for line in found.overridden)
    ignored = (*CLOCKS, "batch/samples") if other_data else CLOCKS
    different = capture.first_difference(
        *(
            capture.digests(tree, ignore=ignored)
            for tree in (_comparable(found.tree, again), _comparable(again, found.tree))
        )
    )
    if different is not None:
        raise RestoreError(
            f"{different} of checkpoint {found.info.name} is not what it was after restoring it; expected every bit "
            "to be equal. Does a state_dict of a callback, metric or scheduler leave something out, or change it?"
        )
    return None


def _comparable(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What of `tree` must be in `other` too: not what only this script, or only that one, has."""
    chosen = {key: value for key, value in tree.items() if key in other and key not in _UNVERIFIED}
    for key in ("callbacks", "generators"):
        if key in chosen:
            chosen[key] = {name: value for name, value in tree[key].items() if name in other[key]}
    for key in ("guard", "gradients"):  # whether to guard is not binding, nor what hooks read
        if tree[key] is None or other[key] is None:
            chosen[key] = None
    for key in ("data", "passed"):  # the batch, where it was not fetched again: hooks may come and go
        if tree["batch"].get(key) is None or other["batch"].get(key) is None:
            chosen["batch"] = {name: value for name, value in chosen["batch"].items() if name != key}
    for key in ("model", "loss"):
        if tree[key] is None or other[key] is None:
            chosen[key] = None
        else:
            chosen[key] = _without_new_attributes(tree[key], other[key])
    return chosen


def _without_new_attributes(module: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A script may give its modules attributes that the checkpoint's did not have."""
    kept = {key: value for key, value in module.items() if key in other}
    if "attributes" in kept:
        theirs = other["attributes"]["values"]
        values = {
            f"{path}.{name}": value
            for path, of_part in kept["attributes"]["values"].items()
            for name, value in of_part.items()
            if name in theirs.get(path, ())
        }
        kept["attributes"] = {**kept["attributes"], "values": values}
    return kept


def result(
    run: RunFolder, state: State, reason: str, history: list[dict[str, float]], settings: Checkpointing | None
) -> Result:
    """What `fit` returns for a run as it stands on disk."""
    with Journal.open(run) as journal:
        positions = {attempt.attempt: attempt.position for attempt in journal.attempts()}
    infos = not_superseded(readable(run.checkpoints), positions)
    best = best_of(infos, settings.best) if settings is not None else None
    try:
        delivered = read_outbox(run.outbox).remote_run_id
    except InterlockError:
        delivered = None
    return Result(
        state=state,
        reason=reason,
        history=[dict(values) for values in history],
        run=run.path,
        best_checkpoint=best.path if best is not None else None,
        last_checkpoint=infos[0].path if infos else None,
        mlflow_run_id=delivered,
    )
