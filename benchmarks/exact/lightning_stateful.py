"""Lightning with torchdata's StatefulDataLoader, whose `state_dict` it puts into its checkpoints.

The data set has a `state_dict` too, as torchdata's tutorial shows. Else as in lightning_trainer.py.
"""

from lightning_trainer import main
from stateful_samples import StatefulSamples
from torchdata.stateful_dataloader import StatefulDataLoader

if __name__ == "__main__":
    main(StatefulDataLoader, StatefulSamples)
