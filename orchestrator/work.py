"""What each transition does: fetch, forward, backward, step and the rest. Called by the machine alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from orchestrator import numerics
from orchestrator.data import BatchStream, Looks, carrying, first_samples, received, to_device
from orchestrator.errors import ConfigurationError, LossError, NonFiniteError, kind_of
from orchestrator.metrics import RESERVED, EpochMetrics, as_float
from orchestrator.phase import Forward, Phase
from orchestrator.policy import Situation
from orchestrator.warning import warn
from states.table import State, Trigger

__all__ = ["BatchWork", "EvaluationWork", "Limits", "Place", "TrainingWork", "Window", "supervised"]

_NOTHING: Mapping[str, float] = {}


@dataclass(slots=True)
class Place:
    """How far a training has come; all of it is training state."""

    epoch: int = -1
    """The epoch at hand, counted from 0; -1 before the first."""
    batch: int = -1
    """The batch at hand within its epoch, counted from 0; -1 before the first."""
    batches: int = 0
    """Batches completed since the beginning, over all epochs."""
    updates: int = 0
    """Updates that optimizers have applied."""


@dataclass(frozen=True)
class Limits:
    """Where a training ends: after `epochs`, or after `max_batches`, whichever comes first."""

    epochs: int | None
    max_batches: int | None

    def apply(self, situation: Situation, place: Place) -> None:
        """Say in `situation` whether anything is left at `place`."""
        situation.epochs_left = self.epochs is None or place.epoch + 1 < self.epochs
        situation.batches_left = self.max_batches is None or place.batches < self.max_batches


@dataclass(slots=True)
class Window:
    """The open accumulation window: micro-batches whose gradients wait for a step."""

    count: int = 0
    weight: float = 0.0
    """The sum of the micro-batches' weights, the first of which is `unit`."""
    unit: float = 1.0
    finite: bool = True
    """No micro-batch had a loss that was NaN or infinite."""

    def clear(self) -> None:
        """Begin anew."""
        self.count, self.weight, self.unit, self.finite = 0, 0.0, 1.0, True


def supervised(loss_fn: Callable[[Any, Any], Any]) -> Forward:
    """The default `forward`: a batch is a pair `(inputs, targets)`, the loss `loss_fn(model(inputs), targets)`."""

    def forward(model: nn.Module, batch: Any) -> tuple[Any, Any, Any]:
        if not isinstance(batch, (list, tuple)) or len(batch) != 2:
            found = kind_of(batch)
            if isinstance(batch, Mapping):
                found += f" with keys {', '.join(map(repr, batch))}"
            elif isinstance(batch, list | tuple):
                found += f" of length {len(batch)}"
            raise ConfigurationError(
                f"the loader yields {found}; without forward= a batch is expected to be a pair "
                "(inputs, targets): pass forward=(model, batch) -> loss, or (loss, outputs, targets)"
            )
        inputs, targets = batch
        outputs = model(inputs)
        return loss_fn(outputs, targets), outputs, targets

    return forward


def _read_loss(
    result: Any, training: bool, forward: Forward, where: Callable[[str], str] = str
) -> tuple[Tensor, Any, Any]:
    """(loss, outputs, targets) of what `forward` has returned; `where` names it in messages."""
    outputs = targets = None
    if isinstance(result, tuple):
        if len(result) != 3:
            raise LossError(
                f"{_giver(forward, where)} returned a tuple of {len(result)}; expected a loss, or (loss, outputs, "
                "targets)"
            )
        result, outputs, targets = result
    if not isinstance(result, Tensor):
        raise LossError(
            f"{_giver(forward, where)} returned {kind_of(result)} as the loss; expected a scalar tensor that the "
            f"model's outputs lead to{_advice(result)}"
        )
    if result.numel() != 1 or not result.is_floating_point():
        raise LossError(
            f"{_giver(forward, where)} returned a loss of shape {tuple(result.shape)} and type {result.dtype}; "
            f"expected a scalar floating-point tensor{_advice(result)}"
        )
    if training and not result.requires_grad:
        raise LossError(
            f"{_giver(forward, where)} returned a loss that does not depend on any parameter that requires a "
            "gradient; expected one: was it detached, computed under torch.no_grad(), or is the whole model frozen?"
        )
    return result, outputs, targets


def _giver(forward: Forward, where: Callable[[str], str]) -> str:
    """What the user gave that the loss came from: a forward of this file only calls their loss_fn."""
    return where("loss_fn" if getattr(forward, "__module__", "") == __name__ else "forward")


def _advice(loss: Any) -> str:
    """What to do about a loss that is none."""
    if loss is None:
        return ": does it end with a return?"
    if isinstance(loss, float):
        return ": leave out .item() or float()"
    if isinstance(loss, Mapping):
        return ": return the loss itself, and trainer.log(name, value) the rest"
    if not isinstance(loss, Tensor):
        return ""
    if loss.numel() == 1:
        return ": compute it from the model's outputs as they are, not from an argmax or a comparison of them"
    return ": reduce it, for instance with .mean()"


_HOW_EMPTY = "is its data set empty, or smaller than one batch with drop_last=True, or used up?"


class BatchWork:
    """What training and evaluation have in common: taking batches, the forward pass, metrics."""

    skipped = False
    """Whether the last step of the batch at hand applied nothing."""
    validated: Mapping[str, float] = _NOTHING
    """What a validation within the batch at hand, or the epoch, has found."""

    def __init__(
        self,
        *,
        stream: BatchStream,
        metrics: EpochMetrics,
        device: torch.device,
        precision: numerics.Precision,
        situation: Situation,
        place: Place,
    ) -> None:
        self.stream = stream
        if (carry := carrying.carrier_to(device)) is not None:
            stream.carry_by(carry)
        self.epoch_metrics = metrics
        self.device = device
        self.precision = precision
        self.situation = situation
        self.place = place
        self.data: Any = None
        self._looks = Looks(None)
        self._replaced = False
        self.samples = 0
        self.loss = math.nan
        self.metrics: MutableMapping[str, float] = {}
        self._note = ""
        self.noted: Callable[[], object] = lambda: None
        """Called when something is noted of the transition at hand, which then takes more to write down."""
        self.started = 0.0
        self._reserved = RESERVED | metrics.names
        self._tells_of_data = 3
        """How many more batches that were written to are looked for in the data, which takes a while."""
        self.wants_example = False
        """Whether two samples of the next batch are to be kept in `example`, once."""
        self.example: Any = None

    @property
    def note(self) -> str:
        """What the transition that is written down next is to be noted with."""
        return self._note

    @note.setter
    def note(self, text: str) -> None:
        self._note = text
        if text:
            self.noted()

    def _begin_pass(self, epoch: int) -> None:
        self.stream.begin_epoch(epoch)
        self.place.epoch = epoch
        self.place.batch = -1
        self.epoch_metrics.reset()
        self.situation.has_batch = self.stream.has_next

    def fetch(self) -> None:
        """Take the next batch and move it to the device."""
        self.started = time.perf_counter()
        self.take(self.stream.fetch())
        self.place.batch += 1
        self.metrics = {}

    def take(self, batch: Any) -> None:
        """Make `batch`, as the stream gives it, the one at hand."""
        self.tell_of_changed_data()
        self.data, self._looks, self.samples = received(batch, self.device)
        self._replaced = False
        self.situation.empty = self.samples == 0
        self.situation.has_batch = self.stream.has_next
        if self.wants_example and self.samples:
            self._keep_example(batch)

    def replace(self, batch: Any) -> None:
        """Let `batch` be what has become of the one at hand."""
        self.data = to_device(batch, self.device)
        self._looks, self._replaced = Looks(self.data), True

    @property
    def batch_changed(self) -> bool:
        """Whether the batch at hand is seen not to be what the loader gave."""
        return self._replaced or self._looks.changed(self.data)

    def tell_of_changed_data(self) -> None:
        """Say so, once, where the batch at hand was written to and the data themselves with it."""
        if self._tells_of_data and (written := self._looks.written()):
            self._tells_of_data -= 1
            if self.stream.holds(written):
                self._tells_of_data = 0
                self._tell(
                    f"forward, or a hook, changes the batches of the {self.stream.role} data in place, and so the "
                    "data, which has changed since the training began and is in no checkpoint; a resumed run will "
                    "differ: change a copy (x = x + noise instead of x += noise)"
                )

    def _tell(self, message: str) -> None:
        warn(message)

    def _keep_example(self, batch: Any) -> None:
        self.wants_example = False
        try:
            self.example = to_device(first_samples(batch, self.samples), torch.device("cpu"))
        except Exception:  # a batch of the user's own kind, which cannot be cut
            self.example = None

    def log(self, name: str, value: Any) -> None:
        """Add a named value to the batch at hand; averaged over the epoch like the loss."""
        self._check_free(name)
        self._keep(name, value)

    def _check_free(self, name: str) -> None:
        if name in self._reserved:
            raise ConfigurationError(
                f"log({name!r}, ...): a metric of that name is there already, one of metrics= or of interlock's "
                "own; log it by another name"
            )

    def _count_loss(self, loss: Tensor, outputs: Any, targets: Any, name: str) -> None:
        self._keep_loss(loss, name)
        if self.epoch_metrics.wants_outputs:
            if outputs is None:
                raise ConfigurationError(
                    f"metrics= asks for {', '.join(sorted(self.epoch_metrics.names))}, but forward returns a loss "
                    "alone; expected (loss, outputs, targets), from which metrics are computed"
                )
            with torch.no_grad():
                observed = self.epoch_metrics.observe(
                    outputs.detach() if isinstance(outputs, Tensor) else outputs, targets
                )
                for metric, value in observed.items():
                    self._keep(metric, value)

    def _keep_loss(self, loss: Tensor, name: str) -> None:
        """Make `loss` the batch's, or, with several phases, the share of the phase `name` in it."""
        self.loss = loss.item()
        if name:
            self.metrics[f"loss/{name}"] = self.loss
        self.metrics["loss"] = self.metrics.get("loss", 0.0) + self.loss

    def _keep(self, name: str, value: Any) -> None:
        self.metrics[name] = as_float(value, name)

    @property
    def latest(self) -> Mapping[str, float]:
        """The values of the newest batch that are known."""
        return self.metrics

    def settle(self) -> None:
        """Wait for what is on its way from the device, where anything is: all values are known then."""

    def close_batch(self) -> None:
        """Fold the batch's values, hooks' included, into the epoch's; part of writing the batch down."""
        if self.samples:
            self._fold(self.metrics, self.samples, self.skipped, self.validated)

    def _fold(
        self, values: Mapping[str, float], samples: int, skipped: bool, validated: Mapping[str, float]
    ) -> None:
        """Fold the values of a batch, those of validation left out, into the epoch's."""
        self.epoch_metrics.add(values, samples)


class EvaluationWork(BatchWork):
    """A pass over one evaluation loader: no gradients, nothing of the training changes."""

    def __init__(self, *, model: nn.Module, forward: Forward, **common: Any) -> None:
        super().__init__(**common)
        self.model = model
        self._forward = forward
        self.values: dict[str, float] = {}

    def begin_epoch(self) -> None:
        """Fix the order of the loader and forget the last pass."""
        self._begin_pass(self.place.epoch)
        self.situation.epochs_left = False

    def forward(self) -> None:
        """Model and loss, without gradients."""
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # what no_grad does, which makes two objects on the way
        try:
            result = self.precision.apply(self._forward, self.model, self.data)
        finally:
            torch._C._set_grad_enabled(before)
        self._count_loss(*_read_loss(result, training=False, forward=self._forward), "")

    def end_batch(self) -> None:
        """Fold the batch into the pass."""
        self.close_batch()
        self.place.batches += 1

    def end_epoch(self) -> None:
        """The values over the whole loader."""
        self.tell_of_changed_data()  # of the last batch; of the others it was told when the next was taken
        if not self.place.batches and not self.situation.has_batch:
            self._tell(f"the {self.stream.role} loader has no batch, so nothing comes of it: {_HOW_EMPTY}")
        self.values = self.epoch_metrics.values()

    def finish(self) -> None:
        """Nothing is left to do."""
        self.data = None

    def halt(self) -> None:
        """Abandon the pass."""
        self.data = None

    def table(self) -> dict[Trigger, Callable[[], object]]:
        """The work of each trigger."""
        return {
            Trigger.BEGIN_EPOCH: self.begin_epoch,
            Trigger.FETCH: self.fetch,
            Trigger.FORWARD: self.forward,
            Trigger.END_BATCH: self.end_batch,
            Trigger.END_EPOCH: self.end_epoch,
            Trigger.FINISH: self.finish,
            Trigger.HALT: self.halt,
        }


class TrainingWork(BatchWork):
    """What the transitions of a training do to model, optimizers and metrics."""

    def __init__(
        self,
        *,
        model: nn.Module,
        phases: tuple[Phase, ...],
        limits: Limits,
        accumulate: int,
        weigh: Callable[[Any, int], float] | None,
        clip_grad_norm: float | None,
        nonfinite: str,
        validate_every: int | None,
        validate: Callable[[], dict[str, float]],
        request_halt: Callable[[NonFiniteError], None],
        restore: Callable[[], None],
        report: Callable[[str], None],
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.model = model
        self.phases = phases
        self.limits = limits
        self.accumulate = accumulate
        self.phase = 0
        self.window = Window()
        self.skipped = False
        self.skips = 0
        """Windows of this epoch that were skipped."""
        self._tells_of_empty = True
        self.history: list[dict[str, float]] = []
        self.epoch_started = 0.0
        self.validated: dict[str, float] = {}
        self._weigh = weigh
        self._clip_grad_norm = clip_grad_norm
        self._nonfinite = nonfinite
        self.validate_every = validate_every
        self.validate = validate
        self._request_halt = request_halt
        self._restore = restore
        self._report = report
        self.guard = numerics.BufferGuard(model) if nonfinite == "skip" else None
        self.keep: Callable[[], dict[str, Any]] | None = None
        """Copies what forward changes; set where the next FORWARD is to be saved."""
        self.before_forward: dict[str, Any] | None = None
        """What it copied, while the training stands in FORWARD."""
        self.computing = False
        """Whether a forward is under way."""
        self.copying: Callable[[], None] | None = None
        """Ends the copying of weights and optimizers' state for a checkpoint; called once, before they change."""
        self._result: Tensor | None = None

    # -- one method for each trigger -------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Fix the epoch's order of data and reset the epoch's metrics."""
        self._begin_pass(self.place.epoch + 1)
        self.epoch_started = time.perf_counter()
        self.validated = {}
        self.skips = 0
        self.window.clear()
        self.situation.pending = False

    def fetch(self) -> None:
        """Take batch (epoch, index); where it stands in its accumulation window is known from here on."""
        super().fetch()
        self.phase = 0
        self.skipped = False
        self.place_in_window()
        if self.situation.empty:
            self._add_note("empty")
            self._tell(f"batch {self.place.batch} of epoch {self.place.epoch} is empty and was skipped")

    def _tell(self, message: str) -> None:
        self._report(message)
        super()._tell(message)

    def place_in_window(self, counted: bool = False) -> None:
        """Say in the situation what the batch at hand is to its accumulation window and its phases.

        `counted`: its gradients are in the window already.
        """
        s, count = self.situation, self.window.count
        full = not s.empty and (count if counted else count + 1) >= self.accumulate
        s.window_closes = full or not s.has_batch
        s.pending = count > 0
        s.another_phase = not s.empty and self.phase + 1 < len(self.phases)

    def forward(self) -> None:
        """Model and loss of the batch at hand, in its phase."""
        if self.situation.state is State.STEP:
            self.phase += 1
            self.situation.another_phase = self.phase + 1 < len(self.phases)
        self.before_forward = self.keep() if self.keep is not None else None
        self.compute()

    def compute(self) -> None:
        """What forward does once the phase is set; done again where a checkpoint of FORWARD is restored."""
        phase = self.phases[self.phase]
        if self.guard is not None and self.window.count == 0:
            self.guard.keep()
        self.computing = True
        try:
            result = self.precision.apply(phase.forward, self.model, self.data)
        finally:
            self.computing = False
        loss, outputs, targets = _read_loss(result, True, phase.forward, self._named)
        self._count_loss(loss, outputs, targets, phase.name if len(self.phases) > 1 else "")
        self._result = loss

    def backward(self) -> None:
        """Zero the gradients at the start of a window, then add this micro-batch's share to them."""
        window, loss = self.window, self._result
        assert loss is not None
        self.before_forward = None
        if window.count == 0:
            numerics.zero(self.phases[self.phase].optimizer)
        self._judge(loss)
        loss = loss * self._share() if self.accumulate > 1 else loss
        scaler = self.precision.scalers[self.phase]
        numerics.backward(loss if scaler is None else scaler.scale(loss))
        self._result = None
        window.count += 1
        self.situation.pending = True

    def _judge(self, loss: Tensor) -> None:
        """Count in whether the loss of a micro-batch is finite."""
        self.window.finite = self.window.finite and math.isfinite(self.loss)

    def step(self) -> None:
        """Apply the gradients of the window, or nothing where they or the loss are not finite."""
        if self.copying is not None:
            self.end_copying()
        optimizer, scaler = self.phases[self.phase].optimizer, self.precision.scalers[self.phase]
        if scaler is not None:
            scaler.unscale_(optimizer)
        correction = self._correction()
        if correction != 1.0:
            numerics.rescale(numerics.gradients(optimizer), correction)
        self._apply(optimizer, scaler)
        self.window.clear()
        self.situation.pending = False

    def _apply(self, optimizer: Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        if self._clip_grad_norm is None:
            norm = numerics.norm(optimizer)
        else:
            total, norm = numerics.norm_to_clip(numerics.gradients(optimizer))
        self.skipped = not (math.isfinite(norm) and self.window.finite)
        if self.skipped:
            self._skip(scaler is not None)
        else:
            if self._clip_grad_norm is not None:
                numerics.clip(optimizer, self._clip_grad_norm, total)
            self.metrics["grad_norm"] = norm
        if scaler is not None:
            if not self.skipped:  # else fused kernels would make state that they leave unset
                scaler.step(optimizer)
            scaler.update()
        elif not self.skipped:
            numerics.update(optimizer)
        if not self.skipped:
            self.place.updates += 1

    def end_copying(self) -> None:
        """Wait until a checkpoint that is being made has its copy of weights and optimizers' state."""
        if self.copying is not None:
            self.copying()
            self.copying = None

    def was_skipped(self) -> bool:
        """Whether the last step is known to have applied nothing."""
        return self.skipped

    def restored(self) -> None:
        """A checkpoint was put back: whatever is not in it is forgotten."""

    def end_batch(self) -> None:
        """Count the batch; validation if it is due within the epoch."""
        # Validation comes first: where it is abandoned, this transition has not happened.
        batches = self.place.batches + 1
        elapsed = time.perf_counter() - self.started
        if self.validate_every and batches % self.validate_every == 0:
            self.end_copying()  # a validation may be made with other weights
            self.validated = self.validate()
            self.metrics.update(self.validated)
        self.place.batches = batches
        self.metrics["batch_time"] = elapsed
        self.limits.apply(self.situation, self.place)

    def end_epoch(self) -> None:
        """The epoch's values, and validation where it is not done every so many batches."""
        self.end_copying()
        self.tell_of_changed_data()  # of the last batch; of the others it was told when the next was taken
        values = self.epoch_metrics.values()
        values["duration"] = time.perf_counter() - self.epoch_started
        values.update(self._learning_rates())
        if self.skips:
            values["skipped"] = float(self.skips)
        if self.validate_every is None:
            self.validated = self.validate()
        values.update(self.validated)
        if self.window.count:
            self._add_note(f"{self.window.count} batches of an open accumulation window were not applied")
        self.history.append(values)
        self.limits.apply(self.situation, self.place)
        if self.place.batch < 0 and self.limits.epochs is None:
            raise ConfigurationError(
                "the training loader has no batch, and only max_batches says where to end, which it will never "
                "reach; expected a loader with batches, or epochs="
            )
        if self._tells_of_empty and self.place.batch < 0 and not self.situation.has_batch:
            self._tells_of_empty = False
            self._tell(
                f"the training loader has no batch in epoch {self.place.epoch}, so nothing is trained: {_HOW_EMPTY}"
            )

    def finish(self) -> None:
        """Nothing is left to do; the final checkpoint is asked for by Checkpointing."""
        self.data = None

    def halt(self) -> None:
        """Let go of the batch at hand."""
        self._result = None

    def resume(self) -> None:
        """Put the training state of the checkpoint back."""
        self._restore()

    def table(self) -> dict[Trigger, Callable[[], object]]:
        """The work of each trigger."""
        return {trigger: getattr(self, trigger.value) for trigger in Trigger}

    def log_epoch(self, name: str, value: Any) -> None:
        """Add a named value to the epoch that has just ended."""
        self._check_free(name)
        self.history[-1][name] = as_float(value, name)

    # -- their parts -----------------------------------------------------------------------------

    def _fold(
        self, values: Mapping[str, float], samples: int, skipped: bool, validated: Mapping[str, float]
    ) -> None:
        # Where non-finite batches are to be left out, they are left out of the averages too.
        if skipped or self.guard is not None:
            values = {name: value for name, value in values.items() if math.isfinite(value)}
        self.epoch_metrics.add(values, samples, validated)

    def _add_note(self, text: str) -> None:
        """Note something of the transition under way, before what its hooks have noted."""
        self.note = f"{text}; {self.note}" if self.note else text

    def _named(self, what: str) -> str:
        name = self.phases[self.phase].name
        return f"{what} of phase {name!r}" if name else what

    def _share(self) -> float:
        """What this micro-batch's loss is multiplied with; `_correction` makes it exact at the step."""
        window = self.window
        weight = 1.0 if self._weigh is None else float(self._weigh(self.data, self.samples))
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigurationError(f"accumulate_weighting gave {weight}; expected a finite positive number")
        if window.count == 0:
            window.unit = weight
        window.weight += weight
        return weight / (window.unit * self.accumulate)

    def _correction(self) -> float:
        if self.accumulate == 1 or self.window.count == 0:
            return 1.0
        return self.accumulate * self.window.unit / self.window.weight

    def _skip(self, scaled: bool) -> None:
        self.skips += 1
        if scaled and self.window.finite:
            self._add_note("skipped: the scaled gradients overflowed, the scaler lowers its scale")
            return
        if self.guard is not None:
            self.guard.put_back()
        what = "gradient" if self.window.finite else "loss"
        self._add_note(f"skipped: non-finite {what}")
        error = self._nonfinite_error(what)
        self._report(f"{error.found}; by parameter: {error.statistics}")
        if self._nonfinite == "halt":
            self._request_halt(error)

    def _nonfinite_error(self, what: str) -> NonFiniteError:
        counts = numerics.nonfinite_counts(self.model.named_parameters())
        return NonFiniteError(what, self.place.epoch, self.place.batch, self.loss, counts)

    def _learning_rates(self) -> dict[str, float]:
        rates = [float(group["lr"]) for phase in self.phases for group in phase.optimizer.param_groups]
        return {"lr": rates[0]} if len(rates) == 1 else {f"lr/{i}": rate for i, rate in enumerate(rates)}
