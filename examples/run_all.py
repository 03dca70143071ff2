"""Run every example at a small size, one after the other, in a folder that is thrown away: does each still work?"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL = {
    "char_gpt.py": "--epochs 2 --characters 12000 --width 16 --precision bf16",
    "curriculum.py": "--epochs 2 --sequences 512 --length 8",
    "debug_nan.py": "",
    "digits.py": "--epochs 2",
    "huggingface.py": "--epochs 2 --functions 40",
    "kill_and_resume.py": "",
    "optuna_search.py": "--epochs 3 --trials 2",
    "vae.py": "--epochs 3",
}

here = Path(__file__).parent
found = {path.name for path in here.glob("*.py")} - {Path(__file__).name}
assert found == SMALL.keys(), f"examples/ has {sorted(found)}; expected {sorted(SMALL)}: add a size for each"
with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # some are being delivered yet
    for name, size in SMALL.items():
        began = time.monotonic()
        print(f"== {name} {size}", flush=True)
        subprocess.run([sys.executable, here / name, *size.split()], cwd=folder, check=True)
        print(f"({time.monotonic() - began:.0f} s)\n", flush=True)
