"""How a process of our own is started: it finds these packages, and takes nothing else for them."""

import os
import sys
import sysconfig
from pathlib import Path

__all__ = ["command", "environment"]


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs `module` of ours in a Python like this one."""
    # -P: a folder called `tracking` where the user works must not be taken for the package.
    return [sys.executable, "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """This process's environment, in which these packages are found, and NumPy starts no threads."""
    found = dict(os.environ)
    home = str(Path(__file__).resolve().parent.parent)
    if home not in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        path = found.get("PYTHONPATH")
        found["PYTHONPATH"] = f"{path}{os.pathsep}{home}" if path else home
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        found[name] = "1"  # importing NumPy would start a thread for each core
    return found
