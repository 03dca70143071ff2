"""The process that downloads from MLflow: `python -m tracking.mlflow_fetching`, asked by `tracking.fetching`.

The first line of its input are the settings of an MLflow destination; each further one is a request.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tracking.delivery import BackendError, Unavailable
from tracking.mlflow_delivery import _OUR_ID, _explained, _prepare

__all__ = ["main"]

_T = TypeVar("_T")
_PAUSE_S = 1.0


class _Files:
    """The files of runs at one MLflow."""

    def __init__(self, settings: Mapping[str, Any]):
        _prepare(settings["tracking_uri"])
        from mlflow.tracking import MlflowClient

        self._wait_s = float(settings["wait_s"])
        self._uri = settings["tracking_uri"]
        self._new_client: Any = MlflowClient
        self._client: Any = None
        self._stores: dict[str, Any] = {}

    def look(self, run_id: str) -> dict[str, Any]:
        """What there is of a run."""
        try:
            run = self._patiently(f"find the run {run_id!r}", lambda: self._opened().get_run(run_id))
        except Unavailable:
            raise
        except BackendError as error:
            raise BackendError(
                f"there is no MLflow run {run_id!r} ({error}); expected the id of a run as MLflow shows it, at this "
                "tracking URI"
            ) from error
        ours = run.data.tags.get(_OUR_ID)
        if not ours:
            raise BackendError(
                f"the MLflow run {run_id!r} ({run.info.run_name}) was not made by interlock: it has no tag "
                f"{_OUR_ID!r}; expected a run that a Trainer was tracked in"
            )
        top = self._list(run_id, None)
        names = self._list(run_id, "checkpoints") if "checkpoints" in top else {}
        checkpoints = {}
        for path in names:
            files = self._list(run_id, path)
            if f"{path}/manifest.json" in files:  # which is uploaded last
                checkpoints[path.removeprefix("checkpoints/")] = sum(size or 0 for size in files.values())
        return {
            "run_id": run.info.run_id,
            "ours": ours,
            "status": run.info.status,
            "tags": dict(run.data.tags),
            "files": {path: size for path, size in top.items() if size is not None},
            "checkpoints": checkpoints,
        }

    def download(self, run_id: str, path: str, folder: str) -> dict[str, Any]:
        """Download an artifact."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        found = self._patiently(
            f"download {path}", lambda: self._store(run_id).download_artifacts(path, folder)
        )
        return {"path": found}

    def _list(self, run_id: str, path: str | None) -> dict[str, int | None]:
        """Sizes of files (None: a folder), by path."""
        found = self._patiently("list the artifacts", lambda: list(self._store(run_id).list_artifacts(path)))
        return {item.path: None if item.is_dir else int(item.file_size or 0) for item in found}

    def _store(self, run_id: str) -> Any:
        """The run's artifact store itself: the client would ask for models too, which a server of MLflow 2 has not."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        if run_id not in self._stores:
            place = self._opened().get_run(run_id).info.artifact_uri
            self._stores[run_id] = get_artifact_repository(place, tracking_uri=self._uri)
        return self._stores[run_id]

    def _opened(self) -> Any:
        if self._client is None:
            self._client = self._new_client(tracking_uri=self._uri)
        return self._client

    def _patiently(self, what: str, work: Callable[[], _T]) -> _T:
        """What `work` gives; a server that is away is tried again for a while."""
        deadline = time.monotonic() + self._wait_s
        while True:
            try:
                with _explained(what):
                    return work()
            except Unavailable as error:
                if time.monotonic() + _PAUSE_S >= deadline:
                    raise Unavailable(
                        f"{error}; tried for {self._wait_s:g} s. Is the tracking URI right, the server up, and are the "
                        "credentials in the environment?"
                    ) from error
            time.sleep(_PAUSE_S)


def main() -> None:
    """Answer requests until the input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not get between the answers
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    files: _Files | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if files is None:
            files = _Files(request)
            continue
        try:
            answer = files.look(**request) if request.pop("what") == "look" else files.download(**request)
        except BackendError as error:
            answer = {"error": str(error)}
        out.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
