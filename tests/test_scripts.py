"""Users' scripts, each struck several times and started again: the same result, or the reason why not. Never silence.

The scripts in tests/scripts are in the style of public tutorials; each prints a digest of its weights, its
optimizers' state and every loss. Each is run once unbroken, and once with SIGKILL and SIGTERM at moments drawn
by its name.
"""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from orchestrator.cli import main

HERE = Path(__file__).parent
SCRIPTS = HERE / "scripts"
KILLS = 3
"""SIGKILLs of each script; SIGTERM comes beside them, at a place drawn."""

_CHANGED = "has changed since the training began and is in no checkpoint"
DIFFERENT = {
    "averaged_weights": f"averaged, a global variable of __main__, {_CHANGED}",
    "callback_without_state": f"FollowLoss.average, an attribute of a callback that has no state_dict, {_CHANGED}",
    "char_rnn_global": f"hidden, a global variable of __main__, {_CHANGED}",
    "curriculum_dataset": f"NoisySigns.difficulty, an attribute of the data, {_CHANGED}",
    "curriculum_weight": f"settings, a global variable of __main__, {_CHANGED}",
    "dqn": f"Explorer.position, an attribute of a callback that has no state_dict, {_CHANGED}",
    "importance_sampling": f"ImportanceSampler.weights, an attribute of the data, {_CHANGED}",
    "lookahead": f"Lookahead.slow, an attribute of an optimizer, {_CHANGED}",
    "mean_teacher": f"teacher, a global variable of __main__, {_CHANGED}",
    "pseudo_labels": f"PseudoLabels.labels, an attribute of a callback that has no state_dict, {_CHANGED}",
}
"""Scripts whose result differs, and the warning that names the reason. All others are exact."""

REFUSED = {
    "char_rnn_set": "first item: ",
    "pruning": "buffer '0.weight_mask': checkpoint has (48, 64) float32, the model has none",
}
"""Scripts that are not gone on with, and the difference that is named."""

WARNED = {
    "progressive_unfreezing": "the checkpoint's value is used: lr of parameter group 0",
    "streaming_text": "are loaded again and thrown away to go on where it stood",
}
"""Scripts that are exact, and the warning that comes all the same. The others come without one."""

BEGINS_ANEW = "has no checkpoint to continue from; a new run begins"
"""What is said after a kill that came before the checkpoint of IDLE was on disk."""

FAST = {"mean_teacher", "pruning"}


@dataclass(frozen=True)
class Ran:
    """How a script ended: its exit status, or minus the signal; what it printed; the moments it passed."""

    status: int
    output: str
    moments: list[list[Any]]

    @property
    def digest(self) -> str:
        return self.output.splitlines()[-1]


@dataclass(frozen=True)
class Cut:
    """The moment at which an attempt is struck, and by what."""

    moment: list[Any]
    signal: signal.Signals

    @property
    def status(self) -> int:
        """How a process ends that was struck so."""
        return -self.signal if self.signal is signal.SIGKILL else 128 + self.signal


class Server:
    """A process that runs scripts; strings are hashed in an order of its own, as in every new process."""

    def __init__(self, hash_seed: int) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": str(hash_seed),
            "PYTHONPATH": os.pathsep.join((str(SCRIPTS), str(HERE.parent))),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "script_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, name: str, root: Path, cut: Cut | None = None) -> Ran:
        request: dict[str, Any] = {"script": str(SCRIPTS / f"{name}.py"), "root": str(root)}
        if cut is not None:
            request |= {"moment": cut.moment, "signal": cut.signal}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ran(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Server, Server]]:
    pair = Server(1), Server(2)
    yield pair
    for server in pair:
        server.close()


def cuts(name: str, moments: list[list[Any]], chance: random.Random) -> list[Cut]:
    """Moments in their order, with room between them for the save that SIGTERM asks for, each with its signal.

    Where a script is not expected to be exact, SIGTERM comes last: then the last attempt does resume, however
    slowly the disk has taken the checkpoints of those that were killed.
    """
    apart = 6
    drawn = sorted(chance.sample(range(len(moments) - apart * KILLS), KILLS + 1))
    signals = [signal.SIGKILL] * KILLS + [signal.SIGTERM]
    if name not in {*DIFFERENT, *REFUSED, *WARNED}:
        chance.shuffle(signals)
    return [Cut(moments[index + apart * i], signals[i]) for i, index in enumerate(drawn)]


def interrupt(name: str, root: Path, servers: tuple[Server, Server], planned: list[Cut]) -> list[Ran]:
    """The script started again after each cut, by the other server, until it comes to its end or is refused."""
    attempts: list[Ran] = []
    for number, cut in enumerate([*planned, None]):
        attempts.append(servers[number % 2].run(name, root, cut))
        if cut is not None and attempts[-1].status != cut.status:
            break
    return attempts


def case(name: str) -> Any:
    marks = [] if name in FAST else [pytest.mark.long]
    return pytest.param(name, marks=marks)


NAMES = sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem != "fingerprint")


def warnings(said: str) -> list[str]:
    return [line for line in said.splitlines() if "Warning: " in line and BEGINS_ANEW not in line]


@pytest.mark.parametrize("name", [case(name) for name in NAMES])
def test_a_script_is_exact_or_says_why_not(name: str, tmp_path: Path, servers: tuple[Server, Server]) -> None:
    whole = servers[0].run(name, tmp_path / "whole")
    assert whole.status == 0, whole.output
    planned = cuts(name, whole.moments, random.Random(name))
    attempts = interrupt(name, tmp_path / "cut", servers, planned)
    said = "\n".join(f"-- {ran.status}\n{ran.output}" for ran in attempts)
    story = f"{planned}\n{said}"
    if name in REFUSED:
        assert attempts[-1].status == 1, story
        assert REFUSED[name] in attempts[-1].output, story
        return
    assert attempts[-1].status == 0, story
    if name in DIFFERENT:
        for told in (whole.output, said):
            assert any(DIFFERENT[name] in line for line in warnings(told)), story
        assert attempts[-1].digest != whole.digest, "it is exact now: say so in the table"
        return
    assert [ran.status for ran in attempts] == [*(cut.status for cut in planned), 0], story
    assert attempts[-1].digest == whole.digest, story
    if name in WARNED:
        assert any(WARNED[name] in line for line in warnings(said)), story
    else:
        assert not warnings(said), story
    for run in (tmp_path / "cut").iterdir():
        checked = CliRunner().invoke(main, ["check", str(run)])
        assert checked.exit_code == 0, checked.output


def test_the_tables_name_scripts() -> None:
    assert {*DIFFERENT, *REFUSED, *WARNED, *FAST} <= set(NAMES)
