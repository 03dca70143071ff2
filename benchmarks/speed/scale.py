"""A run of ten million transitions: how long its journal is, whether the trainer stays as it was, what readers take.

The run is that of long_run.py: a real training that computes nothing, with values for each batch, epochs of 10,000
batches, validation passes and checkpoints. What reads it is a process of its own each time, as a command is, the
interpreter's own start included. Going on is timed from `fit` to the first batch, beside a run of two epochs; then at
the run's first checkpoint, so that every batch is compared with what it was.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import mean
from typing import Any

from long_run import PER_EPOCH
from measuring import Figure, Row, arguments, report

from tracking.packed import NEWEST_SEQ

HERE = Path(__file__).parent
SHORT = 2
"""Epochs of the run that the long one stands beside."""
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def python(*command: object) -> list[str]:
    """The command line of a Python of its own."""
    return [sys.executable, "-W", "ignore", *map(str, command)]


def train(root: Path, epochs: int, *resume: object) -> dict[str, Any]:
    """What long_run.py saw of itself."""
    command = python(HERE / "long_run.py", root, epochs, *resume)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def interlock(*command: object) -> float:
    """Seconds until the command has ended."""
    began = time.perf_counter()
    words = python("-m", "orchestrator.cli", *command)
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    return time.perf_counter() - began


def first_line(*command: object) -> float:
    """Seconds until the command has written its first line."""
    began = time.perf_counter()
    words = python("-m", "orchestrator.cli", *command)
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=ENVIRONMENT) as child:
        assert child.stdout is not None
        child.stdout.readline()
        seconds = time.perf_counter() - began
        child.kill()
    return seconds


def transitions(journal: Path) -> int:
    """How many the journal has."""
    with closing(sqlite3.connect(f"{journal.as_uri()}?mode=ro", uri=True)) as connection:
        newest: int = connection.execute(NEWEST_SEQ).fetchone()[0]
    return newest


def size_alone(journal: Path) -> int:
    """Bytes of a file that has the packed transitions, and nothing else."""
    with tempfile.TemporaryDirectory(dir=journal.parent.parent) as folder:
        file = Path(folder) / "alone.sqlite"
        with closing(sqlite3.connect(file, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("ATTACH ? AS journal", (str(journal),))
            for name in ("packed_transitions", "transition_blocks"):
                table = connection.execute("SELECT sql FROM journal.sqlite_master WHERE name = ?", (name,))
                connection.execute(table.fetchone()[0])
                connection.execute(f"INSERT INTO main.{name} SELECT * FROM journal.{name}")
        return file.stat().st_size


def one(name: str, value: float, unit: str) -> Row:
    """A row of what is measured once."""
    return Row(name, Figure.of([value]), unit)


def written(root: Path, epochs: int) -> tuple[Path, list[Row]]:
    """Make the run; its folder, and what that took."""
    seen = train(root, epochs)
    run = Path(seen["run"])
    journal, resident = run / "journal.sqlite", seen["resident"]
    made, tenth = transitions(journal), max(1, epochs // 10)
    grown = mean(resident[-tenth:]) - mean(resident[:tenth])
    return run, [
        one("transitions", made, ""),
        one("written in", seen["seconds"], "s"),
        one("journal.sqlite, a transition", journal.stat().st_size / made, "bytes"),
        one("  of which transitions", size_alone(journal) / made, "bytes"),
        one("memory of the last tenth, more than of the first", grown / 1e6, "MB"),
    ]


def read(root: Path, run: Path, epochs: int, rounds: int) -> list[Row]:
    """What the commands take."""
    commands = {
        "interlock show RUN": lambda: interlock("show", run),
        "interlock runs": lambda: interlock("--root", root, "runs"),
        f"interlock log RUN --epoch {epochs // 2}": lambda: interlock("log", run, "--epoch", epochs // 2),
        "interlock log RUN --tail 20": lambda: interlock("log", run, "--tail", 20),
        "interlock log RUN, first line": lambda: first_line("log", run),
        "interlock check RUN": lambda: interlock("check", run),
    }
    interlock("show", run)  # finds the files
    return [
        Row(name, Figure.of([seconds() for _ in range(rounds)]), "s") for name, seconds in commands.items()
    ]


def resumed(runs: Sequence[tuple[str, Path, int]], rounds: int) -> list[Row]:
    """What going on takes until the first batch, run beside run, and at the first checkpoint of each."""
    rows = []
    for where in ("", "checkpoints/000000000-a1-IDLE"):
        found: dict[str, list[float]] = {name: [] for name, _, _ in runs}
        for _ in range(rounds):
            for name, run, epochs in runs:
                found[name].append(train(run.parent, epochs + 1, run / where)["first_batch"])
        at = "at its first checkpoint" if where else "where it stood"
        rows += [Row(f"resuming the {name} run {at}", Figure.of(found[name]), "s") for name in found]
    return rows


def main() -> None:
    options = arguments(__doc__, transitions=10_000_000, rounds=3).parse_args()
    epochs = max(SHORT, -(-options.transitions // PER_EPOCH))
    with tempfile.TemporaryDirectory() as folder:
        root, beside = Path(folder) / "long", Path(folder) / "short"
        run, rows = written(root, epochs)
        rows += read(root, run, epochs, options.rounds)
        short = Path(train(beside, SHORT)["run"])
        rows += resumed([("short", short, SHORT), ("long", run, epochs)], options.rounds)
        report(rows, options.json)


if __name__ == "__main__":
    main()
