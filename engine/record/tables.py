"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

Table = Sequence[Sequence[str]]
"""The header, then the rows."""


def markdown(table: Table, align: Literal["left", "right"] = "left") -> str:
    """The table, without a line feed at its end. `align` is that of all columns but the first."""
    header, *rows = table
    rule = ["---", *("---:" if align == "right" else "---" for _ in header[1:])]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in (header, rule, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def amount(value: float) -> str:
    """A count in full, however large it is: "16,384,000"; six digits of what is no whole number."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.6g}"


def metrics_table(of: str, metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics as a table in Markdown, a line for each model, whose name they stand under. `of`: what was measured."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = [[of, *names]]
    for model, values in metrics.items():
        rows.append([model, *(f"{values[name]:.4g}" if name in values else "" for name in names)])
    return markdown(rows, align="right")
