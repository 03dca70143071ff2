"""Precision, clipping, and what happens to values that are not finite."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import trainings
from orchestrator import Checkpointing, NonFiniteError, seed_everything
from orchestrator.errors import NonFiniteAgainError
from orchestrator.numerics import norm, zero
from states import State, Trigger
from tracking.journal import Journal


def poisoned(*positions: int, value: float = math.nan):
    batches = list(trainings.loader(shuffle=False))
    for position in positions:
        inputs, targets = batches[position]
        batches[position] = (torch.full_like(inputs, value), targets)
    return batches


def notes(trainer) -> list[tuple[int, str]]:
    with Journal.open(trainer.run) as journal:
        return [
            (r.batch, r.note)
            for r in journal.transitions(scope="train")
            if r.trigger is Trigger.STEP and r.note
        ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_halting_leaves_the_weights_from_before_and_saves_nothing(value: float, tmp_path: Path) -> None:
    trainer = trainings.make(
        tmp_path,
        train_loader=poisoned(3, value=value),
        checkpoint=Checkpointing(every_batches=1, keep_last=99),
    )
    before: dict[int, dict[str, torch.Tensor]] = {}
    trainer.after(Trigger.END_BATCH)(lambda: before.update({trainer.batch: parameters(trainer)}))
    with pytest.raises(NonFiniteError, match="epoch 0, batch 3") as caught:
        trainer.fit()
    error = caught.value
    assert (error.epoch, error.batch) == (0, 3)
    assert not math.isfinite(error.loss)
    assert error.statistics["4.weight"] == 24
    assert trainer.state is State.HALTED
    trainings.assert_equal(parameters(trainer), before[2])
    with Journal.open(trainer.run) as journal:
        last = list(journal.transitions(scope="train"))[-1]
        assert (last.source, last.batch) == (State.STEP, 3)
        assert "resume goes back to" in last.note
        assert max(c.batch for c in journal.checkpoints()) == 2
        assert journal.attempts()[-1].outcome == "failed"
        (message,) = [r.message for r in journal.logs() if "non-finite" in r.message]
        assert "'4.weight': 24" in message
    with pytest.raises(NonFiniteAgainError, match="only meet it again"):
        trainings.make(tmp_path, train_loader=poisoned(3, value=value)).fit(resume="auto")
    # By another road it goes on: from the checkpoint before, leaving that batch out.
    again = trainings.make(tmp_path, train_loader=poisoned(3, value=value), nonfinite="skip")
    assert again.fit(resume="auto").state is State.DONE


def parameters(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_skipping_is_as_if_the_batch_had_not_been(tmp_path: Path) -> None:
    """Weights, optimizer, BatchNorm statistics and per-batch schedules pass over it."""
    clean = poisoned()
    del clean[3]
    found = []
    for batches in (poisoned(3), clean):
        seed_everything(3)
        trainer = trainings.make(
            tmp_path,
            model=trainings.network(dropout=0.0),
            seed=3,
            train_loader=batches,
            epochs=1,
            nonfinite="skip",
        )
        result = trainer.fit()
        weights = trainings.weights(trainer)
        weights.pop("1.num_batches_tracked")  # counts the forward pass that was made
        found.append((weights, trainer.updates, result.history[-1]))
    (skipping, updates, values), (without, expected, reference) = found
    trainings.assert_equal(skipping, without)
    assert updates == expected == 5
    assert values["skipped"] == 1
    assert values["loss"] == reference["loss"]
    assert "skipped" not in reference


def test_the_window_is_the_unit_of_skipping(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, train_loader=poisoned(2), epochs=1, accumulate=2, nonfinite="skip")
    trainer.fit()
    assert trainer.updates == 2
    assert notes(trainer) == [(3, "skipped: non-finite loss")]


def test_non_finite_gradients_under_a_finite_loss(tmp_path: Path) -> None:
    def forward(model, batch):
        outputs = model(batch[0])
        loss = nn.functional.cross_entropy(outputs, batch[1])
        if trainer.batch == 1:
            outputs.register_hook(lambda gradient: gradient * math.inf)
        return loss

    trainer = trainings.make(tmp_path, forward=forward, epochs=1, nonfinite="skip")
    trainer.fit()
    assert notes(trainer) == [(1, "skipped: non-finite gradient")]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_norm_that_overflows_is_taken_again_in_double() -> None:
    total, _ = norm([torch.full((4,), 3e38)])
    assert float(total) == pytest.approx(6e38)


def test_bf16_computes_in_bfloat16_and_keeps_fp32_weights(tmp_path: Path) -> None:
    seen = []

    def forward(model, batch):
        outputs = model(batch[0])
        seen.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs, batch[1])

    trainer = trainings.make(tmp_path, forward=forward, precision="bf16", epochs=1)
    trainer.fit()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_fp16_scales_and_lowers_the_scale_when_it_overflows(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path, precision="fp16", epochs=4, nonfinite="halt")
    scaler = trainer._training.work.precision.scalers[0]
    with torch.no_grad():
        scaler._lazy_init_scale_growth_tracker(trainer.device) if scaler._scale is None else None
        scaler._scale.fill_(2.0**40)
    trainer.fit()
    assert trainer.state is State.DONE
    skipped = notes(trainer)
    assert skipped
    assert all("scaler" in note for _, note in skipped)
    assert trainer.updates == 24 - len(skipped)
    assert scaler.get_scale() == 2.0 ** (40 - len(skipped))


def test_clipping_bounds_the_norm(tmp_path: Path) -> None:
    norms = []
    trainer = trainings.make(tmp_path, clip_grad_norm=1e-3, epochs=1)

    @trainer.after(Trigger.STEP)
    def _look() -> None:
        norms.append(norm([p.grad for p in trainer.model.parameters()])[1])

    history = trainer.fit().history
    assert max(norms) <= 1e-3 * (1 + 1e-5)
    assert history[-1]["grad_norm"] > 1e-2  # what is reported is the norm before clipping


@pytest.mark.parametrize(
    "kinds", [[torch.float32], [torch.float64], [torch.bfloat16], [torch.float32, torch.bfloat16]]
)
def test_the_norm_is_that_of_torch_bit_for_bit(kinds: list[torch.dtype]) -> None:
    for size in range(1, 60):
        grads = [
            torch.randn(size, number + 1).to(kinds[number % len(kinds)]) for number in range(size % 7 + 1)
        ]
        assert torch.equal(norm(grads)[0], torch.nn.utils.get_total_norm(grads))


class _Forgetful(torch.optim.SGD):
    """Its gradients are set to zero, not to None."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none=False)


def test_gradients_are_forgotten_as_the_optimizer_forgets_them() -> None:
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    zero(_Forgetful(model.parameters(), lr=0.1))
    assert [bool(parameter.grad.any()) for parameter in model.parameters()] == [False, False]
    patched, calls = torch.optim.SGD(model.parameters(), lr=0.1), []
    patched.zero_grad = lambda set_to_none: calls.append(set_to_none)
    zero(patched)
    assert calls == [True]
    zero(torch.optim.SGD(model.parameters(), lr=0.1))
    assert [parameter.grad for parameter in model.parameters()] == [None, None]
