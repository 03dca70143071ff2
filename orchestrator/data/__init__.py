"""The batches of a loader, addressed by (epoch, index), the same ones every time."""

from orchestrator.data.batches import Looks, first_samples, received, to_device
from orchestrator.data.errors import DataError
from orchestrator.data.fingerprint import compare_fingerprints, likely_causes
from orchestrator.data.stream import BatchStream

__all__ = [
    "BatchStream",
    "DataError",
    "Looks",
    "compare_fingerprints",
    "first_samples",
    "likely_causes",
    "received",
    "to_device",
]
