"""Checkpoints on disk: whole or absent after any fault, damage always found, read by the safetensors library too."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import mmap
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_encoding import same, trees

from orchestrator.snapshot import manifest, storage
from orchestrator.snapshot.chunks import InParallel, chunked
from orchestrator.snapshot.encoding import Encoded, EncodingError, encode
from orchestrator.snapshot.filesystem import DISK, Disk, FileSystem, write_file
from orchestrator.snapshot.staging import Staged, Staging
from orchestrator.snapshot.storage import (
    CheckpointDamaged,
    CheckpointExists,
    CheckpointFormatError,
    CheckpointNameError,
    CheckpointWriteError,
    checkpoint_name,
    clean_leftovers,
    list_checkpoints,
    parse_checkpoint_name,
    read_checkpoint,
    read_manifest,
    remove_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from states import InterlockError, State

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")

NAME = checkpoint_name(7, 1, 0, 2, State.BATCH_END)
NEXT = checkpoint_name(12, 1, 0, 3, State.BATCH_END)
SMALL = 512  # bytes of a chunk, so that little files have many


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "CHUNK", SMALL)


def state(seed: int = 1) -> dict[str, Any]:
    random_state = torch.Generator().manual_seed(seed)
    weight = torch.randn(20, 7, generator=random_state)
    image = torch.randn(2, 3, 4, 4, generator=random_state).to(memory_format=torch.channels_last)
    return {
        "model": {
            "parameters": {"conv.weight": image, "head.weight": weight, "half": weight[0].bfloat16()},
            "buffers": {"steps": torch.tensor(seed), "none": None, "empty": torch.empty(0, 3)},
        },
        "optimizer": {"state": {0: {"exp_avg": weight * 2}}, "betas": (0.9, math.inf)},
        "random": torch.arange(700, dtype=torch.uint8),
    }


def staged(tree: Any) -> Staged:
    return Staging().copy(encode(tree))


def write(parent: Path, name: str = NAME, tree: Any = None, **options: Any) -> Path:
    content = staged(state() if tree is None else tree)
    return write_checkpoint(parent, name, manifest={"seq": 7}, staged=content, **options)


# -- what is written is what is read -----------------------------------------------------------------


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path = write_checkpoint(
        tmp_path / "checkpoints",
        NAME,
        manifest={"seq": 7, "loss": math.nan, "at": (1, 2)},
        staged=staged(state()),
    )
    assert path == tmp_path / "checkpoints" / NAME
    assert sorted(os.listdir(path)) == [
        "manifest.json",
        "model.safetensors",
        "state.json",
        "state.safetensors",
    ]
    found, tree = read_checkpoint(path)
    assert same(tree, state())
    assert (found["seq"], found["format_version"], found["at"]) == (7, manifest.FORMAT_VERSION, (1, 2))
    assert math.isnan(found["loss"])
    assert found["versions"]["torch"] == torch.__version__
    assert found["files"]["state.json"]["size"] == (path / "state.json").stat().st_size
    assert same(verify_checkpoint(path), found)
    assert same(read_manifest(path), found)


@settings(max_examples=20)
@given(tree=trees)
def test_any_tree_comes_back(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    path = write(tmp_path_factory.mktemp("tree"), tree={"model": {"parameters": tree}, "rest": tree})
    _, found = read_checkpoint(path)
    assert same(found, {"model": {"parameters": tree}, "rest": tree})


def test_files_of_many_chunks_and_none(tmp_path: Path) -> None:
    names = iter(checkpoint_name(seq, 1, -1, -1, State.IDLE) for seq in range(99))
    for tree in ({}, None, {"x": torch.arange(3 * SMALL)}, {str(i): torch.tensor(i) for i in range(700)}):
        path = write(tmp_path, next(names), {"tree": tree})
        assert same(read_checkpoint(path)[1], {"tree": tree})


def test_the_safetensors_library_reads_both_files(tmp_path: Path) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(4, 4).bfloat16()
    )
    model.to(memory_format=torch.channels_last)
    tree = {
        "model": {"parameters": dict(model.named_parameters()), "buffers": dict(model.named_buffers())},
        "moments": torch.randn(3, dtype=torch.float64),
        "scales": torch.tensor([1 + 2j]),
    }
    path = write(tmp_path, tree=tree)
    found = safetensors.torch.load_file(path / "model.safetensors")
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    rest = safetensors.torch.load_file(path / "state.safetensors")
    assert torch.equal(rest["moments"], tree["moments"])
    assert torch.equal(rest["scales"], tree["scales"])


def test_tensors_lie_aligned_and_in_one_order(tmp_path: Path) -> None:
    tree = {
        "model": {
            "parameters": {
                "b": torch.ones(3, dtype=torch.int8),
                "a": torch.ones(3),
                "c": torch.ones(1).double(),
            }
        }
    }
    one, other = write(tmp_path, tree=tree), write(tmp_path, NEXT, tree)
    text = (one / "model.safetensors").read_bytes()
    assert text == (other / "model.safetensors").read_bytes()
    length = int.from_bytes(text[:8], "little")
    header = json.loads(text[8 : 8 + length])
    assert length % 8 == 0
    assert {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"} == {
        "c": [0, 8],
        "a": [8, 20],
        "b": [20, 23],
    }


def test_names_that_both_files_could_mean(tmp_path: Path) -> None:
    one, two, three, four = (torch.full((2,), float(i)) for i in range(4))
    tree = {
        "model": {"parameters": {"x": one, "__metadata__": three}, "buffers": {"x": two}},
        "__metadata__": four,
        "state": {"model/parameters/x": four.clone()},
    }
    assert same(read_checkpoint(write(tmp_path, tree=tree))[1], tree)


def test_tensors_read_are_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path)
    _, tree = read_checkpoint(path)
    shutil.rmtree(path)
    tree["model"]["parameters"]["head.weight"].add_(1)
    tree["random"].zero_()
    starts = {
        tree["random"].untyped_storage().data_ptr(),
        tree["optimizer"]["state"][0]["exp_avg"].data_ptr(),
    }
    assert len(starts) == 2


def test_weights_may_be_called_otherwise(tmp_path: Path) -> None:
    content = Staging().copy(encode({"net": {"w": torch.ones(2)}}), weights=("net/",))
    path = write_checkpoint(tmp_path, NAME, manifest={}, staged=content)
    assert list(safetensors.torch.load_file(path / "model.safetensors")) == ["w"]
    assert torch.equal(read_checkpoint(path)[1]["net"]["w"], torch.ones(2))


# -- names and lists ---------------------------------------------------------------------------------


@given(
    seq=st.integers(0, 10**12), attempt=st.integers(1, 9999), epoch=st.integers(-1, 9999), batch=st.integers(-1, 10**7),
    where=st.sampled_from(State),
)  # fmt: skip
def test_names_are_read_back(seq: int, attempt: int, epoch: int, batch: int, where: State) -> None:
    name = checkpoint_name(seq, attempt, epoch, batch, where)
    assert parse_checkpoint_name(name) == storage.CheckpointName(seq, attempt, epoch, batch, where)


def test_names_as_people_read_them() -> None:
    assert checkpoint_name(1234, 1, 2, 113, State.BATCH_END) == "000001234-a1-e2-b113-BATCH_END"
    assert checkpoint_name(0, 1, -1, -1, State.IDLE) == "000000000-a1-IDLE"
    for name in (
        "best",
        "1-a1-IDLE",
        "000000001-a01-IDLE",
        "000000001-a1-e1-b2-LOST",
        ".tmp-000000001-a1-IDLE",
        "",
    ):
        assert parse_checkpoint_name(name) is None


def test_the_newest_is_first(tmp_path: Path) -> None:
    names = [(9, 1), (10, 1), (10, 2), (3, 1), (10**9, 1), (10**10, 1)]
    for seq, attempt in names:
        (tmp_path / checkpoint_name(seq, attempt, 0, 0, State.BATCH_END)).mkdir()
    (tmp_path / ".tmp-000000011-a1-IDLE").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "000000099-a1-IDLE").write_text("a file")
    parsed = [parse_checkpoint_name(path.name) for path in list_checkpoints(tmp_path)]
    assert [(name.seq, name.attempt) for name in parsed if name is not None] == sorted(names, reverse=True)
    assert list_checkpoints(tmp_path / "none") == []


def test_a_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(CheckpointExists, match="never replaced"):
        write(tmp_path, tree={"other": 1})
    assert same(read_checkpoint(path)[1], state())


def test_names_of_another_hand_are_refused(tmp_path: Path) -> None:
    for name in ("../out", "best", ".tmp-x", "a/b"):
        with pytest.raises(CheckpointNameError, match="checkpoint_name"):
            write(tmp_path, name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("key", ["files", "digest", "versions", "format_version", "$", 3])
def test_keys_of_the_format_are_its_own(tmp_path: Path, key: Any) -> None:
    with pytest.raises(EncodingError, match="key that is not free"):
        write_checkpoint(tmp_path, NAME, manifest={key: 1}, staged=staged({}))


def test_no_tensors_in_manifests(tmp_path: Path) -> None:
    with pytest.raises(EncodingError, match="manifest/a/b"):
        write_checkpoint(tmp_path, NAME, manifest={"a": {"b": torch.ones(1)}}, staged=staged({}))


def test_removing_and_cleaning(tmp_path: Path) -> None:
    keep, gone = write(tmp_path), write(tmp_path, NEXT)
    (tmp_path / f".tmp-removed-{NEXT}").mkdir()
    (tmp_path / f".tmp-removed-{NEXT}" / "rest").write_text("x")
    remove_checkpoint(gone)
    assert os.listdir(tmp_path) == [NAME]
    (tmp_path / ".tmp-x" / "deeper").mkdir(parents=True)
    (tmp_path / ".tmp-x" / "deeper" / "file").write_text("x")
    (tmp_path / ".tmp-y").mkdir()
    assert clean_leftovers(tmp_path) == [".tmp-x", ".tmp-y"]
    assert list_checkpoints(tmp_path) == [keep]
    assert clean_leftovers(tmp_path / "none") == []
    with pytest.raises(CheckpointWriteError, match="could not be removed"):
        remove_checkpoint(gone)


# -- faults, one by one ------------------------------------------------------------------------------


class Fault(OSError):
    """Told apart from the real ones."""


class PowerCut(BaseException):
    """The process is gone: nothing that would clean up runs to any effect."""


class Counting:
    """A file system that does `fail` instead of its n-th effect."""

    def __init__(self, number: int, fail: Callable[[str], None], below: FileSystem = DISK) -> None:
        self.calls = 0
        self._number = number
        self._fail = fail
        self._below = below

    def __getattr__(self, effect: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            if not self.reached():
                return getattr(self._below, effect)(*arguments)
            if effect == "close":  # one that fails has closed all the same
                self._below.close(*arguments)
            return self._fail(effect)

        return call

    def reached(self) -> bool:
        return self.calls == self._number


class Dead(Counting):
    """After the n-th effect nothing has any."""

    def reached(self) -> bool:
        return self.calls >= self._number


def fault(effect: str) -> None:
    raise Fault(errno.EIO, f"injected into {effect}")


def full(effect: str) -> None:
    raise Fault(errno.ENOSPC, "No space left on device")


def cut(effect: str) -> None:
    raise PowerCut


def each_fault(
    make: type[Counting],
    fail: Callable[[str], None],
    below: Callable[[], FileSystem] = lambda: DISK,
    least: int = 20,
) -> Iterator[tuple[Counting, int]]:
    """A file system for each effect to fail, until a run meets no fault any more."""
    for number in range(1, 1000):
        files = make(number, fail, below())
        yield files, number
        if files.calls < number:
            assert number >= least, "effects go past the seam"
            return
    raise AssertionError("a run without faults was never reached")


def assert_whole(parent: Path, expected: dict[str, int]) -> None:
    """The folder has exactly these checkpoints, by their seeds, and all are whole."""
    assert {path.name for path in list_checkpoints(parent)} == expected.keys()
    for name, seed in expected.items():
        assert same(read_checkpoint(parent / name)[1], state(seed))


@pytest.mark.parametrize("fail", [fault, full], ids=["EIO", "ENOSPC"])
def test_a_fault_at_any_call_leaves_old_checkpoints_whole_and_the_new_one_whole_or_absent(
    tmp_path: Path, fail: Callable[[str], None]
) -> None:
    write(tmp_path, tree=state(1))
    outcomes = set()
    for files, number in each_fault(Counting, fail):
        error = None
        try:
            write(tmp_path, NEXT, state(2), files=files)
        except CheckpointWriteError as caught:
            error = caught
        there = (tmp_path / NEXT).exists()
        assert_whole(tmp_path, {NAME: 1, NEXT: 2} if there else {NAME: 1})
        if error is None:
            assert there
            assert files.calls < number
        else:
            outcomes.add(there)
            assert isinstance(error, InterlockError)
            assert isinstance(error.__cause__, Fault)
            assert error.errno == error.__cause__.errno
            assert NEXT in str(error)
            assert there == ("it is there and whole" in str(error))
        shutil.rmtree(tmp_path / NEXT, ignore_errors=True)
        assert os.listdir(tmp_path) == [NAME], "a single fault is cleaned up after"
    assert outcomes == {False, True}


def test_a_process_that_dies_at_any_call_leaves_nothing_half_written(tmp_path: Path) -> None:
    write(tmp_path, tree=state(1))
    for files, number in each_fault(Dead, cut):
        try:
            write(tmp_path, NEXT, state(2), files=files)
        except PowerCut:
            assert files.calls >= number
        assert_whole(tmp_path, {NAME: 1, NEXT: 2} if (tmp_path / NEXT).exists() else {NAME: 1})
        # Whoever comes next saves the same, leftovers or not.
        shutil.rmtree(tmp_path / NEXT, ignore_errors=True)
        write(tmp_path, NEXT, state(2))
        assert_whole(tmp_path, {NAME: 1, NEXT: 2})
        shutil.rmtree(tmp_path / NEXT)
        clean_leftovers(tmp_path)
        assert os.listdir(tmp_path) == [NAME]


class Volatile(Disk):
    """Knows what a power cut would take: the bytes of a file that were not synced when their names were."""

    def __init__(self) -> None:
        self._paths: dict[int, Path] = {}
        self.unsynced: set[Path] = set()
        self.unlisted: set[Path] = set()
        self.renamed: list[tuple[Path, Path]] = []

    def create(self, path: Path) -> int:
        file = super().create(path)
        self._paths[file] = path
        self.unlisted.add(path)
        return file

    def write(self, file: int, data: memoryview) -> int:
        self.unsynced.add(self._paths[file])
        return super().write(file, data)

    def sync(self, file: int) -> None:
        super().sync(file)
        self.unsynced.discard(self._paths[file])

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        self.unlisted -= {file for file in self.unlisted if file.parent == path}
        self.renamed = [pair for pair in self.renamed if pair[0].parent != path]

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self.renamed.append((old, new))
        self.unsynced, self.unlisted = (
            {new / path.name if path.parent == old else path for path in paths}
            for paths in (self.unsynced, self.unlisted)
        )

    def lose(self, *, names: bool) -> None:
        """Take what a power cut would: all data that was not synced, and names too or not."""
        for path in self.unsynced:
            if path.exists():
                os.truncate(path, path.stat().st_size // 2)
        for path in self.unlisted:
            path.unlink(missing_ok=True)
        if names:
            for old, new in self.renamed:
                if new.exists():
                    new.rename(old)


@pytest.mark.parametrize("names", [False, True], ids=["names-kept", "names-lost"])
def test_a_power_cut_at_any_call_leaves_nothing_half_written(tmp_path: Path, names: bool) -> None:
    disks: list[Volatile] = []

    def disk() -> Volatile:
        disks.append(Volatile())
        return disks[-1]

    write(tmp_path, tree=state(1))
    for files, number in each_fault(Dead, cut, disk):
        durable = True
        try:
            write(tmp_path, NEXT, state(2), files=files)
        except PowerCut:
            durable = False
        disks[-1].lose(names=names)
        there = (tmp_path / NEXT).exists()
        assert there or not durable, f"lost after a cut at call {number}, though it was said to be safe"
        assert_whole(tmp_path, {NAME: 1, NEXT: 2} if there else {NAME: 1})
        shutil.rmtree(tmp_path / NEXT, ignore_errors=True)


@pytest.mark.parametrize("make", [Counting, Dead])
def test_a_fault_while_removing_leaves_it_whole_or_gone(tmp_path: Path, make: type[Counting]) -> None:
    disks: list[Volatile] = []

    def disk() -> Volatile:
        disks.append(Volatile())
        return disks[-1]

    write(tmp_path, tree=state(1))
    for files, number in each_fault(make, fault if make is Counting else cut, disk, least=8):
        write(tmp_path, NEXT, state(2))
        failed = True
        try:
            remove_checkpoint(tmp_path / NEXT, files=files)
            failed = False
        except (CheckpointWriteError, PowerCut):
            assert files.calls >= number
        if make is Dead:
            disks[-1].lose(names=True)
        there = (tmp_path / NEXT).exists()
        assert failed or not there
        assert_whole(tmp_path, {NAME: 1, NEXT: 2} if there else {NAME: 1})
        clean_leftovers(tmp_path)
        if there:
            remove_checkpoint(tmp_path / NEXT)
        assert os.listdir(tmp_path) == [NAME]


class Stingy(Disk):
    """Writes only some bytes of what it is given."""

    def write(self, file: int, data: memoryview) -> int:
        return super().write(file, data[: 1 + data.nbytes // 2])


def test_short_writes_are_continued(tmp_path: Path) -> None:
    path = write(tmp_path, files=Stingy())
    assert same(read_checkpoint(path)[1], state())


@pytest.mark.parametrize("folder", [None, Path("/dev/shm")], ids=["here", "in memory"])
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_disk_takes_pieces_of_any_size_and_place(
    tmp_path_factory: pytest.TempPathFactory, folder: Path | None, data: st.DataObject
) -> None:
    """Those that go past the page cache, those that cannot, and, in /dev/shm, where the file system may not."""
    if folder is not None and not os.access(folder, os.W_OK):
        pytest.skip(f"there is no {folder}")
    memory = memoryview(mmap.mmap(-1, 1 << 20))
    memory[:] = random.Random(1).randbytes(len(memory))
    sizes = st.one_of(st.integers(1, 9000), st.sampled_from([512, 4096, 8192, 65536]))
    places = data.draw(st.lists(st.tuples(st.sampled_from([0, 0, 4096, 512, 8, 1]), sizes), max_size=8))
    pieces = [memory[begin : begin + size] for begin, size in places]
    with tempfile.TemporaryDirectory(dir=folder or tmp_path_factory.getbasetemp()) as parent:
        write_file(DISK, Path(parent) / "file", pieces)
        assert (Path(parent) / "file").read_bytes() == b"".join(pieces)


class Stuck(Disk):
    def write(self, file: int, data: memoryview) -> int:
        return 0


def test_a_disk_that_takes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointWriteError, match="nothing was written"):
        write(tmp_path, files=Stuck())
    assert os.listdir(tmp_path) == []


def test_a_file_system_that_is_really_full(tmp_path: Path) -> None:
    class Device(Disk):
        def create(self, path: Path) -> int:
            file = super().create(path)
            if path.name != "state.safetensors":
                return file
            os.close(file)
            return os.open("/dev/full", os.O_WRONLY)

    with pytest.raises(CheckpointWriteError, match="Free some space") as caught:
        write(tmp_path, files=Device())
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_everything_is_durable_before_the_journal_is_asked(tmp_path: Path) -> None:
    disk = Volatile()
    seen = []

    def sync() -> None:
        assert (disk.unsynced, disk.unlisted, disk.renamed) == (set(), set(), [])
        assert list_checkpoints(tmp_path) == []
        seen.append(sorted(os.listdir(tmp_path / f".tmp-{NAME}")))

    write(tmp_path, before_rename=sync, files=disk)
    assert seen == [["manifest.json", "model.safetensors", "state.json", "state.safetensors"]]
    assert (disk.unsynced, disk.unlisted, disk.renamed) == (set(), set(), [])


def test_a_journal_that_cannot_be_synced_prevents_the_checkpoint(tmp_path: Path) -> None:
    def sync() -> None:
        raise Fault(errno.EROFS, "journal")

    with pytest.raises(Fault, match="journal"):
        write(tmp_path, before_rename=sync)
    assert os.listdir(tmp_path) == []


# -- SIGKILL -----------------------------------------------------------------------------------------


def write_until_killed(parent: Path, told: int) -> None:
    """In a forked child: one checkpoint after another; `told` gets a byte for each that is safe."""
    for seq in itertools.count(1):
        tree = {"seq": seq, "model": {"parameters": {"w": torch.full((300_000,), float(seq))}}}
        name = checkpoint_name(seq, 1, 0, seq, State.BATCH_END)
        write_checkpoint(parent, name, manifest={"seq": seq}, staged=staged(tree))
        os.write(told, b".")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_writer_leaves_whole_checkpoints_only(tmp_path: Path) -> None:
    chance = random.Random(3)
    halves = 0
    for attempt in range(8):
        parent = tmp_path / str(attempt)
        parent.mkdir()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_until_killed(parent, writing)
            finally:
                os._exit(1)
        os.close(writing)
        told = len(os.read(reading, 1))
        time.sleep(chance.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        told += len(os.read(reading, 10_000))
        os.close(reading)
        found = list_checkpoints(parent)
        assert len(found) - told in (0, 1)
        for path in found:
            record, tree = read_checkpoint(path)
            assert tree["model"]["parameters"]["w"].eq(record["seq"]).all()
        halves += len(clean_leftovers(parent))
        assert len(os.listdir(parent)) == len(found)
    assert halves > 0, "no kill struck while a checkpoint was being written"


# -- damage ------------------------------------------------------------------------------------------


def assert_found(path: Path, file: str) -> None:
    for look in (read_checkpoint, verify_checkpoint):
        with pytest.raises(CheckpointDamaged) as caught:
            look(path)
        assert caught.value.path == path
        assert file in caught.value.what
        assert "found" in str(caught.value) or "cannot be read" in str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("whole"), NAME, manifest={"é": 1e5}, staged=staged(state())
    )


@settings(max_examples=60)
@given(st.data())
def test_a_flipped_bit_is_always_found(whole: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(os.listdir(whole))))
    content = (whole / name).read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    with replaced(whole / name, bytes(flipped)):
        assert_found(whole, name)


@settings(max_examples=40)
@given(st.data())
def test_a_file_cut_short_or_grown_is_always_found(whole: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(os.listdir(whole))))
    content = (whole / name).read_bytes()
    kept = data.draw(st.integers(0, len(content) - 1))
    with replaced(whole / name, content[:kept] if data.draw(st.booleans()) else content + content[kept:]):
        assert_found(whole, name)


class replaced:
    """Within the block a file has another content."""

    def __init__(self, path: Path, content: bytes) -> None:
        self._path, self._content, self._before = path, content, path.read_bytes()

    def __enter__(self) -> None:
        self._path.write_bytes(self._content)

    def __exit__(self, *exception: object) -> None:
        self._path.write_bytes(self._before)


def test_every_bit_of_a_manifest_counts(whole: Path) -> None:
    path = whole / "manifest.json"
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        flipped = content[:position] + bytes([content[position] ^ 32]) + content[position + 1 :]
        with replaced(path, flipped), pytest.raises(CheckpointDamaged):
            read_manifest(whole)


def test_damage_is_named_by_file_and_place(tmp_path: Path) -> None:
    path = write(tmp_path)
    content = bytearray((path / "state.safetensors").read_bytes())
    content[2 * SMALL + 5] ^= 1
    (path / "state.safetensors").write_bytes(content)
    end = min(3 * SMALL, len(content)) - 1
    for look, kind in (read_checkpoint, "xxh3_128"), (verify_checkpoint, "sha256"):
        with pytest.raises(CheckpointDamaged) as caught:
            look(path)
        assert caught.value.what.startswith(f"state.safetensors: bytes {2 * SMALL} to {end}: found {kind} ")
        assert "expected" in caught.value.what
        assert str(path) in str(caught.value)


def test_digests_are_those_of_the_files(tmp_path: Path) -> None:
    path = write(tmp_path)
    files = read_manifest(path)["files"]
    assert len(files["state.safetensors"]["sha256"]) > 1
    for name, record in files.items():
        content = (path / name).read_bytes()
        chunks = [content[at : at + SMALL] for at in range(0, len(content), SMALL)]
        assert record["sha256"] == [hashlib.sha256(chunk).hexdigest() for chunk in chunks]
        assert record["xxh3_128"] == [xxhash.xxh3_128_hexdigest(chunk) for chunk in chunks]


@pytest.mark.parametrize("kind", ["sha256", "xxh3_128"])
def test_both_digests_are_verified(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "DIGESTS", {**storage.DIGESTS, kind: lambda chunk: "0" * 32})
    path = write(tmp_path)
    monkeypatch.undo()
    with pytest.raises(CheckpointDamaged, match=f"found {kind} .*, expected 0000"):
        verify_checkpoint(path)


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "state.safetensors", "state.json"])
def test_a_missing_file_or_a_folder_in_its_place_is_found(tmp_path: Path, name: str) -> None:
    path = write(tmp_path)
    (path / name).unlink()
    for look in (read_checkpoint, verify_checkpoint):
        with pytest.raises(CheckpointDamaged, match=name.replace(".", r"\.")):
            look(path)
    (path / name).mkdir()
    for look in (read_checkpoint, verify_checkpoint):
        with pytest.raises(CheckpointDamaged, match=name.replace(".", r"\.")):
            look(path)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointDamaged, match=r"no manifest\.json"):
        read_checkpoint(tmp_path / "none")


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = manifest.FORMAT_VERSION + 1
    monkeypatch.setattr(manifest, "FORMAT_VERSION", newer)
    path = write(tmp_path)
    monkeypatch.undo()
    for look in (read_checkpoint, verify_checkpoint, read_manifest):
        with pytest.raises(
            CheckpointFormatError, match=rf"version {newer}, expected 1 to {newer - 1}.*Upgrade"
        ):
            look(path)


def test_a_whole_checkpoint_of_another_hand_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(
        tmp_path, NAME, manifest={}, staged=Staging().copy(Encoded({"$": "from the future"}, {}))
    )
    with pytest.raises(CheckpointFormatError, match="from the future"):
        read_checkpoint(path)
    verify_checkpoint(path)


# -- chunks ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 16))
def test_chunks_are_the_bytes_in_order(sizes: list[int], size: int) -> None:
    buffers = [memoryview(random.Random(i).randbytes(n)) for i, n in enumerate(sizes)]
    found = [b"".join(chunk) for chunk in chunked(buffers, size)]
    assert b"".join(found) == b"".join(buffers)
    assert all(len(chunk) == size for chunk in found[:-1])
    assert all(found)


def test_work_in_parallel_gives_results_in_order_or_the_error() -> None:
    with InParallel(lambda number: number * number, range(500)) as work:
        assert work.results() == [number * number for number in range(500)]
    with InParallel(lambda number: 1 // number, [3, 1, 0, 2]) as work, pytest.raises(ZeroDivisionError):
        work.results()
    with InParallel(time.sleep, [0.0] * 3 + [0.001] * 100_000):
        pass  # abandoned: leaving must not take the sum
