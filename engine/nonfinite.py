"""Which rank and which parameter a non-finite gradient came from: found by repeating the step that was skipped.

A skipped step left the parameters alone, and its randomness is a function of seed, step and rank, so repeating it
shows the same failure. Ordinary steps pay nothing for this.
"""

from __future__ import annotations

import torch
from torch import nn

from engine.distributed import Ranks, gather
from engine.task import Batch, Task


def locate(task: Task, model: nn.Module, micro_batches: list[Batch], ranks: Ranks) -> str:
    """One line: ranks, and on each the loss or the first parameter whose gradient is not finite. On all ranks."""
    lines = gather(_locate_here(task, model, micro_batches), ranks)
    found = [f"rank {rank}: {line}" for rank, line in enumerate(lines) if line]
    return "; ".join(found) or "not seen again when the step was repeated"


def _locate_here(task: Task, model: nn.Module, micro_batches: list[Batch]) -> str:
    names = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for number, batch in enumerate(micro_batches):
        loss = task.loss(model, batch)["loss"]
        if not torch.isfinite(loss):
            return f"loss {loss.item()} in micro-batch {number}"
        gradients = torch.autograd.grad(loss, [parameter for _, parameter in names], allow_unused=True)
        for (name, _), gradient in zip(names, gradients, strict=True):
            if gradient is not None and not torch.isfinite(gradient).all():
                return f"gradient of {name} in micro-batch {number}"
    return ""
