"""The records that were left out: counted by reason, the first of each shown.

Skipped(max_bad_fraction)   .add(problem), .check(records) raises once they are too many
lines(skipped)              what Skipped.to_json returned, for a person to read
"""

from __future__ import annotations

from typing import Any

from engine.errors import DataError
from models.causal_lm.sources import Problem

_SHOWN = 3
_SHOWN_IN_ERROR = 10


class Skipped:
    """Counts problems; holds only the first few of each reason."""

    def __init__(self, max_bad_fraction: float) -> None:
        self._max_bad_fraction = max_bad_fraction
        self._first: list[Problem] = []
        self._reasons: dict[str, tuple[int, list[str]]] = {}
        self.count = 0

    def add(self, problem: Problem) -> None:
        """Note a record that is left out."""
        self.count += 1
        if len(self._first) < _SHOWN_IN_ERROR:
            self._first.append(problem)
        count, places = self._reasons.get(problem.reason, (0, []))
        self._reasons[problem.reason] = count + 1, places if len(places) == _SHOWN else [*places, str(problem.place)]

    def check(self, records: int) -> None:
        """Raises DataError if more than the fraction allowed of `records` records, good and bad, are left out."""
        if self.count > self._max_bad_fraction * records:
            shown = "\n".join(f"  {problem}" for problem in self._first)
            raise DataError(
                f"{self.count:,} of {records:,} records cannot be used, more than --max-bad-fraction "
                f"{self._max_bad_fraction:g} allows; mend them. The first:\n{shown}"
            )

    def to_json(self) -> dict[str, Any]:
        """{reason: {"count": n, "first": [place, ...]}}, the most frequent first."""
        ordered = sorted(self._reasons.items(), key=lambda item: (-item[1][0], item[0]))
        return {reason: {"count": count, "first": places} for reason, (count, places) in ordered}


def lines(skipped: dict[str, Any]) -> list[str]:
    """What `Skipped.to_json` returned, one line a reason."""
    return [
        f"{entry['count']:,} left out: {reason} ({', '.join(entry['first'])}{', ...' * (entry['count'] > _SHOWN)})"
        for reason, entry in skipped.items()
    ]
