"""Warm start: the weights of an earlier training, and nothing else of it, put into the model of a new run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from orchestrator.errors import ConfigurationError, kind_of
from orchestrator.snapshot.differences import describe
from orchestrator.snapshot.info import not_superseded, readable
from orchestrator.snapshot.manifest import MANIFEST
from orchestrator.snapshot.names import Slot, aliases, slots_of
from orchestrator.snapshot.storage import CheckpointDamaged, read_checkpoint
from orchestrator.snapshot.tensor_file import HeaderError, read_tensors
from orchestrator.warning import warn
from tracking.journal import Journal, Parent
from tracking.runs import RunFolder, RunNotFound, find_run

__all__ = ["Source", "WarmStart", "apply", "read"]

_MOST_NAMED = 6


@dataclass(frozen=True)
class Source:
    """Where weights come from. A file that is no checkpoint has neither run nor seq."""

    path: Path
    run: RunFolder | None = None
    seq: int | None = None
    """The run's transition that the checkpoint was made after."""

    @property
    def parent(self) -> Parent | None:
        """The link to the run, for a run that begins with these weights."""
        if self.run is None:
            return None
        return Parent(self.run.id, str(self.run.path), self.seq, self.path.name, "warm start")


@dataclass(frozen=True)
class WarmStart:
    """What a model took of the weights of `source`, by the model's names."""

    source: Source
    taken: tuple[str, ...]
    left: tuple[str, ...]
    """What of the source was not taken: names the model has not, and names whose shapes or types differ."""
    missing: tuple[str, ...]
    """What of the model the source has not, and which keeps its initial values."""
    total: int
    """How many tensors the model has."""

    def __str__(self) -> str:
        """All of it, in up to three lines."""
        count = len(self.taken)
        tensors = f"{count:,} tensor{'' if count == 1 else 's'}"
        lines = [f"init_from: {tensors} of {self.total:,} taken from {self.source.path}"]
        if self.left:
            lines.append(f"  left there: {_listed(self.left)}")
        if self.missing:
            lines.append(f"  missing there: {_listed(self.missing)}")
        return "\n".join(lines)


def _listed(names: tuple[str, ...]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f", and {more:,} more" if more > 0 else "")


def read(
    reference: str | os.PathLike[str], root: Path, model: nn.Module
) -> tuple[WarmStart, dict[str, Tensor]]:
    """Find the weights that `reference` means, and those of them that `model` takes; nothing is changed.

    `reference` is the folder of a checkpoint; a run's folder, id or name in `root`, for its newest checkpoint; a
    `.safetensors` file; or a file that `torch.save` made of a `state_dict()`, which is loaded with
    `weights_only=True`. Of a model's buffers the persistent ones are taken.

    Raises ConfigurationError where there is nothing of that name, it holds no weights, or none that the model
    takes; CheckpointDamaged where its bytes are not what was written.
    """
    source, found = _read(os.fspath(reference), root)
    slots = _slots(model)
    names = _ties(model, slots)
    there = {name: next((n for n in (name, *others) if n in found), None) for name, others in names.items()}
    offered = {name: found[n] for name, n in there.items() if n is not None}
    why = {name: _why_not(tensor, slots[name].tensor) for name, tensor in offered.items()}
    taken = {name: tensor for name, tensor in offered.items() if not why[name]}
    known = {n for name, others in names.items() for n in (name, *others)}
    left = [f"{there[name]} ({text})" for name, text in why.items() if text]
    left += [name for name in found if name not in known]
    missing = tuple(name for name, n in there.items() if n is None)
    if not taken:
        raise ConfigurationError(
            f"init_from={os.fspath(reference)!r}: nothing in {source.path} fits this model; found "
            f"{_listed(tuple(left)) or 'no tensors'}, expected some of {_listed(tuple(names)) or 'none'}: pass weights "
            "by the names that the model's state_dict() has"
        )
    return WarmStart(source, tuple(taken), tuple(left), missing, len(names)), taken


def apply(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Put the tensors that `read` gave into `model`, in place; they are cast to the types that it has."""
    slots = _slots(model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            live = slots[name].tensor
            assert live is not None
            live.copy_(tensor)


def _why_not(found: Tensor, live: Tensor | None) -> str:
    """Why a tensor of the model's name does not go into it; empty if it does."""
    if live is None or is_lazy(live):
        return "the model has no shape for it yet"
    if found.shape != live.shape or not torch.can_cast(found.dtype, live.dtype):
        return f"{describe(found)}, the model's is {describe(live)}"
    return ""


def _slots(model: nn.Module) -> dict[str, Slot]:
    """Where the model's parameters and persistent buffers are, those of tied ones once."""
    parameters, buffers = slots_of(model)
    persistent = [s for s in buffers if s.key not in s.owner._non_persistent_buffers_set]
    slots = [slot for slot in (*parameters, *persistent) if slot.tensor is not None]
    tied = aliases(slots)
    return {slot.name: slot for slot in slots if slot.name not in tied}


def _ties(model: nn.Module, slots: Mapping[str, Slot]) -> dict[str, list[str]]:
    """For each of the `slots` by its name: the other names that the same tensor has."""
    tied = aliases(list(chain(*slots_of(model))))
    return {name: [other for other, of in tied.items() if of == name] for name in slots}


# -- where weights come from -----------------------------------------------------------------------------


def _read(reference: str, root: Path) -> tuple[Source, dict[str, Tensor]]:
    path = Path(reference)
    if path.is_file():
        return Source(path.resolve()), _of_file(path)
    if (path / MANIFEST).is_file():
        return _of_checkpoint(path.resolve())
    try:
        run = find_run(reference, root)
    except RunNotFound as error:
        raise ConfigurationError(
            f"init_from={reference!r}: neither a file nor a checkpoint's folder, and {error}"
        ) from error
    with Journal.open(run) as journal:
        positions = {attempt.attempt: attempt.position for attempt in journal.attempts()}
    for info in not_superseded(readable(run.checkpoints), positions):
        try:
            return _of_checkpoint(info.path)
        except CheckpointDamaged as error:
            warn(error.passed_over)
    raise ConfigurationError(
        f"init_from={reference!r}: {run.id} has no checkpoint that can be read; expected a run with one, or a file of "
        "weights"
    )


def _of_checkpoint(path: Path) -> tuple[Source, dict[str, Tensor]]:
    manifest, tree = read_checkpoint(path)
    model = tree["model"]
    tensors = {**model["parameters"], **model["buffers"]}
    tensors |= {name: tensors[of] for name, of in model["aliases"].items()}
    found = {n: t for n, t in tensors.items() if t is not None and n not in model["non_persistent"]}
    run = RunFolder(path.parent.parent)
    if not run.journal.is_file():
        return Source(path), found
    return Source(path, run, manifest["seq"]), found


def _of_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return read_tensors(path)
        except HeaderError as error:
            raise ConfigurationError(f"init_from: {path} is no whole safetensors file: {error}") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigurationError(
            f"init_from: {path} cannot be loaded as weights ({type(error).__name__}); expected a checkpoint's folder, "
            "a .safetensors file, or what torch.save(model.state_dict(), path) made: nothing else is unpickled"
        ) from error
    found = {}
    if isinstance(loaded, Mapping):
        found = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not found:
        held = kind_of(loaded)
        if isinstance(loaded, Mapping):
            held = f"the keys {_listed(tuple(map(str, loaded)))}"
        raise ConfigurationError(
            f"init_from: {path} holds {held}; expected a state_dict, names and tensors: save the part of it that is "
            "one by itself"
        )
    return found
