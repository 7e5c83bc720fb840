"""The environment that ranks start in, and what is done on rank 0 for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import run_distributed_test
from trunkline.engine.errors import CheckpointError, ConfigError, DataError
from trunkline.engine.ranks.distributed import on_main, start


def refuses_on_every_rank(rank: int, world_size: int) -> None:
    ranks = start()
    for error, message in (
        (ConfigError("a key"), "^a key$"),
        (DataError("a row"), "^a row$"),
        (CheckpointError("a file"), "^a file$"),
        (OSError(28, "No space left on device", "x"), r"^cannot: No space left on device \(x\); make room"),
        (KeyError("loss"), "^cannot: KeyError: 'loss'$"),
    ):

        def work(error: Exception = error) -> None:
            raise error

        kind = type(error) if isinstance(error, ConfigError | DataError) else CheckpointError
        with pytest.raises(kind, match=message) as raised:
            on_main(work, ranks, "cannot")
        assert raised.type is kind
    on_main(lambda: None, ranks, "cannot")


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_rank_0_cannot_do_is_the_same_error_on_all_ranks(world_size: int) -> None:
    run_distributed_test(refuses_on_every_rank, world_size)


def test_deepspeed_counts_the_ranks_of_a_cpu_without_starting_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    (tmp_path / "numactl").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "numactl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    start()
    assert CPU_Accelerator().device_count() == 1
    assert not (tmp_path / "started").exists()
