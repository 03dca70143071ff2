"""Instructions a batch of orchestration alone, counted by valgrind: a figure that a busy machine hardly changes.

What dispatch.py times is run for so many batches and for twice as many, in a process that valgrind counts in; the
difference is what the batches take. Counting is switched on when everything is imported and has run once. interlock's
main thread is the loop; its other one writes the journal four times a second by the clock, and since a program in
valgrind is fifty times as slow, more often per batch than it would: its count is too high.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from measuring import Row, arguments, beside, report

NAMES = ("Ignite", "interlock", "interlock, main thread", "interlock, the journal's thread")
_PART = re.compile(
    r"^thread: (?P<thread>\d+)$.*^desc: Trigger: dump (?P<label>\S+)$", re.MULTILINE | re.DOTALL
)
_TOTAL = re.compile(r"^totals: (?P<total>\d+)$", re.MULTILINE)


def tell(*command: str) -> None:
    """Have the valgrind that this process is in do something."""
    subprocess.run(["vgdb", f"--pid={os.getpid()}", *command], check=True, capture_output=True, timeout=120)


def count(batches: int, rounds: int) -> None:
    """In valgrind: run each contender, and have a part of the counts written after each run, and between them."""
    import torch
    from dispatch import contenders

    torch.set_num_threads(1)
    for run in contenders().values():
        run(100)
    tell("instrumentation", "on")
    for name, run in contenders().items():
        run(100)  # what valgrind translates anew, and Python specializes
        for number in range(rounds):
            for length in (batches, 2 * batches):
                tell("dump", "between")
                run(length)
                tell("dump", f"{name.split(',')[0]}/{number}/{length}")
    tell("instrumentation", "off")


def counted(folder: Path, batches: int) -> dict[str, list[float]]:
    """Instructions a batch, for each round, of each contender, and of interlock's by thread."""
    totals: dict[tuple[str, str], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for file in sorted(folder.iterdir()):
        text = file.read_text()
        part, total = _PART.search(text), _TOTAL.search(text)
        if part is None or total is None or part["label"] == "between":
            continue
        name, number, length = part["label"].split("/")
        thread = "main thread" if int(part["thread"]) == 1 else "the journal's thread"
        for counter in (name, f"{name}, {thread}"):
            totals[counter, number][int(length)] += int(total["total"])
    values: dict[str, list[float]] = defaultdict(list)
    for (name, _), by_length in totals.items():
        values[name].append((by_length[2 * batches] - by_length[batches]) / batches)
    return {name: values[name] for name in NAMES if name in values}


def rows(batches: int, rounds: int) -> list[Row]:
    """What valgrind counts."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        command = [
            *("valgrind", "--quiet", "--tool=callgrind", "--separate-threads=yes", "--instr-atstart=no"),
            f"--callgrind-out-file={folder}/counts",
            *(sys.executable, __file__, "--inside"),
            *("--batches", str(batches), "--rounds", str(rounds)),
        ]
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
        values = counted(Path(folder), batches)
    return beside(values, "Ignite", "instructions")


if __name__ == "__main__":
    parser = arguments(__doc__, batches=1000, rounds=3)
    parser.add_argument("--inside", action="store_true", help="used by this script itself")
    options = parser.parse_args()
    if options.inside:
        count(options.batches, options.rounds)
    elif shutil.which("valgrind") is None:
        print(
            "valgrind is not installed here, so nothing is counted; `apt-get install valgrind`, or your system's own"
        )
    else:
        report(rows(options.batches, options.rounds), options.json)
