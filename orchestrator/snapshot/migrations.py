"""Checkpoints of older formats made into the newest one: a pure function for each step from a format to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["MIGRATIONS", "migrate", "with_what_was_not_kept"]

Tree = dict[str, Any]
Migration = Callable[[Tree, Tree | None], tuple[Tree, Tree | None]]


def _to_2(manifest: Tree, tree: Tree | None) -> tuple[Tree, Tree | None]:
    """Format 2 keeps more of a training; what an older checkpoint has none of was not kept, and was not there.

    - `forward`: what forward changes as it was before it, in a checkpoint of FORWARD; None in any other.
    - `model` and `loss`: `attributes` of modules that are plain values, and `generators` that they own.
    """
    return manifest, None if tree is None else _with_defaults(tree, _ADDED_IN_2)


_OF_A_MODULE: Tree = {"attributes": {}, "generators": {}}
_ADDED_IN_2: Mapping[str, Tree] = {"": {"forward": None}, "model": _OF_A_MODULE, "loss": _OF_A_MODULE}


def _with_defaults(tree: Tree, defaults: Mapping[str, Tree]) -> Tree:
    """`tree` with what it lacks: at its top for the key "", else in its entry of that key, unless that is None."""
    filled = {**defaults.get("", {}), **tree}
    for part, added in defaults.items():
        if filled.get(part) is not None:
            filled[part] = {**added, **filled[part]}
    return filled


MIGRATIONS: Mapping[int, Migration] = {1: _to_2}
"""For each format but the newest, what makes (manifest, tree) of it into those of the next."""

_NOT_KEPT: Mapping[int, Mapping[str, Tree]] = {1: {"model": _OF_A_MODULE, "loss": _OF_A_MODULE}}


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
        for part, entries in _NOT_KEPT[older].items():
            if tree[part] is not None and live[part] is not None:
                rest = {key: value for key, value in tree[part].items() if key not in entries}
                found = {key: live[part][key] for key in entries if key in live[part]}
                tree = {**tree, part: {**rest, **found}}
    return tree
