"""What a run's page says of it at first sight: how it went, and how to go on. Pure functions."""

from collections.abc import Mapping, Sequence

from tracking.rows import Attempt, Parent
from tracking.source import Source

__all__ = ["describe"]

_TO_LOOK_AT = {
    "timeline.html": "where the time went",
    "curves.png": "the curves",
    "machine.svg": "the machine",
}
_ENDED = {"done": "Done", "failed": "Failed", "stopped": "Stopped", "died": "Died without a word"}


def describe(
    ours: str,
    remote_run_id: str,
    attempts: Sequence[Attempt],
    checkpoints: Mapping[str, str],
    *,
    parent: Parent | None = None,
    source: Source | None = None,
    pages: Mapping[str, str] | None = None,
) -> str:
    """Markdown: the outcome of the newest attempt in words, where the run is, and the commands to go on with it.

    `checkpoints` are the uploaded ones, by 'last' and 'best'; `pages` are links to what is shown of an artifact, by
    its path.
    """
    newest, pages = attempts[-1], pages or {}
    paragraphs = [_outcome(newest), _place(ours, attempts, parent, source)]
    looks = [f"[{what}]({pages[path]})" for path, what in _TO_LOOK_AT.items() if path in pages]
    if looks:
        paragraphs.append(f"Look at {', '.join(looks)}.")
    if checkpoints:
        named = ", ".join(
            f"{which} {_linked(f'`{name}`', pages.get(f'checkpoints/{name}'))}"
            for which, name in checkpoints.items()
        )
        paragraphs.append(f"Checkpoints: {named}.")
    if newest.outcome != "done" and checkpoints:
        paragraphs.append(
            f"Go on with it:\n\n```\ninterlock resume {ours}    # on {newest.host}\n"
            f"interlock resume mlflow:{remote_run_id}    # anywhere\n```"
        )
    return "\n\n".join(paragraphs)


def _linked(text: str, link: str | None) -> str:
    return text if link is None else f"[{text}]({link})"


def _outcome(attempt: Attempt) -> str:
    if attempt.outcome is None:
        return "**Running.**"
    words = f"**{_ENDED[attempt.outcome]}**"
    if attempt.reason and attempt.reason != "finished":
        words += f": {_one_line(attempt.reason)}"
    if attempt.exception and attempt.exception != attempt.reason:
        words += f"\n\n```\n{attempt.exception.strip()}\n```"
    return words if words.endswith(("`", ".")) else f"{words}."


def _place(ours: str, attempts: Sequence[Attempt], parent: Parent | None, source: Source | None) -> str:
    newest = attempts[-1]
    count = "1 attempt" if len(attempts) == 1 else f"{len(attempts)} attempts"
    hosts = " and ".join(dict.fromkeys(attempt.host for attempt in attempts))
    text = f"interlock run `{ours}`: {count} on {hosts}" + (
        f", device {newest.device}" if newest.device else ""
    )
    if parent is not None:
        text += f"; {parent.kind} from `{parent.run}`"
        text += "" if parent.seq is None else f" at transition {parent.seq}"
    if source is not None:
        state = {True: ", with changes that are not committed", False: "", None: ""}[source.dirty]
        text += f"; commit `{source.commit[:12]}`{state}"
    return f"{text}."


def _one_line(text: str) -> str:
    return " ".join(text.split())
