"""Errands: what `interlock seek`, `replay` and `blame` have the recorded script do instead of training."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from states.errors import InterlockError
from states.table import State, Trigger
from tracking.runs import RunFolder

if TYPE_CHECKING:
    from orchestrator.past import Past, Replay
    from orchestrator.trainer import Trainer

__all__ = ["ERRAND_VARIABLE", "Errand", "ErrandError", "carry_out"]

ERRAND_VARIABLE = "INTERLOCK_ERRAND"
"""The environment variable by which a command tells a script what to do with its trainer."""

Place = tuple[int, int | None]
"""An epoch, and a batch of it or all of them."""


class ErrandError(InterlockError):
    """An errand that cannot be read."""


@dataclass(frozen=True)
class Errand:
    """What is to be done with the trainer of a run."""

    what: Literal["seek", "replay", "blame"]
    run: str
    """The run's folder."""
    epoch: int | None = None
    batch: int | None = None
    state: str | None = None
    phase: str | None = None
    first: Place | None = None
    last: Place | None = None
    script: str | None = None
    """The path of what is to be run there."""
    begun: str | None = None
    """A file that is made when the errand begins, so that the command knows that its trainer was there."""

    def to_json(self) -> str:
        """For the environment."""
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None})

    @classmethod
    def from_json(cls, text: str) -> Errand:
        """The same again; raises ErrandError."""
        try:
            found = json.loads(text)
            places = {key: tuple(found[key]) for key in ("first", "last") if key in found}
            return cls(**{**found, **places})
        except (ValueError, TypeError) as error:
            raise ErrandError(
                f"{ERRAND_VARIABLE}={text!r}: cannot be read ({error}); expected what `interlock seek`, `replay` or "
                "`blame` sets, or no such variable"
            ) from error


def carry_out(trainer: Trainer) -> None:
    """Do the errand that the environment has for this trainer, if there is one, and leave by SystemExit.

    It is taken out of the environment, so that no other trainer, and no child, does it as well.
    """
    text = os.environ.get(ERRAND_VARIABLE)
    if text is None:
        return
    errand = Errand.from_json(text)
    if RunFolder(Path(errand.run)).name != trainer._settings.name:
        return
    del os.environ[ERRAND_VARIABLE]
    if errand.begun is not None:
        Path(errand.begun).touch()
    does = {"seek": _seek, "replay": _replay, "blame": _blame}[errand.what]
    try:
        does(trainer, errand)
    except InterlockError as error:
        _say(f"Error: {error}")
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        trainer.close()
    raise SystemExit(0)


# -- the three of them -------------------------------------------------------------------------------


def _seek(trainer: Trainer, errand: Errand) -> None:
    state = None if errand.state is None else State(errand.state)
    with _progress(trainer, "going back"):
        past = trainer.seek(errand.epoch, errand.batch, state, phase=errand.phase, run=errand.run)
    names = {
        "trainer": trainer,
        "model": trainer.model,
        "batch": trainer.data,
        "State": State,
        "Trigger": Trigger,
    }
    if errand.script is not None:
        _say(_standing(trainer, past))
        _run(_code_of(errand.script), {**names, "__file__": errand.script})
    elif sys.stdin.isatty():
        _prompt(names, f"{_standing(trainer, past)}\n{_TO_TRY}")
    else:
        _say(_standing(trainer, past))
        _run(compile(sys.stdin.read(), "<stdin>", "exec"), names)


def _standing(trainer: Trainer, past: Past) -> str:
    again = (
        f"reached from {past.checkpoint}, {_count(past.replayed)} done again, {_verdict(trainer.divergence)}"
    )
    return f"{past.run.id} at {past.moment}: {again}."


_TO_TRY = """There are: trainer, model, batch (the data at hand), State, Trigger. To try:
  trainer.advance()                        one transition; trainer.advance(until=State.BACKWARD) up to a state
  {n: p.grad for n, p in model.named_parameters()}   in BACKWARD
  trainer.seek(epoch, batch, State.STEP)   another moment
  trainer.blame()                          what made a loss or gradient NaN
Nothing is recorded until you go on with advance, fit or save, which begins a new run. Ctrl-D leaves."""


def _replay(trainer: Trainer, errand: Errand) -> None:
    from orchestrator import past

    assert errand.script is not None
    script = _Script(errand.script)
    last = errand.last
    if last is None:
        last = past.last_epoch(past.run_of(trainer, errand.run)), None
    with _progress(trainer, "replaying"):
        replay = past.replay(
            trainer, _stretch(errand.first or (0, None)), _stretch(last), (), errand.run, script.during
        )
    _say(_replayed(replay))


def _stretch(place: Place) -> int | tuple[int, int]:
    epoch, batch = place
    return epoch if batch is None else (epoch, batch)


def _replayed(replay: Replay) -> str:
    stretch = f"after {replay.first} up to {replay.last}"
    return f"replayed {_count(replay.batches)}, {stretch}: {_verdict(replay.divergence)}."


def _blame(trainer: Trainer, errand: Errand) -> None:
    with _progress(trainer, "going back"):
        if errand.epoch is None:
            blame = trainer.blame(run=errand.run)
        else:
            trainer.seek(errand.epoch, errand.batch, run=errand.run)
            blame = trainer.blame()
    print(blame)


def _verdict(divergence: object) -> str:
    if divergence is None:
        return "every loss the recorded one, bit for bit"
    return f"not the same as it was: {divergence}"


def _count(batches: int) -> str:
    return "1 batch" if batches == 1 else f"{batches} batches"


def _say(text: str) -> None:
    """Standard output is for what the user's code prints."""
    print(text, file=sys.stderr, flush=True)


# -- the user's code ---------------------------------------------------------------------------------


class _Script:
    """A script of hooks: executed where the stretch begins; its `callbacks` are attached; `done()` ends it."""

    def __init__(self, path: str) -> None:
        self._path = path

    @contextlib.contextmanager
    def during(self, trainer: Trainer) -> Iterator[None]:
        """What `past.replay` enters for the stretch."""
        from orchestrator import past

        names: dict[str, Any] = {
            "trainer": trainer,
            "State": State,
            "Trigger": Trigger,
            "__file__": self._path,
        }
        _run(_code_of(self._path), names)
        with _said():
            past.attach(trainer, names.get("callbacks", ()))
        with _said():
            yield
        done = names.get("done")
        if callable(done):
            with _said():
                done()


def _code_of(path: str) -> Any:
    with _said():
        return compile(Path(path).read_bytes(), path, "exec")


def _run(code: Any, names: dict[str, Any]) -> None:
    names.setdefault("__name__", "__main__")
    with _said():
        exec(code, names)


@contextlib.contextmanager
def _said() -> Iterator[None]:
    """What the user's code raises is shown from that code on, and ends the errand."""
    try:
        yield
    except InterlockError:
        raise
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, contextlib.__file__):
            trace = trace.tb_next
        traceback.print_exception(error.with_traceback(trace))
        raise SystemExit(1) from None


def _prompt(names: dict[str, Any], banner: str) -> None:
    """A Python prompt: IPython's where it is installed."""
    if find_spec("IPython") is None:
        _plain_prompt(names, banner)
        return
    from IPython import start_ipython
    from traitlets.config import Config

    config = Config()
    config.TerminalInteractiveShell.banner1 = f"{banner}\n"
    config.TerminalInteractiveShell.confirm_exit = False
    start_ipython(argv=[], user_ns=names, config=config)


def _plain_prompt(names: dict[str, Any], banner: str) -> None:
    import code

    with contextlib.suppress(ImportError):
        import readline
        import rlcompleter

        readline.set_completer(rlcompleter.Completer(names).complete)
        readline.parse_and_bind("tab: complete")
    code.interact(banner, local=names, exitmsg="")


# -- progress ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(trainer: Trainer, what: str) -> Iterator[None]:
    """A line that says which batch is done again; on a terminal only."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn(f"{what} {{task.description}}"), TimeElapsedColumn()
    out = sys.stdout.isatty()  # otherwise what is printed belongs into the file or pipe
    bar = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=out)
    with bar, trainer._training.loop.hooks_kept():
        task = bar.add_task("", total=None)
        trainer.after(Trigger.END_BATCH)(
            lambda: bar.update(task, description=f"epoch {trainer.epoch}, batch {trainer.batch}")
        )
        yield
