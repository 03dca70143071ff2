"""Accelerate: a loop written by hand with `save_state`, `load_state` and `skip_first_batches`.

After its checkpointing guide and its example by_feature/checkpointing.py: everything prepared, folders named by
step, `set_epoch` before each epoch. With the seedable sampler and its `data_seed`, and a generator of the loader's
own, as PyTorch's notes on reproducibility ask: without it, to begin the loader draws from the stream of dropout.
"""

import task
import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import set_seed
from torch import nn


def main(stateful: bool = False, data: type[task.Samples] = task.Samples) -> None:
    """Train to the end, from the last checkpoint if there is one; a stateful loader finds its place itself."""
    options = task.options()
    record = task.Record(options)
    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=task.SEED, use_stateful_dataloader=stateful
        ),
    )
    set_seed(task.SEED, deterministic=True)
    model = task.network()
    loader = task.loader(options, data=data, generator=torch.Generator().manual_seed(task.SEED))
    model, optimizer, scheduler, loader = accelerator.prepare(model, *task.optimization(model), loader)
    done = max((int(path.name.split("_")[1]) for path in options.folder.glob("step_*")), default=0)
    if done:
        accelerator.load_state(str(options.folder / f"step_{done}"))
    first, skip = divmod(done, task.BATCHES)
    for epoch in range(first, task.EPOCHS):
        model.train()
        loader.set_epoch(epoch)
        batches = loader
        if epoch == first and skip and not stateful:
            batches = skip_first_batches(loader, skip)
        for inputs, targets in batches:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            record.loss(done, loss)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            done += 1
            if done % task.CHECKPOINT_EVERY == 0:
                accelerator.save_state(str(options.folder / f"step_{done}"))
    record.weights(accelerator.unwrap_model(model))


if __name__ == "__main__":
    main()
