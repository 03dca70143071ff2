"""Run folders and leases, with real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tracking
from states.errors import InterlockError
from tracking.journal import Journal, Parent
from tracking.runs import (
    Lease,
    LeaseHeldError,
    RootError,
    RunFolder,
    RunNameError,
    RunNotFound,
    create_run,
    find_run,
    folder_of_parent,
    lease_holder,
    list_runs,
)
from tracking.schema import FORMAT

ROOT = Path(tracking.__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@contextmanager
def process(script: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    """A child that runs `script`, once it has printed its first line; killed at the end."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as child:
        assert child.stdout is not None
        child.first_line = child.stdout.readline().strip()  # type: ignore[attr-defined]
        try:
            yield child
        finally:
            child.kill()


HOLD = """
import sys, time
from tracking.runs import *
lease = Lease.acquire(RunFolder(__import__("pathlib").Path(sys.argv[1])))
print(lease.holder.pid, flush=True)
time.sleep(60)
"""


def test_a_new_run(tmp_path: Path) -> None:
    run = create_run(tmp_path / "deep" / "runs", "digits", created_ns=1_700_000_000_123_456_789)
    assert run.id == "digits-20231114-221320-4fzz"
    assert run.name == "digits"
    assert run.path.parent == tmp_path / "deep" / "runs"
    assert run.checkpoints.is_dir()
    assert sorted(entry.name for entry in run.path.iterdir()) == ["checkpoints", "journal.sqlite"]
    with Journal.open(run) as journal:
        info = journal.run_info()
    assert (info.id, info.name, info.created_ns, info.format) == (
        run.id,
        "digits",
        1_700_000_000_123_456_789,
        FORMAT,
    )
    assert list(run.path.parent.iterdir()) == [run.path]


@pytest.mark.parametrize(
    "parent",
    [
        Parent(
            "digits-20231114-221320-4fzz", "/data/runs/digits-20231114-221320-4fzz", 7, "00000007", "branch"
        ),
        Parent("digits-20231114-221320-4fzz", "/a b/ü", None, "", "warm start"),
    ],
)
def test_a_run_knows_its_parent(tmp_path: Path, parent: Parent) -> None:
    with Journal.open(create_run(tmp_path, "child", parent)) as journal:
        assert journal.run_info().parent == parent
    with Journal.open(create_run(tmp_path, "orphan")) as journal:
        assert journal.run_info().parent is None


def test_a_parent_is_found_where_it_was_or_beside_its_child(tmp_path: Path) -> None:
    mother = create_run(tmp_path / "here", "mother")
    parent = Parent(mother.id, str(mother.path), 3, "", "branch")
    child = create_run(tmp_path / "there", "child", parent)
    assert folder_of_parent(child, parent) == mother
    moved = child.path.parent / mother.id
    mother.path.rename(moved)
    assert folder_of_parent(child, parent) == RunFolder(moved)
    moved.rename(moved.with_name("gone"))
    assert folder_of_parent(child, parent) is None


def test_paths_of_a_run() -> None:
    run = RunFolder(Path("/r/a-b-20240101-000000-abcd"))
    names = [run.journal, run.recorder, run.lease, run.outbox, run.checkpoints, run.console_log, run.command]
    assert [path.name for path in names] == [
        *("journal.sqlite", "recorder.bin", "lease", "outbox.sqlite", "checkpoints", "console.log"),
        "command.json",
    ]
    assert run.name == "a-b"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("a/b", "has a path separator"),
        ("..", "begins with a dot"),
        ("a\\b", "has a path separator"),
        (".hidden", "begins with a dot"),
        ("-rf", "begins with a dash"),
        (" a", "begins or ends with white space"),
        ("a\nb", "has an unprintable character"),
        ("a\0b", "has an unprintable character"),
        ("x" * 101, "is too long"),
        ("é" * 51, "is too long"),
        ("digits-20240101-120000-ab12", "looks like the id of a run"),
        (7, "is of type int"),
        (None, "is of type NoneType"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(RunNameError, match=why):
        create_run(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=30))
def test_any_name_is_refused_or_found_again(tmp_path: Path, name: str) -> None:
    try:
        run = create_run(tmp_path, name)
    except RunNameError:
        return
    assert run.path.parent == tmp_path
    assert run.name == name
    assert find_run(name, tmp_path) == run
    assert find_run(run.id, tmp_path) == run


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    second = 1_700_000_000_000_000_000
    ages = [5, 3, 999_999_000, 2_000_000_000, 500_000_000, 4_000_000]
    runs = {age: create_run(tmp_path, f"name{age % 2}", created_ns=second + age) for age in ages}
    (tmp_path / "file-20240101-000000-abcd").touch()
    (tmp_path / "empty-20240101-000000-abcd").mkdir()
    (tmp_path / "other").mkdir()
    expected = sorted(ages, reverse=True)
    assert [run.name for run in list_runs(tmp_path)] == [f"name{age % 2}" for age in expected]
    assert list_runs(tmp_path)[0] == runs[2_000_000_000]
    assert list_runs(tmp_path / "nowhere") == []
    with pytest.raises(RootError, match="expected a folder of runs"):
        list_runs(tmp_path / "file-20240101-000000-abcd")


def test_runs_made_in_the_same_moment_differ(tmp_path: Path) -> None:
    runs = [create_run(tmp_path, "same", created_ns=1_700_000_000_000_000_000) for _ in range(5)]
    assert len({run.id for run in runs}) == 5
    assert set(list_runs(tmp_path)) == set(runs)
    for run in runs:
        with Journal.open(run) as journal:
            assert journal.run_info().id == run.id
    assert list(reversed(list_runs(tmp_path))) == runs


def test_a_list_shows_no_half_made_run(tmp_path: Path) -> None:
    script = (
        "import sys; from tracking.runs import create_run\n"
        "print('ready', flush=True)\n"
        "while True: create_run(sys.argv[1], 'many')\n"
    )
    seen: set[RunFolder] = set()
    with process(script, tmp_path):
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            for run in list_runs(tmp_path):
                if run not in seen:
                    with Journal.open(run) as journal:
                        assert journal.run_info().id == run.id
                    assert run.checkpoints.is_dir()
                    seen.add(run)
    assert len(seen) > 5


def test_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = 1_700_000_000_000_000_000
    old = create_run(tmp_path / "runs", "digits", created_ns=second)
    new = create_run(tmp_path / "runs", "digits", created_ns=second + 1_000_000)
    other = create_run(tmp_path / "elsewhere", "far")
    assert find_run("digits", tmp_path / "runs") == new
    assert find_run(old.id, tmp_path / "runs") == old
    assert find_run(other.path, tmp_path / "runs") == other
    assert find_run(str(other.path), tmp_path / "nowhere") == other
    monkeypatch.chdir(tmp_path)
    assert find_run("digits") == new
    assert find_run(Path("elsewhere") / other.id) == other


def test_not_finding(tmp_path: Path) -> None:
    with pytest.raises(RunNotFound, match="there are no runs at all"):
        find_run("digits", tmp_path)
    create_run(tmp_path, "digits")
    create_run(tmp_path, "resnet50")
    with pytest.raises(RunNotFound, match=r"no run 'digit' in .*; there is digits$"):
        find_run("digit", tmp_path)
    with pytest.raises(RunNotFound, match="there is resnet50, digits"):
        find_run("zzz", tmp_path)
    assert issubclass(RunNotFound, InterlockError)


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RootError, match="cannot be made"):
        create_run(tmp_path / "file", "digits")
    with pytest.raises(RootError, match="cannot be made"):
        create_run(tmp_path / "file" / "runs", "digits")


def test_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from tracking.runs import create_run, RootError\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try: create_run(sys.argv[1], 'digits')\n"
        "except RootError as error: print(error)\n"
    )
    root = tmp_path / "runs"
    root.mkdir(mode=0o555)
    with process(script, root) as child:
        # A root user's temporary folder is closed to others altogether: then the root cannot even be reached.
        assert child.first_line.startswith(f"root {root}: ")  # type: ignore[attr-defined]
    assert list(root.iterdir()) == []


def test_one_process_holds_the_lease(tmp_path: Path) -> None:
    run = create_run(tmp_path, "digits")
    assert lease_holder(run) is None
    with process(HOLD, run.path) as child:
        holder = lease_holder(run)
        assert holder is not None
        assert (holder.pid, holder.host) == (child.pid, socket.gethostname())
        assert abs(holder.started - time.time()) < 20
        begun = time.monotonic()
        with pytest.raises(LeaseHeldError) as caught:
            Lease.acquire(run, wait_s=0.2)
        assert 0.2 <= time.monotonic() - begun < 1.5
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.started))
        assert f"process {child.pid} on {socket.gethostname()}, started {started}" in str(caught.value)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert lease_holder(run) is None
    with Lease.acquire(run, wait_s=0.0) as lease:
        assert lease.held
        assert lease_holder(run) == lease.holder
    assert not lease.held
    assert lease_holder(run) is None


def test_waiting_for_a_holder_that_is_about_to_leave(tmp_path: Path) -> None:
    run = create_run(tmp_path, "digits")
    script = HOLD.replace("time.sleep(60)", "time.sleep(0.3); lease.release(); time.sleep(60)")
    with process(script, run.path):
        Lease.acquire(run, wait_s=10).release()


def test_the_same_process_cannot_take_it_twice(tmp_path: Path) -> None:
    run = create_run(tmp_path, "digits")
    with Lease.acquire(run):
        with pytest.raises(LeaseHeldError, match=f"process {os.getpid()}"):
            Lease.acquire(RunFolder(tmp_path / "." / run.id), wait_s=0.0)
        # None of these attempts and probes dropped the lock, as another process sees:
        lease_holder(run)
        with process(HOLD.replace("acquire(", "acquire(wait_s=0.1, run="), run.path) as child:
            assert child.wait() == 1
    Lease.acquire(run).release()


def test_any_other_file_can_be_a_lease(tmp_path: Path) -> None:
    run = create_run(tmp_path, "digits")
    with Lease.acquire(run), Lease.acquire(run.outbox_lease) as second:
        assert lease_holder(run.outbox_lease) == second.holder
    assert lease_holder(run.outbox_lease) is None


def test_a_lease_without_its_note_still_names_the_process(tmp_path: Path) -> None:
    run = create_run(tmp_path, "digits")
    with process(HOLD, run.path) as child:
        for text in ("", "[]", json.dumps({"host": "h", "pid": 1, "started": 0.0})):
            (run.path / "lease.json").write_text(text)
            holder = lease_holder(run)
            assert holder is not None
            assert holder.pid == child.pid


def test_an_orphan_of_the_holder_does_not_hold_it(tmp_path: Path) -> None:
    """Data workers are forked, and live on for a while after the trainer was killed."""
    run = create_run(tmp_path, "digits")
    script = HOLD.replace("print(", "import os\norphan = os.fork()\nif orphan: print(orphan, ").replace(
        "time.sleep(60)", "time.sleep(20)"
    )
    with process(script, run.path) as child:
        orphan = int(child.first_line.split()[0])  # type: ignore[attr-defined]
        assert lease_holder(run) is not None
        child.send_signal(signal.SIGKILL)
        child.wait()
        try:
            os.kill(orphan, 0)
            Lease.acquire(run, wait_s=0.0).release()
        finally:
            os.kill(orphan, signal.SIGKILL)


def test_a_forked_child_neither_uses_nor_drops_its_parents_lease(tmp_path: Path) -> None:
    run = create_run(tmp_path, "digits")
    with Lease.acquire(run) as lease:
        child = os.fork()
        if child == 0:
            lease.release()
            holder = lease_holder(run)
            try:
                Lease.acquire(run, wait_s=0.0)
            except LeaseHeldError:
                os._exit(0 if not lease.held and holder and holder.pid == os.getppid() else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert lease.held
        with process(HOLD.replace("acquire(", "acquire(wait_s=0.1, run="), run.path) as other:
            assert other.wait() == 1


def test_a_lease_in_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RootError, match="cannot open the lease"):
        Lease.acquire(tmp_path / "gone" / "lease")
    assert lease_holder(tmp_path / "gone" / "lease") is None
