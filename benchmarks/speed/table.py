"""All measurements of speed, one after the other; with --write they go to benchmarks/RESULTS.md and RESULTS.svg.

Each is a script of its own here, which says what it measures. Peers that are not installed are left out. Nothing is
judged. What was measured is kept in RESULTS.json, so that a part can be measured again by itself. Parts that need a
CUDA device are measured where there is one, and stay what they were elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from measuring import measured_by, read
from plot import draw

HERE = Path(__file__).parent
RESULTS = HERE.parent / "RESULTS.md"
PLOT = RESULTS.with_suffix(".svg")
KEPT = RESULTS.with_suffix(".json")

PARTS = {
    "Orchestration alone": ["dispatch.py"],
    "Orchestration alone, instructions": ["instructions.py"],
    "Orchestration alone, part by part": ["parts.py"],
    "Orchestration alone, line by line": ["lines.py"],
    "Real training": ["training.py"],
    "Real training, beside Ignite alone": [
        *("training.py", "--only", "everything", "Ignite", "--processes", "9", "--rounds", "2"),
    ],
    "Real training, instructions": ["instructions.py", "--training", "--rounds", "1"],
    "Real training, 4 ms a step": ["training.py", "--width", "4096", "--size", "128"],
    "Real training, 4 ms a step, beside the loop": ["delivering.py"],
    "Real training, convolutions, 5 ms a step": [
        *("training.py", "--convolutions", "--width", "32", "--size", "96"),
        *("--only", "everything", "Ignite", "Lightning, no", "--rounds", "9", "--turns", "20"),
    ],
    "Real training, convolutions, instructions": [
        *("instructions.py", "--training", "--convolutions", "--width", "32", "--size", "24"),
        *("--warm", "5", "--batches", "20", "--rounds", "1"),
    ],
    "Validation": ["evaluation.py"],
    "Validation, from a DataLoader": ["evaluation.py", "--loader", "--batches", "1000"],
    "Validation, 1.5 ms a batch": [
        *("evaluation.py", "--width", "4096", "--size", "128", "--batches", "500"),
    ],
    "Checkpoints": ["checkpoint.py"],
    "Checkpoints, in a training": ["saving.py"],
    "Start and stop": ["startup.py"],
    "A long run": ["scale.py"],
    "Time to batch N under kills": ["kills.py"],
    "On a CUDA device": ["training.py", "--device", "cuda"],
    "On a CUDA device, 2.5 ms a step": [
        *("training.py", "--device", "cuda", "--features", "3072", "--width", "8192", "--size", "1024"),
        *("--only", "norm", "interlock", "Ignite", "no loss"),
    ],
    "On a CUDA device, saves": ["saving.py", "--device", "cuda", "--samples", "4096"],
}
QUICKLY = {
    "Orchestration alone": ["--batches", "2000", "--rounds", "1"],
    "Orchestration alone, part by part": ["--batches", "2000", "--rounds", "1"],
    "Orchestration alone, line by line": ["--seconds", "2", "--rounds", "1"],
    "Real training": ["--rounds", "1", "--turns", "1"],
    "Real training, beside Ignite alone": [
        *("--only", "everything", "Ignite", "--processes", "2", "--rounds", "1", "--turns", "1"),
    ],
    "Real training, 4 ms a step, beside the loop": ["--rounds", "1", "--seconds", "4"],
    "Validation": ["--batches", "300", "--rounds", "1", "--turns", "1"],
    "Validation, from a DataLoader": ["--loader", "--batches", "100", "--rounds", "1", "--turns", "1"],
    "Checkpoints": ["--megabytes", "50", "--rounds", "1"],
    "Checkpoints, in a training": ["--megabytes", "50", "--rounds", "1"],
    "Start and stop": ["--rounds", "1"],
    "A long run": ["--transitions", "20000", "--rounds", "1"],
    "Time to batch N under kills": ["--contenders", "interlock", "--seconds", "8", "--batches", "200"],
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
    if torch.cuda.is_available():
        system = f"{torch.cuda.get_device_name()}, {system}"
    return f"{model}, {system}; Python {platform.python_version()}, {', '.join(versions)}"


@dataclass(frozen=True)
class Part:
    """What a script printed and its rows (none where it had nothing to measure with), when, and on what."""

    command: str
    printed: str
    rows: list[dict[str, Any]]
    when: str
    on: str

    @classmethod
    def measure(cls, script: str, arguments: list[str]) -> Part:
        """Run the script, which shows what it measures."""
        printed, rows = measured_by(str(HERE / script), arguments)
        return cls(" ".join([script, *arguments]), printed, rows, str(date.today()), machine())


def text(parts: Mapping[str, Part]) -> str:
    """The page of the results."""
    found = "# Results\n\nBy `make bench WRITE=1`. Contenders take turns. Medians, in brackets the least and the most; "
    found += f"ratios are of runs side by side.\n\n![The results, drawn]({PLOT.name})\n"
    for title, part in parts.items():
        found += f"\n## {title}\n\n`python benchmarks/speed/{part.command}`, {part.when}. {part.on}.\n"
        found += f"\n```\n{part.printed}\n```\n"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--write", action="store_true", help=f"write {RESULTS.name} and {PLOT.name}")
    either.add_argument("--quick", action="store_true", help="see that it runs; the numbers mean nothing")
    parser.add_argument("--only", nargs="*", choices=PARTS, metavar="TITLE", help=f"of: {'; '.join(PARTS)}")
    options = parser.parse_args()
    measured: dict[str, Part] = {}
    for title, (script, *arguments) in PARTS.items():
        if (options.quick and title not in QUICKLY) or title not in (options.only or PARTS):
            continue
        if "cuda" in arguments and not torch.cuda.is_available():
            continue
        print(f"-- {title}", flush=True)
        measured[title] = Part.measure(script, QUICKLY[title] if options.quick else arguments)
        print(f"{measured[title].printed}\n", flush=True)
    if options.write:
        kept = {title: Part(**part) for title, part in json.loads(KEPT.read_text()).items()}
        if not options.only:  # all that can be measured here was
            kept = {title: part for title, part in kept.items() if "cuda" in PARTS.get(title, ())}
        measured = {title: (kept | measured)[title] for title in PARTS if title in kept | measured}
    with tempfile.TemporaryDirectory() as folder:
        file = PLOT if options.write else Path(folder) / PLOT.name
        draw({title: read(part.rows) for title, part in measured.items()}, file)
    if options.write:
        KEPT.write_text(json.dumps({title: asdict(part) for title, part in measured.items()}, indent=1))
        RESULTS.write_text(text(measured))


if __name__ == "__main__":
    main()
