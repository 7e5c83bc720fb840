"""DeepSpeed ZeRO as a backend.

What differs from the protocol, and is put right here:
- DeepSpeed averages gradients over the ranks and divides by the accumulation count. The loss is multiplied by the
  number of ranks, and the division is switched off.
- ZeRO 0 in fp32 neither looks for non-finite gradients nor reports the norm; this adapter does both, with one norm
  that also clips. Every other mode skips a step by itself when the norm is not finite.
- DeepSpeed's defaults that have moved between releases are always written out.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from engine.backends import Stepped
from engine.config import RunConfig
from engine.deepspeed_section import BatchSizes, DeepSpeedSection
from engine.distributed import Ranks
from engine.errors import CheckpointError, ConfigError
from engine.optimizers import build_optimizer, is_deepspeed_only
from engine.schedules import build_scheduler

_TAG = "deepspeed"


def quiet() -> None:
    """Leave DeepSpeed's warnings, without its narration and torch's remarks on the collectives that it calls."""
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)


def deepspeed_config(section: DeepSpeedSection, sizes: BatchSizes) -> dict[str, Any]:
    """The dictionary that DeepSpeed is given: the section, with what the engine resolves written out."""
    config = section.model_dump(mode="json", exclude_none=True, by_alias=False, exclude={"optimizer", "scheduler"})
    config |= {
        "train_batch_size": sizes.global_batch_size,
        "train_micro_batch_size_per_gpu": sizes.micro_batch_size,
        "gradient_accumulation_steps": sizes.grad_accum_steps,
    }
    config.setdefault("steps_per_print", None)
    if is_deepspeed_only(section.optimizer):
        config["optimizer"] = section.optimizer.model_dump(mode="json")
    if _engine_clips(section):
        config["gradient_clipping"] = 0.0
    return config


def _engine_clips(section: DeepSpeedSection) -> bool:
    autocast = bool(section.torch_autocast and section.torch_autocast.get("enabled"))
    return not (section.zero_optimization.stage or section.bf16.enabled or section.fp16.enabled or autocast)


class DeepSpeedBackend:
    """engine.backends.Backend on deepspeed.initialize."""

    name = "deepspeed"

    def __init__(self, model: nn.Module, config: RunConfig, sizes: BatchSizes, ranks: Ranks, total_steps: int) -> None:
        import deepspeed

        quiet()
        if ranks.device.type == "cpu":
            # left to itself, DeepSpeed probes its operators with the machine's compiler and then builds a collective of
            # its own at a user's first step, for minutes; gloo's serves
            deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed(dist_backend="nccl" if ranks.device.type == "cuda" else "gloo", verbose=False)
        section = config.deepspeed
        optimizer = (
            None if is_deepspeed_only(section.optimizer) else partial(build_optimizer, section=section.optimizer)
        )
        try:
            self.engine, self.optimizer, _, self.scheduler = deepspeed.initialize(
                model=model,
                model_parameters=[p for p in model.parameters() if p.requires_grad],
                optimizer=optimizer,
                lr_scheduler=partial(build_scheduler, section=section.scheduler, total_steps=total_steps),
                config=deepspeed_config(section, sizes),
                dist_init_required=False,
            )
        except (ValueError, AssertionError, NotImplementedError) as error:
            raise ConfigError(f"{config.source}: deepspeed: DeepSpeed does not accept this section: {error}") from error
        self.model: nn.Module = self.engine
        self.module: nn.Module = self.engine.module
        self._world_size = ranks.world_size
        self._micro_step = 0
        self._clip = section.gradient_clipping if _engine_clips(section) else None
        self._parameters = [p for p in self.module.parameters() if p.requires_grad]

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed wants step() after every micro-batch; all but the last of a step only count
        if self._micro_step:
            self.engine.step()
        self._micro_step += 1
        self.engine.backward(loss * self._world_size, scale_wrt_gas=False)

    def step(self) -> Stepped:
        self._micro_step = 0
        norm = None
        if self._clip is not None:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            norm = get_total_norm(gradients)
            if not torch.isfinite(norm):
                for parameter in self._parameters:
                    parameter.grad = None
                # as DeepSpeed does in its other modes: no update, no schedule, but the step is counted
                self.engine.micro_steps += 1
                self.engine.global_steps += 1
                self.engine.skipped_steps += 1
                return Stepped(float("inf"), skipped=True)
            if self._clip > 0:
                clip_grads_with_norm_(self._parameters, self._clip, norm)
        self.engine.step()
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        return Stepped(float("inf") if norm is None else norm, skipped=not self.engine.was_step_applied())

    def learning_rate(self) -> float:
        return float(self.engine.get_lr()[0])

    def loss_scale(self) -> float:
        return float(self.engine._get_optimizer_loss_scale() or 1.0) if self.engine.fp16_enabled() else 1.0

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), tag=_TAG)
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed found nothing to load in it")

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        masters = self._unsharded_masters()
        for name, parameter in self.module.named_parameters():
            master = masters.get(parameter)
            if master is None:
                master = safe_get_full_fp32_param(parameter)
            yield name, (parameter if master is None else master).detach().to("cpu", copy=True)
        for name, buffer in _persistent_buffers(self.module):
            yield name, buffer.detach().to("cpu", copy=True)

    def _unsharded_masters(self) -> dict[nn.Parameter, Tensor]:
        """The fp32 copies that ZeRO 0 keeps of half-precision parameters, which DeepSpeed's own access leaves out."""
        low = getattr(self.engine.optimizer, "fp16_groups", [])
        high = getattr(self.engine.optimizer, "fp32_groups", [])
        if self.engine.zero_optimization() or not high:
            return {}
        return {
            p: master
            for group, masters in zip(low, high, strict=True)
            for p, master in zip(group, masters, strict=True)
        }


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
