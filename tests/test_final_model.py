"""The final model: handed over in no time, exported by a process of its own, logged once; or its weights, and why."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainings
from deliveries import ENVIRONMENT, until
from mlflow_server import Database
from orchestrator import EMA, MLflow, Phase
from orchestrator.final_model import HandOverError, call_of, hand_over
from orchestrator.model_export import load
from orchestrator.snapshot.tensor_file import read_tensors
from tracking.journal import Journal
from tracking.mlflow_delivery import MLflowDelivery
from tracking.runs import RunFolder, create_run, list_runs
from tracking.shipper import status, sync


class Tied(nn.Module):
    """Two names for one parameter, a buffer that is not saved, a tensor that is neither, named arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.shift = torch.tensor(0.5)
        self.one.bias.requires_grad_(False)

    def forward(self, inputs: torch.Tensor, *, extra: dict[str, torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = self.other(self.one(inputs)) * self.scale + self.shift + extra["more"]
        return found


class Branching(nn.Module):
    """torch.export cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) if inputs.sum() > 0 else -self.layer(inputs)


class Locked(nn.Linear):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.lock = threading.Lock()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_run(tmp_path, "final")


def inputs_of(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.ones(2, 6),), {}


# -- handing over --------------------------------------------------------------------------------------------


def test_what_is_handed_over_is_the_model(run: RunFolder) -> None:
    model, extra = Tied().train(), {"more": torch.ones(2, 6)}
    reason = hand_over(run, model, lambda _: ((torch.ones(2, 6),), {"extra": extra}), {"attempt": 3})
    assert reason == ""
    assert json.loads((run.final_model / "request.json").read_text())["attempt"] == 3
    assert (run.final_model / "structure.pickle").stat().st_mode & 0o777 == 0o600
    assert b"\x00\x00\x80\x3f" * 6 not in (run.final_model / "structure.pickle").read_bytes(), "no tensors"
    weights = read_tensors(run.final_model / "weights" / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    found, args, kwargs = load(run.final_model)
    assert isinstance(found, Tied)
    assert not found.training
    assert model.training, "the trainer's own is as it was"
    assert found.one.weight is found.other.weight
    assert isinstance(found.one.weight, nn.Parameter)
    assert (found.one.weight.requires_grad, found.one.bias.requires_grad) == (True, False)
    assert torch.equal(found(*args, **kwargs), model(torch.ones(2, 6), extra=extra))


def test_the_pickle_of_another_machine_is_not_read(run: RunFolder) -> None:
    hand_over(run, nn.Linear(6, 3), inputs_of, {})
    file = run.final_model / "request.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "boot": "another"}))
    (run.final_model / "structure.pickle").write_bytes(
        b"cposix\n_exit\n(I7\ntR."
    )  # os._exit(7), if it is read
    answer = subprocess.run(
        [sys.executable, "-m", "orchestrator.model_export", str(run.final_model)],
        env=ENVIRONMENT,
        check=True,
        stdout=subprocess.PIPE,
    )
    assert "on the machine that trained it" in json.loads(answer.stdout)["reason"]
    assert not (run.final_model / "mlflow").exists()


def test_a_model_that_cannot_be_pickled_leaves_its_weights(run: RunFolder) -> None:
    assert "pickle" in hand_over(run, Locked(), inputs_of, {})
    assert "pickle" in json.loads((run.final_model / "request.json").read_text())["reason"]
    assert read_tensors(run.final_model / "weights" / "model.safetensors").keys() == {"weight", "bias"}


def test_a_model_that_refers_to_its_data_is_not_written_with_it(run: RunFolder) -> None:
    model = nn.Linear(6, 3)
    model.data = [random.randbytes(1 << 20) for _ in range(70)]  # type: ignore[assignment]
    assert "does it refer to its data" in hand_over(run, model, inputs_of, {})


def test_a_later_model_takes_the_place_of_one_that_waits(run: RunFolder) -> None:
    hand_over(run, nn.Linear(6, 3), inputs_of, {"attempt": 1})
    hand_over(run, nn.Linear(6, 4), inputs_of, {"attempt": 2})
    assert json.loads((run.final_model / "request.json").read_text())["attempt"] == 2
    assert load(run.final_model)[0].out_features == 4


def test_a_forward_is_asked_how_it_calls_the_model_without_running_it() -> None:
    model = Branching()

    def forward(model: nn.Module, batch: Any) -> Any:
        return model(batch["x"].to(next(model.parameters()).device), extra=batch["y"])

    batch = {"x": torch.ones(2, 6), "y": 7}
    args, kwargs = call_of(forward, model, batch)
    assert torch.equal(args[0], batch["x"])
    assert kwargs == {"extra": 7}
    with pytest.raises(HandOverError, match="only parts of it"):
        call_of(lambda model, batch: model.layer(batch["x"]), model, batch)
    with pytest.raises(HandOverError, match="KeyError: 'z'"):
        call_of(lambda model, batch: model(batch["z"]), model, batch)


@pytest.mark.parametrize("what", ["track=None", "log_model=False", "halted"])
def test_nothing_is_handed_over_unasked(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.attempt.start_shipper", lambda *_: None)
    track = None if what == "track=None" else MLflow("sqlite:///x.db", log_model=what == "halted")
    trainer = trainings.make(tmp_path, track=track)
    if what == "halted":
        trainer.advance()
        trainer.close()
    else:
        trainer.fit()
    assert trainer.run is not None
    assert not trainer.run.final_model.exists()


def messages(run: RunFolder) -> str:
    with Journal.open(run) as journal:
        return "\n".join(record.message for record in journal.logs())


def test_a_trainer_hands_over_the_validated_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.attempt.start_shipper", lambda *_: None)
    trainer = trainings.make(
        tmp_path, callbacks=[EMA(0.9, validate=True)], val_loader=trainings.loader(16), track=MLflow()
    )
    trainer.fit()
    assert trainer.run is not None
    found, args, kwargs = load(trainer.run.final_model)
    assert (args[0].shape, kwargs) == ((2, 6), {})
    trainings.assert_equal(found.state_dict(), trainer.validation_model.state_dict())
    assert not torch.equal(found.state_dict()["0.weight"], trainer.model.state_dict()["0.weight"])


def test_a_training_of_several_phases_says_why_only_weights_are_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.attempt.start_shipper", lambda *_: None)

    def phases(model: nn.Module) -> list[Phase]:
        def forward(model: nn.Module, batch: Any) -> Any:
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        return [Phase(name, torch.optim.SGD(model.parameters(), lr=0.1), forward) for name in ("a", "b")]

    trainer = trainings.make(tmp_path, optimizer=phases, loss_fn=None, track=MLflow())
    trainer.fit()
    assert trainer.run is not None
    assert "of the final model only the weights are delivered" in messages(trainer.run)
    assert (trainer.run.final_model / "weights" / "model.safetensors").exists()


def test_a_folder_that_cannot_be_written_is_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.attempt.start_shipper", lambda *_: None)
    trainer = trainings.make(tmp_path, track=MLflow())
    trainer.start()
    assert trainer.run is not None
    trainer.run.final_model.with_suffix(".new").touch()
    (trainer.run.final_model).touch()  # a file where the folder belongs
    assert trainer.fit().state.value == "DONE"
    assert "the final model is not delivered" in messages(trainer.run)


# -- exported, logged once -----------------------------------------------------------------------------------

_SCRIPT = """
import sys
from pathlib import Path
import torch, trainings
from torch import nn
from orchestrator import MLflow
torch.set_num_threads(1)

class Net(nn.Module):  # known to this script only
    def __init__(self):
        super().__init__()
        self.body = trainings.network()
    def forward(self, inputs, scale):
        return self.body(inputs) * scale["by"]

def forward(model, batch):
    outputs = model(batch[0], scale={"by": torch.ones(len(batch[0]), 1)})
    return nn.functional.cross_entropy(outputs, batch[1]), outputs, batch[1]

BODY
"""


def trained(root: Path, store: str, body: str) -> RunFolder:
    """Train as a script does; the run, when its shipper has left."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    script = _SCRIPT.replace("BODY", body)
    subprocess.run(
        [sys.executable, "-c", script, str(root), store], env=environment, check=True, cwd=root.parent
    )
    (run,) = list_runs(root)
    until(lambda: status(run).shipper is None and not status(run).artifacts_waiting, 150)
    return run


_LOOK = """
import json, sys
import mlflow, numpy
mlflow.set_tracking_uri(sys.argv[1])
client = mlflow.MlflowClient()
(run,) = client.search_runs(["0"])
models = client.search_logged_models(["0"])
told = {"status": run.info.status, "run": run.info.run_id, "outputs": [m.model_id for m in run.outputs.model_outputs]}
told["models"] = [[m.model_id, m.name, str(m.status), m.tags, m.artifact_location] for m in models]
if len(sys.argv) > 2:
    uri = f"models:/{models[0].model_id}"
    loaded = mlflow.pytorch.load_model(uri)
    import torch
    for size in (2, 7):
        inputs = [torch.ones(size, *shape) for shape in json.loads(sys.argv[2])]
        told.setdefault("shapes", []).append(list(loaded(*inputs).shape))
    if len(inputs) == 1:
        served = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model").predict(inputs[0].numpy())
        told["served"] = bool(numpy.allclose(served, loaded(*inputs).detach().numpy()))
print(json.dumps(told))
"""


def look(store: str, *inputs: str) -> dict[str, Any]:
    answer = subprocess.run(
        [sys.executable, "-c", _LOOK, store, *inputs], env=ENVIRONMENT, check=True, stdout=subprocess.PIPE
    )
    told = json.loads(answer.stdout)
    assert isinstance(told, dict)
    return told


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["plain", "named arguments"])
def test_the_logged_model_loads_and_serves(kind: str, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    options = "model=Net(), forward=forward, " if kind == "named arguments" else ""
    trained(
        tmp_path / "runs",
        store,
        f"trainings.make(Path(sys.argv[1]), {options}val_loader=trainings.loader(16), "
        "track=MLflow(tracking_uri=sys.argv[2])).fit()",
    )
    told = look(store, json.dumps([[6]] if kind == "plain" else [[6], [1]]))
    (model,) = told["models"]
    assert model[1:3] == ["model", "READY"]
    assert model[3]["interlock.format"] == "pt2"
    assert told["outputs"] == [model[0]]
    assert told["shapes"] == [[2, 3], [7, 3]]
    assert told.get("served", True)
    assert told["status"] == "FINISHED"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_model_that_cannot_be_exported_is_logged_as_its_weights(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    run = trained(
        tmp_path / "runs",
        store,
        """
import test_final_model
trainings.make(Path(sys.argv[1]), model=test_final_model.Branching(), track=MLflow(tracking_uri=sys.argv[2])).fit()
""",
    )
    told = look(store)
    (model,) = told["models"]
    assert (model[2], model[3]["interlock.format"]) == ("READY", "safetensors")
    assert (
        "branching" in model[3]["interlock.reason"].lower() or "guard" in model[3]["interlock.reason"].lower()
    )
    weights = read_tensors(Path(model[4].removeprefix("file://")) / "model.safetensors")
    assert weights.keys() == {"layer.weight", "layer.bias"}
    assert "the final model is delivered as its weights" in (run.path / "shipper.log").read_text()
    assert not run.final_model.exists()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_killed_at_any_moment_the_model_is_there_once(tmp_path: Path) -> None:
    """The delivery is killed at random, with whatever process it has started."""
    store = f"sqlite:///{tmp_path}/mlflow.db"
    script = _SCRIPT.replace(
        "BODY",
        """
from orchestrator import attempt
attempt.start_shipper = lambda run, tracker: None
trainings.make(Path(sys.argv[1]), track=MLflow()).fit()
""",
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "runs"), store],
        env=environment,
        check=True,
        cwd=tmp_path,
    )
    (run,) = list_runs(tmp_path / "runs")
    # MLflow does not survive that the making of its tables is killed.
    Database.made(tmp_path / "mlflow.db")
    chance = random.Random(5)
    for _ in range(6):
        first = threading.Thread(target=_sync, args=(run, store))
        first.start()
        time.sleep(1)
        until(lambda: status(run).shipper is not None or not run.final_model.exists(), 60)
        time.sleep(chance.uniform(0, 12))
        shipper = status(run).shipper
        if shipper is not None:
            os.kill(shipper.pid, signal.SIGKILL)
        first.join(60)
        if not run.final_model.exists():
            break
    assert sync(run, timeout=60).complete
    told = look(store, "[[6]]")
    (model,) = told["models"]
    assert (model[2], told["outputs"]) == ("READY", [model[0]])


def _sync(run: RunFolder, store: str) -> None:
    sync(run, tracker=MLflow(store))


@pytest.mark.long
def test_a_store_without_logged_models_gets_an_artifact(tmp_path: Path) -> None:
    """MLflow 2.x answers such requests with a 404 that is not its own: seen, and done here by the client."""
    script = """
import sys
from pathlib import Path
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND
from tracking.delivery import Identity
from tracking.mlflow_delivery import open_delivery
delivery = open_delivery({"tracking_uri": sys.argv[1], "experiment": None, "experiment_id": None, "run_id": None})
remote = delivery.open(Identity("old-20240101-000000-0000", "old", 1, "x.py", "me"), None)
def absent(*_, **__):
    raise MlflowException("API request failed with error code 404 != 200", error_code=ENDPOINT_NOT_FOUND)
delivery._client.search_logged_models = delivery._client.create_logged_model = absent
folder = Path(sys.argv[2]); folder.mkdir(); (folder / "model.safetensors").write_bytes(b"x")
(folder / "MLmodel").write_text("flavors: {}")
for _ in range(2):
    delivery.model(folder, {"interlock.model": "old/1"}, 3)
print([file.path for file in delivery._client.list_artifacts(remote.run_id, "model")])
"""
    answer = subprocess.run(
        [sys.executable, "-c", script, f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "model")],
        env=ENVIRONMENT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert answer.stdout.strip().endswith("['model/MLmodel', 'model/model.safetensors']")


def test_mlflow_delivery_takes_models() -> None:
    from tracking.delivery import ModelDelivery

    assert issubclass(MLflowDelivery, ModelDelivery)
