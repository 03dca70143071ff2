"""Run folders: made, found by name or id, and held by one writer at a time (the lease)."""

import contextlib
import difflib
import fcntl
import json
import os
import re
import shutil
import socket
import struct
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from states.errors import InterlockError
from tracking.forks import forget_in_children
from tracking.rows import Parent
from tracking.schema import create_journal, newest_checkpoint

__all__ = [
    "BEGUN_VARIABLE",
    "RESUME_VARIABLE",
    "Holder",
    "Lease",
    "LeaseHeldError",
    "RootError",
    "RunFolder",
    "RunNameError",
    "RunNotFound",
    "check_name",
    "create_run",
    "find_run",
    "folder_of_parent",
    "lease_holder",
    "list_runs",
]

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_ID = re.compile(r"(?P<name>.+)-(?P<stamp>\d{8}-\d{6}-[0-9a-z]{4})")
_LONGEST_NAME = 100


RESUME_VARIABLE = "INTERLOCK_RESUME"
"""The environment variable by which a command tells a script which runs' folders to go on with, one a line."""

BEGUN_VARIABLE = "INTERLOCK_BEGUN"
"""The one that names the file in which a script's trainers tell `interlock launch` which runs they are at work on."""


class RunNameError(InterlockError):
    """A name that cannot be a run's."""


class RootError(InterlockError):
    """The folder that runs are kept in cannot be used."""


class RunNotFound(InterlockError):
    """There is no run of that name, id or path."""


class LeaseHeldError(InterlockError):
    """Another process (or this one already) writes to the run."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, `root/NAME-YYYYMMDD-HHMMSS-XXXX` (UTC), and the paths of what is in it."""

    path: Path

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def name(self) -> str:
        """The name that the user gave; runs may share it."""
        match = _ID.fullmatch(self.id)
        return match["name"] if match else self.id

    @property
    def journal(self) -> Path:
        """The SQLite file of what happened."""
        return self.path / "journal.sqlite"

    @property
    def recorder(self) -> Path:
        """The flight recorder of the newest attempt."""
        return self.path / "recorder.bin"

    @property
    def lease(self) -> Path:
        """The file whose lock says who writes. Its holder must not open it again, see `Lease`."""
        return self.path / "lease"

    @property
    def outbox(self) -> Path:
        """The shipper's own database."""
        return self.path / "outbox.sqlite"

    @property
    def outbox_lease(self) -> Path:
        """The file whose lock says which shipper delivers."""
        return self.path / "outbox.lease"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def artifacts(self) -> Path:
        """The folder of artifacts of the user's own."""
        return self.path / "artifacts"

    @property
    def console_log(self) -> Path:
        """What the run printed."""
        return self.path / "console.log"

    @property
    def final_model(self) -> Path:
        """The folder of a final model that waits for its delivery."""
        return self.path / "final_model"

    @property
    def command(self) -> Path:
        """The command that started the run, unmasked."""
        return self.path / "command.json"


def check_name(name: str) -> None:
    """Raise RunNameError, saying why, if `name` cannot be the name of a run."""
    wrong = _what_is_wrong(name)
    if wrong:
        raise RunNameError(
            f"run name: found {name!r}, which {wrong}; expected 1 to {_LONGEST_NAME} printable characters "
            "without path separators, such as 'digits' or 'resnet50.lr-3e-4'"
        )


def _what_is_wrong(name: object) -> str:
    if not isinstance(name, str):
        return f"is of type {type(name).__name__}"
    tests = (
        (not name.strip(), "is empty"),
        ("/" in name or "\\" in name, "has a path separator in it (a folder for runs is given as root)"),
        (name.startswith("."), "begins with a dot"),
        (name.startswith("-"), "begins with a dash"),
        (name != name.strip(), "begins or ends with white space"),
        (not name.isprintable(), "has an unprintable character in it"),
        (len(name.encode(errors="replace")) > _LONGEST_NAME, "is too long for a folder's name"),
        (_ID.fullmatch(name) is not None, "looks like the id of a run (to continue that run, resume it)"),
    )
    return next((text for found, text in tests if found), "")


def create_run(
    root: Path | str, name: str, parent: Parent | None = None, *, created_ns: int | None = None
) -> RunFolder:
    """Make the folder of a new run, with an empty journal in it; others see it whole or not at all.

    `parent` is the run that it comes from, if it comes from one. `created_ns` is since 1970; default: now.
    Raises RunNameError, or RootError if `root` cannot be written.
    """
    check_name(name)
    root = _writable(Path(root))
    created = time.time_ns() if created_ns is None else created_ns
    draft = root / f".new-{os.getpid()}-{threading.get_ident()}-{created}"
    try:
        draft.mkdir()
        try:
            (draft / "checkpoints").mkdir()
            while True:
                run = RunFolder(root / f"{name}-{_stamp(created)}")
                RunFolder(draft).journal.unlink(missing_ok=True)
                create_journal(
                    RunFolder(draft).journal, run_id=run.id, name=name, created_ns=created, parent=parent
                )
                if _renamed(draft, run.path):
                    break
                created += 1_000  # another process made a run of this name in this very microsecond
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        _fsync(root)
    except OSError as error:
        raise RootError(f"root {root}: cannot make a run's folder in it ({error})") from error
    return run


def _writable(root: Path) -> Path:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RootError(
            f"root {root}: cannot be made ({error}); expected a folder for runs: choose another root"
        ) from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise RootError(
            f"root {root}: found a folder that cannot be written; choose another root, or its mode"
        )
    return root.resolve()


def _renamed(draft: Path, final: Path) -> bool:
    try:
        draft.rename(final)
    except OSError:
        if final.exists():
            return False
        raise
    return True


def _stamp(created_ns: int) -> str:
    """Date and time (UTC), and four characters that go up within the second: ids of a name sort by age."""
    seconds, rest = divmod(created_ns, 1_000_000_000)
    fraction = rest * 36**4 // 1_000_000_000
    characters = "".join(_DIGITS[fraction // 36**place % 36] for place in (3, 2, 1, 0))
    return f"{datetime.fromtimestamp(seconds, UTC):%Y%m%d-%H%M%S}-{characters}"


def _fsync(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def list_runs(root: Path | str) -> list[RunFolder]:
    """The runs of `root`, newest first; none if there is no such folder. Raises RootError if it is none.

    One whose journal is gone is among them as long as it has checkpoints: to open its journal says what can be done.
    """
    root = Path(root)
    try:
        folders = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RootError(f"root {root}: cannot be listed ({error}); expected a folder of runs") from error
    stamped = [(match["stamp"], match[0]) for name in folders if (match := _ID.fullmatch(name))]
    runs = [RunFolder(root.resolve() / name) for _, name in sorted(stamped, reverse=True)]
    return [run for run in runs if _is_run(run)]


def _is_run(folder: RunFolder) -> bool:
    return folder.journal.exists() or newest_checkpoint(folder.path) is not None


def find_run(reference: Path | str, root: Path | str = "runs") -> RunFolder:
    """The run that is meant by an id, a name (its newest run), or the path of a run's folder.

    Raises RunNotFound, which lists what comes nearest.
    """
    runs = list_runs(root)
    text = str(reference)
    for run in runs:
        if run.id == text:
            return run
    for run in runs:
        if run.name == text:
            return run
    folder = RunFolder(Path(reference).expanduser().resolve())
    if _is_run(folder):
        return folder
    if folder.path.is_dir():
        raise RunNotFound(
            f"{text!r} is a folder, but no run's: it has no {folder.journal.name}; expected a run's folder, such as "
            f"{Path(root) / 'NAME-YYYYMMDD-HHMMSS-XXXX'}; {_nearest(text, runs)}"
        )
    raise RunNotFound(
        f"no run {text!r} in {Path(root)}, nor a run's folder of that path; {_nearest(text, runs)}"
    )


def folder_of_parent(run: RunFolder, parent: Parent) -> RunFolder | None:
    """Where the parent of `run` lies: where it was, or beside `run` (both were moved); None: it is gone."""
    folders = (RunFolder(Path(parent.path)), RunFolder(run.path.parent / parent.run))
    return next((folder for folder in folders if folder.id == parent.run and folder.journal.is_file()), None)


def _nearest(text: str, runs: list[RunFolder]) -> str:
    if not runs:
        return "there are no runs at all: is the root right?"
    names = list(dict.fromkeys(run.name for run in runs))
    near = difflib.get_close_matches(text, names + [run.id for run in runs], n=5, cutoff=0.5)
    return f"there is {', '.join(near or names[:5])}"


@dataclass(frozen=True)
class Holder:
    """Who holds a lease: `started` is the start of the process in seconds since 1970 (0: not known)."""

    host: str
    pid: int
    started: float

    def __str__(self) -> str:
        since = f", started {datetime.fromtimestamp(self.started):%Y-%m-%d %H:%M:%S}" if self.started else ""
        return f"process {self.pid} on {self.host}{since}"


class Lease:
    """The right to write to a run, held by one process until it releases it or dies.

    Invariant: as long as the lease is held, this process has exactly one descriptor of the file, and never
    closes another: POSIX drops a process's locks when it closes *any* descriptor of the file. Forked children
    inherit the descriptor, but not the lock; they close it and are no holders.
    """

    def __init__(self, path: Path, file: int, holder: Holder):
        self.path = path
        self.holder = holder
        self._file = file

    @classmethod
    def acquire(cls, run: RunFolder | Path | str, wait_s: float = 1.0) -> "Lease":
        """Take the lease of a run (or of any lock file), waiting up to `wait_s` for a holder about to leave.

        Raises LeaseHeldError with host, process and start time of the holder, RootError if the file cannot
        be written.
        """
        path = _lease_path(run)
        deadline = time.monotonic() + wait_s
        while True:
            with _table.lock:
                found = _table.try_acquire(path)
            if isinstance(found, Lease):
                return found
            if time.monotonic() >= deadline:
                break
            time.sleep(0.02)
        if path in _table.held:
            held, advice = f"this very process ({found})", "Close the Trainer that has it: trainer.close()"
        else:
            held, advice = str(found), "Wait for it to end or stop it"
        raise LeaseHeldError(
            f"{path.parent.name}: {path.name} is held by {held}; expected nobody else to write to this run. "
            f"{advice}, or start a run of another name"
        )

    @property
    def held(self) -> bool:
        """Does this process hold it (still)?"""
        return self._file >= 0

    def release(self) -> None:
        """Give it back; nothing happens if it is not held any more, or this is a forked child."""
        with _table.lock:
            if self._file >= 0:
                _holder_file(self.path).unlink(missing_ok=True)
                os.close(self._file)
                self._file = -1
                _table.held.pop(self.path, None)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def lease_holder(run: RunFolder | Path | str) -> Holder | None:
    """Who holds the lease of a run (or of any lock file); None if it is free. Takes no lock itself."""
    path = _lease_path(run)
    with _table.lock:
        mine = _table.held.get(path)
        return mine.holder if mine else _other_holder(path)


class _Table:
    """The leases of this process, and the one lock under which lease files are opened and closed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.held: dict[Path, Lease] = {}
        forget_in_children(self)

    def forget(self) -> None:
        # Another thread of the parent may have held the lock when it forked.
        self.lock = threading.Lock()
        for lease in self.held.values():
            os.close(lease._file)
            lease._file = -1
        self.held.clear()

    def try_acquire(self, path: Path) -> Lease | Holder:
        mine = self.held.get(path)
        if mine:
            return mine.holder
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RootError(
                f"{path}: cannot open the lease ({error}); is the run's folder writable?"
            ) from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            return _other_holder(path) or Holder("an unknown host", 0, 0.0)
        holder = Holder(socket.gethostname(), os.getpid(), _process_started())
        with contextlib.suppress(OSError):  # on a full disk the lock still holds; others see the process id
            _write_holder(path, holder)
        self.held[path] = Lease(path, file, holder)
        return self.held[path]


_table = _Table()

# struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid
_FLOCK = struct.Struct("@hhqqi0q")


def _other_holder(path: Path) -> Holder | None:
    """Ask the kernel who has the lock; asking takes none, so that two who ask do not meet each other."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        answer = fcntl.fcntl(file, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    finally:
        os.close(file)
    kind, _, _, _, pid = _FLOCK.unpack(answer)
    if kind == fcntl.F_UNLCK:
        return None
    written = _read_holder(path)
    # The kernel knows the process of this machine (0 or less: it is in another one, or another container).
    if written and (pid <= 0 or written.pid == pid):
        return written
    return Holder(socket.gethostname() if pid > 0 else "another host", pid, 0.0)


def _lease_path(run: RunFolder | Path | str) -> Path:
    path = run.lease if isinstance(run, RunFolder) else Path(run)
    return path.parent.resolve() / path.name


def _holder_file(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write_holder(path: Path, holder: Holder) -> None:
    # Beside the lease, because readers of the lease file itself would have to open it.
    draft = path.with_name(f"{path.name}.json.new")
    draft.write_text(json.dumps(asdict(holder)))
    draft.rename(_holder_file(path))


def _read_holder(path: Path) -> Holder | None:
    try:
        found = json.loads(_holder_file(path).read_text())
        return Holder(str(found["host"]), int(found["pid"]), float(found["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _process_started() -> float:
    import psutil  # slow to import, and needed by writers only

    return float(psutil.Process().create_time())
