"""MLflow's tracking URIs: the same place whatever the working directory, and what is wrong with one that is none."""

import difflib
import re
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from tracking.masking import MASK, mask_text

__all__ = ["EXAMPLES", "SQL", "absolute", "wrong_with"]

SQL = ("sqlite", "postgresql", "mysql", "mssql")
"""The databases that can be a store themselves."""

EXAMPLES = "one such as 'http://host:5000', 'sqlite:///mlflow.db' or the path of a folder"

_SCHEMES = ("http", "https", *SQL, "file", "databricks", "databricks-uc", "uc")
_HERE = ("", "localhost")


def absolute(uri: str | Path) -> str:
    """The same place, whatever the working directory."""
    if isinstance(uri, Path) or uri == "" or uri.startswith((".", "/", "~")):
        return Path(uri or "mlruns").expanduser().absolute().as_uri()
    if uri.startswith("sqlite:///"):
        path, mark, options = uri.removeprefix("sqlite:///").partition("?")
        return f"sqlite:///{Path(path).absolute()}{mark}{options}" if path not in ("", ":memory:") else uri
    if uri.startswith("file:") and not uri.startswith("file:/"):
        return Path(uri.removeprefix("file:")).absolute().as_uri()
    if ":" not in uri and not uri.startswith(("databricks", "uc")):
        return Path(uri).absolute().as_uri()
    return uri


def wrong_with(uri: str) -> str:
    """Why `uri` can never be a place to deliver to, with what to write instead; '' where it may be one.

    Nothing is reached for: a server that is away is no reason, nor is a driver that is not installed.
    """
    wrong = _wrong(uri)
    if not wrong:
        return ""
    shown = re.sub(r"//[^/@]*@", f"//{MASK}@", mask_text(uri))  # a password is one in a malformed URI, too
    return f"tracking URI {shown!r}: {wrong}; expected {EXAMPLES}"


def _wrong(uri: str) -> str:
    if uri != uri.strip():
        return "it begins or ends with white space"
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError as error:
        return str(error)
    scheme = parts.scheme
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", uri):
        return f"a host and a port without the http:// before them, 'http://{uri}'"
    if not scheme:
        return _wrong_path(uri)
    kind = scheme.partition("+")[0]
    if kind not in (SQL if "+" in scheme else _SCHEMES) and scheme not in _plugins():
        near = difflib.get_close_matches(scheme, _SCHEMES, n=1)
        hint = f" (is {near[0]!r} meant?)" if near else ""
        return f"{scheme!r} is none of the schemes {', '.join(_SCHEMES)}{hint}"
    if kind in SQL:
        return _wrong_database(uri, kind, parts.netloc)
    if kind in ("http", "https") and not parts.hostname:
        return "it names no host"
    if kind == "file" and parts.netloc not in _HERE:
        return "two slashes make a host of what follows, and a path has three: 'file:///absolute/path'"
    return ""


def _wrong_path(uri: str) -> str:
    """Of what has no scheme, and is taken for a folder's path."""
    if uri.startswith((".", "/", "~")):
        return ""
    if "://" in uri:
        return "there is no scheme before its ://"
    known = "|".join(_SCHEMES)
    if re.match(rf"({known})(\+\w+)?//", uri):
        return "there is no colon before its //"
    return ""


def _wrong_database(uri: str, kind: str, host: str) -> str:
    if uri.rstrip("/") == "sqlite:" or ":memory:" in uri:
        return "a database in memory is gone with the process that delivers"
    if "://" not in uri:
        slashes = ":///" if kind == "sqlite" else "://"
        return f"after {uri.partition(':')[0]!r} comes {slashes!r}"
    if kind == "sqlite" and host:
        return "two slashes make a host of what follows, and a file has three: 'sqlite:///mlflow.db'"
    return ""


def _plugins() -> set[str]:
    """Schemes that packages installed here have given to MLflow."""
    return {found.name for found in metadata.entry_points(group="mlflow.tracking_store")}
