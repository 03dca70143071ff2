"""Whether a checkpoint fits a trainer: what differs, what was said to be overridden, and what to restore then."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from orchestrator import overrides
from orchestrator.data import BatchStream, DataError, compare_fingerprints, likely_causes
from orchestrator.errors import ConfigurationError
from orchestrator.snapshot import capture
from orchestrator.snapshot.manifest import versions
from orchestrator.snapshot.migrations import with_what_was_not_kept
from orchestrator.snapshot.optimizers import SCHEDULERS_OWN
from orchestrator.state import TrainingState
from states.errors import InterlockError
from states.table import State

__all__ = ["PARTS", "Agreement", "CheckpointMismatch", "Difference", "agree", "check_names"]

PARTS = (
    "model",
    "optimizer",
    "scheduler",
    "metrics",
    "data",
    "accumulate",
    "accumulate_weighting",
    "clip_grad_norm",
    "precision",
    "validate_every",
)
"""What can be overridden besides single hyper-parameters."""

_SCHEDULING = "LRScheduling/"
_WITH_BATCH = (State.BATCH_START, State.FORWARD, State.BACKWARD, State.STEP)
_AFTER_AN_EPOCH = (State.EPOCH_END, State.DONE)


class CheckpointMismatch(InterlockError):
    """The checkpoint is of another model, optimizer, data or configuration; nothing was changed."""


@dataclass(frozen=True)
class Difference:
    """One thing that differs: the name that overrides it (None: nothing does), and both values in words."""

    key: str | None
    text: str

    def __str__(self) -> str:
        """As it is listed: what it is about comes first."""
        return self.text if self.key is None or self.text.startswith(self.key) else f"{self.key}: {self.text}"


@dataclass(frozen=True)
class Agreement:
    """What a checkpoint and a trainer agreed upon."""

    tree: dict[str, Any]
    """The checkpoint's tree, made to fit: what is to be restored, and verified."""
    overridden: tuple[str, ...]
    """What the trainer has its way in, a line each."""
    warnings: tuple[str, ...]
    """What else to say before training."""


def check_names(override: Collection[str], resume: object, state: TrainingState) -> frozenset[str]:
    """`override` as a set.

    Raises ConfigurationError for names that there are not, listing those there are, and where nothing is resumed.
    """
    if isinstance(override, str) or not isinstance(override, Collection):
        raise ConfigurationError(
            f'override is {override!r}; expected a set of names, such as {{"lr"}} or {{"data", "accumulate"}}'
        )
    if not override:
        return frozenset()
    if not resume:
        raise ConfigurationError(
            f"override is {set(override)!r} with resume=False, a new run, which takes everything from this trainer; "
            'expected override with resume="auto", a run or a checkpoint'
        )
    settings = sorted(_hyperparameters(state.constructed()))
    for name in override:
        if name == "phases":
            raise ConfigurationError(
                'override has "phases", which cannot be overridden: each phase has its own part of a checkpoint; build '
                "the phases as they were, or begin a new run from the weights with init_from="
            )
        if name not in PARTS and name not in settings:
            raise ConfigurationError(
                f"override has {name!r}; expected names of parts ({', '.join(PARTS)}) or of settings of the "
                f"optimizer and scheduler at hand ({', '.join(settings)})"
            )
    return frozenset(override)


def _hyperparameters(live: Mapping[str, Any]) -> set[str]:
    names = {key for tree in live["optimizers"] for group in tree["groups"] for key in group["settings"]}
    for name, state in live["callbacks"].items():
        if name.startswith(_SCHEDULING):
            names.update(capture.given_settings(state["scheduler"]["state"]))
    return names - {"initial_lr"}


def agree(
    path: Path,
    manifest: Mapping[str, Any],
    tree: dict[str, Any],
    state: TrainingState,
    stream: BatchStream,
    binding: Mapping[str, Any],
    override: frozenset[str] = frozenset(),
) -> Agreement:
    """What to restore of the checkpoint at `path`, after every difference was found; nothing is changed.

    Hyper-parameters are the checkpoint's, with a warning, where they are not overridden. All else that differs
    must be. `stream` is the training data, `binding` the arguments that a checkpoint must agree with.

    Raises CheckpointMismatch, listing every difference that is not overridden, or that cannot be.
    """
    fitting = _Fitting(manifest, tree, state, stream, binding)
    fitting.fit()
    if "scheduler" in override:
        fitting.restart_changed_schedules()
    refused = [d for d in fitting.differences if d.key not in override]
    impossible = fitting.impossible(override)
    if refused or impossible:
        raise CheckpointMismatch(_refusal(path, refused, impossible, fitting.causes))
    if left := fitting.left():
        raise CheckpointMismatch(_refusal(path, [], left))
    changed = fitting.changed()
    overridden = list(fitting.differences)
    for name in sorted({d.key for d in changed if d.key in override}, key=lambda name: (name != "lr", name)):
        overridden += [d for d in changed if d.key == name]
        fitting.override(str(name))
    kept = [*map(str, fitting.changed()), *state.other_constants(fitting.tree)]
    used = {d.key for d in overridden}
    said = [f"the checkpoint's value is used: {text}" for text in kept]
    if override - used:
        said.append(_unused(override - used, {d.key for d in (*overridden, *fitting.changed())}))
    said += _other_validation_data(manifest, state)
    said += _last_bits(manifest, tree)
    return Agreement(fitting.tree, tuple(map(str, overridden)), tuple(said))


def _refusal(path: Path, refused: list[Difference], impossible: list[str], of_data: str = "") -> str:
    """In words; `of_data` is what may have made the data differ."""
    listed = "\n".join(f"  {text}" for text in (*map(str, refused), *impossible))
    if of_data and any(d.key == "data" for d in refused):
        listed += f"\n{of_data}."
    names = ", ".join(f'"{key}"' for key in dict.fromkeys(d.key for d in refused if d.key is not None))
    advice = f", or say that they may differ with override={{{names}}}" if names else ""
    if impossible or any(d.key is None for d in refused):
        advice = ""
    return (
        f"checkpoint {path} does not fit this trainer; expected the same model, optimizer, data and "
        f"configuration as it was saved with:\n{listed}\n"
        f"Make them equal{advice}, or start a new run: by another name=, or with resume=False"
    )


def _unused(names: Collection[str], differing: Collection[str | None]) -> str:
    found = ", ".join(sorted(str(key) for key in differing)) or "nothing"
    named = ", ".join(sorted(names))
    return f"override has {named}, of which nothing differs from the checkpoint; what differs: {found}"


def _other_validation_data(manifest: Mapping[str, Any], state: TrainingState) -> list[str]:
    """What else a loader for validation gives now; a checkpoint of an earlier version does not know."""
    saved = manifest.get("validation_data", {})
    return [
        f"the validation data of {name!r} is other than it was, and so is what follows from it (the best checkpoint, "
        f"early stopping, a scheduler that monitors it): "
        + ". ".join(filter(None, ("; ".join(lines), likely_causes(saved[name], now))))
        for name, now in (state.fingerprints()["validation_data"] if saved else {}).items()
        if (lines := compare_fingerprints(saved.get(name, {}), now))
    ]


def _last_bits(manifest: Mapping[str, Any], tree: Mapping[str, Any]) -> list[str]:
    now = versions()
    flags = [
        f"{name}: it was {then}, now it is {now[name]}"
        for name, then in manifest["versions"].items()
        if name in now and now[name] != then
    ]
    flags += capture.compare_flags(tree["flags"])
    return [f"results may differ in the last bits: {flag}" for flag in flags]


class _Fitting:
    """Finds what differs, and makes the tree fit meanwhile, as if all of it were overridden."""

    def __init__(
        self,
        manifest: Mapping[str, Any],
        tree: dict[str, Any],
        state: TrainingState,
        stream: BatchStream,
        binding: Mapping[str, Any],
    ) -> None:
        self._manifest = manifest
        self._state = state
        self._stream = stream
        self._binding = binding
        self._live = state.constructed()
        self._names = capture.parameter_names(state.model)
        self.tree = with_what_was_not_kept(tree, self._live, manifest["format_version"])
        self.differences: list[Difference] = []
        self.causes = ""
        """What may have made the data differ."""
        self._unfit: set[str] = set()

    def fit(self) -> None:
        """Part by part; a later one is compared as it is once the earlier ones fit."""
        self._fit_model()
        if len(self.tree["optimizers"]) == len(self._live["optimizers"]):  # else the phases differ
            self._fit_optimizers()
            self._fit_schedulers()
        self._fit_metrics()
        self._fit_settings()
        self._fit_data()
        if {d.key for d in self.differences} & {"model", "optimizer"} and not self.tree["window"]["count"]:
            self._replace(gradients=None)  # no step waits for them: hooks may have read them

    def _differs(self, key: str | None, text: str) -> None:
        self.differences.append(Difference(key, text))

    def _replace(self, **parts: Any) -> None:
        self.tree = {**self.tree, **parts}

    # -- model -----------------------------------------------------------------------------------

    def _fit_model(self) -> None:
        state, saved, live = self._state, self.tree, self._live
        for part, module in (("model", state.model), ("loss", state.loss)):
            lines = _module_lines(part, module, saved[part])
            for line in lines:
                self._differs("model", line)
            if not lines:
                continue
            fits = saved[part] is not None and live[part] is not None
            self._replace(**{part: overrides.fitted_module(saved[part], live[part]) if fits else live[part]})
            if part == "model" and len(saved["optimizers"]) == len(live["optimizers"]):
                self._fit_to_model(saved["model"])

    def _fit_to_model(self, was: Mapping[str, Any]) -> None:
        """Let what goes by the names of parameters follow the model."""
        both = zip(self.tree["optimizers"], self._live["optimizers"], strict=True)
        self._replace(
            optimizers=[overrides.fitted_optimizer(*pair, self._live["model"], was) for pair in both]
        )
        callbacks = dict(self.tree["callbacks"])
        for name, live in self._live["callbacks"].items():
            if not name.startswith(_SCHEDULING) and name in callbacks:
                callbacks[name] = overrides.fitted_average(callbacks[name], live)
        self._replace(callbacks=callbacks)

    # -- optimizers and schedulers ---------------------------------------------------------------

    def _fit_optimizers(self) -> None:
        fitted = []
        schedulings = self._state.schedulings
        for number, saved in enumerate(self.tree["optimizers"]):
            live, optimizer = self._live["optimizers"][number], self._state.optimizers[number]
            lines = capture.compare_optimizer(optimizer, saved, self._names).incompatible
            for line in lines:
                self._differs("optimizer", line)
            fitted.append(live if lines else overrides.with_new_entries(saved, live))
            for name, (scheduling, owner) in schedulings.items():
                if lines and owner == number:
                    self._unfit.add(name)
                    kind = type(scheduling.scheduler).__name__
                    self._differs("optimizer", f"its {kind} starts anew with another optimizer")
        self._replace(optimizers=fitted)

    def _fit_schedulers(self) -> None:
        live, saved = self._schedules(self._live), self._schedules(self.tree)
        fresh = set(self._unfit)
        if live.keys() != saved.keys():
            there, here = (
                ", ".join(sorted(n.removeprefix(_SCHEDULING) for n in s)) or "none" for s in (saved, live)
            )
            self._differs("scheduler", f"scheduler: the checkpoint has {there}, this trainer {here}")
            fresh |= live.keys() - saved.keys()
        for name in live.keys() & saved.keys() - self._unfit:
            lines = capture.compare_scheduler(self._scheduler(name), saved[name]).incompatible
            for line in lines:
                self._differs("scheduler", line)
            if lines:
                fresh.add(name)
        self._begin_anew(fresh, gone=bool(saved.keys() - live.keys()))

    def _begin_anew(self, names: Collection[str], *, gone: bool = False) -> None:
        """Take these schedulers, and the learning rates they set, as they were constructed; all others if `gone`."""
        schedulings = self._state.schedulings
        callbacks = {
            name: state
            for name, state in self.tree["callbacks"].items()
            if not name.startswith(_SCHEDULING) or name in schedulings
        }
        callbacks |= {name: self._live["callbacks"][name] for name in names}
        begun = {schedulings[name][1] for name in names}
        if gone:  # whose it was is not known, but not that of an optimizer with a scheduler that goes on
            going_on = {owner for name, (_, owner) in schedulings.items() if name not in names}
            begun |= set(range(len(self._state.optimizers))) - going_on
        optimizers = [
            overrides.with_rates_of(saved, live) if number in begun else saved
            for number, (saved, live) in enumerate(
                zip(self.tree["optimizers"], self._live["optimizers"], strict=True)
            )
        ]
        self._replace(callbacks=callbacks, optimizers=optimizers)

    def _scheduler(self, name: str) -> Any:
        return self._state.schedulings[name][0].scheduler

    @staticmethod
    def _schedules(tree: Mapping[str, Any]) -> dict[str, Any]:
        return {n: s["scheduler"] for n, s in tree["callbacks"].items() if n.startswith(_SCHEDULING)}

    # -- metrics, settings, data -----------------------------------------------------------------

    def _fit_metrics(self) -> None:
        saved, metrics = self.tree["metrics"]["metrics"], self._state.metrics
        if saved.keys() != metrics.keys():
            self._differs(
                "metrics", f"metrics: the checkpoint has {sorted(saved)}, this trainer {sorted(metrics)}"
            )
        lines = {
            name: capture.compare_metric(metrics[name], saved[name]) for name in metrics.keys() & saved.keys()
        }
        for name in sorted(lines):
            for line in lines[name]:
                self._differs("metrics", f"metrics: {name}: {line}")
        differing = [name for name, found in lines.items() if found]
        self._replace(
            metrics=overrides.fitted_metrics(self.tree["metrics"], self._live["metrics"], differing)
        )

    def _fit_settings(self) -> None:
        saved = self._manifest["binding"]
        for key, value in self._binding.items():
            if saved.get(key) != value:
                self._differs(
                    None if key == "phases" else key,
                    f"{key}: the checkpoint has {saved.get(key)!r}, this trainer {value!r}",
                )
        if saved.get("precision") != self._binding["precision"]:
            both = zip(self.tree["scalers"], self._live["scalers"], strict=False)
            scalers = [then if None not in (then, now) else now for then, now in both]
            self._replace(scalers=scalers)

    def _fit_data(self) -> None:
        stream = self._stream
        saved, now = self._manifest["data"], stream.fingerprint()
        lines, self.causes = compare_fingerprints(saved, now), likely_causes(saved, now)
        for line in lines:
            self._differs("data", line)
        if lines:
            self._replace(
                batch={**self.tree["batch"], "data": None},  # it is fetched from the other data
                data=overrides.fitted_data(
                    self.tree["data"],
                    self._live["data"],
                    length=stream.length,
                    over=self.tree["state"] in _AFTER_AN_EPOCH,
                    same_sampler=_types(saved.get("sampler")) == _types(now.get("sampler")),
                ),
            )

    # -- what follows once it is known what is overridden ----------------------------------------

    def impossible(self, override: Collection[str]) -> list[str]:
        """Why what is overridden cannot be, at the place where the checkpoint stands."""
        differing = {d.key for d in self.differences if d.key is not None} & set(override)
        found = []
        if "data" in differing and (problem := self._cannot_stand()) is not None:
            found.append(
                f"data: the epoch at hand cannot be continued ({problem}); resume from a checkpoint of an EPOCH_END"
            )
        again = sorted(differing & {"model", "metrics", "data", "precision"})
        if again and self.tree["state"] is State.FORWARD:
            found.append(
                f"{', '.join(again)}: the checkpoint stands in FORWARD, and its forward pass would be done again with "
                "something else; resume from a checkpoint of another state"
            )
        window = self.tree["window"]["count"]
        if window:
            names = sorted(differing & {"model", "accumulate", "accumulate_weighting"})
            if "precision" in differing and "fp16" in (self._binding["precision"], self._saved_precision()):
                names.append("precision")
            found += [
                f"{name}: the checkpoint stands in {self.tree['state'].value} with the gradients of {window} "
                f"{'batch' if window == 1 else 'batches'} that wait for their step; {name} can be overridden from a "
                "checkpoint of EPOCH_END, EPOCH_START or IDLE, or of any state after the STEP that closes a window"
                for name in names
            ]
        return found

    def _saved_precision(self) -> Any:
        return self._manifest["binding"].get("precision")

    def _cannot_stand(self) -> str | None:
        """Why the stream cannot be where the checkpoint is; tried, and undone."""
        stream, data = self._stream, dict(self.tree["data"])
        if self.tree["state"] in _WITH_BATCH:
            if data["position"] == 0:
                return "an epoch has no batch now"
            data["position"] -= 1
        before = stream.state_dict()
        try:
            stream.load_state_dict(data)
            if self.tree["state"] in _WITH_BATCH and not stream.has_next:
                return f"there is no batch {data['position']} now"
        except DataError as error:
            return str(error)
        finally:
            stream.load_state_dict(before)
        return None

    def changed(self) -> list[Difference]:
        """The hyper-parameters for which the trainer was given other values than the tree has."""
        found = [line for number in range(len(self._state.optimizers)) for line in self._changed_of(number)]
        return [Difference(_name(line), line.lstrip("_")) for line in found]

    def _changed_of(self, number: int) -> list[str]:
        """Those of one optimizer and its schedulers."""
        optimizer, saved = self._state.optimizers[number], self.tree["optimizers"][number]
        found = list(capture.compare_optimizer(optimizer, saved, self._names).hyperparameters)
        found += _scheduled(optimizer.param_groups, saved["groups"])
        for name, schedule in self._schedules_of(number).items():
            found += capture.compare_scheduler(self._scheduler(name), schedule).hyperparameters
        return found

    def _schedules_of(self, number: int) -> dict[str, Any]:
        saved = self._schedules(self.tree)
        return {name: saved[name] for name, (_, owner) in self._state.schedulings.items() if owner == number}

    def restart_changed_schedules(self) -> None:
        """Let schedulers that were constructed with other values start as they were constructed."""
        for number, (optimizer, tree) in enumerate(
            zip(self._state.optimizers, self.tree["optimizers"], strict=False)
        ):
            scheduled = _scheduled(optimizer.param_groups, tree["groups"])
            for name, schedule in self._schedules_of(number).items():
                lines = [
                    *scheduled,
                    *capture.compare_scheduler(self._scheduler(name), schedule).hyperparameters,
                ]
                for line in lines:
                    self._differs("scheduler", line)
                if lines:
                    self._begin_anew([name])

    def override(self, name: str) -> None:
        """Put the trainer's value of one hyper-parameter into the tree, wherever it differs."""
        live = self._schedules(self._live)
        callbacks, optimizers = dict(self.tree["callbacks"]), list(self.tree["optimizers"])
        for number, saved in enumerate(optimizers):
            if name not in map(_name, self._changed_of(number)):
                continue
            optimizers[number], schedules = overrides.with_setting(
                name, saved, self._live["optimizers"][number], self._schedules_of(number), live
            )
            callbacks |= {key: {"scheduler": schedule} for key, schedule in schedules.items()}
        self._replace(callbacks=callbacks, optimizers=optimizers)

    def left(self) -> list[str]:
        """What does not fit even so; empty, unless a part of the checkpoint cannot be made to."""
        state, tree = self._state, self.tree
        found = [*_module_lines("model", state.model, tree["model"])]
        found += _module_lines("loss", state.loss, tree["loss"])
        for optimizer, saved in zip(state.optimizers, tree["optimizers"], strict=True):
            found += capture.compare_optimizer(optimizer, saved, self._names).incompatible
        for name, saved in self._schedules(tree).items():
            found += capture.compare_scheduler(self._scheduler(name), saved).incompatible
        return found


def _module_lines(part: str, module: nn.Module | None, saved: Mapping[str, Any] | None) -> list[str]:
    if module is not None and saved is not None:
        lines = capture.compare_module(module, saved)
        return lines if part == "model" else [f"loss_fn: {line}" for line in lines]
    here = module is not None and bool(module.state_dict())
    if here or (saved is not None and any(t is not None for t in _tensors(saved))):
        return ["loss_fn: only one of checkpoint and trainer has a module with tensors as its loss function"]
    return []


def _tensors(module: Mapping[str, Any]) -> list[Any]:
    return [*module["parameters"].values(), *module["buffers"].values()]


def _scheduled(live: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a scheduler was given, and keeps in the groups, that differs; not what follows from the learning rate."""
    found = []
    for number, (group, then) in enumerate(zip(live, saved, strict=True)):
        where = "" if len(live) == 1 else f" of parameter group {number}"
        for key in sorted(SCHEDULERS_OWN - {"initial_lr"}):
            before, now = then["settings"].get(key), group.get(key)
            if before is not None and now is not None and before != now:
                found.append(f"{key}{where}: checkpoint has {before!r}, the scheduler was given {now!r}")
    return found


def _name(line: str) -> str:
    """The name of the hyper-parameter that a line of a Comparison begins with."""
    return line.split(":")[0].split(" of ")[0].lstrip("_")


def _types(sampler: Any) -> list[str]:
    """The types of a sampler and of those it wraps, from a fingerprint."""
    found = []
    while isinstance(sampler, Mapping):
        found.append(sampler["type"])
        sampler = sampler.get("of")
    return found
