"""Hugging Face Trainer: `save_steps`, and `train(resume_from_checkpoint=...)` with `ignore_data_skip=False`.

With `full_determinism=True`, and the seedable sampler that is its default.
"""

from typing import Any

import task
import torch
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint


class Classifier(nn.Module):
    """Takes named inputs and returns its loss, as a Trainer's model does."""

    def __init__(self) -> None:
        super().__init__()
        self.network = task.network()

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.network(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class RecordingTrainer(Trainer):
    """Writes each loss down."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        record.loss(self.state.global_step, loss)
        return loss


def collate(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    inputs, labels = zip(*samples, strict=True)
    return {"inputs": torch.stack(inputs), "labels": torch.stack(labels)}


options = task.options()
record = task.Record(options)
set_seed(task.SEED)
model = Classifier()
trainer = RecordingTrainer(
    model,
    TrainingArguments(
        output_dir=str(options.folder),
        num_train_epochs=task.EPOCHS,
        per_device_train_batch_size=task.BATCH_SIZE,
        dataloader_num_workers=options.workers,
        save_strategy="steps",
        save_steps=task.CHECKPOINT_EVERY,
        seed=task.SEED,
        data_seed=task.SEED,
        full_determinism=True,
        ignore_data_skip=False,
        max_grad_norm=0.0,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    ),
    data_collator=collate,
    train_dataset=task.Samples(options.augment),
    optimizers=task.optimization(model),
)
trainer.train(resume_from_checkpoint=get_last_checkpoint(str(options.folder)))
record.weights(model.network)
