"""Watch one forward and backward pass: which function of which module was the first to make a value not finite."""

from __future__ import annotations

import contextlib
import dataclasses
import linecache
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

__all__ = ["Origin", "Watch", "describe", "kinds_of", "named_tensors"]

NAN, INF, MINUS_INF = "nan", "inf", "-inf"

_TORCH = os.path.dirname(torch.__file__) + os.sep
_INTERLOCK = os.path.dirname(__file__) + os.sep
_FRAME = re.compile(r'\s*File "(?P<file>.+)", line (?P<line>\d+), in (?P<name>.+)\n(?P<code>.*)')


@dataclass(frozen=True)
class Origin:
    """The function that made something not finite from what was finite, and the module it was called in."""

    module: str | None
    """The module's name within the model; None for what is called outside of any, such as a loss function."""
    function: str
    """As torch calls it: "torch.log" of a forward pass, "SqrtBackward0" of a backward pass. Empty: not known."""
    line: str
    """Where the user's code called it; empty where no such code did."""
    given: str
    """What of its input was not finite, and may be a mask, such as "3 -infinite of 80 elements"; mostly empty."""
    made: str
    """What of its output was not finite, such as "3 NaN of 80 elements"."""


@dataclass(frozen=True)
class _Call:
    """A module whose forward is under way, what was not finite of its input, how many functions came before."""

    module: nn.Module
    kinds: frozenset[str]
    given: str
    functions: int


class Watch(TorchFunctionMode):
    """Looks at what goes into and comes out of every function and module; a context manager for the forward pass.

    The backward pass may come after the context: its functions are looked at until `close`. Lines of a backward
    function come from torch's anomaly mode, which is on in the context (`torch.autograd.set_detect_anomaly`).
    Negative infinity that a mask has brought in, or made of an infinite argument, is no anomaly; what is made of it is.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules: list[Origin] = []
        """The modules whose outputs were the first not to be finite, in the order of their ends."""
        self.functions: list[Origin] = []
        """The same of functions."""
        self.backward: Origin | None = None
        """The first function of the backward pass whose result was not finite."""
        self._names = {module: name for name, module in model.named_modules()}
        self._inside: list[_Call] = []
        self._owners: dict[Any, str | None] = {}
        self._handles: list[Any] = []
        self._forward = contextlib.ExitStack()

    def __enter__(self) -> Watch:
        self._forward.enter_context(torch.autograd.set_detect_anomaly(True, check_nan=False))
        if "torch._dynamo" in sys.modules:  # otherwise nothing can have been compiled
            self._forward.enter_context(torch.compiler.set_stance("force_eager"))
        for module in self._names:
            for handle in (
                module.register_forward_pre_hook(self._enter_module, with_kwargs=True),
                module.register_forward_hook(self._leave_module, with_kwargs=True),
            ):
                self._forward.callback(handle.remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._inside.clear()
        self._forward.close()

    def close(self) -> None:
        """Look no more, and let go of the graph."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._owners.clear()

    # -- forward ---------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, and compare what it made with what it was given."""
        given, inputs = kinds_of((args, kwargs)), describe((args, kwargs))
        result = func(*args, **(kwargs or {}))
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        if "empty" not in name:  # what is in fresh memory means nothing
            made = _new(given, kinds_of(result))
            if made:
                self.functions.append(Origin(self._here(), name, _calling_line(), inputs, describe(result)))
        self._claim(result)
        return result

    def _here(self) -> str | None:
        return self._names[self._inside[-1].module] if self._inside else None

    def _enter_module(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = (args, kwargs)
        self._inside.append(_Call(module, kinds_of(given), describe(given), len(self.functions)))

    def _leave_module(self, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        self._claim(outputs)
        call = self._inside.pop()
        made = _new(call.kinds, kinds_of(outputs))
        inside, before = self.functions[call.functions :], self.functions[: call.functions]
        # A module may give negative infinity on purpose: it is a mask unless a function made it of finite values.
        if not made or (made == {MINUS_INF} and not inside):
            return
        if call.kinds and before:
            self.modules.append(before[0])  # where its input was spoilt
            return
        function = inside[0] if inside else Origin(None, "", "", "", "")
        name = self._names[module]
        self.modules.append(Origin(name, function.function, function.line, call.given, describe(outputs)))

    # -- backward --------------------------------------------------------------------------------

    def _claim(self, result: Any) -> None:
        """What of the graph is new was built by the module that is under way; have it looked at in backward."""
        here = self._here()
        todo = [tensor.grad_fn for _, tensor in named_tensors(result) if tensor.grad_fn is not None]
        while todo:
            node: Any = todo.pop()
            if node is None or node in self._owners:
                continue
            self._owners[node] = here
            self._handles.append(node.register_hook(self._looking_at(node)))
            todo += [before for before, _ in node.next_functions]

    def _looking_at(self, node: Any) -> Callable[[Any, Any], None]:
        def look(results: Any, given: Any) -> None:
            if self.backward is None and not kinds_of(given) and kinds_of(results):
                line = _line_of_traceback(node.metadata.get("traceback_", ()))
                self.backward = Origin(self._owners[node], node.name(), line, "", describe(results))

        return look


# -- what is not finite ------------------------------------------------------------------------------


def kinds_of(value: Any) -> frozenset[str]:
    """Which of "nan", "inf" and "-inf" are in the numbers and tensors of a nested value."""
    found: set[str] = set()
    for _, number in _leaves(value, ""):
        if isinstance(number, float):
            if not math.isfinite(number):
                found.add(NAN if math.isnan(number) else INF if number > 0 else MINUS_INF)
            continue
        values = _values(number)
        if values is None or bool(torch.isfinite(values).all()):
            continue
        found |= {kind for kind, count in _counts(values).items() if count}
    return frozenset(found)


def describe(value: Any) -> str:
    """How many elements of the tensors in a nested value are NaN or infinite; empty if none is."""
    found: dict[str, int] = {}
    elements = 0
    for _, tensor in named_tensors(value):
        values = _values(tensor)
        if values is None or bool(torch.isfinite(values).all()):
            elements += 0 if values is None else values.numel()
            continue
        elements += values.numel()
        for kind, count in _counts(values).items():
            found[kind] = found.get(kind, 0) + count
    named = {NAN: "NaN", INF: "infinite", MINUS_INF: "-infinite"}
    parts = [f"{count} {named[kind]}" for kind, count in found.items() if count]
    return f"{', '.join(parts)} of {elements} elements" if parts else ""


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a nested value, each with how it is reached from `name`, such as `batch['x'][0]`."""
    return ((path, leaf) for path, leaf in _leaves(value, name) if isinstance(leaf, Tensor))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Tensor | float]]:
    """Tensors and floats, depth first."""
    if isinstance(value, Tensor | float):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _leaves(part, f"{path}[{number}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), f"{path}.{field.name}")


def _values(tensor: Tensor) -> Tensor | None:
    """The numbers that a tensor holds; None where they cannot be looked at, or are always finite."""
    if nn.parameter.is_lazy(tensor) or tensor.is_meta or tensor.is_nested or tensor.is_quantized:
        return None
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        return tensor.coalesce().values()
    return tensor if tensor.layout is torch.strided else None


def _counts(values: Tensor) -> dict[str, int]:
    parts = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    return {
        NAN: int(torch.isnan(parts).sum()),
        INF: int(torch.isposinf(parts).sum()),
        MINUS_INF: int(torch.isneginf(parts).sum()),
    }


def _new(given: frozenset[str], made: frozenset[str]) -> frozenset[str]:
    """What of `made` is not to be expected of what was given."""
    if given & {NAN, INF}:
        return frozenset()
    return made - given


# -- where in the user's code ------------------------------------------------------------------------


def _calling_line() -> str:
    """The line of the user's code that is being executed; empty where torch or interlock called by itself."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        found = _shown(code.co_filename, frame.f_lineno, code.co_name)
        if found is not None:
            return found
        frame = frame.f_back
    return ""


def _line_of_traceback(entries: Iterable[str]) -> str:
    """The same of a traceback that torch's anomaly mode has kept, outermost first."""
    for entry in reversed(list(entries)):
        match = _FRAME.match(entry)
        if match is None:
            continue
        found = _shown(match["file"], int(match["line"]), match["name"])
        if found is not None:
            return found
    return ""


def _shown(file: str, line: int, name: str) -> str | None:
    """A line as it is shown; None to look at the frame around it, empty where the user's code has ended."""
    if file == __file__ or file.startswith((_TORCH, "<frozen")):
        return None
    if file.startswith(_INTERLOCK):
        return ""
    code = linecache.getline(file, line).strip()
    path = Path(file)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{shown}:{line}, in {name}" + (f": {code}" if code else "")
