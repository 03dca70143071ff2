"""Kill each contender, resume it, compare it with its own unbroken run; print the tables, or put them in the docs."""

import argparse
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

from task import LOSSES, TOTAL, WEIGHTS

HERE = Path(__file__).parent
DOCUMENT = HERE.parent.parent / "docs" / "exactness.md"
KILL_AT = 33
"""A batch in the middle of the second of three epochs of 20, three batches after a checkpoint."""

CONTENDERS = {
    "interlock_trainer.py": "interlock {interlock}",
    "accelerate_loop.py": "Accelerate {accelerate}",
    "accelerate_stateful.py": "Accelerate {accelerate}, StatefulDataLoader of torchdata {torchdata}",
    "hf_trainer.py": "Hugging Face Trainer {transformers}",
    "ignite_engine.py": "Ignite {pytorch-ignite}, DeterministicEngine",
    "lightning_trainer.py": "Lightning {lightning}",
    "lightning_stateful.py": "Lightning {lightning}, StatefulDataLoader of torchdata {torchdata}",
    "lightning_by_hand.py": "the same, random states saved by hand",
}
"""Each script with the name of its row, where the versions of packages are filled in."""

STATES_SCRIPT = "interlock_states.py"
KILLED_IN = (
    "EPOCH_START",
    "BATCH_START",
    "FORWARD",
    "BACKWARD",
    "STEP",
    "BATCH_END",
    "validation",
    "EPOCH_END",
)


@dataclass(frozen=True)
class Cell:
    """One way to load the data."""

    workers: int
    augment: bool

    def __str__(self) -> str:
        return f"{self.workers} workers" + (", augmentation" if self.augment else "")

    @property
    def arguments(self) -> list[str]:
        """As the contenders' command line has it."""
        return ["--workers", str(self.workers), *(["--augment"] if self.augment else [])]


CELLS = tuple(Cell(workers, augment) for augment in (False, True) for workers in (0, 2))
Loss = tuple[int, float]


@dataclass(frozen=True)
class Outcome:
    """What a process has left: its losses in their order, and the digest of the final weights, if it came to them."""

    losses: tuple[Loss, ...]
    weights: str | None


# -- judging: pure functions -------------------------------------------------------------------------


def difference(expected: Sequence[Loss], found: Sequence[Loss]) -> str | None:
    """The first batch at which two trainings part, with both losses; None where there is none."""
    for one, other in zip_longest(expected, found):
        if one is None or other is None:
            return f"batch {(one or other)[0]} on (trained by one only)"
        if one[0] != other[0]:
            return f"batch {one[0]} on (batch {other[0]} was trained in its place)"
        if one[1] != other[1]:
            return f"batch {one[0]} on (loss {one[1]:.9g}, {other[1]:.9g})"
    return None


def verdict(
    unbroken: Outcome, repeated: Outcome, killed: Outcome, resumed: Outcome, total: int = TOTAL
) -> str:
    """`exact`, or from which batch on the resumed run differs, or why there is nothing to compare."""
    if [batch for batch, _ in unbroken.losses] != list(range(total)):
        return f"not comparable: the unbroken run trained {len(unbroken.losses)} batches, expected {total}"
    parted = difference(unbroken.losses, repeated.losses)
    if parted is not None or unbroken.weights != repeated.weights:
        return f"not comparable: two unbroken runs differ from {parted or 'the last step on'}"
    parted = difference(unbroken.losses[: len(killed.losses)], killed.losses)
    if parted is not None:
        return f"not comparable: before the kill already it differs from {parted}"
    if not resumed.losses or not 0 < resumed.losses[0][0] <= len(killed.losses):
        began = f"at batch {resumed.losses[0][0]}" if resumed.losses else "nowhere"
        return f"does not resume: goes on {began}, had trained {len(killed.losses)} batches"
    parted = difference(unbroken.losses[resumed.losses[0][0] :], resumed.losses)
    if parted is not None:
        return f"differs from {parted}"
    if unbroken.weights != resumed.weights:
        return "differs in the final weights, though in no loss"
    return "exact"


# -- running ----------------------------------------------------------------------------------------


class Failed(Exception):
    """A contender's process ended in another way than it should; the message has the end of what it said."""


def train(script: str, folder: Path, cell: Cell, *more: str, killed: bool = False) -> Outcome:
    """Run a contender once, in a process of its own; its outcome has the losses of this process alone."""
    folder.mkdir(parents=True, exist_ok=True)
    before = len(read_losses(folder))
    command = [sys.executable, "-W", "ignore", str(HERE / script), str(folder), *cell.arguments, *more]
    # Nothing that a user's shell or a graphics card would make different from one machine to the next.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder / "output.txt", "w+") as output:
        status = subprocess.run(command, env=environment, stdout=output, stderr=output, cwd=folder).returncode
        output.seek(0)
        said = output.read().strip()
    if status != (-signal.SIGKILL if killed else 0):
        expected = "death by SIGKILL" if killed else "0"
        raise Failed(f"{script}, {cell}: exit status {status}, expected {expected}\n{said[-2000:]}")
    return Outcome(tuple(read_losses(folder)[before:]), None if killed else (folder / WEIGHTS).read_text())


def read_losses(folder: Path) -> list[Loss]:
    """What a contender has recorded there."""
    path = folder / LOSSES
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(batch), float.fromhex(loss)) for batch, loss in map(str.split, lines)]


def unbroken_twice(script: str, folder: Path, cell: Cell) -> tuple[Outcome, Outcome]:
    """Two whole runs, to see whether one can be compared with another at all."""
    return train(script, folder / "unbroken", cell), train(script, folder / "repeated", cell)


def judge(script: str, folder: Path, cell: Cell, whole: Future[tuple[Outcome, Outcome]], *kill: str) -> str:
    """Killed, then resumed in a new process: the verdict."""
    try:
        killed = train(script, folder, cell, *kill, killed=True)
        resumed = train(script, folder, cell)
        return verdict(*whole.result(), killed, resumed)
    except Failed as error:
        print(error, file=sys.stderr, flush=True)
        return "fails: " + str(error).splitlines()[0]


Row = tuple[str, list[str]]


@dataclass(frozen=True)
class Bench:
    """Where the runs are made, and by how many at a time."""

    folder: Path
    pool: ThreadPoolExecutor

    def rows(self, script: str, kills: Mapping[str, Sequence[str]]) -> list[Row]:
        """A script in each cell: whole runs, then one killed in each of the ways that a row is named for."""
        ends = []
        for cell in CELLS:
            folder = self.folder / script / str(cell)
            whole = self.pool.submit(unbroken_twice, script, folder, cell)
            for row, (name, kill) in enumerate(kills.items()):
                end = self.pool.submit(judge, script, folder / f"killed-{row}", cell, whole, *kill)
                ends.append((name, cell, end))
        found: dict[str, list[str]] = {name: [] for name in kills}
        for name, cell, end in ends:
            found[name].append(end.result())
            print(f"{name}; {cell}: {end.result()}", flush=True)
        return list(found.items())


# -- the tables -------------------------------------------------------------------------------------


def filled_in(name: str) -> str:
    """The name with the versions of the packages that it has in braces."""
    return re.sub(r"{([\w-]+)}", lambda match: version(match[1]), name)


def markdown(head: str, table: Sequence[Row]) -> str:
    """The rows as a table of Markdown."""
    lines = [f"| {head} | " + " | ".join(map(str, CELLS)) + " |", "|---" * (1 + len(CELLS)) + "|"]
    lines += [f"| {name} | " + " | ".join(found) + " |" for name, found in table]
    return "\n".join(lines)


def put(document: str, marker: str, text: str) -> str:
    """The document with `text` between the markers of this name."""
    begin, end = f"<!-- {marker}: written by `make bench-exact WRITE=1` -->", f"<!-- end of {marker} -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise SystemExit(f"{DOCUMENT}: expected {begin!r} and {end!r} once each; put them back")
    before, rest = document.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/exactness.md")
    parser.add_argument("--only", metavar="SCRIPT", help="one contender, such as ignite_engine.py")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: all cores)"
    )
    parser.add_argument("--keep", type=Path, help="make the runs in this folder, which is new, and keep them")
    given = parser.parse_args()
    if given.write and given.only:
        parser.error("--write needs the whole table, not --only one contender")
    if given.keep:
        given.keep.mkdir(parents=True)  # not an old one, whose runs would be resumed
    at = ("--kill-at", str(KILL_AT))
    peers: list[Row] = []
    own: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(given.jobs) as pool:
        bench = Bench((given.keep or Path(scratch)).resolve(), pool)
        for script, name in CONTENDERS.items():
            if given.only in (None, script):
                peers += bench.rows(script, {filled_in(name): at})
        if given.only in (None, STATES_SCRIPT):
            own += bench.rows(STATES_SCRIPT, {state: (*at, "--kill-in", state) for state in KILLED_IN})
    torch = version("torch").partition("+")[0]  # the CPU build says so in its version
    versions = f"Python {platform.python_version()}, torch {torch}, NumPy {version('numpy')}."
    for marker, head, table in (
        ("contenders", f"killed at batch {KILL_AT}", peers),
        ("states", "interlock, killed in", own),
    ):
        if table:
            text = f"{markdown(head, table)}\n\n{versions}"
            print(f"\n{text}")
            if given.write:
                DOCUMENT.write_text(put(DOCUMENT.read_text(), marker, text))
    ours = [*own, *(row for row in peers if row[0].startswith("interlock"))]
    return 0 if all(what == "exact" for _, found in ours for what in found) else 1


if __name__ == "__main__":
    sys.exit(main())
