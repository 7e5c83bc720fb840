"""The shipped tiles of flash_attention, compiled for six architectures without a GPU."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from trunkline.benchmarks.compile_gate import (
    HEAD_DIMS,
    Configuration,
    Usage,
    exponentials_beside_products,
    limits_broken,
    rate_limit,
)

ROOT = Path(__file__).parents[2]
LOOP = Counter(HGMMA=8)


def gate(*arguments):
    """Run in a process of its own: in this one, Triton interprets."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "trunkline.benchmarks.compile_gate", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout)
    return done


@pytest.mark.parametrize(
    ("some", "tiles"),
    [
        (r"sm_90 .* D=64 |backward_hopper|sm_86|sm_100 .* D=64 |sm_120 .* D=(16|128) ", 8 + 1 + 4 + 3),
        pytest.param("sm_90|sm_86|sm_1.0", 29 + 1 + 12 + 5, marks=pytest.mark.slow),
        pytest.param("sm_80", 25, marks=pytest.mark.slow),
    ],
)
def test_a_tile_of_each_kind_fits_its_architecture(some, tiles):
    done = gate("--only", some)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(" registers, ") == tiles


def test_a_key_mask_without_a_causal_block_and_rows_of_8_modulo_16_values_and_the_deterministic_pass_fit_too():
    some = "forward bf16 D=64 full.mask|(forward|backward) bf16 D=72 causal.mask|backward_dkdv bf16 D=64 causal.mask"
    done = gate("--every", "--only", f"sm_90 ({some})")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(" registers, ") == 4


@pytest.mark.hours
@pytest.mark.parametrize("architecture", ["sm_90", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_tile_in_every_use_fits_its_architecture(architecture, dtype):
    done = gate("--every", "--only", f"{architecture} .* {dtype} ")
    assert done.returncode == 0, done.stdout
    of_gluon = 2 * 2 * 4 if architecture == "sm_90" and dtype != "fp32" else 0
    assert done.stdout.count(" registers, ") == len(HEAD_DIMS) * (5 * 4 + 1) + of_gluon  # passes, patterns


@pytest.mark.parametrize(
    ("usage", "broken"),
    [
        (Usage(168, 0, 0, 227 * 1024, True, False, 99, LOOP), []),
        (Usage(168, 96, 0, 0, True, False, 99, LOOP + Counter(FFMA=92, LDL=1)), []),
        (Usage(168, 8, 0, 0, True, False, 99, LOOP + Counter(FFMA=92, LDL=1, STL=1)), ["spills 8 bytes"]),
        (Usage(168, 8, 0, 0, True, False, 99, Counter()), ["spills 8 bytes", "no inner loop found"]),
        (Usage(255, 104, 0, 0, True, False, 99, LOOP), ["spills 104 bytes"]),
        (Usage(255, 0, 16, 0, True, False, 99, LOOP), ["spills 16 bytes"]),
        (Usage(168, 0, 0, 227 * 1024 + 1, True, False, 99, LOOP), ["needs 232449 bytes of shared memory"]),
        (Usage(168, 0, 0, 0, False, False, 99, LOOP), ["no wgmma"]),
        (Usage(168, 0, 0, 0, True, True, 99, LOOP), ["wgmma serialized"]),
        (Usage(168, 0, 0, 0, True, False, 99, Counter(HGMMA=8, FSEL=1)), ["mask arithmetic in the inner loop"]),
        (Usage(168, 0, 0, 0, True, False, 99, Counter()), ["no inner loop found"]),
        (Usage(168, 0, 0, 0, True, False, 7, LOOP), ["7 loads of 16 bytes, not 12"]),
    ],
)
def test_what_breaks_a_limit(usage, broken):
    assert limits_broken(Configuration(90, "forward", "bf16", 64, True, True), usage) == broken


def test_gluon_s_kernel_shares_a_multiprocessor_s_registers_and_overlaps_exponentials_with_products():
    configuration = Configuration(90, "forward_hopper", "bf16", 64, True, True)
    usage = Usage(128, 0, 0, 227 * 1024, True, False, 0, LOOP, exponentials_beside_products=True)
    assert limits_broken(configuration, usage) == []
    assert limits_broken(configuration, usage._replace(registers=136)) == ["more registers than there are"]
    assert limits_broken(configuration, usage._replace(exponentials_beside_products=False)) == [
        "exponentials wait for products"
    ]


def test_gluon_s_backward_kernel_may_spill_a_little_and_has_its_loading_warps_hand_over_registers():
    configuration = Configuration(90, "backward_hopper", "bf16", 64, True, True)
    usage = Usage(128, 400, 0, 0, True, False, 0, LOOP, spills_in_loops=16)
    assert limits_broken(configuration, usage) == []
    assert limits_broken(configuration, usage._replace(spills_in_loops=17)) == [
        "17 transfers of spilled registers in a loop"
    ]
    assert limits_broken(configuration, usage._replace(registers_handed_over=False)) == ["registers not handed over"]


@pytest.mark.parametrize(
    ("loop", "beside"),
    [
        ("HGMMA HGMMA DEPBAR MUFU FADD MUFU DEPBAR F2FP", True),
        ("HGMMA DEPBAR MUFU DEPBAR HGMMA", False),
        ("HGMMA DEPBAR MUFU DEPBAR MUFU", False),
        ("HGMMA MUFU DEPBAR MUFU DEPBAR", False),
        ("HGMMA DEPBAR MUFU", False),
    ],
)
def test_exponentials_beside_products_stand_between_the_two_waits(loop, beside):
    names = {"HGMMA": "HGMMA.64x128x16.F32.BF16", "DEPBAR": "WARPGROUP.DEPBAR.LE", "MUFU": "MUFU.EX2"}
    assert exponentials_beside_products([names.get(name, name) for name in loop.split()]) == beside


@pytest.mark.parametrize(
    ("loop", "what", "clocks"),
    [
        # 64 x 64 scores by 4 warps: 2 x 2 x 64 x 64 x 64 operations at 4,096 a clock
        ({"HGMMA": 8, "MUFU": 30, "FFMA": 200}, "tensor cores", 256),
        ({"HGMMA": 8, "MUFU": 34, "FFMA": 200}, "exponentials", 34 * 4 * 32 / 16),
        ({"HGMMA": 8, "MUFU": 34, "FFMA": 300}, "issue", 342 * 4 / 4),
    ],
)
def test_the_busiest_part_of_a_multiprocessor_limits_the_rate(loop, what, clocks):
    configuration = Configuration(90, "forward", "bf16", 64, True, True)
    assert configuration.tile[:3] == (64, 64, 4)
    limit = rate_limit(configuration, Usage(128, 0, 0, 0, True, False, 99, Counter(loop)))
    assert limit == (what, pytest.approx(4 * 64 * 64 * 64 / clocks * 132 * 1.83e9 / 1e12))


@pytest.mark.parametrize(("architecture", "kib"), [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)])
def test_shared_memory_is_that_of_the_architecture(architecture, kib):
    configuration = Configuration(architecture, "backward_delta", "bf16", 64, False, False)
    usage = Usage(64, 0, 0, kib * 1024, False, False, 99, Counter())
    assert limits_broken(configuration, usage) == []
    assert limits_broken(configuration, usage._replace(shared_bytes=kib * 1024 + 1)) == [
        f"needs {kib * 1024 + 1} bytes of shared memory"
    ]
