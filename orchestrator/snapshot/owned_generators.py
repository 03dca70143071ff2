"""Random generators that the model, the loss, callbacks and other code of the user's own; the data's are not here."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from orchestrator.data.generators import find_generators, get_state, set_state

__all__ = ["OwnedGenerators"]


class OwnedGenerators:
    """The generators that can be reached from some roots, by the path to each.

    Those that the data's objects own too are left out: they are seeded anew for each batch.
    """

    def __init__(self, data: Collection[object], outside: Collection[object]) -> None:
        self._data = data
        self._outside = outside
        self._found: dict[str, Any] = {}
        self._unseen: list[str] = []

    def find(self, roots: Mapping[str, object]) -> None:
        """Look from `roots`, at the beginning and, for those made meanwhile, at each save."""
        of_data = find_generators({f"data{i}": item for i, item in enumerate(self._data)})
        known = {id(generator) for generator in of_data.seedable.values()}
        walked = find_generators(roots, outside=self._outside)
        self._found = {p: g for p, g in walked.seedable.items() if id(g) not in known}
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
                warnings.warn(
                    f"the checkpoint has the state of a random generator {path}, which is not there: what it draws "
                    "will differ; make it before the training begins, in __init__ rather than in forward",
                    stacklevel=2,
                )
