"""The one base class of every error that interlock raises on purpose."""

__all__ = ["InterlockError"]


class InterlockError(Exception):
    """Base of all errors raised by interlock.

    The message says what was found, what was expected, and what to do about it.
    """
