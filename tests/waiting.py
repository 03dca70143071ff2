"""A real training, in a process of its own, that waits for its fourth batch until it is told to go on, or is killed."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tracking
from tracking.journal import Journal
from tracking.runs import RunFolder, find_run

HERE = Path(tracking.__file__).parent.parent
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")},
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE / "tests")]),
    "TERM": "xterm-256color",
}
SCRIPT = """
import sys, time
from pathlib import Path
import torch
from torch import nn
from orchestrator import Trainer
from torch.utils.data import DataLoader
from trainings import data, network

torch.set_num_threads(1)
folder = Path(sys.argv[1])

class Waiting(torch.utils.data.Dataset):
    inner = data(48)
    def __len__(self): return 48
    def __getitem__(self, index):
        if index == 30:
            while not (folder / "go").exists(): time.sleep(0.02)
        return self.inner[index]

model = network()
Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(),
        DataLoader(Waiting(), batch_size=8), {"held": DataLoader(data(16), batch_size=8)},
        epochs=2, name="waits", root=folder, track=None, log=None).fit()
"""


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What `condition` says, once it says something."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.05)
    return found


@contextmanager
def waiting(folder: Path) -> Iterator[tuple["subprocess.Popen[bytes]", RunFolder]]:
    """A real training that waits for its fourth batch, and its run."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, str(script), str(folder)], env=ENVIRONMENT) as child:
        try:
            wait_for(lambda: list(folder.glob("waits-*/recorder.bin")))
            run = find_run("waits", folder)
            wait_for(lambda: live(run) == 2)
            yield child, run
        finally:
            child.kill()


def live(run: RunFolder) -> int:
    with Journal.open(run) as journal:
        last = journal.last_transition()
    return last.batch if last and last.dest.value == "BATCH_END" else -1
