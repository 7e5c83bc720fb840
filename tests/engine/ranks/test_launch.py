"""Who a process is, from what launchers and people put into the environment."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed_test
from trunkline.engine.errors import ConfigError
from trunkline.engine.ranks.distributed import _device, start
from trunkline.engine.ranks.launch import Launch, first_host, read_launch

OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher's variable but those that a test sets, and none left behind."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name in OURS or name.startswith(("SLURM_", "OMPI_", "PMI", "MV2_", "MPI_")):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


WRONG = {
    "WORLD_SIZE=abc": "WORLD_SIZE=abc .* whole number of at least 1",
    "WORLD_SIZE=0": "WORLD_SIZE=0 .* of at least 1",
    "WORLD_SIZE=-2": "WORLD_SIZE=-2 .* of at least 1",
    "WORLD_SIZE=2": r"has WORLD_SIZE=2, but not RANK, MASTER_ADDR, MASTER_PORT: start with `torchrun",
    "RANK=3": "has RANK=3, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT",
    "RANK=0 WORLD_SIZE=2 MASTER_PORT=29500": "but not MASTER_ADDR",
    "RANK=5 WORLD_SIZE=1": "RANK=5 .* from 0 to 0",
    "RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1": "RANK=2 .* from 0 to 1",
    "RANK=-1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1": "RANK=-1 .* from 0 to 1",
    "RANK=1 WORLD_SIZE=2 LOCAL_RANK=x MASTER_ADDR=a MASTER_PORT=1": "LOCAL_RANK=x .* from 0 to 1",
    "RANK=1 WORLD_SIZE=2 LOCAL_RANK=2 MASTER_ADDR=a MASTER_PORT=1": "LOCAL_RANK=2 .* from 0 to 1",
    "RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=http": "MASTER_PORT=http .* from 1 to 65535",
    "RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=99999": "MASTER_PORT=99999 .* from 1 to 65535",
    "RANK=٣ WORLD_SIZE=4 MASTER_ADDR=a MASTER_PORT=1": "RANK=٣ .* from 0 to 3",
    "LOCAL_RANK=gpu0": "LOCAL_RANK=gpu0 .* of at least 0",
    "SLURM_PROCID=one SLURM_NTASKS=2": "SLURM_PROCID=one .* whole number",
    "SLURM_PROCID=2 SLURM_NTASKS=2 SLURM_STEP_ID=0": "SLURM_PROCID=2, but there are 2 tasks",
    "SLURM_JOB_ID=71 SLURM_PROCID=1 SLURM_NTASKS=2": "SLURM_STEP_ID is not set, .* with `srun python",
    "OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=2": "OMPI_COMM_WORLD_RANK=2 .* from 0 to 1",
    "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_SIZE=2": "mpirun -x MASTER_ADDR=HOST",
    "PMIX_RANK=1": "PMIX_RANK=1 says .* start with `torchrun",
    "PMI_RANK=1": "PMI_RANK=1 says .* start with `torchrun",
}


def put(settings: str) -> None:
    os.environ.update(item.split("=", 1) for item in settings.split())


@pytest.mark.parametrize("settings", WRONG)
def test_what_does_not_fit_together_is_one_clear_line(settings: str) -> None:
    put(settings)
    with pytest.raises(ConfigError, match=WRONG[settings]) as raised:
        read_launch()
    assert "\n" not in str(raised.value)


STEP = "SLURM_JOB_ID=71 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=4 SLURM_NTASKS=4"
RIGHT = {
    "": (0, 1, 0, None),
    "WORLD_SIZE=1": (0, 1, 0, None),
    "LOCAL_RANK=1": (0, 1, 1, None),
    "WORLD_SIZE=1 SLURM_LOCALID=3 SLURM_PROCID=3 SLURM_NTASKS=4": (0, 1, 0, None),  # a run of its own each
    "RANK= WORLD_SIZE=": (0, 1, 0, None),
    "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=a MASTER_PORT=5": (1, 2, 1, "a"),
    f"{STEP} SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_STEP_NODELIST=gpu[07-08]": (3, 4, 1, "gpu07"),
    f"{STEP} SLURM_PROCID=3 SLURM_LOCALID=3 SLURM_STEP_NODELIST=gpu07": (3, 4, 3, "127.0.0.1"),
    f"{STEP} SLURM_PROCID=1 SLURM_LOCALID=1 SLURM_JOB_NODELIST=b,a MASTER_ADDR=c": (1, 4, 1, "c"),
    # srun with --mpi=pmi2, in a step on some machines of the job
    f"{STEP} SLURM_PROCID=3 SLURM_LOCALID=1 PMI_RANK=3 PMI_SIZE=4 SLURM_STEP_NODELIST=b[2-3] SLURM_JOB_NODELIST=b[1-3]":
        (3, 4, 1, "b2"),
    # a batch script, salloc's shell, a shell that is a step of its own
    "SLURM_JOB_ID=71 SLURM_NTASKS=2 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_NODELIST=a[1-2]": (0, 1, 0, None),
    "SLURM_JOB_ID=71 SLURM_NTASKS=2 SLURM_PROCID=0 SLURM_STEP_ID=4294967291": (0, 1, 0, None),
    "SLURM_JOB_ID=71 SLURM_NTASKS=2 SLURM_PROCID=0 SLURM_STEP_ID=batch": (0, 1, 0, None),
    "SLURM_JOB_ID=71 SLURM_NTASKS=2": (0, 1, 0, None),
    "SLURM_JOB_ID=71 SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_ID=0 SLURM_PROCID=0": (0, 1, 0, None),
    # mpirun in a job of Slurm, whose own step starts one process a machine
    "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 "
    "SLURM_JOB_NODELIST=x[1,4] SLURM_STEP_NODELIST=x4 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1": (3, 4, 1, "x1"),
    "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2":
        (1, 2, 1, "127.0.0.1"),
    "MV2_COMM_WORLD_RANK=1 MV2_COMM_WORLD_SIZE=2 MV2_COMM_WORLD_LOCAL_RANK=1 MV2_COMM_WORLD_LOCAL_SIZE=2":
        (1, 2, 1, "127.0.0.1"),
    "PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2": (1, 2, 1, "127.0.0.1"),
    "PMI_RANK=0 PMI_SIZE=1": (0, 1, 0, None),
    # torchrun started by mpirun on each machine
    "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 MASTER_ADDR=a MASTER_PORT=5 OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 "
    "OMPI_COMM_WORLD_LOCAL_RANK=0": (3, 4, 1, "a"),
}  # fmt: skip


@pytest.mark.parametrize("settings", RIGHT)
def test_tasks_of_any_launcher_are_one_world_and_a_lone_process_is_one(settings: str) -> None:
    put(settings)
    launch = read_launch()
    rank, size, local_rank, address = RIGHT[settings]
    assert (launch.rank, launch.world_size, launch.local_rank) == (rank, size, local_rank)
    if size > 1:
        assert launch.address == os.environ["MASTER_ADDR"] == address
        assert read_launch() == launch  # also for those who read the launcher's variables later
        assert os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", str(local_rank)) == str(local_rank)


def test_a_batch_script_that_asked_for_tasks_says_that_it_is_one_process() -> None:
    put("SLURM_JOB_ID=71 SLURM_NTASKS=8 SLURM_PROCID=0")
    assert "SLURM_NTASKS is 8, but this process is no task of srun: training on one process" in read_launch().note
    put("SLURM_NTASKS=1")
    assert read_launch() == Launch()


def test_jobs_have_ports_of_their_own_and_their_tasks_one() -> None:
    ports = set()
    for job in range(20):
        for task in ("0", "1"):
            for name in OURS:
                os.environ.pop(name, None)
            put(f"SLURM_JOB_ID={job} SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_PROCID={task}")
            ports.add(read_launch().port)
    assert len(ports) == 20
    assert all(1024 < port < 32768 for port in ports)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu-[003-005,007],login1", "gpu-003"), ("n[1,3-4]", "n1"), ("a,b[1-2]", "a"),
        ("rack[1-2]node[05-06]", "rack1node05"), ("one", "one"), ("n[09-11].site", "n09.site"), ("", ""),
    ],
)  # fmt: skip
def test_the_first_machine_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_a_rank_without_a_gpu_of_its_own_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _device(1) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="LOCAL_RANK=2: this machine shows 2 GPUs"):
        _device(2)


def test_a_task_that_sees_its_own_gpu_alone_takes_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    put(f"{STEP} SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_STEP_NODELIST=gpu[07-08]")
    assert read_launch().local_rank == 0


def start_as_task(rank: int, world_size: int, settings: dict[str, str]) -> tuple[int, int, float]:
    for name in OURS:
        os.environ.pop(name, None)
    os.environ |= {name: value.format(rank=rank, size=world_size) for name, value in settings.items()}
    ranks = start(timeout_s=60.0)
    total = torch.tensor(float(ranks.rank + 1))
    dist.all_reduce(total)
    return ranks.rank, ranks.world_size, total.item()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings",
    [
        {"SLURM_NTASKS": "{size}", "SLURM_PROCID": "{rank}"},
        {"SLURM_JOB_ID": "99", "SLURM_STEP_ID": "3", "SLURM_NTASKS": "{size}", "SLURM_PROCID": "{rank}",
         "SLURM_LOCALID": "{rank}", "SLURM_JOB_NODELIST": "localhost"},
        {"OMPI_COMM_WORLD_RANK": "{rank}", "OMPI_COMM_WORLD_SIZE": "{size}", "OMPI_COMM_WORLD_LOCAL_RANK": "{rank}",
         "PMIX_NAMESPACE": "prterun-9"},
        {"PMI_RANK": "{rank}", "PMI_SIZE": "{size}"},
    ],
)  # fmt: skip
def test_two_tasks_of_a_scheduler_add_up(settings: dict[str, str]) -> None:
    job = {"PMI_JOBID": str(time.time_ns())}  # a port that no other test waits at
    assert run_distributed_test(start_as_task, 2, settings | job, backend=None) == [(0, 2, 3.0), (1, 2, 3.0)]
