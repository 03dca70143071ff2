"""Lightning as in lightning_stateful.py, and what its checkpoints lack put in by hand: the random states.

A callback's `state_dict` is the documented place for state of one's own; that the states are to be put back only when
the first batch has been fetched is not documented, but needed.
"""

from typing import Any

import lightning
from lightning_trainer import main
from stateful_samples import StatefulSamples, random_states, set_random_states
from torchdata.stateful_dataloader import StatefulDataLoader


class RandomStates(lightning.Callback):
    """Saves the random states of the main process, and puts them back before the first batch after a resume."""

    def __init__(self) -> None:
        self.restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return random_states()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict

    def on_train_batch_start(self, *_: Any) -> None:
        if self.restored is not None:
            set_random_states(self.restored)
            self.restored = None


if __name__ == "__main__":
    main(StatefulDataLoader, StatefulSamples, [RandomStates()])
