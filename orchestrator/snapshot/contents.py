"""Which of a checkpoint's files a tensor is in, and under which name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from orchestrator.snapshot.tensor_file import METADATA

__all__ = ["DOCUMENT", "MODEL", "STATE", "WEIGHTS", "by_path", "divided"]

WEIGHTS = ("model/parameters/", "model/buffers/")
"""The paths in a training's state whose tensors are the model's, stored under plain names."""

MODEL = "model.safetensors"
STATE = "state.safetensors"
DOCUMENT = "state.json"


def divided(tensors: Mapping[str, Tensor], weights: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file by their names in it.

    Those whose paths begin with one of `weights` are in MODEL, without that beginning; all others in STATE, and so is
    the second of two whose plain names would be the same.
    """
    model: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for path, tensor in tensors.items():
        plain = _plain(path, weights)
        if plain is None or plain in model:
            state[path] = tensor
        else:
            model[plain] = tensor
    return {MODEL: model, STATE: state}


def _plain(path: str, weights: Sequence[str]) -> str | None:
    """The name of a weight in MODEL; None for a tensor that belongs elsewhere."""
    for beginning in weights:
        plain = path.removeprefix(beginning)
        if plain not in (path, "", METADATA):
            return plain
    return None


def by_path(
    model: Mapping[str, Tensor], state: Mapping[str, Tensor], weights: Sequence[str]
) -> dict[str, Tensor]:
    """The tensors of both files by their paths in the tree; undoes `divided`."""
    found = dict(state)
    for name, tensor in model.items():
        for beginning in weights:
            # Where two paths lead to one plain name, the other one is in the file of all else.
            found.setdefault(beginning + name, tensor)
    return found
