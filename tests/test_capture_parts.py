"""Each part of a training state on its own: what is kept, what fits, and what is said where it does not."""

import itertools
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler

from orchestrator.snapshot import capture
from orchestrator.snapshot.capture import IncompatibleStateError, UnsupportedStateError
from orchestrator.snapshot.optimizers import follow_parameters


def network(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


# --- modules ---------------------------------------------------------------------------------------------------


def test_capturing_copies_nothing_and_restoring_writes_into_live_tensors() -> None:
    model, other = network(), network()
    tree = capture.capture_module(other)
    assert tree["parameters"]["0.weight"].data_ptr() == other[0].weight.data_ptr()
    before = {name: (id(t), t.data_ptr()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    capture.restore_module(model, tree)
    assert before == {
        name: (id(t), t.data_ptr()) for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    assert torch.equal(model[0].weight, other[0].weight)
    assert model[0].weight.data_ptr() != other[0].weight.data_ptr()


def test_every_bit_is_restored() -> None:
    bits = torch.tensor([0x7FC00001, 0xFFA00002 - 2**32, -(2**31), 1, 0x7F800000], dtype=torch.int32)
    model, saved = nn.Linear(5, 1, bias=False), nn.Linear(5, 1, bias=False)
    saved.weight.data = bits.view(torch.float32)[None]
    capture.restore_module(model, capture.capture_module(saved))
    assert torch.equal(model.weight.detach().view(torch.int32)[0], bits)


def test_requires_grad_and_the_mode_of_each_module_are_restored() -> None:
    saved, model = network(), network()
    saved[0].weight.requires_grad_(False)
    saved[1].eval()
    capture.restore_module(model, capture.capture_module(saved))
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in saved.parameters()]
    assert [m.training for m in model.modules()] == [True, True, False, True]


def test_strides_of_a_parameter_are_restored_and_the_object_stays() -> None:
    saved, model = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), nn.Conv2d(2, 3, 3)
    weight = model.weight
    capture.restore_module(model, capture.capture_module(saved))
    assert model.weight is weight
    assert weight.stride() == saved.weight.stride()


def test_differences_are_listed_and_nothing_is_changed() -> None:
    saved, model = network(), nn.Sequential(nn.Linear(3, 5), nn.GroupNorm(1, 5), nn.Linear(5, 2, bias=False))
    before = [p.clone() for p in model.parameters()]
    tree = capture.capture_module(saved.to(torch.float64))
    with pytest.raises(IncompatibleStateError) as caught:
        capture.restore_module(model, tree)
    assert caught.value.differences == tuple(capture.compare_module(model, tree))
    assert set(caught.value.differences) == {
        "parameter '0.weight': checkpoint has (4, 3) float64, the model has (5, 3) float32",
        "parameter '0.bias': checkpoint has (4,) float64, the model has (5,) float32",
        "parameter '1.weight': checkpoint has (4,) float64, the model has (5,) float32",
        "parameter '1.bias': checkpoint has (4,) float64, the model has (5,) float32",
        "parameter '2.weight': checkpoint has (2, 4) float64, the model has (2, 5) float32",
        "parameter '2.bias': checkpoint has (2,) float64, the model has none",
        "buffer '1.running_mean': checkpoint has (4,) float64, the model has none",
        "buffer '1.running_var': checkpoint has (4,) float64, the model has none",
        "buffer '1.num_batches_tracked': checkpoint has () int64, the model has none",
        "module '1': checkpoint has BatchNorm1d, the model has GroupNorm",
    }
    assert all(map(torch.equal, before, model.parameters()))


def test_another_activation_or_a_layer_more_is_a_difference() -> None:
    tree = capture.capture_module(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    changed = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Dropout())
    assert capture.compare_module(changed, tree) == [
        "module '1': checkpoint has ReLU, the model has GELU",
        "module '2': checkpoint has none, the model has Dropout",
    ]


def test_extra_state_that_nobody_takes_is_a_difference() -> None:
    class Counts(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"count": 1}

        def set_extra_state(self, state: Any) -> None: ...

    tree = capture.capture_module(Counts(1, 1))
    Plain = type("Counts", (nn.Linear,), {})
    assert capture.compare_module(Plain(1, 1), tree) == [
        "module '': checkpoint has extra state, the model has no set_extra_state for it"
    ]


def test_buffers_of_torch_modules_do_not_come_and_go() -> None:
    tracked, untracked = nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)
    found = capture.compare_module(untracked, capture.capture_module(tracked))
    assert "buffer 'running_mean': checkpoint has (3,) float32, the model has None" in found
    assert capture.compare_module(tracked, capture.capture_module(untracked)) != []


def test_tied_weights_are_saved_once_and_untied_ones_are_refused() -> None:
    def model(tied: bool) -> nn.Sequential:
        made = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        if tied:
            made[1].weight = made[0].weight
        return made

    tree = capture.capture_module(model(tied=True))
    assert list(tree["parameters"]) == ["0.weight"]
    assert tree["aliases"] == {"1.weight": "0.weight"}
    assert capture.compare_module(model(tied=True), tree) == []
    untied = model(tied=False)
    assert capture.compare_module(untied, tree) == [
        "parameter '1.weight': checkpoint has it tied to '0.weight', the model has (3, 3) float32"
    ]
    assert capture.compare_module(model(tied=True), capture.capture_module(untied)) == [
        "parameter '1.weight': checkpoint has (3, 3) float32, the model has it tied to '0.weight'"
    ]


class Shares(nn.Module):
    """Two buffers that are one tensor at first, and later are not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.zeros(2))
        self.register_buffer("other", self.one)


def test_buffers_that_share_memory_are_parted_and_joined() -> None:
    saved = Shares()
    saved.other = torch.ones(2)
    parted = Shares()
    capture.restore_module(parted, capture.capture_module(saved))
    assert (parted.one.tolist(), parted.other.tolist()) == ([0, 0], [1, 1])
    capture.restore_module(parted, capture.capture_module(Shares()))
    assert parted.one is parted.other


def test_a_shared_module_is_captured_once() -> None:
    layer = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": layer, "b": layer})
    tree = capture.capture_module(model)
    assert list(tree["modes"]) == ["", "a"]
    assert tree["aliases"]["b.running_mean"] == "a.running_mean"
    capture.restore_module(model, tree)


def test_names_are_those_of_the_model_inside_torch_compile() -> None:
    saved = network()
    inner = network()
    inner[0] = torch.compile(inner[0], backend="eager")  # type: ignore[assignment]
    compiled = torch.compile(inner, backend="eager")
    tree = capture.capture_module(saved.eval())
    capture.restore_module(compiled, tree)  # type: ignore[arg-type]
    assert capture.digests({"model": tree}) == capture.digests({"model": capture.capture_module(compiled)})  # type: ignore[arg-type]
    assert not any(module.training for module in compiled.modules())  # type: ignore[attr-defined]
    assert list(capture.parameter_names(compiled).values()) == [n for n, _ in saved.named_parameters()]  # type: ignore[arg-type]


@pytest.fixture
def process_group(tmp_path: Any) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_checkpoint_fits_with_and_without_ddp(process_group: None) -> None:
    model = network().eval()
    wrapped = DistributedDataParallel(network())
    capture.restore_module(wrapped, capture.capture_module(model))
    assert not wrapped.training
    tree = capture.capture_module(wrapped)
    assert list(tree["parameters"]) == [name for name, _ in model.named_parameters()]
    capture.restore_module(model, tree)
    assert capture.unwrapped(wrapped) is wrapped.module


def test_restore_weights_leaves_modes_alone() -> None:
    saved, model = network().requires_grad_(False).eval(), network()
    capture.restore_weights(model, capture.capture_module(saved))
    assert torch.equal(model[2].bias, saved[2].bias)
    assert model.training
    assert model[2].bias.requires_grad
    with pytest.raises(IncompatibleStateError, match=r"'0.weight': checkpoint has \(4, 3\) float32"):
        capture.restore_weights(network(5), capture.capture_module(saved))


# --- gradients -------------------------------------------------------------------------------------------------


def test_no_gradient_is_not_zero_and_strides_are_kept() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(2, 2), nn.Linear(2, 2))

    saved, other = model(), model()
    saved[0].weight.grad = torch.randn(3, 2, 3, 3).to(memory_format=torch.channels_last)
    saved[1].weight.grad = torch.zeros(2, 2)
    for parameter in other[2].parameters():
        parameter.grad = torch.ones_like(parameter)
    capture.restore_gradients(other, capture.capture_gradients(saved))
    gradient = other[0].weight.grad
    assert gradient is not None
    assert gradient.stride() == saved[0].weight.grad.stride()
    assert torch.equal(gradient, saved[0].weight.grad)
    assert torch.equal(other[1].weight.grad, torch.zeros(2, 2))
    assert all(p.grad is None for p in (other[0].bias, other[1].bias, *other[2].parameters()))


def test_gradients_of_what_an_optimizer_trains_beside_the_model_are_kept() -> None:
    def build() -> tuple[nn.Module, nn.Parameter, torch.optim.Optimizer]:
        model, weight = nn.Linear(2, 1), nn.Parameter(torch.zeros(3))
        return model, weight, torch.optim.SGD([{"params": model.parameters()}, {"params": [weight]}], lr=0.1)

    model, weight, optimizer = build()
    weight.grad = torch.ones(3)
    tree = capture.capture_gradients(model, [optimizer])
    assert list(tree["optimizers"][0]) == ["optimizer/group1/param0"]
    model, weight, optimizer = build()
    capture.restore_gradients(model, tree, [optimizer])
    assert torch.equal(weight.grad, torch.ones(3))
    with pytest.raises(IncompatibleStateError, match="1 optimizers, not 0"):
        capture.restore_gradients(model, tree)


# --- optimizers ------------------------------------------------------------------------------------------------


def optimizer_of(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"lr": 0.01, **settings})


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return capture.capture_optimizer(optimizer, capture.parameter_names(model))


def test_dtypes_of_the_state_are_kept_where_load_state_dict_casts_them() -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    optimizer = torch.optim.NAdam(model.parameters())
    model(torch.randn(4, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    optimizer.state[model.weight]["exp_avg"] = torch.full((2, 3), 1 / 3)
    tree = capture.capture_optimizer(optimizer, capture.parameter_names(model))
    fresh = torch.optim.NAdam(model.parameters())
    capture.restore_optimizer(fresh, tree, capture.parameter_names(model))
    assert fresh.state[model.weight]["exp_avg"].dtype is torch.float32
    assert fresh.state[model.weight]["exp_avg_sq"].dtype is torch.bfloat16
    assert fresh.state[model.weight]["mu_product"].dtype is torch.float32


def test_live_state_is_written_in_place_and_left_over_state_is_removed() -> None:
    model = network()
    names = capture.parameter_names(model)
    fresh = capture.capture_optimizer(optimizer_of(model), names)
    optimizer = optimizer_of(model)
    tree = trained(model, optimizer)
    average = optimizer.state[model[0].weight]["exp_avg"]
    expected = average.clone()
    average.zero_()
    capture.restore_optimizer(
        optimizer, {**tree, "state": {"0.weight": {**tree["state"]["0.weight"], "exp_avg": expected}}}, names
    )
    assert optimizer.state[model[0].weight]["exp_avg"] is average
    assert torch.equal(average, expected)
    assert list(optimizer.state) == [model[0].weight]
    capture.restore_optimizer(optimizer, fresh, names)
    assert not optimizer.state


@pytest.mark.parametrize("fused", [False, True])
def test_state_that_is_there_before_the_first_update_goes_where_the_parameters_go(fused: bool) -> None:
    """As Adagrad's is, made for parameters that the trainer then moves to the device."""
    parameter = nn.Parameter(torch.ones(3, device="meta"))
    optimizer = torch.optim.Adagrad([parameter])
    optimizer.param_groups[0]["fused"] = fused
    optimizer.state[parameter] = {"step": torch.zeros(()), "sum": torch.zeros(3)}  # as it was before
    follow_parameters(optimizer)
    devices = {key: value.device.type for key, value in optimizer.state[parameter].items()}
    assert devices == {"sum": "meta", "step": "meta" if fused else "cpu"}


def test_hyperparameters_keep_their_python_types() -> None:
    model = network()
    names = capture.parameter_names(model)
    tree = capture.capture_optimizer(optimizer_of(model, lr=torch.tensor(0.5), foreach=False), names)
    from_float, from_tensor = optimizer_of(model), optimizer_of(model, lr=torch.tensor(0.1), foreach=False)
    tensor = from_tensor.param_groups[0]["lr"]
    capture.restore_optimizer(from_float, tree, names)
    capture.restore_optimizer(from_tensor, tree, names)
    assert isinstance(from_float.param_groups[0]["lr"], Tensor)
    assert from_tensor.param_groups[0]["lr"] is tensor
    assert tensor.item() == 0.5
    capture.restore_optimizer(from_float, capture.capture_optimizer(optimizer_of(model), names), names)
    assert type(from_float.param_groups[0]["lr"]) is float
    assert type(from_float.param_groups[0]["betas"]) is tuple


def test_the_checkpoint_wins_unless_overridden_and_the_difference_is_listed() -> None:
    model = network()
    names = capture.parameter_names(model)
    tree = trained(model, optimizer_of(model, weight_decay=0.1))
    changed = optimizer_of(model, lr=0.3)
    compared = capture.compare_optimizer(changed, tree, names)
    assert compared.incompatible == ()
    assert compared.hyperparameters == (
        "lr: checkpoint has 0.01, the optimizer was given 0.3",
        "weight_decay: checkpoint has 0.1, the optimizer was given 0.01",
    )
    capture.restore_optimizer(changed, tree, names, override={"lr"})
    assert changed.param_groups[0]["lr"] == 0.3
    assert changed.param_groups[0]["weight_decay"] == 0.1
    capture.restore_optimizer(changed, tree, names)
    assert changed.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.ExponentialLR(o, 0.5),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
        lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, cycle_momentum=True),
    ],
)
def test_what_a_scheduler_moved_is_no_difference(schedule: Any) -> None:
    model = network()
    names = capture.parameter_names(model)
    optimizer, same, changed = optimizer_of(model), optimizer_of(model), optimizer_of(model, eps=1e-3)
    scheduler = schedule(optimizer)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    tree = capture.capture_optimizer(optimizer, names)
    schedule(same), schedule(changed)
    assert capture.compare_optimizer(same, tree, names).hyperparameters == ()
    assert capture.compare_optimizer(changed, tree, names).hyperparameters == (
        "eps: checkpoint has 1e-08, the optimizer was given 0.001",
    )


def test_a_learning_rate_moved_by_hand_is_no_difference() -> None:
    model = network()
    names = capture.parameter_names(model)
    optimizer = optimizer_of(model)
    optimizer.param_groups[0]["lr"] *= 0.5
    tree = capture.capture_optimizer(optimizer, names)
    assert capture.compare_optimizer(optimizer_of(model), tree, names).hyperparameters == ()


def test_another_optimizer_other_groups_or_parameters_are_refused() -> None:
    model = network()
    names = capture.parameter_names(model)
    tree = trained(model, optimizer_of(model))
    parameters = list(model.parameters())
    sgd = torch.optim.SGD(parameters, lr=0.1)
    assert capture.compare_optimizer(sgd, tree, names).incompatible == (
        "optimizer: checkpoint has AdamW, the trainer has SGD",
    )
    groups = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}])
    assert capture.compare_optimizer(groups, tree, names).incompatible == (
        "optimizer AdamW: checkpoint has 1 parameter groups, the trainer's has 2",
    )
    fewer = torch.optim.AdamW(parameters[1:])
    with pytest.raises(IncompatibleStateError, match=r"only the checkpoint's has '0\.weight'"):
        capture.restore_optimizer(fewer, tree, names)
    more = torch.optim.AdamW([*parameters, nn.Parameter(torch.ones(1))])
    assert capture.compare_optimizer(more, tree, names).incompatible == (
        "optimizer AdamW, parameter group 0: only the trainer's has 'optimizer/group0/param6'",
    )


def test_lbfgs_and_optimizers_with_hidden_state_are_refused() -> None:
    class Wrapped(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "slow_weights": []}

    model = network()
    names = capture.parameter_names(model)
    with pytest.raises(UnsupportedStateError, match="LBFGS evaluates the model several times"):
        capture.capture_optimizer(torch.optim.LBFGS(model.parameters()), names)
    with pytest.raises(UnsupportedStateError, match="Wrapped has a state_dict of its own"):
        capture.capture_optimizer(Wrapped(model.parameters()), names)


def test_state_of_a_tensor_without_a_name_is_refused() -> None:
    model = network()
    optimizer = optimizer_of(model)
    optimizer.state[torch.zeros(1)] = {"step": 1}
    with pytest.raises(UnsupportedStateError, match="AdamW has state of a tensor that is in none"):
        capture.capture_optimizer(optimizer, capture.parameter_names(model))


# --- schedulers and scalers ------------------------------------------------------------------------------------


def scheduled(schedule: Any) -> Any:
    return schedule(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))


def test_a_scheduler_is_captured_without_functions_and_copies_its_containers() -> None:
    scheduler = scheduled(lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step))
    tree = capture.capture_scheduler(scheduler)
    assert tree["state"]["lr_lambdas"] == [None]
    assert tree["state"]["_last_lr"] is not scheduler._last_lr
    capture.digests({"scheduler": tree})  # raises for what is no plain value


def test_another_scheduler_is_refused_and_other_settings_are_listed() -> None:
    tree = capture.capture_scheduler(scheduled(lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5)))
    other = scheduled(lambda o: lr_scheduler.ExponentialLR(o, 0.5))
    with pytest.raises(IncompatibleStateError, match="checkpoint has StepLR, the trainer has ExponentialLR"):
        capture.restore_scheduler(other, tree)
    changed = scheduled(lambda o: lr_scheduler.StepLR(o, 4, gamma=0.5))
    for _ in range(2):
        changed.optimizer.step()
        changed.step()
    assert capture.compare_scheduler(changed, tree).hyperparameters == (
        "step_size of StepLR: checkpoint has 3, the scheduler was given 4",
    )
    three = scheduled(
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, g) for g in (0.5, 0.6)], o)
    )
    one = scheduled(lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.5)], o))
    assert capture.compare_scheduler(one, capture.capture_scheduler(three)).incompatible == (
        "scheduler ChainedScheduler: checkpoint has 2 inside, the trainer's has 1",
    )


def test_what_a_users_scheduler_moves_by_itself_is_not_taken_for_what_it_was_given() -> None:
    class Jagged(torch.optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer: torch.optim.Optimizer, period: int) -> None:
            self.period, self.peak = period, 1.0
            super().__init__(optimizer)

        def get_lr(self) -> list[float]:
            self.peak *= 0.5
            return [base * self.peak for base in self.base_lrs]

    def jagged(period: int) -> Jagged:
        return Jagged(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), period)

    stepped = jagged(3)
    stepped.optimizer.step()
    stepped.step()
    tree = capture.capture_scheduler(stepped)
    assert capture.compare_scheduler(jagged(3), tree).hyperparameters == ()
    assert capture.compare_scheduler(jagged(4), tree).hyperparameters == (
        f"period of {Jagged.__qualname__}: checkpoint has 3, the scheduler was given 4",
    )


def test_a_scaler_keeps_its_scale_and_growth() -> None:
    scaler, fresh = torch.amp.GradScaler("cpu", growth_interval=2), torch.amp.GradScaler("cpu")
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    for factor in (float("inf"), 1.0, 1.0, 1.0):
        scaler.scale(parameter.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    capture.restore_scaler(fresh, capture.capture_scaler(scaler))
    assert capture.capture_scaler(fresh) == capture.capture_scaler(scaler)
    assert fresh.get_scale() == 65536.0
    assert fresh._get_growth_tracker() == 1
    off = torch.amp.GradScaler("cpu", enabled=False)
    capture.restore_scaler(off, capture.capture_scaler(off))
    with pytest.raises(IncompatibleStateError, match="the scaler is enabled, the checkpoint's was off"):
        capture.restore_scaler(fresh, capture.capture_scaler(off))


# --- random states and flags -----------------------------------------------------------------------------------


def draws() -> list[float]:
    drawn = [random.random(), random.gauss(0, 1), float(np.random.randn()), float(torch.randn(()))]
    return [*drawn, float(torch.rand(3).sum()), float(np.random.rand())]


def test_random_states_are_restored_with_the_cached_gaussians() -> None:
    random.gauss(0, 1), np.random.randn()  # each leaves the second of two draws for later
    tree = capture.capture_random()
    expected = draws()
    draws()
    capture.restore_random(tree)
    assert draws() == expected


def test_another_bit_generator_of_numpy_is_restored() -> None:
    original = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        tree = capture.capture_random()
        expected = np.random.rand(4).tolist()
        np.random.set_bit_generator(np.random.MT19937(1))
        capture.restore_random(tree)
        assert np.random.rand(4).tolist() == expected
    finally:
        np.random.set_bit_generator(original)


def test_a_device_that_is_not_there_is_warned_of() -> None:
    tree = {**capture.capture_random(), "devices": {"cuda:99": torch.zeros(16, dtype=torch.uint8)}}
    with pytest.warns(UserWarning, match="random state of cuda:99 cannot be restored"):
        capture.restore_random(tree)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture.restore_random(capture.capture_random(["cpu"]))


def test_flags_that_differ_are_named_with_both_values() -> None:
    saved = capture.numeric_flags()
    assert capture.compare_flags(saved) == []
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = not saved["cudnn.benchmark"]
        torch.set_default_dtype(torch.float64)
        found = capture.compare_flags(saved)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = saved["cudnn.benchmark"]
        torch.set_default_dtype(torch.float32)
    assert f"threads: it was {threads}, now it is {threads + 1}" in found
    assert "deterministic algorithms: it was False, now it is True" in found
    assert "float32 matmul precision: it was 'highest', now it is 'high'" in found
    assert "default dtype: it was 'float32', now it is 'float64'" in found
    assert any(flag.startswith("cudnn.benchmark") for flag in found)
    assert capture.compare_flags(saved) == []


# --- digests ---------------------------------------------------------------------------------------------------

CHANNELS_LAST = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)

DISTINCT = [
    torch.tensor([0.0]),
    torch.tensor([-0.0]),
    torch.tensor([0.0], dtype=torch.float64),
    torch.tensor(0.0),
    torch.zeros(1, 1),
    torch.tensor([float("nan")]),
    torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32),
    torch.zeros(0),
    torch.zeros(0, 2),
    torch.tensor([False]),
    torch.zeros(1, dtype=torch.bfloat16),
    torch.zeros(1, dtype=torch.complex64),
    CHANNELS_LAST,
    CHANNELS_LAST.contiguous(),
    torch.zeros(1).expand(3),
    torch.zeros(3),
    *(0, 0.0, -0.0, False, None, "", "0", b"0", "None", float("nan"), float("inf"), 0j, 2**70),
    *([], (), {}, set(), [0], (0,), {0}, {0: 0}, {"0": 0}, [[], [0]], [[0], []], [1, 23], [12, 3]),
    *(torch.float32, torch.device("cpu"), torch.Size([0])),
    *(np.float32(0), np.float64(0), np.zeros(1), np.zeros((1, 1)), np.zeros(2, dtype=np.float32)),
]


@pytest.mark.parametrize("place", ["top", "inside"])
def test_whatever_differs_has_another_digest(place: str) -> None:
    trees = [{"a": value} if place == "top" else {"a": {"b": [value]}} for value in DISTINCT]
    found = [capture.digests(tree) for tree in trees]
    for (i, one), (j, other) in itertools.combinations(enumerate(found), 2):
        assert one != other, (DISTINCT[i], DISTINCT[j])


def test_the_same_values_in_other_memory_have_the_same_digest() -> None:
    conjugate = torch.tensor([1 + 2j]).conj()
    for value in [*DISTINCT, conjugate]:
        if isinstance(value, Tensor):
            if 0 in value.stride() and value.numel() > 1:
                same = value[:1].clone().expand(value.shape)
            else:
                same = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
            assert capture.digests({"a": value}) == capture.digests({"a": same})
    assert capture.digests({"a": {"x": 1, "y": 2}}) == capture.digests({"a": {"y": 2, "x": 1}})


def test_the_first_difference_is_named() -> None:
    model = network()
    tree = {"model": capture.capture_module(model), "epoch": {"elapsed": 1.0, "skips": 0}}
    before = capture.digests(tree)
    assert capture.first_difference(before, capture.digests(tree)) is None
    with torch.no_grad():
        model[2].weight[0, 0] += 1
    assert capture.first_difference(before, capture.digests(tree)) == "model/parameters/2.weight"
    missing = {key: digest for key, digest in before.items() if key != "model/buffers/1.running_var"}
    assert capture.first_difference(before, missing) == "model/buffers/1.running_var"
    assert capture.first_difference(missing, before) == "model/buffers/1.running_var"


def test_ignored_paths_are_left_out() -> None:
    def found(elapsed: float, skips: int, weight: Tensor) -> dict[str, str]:
        tree = {"epoch": {"elapsed": elapsed, "skips": skips}, "ema": {"weight": weight}}
        return capture.digests(tree, ignore=("epoch/elapsed", "ema"))

    assert found(1.0, 0, torch.ones(1)) == found(2.0, 0, torch.zeros(1))
    assert found(1.0, 0, torch.ones(1)) != found(1.0, 1, torch.ones(1))


def test_what_is_no_training_state_is_named() -> None:
    with pytest.raises(UnsupportedStateError, match="callbacks/ema/0 is a function"):
        capture.digests({"callbacks": {"ema": [draws]}})


# --- metrics ---------------------------------------------------------------------------------------------------


class Mean:
    """A metric as people write them: plain attributes."""

    def __init__(self) -> None:
        self.total = torch.zeros(())
        self.seen: list[Tensor] = []
        self.count = 0
        self.transform = torch.abs

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.total += self.transform(outputs - targets).sum()
        self.seen.append(targets)
        self.count += len(outputs)

    def compute(self) -> Tensor:
        return self.total / self.count + torch.cat(self.seen).sum()

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]


class Loads(Mean):
    """One whose attributes say nothing, with state_dict and load_state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.opaque = object()

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "seen": self.seen, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.seen, self.count = state["total"], state["seen"], state["count"]


class InModule(nn.Module):
    """A module that counts in a plain attribute and in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))
        self.count = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.total += (outputs - targets).abs().sum()
        self.count += len(outputs)

    def compute(self) -> Tensor:
        return self.total / self.count

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]


def torchmetrics_kinds() -> dict[str, Any]:
    # Here, as importing it is slow.
    from torchmetrics import CatMetric, MeanMetric, MeanSquaredError, MetricCollection, PearsonCorrCoef
    from torchmetrics.wrappers import MinMaxMetric, Running

    class Concatenates(CatMetric):
        def update(self, outputs: Tensor, targets: Tensor) -> None:
            super().update(outputs - targets)

        def compute(self) -> Tensor:
            return super().compute().double().std()

    class RunningMean(Running):
        def update(self, outputs: Tensor, targets: Tensor) -> None:
            super().update(outputs - targets)

    return {
        "tensors": MeanSquaredError,
        "list": Concatenates,
        "several states": PearsonCorrCoef,
        "collection": lambda: MetricCollection([MeanSquaredError(), PearsonCorrCoef()]),
        "grouped": lambda: MetricCollection({"a": MeanSquaredError(), "b": MeanSquaredError(squared=False)}),
        "wrapper": lambda: MinMaxMetric(MeanSquaredError()),
        "running": lambda: RunningMean(MeanMetric(), window=2),
    }


OWN = {"attributes": Mean, "state_dict": Loads, "module": InModule}
KINDS = ["tensors", "list", "several states", "collection", "grouped", "wrapper", "running", *OWN]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("used", [False, True])
def test_a_metric_goes_on_in_mid_epoch(kind: str, before: int, used: bool) -> None:
    make = OWN[kind] if kind in OWN else torchmetrics_kinds()[kind]
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 5, generator=generator) for _ in range(6)]
    unbroken, resumed = make(), make()
    for batch in batches[:before]:
        unbroken.update(*batch)
    tree = capture.capture_metric(unbroken)
    if used:
        for _ in range(2):
            resumed.update(torch.ones(5), torch.arange(5.0))
    captured = capture.digests(tree)
    capture.restore_metric(resumed, tree)
    assert capture.digests(capture.capture_metric(resumed)) == captured
    for metric in (unbroken, resumed):
        if before:
            metric.compute()
        for batch in batches[before:]:
            metric.update(*batch)
    expected, found = unbroken.compute(), resumed.compute()
    if isinstance(expected, Tensor):
        expected, found = {"": expected}, {"": found}
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert expected.keys() == found.keys()


def test_a_metric_inside_the_model_is_captured_with_it() -> None:
    from torchmetrics import MeanMetric

    saved, model = (nn.ModuleDict({"layer": nn.Linear(1, 1), "metric": MeanMetric()}) for _ in range(2))
    saved["metric"].update(torch.tensor([1.0, 4.0]))  # type: ignore[operator]
    capture.restore_module(model, capture.capture_module(saved))
    assert model["metric"].compute() == 2.5  # type: ignore[operator]


def test_a_metric_whose_state_cannot_be_seen_or_does_not_fit_is_refused() -> None:
    class Opaque(Mean):
        def __init__(self) -> None:
            super().__init__()
            self.helper = random.Random(1)

    with pytest.raises(
        UnsupportedStateError, match=r"Opaque\.helper is a Random.*give the metric state_dict"
    ):
        capture.capture_metric(Opaque())
    from torchmetrics import MeanMetric, SumMetric

    with pytest.raises(IncompatibleStateError, match="the metric has no state 'weight'"):
        capture.restore_metric(SumMetric(), capture.capture_metric(MeanMetric()))
    with pytest.raises(IncompatibleStateError, match="checkpoint has its attributes, the metric has states"):
        capture.restore_metric(SumMetric(), capture.capture_metric(Mean()))
