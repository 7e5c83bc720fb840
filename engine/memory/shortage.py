"""Running out of memory: one rank sees it, and all ranks hear of it.

No rank is left waiting in a collective.

    is_out_of_memory(error)         whether this is what an allocator says
    with Attempts(ranks).attempt(agreed=True): ...      raises OutOfMemory on all ranks where it came on any

A rank that has no memory left does not join the collectives that the others are in, which then wait for it for ever.
So in an agreed attempt every rank asks the others, before each collective that it is about to issue, whether they are
all well; a rank that is not answers the question that the others ask next. It then holds for any backend that no rank
issues a collective that another one will not join. The question is an all-reduce of one number on a CPU group, tens of
microseconds or more for every collective: only attempts that are not yet known to fit are agreed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trunkline.engine.ranks.distributed import Ranks, gather, with_own_group

_SAYINGS = (
    "out of memory",  # CUDA, HIP and NCCL
    "can't allocate memory",  # torch's allocator for the CPU
    "not enough memory: you tried to allocate",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",  # cuDNN 9, of the host and of the device
    "HIPBLAS_STATUS_ALLOC_FAILED",
)
_COLLECTIVES = ("all", "barrier", "broadcast", "gather", "reduce", "scatter", "start_coalescing", "end_coalescing")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused: torch's own error, Python's, or a library's that is told by its words alone."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error) for saying in _SAYINGS)


@dataclass(frozen=True)
class Shortage:
    """Which rank ran out of memory, and what its allocator said.

    `agreed`: all ranks have heard of it. Else this one is alone, and the others are somewhere in the step.
    """

    text: str
    agreed: bool


class OutOfMemory(Exception):  # noqa: N818  # not an error of a run yet
    """Memory ran out. Its traceback holds what the failed attempt held: keep the `shortage` and drop the exception."""

    def __init__(self, shortage: Shortage) -> None:
        super().__init__(shortage.text)
        self.shortage = shortage


class Attempts:
    """What the ranks try together. Made on all ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = with_own_group(ranks)
        self._coalescing = False

    @contextmanager
    def attempt(self, agreed: bool) -> Iterator[None]:
        """Do what is within; raise OutOfMemory if memory does not suffice.

        With `agreed`, which is the same on all ranks, no other thread may use a process group meanwhile. On a single
        rank it makes no difference.
        """
        alone = self.ranks.world_size == 1
        said = ""
        try:
            if agreed and not alone:
                with self._asking_before_collectives():
                    yield
            else:
                yield
        except Exception as error:
            if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
                raise
            said = f"{type(error).__name__}: {error}".splitlines()[0]
        if agreed and not alone:
            self._ask(said)
        elif said:
            raise OutOfMemory(Shortage(f"rank {self.ranks.rank}: {said}", agreed=alone))

    def _ask(self, said: str = "") -> None:
        """Raise OutOfMemory on all ranks if one of them has come here with something to say."""
        anyone = torch.tensor(bool(said), dtype=torch.int32, device="cpu")
        dist.all_reduce(anyone, op=dist.ReduceOp.MAX, group=self.ranks.group)
        if anyone:
            reports = gather(said, self.ranks)
            told = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if report]
            raise OutOfMemory(Shortage("; ".join(told), agreed=True))

    @contextmanager
    def _asking_before_collectives(self) -> Iterator[None]:
        """Every backend's collectives are methods of ProcessGroup: put the question before each of them."""
        methods = {
            name: method
            for name, method in vars(dist.ProcessGroup).items()
            if name.lstrip("_").startswith(_COLLECTIVES) and callable(method)
        }
        for name in methods:
            setattr(dist.ProcessGroup, name, self._asking(name, getattr(dist.ProcessGroup, name)))
        try:
            yield
        finally:
            self._coalescing = False
            for name, method in methods.items():
                setattr(dist.ProcessGroup, name, method)

    def _asking(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def ask_first(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            # once for collectives that are launched as one: a start without its end would block all later ones
            if group is not self.ranks.group and not self._coalescing:
                self._ask()
            result = collective(group, *args, **kwargs)
            if name.endswith("_coalescing"):
                self._coalescing = name == "_start_coalescing"
            return result

        return ask_first
