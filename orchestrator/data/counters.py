"""Plain values that samplers and data sets keep count with, by themselves: read, and put back."""

from typing import Any

__all__ = ["Counters", "chain", "is_plain"]

_DEPTH = 8
_PLAIN = (bool, int, float, str)


def is_plain(value: object) -> bool:
    """Whether `value` is of a kind that is kept as a counter."""
    return value is None or type(value) in _PLAIN


class Counters:
    """The attributes of some objects that are plain values: None, bool, int, float, str.

    Those that are what they were when this was made are not recorded: a script makes them again.
    """

    def __init__(self, owners: dict[str, Any]) -> None:
        self._owners = {path: owner for path, owner in owners.items() if hasattr(owner, "__dict__")}
        self._initial = self._now()
        self._names = {f"{path}.{name}" for path, owner in self._owners.items() for name in vars(owner)}

    def changed(self) -> dict[str, Any]:
        """What has changed, by the path to it."""
        return {
            path: value
            for path, value in self._now().items()
            if path not in self._initial or self._initial[path] != value
        }

    def restore(self, changed: dict[str, Any]) -> None:
        """Put everything to what it was when `changed` returned this; counters made since are taken away."""
        for path in self._now().keys() - self._names - changed.keys():
            owner, _, name = path.rpartition(".")
            del vars(self._owners[owner])[name]
        for path, value in {**self._initial, **changed}.items():
            owner, _, name = path.rpartition(".")
            if owner in self._owners:
                vars(self._owners[owner])[name] = value

    def _now(self) -> dict[str, Any]:
        return {
            f"{path}.{name}": value
            for path, owner in self._owners.items()
            for name, value in vars(owner).items()
            if is_plain(value)
        }


def chain(item: Any, attribute: str) -> dict[str, Any]:
    """`item` and those it wraps, by path, as far as each keeps the next one as `attribute`."""
    found: dict[str, Any] = {}
    path = attribute
    while item is not None and len(found) < _DEPTH:
        found[path] = item
        path, item = f"{path}.{attribute}", getattr(item, attribute, None)
    return found
