"""The second backend: event files that TensorBoard reads, each point once."""

import os
import signal
import struct
from pathlib import Path

import pytest

from deliveries import BATCHES, Training, expected_points, until
from orchestrator import TensorBoard
from tracking.delivery import Tracker, TrackerError
from tracking.runs import RunFolder, create_run, lease_holder
from tracking.shipper import start_shipper, status, sync

loaders = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_run(tmp_path / "runs", "digits")


def read(folder: Path) -> tuple[dict[tuple[str, int], float], list[tuple[str, int]], dict[str, str]]:
    """What TensorBoard itself finds: values, all points with repetitions, texts."""
    found = loaders.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    values, points, texts = {}, [], {}
    for tag in found.Tags()["tensors"]:
        for event in found.Tensors(tag):
            if event.tensor_proto.string_val:
                texts[tag] = event.tensor_proto.string_val[0].decode()
    for tag in found.Tags()["scalars"]:
        for event in found.Scalars(tag):
            values[tag, event.step] = event.value
            points.append((tag, event.step))
    return values, points, texts


def single(value: float) -> float:
    (found,) = struct.unpack("f", struct.pack("f", value))
    return float(found)


def test_each_point_once_through_kills_and_a_lost_outbox(run: RunFolder, tmp_path: Path) -> None:
    tracker = TensorBoard(tmp_path / "tb", upload="best+last")
    training = Training(run)
    shipper = start_shipper(run, tracker)
    assert shipper is not None
    for _ in range(BATCHES + 2):
        position = training.batch()
    until(lambda: status(run).points_delivered)
    os.kill(shipper.pid, signal.SIGKILL)
    shipper.wait()
    training.batch()
    training.end("stopped", "asked to")
    assert lease_holder(run.outbox_lease) is None
    run.outbox.unlink()
    training = Training(run, position, done=BATCHES + 2)  # one batch is done again
    for _ in range(BATCHES):
        training.batch()
    name = training.checkpoint()
    training.end("done", "finished")
    report = sync(run, tracker=tracker)
    assert report.complete, (run.path / "shipper.log").read_text()
    folder = tmp_path / "tb" / run.id
    assert report.command == f"tensorboard --logdir {tmp_path / 'tb'}"
    values, points, texts = read(folder)
    assert len(points) == len(set(points)), "points are there twice"
    expected = {key: single(value) for key, value in _named(run).items()}
    assert values == expected
    assert "| lr | 0.1 |" in texts["params"]
    assert "finished" in texts["outcome"]
    assert (folder / "artifacts/checkpoints" / name / "manifest.json").stat().st_nlink == 2


def _named(run: RunFolder) -> dict[tuple[str, int], float]:
    return {
        (key.replace("acc_1", "acc@1"), step): value for (key, step), value in expected_points(run).items()
    }


def test_settings() -> None:
    assert isinstance(TensorBoard(), Tracker)
    assert TensorBoard("here").destination().place == str(Path("here").absolute())
    for wrong in ({"upload": "some"}, {"patience_s": -1}, {"log_dir": ""}):
        with pytest.raises(TrackerError, match="TensorBoard"):
            TensorBoard(**wrong)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_one(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    training = Training(run)
    training.batch()
    training.end()
    report = sync(run, tracker=TensorBoard(tmp_path / "file"), timeout=1)
    assert "expected a folder for event files" in report.trouble
