"""A script run in forks of this process, which has imported what it needs: starting it again takes no imports."""

from __future__ import annotations

import ast
import ctypes
import gc
import importlib
import importlib.util
import os
import runpy
import signal
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

__all__ = ["Script", "cannot_fork", "import_ahead", "start"]

_ALWAYS = ("torch", "torch._dynamo", "numpy", "orchestrator.trainer", "orchestrator.recovery")
"""`torch._dynamo` is imported by the first optimizer."""
_NOT_FORKED = frozenset({"grpc", "jax", "jaxlib", "ray", "tensorflow"})
"""Packages whose threads, which a fork has not, they wait for all the same."""
_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Script:
    """What `python SCRIPT ARGUMENTS` would run; `python -m SCRIPT` if it is a module's name."""

    name: str
    arguments: tuple[str, ...] = ()
    module: bool = False

    @property
    def folder(self) -> str:
        """Where Python looks first for what the script imports."""
        return os.getcwd() if self.module else str(Path(self.name).resolve().parent)

    @property
    def command(self) -> list[str]:
        """The command line that runs it in a process that imports everything itself."""
        return [sys.executable, *(["-m"] if self.module else []), self.name, *self.arguments]


def import_ahead(script: Script, also: Sequence[str] = ()) -> None:
    """Import what `script` imports at its top and is installed, torch, and `also`.

    What lies beside the script is left to it, as it may be changed before it is started again. What cannot be
    imported is left to it too, but for what is named in `also`.

    Raises ImportError for `also`.
    """
    for name in also:
        importlib.import_module(name)
    # By NVML it is found out whether there is a device; by CUDA itself, which no fork could use then.
    given = os.environ.get(_NVML)
    os.environ[_NVML] = given or "1"
    for name, members in [*((name, []) for name in _ALWAYS), *_imports(script)]:
        top = name.partition(".")[0]
        if top in _NOT_FORKED or not _installed(top, script):
            continue
        try:
            __import__(name, fromlist=members)
        except Exception:
            continue  # the script meets it at its own line, where it may be caught
    if given is None:
        del os.environ[_NVML]


def _imports(script: Script) -> Iterator[tuple[str, list[str]]]:
    """The modules that a script's outermost statements import, and what they take from each."""
    if script.module:
        return
    try:
        body = ast.parse(Path(script.name).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return  # running it says what is wrong
    for statement in body:
        if isinstance(statement, ast.Import):
            yield from ((alias.name, []) for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            yield statement.module, [alias.name for alias in statement.names if alias.name != "*"]


def _installed(top: str, script: Script) -> bool:
    """Whether a package is Python's own, or found where packages are installed, and not beside the script."""
    if _beside(script, top):
        return False
    if top in sys.stdlib_module_names or top == __name__.partition(".")[0]:
        return True
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if found is None or found.origin is None:
        return False
    folders = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    return not folders.isdisjoint(Path(found.origin).resolve().parents)


def _beside(script: Script, top: str) -> bool:
    place = Path(script.folder, top)
    return place.with_name(f"{top}.py").is_file() or (place / "__init__.py").is_file()


def cannot_fork(script: Script) -> str:
    """Why what has been imported here cannot be shared by forks that run `script`; empty if it can be."""
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if threads:
        return f"what was imported has started threads ({', '.join(threads)})"
    if there := sorted(_NOT_FORKED.intersection(sys.modules)):
        return f"{', '.join(there)} cannot be used in a fork"
    if shadowed := sorted(name for name in sys.modules if "." not in name and _is_another(script, name)):
        return f"{', '.join(shadowed)} beside the script has the name of a module that is imported already"
    if _in_a_fork(sys.modules["torch"].cuda._is_in_bad_fork):
        return "what was imported has begun to use CUDA"
    return ""


def _is_another(script: Script, name: str) -> bool:
    """Whether what lies beside the script by the name of an imported module is not that module."""
    file = getattr(sys.modules[name], "__file__", None)
    return (
        name != "__main__" and _beside(script, name) and Path(script.folder) not in Path(file or "/").parents
    )


def _in_a_fork(question: Callable[[], bool]) -> bool:
    child = _fork()
    if child == 0:
        answer = True
        try:
            answer = question()
        finally:
            os._exit(answer)
    return os.waitpid(child, 0)[1] != 0


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns of threads: those of NumPy's OpenBLAS, which ends them before a fork and begins them after.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def start(script: Script, environment: Mapping[str, str], *, fork: bool) -> int:
    """Start the script; its process's id. No signal is blocked in it.

    A fork is asked to halt, by SIGTERM, if this process dies. Without `fork` the script imports everything itself.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if not fork:
        return os.posix_spawn(sys.executable, script.command, environment, setsigmask=())
    gc.freeze()  # what was imported stays, and stays shared: no collection of the script's looks at it
    parent = os.getpid()
    child = _fork()
    if child == 0:
        _become(script, environment, parent)
    return child


def _become(script: Script, environment: Mapping[str, str], parent: int) -> NoReturn:
    """Be, in a child that was just forked, the process that the script would have had of its own."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
    os.environ.clear()
    os.environ.update(environment)
    # Python's own generator seeds itself anew in a fork. A script that seeds none draws anew each time.
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    sys.argv = [script.name, *script.arguments]
    sys.orig_argv = script.command
    sys.path[0] = script.folder
    try:
        if script.module:
            runpy.run_module(script.name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script.name, run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        error.__traceback__ = _of_the_script(error)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1)
    sys.exit(0)


def _of_the_script(error: BaseException) -> TracebackType | None:
    """The traceback of an error from where it left this module and `runpy`, if it did."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>"):
        trace = trace.tb_next
    return trace or error.__traceback__
