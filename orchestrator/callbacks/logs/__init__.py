"""Logging: what a training says while it runs, to the console, a file and functions."""

from orchestrator.callbacks.logs.callback import Logging
from orchestrator.callbacks.logs.record import LogRecord

__all__ = ["LogRecord", "Logging"]
