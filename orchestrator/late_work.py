"""The work of transitions where a device queues it: nothing waits for the device, and values are read late."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from orchestrator import numerics
from orchestrator.errors import NonFiniteError
from orchestrator.late import Bundle, LateValues, Link, Mark, Parcel
from orchestrator.metrics import check_scalar
from orchestrator.work import BatchWork, EvaluationWork, TrainingWork
from states.table import ARCS, Trigger
from tracking.frames import PENDING

__all__ = ["LateEvaluationWork", "LateTrainingWork", "LateWork", "Written"]

_MOST_UNDER_WAY = 2
"""Batches that may be behind the one at hand: as far as the processor may run ahead of the device."""

_FORWARD = [arc.trigger is Trigger.FORWARD for arc in ARCS]
_END_BATCH = [arc.trigger is Trigger.END_BATCH for arc in ARCS]


class Written(Protocol):
    """Who has written transitions down, and takes what belongs to them when it arrives."""

    def loss_arrived(self, seq: int, loss: float) -> None:
        """The loss of the forward pass that is transition `seq`."""

    def values_arrived(
        self, epoch: int, batch: int, step: int, values: Mapping[str, float], time_ns: int, seq: int
    ) -> None:
        """Values of the batch whose `end_batch` is transition `seq`."""


@dataclass(frozen=True, slots=True)
class _Close:
    """What was known of a batch when it was complete."""

    epoch: int
    batch: int
    batches: int
    samples: int
    validated: Mapping[str, float]
    seq: int | None
    time_ns: int


@dataclass(slots=True)
class _Flight:
    """The values of one batch, and what is to be done, in this order, when they arrive."""

    values: LateValues
    arrivals: list[Callable[[], None]] = field(default_factory=list)
    norm: float | None = None
    """The gradient norm of the newest step that was not skipped, as far as is known."""
    skipped: bool = False
    """Whether the last step was skipped, as far as is known."""
    mark: Mark | None = None
    close: _Close | None = None


class LateWork(BatchWork):
    """What training and evaluation on such a device have in common.

    Losses and norms are copied together, at a batch's update or its end, metrics as they are computed. A mark at the
    end of each batch says when they are there. They are read at the end of a later batch, at most two later, which is
    when averages, counts and the journal get them; or at once, waiting, by whoever asks: hooks that read, saves, the
    end of an epoch.
    """

    def __init__(self, *, link: Link, **common: Any) -> None:
        super().__init__(**common)
        self._link = link
        self._flights: deque[_Flight] = deque()
        self._here = _Flight(LateValues({}, self.settle))
        self._loss = Parcel()
        """The loss of the newest forward pass."""
        self._unsent: list[tuple[Tensor, Parcel]] = []
        """Losses of the batch at hand that are still to be sent."""
        self._unwritten: Parcel | None = None
        """The loss of a forward pass that is not written down yet."""
        self._newest_loss = math.nan
        self.written: Written | None = None
        """Who takes what arrives; None while nothing is recorded."""
        self._arrived: Mapping[str, float] = {}

    def fetch(self) -> None:
        """Take the next batch and begin to move it to the device."""
        super().fetch()
        self._here = _Flight(LateValues({}, self.settle))
        self.metrics = self._here.values

    def _values(self) -> LateValues:
        """The values of the batch at hand."""
        here = self._here
        if self.metrics is not here.values:  # plain ones, of a checkpoint that was just restored
            here.norm = self.metrics.get("grad_norm")
            self.metrics = here.values = LateValues(self.metrics, self.settle)
        return here.values

    def _keep_loss(self, loss: Tensor, name: str) -> None:
        values, parcel = self._values(), Parcel()
        if name:
            values.expect(f"loss/{name}", parcel)
        values.expect_more("loss", parcel)
        self.loss, self._loss, self._unwritten = PENDING, parcel, parcel
        self._unsent.append((self._scalar(loss), parcel))

    def _scalar(self, value: Tensor) -> Tensor:
        """The one element of `value`, on the device, without a dimension."""
        value = value.detach().reshape(())
        return value if value.device == self.device else value.to(self.device, non_blocking=True)

    def _send(self) -> None:
        """Send what is still to be sent."""
        unsent, self._unsent = self._unsent, []
        for value, parcel in unsent:
            parcel.sent(self._link.send(value), 0, 1)

    def _keep(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.device.type == self.device.type:
            check_scalar(value, name)
            self._values().expect(name, Parcel(self._link.send(value)))
        else:
            super()._keep(name, value)

    @property
    def latest(self) -> Mapping[str, float]:
        """The values of the newest batch that has arrived."""
        return self._arrived

    def keep_all(self, values: Tensor, read: Callable[[list[float]], Mapping[str, float]]) -> None:
        """Add the values that `read` makes of the elements of `values`, once they are here."""
        self._values().expect_all(Bundle(Parcel(self._link.send(values)), read))

    def close_batch(self) -> None:
        """Nothing yet: the batch is folded in when its values are here."""

    def write(self, arc: int, record: Callable[[int], int | None]) -> None:
        """Have a transition written down by `record`, which gives its number, without what is still on its way."""
        if _FORWARD[arc]:
            seq = record(arc)
            if self._unwritten is not None:
                self._here.arrivals.append(partial(self._take_loss, self._unwritten, seq))
                self._unwritten = None
        elif _END_BATCH[arc]:
            values = self._values()
            if values.late:
                self.metrics = values.known()
            try:
                seq = record(arc)
            finally:
                self.metrics = values
            self._depart(seq)
        else:
            record(arc)

    def _depart(self, seq: int | None) -> None:
        """The batch at hand is complete; see what has arrived of those before it."""
        here, place = self._here, self.place
        self._send()
        here.close = _Close(
            place.epoch, place.batch, place.batches, self.samples, self.validated, seq, time.time_ns()
        )
        here.mark = self._link.mark()
        self._flights.append(here)
        while self._flights:
            mark = self._flights[0].mark
            assert mark is not None
            if len(self._flights) > _MOST_UNDER_WAY:
                mark.synchronize()
            elif not mark.query():
                return
            self._arrive(self._flights.popleft())

    def settle(self) -> None:
        """Wait for everything that is on its way."""
        here = self._here
        waiting = here.arrivals or here.values.late or self._unwritten is not None
        if waiting or self._flights:
            self._send()
            self._link.mark().synchronize()
        while self._flights:
            self._arrive(self._flights.popleft())
        if waiting and here.close is None:
            self._take_in(here)
        if self._unwritten is not None:
            self._newest_loss = self._unwritten.first()
            self._unwritten = None
        self.loss = self._newest_loss
        self._settled()

    def _settled(self) -> None:
        """Everything has arrived."""

    def _take_in(self, flight: _Flight) -> dict[str, float]:
        """What has arrived of a batch."""
        arrivals, flight.arrivals = flight.arrivals, []
        for arrival in arrivals:
            arrival()
        found = flight.values.arrive()
        if "grad_norm" in found:
            if flight.norm is None:
                flight.values.forget("grad_norm")
                del found["grad_norm"]
            else:
                flight.values["grad_norm"] = found["grad_norm"] = flight.norm
        return found

    def _arrive(self, flight: _Flight) -> None:
        found, close = self._take_in(flight), flight.close
        assert close is not None
        self._arrived = flight.values
        if close.samples:
            self._fold(flight.values, close.samples, flight.skipped, close.validated)
        if self.written is not None and close.seq is not None and found:
            self.written.values_arrived(
                close.epoch, close.batch, close.batches, found, close.time_ns, close.seq
            )

    def _take_loss(self, parcel: Parcel, seq: int | None) -> None:
        self._newest_loss = parcel.first()
        if self.written is not None and seq is not None:
            self.written.loss_arrived(seq, self._newest_loss)

    def forget_late(self) -> None:
        """Forget what is on its way: it is of another place than the one that is stood at from here on."""
        self._flights.clear()
        self._unsent.clear()
        self._unwritten = None
        self._here = _Flight(LateValues({}, self.settle))
        self._newest_loss = self.loss


class LateEvaluationWork(LateWork, EvaluationWork):
    """A pass over an evaluation loader whose losses are read late."""

    def begin_epoch(self) -> None:
        """Fix the order of the loader and forget the last pass, one that was broken off too."""
        self.forget_late()
        super().begin_epoch()

    def end_epoch(self) -> None:
        """The values over the whole loader, once they are here."""
        self.settle()
        super().end_epoch()

    def _depart(self, seq: int | None) -> None:
        super()._depart(None)  # the journal has values of whole passes only


class LateTrainingWork(LateWork, TrainingWork):
    """The transitions of a training where nothing waits for the device.

    Whether a window is finite is decided on the device. An update is suppressed there by the optimizer's own kernels
    where it has such (`numerics.can_suppress`); for others the flag is read before each update, which waits. With
    `nonfinite="halt"` the flag is sticky: nothing is applied any more until the processor has read it and halts. So
    counts of updates and skips are late too.
    """

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self._finite = True
        """Whether the losses that have arrived of the open window are."""
        self._over = False
        """Whether the flag that halts was read."""
        self._losses: list[Tensor] = []
        """Those of the open window; of one that a checkpoint has begun, those since."""
        self._spoilt_before = False
        """Whether one before those is not finite."""
        self._flag = torch.zeros((), device=self.device)
        """1.0 where a loss or a gradient of the open window is not finite; where that halts, it stays 1.0."""
        self._one = torch.ones((), device=self.device)
        self._stepped: dict[int, set[int]] = {}
        """By optimizer: the parameters that it has updated, and so has state for."""

    def begin_epoch(self) -> None:
        """See TrainingWork."""
        super().begin_epoch()
        self._finite = True

    def end_epoch(self) -> None:
        """See TrainingWork; waits for the device, once an epoch."""
        self.settle()
        super().end_epoch()

    def was_skipped(self) -> bool:
        """Whether the last step is known to have applied nothing.

        Where training goes on after one that did, this waits. Where it halts, False may mean that it will.
        """
        if self.guard is not None or self.precision.scalers[self.phase] is not None:
            self.settle()
        return self.skipped

    def restored(self) -> None:
        """A checkpoint was put back: what is on its way is of another place."""
        self.forget_late()
        self._here.skipped = self.skipped
        self._finite, self._over = self.window.finite, False
        self._losses, self._spoilt_before = [], not self.window.finite
        self._flag.zero_()
        self._stepped.clear()

    def _settled(self) -> None:
        self.window.finite = self._finite
        self.skipped = self._here.skipped

    def _judge(self, loss: Tensor) -> None:
        if self.window.count == 0:
            self._losses, self._spoilt_before = [], False
        self._losses.append(self._scalar(loss))
        self._here.arrivals.append(partial(self._take_judgement, self._loss))

    def _take_judgement(self, loss: Parcel) -> None:
        self._finite = self._finite and math.isfinite(loss.first())

    def _apply(self, optimizer: Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        each, total = self._norms(optimizer)
        of_all = [] if total is None else [self._scalar(total)]
        numbers = numerics.together([*self._losses, *of_all, *each])
        losses = len(self._losses)
        flag = self._flag
        if self._nonfinite != "halt":
            flag.zero_()
        if self._spoilt_before:
            flag.fill_(1.0)
        numerics.flag_nonfinite(flag, numbers if scaler is None else numbers[:losses], self._one)
        if self.guard is not None:
            self.guard.put_back_where(flag)
        if scaler is not None:  # gradients that overflow are its business: they suppress this update only
            flag = flag.clone()
            numerics.flag_nonfinite(flag, numbers[losses:], self._one)
        if self._clip_grad_norm is not None and total is not None:
            numerics.clip(optimizer, self._clip_grad_norm, total)
        self._update(optimizer, flag)
        if scaler is not None:
            scaler.update()
        norms = self._sent_with_losses(numbers)
        self._values().expect("grad_norm", norms)  # `_take_step` says what it is
        taking = partial(self._take_step, self._here, norms, total is not None, optimizer, scaler is not None)
        self._here.arrivals.append(partial(taking, self.place.epoch, self.place.batch))

    def _norms(self, optimizer: Optimizer) -> tuple[Sequence[Tensor], Tensor | None]:
        """See `numerics.late_norms`."""
        grads = numerics.gradients(optimizer)
        if not grads:
            return (), torch.zeros((), device=self.device)
        return numerics.late_norms(grads, to_clip=self._clip_grad_norm is not None)

    def _sent_with_losses(self, numbers: Tensor) -> Parcel:
        """Send `numbers`, the losses of the window, of which the newest may be unsent, and norms; a parcel of these."""
        memory, norms, losses = self._link.send(numbers), Parcel(), len(self._losses)
        norms.sent(memory, losses, numbers.numel())
        if self._unsent and self._unsent[-1][1] is self._loss:
            self._unsent.pop()
            self._loss.sent(memory, losses - 1, losses)
        return norms

    def _update(self, optimizer: Optimizer, suppressed: Tensor) -> None:
        updated = self._stepped.setdefault(id(optimizer), set())
        due = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        # A first update makes the optimizer's state; suppressed, it would leave some of it unset (SGD's momentum).
        if due <= updated and numerics.can_suppress(optimizer):
            numerics.step_unless(optimizer, suppressed)
        elif not suppressed.item():
            numerics.update(optimizer)
            updated |= due

    def _take_step(
        self,
        flight: _Flight,
        norms: Parcel,
        has_total: bool,
        optimizer: Optimizer,
        scaled: bool,
        epoch: int,
        batch: int,
    ) -> None:
        each = norms.read()
        norm = each.pop(0) if has_total else math.hypot(*each)
        finite, self._finite = self._finite, True
        if not self._over and finite and math.isfinite(norm):
            self.place.updates += 1
            flight.norm, flight.skipped = norm, False
            return
        flight.skipped = True
        if self._over:  # suppressed with the one that halts
            return
        self.skips += 1
        if scaled and finite:
            return
        spoilt = self._spoilt(optimizer, each)
        error = NonFiniteError("gradient" if finite else "loss", epoch, batch, self._newest_loss, spoilt)
        self._report(f"{error.found}; by parameter: {error.statistics}")
        if self._nonfinite == "halt":
            self._over = True
            self._request_halt(error)

    def _spoilt(self, optimizer: Optimizer, norms: Sequence[float]) -> dict[str, int]:
        """The parameters whose gradients are not finite by their `norms`: the gradients themselves are gone."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        due = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if len(due) != len(norms):
            return {}
        return {
            names.get(id(parameter), "?"): 1
            for parameter, norm in zip(due, norms, strict=True)
            if not math.isfinite(norm)
        }
