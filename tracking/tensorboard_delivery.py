"""TensorBoard: the settings that a user gives (tensorboard is not imported), and the delivery into event files."""

import getpass
import json
import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

from tracking.artifact_folder import link
from tracking.delivery import (
    Closed,
    Destination,
    Ending,
    Identity,
    Point,
    Remote,
    TrackerError,
    Unavailable,
    Upload,
)

__all__ = ["TensorBoard", "TensorBoardDelivery", "open_delivery"]


@dataclass(frozen=True)
class TensorBoard:
    """Show runs in TensorBoard: a folder for each run in `log_dir`, to be seen with `tensorboard --logdir LOG_DIR`.

    Needs the package `tensorboard`, which is imported by the shipper only. Event files hold values of 32 bits.

    Args:
        log_dir: the folder of the runs' folders; made if there is none, relative to the working directory.
        upload: checkpoints to put there too: "none", "best+last" or "all". They are linked where that is possible.
        patience_s: seconds that a folder which cannot be written is tried again after the training has ended.

    Raises TrackerError for a value that makes no sense.
    """

    log_dir: str | Path = "tensorboard"
    upload: Upload = "none"
    patience_s: float = 600.0

    backend: ClassVar[str] = "tracking.tensorboard_delivery:open_delivery"

    def __post_init__(self) -> None:
        if self.upload not in get_args(Upload):
            raise TrackerError(
                f"TensorBoard(upload={self.upload!r}): expected one of {', '.join(get_args(Upload))}"
            )
        if not self.patience_s >= 0:
            raise TrackerError(
                f"TensorBoard(patience_s={self.patience_s!r}): expected a number of seconds, 0 or more"
            )
        if not isinstance(self.log_dir, str | Path) or not str(self.log_dir):
            raise TrackerError(f"TensorBoard(log_dir={self.log_dir!r}): expected the path of a folder")

    def destination(self) -> Destination:
        """The folder, whatever the working directory."""
        place = str(Path(self.log_dir).expanduser().absolute())
        return Destination(place, {"folder": place})


def open_delivery(settings: Mapping[str, Any]) -> "TensorBoardDelivery":
    """The delivery to the folder that `settings` name; imports tensorboard."""
    return TensorBoardDelivery(Path(settings["folder"]))


class TensorBoardDelivery:
    """One run's event files. Each process begins a file of its own: a half-written end of one harms no other.

    The files themselves say what has arrived, so that nothing is there twice.
    """

    most_points = 1000
    parent_tag = ""

    def __init__(self, folder: Path):
        try:
            from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
            from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise Closed(
                f"TensorBoard needs the package tensorboard ({error}); pip install tensorboard"
            ) from error
        self._loader: Any = LegacyEventFileLoader
        self._writer: Any = RecordWriter
        self._event: Any = event_pb2.Event
        self._summary: Any = summary_pb2
        self._tensor: Any = tensor_pb2.TensorProto
        self._string: Any = types_pb2.DT_STRING
        self._folder = folder
        self._run = folder
        self._file: Any = None
        self._tags: dict[str, str] = {}

    def open(self, run: Identity, known: str | None) -> Remote:
        """The folder of our id."""
        self._run = self._folder / run.run_id
        try:
            self._run.mkdir(parents=True, exist_ok=True)
        except (NotADirectoryError, FileExistsError) as error:
            raise Closed(
                f"{self._folder}: cannot be made ({error}); expected a folder for event files"
            ) from error
        except OSError as error:
            raise Unavailable(f"{self._folder}: cannot be written ({error})") from error
        tags = self._run / "tags.json"
        self._tags = json.loads(tags.read_text()) if tags.exists() else {}
        steps = {key: step for key, (step, _) in self._newest().items()}
        return Remote(run.run_id, False, steps, "", f"tensorboard --logdir {self._folder}")

    def key(self, name: str) -> str:
        """The metric's name as it is."""
        return name

    def params(self, values: Mapping[str, str]) -> list[str]:
        """A table, in the tab "Text"."""
        self._text("params", _table(values))
        return []

    def tags(self, values: Mapping[str, str]) -> None:
        """Kept in `tags.json`; when the run ends they are a table in the tab "Text"."""
        self._tags.update(values)
        draft = self._run / ".tags.json.new"
        with _explained(self._run):
            draft.write_text(json.dumps(self._tags, indent=1))
            draft.replace(self._run / "tags.json")

    def points(self, points: Sequence[Point]) -> None:
        """Append scalars, and have them on disk."""
        value = self._summary.Summary.Value
        self._write(
            self._event(
                wall_time=point.time_ms / 1000,
                step=point.step,
                summary=self._summary.Summary(
                    value=[value(tag=point.key, simple_value=_single(point.value))]
                ),
            )
            for point in points
        )

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """What is newer than the newest in the files; points are written in order, so the rest is there."""
        newest = self._newest()
        return [p for p in points if p.key not in newest or (p.step, p.time_ms) > newest[p.key]]

    def artifact(self, file: Path, folder: str) -> None:
        """Link or copy a file into the run's folder."""
        target = self._run / "artifacts" / folder
        if link(file, target):
            return
        with _explained(target):
            target.mkdir(parents=True, exist_ok=True)
            draft = target / f".{file.name}.new"
            shutil.copyfile(file, draft)
            draft.replace(target / file.name)

    def remove_artifacts(self, folder: str) -> None:
        """Remove a folder of artifacts."""
        shutil.rmtree(self._run / "artifacts" / folder, ignore_errors=True)

    def running(self) -> None:
        """Its tags say so."""

    def end(self, ending: Ending, time_ms: int) -> None:
        """Say how it ended, in the tab "Text"."""
        self._text("outcome", _table({"ended": ending, **self._tags}))

    def check(self) -> None:
        """Raise Closed if the run's folder was removed."""
        if not self._run.is_dir():
            raise Closed(f"{self._run} was removed; make that folder again to have the run delivered anew")

    def _text(self, tag: str, text: str) -> None:
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        value = self._summary.Summary.Value(
            tag=tag,
            metadata=self._summary.SummaryMetadata(plugin_data=plugin),
            tensor=self._tensor(dtype=self._string, string_val=[text.encode()]),
        )
        self._write(
            [self._event(wall_time=time.time(), step=0, summary=self._summary.Summary(value=[value]))]
        )

    def _write(self, events: Any) -> None:
        self.check()
        with _explained(self._run):
            if self._file is None:
                name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}.{getpass.getuser()}"
                self._file = (self._run / name).open("ab", buffering=1 << 16)
                events = [self._event(wall_time=time.time(), file_version="brain.Event:2"), *events]
            try:
                writer = self._writer(self._file)
                for event in events:
                    writer.write(event.SerializeToString())
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError:
                self._file = None  # its end may be half an event: what comes goes into another file
                raise

    def _newest(self) -> dict[str, tuple[int, int]]:
        """For each key the newest (step, time in ms) in the files."""
        found: dict[str, tuple[int, int]] = {}
        for file in sorted(self._run.glob("events.out.tfevents.*")):
            for event in self._loader(str(file)).Load():
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        here = (event.step, round(event.wall_time * 1000))
                        found[value.tag] = max(found.get(value.tag, here), here)
        return found


class _explained:
    """An OSError is a disk that may be better later."""

    def __init__(self, place: Path):
        self._place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise Unavailable(f"{self._place}: cannot be written ({error})") from error


def _table(values: Mapping[str, str]) -> str:
    rows = "".join(f"\n| {key} | {_cell(value)} |" for key, value in sorted(values.items()))
    return f"| | |\n|---|---|{rows}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _single(value: float) -> float:
    """What 32 bits hold: too large a value is infinite."""
    return value if not abs(value) > 3.4028234663852886e38 else float("inf") * (1 if value > 0 else -1)
