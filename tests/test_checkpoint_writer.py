"""Saving in the background: what is written is the state at the call, whatever the loop does afterwards."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_encoding import same

from orchestrator.snapshot import storage
from orchestrator.snapshot.chunks import DIGESTS
from orchestrator.snapshot.encoding import Encoded, EncodingError
from orchestrator.snapshot.filesystem import Disk
from orchestrator.snapshot.staging import Staging
from orchestrator.snapshot.storage import (
    CheckpointWriteError,
    checkpoint_name,
    list_checkpoints,
    read_checkpoint,
)
from orchestrator.snapshot.writer import CheckpointWriter, WriterClosedError
from states import State


def name(seq: int) -> str:
    return checkpoint_name(seq, 1, 0, seq, State.BATCH_END)


class Gate(Disk):
    """A disk that waits before each fsync of a file until it is opened; `fail` may refuse then."""

    def __init__(self, *, opened: bool = False, fail: Callable[[], None] = lambda: None) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self.fail = fail
        if opened:
            self.open.set()

    def sync(self, file: int) -> None:
        self.reached.set()
        assert self.open.wait(20)
        self.fail()
        super().sync(file)


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_no_save_is_lost_that_comes_while_the_one_before_is_written(tmp_path: Path) -> None:
    weight = torch.zeros(5_000_000)  # longer on its way to the disk than the loop is to the next save
    handles: list[Any] = []
    overlapping = 0
    with CheckpointWriter(tmp_path) as writer:
        for seq in range(8):
            overlapping += bool(handles) and not handles[-1].done
            handles.append(writer.submit(name(seq), {"w": weight}, {}))
            weight += 1
    assert overlapping > 0
    for seq, handle in enumerate(handles):
        assert read_checkpoint(handle.wait())[1]["w"].eq(seq).all()


def test_live_tensors_may_change_as_soon_as_submit_returns(tmp_path: Path) -> None:
    disk = Gate()
    weight, history, losses = torch.nn.Parameter(torch.zeros(50, 3)), [1.0], torch.zeros(4, 4).t()
    tree = {"model": {"parameters": {"w": weight}}, "history": history, "losses": losses[::2]}
    manifest = {"metrics": {"loss": 1.0}}
    with CheckpointWriter(tmp_path, files=disk) as writer:
        handle = writer.submit(name(1), tree, manifest)
        assert not handle.done
        with torch.no_grad():
            weight.fill_(5.0)
            losses.fill_(5.0)
        history.append(2.0)
        manifest["metrics"]["loss"] = 2.0
        disk.open.set()
        found, saved = read_checkpoint(handle.wait())
    assert handle.done
    assert handle.error is None
    assert found["metrics"] == {"loss": 1.0}
    expected = {
        "model": {"parameters": {"w": torch.zeros(50, 3)}},
        "history": [1.0],
        "losses": torch.zeros(4, 4).t()[::2],
    }
    assert same(saved, expected)


def test_saves_that_come_too_soon_wait_and_none_is_skipped(tmp_path: Path) -> None:
    disk = Gate()
    weight = torch.zeros(1000)
    with CheckpointWriter(tmp_path, files=disk) as writer:
        handles = [writer.submit(name(1), {"w": weight}, {})]
        assert disk.reached.wait(20)
        threading.Timer(0.05, disk.open.set).start()
        for seq in range(2, 6):
            weight += 1
            handles.append(writer.submit(name(seq), {"w": weight}, {}))
            assert handles[-2].done
    assert [path.name for path in list_checkpoints(tmp_path)] == [name(seq) for seq in range(5, 0, -1)]
    for number, handle in enumerate(handles):
        assert read_checkpoint(handle.wait())[1]["w"].eq(number).all()


@pytest.mark.skipif(sys.platform != "linux", reason="niceness is the process's elsewhere")
def test_the_processors_are_left_to_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {}

    def look() -> None:
        nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        seen.setdefault(threading.current_thread().name, set()).add(nice)

    def hashed(chunk: Sequence[memoryview]) -> str:
        look()
        time.sleep(0.01)  # so that more than one thread gets a turn
        return DIGESTS["sha256"](chunk)

    monkeypatch.setattr(storage, "DIGESTS", {"sha256": hashed})
    monkeypatch.setattr(storage, "CHUNK", 4096)
    look()
    before = seen.copy()
    with CheckpointWriter(tmp_path, before_rename=look) as writer:
        writer.submit(name(1), {"w": torch.ones(20_000)}, {}).wait()
    look()
    assert seen == {**before, "interlock-checkpoint": {19}, "interlock-chunks": {19}}


def test_what_happens_in_which_order(tmp_path: Path) -> None:
    seen: list[tuple[str, bool, str]] = []

    def look(what: str) -> None:
        seen.append((what, (tmp_path / name(1)).exists(), threading.current_thread().name))

    with CheckpointWriter(tmp_path, before_rename=lambda: look("journal synced")) as writer:
        handle = writer.submit(name(1), {}, {}, lambda path: look(f"durable {path.name}"))
        assert handle.wait() == tmp_path / name(1)
    assert seen == [
        ("journal synced", False, "interlock-checkpoint"),
        (f"durable {name(1)}", True, "interlock-checkpoint"),
    ]


def test_staging_memory_is_allocated_once(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"w": torch.zeros(1000), "small": torch.tensor(1)}
    with CheckpointWriter(tmp_path) as writer:
        writer.submit(name(1), tree, {}).wait()
        staging, memory = writer._staging, writer._staging._memory.data_ptr()
        for seq, smaller in ((2, tree), (3, {"w": torch.ones(900)}), (4, tree)):
            writer.submit(name(seq), smaller, {}).wait()
            assert staging._memory.data_ptr() == memory
        size = staging.size
        writer.submit(name(5), {**tree, "moments": torch.ones(50_000)}, {}).wait()
        assert size + 200_000 - mmap.PAGESIZE < staging.size < size + 200_200 + mmap.PAGESIZE
    assert staging.size == 0
    for seq in range(1, 6):
        read_checkpoint(tmp_path / name(seq))


def test_staged_files_are_whole_and_exact_and_begin_at_a_page() -> None:
    tensors = {
        "t": torch.randn(5, 3).t(),
        "bits": torch.tensor([0x7FC00001, -1], dtype=torch.int32).view(torch.float32),
        "scalar": torch.tensor(True),
        "empty": torch.empty(0, 2),
        "half": torch.randn(7).bfloat16(),
        "number": torch.randn(3, dtype=torch.complex64),
        "tiny": torch.randn(3).to(torch.float8_e5m2),
    }
    staging = Staging()
    for state in (tensors, {"t": torch.ones(2)}, tensors):
        paths = {f"{at}{key}": tensor for key, tensor in state.items() for at in ("", "model/parameters/")}
        staged = staging.copy(Encoded(None, paths))
        expected = {key: tensor.contiguous() for key, tensor in state.items()}
        assert list(staged.files) == ["model.safetensors", "state.safetensors"]
        for content in staged.files.values():
            assert torch.frombuffer(content, dtype=torch.uint8).data_ptr() % mmap.PAGESIZE == 0
            found = safetensors.torch.load(bytes(content))
            assert found.keys() == expected.keys()
            assert same({key: found[key] for key in expected}, expected)


def test_a_failed_save_is_reported_once_and_the_next_one_works(tmp_path: Path) -> None:
    disk = Gate(opened=True, fail=full)
    writer = CheckpointWriter(tmp_path, files=disk)
    first = writer.submit(name(1), {"w": torch.ones(3)}, {})
    with pytest.raises(CheckpointWriteError, match="Free some space"):
        first.wait()
    assert first.done
    assert isinstance(first.error, CheckpointWriteError)
    assert writer.failure is None, "whoever waited has been told"
    second = writer.submit(name(2), {"w": torch.ones(3)}, {})
    disk_recovers(disk, second)
    assert isinstance(writer.failure, CheckpointWriteError)
    third = writer.submit(name(3), {"w": torch.ones(3)}, {})
    assert third.wait() == tmp_path / name(3)
    with pytest.raises(CheckpointWriteError, match=name(2)):
        writer.close()
    assert writer.failure is None
    writer.close()
    assert list_checkpoints(tmp_path) == [tmp_path / name(3)]


def disk_recovers(disk: Gate, failed: Any) -> None:
    while not failed.done:
        time.sleep(0.001)
    disk.fail = lambda: None


def test_an_error_in_on_durable_is_not_lost(tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise RuntimeError(f"no row for {path.name}")

    with CheckpointWriter(tmp_path) as writer:
        handle = writer.submit(name(1), {"x": 1}, {}, refuse)
        with pytest.raises(RuntimeError, match="no row"):
            handle.wait()
    assert read_checkpoint(tmp_path / name(1))[1] == {"x": 1}


def test_the_error_that_ends_the_block_comes_first(tmp_path: Path) -> None:
    def block() -> None:
        with CheckpointWriter(tmp_path, files=Gate(opened=True, fail=full)) as writer:
            writer.submit(name(1), {}, {})
            raise KeyError

    with pytest.raises(KeyError):
        block()


def test_what_cannot_be_stored_is_refused_at_once(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path) as writer:
        with pytest.raises(EncodingError, match="callbacks/ema/fn: a function"):
            writer.submit(name(1), {"callbacks": {"ema": {"fn": name}}}, {})
        with pytest.raises(EncodingError, match="manifest/files"):
            writer.submit(name(1), {}, {"files": 1})
        assert writer.submit(name(1), {}, {}).wait().exists()


def test_waiting_no_longer_than_asked(tmp_path: Path) -> None:
    disk = Gate()
    with CheckpointWriter(tmp_path, files=disk) as writer:
        handle = writer.submit(name(1), {}, {})
        with pytest.raises(TimeoutError, match=name(1)):
            handle.wait(0.01)
        disk.open.set()
        assert handle.wait(20).exists()


def test_closing_waits_and_refuses_more(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    handle = writer.submit(name(1), {"w": torch.ones(10_000)}, {})
    writer.close()
    assert handle.done
    with pytest.raises(WriterClosedError, match="closed"):
        writer.submit(name(2), {}, {})


def test_a_save_from_on_durable_is_refused_rather_than_waiting_for_itself(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path) as writer:
        handle = writer.submit(name(1), {}, {}, lambda _: writer.submit(name(2), {}, {}) and None)
        with pytest.raises(WriterClosedError, match="on_durable"):
            handle.wait()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_neither_waits_nor_writes(tmp_path: Path) -> None:
    disk = Gate()
    with CheckpointWriter(tmp_path, files=disk) as writer:
        handle = writer.submit(name(1), {"w": torch.ones(1000)}, {})
        assert disk.reached.wait(20)
        child = os.fork()
        if child == 0:
            os._exit(in_child(writer, handle))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not handle.done
        disk.open.set()
        assert read_checkpoint(handle.wait())[1]["w"].eq(1).all()


def in_child(writer: CheckpointWriter, handle: Any) -> int:
    for call in (handle.wait, lambda: writer.submit(name(2), {}, {})):
        try:
            call()
        except WriterClosedError:
            continue
        except BaseException:
            return 1
        return 2
    writer.close()
    return 0


_LAST_WORDS = """
import sys, time
from pathlib import Path
import torch
from orchestrator.snapshot.writer import CheckpointWriter
writer = CheckpointWriter(Path(sys.argv[1]), before_rename=lambda: time.sleep(0.2))
weights = {str(i): torch.full((9_000_000,), 1.0) for i in range(2)}
writer.submit("000000001-a1-IDLE", weights, {})
"""


def test_a_process_that_ends_without_closing_still_finishes_the_last_checkpoint(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", _LAST_WORDS, str(tmp_path)], cwd=root, check=True)
    assert read_checkpoint(tmp_path / "000000001-a1-IDLE")[1]["1"].eq(1.0).all()
