"""Files that hooks keep with a run: whole or not at all, delivered once in each version, through kills and outages."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import trainings
from deliveries import ENVIRONMENT, Training, until
from faulty_proxy import FaultyProxy, each
from mlflow_server import Database, MLflowServer
from orchestrator import Callback, MLflow, TensorBoard, Trainer
from orchestrator.errors import ConfigurationError
from states import Trigger
from tracking.artifacts import REPORTS
from tracking.delivery import CHECKPOINTS
from tracking.outbox import Outbox, read_outbox
from tracking.own_artifacts import _TAKEN, ArtifactError, check_path, version, waiting_own, writing
from tracking.runs import RunFolder, find_run
from tracking.shipper import start_shipper, status, sync
from tracking.uploads import MODEL


def keep(run: RunFolder, path: str, text: str) -> None:
    with writing(run, path) as file:
        file.write_text(text)


def trained(run: RunFolder) -> None:
    training = Training(run)
    training.batch()
    training.end()


def sent(run: RunFolder) -> dict[str, int]:
    """When each of the user's own was uploaded."""
    with Outbox.open(run.outbox) as outbox:
        return dict(outbox._all("SELECT path, sent_ns FROM artifacts JOIN versions USING (path)"))


# -- writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "a/../b", "/a", "a//b", "a/", ".hidden", "a/.b", "a\\b", None, "model", "checkpoints/a"],
)
def test_paths_that_cannot_be(run: RunFolder, path: str) -> None:
    with pytest.raises(ArtifactError, match="expected"), writing(run, path):
        raise AssertionError("nothing is written before the path is looked at")
    assert waiting_own(run, {}) == []


def test_what_interlock_makes_is_not_written_over() -> None:
    assert {*REPORTS, MODEL, CHECKPOINTS} == _TAKEN
    assert str(check_path("samples/model")) == "samples/model"


def test_a_file_is_there_whole_or_not_at_all(run: RunFolder) -> None:
    with writing(run, "a/b.txt") as file:
        assert file.name == "b.txt"  # libraries choose the format by it
        file.write_text("one")
        assert waiting_own(run, {}) == []
    assert (run.artifacts / "a/b.txt").read_text() == "one"
    with (
        pytest.raises(UnicodeEncodeError),
        writing(run, "a/b.txt") as file,
        file.open("w", buffering=1) as stream,
    ):
        stream.writelines(["half of\n", "tw\udc80\n"])
    assert (run.artifacts / "a/b.txt").read_text() == "one"
    with pytest.raises(ArtifactError, match="nothing was written"), writing(run, "c"):
        pass
    with pytest.raises(ArtifactError, match="a folder was made"), writing(run, "c") as file:
        file.mkdir()
    with pytest.raises(ArtifactError, match="cannot be kept"), writing(run, "a/b.txt/c") as file:
        file.write_text("below a file")
    assert waiting_own(run, {}) == ["a/b.txt"]
    assert not list(run.path.glob(".artifact-*"))


def test_what_a_killed_process_left_half_written_is_removed_by_the_next_attempt(tmp_path: Path) -> None:
    with trainings.make(tmp_path) as trainer:
        trainer.advance()
        assert trainer.run is not None
        left = trainer.run.path / ".artifact-abc"
    left.mkdir()
    (left / "half.png").write_text("ha")
    with trainings.make(tmp_path) as trainer:
        trainer.fit(resume="auto")
    assert not left.exists()


def test_another_of_the_same_size_at_the_same_moment_is_known_from_the_one_before(run: RunFolder) -> None:
    keep(run, "a", "one")
    times = (run.artifacts / "a").stat().st_mtime_ns
    os.utime(run.artifacts / "a", ns=(times + 10**12, times + 10**12))  # a clock that went back
    one = {"a": version(run.artifacts / "a")}
    keep(run, "a", "one")
    assert waiting_own(run, one) == [], "the very same again"
    keep(run, "a", "two")
    assert waiting_own(run, one) == ["a"]


# -- in a training ------------------------------------------------------------------------------------------


class Sample(Callback):
    def on_epoch_end(self, epoch: int, metrics: dict[str, float]) -> None:
        with self.trainer.artifact(f"samples/{epoch}.txt") as file:
            file.write_text(f"{metrics['loss']!r}")


def texts(run: RunFolder | Path) -> dict[str, str]:
    folder = run if isinstance(run, Path) else run.path
    return {path.name: path.read_text() for path in (folder / "artifacts" / "samples").iterdir()}


def test_a_training_that_was_killed_has_the_same_files(tmp_path: Path) -> None:
    script = (
        "import sys, os, signal, pathlib, torch, trainings, test_own_artifacts; from states import Trigger\n"
        "torch.set_num_threads(1)\n"
        "t = trainings.make(pathlib.Path(sys.argv[1]), callbacks=[test_own_artifacts.Sample()])\n"
        "t.after(Trigger.STEP)(lambda: t.batches == 8 and os.kill(os.getpid(), signal.SIGKILL))\n"
        "t.fit()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "killed")]
    assert subprocess.run(command, env=ENVIRONMENT, check=False).returncode == -signal.SIGKILL
    before = texts(find_run("test", tmp_path / "killed"))
    results = [
        trainings.make(root, callbacks=[Sample()]).fit(resume="auto")
        for root in (tmp_path / "killed", tmp_path / "whole")
    ]
    assert texts(results[0].run) == texts(results[1].run)
    assert len(texts(results[0].run)) == 3
    assert before.items() <= texts(results[0].run).items()


def test_nothing_is_kept_where_the_past_is_run_again(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, callbacks=[Sample()])
    result = trainer.fit()
    for file in (result.run / "artifacts" / "samples").iterdir():
        file.unlink()
    trainer.seek(epoch=2)
    with trainer.artifact("samples/seen.txt") as file:
        file.write_text("by somebody who looks back")
    trainer.replay(0, 1)
    assert texts(result.run) == {}


def test_where_no_attempt_is_under_way(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path)
    for where in ("IDLE", "DONE"):
        with pytest.raises(
            ConfigurationError, match=f"no attempt is under way .the training stands in {where}"
        ):
            trainer.artifact("a.txt")
        trainer.fit()


# -- delivering ---------------------------------------------------------------------------------------------


@pytest.mark.long
def test_each_version_is_delivered_once(run: RunFolder, store: Database) -> None:
    training = Training(run)
    training.batch()
    keep(run, "notes.txt", "one")
    keep(run, "samples/a b/0.txt", "zero")
    sync(run, tracker=MLflow(store.uri))
    before = sent(run)
    assert before.keys() == {"notes.txt", "samples/a b/0.txt"}
    keep(run, "notes.txt", "two")
    keep(run, "samples/a b/0.txt", "zero")
    sync(run, tracker=MLflow(store.uri))
    assert sent(run)["samples/a b/0.txt"] == before["samples/a b/0.txt"], "sent again"
    assert sent(run)["notes.txt"] > before["notes.txt"]
    training.end()
    (run.artifacts / "notes.txt").unlink()  # a person may: it is at the server
    assert sync(run, tracker=MLflow(store.uri)).complete
    there = store.run(run.id).artifacts
    assert (there / "notes.txt").read_text() == "two"
    assert (there / "samples/a b/0.txt").read_text() == "zero"


def test_they_are_waiting_until_they_are_there(run: RunFolder, store: Database) -> None:
    trained(run)
    sync(run, tracker=MLflow(store.uri))
    assert status(run).artifacts_waiting == ()
    keep(run, "notes.txt", "one")
    assert status(run).artifacts_waiting == ("notes.txt",)
    assert sync(run).complete
    assert status(run).artifacts_waiting == ()


@pytest.mark.long
def test_an_outbox_that_an_older_interlock_left(run: RunFolder, store: Database) -> None:
    trained(run)
    sync(run, tracker=MLflow(store.uri))
    with Outbox.open(run.outbox) as outbox:
        outbox._connection.execute("DROP TABLE versions")
    keep(run, "notes.txt", "one")
    assert status(run).artifacts_waiting == ("notes.txt",)
    assert sync(run).complete
    assert (store.run(run.id).artifacts / "notes.txt").read_text() == "one"


@pytest.mark.long  # requests whose answers are lost are tried again after minutes
def test_through_lost_answers_an_outage_and_a_killed_shipper(
    run: RunFolder, shared_server: MLflowServer
) -> None:
    with FaultyProxy(shared_server.port, lambda what: "503") as proxy:
        training = Training(run)
        shipper = start_shipper(run, MLflow(proxy.uri))
        assert shipper is not None
        for number in range(3):
            training.batch()
            keep(run, f"samples/{number}.txt", str(number))
        until(lambda: proxy.met)
        shipper.kill()
        shipper.wait()
        training.end()
        assert {f"samples/{number}.txt" for number in range(3)} <= set(status(run).artifacts_waiting)
        proxy.choose = each("cut", "drop", "500")
        assert sync(run).complete
        assert proxy.met["artifact PUT", "cut"] == 1
    assert sorted(read_outbox(run.outbox).versions) == [f"samples/{number}.txt" for number in range(3)]
    remote = shared_server.database.run(run.id)
    (there,) = (shared_server.folder / "artifacts").glob(f"*/{remote.id}/artifacts/samples")
    assert {path.name: path.read_text() for path in there.iterdir()} == {f"{n}.txt": str(n) for n in range(3)}


def test_tensorboard_has_them_too(run: RunFolder, tmp_path: Path) -> None:
    trained(run)
    keep(run, "samples/0.txt", "zero")
    assert sync(run, tracker=TensorBoard(str(tmp_path / "tb"))).complete
    assert [path.read_text() for path in (tmp_path / "tb").rglob("samples/0.txt")] == ["zero"]


def test_a_hook_may_keep_several_at_once(tmp_path: Path) -> None:
    trainer: Trainer = trainings.make(tmp_path, epochs=1)

    @trainer.after(Trigger.END_EPOCH)
    def both() -> None:
        with trainer.artifact("a.txt") as a, trainer.artifact("b.txt") as b:
            a.write_text("a")
            b.write_text("b")

    result = trainer.fit()
    assert {path.name: path.read_text() for path in (result.run / "artifacts").iterdir()} == {
        "a.txt": "a",
        "b.txt": "b",
    }
