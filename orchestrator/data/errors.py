"""What is raised when data cannot be addressed as (epoch, index)."""

from states.errors import InterlockError

__all__ = ["DataError"]


class DataError(InterlockError):
    """A loader, a sampler or a saved position of one that cannot be used as it is."""
