"""`interlock check`: proves that a run's journal is a legal word and that its checkpoints are whole."""

import sqlite3
import sys
from collections.abc import Collection, Iterator
from contextlib import closing
from pathlib import Path

import click

from orchestrator.commands.arguments import json_option, root_option, run_argument
from orchestrator.commands.layout import count, heading, padded, size, to_json
from orchestrator.commands.proof import Finding, ask, questions
from orchestrator.commands.standing import Life, Place, origin_of, places_of, read_life
from states.table import State
from tracking.journal import Checkpoint, Journal, JournalError, Settled, settle
from tracking.runs import RootError, RunFolder
from tracking.schema import connect_to_read

__all__ = ["check", "examine"]

_TRIES = 5


@click.command()
@run_argument()
@json_option
@root_option
def check(run: RunFolder, as_json: bool) -> None:
    """Prove that RUN's journal and checkpoints are sound.

    The journal must be a legal word, the checkpoints whole: every transition and every byte of every
    checkpoint is looked at. Of a run that is being trained, it checks what there is so far. Where a process
    died without a word, the end of its attempt is written down first. The exit status is 0 if all is well, 1
    if something is wrong, which is then named.

    \b
    Example:
      interlock check digits && echo sound
    """
    if as_json:
        findings = list(_findings(run))
        wrong = sum(not finding.good for finding in findings)
        click.echo(to_json({"run": run.id, "wrong": wrong, "findings": findings}, indent=1))
        sys.exit(1 if wrong else 0)
    click.echo(heading(run.id))
    wrong = 0
    for finding in _findings(run):
        wrong += not finding.good
        mark = click.style("ok   ", fg="green") if finding.good else click.style("WRONG", fg="red", bold=True)
        click.echo(f"  {mark}  {padded(finding.part, 13)} {finding.text}")
    if wrong:
        click.secho(f"{count(wrong, 'thing')} wrong", fg="red", bold=True)
        sys.exit(1)
    click.secho("all is well", fg="green")


def _findings(run: RunFolder) -> Iterator[Finding]:
    try:
        yield from _settled(run)
    except (sqlite3.DatabaseError, JournalError):
        pass  # which is said next
    yield from examine(run)


def examine(run: RunFolder) -> Iterator[Finding]:
    """What is found out about the journal and the checkpoints of a run, without changing anything."""
    try:
        yield from _file(run)
        with Journal.open(run) as journal:
            yield from _journal(run, journal)
            yield from _checkpoints(run, journal)
    except (sqlite3.DatabaseError, JournalError) as error:
        yield Finding("file", f"the journal cannot be read: {error}", good=False)


def _settled(run: RunFolder) -> Iterator[Finding]:
    """Write down the end of a process that died."""
    with Journal.open(run) as journal:
        if not read_life(run, journal).died:
            return
    try:
        settled = settle(run)
    except (RootError, JournalError) as error:
        yield Finding("settled", f"not written down, as the run cannot be written to ({error})")
        return
    if settled is not None:
        yield Finding("settled", _what_was_settled(settled))
        for note in settled.notes:
            yield Finding("settled", note, good=False)


def _what_was_settled(settled: Settled) -> str:
    drained = f"took {count(settled.drained, 'transition')} from its recorder, " if settled.drained else ""
    return f"attempt {settled.attempt} died in {settled.state.value}: {drained}wrote down its halt"


def _file(run: RunFolder) -> Iterator[Finding]:
    with closing(connect_to_read(run.journal)) as connection:
        problems = [text for (text,) in connection.execute("PRAGMA quick_check(5)") if text != "ok"]
    for problem in problems:
        yield Finding("file", f"{run.journal.name} is damaged: {problem}", good=False)
    if not problems:
        yield Finding(
            "file", f"{run.journal.name}, {size(run.journal.stat().st_size)}, is a whole SQLite file"
        )


def _journal(run: RunFolder, journal: Journal) -> Iterator[Finding]:
    origin = origin_of(run, journal.run_info().parent)
    if origin is not None:
        yield Finding("origin", str(origin))
    branched = origin is not None and origin.parent.kind == "branch"
    for _ in range(_TRIES):
        life = read_life(run, journal)
        asked = questions(life.attempts, branched=branched)
        findings = ask(asked, journal.packed(live=life.running or life.died))
        # An attempt that begins or ends meanwhile changes what has been read: then it is read again.
        if _ends(read_life(run, journal)) == _ends(life):
            break
    if life.running:
        yield Finding("running", f"{life.holder} is at work on it: this is about what there is so far")
    yield from findings


def _ends(life: Life) -> list[tuple[int, str | None]]:
    return [(attempt.attempt, attempt.outcome) for attempt in life.attempts]


def _checkpoints(run: RunFolder, journal: Journal) -> Iterator[Finding]:
    """Every checkpoint that is there is whole and belongs there, and those that the journal has are there."""
    there = {path.name: path for path in _listed(run)}
    known = journal.checkpoints(include_removed=True, include_superseded=True)
    removed = sum(found.removed_ns is not None for found in known)
    wrong = [problem for path in there.values() if (problem := _problem(run, path)) is not None]
    yield from (Finding("checkpoints", problem, good=False) for problem in wrong)
    life = read_life(run, journal)
    for found in known:
        if found.removed_ns is None and found.name not in there:
            yield _missing(found, there, life)
    if not wrong:
        unknown = len(there.keys() - {found.name for found in known})
        text = f"{count(len(there), 'checkpoint')}, every hash holds" if there else "there is none"
        text += f"; {removed:,} removed by retention" if removed else ""
        text += f"; {unknown:,} not in the journal" if unknown else ""
        yield Finding("checkpoints", text)


def _listed(run: RunFolder) -> list[Path]:
    if not run.checkpoints.is_dir() or not any(run.checkpoints.iterdir()):
        return []
    from orchestrator.snapshot.storage import list_checkpoints  # needs torch, slow to import

    return list_checkpoints(run.checkpoints)


def _problem(run: RunFolder, path: Path) -> str | None:
    from orchestrator.snapshot.storage import (
        CheckpointDamaged,
        CheckpointFormatError,
        parse_checkpoint_name,
        verify_checkpoint,
    )

    try:
        verify_checkpoint(path)
    except (CheckpointDamaged, CheckpointFormatError) as error:
        # One that retention has removed meanwhile is not damaged.
        return str(error) if path.exists() else None
    said = parse_checkpoint_name(path.name)
    assert said is not None  # or it would not have been listed
    place = places_of(run, [said.seq]).get(said.seq)
    if place != Place(said.epoch, said.batch, said.state) and (said.seq, said.state) != (0, State.IDLE):
        found = f"leads to {place.state.value} {place}" if place else "is missing"
        return f"{path.name} says what it stands for, but transition {said.seq} {found}"
    return None


def _missing(found: Checkpoint, there: Collection[str], life: Life) -> Finding:
    """A kill can come between the removal of a folder and its row in the journal; else nothing explains it."""
    killed = any(
        attempt.attempt >= found.attempt and attempt.outcome in (None, "died") for attempt in life.attempts
    )
    if killed and any(name > found.name for name in there):  # only then retention removes anything
        why = "retention has just removed it" if life.running else "removed just before a kill, it seems"
        return Finding("checkpoints", f"{found.name} is gone: {why}")
    return Finding(
        "checkpoints",
        f"{found.name} is missing, and the journal does not say that it was removed",
        good=False,
    )
