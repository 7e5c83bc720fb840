"""A data set that is opened when it is first asked for anything, so that what needs none of it can do without.

store = opened_late(lambda: Store.open(folder))
store.fingerprint                                   opens it; raises MissingDataError where there is none
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def opened_late(open_it: Callable[[], Any]) -> Any:
    """What `open_it` returns, by its attributes. Every attribute may raise what `open_it` raises."""
    return _OpenedLate(open_it)


class _OpenedLate:
    def __init__(self, open_it: Callable[[], Any]) -> None:
        self.__dict__["_open_it"] = open_it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if "_opened" not in self.__dict__:
            self.__dict__["_opened"] = self.__dict__["_open_it"]()
        return getattr(self.__dict__["_opened"], name)
