"""Which process of a launch this is, from what the launcher put into the environment.

    launch = read_launch()      rank, number of ranks, and where they meet

The first of these that is there decides:

    RANK, WORLD_SIZE           torchrun, deepspeed, or a person: then MASTER_ADDR and MASTER_PORT too
    OMPI_*, MV2_*, PMI_*       a task of mpirun
    SLURM_PROCID               a task of srun; but a batch script and the shell of salloc are one process, whatever
                               SLURM_NTASKS says, and that is said
    none of them               one process

Tasks of mpirun and srun become one world: the variables of the first line are put into the environment, for DeepSpeed
and for whoever asks later.
"""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass, replace

from trunkline.engine.errors import ConfigError

_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),  # MVAPICH2
    ("PMI_RANK", "PMI_SIZE"),  # MPICH, Intel MPI, Cray
)
_LOCAL_RANKS = (
    "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID"
)  # fmt: skip
_LOCAL_SIZES = (
    "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"
)  # fmt: skip
_JOBS = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
_NO_STEP = 0xFFFFFFF0  # from here on, the numbers of Slurm's steps mean a batch script, a shell, ...
_ONE_PROCESS = "or unset RANK, WORLD_SIZE and LOCAL_RANK for one process"


@dataclass(frozen=True)
class Launch:
    """`local_rank` counts the ranks of one machine. `note` is for whoever starts the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 29500
    note: str = ""


def read_launch() -> Launch:
    """This process among all. Raises ConfigError for what does not fit together, with the command to type."""
    if not (_given("RANK") or _given("WORLD_SIZE")):
        launch = _scheduled()
        if launch.world_size == 1:
            return replace(launch, local_rank=_chosen_device())
        os.environ |= {
            "RANK": str(launch.rank), "WORLD_SIZE": str(launch.world_size), "LOCAL_RANK": str(launch.local_rank),
            "MASTER_ADDR": launch.address, "MASTER_PORT": str(launch.port),
        }  # fmt: skip
    size = _number("WORLD_SIZE", 1) if _given("WORLD_SIZE") else None
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if size != 1 else ("WORLD_SIZE",)
    if missing := [name for name in needed if not _given(name)]:
        have = ", ".join(f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if _given(name))
        raise ConfigError(
            f"the environment has {have}, but not {', '.join(missing)}: start with `torchrun --nproc_per_node N "
            f"launchers/train.py ...`, which sets all of them, {_ONE_PROCESS}"
        )
    assert size is not None
    rank = _number("RANK", 0, size - 1) if _given("RANK") else 0
    local_rank = _local_rank(size, 0) if size > 1 else _chosen_device()
    os.environ["LOCAL_RANK"] = str(local_rank)
    if _given("OMPI_COMM_WORLD_LOCAL_RANK"):  # DeepSpeed asserts that they are equal; torchrun may stand between them
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(local_rank)
    if size == 1:
        return Launch(local_rank=local_rank)
    return Launch(rank, size, local_rank, os.environ["MASTER_ADDR"], _number("MASTER_PORT", 1, 65535))


def _chosen_device() -> int:
    return _number("LOCAL_RANK", 0) if _given("LOCAL_RANK") else 0


def _local_rank(size: int, otherwise: int) -> int:
    if _given("LOCAL_RANK"):
        return _number("LOCAL_RANK", 0, size - 1)
    import torch  # which takes seconds, and whoever reads of one process alone need not wait

    if torch.cuda.device_count() == 1:  # as with --gpus-per-task=1, where each task sees its own alone
        return 0
    return next((_number(name, 0) for name in _LOCAL_RANKS if _given(name)), otherwise)


def local_world_size() -> int:
    """How many ranks share this machine, from the launcher: torchrun LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", *_LOCAL_SIZES, "WORLD_SIZE"):
        if _given(name):
            return _number(name, 1)
    return 1


def _scheduled() -> Launch:
    """A task of mpirun or srun; a world of one where there is none."""
    tasks = [names for names in _MPI if _given(names[0]) and _given(names[1])]
    step = os.environ.get("SLURM_PROCID"), os.environ.get("SLURM_STEP_NUM_TASKS")
    if tasks and step != tuple(os.environ[name] for name in tasks[0]):  # else srun speaks MPI's language too
        size = _number(tasks[0][1], 1)
        return _world(_number(tasks[0][0], 0, size - 1), size, "mpirun")
    if _given("SLURM_PROCID") or _given("SLURM_NTASKS"):
        return _slurm()
    for name in ("PMIX_RANK", *(rank_name for rank_name, _ in _MPI)):
        if _given(name):
            raise ConfigError(
                f"{name}={os.environ[name][:80]} says that this is one of several tasks, and nothing says of how many: "
                "start with `torchrun --nnodes M --nproc_per_node N launchers/train.py ...`, or give every task RANK, "
                "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; WORLD_SIZE=1 trains on one process"
            )
    return Launch()


def _slurm() -> Launch:
    size_name = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if _given(name)), "")
    size = _number(size_name, 1) if size_name else 1
    rank = _number("SLURM_PROCID", 0) if _given("SLURM_PROCID") else 0
    step = os.environ.get("SLURM_STEP_ID", "")
    in_step = _given("SLURM_STEP_NUM_TASKS") or (step.isdecimal() and int(step) < _NO_STEP)
    # a batch script is in a job, and its SLURM_PROCID is 0; salloc's shell has none
    if size > 1 and not in_step and (not _given("SLURM_PROCID") or (rank == 0 and _given("SLURM_JOB_ID"))):
        return Launch(
            note=f"{size_name} is {size}, but this process is no task of srun: training on one process. One run on all "
            "of them: srun python launchers/train.py ..."
        )
    if rank > 0 and not in_step and _given("SLURM_JOB_ID"):  # task 0 would take itself for the batch script
        raise ConfigError(
            f"SLURM_PROCID={rank}, but SLURM_STEP_ID is not set, so it is not known whether srun started other tasks: "
            "start all of them with `srun python launchers/train.py ...`, or set WORLD_SIZE=1 for one process"
        )
    if rank >= size:
        raise ConfigError(f"SLURM_PROCID={rank}, but there are {size} tasks ({size_name or 'SLURM_NTASKS'})")
    return _world(rank, size, "srun")


def _world(rank: int, size: int, starter: str) -> Launch:
    if size == 1:
        return Launch()
    sizes = _LOCAL_SIZES if starter == "mpirun" else ()
    local_size = next((_number(name, 1) for name in sizes if _given(name)), None)
    # mpirun starts itself on the machines of a job by a step of its own
    lists = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")[starter == "mpirun" :]
    hosts = next((os.environ[name] for name in lists if _given(name)), "")
    one_machine = local_size == size or (local_size is None and not re.search(r"[,\[]", hosts))
    address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if one_machine else first_host(hosts))
    if not address:
        raise ConfigError(
            f"{starter} started {size} tasks on several machines, and the address of rank 0 is not known: name its "
            "machine, with `mpirun -x MASTER_ADDR=HOST ...` (Open MPI) or `mpirun -genv MASTER_ADDR HOST ...` (MPICH, "
            "Intel MPI), or start with torchrun"
        )
    local_rank = _local_rank(size, rank if one_machine else 0)
    port = _number("MASTER_PORT", 1, 65535) if _given("MASTER_PORT") else _port()
    return Launch(rank, size, local_rank, address, port)


def first_host(hosts: str) -> str:
    """The first name of a list as Slurm writes it: gpu-[003-005,007],login1 gives gpu-003."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    assert first is not None
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _port() -> int:
    """A port that all tasks of a job choose alike and another job rarely does, below those that systems hand out."""
    job = "/".join(os.environ.get(name, "") for name in _JOBS)
    return 12_000 + zlib.crc32(job.encode()) % 20_000


def _given(name: str) -> bool:
    return bool(os.environ.get(name))


def _number(name: str, low: int, high: int | None = None) -> int:
    text = os.environ[name]
    wanted = f"from {low} to {high}" if high is not None else f"of at least {low}"
    if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= (int(text) if high is None else high):
        raise ConfigError(
            f"{name}={text[:80]} in the environment: expected a whole number {wanted}; start with torchrun, deepspeed, "
            f"srun or mpirun, which set it, {_ONE_PROCESS}"
        )
    return int(text)
