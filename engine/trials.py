"""The largest micro-batch that fits, found by trying: `launchers/train.py --find-micro-batch`.

    find_micro_batch(trainer)      before trainer.run(), which then trains with what was found

A trial is one whole step and one more forward and backward pass, because the optimizer makes its state in the first
step; it is made by the trainer's own code, on all ranks, on the samples that need most memory. Afterwards the run is
put together again as it was before, so no trial leaves a trace. Sizes whose counted memory alone is beyond the device's
are not tried: a GPU's allocator refuses, but a machine that has no memory left for a CPU's ends the process.
"""

from __future__ import annotations

import time
from bisect import bisect_right

import numpy as np
import psutil
import torch
from tqdm import tqdm

from trunkline.engine.config.deepspeed_section import BatchSizes
from trunkline.engine.data.loading import collate
from trunkline.engine.data.order import lengths_of
from trunkline.engine.errors import TrunklineError
from trunkline.engine.machine.hardware import peak_memory, reset_peak_memory
from trunkline.engine.machine.log import bars_are_hidden
from trunkline.engine.memory.micro_batch import divisors, resized, ways_out
from trunkline.engine.memory.shortage import OutOfMemory, Shortage
from trunkline.engine.optim.parameter_rules import freeze
from trunkline.engine.plan_text import readable_size
from trunkline.engine.planned_memory import activation_bytes
from trunkline.engine.ranks.distributed import Ranks, gather
from trunkline.engine.ranks.launch import local_world_size
from trunkline.engine.task import Samples
from trunkline.engine.trainer import Trainer

_SHARE_OF_A_CPU = 0.8  # of what is free: an activation's gradient is not counted


def find_micro_batch(trainer: Trainer) -> None:
    """Find it by bisection and remember it with the run, which is ready to begin. Called on all ranks.

    A run that remembers its micro-batch keeps to it. Raises TrunklineError if the smallest does not fit.
    """
    if trainer.micro.notes:
        trainer.say(f"not looking for a micro-batch: remove {trainer.micro.path} to look again")
        return
    sizes = trainer.micro.sizes
    smallest, *_ = possible = divisors(sizes, trainer.micro.multiple)
    candidates = _not_hopeless(trainer, possible)
    fits, too_large = -1, len(candidates)  # places in the list
    shortage = Shortage("counted memory alone is beyond the device's", agreed=True)
    hidden = not trainer.ranks.is_main or bars_are_hidden()
    with tqdm(total=len(candidates).bit_length(), desc="find micro-batch", unit="trial", disable=hidden) as bar:
        while too_large - fits > 1:
            middle = (fits + too_large) // 2
            outcome = _trial(trainer, resized(sizes, candidates[middle]))
            if isinstance(outcome, Shortage):
                too_large, shortage = middle, outcome
                trainer.say(f"micro-batch {candidates[middle]:>6}: out of memory ({shortage.text})")
            else:
                fits = middle
                trainer.say(f"micro-batch {candidates[middle]:>6}: {outcome}")
            bar.update()
        bar.total = bar.n
    if fits < 0:
        what = "a single sample does" if smallest == 1 else f"{smallest} samples that belong together do"
        raise TrunklineError(f"{what} not fit into memory{ways_out(shortage, trainer.assembly.plan)}")
    trainer.micro.take(resized(sizes, candidates[fits]), "found by --find-micro-batch")
    trainer.room.rebuild()
    trainer.room.note_sizes()
    trainer.say(f"training with micro-batches of {candidates[fits]}, remembered in {trainer.micro.path}")


def _trial(trainer: Trainer, wanted: BatchSizes) -> str | Shortage:
    """Peak memory and speed, for a person; or who ran out of memory."""
    ranks, dataset = trainer.ranks, trainer.dataset
    accumulation = min(2, wanted.grad_accum_steps)  # from the second micro-batch on, the first one's gradients are kept
    total = wanted.micro_batch_size * ranks.world_size * accumulation
    sizes = BatchSizes(total, wanted.micro_batch_size, accumulation, ranks.world_size)
    trainer.micro.sizes = sizes
    trainer.room.rebuild()
    reset_peak_memory(ranks.device)
    heaviest = _heaviest(dataset, wanted.micro_batch_size)
    samples = [dataset[int(index)] for index in heaviest]
    try:
        with trainer.room.attempt():
            for is_timed in (False, True):
                batches = [collate(trainer.task, samples, [heaviest, heaviest]) for _ in range(accumulation)]
                begin = _now(ranks)
                trainer.stepper.accumulate(batches)
                if not is_timed:
                    trainer.backend.step()
            seconds = _now(ranks) - begin
    except OutOfMemory as error:
        return error.shortage
    peak = max(gather(peak_memory(ranks.device), ranks))
    return f"fits, peak {peak:.2f} GiB a rank, {seconds:.3g} s, {total / seconds:,.0f} samples/s"


def _heaviest(dataset: Samples, count: int) -> np.ndarray:
    """The samples that need most memory, int64 [count]; any, where the data set does not tell."""
    size, lengths = len(dataset), lengths_of(dataset)
    order = np.arange(size) if lengths is None else np.argsort(-lengths, kind="stable")
    return order[np.arange(count) % size]


def _not_hopeless(trainer: Trainer, candidates: list[int]) -> list[int]:
    """Those whose counted memory is no more than the device's on every rank."""
    counted = _counted_bytes(trainer, candidates)
    budget = min(gather(_budget_bytes(trainer.ranks), trainer.ranks))
    worth = bisect_right(counted, budget)
    if worth < len(candidates):
        trainer.say(
            f"micro-batch {candidates[worth]:>6} and more: not tried, {readable_size(counted[worth])} of parameters, "
            f"states and activations counted for {readable_size(budget)} of memory",
        )
    return candidates[:worth]


def _counted_bytes(trainer: Trainer, candidates: list[int]) -> list[float]:
    """A lower bound of what each size needs; activations grow in proportion, apart from what all samples share."""
    plan, settings = trainer.assembly.plan, trainer.config.training
    zero = trainer.config.deepspeed.zero_optimization
    states = sum(size for name, size in plan["memory_bytes"].items() if name != "activations")
    if zero.offloads:
        states = 0  # it is elsewhere, wholly or partly
    two, four = 0, 0
    if not (settings.activation_checkpointing or settings.compile):  # neither of which the count knows
        model = freeze(trainer.task.build_model(), trainer.config)
        gpu = trainer.ranks.device.type == "cuda"
        two, four = (activation_bytes(trainer.task, model, trainer.config, size, gpu) or 0 for size in (2, 4))
    return [states + max(0.0, two + (four - two) / 2 * (size - 2)) for size in candidates]


def _budget_bytes(ranks: Ranks) -> float:
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_properties(ranks.device).total_memory
    return _SHARE_OF_A_CPU * psutil.virtual_memory().available / local_world_size()


def _now(ranks: Ranks) -> float:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
