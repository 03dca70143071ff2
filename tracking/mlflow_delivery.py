"""MLflow: the settings that a user gives (no mlflow imported), and the delivery that the shipper makes of them."""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args
from urllib.parse import urlsplit

from tracking.artifact_folder import folder_of, link
from tracking.delivery import (
    Closed,
    Destination,
    Ending,
    Identity,
    Point,
    Refused,
    Remote,
    TrackerError,
    Unavailable,
    Upload,
)
from tracking.mlflow_uri import EXAMPLES, SQL, absolute, wrong_with

if TYPE_CHECKING:
    from tracking.inputs import DataInput

__all__ = ["MLflow", "MLflowDelivery", "open_delivery"]

_OUR_ID = "interlock.run_id"
_OWNER = "interlock.owner"
_PARENT = "mlflow.parentRunId"

_LONGEST_PARAM = 6000
_LONGEST_TAG = 5000
_LONGEST_PROFILE = 16_000
_MOST_PARAMS = 100
_LATE_S = 5.0  # a server that has not answered may still be at work for so long
_LONGEST_MAKING_S = 120.0


@dataclass(frozen=True)
class MLflow:
    """Show runs in MLflow. All arguments are optional; what is not given is what MLflow itself would use.

    That is: what was set in this process with `mlflow.set_tracking_uri`, `mlflow.set_experiment` and
    `mlflow.start_run`, if mlflow was imported; then MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME or
    MLFLOW_EXPERIMENT_ID, and MLFLOW_RUN_ID; then the local store `mlflow.db` and `mlruns/` in the working
    directory, and the experiment "Default". Credentials stay in the environment.

    Args:
        tracking_uri: "http://...", "sqlite:///mlflow.db", "databricks", ...; relative paths are made absolute.
        experiment_name: where runs go; it is made if there is none.
        run_id: an MLflow run of yours to deliver to. Like one you started, it is used, and never ended.
        upload: checkpoints to upload: "best+last" (the ones before are removed again), "all", or "none".
        patience_s: seconds that a server which cannot be reached is tried again after the training has
            ended; after that `interlock sync` delivers what is left.
        system_metrics: show what the machine is doing as `system/*`, every 10 to 20 s while the run trains;
            None: as MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING says, and yes where it says nothing.
        log_model: log the final model (the one that is validated), as an MLflow model in the format pt2, or as
            its weights where torch.export cannot export it.
        nested: make a run below your own (the active one, or that of run_id) instead of delivering to it; for
            trainings that belong together, such as those of a sweep or of cross-validation.

    Raises TrackerError for a value that makes no sense; as a training begins, before anything is written, also for a
    URI of the environment's that can be none, and if there is no run to nest in. A server that is away is no error.
    """

    tracking_uri: str | Path | None = None
    experiment_name: str | None = None
    run_id: str | None = None
    upload: Upload = "best+last"
    patience_s: float = 600.0
    system_metrics: bool | None = None
    log_model: bool = True
    nested: bool = False

    backend: ClassVar[str] = "tracking.mlflow_delivery:open_delivery"

    def __post_init__(self) -> None:
        if self.upload not in get_args(Upload):
            raise TrackerError(
                f"MLflow(upload={self.upload!r}): expected one of {', '.join(get_args(Upload))}"
            )
        if not self.patience_s >= 0:
            raise TrackerError(
                f"MLflow(patience_s={self.patience_s!r}): expected a number of seconds, 0 or more"
            )
        for name in ("experiment_name", "run_id"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise TrackerError(
                    f"MLflow({name}={value!r}): expected a name, or None for MLflow's own choice"
                )
        if self.tracking_uri is not None and not isinstance(self.tracking_uri, str | Path):
            raise TrackerError(f"MLflow(tracking_uri={self.tracking_uri!r}): expected a string or a path")
        if isinstance(self.tracking_uri, str) and (wrong := wrong_with(self.tracking_uri)):
            raise TrackerError(f"MLflow(tracking_uri=...): {wrong}")

    def destination(self) -> Destination:
        """Look at this process and its environment, and say where runs go."""
        found = _in_this_process()
        environment = os.environ.get
        uri, source = self.tracking_uri, "MLflow(tracking_uri=...)"
        if uri is None and found.tracking_uri:
            uri, source = found.tracking_uri, "mlflow.set_tracking_uri(...)"
        if uri is None and (set_outside := environment("MLFLOW_TRACKING_URI")):
            uri, source = set_outside, "the environment variable MLFLOW_TRACKING_URI"
        if uri is None:
            uri = _default_uri()
        if isinstance(uri, str) and (wrong := wrong_with(uri)):
            raise TrackerError(f"{source}: {wrong}, or track=None for no tracking")
        name, number = self.experiment_name, None
        if name is None:
            number = found.experiment_id
        if name is None and number is None:
            name = environment("MLFLOW_EXPERIMENT_NAME")
            number = None if name else environment("MLFLOW_EXPERIMENT_ID")
        run_id = self.run_id or found.run_id or environment("MLFLOW_RUN_ID") or None
        place = absolute(uri)
        settings: dict[str, Any] = {
            "tracking_uri": place,
            "experiment": name,
            "experiment_id": number,
            "run_id": run_id,
        }
        if self.nested:
            if run_id is None:
                raise TrackerError(
                    "MLflow(nested=True): found no run to nest in; expected an active one, as in "
                    "`with mlflow.start_run():`, or run_id or MLFLOW_RUN_ID to name it"
                )
            settings |= {"run_id": None, "parent_run_id": run_id}
        wanted = self.system_metrics
        if wanted is None:
            wanted = environment("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() in ("true", "1")
        settings["system_metrics"] = wanted
        return Destination(place, settings)


@dataclass(frozen=True)
class _Found:
    """What the user has told an mlflow that is imported in this process."""

    tracking_uri: str | None = None
    experiment_id: str | None = None
    run_id: str | None = None


def _in_this_process() -> _Found:
    mlflow: Any = sys.modules.get("mlflow")
    if not hasattr(mlflow, "active_run"):
        return _Found()
    run = mlflow.active_run()
    fluent = sys.modules.get("mlflow.tracking.fluent")
    return _Found(
        mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None,
        getattr(fluent, "_active_experiment_id", None),
        None if run is None else run.info.run_id,
    )


def _default_uri() -> str:
    """MLflow's local store: `mlflow.db`, but `mlruns` where that holds experiments of older versions."""
    old = Path("mlruns")
    if any(path.parent.name.isdigit() for path in old.glob("*/meta.yaml")):
        return old.absolute().as_uri()
    return "sqlite:///mlflow.db"


def open_delivery(settings: Mapping[str, Any]) -> "MLflowDelivery":
    """The delivery to where `settings` say; imports mlflow."""
    return MLflowDelivery(settings)


class MLflowDelivery:
    """One run's line to MLflow, 2.x or 3.x, through the public client.

    The client's own retries are switched off: repeating a `create_run` that has arrived makes a second run.
    """

    most_points = 1000
    parent_tag = _PARENT
    description_tag = "mlflow.note.content"

    def __init__(self, settings: Mapping[str, Any]):
        _prepare(settings["tracking_uri"])
        from mlflow.tracking import MlflowClient

        self._settings = settings
        if settings.get("parent_run_id"):
            self.parent_tag = ""  # it gets the user's run for a parent, and no other
        self._uri: str = settings["tracking_uri"]
        self._our_id = self._run_id = ""
        self._experiment_id = ""
        self._artifact_uri = ""
        self._new_client: Any = MlflowClient
        self._client: Any = None
        self._told: dict[str, str] = {}
        self._doubted = self._create_doubted = -math.inf

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Ask the server; remember when an answer did not come."""
        try:
            with _explained(what):
                yield
        except Unavailable:
            self._doubted = time.monotonic()
            raise

    def open(self, run: Identity, known: str | None) -> Remote:
        """Find the run by id, then by our tag, or make it."""
        with self._asking("open the run"):
            if self._client is None:
                if wrong := wrong_with(self._uri):
                    raise Closed(wrong)
                _expect_outages(self._uri)
                with _alone(self._uri):
                    client = self._new_client(tracking_uri=self._uri)
                    if self._uri.startswith("sqlite:"):
                        client.search_experiments(max_results=1)
                self._client = client
            self._our_id = run.run_id
            wanted = self._settings["run_id"]
            if wanted:
                found = self._at_hand(wanted, "run_id names")
            else:
                found = self._existing(known) if known else None
            found = found or self._find(run) or self._create(run)
            self._check_active(found)
            tags = found.data.tags
            owned = bool(wanted) or tags.get(_OWNER) == "user"
            ours = tags.get(_OUR_ID) == run.run_id
            self._run_id, self._experiment_id = found.info.run_id, found.info.experiment_id
            self._artifact_uri = found.info.artifact_uri
            if not ours or (owned and _OWNER not in tags):
                self._client.set_tag(self._run_id, _OUR_ID, run.run_id)
                if owned:
                    self._client.set_tag(self._run_id, _OWNER, "user")
            steps = {metric.key: metric.step for metric in _newest(found)} if ours else {}
            return Remote(self._run_id, owned, steps, self._url(), self._command())

    def key(self, name: str) -> str:
        """The metric's name, with `_` for what MLflow does not take ('acc@1')."""
        return re.sub(r"[^\w\-. :/]", "_", name)

    def params(self, values: Mapping[str, str]) -> list[str]:
        """Send parameters, a hundred at a time; where MLflow refuses one, the others one by one."""
        from mlflow.entities import Param

        notices = [
            f"param {key}: {len(value)} characters cut to {_LONGEST_PARAM}"
            for key, value in values.items()
            if len(value) > _LONGEST_PARAM
        ]
        items = [Param(self.key(key), _cut(value, _LONGEST_PARAM)) for key, value in values.items()]
        for start in range(0, len(items), _MOST_PARAMS):
            notices += self._some_params(items[start : start + _MOST_PARAMS])
        return notices

    def _some_params(self, items: list[Any]) -> list[str]:
        try:
            with self._asking("send parameters"):
                self._client.log_batch(self._run_id, params=items)
        except Refused as error:
            if len(items) == 1:
                return [f"param {items[0].key} was refused: {error}"]
            return [notice for item in items for notice in self._some_params([item])]
        return []

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        items = [RunTag(key, _cut(value, _LONGEST_TAG)) for key, value in values.items()]
        self._told |= {item.key: item.value for item in items}
        with self._asking("set tags"):
            for start in range(0, len(items), _MOST_PARAMS):
                self._client.log_batch(self._run_id, tags=items[start : start + _MOST_PARAMS])

    def points(self, points: Sequence[Point]) -> None:
        """Send points with their own times. SQL stores turn inf into 1.797e308; NaN stays."""
        from mlflow.entities import Metric

        items = [Metric(point.key, point.value, point.time_ms, point.step) for point in points]
        with self._asking("send metrics"):
            self._client.log_batch(self._run_id, metrics=items)

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """All of them for an SQL store, which drops exact repeats; of others what has not arrived.

        A server does not say what its store is, so it is asked for the newest point of each metric. If that is one
        of `points`, they have arrived as far as that one.
        """
        if urlsplit(self._uri).scheme.partition("+")[0] in SQL:
            return list(points)
        with self._asking("ask for the newest steps"):
            run = self._client.get_run(self._run_id)
        newest = {(metric.key, metric.step, metric.timestamp) for metric in _newest(run)}
        arrived = {p.key: (p.step, p.time_ms) for p in points if (p.key, p.step, p.time_ms) in newest}
        return [p for p in points if p.key not in arrived or (p.step, p.time_ms) > arrived[p.key]]

    def artifact(self, file: Path, folder: str) -> None:
        """Upload one file; into a folder of this machine it is linked, where that is possible, and not copied."""
        here = folder_of(self._artifact_uri)
        if here is not None and link(file, here / folder):
            return
        with self._asking(f"upload {file.name}"):
            self._client.log_artifact(self._run_id, str(file), folder or None)

    def inputs(self, inputs: "Iterable[DataInput]") -> None:
        """Data sets, as MLflow's dataset inputs; it keeps each once."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        items = [
            DatasetInput(
                Dataset(
                    name=data.name,
                    digest=data.digest,
                    source_type="code",
                    source=json.dumps({"tags": {}}),
                    profile=json.dumps(data.profile, default=str)[:_LONGEST_PROFILE],
                ),
                [InputTag("mlflow.data.context", data.context)],
            )
            for data in inputs
        ]
        with self._asking("log the data set"):
            self._client.log_inputs(self._run_id, datasets=items)

    def remove_artifacts(self, folder: str) -> None:
        """Remove an uploaded folder, on stores that can (local, S3, Azure, GCS, through the server, ...)."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        try:
            with self._asking(f"remove {folder}"):
                store: Any = get_artifact_repository(self._artifact_uri, tracking_uri=self._uri)
                store.delete_artifacts(folder)
        except (Refused, Closed, NotImplementedError, TypeError):
            return

    def model(self, folder: Path, tags: Mapping[str, str], step: int) -> None:
        """Log the model in `folder` as a LoggedModel of the run, found by its tag `interlock.model`, or made.

        A store that has no LoggedModels (MLflow 2.x) gets it as the run's artifact `model/`.
        """
        with _explained("log the model"):
            try:
                found = self._logged_model(tags)
            except Exception as error:
                if getattr(error, "error_code", "") != "ENDPOINT_NOT_FOUND":
                    raise
                self._client.get_run(self._run_id)  # the server is there, and does not know of such models
                _describe(folder, run_id=self._run_id)
                self._client.log_artifacts(self._run_id, str(folder), "model")
                return
            if str(found.status) == "READY":
                return
            _describe(folder, run_id=self._run_id, model_id=found.model_id, model_uuid=found.model_id)
            self._client.log_model_artifacts(found.model_id, str(folder))
            self._note_output(found.model_id, step)
            self._client.finalize_logged_model(found.model_id, "READY")

    def _logged_model(self, tags: Mapping[str, str]) -> Any:
        mark = tags["interlock.model"]
        found = self._client.search_logged_models(
            [self._experiment_id], filter_string=f"source_run_id = '{self._run_id}'"
        )
        mine = [model for model in found if model.tags.get("interlock.model") == mark]
        return min(mine, key=lambda model: model.creation_timestamp, default=None) or (
            self._client.create_logged_model(
                self._experiment_id, name="model", source_run_id=self._run_id, tags=dict(tags)
            )
        )

    def _note_output(self, model_id: str, step: int) -> None:
        from mlflow.entities import LoggedModelOutput

        outputs = getattr(self._client.get_run(self._run_id), "outputs", None)
        if model_id not in [output.model_id for output in getattr(outputs, "model_outputs", None) or []]:
            self._client.log_outputs(self._run_id, [LoggedModelOutput(model_id, step)])

    def running(self) -> None:
        """RUNNING."""
        with self._asking("set the status"):
            self._client.update_run(self._run_id, status="RUNNING")

    def end(self, ending: Ending, time_ms: int) -> None:
        """FINISHED, FAILED or KILLED; then a look at whether what was said before has not come after."""
        status = ending.upper()
        with self._asking("set the status"):
            self._client.set_terminated(self._run_id, status=status, end_time=time_ms)
        # A request whose answer we stopped waiting for may be served still.
        time.sleep(max(0.0, self._doubted + _LATE_S - time.monotonic()))
        with self._asking("look at the run"):
            self._tidy(self._tagged(self._our_id, self._experiment_id), status, time_ms)

    def _tidy(self, found: list[Any], status: str, time_ms: int) -> None:
        """Set right what late requests have done: old tags, an old status, a second run."""
        for other in found:
            if other.info.run_id != self._run_id:
                if _is_empty(other):
                    self._client.delete_run(other.info.run_id)
                continue
            if old := {key: value for key, value in self._told.items() if other.data.tags.get(key) != value}:
                self.tags(old)
            if other.info.status != status:
                self._client.set_terminated(self._run_id, status=status, end_time=time_ms)

    def check(self) -> None:
        """Raise Closed if the run or its experiment was deleted."""
        with self._asking("look at the run"):
            run = self._client.get_run(self._run_id)
        self._check_active(run)

    def _existing(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def _at_hand(self, run_id: str, purpose: str) -> Any:
        """A run of the user's; raises Closed if it is not there."""
        found = self._existing(run_id)
        if found is None:
            raise Closed(f"{self._uri}: there is no MLflow run {run_id!r}; expected the run that {purpose}")
        return found

    def _find(self, run: Identity) -> Any:
        """The run that carries our tag; of several the one with values, then the first."""
        mine = self._tagged(run.run_id, self._experiment())
        return min(
            mine,
            key=lambda other: (_is_empty(other), other.info.start_time, other.info.run_id),
            default=None,
        )

    def _tagged(self, ours: str, experiment: str) -> list[Any]:
        # The end of our id has no character that a filter would have to quote; the user's name may.
        ending = ours[-len("-YYYYMMDD-HHMMSS-XXXX") :].replace("'", "_")
        found = self._client.search_runs(
            [experiment], filter_string=f"tags.`{_OUR_ID}` LIKE '%{ending}'", max_results=100
        )
        return [other for other in found if other.data.tags.get(_OUR_ID) == ours]

    def _create(self, run: Identity) -> Any:
        if time.monotonic() - self._create_doubted < _LATE_S:
            raise Unavailable("the run may be being made; looking for it again")
        tags = {
            _OUR_ID: run.run_id,
            "mlflow.user": run.user,
            "mlflow.source.name": run.source,
            "mlflow.source.type": "LOCAL",
        }
        if parent := self._settings.get("parent_run_id"):
            tags[_PARENT] = parent
        try:
            return self._client.create_run(
                self._experiment(), start_time=run.started_ns // 1_000_000, tags=tags, run_name=run.name
            )
        except Exception:
            self._create_doubted = time.monotonic()
            raise

    def _experiment(self) -> str:
        """The experiment's id: the parent's, where there is one; it is made where there is none of that name."""
        from mlflow.exceptions import MlflowException

        if parent := self._settings.get("parent_run_id"):
            return str(self._at_hand(parent, "nested=True is to nest in").info.experiment_id)
        name, number = self._settings["experiment"], self._settings["experiment_id"]
        if not name:
            return str(number or "0")
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    with _explained(f"make the experiment {_cut(name, 60)!r}"):
                        raise
                found = self._client.get_experiment_by_name(name)
        if found.lifecycle_stage == "deleted":
            raise Closed(
                f"{self._uri}: the experiment {name!r} was deleted; restore it with `mlflow experiments restore "
                f"--experiment-id {found.experiment_id}`, or name another"
            )
        return str(found.experiment_id)

    def _check_active(self, run: Any) -> None:
        if run.info.lifecycle_stage == "deleted":
            raise Closed(
                f"{self._uri}: the MLflow run {run.info.run_id} was deleted; restore it with `mlflow runs restore "
                f"--run-id {run.info.run_id}`, then `interlock sync`"
            )

    def artifact_page(self, path: str) -> str:
        """Where the server's own pages show an artifact, as a link from one of them."""
        return f"{self._page}/artifacts/{path}"

    @property
    def _page(self) -> str:
        return f"#/experiments/{self._experiment_id}/runs/{self._run_id}"

    def _url(self) -> str:
        return f"{self._uri.rstrip('/')}/{self._page}" if self._uri.startswith("http") else ""

    def _command(self) -> str:
        return "" if self._uri.startswith("http") else f"mlflow ui --backend-store-uri {self._uri}"


def _describe(folder: Path, **fields: str) -> None:
    """Say in the model's own file which run, and which LoggedModel, it is of."""
    import yaml

    file = folder / "MLmodel"
    if file.exists():
        described = yaml.safe_load(file.read_text())
        file.write_text(yaml.safe_dump({**described, **fields, "artifact_path": "model"}))


def _newest(run: Any) -> list[Any]:
    """For each key of a run, the metric with the highest step. (`data.metrics` leaves the step out.)"""
    return list(run.data._metric_objs)


def _is_empty(run: Any) -> bool:
    return not (run.data.params or _newest(run) or _OWNER in run.data.tags)


def _cut(value: str, longest: int) -> str:
    # No database takes a NUL, no request a lone surrogate (of a file's name that is not UTF-8).
    value = value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
    return value if len(value) <= longest else value[: longest - 1] + "…"


def _expect_outages(uri: str) -> None:
    """Have MLflow report at once, and to us only, that a database is away: it would try ten times, on pages of log."""
    if urlsplit(uri).scheme.partition("+")[0] in SQL:
        with contextlib.suppress(ImportError):
            utils = import_module("mlflow.store.db.utils")
            utils.MAX_RETRY_COUNT = 1  # type: ignore[attr-defined]
            logging.getLogger(utils.__name__).setLevel(logging.CRITICAL)


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """For a database in a file: one process of ours at a time, because two that make its tables spoil it for ever."""
    if not uri.startswith("sqlite:"):
        yield
        return
    name = hashlib.sha256(uri.encode()).hexdigest()[:16]
    with (Path(tempfile.gettempdir()) / f"interlock-{os.getuid()}-{name}.lock").open("a") as file:
        deadline = time.monotonic() + _LONGEST_MAKING_S
        while time.monotonic() < deadline:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.1)
        yield


# Codes by which a server says that it has understood, and will not.
_REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_ALREADY_EXISTS",
    "ALREADY_EXISTS",
    "NOT_IMPLEMENTED",
}
_GONE = {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"}
_DENIED = {"UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED"}
_DENIED_HINT = (
    ". Do MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, belong to somebody "
    "who may write there? They are read when the training starts, and by `interlock sync`"
)
_RETRIED_STATUS = {401, 403, 404, 408, 409, 425, 429}


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Whatever MLflow raises, as one of our three answers.

    A 404 or 403 that is not MLflow's own is that of a proxy whose server is away, or of a token that has run out.
    """
    from mlflow.exceptions import InvalidUrlException, MlflowException
    from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

    try:
        yield
    except (Unavailable, Refused, Closed):
        raise
    except (UnsupportedModelRegistryStoreURIException, InvalidUrlException) as error:
        raise Closed(f"cannot {what}: {_first_line(error)} Expected {EXAMPLES}") from error
    except MlflowException as error:
        text = f"cannot {what}: {_first_line(_innermost(error))}"
        if error.error_code in _GONE:
            raise Closed(text) from error
        if error.error_code in _REFUSALS:
            raise Refused(text) from error
        raise Unavailable(text + (_DENIED_HINT if error.error_code in _DENIED else "")) from error
    except ImportError as error:
        raise Closed(
            f"cannot {what}: {_first_line(error)}; install the driver that the URI asks for"
        ) from error
    except Exception as error:  # of requests, SQLAlchemy, boto3, a plugin: they have no base class in common
        status = getattr(getattr(error, "response", None), "status_code", None)
        text = f"cannot {what}: {type(error).__name__}: {_first_line(_innermost(error))}"
        if type(error).__name__ in ("ArgumentError", "NoSuchModuleError"):  # SQLAlchemy's
            raise Closed(f"{text}; expected {EXAMPLES}") from error
        if type(error).__name__ == "OperationalError":
            text = f"cannot {what}: {_first_line(getattr(error, 'orig', None) or error)}"
        if isinstance(status, int) and 400 <= status < 500 and status not in _RETRIED_STATUS:
            raise Refused(text) from error
        raise Unavailable(text + (_DENIED_HINT if status in (401, 403) else "")) from error


def _innermost(error: BaseException) -> BaseException:
    """For a request that got no answer, what happened to it, without three layers of wrapping."""
    context = error.__context__ if str(error).startswith("API request to") else error
    reason: object = context
    while reason is not None:
        inner = getattr(reason, "reason", None) or next(iter(getattr(reason, "args", ())), None)
        if not isinstance(inner, BaseException):
            break
        reason = inner
    if reason is error or not isinstance(reason, BaseException):
        return error
    said = str(reason).rpartition("): ")[2]
    url = getattr(getattr(context, "request", None), "url", None) or "the server"
    return ConnectionError(
        f"{urlsplit(str(url))._replace(path='', query='').geturl()} gives no answer: {said}"
    )


def _first_line(error: BaseException) -> str:
    return _cut((str(error).strip() or type(error).__name__).splitlines()[0], 500)


def _prepare(uri: str) -> None:
    """Set up this process for an mlflow without a person in front of it; before it is imported."""
    # Its own retries would repeat a create_run, and hide an outage for minutes.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_LOGGING_LEVEL"] = "WARNING"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # The settings say where to, once and for all.
    os.environ["MLFLOW_TRACKING_URI"] = uri
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.pop(name, None)
    logging.getLogger("alembic").setLevel(logging.WARNING)
