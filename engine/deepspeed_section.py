"""The "deepspeed" section: DeepSpeed's own schema, checked strictly, and the batch sizes that follow from it.

DeepSpeed itself passes unknown keys over in silence. Here every key is known, refused with what to use instead, or an
error. This table does not need DeepSpeed to be installed; a test compares it with the installed release.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from engine.errors import ConfigError
from engine.strict import Strict

REFUSED = {
    "autotuning": "choose batch sizes with --plan",
    "checkpoint": "the engine writes whole checkpoints of its own; see training.save_every",
    "comet": "use training.trackers",
    "compression_training": "it changes the model behind the engine's back",
    "csv_monitor": "every run writes metrics.jsonl",
    "curriculum_learning": "the order of samples is a function of the seed and the epoch",
    "data_efficiency": "the order of samples is a function of the seed and the epoch",
    "dataloader_drop_last": "no sample is dropped: a short last batch is filled up with samples of weight zero",
    "elasticity": "train_batch_size is the global batch on any number of ranks",
    "expert_parallel": "only data parallelism is driven",
    "gradient_allreduce_op": "gradients are divided by the weight of the global batch",
    "hybrid_engine": "it is for inference inside training, which no task here does",
    "managed_gradient_accumulation": "the engine drives the accumulation",
    "pipeline": "only data parallelism is driven",
    "seq_parallel_communication_data_type": "only data parallelism is driven",
    "sequence_parallel_size": "only data parallelism is driven",
    "tensor_parallel": "only data parallelism is driven",
    "tensorboard": "use training.trackers",
    "train_steps": "use training.steps",
    "use_data_before_expert_parallelism": "only data parallelism is driven",
    "vocabulary_size": "DeepSpeed only warns by it",
    "wandb": "use training.trackers",
    "weight_quantization": "it changes the model behind the engine's back",
}

REFUSED_ZERO = {
    "compute_grad_norm": "steps without a finite gradient are found by the norm",
    "cpu_offload": "it is deprecated; use offload_optimizer",
    "cpu_offload_param": "it is deprecated; use offload_param",
    "cpu_offload_use_pin_memory": "it is deprecated; use offload_optimizer.pin_memory",
    "legacy_stage1": "DeepSpeed has dropped it",
    "pipeline_loading_checkpoint": "only data parallelism is driven",
    "stage3_gather_fp16_weights_on_model_save": "it is deprecated; use stage3_gather_16bit_weights_on_model_save",
    "zenflow": "it updates out of step, so a run could not be resumed exactly",
}

Json = dict[str, Any]


def _refuse(section: Any, refused: dict[str, str]) -> Any:
    for key, instead in refused.items():
        if isinstance(section, dict) and key in section:
            raise ValueError(f"'{key}' is not supported here: {instead}; remove it")
    return section


class Optimizer(Strict):
    """`type` is one of DeepSpeed's names, any class of torch.optim, or "apex.<class>"."""

    type: str
    params: Json = Field(default_factory=dict)
    legacy_fusion: bool = False


class Scheduler(Strict):
    """`type` is one of DeepSpeed's names, any class of torch.optim.lr_scheduler, or a name of engine.schedules."""

    type: str
    params: Json = Field(default_factory=dict)


class Bf16(Strict):
    """Parameters in bfloat16, master weights and optimizer in fp32."""

    enabled: bool = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True
    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False


class Fp16(Strict):
    """Parameters in float16 with loss scaling; `loss_scale` 0 makes the scale dynamic."""

    enabled: bool = False
    auto_cast: bool = False
    loss_scale: float = Field(default=0, ge=0)
    initial_scale_power: int = Field(default=16, ge=0)
    loss_scale_window: int = Field(default=1000, gt=0)
    hysteresis: int = Field(default=2, ge=0)
    consecutive_hysteresis: bool = False
    min_loss_scale: float = Field(default=1, gt=0)
    fp16_master_weights_and_grads: bool = False


class Zero(Strict):
    """ZeRO: what is sharded over the ranks (1 optimizer states, 2 gradients too, 3 parameters too)."""

    stage: Literal[0, 1, 2, 3] = 0
    allgather_bucket_size: int | None = None
    allgather_partitions: bool | None = None
    stage3_allgather_sequential: bool | None = None
    contiguous_gradients: bool | None = None
    enable_sanity_checks: bool | None = None
    elastic_checkpoint: bool | None = None
    stage3_gather_16bit_weights_on_model_save: bool | None = None
    ignore_unused_parameters: bool | None = None
    leaf_module: Json | None = None
    load_from_fp32_weights: bool | None = None
    log_trace_cache_warnings: bool | None = None
    stage3_max_live_parameters: int | None = None
    stage3_max_reuse_distance: int | None = None
    memory_efficient_linear: bool | None = None
    stage3_model_persistence_threshold: int | None = None
    stage3_module_granularity_threshold: int | None = None
    offload_optimizer: Json | None = None
    offload_param: Json | None = None
    overlap_comm: bool | None = None
    override_module_apply: bool | None = None
    stage3_param_persistence_threshold: int | None = None
    parameter_alignment: bool | None = None
    stage3_prefetch_bucket_size: int | None = None
    reduce_bucket_size: int | None = None
    reduce_scatter: bool | None = None
    round_robin_gradients: bool | None = None
    save_muon_momentum_buffer_in_memory: bool | None = None
    sub_group_size: int | None = None
    stage3_use_all_reduce_for_fetch_params: bool | None = None
    use_multi_rank_bucket_allreduce: bool | None = None
    zero_hpz_partition_size: int | None = None
    zero_quantized_gradients: bool | None = None
    zero_quantized_nontrainable_weights: bool | None = None
    zero_quantized_weights: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_refused_key(cls, section: Any) -> Any:
        return _refuse(section, REFUSED_ZERO)


class DeepSpeedSection(Strict):
    """DeepSpeed's configuration. `train_batch_size` is the global batch, whatever the number of ranks."""

    train_batch_size: int | None = Field(None, gt=0)
    train_micro_batch_size_per_gpu: int | Literal["auto"] = "auto"
    gradient_accumulation_steps: int | Literal["auto"] = "auto"
    optimizer: Optimizer
    scheduler: Scheduler | None = None
    gradient_clipping: float = Field(default=0.0, ge=0)
    bf16: Bf16 = Bf16()
    fp16: Fp16 = Fp16()
    zero_optimization: Zero = Zero()
    zero_allow_untested_optimizer: bool = True
    zero_force_ds_cpu_optimizer: bool = False
    activation_checkpointing: Json | None = None
    aio: Json | None = None
    comms_logger: Json | None = None
    communication_data_type: str | None = None
    compile: Json | None = None
    data_types: Json | None = None
    disable_allgather: bool | None = None
    disable_python_gc: bool | None = None
    dump_state: bool | None = None
    flops_profiler: Json | None = None
    gradient_predivide_factor: float | None = None
    log_level: str | None = None
    memory_breakdown: bool | None = None
    nebula: Json | None = None
    prescale_gradients: bool | None = None
    steps_per_print: int | None = None
    timers: Json | None = None
    torch_autocast: Json | None = None
    use_node_local_storage: bool | None = None
    wall_clock_breakdown: bool = False

    @model_validator(mode="before")
    @classmethod
    def _no_refused_key(cls, section: Any) -> Any:
        return _refuse(section, REFUSED)

    @field_validator("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value <= 0:
            raise ValueError('must be a positive integer or "auto"')
        return value

    @model_validator(mode="after")
    def _consistent(self) -> DeepSpeedSection:
        if self.bf16.enabled and self.fp16.enabled:
            raise ValueError("bf16.enabled and fp16.enabled are both true; choose one precision")
        if self.train_batch_size is None and not isinstance(self.train_micro_batch_size_per_gpu, int):
            raise ValueError("train_batch_size (the global batch) is missing; this key is required")
        if "lr" not in self.optimizer.params:
            raise ValueError("optimizer.params.lr is missing; this key is required")
        return self


def parameter_dtype(section: DeepSpeedSection) -> torch.dtype:
    """The dtype that the model computes in."""
    return torch.bfloat16 if section.bf16.enabled else torch.float16 if section.fp16.enabled else torch.float32


@dataclass(frozen=True)
class BatchSizes:
    """How one global batch is split: global = micro x ranks x accumulation."""

    global_batch_size: int
    micro_batch_size: int
    grad_accum_steps: int
    world_size: int


def batch_sizes(section: DeepSpeedSection, world_size: int) -> BatchSizes:
    """Resolve "auto" and check that the sizes multiply. Raises ConfigError with the numbers and the way out."""
    total, micro = section.train_batch_size, section.train_micro_batch_size_per_gpu
    accumulation = section.gradient_accumulation_steps
    if total is None:
        assert isinstance(micro, int)
        total = micro * world_size * (accumulation if isinstance(accumulation, int) else 1)
    if micro == "auto":
        share, rest = divmod(total, world_size * (accumulation if isinstance(accumulation, int) else 1))
        if rest or not share:
            raise ConfigError(
                f"deepspeed.train_batch_size: {total} cannot be shared by {world_size} ranks"
                + (f" x {accumulation} accumulation steps" if accumulation != "auto" else "")
                + f"; choose a multiple of {world_size * (accumulation if isinstance(accumulation, int) else 1)}"
            )
        micro = share
    assert isinstance(micro, int)
    steps, rest = divmod(total, micro * world_size)
    if rest or not steps:
        raise ConfigError(
            f"deepspeed.train_batch_size: {total} is not a multiple of {micro} samples a micro-batch x {world_size} "
            f"ranks; use a train_micro_batch_size_per_gpu that divides {total / world_size:g}, or another global batch"
        )
    if accumulation not in ("auto", steps):
        raise ConfigError(
            f"deepspeed.gradient_accumulation_steps: {accumulation} contradicts train_batch_size {total} = {micro} x "
            f"{world_size} ranks x {steps}; remove the key: it is derived"
        )
    return BatchSizes(total, micro, steps, world_size)
