"""Weights of an earlier training put into a new run: what is taken, what is said, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import trainings
from orchestrator import Checkpointing, Logging, Trainer
from orchestrator.callbacks.logs import LogRecord
from orchestrator.errors import ConfigurationError
from orchestrator.snapshot.storage import CheckpointDamaged, list_checkpoints
from orchestrator.warm_start import apply, read
from states import State
from tracking.journal import Journal
from tracking.runs import RESUME_VARIABLE, list_runs


def trained(root: Path, **options: Any) -> Trainer:
    """A run of one epoch, named "before"."""
    trainer = trainings.make(root, name="before", epochs=1, **options)
    trainer.fit()
    return trainer


def begun(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The weights that its run begins with."""
    trainer.start()
    trainer.close()
    return trainings.weights(trainer)


def checkpoint_of(trainer: Trainer) -> Path:
    assert trainer.run is not None
    return list_checkpoints(trainer.run.checkpoints)[0]


def told(trainer: Trainer) -> list[str]:
    """What the journal was told, but for warnings."""
    assert trainer.run is not None
    with Journal.open(trainer.run) as journal:
        return [log.message for log in journal.logs() if log.level == "INFO"]


REFERENCES: dict[str, Callable[[Trainer, Path], Any]] = {
    "a run's name": lambda before, folder: "before",
    "a run's id": lambda before, folder: before.run.id,
    "a run's folder": lambda before, folder: before.run.path,
    "a checkpoint": lambda before, folder: checkpoint_of(before),
    "its file of weights": lambda before, folder: str(checkpoint_of(before) / "model.safetensors"),
    "a safetensors file": lambda before, folder: saved(before, folder / "weights.safetensors"),
    "a state dict": lambda before, folder: saved(before, folder / "weights.pt"),
}


def saved(trainer: Trainer, file: Path) -> Path:
    if file.suffix == ".safetensors":
        safetensors.torch.save_file(trainer.model.state_dict(), file)
    else:
        torch.save(trainer.model.state_dict(), file)
    return file


@pytest.mark.parametrize("kind", REFERENCES)
def test_weights_and_nothing_else(kind: str, tmp_path: Path) -> None:
    before = trained(tmp_path)
    trainer = trainings.make(tmp_path, seed=2, init_from=REFERENCES[kind](before, tmp_path))
    trainings.assert_equal(begun(trainer), trainings.weights(before))
    assert trainer.warm_start is not None
    assert (trainer.epoch, trainer.batches, trainer.updates, trainer.history) == (-1, 0, 0, [])
    assert not trainer.optimizers[0].state
    assert len(list_runs(tmp_path)) == 2
    (text,) = told(trainer)
    assert text.startswith("init_from: 9 tensors of 9 taken from")
    source = trainer.warm_start.source
    if "file" in kind or "dict" in kind:
        assert (source.run, source.seq) == (None, None)
    else:
        assert (source.run, source.path) == (before.run, checkpoint_of(before))
        assert source.path.name.startswith(f"{source.seq:09d}-")
    with Journal.open(trainer.run) as journal:
        given = Path(journal.attempts()[0].params["init_from"])
    assert given.name == Path(REFERENCES[kind](before, tmp_path)).name


def test_it_trains_like_a_model_that_had_these_weights(tmp_path: Path) -> None:
    """The first checkpoint has them, so that a resume from the very beginning has them too."""
    before = trained(tmp_path)
    by_hand = trainings.make(tmp_path / "other", seed=2)
    by_hand.model.load_state_dict(before.model.state_dict())
    by_hand.fit()
    trainer = trainings.make(tmp_path, seed=2, init_from="before", checkpoint=Checkpointing(keep_last=99))
    trainer.fit()
    trainings.assert_equal(trainings.weights(trainer), trainings.weights(by_hand))
    assert trainer.run is not None
    first = list_checkpoints(trainer.run.checkpoints)[-1]
    again = trainings.make(tmp_path, seed=3)
    again.fit(resume=first)
    trainings.assert_equal(trainings.weights(again), trainings.weights(by_hand))


def test_never_mixed_up_with_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = trained(tmp_path)
    whole = trainings.make(tmp_path / "whole", seed=2, init_from=checkpoint_of(before))
    whole.fit("auto")
    broken = trainings.make(tmp_path, seed=2, init_from="before")
    broken.start("auto")
    for _ in range(20):
        broken.advance()
    broken.close()
    run = broken.run
    assert run is not None
    # By now what it began with may even be gone.
    again = trainings.make(tmp_path, seed=2, init_from="gone")
    again.fit("auto")
    assert (again.run, again.warm_start) == (run, None)
    assert len(told(again)) == 1
    trainings.assert_equal(trainings.weights(again), trainings.weights(whole))
    for explicit in (run.id, run.path, checkpoint_of(again)):
        other = trainings.make(tmp_path, init_from="before", epochs=4)
        with pytest.raises(ConfigurationError, match=r"resume is .* and init_from 'before'; expected one"):
            other.fit(resume=explicit)
    monkeypatch.setenv(RESUME_VARIABLE, str(run.path))
    from_outside = trainings.make(tmp_path, init_from="before", epochs=4)
    assert from_outside.fit().run == run.path
    assert from_outside.warm_start is None


def test_going_on_in_the_same_process(tmp_path: Path) -> None:
    trained(tmp_path)
    trainer = trainings.make(tmp_path, init_from="before")
    trainer.start()
    trainer.advance(until=State.BATCH_END)
    trainer.close()
    weights = trainings.weights(trainer)
    trainer.start()
    trainings.assert_equal(trainings.weights(trainer), weights)
    assert trainer.attempt == 2
    trainer.close()


# -- what is taken, left and missing -------------------------------------------------------------------


class Wide(nn.Module):
    """Shares with `trainings.network` some names, and some shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(6, 8))
        self.add_module("1", nn.BatchNorm1d(8))
        self.add_module("4", nn.Linear(8, 5))
        self.head = nn.Linear(5, 3)
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        parts = self._modules
        hidden = parts["1"](parts["0"](inputs)).relu()  # type: ignore[misc]
        return self.head(parts["4"](hidden).relu())  # type: ignore[no-any-return,misc]


def test_what_matches_is_taken_and_the_rest_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = trained(tmp_path)
    records: list[LogRecord] = []
    trainer = trainings.make(
        tmp_path,
        model=Wide(),
        init_from="before",
        log=Logging("minimal", to=("console", "file", records.append)),
    )
    initial, old = trainings.weights(trainer), trainings.weights(before)
    new = begun(trainer)
    for name, value in new.items():
        taken = name.startswith(("0", "1"))
        assert torch.equal(value, (old if taken else initial)[name]), name
    start = trainer.warm_start
    assert start is not None
    assert set(start.taken) == {name for name in old if name.startswith(("0", "1"))}
    assert start.left == (
        "4.weight ((3, 8) float32, the model's is (5, 8) float32)",
        "4.bias ((3,) float32, the model's is (5,) float32)",
    )
    assert start.missing == ("head.weight", "head.bias")
    expected = (
        f"init_from: 7 tensors of 11 taken from {checkpoint_of(before)}\n"
        "  left there: 4.weight ((3, 8) float32, the model's is (5, 8) float32), 4.bias ((3,) float32, the model's is "
        "(5,) float32)\n"
        "  missing there: head.weight, head.bias"
    )
    assert told(trainer) == [expected]
    assert [record.message for record in records if record.kind == "start"][1] == expected
    assert expected.splitlines()[0] in capsys.readouterr().out
    assert trainer.run is not None
    assert "missing there" in trainer.run.console_log.read_text()


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    torch.save(
        {"one": torch.zeros(2), **{f"other.{i}": torch.zeros(1) for i in range(20)}}, tmp_path / "w.pt"
    )
    model = nn.ParameterDict({"one": torch.ones(2)})
    text = str(read(tmp_path / "w.pt", tmp_path, model)[0])
    assert text.endswith("left there: other.0, other.1, other.2, other.3, other.4, other.5, and 14 more")


def test_other_types_are_cast_where_they_can_be(tmp_path: Path) -> None:
    model = nn.ParameterDict({"low": torch.zeros(2, dtype=torch.bfloat16), "real": torch.zeros(2)})
    torch.save(
        {"low": torch.tensor([1.0, 1e-3]), "real": torch.tensor([1j, 2j])},
        tmp_path / "w.pt",
    )
    start, weights = read(tmp_path / "w.pt", tmp_path, model)
    apply(weights, model)
    assert model["low"].tolist() == torch.tensor([1.0, 1e-3]).bfloat16().tolist()
    assert model["real"].tolist() == [0, 0]
    assert start.left == ("real ((2,) complex64, the model's is (2,) float32)",)


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        if tied:
            self.out.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.embedding(tokens))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("source", "target"), [(True, True), (True, False), (False, False)])
def test_tied_weights(source: bool, target: bool, tmp_path: Path) -> None:
    tokens = [(torch.tensor([1, 2, 3]), torch.tensor([2, 3, 4]))]
    before = trained(tmp_path, model=Tied(source), train_loader=tokens)
    saved(before, tmp_path / "w.pt")
    for reference in ("before", tmp_path / "w.pt"):
        model = Tied(target)
        start, weights = read(reference, tmp_path, model)
        apply(weights, model)
        trainings.assert_equal(model.state_dict(), before.model.state_dict())
        assert (model.out.weight is model.embedding.weight) == target
        assert start.missing == ()


def test_a_wrapped_model_goes_by_its_plain_names(tmp_path: Path) -> None:
    before = trained(tmp_path)
    model = trainings.network()
    start, weights = read("before", tmp_path, nn.DataParallel(model))
    apply(weights, nn.DataParallel(model))
    assert start.missing == start.left == ()
    trainings.assert_equal(model.state_dict(), before.model.state_dict())


# -- what is refused -----------------------------------------------------------------------------------


def refused(tmp_path: Path, reference: Any, message: str, **options: Any) -> None:
    """It raises, and no run was made nor a weight changed."""
    runs = list_runs(tmp_path)
    trainer = trainings.make(tmp_path, init_from=reference, **options)
    weights = trainings.weights(trainer)
    with pytest.raises(ConfigurationError, match=message):
        trainer.start("auto")
    assert list_runs(tmp_path) == runs
    trainings.assert_equal(trainings.weights(trainer), weights)


def test_a_reference_to_nothing(tmp_path: Path) -> None:
    trained(tmp_path)
    refused(tmp_path, "befor", r"init_from='befor': neither a file nor .* there is before")
    refused(tmp_path, tmp_path / "no.pt", "neither a file nor a checkpoint's folder")
    with pytest.raises(ConfigurationError, match="init_from is 3; expected the name or folder of a run"):
        trainings.make(tmp_path, init_from=3)


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    trained(tmp_path, checkpoint=None)
    refused(tmp_path, "before", "has no checkpoint that can be read")


def test_weights_of_something_else(tmp_path: Path) -> None:
    trained(tmp_path)
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(6, 3)))
    refused(
        tmp_path,
        "before",
        r"nothing in .* fits this model; found 0\.weight, 0\.bias, .*, and 3 more, expected some of 1\.0\.weight",
        model=model,
    )


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {"weight": torch.zeros(1)}}, tmp_path / "nested.pt")
    refused(tmp_path, tmp_path / "nested.pt", "holds the keys epoch, state_dict; expected a state_dict")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    refused(tmp_path, tmp_path / "tensor.pt", "holds a Tensor; expected a state_dict")
    torch.save(trainings.network(), tmp_path / "module.pt")
    refused(tmp_path, tmp_path / "module.pt", "cannot be loaded as weights .*nothing else is unpickled")
    (tmp_path / "text.pt").write_text("no weights")
    refused(tmp_path, tmp_path / "text.pt", "cannot be loaded as weights")
    for content in (b"", b"short", (1 << 40).to_bytes(8, "little") + b"{}", b"\2\0\0\0\0\0\0\0[]"):
        (tmp_path / "w.safetensors").write_bytes(content)
        refused(tmp_path, tmp_path / "w.safetensors", "is no whole safetensors file")
    saved(trained(tmp_path), tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:-3])
    refused(tmp_path, tmp_path / "w.safetensors", "is no whole safetensors file")


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    before = trained(tmp_path)
    newest = checkpoint_of(before)
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    trainer = trainings.make(tmp_path, init_from=newest)
    with pytest.raises(CheckpointDamaged, match="is damaged"):
        trainer.start()
    by_name = trainings.make(tmp_path, init_from="before")
    with pytest.warns(UserWarning, match=f"passing over checkpoint {newest.name}"):
        begun(by_name)
    assert by_name.warm_start is not None
    assert by_name.warm_start.source.path == list_checkpoints(newest.parent)[1]


def test_the_new_run_names_the_run_that_its_weights_are_of(tmp_path: Path) -> None:
    before = trained(tmp_path)
    after = trainings.make(tmp_path, name="after", init_from="before")
    begun(after)
    assert before.run is not None
    assert after.run is not None
    with Journal.open(after.run) as journal:
        parent = journal.run_info().parent
    assert parent is not None
    assert (parent.run, parent.kind) == (before.run.id, "warm start")
    assert parent.checkpoint == checkpoint_of(before).name
    # A warm start is a run of its own name, and goes on by "auto"; a branch would not.
    again = trainings.make(tmp_path, name="after", init_from="before")
    again.fit(resume="auto")
    assert again.run == after.run
