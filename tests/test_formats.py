"""Stored runs of every format are read, checked, restored and continued by the code of today."""

import copy
import math
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from formats.make import HERE, STORED, make
from orchestrator.cli import main
from orchestrator.snapshot.info import info_of
from orchestrator.snapshot.manifest import FORMAT_VERSION, manifest_as_written
from orchestrator.snapshot.migrations import MIGRATIONS, migrate, with_what_was_not_kept
from orchestrator.snapshot.storage import (
    CheckpointDamaged,
    list_checkpoints,
    read_checkpoint,
    read_manifest,
    verify_checkpoint,
)
from states import State
from tracking.journal import Journal
from tracking.runs import RunFolder

RUNS = sorted(folder for version in HERE.glob("[0-9]*") for folder in version.iterdir())
NAMES = [f"{folder.parent.name}/{folder.name}" for folder in RUNS]

TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}
"""For other versions of torch and other processors, where the last bits of a sum differ, and grow in training."""


def copied(stored: Path, root: Path) -> RunFolder:
    """The stored run in a folder of runs, where it can be written to."""
    run = RunFolder(root / read_manifest(list_checkpoints(stored / "checkpoints")[0])["run"])
    shutil.copytree(stored, run.path)
    return run


def finals(run: RunFolder) -> dict[str, torch.Tensor]:
    """The weights that the run ended with, read without any of our code."""
    (done,) = run.checkpoints.glob("*-DONE")
    return load_file(done / "model.safetensors")


@pytest.fixture(scope="module")
def same_arithmetic(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """Whether each training, run unbroken here, gives the stored bits: then so must every restored one."""
    found = {}
    for folder, name in zip(RUNS, NAMES, strict=True):
        trainer = STORED[folder.name][0](tmp_path_factory.mktemp("unbroken"))
        trainer.fit()
        expected = finals(RunFolder(folder))
        found[name] = all(torch.equal(trainer.model.state_dict()[key], expected[key]) for key in expected)
    return found


def test_there_is_a_run_of_every_format_that_was_released() -> None:
    assert {int(folder.parent.name) for folder in RUNS} >= set(range(1, FORMAT_VERSION))


@pytest.mark.parametrize("stored", RUNS, ids=NAMES)
def test_every_stored_checkpoint_leads_to_the_same_end(
    stored: Path, same_arithmetic: dict[str, bool], tmp_path: Path
) -> None:
    expected = finals(RunFolder(stored))
    checkpoints = [path.name for path in list_checkpoints(stored / "checkpoints")]
    assert len(checkpoints) >= 5
    for name in checkpoints:
        run = copied(stored, tmp_path / name)
        trainer = STORED[stored.name][0](tmp_path / name)
        result = trainer.fit(resume=run.checkpoints / name)
        assert (result.state, result.run, len(result.history)) == (State.DONE, run.path, 2)
        for key, value in trainer.model.state_dict().items():
            if same_arithmetic[f"{stored.parent.name}/{stored.name}"]:
                assert torch.equal(value, expected[key]), (name, key)
            else:
                torch.testing.assert_close(value, expected[key], **TOLERANCE)


@pytest.mark.parametrize("stored", RUNS, ids=NAMES)
def test_the_journal_is_understood(stored: Path, tmp_path: Path) -> None:
    run = copied(stored, tmp_path)
    with Journal.open(run) as journal:
        assert journal.run_info().id == run.id
        assert [attempt.outcome for attempt in journal.attempts()] == ["stopped", "done"]
        assert journal.attempts()[0].position is None
        rows = list(journal.transitions(scope="train"))
        assert rows[-1].dest is State.DONE
        losses = [row.loss for row in rows if row.dest is State.FORWARD]
        assert len(losses) == 10 * len({row.phase for row in rows if row.dest is State.FORWARD})
        assert all(loss is not None and math.isfinite(loss) for loss in losses)
        assert {found.name for found in journal.checkpoints()} == {
            path.name for path in list_checkpoints(run.checkpoints)
        }
        assert {metric.key for metric in journal.metrics()} >= {"loss", "grad_norm", "duration"}
    for command, said in (("check", "all is well"), ("show", "DONE"), ("runs", run.name)):
        arguments = [command, "--root", str(tmp_path)] if command == "runs" else [command, str(run.path)]
        found = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert (found.exit_code, said in found.output) == (0, True), found.output


@pytest.mark.parametrize("name", STORED)
def test_a_run_of_the_present_format_can_be_stored(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / name)
    states = {read_manifest(path)["state"] for path in list_checkpoints(tmp_path / name / "checkpoints")}
    assert states >= {"IDLE", "EPOCH_END", "DONE", *(state.value for _, _, state in STORED[name][1])}
    assert {path.name for path in (tmp_path / name).iterdir()} == {"journal.sqlite", "checkpoints"}
    for path in list_checkpoints(tmp_path / name / "checkpoints"):
        assert read_checkpoint(path)[0]["format_version"] == FORMAT_VERSION


def test_there_is_a_way_from_every_older_format() -> None:
    assert list(MIGRATIONS) == list(range(1, FORMAT_VERSION))


def test_damage_is_found_by_the_digests_of_an_older_format(tmp_path: Path) -> None:
    run = copied(HERE / "2" / "window", tmp_path)
    (path, *_) = list_checkpoints(run.checkpoints)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    for look in (read_checkpoint, verify_checkpoint):
        with pytest.raises(CheckpointDamaged, match="found sha256"):
            look(path)


NONE = {"values": {}, "shared": {}, "marks": {}}


def test_from_1_to_2() -> None:
    """The keys that came, with what means none; those that are there stay, and nothing given is changed."""
    tree = {
        "model": {"parameters": {"weight": 1.0}},
        "loss": None,
        "stop": "enough",
        "data": {"position": 3},
        "validation_data": {"val": {"position": 0}, "other": {"position": 1}},
    }
    before = copy.deepcopy(tree)
    manifest = {"format_version": 1, "seq": 7}
    expected = {
        "model": {"parameters": {"weight": 1.0}, "attributes": NONE},
        "loss": None,
        "stop": "enough",
        "data": {"position": 3, "place": {}},
        "validation_data": {
            "val": {"position": 0, "place": {}},
            "other": {"position": 1, "place": {}},
        },
        "forward": None,
        "built": {},
        "generators": {},
    }
    assert migrate(manifest, tree) == (manifest, expected)
    assert tree == before
    _, other = migrate(manifest, {**tree, "loss": {}, "forward": {"kept": 1}})
    assert other == {**expected, "loss": {"attributes": NONE}, "forward": {"kept": 1}}
    assert migrate(manifest, None) == (manifest, None)


def test_from_2_to_3() -> None:
    manifest, tree = {"format_version": 2}, {"model": {}}
    assert migrate(manifest, tree) == (manifest, tree)


def test_what_a_format_did_not_keep_stays_as_it_is() -> None:
    average = {"updates": 1, "n_averaged": 1, "parameters": {}, "buffers": {}}
    saved = {
        "model": {"parameters": {"weight": 1.0}},
        "loss": None,
        "data": {"position": 3},
        "callbacks": {"EMA": average, "Mine": {"attributes": [1]}},
    }
    _, tree = migrate({"format_version": 1}, saved)
    live = {
        "model": {"parameters": {"weight": 2.0}, "attributes": {**NONE, "values": {"": {"steps": 3}}}},
        "loss": {},
        "data": {"position": 0},
        "callbacks": {
            "EMA": {**average, "attributes": {**NONE, "marks": {"": 1}}},
            "Mine": {"attributes": [2]},
        },
    }
    assert tree is not None
    found = with_what_was_not_kept(tree, live, 1)
    assert found["model"] == {"parameters": {"weight": 1.0}, "attributes": live["model"]["attributes"]}
    assert found["loss"] is None
    assert found["data"] == {"position": 3}
    assert found["callbacks"] == {"EMA": live["callbacks"]["EMA"], "Mine": {"attributes": [1]}}
    assert with_what_was_not_kept(tree, live, FORMAT_VERSION) == tree


def test_readers_see_the_newest_format_only() -> None:
    (path, *_) = list_checkpoints(HERE / "1" / "window" / "checkpoints")
    assert manifest_as_written(path)["format_version"] == 1
    manifest, tree = read_checkpoint(path)
    assert manifest == read_manifest(path)
    assert tree["forward"] is None
    assert tree["model"]["attributes"] == tree["loss"]["attributes"] == NONE
    assert (info_of(path).state, info_of(path).epoch) == (State.DONE, 1)
