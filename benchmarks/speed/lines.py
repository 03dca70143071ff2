"""Where the time of a batch of orchestration goes, line by line: the main thread of what dispatch.py measures.

py-spy looks from outside, so many times a second, at which line the thread is, and stops it for that: only a line's
share is its. What a batch takes in that thread is measured beside it, undisturbed. What a line calls in C is the
line's, and entering a function that of its `def`. Lines of less than a 200th are summed up. What the journal's thread
does is in no line.
"""

from __future__ import annotations

import linecache
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import CodeType

from dispatch import without_work
from measuring import Figure, Row, arguments, report

from orchestrator import loop

ROOT = Path(__file__).parents[2]
BATCHES = 50_000


def _kept(source: str, title: str, mode: str) -> CodeType:
    """`compile`, which lets the lines of what the loop writes itself be read afterwards."""
    linecache.cache[title] = (len(source), None, source.splitlines(keepends=True), title)
    return compile(source, title, mode)


def main_thread(batches: int) -> float:
    """Microseconds of the main thread's processor time that a batch takes."""
    with tempfile.TemporaryDirectory() as root:
        trainer = without_work(batches, Path(root))
        began = time.thread_time()
        trainer.fit()
        return (time.thread_time() - began) / batches * 1e6


def looked_at(spy: str, seconds: int, rate: int) -> Counter[str]:
    """How often the loop's thread was at each line, as FILE:LINE."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "stacks"
        done = subprocess.run(
            [
                *(spy, "record", "--rate", str(rate), "--full-filenames", "--format", "raw"),
                *("--output", str(found), "--", sys.executable, "-W", "ignore", __file__),
                *("--inside", "--seconds", str(seconds)),
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(f"py-spy ended with {done.returncode}, so nothing is looked at: {done.stderr.strip()}")
            return Counter()
        counts: Counter[str] = Counter()
        for line in found.read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            frames = stack.split(";")
            if any(frame.startswith("Loop.run (") for frame in frames):
                counts[frames[-1].rpartition(" (")[2].removesuffix(")")] += int(count)
    return counts


def named(place: str) -> str:
    """The line, with what stands there."""
    file, line = _parts(place)
    path = Path(file)
    where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    return f"{where}:{line:<4} {linecache.getline(file, line).strip()[:72]}".rstrip()


def _parts(place: str) -> tuple[str, int]:
    file, _, line = place.rpartition(":")
    return file, int(line)


def rows(spy: str, seconds: int, rate: int, rounds: int) -> list[Row]:
    """The lines, as they stand in their files, those of the files together that take the most."""
    totals, shares = [], []
    for _ in range(rounds):
        totals.append(main_thread(BATCHES))
        counts = looked_at(spy, seconds, rate)
        if not counts:
            return []
        shares.append({place: count / counts.total() for place, count in counts.items()})
    of_all: Counter[str] = Counter()
    for found in shares:
        for place, share in found.items():
            of_all[place] += share / rounds
    shown = [place for place in of_all if of_all[place] >= 0.005]
    of_file: Counter[str] = Counter()
    for place in shown:
        of_file[_parts(place)[0]] += of_all[place]
    shown.sort(key=lambda place: (-of_file[_parts(place)[0]], _parts(place)))
    times = {
        named(place): [total * found.get(place, 0.0) for total, found in zip(totals, shares, strict=True)]
        for place in shown
    }
    left = [
        total - sum(column) for total, column in zip(totals, zip(*times.values(), strict=True), strict=True)
    ]
    return [
        Row(name, Figure.of(values), "µs a batch")
        for name, values in {**times, "all other lines": left, "together": totals}.items()
    ]


if __name__ == "__main__":
    parser = arguments(__doc__, seconds=20, rate=200, rounds=3)
    parser.add_argument("--inside", action="store_true", help="used by this script itself")
    options = parser.parse_args()
    vars(loop)["compile"] = _kept
    beside_python = Path(sys.executable).parent / "py-spy"
    spy = str(beside_python) if beside_python.exists() else shutil.which("py-spy")
    if options.inside:
        until = time.monotonic() + options.seconds
        while time.monotonic() < until:
            main_thread(10 * BATCHES)
    elif spy is None:
        print("py-spy is not installed here, so nothing is looked at; `make bench` installs it")
    elif found := rows(spy, options.seconds, options.rate, options.rounds):
        report(found, options.json)
