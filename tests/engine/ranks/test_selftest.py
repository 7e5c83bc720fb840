from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed_test
from trunkline.engine.errors import TrunklineError
from trunkline.engine.ranks.selftest import collective_self_test

pytestmark = pytest.mark.distributed
CPU = torch.device("cpu")


def _passes(rank: int, world_size: int) -> bool:
    collective_self_test(CPU)
    return True


def _breaks(rank: int, world_size: int, fault: str) -> str:
    """Put a fault into one of torch's collectives on rank 1 and return what the self-test says of it."""
    sum_of_all, gather = dist.all_reduce, dist.all_gather_into_tensor

    def does_nothing(x: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        sum_of_all(x.clone(), op=op)

    def off_by_one(x: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        sum_of_all(x, op=op)
        if op == dist.ReduceOp.SUM and x.dtype == torch.bfloat16:
            x[5] += 1

    def swaps_ranks(whole: torch.Tensor, x: torch.Tensor) -> None:
        gather(whole, x)
        whole.copy_(whole.reshape(world_size, -1).flip(0).flatten())

    def raises(x: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        sum_of_all(x, op=op)
        if op == dist.ReduceOp.AVG and x.dtype == torch.float16:
            raise RuntimeError("no average of half precision\nand a long tail")

    if rank == 1:
        if fault == "swaps_ranks":
            dist.all_gather_single = dist.all_gather_into_tensor = swaps_ranks
        else:
            dist.all_reduce = {"does_nothing": does_nothing, "off_by_one": off_by_one, "raises": raises}[fault]
    try:
        collective_self_test(CPU)
    except TrunklineError as error:
        return str(error)
    return "passed"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_working_collectives_pass(world_size: int) -> None:
    assert run_distributed_test(_passes, world_size) == [True] * world_size


@pytest.mark.parametrize(
    ("fault", "named", "unnamed"),
    [
        ("does_nothing", "rank 1: sum in float32 gave", "all-gather"),
        ("off_by_one", "rank 1: sum in bfloat16 gave", "float16 gave 3"),
        ("swaps_ranks", "rank 1: all-gather in float16 gave", "sum"),
        ("raises", "rank 1: average in float16 failed: no average of half precision", "long tail"),
    ],
)
def test_a_faulty_collective_is_named_on_every_rank(fault: str, named: str, unnamed: str) -> None:
    first, second = run_distributed_test(_breaks, 2, fault)
    assert first == second
    assert named in first
    assert unnamed not in first
    assert "rank 0:" not in first
