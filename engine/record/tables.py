"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Table = Sequence[Sequence[str]]
"""The header, then the rows."""


def markdown(table: Table, align: Literal["left", "right"] = "left") -> str:
    """The table, without a line feed at its end. `align` is that of all columns but the first."""
    header, *rows = table
    rule = ["---", *("---:" if align == "right" else "---" for _ in header[1:])]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in (header, rule, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
