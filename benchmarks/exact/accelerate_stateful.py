"""Accelerate with `use_stateful_dataloader=True`: `load_state` restores the loader's place, nothing is skipped by hand.

The data set has a `state_dict` too, as torchdata's tutorial shows. Else as in accelerate_loop.py.
"""

from accelerate_loop import main
from stateful_samples import StatefulSamples

if __name__ == "__main__":
    main(stateful=True, data=StatefulSamples)
