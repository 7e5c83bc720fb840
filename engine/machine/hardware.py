"""What the machine offers and what of it is in use.

choose_device(name)         the device that a person named, or the GPU where there is one
has_bf16_units(device)      whether it computes in bf16 itself
peak_flops(device, dtype)   the device's dense peak rate in FLOP/s, or None where it is not known
memory_in_use(device)       GiB in use by this process, by name
peak_memory(device)         GiB at most since reset_peak_memory(device)
keep_freed_memory()         for the next step, on a CPU
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from trunkline.engine.errors import CheckpointError

GIB = 2**30


class Peak(NamedTuple):
    """Dense rates of one device in TFLOP/s, without sparsity. None: the device cannot, or the vendor does not say."""

    bf16: float | None
    fp16: float | None
    tf32: float | None
    fp32: float | None


# By the words of the device's name; the first row whose words all occur is taken, so the narrower row stands first.
# From the vendors' data sheets and architecture papers (NVIDIA: Volta, Turing, Ampere, Ada, Hopper and Blackwell;
# AMD: CDNA 2, 3 and 4), at boost clock. Tensor-core rates are those with fp32 accumulation; data sheets that only
# give rates with 2:4 sparsity are halved. An MI250X counts as its two dies do: as two devices.
_PEAKS: tuple[tuple[tuple[str, ...], Peak], ...] = (
    (("GB200",), Peak(2500, 2500, 1250, 80)),
    (("B300",), Peak(2250, 2250, 1125, 75)),
    (("B200",), Peak(2250, 2250, 1125, 75)),
    (("H200", "NVL"), Peak(835.5, 835.5, 417.5, 60)),
    (("H200",), Peak(989.4, 989.4, 494.7, 66.9)),
    (("GH200",), Peak(989.4, 989.4, 494.7, 66.9)),
    (("H100", "PCIe"), Peak(756, 756, 378, 51)),
    (("H100", "NVL"), Peak(835.5, 835.5, 417.5, 60)),
    (("H100",), Peak(989.4, 989.4, 494.7, 66.9)),
    (("H800",), Peak(989.4, 989.4, 494.7, 66.9)),
    (("H20",), Peak(148, 148, 74, 44)),
    (("A100",), Peak(312, 312, 156, 19.5)),
    (("A800",), Peak(312, 312, 156, 19.5)),
    (("A40",), Peak(149.7, 149.7, 74.8, 37.4)),
    (("A30",), Peak(165, 165, 82, 10.3)),
    (("A10G",), Peak(70, 70, 35, 31.5)),
    (("A10",), Peak(125, 125, 62.5, 31.2)),
    (("A6000",), Peak(154.8, 154.8, 77.4, 38.7)),
    (("6000", "Ada"), Peak(364.2, 364.2, 182.1, 91.1)),
    (("L40S",), Peak(362, 362, 183, 91.6)),
    (("L40",), Peak(181, 181, 90.5, 90.5)),
    (("L4",), Peak(121, 121, 60.5, 30.3)),
    (("V100", "PCIE"), Peak(None, 112, None, 14)),
    (("V100",), Peak(None, 125, None, 15.7)),
    (("T4",), Peak(None, 65, None, 8.1)),
    (("RTX", "5090"), Peak(209.5, 209.5, 104.8, 104.8)),
    (("RTX", "4090"), Peak(165.2, 165.2, 82.6, 82.6)),
    (("RTX", "3090"), Peak(71, 71, 35.6, 35.6)),
    (("MI355X",), Peak(2516.6, 2516.6, None, 157.3)),
    (("MI325X",), Peak(1307.4, 1307.4, 653.7, 163.4)),
    (("MI300X",), Peak(1307.4, 1307.4, 653.7, 163.4)),
    (("MI250X",), Peak(191.5, 191.5, None, 23.9)),
)

# slices of a device, and chips that share only the name
_OTHERS = {"MIG", "GRID", "LAPTOP", "MAX-Q", "MOBILE", "D", "V2", "TI"}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The dense peak rate of `device` for matrix products in `dtype`, in FLOP/s; None for a CPU or an unknown GPU.

    fp32 counts at the TF32 rate where torch.set_float32_matmul_precision allows TF32.
    """
    if device.type != "cuda":
        return None
    return peak_by_name(torch.cuda.get_device_name(device), dtype, torch.get_float32_matmul_precision() != "highest")


def peak_by_name(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """`peak_flops` for a device of this name, as the driver reports it; `tf32` lets fp32 products use TF32."""
    words = {word.upper() for word in re.split(r"[\s\-_/]+", name)}
    if words & _OTHERS:
        return None
    for wanted, peak in _PEAKS:
        if words >= {word.upper() for word in wanted}:
            rates = {torch.bfloat16: peak.bf16, torch.float16: peak.fp16, torch.float32: peak.fp32}
            rate = (tf32 and dtype == torch.float32 and peak.tf32) or rates.get(dtype)
            return rate * 1e12 if rate else None
    return None


def choose_device(name: str | None) -> torch.device:
    """The named device, or the GPU where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"--device {name}: not usable here: {str(error).splitlines()[0]}") from error
    return device


def has_bf16_units(device: torch.device) -> bool:
    """Whether the device computes in bf16 itself; without, it emulates it, many times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in _BF16_UNITS)


_BF16_UNITS = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")
"""Any of them, as torch.cpu.get_capabilities names them on x86-64 and on Arm."""


def memory_in_use(device: torch.device) -> dict[str, float]:
    """GiB by name: resident memory of this process, and on a GPU the most that tensors have held since the start."""
    values = {"host_memory_gib": psutil.Process().memory_info().rss / GIB}
    if device.type == "cuda":
        values["gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    return values


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # proc_pid_clear_refs(5): the peak resident set size becomes the present one


def peak_memory(device: torch.device) -> float:
    """GiB that tensors have held at most on a GPU, or that this process has on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / GIB
    return psutil.Process().memory_info().rss / GIB  # not Linux


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees for what it allocates next, up to 1 GiB.

    Else a step gives its activations back to the system and gets them again page by page, each filled with zeros.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not musl
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that it takes
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
