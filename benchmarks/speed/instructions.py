"""Instructions a batch, counted by valgrind: a figure that a busy machine hardly changes.

What dispatch.py times (--training: what training.py does, but for delivering and Lightning) is run for so many batches
and for twice as many, in a process that valgrind counts in; the difference is what the batches take. Counting is
switched on when everything is imported and has run once. interlock's main thread is the loop; its other one writes the
journal four times a second by the clock. A program in valgrind is some fifty times as slow, so what goes by the clock
(that, looking for requests, and how long a thread waits for the interpreter) is made fifty times as rare here.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from measuring import Row, arguments, beside, installed, report

SLOWER = 50
"""So many times as long a program takes in valgrind."""
_JOURNAL = "interlock, the journal's thread"
ALONE = ("Ignite", "interlock", "interlock, main thread", _JOURNAL)
TRAINING = ("bare loop", "bare loop with torch's norm", "interlock", _JOURNAL, "Ignite")
_PART = re.compile(
    r"^thread: (?P<thread>\d+)$.*^desc: Trigger: dump (?P<label>[^\n]+)$", re.MULTILINE | re.DOTALL
)
_TOTAL = re.compile(r"^totals: (?P<total>\d+)$", re.MULTILINE)


def tell(*command: str) -> None:
    """Have the valgrind that this process is in do something."""
    subprocess.run(["vgdb", f"--pid={os.getpid()}", *command], check=True, capture_output=True, timeout=120)


def chosen(options: argparse.Namespace) -> dict[str, Callable[[int], object]]:
    """The contenders, by name."""
    if not options.training:
        from dispatch import contenders

        return {name.split(",")[0]: run for name, run in contenders().items()}
    import torch
    from training import CONTENDERS, network

    def train(name: str, batches: int) -> None:
        data = [(torch.randn(options.size, 64), torch.randint(10, (options.size,)))] * batches
        CONTENDERS[name](network(options.width, options.convolutions), data, 1)

    names = {
        "bare loop": "bare loop",
        "bare loop with torch's norm": "bare loop, with torch's norm of the gradients",
        "interlock": "interlock, not tracked",
        "Ignite": "Ignite, two empty handlers, no logging",
    }
    return {
        name: partial(train, names[name])
        for name in names
        if name != "Ignite" or installed("ignite", "Ignite")
    }


def count(options: argparse.Namespace) -> None:
    """In valgrind: run each contender, and have a part of the counts written after each run, and between them."""
    import torch

    from orchestrator import attempt
    from tracking import writer

    torch.set_num_threads(1)
    writer._PERIOD_S *= SLOWER
    attempt._LOOKS_NS *= SLOWER
    sys.setswitchinterval(sys.getswitchinterval() * SLOWER)
    contenders = chosen(options)
    for run in contenders.values():
        run(options.warm)
    tell("instrumentation", "on")
    for name, run in contenders.items():
        run(options.warm)  # what valgrind translates anew, and Python specializes
        for number in range(options.rounds):
            for length in (options.batches, 2 * options.batches):
                gc.collect()
                gc.freeze()  # else one look through all of torch, in one run and not the other, is a tenth of a batch's
                tell("dump", "between")
                run(length)
                tell("dump", f"{name}/{number}/{length}")
    tell("instrumentation", "off")


def counted(folder: Path, batches: int, names: Sequence[str]) -> dict[str, list[float]]:
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
    return {name: values[name] for name in names if name in values}


def rows(options: argparse.Namespace) -> list[Row]:
    """What valgrind counts."""
    names = TRAINING if options.training else ALONE
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        command = [
            *("valgrind", "--quiet", "--tool=callgrind", "--separate-threads=yes", "--instr-atstart=no"),
            f"--callgrind-out-file={folder}/counts",
            *(sys.executable, __file__, "--inside"),
            *("--batches", str(options.batches), "--rounds", str(options.rounds)),
            *("--warm", str(options.warm), "--width", str(options.width), "--size", str(options.size)),
            *(f"--{name}" for name in ("training", "convolutions") if getattr(options, name)),
        ]
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
        values = counted(Path(folder), options.batches, names)
    return beside(values, names[0], "instructions")


if __name__ == "__main__":
    parser = arguments(__doc__, batches=1000, rounds=3, warm=100, width=32, size=32)
    parser.add_argument("--training", action="store_true", help="a small network is trained")
    parser.add_argument("--convolutions", action="store_true", help="in place of linear layers")
    parser.add_argument("--inside", action="store_true", help="used by this script itself")
    options = parser.parse_args()
    if options.inside:
        count(options)
    elif shutil.which("valgrind") is None:
        print(
            "valgrind is not installed here, so nothing is counted; `apt-get install valgrind`, or your system's own"
        )
    else:
        report(rows(options), options.json)
