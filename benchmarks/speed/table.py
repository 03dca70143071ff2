"""All measurements of speed, one after the other; with --write their results go to benchmarks/RESULTS.md.

Each is a script of its own here, which says what it measures. Nothing is judged.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE.parent / "RESULTS.md"

PARTS = {
    "Orchestration alone": ["dispatch.py"],
    "Real training": ["training.py"],
    "Real training, 5 ms a step": [
        "training.py",
        "--width",
        "2560",
        "--size",
        "128",
        "--batches",
        "300",
        "--rounds",
        "5",
    ],
    "Checkpoints": ["checkpoint.py"],
    "Start and stop": ["startup.py"],
}
QUICKLY = {
    "dispatch.py": ["--batches", "2000", "--rounds", "1"],
    "training.py": ["--batches", "200", "--rounds", "1"],
    "checkpoint.py": ["--megabytes", "50", "--rounds", "1"],
    "startup.py": ["--rounds", "1"],
}


def machine() -> str:
    """What the numbers were measured on, in a line."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    versions = ", ".join(
        f"{name} {version(name)}"
        for name in ("torch", "lightning", "pytorch-ignite", "mlflow", "transitions")
    )
    system = f"{os.cpu_count()} processors, Linux {platform.release()}"
    return f"{model}, {system}; Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument(
        "--quick", action="store_true", help="see that everything runs; the numbers mean nothing"
    )
    options = parser.parse_args()
    text = f"# Results\n\nBy `make bench WRITE=1`, {date.today()}. {machine()}.\n\n"
    text += "Contenders take turns. Medians, in brackets the least and the most; ratios are of runs side by side.\n"
    for title, (script, *arguments) in PARTS.items():
        command = [sys.executable, "-W", "ignore", str(HERE / script), *arguments]
        if options.quick:
            command += QUICKLY[script]
        print(f"-- {title}", flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout, flush=True)
        shown = " ".join([script, *arguments])
        text += f"\n## {title}\n\n`python benchmarks/speed/{shown}`\n\n```\n{done.stdout.rstrip()}\n```\n"
    if options.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
