"""EMA: an exponential moving average of the weights, beside the model that is trained."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from orchestrator.callbacks.base import Callback
from orchestrator.callbacks.checks import check_whole
from orchestrator.errors import ConfigurationError
from orchestrator.snapshot.capture import Built, capture_attributes, restore_attributes, unwrapped
from states.table import Trigger

if TYPE_CHECKING:
    from orchestrator.trainer import Trainer

__all__ = ["EMA"]


class EMA(Callback):
    """Averages the weights: `average = decay * average + (1 - decay) * weights` after an update.

    The average lives in a `torch.optim.swa_utils.AveragedModel`; `.model` is the averaged module, in the
    types and on the device of the trained one. It begins as a copy of the weights after the first update
    past `start`. Skipped updates do not count. Checkpoints keep the averaged weights.

    Args:
        decay: from 0 to 1.
        every_updates: the average is updated after every so many updates.
        start: updates before the average begins.
        validate: whether validation evaluates the average, from its first update on.
        use_buffers: whether floating-point buffers (BatchNorm's statistics) are averaged likewise, others copied;
            with False all buffers are copies of the trained model's.
        phase: with several phases, the one whose updates count; by default the last.

    Raises ConfigurationError for arguments that make no sense.
    """

    def __init__(
        self,
        decay: float = 0.999,
        *,
        every_updates: int = 1,
        start: int = 0,
        validate: bool = False,
        use_buffers: bool = True,
        phase: str | None = None,
    ) -> None:
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0.0 <= decay <= 1.0:
            raise ConfigurationError(f"EMA: decay is {decay!r}; expected a number from 0 to 1, such as 0.999")
        check_whole("EMA: every_updates", every_updates, unit="update")
        check_whole("EMA: start", start, least=0, unit="updates")
        self.decay = decay
        self.every_updates = every_updates
        self.start = start
        self.validate = validate
        self.use_buffers = use_buffers
        self.phase = phase
        self.updates = 0
        self._blend = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    @property
    def model(self) -> nn.Module:
        """The averaged module; the initial weights until the average begins."""
        module = self.averaged.module
        assert isinstance(module, nn.Module)
        return module

    @property
    def n_averaged(self) -> int:
        """How many times the weights were taken into the average."""
        return int(self.averaged.n_averaged)  # on the CPU, wherever the weights are

    def attach(self, trainer: Trainer) -> None:
        """Copy the model, which is on its device by now, and hook the step."""
        super().attach(trainer)
        self._trained = unwrapped(trainer.model)
        self.averaged = AveragedModel(self._trained, multi_avg_fn=self._blend, use_buffers=self.use_buffers)
        self._built = Built.of(self.model)
        names = [phase.name for phase in trainer.phases]
        self._after_phase = names[-1] if self.phase is None else self.phase
        if self._after_phase not in names:
            raise ConfigurationError(f"EMA is to average after phase {self.phase!r}; the phases are {names}")
        if self.validate and trainer.validation_model is not trainer.model:
            raise ConfigurationError("two callbacks want to say which model is validated; one EMA only may")
        trainer.after(Trigger.STEP)(self._after_step)

    def _after_step(self) -> None:
        trainer = self.trainer
        if trainer.skipped or trainer.phase != self._after_phase:
            return
        self.updates += 1
        past = self.updates - self.start
        if past >= 1 and (past - 1) % self.every_updates == 0:
            self._take_in()

    @torch.no_grad()
    def _take_in(self) -> None:
        # What AveragedModel.update_parameters does, but for two things: it moves its counter to the weights'
        # device each time, which would wait for the device, and it averages integers, truncating them.
        ours, theirs = self.model, self._trained
        parameters = zip(ours.parameters(), theirs.parameters(), strict=True)
        buffers = zip(ours.buffers(), theirs.buffers(), strict=True)
        begun = self.n_averaged > 0
        blended: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for is_buffer, (average, value) in chain(_tagged(parameters, False), _tagged(buffers, True)):
            floating = average.is_floating_point() or average.is_complex()
            if begun and floating and (self.use_buffers or not is_buffer):
                averages, values = blended.setdefault((average.device, average.dtype), ([], []))
                averages.append(average.detach())
                values.append(value.detach())
            else:
                average.copy_(value)
        for averages, values in blended.values():
            self._blend(averages, values, self.averaged.n_averaged)
        self.averaged.n_averaged += 1
        self._choose_validated()

    def _choose_validated(self) -> None:
        if self.validate:
            self.trainer.validation_model = self.model if self.n_averaged else self.trainer.model

    def state_dict(self) -> dict[str, Any]:
        """Counters, and all that the averaged module has: parameters, buffers, plain attributes."""
        return {
            "updates": self.updates,
            "n_averaged": self.n_averaged,
            "parameters": {name: p.detach() for name, p in self.model.named_parameters()},
            "buffers": {name: b.detach() for name, b in self.model.named_buffers()},
            "attributes": capture_attributes(self.model, self._built),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, in place."""
        self.updates = state["updates"]
        self.averaged.n_averaged.fill_(state["n_averaged"])
        _copy_into(dict(self.model.named_parameters()), state["parameters"])
        _copy_into(dict(self.model.named_buffers()), state["buffers"])
        if "attributes" in state:
            restore_attributes(self.model, state["attributes"], self._built)
        self._choose_validated()


def _tagged(
    pairs: Iterable[tuple[Tensor, Tensor]], is_buffer: bool
) -> Iterable[tuple[bool, tuple[Tensor, Tensor]]]:
    return ((is_buffer, pair) for pair in pairs)


@torch.no_grad()
def _copy_into(tensors: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    if tensors.keys() != saved.keys():
        differing = ", ".join(sorted(tensors.keys() ^ saved.keys()))
        raise ConfigurationError(f"the checkpoint's average is of another model; they differ in {differing}")
    for name, tensor in tensors.items():
        if tensor.shape != saved[name].shape:
            raise ConfigurationError(
                f"the checkpoint's average has {name} of shape {tuple(saved[name].shape)}, "
                f"the model {tuple(tensor.shape)}"
            )
        tensor.copy_(saved[name])
