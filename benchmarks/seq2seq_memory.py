"""What training an encoder-decoder keeps for the backward pass, and its time, whole and with a frozen encoder.

    run(arguments)   `python launchers/bench.py seq2seq_memory`

Bytes are those of the tensors that autograd keeps, each once and without parameters, over the whole network and its
loss. They are counted on tensors without values, so that the device need not hold them. With --steps, the CPU time of
forward and backward is measured too, which needs the memory.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trunkline.models.seq2seq.build import head_of, hf_config_of, make_network
from trunkline.models.seq2seq.config import Seq2SeqModel
from trunkline.models.seq2seq.network import Seq2Seq

ATTENTIONS = ("trunkline", "sdpa", "eager")


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each attention, whole and frozen."""
    size = arguments.batch_size, arguments.source_length, arguments.target_length
    what = f"{arguments.preset}, {size[0]} x ({size[1]} + {size[2]}), {arguments.dtype}"
    print(f"{what}: kept for backward" + (f"; CPU time, median of {arguments.steps}" if arguments.steps else ""))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    for attention in ATTENTIONS:
        for frozen in (False, True):
            line = f"{attention:10} {'frozen encoder' if frozen else 'whole':15}"
            with FakeTensorMode():
                network = network_of(arguments.preset, attention, arguments.layers, frozen, dtype)
                line += f" {kept_bytes(network, batch_of(*size)) / 2**30:7.2f} GiB"
            if arguments.steps:
                network = network_of(arguments.preset, attention, arguments.layers, frozen, dtype)
                seconds = [_step_s(network, batch_of(*size)) for _ in range(arguments.steps + 1)][1:]
                line += f" {statistics.median(seconds):8.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"
            print(line, flush=True)
    return 0


def network_of(
    preset: str, attention: str, layers: int | None, frozen: bool, dtype: torch.dtype = torch.float32
) -> Seq2Seq:
    """A new network, in training mode, of the preset's depth or of `layers` blocks of each kind."""
    depth = {} if layers is None else {"num_layers": layers, "num_decoder_layers": layers}
    model = Seq2SeqModel.model_validate({"preset": preset, "attention": attention} | depth)
    network = make_network(model, hf_config_of(model), head_of(model)).train()
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)  # network.to would swap tensors, which those without values refuse
    if frozen:
        network.lm.encoder.requires_grad_(False)
    return network


def batch_of(batch_size: int, source_length: int, target_length: int) -> dict[str, Tensor]:
    """What the network reads: one pair a row, without padding."""
    source, target = (torch.ones(batch_size, n, dtype=torch.int64) for n in (source_length, target_length))
    return {
        "input_ids": source, "input_document": source - 1, "decoder_input_ids": target, "target_document": target - 1,
        "targets": target,
    }  # fmt: skip


def kept_bytes(network: Seq2Seq, batch: dict[str, Tensor]) -> int:
    """Bytes of the storages that autograd keeps between forward and backward, parameters not counted."""
    parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = network(**batch)
    del loss
    return sum(kept.values())


def _step_s(network: Seq2Seq, batch: dict[str, Tensor]) -> float:
    network.zero_grad()
    start = time.process_time()
    network(**batch).backward()
    return time.process_time() - start
