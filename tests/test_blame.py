"""Blame: who made the NaN, found by doing the guilty batch again. Every kind of culprit, made for real."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainings
from orchestrator import NonFiniteError, Phase, Trainer
from orchestrator.blame import Blame, BlameError, guilty_batch
from orchestrator.past import SeekError
from states import State, Trigger
from tracking.journal import Journal
from tracking.runs import RunFolder, list_runs
from trainings import At, spoilt


def halted(trainer: Trainer) -> NonFiniteError:
    with pytest.raises(NonFiniteError) as raised:
        trainer.fit()
    return raised.value


def recorded(run: RunFolder) -> tuple[object, ...]:
    with Journal.open(run) as journal:
        return (
            journal.newest_seq(),
            journal.attempts(),
            sorted(run.checkpoints.iterdir()),
            list_runs(run.path.parent),
        )


def blamed(trainer: Trainer, place: tuple[int, int] = (1, 2)) -> Blame:
    """Train until it halts at this place, and ask; nothing is recorded by asking."""
    error = halted(trainer)
    assert (error.epoch, error.batch) == place
    run = trainer.run
    before = recorded(run)
    blame = trainer.blame()
    assert recorded(run) == before
    assert (trainer.epoch, trainer.batch) == (blame.epoch, blame.batch)
    assert trainer.state is (State.BACKWARD if blame.kind == "backward" else State.FORWARD)
    assert trainer.attempt == 0
    return blame


def test_log_of_zero_in_a_module(tmp_path: Path) -> None:
    blame = blamed(trainings.make(tmp_path, model=spoilt(lambda x: torch.log(x - x) * 0)))
    assert (blame.kind, blame.name, blame.type) == ("module", "2.1", "At")
    assert (blame.epoch, blame.batch, blame.phase) == (1, 2, "")
    assert blame.function == "torch.log"
    assert "test_blame.py:" in blame.line
    assert "in <lambda>: " in blame.line
    assert "torch.log(x - x)" in blame.line
    assert "64 NaN of 64 elements" in blame.made
    assert "epoch 1, batch 2: module 2.1 (At) was given finite values, and its output has 64 NaN" in str(
        blame
    )
    assert "in torch.log, called at " in str(blame)


def test_gradient_of_the_root_of_zero(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, model=spoilt(lambda x: x + torch.sqrt(x * 0)))
    blame = blamed(trainer)
    assert (blame.kind, blame.name, blame.type) == ("backward", "2.1", "At")
    assert blame.function == "SqrtBackward0"
    assert "torch.sqrt(x * 0)" in blame.line
    assert (
        "the loss is finite; the backward pass of module 2.1 (At) was given finite gradients, and made"
        in str(blame)
    )
    # It is the training's own backward that was watched: the gradients are there to be looked at.
    assert not torch.isfinite(trainer.model[0].weight.grad).all()


def test_nothing_divided_by_nothing_in_the_loss(tmp_path: Path) -> None:
    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wanted = targets < (0 if trainer.batches == 8 else 3)
        return (outputs.square().mean(1) * wanted).sum() / wanted.sum()

    trainer = trainings.make(tmp_path, loss_fn=loss_fn)
    blame = blamed(trainer)
    assert (blame.kind, blame.name, blame.type) == ("loss", "loss_fn", "")
    assert blame.function == "torch.Tensor.div"
    assert "/ wanted.sum()" in blame.line


def test_a_loss_of_torch_without_targets(tmp_path: Path) -> None:
    inputs, targets = trainings.data().tensors
    targets = targets.clone()
    targets[16:24] = -100
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=8)
    blame = blamed(trainings.make(tmp_path, train_loader=loader), (0, 2))
    assert (blame.kind, blame.name) == ("loss", "CrossEntropyLoss")
    assert blame.function == "torch.nn.functional.cross_entropy"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_data(tmp_path: Path, value: float) -> None:
    inputs, targets = trainings.data().tensors
    inputs = inputs.clone()
    inputs[33, 1:3] = value
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=8)
    blame = blamed(trainings.make(tmp_path, train_loader=loader), (0, 4))
    assert (blame.kind, blame.name) == ("batch", "batch[0]")
    word = "NaN" if value != value else "infinite"
    assert f"the data is not finite: batch[0] has 2 {word} of 48 elements" in str(blame)


def test_weights_that_explode(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    trainer = trainings.make(
        tmp_path,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e16),
        loss_fn=nn.MSELoss(),
        train_loader=[(torch.ones(4, 6), torch.zeros(4, 3))] * 6,
    )
    error = halted(trainer)
    blame = trainer.blame()
    assert (blame.epoch, blame.batch) == (error.epoch, error.batch)
    assert (blame.kind, blame.type, blame.function) == ("module", "Linear", "torch.nn.functional.linear")
    assert str(blame).endswith("in torch.nn.functional.linear")  # no line of the user's code called it
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


class Attention(nn.Module):
    """Attends to what a mask allows; the mask is a buffer that is infinite on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 3)
        self.register_buffer("causal", torch.full((6, 6), -torch.inf).triu(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        mask = self.causal if inputs[0, 0] != 7 else self.causal - torch.inf
        x = self.embed(inputs[..., None])
        return self.out(self.attend(x, x, x, attn_mask=mask, need_weights=True)[0].mean(1))


def test_a_mask_that_leaves_nothing(tmp_path: Path) -> None:
    inputs, targets = trainings.data().tensors
    inputs = inputs.clone()
    inputs[24, 0] = 7
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=8)
    blame = blamed(trainings.make(tmp_path, model=Attention(), train_loader=loader), (0, 3))
    assert (blame.kind, blame.name, blame.type) == ("module", "attend", "MultiheadAttention")
    assert "given an input with 36 -infinite" in str(blame)
    assert "multi_head_attention_forward" in blame.function


def test_masks_and_other_infinities_that_are_meant_are_not_blamed(tmp_path: Path) -> None:
    """Ones that a module gives, and a log of zero that is masked, before the module that is guilty."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = Mask()
            self.guilty = At(lambda x: (x / 0).tanh() - x / 0)
            self.out = nn.Linear(6, 3)

        def forward(self, inputs):
            zero = inputs * 0
            safe = torch.where(zero > 0, zero.log(), inputs)
            return self.out(self.guilty(torch.softmax(self.mask(safe), 1)))

    class Mask(nn.Module):
        def forward(self, scores):
            return scores.masked_fill(torch.arange(6) > 3, -torch.inf)

    blame = blamed(trainings.make(tmp_path, model=Masked()))
    assert (blame.kind, blame.name) == ("module", "guilty")
    assert "(x / 0)" in blame.line


def test_a_buffer(tmp_path: Path) -> None:
    model = trainings.network()
    model[1].eval().train = lambda mode=True: model[1]
    trainer = trainings.make(tmp_path, model=model)
    trainer.after(Trigger.END_BATCH)(
        lambda: model[1].running_mean.fill_(torch.nan) if trainer.batches == 7 else None
    )
    blame = blamed(trainer, (1, 1))
    assert (blame.kind, blame.name, blame.type) == ("buffer", "1.running_mean", "BatchNorm1d")
    assert "the buffer 1.running_mean (BatchNorm1d) is not finite before the forward pass: 8 NaN of 8" in str(
        blame
    )


def test_a_parameter(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path)

    def spoil() -> None:
        if trainer.batches == 7:
            trainer.model[4].bias.data[1] = torch.nan

    trainer.after(Trigger.END_BATCH)(spoil)
    blame = blamed(trainer, (1, 1))
    assert (blame.kind, blame.name, blame.type) == ("parameter", "4.bias", "Linear")


def test_the_second_player_of_a_gan(tmp_path: Path) -> None:
    model = nn.ModuleDict({"d": trainings.network(0), "g": spoilt(lambda x: x / (x - x))})
    phases = [
        Phase(
            name,
            torch.optim.Adam(model[name].parameters()),
            lambda model, batch, name=name: nn.functional.cross_entropy(model[name](batch[0]), batch[1]),
        )
        for name in ("d", "g")
    ]
    trainer = trainings.make(tmp_path, model=model, optimizer=phases, loss_fn=None)
    blame = blamed(trainer)
    assert (blame.phase, blame.kind, blame.name) == ("g", "module", "g.2.1")
    assert "phase 'g'" in str(blame)
    assert trainer.phase == "g"


@pytest.mark.parametrize("in_backward", [False, True])
def test_an_earlier_batch_of_the_window(tmp_path: Path, in_backward: bool) -> None:
    """The step that is skipped is that of batch 5; batch 3 has spoilt the gradients, or has a loss of NaN."""
    function = (lambda x: x + torch.sqrt(x * 0)) if in_backward else (lambda x: torch.log(x - x) * 0)
    trainer = trainings.make(tmp_path, model=spoilt(function, 9), accumulate=3)
    error = halted(trainer)
    assert (error.epoch, error.batch) == (1, 5)
    blame = trainer.blame()
    assert (blame.epoch, blame.batch, blame.name) == (1, 3, "2.1")
    assert blame.kind == ("backward" if in_backward else "module")


def test_the_newest_batch_that_was_skipped(tmp_path: Path) -> None:
    def make() -> Trainer:
        model = nn.Sequential(spoilt(lambda x: x / (x - x), 3), nn.Linear(3, 3), At(torch.log, 10))
        return trainings.make(tmp_path, model=model, nonfinite="skip")

    trainer, again = make(), make()
    trainer.fit()
    assert trainer.state is State.DONE
    blame = again.blame(run=trainer.run.path)
    assert (blame.epoch, blame.batch, blame.name, blame.function) == (1, 4, "2", "torch.log")
    # A batch that one has gone back to is the one that is looked at, from whichever state.
    again.seek(0, 3, State.BACKWARD)
    assert again.blame().name == "0.2.1"
    assert len(list_runs(tmp_path)) == 1


def test_going_on_from_the_guilty_batch_is_linked_to_it(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, model=spoilt(lambda x: x / (x - x)))
    blame = blamed(trainer)
    with Journal.open(list_runs(tmp_path)[0]) as journal:
        row = journal.find(blame.epoch, blame.batch, State.FORWARD)
    with pytest.raises(NonFiniteError):
        trainer.fit()
    assert trainer.run is not None
    with Journal.open(trainer.run) as journal:
        assert journal.run_info().parent.seq == row.seq


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_overflow_that_a_scaler_takes_care_of_is_left_alone(tmp_path: Path) -> None:
    try:
        trainer = trainings.make(tmp_path, precision="fp16", device="cpu", epochs=1)
    except Exception as error:
        pytest.skip(str(error))
    trainer._training.work.precision.scalers[0]._init_scale = 2.0**40
    trainer.fit()
    assert trainer.history[0]["skipped"] >= 1
    with pytest.raises(BlameError, match="has no loss and no gradient that is not finite"):
        guilty_batch(trainer.run)
    again = trainings.make(tmp_path, precision="fp16", device="cpu", epochs=1)
    again.seek(0, 0)
    with pytest.raises(BlameError, match="everything is finite from epoch 0, batch 0"):
        again.blame()


def test_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = Path(__file__).parent.parent / "examples" / "debug_nan.py"
    code = [line for line in example.read_text().splitlines() if line.strip() and not line.startswith('"""')]
    assert len(code) < 40
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")
    text = capsys.readouterr().out
    assert "halted: non-finite " in text
    assert "the same as before: True" in text
    assert "module 3 (LogProbabilities)" in text
    assert "return torch.log(torch.softmax(scores, dim=1))" in text


def test_where_nothing_is_to_be_blamed(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path)
    trainer.fit()
    with pytest.raises(BlameError, match="no loss and no gradient"):
        trainer.blame()
    trainer.seek(1, 3)
    with pytest.raises(BlameError, match="everything is finite from epoch 1, batch 3 to batch 3"):
        trainer.blame()
    trainer.seek(1)
    with pytest.raises(BlameError, match="where there is no batch"):
        trainer.blame()
    with pytest.raises(SeekError, match="no run named"):
        trainings.make(tmp_path / "none").blame()
