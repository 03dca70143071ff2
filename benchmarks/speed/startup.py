"""Start and stop, each in a process of its own: importing, the time before the first batch and after the last.

The run is journaled, saves its checkpoints, and is delivered to a local MLflow store that is not behind. Then what
the command line takes to answer, the interpreter's own start included. Python keeps its bytecode, as it does where a
package was installed: compiling all of it anew takes longer than what is measured here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import arguments, beside, report

TORCH, TRAINER = "import torch", "then: from orchestrator import Trainer"
BEFORE, AFTER = "from fit to the first batch", "from the last batch to the end"
PYTHON = "python -c pass"
COMMANDS = {
    PYTHON: ["-c", "pass"],
    "interlock --help": ["-m", "orchestrator.cli", "--help"],
    "interlock show RUN": ["-m", "orchestrator.cli", "show"],
}

_IMPORT = """
import json, time
a = time.perf_counter(); import torch
b = time.perf_counter(); from orchestrator import Trainer
print(json.dumps([b - a, time.perf_counter() - b]))
"""

_RUN = """
import json, sys, time
import torch
from torch import nn
from orchestrator import MLflow, Trainer
torch.set_num_threads(1)
times = []
class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
    def forward(self, inputs):
        times.append(time.perf_counter())
        return self.layer(inputs)
model = Network()
batches = [(torch.randn(32, 64), torch.randint(10, (32,))) for _ in range(2000)]
root = sys.argv[1]
trainer = Trainer(model, torch.optim.AdamW(model.parameters()), nn.CrossEntropyLoss(), batches, epochs=1, log=None,
                  track=MLflow(f"sqlite:///{root}/mlflow.db"), root=root)
start = time.perf_counter()
trainer.fit()
end = time.perf_counter()
print(json.dumps([times[0] - start, end - times[-1]]))
"""

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def run(*command: str) -> str:
    """What a Python of its own prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        check=True,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    return done.stdout


def once() -> dict[str, float]:
    """Seconds of each thing, by its name."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
        seconds: dict[str, float] = {}
        for script, names in ((_IMPORT, (TORCH, TRAINER)), (_RUN, (BEFORE, AFTER))):
            seconds |= zip(names, json.loads(run("-c", script, root).splitlines()[-1]), strict=True)
        trained = next(str(path.parent) for path in Path(root).glob("*/journal.sqlite"))
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            run(*command, *([trained] if command[-1] == "show" else []))
            seconds[name] = time.perf_counter() - began
    return seconds


if __name__ == "__main__":
    options = arguments(__doc__, rounds=7).parse_args()
    rounds = [once() for _ in range(options.rounds + 1)][1:]  # the first compiles, and finds the files
    found = {name: [seconds[name] for seconds in rounds] for name in rounds[0]}
    importing, training, commands = (
        {name: values for name, values in found.items() if name in names}
        for names in ((TORCH, TRAINER), (BEFORE, AFTER), COMMANDS)
    )
    rows = [*beside(importing, TORCH, "s"), *beside(training, None, "s"), *beside(commands, PYTHON, "s")]
    report(rows, options.json)
