"""Time and peak memory of one training step of a fluid configuration.

    python launchers/bench.py fluid_step --config configs/fluid/small.json

One sample, T minutes of V = 6,712 variables: forward, loss, backward, clipping and AdamW, in fp32 or, on a GPU, under
bf16 autocast. Values are random: no data set is needed.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from trunkline.engine.config.run_config import load_config
from trunkline.models.fluid.network import FluidDecoder
from trunkline.models.registry import config_sections

REFERENCE_BOUNDARY, REFERENCE_STATES = 538, 6174


def run(arguments: argparse.Namespace) -> int:
    """Time the steps and print what they took. Returns the exit status."""
    config = load_config(arguments.config, sections=config_sections)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.training.seed)
    model = FluidDecoder(
        config.model.shape,
        num_boundary=REFERENCE_BOUNDARY,
        num_states=REFERENCE_STATES,
        history=config.data.history,
        target=config.model.target,
        input_noise=config.model.input_noise,
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-5)
    variables = REFERENCE_BOUNDARY + REFERENCE_STATES
    x = torch.randn(arguments.micro_batch, config.data.history, variables, device=device)
    target = torch.randn_like(x[..., REFERENCE_BOUNDARY:])
    mask = torch.ones_like(target, dtype=torch.bool)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{arguments.config}: {parameters:,} parameters, {x.numel():,} tokens, {_where(device)}", flush=True)
    for step in range(arguments.steps):
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            total, count = model(x, target, mask)
        loss = total / count
        value = loss.item()
        forward = time.perf_counter() - begin
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        whole = time.perf_counter() - begin
        print(f"step {step + 1}: {whole:.1f} s (forward {forward:.1f} s), loss {value:.4f}, gradient norm {norm:.4f}")
    print(f"peak memory: {_peak_gib(device):.2f} GiB")
    return 0


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} threads"


def _peak_gib(device: torch.device) -> float:
    """Of the device, or on a CPU resident memory of this process, PyTorch itself included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
