"""Records that were left out, and parts not used: counted by reason, with examples.

Tally()                     .add(place, reason)
Skipped(max_bad_fraction)   .add(problem), .check(records) raises once they are too many
remarks(index)              what a store's index says of both, and of its tokenizer, for a person to read
"""

from __future__ import annotations

from typing import Any

from trunkline.engine.errors import DataError
from trunkline.models.text.sources import Place, Problem

_SHOWN = 3
_SHOWN_IN_ERROR = 10
_MOST_REASONS = 200
_LONGEST_REASON = 400


class Tally:
    """Counts reasons; holds only the first few places of each, and a bounded number of reasons."""

    def __init__(self) -> None:
        self._reasons: dict[str, tuple[int, list[str]]] = {}

    def add(self, place: Place, reason: str) -> None:
        """Note the record at `place`."""
        reason = reason[:_LONGEST_REASON]  # a field may have any name, and a template say anything
        if reason not in self._reasons and len(self._reasons) >= _MOST_REASONS:
            reason = "other reasons"
        count, places = self._reasons.get(reason, (0, []))
        self._reasons[reason] = count + 1, places if len(places) == _SHOWN else [*places, str(place)]

    def to_json(self) -> dict[str, Any]:
        """{reason: {"count": n, "first": [place, ...]}}, the most frequent first."""
        ordered = sorted(self._reasons.items(), key=lambda item: (-item[1][0], item[0]))
        return {reason: {"count": count, "first": places} for reason, (count, places) in ordered}


class Skipped:
    """Counts problems; holds only the first few of each reason."""

    def __init__(self, max_bad_fraction: float) -> None:
        self._max_bad_fraction = max_bad_fraction
        self._first: list[Problem] = []
        self._tally = Tally()
        self.count = 0

    def add(self, problem: Problem) -> None:
        """Note a record that is left out."""
        self.count += 1
        if len(self._first) < _SHOWN_IN_ERROR:
            self._first.append(problem)
        self._tally.add(problem.place, problem.reason)

    def check(self, records: int) -> None:
        """Raises DataError if more than the fraction allowed of `records` records, good and bad, are left out."""
        if self.count > self._max_bad_fraction * records:
            shown = "\n".join(f"  {problem}" for problem in self._first)
            raise DataError(
                f"{self.count:,} of {records:,} records cannot be used, more than --max-bad-fraction "
                f"{self._max_bad_fraction:g} allows; mend them. The first:\n{shown}"
            )

    def to_json(self) -> dict[str, Any]:
        """See Tally.to_json."""
        return self._tally.to_json()


def remarks(index: dict[str, Any]) -> list[str]:
    """What a store's index says of its tokenizer and records, for a person to read: one line per reason."""
    overrides = [line] if (line := index.get("overrides")) else []
    return overrides + [
        f"{entry['count']:,} {what}: {reason} ({', '.join(entry['first'])}{', ...' * (entry['count'] > _SHOWN)})"
        for name, what in (("skipped", "left out"), ("noted", "kept"))
        for reason, entry in index.get(name, {}).items()
    ]
