"""The safetensors file format: which dtypes it holds, how tensors are laid out in it, how its header is read.

https://github.com/huggingface/safetensors: eight bytes with the header's length, the header (JSON), and the
tensors without gaps.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "DTYPES",
    "METADATA",
    "Entry",
    "HeaderError",
    "buffers",
    "header_length",
    "layout",
    "memory",
    "read_header",
    "read_tensors",
]

METADATA = "__metadata__"
"""The one name that no tensor in a file can have."""

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The dtypes of the format that its readers have long known, under their names in a header."""

_NAMED = {name: dtype for dtype, name in DTYPES.items()}
_LENGTH = 8
_ALIGNMENT = 64  # of the first tensor in a file, and so in memory that is arranged as the file: a cache line


class HeaderError(ValueError):
    """A header that is not one of this format."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: where its bytes are, counted from the end of the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, in place."""
    # Not by numpy(), after which a storage can be resized no more.
    view: Any = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    view.tensor = tensor.detach()  # for as long as anybody looks at its memory
    return memoryview(view).cast("B")


def layout(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[Entry]]:
    """The beginning of a file of `tensors`, length and header, and where after it each of them is.

    Tensors come by descending size of element and then by name, so that each lies at a multiple of that
    size. dtypes as in DTYPES.
    """
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    entries, end = [], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), begin, end))
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH, "little") + text, entries


def buffers(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """A whole file as views of memory, in order: the header, then the tensors as `layout` has them.

    Only those that are not contiguous or not on the CPU are copied.
    """
    header, entries = layout(tensors)
    found = [memory(tensors[e.name].detach().cpu().contiguous()) for e in entries if e.end > e.begin]
    return [memoryview(header), *found]


def header_length(start: bytes | bytearray, size: int) -> int:
    """The bytes that length and header take, from a file's first eight and its size; raises HeaderError."""
    length = _LENGTH + int.from_bytes(start[:_LENGTH], "little")
    if len(start) < _LENGTH or length > size:
        raise HeaderError(f"a header of {length} bytes in a file of {size}")
    return length


def read_header(header: bytes, size: int) -> list[Entry]:
    """The tensors of a file of `size` bytes, in the order of their bytes, from its length and header.

    Raises HeaderError where they do not fill the rest of the file without gaps.
    """
    try:
        listed = json.loads(header[_LENGTH:])
        entries = [_entry(name, found) for name, found in listed.items() if name != METADATA]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HeaderError(f"a header that cannot be read ({error!r})") from error
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_gapless(entries, size - len(header))
    return entries


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the file at `path`, whoever wrote it, on the CPU; nothing vouches for their bytes.

    Raises HeaderError where it is not a whole file of this format.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH)
        header = start + file.read(header_length(start, size) - _LENGTH)
        made = {}
        for entry in read_header(header, size):
            tensor = made[entry.name] = torch.empty(entry.shape, dtype=entry.dtype)
            if tensor.numel():
                file.readinto(memory(tensor))
    return made


def _entry(name: str, found: dict[str, Any]) -> Entry:
    begin, end = found["data_offsets"]
    return Entry(name, _NAMED[found["dtype"]], tuple(found["shape"]), begin, end)


def _check_gapless(entries: Sequence[Entry], size: int) -> None:
    position = 0
    for entry in entries:
        expected = math.prod(entry.shape) * entry.dtype.itemsize
        if entry.begin != position or entry.end - entry.begin != expected:
            raise HeaderError(f"tensor {entry.name!r} at bytes {entry.begin} to {entry.end}")
        position = entry.end
    if position != size:
        raise HeaderError(f"{size} bytes of tensors where the header lists {position}")
