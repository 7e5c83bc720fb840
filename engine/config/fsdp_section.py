"""What FSDP makes of each key of the "deepspeed" section.

It obeys the key, or refuses it with what to use instead.

A key that is refused passes where it holds the value that DeepSpeed has anyway, or one that asks for nothing: then
nothing is lost. Everything else is an error rather than a warning, also the sizes of DeepSpeed's buffers, which change
no result: somebody who tunes them should know that they are not what runs.

    python -m trunkline.engine.config.fsdp_section > docs/fsdp.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trunkline.engine.config import deepspeed_section
from trunkline.engine.config.deepspeed_section import REFUSED, DeepSpeedSection, parameter_dtype
from trunkline.engine.config.zero_section import REFUSED_ZERO
from trunkline.engine.errors import ConfigError


@dataclass(frozen=True)
class Obeyed:
    """A key with a meaning here. `only` holds the values that can be had, if not all can."""

    how: str
    only: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Refused:
    """A key without one. `passing` are the values that ask for nothing that FSDP does not do."""

    instead: str
    passing: tuple[Any, ...] = ()


Rule = Obeyed | Refused

_BY_BLOCK = "FSDP communicates block by block, as the model names its blocks"
_PREFETCHES = "FSDP gathers the next block while one is computed"

RULES: dict[str, Rule] = {
    "train_batch_size": Obeyed("the global batch"),
    "train_micro_batch_size_per_gpu": Obeyed("samples a rank computes at once"),
    "gradient_accumulation_steps": Obeyed("derived and checked"),
    "optimizer.type": Obeyed("torch.optim's classes, Adam and AdamW with DeepSpeed's meaning. Not Lamb, Lion, Muon and "
                             "MuAdam, which only DeepSpeed builds, nor Adafactor, which needs whole parameters: use "
                             "AdamW"),
    "optimizer.params": Obeyed("arguments of the class"),
    "optimizer.legacy_fusion": Refused("it chooses between DeepSpeed's own kernels", (False,)),
    "scheduler.type": Obeyed("all: DeepSpeed's five, torch's and the engine's, with the same rates step by step"),
    "scheduler.params": Obeyed("arguments of the schedule"),
    "gradient_clipping": Obeyed("by the global norm; 0 for none"),
    "bf16.enabled": Obeyed("parameters are gathered in bf16; shards and optimizer are fp32"),
    "bf16.immediate_grad_update": Refused("gradients are reduced in a block's backward anyway", (False,)),
    "bf16.check_grad_overflow": Refused("a step without a finite gradient is always skipped", (True,)),
    "bf16.bf16_master_weights_and_grads": Refused("shards are fp32", (False,)),
    "bf16.bf16_optimizer_states": Refused("optimizer states are fp32", (False,)),
    "fp16.enabled": Obeyed("parameters are gathered in fp16; shards and optimizer are fp32"),
    "fp16.auto_cast": Obeyed("the inputs of each block are cast to fp16"),
    "fp16.loss_scale": Obeyed("0 for a dynamic one"),
    "fp16.initial_scale_power": Obeyed("as in DeepSpeed"),
    "fp16.loss_scale_window": Obeyed("as in DeepSpeed"),
    "fp16.hysteresis": Obeyed("as in DeepSpeed"),
    "fp16.consecutive_hysteresis": Obeyed("as in DeepSpeed"),
    "fp16.min_loss_scale": Obeyed("as in DeepSpeed"),
    "fp16.fp16_master_weights_and_grads": Refused("shards are fp32", (False,)),
    "zero_optimization.stage": Obeyed("3: parameters are freed after each forward; 2: kept to the step's last "
                                      "backward; 1: gradients too are reduced once a step; 0: all replicated"),
    "zero_optimization.zero_hpz_partition_size": Obeyed("ranks that share one copy of the state, the copies being "
                                                        "replicas (HSDP); 1 for all ranks. It divides their number"),
    "zero_optimization.offload_optimizer.device": Obeyed("shards, gradients and optimizer states rest on the CPU "
                                                         "(they do anyway where that is the device)",
                                                         ("cpu", "none")),
    "zero_optimization.offload_optimizer.pin_memory": Obeyed("true by default"),
    "zero_optimization.offload_param.device": Obeyed("the same as offload_optimizer; needs stage 3",
                                                     ("cpu", "none")),
    "zero_optimization.offload_param.pin_memory": Obeyed("true by default"),
    "zero_optimization.offload_optimizer.*": Refused("only device and pin_memory mean something to FSDP"),
    "zero_optimization.offload_param.*": Refused("only device and pin_memory mean something to FSDP"),
    "zero_optimization.allgather_bucket_size": Refused(_BY_BLOCK, (500_000_000,)),
    "zero_optimization.allgather_partitions": Refused("parameters are always all-gathered", (True,)),
    "zero_optimization.stage3_allgather_sequential": Refused(_BY_BLOCK, (False,)),
    "zero_optimization.contiguous_gradients": Refused("a block's gradients always share one buffer", (True,)),
    "zero_optimization.enable_sanity_checks": Refused("use TORCH_DISTRIBUTED_DEBUG=DETAIL", (False,)),
    "zero_optimization.elastic_checkpoint": Refused("the engine writes checkpoints of its own", (False,)),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": Refused("final/ holds whole fp32 weights", (False,)),
    "zero_optimization.ignore_unused_parameters": Refused("an unused parameter has the gradient 0", (True,)),
    "zero_optimization.leaf_module": Refused(_BY_BLOCK),
    "zero_optimization.load_from_fp32_weights": Refused("the engine writes checkpoints of its own", (True,)),
    "zero_optimization.log_trace_cache_warnings": Refused("FSDP records no trace", (False,)),
    "zero_optimization.stage3_max_live_parameters": Refused(_BY_BLOCK, (1_000_000_000,)),
    "zero_optimization.stage3_max_reuse_distance": Refused(_BY_BLOCK, (1_000_000_000,)),
    "zero_optimization.memory_efficient_linear": Refused("use training.activation_checkpointing", (True,)),
    "zero_optimization.stage3_model_persistence_threshold": Refused(_BY_BLOCK, (sys.maxsize,)),
    "zero_optimization.stage3_module_granularity_threshold": Refused(_BY_BLOCK, (0,)),
    "zero_optimization.overlap_comm": Refused("communication always overlaps with computation", (True,)),
    "zero_optimization.override_module_apply": Refused("a model is built before it is sharded", (True,)),
    "zero_optimization.stage3_param_persistence_threshold": Refused(_BY_BLOCK, (100_000,)),
    "zero_optimization.parameter_alignment": Refused("FSDP aligns its buffers itself", (False,)),
    "zero_optimization.stage3_prefetch_bucket_size": Refused(_PREFETCHES, (50_000_000,)),
    "zero_optimization.reduce_bucket_size": Refused(_BY_BLOCK, (500_000_000,)),
    "zero_optimization.reduce_scatter": Refused("gradients are reduce-scattered from stage 1 on", (True,)),
    "zero_optimization.round_robin_gradients": Refused("every parameter is split over all ranks", (False,)),
    "zero_optimization.save_muon_momentum_buffer_in_memory": Refused("Muon is DeepSpeed's own; use AdamW", (False,)),
    "zero_optimization.sub_group_size": Refused("the optimizer steps all shards at once", (1_000_000_000,)),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": Refused("parameters are all-gathered", (False,)),
    "zero_optimization.use_multi_rank_bucket_allreduce": Refused(_BY_BLOCK, (True,)),
    "zero_optimization.zero_quantized_gradients": Refused("use communication_data_type", (False,)),
    "zero_optimization.zero_quantized_nontrainable_weights": Refused("use bf16", (False,)),
    "zero_optimization.zero_quantized_weights": Refused("use bf16", (False,)),
    "communication_data_type": Obeyed("in which gradients are reduced; default fp32", ("fp32", "bf16", "fp16")),
    "zero_allow_untested_optimizer": Obeyed("no optimizer that is built here is untested"),
    "zero_force_ds_cpu_optimizer": Refused("it names DeepSpeed's own Adam; use AdamW", (False,)),
    "activation_checkpointing": Refused("use training.activation_checkpointing", ({},)),
    "aio": Refused("nothing is offloaded to files; use offload_optimizer.device cpu", ({},)),
    "comms_logger": Refused("use torch's profiler", ({},)),
    "compile": Refused("use training.compile", ({},)),
    "data_types": Refused("gradients add up in fp32, buffers keep their dtype", ({}, {"grad_accum_dtype": "fp32"})),
    "disable_allgather": Refused("parameters are always all-gathered", (False,)),
    "disable_python_gc": Refused("Python collects when it will", (False,)),
    "dump_state": Refused("--plan shows the whole configuration", (False,)),
    "flops_profiler": Refused("metrics.jsonl holds the share of the device's peak; use torch's profiler", ({},)),
    "gradient_predivide_factor": Refused("gradients are divided by the weight of the global batch", (1.0,)),
    "log_level": Refused("it is of DeepSpeed's log"),
    "memory_breakdown": Refused("metrics.jsonl holds the memory in use", (False,)),
    "prescale_gradients": Refused("gradients are divided by the weight of the global batch", (False,)),
    "steps_per_print": Refused("use training.log_every"),
    "timers": Refused("use torch's profiler", ({},)),
    "torch_autocast": Refused("use bf16 or fp16", ({},)),
    "use_node_local_storage": Refused("the engine writes checkpoints of its own", (False,)),
    "wall_clock_breakdown": Refused("metrics.jsonl holds the time of a step; use torch's profiler", (False,)),
}  # fmt: skip
"""Every key of the section, dotted; "*" stands for whatever else an object may hold."""


def check_fsdp_section(section: DeepSpeedSection, where: Callable[[str], str], world_size: int) -> None:
    """Raise ConfigError for what FSDP does not do, all in one message. `where`: what each line begins with."""
    faults = [(f"deepspeed.{key}", fault) for key, fault in _faults(section, world_size)]
    if faults:
        lines = [f"{where(key)}: {key}: {fault}" for key, fault in faults]
        raise ConfigError("\n  ".join(["FSDP does not do what is asked for:", *lines]))


def _faults(section: DeepSpeedSection, world_size: int) -> Iterator[tuple[str, str]]:
    for key, value in _given(section):
        rule = RULES.get(key) or RULES[f"{key.rpartition('.')[0]}.*"]
        shown = json.dumps(value)
        if isinstance(rule, Refused) and value not in rule.passing:
            yield key, f"{shown} has no effect here: {rule.instead}. Remove the key, or use --backend deepspeed"
        elif isinstance(rule, Obeyed) and rule.only is not None and value not in rule.only:
            yield key, f"{shown} cannot be had: use {_values(rule.only)}, or --backend deepspeed"
    optimizer = section.optimizer.type
    if section.optimizer.is_deepspeed_only:
        yield "optimizer.type", f"only DeepSpeed builds {optimizer}: use AdamW, or --backend deepspeed"
    zero = section.zero_optimization
    together = zero.zero_hpz_partition_size or 1
    if together < 1 or world_size % together:
        yield (
            "zero_optimization.zero_hpz_partition_size",
            f"{together} does not divide the number of ranks, {world_size}",
        )


def _given(section: DeepSpeedSection) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values that ask for something; below an object, its own keys where they have a rule."""
    whole = section.model_dump(mode="json", exclude_unset=True, exclude_defaults=True, exclude_none=True)
    off = [key for key in whole if getattr(getattr(section, key), "enabled", True) is False]
    whole = {key: value for key, value in whole.items() if key not in off}
    inner = {key.rpartition(".")[0] for key in RULES}

    def walk(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, item in value.items():
            dotted = f"{prefix}{key}"
            if dotted in inner:
                yield from walk(item, f"{dotted}.")
            else:
                yield dotted, item

    return walk(whole, "")


def shard_group_size(section: DeepSpeedSection, world_size: int) -> int:
    """The number of ranks that share one copy of the state."""
    if section.zero_optimization.stage == 0:
        return 1
    together = section.zero_optimization.zero_hpz_partition_size or 1
    return together if together > 1 else world_size


def needs_no_shards(section: DeepSpeedSection, world_size: int) -> bool:
    """Whether fully_shard would only copy what there is, or narrow it: one rank, of which nothing is offloaded.

    In 16 bits fully_shard does more at stage 3, where it frees what is narrow, and where it casts the inputs of blocks.
    """
    is_narrow = parameter_dtype(section) != torch.float32
    in_fp32 = section.model_copy(update={"bf16": type(section.bf16)(), "fp16": type(section.fp16)()})
    does_more = is_narrow and (section.zero_optimization.stage == 3 or section.fp16.auto_cast)
    return deepspeed_section.shares_nothing(in_fp32, world_size) and not does_more


def reduce_dtype(section: DeepSpeedSection) -> torch.dtype:
    """The dtype in which gradients travel."""
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    return names[section.communication_data_type or "fp32"]


_DOCUMENT = """# The section "deepspeed" on FSDP

    torchrun --nproc_per_node 8 launchers/train.py --config configs/fluid/large.json --backend fsdp
    python launchers/train.py --config configs/fluid/nano.json --backend fsdp         # one process

`--backend fsdp` trains with `fully_shard` of PyTorch; DeepSpeed need not be installed. `--backend auto`, the default,
takes DeepSpeed where it can be imported, else FSDP, and says so. The same configuration drives both, and a checkpoint
of one resumes under the other.

Each key is obeyed or refused. A refused key passes where it holds one of the values shown, which ask for nothing: most
are those that DeepSpeed has anyway. Any other value is an error before training begins.

One process that offloads nothing has nothing to share, so `fully_shard` is not called. In fp32 the model is left as it
is, at every stage. In bf16 and fp16 it computes with narrow copies, all made at once after a step. Losses, weights and
checkpoints equal those of `fully_shard` to the last bit, and the peak of memory is no higher. With stage 3, which frees
a block's parameters after its forward, or with `fp16.auto_cast`, `fully_shard` is called in 16 bits all the same. With
a `communication_data_type` other than fp32 it is called always.

Model code has to keep to two rules: parameters are used inside the forward of the model, or of the block that they
belong to; and a parameter has at least one dimension. Buffers keep their dtype in bf16 and fp16 runs.

This page is made by `python -m trunkline.engine.config.fsdp_section > docs/fsdp.md`.
"""


def document() -> str:
    """The page docs/fsdp.md: every key, what FSDP makes of it, and the values that can be had or that pass."""
    lines = [_DOCUMENT, "| key | with FSDP | values |", "|---|---|---|"]
    for key, rule in RULES.items():
        if isinstance(rule, Obeyed):
            values = _values(rule.only) if rule.only else "all"
            lines.append(f"| `{key}` | obeyed: {rule.how} | {values} |")
        else:
            lines.append(f"| `{key}` | refused: {rule.instead} | {_values(rule.passing) or 'none'} |")
    for prefix, refused in (("", REFUSED), ("zero_optimization.", REFUSED_ZERO)):
        lines += [
            f"| `{prefix}{key}` | refused on both backends: {instead} | none |" for key, instead in refused.items()
        ]
    return "\n".join(lines) + "\n"


def _values(values: tuple[Any, ...]) -> str:
    return ", ".join(json.dumps(value) for value in values)


if __name__ == "__main__":
    print(document(), end="")
