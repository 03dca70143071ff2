"""Time to batch N where the training is killed every T seconds, counted from each start, and started again at once.

Starting is part of it: imports, finding and loading the last checkpoint, batches done again. Each contender is killed
with each of some checkpoint intervals, of which the best counts; interlock finds its own. One that in five starts in a
row comes no further than before, or takes ten times as long as without kills, is said not to get there. "As unbroken"
is whether every loss, and the weights after batch N, are those of the run that was not killed, to the bit. A bare loop,
which is not killed, shows what torch itself takes to start.

Each is started by this script, and started again by it. "interlock launch" is the same training started once by that
command, which starts it again itself: the process that trains is killed, and the command, which imports for it, is not.

On a machine whose speed changes from one minute to the next, look at what the kills cost: the time in which nothing new
was trained, beside the rest of the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np

SCRIPT = Path(__file__).parent / "killed.py"
RECORD = "record.txt"
NAMES = {
    "launch": "interlock launch",
    "interlock": "interlock",
    "ignite": "Ignite",
    "hf_trainer": "HF Trainer",
    "lightning": "Lightning",
}
INTERVALS = {2: (20,), 10: (50, 150), 60: (250,)}
"""Batches between the checkpoints of the others, for each T: some sqrt(2 T C) apart, C being what a save costs."""
BATCHES = {2: 1_000, 10: 2_500, 60: 20_000}
OWN_INTERVAL = ("launch", "interlock")
"""Those that find the batches between two checkpoints themselves."""
AT_60 = ("launch", "interlock", "ignite")
"""Those that are killed every 60 s too, by default: it takes more than two minutes each."""


@dataclass(frozen=True)
class Line:
    """One batch, as a contender has recorded it."""

    batch: int
    loss: str
    time: float
    digest: str


def read(folder: Path) -> list[Line]:
    """What has been recorded, batches done again included; the last line may be cut off."""
    path = folder / RECORD
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    found = (line.split(" ") for line in lines)
    return [
        Line(int(batch), loss, float(time), digest[0] if digest else "")
        for batch, loss, time, *digest in found
    ]


@dataclass(frozen=True)
class Outcome:
    """What became of a training that was killed, or not."""

    seconds: float | None
    """From the first start to the end of batch N; None where that was not reached."""
    reached: int
    kills: int
    to_first_batch: tuple[float, ...]
    """Seconds from each start to the end of its first batch."""
    again: tuple[int, ...]
    """Batches that were done again after each kill that left some."""
    lost: float
    """Seconds after the first batch in which no batch was trained for the first time: what kills cost."""
    lines: tuple[Line, ...]

    def same_as(self, unbroken: Outcome, batches: int) -> bool:
        """Whether all losses, those of batches done again included, and the weights after the last are the same."""
        expected = {line.batch: line for line in unbroken.lines}
        mine = {line.batch for line in self.lines}
        at_end = [line.digest for line in self.lines if line.batch == batches]
        return (
            mine == set(range(1, batches + 1))
            and all(line.loss == expected[line.batch].loss for line in self.lines if line.batch <= batches)
            and all(digest == expected[batches].digest != "" for digest in at_end)
        )


class Bench:
    """Where the trainings are run, on which data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "digits.npz"
        self._count = 0
        from sklearn.datasets import load_digits

        digits = load_digits()
        inputs = (digits.data / 16).astype(np.float32)
        np.savez(self.data, inputs=inputs, targets=digits.target.astype(np.int64))

    def run(
        self,
        contender: str,
        batches: int,
        every: int | None,
        digest_at: Sequence[int],
        period: float | None = None,
        plain: float = 0.0,
    ) -> Outcome:
        """Train to batch `batches`; killed every `period` seconds, which without kills takes `plain` seconds."""
        self._count += 1
        folder = self.folder / f"{self._count}-{contender}"
        folder.mkdir()
        launched = contender == "launch"
        command = [
            sys.executable, "-W", "ignore", *(["-m", "orchestrator.cli", "launch", "--tries", "5"] if launched else []),
            str(SCRIPT), "interlock" if launched else contender, str(folder), str(self.data),
            "--batches", str(batches), *(["--every", str(every)] if every else []),
            "--digest-at", *map(str, digest_at),
        ]  # fmt: skip
        environment = {
            **os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        starts: list[float] = []
        furthest, in_vain = 0, 0
        with (folder / "output.txt").open("w") as output, contextlib.ExitStack() as ending:
            life: _Life | None = None
            while True:
                starts.append(time.time())
                if life is None or not launched:
                    life = _Life(command, environment, output, folder, in_a_fork=launched)
                    ending.callback(life.end)
                status = life.wait(period)
                if status:
                    said = (folder / "output.txt").read_text()[-2000:]
                    raise SystemExit(f"{contender} ended with status {status}, expected 0:\n{said}")
                reached = max((line.batch for line in read(folder)), default=0)
                in_vain = in_vain + 1 if reached <= furthest else 0
                furthest = max(furthest, reached)
                too_long = period is not None and time.time() - starts[0] > 10 * plain
                if status == 0 or reached >= batches or in_vain == 5 or too_long:
                    return _outcome(read(folder), starts, batches)


class _Life:
    """A process that trains, or one whose forks do, one after the other."""

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        output: IO[str],
        folder: Path,
        *,
        in_a_fork: bool,
    ) -> None:
        self._process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, cwd=folder, start_new_session=True
        )
        self._in_a_fork = in_a_fork
        self._killed = 0

    def wait(self, period: float | None) -> int | None:
        """The exit status, or None where what trains was killed `period` seconds after it began."""
        while self._in_a_fork and self._fork() in (0, self._killed) and self._process.poll() is None:
            time.sleep(0.002)
        try:
            return self._process.wait(period)
        except subprocess.TimeoutExpired:
            if self._in_a_fork:
                self._killed = self._fork()
                os.kill(self._killed, signal.SIGKILL)
            else:
                self.end()
            return None

    def _fork(self) -> int:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def end(self) -> None:
        """Kill it with all that it has started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _outcome(lines: list[Line], starts: list[float], batches: int) -> Outcome:
    end = next((line.time for line in lines if line.batch >= batches), None)
    first, again = [], []
    furthest, new = 0, 0.0
    for start, until in zip(starts, [*starts[1:], float("inf")], strict=True):
        mine = [line for line in lines if start <= line.time < until]
        for before, line in pairwise(mine):
            if furthest < line.batch <= batches:
                new += line.time - before.time
            furthest = max(furthest, before.batch, line.batch)
        if mine:
            first.append(mine[0].time - start)
            before = max((line.batch for line in lines if line.time < start), default=0)
            if start > starts[0]:
                again.append(before - mine[0].batch + 1)
    return Outcome(
        None if end is None else end - starts[0],
        max((line.batch for line in lines), default=0),
        len(starts) - (end is not None),
        tuple(first),
        tuple(again),
        0.0 if end is None else max(end - starts[0] - first[0] - new, 0.0),
        tuple(lines),
    )


def report_whole(name: str, found: Outcome) -> None:
    """Print how long a training that is not killed took."""
    print(f"{name:16} unbroken, to batch {found.reached:,}: {_took(found)}, {_details(found)}", flush=True)


def report(
    bench: Bench, period: float, batches: int, contenders: Sequence[str], plain: dict[str, Outcome]
) -> None:
    """Kill each contender every `period` seconds until batch `batches`, and print what becomes of it."""
    print(f"killed every {period:g} s, to batch {batches:,}")
    for contender in contenders:
        whole = next(line.time for line in plain[contender].lines if line.batch == batches)
        start = plain[contender].lines[0].time - plain[contender].to_first_batch[0]
        seconds = whole - start
        tried: dict[int | None, Outcome] = {}
        for every in (None,) if contender in OWN_INTERVAL else INTERVALS.get(int(period), (100,)):
            tried[every] = bench.run(contender, batches, every, [batches], period, seconds)
            if not tried[every].reached:
                break  # another interval is no help where there is not one batch
        every, best = min(tried.items(), key=lambda item: (item[1].seconds or float("inf"), -item[1].reached))
        setting = "overhead=0.03" if every is None else f"every {every} batches"
        others = ", ".join(f"every {other}: {_took(tried[other])}" for other in tried if other != every)
        took = "not reached" if best.seconds is None else f"{best.seconds:7.1f} s"
        ratio = "" if best.seconds is None else f", {best.seconds / seconds:.2f} times"
        print(
            f"{NAMES[contender]:16} {took} (unbroken {seconds:.1f} s{ratio}); {_details(best)}; {setting}",
            end="",
        )
        print(f" ({others})" if others else "", end="")
        if best.seconds is not None:
            print(f"; as unbroken: {'yes' if best.same_as(plain[contender], batches) else 'no'}", end="")
        print(flush=True)


def _took(outcome: Outcome) -> str:
    return "not reached" if outcome.seconds is None else f"{outcome.seconds:.1f} s"


def _details(outcome: Outcome) -> str:
    parts = [f"{outcome.kills} kills"] if outcome.kills else []
    if outcome.seconds is None:
        parts.append(f"came to batch {outcome.reached}")
    if outcome.to_first_batch:
        parts.append(f"{statistics.median(outcome.to_first_batch):.1f} s to the first batch")
    if outcome.again:
        parts.append(f"{statistics.mean(outcome.again):.0f} batches done again")
    if outcome.kills and outcome.seconds is not None:
        share = outcome.lost / (outcome.seconds - outcome.lost)
        parts.append(f"they cost {outcome.lost:.1f} s, {share:.1%} of the rest")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, nargs="*", default=list(BATCHES))
    parser.add_argument("--contenders", nargs="*", choices=NAMES, default=list(NAMES))
    parser.add_argument("--all", action="store_true", help="kill all of them every 60 s as well")
    parser.add_argument("--batches", type=int, help="instead of what goes with each number of seconds")
    parser.add_argument("--json", help="taken and left alone: nothing of this is drawn")
    options = parser.parse_args()
    wanted = {
        period: [c for c in options.contenders if options.all or period < 60 or c in AT_60]
        for period in sorted(options.seconds)
    }
    batches = {period: options.batches or BATCHES.get(period, 2_500) for period in wanted}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder))
        plain = {}
        report_whole("bare loop", bench.run("bare", 200, None, []))
        for contender in options.contenders:
            marks = [batches[period] for period, chosen in wanted.items() if contender in chosen]
            every = None if contender in OWN_INTERVAL else 250
            plain[contender] = bench.run(contender, max(marks), every, marks)
            print(
                f"{NAMES[contender]:16} unbroken, to batch {max(marks):,}: {_took(plain[contender])}",
                flush=True,
            )
        for period, contenders in wanted.items():
            report(bench, period, batches[period], contenders, plain)


if __name__ == "__main__":
    main()
