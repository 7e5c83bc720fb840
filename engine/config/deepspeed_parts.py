"""The objects inside the "deepspeed" section, each with DeepSpeed's own keys and defaults.

A key that DeepSpeed reads but that acts on nothing in a run of this engine passes with the value that asks for nothing,
and is an error with any other. So is a setting of a part that nothing switches on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from trunkline.engine.config.strict import Strict


@dataclass(frozen=True)
class _Idle(AfterValidator):
    instead: str = ""
    passing: tuple[Any, ...] = ()

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": list(self.passing), "description": f"Has no effect here: {self.instead}."}


def idle(instead: str, *passing: Any) -> AfterValidator:
    """Refuses all but the values that ask for nothing, and says what to use instead."""

    def check(value: Any) -> Any:
        if value not in passing:
            raise ValueError(f"has no effect here: {instead}; remove the key")
        return value

    return _Idle(check, instead, passing)


def refuse(section: Any, refused: dict[str, str]) -> Any:
    """Raise ValueError for the first key that has no place here, with what takes its place."""
    for key, instead in refused.items():
        if isinstance(section, dict) and key in section:
            raise ValueError(f"'{key}' is not supported here: {instead}; remove it")
    return section


OWN_CHECKPOINTS = "the engine writes checkpoints of its own, which any layout can load"


class Part(Strict):
    """A part of DeepSpeed's configuration. As DeepSpeed reads it, a key that is "auto" is one that is left out."""

    left_out: ClassVar[dict[str, Any]] = {}
    """What DeepSpeed has then, where the field's default does not say so."""

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, section: Any) -> Any:
        if not isinstance(section, dict):
            return section
        defaults = {key: field.default for key, field in cls.model_fields.items() if not field.is_required()}
        decided = defaults | cls.left_out
        return {key: decided.get(key, value) if value == "auto" else value for key, value in section.items()}


class Switched(Part):
    """A part that acts only where `enabled` is true. Saying false is enough to keep its settings for later."""

    enabled: bool = Field(default=False, description="switches this part on")

    @model_validator(mode="after")
    def _settings_are_switched_on(self) -> Switched:
        if "enabled" not in self.model_fields_set and (asked := asked_for(self)):
            raise ValueError(f'{", ".join(asked)} has no effect while enabled is false: add "enabled": true or false')
        return self


def asked_for(part: Part) -> list[str]:
    """The keys that were given with another value than the default."""
    return [key for key in type(part).model_fields if getattr(part, key) != type(part).model_fields[key].default]


class Bf16(Switched):
    """Parameters in bfloat16, master weights and optimizer in fp32."""

    immediate_grad_update: bool = Field(
        default=False,
        description="add each gradient to the fp32 sum at once; at ZeRO stage 1 with data_types.grad_accum_dtype fp32",
    )
    check_grad_overflow: bool = Field(default=True, description="skip a step whose gradient is not finite")
    bf16_master_weights_and_grads: bool = Field(default=False, description="master weights and gradients in bf16, too")
    bf16_optimizer_states: bool = Field(default=False, description="optimizer states in bf16, too")


class Fp16(Switched):
    """Parameters in float16 with loss scaling; `loss_scale` 0 makes the scale dynamic."""

    auto_cast: bool = Field(default=False, description="cast the model's inputs to fp16")
    loss_scale: float = Field(default=0, ge=0, description="factor of the loss; 0 for one that adapts")
    initial_scale_power: int = Field(default=16, ge=0, description="the first scale is 2 to this power")
    loss_scale_window: int = Field(
        default=1000, gt=0, description="steps without overflow after which the scale doubles"
    )
    hysteresis: int = Field(default=2, ge=0, description="overflows after which the scale is halved")
    consecutive_hysteresis: bool = Field(default=False, description="count only overflows in a row")
    min_loss_scale: float = Field(default=1, gt=0, description="the scale is never less")
    fp16_master_weights_and_grads: bool = Field(default=False, description="master weights and gradients in fp16, too")


class TorchAutocast(Switched):
    """fp32 parameters under torch.autocast."""

    dtype: Literal["bfloat16", "bf16", "torch.bfloat16"] | None = Field(
        None, description="in which operations are computed where that is safe"
    )
    lower_precision_safe_modules: list[str] | None = Field(None, description="classes whose gradients travel in dtype")

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_float16(cls, value: Any) -> Any:
        if value in ("float16", "fp16", "half", "torch.float16"):
            raise ValueError("its loss scale could not be saved with the run: use bfloat16, or fp16.enabled")
        return value

    @model_validator(mode="after")
    def _dtype_is_said(self) -> TorchAutocast:
        if self.enabled and self.dtype is None:
            raise ValueError('dtype is missing, and torch\'s own choice differs by device: add "dtype": "bfloat16"')
        return self


_RECOMPUTE = "use training.activation_checkpointing"


class ActivationCheckpointing(Part):
    """Settings of DeepSpeed's own checkpoint function, which no model here calls."""

    partition_activations: Annotated[bool, idle(_RECOMPUTE, False)] = False
    contiguous_memory_optimization: Annotated[bool, idle(_RECOMPUTE, False)] = False
    cpu_checkpointing: Annotated[bool, idle(_RECOMPUTE, False)] = False
    number_checkpoints: Annotated[int | None, idle(_RECOMPUTE, None)] = None
    synchronize_checkpoint_boundary: Annotated[bool, idle(_RECOMPUTE, False)] = False
    profile: Annotated[bool, idle(_RECOMPUTE, False)] = False


NO_NVME = "nothing is offloaded to files; use offload_optimizer.device cpu"


class Aio(Part):
    """Settings of offload to files."""

    block_size: Annotated[int, idle(NO_NVME, 1048576)] = 1048576
    queue_depth: Annotated[int, idle(NO_NVME, 8)] = 8
    intra_op_parallelism: Annotated[int, idle(NO_NVME, 1)] = 1
    single_submit: Annotated[bool, idle(NO_NVME, False)] = False
    overlap_events: Annotated[bool, idle(NO_NVME, True)] = True
    use_gds: Annotated[bool, idle(NO_NVME, False)] = False


class CommsLogger(Switched):
    """A line on the console for each collective that DeepSpeed calls."""

    verbose: bool = Field(default=False, description="show each collective")
    prof_all: bool = Field(default=True, description="all operations; else those of prof_ops")
    prof_ops: list[str] | None = Field(None, description="operations; all if prof_all")
    debug: bool = Field(default=False, description="with the function that called it")

    @model_validator(mode="after")
    def _something_is_shown(self) -> CommsLogger:
        if self.enabled and not self.verbose:
            raise ValueError('nothing is shown without verbose, as the summary is never asked for: add "verbose": true')
        return self


_COMPILE = "use training.compile"


class Compile(Part):
    """Settings of DeepSpeed's compiler, which is never started."""

    deepcompile: Annotated[bool, idle(_COMPILE, False)] = False
    autoep_non_moe: Annotated[bool, idle(_COMPILE, False)] = False
    free_activation: Annotated[bool, idle(_COMPILE, False)] = False
    free_activation_threshold: Annotated[int, idle(_COMPILE, 10485760)] = 10485760
    offload_activation: Annotated[bool, idle(_COMPILE, False)] = False
    offload_activation_pin_memory: Annotated[bool, idle(_COMPILE, True)] = True
    offload_opt_states: Annotated[bool, idle(_COMPILE, False)] = False
    double_buffer: Annotated[bool, idle(_COMPILE, True)] = True
    symmetric_memory: Annotated[bool, idle(_COMPILE, False)] = False
    debug_log: Annotated[bool, idle(_COMPILE, False)] = False
    offload_parameters: Annotated[bool, idle(_COMPILE, False)] = False
    sync_before_reduce: Annotated[bool, idle(_COMPILE, False)] = False
    sync_after_reduce: Annotated[bool, idle(_COMPILE, False)] = False
    sync_before_allgather: Annotated[bool, idle(_COMPILE, False)] = False
    sync_after_allgather: Annotated[bool, idle(_COMPILE, False)] = False
    keep_int_input_tensors: Annotated[bool, idle(_COMPILE, True)] = True
    keep_all_input_tensors: Annotated[bool, idle(_COMPILE, False)] = False
    passes: Annotated[list[str] | None, idle(_COMPILE, None)] = None


Dtype = Literal["fp32", "bf16", "fp16"]
_BUFFERS = "buffers keep their dtype"


class DataTypes(Part):
    """In what gradients add up, beside the precision of the section."""

    grad_accum_dtype: Dtype | None = Field(None, description="in which gradients add up")
    param_dtype: Dtype | None = Field(None, description="that of bf16 or fp16, which choose it")
    buffer_dtype: Annotated[Dtype | None, idle(_BUFFERS, None)] = None
    keep_in_fp32_modules: Annotated[str | list[str], idle(_BUFFERS, "auto")] = "auto"


class FlopsProfiler(Switched):
    """DeepSpeed's profile of one step."""

    recompute_fwd_factor: float = Field(
        default=0.0, ge=0, description="forward passes that are computed again, as a share"
    )
    profile_step: int = Field(default=1, ge=1, description="the step that is measured")
    module_depth: int = Field(default=-1, ge=-1, description="depth of modules that are shown; -1 for all")
    top_modules: int = Field(default=1, ge=1, description="modules that are shown at each depth")
    detailed: bool = Field(default=True, description="show each module")
    output_file: str | None = Field(None, description="file to write to; else standard output")


class Throughput(Part):
    """DeepSpeed's timer of steps."""

    enabled: bool = Field(default=True, description="switches the timer on")
    synchronized: bool = Field(default=True, description="wait for the device before the time is read")


class Timers(Part):
    """DeepSpeed's timers."""

    throughput: Throughput = Field(Throughput(), description="the timer of steps")
