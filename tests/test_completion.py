"""Completion of commands, options and runs, by what each shell asks, and by a real bash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tracking
from tracking.runs import create_run

HERE = Path(tracking.__file__).parent.parent


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A folder with `interlock` in it, which fails if torch is imported; beside `runs` with three runs."""
    for name in ("digits", "digits", "text"):
        create_run(tmp_path / "runs", name)
    script = tmp_path / "bin" / "interlock"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(HERE)!r})\nsys.modules['torch'] = None\n"
        "from orchestrator.cli import main\nmain(prog_name='interlock')\n"
    )
    script.chmod(0o755)
    return script.parent


def run(program: Path, command: list[str], **environment: str) -> str:
    words = {**os.environ, "PATH": f"{program}:{os.environ['PATH']}", **environment}
    return subprocess.run(
        command, cwd=program.parent, env=words, capture_output=True, text=True, check=True, timeout=60
    ).stdout


def ids(program: Path, name: str = "") -> list[str]:
    return sorted(path.name for path in (program.parent / "runs").glob(f"{name}*"))


def test_each_shell_is_told_of_runs(program: Path) -> None:
    asked = {"_INTERLOCK_COMPLETE": "bash_complete", "COMP_WORDS": "interlock show di", "COMP_CWORD": "2"}
    said = run(program, ["interlock"], **asked).split()
    assert sorted(said) == sorted(f"plain,{name}" for name in ["digits", *ids(program, "digits")])

    said = run(program, ["interlock"], **{**asked, "_INTERLOCK_COMPLETE": "zsh_complete"})
    assert "digits\nthe newest of 2\n" in said

    asked = {"_INTERLOCK_COMPLETE": "fish_complete", "COMP_WORDS": "interlock show di", "COMP_CWORD": "di"}
    assert set(ids(program, "digits")) <= set(run(program, ["interlock"], **asked).replace(",", "\n").split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script(program: Path, shell: str) -> None:
    assert "_INTERLOCK_COMPLETE" in run(program, ["interlock"], _INTERLOCK_COMPLETE=f"{shell}_source")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("interlock wat", ["watch"]),
        ("interlock show te", None),
        ("interlock --root elsewhere show te", []),
        ("interlock log digits --state BATCH", ["batch_start", "batch_end"]),
        ("interlock sync --al", ["--all"]),
        ("interlock resume te", None),
    ],
)
def test_in_bash(program: Path, typed: str, offered: list[str] | None) -> None:
    words = typed.split()
    script = (
        'eval "$(_INTERLOCK_COMPLETE=bash_source interlock)"; '
        f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _interlock_completion interlock; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    found = run(program, ["bash", "-c", script]).split()
    assert sorted(found) == sorted(["text", *ids(program, "text")] if offered is None else offered)
