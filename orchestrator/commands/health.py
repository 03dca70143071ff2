"""What is wrong with a run? Signs for `interlock doctor RUN`; changes nothing, not even what `check` would settle."""

import os
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from orchestrator.commands.arguments import reference
from orchestrator.commands.check import examine
from orchestrator.commands.environment import LEAST_FREE, disk
from orchestrator.commands.layout import count, duration
from orchestrator.commands.moment import Moment, seize
from orchestrator.commands.resume import ResumeError, read_command
from orchestrator.commands.show import delivery_of
from orchestrator.commands.signs import Sign, bad, fine, note
from orchestrator.commands.sync import in_words
from orchestrator.errors import NonFiniteError
from states.table import State, Trigger
from tracking.journal import Journal, JournalError
from tracking.recorder import RecorderError
from tracking.recorder_view import read_recorder
from tracking.runs import RunFolder

__all__ = ["health"]

_STALL_S = 60.0


def health(run: RunFolder, root: Path) -> Iterator[Sign]:
    """Everything about a run: its process, how it ended, its files, its delivery."""
    name = reference(run, root)
    try:
        with Journal.open(run) as journal:
            moment = seize(run, journal)
            messages = [record.message for record in journal.logs() if record.level == "WARNING"]
    except (JournalError, sqlite3.Error) as error:
        yield bad("journal", str(error), "a journal that can be read", f"interlock check {name}")
        yield from _room(run, None)
        return
    yield from _process(moment, name)
    yield from _ending(moment, name)
    yield from _divergence(messages, name)
    yield from _recorder(moment)
    for finding in examine(run):
        if not finding.good:
            yield bad(finding.part, finding.text, "what was written, whole", f"interlock check {name}")
        elif finding.part in ("file", "checkpoints"):
            yield fine(finding.part, finding.text)
    yield from _way_on(moment, name)
    yield from _delivery(moment, name)
    yield from _room(run, moment)
    yield from _warnings(messages, name)


def _process(moment: Moment, name: str) -> Iterator[Sign]:
    life, work, process = moment.standing.life, moment.work, moment.process
    holder = life.holder
    if holder is None:
        return
    if process is None and holder.host == socket.gethostname():
        yield bad(
            "process",
            f"the lease is held by {holder}, which is not there",
            "a process that holds it",
            "was it started in another container that shares this folder? Look there; end it, and the lease is free",
        )
    elif process is not None and process.state == "T":
        yield bad(
            "process",
            f"{holder} is stopped (SIGSTOP, or Ctrl-Z in its terminal)",
            "a process that runs",
            f"kill -CONT {holder.pid}",
        )
    elif work is not None and moment.now_ns - work.since_ns > _STALL_S * 1e9 and work.unusual(moment.now_ns):
        usual = f"{duration(work.usual_ns)} as before" if work.usual_ns is not None else "an end"
        advice = f"interlock watch {name}; `py-spy dump --pid {holder.pid}` says where in the code"
        if work.trigger is Trigger.FETCH and moment.wanted("num_workers"):
            advice += (
                ". Data workers are forked, and hang where a thread of the script held a lock at that moment: "
                'try DataLoader(multiprocessing_context="spawn")'
            )
        yield note(
            "process",
            f"at {work.words} for {duration(moment.now_ns - work.since_ns)}",
            usual,
            advice,
        )
    else:
        yield fine("process", f"{holder} is at work on it")


def _ending(moment: Moment, name: str) -> Iterator[Sign]:
    """How the newest attempt ended, where it did not end well."""
    standing, attempts = moment.standing, moment.attempts
    if not attempts or standing.life.running:
        return
    newest, place = attempts[-1], standing.place
    resume = f"interlock resume {name}"
    at = f"in {standing.state.value} {place}"
    if standing.kind == "died" or newest.outcome == "died":
        settled = "" if newest.outcome else "; its end is not written down yet"
        yield bad(
            "ending",
            f"attempt {newest.attempt} died without a word, {at}{settled}",
            "DONE, or a halt with a reason",
            f"{resume}. Out of memory? `dmesg | grep -i 'killed process'` (SIGKILL leaves no other trace)",
        )
    elif newest.exception.startswith(NonFiniteError.__name__):
        back = f"--epoch {place.epoch} --batch {place.batch}" if place.batch >= 0 else ""
        yield bad(
            "ending",
            f"attempt {newest.attempt} halted on a loss or gradient that is NaN or infinite, {place}",
            "finite ones; a resume would meet it again",
            f"interlock blame {name} names what made it, interlock seek {name} {back} goes there; "
            f'nonfinite="skip" and {resume} goes on without that batch',
        )
    elif newest.outcome == "failed":
        yield bad(
            "ending",
            f"attempt {newest.attempt} failed {at}: {' '.join(newest.exception.split())}",
            "DONE",
            f"mend its cause, then {resume}",
        )
    elif newest.outcome == "stopped":
        yield note("ending", f"attempt {newest.attempt} stopped: {newest.reason}", "DONE", resume)
    else:
        yield fine("ending", f"{standing.state.value}: {newest.reason}")


def _divergence(messages: list[str], name: str) -> Iterator[Sign]:
    found = [message for message in messages if "expected the same, bit for bit" in message]
    if found:
        yield bad(
            "divergence",
            found[-1],
            "the same losses where batches are done again",
            "docs/exactness.md; interlock log and diff show where",
        )


def _recorder(moment: Moment) -> Iterator[Sign]:
    if moment.standing.life.holder is None and moment.standing.kind != "died":
        return  # all that it held is in the journal
    try:
        view = read_recorder(moment.run.recorder)
    except (OSError, RecorderError) as error:
        if moment.attempts:
            yield bad(
                "recorder",
                str(error),
                "a flight recorder that can be read",
                "what was not in the journal yet is lost: a quarter of a second; a resume does it again",
            )
        return
    if view.damaged:
        yield bad(
            "recorder",
            f"{count(view.damaged, 'frame')} make no sense, as after a power cut",
            "whole frames",
            "nothing: what they held is done again on resume",
        )
    else:
        yield fine("recorder", f"{count(len(view.records), 'transition')}, whole")


def _way_on(moment: Moment, name: str) -> Iterator[Sign]:
    """Could a run that has not ended be gone on with?"""
    standing = moment.standing
    if standing.kind not in ("died", "ended") or standing.state is State.DONE:
        return
    there = [c for c in moment.checkpoints if (moment.run.checkpoints / c.name).is_dir()]
    if not there:
        yield bad(
            "way on",
            "there is no checkpoint",
            "one to resume from",
            "begin anew; with checkpoint=None none are made. On another machine: interlock resume mlflow:RUN_ID",
        )
    try:
        read_command(moment.run)
    except ResumeError as error:
        yield note("command", str(error), "a command that can be started again", "as it says")


def _delivery(moment: Moment, name: str) -> Iterator[Sign]:
    found = delivery_of(moment.run)
    if isinstance(found, str):
        yield bad("delivery", found, "an outbox that can be read", f"interlock sync {name} makes a new one")
        return
    if not found.tracked:
        yield fine("delivery", "none: made with track=None")
        return
    waiting = in_words(found.points_waiting, len(found.artifacts_waiting))
    if found.trouble:
        yield bad(
            "delivery",
            f"{found.place}: {found.trouble}" + (f"; waiting: {waiting}" if waiting else ""),
            "everything delivered",
            f"mend that, then interlock sync {name}; see {moment.run.path / 'shipper.log'}",
        )
    elif waiting and found.shipper is None:
        yield bad(
            "delivery",
            f"{waiting} waiting, and nobody delivers",
            "everything delivered",
            f"interlock sync {name}",
        )
    elif waiting:
        yield fine("delivery", f"{waiting} waiting; {found.shipper} is at it")
    else:
        yield fine("delivery", f"everything is delivered to {found.place}")


def _room(run: RunFolder, moment: Moment | None) -> Iterator[Sign]:
    largest = max((c.size_bytes for c in moment.checkpoints), default=0) if moment else 0
    yield from disk(run.path, max(LEAST_FREE, 3 * largest))
    if run.journal.exists() and not os.access(run.journal, os.W_OK):
        yield bad("journal", f"{run.journal} cannot be written", "a file of yours", "its owner or mode")


def _warnings(messages: list[str], name: str) -> Iterator[Sign]:
    if messages:
        yield note(
            "warnings",
            f"{count(len(messages), 'warning')}, the last: {' '.join(messages[-1].split())}",
            "none",
            f"interlock watch {name} --once shows the newest",
        )
