"""A process that imports torch once and runs users' scripts in forked children, which it can have struck by a signal.

It reads a JSON object a line from standard input, and answers each with one:

    {"script": path, "root": folder}, and to cut it: "moment": [epoch, batch, phase, trigger, when], "signal": number
    {"status": exit status, or minus the signal; "output": all that was printed; "moments": those passed}

A moment is the time before the work of a transition or after it. The child strikes itself at the first moment
that is the given one, which is the kernel's signal to a real process: after SIGKILL nothing of it runs.
"""

import functools
import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from orchestrator.trainer import Trainer
from states import Trigger

WANTED = ("sklearn.datasets", "sklearn.model_selection", "torch._dynamo")
"""What scripts, and the first optimizer, import and is slow: once here, not in each child."""

TRIGGERS = [trigger for trigger in Trigger if trigger not in (Trigger.HALT, Trigger.RESUME)]


def serve() -> None:
    for module in WANTED:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["root"])
        folder.mkdir(parents=True, exist_ok=True)
        output, passed = folder.with_suffix(".output"), folder.with_suffix(".moments")
        passed.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            os._exit(run(request, output, passed))
        _, status = os.waitpid(child, 0)
        answer = {
            "status": os.waitstatus_to_exitcode(status),
            "output": output.read_text(),
            "moments": json.loads(passed.read_text()) if passed.exists() else None,
        }
        print(json.dumps(answer), flush=True)


def run(request: dict[str, Any], output: Path, passed: Path) -> int:
    """In the child: the script from beginning to end, or to the moment it is struck."""
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        opened = os.open(os.devnull if number == 0 else output, flags | os.O_CREAT | os.O_APPEND)
        if number == 1:
            os.ftruncate(opened, 0)
        os.dup2(opened, number)
    sys.argv = [request["script"], "--root", request["root"]]
    moments: list[list[Any]] = []
    watch(moments, request.get("moment"), request.get("signal", 0))
    status = 0
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    passed.write_text(json.dumps(moments))
    return status


def watch(moments: list[list[Any]], target: list[Any] | None, number: int) -> None:
    """From now on each trainer notes the moments it passes, and is struck at `target`."""
    begin = Trainer.__init__

    def passing(trainer: Trainer, trigger: Trigger, when: str) -> None:
        moment = [trainer.epoch, trainer.batch, trainer.phase, trigger.value, when]
        moments.append(moment)
        if moment == target:
            os.kill(os.getpid(), number)

    passing.__module__ = "orchestrator.harness"  # not the user's code, which would have every batch stored

    def init(trainer: Trainer, *args: Any, **options: Any) -> None:
        begin(trainer, *args, **options)
        for trigger in TRIGGERS:
            for when, register in (("before", trainer.before), ("after", trainer.after)):
                hook = functools.partial(passing, trainer, trigger, when)
                register(trigger)(hook)

    Trainer.__init__ = init  # type: ignore[method-assign]


if __name__ == "__main__":
    serve()
