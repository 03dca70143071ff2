"""What `interlock resume` and `launch` tell the trainers of a script that they start, and what those tell them."""

from __future__ import annotations

import os
from pathlib import Path

from tracking.runs import BEGUN_VARIABLE, RESUME_VARIABLE, RunFolder

__all__ = ["asked_to_resume", "tell_begun"]


def asked_to_resume(name: str) -> str | None:
    """The folder or checkpoint that the environment names for a run of this name, the first of several; once."""
    folders = os.environ.get(RESUME_VARIABLE, "").splitlines()
    found = next((folder for folder in folders if _run_of(Path(folder)).name == name), None)
    if found is None:
        return None
    folders.remove(found)
    if folders:
        os.environ[RESUME_VARIABLE] = "\n".join(folders)
    else:
        del os.environ[RESUME_VARIABLE]
    return found


def _run_of(folder: Path) -> RunFolder:
    return RunFolder(folder.parent.parent if (folder / "manifest.json").is_file() else folder)


def tell_begun(run: RunFolder) -> None:
    """Let `interlock launch` know which run was begun or gone on with, if it has started this script."""
    if file := os.environ.get(BEGUN_VARIABLE):
        with open(file, "a") as stream:
            stream.write(f"{run.path}\n")
