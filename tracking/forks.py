"""What a forked child (a data worker) must let go of: mapped rings, database connections, leases."""

import os
import weakref
from typing import Protocol

__all__ = ["ForkAware", "forget_in_children"]


class ForkAware(Protocol):
    """Something that belongs to the process that made it."""

    def forget(self) -> None:
        """Let go of it in a forked child, without a trace in the parent. Must not block nor raise."""


_known: "weakref.WeakSet[ForkAware]" = weakref.WeakSet()


def forget_in_children(thing: ForkAware) -> None:
    """From now on, every forked child calls `thing.forget()` before anything else runs in it.

    In a child's child it is called again. The thing is not kept alive.
    """
    _known.add(thing)


def _after_fork_in_child() -> None:
    for thing in list(_known):
        thing.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
