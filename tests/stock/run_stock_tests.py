"""The transitions project's own tests of its core, run with CompiledMachine in place of Machine.

    python tests/stock/run_stock_tests.py [--keep FOLDER]

Fetches the source distribution of transitions 0.9.3 with pip (options for pip: the environment variable
PIP_ARGS), runs the tests listed in FILES with stock's own Machine and then with CompiledMachine, each in
a process of its own, prints both summaries, and exits with 1 if CompiledMachine fails one that stock passes.
The library under test is the one in the source distribution, so tests and library belong together. Needs
pytest, and setuptools from the package index (pip builds metadata to know the version).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

VERSION = "0.9.3"
# Left out are the tests of the machines in transitions.extensions: nested, graphs, asyncio, locked, markup.
FILES = ("test_core.py", "test_add_remove.py", "test_enum.py", "test_states.py", "test_experimental.py")
EXTENSIONS = ("Nested", "Graph", "Diagram", "Async", "Locked", "HSM")
REPOSITORY = Path(__file__).resolve().parents[2]


class Outcomes:
    """A pytest plugin that gives the tests the machine to test, and notes what became of each."""

    def __init__(self, machine: type) -> None:
        import transitions.core

        self.of_test: dict[str, str] = {}
        self._core, self._stock = transitions.core, transitions.core.Machine
        transitions.Machine = transitions.core.Machine = machine  # type: ignore[misc,assignment]

    def pytest_collection_finish(self) -> None:
        """Stock's own code needs its name back, once the tests have imported theirs."""
        self._core.Machine = self._stock  # type: ignore[misc]

    def pytest_collection_modifyitems(self, items: list) -> None:  # type: ignore[type-arg]
        """Leave out the classes that test machines of transitions.extensions."""
        items[:] = [item for item in items if not any(word in item.nodeid for word in EXTENSIONS)]

    def pytest_runtest_logreport(self, report) -> None:  # type: ignore[no-untyped-def]
        """A failure in any phase counts, a skip in any phase counts, a pass of the call itself counts."""
        if report.outcome != "passed" or report.when == "call":
            self.of_test[report.nodeid] = report.outcome


def run_child(sources: Path, machine: str, report: Path) -> int:
    """Run the tests in this process, with the machine of that name, and write the outcomes to `report`."""
    os.chdir(sources)
    sys.path[:0] = [str(sources), str(REPOSITORY)]
    import pytest
    import transitions.core
    import transitions.extensions  # its machines stay what they are: they are out of scope

    if not Path(transitions.__file__).is_relative_to(sources):
        raise SystemExit(f"transitions was imported from {transitions.__file__}, not from {sources}")
    from states.compiled import CompiledMachine

    outcomes = Outcomes(CompiledMachine if machine == "compiled" else transitions.core.Machine)
    options = [
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--rootdir=.",
        "-c",
        os.devnull,
    ]
    pytest.main([*options, *(f"tests/{name}" for name in FILES)], plugins=[outcomes])
    report.write_text(json.dumps(outcomes.of_test))
    return 0


def fetch(folder: Path) -> Path:
    """Download and unpack the source distribution; the folder that holds its `tests`."""
    options = shlex.split(os.environ.get("PIP_ARGS", ""))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    # Without build isolation, where setuptools is installed, nothing else has to be fetched or built.
    if _has_setuptools():
        command.append("--no-build-isolation")
    subprocess.run([*command, *options, "--dest", str(folder), f"transitions=={VERSION}"], check=True)
    with tarfile.open(folder / f"transitions-{VERSION}.tar.gz") as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(folder, filter="data")
        else:  # Python 3.11.2, which Debian 12 has
            archive.extractall(folder)
    return folder / f"transitions-{VERSION}"


def _has_setuptools() -> bool:
    probe = [sys.executable, "-c", "import setuptools, wheel"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def outcomes_with(machine: str, sources: Path) -> dict[str, str]:
    """What became of each test with that machine, run in a process of its own."""
    report = sources / f"{machine}.json"
    child = [sys.executable, __file__, "--child", machine, "--keep", str(sources)]
    print(f"\n== {machine} ==", flush=True)
    subprocess.run(child, check=True)
    found: dict[str, str] = json.loads(report.read_text())
    return found


def main() -> int:
    """Fetch, run both, compare; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, help="download and unpack here, and keep it")
    parser.add_argument("--child", choices=("stock", "compiled"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return run_child(arguments.keep, arguments.child, arguments.keep / f"{arguments.child}.json")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        sources = fetch(folder.resolve())
        stock, compiled = outcomes_with("stock", sources), outcomes_with("compiled", sources)
    print()
    for name, outcomes in (("Machine", stock), ("CompiledMachine", compiled)):
        print(
            f"{name:16}", ", ".join(f"{count} {what}" for what, count in Counter(outcomes.values()).items())
        )
    broken = [
        test for test, outcome in stock.items() if outcome == "passed" and compiled.get(test) != "passed"
    ]
    for test in broken:
        print(f"passes with Machine, not with CompiledMachine: {test}")
    if not stock:
        print("no test was found: the source distribution is not what was expected")
    return 1 if broken or not stock else 0


if __name__ == "__main__":
    sys.exit(main())
