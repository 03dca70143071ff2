"""The package as it is built and installed: nothing is missing from it, and a user's typed script runs on it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
PACKAGES = ("orchestrator", "states", "tracking")
FILES = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "Makefile",
    "MANIFEST.in",
    "constraints.txt",
)


def call(*command: object, folder: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the wheel is that was built from the source distribution."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*PACKAGES, "tests", "examples", "docs", "benchmarks"):
        shutil.copytree(HERE / name, source / name, ignore=ignored)
    for name in FILES:
        shutil.copy(HERE / name, source)
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    call(sys.executable, "-c", build, folder=source)
    (archive,) = (source / "dist").glob("interlock-*.tar.gz")
    call("tar", "-xf", archive, folder=folder)
    unpacked_to = folder / archive.name.removesuffix(".tar.gz")
    pip = (sys.executable, "-m", "pip")
    call(
        *pip,
        *("wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", "wheels", "."),
        folder=unpacked_to,
    )
    (wheel,) = (unpacked_to / "wheels").glob("*.whl")
    call(*pip, "install", "-q", "--no-deps", "--no-index", "--target", folder / "site", wheel, folder=folder)
    assert (unpacked_to / "tests" / "trainings.py").exists(), "a source distribution whose tests cannot run"
    return folder / "site"


@pytest.mark.long
def test_every_file_of_the_packages_is_installed(installed: Path) -> None:
    def files(root: Path) -> set[Path]:
        found = (path.relative_to(root) for name in PACKAGES for path in (root / name).rglob("*"))
        return {path for path in found if path.suffix in (".py", ".html", ".typed")}

    assert files(installed) == files(HERE)


@pytest.mark.long
def test_a_typed_script_runs_on_it(installed: Path, tmp_path: Path) -> None:
    shutil.copy(HERE / "tests" / "typed_user.py", tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import orchestrator; print(orchestrator.__file__)\n"
        "from pathlib import Path; import typed_user; print(typed_user.train(Path('runs')).state)"
    )
    said = call(sys.executable, "-c", script, folder=tmp_path).splitlines()
    assert said[0].startswith(str(installed))
    assert said[-1] == "State.DONE"
    assert sum("BACKWARD" in line for line in said) == 8
