"""A training on digits that halts on a NaN, and is gone back in to see which module made it, and where."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import NonFiniteError, Trainer, seed_everything
from states import State


class LogProbabilities(nn.Module):
    def forward(self, scores):
        return torch.log(torch.softmax(scores, dim=1))  # log_softmax would not round a probability to 0


torch.set_num_threads(1)
seed_everything(7)
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.as_tensor(images).float(), torch.as_tensor(labels))
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10), LogProbabilities())
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
loader = DataLoader(data, batch_size=32, shuffle=True)
trainer = Trainer(model, optimizer, nn.NLLLoss(), loader, epochs=20, log=None, track=None, name="debug-nan")

try:
    trainer.fit()
except NonFiniteError as error:
    print(f"halted: {error.found}")
    past = trainer.seek(error.epoch, error.batch, State.FORWARD)
    print(
        f"back at {past.moment}, {past.replayed} batches done again, the same as before: {not trainer.divergence}"
    )
    scores = model[:3](trainer.data[0])
    print(f"scores go from {scores.min():.0f} to {scores.max():.0f}")
    print(f"blamed: {trainer.blame()}")
else:
    raise SystemExit("expected a NaN on the way; on this machine there was none")
