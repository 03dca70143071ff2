"""What tracking costs a training whose server is up, down, or never answers; and how fast points are delivered."""

import argparse
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

# What the tests have for it: a real server, and trainings that are only recorded.
sys.path[0] = str(Path(__file__).parent.parent / "tests")

import torch
from torch import nn

import deliveries
from deliveries import Training
from mlflow_server import MLflowServer
from orchestrator import MLflow, Tracker, Trainer, seed_everything
from tracking.journal import Journal
from tracking.outbox import read_outbox
from tracking.runs import RunFolder, create_run, lease_holder
from tracking.shipper import start_shipper, status, sync


def train(root: Path, track: Tracker | None) -> float:
    """Seconds of `fit`: an MLP 256-512-512-10 with Adam, batches of 32 that are there already."""
    seed_everything(1)
    layers = (nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    model = nn.Sequential(*layers)
    batches = [(torch.randn(32, 256), torch.randint(10, (32,))) for _ in range(100)]
    trainer = Trainer(
        model,
        torch.optim.Adam(model.parameters()),
        nn.CrossEntropyLoss(),
        batches,
        max_batches=options.batches,
        log=None,
        track=track,
        root=root,
    )
    start = time.perf_counter()
    result = trainer.fit()
    seconds = time.perf_counter() - start
    leave(RunFolder(result.run), wait=isinstance(track, MLflow) and track.experiment_name == "up")
    return seconds


def leave(run: RunFolder, wait: bool) -> None:
    """See the shipper off, so that it does not work during the next training."""
    while (holder := lease_holder(run.outbox_lease)) is not None:
        if not wait:
            with suppress(ProcessLookupError):
                os.kill(holder.pid, signal.SIGKILL)
        time.sleep(0.1)


def blocked() -> str:
    """A server that takes connections and never says a word; its URI."""
    listener = socket.create_server(("127.0.0.1", 0))
    held = []

    def accept() -> None:
        while True:
            held.append(listener.accept())

    threading.Thread(target=accept, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def compare(folder: Path, server: MLflowServer) -> None:
    ways = {
        "track=None": None,
        "server up": MLflow(server.uri, "up"),
        "server down": MLflow("http://127.0.0.1:1", "down"),
        "server never answers": MLflow(blocked(), "blocked"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        names = list(ways)[number % 4 :] + list(ways)[: number % 4]
        for name in names:
            took = train(folder / "runs", ways[name])
            if number:  # the first round warms up
                seconds[name].append(took)
    plain = statistics.median(seconds["track=None"])
    print(
        f"{options.batches} batches, {options.rounds} rounds, alternating: seconds of fit (least to most), ratio"
    )
    for name, found in seconds.items():
        middle = statistics.median(found)
        print(f"{name:22} {middle:7.2f} ({min(found):.2f} to {max(found):.2f})  {middle / plain:.3f}")


def deliver(folder: Path, server: MLflowServer) -> None:
    """How many points a second go to a server with SQLite, when all of them wait."""
    run = create_run(folder, "waiting")
    training = Training(run)
    for _ in range(options.points // 2):
        training.batch()
    training.end()
    target = {"tracker": MLflow(server.uri, "points", upload="none")}
    thread = threading.Thread(target=sync, args=(run,), kwargs=target)
    thread.start()
    seen: list[tuple[float, int]] = []
    while thread.is_alive():
        points = read_outbox(run.outbox).points
        if points and (not seen or points != seen[-1][1]):
            seen.append((time.perf_counter(), points))
        time.sleep(0.05)
    seconds, points = (late - early for late, early in zip(seen[-1], seen[0], strict=True))
    print(
        f"{points / seconds:.0f} points a second are delivered to a server with SQLite, {seen[-1][1]} in all"
    )


def flood(folder: Path, server: MLflowServer) -> None:
    """A training of 5,000 batches a second, five epochs of them, and whether the shipper keeps up with it."""
    deliveries.BATCHES = 1000  # values of epochs are not thinned
    run = create_run(folder, "fast")
    training = Training(run)
    start_shipper(run, MLflow(server.uri, "fast", upload="none"))
    start = last = time.perf_counter()
    while (now := time.perf_counter()) - start < options.flood:
        if training.done < (now - start) * 5000:
            training.batch()
        if now - last > 10:
            last = now
            found = status(run)
            with Journal.open(run) as journal:
                newest = journal.newest_metrics() * 2
            waiting, points = found.points_waiting, found.points_delivered
            print(f"{now - start:5.0f} s: {newest:8} values, {waiting:8} wait, {points} points", flush=True)
    rate = training.done / options.flood
    training.end()
    start = time.perf_counter()
    leave(run, wait=True)
    points = read_outbox(run.outbox).points
    print(
        f"{rate:.0f} batches a second for {options.flood} s, {training.done * 2} values: {points} points, "
        f"the last {time.perf_counter() - start:.0f} s after the end"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--flood", type=int, default=120, help="seconds")
    parser.add_argument("--only", choices=["compare", "deliver", "flood"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, MLflowServer(Path(name)) as server:
        for part in (compare, deliver, flood):
            if options.only in (None, part.__name__):
                part(Path(name), server)
