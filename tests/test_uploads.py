"""Checkpoints on their way to the server: which, in which order, linked or not; and what retention waits for."""

import shutil
import socket
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

import trainings
from deliveries import Training
from mlflow_server import Database
from orchestrator import Checkpointing, MLflow, Trainer
from orchestrator.durability import Durability, not_safe
from orchestrator.errors import ConfigurationError
from orchestrator.snapshot.info import CheckpointInfo
from orchestrator.snapshot.storage import list_checkpoints
from states.table import State
from tracking.artifact_folder import folder_of, link
from tracking.journal import Journal
from tracking.outbox import Outbox
from tracking.runs import RunFolder, create_run
from tracking.shipper import sync
from tracking.uploads import wanted_checkpoints


def test_all_of_them_the_newest_first_and_each_file_once_on_disk(run: RunFolder, store: Database) -> None:
    training = Training(run)
    names = []
    for _ in range(4):
        training.batch()
        names.append(training.checkpoint())
    shutil.rmtree(run.checkpoints / names[1])  # as retention does
    training.writer.checkpoint_removed(names[1])
    training.end()
    report = sync(run, tracker=MLflow(store.uri, upload="all"))
    assert report.complete
    with Outbox.open(run.outbox) as outbox:
        sent = outbox._all("SELECT path FROM artifacts WHERE path LIKE 'checkpoints/%' ORDER BY sent_ns")
    assert [path for (path,) in sent] == [f"checkpoints/{name}" for name in (names[3], names[2], names[0])]
    there = store.run(run.id).artifacts / "checkpoints"
    assert sorted(path.name for path in there.iterdir()) == [names[0], *names[2:]]
    for name in (names[0], *names[2:]):
        files = list((run.checkpoints / name).iterdir())
        assert sorted(path.name for path in (there / name).iterdir()) == sorted(path.name for path in files)
        for file in files:
            assert file.stat().st_ino == (there / name / file.name).stat().st_ino, "linked, not copied"
            assert file.stat().st_nlink == 2
    together = subprocess.run(
        ["du", "-sb", run.checkpoints, there], capture_output=True, text=True, check=True
    ).stdout.split()
    folders = sum(folder.stat().st_size for folder in (there, *there.iterdir()))
    assert int(together[2]) == folders, "du counts each file once: the second place adds its folders only"
    # Taken away here, it is still there.
    shutil.rmtree(run.checkpoints / names[3])
    assert (there / names[3] / "manifest.json").read_bytes() == b"{}"


def test_linking(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "store" / "a b"
    file.write_text("one")
    assert link(file, folder)
    assert link(file, folder), "again, over itself"
    assert [path.name for path in folder.iterdir()] == ["file"]
    file.unlink()
    file.write_text("two")
    assert link(file, folder), "over another one"
    assert (folder / "file").read_text() == "two"
    assert file.stat().st_nlink == 2
    assert folder_of(folder.as_uri()) == folder_of(str(folder)) == folder
    for elsewhere in (
        "mlflow-artifacts:/1/2",
        "s3://bucket/a",
        "http://host/a",
        "relative/path",
        "file://host/a",
    ):
        assert folder_of(elsewhere) is None
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    assert not link(file, other / tmp_path.name)
    assert not list((other / tmp_path.name).iterdir())
    (other / tmp_path.name).rmdir()


def test_a_run_that_is_done_can_be_made_longer_from_what_was_uploaded(tmp_path: Path) -> None:
    with trainings.make(tmp_path, checkpoint=Checkpointing(best="loss")) as trainer:
        trainer.fit()
    assert trainer.run is not None
    with Journal.open(trainer.run) as journal:
        rows = journal.checkpoints()
    wanted = wanted_checkpoints(rows, "best+last")
    assert [row.state for row in wanted] == [State.DONE, State.EPOCH_END]
    assert wanted_checkpoints(rows, "none") == []
    assert len(wanted_checkpoints(rows, "all")) == len(rows) > 2


# -- durable="remote" -----------------------------------------------------------------------------------


def info(seq: int) -> CheckpointInfo:
    return CheckpointInfo(Path(f"{seq:09}-a1-e0-b{seq}-BATCH_END"), seq, 1, 0, seq, seq, State.BATCH_END)


def test_what_is_not_safe() -> None:
    doomed = [info(seq) for seq in (4, 3, 2, 1)]
    names = {found.seq: found.name for found in map(info, range(7))}
    assert [found.seq for found in not_safe(doomed, set(), "all")] == [1, 2, 3, 4]
    assert [found.seq for found in not_safe(doomed, {names[3], names[6]}, "all")] == [1, 2, 4]
    assert [found.seq for found in not_safe(doomed, set(), "best+last")] == [1, 2, 3, 4]
    assert [found.seq for found in not_safe(doomed, {names[2]}, "best+last")] == [3, 4]
    assert not_safe(doomed, {names[6]}, "best+last") == []


@pytest.fixture
def nobody() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def trainer_of(root: Path, uri: str, *, batches: int) -> Trainer:
    return trainings.make(
        root,
        max_batches=batches,
        track=MLflow(uri, upload="all", patience_s=0.0),
        checkpoint=Checkpointing(every_batches=1, keep_last=1, durable="remote", keep_first=False),
    )


@pytest.mark.long
def test_nothing_is_removed_here_before_it_is_there(tmp_path: Path, store: Database, nobody: str) -> None:
    trainer = trainer_of(tmp_path, nobody, batches=8)
    with pytest.warns(UserWarning, match="checkpoints stay here until they are at the tracking server"):
        trainer.fit()
    run = trainer.run
    assert run is not None
    with Journal.open(run) as journal:
        made = [row.name for row in journal.checkpoints(include_removed=True)]
        assert sum("stay here" in record.message for record in journal.logs()) == 1
    here = {path.name for path in list_checkpoints(run.checkpoints)}
    assert here == set(made), "none is removed: the server has none"
    shipper = trainer._training.attempt._shipper  # type: ignore[union-attr]
    assert shipper is not None
    shipper.kill()
    shipper.wait()
    assert sync(run, tracker=MLflow(store.uri, upload="all")).complete
    with trainer_of(tmp_path, store.uri, batches=10) as longer:
        longer.fit(resume="auto")
        shipper = longer._training.attempt._shipper  # type: ignore[union-attr]
    assert shipper is not None
    assert shipper.wait(60) == 0
    there = {path.name for path in (store.run(run.id).artifacts / "checkpoints").iterdir()}
    with Journal.open(run) as journal:
        made = [row.name for row in journal.checkpoints(include_removed=True, include_superseded=True)]
    left = {path.name for path in list_checkpoints(run.checkpoints)}
    assert there == set(made)
    assert left < here | there
    assert len(left) < len(here), "what is safe is removed"


def test_a_disk_that_is_nearly_full_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create_run(tmp_path, "digits")
    infos = []
    for seq in range(1, 6):
        found = info(seq)
        folder = run.checkpoints / found.name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * 1000)
        infos.append(CheckpointInfo(folder, seq, 1, 0, seq, seq, State.BATCH_END))
    said: list[str] = []
    durability = Durability(run, "all", said.append)
    assert durability.removable(infos) == []
    assert len(said) == 1
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 9_000, 1_500))
    removable = durability.removable(infos)
    assert [found.seq for found in removable] == [1, 2], "the oldest, until there is room for three more"
    assert "nearly full" in said[1]
    assert durability.removable(infos) == removable
    assert len(said) == 2, "said once"


def test_durable_remote_needs_a_tracker_that_uploads(tmp_path: Path) -> None:
    for track in (None, MLflow(upload="none")):
        with pytest.raises(ConfigurationError, match='durable="remote"'):
            trainings.make(tmp_path, track=track, checkpoint=Checkpointing(durable="remote"))
    with pytest.raises(ConfigurationError, match='expected "local" or "remote"'):
        Checkpointing(durable="there")  # type: ignore[arg-type]
