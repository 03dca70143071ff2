"""What there is to deliver of a run, and the delivering of it, one small step at a time."""

import getpass
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from states.table import State
from tracking.artifacts import METRICS
from tracking.delivery import (
    Closed,
    Delivery,
    Ending,
    Identity,
    Point,
    Refused,
    Remote,
    Target,
    Upload,
    open_delivery,
)
from tracking.description import describe
from tracking.fetching import Fetched, fetched
from tracking.inputs import DataSender
from tracking.journal import Attempt, Journal
from tracking.masking import mask_text, mask_tree, secrets_in
from tracking.outbox import Flight, Outbox, OutboxError, OutboxView, close_windows, read_outbox, select
from tracking.packed import NEWEST_METRICS, ROW_LENGTH, metrics_between
from tracking.rows import Measured, Outcome, Parent
from tracking.runs import RunFolder, folder_of_parent
from tracking.schema import connect_to_read
from tracking.source import Source, keep_source, read_sources, script_of, source_tags
from tracking.system_metrics import SystemSampler
from tracking.thinning import Pace
from tracking.uploads import Uploads, waiting_artifacts

__all__ = ["Shipment", "Waiting", "waiting"]

_TAGS_EVERY_S = 2.0
_HEARTBEAT_EVERY_S = 30.0
_MOST_VALUES = 20_000  # a flight: what the shipper holds in memory
_LONGEST_WINDOW_MS = 10_000

_ENDINGS: dict[Outcome, Ending] = {
    "done": "finished",
    "failed": "failed",
    "stopped": "killed",
    "died": "killed",
}


@dataclass(frozen=True)
class Waiting:
    """What is still to be delivered: metric values (replayed ones, and those that will be thinned, included), and
    artifacts by their paths.
    """

    points: int
    artifacts: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.points or self.artifacts)


def waiting(run: RunFolder, journal: Journal, sent: OutboxView, upload: Upload) -> Waiting:
    """What the journal has and the outbox `sent` does not; reads the journal only."""
    points = _count_points(run, sent.cursor) + sent.windows
    return Waiting(points, tuple(waiting_artifacts(run, journal, sent, upload)))


_COUNTED = frozenset({"id", "attempt", "seq", "keyset"})


def _count_points(run: RunFolder, cursor: int) -> int:
    connection = connect_to_read(run.journal)
    try:
        rows = connection.execute(
            f"""SELECT count(*) FROM {metrics_between(f"?1 / {ROW_LENGTH}", f"({NEWEST_METRICS})", _COUNTED)} AS packed
                    CROSS JOIN attempts ON attempts.attempt = packed.attempt
                    CROSS JOIN keysets AS pattern ON pattern.keyset = packed.keyset
                WHERE packed.id * {ROW_LENGTH} + pattern.pos > ?1
                    AND (attempts.kept_until IS NULL OR packed.seq <= attempts.kept_until)""",
            (cursor,),
        )
        return int(rows.fetchone()[0])
    finally:
        connection.close()


class Shipment:
    """One run on its way to one server. Every method may be interrupted at any point, by SIGKILL too.

    Those that speak to the server raise Unavailable, with nothing lost or done twice when they are called again.
    """

    def __init__(
        self,
        run: RunFolder,
        target: Target,
        outbox: Outbox,
        journal: Journal,
        notice: Callable[[str], None],
        *,
        at_once: bool = False,
    ):
        self._run, self._target, self._outbox, self._journal = run, target, outbox, journal
        self._secrets = secrets_in(os.environ)
        self._say = notice
        self._delivery: Delivery | None = None
        self._remote: Remote | None = None
        self._names: dict[str, str] = {}
        self._uncertain = outbox.flight() is not None
        self._pace = Pace()
        self._busy_since: float | None = None
        self._every = self._most_every = 1
        self._more = False
        self._at_once = at_once
        self._refused: set[str] = set()
        self._next_tags = self._next_heartbeat = 0.0
        self._last_beat: dict[str, str] = {}
        self._uploads = Uploads(
            run,
            target.upload,
            outbox,
            journal,
            self._notice,
            self._secrets,
            before_model=self.conclude,
            at_once=at_once,
        )
        self._data = DataSender(run, journal, self._notice)
        self._system = SystemSampler(journal, wanted=bool(target.settings.get("system_metrics")))
        attempts = journal.attempts()
        if attempts and not at_once:  # this process was begun with the attempt; later the files may be others
            keep_source(run, attempts[-1].attempt, attempts[-1].command, target.folder)

    def _notice(self, text: str) -> None:
        self._say(mask_text(text, self._secrets))

    @property
    def _target_text(self) -> str:
        return json.dumps([self._target.backend, self._target.settings], sort_keys=True)

    @property
    def opened(self) -> bool:
        """Is the run at the server known?"""
        return self._remote is not None

    def complete(self, attempt: Attempt) -> bool:
        """Was all of an ended run delivered before, as far as the outbox knows?"""
        return (
            self._outbox.target == self._target_text
            and attempt.outcome is not None
            and self._outbox.status == _status(attempt, _ENDINGS[attempt.outcome])
            and not self.waiting()
        )

    def waiting(self) -> Waiting:
        """What is left, but for artifacts that the server refused or that are gone from here."""
        found = waiting(self._run, self._journal, self._outbox.view(), self._target.upload)
        return Waiting(
            found.points, tuple(path for path in found.artifacts if path not in self._uploads.skipped)
        )

    # -- values: parameters, tags, metrics ---------------------------------------------------------------

    def deliver(self, attempt: Attempt) -> bool:
        """Deliver some of what the journal has; should it be called again at once?

        `attempt` is the run's newest.
        """
        if self._remote is None:
            self._open(attempt)
            return True
        if attempt.outcome is None and self._outbox.status != _status(attempt, "running"):
            if not self._remote.owned:
                self._at_server.running()
            self._outbox.note(status=_status(attempt, "running"))
        if self._outbox.params_sent < attempt.attempt:
            self._send_params()
        self._send_tags(attempt)
        return self._send_points(attempt)

    @property
    def _at_server(self) -> Delivery:
        assert self._delivery is not None, "opened first"
        return self._delivery

    def _open(self, attempt: Attempt) -> None:
        if self._delivery is None:
            self._delivery = open_delivery(self._target)
        known = self._outbox.remote_run_id if self._outbox.place == self._target.place else None
        came_from = self._fetched() if known is None else None
        known = came_from.remote_run_id if came_from is not None else known
        first, info = self._journal.attempts()[0], self._journal.run_info()
        script = mask_text(script_of(first.command), self._secrets)
        identity = Identity(info.id, info.name, first.started_ns, script, _user())
        try:
            remote = self._delivery.open(identity, known)
        except Refused as error:
            raise Closed(str(error)) from error
        self._outbox.begin(self._target.place, self._target_text, remote, attempt.attempt)
        if came_from is not None and remote.run_id == came_from.remote_run_id:
            for path, size in came_from.artifacts.items():
                self._outbox.artifact_sent(path, size)
        self._uncertain = self._outbox.flight() is not None
        self._remote = remote
        self._notice(f"delivering {info.id} to {remote.url or self._target.place}, run {remote.run_id}")

    def _fetched(self) -> Fetched | None:
        """The remote run that the run's folder was made from, if it is at the place that is delivered to."""
        found = fetched(self._run)
        return found if found is not None and found.place == self._target.place else None

    def _send_params(self) -> None:
        """Parameters are the first attempt's; what later ones changed becomes their tags."""
        attempts = self._journal.attempts()
        first = self._params_of(attempts[0])
        if not self._outbox.params_sent:
            for notice in self._at_server.params(first):
                self._notice(notice)
        for later in attempts[1:]:
            changed = {key: value for key, value in self._params_of(later).items() if first.get(key) != value}
            self._set_tags(
                {f"interlock.attempt.{later.attempt}.{key}": value for key, value in changed.items()}
            )
        self._outbox.note(params_sent=attempts[-1].attempt)

    def _params_of(self, attempt: Attempt) -> dict[str, str]:
        return _flat(mask_tree(attempt.params, self._secrets))

    def _send_tags(self, attempt: Attempt) -> None:
        if attempt.outcome is None:
            if time.monotonic() < self._next_tags:
                return
            self._next_tags = time.monotonic() + _TAGS_EVERY_S
        attempts, sources = self._journal.attempts(), read_sources(self._run)
        checkpoints = self._uploads.checkpoint_tags()
        tags = {
            "interlock.attempt": str(attempt.attempt),
            **self._signs_of_life(attempt),
            "interlock.host": attempt.host,
            "interlock.outcome": attempt.outcome or "running",
            "interlock.reason": attempt.reason,
            "interlock.exception": attempt.exception,
            **{f"interlock.attempt.{one.attempt}": _in_words(one) for one in attempts},
            **self._parent_tags(),
            **checkpoints,
            **source_tags(sources, owned=self._remote is None or self._remote.owned),
            **self._description(attempts, sources, checkpoints),
        }
        self._set_tags(tags)
        self._data.send(self._at_server)

    def _description(
        self, attempts: Sequence[Attempt], sources: Mapping[int, Source], checkpoints: Mapping[str, str]
    ) -> dict[str, str]:
        """The run in words, where the server has a place for it; a user's run is described by its owner."""
        tag = getattr(self._at_server, "description_tag", "")
        if not tag or self._remote is None or self._remote.owned:
            return {}
        page = getattr(self._at_server, "artifact_page", None)
        text = describe(
            self._run.id,
            self._remote.run_id,
            attempts,
            {key.rpartition(".")[2]: name for key, name in checkpoints.items()},
            parent=self._journal.run_info().parent,
            source=sources[max(sources)] if sources else None,
            pages={path: page(path) for path in self._outbox.artifacts} if page is not None else {},
        )
        return {tag: text}

    def _signs_of_life(self, attempt: Attempt) -> dict[str, str]:
        """When the training was last seen to live, and where it stood, renewed now and then; at its end, that end's."""
        if attempt.ended_ns is not None:
            return _beat(attempt.ended_ns, attempt.end_state)
        if time.monotonic() >= self._next_heartbeat:
            self._next_heartbeat = time.monotonic() + _HEARTBEAT_EVERY_S
            moved = self._journal.last_transition()
            self._last_beat = _beat(time.time_ns(), moved.dest if moved else None)
        return self._last_beat

    def _parent_tags(self) -> dict[str, str]:
        """The run that this one comes from, and that run's id at the server once it is known here."""
        parent = self._journal.run_info().parent
        if parent is None:
            return {}
        tags = {"interlock.parent": parent.run, "interlock.parent_kind": parent.kind}
        if parent.seq is not None:
            tags["interlock.parent_seq"] = str(parent.seq)
        there = self._outbox.sent_tags.get(self._at_server.parent_tag) or self._parent_there(parent)
        if there and self._at_server.parent_tag and self._remote and not self._remote.owned:
            tags[self._at_server.parent_tag] = there
        return tags

    def _parent_there(self, parent: Parent) -> str | None:
        folder = folder_of_parent(self._run, parent)
        if folder is None:
            return None
        try:
            sent = read_outbox(folder.outbox)
        except OutboxError:
            return None
        return sent.remote_run_id if sent.place == self._target.place else None

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        tags = {key: mask_text(value, self._secrets) for key, value in tags.items()}
        # A tag that was never set and is empty now needs no setting.
        changed = {key: value for key, value in tags.items() if self._outbox.sent_tags.get(key, "") != value}
        if not changed:
            return
        try:
            self._at_server.tags(changed)
        except Refused as error:
            self._at_server.check()
            if len(changed) > 1:
                for key, value in changed.items():
                    self._set_tags({key: value})
                return
            self._notice(f"tag {next(iter(changed))}: {error}")
        self._outbox.tags_sent(changed)

    def _send_points(self, attempt: Attempt) -> bool:
        # Where one flight follows another, what lies between them is part of what a flight takes.
        began, self._busy_since = self._busy_since or time.monotonic(), None
        flight = self._outbox.flight()
        if flight is None:
            flight = self._with_system(self._next_flight() or self._last_flight(attempt), attempt)
            if flight is None:
                return False
            if flight.points:
                self._outbox.depart(flight)
        refused = self._send_flight(flight)
        self._outbox.arrived(flight, refused)
        self._busy_since = time.monotonic()
        self._pace.took(len(flight.points), self._busy_since - began)
        # What a training has measured meanwhile waits for the next time: few points take as long as many.
        return self._more or self._at_once or attempt.outcome is not None

    def _next_flight(self) -> Flight | None:
        limit = min(_MOST_VALUES, self._at_server.most_points * self._every)
        rows: list[Measured] = []
        values, self._more = 0, False
        for found in self._journal.measured(after=self._outbox.cursor, page=limit):
            room = max(1, (limit - values) // len(found.keys))
            rows.append(found.part(slice(room)))
            values += len(found.keys) * len(rows[-1].ids)
            self._more = len(found.ids) >= room
            if self._more:
                break
        if not rows:
            return None
        self._every = self._pace_for(rows, values)
        return select(rows, self._outbox.marks, self._name, self._outbox.windows, self._every)

    def _with_system(self, flight: Flight | None, attempt: Attempt) -> Flight | None:
        """What the machine is doing goes along, since another call would cost more than it all."""
        sample = self._system.due(attempt)
        if not sample:
            return flight
        flight = flight or Flight(self._outbox.cursor, (), {}, self._outbox.windows)
        return replace(flight, points=(*flight.points, *sample))

    def _pace_for(self, rows: Sequence[Measured], values: int) -> int:
        """How many batches make one point, seen from how densely the journal's newest rows are filled."""
        newest = self._journal.newest_metrics()
        read, first = rows[-1].ids[-1] // ROW_LENGTH, rows[0].ids[0] // ROW_LENGTH
        density = values / (read - first + 1)
        self._pace.saw(round(newest * density))
        every = self._pace.every(round((newest - read) * density))
        if every > self._most_every:
            self._most_every = every
            self._notice(
                f"more values come than the server should be given: batch/* are now means of {every} batches (all "
                f"values are in the journal, and in {METRICS})"
            )
        return every

    def _last_flight(self, attempt: Attempt) -> Flight | None:
        """The open windows, when nothing follows that completes them, or not soon."""
        windows = self._outbox.windows
        oldest = min((window.time_ms for window in windows.values()), default=math.inf)
        if attempt.outcome is None and not self._at_once and oldest > time.time() * 1000 - _LONGEST_WINDOW_MS:
            return None
        return close_windows(self._outbox.cursor, windows)

    def _send_flight(self, flight: Flight) -> int:
        """Send it, again if need be; how many of its points the server will never take."""
        points = sorted(flight.points, key=lambda point: (point.key, point.step, point.time_ms))
        if self._uncertain:
            points = self._at_server.missing(points)
        self._uncertain = True
        most = self._at_server.most_points
        refused = sum(self._send_some(points[at : at + most]) for at in range(0, len(points), most))
        self._uncertain = False
        return refused

    def _send_some(self, points: list[Point]) -> int:
        if not points:
            return 0
        try:
            self._at_server.points(points)
        except Refused as error:
            self._at_server.check()
            if len(points) > 1:
                middle = len(points) // 2
                return self._send_some(points[:middle]) + self._send_some(points[middle:])
            if points[0].key not in self._refused:
                self._refused.add(points[0].key)
                self._notice(f"metric {points[0].key}: {error} (said once; its values are in the journal)")
            return 1
        return 0

    def _name(self, name: str) -> str:
        """What the server calls a metric."""
        if name not in self._names:
            self._names[name] = self._at_server.key(name)
            if self._names[name] != name:
                self._notice(f"metric {name!r} is shown as {self._names[name]!r}")
        return self._names[name]

    # -- artifacts ------------------------------------------------------------------------------------------

    def upload(self, attempt: Attempt) -> bool:
        """Upload one file; was there one?"""
        moved = self._uploads.step(self._at_server, attempt)
        if self._uploads.news:
            self._uploads.news = False
            self._next_tags = 0.0  # which checkpoints are the best and the last is said at once
        return moved

    # -- the end ------------------------------------------------------------------------------------------

    def conclude(self, attempt: Attempt) -> bool:
        """Everything has been delivered: say how the run ended. A user's run is left to its owner."""
        assert attempt.outcome is not None
        assert self._remote is not None
        ending = _ENDINGS[attempt.outcome]
        if not self._remote.owned and self._outbox.status != _status(attempt, ending):
            self._at_server.end(ending, (attempt.ended_ns or time.time_ns()) // 1_000_000)
        self._outbox.note(status=_status(attempt, ending), trouble="")
        return True


def _status(attempt: Attempt, status: str) -> str:
    return f"{attempt.attempt}:{status}"


def _beat(time_ns: int, state: State | None) -> dict[str, str]:
    found = {"interlock.heartbeat": _utc(time_ns)}
    return found if state is None else {**found, "interlock.state": state.value}


def _in_words(attempt: Attempt) -> str:
    """'stopped: SIGTERM; 2026-01-31T12:00:00Z to 2026-01-31T12:30:00Z on host, process 17'."""
    outcome = ": ".join(filter(None, [attempt.outcome or "running", attempt.reason, attempt.exception]))
    ended = f" to {_utc(attempt.ended_ns)}" if attempt.ended_ns is not None else ""
    return f"{outcome}; {_utc(attempt.started_ns)}{ended} on {attempt.host}, process {attempt.pid}"


def _utc(time_ns: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_ns // 1_000_000_000))


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{'data': {'seed': 1}} becomes {'data.seed': '1'}."""
    found: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
