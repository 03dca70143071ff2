"""What mkdocs does beyond its plugins: files of the repository that pages link to become part of the site.

A page may link to `../benchmarks/RESULTS.md` or show `../benchmarks/RESULTS.svg`; both work where the repository is
browsed. In the site they lie under `repository/`, and so do those that they link to in turn.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
_PLACE = "repository"


def on_files(files: Files, *, config: Any) -> Files:
    """Add what pages link to outside of docs/."""
    root = Path(config.config_file_path).parent
    waiting = [(Path(file.abs_src_path), file.src_uri) for file in files.documentation_pages()]
    while waiting:
        source, _ = waiting.pop()
        for _, target, _ in _LINK.findall(source.read_text()):
            path = (source.parent / target).resolve()
            if not path.is_file() or not path.is_relative_to(root) or path.is_relative_to(config.docs_dir):
                continue
            uri = f"{_PLACE}/{path.relative_to(root).as_posix()}"
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
                if path.suffix == ".md":
                    waiting.append((path, uri))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Let links out of docs/ lead to where their files lie in the site."""
    docs = Path(config.docs_dir)
    if page.file.src_uri.startswith(f"{_PLACE}/"):
        return markdown
    up = "../" * page.file.src_uri.count("/")

    def led(match: re.Match[str]) -> str:
        path = (docs / page.file.src_uri).parent.joinpath(match[2]).resolve()
        if not path.is_file() or path.is_relative_to(docs):
            return match[0]
        return f"{match[1]}{up}{_PLACE}/{path.relative_to(docs.parent).as_posix()}{match[3]}"

    return _LINK.sub(led, markdown)
