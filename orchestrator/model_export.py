"""A process that exports a handed-over model for MLflow, the one place where torch and mlflow meet.

`python -m orchestrator.model_export FOLDER` makes `FOLDER/mlflow` of what `orchestrator.final_model` left in FOLDER:
an MLflow model in the format `pt2` (torch.export). It prints a line of JSON: `reason` is why it could not, or ''.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from orchestrator.final_model import FOLDER_FILES, this_boot
from orchestrator.snapshot.tensor_file import read_tensors
from tracking.one_off import go_with_parent

__all__ = ["export", "load"]

_LARGEST_EXAMPLE = 64_000  # elements that are kept beside the model, as JSON
_TYPES = {"Tensor": None, "Parameter": nn.Parameter, "Buffer": nn.Buffer}


class ExportError(Exception):
    """Why a model cannot be exported."""


class _Positional(nn.Module):
    """A model that is called with nested or named arguments, as one of a list of tensors."""

    def __init__(self, model: nn.Module, leaves: list[Any], structure: pytree.TreeSpec):
        super().__init__()
        self.model, self._leaves, self._structure = model, leaves, structure

    def call(self, *tensors: Tensor) -> Any:
        """The model's answer, the tensors put where they belong among the arguments."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        return self.model(*args, **kwargs)


def _positional(model: nn.Module, leaves: list[Any], structure: pytree.TreeSpec) -> nn.Module:
    """`_Positional` with a forward of just as many arguments: torch.export asks for its signature."""
    names = ", ".join(f"input_{n}" for n in range(sum(isinstance(leaf, Tensor) for leaf in leaves)))
    forward = eval(f"lambda self, {names}: self.call({names})")
    kind = type("Positional", (_Positional,), {"forward": forward})
    return cast(nn.Module, kind(model, leaves, structure))


def load(folder: Path) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model that was handed over, on the CPU and in evaluation mode, and the arguments of one call of it."""
    tensors = read_tensors(folder / FOLDER_FILES[0]) | read_tensors(folder / FOLDER_FILES[1])
    made: dict[str, Tensor] = {}

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, key: Any) -> Tensor:
            kind, name, wanted = key
            if name not in made:
                tensor, wrap = tensors[name], _TYPES[kind]
                made[name] = tensor.requires_grad_(wanted) if wrap is None else wrap(tensor)
                if kind == "Parameter":
                    made[name].requires_grad_(wanted)
            return made[name]

    with (folder / FOLDER_FILES[2]).open("rb") as stream:
        model, args, kwargs = Unpickler(stream).load()
    return model.eval(), args, kwargs


def export(folder: Path) -> None:
    """Make `folder/mlflow`, whole or not at all. Raises whatever the model, torch or mlflow does."""
    model, args, kwargs = load(folder)
    leaves, structure = pytree.tree_flatten((args, kwargs))
    example = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    if not example:
        raise ExportError("it is called without tensors")
    if kwargs or len(example) != len(args):
        model = _positional(model, leaves, structure).eval()
    with torch.no_grad():
        expected = model(*example)
    draft = folder / "mlflow.new"
    shutil.rmtree(draft, ignore_errors=True)
    _save(model, example, expected, draft)
    _compare(draft, example, expected)
    draft.rename(folder / "mlflow")


def _save(model: nn.Module, example: tuple[Tensor, ...], expected: Any, draft: Path) -> None:
    import mlflow
    import mlflow.pytorch
    import numpy

    arrays = tuple(tensor.detach().numpy() for tensor in example)
    mlflow.pytorch.save_model(
        model,
        str(draft),
        signature=_signature(arrays, expected),
        input_example=arrays[0] if len(arrays) == 1 else arrays,
        serialization_format="pt2",
        # Named, because working them out would load the model once more.
        pip_requirements=[
            f"mlflow=={mlflow.__version__}",
            f"torch=={torch.__version__.partition('+')[0]}",
            f"numpy=={numpy.__version__}",
        ],
    )
    if sum(array.size for array in arrays) > _LARGEST_EXAMPLE:
        _leave_out_example(draft)


def _signature(arrays: tuple[Any, ...], expected: Any) -> Any:
    """Types and shapes of what goes in and comes out; the first dimension is the batch's where they agree in it."""
    import numpy
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    size = arrays[0].shape[0] if arrays[0].ndim else None

    def spec(array: Any, name: str | None) -> TensorSpec:
        shape = array.shape
        free = bool(shape) and shape[0] == size
        return TensorSpec(numpy.dtype(array.dtype), (-1, *shape[1:]) if free else shape, name)

    several = len(arrays) > 1
    inputs = Schema([spec(array, f"input_{n}" if several else None) for n, array in enumerate(arrays)])
    outputs = Schema([spec(expected.numpy(), None)]) if isinstance(expected, Tensor) else None
    return ModelSignature(inputs=inputs, outputs=outputs)


def _leave_out_example(draft: Path) -> None:
    import yaml

    described = yaml.safe_load((draft / "MLmodel").read_text())
    if described.pop("saved_input_example_info", None):
        (draft / "MLmodel").write_text(yaml.safe_dump(described))
    for file in ("input_example.json", "serving_input_example.json"):
        (draft / file).unlink(missing_ok=True)


def _compare(draft: Path, example: tuple[Tensor, ...], expected: Any) -> None:
    """The exported model gives what the model gave."""
    import mlflow.pytorch

    with torch.no_grad():
        found = mlflow.pytorch.load_model(str(draft))(*example)
    for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(other, Tensor) and not torch.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise ExportError("the exported model does not give what the model gives")


def _told(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def main(folder: Path) -> None:
    """Export what is in `folder`."""
    go_with_parent()
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    os.environ["MLFLOW_LOGGING_LEVEL"] = "ERROR"
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    warnings.simplefilter("ignore")
    request = json.loads((folder / FOLDER_FILES[3]).read_text())
    sys.path += [entry for entry in request["sys_path"] if entry not in sys.path]
    reason = request["reason"]
    if not reason and (not request["boot"] or request["boot"] != this_boot()):
        reason = "it was to be exported on the machine that trained it, before that is restarted"
    if not reason:
        try:
            export(folder)
        except Exception as error:
            reason = _told(error)
    os.write(out, json.dumps({"reason": reason}).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # taking down torch and mlflow would take a second
