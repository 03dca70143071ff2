"""Is this machine, and what is installed on it, fit for training? Signs for `interlock doctor`; changes nothing."""

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.commands.layout import count, duration, size
from orchestrator.commands.signs import Sign, bad, fine, note
from orchestrator.snapshot.chunks import processors
from tracking.delivery import TrackerError
from tracking.masking import mask_text
from tracking.mlflow_delivery import MLflow
from tracking.runs import lease_holder, list_runs
from tracking.schema import filesystem_type, is_local

__all__ = ["LEAST_FREE", "allows", "clock", "disk", "environment", "store", "threads", "versions"]

LEAST_FREE = 500_000_000
"""Bytes: with less a checkpoint and the journal may not find room."""
_LEAST_SHM = 128_000_000
_LEAST_SQLITE = (3, 30, 0)  # FILTER
_FIRST_SECOND = 1_704_067_200  # 2024: a clock that is behind it was never set
_SLOW_SYNC_S = 0.5
_PROBE_S = 120.0

_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__, "built": torch.version.cuda or torch.version.hip, "available": cuda,
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "threads": torch.get_num_threads(),
}))
"""


def environment(root: Path, timeout: float) -> Iterator[Sign]:
    """Everything about this machine, the root and the tracking server, which gets `timeout` seconds to answer."""
    yield _python()
    yield from versions()
    yield from _torch()
    yield _sqlite()
    yield from disk(root)
    yield clock(root)
    yield _shared_memory()
    yield from _hashes()
    yield from _shippers(root)
    try:
        place = MLflow().destination().place
    except TrackerError as error:
        yield bad(
            "mlflow at",
            str(error),
            "a place that can be one",
            "mend it, or unset it for MLflow's local store",
        )
    else:
        yield store(place, timeout)


# -- what is installed ---------------------------------------------------------------------------------------


def _python() -> Sign:
    return fine("python", f"{platform.python_version()}, {sys.executable}")


def versions() -> Iterator[Sign]:
    """Is what interlock needs installed, in versions it works with?"""
    try:
        needed = metadata.requires("interlock") or []
    except metadata.PackageNotFoundError:
        yield note(
            "packages",
            "interlock runs from source files that are not installed",
            "an installed package, whose requirements can be looked at",
            "pip install interlock, or pip install -e . in its source",
        )
        return
    for requirement in needed:
        if ";" in requirement:  # an extra's
            continue
        name, bounds = re.fullmatch(r"([\w.-]+)\s*(.*)", requirement.strip(), re.DOTALL).groups()  # type: ignore[union-attr]
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield bad(name, "not installed", f"{name} {bounds}", f"pip install '{requirement}'")
            continue
        if allows(bounds, found):
            yield fine(name, found)
        else:
            yield bad(name, found, bounds, f"pip install '{requirement}'")


def allows(bounds: str, version: str) -> bool:
    """Is the version within bounds such as '>=0.9.2,<0.10'? Compares releases: what follows '+' or 'rc' is left out."""
    release = _release(version)
    for bound in filter(None, bounds.split(",")):
        sign, limit = re.fullmatch(r"\s*(>=|<)\s*([\w.]+)\s*", bound).groups()  # type: ignore[union-attr]
        if (sign == ">=" and release < _release(limit)) or (sign == "<" and release >= _release(limit)):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else [0]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _torch() -> Iterator[Sign]:
    """What torch says of itself, in a process of its own: it may be what is broken."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_S, check=False
        )
    except subprocess.TimeoutExpired:
        yield bad(
            "torch",
            f"importing it took more than {_PROBE_S:.0f} s",
            "a few seconds",
            f"try `{sys.executable} -c 'import torch'`: a slow disk, or a driver that does not answer?",
        )
        return
    if child.returncode:
        said = (child.stderr.strip().splitlines() or [f"status {child.returncode}"])[-1]
        yield bad(
            "torch",
            f"cannot be imported: {said}",
            "`import torch` to work",
            "install torch again: pytorch.org",
        )
        return
    probed = json.loads(child.stdout.splitlines()[-1])
    built = f"built for CUDA {probed['built']}" if probed["built"] else "built for the CPU only"
    devices = ", ".join(probed["devices"])
    if probed["available"]:
        yield fine("device", f"{built}: {devices}")
    elif probed["built"]:
        yield note(
            "device",
            f"{built}, but no device can be used",
            "a GPU and a driver for it, or a build for the CPU",
            "look at `nvidia-smi`; trainings run on the CPU",
        )
    elif Path("/dev/nvidia0").exists():
        yield bad(
            "device",
            f"a GPU is there (/dev/nvidia0), but torch is {built}",
            "a build for CUDA",
            "install torch for CUDA: pytorch.org",
        )
    else:
        yield fine("device", built)
    yield threads(probed["threads"])


def threads(found: int) -> Sign:
    """Are there more threads of torch than cores that this process may use?"""
    cores: float = processors()
    limit = _cpu_limit()
    text = f"{count(found, 'thread')} of torch on {count(int(cores), 'core')}"
    if limit is not None and limit < cores:
        text += f", of which this container may use {limit:g}"
        cores = limit
    if found > max(1, cores):
        return note(
            "threads",
            text,
            f"at most {max(1, int(cores))}: threads that wait for each other's core slow each batch down",
            f"OMP_NUM_THREADS={max(1, int(cores))}, or torch.set_num_threads",
        )
    return fine("threads", text)


def _cpu_limit() -> float | None:
    """Cores that the control group may use; None: no limit is known."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _sqlite() -> Sign:
    if sqlite3.sqlite_version_info < _LEAST_SQLITE:
        least = ".".join(map(str, _LEAST_SQLITE))
        return bad(
            "sqlite", sqlite3.sqlite_version, f"{least} or later", "use a Python built with a newer SQLite"
        )
    return fine("sqlite", sqlite3.sqlite_version)


# -- the machine ---------------------------------------------------------------------------------------------


def disk(root: Path, room: int = LEAST_FREE) -> Iterator[Sign]:
    """Is there `room` in bytes, and can journals and leases live on this file system?"""
    there = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    if not there.is_dir():
        yield bad("root", f"{there} is a file", "a folder for runs", "choose another --root")
        return
    if not os.access(there, os.W_OK | os.X_OK):
        yield bad(
            "root", f"{there} cannot be written", "a folder that can be", "choose another root, or its mode"
        )
        return
    usage, nodes = shutil.disk_usage(there), os.statvfs(there)
    text = f"{size(usage.free)} free of {size(usage.total)} at {there}"
    if usage.free < room:
        yield bad("disk", text, f"at least {size(room)}", "free some space: a training halts on a full disk")
    elif nodes.f_files and nodes.f_favail < 1000:
        yield bad("disk", f"{text}, but {nodes.f_favail} inodes", "1,000 inodes", "remove files")
    else:
        yield fine("disk", text)
    kind = filesystem_type(there.resolve())
    if not is_local(kind):
        yield note(
            "file system",
            f"{kind} at {there}",
            "a local one, such as ext4 or xfs, where the journal is kept with a WAL",
            "expect readers to hold the training up for moments; one machine at a time may train a run",
        )
    else:
        yield fine("file system", kind or "not known")
    yield _locks(there)


def _locks(folder: Path) -> Sign:
    """A lease is a lock, and a journal is as durable as fsync makes it: try both."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(b"\0" * 4096)
            began = time.perf_counter()
            os.fsync(file.fileno())
            took = time.perf_counter() - began
    except OSError as error:
        locks = error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
        return bad(
            "locks",
            f"{'a lock' if locks else 'a file'} in {folder}: {error.strerror}",
            "files that can be written, locked (lockf) and synchronised (fsync)",
            "choose a root on another file system",
        )
    if took > _SLOW_SYNC_S:
        return note(
            "locks",
            f"fsync of 4 kB took {duration(int(took * 1e9))}",
            f"less than {_SLOW_SYNC_S:g} s",
            "the journal and checkpoints wait for it in the background: is the disk busy, or remote?",
        )
    return fine("locks", f"a lock is given, fsync took {duration(int(took * 1e9))}")


def clock(root: Path) -> Sign:
    """Was the clock set, and is it not behind the newest run's?"""
    now = time.time()
    text = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now))
    wrong = "set the clock (NTP): the newest run of a name is told by its time"
    if now < _FIRST_SECOND:
        return bad("clock", text, "the time of today", wrong)
    runs = list_runs(root) if root.is_dir() else []
    if runs:
        newest = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now + 60))
        stamp = runs[0].id[-20:-5]
        if stamp > newest:
            return bad("clock", f"{text}, but {runs[0].id} was made later", "runs made before now", wrong)
    return fine("clock", text)


def _shared_memory() -> Sign:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return note(
            "/dev/shm",
            "not there",
            "shared memory: data workers hand batches over in it",
            "num_workers=0, or mount it",
        )
    usage = shutil.disk_usage(folder)
    text = f"{size(usage.free)} free of {size(usage.total)}"
    if usage.free < _LEAST_SHM:
        return note(
            "/dev/shm",
            text,
            f"{size(_LEAST_SHM)}: data workers hand batches over in it, and die of SIGBUS where it is full",
            "docker run --shm-size=1g; or num_workers=0",
        )
    return fine("/dev/shm", text)


def _hashes() -> Iterator[Sign]:
    if os.environ.get("PYTHONHASHSEED", "random") == "random":
        yield note(
            "hashes",
            "PYTHONHASHSEED is not set: sets of strings have another order in each process",
            "no training data in an order that a set gave; such a run cannot be resumed exactly",
            "sorted(...) around such sets, or PYTHONHASHSEED=0",
        )


def _shippers(root: Path) -> Iterator[Sign]:
    """Processes that deliver runs of which the training has ended."""
    left = [
        f"{run.id} ({holder})"
        for run in (list_runs(root) if root.is_dir() else [])
        if (holder := lease_holder(run.outbox_lease)) is not None and lease_holder(run) is None
    ]
    if left:
        yield note(
            "shippers",
            f"{count(len(left), 'run')} still being delivered: {', '.join(left[:3])}",
            "a minute or so after a training, unless the server is away",
            "`interlock doctor RUN` says what one waits for",
        )


# -- the tracking server -------------------------------------------------------------------------------------


def store(uri: str, timeout: float) -> Sign:
    """Can the store that trainings of this folder would be delivered to be reached within `timeout` seconds?"""
    parts, shown = urlsplit(uri), mask_text(uri)
    scheme = parts.scheme.partition("+")[0]
    if scheme in ("http", "https"):
        return _server(uri, shown, timeout)
    if scheme in ("file", "sqlite"):
        path = Path(parts.path) if scheme == "file" else Path(uri.partition(":///")[2].partition("?")[0])
        there = next(p for p in (path, *path.parents) if p.exists())
        if os.access(there, os.W_OK):
            return fine("mlflow at", shown)
        return bad("mlflow at", f"{shown}: cannot be written", "a store that can", "set MLFLOW_TRACKING_URI")
    if parts.hostname is None:
        return fine("mlflow at", f"{shown}, not tried")
    port = parts.port or {"postgresql": 5432, "mysql": 3306, "mssql": 1433}.get(scheme, 443)
    try:
        with socket.create_connection((parts.hostname, port), timeout=timeout):
            return fine("mlflow at", f"{shown}, which answers")
    except OSError as error:
        return _away(shown, str(error))


def _server(uri: str, shown: str, timeout: float) -> Sign:
    parts = urlsplit(uri)
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    began = time.perf_counter()
    try:
        with urllib.request.urlopen(f"{plain.rstrip('/')}/health", timeout=timeout) as answer:
            answer.read(1024)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return note(
                "mlflow at",
                f"{shown} asks who is there (status {error.code})",
                "credentials in the environment",
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
            )
        return bad(
            "mlflow at",
            f"{shown}/health answers with status {error.code}",
            "an MLflow server",
            "is the address right? MLFLOW_TRACKING_URI, or MLflow(tracking_uri=...)",
        )
    except (OSError, ValueError) as error:
        return _away(shown, str(getattr(error, "reason", error)))
    return fine(
        "mlflow at", f"{shown}, which answers in {duration(int((time.perf_counter() - began) * 1e9))}"
    )


def _away(shown: str, why: str) -> Sign:
    return bad(
        "mlflow at",
        f"{shown} cannot be reached: {mask_text(why)}",
        "an answer; trainings go on without, and deliver later",
        "start the server, or set MLFLOW_TRACKING_URI; afterwards `interlock sync --all`",
    )
