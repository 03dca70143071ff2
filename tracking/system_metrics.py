"""What the machine and the trainer's process are doing: values for `system/*`, by the names that MLflow gives them."""

import contextlib
import math
import socket
import time
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from tracking.delivery import Point
from tracking.journal import Attempt, Journal

__all__ = ["System", "SystemSampler"]

_EVERY_S = 10.0
_MEGA = 1e6


class System:
    """Looks at the machine, at one process on it (0: none), and at its NVIDIA devices if `pynvml` is installed."""

    def __init__(self, pid: int):
        import psutil

        self._psutil: Any = psutil
        self._process: Any = None
        with contextlib.suppress(psutil.Error, ValueError):
            self._process = psutil.Process(pid) if pid else None
        self._network = psutil.net_io_counters()
        self._devices = list(_devices())
        psutil.cpu_percent()  # the first answer is about nothing
        with contextlib.suppress(psutil.Error):
            self._process and self._process.cpu_percent()

    def sample(self) -> dict[str, float]:
        """What is to be seen now; of network and processor since the last look. Percent and megabytes."""
        memory, disk = self._psutil.virtual_memory(), self._psutil.disk_usage("/")
        found = {
            "cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGA,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_megabytes": disk.used / _MEGA,
            "disk_usage_percentage": disk.percent,
        }
        before, self._network = self._network, self._psutil.net_io_counters()
        if before is not None and self._network is not None:
            found["network_receive_megabytes"] = (self._network.bytes_recv - before.bytes_recv) / _MEGA
            found["network_transmit_megabytes"] = (self._network.bytes_sent - before.bytes_sent) / _MEGA
        with contextlib.suppress(self._psutil.Error):  # the training has just ended
            if self._process is not None:
                found["process_cpu_percentage"] = self._process.cpu_percent()
                found["process_memory_megabytes"] = self._process.memory_info().rss / _MEGA
        for number, (library, device) in enumerate(self._devices):
            with contextlib.suppress(library.NVMLError):
                used = library.nvmlDeviceGetMemoryInfo(device)
                rates = library.nvmlDeviceGetUtilizationRates(device)
                found[f"gpu_{number}_utilization_percentage"] = rates.gpu
                found[f"gpu_{number}_memory_usage_megabytes"] = used.used / _MEGA
                found[f"gpu_{number}_memory_usage_percentage"] = used.used / used.total * 100
        return {key: float(value) for key, value in found.items()}


def _devices() -> Iterator[tuple[Any, Any]]:
    try:
        pynvml: Any = import_module("pynvml")
        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            yield pynvml, pynvml.nvmlDeviceGetHandleByIndex(number)
    except Exception:  # no library, no driver, no device: NVML has an error class of its own for each
        return


class SystemSampler:
    """Takes a sample of what the machine is doing now and then while the run trains, first after ten seconds of it.

    It is in no journal: none is taken while the server is away.
    """

    def __init__(self, journal: Journal, *, wanted: bool):
        self._wanted = wanted
        self._began = journal.run_info().created_ns
        self._attempt = 0
        self._system: System | None = None
        self._next = math.inf

    def due(self, attempt: Attempt) -> list[Point]:
        """A sample, if it is time for one."""
        if not self._wanted or attempt.outcome is not None:
            return []
        now = time.monotonic()
        if attempt.attempt != self._attempt:  # what is counted since the last look, is from here on
            here = attempt.host == socket.gethostname()
            self._attempt, self._system = attempt.attempt, System(attempt.pid if here else 0)
            self._next = now + _EVERY_S
        if self._system is None or now < self._next:
            return []
        self._next = now + _EVERY_S
        now_ns = time.time_ns()
        step = max(0, now_ns - self._began) // 1_000_000_000  # seconds, which no later attempt repeats
        values = self._system.sample()
        return [Point(f"system/{key}", step, now_ns // 1_000_000, value) for key, value in values.items()]
