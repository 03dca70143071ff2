"""Where the code of an attempt came from: what `git` says of the script's folder when the attempt begins."""

import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tracking.runs import RunFolder

__all__ = ["Source", "keep_source", "read_sources", "script_of", "source_of", "source_tags"]

LONGEST_S = 10.0
"""What `git` may take altogether; a work tree that takes longer to look through is not said to be dirty or not."""


@dataclass(frozen=True)
class Source:
    """A commit, whether tracked files differ from it (None: not known), the branch and the address it came from."""

    commit: str
    dirty: bool | None
    branch: str
    repository: str


def script_of(command: Any) -> str:
    """The script of a recorded command; the arguments may hold secrets, and are no part of it."""
    words = command.get("argv", []) if isinstance(command, dict) else command
    words = [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
    return next((word for word in words if word.endswith((".py", ".ipynb"))), words[0] if words else "")


def source_of(folder: Path, longest_s: float = LONGEST_S) -> Source | None:
    """What `git` says of `folder`; None where it is in no work tree, has no commit, or there is no git."""
    deadline = time.monotonic() + longest_s
    commit = _git(folder, deadline, "rev-parse", "--verify", "HEAD")
    if not commit:
        return None
    changed = _git(folder, deadline, "status", "--porcelain", "--untracked-files=no")
    return Source(
        commit,
        None if changed is None else bool(changed),
        _git(folder, deadline, "symbolic-ref", "--short", "-q", "HEAD") or "",
        _git(folder, deadline, "config", "--get", "remote.origin.url") or "",
    )


def _git(folder: Path, deadline: float, *words: str) -> str | None:
    """What it prints; '' where it fails, None where it takes too long or is not there."""
    quiet = {
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_TERMINAL_PROMPT": "0",
    }  # looking leaves no trace in the user's index
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=max(0.1, deadline - time.monotonic()),
            env={**os.environ, **quiet},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else ""


def source_tags(sources: Mapping[int, Source], *, owned: bool) -> dict[str, str]:
    """The newest attempt's commit, also in MLflow's own words unless a user owns the run; those of later ones each."""
    if not sources:
        return {}
    newest = sources[max(sources)]
    tags = {"interlock.source.commit": newest.commit}
    if newest.dirty is not None:
        tags["interlock.source.dirty"] = str(newest.dirty).lower()
    for number, source in sources.items():
        if number > min(sources):
            tags[f"interlock.attempt.{number}.source"] = source.commit + (" (dirty)" if source.dirty else "")
    if not owned:
        tags["mlflow.source.git.commit"] = newest.commit
        tags["mlflow.source.git.branch"] = newest.branch
        tags["mlflow.source.git.repoURL"] = newest.repository
    return tags


# -- what the run's folder keeps of it ---------------------------------------------------------------------


def keep_source(run: RunFolder, attempt: int, command: Any, folder: str) -> None:
    """Look at the script's folder now, and write down what is there as that of `attempt`; once."""
    known = read_sources(run)
    if attempt in known:
        return
    place = (Path(folder) / script_of(command)).parent
    found = source_of(place if place.is_dir() else Path(folder))
    if found is None:
        return
    sources = {str(number): asdict(source) for number, source in (known | {attempt: found}).items()}
    draft = run.path / "source.json.new"
    draft.write_text(json.dumps(sources, indent=1))
    draft.replace(run.path / "source.json")


def read_sources(run: RunFolder) -> dict[int, Source]:
    """The sources of attempts, as far as they are known."""
    try:
        found = json.loads((run.path / "source.json").read_text())
        return {int(number): Source(**source) for number, source in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
