"""The memory of a run, counted and not measured: model and optimizer states, activations, a checkpoint's files."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from trunkline.engine.config import deepspeed_section
from trunkline.engine.config.deepspeed_section import parameter_dtype
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.errors import MissingDataError
from trunkline.engine.memory.shortage import is_out_of_memory
from trunkline.engine.optim.optimizers import build_optimizer
from trunkline.engine.task import Task


def state_bytes(config: RunConfig, parameters: int, trainable: int, world_size: int) -> dict[str, int]:
    """Parameters, gradients, fp32 master weights and optimizer states of one rank under the ZeRO stage."""
    zero, width = config.deepspeed.zero_optimization, _parameter_bytes(config)
    shards = [world_size if zero.stage >= stage else 1 for stage in (3, 2, 1)]
    optimizer_on_device = 0 if zero.offload_optimizer is not None and zero.offload_optimizer.device == "cpu" else 1
    # ZeRO keeps a master copy in fp32 even of fp32 parameters, in the flat partitions that it updates
    partitioned = zero.stage > 0 and not deepspeed_section.shares_nothing(config.deepspeed, world_size)
    master = 4 * trainable if width == 2 or partitioned else 0
    average = {"average": math.ceil(4 * trainable / shards[2]) * optimizer_on_device} if config.training.ema else {}
    return {
        "parameters": math.ceil(width * parameters / shards[0]),
        "gradients": math.ceil(width * trainable / shards[1]),
        "master weights": math.ceil(master / shards[2]) * optimizer_on_device,
        "optimizer": math.ceil(_optimizer_bytes_a_parameter(config) * trainable / shards[2]) * optimizer_on_device,
    } | average


def checkpoint_bytes(config: RunConfig, parameters: int, trainable: int) -> int:
    """All files of one checkpoint over all ranks: every value once, in fp32, with what the optimizer keeps for it."""
    frozen = _parameter_bytes(config) * (parameters - trainable)
    average = 4 if config.training.ema else 0
    return round(frozen + (4 + average + _optimizer_bytes_a_parameter(config)) * trainable)


def _optimizer_bytes_a_parameter(config: RunConfig) -> float:
    """What the optimizer keeps for a parameter, from one step of it on a small one."""
    if config.deepspeed.optimizer.is_deepspeed_only:
        return 4.0 if config.deepspeed.optimizer.type.lower() in ("lion", "muon") else 8.0
    probe = nn.Parameter(torch.zeros(64, 64))
    optimizer = build_optimizer([probe], config.deepspeed.optimizer)
    probe.grad = torch.ones_like(probe)
    optimizer.step()
    state = optimizer.state[probe].values()
    return sum(value.numel() * value.element_size() for value in state if torch.is_tensor(value)) / probe.numel()


def _parameter_bytes(config: RunConfig) -> int:
    return parameter_dtype(config.deepspeed).itemsize


def activation_bytes(
    task: Task, model: nn.Module, config: RunConfig, micro_batch_size: int, gpu: bool = False
) -> int | None:
    """What autograd keeps for one micro-batch, nothing recomputed; None where the model cannot run on fake tensors.

    Operators keep what they do on a CPU, but RMS norms what they do on a GPU if `gpu`.

    The micro-batch is made of copies of the first training sample, or of the largest possible where there are no data.
    Raises MissingDataError where that is not known either.
    """
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    try:
        sample = task.dataset("train")[0]
    except MissingDataError:
        sample = task.largest_sample()
    try:
        batch = task.collate([sample] * micro_batch_size)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    batch["valid"] = torch.ones(micro_batch_size, dtype=torch.bool)
    batch["draw"] = torch.zeros(micro_batch_size, dtype=torch.int64)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # a task may hold tensors too
            faked = _Faked(model, mode, parameter_dtype(config.deepspeed))
            own = {tensor.untyped_storage()._cdata for tensor in faked.tensors.values()}
            norms = _NormsOfAGpu() if gpu else nullcontext()
            with norms, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = task.loss(faked, {key: mode.from_tensor(value) for key, value in batch.items()})["loss"]
            del loss
    except Exception:  # a model may do what fake tensors cannot; the rest of the plan stands without this figure
        return None
    return sum(kept.values())


class _NormsOfAGpu(TorchFunctionMode):
    """RMS norms by LayerNorm, which keeps what a GPU's kernel of RMS norms does: its input and some values a row.

    A CPU computes RMS norms by a chain of operators, which keeps more. In 16 bits the bytes are the kernel's, in fp32
    4 more a row.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.rms_norm:
            (hidden, shape), weight = args, kwargs["weight"]
            if weight is None or weight.dtype == hidden.dtype:  # a GPU, too, has a chain for mixed dtypes
                return F.layer_norm(hidden, shape, weight)
        return func(*args, **kwargs)


class _Faked(nn.Module):
    """A model run with fake parameters and buffers in place of its own, which stay untouched."""

    def __init__(self, model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not a submodule: its real parameters are not this module's
        self.__dict__["tensors"] = {name: mode.from_tensor(tensor.cpu()) for name, tensor in model.named_buffers()}
        for name, parameter in model.named_parameters():
            fake = torch.empty(parameter.shape, dtype=dtype)  # made inside the mode, so it takes no memory
            self.tensors[name] = fake.requires_grad_(parameter.requires_grad)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.__dict__["model"], self.tensors, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)
