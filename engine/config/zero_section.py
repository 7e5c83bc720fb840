"""The object "zero_optimization": its keys, DeepSpeed's defaults, and the stages of each."""

from __future__ import annotations

import sys
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from trunkline.engine.config.deepspeed_parts import NO_NVME, OWN_CHECKPOINTS, Part, asked_for, idle, refuse

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


class LeafModule(Part):
    """Modules that ZeRO 3 gathers whole: by class, by name and by the end of their name."""

    classes: str | list[str] | None = Field(None, description="class names of modules")
    names: str | list[str] | None = Field(None, description="names of modules")
    name_suffixes: str | list[str] | None = Field(None, description="ends of names of modules")


class _Offload(Part):
    device: Literal["cpu", "none"] = Field("none", description="cpu, or none for the accelerator")
    nvme_path: Annotated[str | None, idle(NO_NVME, None)] = None
    pin_memory: bool = Field(default=True, description="page-locked memory, which is copied faster")

    @field_validator("device", mode="before")
    @classmethod
    def _no_nvme(cls, value: Any) -> Any:
        if value == "nvme":
            raise ValueError("offload to files is not supported, its state could not be checkpointed: use cpu or none")
        return value

    @model_validator(mode="after")
    def _something_is_offloaded(self) -> _Offload:
        if self.device == "none" and (asked := asked_for(self)):
            raise ValueError(f'{", ".join(asked)} has no effect while device is "none": add "device": "cpu"')
        return self


_ONE_OPTIMIZER = "a second optimizer's state could not be checkpointed"


class OffloadOptimizer(_Offload):
    """Where optimizer states rest between steps."""

    buffer_count: Annotated[int, idle(NO_NVME, 4)] = 4
    pipeline_read: Annotated[bool, idle(NO_NVME, False)] = False
    pipeline_write: Annotated[bool, idle(NO_NVME, False)] = False
    fast_init: Annotated[bool, idle(NO_NVME, False)] = False
    ratio: Annotated[float, idle(_ONE_OPTIMIZER, 1.0)] = 1.0
    super_offload: Annotated[bool, idle(_ONE_OPTIMIZER, False)] = False
    cpuadam_cores_perc: Annotated[float, idle(_ONE_OPTIMIZER, 0.8)] = 0.8


class OffloadParam(_Offload):
    """Where parameters rest between their uses."""

    buffer_count: Annotated[int, idle(NO_NVME, 5)] = 5
    buffer_size: Annotated[int, idle(NO_NVME, 100_000_000)] = 100_000_000
    max_in_cpu: Annotated[int, idle(NO_NVME, 1_000_000_000)] = 1_000_000_000


ZERO_DEFAULTS: dict[str, Any] = {
    "allgather_bucket_size": 500_000_000,
    "allgather_partitions": True,
    "stage3_allgather_sequential": False,
    "contiguous_gradients": True,
    "enable_sanity_checks": False,
    "elastic_checkpoint": False,
    "stage3_gather_16bit_weights_on_model_save": False,
    "ignore_unused_parameters": True,
    "load_from_fp32_weights": True,
    "log_trace_cache_warnings": False,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "memory_efficient_linear": True,
    "stage3_model_persistence_threshold": sys.maxsize,
    "stage3_module_granularity_threshold": 0,
    "overlap_comm": False,
    "override_module_apply": True,
    "stage3_param_persistence_threshold": 100_000,
    "parameter_alignment": False,
    "stage3_prefetch_bucket_size": 50_000_000,
    "reduce_bucket_size": 500_000_000,
    "reduce_scatter": True,
    "round_robin_gradients": False,
    "save_muon_momentum_buffer_in_memory": False,
    "sub_group_size": 1_000_000_000,
    "stage3_use_all_reduce_for_fetch_params": False,
    "use_multi_rank_bucket_allreduce": True,
    "zero_hpz_partition_size": 1,
    "zero_quantized_gradients": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_weights": False,
}
"""DeepSpeed's own values, which ask for nothing; `overlap_comm` is true at stage 3."""

ZERO_STAGES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("allgather_bucket_size", "allgather_partitions", "ignore_unused_parameters", "parameter_alignment",
                     "round_robin_gradients", "use_multi_rank_bucket_allreduce"), (1, 2)),
    **dict.fromkeys(("enable_sanity_checks", "leaf_module", "log_trace_cache_warnings", "memory_efficient_linear",
                     "offload_param", "override_module_apply", "save_muon_momentum_buffer_in_memory",
                     "sub_group_size", "zero_quantized_gradients", "zero_quantized_nontrainable_weights",
                     "zero_quantized_weights"), (3,)),
}  # fmt: skip
"""Where a key acts, if not at every stage from 1 on; those named stage3_ act there."""


_WHOLE = "final/ holds whole fp32 weights in any case"


def _stage(value: int) -> int:  # a Literal would take true for 1
    if value not in (0, 1, 2, 3):
        raise ValueError("must be 0, 1, 2 or 3")
    return value


class Zero(Part):
    """ZeRO: what is sharded over the ranks (1 optimizer states, 2 gradients too, 3 parameters too)."""

    stage: Annotated[int, AfterValidator(_stage)] = Field(
        0,
        json_schema_extra={"enum": [0, 1, 2, 3]},
        description="0: nothing is sharded; 1: optimizer states; 2: gradients too; 3: parameters too",
    )
    allgather_bucket_size: int | None = Field(
        None, ge=0, description="elements gathered at once; the model's size, at most 5e8, by default"
    )
    allgather_partitions: bool | None = Field(
        None, description="gather updated parameters by all-gather; else by broadcasts"
    )
    stage3_allgather_sequential: bool | None = Field(None, description="gather parameters one after the other")
    contiguous_gradients: bool | None = Field(
        None,
        description="copy gradients into one buffer as they come; on one rank by default at stage 3 or with offload",
    )
    enable_sanity_checks: bool | None = Field(None, description="check that ranks gather the same parameters")
    elastic_checkpoint: Annotated[bool | None, idle(OWN_CHECKPOINTS, None, False)] = None
    stage3_gather_16bit_weights_on_model_save: Annotated[bool | None, idle(_WHOLE, None, False)] = None
    ignore_unused_parameters: bool | None = Field(None, description="a parameter without gradient is no error")
    leaf_module: LeafModule | None = Field(None, description="modules that stage 3 gathers whole")
    load_from_fp32_weights: Annotated[bool | None, idle(OWN_CHECKPOINTS, None, True)] = None
    log_trace_cache_warnings: bool | None = Field(None, description="say where the order of modules changes")
    stage3_max_live_parameters: int | None = Field(None, ge=0, description="gathered elements a rank holds at most")
    stage3_max_reuse_distance: int | None = Field(
        None, ge=0, description="a parameter that is used again within so many elements is kept"
    )
    memory_efficient_linear: bool | None = Field(None, description="linear layers that keep less for the backward pass")
    stage3_model_persistence_threshold: int | None = Field(
        None, ge=0, description="elements of small parameters that stay whole, in all"
    )
    stage3_module_granularity_threshold: int | None = Field(
        None, description="modules with fewer elements for each of their parts are gathered whole; 0 for none"
    )
    offload_optimizer: OffloadOptimizer | None = Field(
        None, description="where optimizer states rest; on the device if null"
    )
    offload_param: OffloadParam | None = Field(None, description="where parameters rest; on the device if null")
    overlap_comm: bool | None = Field(None, description="communicate while computing; at stage 3 by default")
    override_module_apply: bool | None = Field(None, description="let apply() see whole parameters")
    stage3_param_persistence_threshold: int | None = Field(
        None, ge=0, description="parameters with fewer elements stay whole on each rank"
    )
    parameter_alignment: bool | None = Field(None, description="align parameters in their flat buffer")
    stage3_prefetch_bucket_size: int | None = Field(None, ge=0, description="elements gathered ahead")
    reduce_bucket_size: int | None = Field(
        None, gt=0, description="elements reduced at once; the model's size, at most 5e8, by default"
    )
    reduce_scatter: bool | None = Field(None, description="reduce gradients by reduce-scatter; else by all-reduce")
    round_robin_gradients: bool | None = Field(
        None, description="spread the copying of gradients over the ranks, for offload"
    )
    save_muon_momentum_buffer_in_memory: bool | None = Field(None, description="keep Muon's momentum on the device")
    sub_group_size: int | None = Field(None, ge=0, description="elements that the optimizer updates at once")
    stage3_use_all_reduce_for_fetch_params: bool | None = Field(None, description="gather parameters by all-reduce")
    use_multi_rank_bucket_allreduce: bool | None = Field(
        None, description="reduce the gradients of several ranks together"
    )
    zero_hpz_partition_size: int | None = Field(
        None, ge=0, description="ranks that hold one more shard of the parameters together (hpZ); 1 for none"
    )
    zero_quantized_gradients: bool | None = Field(None, description="reduce gradients as 4-bit numbers (qgZ)")
    zero_quantized_nontrainable_weights: bool | None = Field(None, description="keep frozen weights as 8-bit numbers")
    zero_quantized_weights: bool | None = Field(None, description="gather weights as 8-bit numbers (qwZ)")

    # the engine sizes the buckets by the model and gathers gradients by the ranks, DeepSpeed overlaps by the stage
    left_out: ClassVar[dict[str, Any]] = ZERO_DEFAULTS | dict.fromkeys(
        ("contiguous_gradients", "overlap_comm", "reduce_bucket_size", "allgather_bucket_size")
    )

    @model_validator(mode="before")
    @classmethod
    def _no_refused_key(cls, section: Any) -> Any:
        return refuse(section, REFUSED_ZERO)

    @property
    def offloads(self) -> bool:
        """Whether anything rests on the CPU between its uses."""
        return any(part is not None and part.device == "cpu" for part in (self.offload_optimizer, self.offload_param))

    @model_validator(mode="after")
    def _keys_act_at_this_stage(self) -> Zero:
        for key in sorted(self.model_fields_set - {"stage"}):
            value = getattr(self, key)
            stages = ZERO_STAGES.get(key, (3,) if key.startswith("stage3_") else (1, 2, 3))
            asks = value is not None and value != ZERO_DEFAULTS.get(key) and getattr(value, "device", "") != "none"
            if asks and self.stage not in stages:
                places = " or ".join(map(str, stages))
                raise ValueError(f"{key} has no effect at stage {self.stage}: remove it, or set stage to {places}")
        return self
