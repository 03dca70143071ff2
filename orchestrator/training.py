"""Training: one training under way. Transitions are fired here, and what was asked for is done between them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from orchestrator import late, recovery
from orchestrator.attempt import Attempt
from orchestrator.configuration import Settings
from orchestrator.data.batches import described
from orchestrator.divergence import Divergence, DivergenceError, Expected
from orchestrator.errors import NonFiniteError
from orchestrator.evaluation import Evaluation
from orchestrator.late_work import LateTrainingWork, LateWork
from orchestrator.loop import Loop
from orchestrator.policy import AHEAD, Situation, next_trigger
from orchestrator.requests import HaltRequest, Requests, Save
from orchestrator.signals import GiveWay, leave
from orchestrator.snapshot.info import BEFORE_THE_END, CUT_SHORT
from orchestrator.snapshot.writer import OPTIMIZER_STATE, PARAMETERS
from orchestrator.state import SAVEABLE, TrainingState
from orchestrator.validation import Validation
from orchestrator.warning import warn
from orchestrator.work import BatchWork, EvaluationWork, Place, TrainingWork
from states.errors import InterlockError
from states.table import ARCS, TERMINAL, TRAINING, Arc, State, Trigger
from tracking.rows import Outcome, Parent

__all__ = ["Training"]

_BEFORE_UPDATES = frozenset({State.BATCH_START, State.FORWARD, State.BACKWARD})


class Training:
    """The machine with its work, the attempt that records it, and the requests that wait for the next boundary.

    `fire_next` is one transition and what follows it, `run` all that are left:

        fire(next_trigger(situation))    # before-hooks, work, change of state, after-hooks, journal
        carry out what was asked for     # saves, stops, halts

    Where work or a hook raises, the transition has not happened: the training halts from the last journaled state,
    and memory is `tainted`, so that nothing of it is saved.

    `snapshots` is set once the callbacks, whose state it takes, are known. `work` are the arguments of TrainingWork
    that are no affair of this class.
    """

    snapshots: TrainingState

    def __init__(
        self, evaluations: Mapping[str, Evaluation], *, saves: bool, on_divergence: str, **work: Any
    ) -> None:
        self.requests = Requests()
        self.attempt: Attempt | None = None
        self.beside: Attempt | None = None
        """The attempt that goes on after what is done now, of which it records nothing but warnings."""
        self.found: recovery.Found | None = None
        """The checkpoint that the next `resume` puts back."""
        self.expected: Expected | None = None
        """The recorded losses of what is done again."""
        self.divergence: Divergence | None = None
        """The first loss of this attempt, or of the last seek, that was not the recorded one."""
        self.validation = Validation(evaluations)
        self._runs = False
        """Whether nobody but the loop, its work and its hooks gets a turn before the next transition."""
        self._saves = saves
        self._on_divergence = on_divergence
        self._forget_the_end()
        situation = Situation()
        work |= {
            "situation": situation,
            "place": Place(),
            "request_halt": self._request_nonfinite_halt,
            "restore": self.restore,
            "report": self.report,
        }
        link = late.link_to(work["device"])
        self.work = TrainingWork(**work) if link is None else LateTrainingWork(link=link, **work)
        self.loop = Loop(TRAINING, self.work.table(), situation, self._journal)

    def _forget_the_end(self) -> None:
        self.tainted = False
        """Whether a transition failed half-way, so that memory holds no state of the training."""
        self.ended = ""
        """Why the training ended; empty while it goes on."""
        self.left: HaltRequest | None = None
        """What the last attempt halted for."""
        self.halted_in: State | None = None
        """The state that a checkpoint of HALTED carries; None where memory is not worth keeping."""

    def renew(self, expected: Expected | None) -> None:
        """Forget how the last attempt ended; another begins, which is to do the `expected` losses again."""
        self._forget_the_end()
        self.expected, self.divergence = expected, None
        self.work.situation.halt = False

    def open(self, plan: recovery.Plan, settings: Settings, parent: Parent | None) -> Attempt:
        """Open the attempt that records what follows."""
        scopes = ("train", *self.validation.scopes)
        self.attempt = Attempt.open(plan, settings, scopes, self.work, self.requests, parent)
        for work in (self.work, *(evaluation.work for evaluation in self.validation.evaluations.values())):
            if isinstance(work, LateWork):
                work.written = self.attempt
        return self.attempt

    @property
    def state(self) -> State:
        """Where the machine stands."""
        return self.loop.state

    def spent(self) -> Mapping[Trigger, int]:
        """Nanoseconds of the newest batches by trigger, those of all phases together; from any thread."""
        return {} if self.attempt is None else self.attempt.spent()

    def under_way(self) -> tuple[str, float] | None:
        """What is being done, a transition's work or its hooks, and for how many seconds already; from any thread."""
        if self.attempt is None or not self.loop.inside:
            return None
        if self._in_hooks():
            return f"hooks in {self.state.value}", self.attempt.idle_s()
        trigger = next_trigger(self.work.situation)
        return None if trigger is None else (trigger.value, self.attempt.idle_s())

    def run(self) -> None:
        """Fire transitions, and carry out what was asked for, until nothing is left."""
        while self._guarded(self._run):
            pass

    def fire_next(self) -> bool:
        """Fire the next transition and carry out what was asked for; False where nothing is left."""
        return self._guarded(self._fire_next)

    def _run(self) -> bool:
        plain = not isinstance(self.work, LateWork) and self.expected is None
        writer = self.attempt.writer if self.attempt is not None and plain else None
        self._runs = True
        try:
            self.loop.run(self.requests, self._look_up, writer)
        finally:
            self._runs = False
        return False

    def _fire_next(self) -> bool:
        if not self.loop.advance():
            return False
        self._look_up()
        return True

    def _guarded(self, go: Callable[[], bool]) -> bool:
        """What `go` says, or True where it was broken off and the training stands as if it had not begun."""
        self.loop.check_outside()
        try:
            if self.requests.halt is not None and self.state not in TERMINAL:
                self.carry_out()  # it was asked for between two transitions
                if self.state in TERMINAL:
                    return True
            return go()
        except GiveWay:
            # Nothing had changed: the training stands, intact, where the journal says.
            self.work.note = ""
            self.validation.abandon()
            self.loop.stand(self.attempt.state if self.attempt else self.state)
        except BaseException as error:
            left = self._excused(error)
            if left is error and isinstance(error, Exception) and not isinstance(error, InterlockError):
                with contextlib.suppress(Exception):  # what it tells of may be what is broken
                    error.add_note(self._told())
            self.fail(left)
            if left is error:
                raise
            raise left from error
        return True

    def _in_hooks(self) -> bool:
        """Whether the work of the transition at hand is done, and the hooks after it are called."""
        return self.attempt is not None and self.attempt.state is not self.state

    def _told(self) -> str:
        """For whoever reads a traceback: in what it was raised, and with which batch."""
        evaluation = self.validation.under_way
        work: BatchWork = self.work if evaluation is None else evaluation.work
        place, trigger = work.place, next_trigger(work.situation)
        what = "" if trigger is None else trigger.value
        if evaluation is None and self._in_hooks():
            what = f"a hook in {self.state.value}"
        told = f"raised in {what}, epoch {place.epoch}"
        if evaluation is not None:
            told += f", validating {evaluation.name!r}"
        of_epoch = what in (Trigger.BEGIN_EPOCH.value, Trigger.END_EPOCH.value)
        if of_epoch or place.batch < 0 or self.state in (State.EPOCH_START, State.EPOCH_END):
            return told
        if what == Trigger.FETCH.value:
            return f"{told}, after batch {place.batch}"
        return f"{told}, batch {place.batch}, which has {described(work.data)}"

    def _look_up(self) -> None:
        """Between two transitions: carry out what was asked for during the last."""
        if self.requests.later:
            self._arrive()
        if self.halting() or self.requests.saves or self.state is State.DONE:
            self.carry_out()
            self.requests.looked_at()

    def _arrive(self) -> None:
        self.requests.arrive(self.state)
        if not self.requests.awaits(State.FORWARD):
            self.work.keep = None

    def _excused(self, error: BaseException) -> BaseException:
        """A data worker that dies after a stop was requested is no error of its own: schedulers kill them all."""
        halt = self.requests.halt
        if halt is None or halt.error is None:
            return error
        died = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
        return halt.error if died else error

    def saveable(self) -> bool:
        """Whether a checkpoint can be taken where the training stands."""
        if self.state is State.FORWARD:
            return self.work.before_forward is not None
        return self.state in SAVEABLE

    def carry_out(self) -> None:
        """Do what was asked for: saves and a halt."""
        self.work.settle()  # which may ask for a halt
        halt = self.requests.halt if self.state not in TERMINAL else None
        if halt is not None:
            if not halt.save:
                self.requests.abandon_saves(halt.reason)
            elif self._saves:
                if not self.saveable():
                    return  # one transition on, to BACKWARD
                if not self.requests.saves:
                    self.requests.saves.append(Save())
        if self.saveable():
            self.carry_out_saves()
        if halt is not None:
            self.ended = halt.reason
            self.work.note = self._halt_note(halt)
            self.work.situation.halt = True
            self.halted_in = self.state if halt.save and self.saveable() else None
            self.loop.advance()
            self.requests.arrive(State.HALTED)
            if self.halted_in is not None:
                self.carry_out_saves()
            self.requests.abandon_all_saves("the training stands in HALTED")
        elif self.state is State.DONE:
            self.ended = self.requests.stop or "finished"

    def carry_out_saves(self, purpose: str = "") -> None:
        """Take a checkpoint of where the training stands, if any was asked for."""
        self.work.settle()
        if self.requests.halt is not None and not self.requests.halt.save:
            self.requests.abandon_saves(self.requests.halt.reason)
        if self.requests.saves:
            self.work.end_copying()  # of an earlier one: that may be why there has to be another
        saves, self.requests.saves = self.requests.saves, []
        if not saves or self.attempt is None:
            return
        work, state, began = self.work, self.state, time.perf_counter()
        stands = self.halted_in if state is State.HALTED and self.halted_in is not None else state
        metrics = work.history[-1] if stands is State.EPOCH_END and work.history else {}
        left_alone = self._left_alone(state) if self._runs and self.requests.halt is None else ()
        try:
            data = (
                self.snapshots.fingerprints()
            )  # first: what reading changes, if anything, is in the snapshot
            handle = self.attempt.save(
                self.snapshots.capture(stands),
                state,
                work.place,
                self._purpose(stands) or purpose,
                metrics,
                data,
                left_alone=left_alone,
            )
        except BaseException as error:
            for save in saves:
                save.abandoned(f"{type(error).__name__}: {error}")
            raise
        if left_alone:
            work.copying = partial(self._end_copying, saves)
        for save in saves:
            save.begun(handle, time.perf_counter() - began)
        self.attempt.restart_clock()

    def _left_alone(self, state: State) -> tuple[str, ...]:
        """What nothing but the next update writes to, from a boundary in `state` on."""
        if state in TERMINAL:
            return ()
        # Callbacks may well write to parameters where a batch or an epoch ends, or an epoch begins. (In an open window
        # the update is not yet that of the next batch; where one does so there, it costs a save, and is told.)
        to_the_update = state in _BEFORE_UPDATES or (
            state is State.BATCH_END and AHEAD[state](self.work.situation) == (Trigger.FETCH,)
        )
        return (PARAMETERS, OPTIMIZER_STATE) if to_the_update else (OPTIMIZER_STATE,)

    def _end_copying(self, saves: list[Save]) -> None:
        """Wait until what `saves` have begun is copied."""
        began = time.perf_counter()
        if self.attempt is not None and not self.attempt.finish_copy():
            self.requests.add_save(Save())
        for save in saves:
            save.waited(time.perf_counter() - began)

    def _purpose(self, state: State) -> str:
        """What a checkpoint of this moment is for, should the run be extended after its end."""
        situation = self.work.situation
        if state is State.BATCH_END and situation.has_batch and not situation.batches_left:
            return BEFORE_THE_END
        if state is State.EPOCH_END and not (situation.epochs_left and situation.batches_left):
            return BEFORE_THE_END if not situation.has_batch else CUT_SHORT
        return ""

    def _halt_note(self, halt: HaltRequest) -> str:
        """The reason; and the way back, where no checkpoint of this moment is on disk."""
        attempt = self.attempt
        if attempt is None or (halt.save and not self._saves):
            return halt.reason
        failure = attempt.wait_for_save() if halt.save else None
        if halt.save and failure is None:
            return halt.reason
        why = f"{halt.reason}; the checkpoint could not be written ({failure})" if failure else halt.reason
        return f"{why}; {attempt.way_back(self.work.place)}"

    def fail(self, error: BaseException) -> None:
        """Work or a hook raised: halt from the last journaled state, capture nothing, name the way back."""
        self.tainted = True
        with contextlib.suppress(Exception):  # the device may have failed
            self.work.settle()
        with contextlib.suppress(Exception):
            self.work.end_copying()
        attempt, halt = self.attempt, self.requests.halt
        self.requests.abandon_all_saves(f"{type(error).__name__}: {error}")
        if attempt is None or attempt.closed:
            return
        self.validation.abandon()
        attempt.catch_up()
        self.loop.stand(attempt.state)
        asked = halt is not None and halt.error is error
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        self.ended = halt.reason if asked and halt is not None else said
        self.requests.halt = HaltRequest(self.ended, save=False, error=error)
        if attempt.state in TERMINAL:
            return
        note = self.work.note = f"{self.ended}; {attempt.way_back(self.work.place)}"
        source = attempt.state
        try:
            self.work.situation.halt = True
            self.loop.advance()
        except Exception as second:
            warn(f"a hook on HALTED raised {type(second).__name__}: {second}")
            self.work.note = note
            attempt.record(ARCS.index(Arc(Trigger.HALT, source, State.HALTED)))
            self.loop.stand(State.HALTED)

    def diverged(self, divergence: Divergence) -> None:
        """Say that a loss is not the recorded one, and halt where that is asked for."""
        self.divergence = self.divergence or divergence
        if self._on_divergence == "halt":
            error = DivergenceError(divergence)
            self.requests.add_halt(HaltRequest(str(error), save=False, error=error))
        else:
            self.report(str(divergence))
            warn(str(divergence))

    def halting(self) -> bool:
        """Whether a halt is asked for, by anybody or by trouble with the files or the time."""
        if self.attempt is not None and (trouble := self.attempt.trouble()) is not None:
            self.requests.add_halt(trouble)
        self.requests.looked_at()
        return self.requests.halt is not None

    def waits(self) -> bool:
        """Whether the main thread is waiting for a data worker, so that a signal may break it off."""
        if self.attempt is None or self.attempt.state in TERMINAL:
            return False  # also while a resume takes its batch again: that is no transition to give way
        return self.work.stream.waiting or self.validation.waiting

    def request_signal_halt(self, which: Any) -> None:
        """A signal asks to halt."""
        self.requests.add_halt(HaltRequest(f"signal {which.name}", error=leave(which), signal=True))

    @property
    def outcome(self) -> Outcome:
        """How the attempt ends, as things stand."""
        error = self.requests.halt.error if self.requests.halt is not None else None
        asked = isinstance(error, SystemExit | KeyboardInterrupt)
        if self.tainted or (error is not None and not asked):
            return "stopped" if asked else "failed"
        return "done" if self.state is State.DONE else "stopped"

    def end_attempt(self, attempt: Attempt) -> None:
        """Write down how it ended; what was asked of it is asked no more."""
        outcome, halt = self.outcome, self.requests.halt
        self.left = halt
        self.requests.abandon_all_saves("the attempt has ended")
        self.requests.halt = None
        if self.state is State.HALTED:
            self.requests.stop = None
        attempt.close(outcome, self.ended, halt.error if halt is not None else None)

    def _record(self, arc: int) -> int | None:
        if self.attempt is not None:
            self.attempt.record(arc)
            return self.attempt.seq
        self.work.note = ""
        if ARCS[arc].trigger is Trigger.END_BATCH:
            self.work.close_batch()
        return None

    def _journal(self, arc: int) -> None:
        if self.expected is not None:
            self.work.settle()  # the loss is compared at once
        if isinstance(self.work, LateWork):
            self.work.write(arc, self._record)
        else:
            self._record(arc)
        if self.expected is not None and ARCS[arc].trigger is Trigger.FORWARD:
            work = self.work
            found = self.expected.meet(work.place.epoch, work.place.batch, self.snapshots.phase, work.loss)
            if found is not None:
                self.diverged(found)

    def report(self, message: str) -> None:
        """Keep a warning in the journal."""
        if (attempt := self.attempt or self.beside) is not None:
            attempt.warn(message)

    def restore(self) -> None:
        """Put back the checkpoint that was found: the work of `resume`."""
        assert self.found is not None
        divergence = recovery.restore(self.found, self.snapshots)
        self.found = None
        if divergence is not None:
            self.diverged(divergence)

    def _request_nonfinite_halt(self, error: NonFiniteError) -> None:
        if (halt := self.requests.halt) is not None:  # read late, it may find that somebody asked meanwhile
            self.requests.halt = replace(halt, save=False)
        self.requests.add_halt(HaltRequest(str(error), save=False, error=error))

    def journal_validation(self, arc: int, work: EvaluationWork) -> int | None:
        """Write down a transition of the validation under way; its number, where it has one."""
        if self.attempt is None:
            return None
        self.attempt.record_validation(arc, self._under_way(), work)
        return self.attempt.last_seq

    def begin_validation(self) -> Callable[[int], Callable[[], object]] | None:
        """A pass over a validation loader begins; what gives what writes an arc down, where that is to be hurried."""
        evaluation = self.validation.under_way
        if self.attempt is None or evaluation is None:
            return None
        writer = self.attempt.begin_validation(evaluation.name, evaluation.work)
        return None if isinstance(evaluation.work, LateWork) else writer

    def _under_way(self) -> str:
        return "" if self.validation.under_way is None else self.validation.under_way.name
