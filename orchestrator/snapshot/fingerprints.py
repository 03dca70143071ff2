"""Fingerprints of live values: cheap, taken twice and compared to see whether a value has changed meanwhile."""

from __future__ import annotations

import functools
import sys
import types
from array import array
from collections import deque
from collections.abc import Collection, Hashable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from orchestrator.snapshot.attributes import attributes
from orchestrator.snapshot.metric_states import capture_states, has_states
from orchestrator.snapshot.names import unique_submodules
from orchestrator.snapshot.tensor_file import memory
from orchestrator.snapshot.users_code import SCALARS, has_users_variables, variables

__all__ = ["NOTHING", "Fingerprints", "is_of_code", "memory_of"]

NOTHING: Hashable = None
"""The fingerprint of what has no state that could be seen: modules, iterators, objects of most libraries."""

_CODE = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.MethodDescriptorType,
    functools.partial,
    np.ufunc,
    type,
)
_QUIET = frozenset(
    {
        *("torch", "torchvision", "torchmetrics", "numpy", "orchestrator", "states", "tracking"),
        *("tqdm", "matplotlib", "seaborn", "plotly", "PIL", "rich", "loguru", "click", "yaml", "pandas"),
        *(
            "tensorboard",
            "tensorboardX",
            "mlflow",
            "wandb",
            "comet_ml",
            "neptune",
            "clearml",
            "aim",
            "visdom",
        ),
        *("psutil", "pynvml", "pytest", "_pytest", "IPython", "ipykernel"),
    }
)
"""Libraries whose objects are not looked into: they print, draw and log, or are looked at in other ways."""
_CONTAINERS = frozenset({list, tuple, dict})
_REPRESENTED = (float, complex)
_ARRAYS = (np.ndarray, np.generic)
_READ = 1024
_MANY = 256
_PARTS = 16
_DEPTH = 8


class Fingerprints:
    """Takes fingerprints, with nothing for tensors whose memory is among `captured` and objects of `known` ids.

    Without `versions` those of a value and its copy are equal.

    Of a tensor or array up to 1,024 elements are read, with its version, shape and dtype; of a container up to
    256. So a change may go unseen in a large one that was written to by other than torch's means.
    """

    def __init__(
        self, captured: Collection[Hashable], known: Collection[int], *, versions: bool = True
    ) -> None:
        self._versions = versions
        self._captured = captured
        self._known = known
        self._open: set[int] = set()
        self._tensors: dict[int, tuple[Tensor, Hashable]] = {}

    def of(self, value: Any, depth: int = 0) -> Hashable:
        """The fingerprint of `value`: equal while it has not changed."""
        if type(value) not in _CONTAINERS:  # not asked of containers, which are many
            if isinstance(value, SCALARS):
                return type(value).__name__, repr(value) if isinstance(value, _REPRESENTED) else value
            if isinstance(value, Tensor):
                return self._tensor(value)
            if isinstance(value, _ARRAYS):
                return _array(np.asarray(value))
        if depth > _DEPTH:
            return NOTHING
        if isinstance(value, _CODE):
            return self._code(value, depth)
        if id(value) in self._known or id(value) in self._open:
            return NOTHING
        self._open.add(id(value))
        try:
            return self._inside(value, depth)
        finally:
            self._open.discard(id(value))

    def _tensor(self, value: Tensor) -> Hashable:
        # One that is met again was read already. It is kept, so that its id stays its own.
        found = self._tensors.get(id(value))
        if found is None:
            known = memory_of(value) in self._captured
            found = value, NOTHING if known else _tensor(value, self._versions)
            self._tensors[id(value)] = found
        return found[1]

    def _inside(self, value: Any, depth: int) -> Hashable:
        if isinstance(value, (list, tuple, deque)):
            some = _some(value)
            if set(map(type, some)) == {float}:  # a log of losses, say
                return "floats", len(value), array("d", some).tobytes()
            return self._all("sequence", len(value), some, depth)
        if isinstance(value, dict):
            keys, values = tuple(map(repr, _some(value))), (value[key] for key in _some(value))
            return self._all("dict", (len(value), keys), values, depth)
        if isinstance(value, set | frozenset):
            return "set", len(value), frozenset(self.of(item, depth + 1) for item in _some(value))
        if isinstance(value, nn.Module):
            return self._all("module", None, _inside_module(value), depth)
        if isinstance(value, Optimizer):
            groups = [{k: v for k, v in group.items() if k != "params"} for group in value.param_groups]
            return self._all("optimizer", None, [groups, list(value.state.values())], depth)
        if isinstance(value, LRScheduler | torch.amp.GradScaler):
            return self._all("object", None, [dict(vars(value))], depth)
        if has_users_variables(value):
            return self._all("object", None, [variables(value)], depth)
        if _may_learn(value):
            return self._all("learnt", None, islice(_arrays(value, 0), _MANY), depth)
        return NOTHING

    def _code(self, value: Any, depth: int) -> Hashable:
        """Which code it is, not what it encloses: that is looked at for itself."""
        if isinstance(value, functools.partial):
            return "code", *(self.of(part, depth + 1) for part in (value.func, value.args, value.keywords))
        line = value.__code__.co_firstlineno if isinstance(value, types.FunctionType) else None
        name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
        return "code", getattr(value, "__module__", None), name, line

    def _all(self, kind: str, size: Hashable, items: Any, depth: int) -> Hashable:
        parts = tuple([self.of(item, depth + 1) for item in items])
        if parts and all(part is NOTHING for part in parts):
            return NOTHING
        return kind, size, parts


def is_of_code(fingerprint: Hashable) -> bool:
    """Whether it is that of a function, a partial or a class."""
    return isinstance(fingerprint, tuple) and fingerprint[0] == "code"


def _may_learn(value: object) -> bool:
    """Whether it is of a library that may keep arrays which matter, such as a scaler of sklearn."""
    if isinstance(value, (*_CODE, nn.Module)):
        return False
    top = type(value).__module__.partition(".")[0]
    return top not in _QUIET and top not in sys.stdlib_module_names


def _arrays(value: object, depth: int) -> Iterator[Any]:
    """The arrays and tensors among the attributes of a library's object, and of those in it."""
    for item in variables(value).values():
        for part in item if isinstance(item, list | tuple) and len(item) <= _PARTS else (item,):
            for inner in part if isinstance(part, tuple) and len(part) <= _PARTS else (part,):
                if isinstance(inner, Tensor | np.ndarray | np.generic):
                    yield inner
                elif depth < 2 and hasattr(inner, "__dict__") and _may_learn(inner):
                    yield from _arrays(inner, depth + 1)


def _some(values: Any) -> list[Any]:
    """All of the values, or the first and last of many."""
    if len(values) <= _MANY:
        return list(values)
    half = _MANY // 2
    last = reversed(values) if hasattr(values, "__reversed__") else ()
    return [*islice(values, half), *islice(last, half)]


def _inside_module(module: nn.Module) -> Iterator[Any]:
    for part in unique_submodules(module).values():
        yield from chain(part._parameters.values(), part._buffers.values())
        yield dict(attributes(part))
        if has_states(part):
            yield capture_states(part)


def memory_of(tensor: Tensor) -> Hashable:
    """Equal for tensors that share memory."""
    if tensor.layout is not torch.strided or is_lazy(tensor):
        return id(tensor)
    return tensor.device, tensor.untyped_storage().data_ptr() or id(tensor)


def _tensor(tensor: Tensor, versions: bool) -> Hashable:
    version = tensor._version if versions and not tensor.is_inference() else None
    return "tensor", str(tensor.dtype), tuple(tensor.shape), version, _sample(tensor)


def _sample(tensor: Tensor) -> bytes:
    if tensor.device.type == "meta" or is_lazy(tensor):
        return b""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return b""
    tensor, step = tensor.detach(), max(tensor.numel() // _READ, 1)
    if not tensor.is_contiguous() or tensor.device.type != "cpu" or tensor.is_conj() or tensor.is_neg():
        tensor, step = _chosen(tensor, step), 1
    elements = np.frombuffer(memory(tensor), f"V{tensor.element_size()}")
    return xxhash.xxh3_128_digest(elements[::step].tobytes())


@torch.no_grad()
def _chosen(tensor: Tensor, step: int) -> Tensor:
    """Each `step`-th element, in memory that can be read. Finding them takes ten times as long as reading them."""
    tensor = tensor.resolve_conj().resolve_neg()
    if step > 1:
        chosen = torch.arange(0, tensor.numel(), step, device=tensor.device)
        tensor = tensor[torch.unravel_index(chosen, tensor.shape)]
    return tensor.cpu().contiguous()


def _array(values: np.ndarray[Any, Any]) -> Hashable:
    if values.dtype.hasobject:
        return NOTHING
    chosen = values.flat[:: max(values.size // _READ, 1)] if values.size else values
    return "array", str(values.dtype), values.shape, xxhash.xxh3_128_digest(chosen.tobytes())
