"""The "deepspeed" section, checked strictly, and the batch sizes that follow from it.

DeepSpeed itself passes unknown keys over in silence. Here every key is known, refused with what to use instead, or an
error. This table does not need DeepSpeed to be installed; a test compares it with the installed release.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from trunkline.engine.config.deepspeed_parts import (
    OWN_CHECKPOINTS,
    ActivationCheckpointing,
    Aio,
    Bf16,
    CommsLogger,
    Compile,
    DataTypes,
    Dtype,
    FlopsProfiler,
    Fp16,
    Part,
    Timers,
    TorchAutocast,
    idle,
    refuse,
)
from trunkline.engine.config.own_class import is_own, own_class
from trunkline.engine.config.strict import Strict, typed
from trunkline.engine.config.typed_params import (
    DEEPSPEED_ONLY,
    known_optimizer,
    known_scheduler,
    optimizer_params,
    scheduler_params,
)
from trunkline.engine.config.zero_section import ZERO_DEFAULTS, Zero
from trunkline.engine.errors import ConfigError

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
    "nebula": "the engine writes checkpoints itself",
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

Json = dict[str, Any]


class Optimizer(Part):
    """`type` is DeepSpeed's name, any class of torch.optim, AdamWScale, "apex.<class>", or a class of the user's own,
    "module:Class". `params` are typed by it."""

    type: Annotated[str, AfterValidator(known_optimizer)] = Field(
        description="DeepSpeed's name, a class of torch.optim, AdamWScale, apex.<class>, or yours, module:Class"
    )
    params: Json = Field(
        default_factory=dict,
        validate_default=True,
        description="arguments of the optimizer; lr, the learning rate, must be given",
    )
    legacy_fusion: Annotated[bool, idle("it chooses between DeepSpeed's own kernels", False)] = False

    @field_validator("params")
    @classmethod
    def _typed(cls, params: Json, info: ValidationInfo) -> Json:
        return typed(optimizer_params(kind), params, kind) if (kind := info.data.get("type")) else params

    @property
    def is_deepspeed_only(self) -> bool:
        """True for the names that no other library builds."""
        return self.type.lower() in [name.lower() for name in DEEPSPEED_ONLY]


class Scheduler(Strict):
    """`type` is one of DeepSpeed's names, any class of torch.optim.lr_scheduler, one of our own, or one of the user's
    own, "module:Class"."""

    type: Annotated[str, AfterValidator(known_scheduler)] = Field(
        description="DeepSpeed's name, a class of torch.optim.lr_scheduler, one of the engine's, or yours, module:Class"
    )
    params: Json = Field(
        default_factory=dict,
        validate_default=True,
        description="arguments of the schedule; lengths are optimizer steps, or epochs",
    )

    @field_validator("params")
    @classmethod
    def _typed(cls, params: Json, info: ValidationInfo) -> Json:
        return typed(scheduler_params(kind), params, kind) if (kind := info.data.get("type")) else params


_COUNT_OR_AUTO: Json = {"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"const": "auto", "type": "string"}]}


class DeepSpeedSection(Part):
    """DeepSpeed's configuration. `train_batch_size` is the global batch, whatever the number of ranks."""

    train_batch_size: int | None = Field(
        None, gt=0, description="samples of one optimizer step over all ranks: the global batch"
    )
    train_micro_batch_size_per_gpu: int | Literal["auto"] = Field(
        "auto",
        json_schema_extra=_COUNT_OR_AUTO,
        description="samples that a rank computes at once; auto: its share of the global batch",
    )
    gradient_accumulation_steps: int | Literal["auto"] = Field(
        "auto",
        json_schema_extra=_COUNT_OR_AUTO,
        description="micro-batches of a step on each rank; derived from the batch sizes",
    )
    optimizer: Optimizer = Field(description="what changes the weights")
    scheduler: Scheduler | None = Field(None, description="how the learning rate changes; constant if null")
    gradient_clipping: float = Field(default=0.0, ge=0, description="largest global norm of the gradient; 0 for none")
    bf16: Bf16 = Field(Bf16(), description="training in bfloat16")
    fp16: Fp16 = Field(Fp16(), description="training in float16")
    zero_optimization: Zero = Field(Zero(), description="ZeRO: what is sharded over the ranks")
    zero_allow_untested_optimizer: bool = Field(
        default=True, description="let ZeRO work with optimizers that DeepSpeed has not tried"
    )
    zero_force_ds_cpu_optimizer: bool = Field(
        default=False, description="use DeepSpeed's own Adam for offloaded states"
    )
    activation_checkpointing: ActivationCheckpointing | None = Field(
        None, description="DeepSpeed's own function, which no model here calls"
    )
    aio: Aio | None = Field(None, description="offload to files, which is not there")
    comms_logger: CommsLogger | None = Field(None, description="a log of collectives")
    communication_data_type: Dtype | None = Field(None, description="in which gradients travel between ranks")
    compile: Compile | None = Field(None, description="DeepSpeed's compiler, which is never started")
    data_types: DataTypes | None = Field(None, description="in what gradients add up")
    disable_allgather: Annotated[bool | None, idle("parameters are always all-gathered", None, False)] = None
    disable_python_gc: bool | None = Field(None, description="switch Python's garbage collection off")
    dump_state: bool | None = Field(None, description="print DeepSpeed's whole state at the start")
    flops_profiler: FlopsProfiler | None = Field(None, description="DeepSpeed's profile of one step")
    gradient_predivide_factor: float | None = Field(
        None, gt=0, description="divide gradients by this before they are summed, and by the rest afterwards"
    )
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = Field(
        None, description="of DeepSpeed's log"
    )
    memory_breakdown: bool | None = Field(None, description="print DeepSpeed's memory at each phase")
    prescale_gradients: bool | None = Field(None, description="divide gradients before they are summed")
    steps_per_print: int | None = Field(None, gt=0, description="optimizer steps between DeepSpeed's own lines")
    timers: Timers | None = Field(None, description="DeepSpeed's timers")
    torch_autocast: TorchAutocast | None = Field(None, description="fp32 parameters under torch.autocast")
    use_node_local_storage: Annotated[bool | None, idle(OWN_CHECKPOINTS, None, False)] = None
    wall_clock_breakdown: bool = Field(default=False, description="print DeepSpeed's times of each phase")

    @property
    def reports(self) -> bool:
        """Whether DeepSpeed is to print what training does."""
        parts = any(part is not None and part.enabled for part in (self.flops_profiler, self.comms_logger))
        return parts or self.wall_clock_breakdown or bool(self.memory_breakdown or self.steps_per_print)

    @model_validator(mode="before")
    @classmethod
    def _no_refused_key(cls, section: Any) -> Any:
        return refuse(section, REFUSED)

    @field_validator("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value <= 0:
            raise ValueError('must be a positive integer or "auto"')
        return value

    @field_validator("train_micro_batch_size_per_gpu")
    @classmethod
    def _something_to_derive_from(cls, value: int | str, info: ValidationInfo) -> int | str:
        if value == "auto" and info.data.get("train_batch_size", 0) is None:
            raise PydanticCustomError(
                "told", '"auto" is derived from train_batch_size (the global batch), which is not given: write it'
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> DeepSpeedSection:
        if self.bf16.enabled and self.fp16.enabled:
            raise ValueError("bf16.enabled and fp16.enabled are both true; choose one precision")
        precision = "bf16" if self.bf16.enabled else "fp16" if self.fp16.enabled else "fp32"
        if self.data_types is not None and self.data_types.param_dtype not in (None, precision):
            raise ValueError(
                f"data_types.param_dtype {self.data_types.param_dtype!r} contradicts the precision in force, "
                f"{precision}: remove it, and choose by bf16.enabled and fp16.enabled"
            )
        summed = self.data_types.grad_accum_dtype if self.data_types else None
        if self.bf16.immediate_grad_update and not (self.zero_optimization.stage == 1 and summed == "fp32"):
            raise ValueError(
                "bf16.immediate_grad_update has no effect but at zero_optimization.stage 1 with "
                'data_types.grad_accum_dtype "fp32"; remove it'
            )
        return self


def own_classes(section: DeepSpeedSection) -> list[type]:
    """The classes of the user's own that drive the run: optimizer, schedule."""
    kinds = [part.type for part in (section.optimizer, section.scheduler) if part is not None]
    return [own_class(kind, object) for kind in kinds if is_own(kind)]


def parameter_dtype(section: DeepSpeedSection) -> torch.dtype:
    """The dtype that the model computes in."""
    return torch.bfloat16 if section.bf16.enabled else torch.float16 if section.fp16.enabled else torch.float32


def shares_nothing(section: DeepSpeedSection, world_size: int) -> bool:
    """Whether ZeRO and FSDP would only copy what there is: one rank, fp32, nothing offloaded, torch's optimizer."""
    zero, autocast = section.zero_optimization, section.torch_autocast
    narrow = parameter_dtype(section) != torch.float32 or (autocast is not None and autocast.enabled)
    narrow |= section.communication_data_type not in (None, "fp32")
    elsewhere = zero.offload_optimizer or zero.offload_param or section.optimizer.is_deepspeed_only
    return world_size == 1 and not narrow and not elsewhere


def gathers_gradients(section: DeepSpeedSection, world_size: int) -> bool:
    """What `contiguous_gradients` is where it is not given. At ZeRO 1 and 2 one rank gathers no gradients,
    unless optimizer states are offloaded or the optimizer is DeepSpeed's own."""
    zero = section.zero_optimization
    needed = zero.offload_optimizer is not None or section.optimizer.is_deepspeed_only
    return world_size > 1 or zero.stage not in (1, 2) or needed


def bucket_size(num_parameters: int) -> int:
    """DeepSpeed's buckets where none are given: its default is a gigabyte, for the smallest model too."""
    return min(ZERO_DEFAULTS["reduce_bucket_size"], -(-num_parameters // 1024) * 1024)


@dataclass(frozen=True)
class BatchSizes:
    """How one global batch is split: global = micro x ranks x accumulation."""

    global_batch_size: int
    micro_batch_size: int
    grad_accum_steps: int
    world_size: int


def keeps_together(sizes: BatchSizes, multiple: int) -> bool:
    """Whether each micro-batch is whole groups of `multiple` samples in contiguous places of the global batch."""
    return sizes.micro_batch_size % multiple == 0 or sizes.micro_batch_size == sizes.global_batch_size


def batch_sizes(section: DeepSpeedSection, world_size: int) -> BatchSizes:
    """Resolve "auto" and check that the sizes multiply. Raises ConfigError with the numbers and the way out."""
    total, micro = section.train_batch_size, section.train_micro_batch_size_per_gpu
    accumulation = section.gradient_accumulation_steps
    times = accumulation if isinstance(accumulation, int) else 1
    if total is None:
        assert isinstance(micro, int)
        total = micro * world_size * times
    if micro == "auto":
        micro, rest = divmod(total, world_size * times)
        if rest or not micro:
            raise ConfigError(
                f"deepspeed.train_batch_size: {total} samples cannot be shared by {world_size} ranks"
                + (f" x {accumulation} accumulation steps" if accumulation != "auto" else "")
                + f": use {_ways_out(total, 1, world_size, times)}"
            )
    assert isinstance(micro, int)
    steps, rest = divmod(total, micro * world_size)
    if rest or not steps:
        raise ConfigError(
            f"deepspeed.train_batch_size: {total} is not a multiple of {micro * world_size} (micro-batches of "
            f"{micro} x {world_size} ranks): use {_ways_out(total, micro, world_size)}"
        )
    if accumulation not in ("auto", steps):
        raise ConfigError(
            f"deepspeed.gradient_accumulation_steps: {accumulation} contradicts train_batch_size {total} = {micro} x "
            f"{world_size} ranks x {steps}; remove the key: it is derived"
        )
    return BatchSizes(total, micro, steps, world_size)


def _ways_out(total: int, micro: int, world_size: int, times: int = 1) -> str:
    """Sizes that would fit, each with what it is for: a smaller micro-batch, a global batch near by, fewer ranks."""
    share, rest = divmod(total, world_size * times)
    smaller = 0 if rest else max((size for size in range(1, micro) if share % size == 0), default=0)
    least = micro * world_size * times
    near = dict.fromkeys((max(1, total // least) * least, -(-total // least) * least))
    ranks = max((count for count in range(1, world_size) if total % (micro * count * times) == 0), default=0)
    ways = [f"{smaller} for train_micro_batch_size_per_gpu"] * bool(smaller)
    ways += [f"{' or '.join(map(str, near))} for train_batch_size"]
    ways += [f"{ranks} rank{'s' * (ranks > 1)}"] * bool(ranks)
    return ", or ".join(ways)
