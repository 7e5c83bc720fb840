import subprocess
import sys

import pytest
import torch

from trunkline.engine.machine.hardware import GIB, memory_in_use, peak_by_name, peak_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_the_bf16_peak_is_found_by_the_name_that_the_driver_reports(name: str, tflops: float) -> None:
    assert peak_by_name(name, torch.bfloat16) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "GRID A100-10C",
        "NVIDIA Imaginary 9000",
        "",
    ],
)
def test_a_slice_a_namesake_and_an_unknown_device_have_no_known_peak(name: str) -> None:
    assert peak_by_name(name, torch.bfloat16) is None


def test_what_a_device_cannot_do_has_no_peak() -> None:
    assert peak_by_name("Tesla V100-SXM2-16GB", torch.bfloat16) is None
    assert peak_by_name("Tesla V100-SXM2-16GB", torch.float16) == pytest.approx(125e12)
    assert peak_by_name("Tesla V100-PCIE-32GB", torch.float16) == pytest.approx(112e12)
    assert peak_by_name("NVIDIA H200", torch.int8) is None


def test_fp32_counts_at_the_tf32_rate_only_where_allowed() -> None:
    assert peak_by_name("NVIDIA A100-SXM4-80GB", torch.float32) == pytest.approx(19.5e12)
    assert peak_by_name("NVIDIA A100-SXM4-80GB", torch.float32, tf32=True) == pytest.approx(156e12)
    assert peak_by_name("Tesla T4", torch.float32, tf32=True) == pytest.approx(8.1e12)


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu"), torch.float32) is None


def test_resident_memory_grows_with_what_is_touched() -> None:
    device = torch.device("cpu")
    before = memory_in_use(device)["host_memory_gib"]
    block = torch.ones(GIB // 16)  # 256 MiB of fp32
    after = memory_in_use(device)["host_memory_gib"]
    assert 0.2 < after - before < 0.5
    assert block.sum() == GIB // 16


_STEPS = """
import resource
import numpy as np
from trunkline.engine.machine.hardware import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [np.ones(1 << 17) for _ in range(64)]  # 64 MiB, and smaller than what numpy asks huge pages for
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults(), faults()
keep_freed_memory()
print(*before, faults(), faults())
"""


def test_memory_that_is_freed_is_kept_for_the_next_step() -> None:
    found = subprocess.run([sys.executable, "-c", _STEPS], capture_output=True, text=True, check=True).stdout
    _, without, first, later = map(int, found.split())
    assert later < min(without, first) / 10


@pytest.mark.gpu
def test_gpu_memory_is_measured() -> None:
    device = torch.device("cuda")
    block = torch.ones(2**28, device=device)
    assert memory_in_use(device)["gpu_memory_gib"] >= block.nbytes / GIB
