"""The table of docs/exactness.md: its verdicts, and its own scripts; the peers' need an environment of their own."""

import importlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent.parent / "benchmarks" / "exact"
sys.path.append(str(SCRIPTS))
table: Any = importlib.import_module("table")

WHOLE = table.Outcome(tuple((batch, 1 / (batch + 1)) for batch in range(10)), "weights")
KILLED = table.Outcome(WHOLE.losses[:6], None)
RESUMED = table.Outcome(WHOLE.losses[4:], "weights")


def verdict(whole: Any = WHOLE, repeated: Any = WHOLE, killed: Any = KILLED, resumed: Any = RESUMED) -> str:
    return table.verdict(whole, repeated, killed, resumed, total=10)


def with_loss(outcome: Any, batch: int, loss: float) -> Any:
    return replace(outcome, losses=tuple((b, loss if b == batch else old) for b, old in outcome.losses))


def test_the_same_losses_and_weights_are_exact() -> None:
    assert verdict() == "exact"


def test_the_first_loss_that_differs_is_named_with_both_values() -> None:
    resumed = with_loss(with_loss(RESUMED, 7, 0.5), 8, 0.25)
    assert verdict(resumed=resumed) == "differs from batch 7 on (loss 0.125, 0.5)"


def test_weights_alone_can_differ() -> None:
    assert (
        verdict(resumed=replace(RESUMED, weights="others"))
        == "differs in the final weights, though in no loss"
    )


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (RESUMED.losses[:-1], "differs from batch 9 on (trained by one only)"),
        ((*RESUMED.losses, (10, 0.5)), "differs from batch 10 on (trained by one only)"),
        ((RESUMED.losses[0], *RESUMED.losses), "differs from batch 5 on (batch 4 was trained in its place)"),
        (WHOLE.losses, "does not resume: goes on at batch 0, had trained 6 batches"),
        (WHOLE.losses[7:], "does not resume: goes on at batch 7, had trained 6 batches"),
        ((), "does not resume: goes on nowhere, had trained 6 batches"),
    ],
    ids=[
        "a batch less",
        "a batch more",
        "a batch twice",
        "from the beginning",
        "batches left out",
        "not at all",
    ],
)
def test_other_batches_than_those_that_were_left_are_not_exact(losses: Any, expected: str) -> None:
    assert verdict(resumed=replace(RESUMED, losses=losses)) == expected


def test_what_cannot_be_repeated_cannot_be_compared() -> None:
    assert verdict(repeated=with_loss(WHOLE, 3, 0.5)) == (
        "not comparable: two unbroken runs differ from batch 3 on (loss 0.25, 0.5)"
    )
    assert verdict(repeated=replace(WHOLE, weights="others")).startswith(
        "not comparable: two unbroken runs differ"
    )
    assert verdict(killed=with_loss(KILLED, 3, 0.5)).startswith("not comparable: before the kill already")
    assert verdict(whole=RESUMED).startswith(
        "not comparable: the unbroken run trained 6 batches, expected 10"
    )


def test_tables_are_put_between_their_markers() -> None:
    document = table.DOCUMENT.read_text()
    for marker in ("contenders", "states"):
        written = table.put(document, marker, "| new |")
        assert "| new |" in written
        assert table.put(written, marker, "| newer |") == table.put(document, marker, "| newer |")
    with pytest.raises(SystemExit, match="once each; put them back"):
        table.put("no markers", "states", "| new |")


def test_the_document_has_each_contender_as_pinned_and_each_state() -> None:
    lines = (SCRIPTS / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    rows = [line.split("|")[1].strip() for line in table.DOCUMENT.read_text().splitlines() if line[:1] == "|"]
    for name in table.CONTENDERS.values():
        as_pinned = re.sub(r"{([\w-]+)}", lambda match: pins.get(match[1]) or version(match[1]), name)
        assert as_pinned in rows
    assert set(table.KILLED_IN) <= set(rows)


def test_what_is_pinned_twice_is_pinned_alike() -> None:
    # pip is given both files and refuses to install what they disagree about.
    def pins(file: Path) -> dict[str, str]:
        lines = (line.split("==") for line in file.read_text().splitlines() if "==" in line)
        return {re.sub("[-_.]+", "-", name).lower(): pinned for name, pinned in lines}

    required, constrained = pins(SCRIPTS / "requirements.txt"), pins(SCRIPTS.parents[1] / "constraints.txt")
    assert required.keys() & constrained.keys()
    assert {name: constrained.get(name, pinned) for name, pinned in required.items()} == required


FORGETFUL = """
import random, numpy, task, torch
from torch import nn
options = task.options()
record = task.Record(options)
for seed in (random.seed, numpy.random.seed, torch.manual_seed):
    seed(task.SEED)
model = task.network()
optimizer, scheduler = task.optimization(model)
parts = [model, optimizer, scheduler]
file = options.folder / "checkpoint.pt"
done = 0
if file.exists():
    done, states = torch.load(file)
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
while done < task.TOTAL:
    for inputs, targets in task.loader(options):
        loss = nn.functional.cross_entropy(model(inputs), targets)
        record.loss(done, loss)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        done += 1
        if done % task.CHECKPOINT_EVERY == 0:
            torch.save((done, [part.state_dict() for part in parts]), file)
        if done == task.TOTAL:
            break
record.weights(model)
"""


def judge(folder: Path, script: str, *kill: str) -> str:
    with ThreadPoolExecutor(1) as pool:
        cell = table.Cell(workers=0, augment=True)
        whole = pool.submit(table.unbroken_twice, script, folder, cell)
        return table.judge(script, folder / "killed", cell, whole, *kill)


@pytest.mark.long
def test_a_loop_that_forgets_the_random_states_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "forgetful.py"
    script.write_text(FORGETFUL)
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    assert judge(tmp_path, str(script), "--kill-at", "33").startswith("differs from batch 30 on (loss ")


@pytest.mark.long
def test_a_contender_that_does_not_die_where_it_should_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "forgetful.py"
    script.write_text(FORGETFUL)
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    assert "exit status 0, expected death by SIGKILL" in judge(tmp_path, str(script), "--kill-at", "1000")


@pytest.mark.long
@pytest.mark.parametrize("where", [None, "FORWARD", "validation"])
def test_interlock_is_exact(tmp_path: Path, where: str | None) -> None:
    if where is None:
        assert judge(tmp_path, "interlock_trainer.py", "--kill-at", "33") == "exact"
    else:
        assert judge(tmp_path, table.STATES_SCRIPT, "--kill-at", "33", "--kill-in", where) == "exact"
