"""Who this rank is, its device, and the few collectives that the engine needs."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trunkline.engine.errors import CheckpointError, ConfigError, TrunklineError
from trunkline.engine.machine import stopping
from trunkline.engine.machine.hardware import keep_freed_memory
from trunkline.engine.machine.log import LOG
from trunkline.engine.ranks import agreement
from trunkline.engine.ranks.launch import local_world_size, read_launch
from trunkline.engine.ranks.start_facts import code_version
from trunkline.engine.task import Sums

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `start` and read_launch may put into the environment."""


@dataclass(frozen=True)
class Ranks:
    """This process among all. `group` is the process group that the collectives below use; None is the default one."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    group: Any = None

    @property
    def is_main(self) -> bool:
        """True on the one process that prints, draws and writes what is not sharded."""
        return self.rank == 0


def launched_world_size() -> int:
    """The number of ranks that the launcher announced. Raises ConfigError."""
    return read_launch().world_size


def start(timeout_s: float = 1800.0) -> Ranks:
    """Join the processes that were started together (launch.py says by whom); alone, be a world of one. NCCL on
    GPUs, else gloo. Collectives wait twice as long as `timeout_s`: a watchdog, which names the rank, comes first.

    Raises:
        ConfigError: on all ranks, if they do not all come within `timeout_s`, or differ in code or kind of device.
    """
    launch = read_launch()
    device = _device(launch.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _share_cores()
        keep_freed_memory()
    # DeepSpeed's launcher says it; without, ZeRO 3 on a CPU asks numactl for it twice a step
    os.environ["LOCAL_SIZE"] = str(local_world_size() if launch.world_size > 1 else 1)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if launch.world_size > 1:
            facts = {"WORLD_SIZE": launch.world_size, "device": device.type}
            store = agreement.meet(launch, facts | code_version(), timeout_s)
        else:
            store = dist.HashStore()
            if launch.note:
                LOG.info(f"note: {launch.note}")
            # DeepSpeed reads these even where there is nobody to meet
            os.environ |= {"RANK": "0", "LOCAL_RANK": str(launch.local_rank), "WORLD_SIZE": "1"}
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", "29500")
        timeout = datetime.timedelta(seconds=2 * timeout_s)
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
    return Ranks(launch.rank, launch.world_size, launch.local_rank, device)


def _device(local_rank: int) -> torch.device:
    """The GPU of this rank, or the CPU where there is none. Raises ConfigError where there are too few."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank < count:
        return torch.device("cuda", local_rank)
    raise ConfigError(
        f"LOCAL_RANK={local_rank}: this machine shows {count} GPU{'s' * (count > 1)} to this process "
        f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'is not set')}); start one rank for each GPU"
    )


def _share_cores() -> None:
    """Give each rank of this machine its share of the cores, where the launcher and the user did not."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size()))


def stop() -> None:
    """Leave the process group; without this a rank aborts at exit."""
    if dist.is_initialized():
        theirs = sys.modules.get("deepspeed.comm.comm")  # which also lets go of the groups that DeepSpeed remembers
        (dist if theirs is None or theirs.cdb is None else theirs).destroy_process_group()


@contextmanager
def world(timeout_s: float = 1800.0) -> Iterator[Ranks]:
    """`start`, for what is a part of a program: afterwards the environment, the number of threads and the process
    group are as they were, so that it can be done again. On a CPU, glibc goes on keeping freed memory.

    An error is told to the ranks that wait for this one at the start, and the loss of a rank is an error that says so.
    Raises as `start` does.
    """
    environment = {name: os.environ.get(name) for name in _VARIABLES}
    threads, is_ours = torch.get_num_threads(), not dist.is_initialized()
    try:
        yield start(timeout_s)
    except Exception as error:
        is_ours &= not stopping.is_listening()  # a program prints its message before it leaves those that it waits for
        if not lost_a_rank(error):
            agreement.tell(error)
            raise
        raise TrunklineError(f"another rank has ended, so this one stops: {str(error)[:200]}") from error
    finally:
        if is_ours:
            stop()
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def sum_over_ranks(sums: Sums, ranks: Ranks) -> Sums:
    """The entries of `sums` added over all ranks, in one all-reduce of fp64. Shapes are kept."""
    if ranks.world_size == 1 or not sums:
        return sums
    flat = torch.cat([value.reshape(-1).to(torch.float64) for value in sums.values()])
    dist.all_reduce(flat, group=ranks.group)
    parts = flat.split([value.numel() for value in sums.values()])
    return {key: part.reshape(value.shape) for (key, value), part in zip(sums.items(), parts, strict=True)}


def sum_int64(values: list[int], ranks: Ranks) -> list[int]:
    """64-bit integers added over all ranks, place by place, modulo 2^64; as signed ones."""
    signed = [value - (1 << 64) if value >= 1 << 63 else value for value in values]
    if ranks.world_size == 1 or not values:
        return signed
    total = torch.tensor(signed, dtype=torch.int64, device=ranks.device)
    dist.all_reduce(total, group=ranks.group)
    return total.tolist()


def with_own_group(ranks: Ranks) -> Ranks:
    """The same ranks with a process group of their own on the CPU, for collectives beside those of training.

    It waits as long as the slowest disk takes.
    """
    if ranks.world_size == 1:
        return ranks
    return replace(ranks, group=dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1)))


def gather(value: T, ranks: Ranks) -> list[T]:
    """The (small, picklable) values of all ranks, on all ranks."""
    if ranks.world_size == 1:
        return [value]
    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value, group=ranks.group)
    return values


def from_main(value: T, ranks: Ranks) -> T:
    """Rank 0's (small, picklable) value, on all ranks: what is decided there is decided once for all."""
    if ranks.world_size == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, group=ranks.group)
    return box[0]


def on_main(work: Callable[[], object], ranks: Ranks, cannot: str) -> None:
    """Do `work` on rank 0 while the others wait. A TrunklineError of it is raised on all ranks, as it is. Whatever else
    it raises is a CheckpointError, which begins with `cannot`."""
    problem: TrunklineError | None = None
    if ranks.is_main:
        try:
            work()
        except OSError as error:
            problem = CheckpointError(
                f"{cannot}: {error.strerror} ({error.filename}); make room or choose another folder"
            )
        except TrunklineError as error:
            problem = error
        except Exception as error:  # whatever it is, the other ranks must hear of it
            problem = CheckpointError(f"{cannot}: {type(error).__name__}: {error}")
    problem = from_main(problem, ranks)
    if problem is not None:
        raise problem


def lost_a_rank(error: BaseException | None) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
