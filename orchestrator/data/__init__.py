"""The batches of a loader, addressed by (epoch, index), the same ones every time."""

from orchestrator.data.batches import Looks, count_samples, first_samples, to_device
from orchestrator.data.errors import DataError
from orchestrator.data.fingerprint import compare_fingerprints, likely_causes
from orchestrator.data.stream import BatchStream

__all__ = [
    "BatchStream",
    "DataError",
    "Looks",
    "compare_fingerprints",
    "count_samples",
    "first_samples",
    "likely_causes",
    "to_device",
]
