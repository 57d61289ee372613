"""Tables in Markdown, as the documents have them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table under these titles, with the end of its last line."""
    heading, *below = ("| " + " | ".join(cells) + " |\n" for cells in (titles, *rows))
    return "".join((heading, "|" + "---|" * len(titles) + "\n", *below))


def ran_on(about: dict[str, Any], names: Iterable[str] = ()) -> str:
    """What a run ran on, in a line: the card, the date, the versions of these, or of all."""
    versions = about["versions"]
    return f"{about['card']['name']}, {about['date']}; {', '.join(f'{name} {versions[name]}' for name in names or versions)}\n"
