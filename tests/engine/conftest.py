"""One rank in fp32 shares nothing, so it runs neither ZeRO nor fully_shard. In the tests of this folder it does."""

from __future__ import annotations

import pytest

from trunkline.engine.config import deepspeed_section

shares_nothing = deepspeed_section.shares_nothing


@pytest.fixture(autouse=True)
def one_rank_runs_what_several_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_section, "shares_nothing", lambda section, world_size: False)
