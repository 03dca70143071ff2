"""Checkpoints of older formats made into the newest one: a pure function for each step from a format to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["MIGRATIONS", "migrate", "with_what_was_not_kept"]

Tree = dict[str, Any]
Migration = Callable[[Tree, Tree | None], tuple[Tree, Tree | None]]


def _to_2(manifest: Tree, tree: Tree | None) -> tuple[Tree, Tree | None]:
    """Format 2 keeps more of a training; of what an older checkpoint has not kept, there is none in it.

    - `forward`: in a checkpoint of FORWARD, what a forward pass changes as it was before it; None in any other.
    - `attributes` of the modules in `model` and `loss` that are plain values, and in `built` what the script
      made them; `generators` that the script's objects own.
    - `place` of the training's and of each validation's data, for data sets that have a state of their own.
    - `attributes` of the averaged module of each EMA.
    """
    if tree is not None:
        averages = {f"callbacks/{name}": _NO_ATTRIBUTES for name in _averages_of_1(tree)}
        for path, entries in {**_ADDED_IN_2, **averages}.items():
            tree = _with_entries(tree, path, entries)
    return manifest, tree


def _averages_of_1(tree: Tree) -> list[str]:
    """The names of the callbacks whose state is that of an EMA in format 1."""
    states = tree.get("callbacks", {}).items()
    return [
        name for name, state in states if {"updates", "n_averaged", "parameters", "buffers"} == state.keys()
    ]


_NO_ATTRIBUTES: Tree = {"attributes": {"values": {}, "shared": {}, "marks": {}}}
_ADDED_IN_2: Mapping[str, Tree] = {
    "": {"forward": None, "built": {}, "generators": {}},
    "model": _NO_ATTRIBUTES,
    "loss": _NO_ATTRIBUTES,
    "data": {"place": {}},
    "validation_data/*": {"place": {}},
}


def _with_entries(tree: Tree, path: str, entries: Tree) -> Tree:
    """`tree` with the `entries` that the part at `path` lacks ("*": every part there), unless that is None."""
    if not path:
        return {**entries, **tree}
    first, _, rest = path.partition("/")
    parts = [*tree] if first == "*" else [first]
    return tree | {
        part: _with_entries(tree[part], rest, entries) for part in parts if tree.get(part) is not None
    }


def _to_3(manifest: Tree, tree: Tree | None) -> tuple[Tree, Tree | None]:
    """Format 3 has a second digest of each chunk in the manifest, `xxh3_128`; without it the first one is compared."""
    return manifest, tree


MIGRATIONS: Mapping[int, Migration] = {1: _to_2, 2: _to_3}
"""For each format but the newest, what makes (manifest, tree) of it into those of the next."""

_NOT_KEPT: Mapping[int, Mapping[str, Tree]] = {
    1: {**{part: _ADDED_IN_2[part] for part in ("model", "loss", "data")}, "callbacks/*": _NO_ATTRIBUTES},
    2: {},
}


def migrate(manifest: Tree, tree: Tree | None) -> tuple[Tree, Tree | None]:
    """Manifest and tree as in the newest format, from any that this interlock reads; nothing given is changed.

    The manifest's `format_version` stays: it says how the files are written. With None for the tree, the manifest
    alone. Raises KeyError for a format that there is no way from.
    """
    for version in range(manifest["format_version"], max(MIGRATIONS) + 1):
        manifest, tree = MIGRATIONS[version](manifest, tree)
    return manifest, tree


def with_what_was_not_kept(tree: Tree, live: Mapping[str, Any], version: int) -> Tree:
    """`tree`, whose files have format `version`, with the live values of what that format did not keep.

    What a migration adds says that there is none; a trainer may well have some, which then stays as it is.
    """
    for older in range(version, max(MIGRATIONS) + 1):
        for path, entries in _NOT_KEPT[older].items():
            tree = _with_live(tree, live, path, entries)
    return tree


def _with_live(tree: Tree, live: Mapping[str, Any], path: str, entries: Tree) -> Tree:
    """`tree` with the part at `path` as in `live` where it has the `entries` that a migration adds, those of none."""
    if not path:
        added = [key for key, none in entries.items() if key in tree and tree[key] == none]
        found = {key: live[key] for key in added if key in live}
        return {**{key: value for key, value in tree.items() if key not in added}, **found}
    first, _, rest = path.partition("/")
    parts = [part for part in (tree if first == "*" else [first]) if part in tree and part in live]
    return tree | {
        part: _with_live(tree[part], live[part], rest, entries)
        for part in parts
        if tree[part] is not None and live[part] is not None
    }
