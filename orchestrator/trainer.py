"""Trainer: fit, start, advance, save, seek. Where the parts meet, and nothing else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from orchestrator import configuration, errands, recovery, warm_start
from orchestrator.attempt import Attempt, opened_here
from orchestrator.callbacks.base import Callback, overrides
from orchestrator.callbacks.checkpointing import Checkpointing
from orchestrator.callbacks.logs import Logging
from orchestrator.callbacks.lr_scheduling import LRScheduling
from orchestrator.compatibility import check_names
from orchestrator.configuration import UNSET
from orchestrator.data import BatchStream
from orchestrator.divergence import Divergence
from orchestrator.errors import ConfigurationError, TaintedError
from orchestrator.evaluation import Evaluation
from orchestrator.exactness import risks
from orchestrator.final_model import HandingOver
from orchestrator.launched import asked_to_resume, tell_begun
from orchestrator.metrics import EpochMetrics, Metric
from orchestrator.named import named
from orchestrator.numerics import Precision
from orchestrator.phase import Forward, Phase
from orchestrator.requests import HaltRequest, Save
from orchestrator.result import Result
from orchestrator.signals import Signals, in_notebook
from orchestrator.snapshot.capture import capture_random, restore_random
from orchestrator.snapshot.info import BRANCH
from orchestrator.snapshot.optimizers import follow_parameters
from orchestrator.snapshot.tensors import replicas
from orchestrator.snapshot.watch import Watch, parts_of
from orchestrator.state import TrainingState, callback_names
from orchestrator.training import Training
from orchestrator.warm_start import WarmStart
from orchestrator.warning import warn
from orchestrator.work import Limits, Place
from states.table import ARCS, TERMINAL, Arc, State, Trigger
from tracking.delivery import Tracker
from tracking.own_artifacts import writing
from tracking.rows import Parent
from tracking.runs import RunFolder

if (
    TYPE_CHECKING
):  # imported by the methods that use them: a training that never looks back starts without them
    from orchestrator.blame import Blame
    from orchestrator.past import Past, Replay, Stretch
    from orchestrator.rehearsal import Rehearsal

__all__ = ["Trainer"]

HookT = TypeVar("HookT", bound=Callable[[], object])


class Trainer:
    """Trains a model through an explicit state machine that is recorded, checkpointed and resumable.

    One batch is `fetch -> forward -> backward -> step -> end_batch`; `fit` is

        while not done:
            fire(next_trigger(situation))    # before-hooks, work, change of state, after-hooks, journal
            carry out what was asked for     # saves, stops, halts

    Args:
        model: any `nn.Module`; moved to `device`.
        optimizer: a torch optimizer over parameters of `model`, or a list of `Phase`.
        loss_fn: `(outputs, targets) -> loss`, a scalar floating-point tensor; None where `forward` or
            phases compute it.
        train_loader: a `DataLoader`, or a sequence of batches.
        val_loader: the same, or `{name: loader}`; evaluated at each epoch's end.
        epochs: how many epochs the training has. It ends there or at `max_batches`, whichever comes first; at least
            one of them is given.
        max_batches: how many batches it has.
        max_time: seconds of this attempt; then it halts and exits with status 75.
        forward: `(model, batch) -> loss` or `(loss, outputs, targets)`; by default a batch is a pair
            `(inputs, targets)` and the loss is `loss_fn(model(inputs), targets)`.
        metrics: `{name: torchmetrics object or (outputs, targets) -> scalar}`.
        scheduler: a torch scheduler, stepped each epoch, or an `LRScheduling`.
        accumulate: micro-batches for each optimizer step; gradients are averaged over them.
        accumulate_weighting: "batches", "samples", or `(batch) -> weight`.
        clip_grad_norm: the 2-norm that gradients are scaled down to.
        precision: "fp32", "bf16" or "fp16".
        nonfinite: "halt" or "skip": what to do about NaN and infinity in losses and gradients.
        on_divergence: "warn" or "halt": what to do when a batch that is done again, after a resume or on the way of
            a `seek`, has another loss than the recorded one.
        validate_every: validate every so many batches instead of at each epoch's end.
        callbacks: called in this order.
        checkpoint: a `Checkpointing`, or None for no checkpoints.
        log: a `Logging`, or None for silence.
        track: a `Tracker` such as `MLflow()`, or None.
        name: the run's name; by default the script's.
        root: the folder of runs.
        device: "auto" takes an accelerator where there is one.
        deterministic: use torch's deterministic algorithms during this training.
        init_from: where a new run takes its weights from, and nothing else: a run's name or folder, a
            checkpoint, a `.safetensors` file or a saved `state_dict()`. A run that is resumed has its own.
        config: your own settings, to be shown among the parameters, secrets masked: a dict (nested ones too), a
            dataclass, or what argparse gives. Nothing here reads them.

    Raises:
        ConfigurationError: an argument that cannot be honoured; nothing has been written.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Phase],
        loss_fn: Callable[[Any, Any], Any] | None,
        train_loader: Any,
        val_loader: Any = None,
        *,
        epochs: int | None = None,
        max_batches: int | None = None,
        max_time: float | None = None,
        forward: Forward | None = None,
        metrics: Mapping[str, Metric] | None = None,
        scheduler: Any = None,
        accumulate: int = 1,
        accumulate_weighting: str | Callable[[Any], float] = "batches",
        clip_grad_norm: float | None = None,
        precision: str = "fp32",
        nonfinite: str = "halt",
        on_divergence: str = "warn",
        validate_every: int | None = None,
        callbacks: Sequence[Callback] = (),
        checkpoint: Checkpointing | None = UNSET,
        log: Logging | None = UNSET,
        track: Tracker | None = UNSET,
        name: str | None = None,
        root: str | Path = "runs",
        device: str | torch.device = "auto",
        deterministic: bool = False,
        init_from: str | os.PathLike[str] | None = None,
        config: Any = None,
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        settings = configuration.check(given)
        self.model = model
        """The model that is trained."""
        self.device = settings.device
        """Where it is trained."""
        self.epochs = epochs
        self.max_batches = max_batches
        self.phases = settings.phases
        """The phases of a batch; one without a name where `optimizer` is an optimizer."""
        self.validation_model: nn.Module = model
        """What validation evaluates and what is handed over at the end; `EMA(validate=True)` puts its average here."""
        self.run: RunFolder | None = None
        """The run's folder, once it is open: `trainer.run.id`, `trainer.run.path`, `trainer.run.journal`."""
        self.replaying = False
        """Whether the past is being run again, by `seek` or `replay`: nothing is recorded meanwhile."""
        self.rehearsing = False
        """Whether what is done is a rehearsal, undone afterwards: nothing is recorded meanwhile."""
        self.warm_start: WarmStart | None = None
        """What a new run took of the weights that `init_from` names."""
        self._settings = settings
        model.to(self.device)
        # A loss function can be a module with state of its own: class weights, or a counter.
        self._loss = loss_fn if isinstance(loss_fn, nn.Module) else None
        if self._loss is not None:
            self._loss.to(self.device)
        for phase in self.phases:
            follow_parameters(phase.optimizer)
        self._functions = [loss_fn, forward, accumulate_weighting, *(metrics or {}).values()]
        self._functions += [phase.forward for phase in self.phases]
        self._data = [train_loader, *settings.validation_loaders.values()]
        self._past: Past | None = None
        self._evaluating: Evaluation | None = None
        """What `evaluate` is doing."""
        self._beginning = False
        shared_precision = Precision(precision, self.device, len(self.phases))
        named_metrics = dict(metrics or {})
        evaluations = {
            key: Evaluation(
                loader,
                name=key,
                forward=settings.evaluation_forward(key),
                metrics=named_metrics,
                device=self.device,
                precision=shared_precision,
                journal=lambda arc, work: self._training.journal_validation(arc, work),
            )
            for key, loader in settings.validation_loaders.items()
        }
        epoch_metrics = EpochMetrics(named_metrics)
        epoch_metrics.to(self.device)
        self._training = Training(
            evaluations,
            saves=settings.checkpoint is not None,
            on_divergence=on_divergence,
            model=model,
            phases=self.phases,
            limits=Limits(epochs, max_batches),
            accumulate=accumulate,
            weigh=settings.weigh,
            clip_grad_norm=clip_grad_norm,
            nonfinite=nonfinite,
            validate_every=validate_every,
            validate=self._validate,
            stream=BatchStream(train_loader, role="training"),
            metrics=epoch_metrics,
            device=self.device,
            precision=shared_precision,
        )
        self._final_model = HandingOver(self._training, settings)
        self._add_callbacks(scheduler, callbacks)

    def _validate(self) -> dict[str, float]:
        training = self._training
        return training.validation.run(
            self.validation_model, self.epoch, training.requests, training.halting, training.begin_validation
        )

    def _add_callbacks(self, scheduler: Any, callbacks: Sequence[Callback]) -> None:
        """Attach every callback and put what it overrides on the transitions."""
        training = self._training
        settings = self._settings
        listed: list[Callback] = []
        if scheduler is not None:
            listed.append(scheduler if isinstance(scheduler, LRScheduling) else LRScheduling(scheduler))
        listed += callbacks
        if settings.log is not None:
            listed.append(settings.log)
        if settings.checkpoint is not None:
            listed.append(settings.checkpoint)
        configuration.check_schedulers(listed)
        self._callbacks = callback_names(listed)
        self._on_train_begin: list[Callable[[], None]] = []
        for callback in listed:
            callback.attach(self)
            self._add_hooks(callback)
        training.snapshots = TrainingState(
            work=training.work,
            loop=training.loop,
            validations={name: e.work for name, e in training.validation.evaluations.items()},
            callbacks=self._callbacks,
            requests=training.requests,
            device=self.device,
            loss=self._loss,
            report=training.report,
        )

    def _make_watch(self) -> Watch:
        """What looks for state that the checkpoints have not."""
        schedulings = [c for c in self._callbacks.values() if isinstance(c, LRScheduling)]
        return Watch(
            functions=[*self._functions, *self._training.loop.hooks()],
            modules={"model": self.model}
            if self._loss is None
            else {"model": self.model, "loss": self._loss},
            hooked=self.optimizers,
            callbacks=self._callbacks,
            outside=[self, *parts_of([s.scheduler for s in schedulings])],
            data=parts_of(self._data),
        )

    def _add_hooks(self, callback: Callback) -> None:
        training = self._training
        work, place = training.work, training.work.place
        if overrides(callback, "on_train_begin"):
            self._on_train_begin.append(callback.on_train_begin)
        if overrides(callback, "on_epoch_begin"):
            training.loop.after(Trigger.BEGIN_EPOCH)(lambda: callback.on_epoch_begin(place.epoch))
        if overrides(callback, "on_batch_begin"):
            begin = callback.on_batch_begin
            # What it wraps tells whose code it is.
            training.loop.after(Trigger.FETCH)(update_wrapper(lambda: begin(place.batch), begin, (), ()))
        if overrides(callback, "on_batch_end"):
            training.loop.after(Trigger.END_BATCH)(lambda: callback.on_batch_end(place.batch, work.metrics))
        if overrides(callback, "on_epoch_end"):
            training.loop.after(Trigger.END_EPOCH)(
                lambda: callback.on_epoch_end(place.epoch, work.history[-1])
            )
        if overrides(callback, "on_train_end"):
            training.loop.on(State.DONE)(lambda: callback.on_train_end(work.history[-1]))

    # -- hooks on any transition -----------------------------------------------------------------

    def before(self, trigger: Trigger | str) -> Callable[[HookT], HookT]:
        """A decorator: call the function, without arguments, before the work of `trigger`, such as "step"."""
        return self._training.loop.before(named(Trigger, trigger, "before(trigger)"))

    def after(self, trigger: Trigger | str) -> Callable[[HookT], HookT]:
        """A decorator: call the function, without arguments, after every transition of `trigger`."""
        return self._training.loop.after(named(Trigger, trigger, "after(trigger)"))

    def on(self, state: State | str) -> Callable[[HookT], HookT]:
        """A decorator: call the function, without arguments, whenever `state`, such as "HALTED", is entered."""
        return self._training.loop.on(named(State, state, "on(state)"))

    # -- where the training stands ---------------------------------------------------------------

    def __repr__(self) -> str:
        if "_training" not in vars(self):
            return object.__repr__(self)  # of one whose constructor has raised
        of = "" if self.run is None else f" of {self.run.id}"
        place = f", epoch {self.epoch}" if self.epoch >= 0 else ""
        place += f", batch {self.batch}" if self.batch >= 0 else ""
        return f"<Trainer{of} in {self.state.value}{place}>"

    @property
    def state(self) -> State:
        """The state that the machine stands in."""
        return self._training.loop.state

    @property
    def epoch(self) -> int:
        """The epoch at hand, counted from 0; -1 before the first."""
        return self._training.work.place.epoch

    @property
    def batch(self) -> int:
        """The batch at hand within its epoch, counted from 0; -1 before the first."""
        return self._training.work.place.batch

    @property
    def batches(self) -> int:
        """Batches completed since the beginning of the run."""
        return self._training.work.place.batches

    @property
    def updates(self) -> int:
        """Optimizer updates applied since the beginning of the run."""
        self._training.work.settle()
        return self._training.work.place.updates

    @property
    def batches_per_epoch(self) -> int | None:
        """How many batches an epoch has, where the loader can tell."""
        return self._training.work.stream.length

    @property
    def data(self) -> Any:
        """The batch at hand, on the device."""
        return self._training.work.data

    @property
    def metrics(self) -> Mapping[str, float]:
        """The values of the batch at hand. On an accelerator reading them waits for it."""
        return self._training.work.metrics

    @property
    def latest(self) -> Mapping[str, float]:
        """The values of the newest batch that are known: those of the batch at hand, but on an accelerator those of one
        a little earlier, and reading never waits.
        """
        return self._training.work.latest

    @property
    def history(self) -> list[dict[str, float]]:
        """The metrics of each finished epoch."""
        return self._training.work.history

    @property
    def skipped(self) -> bool:
        """Whether the last optimizer step applied nothing because something was not finite.

        On an accelerator with `nonfinite="halt"` that is known some batches later, when the training halts.
        """
        return self._training.work.was_skipped()

    @property
    def phase(self) -> str:
        """The name of the phase at hand; empty where a batch has one."""
        return self.phases[self._training.work.phase].name

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """The optimizer of each phase."""
        return tuple(phase.optimizer for phase in self.phases)

    @property
    def validating(self) -> str | None:
        """The name of the validation loader that is gone through at this moment."""
        under_way = self._training.validation.under_way
        return None if under_way is None else under_way.name

    @property
    def divergence(self) -> Divergence | None:
        """The first loss of this attempt, or of the last seek, that was not the recorded one."""
        return self._training.divergence

    @property
    def attempt(self) -> int:
        """The number of this attempt at the run, counted from 1; 0 before `start`."""
        attempt = self._training.attempt or self._training.beside
        return attempt.number if attempt is not None else 0

    @property
    def tainted(self) -> bool:
        """Whether a transition failed half-way, so that memory holds no state of the training."""
        return self._training.tainted

    @property
    def reason(self) -> str:
        """Why the training ended, or will; empty while it goes on."""
        return self._training.ended or self._training.requests.stop or ""

    @property
    def ending(self) -> bool:
        """Whether nothing but end_epoch and finish is left, unless the run is extended later."""
        situation = self._training.work.situation
        if situation.stop or not situation.batches_left:
            return True
        return self.epoch_complete and not situation.epochs_left

    @property
    def epoch_complete(self) -> bool:
        """Whether every batch of the epoch at hand has been taken."""
        return not self._training.work.situation.has_batch

    # -- requests --------------------------------------------------------------------------------

    def log(self, name: str, value: Any) -> None:
        """Add a named value, a number or a scalar tensor, to the batch at hand, or to the epoch at its end.

        From `forward` or a hook; averaged over the epoch, weighted by batch size, and tracked like the loss.
        """
        training = self._training
        evaluating = self._evaluating or training.validation.under_way
        if evaluating is not None:
            evaluating.work.log(name, value)
            return
        if not isinstance(name, str) or not name:
            raise ConfigurationError(
                f'log({name!r}, ...): expected a name, a string such as "perplexity", then the value'
            )
        if name.split("/")[0] in {"lr", *training.validation.evaluations}:
            raise ConfigurationError(
                f"log({name!r}, ...): names that begin so are interlock's own; log it by another"
            )
        if training.work.computing:
            training.work.log(name, value)
        elif self.state is State.EPOCH_END:
            training.work.log_epoch(name, value)
        elif self.state in (State.IDLE, State.EPOCH_START, *TERMINAL):
            raise ConfigurationError(
                f"log({name!r}, ...) in {self.state.value}, where there is neither a batch nor an epoch to add it to; "
                "log from forward, or from a hook of a batch or of an epoch's end"
            )
        else:
            training.work.log(name, value)

    def note(self, text: str) -> None:
        """Add a note to the transition under way, from a hook: the journal keeps it, `interlock log` shows it.

        After what the transition notes itself, separated by "; ". Raises ConfigurationError between two.
        """
        training = self._training
        if not training.loop.inside:
            raise ConfigurationError(
                f"note({text!r}) in {self.state.value}, where no transition is under way to add it to; "
                "call it from a hook"
            )
        training.work.note = f"{training.work.note}; {text}" if training.work.note else text

    def say(self, text: str) -> None:
        """Have `Logging` say something, and keep it in the journal's messages; from anywhere, at any time."""
        if self._training.attempt is not None and not self._training.attempt.closed:
            self._training.attempt.say(text)
        if self._settings.log is not None:
            self._settings.log.say(text)

    def artifact(self, path: str) -> AbstractContextManager[Path]:
        """Keep a file with the run, and show it among its artifacts: an image, a sample, a table.

            with trainer.artifact(f"samples/epoch-{trainer.epoch}.png") as file:
                figure.savefig(file)

        From a hook, or anywhere in an attempt. The file lies in the run's folder, in `artifacts/`, whole or not at
        all, and is delivered from there. Another one of the same path, as after a resume, takes its place. Where the
        past is run again, by `seek` or `replay`, nothing is kept.

        Raises ArtifactError for a path that cannot be one, and where no file was written.
        """
        training = self._training
        if self.replaying or self._past is not None:
            return writing(None, path)
        if training.attempt is None or training.attempt.closed:
            raise ConfigurationError(
                f"artifact({path!r}) where no attempt is under way (the training stands in {self.state.value}): "
                "call it from a hook, such as one of @trainer.on(State.DONE) at the end"
            )
        return writing(training.attempt.run, path)

    def save(self, at: State | str | None = None) -> Save:
        """Ask for a checkpoint of this boundary; `.wait()` on what is returned gives its path.

        Between transitions it is taken at once, from a hook when the transition is over. With `at` it is taken
        when the training next stands in that state (at once where it does already).

        The graph of FORWARD cannot be stored. Where the trainer stands there by `advance` or `seek`, or `at` asks
        for it, what came before the forward pass is saved instead, and a resume does the pass again; otherwise
        the save is taken one transition later.

        Raises TaintedError after work or a hook has raised.
        """
        at = None if at is None else named(State, at, "save(at)")
        training = self._training
        if training.tainted:
            raise TaintedError(
                "a transition failed half-way, so memory holds no state of the training: "
                "resume from the newest checkpoint instead"
            )
        save = Save()
        if self.replaying or self.rehearsing:
            what = "the past is being run again" if self.replaying else "this is a rehearsal"
            save.abandoned(f"{what}, of which nothing is kept")
            return save
        if self._past is not None:
            self.start()  # going on from there, as a run of its own
        if training.attempt is None or training.attempt.closed:
            return self._saved_at_the_end(save)
        outside = not training.loop.inside and not self._beginning
        if at is not None and not (outside and self.state is at and training.saveable()):
            training.requests.add_save(save, at)
            if at is State.FORWARD:
                training.work.keep = training.snapshots.before_forward
            return save
        training.requests.add_save(save)
        if outside:
            while training.requests.saves and not training.saveable() and training.fire_next():
                pass
            training.carry_out_saves()
        return save

    def _saved_at_the_end(self, save: Save) -> Save:
        """After the end of an attempt: the checkpoint that was made of it."""
        last = self._training.attempt.last_save() if self._training.attempt is not None else None
        if last is None:
            raise ConfigurationError(
                f"there is no attempt under way to save (the training stands in {self.state.value}): "
                "call start(), advance() or fit() first"
            )
        save.begun(last)
        return save

    def stop(self, reason: str = "stopped") -> None:
        """Finish the batch, end the epoch and go to DONE. Part of the training state: survives a resume."""
        training = self._training
        training.requests.stop = training.requests.stop or reason
        training.work.situation.stop = True

    def halt(self, reason: str = "halted") -> None:
        """Save at the next boundary and go to HALTED; resume to go on from there."""
        self._training.requests.add_halt(HaltRequest(reason))

    # -- running ---------------------------------------------------------------------------------

    def fit(
        self,
        resume: bool | str | os.PathLike[str] = False,
        override: Collection[str] = (),
        rehearse: bool = False,
    ) -> Result:
        """Train until DONE or HALTED.

        Args:
            resume: False starts a new run. "auto" starts the run of this name, continues it where it is
                unfinished, returns the result where it is done, or extends it where more is asked for. A
                run's name or folder, or a checkpoint's path, continues from there. "mlflow:RUN_ID" continues a run
                that MLflow has, on any machine: its journal and newest checkpoint are downloaded; @best,
                @epoch=2 or @epoch=2,batch=113 after it mean another checkpoint.
            override: names of what may differ from the checkpoint, and is then this trainer's: "model",
                "optimizer", "scheduler", "metrics", "data", "accumulate", "accumulate_weighting",
                "clip_grad_norm", "precision", "validate_every", and hyper-parameters such as "lr".
            rehearse: `rehearse()` first, from where the training begins or is resumed. A new run whose rehearsal
                fails is not even made; one that is resumed halts where it stood.

        Returns:
            The result. After SIGTERM and Ctrl-C, `fit` saves, halts and leaves by SystemExit(143) or
            KeyboardInterrupt; when `max_time` is up, by SystemExit(75).

        Raises:
            NonFiniteError: a loss or gradient was not finite and `nonfinite="halt"`.
            Exception: whatever a hook, the model or the data raised, unchanged; in a rehearsal with a note.
        """
        training = self._training
        training.loop.check_outside()
        errands.carry_out(self)
        saving = "saves" if self._settings.checkpoint is not None else "keeps nothing (checkpoint=None)"
        told = f"Ctrl-C: the training {saving} at the next boundary and leaves; Ctrl-C again stops it at once, unsaved"
        told = "" if self._settings.log is None or in_notebook() else told
        with Signals(training.request_signal_halt, training.waits, told):
            if training.attempt is None or training.attempt.closed:
                if self.state is not State.DONE:
                    self.start(resume, override, rehearse)
            elif resume or override:
                raise ConfigurationError(
                    "fit(resume=...) on a training that has started; expected fit(), which goes on with it, or "
                    "resume= in start()"
                )
            elif rehearse:
                self._rehearse_or_close()
            try:
                training.run()
            finally:
                self.close()
        return self._leave()

    def start(
        self,
        resume: bool | str | os.PathLike[str] = False,
        override: Collection[str] = (),
        rehearse: bool = False,
    ) -> None:
        """Open the run and stand at its first state: IDLE, or the state of the checkpoint.

        `fit` and `advance` do it themselves if need be; the arguments are as for `fit`. Where `interlock seek`,
        `replay` or `blame` has started the script, that is done instead, and left by SystemExit.
        """
        training = self._training
        errands.carry_out(self)
        if training.attempt is not None and not training.attempt.closed:
            raise ConfigurationError(
                f"start() in {self.state.value}: this training has started already; go on with advance() or fit()"
            )
        if self.state is State.DONE:
            raise ConfigurationError(
                "this training is done; to extend it, build a Trainer that asks for more"
            )
        configuration.check_destination(self._settings)
        if self._settings.checkpoint is not None:
            training.snapshots.check_storable()
        if self._past is not None:
            if resume:
                raise ConfigurationError(
                    f"resume={resume!r} on a trainer that has gone back to {self._past.moment}, from where it goes "
                    "on as a new run; expected resume=False, or another Trainer"
                )
            self._branch(self._past)
            if rehearse:
                self._rehearse_or_close()
            return
        if self._settings.init_from is not None and resume not in (False, "auto"):
            raise ConfigurationError(
                f"resume is {str(resume)!r} and init_from {str(self._settings.init_from)!r}; expected one: "
                "a run that is resumed goes on with its own weights, a new one may begin with those of another"
            )
        if training.attempt is not None and not resume:
            resume = training.attempt.run.path  # a notebook whose fit was interrupted goes on
        resume = asked_to_resume(self._settings.name) or resume
        names = check_names(override, resume, training.snapshots)
        configuration.set_determinism(self._settings)
        try:
            plan = recovery.plan(resume, self._settings, training.work.limits)
            rehearsed = self._rehearse() if rehearse and plan.run is None else None
            self._open(plan, names)
        except BaseException:
            configuration.restore_determinism(self._settings)
            raise
        if plan.finished:
            configuration.restore_determinism(self._settings)
            return
        training.renew(plan.expected)
        if plan.checkpoint is not None:
            training.work.place.epoch, training.work.place.batch = (
                plan.checkpoint.info.epoch,
                plan.checkpoint.info.batch,
            )
            training.loop.stand(State.HALTED)
        try:
            self._begin(training.found)
        except BaseException as error:
            training.fail(error)
            self.close()
            raise
        if rehearsed is not None:
            self.say(str(rehearsed))
        elif rehearse and plan.run is not None:
            self._rehearse_or_close()

    def rehearse(self) -> Rehearsal:
        """Do what a training consists of once, and undo it: what would fail after hours fails now.

        Two batches, or as many more as make an optimizer step (`accumulate`); two of each validation loader, with
        the metrics over them; the end of an epoch with schedulers and callbacks. Then a checkpoint is written in a
        scratch folder on the disk that the run is on, read, restored and compared, bit for bit, and its size is
        compared with what is free there. `fit(rehearse=True)` does it before it trains.

        Afterwards everything is as it was, bit for bit, whatever was raised: weights, optimizers, buffers, gradients,
        random states, the order of the data, metrics, history, callbacks with what they keep in their attributes.
        Nothing is recorded or tracked but a line that says so. Hooks are called as in the training. Before it has
        started `on_train_begin` is too, with a run's folder that is thrown away; `on_train_end` never is.

        What your code does outside of that cannot be undone: files elsewhere, what is printed, services that are
        called, global variables that it sets anew (a warning names those that it reads). Hooks can ask
        `trainer.rehearsing`.

        Raises:
            Exception: what would have been raised later, unchanged but for a note of what was being rehearsed.
            ConfigurationError: the training is at its end, or cannot be put back.
            DiskFullError: the checkpoints that are kept have no room.
            RehearsalError: something could not be put back; the trainer is `tainted`.
        """
        errands.carry_out(self)
        configuration.check_destination(self._settings)
        rehearsal = self._rehearse()
        assert rehearsal is not None  # only the signals that `fit` takes break it off
        if self._training.attempt is not None and not self._training.attempt.closed:
            self.say(str(rehearsal))
        elif self._settings.log is not None:
            self._settings.log.announce(str(rehearsal))
        return rehearsal

    def _rehearse(self) -> Rehearsal | None:
        from orchestrator import rehearsal

        self._training.loop.check_outside()
        return rehearsal.rehearse(self)

    def _rehearse_or_close(self) -> None:
        """Rehearse where the run stands; where that fails, end the attempt as it stands."""
        training = self._training
        try:
            if (rehearsal := self._rehearse()) is not None:
                self.say(str(rehearsal))
        except BaseException as error:
            reason = f"the rehearsal failed: {type(error).__name__}: {error}"
            training.requests.add_halt(HaltRequest(reason, save=not training.tainted, error=error))
            self.close()
            raise

    def _open(self, plan: recovery.Plan, override: frozenset[str]) -> None:
        """See that the checkpoint fits, then open the attempt; or stand at the end of a run that is done."""
        training = self._training
        training.found = plan.checkpoint
        try:
            if training.found is not None:
                training.found = recovery.check(
                    training.found, training.snapshots, self._settings, training.work.stream, override
                )
        except BaseException:
            plan.release()
            raise
        if plan.finished:
            assert plan.run is not None
            if plan.run.path.resolve() in opened_here():
                warn(
                    f"{plan.run.id} was trained by another Trainer of this process and is done: nothing is trained "
                    "and the model gets its weights. If this is another training, give it a name= of its own"
                )
            training.snapshots.begin(self._make_watch())
            training.restore()
            self._stand_done(plan.run)
            tell_begun(plan.run)
            return
        settings = self._settings
        self.warm_start = None
        weights: dict[str, torch.Tensor] = {}
        if plan.run is None and settings.init_from is not None:
            self.warm_start, weights = warm_start.read(settings.init_from, settings.root, self.model)
        parent = None if self.warm_start is None else self.warm_start.source.parent
        attempt = training.open(replace(plan, checkpoint=training.found), settings, parent)
        self.run = attempt.run
        tell_begun(attempt.run)
        self._final_model.begin()
        if self.warm_start is not None:
            warm_start.apply(weights, self.model)
            attempt.say(str(self.warm_start))

    def _begin(self, checkpoint: recovery.Found | None) -> None:
        """The beginning of an attempt: on_train_begin, then the checkpoint of IDLE, or resume."""
        training = self._training
        assert training.attempt is not None
        for risk in risks(self.model, self.device):
            training.report(risk)
            warn(risk)
        self._beginning = True
        for hook in self._on_train_begin:
            hook()
        self._beginning = False
        training.snapshots.begin(self._make_watch())
        training.attempt.restart_clock()
        if checkpoint is not None:
            names = dict.fromkeys(line.split(":")[0] for line in checkpoint.overridden)
            said = f", overridden: {', '.join(names)}" if names else ""
            training.work.note = f"from {checkpoint.info.name}{said}"
            training.loop.fire(Trigger.RESUME, checkpoint.state)
        elif self._settings.checkpoint is not None:
            training.requests.add_save(Save())
        training.carry_out()

    def advance(self, until: State | str | None = None) -> Arc | None:
        """Fire one transition, or go on up to a state; DONE and HALTED end it too.

        Returns the last transition, or None where nothing was left to do.
        """
        until = None if until is None else named(State, until, "advance(until)")
        training = self._training
        if self.state is not State.DONE and (training.attempt is None or training.attempt.closed):
            self.start()
        last = None
        keep = training.work.keep
        if until in (None, State.FORWARD):
            training.work.keep = training.snapshots.before_forward
        try:
            while training.fire_next():
                last = training.loop.last
                if until is None or self.state is until:
                    break
        finally:
            training.work.keep = keep
        if self.state in TERMINAL:
            self.close()
            if last is not None and training.left is not None and training.left.error is not None:
                raise training.left.error
        return last

    def _branch(self, past: Past) -> None:
        """Go on from the past as a new run, which begins with a checkpoint of this moment."""
        training = self._training
        states = replicas({name: callback.state_dict() for name, callback in self._callbacks.items()})
        random = capture_random([self.device] if self.device.type == "cuda" else [])
        parent = Parent(past.run.id, str(past.run.path), past.moment.seq, past.checkpoint, "branch")
        attempt = training.open(recovery.Plan(), self._settings, parent)
        self.run, self._past = attempt.run, None
        self._final_model.begin()
        try:
            self._beginning = True
            for hook in self._on_train_begin:
                hook()
            self._beginning = False
            for name, callback in self._callbacks.items():  # what the past left, not what a beginning sets
                callback.load_state_dict(states[name])
            restore_random(random)
            attempt.restart_clock()
            work, note = training.work, f"branched from {past.run.id} at {past.moment}"
            place, work.place, work.note = work.place, Place(), note
            attempt.record(ARCS.index(Arc(Trigger.HALT, State.IDLE, State.HALTED)))
            work.place, work.note = place, note
            attempt.record(ARCS.index(Arc(Trigger.RESUME, State.HALTED, self.state)))
            if self._settings.checkpoint is not None:
                training.requests.add_save(Save())
            training.carry_out_saves(BRANCH)
        except BaseException as error:
            training.fail(error)
            self.close()
            raise

    # -- the past --------------------------------------------------------------------------------

    def seek(
        self,
        epoch: int | None = None,
        batch: int | None = None,
        state: State | str | None = None,
        *,
        phase: str | None = None,
        run: str | os.PathLike[str] | None = None,
    ) -> Past:
        """Stand at a moment of a run again, bit for bit.

        The newest checkpoint from before that moment is restored, and what followed is done again, each loss being
        compared with the recorded one (`on_divergence`). Nothing is written meanwhile, and the run stays as it
        is: to go on from there, with `advance`, `fit` or `save`, begins a new run that is linked to it.
        An attempt under way is closed first.

        Args:
            epoch: counted from 0.
            batch: counted from 0 within the epoch.
            state: by default BATCH_START, or EPOCH_START where no batch is given. IDLE is the very beginning.
            phase: the phase whose FORWARD, BACKWARD or STEP is meant; by default the first.
            run: a run's name or folder, or "mlflow:RUN_ID" as for `fit`; by default the run at hand, or the newest of
                this trainer's name.

        Raises:
            SeekError: the run was never there, or the training went another way this time.
            NoCheckpoint: there is none from before that moment.
            CheckpointMismatch: this trainer is not the one that the run was made with.
            DivergenceError: with `on_divergence="halt"`.
        """
        from orchestrator import past

        state = None if state is None else named(State, state, "seek(state)")
        self._training.loop.check_outside()
        self._past = past.seek(self, epoch, batch, state, phase, run)
        return self._past

    def replay(
        self,
        first: Stretch,
        last: Stretch,
        callbacks: Sequence[Callback] = (),
        *,
        run: str | os.PathLike[str] | None = None,
    ) -> Replay:
        """Run a stretch of the past again with more callbacks: an answer to a question asked afterwards.

        The stretch is reached as by `seek`; the callbacks are attached where it begins, and taken away where it ends.
        Neither the run nor this trainer is changed: the trainer stands afterwards where it stood.
        (Hindsight logging: Garcia et al., arXiv 2006.07357.)

        Args:
            first: an epoch, or `(epoch, batch)`; included.
            last: the same, included.
            callbacks: what looks at the stretch.
            run: as for `seek`, and so are the errors.
        """
        from orchestrator import past

        self._training.loop.check_outside()
        return past.replay(self, first, last, callbacks, run)

    def blame(self, *, run: str | os.PathLike[str] | None = None) -> Blame:
        """Name what made a loss or a gradient NaN or infinite: a module, its function, the line that called it.

        The guilty batch is done again with every module and function watched, the trace of backward being that of
        torch's anomaly mode. A trainer that has gone back by `seek` looks at the batch it stands in; another one, after
        a NonFiniteError for instance, goes back to where its run met the newest such value. It then stands in
        FORWARD or BACKWARD of the guilty batch, of which nothing is recorded. `run` and errors as for `seek`.

        Raises BlameError where nothing is found.
        """
        from orchestrator.blame import find_nonfinite, stand_before

        self._training.loop.check_outside()
        stand_before(self, run)
        return find_nonfinite(self)

    def evaluate(self, loader: Any) -> dict[str, float]:
        """The metrics of `validation_model` over `loader`; changes nothing of the training."""
        self._training.work.end_copying()  # an evaluation may be made with other weights
        evaluation = Evaluation(
            loader,
            name="",
            forward=self._settings.evaluation_forward("evaluate"),
            metrics=dict(self._settings.metrics),
            device=self.device,
            precision=self._training.work.precision,
        )
        before, self._evaluating = evaluation.stream.between_epochs(), evaluation
        try:
            return evaluation.run(self.validation_model, max(self.epoch, 0))
        finally:
            self._evaluating = None
            # The loader may have a generator that the training uses too.
            evaluation.stream.load_state_dict(before)
            evaluation.close()

    def close(self) -> None:
        """End the attempt, in HALTED if it was not done, with what it had saved. Idempotent."""
        training = self._training
        training.loop.check_outside()
        if training.attempt is None or training.attempt.closed:
            if self._past is not None:
                training.work.stream.close()
                configuration.restore_determinism(self._settings)
            return
        with contextlib.ExitStack() as ending:
            ending.callback(configuration.restore_determinism, self._settings)
            for callback in self._callbacks.values():
                ending.callback(getattr(callback, "close", lambda: None))
            ending.callback(training.validation.close)
            ending.callback(training.work.stream.close)
            ending.callback(training.end_attempt, training.attempt)
            ending.callback(self._hand_over, training.attempt)
            if self.state not in TERMINAL:
                self.halt("closed before the end")
                while training.fire_next():
                    pass

    def _hand_over(self, attempt: Attempt) -> None:
        if self._training.outcome == "done":
            self._final_model.carry_out(attempt, self.validation_model)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- one transition --------------------------------------------------------------------------

    def _stand_done(self, run: RunFolder) -> None:
        training = self._training
        self.run = run
        training.loop.stand(State.DONE)
        training.ended = training.requests.stop or "finished"

    def _leave(self) -> Result:
        """The result, or what `fit` leaves by."""
        halt = self._training.left or self._training.requests.halt
        error = halt.error if halt is not None and (halt.signal or self.state is State.HALTED) else None
        if error is not None and not (isinstance(error, KeyboardInterrupt) and in_notebook()):
            raise error
        assert self.run is not None
        return recovery.result(self.run, self.state, self.reason, self.history, self._settings.checkpoint)
