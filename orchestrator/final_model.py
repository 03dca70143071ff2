"""The final model, handed over by the trainer at DONE to a process that exports it.

What is handed over is a folder in the run's: the weights (safetensors), the model's structure and one example call
(a pickle without tensors, which lives until the model is delivered), and `request.json`, written last.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from orchestrator.attempt import Attempt
from orchestrator.configuration import Settings
from orchestrator.data import to_device
from orchestrator.phase import Forward
from orchestrator.snapshot.names import unwrapped
from orchestrator.snapshot.tensor_file import DTYPES, buffers
from orchestrator.training import Training
from orchestrator.work import BatchWork
from tracking.runs import RunFolder

__all__ = ["FOLDER_FILES", "HandOverError", "call_of", "hand_over", "this_boot"]

FOLDER_FILES = ("weights/model.safetensors", "other.safetensors", "structure.pickle", "request.json")
_MOST_STRUCTURE = 64 << 20


class HandOverError(Exception):
    """Why a model cannot be handed over whole."""


class _Called(BaseException):
    """Raised out of the user's forward when it has come to call the model."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.args_given, self.kwargs_given = args, kwargs


class _StandIn:
    """Is called in the model's place, and is the model in all other ways."""

    def __init__(self, model: nn.Module):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _Called(args, kwargs)


def call_of(forward: Forward, model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `forward(model, batch)` calls the model with; the model is not run.

    Raises HandOverError where it does not call it.
    """
    try:
        with torch.no_grad():
            forward(_StandIn(model), batch)  # type: ignore[arg-type]
    except _Called as called:
        return called.args_given, called.kwargs_given
    except Exception as error:
        raise HandOverError(
            f"forward could not be asked how it calls the model ({type(error).__name__}: {error})"
        ) from error
    raise HandOverError("forward does not call the model itself, only parts of it")


def this_boot() -> str:
    """What names this machine since it was started; '' where nothing does.

    A pickle can do anything when it is read. The structure's is read where and while this is what it was when it was
    written: one that came with a run's folder from elsewhere never is.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def hand_over(
    run: RunFolder, model: nn.Module, find_call: Callable[[nn.Module], Any], facts: Mapping[str, Any]
) -> str:
    """Write down `model` for the process that exports it; why that will only have its weights, '' if it has all.

    `find_call(model)` gives the arguments of one call of it. `facts` are added to the request. Raises OSError where
    the folder cannot be written, HandOverError where not even the weights can be stored.
    """
    model = unwrapped(model)
    draft = run.final_model.with_suffix(".new")
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "weights").mkdir(parents=True)
    named = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if _plain(tensor)}
    _write(draft / FOLDER_FILES[0], named)
    reason = ""
    try:
        args, kwargs = find_call(model)
        _write_structure(draft, named, (model, args, kwargs))
    except Exception as error:  # anything that the user's classes do when they are pickled
        reason = str(error) if isinstance(error, HandOverError) else f"{type(error).__name__}: {error}"
    request = {
        "module": "orchestrator.model_export",
        "reason": reason,
        "boot": this_boot(),
        "class": type(model).__name__,
        "sys_path": [os.path.abspath(entry) for entry in sys.path],
        **facts,
    }
    (draft / "request.json").write_text(json.dumps(request))
    shutil.rmtree(run.final_model, ignore_errors=True)
    draft.rename(run.final_model)
    return reason


class HandingOver:
    """Hands over the final model of a training, if its tracker takes it; nothing that goes wrong here is an error."""

    def __init__(self, training: Training, settings: Settings) -> None:
        self._training = training
        self._settings = settings
        self._wanted = bool(getattr(settings.track, "log_model", False))

    def begin(self) -> None:
        """An attempt begins: the next batch shows how the model is called."""
        self._first_evaluated.wants_example = self._wanted

    @property
    def _first_evaluated(self) -> BatchWork:
        evaluations = self._training.validation.evaluations.values()
        return next((evaluation.work for evaluation in evaluations), self._training.work)

    def carry_out(self, attempt: Attempt, model: nn.Module) -> None:
        """Leave `model` to the process that delivers; whatever goes wrong is a notice."""
        if not self._wanted:
            return
        facts = {
            "run": attempt.run.id,
            "attempt": attempt.number,
            "batches": self._training.work.place.batches,
        }
        try:
            reason = hand_over(attempt.run, model, self._call, facts)
        except Exception as error:
            attempt.warn(f"the final model is not delivered: {type(error).__name__}: {error}")
        else:
            if reason:
                attempt.warn(f"of the final model only the weights are delivered: {reason}")

    def _call(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        example = self._first_evaluated.example
        if example is None:
            raise HandOverError("no batch was taken that shows how it is called")
        name = next(iter(self._training.validation.evaluations), "the final model")
        forward = self._settings.evaluation_forward(name)
        return call_of(forward, model, to_device(example, self._settings.device))


def _plain(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype in DTYPES and tensor.layout is torch.strided


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    with file.open("wb") as stream:
        stream.writelines(buffers(tensors))


def _write_structure(draft: Path, named: Mapping[str, Tensor], what: Any) -> None:
    import cloudpickle

    names = {id(tensor): name for name, tensor in reversed(list(named.items()))}
    others: dict[str, Tensor] = {}
    kept: list[Tensor] = []  # so that no id is given twice

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        """Leaves tensors out, but for their names; one tensor has one name."""

        def persistent_id(self, item: Any) -> Any:
            if type(item) not in (Tensor, nn.Parameter, nn.Buffer) or not _plain(item):
                return None
            name = names.get(id(item))
            if name is None:
                name = names[id(item)] = f"other/{len(others)}"
                others[name] = item.detach()
                kept.append(item)
            return type(item).__name__, name, item.requires_grad

    with (draft / "structure.pickle").open("wb") as stream:
        os.chmod(draft / "structure.pickle", 0o600)
        Pickler(_Bounded(stream)).dump(what)
    _write(draft / "other.safetensors", others)


class _Bounded:
    """A file that takes only so much: a model that refers to its data set is not to be written with it."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._left = stream, _MOST_STRUCTURE

    def write(self, data: Any) -> int:
        self._left -= memoryview(data).nbytes
        if self._left < 0:
            raise HandOverError(
                f"without its tensors the model is larger than {_MOST_STRUCTURE >> 20} MiB: does it refer to its data?"
            )
        return self._stream.write(data)
