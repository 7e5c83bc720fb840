"""What the pages for people hold: links, names of files, and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [path.relative_to(ROOT) for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))]


def read(page: Path | str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def section(page: Path | str, heading: str) -> str:
    """The text below a heading of the second rank, up to the next one."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", read(page), re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no section {heading!r}"
    return found[1]


def blocks(text: str) -> list[str]:
    """The code blocks of a text, those between fences and those of indented lines."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:(?<=\n\n)|\A)((?: {4}.*\n|\n(?= {4}))+)", rest)
    return [*fenced, *(re.sub("^ {4}", "", block, flags=re.MULTILINE) for block in indented)]


def commands(text: str) -> Iterator[list[str]]:
    """The command lines of a text's code blocks, without comments, as a shell splits them."""
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # an apostrophe: no command
                continue
            if words:
                yield words


def steps(page: Path | str) -> list[tuple[str, str]]:
    """(language, block) of a page in its order; a line that is indented is a block of the language "sh"."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$|^ {4}(\S[^\n]*)$", read(page), re.MULTILINE | re.DOTALL)
    return [(language, block) if language else ("sh", line) for language, block, line in found]


def spans(text: str) -> list[str]:
    """What stands between backticks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
