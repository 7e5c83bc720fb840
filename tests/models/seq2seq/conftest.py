"""A toy store of pairs, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.seq2seq.toy_pairs import toy_store


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of some dozens of pairs of different lengths."""
    return toy_store(tmp_path_factory.mktemp("pairs"))
