"""Secrets, hidden from what leaves the machine: pure functions over texts, command lines and settings."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

__all__ = ["MASK", "is_secret", "mask_argv", "mask_setting", "mask_text", "mask_tree", "secrets_in"]

MASK = "***"
"""What stands in a secret's place."""

_SECRET_WORDS = {
    *(
        "password",
        "passwd",
        "passwort",
        "pwd",
        "passphrase",
        "secret",
        "secrets",
        "credential",
        "credentials",
    ),
    *(
        "apikey",
        "accesskey",
        "secretkey",
        "privatekey",
        "authtoken",
        "accesstoken",
        "bearer",
        "authorization",
    ),
    *("signature",),
}
_SECRET_PAIRS = {
    (kind, "key")
    for kind in (
        "api",
        "access",
        "secret",
        "private",
        "account",
        "encryption",
        "signing",
        "storage",
        "license",
    )
}
_SECRET_ALONE = {"sig", "token", "auth"}
# Tokens of a language, not of a door.
_NOT_OF_A_DOOR = {
    *(
        "pad",
        "bos",
        "eos",
        "cls",
        "sep",
        "unk",
        "mask",
        "special",
        "start",
        "end",
        "stop",
        "begin",
        "image",
        "next",
    ),
    *(
        "per",
        "each",
        "first",
        "last",
        "new",
        "audio",
        "video",
        "prompt",
        "class",
        "register",
        "by",
        "decoder",
    ),
    *("separator", "padding", "unknown", "blank", "oov", "distillation", "dist", "added", "extra"),
}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_NAMES_A_FOLDER = re.compile(r"^(OLD)?PWD$|(_|^)(FILE|PATH|DIR|HOME|CREDENTIALS)$")
_SHORTEST_KNOWN = 6  # characters of a secret that is looked for wherever it may stand


def is_secret(key: str) -> bool:
    """Does a setting of this name hold a secret? 'hf_token', 'apiKey', '--password': yes; 'max_tokens': no."""
    words = [word.lower() for word in _WORD.findall(key)]
    if not words:
        return False
    if _SECRET_WORDS.intersection(words) or _SECRET_PAIRS.intersection(pairwise(words)):
        return True
    if words[-1] == "token" and len(words) > 1:
        return words[-2] not in _NOT_OF_A_DOOR
    return len(words) == 1 and words[0] in _SECRET_ALONE


def mask_setting(key: str, value: Any, known: Iterable[str] = ()) -> Any:
    """`value`, with all its texts hidden if `key` says that it is a secret; else as `mask_tree` has it."""
    return _hidden(value) if is_secret(key) else mask_tree(value, known)


def _hidden(value: Any) -> Any:
    """Numbers, booleans and None are no secrets."""
    if isinstance(value, str):
        return MASK if value else value
    if isinstance(value, Mapping):
        return {str(name): _hidden(inner) for name, inner in value.items()}
    return [_hidden(item) for item in value] if isinstance(value, list | tuple) else value


def mask_tree(value: Any, known: Iterable[str] = ()) -> Any:
    """What JSON holds, with the secrets in it hidden; a list of words is taken for a command line."""
    if isinstance(value, str):
        return mask_text(value, known)
    if isinstance(value, Mapping):
        return {str(name): mask_setting(str(name), inner, known) for name, inner in value.items()}
    if not isinstance(value, list | tuple):
        return value
    if value and all(isinstance(word, str) for word in value):
        return mask_argv(value, known)
    return [mask_tree(item, known) for item in value]


def mask_argv(words: Sequence[str], known: Iterable[str] = ()) -> list[str]:
    """A command line with its secrets hidden: `--token x`, `--token=x`, `TOKEN=x`, and what `mask_text` finds."""
    masked: list[str] = []
    hidden = False
    for word in words:
        option, equals, value = word.partition("=")
        if hidden and not word.startswith("-"):
            masked.append(MASK)
        elif equals and value and _NAME.fullmatch(option) and is_secret(option):
            masked.append(f"{option}={MASK}")
        else:
            masked.append(mask_text(word, known))
        hidden = word.startswith("-") and not equals and is_secret(word)
    return masked


def mask_text(text: str, known: Iterable[str] = ()) -> str:
    """`text` with hidden secrets: those `known`, passwords in URLs, `password=...`, tokens by their shapes.

    Masking twice is masking once.
    """
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, MASK)
    for pattern in _SHAPES:
        text = pattern.sub(MASK, text)
    text = _IN_URL.sub(rf"\1:{MASK}@", text)
    text = _SCHEME.sub(rf"\1 {MASK}", text)
    text = _OPTION.sub(_of_option, text)
    return _without_assigned(text)


def secrets_in(environment: Mapping[str, str]) -> frozenset[str]:
    """The values of an environment's variables that are secrets, by their names; short ones would hide words."""
    return frozenset(
        value
        for key, value in environment.items()
        if len(value) >= _SHORTEST_KNOWN and not value.isdigit()
        if is_secret(key) and not _NAMES_A_FOLDER.search(key)
    )


_NAME = re.compile(r"-{0,2}[A-Za-z_][\w.\-]*")
_IN_URL = re.compile(r"(?<=://)([^/@:\s\"']*):[^/\s\"']*@")
_SCHEME = re.compile(r"\b(Bearer|Basic)\s+(?=[\w+/.~=\-]*\d)[\w+/.~=\-]{8,}")
_OPTION = re.compile(r"(?<![\w-])(--?[A-Za-z][\w.\-]*)(\s+)([^\s\-\"'][^\s\"']*)")
_ASSIGNED = re.compile(r"([A-Za-z_][\w.\-]*)([\"']?\s*[=:]\s*)")
_VALUE = re.compile(r"\"[^\"]+\"|'[^']+'|[^\s\"'&,;)}\]]+")
_SHAPES = tuple(
    re.compile(shape, re.DOTALL)
    for shape in (
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
        r"\bgh[pousr]_[A-Za-z0-9]{20,}",
        r"\bgithub_pat_\w{20,}",
        r"\bglpat-[\w\-]{16,}",
        r"\bhf_[A-Za-z0-9]{20,}",
        r"\bsk-[A-Za-z0-9_\-]{20,}",
        r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
        r"\bAIza[\w\-]{30,}",
        r"\bxox[abeprs]-[\w\-]{10,}",
        r"\bdapi[0-9a-f]{30,}",
        r"\bnpm_[A-Za-z0-9]{30,}",
        r"\bpypi-[\w\-]{30,}",
        r"\beyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*",
    )
)


def _of_option(found: re.Match[str]) -> str:
    option, space, value = found.groups()
    return f"{option}{space}{MASK}" if is_secret(option) else f"{option}{space}{value}"


def _without_assigned(text: str) -> str:
    """`text` with the values masked that follow a secret's name and = or a colon."""
    parts, end = [], 0
    for found in _ASSIGNED.finditer(text):
        value = _VALUE.match(text, found.end()) if found.start() >= end and is_secret(found[1]) else None
        if value is None or _is_prose(found[1], found[2], value[0]):
            continue
        quote = value[0][0] if value[0][0] in "\"'" else ""
        parts.append(f"{text[end : found.end()]}{quote}{MASK}{quote}")
        end = value.end()
    return "".join([*parts, text[end:]])


def _is_prose(key: str, sign: str, value: str) -> bool:
    """'invalid token: expected a number' is a sentence, and says nothing secret; nor are numbers and null."""
    if value in ("None", "null", "True", "False", "true", "false") or re.fullmatch(r"[\d.]+", value):
        return True
    bare = ":" in sign and sign[0] not in "\"'" and value[0] not in "\"'"
    return bare and key.lower().endswith(("token", "auth", "signature")) and not re.search(r"\d", value)
