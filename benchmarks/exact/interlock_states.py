"""interlock again, with validation, and SIGKILL where the machine stands in a given state or amid a validation.

It strikes in the epoch of `--kill-at`, and in that batch where the state is one of a batch. The transition into the
state is complete and recorded; the next has not begun.
"""

import task
from interlock_trainer import training
from torch.utils.data import DataLoader

from orchestrator import Trainer
from states import State, Trigger

VALIDATION = "validation"
OF_AN_EPOCH = {State.EPOCH_START, State.EPOCH_END}


def kill_in(trainer: Trainer, state: State, epoch: int, batch: int) -> None:
    def strike() -> None:
        if (
            trainer.state is state
            and trainer.epoch == epoch
            and (state in OF_AN_EPOCH or trainer.batch == batch)
        ):
            task.die()

    for trigger in Trigger:
        trainer.before(trigger)(strike)


class DyingAccuracy:
    """The share of right answers; dies at the second batch of the validation of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.batches = 0
        self.trainer: Trainer | None = None

    def __call__(self, outputs, targets):
        if self.trainer.validating and self.trainer.epoch == self.epoch:
            self.batches += 1
            if self.batches == 2:
                task.die()
        return (outputs.argmax(1) == targets).float().mean()


def main() -> None:
    parser = task.arguments()
    parser.add_argument("--kill-in", choices=[*(state.value for state in State), VALIDATION])
    given = parser.parse_args()
    struck, given.kill_at = given.kill_at, None
    options = task.options(given)
    record = task.Record(options)
    epoch, batch = divmod(struck, task.BATCHES) if struck is not None else (-1, -1)
    accuracy = DyingAccuracy(epoch if given.kill_in == VALIDATION else -1)
    held_out = DataLoader(task.Samples(options.augment, 4 * task.BATCH_SIZE), batch_size=task.BATCH_SIZE)
    trainer = training(options, record, val_loader=held_out, metrics={"accuracy": accuracy})
    accuracy.trainer = trainer
    if given.kill_in in State.__members__:
        kill_in(trainer, State[given.kill_in], epoch, batch)
    trainer.fit(resume="auto")
    record.weights(trainer.model)


if __name__ == "__main__":
    main()
