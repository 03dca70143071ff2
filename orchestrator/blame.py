"""Blame: what made a loss or a gradient not finite, found by doing the guilty batch again under watch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from orchestrator import numerics, past
from orchestrator.anomaly import INF, NAN, Origin, Watch, describe, kinds_of, named_tensors
from orchestrator.errors import NonFiniteError
from orchestrator.past import SeekError
from states.errors import InterlockError
from states.table import State
from tracking.journal import TRAIN, Journal
from tracking.runs import RunFolder

if TYPE_CHECKING:
    from orchestrator.trainer import Trainer

__all__ = ["Blame", "BlameError", "find_nonfinite", "guilty_batch", "stand_before"]

Kind = Literal["parameter", "buffer", "batch", "module", "loss", "backward"]

_SKIPPED = "skipped: non-finite"


class BlameError(InterlockError):
    """Nothing was found that is not finite, where something was said to be."""


@dataclass(frozen=True)
class Blame:
    """What made a loss or a gradient not finite, and where: in which `epoch`, `batch` and `phase`."""

    epoch: int
    batch: int
    phase: str
    kind: Kind
    """What is guilty: a parameter or a buffer that was not finite before; the data; a module's forward pass; the
    loss function (or what `forward` does outside of any module); or the backward pass of what is named."""
    name: str
    """The guilty parameter's, buffer's, module's or loss function's name; how the tensor is reached from `batch`."""
    type: str
    """The class of the module; of a parameter or buffer that of the module it belongs to."""
    function: str
    """As torch calls it: "torch.log", or "LogBackward0" of a backward pass; empty where it is not known."""
    line: str
    """Where the user's code called it; empty where no such code did."""
    given: str
    """What of its input was not finite, and may be a mask, such as "3 -infinite of 80 elements"; mostly empty."""
    made: str
    """What was found, such as "3 NaN of 80 elements"."""

    def __str__(self) -> str:
        phase = f", phase {self.phase!r}" if self.phase else ""
        text = f"epoch {self.epoch}, batch {self.batch}{phase}: {self._what()}"
        if self.function:
            text += f"\n  in {self.function}"
            text += f", called at {self.line}" if self.line else ""
        return text

    def _what(self) -> str:
        named = f"{self.name} ({self.type})" if self.name and self.type else self.name or self.type
        given = f"an input with {self.given}" if self.given else "finite values"
        if self.kind in ("parameter", "buffer"):
            return f"the {self.kind} {named} is not finite before the forward pass: {self.made}"
        if self.kind == "batch":
            return f"the data is not finite: {self.name} has {self.made}"
        if self.kind == "module":
            return f"module {named} was given {given}, and its output has {self.made}"
        if self.kind == "loss":
            return f"what modules gave is finite, and the loss function {named} made of it {self.made}"
        where = f"module {named}" if named else "what is outside of any module"
        return f"the loss is finite; the backward pass of {where} was given finite gradients, and made {self.made}"


def stand_before(trainer: Trainer, run: str | os.PathLike[str] | None = None) -> None:
    """Have the trainer stand in BATCH_START of the batch that made a loss or gradient not finite.

    One that has gone back already stays with its batch, or goes to the earlier one of the same accumulation
    window that spoilt the gradients. Raises BlameError if the run has no such batch.
    """
    went = trainer._past
    if went is None or run is not None:
        folder = past.run_of(trainer, run)
        trainer.seek(*guilty_batch(folder), run=folder.path)
    elif trainer.batch < 0:
        raise BlameError(
            f"blame in {trainer.state.value} of epoch {trainer.epoch}, where there is no batch; expected one: "
            "seek(epoch, batch) first"
        )
    elif trainer.state is not State.BATCH_START:
        trainer.seek(trainer.epoch, trainer.batch)
    while trainer.batch > 0 and _window_is_spoilt(trainer):
        trainer.seek(trainer.epoch, max(0, trainer.batch - max(1, trainer._training.work.window.count)))


def guilty_batch(run: RunFolder) -> tuple[int, int]:
    """Epoch and batch where the newest loss or gradient that is not finite was recorded.

    Raises BlameError if there is none.
    """
    with Journal.open(run) as journal:
        attempts, last = journal.attempts(), journal.last_transition()
        if attempts and last and attempts[-1].exception.startswith(NonFiniteError.__name__):
            return NonFiniteError.place_in(attempts[-1].exception) or (last.epoch, last.batch)
        skipped = {metric.epoch for metric in journal.metrics(key="skipped", scope=TRAIN)}
        under_way = {last.epoch} if last else set()
        for epoch in sorted(skipped | under_way, reverse=True):
            found = _newest_skip(journal, epoch)
            if found is not None:
                return found
        # On an accelerator a skip is known too late for a note of its step.
        reported = [place for log in journal.logs() if (place := NonFiniteError.place_in(log.message))]
    if reported:
        return max(reported)
    raise BlameError(
        f"{run.id} has no loss and no gradient that is not finite; expected a run that halted on one, or skipped a "
        "batch. To look at a certain batch: seek(epoch, batch), then blame()"
    )


def _newest_skip(journal: Journal, epoch: int) -> tuple[int, int] | None:
    start = journal.find(epoch, None, State.EPOCH_START)
    found = None
    for row in journal.transitions(scope=TRAIN, after=start.seq if start else 0):
        if row.epoch > epoch:
            break
        if row.dest is State.STEP and row.note.startswith(_SKIPPED):
            found = row.epoch, row.batch
    return found


def _window_is_spoilt(trainer: Trainer) -> bool:
    window = trainer._training.work.window
    if window.count == 0:
        return False
    return not window.finite or bool(_spoilt_gradients(trainer))


def find_nonfinite(trainer: Trainer) -> Blame:
    """Name what makes the batch at hand not finite; the trainer stands in BATCH_START, or in STEP before a phase.

    Its machine goes on, through the other phases and to the end of the accumulation window if need be, and ends in
    FORWARD or BACKWARD of what is guilty. Nothing is recorded. Under a gradient scaler only forward passes are looked
    at: gradients that overflow are the scaler's business. Compiled modules are run uncompiled.

    Raises BlameError where everything is finite.
    """
    work, began = trainer._training.work, f"epoch {trainer.epoch}, batch {trainer.batch}"
    found: Blame | None = None
    with past.replaying(trainer):
        work.keep = trainer._training.snapshots.before_forward
        while found is None and not _over(trainer):
            before_forward = trainer.state is State.BATCH_START and not work.situation.empty
            if before_forward or (trainer.state is State.STEP and work.situation.another_phase):
                found = _look(trainer)
            else:
                past.fire(trainer)
    if found is None:
        raise BlameError(
            f"everything is finite from {began} to batch {trainer.batch}; expected a loss or a gradient that is not. "
            "Is this the batch that was recorded as such, done again with the same code?"
        )
    went = trainer._past
    if went is not None:
        with contextlib.suppress(SeekError):  # it went another way than the recorded run
            moment = past.moment_at(went.run, trainer.epoch, trainer.batch, trainer.state, trainer.phase)
            trainer._past = replace(went, moment=moment)
    return found


def _over(trainer: Trainer) -> bool:
    """Whether the batch, and the window that it is in, are done."""
    ended = trainer.state is State.BATCH_END and not trainer._training.work.window.count
    return ended or trainer.state in (State.EPOCH_END, State.DONE)


def _look(trainer: Trainer) -> Blame | None:
    """One phase of the batch at hand, forward and backward, under watch."""
    work = trainer._training.work
    watch = Watch(trainer.model)
    try:
        before = _parameter(trainer)
        with watch:
            past.fire(trainer)
        work.settle()
        if kinds_of(work.loss):
            return before or _of_forward(trainer, watch)
        if work.precision.scalers[work.phase] is not None:
            return None
        past.fire(trainer)
        spoilt = _spoilt_gradients(trainer)
        return before or _of_backward(trainer, watch, spoilt) if spoilt else None
    finally:
        watch.close()


def _spoilt_gradients(trainer: Trainer) -> dict[str, int]:
    """Of the parameters that the phase at hand updates: how many elements of each gradient are not finite."""
    optimizer = trainer.phases[trainer._training.work.phase].optimizer
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    named = ((name, p) for name, p in trainer.model.named_parameters() if id(p) in own)
    return numerics.nonfinite_counts(named)


# -- who it was --------------------------------------------------------------------------------------


def _of_forward(trainer: Trainer, watch: Watch) -> Blame:
    """Whom the loss, which is not finite, is to be blamed on."""
    guilty = next(iter(watch.modules), None)
    if guilty is not None and guilty.module is not None:
        return _buffer(trainer, guilty) or _blame(trainer, "module", guilty.module, guilty)
    if guilty is None:
        data = _data(trainer)
        if data is not None:
            return data
    outside = [origin for origin in watch.functions if origin.module is None]
    origin = guilty or next(iter(outside), Origin(None, "", "", "", ""))
    return _blame(
        trainer,
        "loss",
        _loss_name(trainer),
        replace(origin, made=f"a value of {trainer._training.work.loss}"),
    )


def _of_backward(trainer: Trainer, watch: Watch, spoilt: Mapping[str, int]) -> Blame:
    """Whom gradients that are not finite are to be blamed on."""
    if watch.backward is not None:
        return _blame(trainer, "backward", watch.backward.module or "", watch.backward)
    data = _data(trainer)
    if data is not None:
        return data
    # Each share of a gradient was finite, their sum is not.
    name, count = next(iter(spoilt.items()))
    made = f"{count} of the elements of the gradient of {name}"
    return _blame(trainer, "backward", name.rpartition(".")[0], Origin("", "", "", "", made))


def _parameter(trainer: Trainer) -> Blame | None:
    for name, parameter in trainer.model.named_parameters():
        if kinds_of(parameter):
            return _blame(trainer, "parameter", name, _found(parameter))
    return None


def _buffer(trainer: Trainer, guilty: Origin) -> Blame | None:
    """A buffer of the module, or in it, that is not finite; negative infinity may be a mask."""
    prefix = f"{guilty.module}." if guilty.module else ""
    for name, buffer in trainer.model.get_submodule(guilty.module or "").named_buffers():
        if kinds_of(buffer) & {NAN, INF}:
            return _blame(trainer, "buffer", prefix + name, _found(buffer))
    return None


def _data(trainer: Trainer) -> Blame | None:
    """The first tensor of the batch that is not finite."""
    for path, tensor in named_tensors(trainer.data, "batch"):
        if kinds_of(tensor):
            return _blame(trainer, "batch", path, _found(tensor))
    return None


def _found(tensor: Tensor) -> Origin:
    return Origin(None, "", "", "", describe(tensor))


def _loss_name(trainer: Trainer) -> str:
    forward = trainer.phases[trainer._training.work.phase].forward
    return str(
        trainer._settings.params.get("loss") or getattr(forward, "__qualname__", type(forward).__name__)
    )


def _blame(trainer: Trainer, kind: Kind, name: str, origin: Origin) -> Blame:
    return Blame(
        epoch=trainer.epoch,
        batch=trainer.batch,
        phase=trainer.phase,
        kind=kind,
        name=name,
        type=_type(trainer, kind, name, origin),
        function=origin.function,
        line=origin.line,
        given=origin.given,
        made=origin.made,
    )


def _type(trainer: Trainer, kind: Kind, name: str, origin: Origin) -> str:
    if kind in ("batch", "loss") or (kind == "backward" and origin.module is None):
        return ""
    owner = name.rpartition(".")[0] if kind in ("parameter", "buffer") else name
    return type(trainer.model.get_submodule(owner)).__name__
