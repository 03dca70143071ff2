"""Random generators that the model, the loss, callbacks and other code of the user's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from orchestrator.data.generators import find_generators, get_state, set_state
from orchestrator.warning import warn

__all__ = ["OwnedGenerators"]


class OwnedGenerators:
    """The generators that can be reached from some roots, by the path to each.

    Those that the data's objects own too are among them: a batch is made on streams of its own, after which they are
    put back, so that their states are the training's.
    """

    def __init__(self, outside: Collection[object]) -> None:
        self._outside = outside
        self._found: dict[str, Any] = {}
        self._unseen: list[str] = []

    def find(self, roots: Mapping[str, object]) -> None:
        """Look from `roots`, at the beginning and, for those made meanwhile, at each save."""
        walked = find_generators(roots, outside=self._outside)
        self._found = walked.seedable
        self._unseen = [] if walked.complete else ["what lies deeper than 20,000 objects"]
        self._unseen += [f"{path} ({type(g).__name__})" for path, g in walked.unseedable.items()]

    @property
    def unseen(self) -> list[str]:
        """Names of generators whose state cannot be read and set."""
        return self._unseen

    def capture(self) -> dict[str, Any]:
        """The state of each by its path."""
        return {path: get_state(generator) for path, generator in self._found.items()}

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Set each to its state in `tree`; one that is not there is warned of."""
        for path, state in tree.items():
            if path in self._found:
                set_state(self._found[path], state)
            else:
                warn(
                    f"the checkpoint has the state of a random generator {path}, which is not there: what it draws "
                    "will differ; make it before the training begins, in __init__ rather than in forward"
                )
