"""How large a run's micro-batches are.

They get smaller when memory runs out, and the run remembers it.

    micro = MicroBatches(folder, sizes, facts, ranks)     what an earlier process of the run remembered, if it fits
    micro.sizes, micro.evaluation
    micro.halve(step, shortage, plan), micro.halve_evaluation(step, shortage, plan)     one line each, for a person

The global batch stays as it is, so the gradient of a step does: accumulation grows by what the micro-batch loses.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trunkline.engine.config.deepspeed_section import BatchSizes, keeps_together
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.errors import TrunklineError
from trunkline.engine.machine.files import replace_whole
from trunkline.engine.machine.log import LOG
from trunkline.engine.machine.reading import read_object, reason
from trunkline.engine.memory.shortage import Shortage
from trunkline.engine.plan_text import readable_size
from trunkline.engine.ranks.distributed import Ranks, from_main, on_main

MEMORY = "memory.json"


def divisors(sizes: BatchSizes, multiple: int = 1) -> list[int]:
    """The micro-batches that the same global batch can be split into, from the smallest; `multiple` samples in
    contiguous places stay together."""
    share = sizes.global_batch_size // sizes.world_size
    return [
        size for size in range(1, share + 1) if share % size == 0 and keeps_together(resized(sizes, size), multiple)
    ]


def resized(sizes: BatchSizes, micro_batch_size: int) -> BatchSizes:
    """The same global batch in micro-batches of another size, which divides it."""
    steps, rest = divmod(sizes.global_batch_size, micro_batch_size * sizes.world_size)
    assert steps > 0 == rest
    return replace(sizes, micro_batch_size=micro_batch_size, grad_accum_steps=steps)


def memory_facts(
    config: RunConfig, identity: dict[str, Any], device: torch.device, sizes: BatchSizes
) -> dict[str, Any]:
    """What a remembered micro-batch holds for: the same run on the same layout and kind of device."""
    kind = "cpu"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        kind = f"{properties.name}, {readable_size(properties.total_memory)}"
    return identity | {
        "device": kind,
        "configured_micro_batch_size": sizes.micro_batch_size,
        "activation_checkpointing": config.training.activation_checkpointing,
    }


class MicroBatches:
    """The sizes in force.

    Args:
        folder: the run's; what is learnt is kept in its memory.json.
        sizes: as configured.
        facts: what that holds for (`memory_facts`); remembered sizes of other facts are left alone.
        ranks: this process among all.
        multiple: samples of a micro-batch that belong together (`Task.micro_batch_multiple`), in training.
    """

    def __init__(self, folder: Path, sizes: BatchSizes, facts: dict[str, Any], ranks: Ranks, multiple: int = 1) -> None:
        self.path, self.facts, self.ranks, self.multiple = folder / MEMORY, facts, ranks, multiple
        self.sizes, self._evaluation = sizes, 0
        self.notes: list[str] = []
        """What was remembered, for whoever starts the run."""
        self._recall()

    @property
    def evaluation(self) -> int:
        """The micro-batch of evaluations: that of training, or what memory has left of it."""
        return min(self.sizes.micro_batch_size, self._evaluation or self.sizes.micro_batch_size)

    def halve(self, step: int, shortage: Shortage, plan: dict[str, Any]) -> str:
        """Halve the training's micro-batch (an odd one goes to the next divisor) and remember it. Called on all ranks,
        or on the one that ran out alone. Raises TrunklineError, with the plan's figures, where it cannot be smaller."""
        old = self.sizes
        smaller = [size for size in divisors(old, self.multiple) if size <= old.micro_batch_size // 2]
        if not smaller:
            size = old.micro_batch_size
            samples = "1 sample" if size == 1 else f"{size} samples, which belong together"
            raise TrunklineError(f"step {step} does not fit into memory with {samples}{ways_out(shortage, plan)}")
        self.sizes = resized(old, smaller[-1])
        line = (
            f"step {step} ran out of memory with {old.micro_batch_size} samples ({shortage.text}): now "
            f"{self.sizes.micro_batch_size} x {old.world_size} ranks x {self.sizes.grad_accum_steps} accumulation "
            f"steps, the same global batch of {old.global_batch_size}"
        )
        self.remember(f"step {step} ran out of memory with {old.micro_batch_size}", shortage.agreed)
        return line

    def halve_evaluation(self, step: int, shortage: Shortage, plan: dict[str, Any]) -> str:
        """The same for the micro-batch of evaluations, whose metrics do not depend on it."""
        old = self.evaluation
        if old == 1:
            raise TrunklineError(
                f"the evaluation at step {step} does not fit into memory with 1 sample{ways_out(shortage, plan)}"
            )
        self._evaluation = old // 2
        self.remember(f"the evaluation at step {step} ran out of memory with {old}", shortage.agreed)
        return f"the evaluation at step {step} ran out of memory with {old} samples ({shortage.text}): now {old // 2}"

    def take(self, sizes: BatchSizes, why: str) -> None:
        """Use these sizes and remember them. Called on all ranks."""
        self.sizes = sizes
        self.remember(why)

    def values(self) -> dict[str, float]:
        """The sizes by name, for metrics."""
        return {
            "micro_batch_size": self.sizes.micro_batch_size,
            "grad_accum_steps": self.sizes.grad_accum_steps,
            "evaluation_micro_batch_size": self.evaluation,
        }

    def remember(self, why: str, together: bool = True) -> None:
        """Let a resumed run start with the present sizes. Raises TrunklineError if the file cannot be written."""
        sizes = {"micro_batch_size": self.sizes.micro_batch_size, "evaluation_micro_batch_size": self.evaluation}
        text = json.dumps(sizes | {"why": why, "for": self.facts}, indent=2) + "\n"
        if together:
            on_main(lambda: replace_whole(self.path, text), self.ranks, str(self.path))
            return
        try:
            replace_whole(self.path, text, f"-{self.ranks.rank}")  # another rank may be doing the same
        except OSError as error:
            raise TrunklineError(f"{self.path}: cannot be written ({error.strerror}); make room") from error

    def _recall(self) -> None:
        found = from_main(self._read() if self.ranks.is_main else None, self.ranks)
        if found is None:
            return
        micro, evaluation, why = found
        self.sizes, self._evaluation = resized(self.sizes, micro), evaluation
        self.notes.append(
            f"micro-batches of {micro} x {self.sizes.grad_accum_steps} accumulation steps, of {self.evaluation} in "
            f"evaluations, as {self.path} remembers: {why}"
        )

    def _read(self) -> tuple[int, int, str] | None:
        try:
            found = read_object(self.path)
            if found["for"] != self.facts:
                return None
            micro, evaluation = found["micro_batch_size"], found["evaluation_micro_batch_size"]
            if type(micro) is not int or micro not in divisors(self.sizes, self.multiple):
                whole = f" into groups of {self.multiple}" if self.multiple > 1 else ""
                raise ValueError(f"micro_batch_size {micro!r:.80} does not divide the global batch{whole}")
            if type(evaluation) is not int or not 1 <= evaluation <= self.sizes.global_batch_size:
                raise ValueError(f"evaluation_micro_batch_size {evaluation!r:.80} is no number of samples")
            return micro, evaluation, str(found["why"])[:1000]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError) as error:
            LOG.warning(f"{self.path} is left aside ({reason(error)}); starting with the configured micro-batch")
            return None


def ways_out(shortage: Shortage, plan: dict[str, Any]) -> str:
    """What a run can do that does not fit with one sample, after the plan's figures; ends a sentence."""
    training, section = plan["config"]["training"], plan["config"]["deepspeed"]
    zero = section["zero_optimization"]
    remedies = [
        ("training.activation_checkpointing", not training["activation_checkpointing"]),
        ("deepspeed.bf16", not (section["bf16"]["enabled"] or section["fp16"]["enabled"])),
        ("a higher deepspeed.zero_optimization.stage", plan["world_size"] > 1 and zero["stage"] < 3),
        ("zero_optimization.offload_optimizer to the cpu", zero["stage"] > 0 and "offload_optimizer" not in zero),
    ]
    figures = ", ".join(
        f"{name} {'unknown' if size is None else readable_size(size)}"
        for name, size in plan["memory_bytes"].items()
        if size != 0
    )
    return f" ({shortage.text}); counted are, a rank: {figures}. Use " + ", ".join(
        [*(remedy for remedy, helps in remedies if helps), "shorter samples or a smaller model"]
    )
