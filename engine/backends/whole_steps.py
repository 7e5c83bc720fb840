"""DeepSpeed's steps in 16 bits, put right and without its launches for each parameter.

    take_whole_steps(wrapper)      of DeepSpeed's optimizer, once

ZeRO 0 to 2 look at each gradient for what is not finite. The norm, which they take next, says the same of all of them:
it is not finite where a gradient is not, and then the step is skipped. ZeRO 0 also widens, measures, scales and narrows
parameter by parameter. For 128 parameters those are 130 waits for a GPU and some 1,300 launches a step.

In the step in which the loss scale of fp16 grows, DeepSpeed divides the gradients by the new scale, which their loss
was not multiplied by. Here a scale changes after the step.
"""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import torch


def take_whole_steps(wrapper: Any) -> None:
    """Change what deepspeed.initialize put around an optimizer: of ZeRO 0 in 16 bits, and of ZeRO 1 to 3."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(wrapper, FP16_UnfusedOptimizer) and not wrapper.fused_lamb_legacy:
        wrapper.step = MethodType(_step, wrapper)
    if type(wrapper) is DeepSpeedZeroOptimizer and wrapper.compute_grad_norm and not wrapper.cpu_offload:
        wrapper.check_overflow = lambda partition_gradients=True: None
    if isinstance(wrapper, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3):
        _scale_late(wrapper)


def _scale_late(wrapper: Any) -> None:
    step, update_scale, overflows = wrapper.step, wrapper._update_scale, list[bool]()

    def step_and_scale(*arguments: Any, **named: Any) -> Any:
        result = step(*arguments, **named)
        while overflows:
            update_scale(overflows.pop())
        return result

    wrapper.step, wrapper._update_scale = step_and_scale, lambda has_overflow=False: overflows.append(has_overflow)


@torch.no_grad()
def _step(wrapper: Any, closure: None = None) -> bool:
    """FP16_UnfusedOptimizer.step, of gradients of a loss times the scale. Returns whether the step was skipped."""
    narrow = [parameter for group in wrapper.fp16_groups for parameter in group]
    wide = [parameter for group in wrapper.fp32_groups for parameter in group]
    gradients = [parameter.grad for parameter in narrow if parameter.grad is not None]
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
    if not math.isfinite(norm):
        return wrapper._skip_invalid_grad_norm()
    wrapper.overflow, wrapper._global_grad_norm = False, norm / wrapper.loss_scale_config.cur_scale
    scale = wrapper.unscale_and_clip_grads(norm, apply_scale=False)
    wrapper._update_scale(False)
    for own, parameter in zip(narrow, wide, strict=True):
        parameter.grad = (torch.zeros_like if own.grad is None else torch.empty_like)(parameter)
    widened = [parameter.grad for own, parameter in zip(narrow, wide, strict=True) if own.grad is not None]
    if widened:
        torch._foreach_copy_(widened, gradients)
        if scale != 1:
            torch._foreach_mul_(widened, 1 / scale)
    wrapper.optimizer.step()
    for parameter in wide:
        parameter.grad = None
    torch._foreach_copy_(narrow, wide)
    return False
