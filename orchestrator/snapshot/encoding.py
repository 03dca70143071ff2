"""Trees of a training's state as JSON documents and tensors, and back, bit for bit; nothing is ever pickled."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

import numpy as np
import torch
from numpy.lib.format import descr_to_dtype, dtype_to_descr
from torch import Tensor

from orchestrator.snapshot.tensor_entries import array_as_tensor, identity, rebuilt, refusal, storable
from orchestrator.snapshot.tensor_file import METADATA
from states.errors import InterlockError
from states.table import State, Trigger

__all__ = ["DecodingError", "Encoded", "EncodingError", "decode", "encode"]

_TAG = "$"
_DEPTH = 100
_JSON_INTEGERS = range(-(2**63), 2**63)
_FACTORIES: dict[str, Callable[[], Any]] = {
    factory.__name__: factory for factory in (bool, dict, float, int, list, set, str, tuple)
}
_REFUSED_WHERE_HASHED = (Tensor, np.ndarray)


class EncodingError(InterlockError, TypeError):
    """Something in a tree cannot be stored exactly. `path` leads to it: `callbacks/ema/fn`."""

    def __init__(self, path: str, found: str, advice: str = "") -> None:
        self.path = path
        super().__init__(
            f"{path or 'the whole'}: {found}, which cannot be stored exactly; expected tensors, numpy arrays, and "
            "plain values in dicts, lists, tuples and sets. "
            + (
                advice
                or "Leave it out of the state, or let state_dict() give plain values it can be made from."
            )
        )


class DecodingError(InterlockError, ValueError):
    """A document that `encode` of this version did not write, or that its tensors do not belong to."""

    def __init__(self, found: str) -> None:
        super().__init__(
            f"found {found}; expected a document as orchestrator.snapshot.encoding writes it, with all its tensors. "
            "Was it written by a newer interlock?"
        )


@dataclass(frozen=True)
class Encoded:
    """A tree taken apart.

    `document` holds what `json` can write and shares nothing with the tree. `tensors` are the tree's own or views of
    them, detached, by names that are their paths in it (`model/parameters/0.weight`).
    """

    document: Any
    tensors: dict[str, Tensor]


def encode(tree: Any) -> Encoded:
    """Take `tree` apart. No tensor is copied, so take what is needed of them before they change.

    Kept exactly, with their types: None, bool, int, float (each bit, of NaN too), complex, str, bytes, bytearray,
    range, dict and OrderedDict (order; keys of any hashable kind named here), defaultdict (without a factory, or with
    one of bool, dict, float, int, list, set, str, tuple), Counter, list, tuple, deque (maxlen), set and frozenset
    (order is not part of them), State, Trigger, torch.Size, torch.dtype, torch.device, numpy scalars and
    arrays, and torch tensors: strided ones with dtype, shape and strides, sparse COO ones with their parts.

    Tensors that are the same memory read in the same way are stored once and come back as one object. A
    tensor's device and requires_grad, and the identity of other objects met twice, are not kept. Where
    elements of a tensor share memory otherwise than by expand(), or it is a thin slice through much memory,
    and for arrays that torch cannot view, the strides are not kept.

    Raises EncodingError, with the path, for everything else: objects, functions, subclasses and named tuples.
    """
    encoder = _Encoder()
    document = encoder.encode(tree, "")
    return Encoded(document, encoder.tensors)


def decode(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree of which `encode` made `document` and `tensors`.

    Tensors become part of the tree as they are; only those that had other strides are copied.
    Raises DecodingError where the document is not one of `encode`, or a tensor is missing.
    """
    return _Decoder(tensors).decode(document)


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._stored: dict[int, list[tuple[Tensor, dict[str, Any]]]] = {}
        """The tensors whose memory begins at one place, and the entry of each; nearly always it is one."""
        self._open: list[int] = []

    def encode(self, value: Any, path: str) -> Any:
        encoder = _ENCODERS.get(type(value))
        if encoder is not None:
            return encoder(self, value, path)
        if isinstance(value, Tensor):
            return self.tensor(value, path)
        if isinstance(value, np.generic):
            return self.numpy_scalar(value, path)
        raise EncodingError(path, _kind(value))

    def inside(self, container: Any, path: str) -> None:
        """Enter a container; `leave` must follow."""
        if id(container) in self._open:
            raise EncodingError(path, f"{_kind(container)} that contains itself")
        if len(self._open) == _DEPTH:
            raise EncodingError(path, f"{_kind(container)} inside {_DEPTH} others")
        self._open.append(id(container))

    def leave(self) -> None:
        self._open.pop()

    def items(self, container: Collection[Any], path: str) -> list[Any]:
        if _are_numbers(container):
            return list(container)
        self.inside(container, path)
        encoded = [self.encode(value, _joined(path, index)) for index, value in enumerate(container)]
        self.leave()
        return encoded

    def hashed(self, value: Any, path: str) -> Any:
        """A dictionary's key or an element of a set."""
        if isinstance(value, _REFUSED_WHERE_HASHED):
            raise EncodingError(
                path, f"{_kind(value)} as a key or in a set", "Use its name or an index instead."
            )
        return self.encode(value, path)

    # -- plain values --------------------------------------------------------------------------------

    def as_it_is(self, value: Any, path: str) -> Any:
        return value

    def integer(self, value: int, path: str) -> Any:
        # Decimal digits are limited in number (sys.set_int_max_str_digits), hexadecimal ones are not.
        return value if value in _JSON_INTEGERS else {_TAG: "int", "v": hex(value)}

    def floating(self, value: float, path: str) -> Any:
        if math.isfinite(value):
            return value  # JSON's numbers are read back as written, -0.0 and subnormals included
        if math.isnan(value):
            return {_TAG: "float", "bits": struct.pack(">d", value).hex()}
        return {_TAG: "float", "v": str(value)}

    def complex_number(self, value: complex, path: str) -> Any:
        return {_TAG: "complex", "v": [self.floating(value.real, path), self.floating(value.imag, path)]}

    def string(self, value: str, path: str) -> Any:
        if _is_text(value):
            return value
        return {_TAG: "str", "v": _text(value.encode("utf-8", "surrogatepass"))}

    def binary(self, value: bytes | bytearray, path: str) -> Any:
        return {_TAG: type(value).__name__, "v": _text(value)}

    def span(self, value: range, path: str) -> Any:
        return {
            _TAG: "range",
            "v": [self.integer(part, path) for part in (value.start, value.stop, value.step)],
        }

    def named(self, value: State | Trigger, path: str) -> Any:
        return {_TAG: type(value).__name__, "v": value.value}

    def size(self, value: torch.Size, path: str) -> Any:
        return {_TAG: "Size", "v": list(value)}

    def dtype(self, value: torch.dtype, path: str) -> Any:
        return {_TAG: "dtype", "v": str(value).removeprefix("torch.")}

    def device(self, value: torch.device, path: str) -> Any:
        return {_TAG: "device", "v": str(value)}

    # -- containers ----------------------------------------------------------------------------------

    def dictionary(self, value: dict[Any, Any], path: str) -> Any:
        for key in value:
            if type(key) is not str or key == _TAG or not _is_text(key):
                return {_TAG: "dict", "v": self.pairs(value, path)}
        self.inside(value, path)
        above = path and f"{path}/"
        encoded = {key: self.encode(item, above + key) for key, item in value.items()}
        self.leave()
        return encoded

    def pairs(self, value: Mapping[Any, Any], path: str) -> list[list[Any]]:
        self.inside(value, path)
        encoded = []
        for key, item in value.items():
            below = _joined(path, key)
            encoded.append([self.hashed(key, below), self.encode(item, below)])
        self.leave()
        return encoded

    def ordered(self, value: Mapping[Any, Any], path: str) -> Any:
        return {_TAG: type(value).__name__, "v": self.pairs(value, path)}

    def with_default(self, value: defaultdict[Any, Any], path: str) -> Any:
        factory = value.default_factory
        name = next((name for name, known in _FACTORIES.items() if known is factory), None)
        if factory is not None and name is None:
            raise EncodingError(
                path,
                f"a defaultdict whose factory is {_kind(factory)}",
                f"Make it a dict, or use one of the factories {', '.join(_FACTORIES)}.",
            )
        return {_TAG: "defaultdict", "factory": name, "v": self.pairs(value, path)}

    def sequence(self, value: list[Any], path: str) -> Any:
        return self.items(value, path)

    def fixed(self, value: tuple[Any, ...], path: str) -> Any:
        return {_TAG: "tuple", "v": self.items(value, path)}

    def queue(self, value: deque[Any], path: str) -> Any:
        return {_TAG: "deque", "maxlen": value.maxlen, "v": self.items(value, path)}

    def set_of(self, value: set[Any] | frozenset[Any], path: str) -> Any:
        self.inside(value, path)
        encoded = [self.hashed(item, _joined(path, "{}")) for item in value]
        self.leave()
        return {_TAG: type(value).__name__, "v": sorted(encoded, key=json.dumps)}

    # -- tensors and arrays --------------------------------------------------------------------------

    def tensor(self, value: Tensor, path: str) -> Any:
        refused = refusal(value)
        if refused is not None:
            raise EncodingError(path, refused, "Store a strided or sparse COO torch.Tensor made from it.")
        if value.layout is torch.strided:
            return {_TAG: "tensor", **self.stored(value, path)}
        found = value.detach()
        # indices() and values() would refuse what is not coalesced.
        return {
            _TAG: "sparse",
            "indices": self.stored(found._indices(), _joined(path, "indices")),
            "values": self.stored(found._values(), _joined(path, "values")),
            "size": list(found.shape),
            "coalesced": found.is_coalesced(),
        }

    def stored(self, value: Tensor, path: str) -> dict[str, Any]:
        start = value.data_ptr() or id(value)  # 0 where there are no elements
        there = self._stored.setdefault(start, [])
        for other, entry in there:
            if identity(other) == identity(value):
                return entry
        tensor, entry = storable(value)
        name = self.free_name(path)
        self.tensors[name] = tensor
        entry = {"name": name, **entry}
        there.append((value, entry))
        return entry

    def free_name(self, path: str) -> str:
        # Names go into file headers as UTF-8.
        plain = path if path.isascii() else path.encode("utf-8", "backslashreplace").decode()
        base = name = plain or "tensor"
        number = 2
        while name in self.tensors or name == METADATA:
            name, number = f"{base}#{number}", number + 1
        return name

    def array(self, value: np.ndarray[Any, Any], path: str) -> Any:
        tensor = array_as_tensor(value)
        if tensor is not None:
            return {_TAG: "ndarray", **self.stored(tensor, path)}
        if value.dtype.hasobject:
            raise EncodingError(path, "a numpy array of Python objects", "Make it a list.")
        order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
        return {
            _TAG: "ndarray",
            "shape": list(value.shape),
            "order": order,
            **self.bytes_of(value, order, path),
        }

    def numpy_scalar(self, value: np.generic, path: str) -> Any:
        if value.dtype.hasobject:
            raise EncodingError(path, "a numpy scalar with Python objects in it")
        return {_TAG: "scalar", **self.bytes_of(np.asarray(value), "C", path)}

    def bytes_of(self, value: np.ndarray[Any, Any], order: Any, path: str) -> dict[str, Any]:
        description = dtype_to_descr(value.dtype)
        read = descr_to_dtype(description)
        if read != value.dtype or read.type is not value.dtype.type:
            raise EncodingError(path, f"a numpy dtype {value.dtype!r}")
        return {"descr": self.encode(description, path), "v": _text(value.tobytes(order))}


def _kind(value: Any) -> str:
    """What an error calls `value`: `a function`, `an object of my.module.Class`."""
    kind = type(value)
    if kind.__module__ == "builtins":
        return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"
    return f"an object of {kind.__module__}.{kind.__qualname__}"


def _are_numbers(values: Collection[Any]) -> bool:
    """Whether they are numbers of one type that JSON keeps as they are; asked of all at once, for long logs."""
    kinds = set(map(type, values))
    if kinds == {float}:
        return all(map(math.isfinite, values))
    return kinds == {int} and min(values) in _JSON_INTEGERS and max(values) in _JSON_INTEGERS


def _joined(path: str, key: object) -> str:
    if type(key) is str:
        shown = key
    elif isinstance(key, State | Trigger):
        shown = key.value
    else:
        try:
            shown = repr(key)[:80]
        except Exception:  # an integer of too many digits, or an object with a repr of its own
            shown = f"<{type(key).__name__}>"
    return f"{path}/{shown}" if path else shown


def _is_text(value: str) -> bool:
    """Whether JSON gives it back; lone surrogates that happen to make a pair would become one character."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(value: bytes | bytearray) -> str:
    return base64.b64encode(value).decode()


_ENCODERS: dict[type, Callable[[_Encoder, Any, str], Any]] = {
    NoneType: _Encoder.as_it_is,
    bool: _Encoder.as_it_is,
    int: _Encoder.integer,
    float: _Encoder.floating,
    complex: _Encoder.complex_number,
    str: _Encoder.string,
    bytes: _Encoder.binary,
    bytearray: _Encoder.binary,
    range: _Encoder.span,
    State: _Encoder.named,
    Trigger: _Encoder.named,
    torch.Size: _Encoder.size,
    torch.dtype: _Encoder.dtype,
    torch.device: _Encoder.device,
    dict: _Encoder.dictionary,
    OrderedDict: _Encoder.ordered,
    Counter: _Encoder.ordered,
    defaultdict: _Encoder.with_default,
    list: _Encoder.sequence,
    tuple: _Encoder.fixed,
    deque: _Encoder.queue,
    set: _Encoder.set_of,
    frozenset: _Encoder.set_of,
    Tensor: _Encoder.tensor,
    np.ndarray: _Encoder.array,
}


class _Decoder:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._made: dict[tuple[str, ...], Any] = {}

    def decode(self, found: Any) -> Any:
        if isinstance(found, list):
            return [self.decode(item) for item in found]
        if not isinstance(found, dict):
            return found
        if _TAG not in found:
            return {key: self.decode(item) for key, item in found.items()}
        decoder = _DECODERS.get(str(found[_TAG]))
        if decoder is None:
            raise DecodingError(f"an entry tagged {found[_TAG]!r}")
        try:
            return decoder(self, found)
        except DecodingError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, struct.error) as error:
            raise DecodingError(f"an entry tagged {found[_TAG]!r} that cannot be read ({error!r})") from error

    def items(self, found: dict[str, Any]) -> list[Any]:
        return [self.decode(item) for item in found["v"]]

    def pairs(self, found: dict[str, Any]) -> list[tuple[Any, Any]]:
        return [(self.decode(key), self.decode(item)) for key, item in found["v"]]

    def floating(self, found: dict[str, Any]) -> float:
        if "bits" in found:
            value: float = struct.unpack(">d", bytes.fromhex(found["bits"]))[0]
            return value
        return float(found["v"])

    def dtype(self, found: dict[str, Any]) -> torch.dtype:
        dtype = getattr(torch, found["v"], None)
        if not isinstance(dtype, torch.dtype):
            raise DecodingError(f"torch.{found['v']}, which this torch ({torch.__version__}) does not have")
        return dtype

    def counter(self, found: dict[str, Any]) -> Counter[Any]:
        made: Counter[Any] = Counter()
        for key, item in self.pairs(found):
            made[key] = item
        return made

    def with_default(self, found: dict[str, Any]) -> defaultdict[Any, Any]:
        factory = None if found["factory"] is None else _FACTORIES[found["factory"]]
        return defaultdict(factory, self.pairs(found))

    # -- tensors and arrays --------------------------------------------------------------------------

    def stored(self, entry: dict[str, Any]) -> Tensor:
        key = ("tensor", entry["name"])
        if key not in self._made:
            if entry["name"] not in self._tensors:
                raise DecodingError(f"no tensor {entry['name']!r}")
            self._made[key] = rebuilt(self._tensors[entry["name"]], entry)
        made: Tensor = self._made[key]
        return made

    def sparse(self, found: dict[str, Any]) -> Tensor:
        key = ("sparse", found["indices"]["name"], found["values"]["name"])
        if key not in self._made:
            indices, values = self.stored(found["indices"]), self.stored(found["values"])
            self._made[key] = torch.sparse_coo_tensor(
                indices, values, found["size"], is_coalesced=found["coalesced"], check_invariants=True
            )
        made: Tensor = self._made[key]
        return made

    def array(self, found: dict[str, Any]) -> np.ndarray[Any, Any]:
        if "name" not in found:
            return self.raw(found, found["shape"], found["order"])
        key = ("ndarray", found["name"])
        if key not in self._made:
            self._made[key] = self.stored(found).numpy()
        made: np.ndarray[Any, Any] = self._made[key]
        return made

    def raw(self, found: dict[str, Any], shape: list[int], order: Any) -> np.ndarray[Any, Any]:
        memory = bytearray(base64.b64decode(found["v"]))  # a bytearray, so that the array can be written to
        dtype = descr_to_dtype(self.decode(found["descr"]))
        return np.ndarray(tuple(shape), dtype, memory, order=order)


_DECODERS: dict[str, Callable[[_Decoder, dict[str, Any]], Any]] = {
    "int": lambda _, found: int(found["v"], 16),
    "float": _Decoder.floating,
    "complex": lambda self, found: complex(*self.items(found)),
    "str": lambda _, found: base64.b64decode(found["v"]).decode("utf-8", "surrogatepass"),
    "bytes": lambda _, found: base64.b64decode(found["v"]),
    "bytearray": lambda _, found: bytearray(base64.b64decode(found["v"])),
    "range": lambda self, found: range(*self.items(found)),
    "State": lambda _, found: State(found["v"]),
    "Trigger": lambda _, found: Trigger(found["v"]),
    "Size": lambda _, found: torch.Size(found["v"]),
    "dtype": _Decoder.dtype,
    "device": lambda _, found: torch.device(found["v"]),
    "dict": lambda self, found: dict(self.pairs(found)),
    "OrderedDict": lambda self, found: OrderedDict(self.pairs(found)),
    "Counter": _Decoder.counter,
    "defaultdict": _Decoder.with_default,
    "tuple": lambda self, found: tuple(self.items(found)),
    "deque": lambda self, found: deque(self.items(found), found["maxlen"]),
    "set": lambda self, found: set(self.items(found)),
    "frozenset": lambda self, found: frozenset(self.items(found)),
    "tensor": _Decoder.stored,
    "ndarray": _Decoder.array,
    "scalar": lambda self, found: self.raw(found, [], "C")[()],
    "sparse": _Decoder.sparse,
}
