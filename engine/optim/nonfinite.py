"""Which rank and which parameter a non-finite gradient came from.

It is found by repeating the step that was skipped.

A skipped step left the parameters alone, and its randomness is a function of seed, step and rank, so repeating it
shows the same failure. Ordinary steps pay nothing for this.
"""

from __future__ import annotations

import torch
from torch import nn

from trunkline.engine.ranks.distributed import Ranks, gather
from trunkline.engine.task import Batch, Task


def locate(task: Task, model: nn.Module, micro_batches: list[Batch], ranks: Ranks) -> str:
    """One line: ranks, and on each the loss or the first parameter whose gradient is not finite. On all ranks."""
    lines = gather(_locate_here(task, model, micro_batches), ranks)
    found = [f"rank {rank}: {line}" for rank, line in enumerate(lines) if line]
    return "; ".join(found) or "not seen again when the step was repeated"


def _locate_here(task: Task, model: nn.Module, micro_batches: list[Batch]) -> str:
    found = ""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for number, batch in enumerate(micro_batches):  # all of them, found or not: the model may be sharded over the ranks
        loss = task.loss(model, batch)["loss"]
        gradients = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
        if not found and not torch.isfinite(loss):
            found = f"loss {loss.item()} in micro-batch {number}"
        for (name, _), gradient in zip(named, gradients, strict=True):
            if not found and gradient is not None and not torch.isfinite(gradient).all():
                found = f"gradient of {name} in micro-batch {number}"
    return found
