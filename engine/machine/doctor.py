"""Can training start on this machine?

Every check is a finding: what was seen and, if need be, what to do.

    findings = examine()
    can_train(findings)

Nothing that is examined is imported at the top, so that a missing package is a finding and not a traceback.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trunkline.engine.machine.apex import find_apex

GIB = 2**30
LEAST_TORCH = (2, 11)
FSDP_TORCH = (2, 13)
_IS_CLONE = (Path(__file__).resolve().parents[2] / "constraints.txt").is_file()
INSTALL = "pip install -c constraints.txt -e ." if _IS_CLONE else "install Trunkline's wheel again, with pip"


@dataclass(frozen=True)
class Finding:
    """One check. A problem keeps training from starting; a warning does not."""

    name: str
    status: Literal["ok", "warning", "problem"]
    detail: str
    remedy: str = ""


def examine(quick: bool = False) -> list[Finding]:
    """All findings, in order. A `quick` look leaves out what starts other processes, some ten seconds."""
    checks: list[Callable[[], Iterator[Finding]]] = [_python, _versions, _apex, _devices, _disk, _memory]
    if not quick:
        checks += [_imports, _collectives]
    findings = []
    for check in checks:
        try:
            findings += list(check())
        except Exception as error:  # a check that breaks must not hide what the others find
            findings.append(Finding(check.__name__.strip("_"), "warning", f"not checked: {error!r}"))
    return findings


def can_train(findings: Sequence[Finding]) -> bool:
    """True if no finding is a problem."""
    return all(finding.status != "problem" for finding in findings)


def _python() -> Iterator[Finding]:
    detail = f"{platform.python_version()} at {sys.executable}, {platform.system()} {platform.machine()}"
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        yield Finding("python", "problem", detail, "use Python 3.10, 3.11, 3.12 or 3.13")
    elif platform.system() != "Linux":
        yield Finding("python", "problem", detail, "use Linux")
    else:
        yield Finding("python", "ok", detail)


def _versions() -> Iterator[Finding]:
    for name in ("torch", "deepspeed", "numpy", "scipy", "polars", "pydantic", "safetensors", "matplotlib"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name == "deepspeed":
                yield Finding(name, "warning", "not installed: runs train with --backend fsdp", INSTALL)
            else:
                yield Finding(name, "problem", "not installed", INSTALL)
            continue
        release = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
        if name == "torch" and release < LEAST_TORCH:
            yield Finding(name, "problem", f"{version} is too old", INSTALL)
        elif name == "torch" and release < FSDP_TORCH:
            yield Finding(name, "warning", f"{version}: --backend fsdp trains on one rank only before 2.13", INSTALL)
        else:
            yield Finding(name, "ok", version)
    try:
        yield Finding("triton", "ok", importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        yield Finding("triton", "ok", "not installed: the kernels run their PyTorch paths")


def _apex() -> Iterator[Finding]:
    apex = find_apex()
    if apex is None:
        yield Finding("apex", "ok", "not installed: PyTorch's own fused optimizers are used")
    elif apex.owner == "nvidia":
        extensions = "with its CUDA extensions" if apex.has_cuda_extensions else "without its CUDA extensions"
        yield Finding("apex", "ok", f"NVIDIA's, version {apex.version}, {extensions}")
    else:
        detail = f"{apex.folder} (version {apex.version}) is not NVIDIA's but the unrelated web toolkit of that name"
        yield Finding("apex", "warning", detail, "pip uninstall apex; NVIDIA's is built from its own sources")


_IMPORTS = """
import importlib, json, sys
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
        print(json.dumps([True, getattr(module, "__version__", "")]))
    except Exception as error:
        print(json.dumps([False, f"{type(error).__name__}: {error}"]))
"""


def _imports() -> Iterator[Finding]:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    has = f"a C++ compiler is at {compiler}" if compiler else "there is no C++ compiler, and none is needed"
    here = Path(sys.executable).parent
    outcome = subprocess.run(
        [sys.executable, "-c", _IMPORTS, "deepspeed", "torch.utils.tensorboard"],
        capture_output=True, text=True, timeout=180, check=False,
        env={**os.environ, "PATH": str(here)},  # no compiler, no nvcc
    )  # fmt: skip
    answers = [json.loads(line) for line in outcome.stdout.splitlines() if line.startswith(("[true", "[false"))]
    died = [False, f"Python ended with status {outcome.returncode}: {outcome.stderr[-500:]}"]
    (deepspeed, said), (tensorboard, complaint) = [*answers, died, died][:2]
    if not any(True for _ in importlib.metadata.distributions(name="deepspeed")):
        pass  # that it is not there has been said
    elif deepspeed:
        yield Finding("deepspeed import", "ok", f"works without a compiler; {has}")
    else:
        apex = find_apex()
        blamed = apex is not None and apex.owner == "other"  # DeepSpeed imports whatever is named apex
        yield Finding("deepspeed import", "problem", said, "pip uninstall apex" if blamed else INSTALL)
    if tensorboard:
        yield Finding("tensorboard", "ok", importlib.metadata.version("tensorboard"))
    else:
        choice = f"{INSTALL}, or train with --set training.trackers=[]"
        yield Finding("tensorboard", "problem", complaint, choice)
    if (here / "deepspeed").exists():
        yield Finding("deepspeed launcher", "ok", str(here / "deepspeed"))
    else:
        found = shutil.which("deepspeed") or "none"
        yield Finding(
            "deepspeed launcher", "warning", f"none beside {sys.executable}; on the path: {found}",
            f"{INSTALL}, or start single processes with python launchers/train.py",
        )  # fmt: skip


def _devices() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0))
    yield Finding("cpu", "ok", f"{cores} cores for this process, {torch.get_num_threads()} threads in PyTorch")
    if not torch.cuda.is_available():
        if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
            yield Finding(
                "gpu", "warning", f"this machine has an NVIDIA device, but PyTorch ({built}) cannot use it",
                "compare the driver (nvidia-smi) with the CUDA version that PyTorch was built for",
            )  # fmt: skip
        else:
            yield Finding("gpu", "ok", "none: training runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        detail = f"{properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        if float((ones @ ones).sum()) == 64**3:
            yield Finding(f"gpu {index}", "ok", detail)
        else:
            yield Finding(f"gpu {index}", "problem", f"{detail}; it computes a wrong product", "replace the device")


def _collectives() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Finding("collectives", "problem", "PyTorch is built without torch.distributed", INSTALL)
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield _self_test("gloo", 2, {"CUDA_VISIBLE_DEVICES": ""})
    if gpus >= 2:
        yield _self_test("nccl", gpus, {})
    elif gpus:
        version = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "missing"
        yield Finding("nccl", "ok", f"{version}; one GPU has nobody to talk to")


def _self_test(backend: str, world_size: int, environment: dict[str, str]) -> Finding:
    """trunkline.engine.ranks.selftest on `world_size` new processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trunkline.engine.ranks.selftest", str(Path(folder, "meeting"))]
        ranks = [
            subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                env={**os.environ, **environment, "RANK": str(rank), "WORLD_SIZE": str(world_size)},
            )
            for rank in range(world_size)
        ]  # fmt: skip
        errors = []
        try:
            for process in ranks:
                _, stderr = process.communicate(timeout=180)
                if process.returncode != 0:
                    errors.append(stderr.strip())
        except subprocess.TimeoutExpired:
            errors.append("no answer after 180 s")
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    name = f"collectives over {backend}"
    if not errors:
        what = "sum, average, reduce-scatter and all-gather in fp32, bf16 and fp16 are right"
        return Finding(name, "ok", f"{what} on {world_size} processes")
    advice = "NCCL_DEBUG=INFO shows the links between GPUs" if backend == "nccl" else (
        "the host's name must resolve (see /etc/hosts), or GLOO_SOCKET_IFNAME=lo"
    )  # fmt: skip
    return Finding(name, "problem", errors[0][-2000:], advice)


def _disk() -> Iterator[Finding]:
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free / GIB
    detail = f"{free:.1f} GiB free at {folder}"
    if not os.access(folder, os.W_OK):
        yield Finding("disk", "warning", f"{folder} cannot be written", "choose another place: --output-dir")
    elif free < 1:
        yield Finding("disk", "problem", detail, "free some space, or choose another place: --output-dir")
    elif free < 20:
        yield Finding("disk", "warning", detail, "a checkpoint takes 12 to 16 bytes a parameter; see --plan")
    else:
        yield Finding("disk", "ok", detail)
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < GIB:
        size = shutil.disk_usage(shared).total / 2**20
        yield Finding(
            "shared memory", "warning", f"/dev/shm has {size:.0f} MiB, little for NCCL and for loading processes",
            "in a container: --shm-size=8g or --ipc=host",
        )  # fmt: skip


def _memory() -> Iterator[Finding]:
    import psutil

    free = psutil.virtual_memory().available / GIB
    detail = f"{free:.1f} of {psutil.virtual_memory().total / GIB:.1f} GiB free"
    if free < 1:
        yield Finding("memory", "problem", detail, "close other programs")
    elif free < 4:
        yield Finding("memory", "warning", detail, "expect only small models to fit")
    else:
        yield Finding("memory", "ok", detail)
