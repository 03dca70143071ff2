"""An artifact store that is a folder of this machine: files are linked into it, so that they take no space twice."""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["folder_of", "link"]


def folder_of(uri: str) -> Path | None:
    """The folder that an artifact URI means; None for a store elsewhere."""
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return Path(uri) if uri.startswith("/") else None


def link(file: Path, folder: Path) -> bool:
    """Give `file` a second name in `folder`, over what has that name there; False where that is impossible.

    It is one file under two names: what is linked must not be changed afterwards.
    """
    draft = folder / f".{file.name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        os.link(file, draft)
        try:
            draft.replace(folder / file.name)
        finally:
            draft.unlink(missing_ok=True)  # renaming one name of a file to another of its names does nothing
    except OSError:  # another file system, or one without links
        return False
    return True
