"""DeepSpeed ZeRO as a backend.

What differs from the protocol, and is put right here:
- DeepSpeed averages gradients over the ranks and divides by the accumulation count. The loss is multiplied by the
  number of ranks, and the division is switched off.
- ZeRO 0 in fp32 neither looks for non-finite gradients nor reports the norm; this adapter does both, with one norm
  that also clips. Every other mode skips a step by itself when the norm is not finite.
- ZeRO 0 in fp16 divides gradients by a loss scale that DeepSpeed's engine did not multiply the loss by. Here it is.
- In bf16 and fp16 it narrows buffers too. They are tables and statistics, such as the frequencies of rotary positions,
  and keep their dtype, as under FSDP.
- The fp32 masters that it makes in bf16 and fp16 are copies of the rounded parameters, and ZeRO 0 decays them once
  more and counts a step that was none. They begin as the model was built, and the optimizer with nothing.
- It has no fp32 masters of frozen parameters: 16 bits round them, in checkpoints too. A note says so.
- Its engine's train() and eval() leave the engine's own `training` as it is, which a task may ask for.
- On one rank in fp32 ZeRO would copy each parameter and gradient to share them with nobody: there every stage is 0.
  There the module and autograd are called directly, and DeepSpeed's engine only if it is to print times or profiles.
- On one rank in 16 bits stages 1 and 2 do not gather gradients, which would copy each.
- DeepSpeed's defaults that have moved between releases are always written out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from trunkline.engine.backends import Stepped
from trunkline.engine.backends.model_options import blocks
from trunkline.engine.backends.whole_steps import take_whole_steps
from trunkline.engine.backends.zero_layout import ZeroLayout
from trunkline.engine.config import deepspeed_section
from trunkline.engine.config.deepspeed_section import (
    BatchSizes,
    DeepSpeedSection,
    bucket_size,
    gathers_gradients,
    parameter_dtype,
)
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim.extensions import compilation_watched
from trunkline.engine.optim.optimizers import build_optimizer
from trunkline.engine.optim.parameter_rules import parameter_groups
from trunkline.engine.optim.schedules import build_scheduler
from trunkline.engine.ranks.distributed import Ranks
from trunkline.engine.state.sharded_state import Fragment, persistent_buffers


def set_log_level(level: str) -> None:
    """Show DeepSpeed's lines of that level and above, without torch's remarks on the collectives that it calls."""
    from deepspeed.utils.logging import set_log_level_from_string

    set_log_level_from_string(level)
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)


def join(device: torch.device) -> None:
    """Let DeepSpeed use the process group that there is."""
    import deepspeed

    if device.type == "cpu":
        # left to itself, DeepSpeed probes its operators with the machine's compiler and then builds a collective of
        # its own at a user's first step, for minutes; gloo's serves
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)


def deepspeed_config(section: DeepSpeedSection, sizes: BatchSizes, num_parameters: int) -> dict[str, Any]:
    """The dictionary that DeepSpeed is given: the section, with what the engine resolves written out."""
    ours = {"optimizer", "scheduler", "activation_checkpointing", "aio", "compile"}  # the last three ask for nothing
    config = section.model_dump(mode="json", exclude_none=True, by_alias=False, exclude=ours)
    if section.comms_logger is not None and not section.comms_logger.enabled:
        del config["comms_logger"]  # which DeepSpeed takes for enabled where it is present
    config |= {
        "train_batch_size": sizes.global_batch_size,
        "train_micro_batch_size_per_gpu": sizes.micro_batch_size,
        "gradient_accumulation_steps": sizes.grad_accum_steps,
    }
    config.setdefault("steps_per_print", None)
    zero = config["zero_optimization"]
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
        zero.setdefault(bucket, bucket_size(num_parameters))
    zero.setdefault("contiguous_gradients", gathers_gradients(section, sizes.world_size))
    for part in zero.keys() & {"offload_optimizer", "offload_param"}:
        zero[part] = {key: zero[part][key] for key in ("device", "pin_memory")}  # the others ask for nothing
    if section.optimizer.is_deepspeed_only:
        config["optimizer"] = section.optimizer.model_dump(mode="json")
    if _engine_clips(section):
        config["gradient_clipping"] = 0.0
    return config


def _engine_clips(section: DeepSpeedSection) -> bool:
    autocast = section.torch_autocast is not None and section.torch_autocast.enabled
    return not (section.zero_optimization.stage or section.bf16.enabled or section.fp16.enabled or autocast)


class DeepSpeedBackend:
    """trunkline.engine.backends.Backend on deepspeed.initialize."""

    name = "deepspeed"

    def __init__(
        self, model: nn.Module, config: RunConfig, sizes: BatchSizes, ranks: Ranks, total_steps: int,
        kept: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        import deepspeed
        from deepspeed.runtime.base_optimizer import ZeROOptimizer

        section = config.deepspeed
        set_log_level("info" if section.dump_state else "warning")
        join(ranks.device)
        alone = deepspeed_section.shares_nothing(section, ranks.world_size)
        if alone:
            zero = type(section.zero_optimization)(stage=0)
            section = section.model_copy(update={"zero_optimization": zero})
        if config.training.compile:  # ZeRO 3 gathers a whole block then, for its hooks must stand around a graph
            for block in blocks(model):
                deepspeed.utils.set_z3_leaf_module(block, True)
        optimizer = None if section.optimizer.is_deepspeed_only else partial(build_optimizer, section=section.optimizer)
        weights = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.notes = _notes_of_frozen(model, parameter_dtype(section))
        buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
        try:
            with compilation_watched(ranks.is_main):
                self.engine, _, _, self.scheduler = deepspeed.initialize(
                    model=model,
                    model_parameters=parameter_groups(model, config, kept),
                    optimizer=optimizer,
                    lr_scheduler=partial(build_scheduler, section=section.scheduler, total_steps=total_steps),
                    config=deepspeed_config(section, sizes, sum(p.numel() for p in model.parameters())),
                    dist_init_required=False,
                )
        except (ValueError, AssertionError, NotImplementedError) as error:
            raise ConfigError(f"deepspeed: DeepSpeed does not accept this section: {error}") from error
        if section.log_level is None:  # only now: it narrates its start
            set_log_level("info" if section.reports else "warning")
        for module, name, buffer in buffers:
            if buffer is not None and module._buffers[name].dtype != buffer.dtype:  # type: ignore[union-attr]
                module._buffers[name] = buffer.to(ranks.device)
        self.engine.train = MethodType(nn.Module.train, self.engine)
        self.engine.eval = MethodType(nn.Module.eval, self.engine)
        take_whole_steps(self.engine.optimizer)
        self._scales_losses = self.engine.fp16_enabled() and not isinstance(self.engine.optimizer, ZeROOptimizer)
        self.module: nn.Module = self.engine.module
        self._direct = alone and not section.reports
        self.model: nn.Module = self.module if self._direct else self.engine
        self._ranks, self._layout = ranks, ZeroLayout(self.engine, ranks)
        if hasattr(scaler := self._dynamic_scaler(), "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False  # the trainer ends the run, and not at the first such step
        self._clip = section.gradient_clipping if _engine_clips(section) else None
        if ranks.world_size == 1 and self._clip is not None and section.communication_data_type is None:
            self.engine.enable_backward_allreduce = False  # it would copy each gradient twice, to reduce nothing
        self._parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.engine.zero_grad = self._drop_gradients  # its own looks for them in all modules, in every step
        if parameter_dtype(section) != torch.float32:
            self._begin_as_built(weights)

    @torch.no_grad()
    def _begin_as_built(self, weights: dict[str, Tensor]) -> None:
        """Put fp32 weights into the masters, and take back what DeepSpeed did to make the optimizer's state."""
        for fragment in self.fragments():
            if fragment.name in weights:
                part = slice(fragment.offset, fragment.offset + fragment.length)
                whole = weights[fragment.name].reshape(-1)
                fragment.owner.view(-1)[part] = whole[fragment.start : fragment.start + fragment.length].to(
                    fragment.owner.device
                )
        if self._layout.unsharded_masters():
            self.optimizer.state.clear()
        self.restore_derived(0, {})

    def backward(self, loss: Tensor, is_last: bool = True) -> None:
        self.engine.set_gradient_accumulation_boundary(is_last)
        if self._direct:
            loss.backward()
            return
        if self._ranks.world_size > 1:
            loss = loss * self._ranks.world_size
        if self._scales_losses:
            loss = loss * self.loss_scale()
        self.engine.backward(loss, scale_wrt_gas=False)

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def clip_at(self, max_norm: float) -> None:
        if self._clip is not None:
            self._clip = max_norm
        elif hasattr(self.engine.optimizer, "clip_grad"):
            self.engine.optimizer.clip_grad = max_norm
        else:  # torch_autocast without ZeRO
            self.engine._config.gradient_clipping = max_norm

    def step(self) -> Stepped:
        norm = None
        if self._clip is not None:
            for parameter in self._parameters:
                if parameter.grad is None:  # an unused one has the gradient 0, as where gradients are reduced
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [p.grad for p in self._parameters]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            if not math.isfinite(norm):
                self._drop_gradients()
                # as DeepSpeed does in its other modes: no update, no schedule, but the step is counted
                self.engine.micro_steps += 1
                self.engine.global_steps += 1
                self.engine.skipped_steps += 1
                return Stepped(float("inf"), skipped=True)
            factor = self._clip / (norm + 1e-6)
            if self._clip > 0 and factor < 1:
                torch._foreach_mul_(gradients, factor)
        self.engine.step()
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        return Stepped(float("inf") if norm is None else norm, skipped=not self.engine.was_step_applied())

    def learning_rate(self) -> float:
        return float(self.scheduler.learning_rate)

    def loss_scale(self) -> float:
        return float(self.engine._get_optimizer_loss_scale() or 1.0) if self.engine.fp16_enabled() else 1.0

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._layout.optimizer

    def gathered(self) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.module)  # ZeRO 3 gathers what a module needs when it is called

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        from deepspeed.runtime.torch_autocast import autocast_if_enabled

        with self._gathered_once(), autocast_if_enabled(self.engine):  # as the engine's own forward does
            yield self.module

    @contextmanager
    def _gathered_once(self) -> Iterator[None]:
        """ZeRO 3 without the hooks that gather and free parameters module by module."""
        if self.engine.zero_optimization_stage() < 3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        hooks = self.engine.optimizer.parameter_offload
        with GatheredParameters(list(self.module.parameters())):
            for hook in (*hooks.forward_hooks, *hooks.backward_hooks):
                hook.remove()
            hooks.forward_hooks, hooks.backward_hooks = [], []
            try:
                yield
            finally:
                hooks._register_deepspeed_module(self.module)

    def prefetch(self) -> None:
        """Nothing: ZeRO 0 to 2 keep parameters whole, ZeRO 3 prefetches by itself."""

    def fragments(self) -> list[Fragment]:
        return self._layout.fragments()

    def loss_scaler(self) -> dict[str, float]:
        scaler = self._dynamic_scaler()
        if scaler is None:
            return {}
        return {ours: getattr(scaler, theirs) for ours, theirs in _SCALER.items() if hasattr(scaler, theirs)}

    def refresh(self) -> None:
        self._layout.refresh()

    def restore_derived(self, applied_steps: int, loss_scaler: dict[str, float]) -> None:
        self.refresh()
        self.scheduler.forward(applied_steps)
        self.engine.global_steps = applied_steps
        scaler = self._dynamic_scaler()
        if scaler is not None:
            for ours, value in loss_scaler.items():
                if hasattr(scaler, _SCALER[ours]):
                    setattr(scaler, _SCALER[ours], value)

    def _dynamic_scaler(self) -> Any:
        wrapper = self.engine.optimizer
        scaler = getattr(wrapper, "loss_scale_config", None) or getattr(wrapper, "loss_scaler", None)
        return scaler if self.engine.fp16_enabled() and hasattr(scaler, "last_overflow_iter") else None

    def close(self) -> None:
        self.engine.destroy()  # else the hooks of ZeRO on the autograd graph keep it alive
        _forget_zero3_modules(set(self.module.modules()))

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._layout.whole_parameters()
        for name, buffer in persistent_buffers(self.module):
            yield name, buffer.detach().to("cpu", copy=True)


def _notes_of_frozen(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """A note if frozen parameters of the model, as it was built, hold more than `dtype` keeps."""
    frozen = [each.detach() for each in model.parameters() if each.is_floating_point() and not each.requires_grad]
    rounded = sum(each.numel() for each in frozen if not torch.equal(each, each.to(dtype).to(each.dtype)))
    kind = str(dtype).removeprefix("torch.")
    note = (
        f"note: DeepSpeed keeps frozen parameters in {kind}: {rounded:,} values lose precision, in checkpoints too. "
        "--backend fsdp keeps them in fp32"
    )
    return [note] if rounded else []


def _forget_zero3_modules(modules: set[nn.Module]) -> None:
    """Drop what ZeRO 3 leaves of a destroyed engine in a list of its module and in a cache of its class."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module not in modules]
    method = vars(PartitionedParameterCoordinator).get("_PartitionedParameterCoordinator__params_to_release")
    for cell in getattr(method, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


_SCALER = {
    "scale": "cur_scale", "iteration": "cur_iter", "last_overflow": "last_overflow_iter", "hysteresis": "cur_hysteresis"
}  # fmt: skip
