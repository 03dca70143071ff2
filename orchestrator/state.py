"""TrainingState: the whole of a training as one tree, taken and put back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from orchestrator.callbacks.base import Callback
from orchestrator.callbacks.ema import EMA
from orchestrator.callbacks.lr_scheduling import LRScheduling
from orchestrator.data import DataError
from orchestrator.loop import Loop
from orchestrator.requests import Requests
from orchestrator.snapshot import capture
from orchestrator.snapshot.encoding import EncodingError, encode
from orchestrator.snapshot.owned_generators import OwnedGenerators
from orchestrator.snapshot.tensors import replicas
from orchestrator.snapshot.users_code import is_users, owner_of
from orchestrator.snapshot.watch import Watch
from orchestrator.warning import warn
from orchestrator.work import EvaluationWork, TrainingWork
from states.table import State, Trigger

__all__ = ["SAVEABLE", "TrainingState", "callback_names"]

SAVEABLE = frozenset(State) - {State.FORWARD, State.HALTED}
"""Where a state can always be taken. FORWARD, whose graph cannot be stored, needs a copy from before it; HALTED
carries the state that the training halted in."""

_WITH_BATCH = (State.BATCH_START, State.FORWARD, State.BACKWARD, State.STEP)
_ON_BATCH = (
    (Trigger.FORWARD, State.FORWARD),
    (Trigger.BACKWARD, State.BACKWARD),
    (Trigger.STEP, State.STEP),
)
"""What comes, in this order, on a batch that was fetched, and where it leads."""


def callback_names(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """Each callback by its name in a checkpoint; repeated names are numbered."""
    named: dict[str, Callback] = {}
    for callback in callbacks:
        name, number = callback.name, 2
        while name in named:
            name, number = f"{callback.name}-{number}", number + 1
        named[name] = callback
    return named


def _has_users(hooks: Sequence[object]) -> bool:
    return any(is_users(owner_of(hook)) for hook in hooks)


class TrainingState:
    """Takes and puts back everything that the rest of a training depends on."""

    def __init__(
        self,
        *,
        work: TrainingWork,
        loop: Loop,
        validations: Mapping[str, EvaluationWork],
        callbacks: Mapping[str, Callback],
        requests: Requests,
        device: torch.device,
        loss: nn.Module | None,
        report: Callable[[str], None],
    ) -> None:
        self._work = work
        self._loop = loop
        self._validations = validations
        self._callbacks = callbacks
        self._requests = requests
        self._loss = loss
        self._report = report
        self._device = device
        self._devices = [device] if device.type == "cuda" else []
        self._optimizers = [phase.optimizer for phase in work.phases]
        self._modules = {"model": work.model} if loss is None else {"model": work.model, "loss": loss}
        self._told: set[str] = set()
        self._built: dict[str, capture.Built] | None = None
        self._watch: Watch | None = None
        self._generators = OwnedGenerators(())

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self._work.model

    @property
    def phase(self) -> str:
        """The name of the phase at hand; empty where a batch has one."""
        return self._work.phases[self._work.phase].name

    def fingerprints(self) -> dict[str, Any]:
        """What tells the data from other data, of training and of each loader for validation; taken once."""
        return {
            "data": self._work.stream.fingerprint(),
            "validation_data": {name: v.stream.fingerprint() for name, v in self._validations.items()},
        }

    def begin(self, watch: Watch) -> None:
        """Remember how the script has built everything; called once an attempt, before anything is restored.

        `watch` finds what changes and is not captured.
        """
        if self._built is None:  # in a second attempt of this process, training has changed it already
            self._built = self._as_built()
        watch.begin()
        self._watch = watch
        self._generators = OwnedGenerators(watch.outside)
        self._generators.find(watch.roots())
        for unseen in self._generators.unseen:
            self._tell(
                f"random generators cannot be kept in checkpoints: {unseen}; what they draw will differ"
            )

    def as_begun(self, state: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
        """What `begin` has set; `state`, from an earlier call, makes it that again."""
        if state is not None:
            self._built, self._watch, self._generators = state
        return self._built, self._watch, self._generators

    def referred_to(self) -> Iterator[object]:
        """The values that the user's code refers to beside what is captured."""
        for owner in self._watch.owners if self._watch is not None else ():
            yield from owner.read().values()

    def _as_built(self) -> dict[str, capture.Built]:
        return self._built or {name: capture.Built.of(module) for name, module in self._modules.items()}

    def _look(self) -> None:
        """See to what user's code has changed or made since."""
        if self._watch is not None:
            for message in self._watch.look():
                self._tell(message)
            self._generators.find(self._watch.roots())

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self._tell(message)

    def _tell(self, message: str) -> None:
        self._report(message)
        warn(message)

    def capture(self, state: State | None = None) -> dict[str, Any]:
        """The state as a tree of plain values and references to live tensors; nothing is copied.

        `state` is where the training stands; by default where the machine does.
        """
        self._look()
        work, state = self._work, state or self._loop.state
        work.settle()
        names = capture.parameter_names(work.model)
        mid_window = work.window.count > 0 or state is State.BACKWARD
        before = work.before_forward if state is State.FORWARD else None
        return {
            "state": state,
            "forward": None if before is None else {k: v for k, v in before.items() if k != "data"},
            "model": self._captured("model"),
            "loss": None if self._loss is None else self._captured("loss"),
            "built": {name: of_module.scalars for name, of_module in self._as_built().items()},
            "gradients": capture.capture_gradients(work.model, self._optimizers)
            if mid_window or self._gradients_are_read(state)
            else None,
            "optimizers": [capture.capture_optimizer(o, names) for o in self._optimizers],
            "scalers": [None if s is None else capture.capture_scaler(s) for s in work.precision.scalers],
            "place": asdict(work.place),
            "window": asdict(work.window),
            "guard": work.guard.state_dict() if work.guard is not None and mid_window else None,
            "batch": {
                "phase": work.phase,
                "metrics": dict(work.metrics),
                "loss": work.loss,
                "samples": work.samples,
                "skipped": work.skipped,
                "elapsed": time.perf_counter() - work.started,
                **self._changed_batch(state),
            },
            "epoch": {
                "elapsed": time.perf_counter() - work.epoch_started,
                "validated": dict(work.validated),
                "skips": work.skips,
            },
            "data": work.stream.state_dict(),
            "metrics": work.epoch_metrics.state_dict(),
            "validation_data": {
                name: validation.stream.between_epochs() for name, validation in self._validations.items()
            },
            "history": [dict(values) for values in work.history],
            "stop": self._requests.stop,
            "callbacks": {name: callback.state_dict() for name, callback in self._callbacks.items()},
            "random": capture.capture_random(self._devices),
            "generators": self._generators.capture(),
            "flags": capture.numeric_flags(),
        }

    def _captured(self, name: str) -> dict[str, Any]:
        """The state of a module that was just looked at."""
        built, watch = self._as_built()[name], self._watch
        attributes = None if watch is None else watch.attributes_of(name, built)
        return capture.capture_module(self._modules[name], built, attributes)

    def check_storable(self) -> None:
        """Refuse what no checkpoint can have, before anything is written. Nothing is copied.

        What cannot be asked for yet, because `on_train_begin` prepares it, is left to the first save.

        Raises EncodingError, naming where the object sits.
        """
        work, built = self._work, self._as_built()
        names = capture.parameter_names(work.model)
        parts: dict[str, Callable[[], Any]] = {
            "model": lambda: capture.capture_module(work.model, built["model"]),
            "loss": lambda: None if self._loss is None else capture.capture_module(self._loss, built["loss"]),
            "optimizers": lambda: [capture.capture_optimizer(o, names) for o in self._optimizers],
            "metrics": work.epoch_metrics.state_dict,
        }
        found: dict[str, Any] = {"callbacks": {}}
        for name, take in parts.items():
            with contextlib.suppress(Exception):
                found[name] = take()
        for name, callback in self._callbacks.items():
            with contextlib.suppress(Exception):
                found["callbacks"][name] = callback.state_dict()
        encode(found)

    def _gradients_are_read(self, state: State) -> bool:
        """Whether hooks may read gradients that the machine itself needs no more."""
        return state is State.STEP or (self._watch is not None and self._watch.reads("grad"))

    def _changed_batch(self, state: State) -> dict[str, Any]:
        """The batch at hand where it was changed, or hooks may have changed it; None where it need only be fetched.

        In FORWARD, whose pass is done again, it is the one from before the pass; `passed` is what hooks after the
        pass may have made of it.
        """
        work = self._work
        if state not in _WITH_BATCH or not (work.batch_changed or self._may_be_changed(state)):
            return {"data": None}
        if state is not State.FORWARD or work.before_forward is None:
            return {"data": self._storable(work.data)}
        before = work.before_forward["data"]
        found = {"data": self._storable(work.data) if before is None else before}
        if found["data"] is not None and _has_users(self._loop.hooks_after(Trigger.FORWARD, State.FORWARD)):
            found["passed"] = self._storable(work.data)
        return found

    def _storable(self, batch: Any, *, tell: bool = True) -> Any:
        """`batch`, or None where it cannot be stored."""
        try:
            encode({"batch": batch})
        except EncodingError as error:
            if tell:
                self._tell_once(
                    f"the batch is not in checkpoints, but fetched again ({error}); a hook or a forward that changes "
                    "it in place would make a resumed run differ: let the data set or collate_fn do it"
                )
            return None
        return batch

    def _may_be_changed(self, state: State) -> bool:
        """Whether code of the user's was called since the batch was fetched; interlock's own leaves it as it is."""
        loop, passed = self._loop, _WITH_BATCH.index(state)
        hooks = loop.hooks_after(Trigger.FETCH, State.BATCH_START)
        for number, (trigger, dest) in enumerate(_ON_BATCH, start=1):
            if number <= passed or self._work.phase > 0:
                hooks += loop.hooks_before(trigger) + loop.hooks_after(trigger, dest)
        return _has_users(hooks)

    def before_forward(self) -> dict[str, Any]:
        """A copy of all that a forward pass may change: buffers and other state of modules, metrics, generators, the
        batch.

        Parameters of lazy modules that have no shape yet are named in `uninitialized`.
        """
        work, built = self._work, self._as_built()
        work.settle()

        def modules(name: str) -> dict[str, Any]:
            tree = capture.capture_module(self._modules[name], built[name])
            parameters = tree.pop("parameters")
            return {**tree, "uninitialized": [name for name, value in parameters.items() if value is None]}

        copied: dict[str, Any] = replicas(
            {
                **{name: modules(name) for name in self._modules},
                "metrics": work.epoch_metrics.state_dict(),
                "batch": dict(work.metrics),
                "generators": self._generators.capture(),
                "random": capture.capture_random(self._devices),
                "data": self._storable(work.data, tell=False),
            }
        )
        return copied

    def restore(self, tree: dict[str, Any]) -> float | None:
        """Make everything what it was; live tensors are written in place. The machine is not moved.

        Forward is done again where the state is FORWARD; the loss it gives is returned, None elsewhere.
        """
        work, before = self._work, tree["forward"] or {}
        work.end_copying()
        names = capture.parameter_names(work.model)
        self._restore_modules(tree, before)
        for optimizer, saved in zip(self._optimizers, tree["optimizers"], strict=True):
            capture.restore_optimizer(optimizer, saved, names)
        for scaler, saved in zip(work.precision.scalers, tree["scalers"], strict=True):
            if scaler is not None and saved is not None:
                capture.restore_scaler(scaler, saved, self._device)
        for name, value in tree["place"].items():
            setattr(work.place, name, value)
        for name, value in tree["window"].items():
            setattr(work.window, name, value)
        if tree["gradients"] is None:
            for optimizer in self._optimizers:
                optimizer.zero_grad(set_to_none=True)
        else:
            capture.restore_gradients(work.model, tree["gradients"], self._optimizers)
        if work.guard is not None and tree["guard"] is not None:
            work.guard.load_state_dict(tree["guard"])
        work.history[:] = [dict(values) for values in tree["history"]]
        work.epoch_metrics.load_state_dict(before.get("metrics", tree["metrics"]))
        self._requests.stop = self._requests.stop or tree["stop"]
        self._restore_callbacks(tree)
        self._stand_in_epoch(tree)
        # After that: where both loaders have one generator, it stands now where it did as the epoch began.
        self._restore_validation_data(tree["validation_data"])
        self._generators.restore(tree.get("generators", {}))
        capture.restore_random(tree["random"])
        work.restored()
        return self._forward_again(tree) if before else None

    def _restore_callbacks(self, tree: dict[str, Any]) -> None:
        for name, callback in self._callbacks.items():
            if name in tree["callbacks"]:
                callback.load_state_dict(tree["callbacks"][name])

    def _forward_again(self, tree: dict[str, Any]) -> float:
        """Build the graph that could not be stored, from what was there before it; the loss."""
        work, before = self._work, tree["forward"]
        work.before_forward = {**before, "data": replicas(self._storable(work.data, tell=False))}
        work.metrics = dict(before["batch"])
        self._generators.restore(before["generators"])
        capture.restore_random(before["random"])
        work.compute()
        work.settle()
        # Hooks that came after the forward have had their effects on these.
        if (passed := tree["batch"].get("passed")) is not None:
            work.replace(replicas(passed))
        work.metrics = dict(tree["batch"]["metrics"])
        self._restore_callbacks(tree)
        self._generators.restore(tree.get("generators", {}))
        capture.restore_random(tree["random"])
        return work.loss

    def _restore_modules(self, tree: dict[str, Any], before: dict[str, Any]) -> None:
        self._built = built = self._as_built()
        for name, saved in tree.get("built", {}).items():
            if name in built:
                built[name].adopt(saved)
        for name, module in self._modules.items():
            if tree[name] is not None:
                capture.restore_module(module, _as_before(tree[name], before.get(name)), built[name])

    def _restore_validation_data(self, saved: Mapping[str, Any]) -> None:
        """Set the generators of validation loaders, which may have changed: validation begins anew each time."""
        for name, validation in self._validations.items():
            try:
                if name in saved:
                    validation.stream.load_state_dict(saved[name])
            except DataError as error:
                warn(f"the order of validation loader {name!r} is not restored: {error}")

    def _stand_in_epoch(self, tree: dict[str, Any]) -> None:
        """Stand at the saved position of the data, with the batch at hand where there was one."""
        work, epoch, batch = self._work, tree["epoch"], tree["batch"]
        state = tree["state"]
        work.epoch_started = time.perf_counter() - epoch["elapsed"]
        work.validated, work.skips = dict(epoch["validated"]), epoch["skips"]
        data = dict(tree["data"])
        if state in _WITH_BATCH:
            work.stream.load_state_dict({**data, "position": data["position"] - 1})
            work.take(work.stream.fetch())
            if (changed := batch.get("data")) is not None:
                work.replace(replicas(changed))
        else:
            work.stream.load_state_dict(data)
        work.metrics = dict(batch["metrics"])
        work.phase, work.loss = batch["phase"], batch["loss"]
        if (
            state is not State.BATCH_START
        ):  # taking the batch has counted it, and it may be another one than then
            work.samples = batch["samples"]
        work.skipped = batch["skipped"]
        work.started = time.perf_counter() - batch["elapsed"]
        situation = work.situation
        situation.has_batch = work.stream.has_next
        situation.stop = self._requests.stop is not None
        work.limits.apply(situation, work.place)
        if state in _WITH_BATCH:
            work.place_in_window(counted=state is State.BACKWARD)

    def constructed(self) -> dict[str, Any]:
        """The parts of the tree that an override takes from this trainer instead of from the checkpoint."""
        work, names = self._work, capture.parameter_names(self._work.model)
        built = self._as_built()
        return {
            "model": capture.capture_module(work.model, built["model"]),
            "loss": None if self._loss is None else capture.capture_module(self._loss, built["loss"]),
            "optimizers": [capture.capture_optimizer(o, names) for o in self._optimizers],
            "scalers": [None if s is None else capture.capture_scaler(s) for s in work.precision.scalers],
            "data": work.stream.state_dict(),
            "metrics": work.epoch_metrics.state_dict(),
            "callbacks": {
                name: callback.state_dict()
                for name, callback in self._callbacks.items()
                if isinstance(callback, LRScheduling | EMA)
            },
        }

    @property
    def loss(self) -> nn.Module | None:
        """The loss function, where it is a module with state."""
        return self._loss

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizer of each phase."""
        return self._optimizers

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The metrics that have state of their own."""
        return self._work.epoch_metrics.accumulating

    @property
    def schedulings(self) -> dict[str, tuple[LRScheduling, int]]:
        """The schedulers by their names in a checkpoint, each with the number of its optimizer."""
        return {
            name: (
                callback,
                next(i for i, o in enumerate(self._optimizers) if o is callback.scheduler.optimizer),
            )
            for name, callback in self._callbacks.items()
            if isinstance(callback, LRScheduling)
        }

    def other_constants(self, tree: Mapping[str, Any]) -> list[str]:
        """Plain attributes that the script now gives its modules otherwise than the checkpoint's, which win."""
        built = self._as_built()
        return [
            line
            for name, scalars in tree.get("built", {}).items()
            if name in built and tree[name] is not None
            for line in capture.other_constants(built[name], scalars, tree[name]["attributes"])
        ]


def _as_before(tree: dict[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """The state of a module with what a forward pass may change as it was before that pass."""
    if before is None:
        return tree
    kept = {key: value for key, value in before.items() if key != "uninitialized"}
    unshaped = dict.fromkeys(before["uninitialized"])
    return {**tree, **kept, "parameters": {**tree["parameters"], **unshaped}}
