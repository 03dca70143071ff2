"""Trainer: fit, start, advance, save, seek. Where the parts meet, and nothing else."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from orchestrator import configuration, errands, final_model, past, recovery, warm_start
from orchestrator.attempt import Attempt
from orchestrator.blame import Blame, find_nonfinite, stand_before
from orchestrator.callbacks.base import Callback, overrides
from orchestrator.callbacks.checkpointing import Checkpointing
from orchestrator.callbacks.logs import Logging
from orchestrator.callbacks.lr_scheduling import LRScheduling
from orchestrator.compatibility import check_names
from orchestrator.configuration import UNSET
from orchestrator.data import BatchStream, to_device
from orchestrator.divergence import Divergence, DivergenceError, Expected
from orchestrator.errors import ConfigurationError, NonFiniteError, TaintedError
from orchestrator.evaluation import Evaluation
from orchestrator.exactness import risks
from orchestrator.loop import Loop
from orchestrator.metrics import EpochMetrics, Metric
from orchestrator.numerics import Precision
from orchestrator.past import Past, Replay, Stretch
from orchestrator.phase import Forward, Phase
from orchestrator.policy import Situation
from orchestrator.requests import HaltRequest, Requests, Save
from orchestrator.result import Result
from orchestrator.signals import GiveWay, Signals, in_notebook, leave
from orchestrator.snapshot.capture import capture_random, restore_random
from orchestrator.snapshot.info import BEFORE_THE_END, BRANCH, CUT_SHORT
from orchestrator.snapshot.kept import Kept
from orchestrator.snapshot.tensors import replicas
from orchestrator.snapshot.watch import Watch, parts_of
from orchestrator.state import SAVEABLE, TrainingState, callback_names
from orchestrator.warm_start import WarmStart
from orchestrator.work import BatchWork, Limits, Place, TrainingWork
from states.table import ARCS, TERMINAL, TRAINING, Arc, State, Trigger
from tracking.delivery import Tracker
from tracking.rows import Outcome, Parent
from tracking.runs import RESUME_VARIABLE, RunFolder

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
        epochs, max_batches: where the training ends, whichever comes first; at least one is given.
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
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        settings = configuration.check(given)
        self.model = model
        self.device = settings.device
        self.epochs = epochs
        self.max_batches = max_batches
        self.phases = settings.phases
        self.validation_model: nn.Module = model
        self.validating: str | None = None
        self.run: RunFolder | None = None
        self.replaying = False
        """Whether the past is being run again, by `seek` or `replay`: nothing is recorded meanwhile."""
        self.divergence: Divergence | None = None
        """The first loss of this attempt, or of the last seek, that was not the recorded one."""
        self.warm_start: WarmStart | None = None
        """What a new run took of the weights that `init_from` names."""
        self._settings = settings
        model.to(self.device)
        # A loss function can be a module with state of its own: class weights, or a counter.
        self._loss = loss_fn if isinstance(loss_fn, nn.Module) else None
        if self._loss is not None:
            self._loss.to(self.device)
        self._functions = [loss_fn, forward, accumulate_weighting, *(metrics or {}).values()]
        self._functions += [phase.forward for phase in self.phases]
        self._data = [train_loader, *settings.validation_loaders.values()]
        self._requests = Requests()
        self._attempt: Attempt | None = None
        self._found: recovery.Found | None = None
        self._expected: Expected | None = None
        self._on_divergence = on_divergence
        self._past: Past | None = None
        self._halted_in: State | None = None
        """The state that a checkpoint of HALTED carries; None where memory is not worth keeping."""
        self._evaluating: Evaluation | None = None
        self._beginning = False
        self._left: HaltRequest | None = None
        """What the last attempt halted for."""
        self._tainted = False
        self._ended = ""
        shared_precision = Precision(precision, self.device, len(self.phases))
        named_metrics = dict(metrics or {})
        self._evaluations = {
            key: Evaluation(
                loader,
                name=key,
                forward=settings.evaluation_forward(key),
                metrics=named_metrics,
                device=self.device,
                precision=shared_precision,
                journal=self._journal_validation,
            )
            for key, loader in settings.validation_loaders.items()
        }
        situation = Situation()
        epoch_metrics = EpochMetrics(named_metrics)
        epoch_metrics.to(self.device)
        self._work = TrainingWork(
            model=model,
            phases=self.phases,
            limits=Limits(epochs, max_batches),
            accumulate=accumulate,
            weigh=settings.weigh,
            clip_grad_norm=clip_grad_norm,
            nonfinite=nonfinite,
            validate_every=validate_every,
            validate=self._validate,
            request_halt=self._request_nonfinite_halt,
            restore=self._restore,
            report=self._report,
            stream=BatchStream(train_loader, role="training"),
            metrics=epoch_metrics,
            device=self.device,
            precision=shared_precision,
            situation=situation,
            place=Place(),
        )
        self._loop = Loop(TRAINING, self._work.table(), situation, self._journal)
        self._add_callbacks(scheduler, callbacks)

    def _add_callbacks(self, scheduler: Any, callbacks: Sequence[Callback]) -> None:
        """Attach every callback and put what it overrides on the transitions."""
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
        self._state = TrainingState(
            work=self._work,
            loop=self._loop,
            validations={name: e.work for name, e in self._evaluations.items()},
            callbacks=self._callbacks,
            requests=self._requests,
            device=self.device,
            loss=self._loss,
            report=self._report,
        )

    def _make_watch(self) -> Watch:
        """What looks for state that the checkpoints have not."""
        schedulings = [c for c in self._callbacks.values() if isinstance(c, LRScheduling)]
        return Watch(
            functions=[*self._functions, *self._loop.hooks()],
            modules={"model": self.model}
            if self._loss is None
            else {"model": self.model, "loss": self._loss},
            hooked=self.optimizers,
            callbacks=self._callbacks,
            outside=[self, *parts_of(self._data), *parts_of([s.scheduler for s in schedulings])],
        )

    def _add_hooks(self, callback: Callback) -> None:
        work, place = self._work, self._work.place
        if overrides(callback, "on_train_begin"):
            self._on_train_begin.append(callback.on_train_begin)
        if overrides(callback, "on_epoch_begin"):
            self._loop.after(Trigger.BEGIN_EPOCH)(lambda: callback.on_epoch_begin(place.epoch))
        if overrides(callback, "on_batch_begin"):
            self._loop.after(Trigger.FETCH)(lambda: callback.on_batch_begin(place.batch))
        if overrides(callback, "on_batch_end"):
            self._loop.after(Trigger.END_BATCH)(lambda: callback.on_batch_end(place.batch, work.metrics))
        if overrides(callback, "on_epoch_end"):
            self._loop.after(Trigger.END_EPOCH)(lambda: callback.on_epoch_end(place.epoch, work.history[-1]))
        if overrides(callback, "on_train_end"):
            self._loop.on(State.DONE)(lambda: callback.on_train_end(work.history[-1]))

    # -- hooks on any transition -----------------------------------------------------------------

    def before(self, trigger: Trigger) -> Callable[[HookT], HookT]:
        """A decorator: call the function, without arguments, before the work of `trigger`."""
        return self._loop.before(trigger)

    def after(self, trigger: Trigger) -> Callable[[HookT], HookT]:
        """A decorator: call the function, without arguments, after every transition of `trigger`."""
        return self._loop.after(trigger)

    def on(self, state: State) -> Callable[[HookT], HookT]:
        """A decorator: call the function, without arguments, whenever `state` is entered."""
        return self._loop.on(state)

    # -- where the training stands ---------------------------------------------------------------

    @property
    def state(self) -> State:
        """The state that the machine stands in."""
        return self._loop.state

    @property
    def epoch(self) -> int:
        """The epoch at hand, counted from 0; -1 before the first."""
        return self._work.place.epoch

    @property
    def batch(self) -> int:
        """The batch at hand within its epoch, counted from 0; -1 before the first."""
        return self._work.place.batch

    @property
    def batches(self) -> int:
        """Batches completed since the beginning of the run."""
        return self._work.place.batches

    @property
    def updates(self) -> int:
        """Optimizer updates applied since the beginning of the run."""
        return self._work.place.updates

    @property
    def batches_per_epoch(self) -> int | None:
        """How many batches an epoch has, where the loader can tell."""
        return self._work.stream.length

    @property
    def data(self) -> Any:
        """The batch at hand, on the device."""
        return self._work.data

    @property
    def metrics(self) -> Mapping[str, float]:
        """The values of the batch at hand."""
        return self._work.metrics

    @property
    def history(self) -> list[dict[str, float]]:
        """The metrics of each finished epoch."""
        return self._work.history

    @property
    def skipped(self) -> bool:
        """Whether the last optimizer step applied nothing because something was not finite."""
        return self._work.skipped

    @property
    def phase(self) -> str:
        """The name of the phase at hand; empty where a batch has one."""
        return self.phases[self._work.phase].name

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """The optimizer of each phase."""
        return tuple(phase.optimizer for phase in self.phases)

    @property
    def attempt(self) -> int:
        """The number of this attempt at the run, counted from 1; 0 before `start`."""
        return self._attempt.number if self._attempt is not None else 0

    @property
    def tainted(self) -> bool:
        """Whether a transition failed half-way, so that memory holds no state of the training."""
        return self._tainted

    @property
    def reason(self) -> str:
        """Why the training ended, or will; empty while it goes on."""
        return self._ended or self._requests.stop or ""

    @property
    def ending(self) -> bool:
        """Whether nothing but end_epoch and finish is left, unless the run is extended later."""
        situation = self._work.situation
        if situation.stop or not situation.batches_left:
            return True
        return self.epoch_complete and not situation.epochs_left

    @property
    def epoch_complete(self) -> bool:
        """Whether every batch of the epoch at hand has been taken."""
        return not self._work.situation.has_batch

    # -- requests --------------------------------------------------------------------------------

    def log(self, name: str, value: Any) -> None:
        """Add a named value, a number or a scalar tensor, to the batch at hand, or to the epoch at its end.

        From `forward` or a hook; averaged over the epoch, weighted by batch size, and tracked like the loss.
        """
        if self._evaluating is not None:
            self._evaluating.work.log(name, value)
            return
        if name.split("/")[0] in {"lr", *self._evaluations}:
            raise ConfigurationError(
                f"log({name!r}, ...): names that begin so are interlock's own; log it by another"
            )
        if self._work.computing:
            self._work.log(name, value)
        elif self.state is State.EPOCH_END:
            self._work.log_epoch(name, value)
        elif self.state in (State.IDLE, State.EPOCH_START, *TERMINAL):
            raise ConfigurationError(
                f"log({name!r}, ...) in {self.state.value}, where there is neither a batch nor an epoch to add it to; "
                "log from forward, or from a hook of a batch or of an epoch's end"
            )
        else:
            self._work.log(name, value)

    def note(self, text: str) -> None:
        """Add a note to the transition under way, from a hook: the journal keeps it, `interlock log` shows it.

        After what the transition notes itself, separated by "; ". Raises ConfigurationError between two.
        """
        if not self._loop.inside:
            raise ConfigurationError(
                f"note({text!r}) in {self.state.value}, where no transition is under way to add it to; "
                "call it from a hook"
            )
        self._work.note = f"{self._work.note}; {text}" if self._work.note else text

    def save(self, at: State | None = None) -> Save:
        """Ask for a checkpoint of this boundary; `.wait()` on what is returned gives its path.

        Between transitions it is taken at once, from a hook when the transition is over. With `at` it is taken
        when the training next stands in that state (at once where it does already).

        The graph of FORWARD cannot be stored. Where the trainer stands there by `advance` or `seek`, or `at` asks
        for it, what came before the forward pass is saved instead, and a resume does the pass again; otherwise
        the save is taken one transition later.

        Raises TaintedError after work or a hook has raised.
        """
        if self._tainted:
            raise TaintedError(
                "a transition failed half-way, so memory holds no state of the training: "
                "resume from the newest checkpoint instead"
            )
        save = Save()
        if self.replaying:
            save.abandoned("the past is being run again, of which nothing is kept")
            return save
        if self._past is not None:
            self.start()  # going on from there, as a run of its own
        if self._attempt is None or self._attempt.closed:
            return self._saved_at_the_end(save)
        outside = not self._loop.inside and not self._beginning
        if at is not None and not (outside and self.state is at and self._saveable()):
            self._requests.later.append((at, save))
            if at is State.FORWARD:
                self._work.keep = self._state.before_forward
            return save
        self._requests.saves.append(save)
        if outside:
            while self._requests.saves and not self._saveable() and self._fire_next():
                pass
            self._carry_out_saves()
        return save

    def _saved_at_the_end(self, save: Save) -> Save:
        """After the end of an attempt: the checkpoint that was made of it."""
        last = self._attempt.last_save() if self._attempt is not None else None
        if last is None:
            raise ConfigurationError(
                f"there is no attempt under way to save (the training stands in {self.state.value}): "
                "call start(), advance() or fit() first"
            )
        save.begun(last)
        return save

    def _saveable(self) -> bool:
        """Whether a checkpoint can be taken where the training stands."""
        if self.state is State.FORWARD:
            return self._work.before_forward is not None
        return self.state in SAVEABLE

    def stop(self, reason: str = "stopped") -> None:
        """Finish the batch, end the epoch and go to DONE. Part of the training state: survives a resume."""
        self._requests.stop = self._requests.stop or reason
        self._work.situation.stop = True

    def halt(self, reason: str = "halted") -> None:
        """Save at the next boundary and go to HALTED; resume to go on from there."""
        self._requests.add_halt(HaltRequest(reason))

    # -- running ---------------------------------------------------------------------------------

    def fit(self, resume: bool | str | os.PathLike[str] = False, override: Collection[str] = ()) -> Result:
        """Train until DONE or HALTED.

        Args:
            resume: False starts a new run. "auto" starts the run of this name, continues it where it is
                unfinished, returns the result where it is done, or extends it where more is asked for. A
                run's name or folder, or a checkpoint's path, continues from there.
            override: names of what may differ from the checkpoint, and is then this trainer's: "model",
                "optimizer", "scheduler", "metrics", "data", "accumulate", "accumulate_weighting",
                "clip_grad_norm", "precision", "validate_every", and hyper-parameters such as "lr".

        Returns:
            The result. After SIGTERM and Ctrl-C, `fit` saves, halts and leaves by SystemExit(143) or
            KeyboardInterrupt; when `max_time` is up, by SystemExit(75).

        Raises:
            NonFiniteError: a loss or gradient was not finite and `nonfinite="halt"`.
            Exception: whatever a hook, the model or the data raised, unchanged.
        """
        self._loop.check_outside()
        errands.carry_out(self)
        with Signals(self._request_signal_halt, self._waits):
            if self._attempt is None or self._attempt.closed:
                if self.state is not State.DONE:
                    self.start(resume, override)
            elif resume or override:
                raise ConfigurationError("fit(resume=...) on a training that has started; resume in start()")
            try:
                while self._fire_next():
                    pass
            finally:
                self.close()
        return self._leave()

    def start(self, resume: bool | str | os.PathLike[str] = False, override: Collection[str] = ()) -> None:
        """Open the run and stand at its first state: IDLE, or the state of the checkpoint.

        `fit` and `advance` do it themselves if need be; `resume` and `override` as for `fit`. Where `interlock seek`,
        `replay` or `blame` has started the script, that is done instead, and left by SystemExit.
        """
        errands.carry_out(self)
        if self._attempt is not None and not self._attempt.closed:
            raise ConfigurationError("this training has started already")
        if self.state is State.DONE:
            raise ConfigurationError(
                "this training is done; to extend it, build a Trainer that asks for more"
            )
        if self._past is not None:
            if resume:
                raise ConfigurationError(
                    f"resume={resume!r} on a trainer that has gone back to {self._past.moment}, from where it goes "
                    "on as a new run; expected resume=False, or another Trainer"
                )
            self._branch(self._past)
            return
        if self._settings.init_from is not None and resume not in (False, "auto"):
            raise ConfigurationError(
                f"resume is {str(resume)!r} and init_from {str(self._settings.init_from)!r}; expected one: "
                "a run that is resumed goes on with its own weights, a new one may begin with those of another"
            )
        if self._attempt is not None and not resume:
            resume = self._attempt.run.path  # a notebook whose fit was interrupted goes on
        resume = self._asked_from_outside() or resume
        names = check_names(override, resume, self._state)
        configuration.set_determinism(self._settings)
        try:
            plan = recovery.plan(resume, self._settings, self._work.limits)
            self._open(plan, names)
        except BaseException:
            configuration.restore_determinism(self._settings)
            raise
        if plan.finished:
            configuration.restore_determinism(self._settings)
            return
        self._tainted, self._ended, self._left, self._halted_in = False, "", None, None
        self._expected, self.divergence = plan.expected, None
        self._work.situation.halt = False
        if plan.checkpoint is not None:
            self._work.place.epoch, self._work.place.batch = (
                plan.checkpoint.info.epoch,
                plan.checkpoint.info.batch,
            )
            self._loop.stand(State.HALTED)
        try:
            self._begin(self._found)
        except BaseException as error:
            self._fail(error)
            self.close()
            raise

    def _open(self, plan: recovery.Plan, override: frozenset[str]) -> None:
        """See that the checkpoint fits, then open the attempt; or stand at the end of a run that is done."""
        self._found = plan.checkpoint
        try:
            if self._found is not None:
                self._found = recovery.check(
                    self._found, self._state, self._settings, self._work.stream, override
                )
        except BaseException:
            plan.release()
            raise
        if plan.finished:
            assert plan.run is not None
            self._restore()
            self._stand_done(plan.run)
            return
        settings = self._settings
        self.warm_start = None
        weights: dict[str, torch.Tensor] = {}
        if plan.run is None and settings.init_from is not None:
            self.warm_start, weights = warm_start.read(settings.init_from, settings.root, self.model)
        parent = None if self.warm_start is None else self.warm_start.source.parent
        self._attempt = Attempt.open(replace(plan, checkpoint=self._found), settings, self._scopes(), parent)
        self.run = self._attempt.run
        self._want_example()
        if self.warm_start is not None:
            warm_start.apply(weights, self.model)
            self._attempt.say(str(self.warm_start))

    def _asked_from_outside(self) -> str | None:
        """The folder that `interlock resume` names in the environment, if it is a run of this name; once."""
        folder = os.environ.get(RESUME_VARIABLE)
        if folder is None or RunFolder(Path(folder)).name != self._settings.name:
            return None
        return os.environ.pop(RESUME_VARIABLE)

    def _begin(self, checkpoint: recovery.Found | None) -> None:
        """The beginning of an attempt: on_train_begin, then the checkpoint of IDLE, or resume."""
        assert self._attempt is not None
        for risk in risks(self.model, self.device):
            self._report(risk)
            warnings.warn(risk, stacklevel=4)
        self._beginning = True
        for hook in self._on_train_begin:
            hook()
        self._beginning = False
        self._state.begin(self._make_watch(), self._data)
        self._attempt.clock.restart()
        if checkpoint is not None:
            names = dict.fromkeys(line.split(":")[0] for line in checkpoint.overridden)
            said = f", overridden: {', '.join(names)}" if names else ""
            self._work.note = f"from {checkpoint.info.name}{said}"
            self._loop.fire(Trigger.RESUME, checkpoint.state)
        elif self._settings.checkpoint is not None:
            self._requests.saves.append(Save())
        self._carry_out()

    def advance(self, until: State | None = None) -> Arc | None:
        """Fire one transition, or go on up to a state; DONE and HALTED end it too.

        Returns the last transition, or None where nothing was left to do.
        """
        if self.state is not State.DONE and (self._attempt is None or self._attempt.closed):
            self.start()
        last = None
        keep, self._work.keep = self._work.keep, self._work.keep
        if until in (None, State.FORWARD):
            self._work.keep = self._state.before_forward
        try:
            while self._fire_next():
                last = self._loop.last
                if until is None or self.state is until:
                    break
        finally:
            self._work.keep = keep
        if self.state in TERMINAL:
            self.close()
            if last is not None and self._left is not None and self._left.error is not None:
                raise self._left.error
        return last

    def _branch(self, past: Past) -> None:
        """Go on from the past as a new run, which begins with a checkpoint of this moment."""
        states = replicas({name: callback.state_dict() for name, callback in self._callbacks.items()})
        random = capture_random([self.device] if self.device.type == "cuda" else [])
        parent = Parent(past.run.id, str(past.run.path), past.moment.seq, past.checkpoint, "branch")
        self._attempt = Attempt.open(recovery.Plan(), self._settings, self._scopes(), parent)
        self.run, self._past = self._attempt.run, None
        self._want_example()
        try:
            self._beginning = True
            for hook in self._on_train_begin:
                hook()
            self._beginning = False
            for name, callback in self._callbacks.items():  # what the past left, not what a beginning sets
                callback.load_state_dict(states[name])
            restore_random(random)
            self._attempt.clock.restart()
            work, note = self._work, f"branched from {past.run.id} at {past.moment}"
            place, work.place, work.note = work.place, Place(), note
            self._attempt.record(ARCS.index(Arc(Trigger.HALT, State.IDLE, State.HALTED)), work)
            work.place, work.note = place, note
            self._attempt.record(ARCS.index(Arc(Trigger.RESUME, State.HALTED, self.state)), work)
            if self._settings.checkpoint is not None:
                self._requests.saves.append(Save())
            self._carry_out_saves(BRANCH)
        except BaseException as error:
            self._fail(error)
            self.close()
            raise

    # -- the past --------------------------------------------------------------------------------

    def seek(
        self,
        epoch: int | None = None,
        batch: int | None = None,
        state: State | None = None,
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
            epoch, batch: counted from 0; `batch` within the epoch.
            state: by default BATCH_START, or EPOCH_START where no batch is given. IDLE is the very beginning.
            phase: the phase whose FORWARD, BACKWARD or STEP is meant; by default the first.
            run: a run's name or folder; by default the run at hand, or the newest of this trainer's name.

        Raises:
            SeekError: the run was never there, or the training went another way this time.
            NoCheckpoint: there is none from before that moment.
            CheckpointMismatch: this trainer is not the one that the run was made with.
            DivergenceError: with `on_divergence="halt"`.
        """
        self._loop.check_outside()
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

        `first` and `last` are epochs, or `(epoch, batch)`, both included. The stretch is reached as by `seek`; the
        callbacks are attached where it begins, and taken away where it ends. Neither the run nor this trainer
        is changed: the trainer stands afterwards where it stood. `run` and errors as for `seek`.
        (Hindsight logging: Garcia et al., arXiv 2006.07357.)
        """
        self._loop.check_outside()
        return past.replay(self, first, last, callbacks, run)

    def blame(self, *, run: str | os.PathLike[str] | None = None) -> Blame:
        """Name what made a loss or a gradient NaN or infinite: a module, its function, the line that called it.

        The guilty batch is done again with every module and function watched, the trace of backward being that of
        torch's anomaly mode. A trainer that has gone back by `seek` looks at the batch it stands in; another one, after
        a NonFiniteError for instance, goes back to where its run met the newest such value. It then stands in
        FORWARD or BACKWARD of the guilty batch, of which nothing is recorded. `run` and errors as for `seek`.

        Raises BlameError where nothing is found.
        """
        self._loop.check_outside()
        stand_before(self, run)
        return find_nonfinite(self)

    def evaluate(self, loader: Any) -> dict[str, float]:
        """The metrics of `validation_model` over `loader`; changes nothing of the training."""
        evaluation = Evaluation(
            loader,
            name="",
            forward=self._settings.evaluation_forward("evaluate"),
            metrics=dict(self._settings.metrics),
            device=self.device,
            precision=self._work.precision,
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
        self._loop.check_outside()
        if self._attempt is None or self._attempt.closed:
            if self._past is not None:
                self._work.stream.close()
                configuration.restore_determinism(self._settings)
            return
        with contextlib.ExitStack() as ending:
            ending.callback(configuration.restore_determinism, self._settings)
            for callback in self._callbacks.values():
                ending.callback(getattr(callback, "close", lambda: None))
            for evaluation in self._evaluations.values():
                ending.callback(evaluation.close)
            ending.callback(self._work.stream.close)
            ending.callback(self._end_attempt, self._attempt)
            if self.state not in TERMINAL:
                self.halt("closed before the end")
                while self._fire_next():
                    pass

    def _end_attempt(self, attempt: Attempt) -> None:
        """Write down how it ended; what was asked of it is asked no more."""
        halt = self._left = self._requests.halt
        error = halt.error if halt is not None else None
        outcome: Outcome = "done" if self.state is State.DONE else "stopped"
        if self._tainted or (error is not None and not isinstance(error, SystemExit | KeyboardInterrupt)):
            outcome = "stopped" if isinstance(error, SystemExit | KeyboardInterrupt) else "failed"
        self._requests.abandon_all_saves("the attempt has ended")
        self._requests.halt = None
        if self.state is State.HALTED:
            self._requests.stop = None
        try:
            if outcome == "done" and self._logs_model:
                self._hand_over_model(attempt)
        finally:
            attempt.close(outcome, self._ended, error)

    @property
    def _logs_model(self) -> bool:
        """Whether the tracker takes the final model."""
        return bool(getattr(self._settings.track, "log_model", False))

    def _want_example(self) -> None:
        self._first_evaluated().wants_example = self._logs_model

    def _first_evaluated(self) -> BatchWork:
        """What takes the batch that shows how the model is called."""
        return next((evaluation.work for evaluation in self._evaluations.values()), self._work)

    def _hand_over_model(self, attempt: Attempt) -> None:
        """Leave the final model to the process that delivers; whatever goes wrong is a notice."""

        def call(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
            example = self._first_evaluated().example
            if example is None:
                raise final_model.HandOverError("no batch was taken that shows how it is called")
            forward = self._settings.evaluation_forward(next(iter(self._evaluations), "the final model"))
            return final_model.call_of(forward, model, to_device(example, self.device))

        facts = {"run": attempt.run.id, "attempt": attempt.number, "batches": self.batches}
        try:
            reason = final_model.hand_over(attempt.run, self.validation_model, call, facts)
        except Exception as error:
            attempt.warn(f"the final model is not delivered: {type(error).__name__}: {error}")
        else:
            if reason:
                attempt.warn(f"of the final model only the weights are delivered: {reason}")

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- one transition --------------------------------------------------------------------------

    def _fire_next(self) -> bool:
        """Fire the next transition and carry out what was asked for; False where nothing is left."""
        self._loop.check_outside()
        try:
            if self._requests.halt is not None and self.state not in TERMINAL:
                self._carry_out()  # it was asked for between two transitions
                if self.state in TERMINAL:
                    return True
            if not self._loop.advance():
                return False
            self._look_up()
        except GiveWay:
            # Nothing had changed: the training stands, intact, where the journal says.
            self._abandon_validation()
            self._loop.stand(self._attempt.state if self._attempt else self.state)
        except BaseException as error:
            left = self._excused(error)
            self._fail(left)
            if left is error:
                raise
            raise left from error
        return True

    def _look_up(self) -> None:
        """Between two transitions: carry out what was asked for during the last."""
        if self._requests.later:
            self._arrive()
        if self._halting() or self._requests.saves or self.state is State.DONE:
            self._carry_out()

    def _arrive(self) -> None:
        self._requests.arrive(self.state)
        if not self._requests.awaits(State.FORWARD):
            self._work.keep = None

    def _excused(self, error: BaseException) -> BaseException:
        """A data worker that dies after a stop was requested is no error of its own: schedulers kill them all."""
        halt = self._requests.halt
        if halt is None or halt.error is None:
            return error
        died = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
        return halt.error if died else error

    def _carry_out(self) -> None:
        halt = self._requests.halt if self.state not in TERMINAL else None
        if halt is not None:
            if not halt.save:
                self._requests.abandon_saves(halt.reason)
            elif self._settings.checkpoint is not None:
                if not self._saveable():
                    return  # one transition on, to BACKWARD
                if not self._requests.saves:
                    self._requests.saves.append(Save())
        if self._saveable():
            self._carry_out_saves()
        if halt is not None:
            self._ended = halt.reason
            self._work.note = self._halt_note(halt)
            self._work.situation.halt = True
            self._halted_in = self.state if halt.save and self._saveable() else None
            self._loop.advance()
            self._requests.arrive(State.HALTED)
            if self._halted_in is not None:
                self._carry_out_saves()
            self._requests.abandon_all_saves("the training stands in HALTED")
        elif self.state is State.DONE:
            self._ended = self._requests.stop or "finished"

    def _carry_out_saves(self, purpose: str = "") -> None:
        saves, self._requests.saves = self._requests.saves, []
        if not saves or self._attempt is None:
            return
        work, state = self._work, self.state
        stands = self._halted_in if state is State.HALTED and self._halted_in is not None else state
        metrics = work.history[-1] if stands is State.EPOCH_END and work.history else {}
        try:
            handle = self._attempt.save(
                self._state.capture(stands),
                state,
                work.place,
                self._purpose(stands) or purpose,
                metrics,
                work.stream,
            )
        except BaseException as error:
            for save in saves:
                save.abandoned(f"{type(error).__name__}: {error}")
            raise
        for save in saves:
            save.begun(handle)
        self._attempt.clock.restart()

    def _purpose(self, state: State) -> str:
        """What a checkpoint of this moment is for, should the run be extended after its end."""
        situation = self._work.situation
        if state is State.BATCH_END and situation.has_batch and not situation.batches_left:
            return BEFORE_THE_END
        if state is State.EPOCH_END and not (situation.epochs_left and situation.batches_left):
            return BEFORE_THE_END if self.epoch_complete else CUT_SHORT
        return ""

    def _halt_note(self, halt: HaltRequest) -> str:
        """The reason; and the way back, where no checkpoint of this moment is on disk."""
        attempt = self._attempt
        if attempt is None or (halt.save and self._settings.checkpoint is None):
            return halt.reason
        failure = attempt.wait_for_save() if halt.save else None
        if halt.save and failure is None:
            return halt.reason
        why = f"{halt.reason}; the checkpoint could not be written ({failure})" if failure else halt.reason
        return f"{why}; {attempt.way_back(self._work.place)}"

    def _fail(self, error: BaseException) -> None:
        """Work or a hook raised: halt from the last journaled state, capture nothing, name the way back."""
        self._tainted = True
        attempt, halt = self._attempt, self._requests.halt
        self._requests.abandon_all_saves(f"{type(error).__name__}: {error}")
        if attempt is None or attempt.closed:
            return
        self._abandon_validation()
        attempt.catch_up()
        self._loop.stand(attempt.state)
        asked = halt is not None and halt.error is error
        self._ended = halt.reason if asked and halt is not None else f"{type(error).__name__}: {error}"
        self._requests.halt = HaltRequest(self._ended, save=False, error=error)
        if attempt.state in TERMINAL:
            return
        note = self._work.note = f"{self._ended}; {attempt.way_back(self._work.place)}"
        source = attempt.state
        try:
            self._work.situation.halt = True
            self._loop.advance()
        except Exception as second:
            warnings.warn(f"a hook on HALTED raised {type(second).__name__}: {second}", stacklevel=2)
            self._work.note = note
            attempt.record(ARCS.index(Arc(Trigger.HALT, source, State.HALTED)), self._work)
            self._loop.stand(State.HALTED)

    def _abandon_validation(self) -> None:
        for name, evaluation in self._evaluations.items():
            self.validating = name
            evaluation.abandon()
        self.validating = self._evaluating = None

    # -- what the parts ask of the trainer -------------------------------------------------------

    def _journal(self, arc: int) -> None:
        if self._attempt is not None:
            self._attempt.record(arc, self._work)
        else:
            self._work.note = ""
            if ARCS[arc].trigger is Trigger.END_BATCH:
                self._work.close_batch()
        if self._expected is not None and ARCS[arc].trigger is Trigger.FORWARD:
            work = self._work
            found = self._expected.meet(work.place.epoch, work.place.batch, self.phase, work.loss)
            if found is not None:
                self._diverged(found)

    def _diverged(self, divergence: Divergence) -> None:
        self.divergence = self.divergence or divergence
        if self._on_divergence == "halt":
            error = DivergenceError(divergence)
            self._requests.add_halt(HaltRequest(str(error), save=False, error=error))
        else:
            self._report(str(divergence))
            warnings.warn(str(divergence), stacklevel=2)

    def _journal_validation(self, arc: int, work: Any) -> None:
        if self._attempt is not None:
            self._attempt.record_validation(arc, self.validating or "", work)

    def _scopes(self) -> tuple[str, ...]:
        return ("train", *(f"validation/{name}" for name in self._evaluations))

    def _validate(self) -> dict[str, float]:
        """All validation loaders in turn; where a halt breaks it off, generators and the model are as before."""
        if not self._evaluations:
            return {}
        values: dict[str, float] = {}
        kept = Kept(self.validation_model)
        before = {name: evaluation.stream.between_epochs() for name, evaluation in self._evaluations.items()}
        for name, evaluation in self._evaluations.items():
            self.validating, self._evaluating = name, evaluation
            if self._attempt is not None:
                self._attempt.validation_clock.restart()
            try:
                found = evaluation.run(self.validation_model, self.epoch, self._halting)
            except GiveWay:
                for begun, state in before.items():
                    self._evaluations[begun].stream.load_state_dict(state)
                kept.put_back()
                raise
            values.update({f"{name}/{key}": value for key, value in found.items()})
        self.validating = self._evaluating = None
        return values

    def _halting(self) -> bool:
        """Whether a halt is asked for, by anybody or by trouble with the files or the time."""
        if self._attempt is not None and (trouble := self._attempt.trouble()) is not None:
            self._requests.add_halt(trouble)
        return self._requests.halt is not None

    def _request_nonfinite_halt(self, error: NonFiniteError) -> None:
        self._requests.add_halt(HaltRequest(str(error), save=False, error=error))

    def _waits(self) -> bool:
        """Whether the main thread is waiting for a data worker, so that a signal may break it off."""
        if self._attempt is None or self._attempt.state in TERMINAL:
            return False  # also while a resume takes its batch again: that is no transition to give way
        streams = [self._work.stream, *(evaluation.stream for evaluation in self._evaluations.values())]
        return any(stream.waiting for stream in streams)

    def _request_signal_halt(self, which: Any) -> None:
        self._requests.add_halt(HaltRequest(f"signal {which.name}", error=leave(which), signal=True))

    def _report(self, message: str) -> None:
        if self._attempt is not None:
            self._attempt.warn(message)

    def _restore(self) -> None:
        assert self._found is not None
        divergence = recovery.restore(self._found, self._state)
        self._found = None
        if divergence is not None:
            self._diverged(divergence)

    def _stand_done(self, run: RunFolder) -> None:
        self.run = run
        self._loop.stand(State.DONE)
        self._ended = self._requests.stop or "finished"

    def _leave(self) -> Result:
        """The result, or what `fit` leaves by."""
        halt = self._left or self._requests.halt
        error = halt.error if halt is not None and (halt.signal or self.state is State.HALTED) else None
        if error is not None and not (isinstance(error, KeyboardInterrupt) and in_notebook()):
            raise error
        assert self.run is not None
        return recovery.result(self.run, self.state, self.reason, self.history, self._settings.checkpoint)
