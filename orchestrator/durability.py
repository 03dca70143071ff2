"""What retention must leave here for the time being, because the tracking server has not got it yet."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from orchestrator.snapshot.info import CheckpointInfo
from tracking.delivery import CHECKPOINTS, Upload
from tracking.outbox import OutboxError, read_outbox
from tracking.runs import RunFolder

__all__ = ["Durability", "not_safe"]

_ROOM = 3  # checkpoints that the disk must have room for
_MANY = 3  # checkpoints that wait before something is said


def not_safe(
    doomed: Sequence[CheckpointInfo], there: Collection[str], upload: Upload
) -> list[CheckpointInfo]:
    """Those of `doomed` that the server still needs, oldest first; `there` are the names it has. A pure function.

    With "all" that is each that it has not. With "best+last" a newer one at the server is worth more than an
    older one that would be removed there at once.
    """
    newest = max(there, default="") if upload != "all" else ""
    return sorted(
        (info for info in doomed if info.name not in there and info.name > newest), key=lambda info: info.seq
    )


class Durability:
    """Asks the shipper's outbox what is safe. Never waits for the server."""

    def __init__(self, run: RunFolder, upload: Upload, say: Callable[[str], None]) -> None:
        self._run, self._upload, self._say = run, upload, say
        self._told = self._full = False

    def removable(self, doomed: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """Those of `doomed` that may go now."""
        held = not_safe(doomed, self._there(), self._upload)
        self._tell(held)
        given_up = self._too_much(held)
        if given_up and not self._full:
            self._say(
                f"the disk of {self._run.path} is nearly full: checkpoints are removed that are not at the tracking "
                f"server yet, {given_up[0].name} first"
            )
        self._full = bool(given_up)
        kept = {info.name for info in held} - {info.name for info in given_up}
        return [info for info in doomed if info.name not in kept]

    def _there(self) -> set[str]:
        try:
            sent = read_outbox(self._run.outbox).artifacts
        except OutboxError:
            return set()
        return {path.removeprefix(f"{CHECKPOINTS}/") for path in sent if path.startswith(f"{CHECKPOINTS}/")}

    def _tell(self, held: Sequence[CheckpointInfo]) -> None:
        if len(held) >= _MANY and not self._told:
            self._say(
                f"{len(held)} checkpoints stay here until they are at the tracking server; it is slow or away, see: "
                f"interlock show {self._run.id}"
            )
        self._told = len(held) >= _MANY or (self._told and bool(held))

    def _too_much(self, held: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """The oldest of them that must go all the same, so that saving does not end on a full disk."""
        if not held:
            return []
        free = shutil.disk_usage(self._run.checkpoints).free
        wanted = _ROOM * _size(held[-1].path)
        given_up: list[CheckpointInfo] = []
        for info in held:
            if free >= wanted:
                break
            free += _size(info.path)
            given_up.append(info)
        return given_up


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
