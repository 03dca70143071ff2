"""Precision, clipping, and what happens to values that are not finite."""

import contextlib
import functools
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import trainings
from orchestrator import Checkpointing, NonFiniteError, seed_everything
from orchestrator.errors import NonFiniteAgainError
from orchestrator.numerics import backward, norm, norm_to_clip, together, update, zero
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
    total, _ = norm_to_clip([torch.full((4,), 3e38)])
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
        norms.append(norm(trainer.optimizers[0]))

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
        assert torch.equal(norm_to_clip(grads)[0], torch.nn.utils.get_total_norm(grads))


@pytest.mark.parametrize(
    "kinds", [[torch.float32], [torch.float64], [torch.bfloat16], [torch.float32, torch.bfloat16]]
)
@pytest.mark.parametrize("size", [3, 40, 300])
def test_the_norm_that_nobody_clips_by_is_the_same_but_for_rounding(
    kinds: list[torch.dtype], size: int
) -> None:
    grads = [torch.randn(size, size + number).to(kinds[number % len(kinds)]) for number in range(4)]
    found = norm(optimizer_of(grads))
    coarsest = max(torch.finfo(kind).eps for kind in kinds)
    exact = torch.nn.utils.get_total_norm([grad.double() for grad in grads]).item()
    assert found == pytest.approx(exact, rel=4 * coarsest)
    assert norm(optimizer_of([grad.T for grad in grads])) == pytest.approx(exact, rel=4 * coarsest)
    assert norm(optimizer_of([*grads, None])) == pytest.approx(exact, rel=4 * coarsest)
    assert norm(optimizer_of([grads[0]], [grads[1]], grads[2:])) == pytest.approx(exact, rel=4 * coarsest)
    assert not math.isfinite(norm(optimizer_of([*grads, torch.tensor([math.nan])])))
    assert not math.isfinite(norm(optimizer_of([*grads, torch.tensor([-math.inf])])))
    huge = [torch.full((size * size,), 1e30)] * 2
    assert norm(optimizer_of(huge)) == pytest.approx(1e30 * (2 * size * size) ** 0.5)


def optimizer_of(*groups: list[torch.Tensor | None]) -> torch.optim.Optimizer:
    """An optimizer of parameters with these gradients."""
    found = []
    for grads in groups:
        parameters = [nn.Parameter(torch.zeros(1 if grad is None else grad.shape)) for grad in grads]
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                parameter.data = parameter.data.to(grad.dtype)
            parameter.grad = grad
        found.append({"params": parameters})
    return torch.optim.SGD(found, lr=0.1)


def test_scalars_of_several_types_lose_nothing_together() -> None:
    values = [torch.tensor(1.0 + 2**-7).bfloat16(), torch.tensor(1 / 3), torch.tensor(1 / 7).double()]
    for taken, kind in ((values[:1], torch.float32), (values[:2], torch.float32), (values, torch.float64)):
        found = together(taken)
        assert found.dtype is kind
        assert found.tolist() == [value.item() for value in taken]


def test_the_norm_of_sparse_gradients() -> None:
    grads = [torch.randn(3, 4), torch.sparse_coo_tensor([[1, 1, 4]], torch.ones(3, 2), (6, 2))]
    assert norm(optimizer_of(grads)) == pytest.approx((grads[0].square().sum() + 2 * 4 + 2).sqrt().item())


def test_nothing_has_a_norm_of_zero() -> None:
    assert norm(optimizer_of([None, None])) == 0.0


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_backward_is_that_of_torch(shape: tuple[int, ...]) -> None:
    def gradients_by(run) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
        run(model(torch.randn(4, 5)).exp().mean().reshape(shape))
        return [parameter.grad for parameter in model.parameters()]

    ours, theirs = gradients_by(backward), gradients_by(torch.Tensor.backward)
    assert all(map(torch.equal, ours, theirs))
    weight = nn.Parameter(torch.tensor(3.0))
    backward(weight)  # the loss itself a parameter
    backward(weight)
    assert weight.grad == 2.0


def test_a_backward_that_somebody_has_replaced_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    of_tensor, of_autograd = torch.Tensor.backward, torch.autograd.backward
    plain = nn.Parameter(torch.ones(()))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", lambda loss: [calls.append("tensor"), of_tensor(loss)])
        backward(plain * 2)
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.autograd, "backward", lambda *a, **k: [calls.append("autograd"), of_autograd(*a, **k)]
        )
        backward(plain * 2)
    assert calls == ["tensor", "autograd"]
    backward((plain * 2).as_subclass(Own))
    assert of_tensor in calls
    assert plain.grad == 6.0


def _optimized(prepare, run) -> tuple[list[str], list[torch.Tensor]]:
    """What was called, and the weights, after two updates by `run` of an optimizer that `prepare` has changed."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    calls: list[str] = []
    with contextlib.ExitStack() as undo:
        prepare(optimizer, calls, undo)
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            run(optimizer)
    return calls, [parameter.detach() for parameter in model.parameters()]


def _with_nothing(optimizer, calls, undo) -> None:
    pass


def _with_hooks(optimizer, calls, undo) -> None:
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))


def _with_a_global_hook(optimizer, calls, undo) -> None:
    undo.callback(register_optimizer_step_pre_hook(lambda *_: calls.append("before all")).remove)
    undo.callback(register_optimizer_step_post_hook(lambda *_: calls.append("after all")).remove)


def _with_a_scheduler(optimizer, calls, undo) -> None:
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # puts a step of its own on the optimizer
    undo.callback(lambda: calls.append(f"known to be updated: {optimizer._opt_called}"))


def _with_a_step_of_its_own(optimizer, calls, undo) -> None:
    step = optimizer.step
    optimizer.step = lambda: [calls.append("its own"), step()]


def _with_a_wrapped_class(optimizer, calls, undo) -> None:
    step = torch.optim.SGD.step

    @functools.wraps(step)
    def wrapped(self):
        calls.append("of the class")
        return step(self)

    torch.optim.SGD.step = wrapped
    undo.callback(setattr, torch.optim.SGD, "step", step)


def _with_a_profiler(optimizer, calls, undo) -> None:
    profile = torch.profiler.profile()
    undo.callback(
        lambda: calls.extend(e.name for e in profile.events() if e.name.startswith("Optimizer.step"))
    )
    undo.enter_context(profile)


@pytest.mark.parametrize(
    "prepare",
    [
        _with_nothing,
        _with_hooks,
        _with_a_global_hook,
        _with_a_scheduler,
        _with_a_step_of_its_own,
        _with_a_wrapped_class,
        _with_a_profiler,
    ],
)
def test_an_update_is_the_optimizers_step_with_all_that_hangs_on_it(prepare) -> None:
    ours, theirs = _optimized(prepare, update), _optimized(prepare, lambda optimizer: optimizer.step())
    assert ours[0] == theirs[0]
    assert bool(ours[0]) is (prepare is not _with_nothing)
    assert all(map(torch.equal, ours[1], theirs[1]))


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
