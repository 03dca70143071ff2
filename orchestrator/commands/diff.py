"""`interlock diff`: the first transition at which two runs part."""

import sys
from collections.abc import Iterator
from typing import Any

import click

from orchestrator.commands.arguments import json_option, root_option, run_argument
from orchestrator.commands.comparison import (
    Comparison,
    Values,
    compare,
    compare_values,
    digest_of,
)
from orchestrator.commands.layout import count, heading, table, to_json
from orchestrator.commands.lineage import END, Stretch, lineage_of, rows_of, shared
from orchestrator.commands.standing import Place, places_of
from tracking.journal import TRAIN, Journal, Metric, Transition
from tracking.runs import RunFolder

__all__ = ["diff"]


@click.command()
@run_argument("left")
@run_argument("right")
@click.option("--validation", is_flag=True, help="Compare the values of validations as well.")
@json_option
@root_option
def diff(left: RunFolder, right: RunFolder, validation: bool, as_json: bool) -> None:
    """Name the first transition at which two RUNs part.

    Their trainings are walked through in step: transitions, losses bit for bit, and digests of the
    parameters where both have them (callback `ParameterDigests`). Interruptions do not count: a run that was
    killed and resumed is the same as one that was not. Of branches, only what they do not share is walked
    through. The exit status is 0 if they are the same as far as both go, 1 if they part.

    \b
    Example:
      interlock diff digits-20240131-120000-ab12 digits-20240131-140000-cd34
      interlock diff digits other --json | jq .parting.what
    """
    if left.path.resolve() == right.path.resolve():
        raise click.UsageError(f"{left.id} is given twice; expected two runs")
    page = _Page(left, right, validation)
    click.echo(to_json(page.values(), indent=1) if as_json else "\n".join(page.lines()))
    if page.part:
        sys.exit(1)


class _Page:
    """Two runs compared, and the two forms of what came of it."""

    def __init__(self, left: RunFolder, right: RunFolder, validation: bool):
        self.left, self.right = left, right
        self.common, behind_left, behind_right, folders = _histories(left, right)
        self.folders = folders
        self.found: Comparison = compare(rows_of(behind_left, folders), rows_of(behind_right, folders))
        self.values_of_validation: Values | None = _validation(left, right) if validation else None
        self.settings = _settings(left, right)

    @property
    def part(self) -> bool:
        """Do they part?"""
        validation = self.values_of_validation
        return self.found.parting is not None or (validation is not None and validation.parting is not None)

    def values(self) -> dict[str, Any]:
        """The page for programs."""
        split = self._split()
        return {
            "left": {"id": self.left.id, "folder": self.left.path},
            "right": {"id": self.right.id, "folder": self.right.path},
            "shared": split and {"run": split.run, "seq": split.last, "place": self._place_of(split)},
            **vars(self.found),
            "validation": self.values_of_validation,
            "settings": self.settings,
        }

    def lines(self) -> Iterator[str]:
        """The page for people."""
        yield f"{heading(self.left.id)} and {heading(self.right.id)}"
        split = self._split()
        if split is not None:
            yield f"  {self._relation(split)}"
        parting = self.found.parting
        yield f"  {self._extent()}"
        if parting is not None:
            yield f"  {self._digest()}"
            yield ""
            yield click.style(f"They part at {_named(parting.left)}: {_IN_WORDS[parting.what]}", fg="red")
            yield from self._sides(parting.left, parting.right)
        if self.values_of_validation is not None:
            yield from self._validation(self.values_of_validation)
        if self.settings and self.part:
            yield ""
            yield heading("What was set differently")
            rows = [[f"  {key}", *map(_shown, values)] for key, values in self.settings.items()]
            yield from table(["  setting", *self._names()], rows)

    def _relation(self, split: Stretch) -> str:
        at = f"{self._place_text(split)}, transition {split.last:,} of {split.run}"
        if split.run in (self.left.id, self.right.id):
            child = self.right if split.run == self.left.id else self.left
            return f"{child.id} goes on from {at}: compared from there"
        return f"both go on from {split.run}; they share all up to {at}"

    def _split(self) -> Stretch | None:
        """The last stretch that both have behind them."""
        return self.common[-1] if self.common else None

    def _place_of(self, split: Stretch) -> Place | None:
        folder = self.folders.get(split.run)
        return places_of(folder, [split.last]).get(split.last) if folder and split.last != END else None

    def _place_text(self, split: Stretch) -> str:
        place = self._place_of(split)
        return f"{place.state.value} {place}" if place else "a moment"

    def _extent(self) -> str:
        found = self.found
        same = f"the same for {count(found.same, 'transition')}"
        if found.parting is not None:
            return same
        if found.longer is None:
            return f"{same}, to the end of both{self._digests()}"
        longer = self.left if found.longer == "left" else self.right
        return f"{same}, as far as both go{self._digests()}; {longer.id} goes on"

    def _digests(self) -> str:
        if not self.found.digests:
            return " (no digests of the parameters to compare)"
        return f" ({count(self.found.digests, 'digest')} of the parameters among them)"

    def _digest(self) -> str:
        last = self.found.last_digest
        if last is None:
            return "no digest of the parameters was equal before, or none is in both"
        return f"digests of the parameters were equal last at {_named(last)}: {digest_of(last.note)}"

    def _sides(self, left: Transition, right: Transition) -> Iterator[str]:
        sides = [_side(left), _side(right)]
        rows = [[f"  {key}", *(side[key] for side in sides)] for key in sides[0]]
        yield from table(["", *self._names()], (row for row in rows if any(row[1:])))

    def _names(self) -> list[str]:
        return [self.left.id, self.right.id]

    def _validation(self, values: Values) -> Iterator[str]:
        if values.parting is None:
            yield f"  {count(values.same, 'value')} of validations that both have are equal"
            return
        one, other = values.parting
        text = f"Validations part at {_of_metric(one)}: {one.value!r} and {other.value!r}"
        yield click.style(text, fg="red")


_IN_WORDS = {
    "transition": "these are different moves",
    "loss": "the losses differ",
    "parameters": "the parameters differ",
}


def _histories(
    left: RunFolder, right: RunFolder
) -> tuple[list[Stretch], list[Stretch], list[Stretch], dict[str, RunFolder]]:
    """What both have behind them, what each has beside that, and the folders that all of it lies in."""
    known = {left.id: left, right.id: right}
    behind_left, folders_left = lineage_of(left, known)
    behind_right, folders_right = lineage_of(right, known)
    return *shared(behind_left, behind_right), {**folders_left, **folders_right}


def _validation(left: RunFolder, right: RunFolder) -> Values:
    with Journal.open(left) as one, Journal.open(right) as other:
        return compare_values(_validated(one), _validated(other))


def _validated(journal: Journal) -> Iterator[Metric]:
    return (metric for metric in journal.metrics() if metric.scope != TRAIN)


def _settings(left: RunFolder, right: RunFolder) -> dict[str, tuple[Any, Any]]:
    """What the newest attempts of two runs were given, or ran on, that is not equal."""
    one, other = _given(left), _given(right)
    keys = dict.fromkeys((*one, *other))
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def _given(run: RunFolder) -> dict[str, Any]:
    with Journal.open(run) as journal:
        attempts = journal.attempts()
    if not attempts:
        return {}
    newest = attempts[-1]
    return {**_flat(newest.params), **newest.versions, "device": newest.device}


def _flat(params: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'data': {'seed': 1}} becomes {'data.seed': 1}."""
    found: dict[str, Any] = {}
    for key, value in params.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _side(row: Transition) -> dict[str, str]:
    """What one run has to say of a transition; '' for nothing."""
    return {
        "transition": f"{row.seq:,} of attempt {row.attempt}",
        "move": f"{row.source.value} → {row.dest.value} ({row.trigger.value})",
        "place": _place(row.epoch, row.batch),
        "phase": row.phase,
        "loss": "" if row.loss is None else repr(row.loss),
        "note": row.note,
    }


def _named(row: Transition) -> str:
    return f"{row.trigger.value} of {_place(row.epoch, row.batch)}"


def _of_metric(metric: Metric) -> str:
    name = f"{metric.scope.removeprefix('validation/')}/{metric.key}"
    return f"{name} of {_place(metric.epoch, metric.batch)}"


def _place(epoch: int, batch: int) -> str:
    return f"epoch {epoch}" + (f", batch {batch}" if batch >= 0 else "")


def _shown(value: object) -> str:
    return "-" if value is None else str(value)
