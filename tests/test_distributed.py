import os
import socket
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import find_free_port, run_distributed_test

pytestmark = pytest.mark.distributed


def _sum_over_ranks(rank: int, world_size: int, scale: float) -> tuple[float, str]:
    total = torch.tensor(rank * scale)
    dist.all_reduce(total)
    assert dist.get_world_size() == world_size
    return total.item(), os.environ["LOCAL_RANK"]


def _fail_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one does not like this")
    dist.barrier()


def _hang(rank: int, world_size: int) -> None:
    time.sleep(3600)


def _group_exists_and_setting(rank: int, world_size: int) -> tuple[bool, str]:
    return dist.is_initialized(), os.environ["TRUNKLINE_TEST_SETTING"]


def test_results_come_back_by_rank() -> None:
    assert run_distributed_test(_sum_over_ranks, 3, 2.0) == [(6.0, "0"), (6.0, "1"), (6.0, "2")]


def test_a_failing_rank_is_reported_though_the_others_wait_for_it() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1 failed(.|\n)*rank one does not like this"):
        run_distributed_test(_fail_on_rank_1, 2, timeout_s=60)
    assert time.monotonic() - start < 30


def test_a_hanging_rank_is_killed_and_named() -> None:
    with pytest.raises(AssertionError, match="rank 0 was still running after 3 s"):
        run_distributed_test(_hang, 1, backend=None, timeout_s=3)


def test_without_a_backend_no_process_group_is_made_and_the_environment_is_passed_on() -> None:
    environment = {"TRUNKLINE_TEST_SETTING": "on"}
    results = run_distributed_test(_group_exists_and_setting, 1, backend=None, environment=environment)
    assert results == [(False, "on")]


def test_a_free_port_can_be_bound(free_port: int) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port))
    assert find_free_port() > 0
