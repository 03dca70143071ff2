"""A search for hyper-parameters with Optuna, whose trials are killed with SIGKILL at random, and go on where they were.

Each trial trains on scikit-learn's digits in a process of its own. The search is done twice, once without kills: each
trial must have the same value, bit for bit, and so the two studies the same outcome; the exit status is 1 if anything
differs. The search itself may be killed too: run again, it goes on with the trial that it was at.
"""

import argparse
import contextlib
import multiprocessing
import random
import sys

import optuna
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import Checkpointing, MLflow, Trainer, seed_everything
from states import Trigger

SPACE = {
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
    "width": CategoricalDistribution([16, 64, 256]),
    "dropout": FloatDistribution(0.0, 0.7),
}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["optuna", "torch._dynamo", "orchestrator.trainer", "sklearn.datasets"]
)  # once for all


def train(name, params, options, parent):
    """A trial, from its beginning or from where it was killed: tells each epoch, and at last the best accuracy."""
    torch.set_num_threads(1)  # the fastest for networks this small
    seed_everything(7)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.as_tensor(images / 16).float(), torch.as_tensor(labels))
    train, val = TensorDataset(*data[:1200]), TensorDataset(*data[1200:])
    model = nn.Sequential(
        nn.Linear(64, params["width"]),
        nn.ReLU(),
        nn.Dropout(params["dropout"]),
        nn.Linear(params["width"], 10),
    )
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=params["lr"]),
        nn.CrossEntropyLoss(),
        DataLoader(train, batch_size=32, shuffle=True),
        DataLoader(val, batch_size=597),
        epochs=options.epochs,
        metrics={"accuracy": lambda outputs, targets: (outputs.argmax(1) == targets).float().mean()},
        checkpoint=Checkpointing(every_batches=10),
        log=None,
        track=MLflow(experiment_name=options.study, log_model=False) if options.track else None,
        config=params,
        name=name,
    )

    @trainer.after(Trigger.END_EPOCH)
    def tell():
        parent.send(trainer.epoch)

    history = trainer.fit(resume="auto").history
    parent.send(max(epoch["val/accuracy"] for epoch in history))


def run_trial(name, params, options, kills, chance):
    """The value of a trial, which is killed so many times before it comes to its end."""
    while True:
        receiver, sender = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=train, args=(name, params, options, sender))
        process.start()
        sender.close()  # so that the pipe ends with the process
        if kills:
            receiver.recv()  # an epoch has ended; somewhere in the next one:
            process.join(chance.uniform(0, 0.2))
            process.kill()
            process.join()
            kills -= 1
            continue
        value = None
        with contextlib.suppress(EOFError):
            while True:
                value = receiver.recv()  # the last thing that it tells
        process.join()
        if process.exitcode:
            raise SystemExit(f"{name} ended with exit status {process.exitcode}")
        return value


def search(name, options, chance=None):
    """Do what is left of the study: its trials. With `chance`, they are killed up to twice each."""
    study = optuna.create_study(
        storage=options.storage, study_name=name, direction="maximize", load_if_exists=True
    )
    while len(study.get_trials(states=[TrialState.COMPLETE])) < options.trials:
        # A sampler of its own for each trial: a search that is started again draws what it would have drawn.
        study.sampler = optuna.samplers.TPESampler(seed=len(study.trials), n_startup_trials=4)
        trial, *_ = study.get_trials(states=[TrialState.RUNNING]) or [study.ask(SPACE)]
        kills = chance.randint(0, 2) if chance else 0
        value = run_trial(f"{name}-{trial.number}", trial.params, options, kills, chance)
        study.tell(trial.number, value)
        params = ", ".join(f"{key} {param:.3g}" for key, param in trial.params.items())
        print(f"{name}-{trial.number:<2} {params:40} killed {kills} times  accuracy {value:.2%}", flush=True)
    return study


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=6, help="of each trial (default: 6)")
    parser.add_argument(
        "--study", default="search", help="its name, and MLflow's experiment (default: search)"
    )
    parser.add_argument(
        "--storage", default="sqlite:///optuna.db", help="of Optuna (default: sqlite:///optuna.db)"
    )
    parser.add_argument("--track", action="store_true", help="show the trials in MLflow")
    parser.add_argument("--seed", type=int, help="for the moments of the kills")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    killed = search(options.study, options, random.Random(options.seed))
    whole = search(f"{options.study}-undisturbed", options)
    outcomes = [[(trial.params, trial.value) for trial in study.trials] for study in (killed, whole)]
    print(f"best with kills: {killed.best_value:.2%}, {killed.best_params}")
    print(f"best without:    {whole.best_value:.2%}, {whole.best_params}")
    print("each trial has the same value" if outcomes[0] == outcomes[1] else "the studies are DIFFERENT")
    return outcomes[0] != outcomes[1]


if __name__ == "__main__":
    sys.exit(main())
