"""All measurements of speed, one after the other; with --write they go to benchmarks/RESULTS.md and RESULTS.svg.

Each is a script of its own here, which says what it measures. Peers that are not installed are left out. Nothing is
judged.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from measuring import Row, read
from plot import draw

HERE = Path(__file__).parent
RESULTS = HERE.parent / "RESULTS.md"
PLOT = RESULTS.with_suffix(".svg")

PARTS = {
    "Orchestration alone": ["dispatch.py"],
    "Orchestration alone, instructions": ["instructions.py"],
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
    "Validation": ["evaluation.py"],
    "Checkpoints": ["checkpoint.py"],
    "Start and stop": ["startup.py"],
    "Time to batch N under kills": ["kills.py"],
}
QUICKLY = {
    "Orchestration alone": ["--batches", "2000", "--rounds", "1"],
    "Real training": ["--batches", "200", "--rounds", "1"],
    "Validation": ["--batches", "300", "--rounds", "1"],
    "Checkpoints": ["--megabytes", "50", "--rounds", "1"],
    "Start and stop": ["--rounds", "1"],
    "Time to batch N under kills": ["--contenders", "interlock", "--seconds", "8", "--batches", "600"],
}
"""The arguments with which a part shows in seconds that it runs; parts that are not named are left out then."""


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
    versions = []
    for name in ("torch", "lightning", "pytorch-ignite", "transformers", "mlflow", "transitions"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"no {name}")
    system = f"{os.cpu_count()} processors, Linux {platform.release()}"
    return f"{model}, {system}; Python {platform.python_version()}, {', '.join(versions)}"


def measure(script: str, arguments: list[str]) -> tuple[str, list[Row]]:
    """What a script prints, and its rows; none where it had nothing to measure with."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-W", "ignore", str(HERE / script), *arguments, "--json", str(file)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.rstrip(), read(json.loads(file.read_text())) if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--write", action="store_true", help=f"write {RESULTS.name} and {PLOT.name}")
    either.add_argument("--quick", action="store_true", help="see that it runs; the numbers mean nothing")
    options = parser.parse_args()
    text = f"# Results\n\nBy `make bench WRITE=1`, {date.today()}. {machine()}.\n\n"
    text += "Contenders take turns. Medians, in brackets the least and the most; ratios are of runs side by side.\n"
    text += f"\n![The results, drawn]({PLOT.name})\n"
    results: dict[str, list[Row]] = {}
    for title, (script, *arguments) in PARTS.items():
        if options.quick and title not in QUICKLY:
            continue
        print(f"-- {title}", flush=True)
        printed, results[title] = measure(script, QUICKLY[title] if options.quick else arguments)
        print(f"{printed}\n", flush=True)
        shown = " ".join([script, *arguments])
        text += f"\n## {title}\n\n`python benchmarks/speed/{shown}`\n\n```\n{printed}\n```\n"
    with tempfile.TemporaryDirectory() as folder:
        file = PLOT if options.write else Path(folder) / PLOT.name
        draw(results, file)
    if options.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
