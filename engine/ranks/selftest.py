"""Collectives whose results are known: a look at every link between the ranks.

collective_self_test(device)           on all ranks, in the process group that is there
python -m trunkline.engine.ranks.selftest FILE   one rank of a test of its own: RANK and WORLD_SIZE say which,
                                       FILE is where the ranks meet; it runs on GPUs if there is one for each rank
"""

from __future__ import annotations

import datetime
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from trunkline.engine.errors import TrunklineError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ELEMENTS = 384  # of each rank, about


def collective_self_test(device: torch.device, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Sum, average, reduce-scatter and all-gather in each dtype, compared with what they must give.

    Values are small whole numbers, which fp16 and bf16 add up exactly, so sums are compared for equality.

    Raises:
        TrunklineError: on all ranks alike, naming every collective, dtype and rank that got something else.
    """
    world_size = dist.get_world_size()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
        failures = [
            f"{name} in {str(dtype).removeprefix('torch.')} {fault}"
            for dtype in dtypes
            for name, fault in _faults(dtype, dist.get_rank(), world_size, device)
        ]
    everywhere: list[list[str]] = [[] for _ in range(world_size)]
    dist.all_gather_object(everywhere, failures)
    lines = [f"rank {rank}: {line}" for rank, found in enumerate(everywhere) for line in found]
    if lines:
        raise TrunklineError(
            f"the ranks do not add up over {dist.get_backend()}:\n  " + "\n  ".join(lines) + "\n  Training would be "
            "wrong without a sign of it. Look at the links between the devices: NCCL_DEBUG=INFO shows them, and "
            "NCCL_P2P_DISABLE=1 goes round those between GPUs"
        )


def _faults(dtype: torch.dtype, rank: int, world_size: int, device: torch.device) -> Iterator[tuple[str, str]]:
    """Name and description of each collective that raised or gave a wrong result on this rank."""
    shard = max(1, _ELEMENTS // world_size)
    everyone = torch.stack([_contribution(other, shard * world_size, device) for other in range(world_size)])
    mine, total = everyone[rank], everyone.sum(0)
    cases: tuple[tuple[str, Callable[[Tensor], Tensor], Tensor, Tensor], ...] = (
        ("sum", _sum, mine, total),
        ("average", _average, mine, total / world_size),
        ("reduce-scatter", _reduce_scatter, mine, total[rank * shard : (rank + 1) * shard]),
        ("all-gather", _all_gather, mine, everyone.flatten()),
    )
    for name, collective, given, expected in cases:
        try:
            found = collective(given.to(dtype, copy=True)).to(torch.float32)
        except RuntimeError as error:
            yield name, f"failed: {str(error).splitlines()[0]}"
            continue
        # an average may be rounded, and so may a sum of hundreds of ranks; nothing else may
        exact = name != "average" and 3 * world_size <= 256
        allowed = 0.0 if exact else 2 * torch.finfo(dtype).eps * float(expected.abs().max())
        wrong = ~((found - expected).abs() <= allowed)
        if wrong.any():
            place = int(wrong.nonzero()[0])
            fault = f"gave {float(found[place]):g} for {float(expected[place]):g} at element {place}"
            yield name, f"{fault} ({int(wrong.sum())} of {len(wrong)} are wrong)"


def _contribution(rank: int, length: int, device: torch.device) -> Tensor:
    """What a rank brings, [length] fp32: whole numbers from 0 to 3 that differ from rank to rank and by place."""
    place = torch.arange(length, device=device)
    return ((place + place // 7 + rank) % 4).to(torch.float32)


def _sum(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x


def _average(x: Tensor) -> Tensor:
    dist.all_reduce(x, op=dist.ReduceOp.AVG)
    return x


def _reduce_scatter(x: Tensor) -> Tensor:
    shard = x.new_zeros(len(x) // dist.get_world_size())
    (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(shard, x)
    return shard


def _all_gather(x: Tensor) -> Tensor:
    whole = x.new_zeros(len(x) * dist.get_world_size())
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(whole, x)
    return whole


def main(meeting_point: str) -> int:
    """Be one rank of a self-test. Prints the error, if any, and returns the exit status."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank) if torch.cuda.device_count() >= world_size else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{os.path.abspath(meeting_point)}",
        rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    try:
        collective_self_test(device)
    except TrunklineError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
