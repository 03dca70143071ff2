"""Precision, gradient norms and clipping, and what is not finite."""

from __future__ import annotations

import functools
import inspect
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import _set_grad_enabled
from torch.autograd.graph import _engine_run_backward
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    _use_grad_for_differentiable,
)
from torch.overrides import has_torch_function_unary

from orchestrator.errors import ConfigurationError

__all__ = [
    "PRECISIONS",
    "BufferGuard",
    "Precision",
    "backward",
    "can_suppress",
    "clip",
    "flag_nonfinite",
    "gradients",
    "late_norms",
    "nonfinite_counts",
    "norm",
    "norm_to_clip",
    "norms",
    "rescale",
    "step_unless",
    "together",
    "update",
    "zero",
]

PRECISIONS: Mapping[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast for the forward pass and, for fp16, a gradient scaler for each phase.

    "fp32" computes in the types of the model; "bf16" and "fp16" run `forward` under `torch.autocast`.
    """

    def __init__(self, name: str, device: torch.device, phases: int) -> None:
        self.name = name
        self._device = device.type
        self._dtype = PRECISIONS[name]
        self.scalers: tuple[torch.amp.GradScaler | None, ...] = (None,) * phases
        if name == "fp16":
            if device.type == "cpu" and not _computes_in_half():
                raise ConfigurationError(
                    'precision="fp16" needs an accelerator, or a build of torch whose CPU kernels compute in '
                    'float16; this one has none: use "bf16" or "fp32"'
                )
            self.scalers = tuple(torch.amp.GradScaler(device.type) for _ in range(phases))

    def apply(self, forward: Callable[[Any, Any], Any], model: nn.Module, batch: Any) -> Any:
        """What `forward` returns for `model` and `batch`, in this precision."""
        if self._dtype is None:
            return forward(model, batch)
        with torch.autocast(self._device, dtype=self._dtype):
            return forward(model, batch)


def _computes_in_half() -> bool:
    try:
        with torch.autocast("cpu", dtype=torch.float16):
            torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))
    except RuntimeError:
        return False
    return True


def gradients(optimizer: Optimizer) -> list[Tensor]:
    """The gradients that `optimizer` would apply, each as a dense tensor that shares their memory."""
    found: list[Tensor] = []
    for group in optimizer.param_groups:
        grads = list(map(_grad, group["params"]))
        if set(map(type, grads)) == _PLAIN and not any(map(_is_sparse, grads)):
            found += grads
            continue
        for parameter, grad in zip(group["params"], grads, strict=True):
            if grad is None:
                continue
            if grad.is_sparse:
                parameter.grad = grad.coalesce()
                grad = parameter.grad._values()
            found.append(grad)
    return found


_grad, _is_sparse = attrgetter("grad"), attrgetter("is_sparse")


def norm(optimizer: Optimizer) -> float:
    """The 2-norm over the gradients of `optimizer`, in their own precision.

    What takes the least time, so its last bits may differ from `norm_to_clip`'s, which is taken where it overflows.
    """
    value = _norm_in_place(optimizer)
    return norm_to_clip(gradients(optimizer))[1] if value is None else value


def norm_to_clip(grads: list[Tensor]) -> tuple[Tensor, float]:
    """The 2-norm over all gradients, in their own precision: bit for bit `torch.nn.utils.get_total_norm`.

    As a tensor without dimensions, and as a number. Where it overflows though every gradient is finite, it is taken
    again in double precision.
    """
    if not grads:
        return torch.zeros(()), 0.0
    total, _ = norms(grads, to_clip=True)
    value = total.item()
    if not math.isfinite(value):
        total = torch.nn.utils.get_total_norm([grad.double() for grad in grads])
        value = total.item()
    return total, value


def _norm_in_place(optimizer: Optimizer) -> float | None:
    """The norm of plain dense gradients of single precision on the processor; None of others, or where it overflows."""
    grads: list[Tensor] = []
    for group in optimizer.param_groups:
        grads += map(_grad, group["params"])
    if set(map(type, grads)) != _PLAIN or not grads[0].is_cpu:
        return None
    square = _square_of_few(grads)
    if square is not None:  # rounded, to be what `_norm_of_few` finds
        found: float = _SINGLE.unpack(_SINGLE.pack(math.sqrt(square.item())))[0]
        return found if math.isfinite(found) else None
    squares = 0.0
    try:
        for grad in grads:
            if grad.dtype is not torch.float32:
                return None
            flat = grad.view(-1)
            squares += flat.dot(flat).item()
    except RuntimeError:  # sparse, or not contiguous
        return None
    return math.sqrt(squares) if math.isfinite(squares) else None


_SINGLE = struct.Struct("f")


def norms(grads: list[Tensor], *, to_clip: bool) -> tuple[Tensor, Tensor | None]:
    """The 2-norm over all gradients (there is one at least), and, where they are alike, that of each.

    Tensors where the gradients are, of no dimension and of one: nothing is waited for. `to_clip` as in `norm`.
    """
    total = None if to_clip else _norm_of_few(grads)
    if not _alike(grads):
        return torch.nn.utils.get_total_norm(grads) if total is None else total, None
    # What get_total_norm does for them, which spends three times as long on finding that out.
    each = torch.stack(torch._foreach_norm(grads))
    return torch.linalg.vector_norm(each) if total is None else total, each


def late_norms(grads: list[Tensor], *, to_clip: bool) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The 2-norm of each gradient (there is one at least), or none where they are not alike, and that over all.

    The latter is None where that of each says it, and it is not needed `to_clip`: `math.hypot` of them is it. Scalars
    where the gradients are, of one type, from as few of the device's operations as can be.
    """
    if grads[0].is_cuda and _alike(grads):
        of_each = tuple(torch._foreach_norm(grads))
        return of_each, torch.linalg.vector_norm(torch.stack(of_each)) if to_clip else None
    total, each = norms(grads, to_clip=to_clip)
    return () if each is None else each.unbind(), total


def _norm_of_few(grads: list[Tensor]) -> Tensor | None:
    """The norm of plain tensors of which there is a `_square_of_few`; None of others."""
    square = _square_of_few(grads) if set(map(type, grads)) == _PLAIN else None
    # A square root in single precision is not rounded right where MKL's is taken, so not what `_norm_in_place` finds.
    return None if square is None else square.double().sqrt_().float()


def _square_of_few(grads: list[Tensor]) -> Tensor | None:
    """The square of the norm of tensors of one device and single precision, so few that they are soon copied into one.

    None of others.
    """
    if sum(map(Tensor.numel, grads)) > _FEW:
        return None
    try:
        together: Tensor = torch._C._nn.flatten_dense_tensors(grads)
    except RuntimeError:  # sparse, or of several devices
        return None
    return together.dot(together) if together.dtype is torch.float32 else None


_FEW, _PLAIN = 2**15, {Tensor}


def _alike(grads: list[Tensor]) -> bool:
    """Whether all are plain tensors of one device and type, for which torch has operations on lists."""
    device, dtype = grads[0].device, grads[0].dtype
    return device.type in ("cpu", "cuda") and all(
        type(grad) is Tensor and grad.device == device and grad.dtype == dtype for grad in grads
    )


def zero(optimizer: Optimizer) -> None:
    """Set the gradients of `optimizer` to None, as its `zero_grad` does, which takes as long as a small layer."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(optimizer):
        optimizer.zero_grad(set_to_none=True)
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def backward(loss: Tensor) -> None:
    """`loss.backward()`, less what torch asks on the way there of a plain scalar: as much as a small layer takes."""
    if (
        type(loss) is Tensor
        and loss.ndim == 0
        and Tensor.backward is _TENSOR_BACKWARD
        and torch.autograd.backward is _AUTOGRAD_BACKWARD
        and not has_torch_function_unary(loss)
    ):
        _engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    else:
        loss.backward()  # type: ignore[no-untyped-call]


_TENSOR_BACKWARD, _AUTOGRAD_BACKWARD = Tensor.backward, torch.autograd.backward


def update(optimizer: Optimizer) -> None:
    """`optimizer.step()`, less what every optimizer's is wrapped in for a profiler and for hooks, if there are none."""
    within = _within(type(optimizer).step)
    if (
        within is None
        or "step" in vars(optimizer)
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or _profiler_enabled()
    ):
        optimizer.step()
        return
    step, sets_grad = within
    if not sets_grad:
        step(optimizer)
        return
    before = is_grad_enabled()
    _set_grad_enabled(optimizer.defaults["differentiable"])
    try:
        step(optimizer)
    finally:
        _set_grad_enabled(before)


@functools.cache
def _within(step: Any) -> tuple[Callable[[Optimizer], object], bool] | None:
    """What torch's wrappers of an optimizer's `step` call, and whether one of them sets the gradient mode.

    None where the outermost is not torch's.
    """
    if getattr(step, "__code__", None) is not _WRAPPER:
        return None
    step = step.__wrapped__
    sets_grad = getattr(step, "__code__", None) is _GRAD_WRAPPER
    return (step.__wrapped__ if sets_grad else step), sets_grad


_profiler_enabled = torch._C._autograd._profiler_enabled
_WRAPPER = Optimizer.profile_hook_step(lambda _: None).__code__
_GRAD_WRAPPER = _use_grad_for_differentiable(lambda _: None).__code__


def clip(optimizer: Optimizer, max_norm: float, total: Tensor) -> None:
    """Scale the gradients of `optimizer`, whose norm is `total`, to a norm of at most `max_norm`.

    The same arithmetic as `torch.nn.utils.clip_grad_norm_`.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)


def can_suppress(optimizer: Optimizer) -> bool:
    """Whether `optimizer` has kernels that apply nothing where a flag on the device says so: `fused=True`.

    The protocol of `torch.amp.GradScaler`: attributes `found_inf` and `grad_scale` that `step` looks at.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    if not all(group.get("fused", True) for group in optimizer.param_groups):
        return False
    return not _is_given_the_scale(type(optimizer).step)


@functools.cache
def _is_given_the_scale(step: Callable[..., Any]) -> bool:
    """Whether `step` has the argument by which a GradScaler once told it."""
    return "grad_scale" in inspect.signature(step).parameters


def step_unless(optimizer: Optimizer, suppressed: Tensor) -> None:
    """The update of an optimizer that `can_suppress`, or, where `suppressed` is 1.0, none; nothing is waited for."""
    fused: Any = optimizer
    fused.grad_scale, fused.found_inf = None, suppressed
    try:
        update(optimizer)
    finally:
        del fused.grad_scale, fused.found_inf


def flag_nonfinite(flag: Tensor, values: Tensor, one: Tensor) -> None:
    """Set `flag`, a float32 scalar, to 1.0 where one of `values` is not finite; `one` is 1.0, of the same kind."""
    torch._amp_foreach_non_finite_check_and_unscale_([values], flag, one)


def together(scalars: Sequence[Tensor]) -> Tensor:
    """Scalars of one device in one tensor of one dimension, in the widest of their types, and of single precision."""
    kinds = set(map(attrgetter("dtype"), scalars))
    widest = functools.reduce(torch.promote_types, kinds, torch.float32)
    if len(kinds) == 1:
        return torch.stack(list(scalars)).to(widest)
    return torch.stack([scalar.to(widest) for scalar in scalars])


def rescale(grads: list[Tensor], factor: float) -> None:
    """Multiply all gradients by `factor`, in place."""
    if grads and factor != 1.0:
        torch._foreach_mul_(grads, factor)


def nonfinite_counts(names: Iterator[tuple[str, nn.Parameter]]) -> dict[str, int]:
    """For each parameter whose gradient is not finite everywhere: how many of its elements are not."""
    counts = {}
    for name, parameter in names:
        grad = parameter.grad
        if grad is None:
            continue
        values = grad.coalesce()._values() if grad.is_sparse else grad
        count = int((~torch.isfinite(values)).sum())
        if count:
            counts[name] = count
    return counts


class BufferGuard:
    """Keeps the floating-point buffers of a model from before a window, to put them back if it is skipped."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[str, Tensor] = {}

    def keep(self) -> None:
        """Copy the buffers as they are now; memory is allocated the first time only."""
        for name, buffer in self._floating():
            kept = self._kept.get(name)
            if kept is None or kept.shape != buffer.shape:
                self._kept[name] = buffer.detach().clone()
            else:
                kept.copy_(buffer)

    def put_back(self) -> None:
        """Make the buffers what they were at `keep`."""
        with torch.no_grad():
            for name, buffer in self._floating():
                if name in self._kept:
                    buffer.copy_(self._kept[name])

    def put_back_where(self, spoilt: Tensor) -> None:
        """The same where `spoilt`, a scalar on the device, is 1.0; else nothing. Nothing is waited for."""
        with torch.no_grad():
            for name, buffer in self._floating():
                if name in self._kept:
                    buffer.copy_(torch.where(spoilt.to(buffer.device).bool(), self._kept[name], buffer))

    def _floating(self) -> Iterator[tuple[str, Tensor]]:
        return ((n, b) for n, b in self._model.named_buffers() if b.is_floating_point() and not is_lazy(b))

    def state_dict(self) -> dict[str, Tensor]:
        """The kept buffers, for a checkpoint within a window."""
        return dict(self._kept)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        devices = {name: buffer.device for name, buffer in self._floating()}
        self._kept = {name: kept.to(devices.get(name, kept.device)) for name, kept in state.items()}
