"""What a run's page says beside its values: source, data set, description, parameters; and that no secret is on it."""

import gzip
import os
import sqlite3
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import trainings
from deliveries import until
from mlflow_server import Database, RemoteRun
from orchestrator.errors import ConfigurationError
from states.table import State
from tracking.description import describe
from tracking.inputs import inputs_in
from tracking.journal import Attempt, Journal, Parent
from tracking.runs import RunFolder, list_runs
from tracking.shipper import status
from tracking.source import Source, source_of

pytestmark = pytest.mark.long  # a training and all that is delivered of it; CI runs it by itself

SECRET = "correct-horse-battery"
SCRIPT = f"""
import torch, trainings
from orchestrator import MLflow
from states import Trigger
torch.set_num_threads(1)
held_out = torch.utils.data.DataLoader(trainings.data(16, seed=6), batch_size=8)
trainer = trainings.make(
    "runs", epochs=1, val_loader=held_out, track=MLflow("sqlite:///mlflow.db"),
    config={{"data": {{"path": "x", "api_key": "{SECRET}"}}, "max_tokens": 512, "long": "y" * 7000}},
)

@trainer.after(Trigger.STEP)
def stumble():
    trainer.note("reading from https://ann:{SECRET}@host/data")
    if trainer.batches == 3:
        raise RuntimeError("cannot connect to postgresql://ann:{SECRET}@db/x")
trainer.fit()
"""


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org"]
    done = subprocess.run(
        ["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def work_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work tree")
    (folder / "train.py").write_text(SCRIPT)
    Database.made(folder / "mlflow.db")
    git(folder, "init", "-q", "-b", "trunk")
    git(folder, "add", "train.py")
    git(folder, "commit", "-q", "-m", "first")
    git(folder, "remote", "add", "origin", f"https://ann:{SECRET}@example.org/project.git")
    return folder


@pytest.fixture(scope="module")
def run(work_tree: Path) -> RunFolder:
    """A training in that work tree that fails on its fourth batch, delivered."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "SOME_TOKEN": f"{SECRET}-2"}
    command = [sys.executable, "train.py", "--password", SECRET, f"{SECRET}-2"]
    assert subprocess.run(command, cwd=work_tree, env=environment, capture_output=True).returncode == 1
    (run,) = list_runs(work_tree / "runs")
    until(lambda: status(run).shipper is None and status(run).points_delivered, 120)
    return run


@pytest.fixture
def remote(run: RunFolder, work_tree: Path) -> RemoteRun:
    return Database(work_tree / "mlflow.db").run(run.id)


def test_the_page_of_a_run_that_failed(run: RunFolder, remote: RemoteRun, work_tree: Path) -> None:
    assert remote.status == "FAILED"
    assert remote.params["config.data.path"] == "x"
    assert remote.params["config.data.api_key"] == "***"
    assert remote.params["config.max_tokens"] == "512"
    assert len(remote.params["config.long"]) == 6000
    assert "param config.long: 7000 characters cut to 6000" in (run.path / "shipper.log").read_text()
    commit = git(work_tree, "rev-parse", "HEAD")
    assert remote.tags["mlflow.source.git.commit"] == remote.tags["interlock.source.commit"] == commit
    assert remote.tags["mlflow.source.git.branch"] == "trunk"
    assert remote.tags["mlflow.source.git.repoURL"] == "https://ann:***@example.org/project.git"
    assert remote.tags["interlock.source.dirty"] == "false"
    note = remote.tags["mlflow.note.content"]
    assert note.startswith("**Failed**: RuntimeError: cannot connect to postgresql://ann:***@db/x.")
    assert f"interlock resume mlflow:{remote.id}" in note
    assert f"commit `{commit[:12]}`" in note


def test_the_data_sets_are_inputs(run: RunFolder, remote: RemoteRun, work_tree: Path) -> None:
    with sqlite3.connect(work_tree / "mlflow.db") as database:
        rows = database.execute(
            """SELECT datasets.name, digest, input_tags.name, input_tags.value FROM datasets
               JOIN inputs ON inputs.source_id = datasets.dataset_uuid AND inputs.destination_id = ?
               JOIN input_tags ON input_tags.input_uuid = inputs.input_uuid""",
            (remote.id,),
        ).fetchall()
    newest = sorted(run.checkpoints.iterdir())[-1]
    training, validation = inputs_in(newest)
    assert training.digest != validation.digest
    assert sorted(rows) == sorted(
        ("TensorDataset", found.digest, "mlflow.data.context", found.context)
        for found in (training, validation)
    )
    assert (training.context, validation.context) == ("training", "validation")


def test_no_secret_leaves_the_machine(run: RunFolder, remote: RemoteRun, work_tree: Path) -> None:
    with Journal.open(run) as journal:
        assert SECRET in journal.attempts()[0].exception, "what stays here is as it was"
    places = [work_tree / "mlflow.db", run.path / "shipper.log"]
    places += [
        path for path in remote.artifacts.rglob("*") if path.is_file() and "checkpoints" not in path.parts
    ]
    names = {path.name for path in places}
    assert {"transitions.jsonl.gz", "journal.sqlite.gz"} <= names
    for path in places:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        assert SECRET.encode() not in content, path


def test_source(tmp_path: Path, work_tree: Path) -> None:
    commit = git(work_tree, "rev-parse", "HEAD")
    found = source_of(work_tree)
    assert found is not None
    assert (found.commit, found.dirty, found.branch) == (commit, False, "trunk")
    inner = work_tree / "inner"
    inner.mkdir(exist_ok=True)
    (inner / "untracked").touch()
    assert source_of(inner) == found, "files that are not tracked are no change"
    script = work_tree / "train.py"
    try:
        script.write_text(SCRIPT + "#")
        assert source_of(work_tree) == replace(found, dirty=True)
    finally:
        script.write_text(SCRIPT)
    assert source_of(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert source_of(tmp_path) is None, "no commit yet"


def test_git_that_hangs_or_is_not_there(
    tmp_path: Path, work_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_of(work_tree) is None
    slow = tmp_path / "git"
    slow.write_text('#!/bin/sh\ncase "$*" in *rev-parse*) echo 123abc;; *) exec /bin/sleep 60;; esac\n')
    slow.chmod(0o755)
    assert source_of(work_tree, longest_s=0.5) == Source("123abc", None, "", "")


def attempt(number: int = 1, **changes: Any) -> Attempt:
    found = Attempt(number, None, 1, 0, None, 1, "ann", 0.0, None, None, "", "", None, {}, {}, "cpu", None)
    return replace(found, **changes)


def test_descriptions() -> None:
    running = describe("digits-1", "0f3c", [attempt()], {})
    assert running == "**Running.**\n\ninterlock run `digits-1`: 1 attempt on ann, device cpu."
    done = attempt(2, outcome="done", reason="finished", end_state=State.DONE, host="bob")
    text = describe("digits-1", "0f3c", [attempt(outcome="died"), done], {"last": "a", "best": "b"})
    assert text.startswith("**Done**.")
    assert "2 attempts on ann and bob" in text
    assert "Checkpoints: last `a`, best `b`." in text
    assert "interlock resume" not in text, "there is nothing left to do"
    pages = {"curves.png": "#/c", "timeline.html": "#/t", "checkpoints/a": "#/a", "metrics.csv.gz": "#/m"}
    text = describe("digits-1", "0f3c", [done], {"last": "a", "best": "b"}, pages=pages)
    assert "Look at [where the time went](#/t), [the curves](#/c)." in text
    assert "Checkpoints: last [`a`](#/a), best `b`." in text
    stopped = describe("d", "0f3c", [attempt(outcome="stopped", reason="signal SIGTERM")], {"last": "a"})
    assert stopped.startswith("**Stopped**: signal SIGTERM.")
    assert "interlock resume mlflow:0f3c" in stopped
    failed = describe("d", "0f3c", [attempt(outcome="failed", reason="a", exception="E: a\nb")], {})
    assert "```\nE: a\nb\n```" in failed
    branch = Parent("other-1", "/x", 7, "c", "branch")
    source = Source("0123456789abcdef", True, "trunk", "")
    text = describe("d", "0f3c", [attempt()], {}, parent=branch, source=source)
    assert "branch from `other-1` at transition 7; commit `0123456789ab`, with changes" in text


@dataclass
class Options:
    depth: int = 3


def test_a_configuration_of_the_users(tmp_path: Path) -> None:
    def params(config: object) -> object:
        return trainings.make(tmp_path, config=config)._settings.params.get("config")

    assert params(None) is None
    assert params({"a": {"b": 1}}) == {"a": {"b": 1}}
    assert params(Options()) == {"depth": 3}
    assert params(Namespace(depth=3)) == {"depth": 3}
    with pytest.raises(ConfigurationError, match="config is 3; expected a dict"):
        params(3)
