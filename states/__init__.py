"""What may happen: states, triggers, the table of transitions, and the machine that runs it."""

from states.compiled import CompiledMachine
from states.errors import InterlockError
from states.table import State, Trigger

__all__ = ["CompiledMachine", "InterlockError", "State", "Trigger"]
