"""CheckpointInfo: what a checkpoint's manifest says of it, without its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.snapshot.storage import CheckpointDamaged, list_checkpoints, read_manifest
from orchestrator.warning import warn
from states.table import State

__all__ = ["BEFORE_THE_END", "BRANCH", "CUT_SHORT", "CheckpointInfo", "info_of", "not_superseded", "readable"]

BEFORE_THE_END = "before the end"
"""The purpose of the checkpoint that a finished run is extended from."""

CUT_SHORT = "cut short"
"""The purpose of a checkpoint at the end of an epoch that `max_batches` cut short: a longer run is not at its end."""

BRANCH = "branch"
"""The purpose of the checkpoint that a run which branched from another begins with."""


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint of a run."""

    path: Path
    seq: int
    """The number of the transition it was saved after."""
    attempt: int
    epoch: int
    batch: int
    batches: int
    state: State
    purpose: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The epoch's metrics, where it was saved at an epoch's end."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.path.name


def not_superseded(
    infos: Iterable[CheckpointInfo], positions: Mapping[int, int | None]
) -> list[CheckpointInfo]:
    """The checkpoints that no later attempt has gone back behind, newest first.

    `positions` has, for each attempt, the number of the transition that it went back to.
    """

    def stands(info: CheckpointInfo) -> bool:
        return not any(
            attempt > info.attempt and position is not None and position < info.seq
            for attempt, position in positions.items()
        )

    return sorted(filter(stands, infos), key=lambda info: info.seq, reverse=True)


def readable(parent: Path) -> list[CheckpointInfo]:
    """The checkpoints in `parent` whose manifests can be read, newest first; damaged ones are named in a warning."""
    infos = []
    for path in list_checkpoints(parent):
        try:
            infos.append(info_of(path))
        except CheckpointDamaged as error:
            warn(error.passed_over)
        except KeyError as error:
            warn(CheckpointDamaged(path, f"its manifest has no {error}").passed_over)
    return infos


def info_of(path: Path) -> CheckpointInfo:
    """What the manifest of the checkpoint at `path` says; raises what `read_manifest` raises."""
    manifest = read_manifest(path)
    return CheckpointInfo(
        path=path,
        seq=manifest["seq"],
        attempt=manifest["attempt"],
        epoch=manifest["epoch"],
        batch=manifest["batch"],
        batches=manifest["batches"],
        state=State(manifest["state"]),
        purpose=manifest["purpose"],
        metrics=manifest["metrics"],
    )
