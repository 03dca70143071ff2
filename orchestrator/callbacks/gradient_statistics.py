"""GradientStatistics: size and health of the gradients, by parameter and in all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orchestrator.callbacks.base import Callback
from orchestrator.callbacks.checks import check_whole
from orchestrator.late_work import LateWork
from states.table import Trigger

if TYPE_CHECKING:
    from orchestrator.trainer import Trainer

__all__ = ["GradientStatistics", "TensorStatistics", "combined", "statistics_of"]


@dataclass(frozen=True)
class TensorStatistics:
    """Of the elements of one tensor or several: 2-norm, mean, greatest magnitude, share not finite."""

    norm: float
    mean: float
    max: float
    nonfinite: float
    """From 0 to 1."""
    elements: int


class GradientStatistics(Callback):
    """Logs statistics of the gradients after `backward`.

    Keys: "grad/norm", "grad/mean", "grad/max" (greatest magnitude) and "grad/nonfinite" (share of elements
    that are NaN or infinite) over all parameters. With several phases, those of the phase's own optimizer, as
    "grad/PHASE/...".

    They are the gradients as they stand: before clipping, within an accumulation window the sum so far,
    and with precision="fp16" multiplied by the scale of the loss. On an accelerator they are read late, like the
    loss; several devices are waited for, on the batches asked for.

    Args:
        every_batches: on every so many batches, from the first on.
        per_parameter: whether there are "grad/NAME/norm" and so on of each parameter too.
    """

    def __init__(self, every_batches: int = 100, per_parameter: bool = True) -> None:
        check_whole("GradientStatistics: every_batches", every_batches, unit="batch")
        self.every_batches = every_batches
        self.per_parameter = per_parameter

    def attach(self, trainer: Trainer) -> None:
        """Hook `backward`."""
        super().attach(trainer)
        trainer.after(Trigger.BACKWARD)(self._after_backward)

    def _after_backward(self) -> None:
        if self.trainer.batches % self.every_batches == 0:
            self._measure()

    def _measure(self) -> None:
        names, gradients = self._gradients()
        if not gradients:
            return
        prefix = f"grad/{self.trainer.phase}" if len(self.trainer.phases) > 1 else "grad"
        work = self.trainer._training.work
        if isinstance(work, LateWork) and len({gradient.device for gradient in gradients}) == 1:
            named = partial(self._named, prefix, names)
            work.keep_all(*queued_statistics(gradients, named))
            return
        for name, value in self._named(prefix, names, statistics_of(gradients)).items():
            self.trainer.log(name, value)

    def _gradients(self) -> tuple[list[str], list[Tensor]]:
        trainer = self.trainer
        own: set[int] | None = None
        if len(trainer.phases) > 1:
            optimizer = next(phase.optimizer for phase in trainer.phases if phase.name == trainer.phase)
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found = [
            (name, parameter.grad)
            for name, parameter in trainer.model.named_parameters()
            if parameter.grad is not None and (own is None or id(parameter) in own)
        ]
        return [name for name, _ in found], [gradient for _, gradient in found]

    def _named(
        self, prefix: str, names: Sequence[str], measured: Sequence[TensorStatistics]
    ) -> dict[str, float]:
        """The values to log, by their keys."""
        found = {prefix: combined(measured)}
        if self.per_parameter:
            found |= {
                f"{prefix}/{name}": statistics for name, statistics in zip(names, measured, strict=True)
            }
        return {
            f"{key}/{what}": getattr(statistics, what)
            for key, statistics in found.items()
            for what in ("norm", "mean", "max", "nonfinite")
        }


@torch.no_grad()
def statistics_of(tensors: Sequence[Tensor]) -> list[TensorStatistics]:
    """The statistics of each tensor, of any shapes, devices and floating-point types.

    Computed in at least single precision; one reading for each device.
    """
    dense = [_dense(tensor) for tensor in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(dense):
        by_device.setdefault(tensor.device, []).append(index)
    found: dict[int, TensorStatistics] = {}
    for indices in by_device.values():
        of_device = [dense[index] for index in indices]
        values = torch.stack(
            [
                torch.stack([norm.double() for norm in torch._foreach_norm(of_device)]),
                torch.stack([tensor.mean().double() for tensor in of_device]),
                torch.stack([norm.double() for norm in torch._foreach_norm(of_device, math.inf)]),
            ]
        ).tolist()
        for index, norm, mean, greatest in zip(indices, *values, strict=True):
            found[index] = _checked(dense[index], norm, mean, greatest)
    return [found[index] for index in range(len(dense))]


@torch.no_grad()
def queued_statistics(
    tensors: Sequence[Tensor], use: Callable[[list[TensorStatistics]], Mapping[str, float]]
) -> tuple[Tensor, Callable[[list[float]], Mapping[str, float]]]:
    """The statistics of tensors of one device without waiting for it.

    Returns a tensor of float64 there, and what makes of its elements, flat, what `use` makes of the statistics. What
    `statistics_of` looks at where a norm is not finite is computed in any case.
    """
    dense = [_dense(tensor) for tensor in tensors]
    elements = [tensor.numel() for tensor in dense]
    rows = torch.stack(
        [
            torch.stack([norm.double() for norm in torch._foreach_norm(dense)]),
            torch.stack([tensor.mean().double() for tensor in dense]),
            torch.stack([norm.double() for norm in torch._foreach_norm(dense, math.inf)]),
            torch.stack([(~torch.isfinite(tensor)).sum().double() for tensor in dense]),
            torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in dense]),
        ]
    )

    def read(values: list[float]) -> Mapping[str, float]:
        columns = zip(*(values[at :: len(elements)] for at in range(len(elements))), strict=True)
        norms, means, greatest, nonfinite, doubles = columns
        return use(
            [
                TensorStatistics(
                    norm=norms[i] if math.isfinite(norms[i]) or nonfinite[i] else doubles[i],
                    mean=means[i],
                    max=greatest[i],
                    nonfinite=nonfinite[i] / count,
                    elements=count,
                )
                for i, count in enumerate(elements)
            ]
        )

    return rows, read


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce()._values()
    if tensor.numel() == 0:
        return tensor.new_zeros(1)
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _checked(tensor: Tensor, norm: float, mean: float, greatest: float) -> TensorStatistics:
    # A finite norm has only finite terms, so elements are counted where it is not, which is rare.
    nonfinite = 0
    if not math.isfinite(norm):
        nonfinite = int((~torch.isfinite(tensor)).sum())
        if nonfinite == 0:  # the squares overflowed
            norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
    return TensorStatistics(norm, mean, greatest, nonfinite / tensor.numel(), tensor.numel())


def combined(parts: Sequence[TensorStatistics]) -> TensorStatistics:
    """The statistics of all the elements of `parts` together."""
    elements = sum(part.elements for part in parts)
    greatest = [part.max for part in parts]
    return TensorStatistics(
        norm=math.hypot(*(part.norm for part in parts)),
        mean=sum(part.mean * part.elements for part in parts) / elements,
        max=math.nan if any(map(math.isnan, greatest)) else max(greatest),
        nonfinite=sum(part.nonfinite * part.elements for part in parts) / elements,
        elements=elements,
    )
