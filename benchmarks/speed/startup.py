"""Start and stop, each in a process of its own: importing, the time before the first batch and after the last.

The run is journaled, saves its checkpoints, and is delivered to a local MLflow store that is not behind.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile

from measuring import Figure

_IMPORT = """
import json, time
a = time.perf_counter(); import torch
b = time.perf_counter(); from orchestrator import Trainer
print(json.dumps({"import torch": b - a, "then: from orchestrator import Trainer": time.perf_counter() - b}))
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
print(json.dumps({"from fit to the first batch": times[0] - start, "from the last batch to the end": end - times[-1]}))
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    for number in range(options.rounds + 1):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
            for script in (_IMPORT, _RUN):
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", "-c", script, root],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                    if number:
                        found.setdefault(name, []).append(value)
    for name, values in found.items():
        print(f"{name:42} {Figure.of(values)} s")
