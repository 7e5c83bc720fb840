"""FSDP2 (`torch.distributed.fsdp.fully_shard`) as a backend: no DeepSpeed, one process or many.

The section "deepspeed" means here what it means there (engine/config/fsdp_section.py says key by key):
- ZeRO 3 frees a block's parameters after its forward and gathers them again for its backward.
- ZeRO 2 keeps them gathered from the first forward of a step to its last backward. The gradients of each micro-batch
  are reduce-scattered, so that a rank keeps its shard of the sum.
- ZeRO 1 is ZeRO 2 with whole gradients: they add up on each rank and are reduced once a step.
- ZeRO 0 is ZeRO 1 with everything replicated, on a mesh whose shards have one rank each.
- `zero_hpz_partition_size` is the number of ranks that share one copy of the state; the copies are replicas (HSDP).

Parameters are fp32 shards, which the optimizer steps; bf16 and fp16 are what they are gathered in. Buffers keep their
dtype. Where one rank has nothing to share, as `needs_no_shards` says, fully_shard, which would copy all of it block by
block, is not called. In 16 bits the model then has narrow copies for parameters, all of them made at once after a step,
and the numbers are the same.
What is put right here: FSDP averages gradients over the ranks, but the protocol wants their sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from trunkline.engine.backends import Stepped
from trunkline.engine.backends.model_options import blocks
from trunkline.engine.config.deepspeed_section import BatchSizes, DeepSpeedSection, parameter_dtype
from trunkline.engine.config.fsdp_section import check_fsdp_section, needs_no_shards, reduce_dtype, shard_group_size
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim.loss_scaling import LossScaler
from trunkline.engine.optim.optimizers import build_optimizer
from trunkline.engine.optim.parameter_rules import parameter_groups
from trunkline.engine.optim.schedules import build_scheduler
from trunkline.engine.ranks.distributed import Ranks
from trunkline.engine.state.sharded_state import Fragment, local_part, persistent_buffers


class FSDPBackend:
    """trunkline.engine.backends.Backend on fully_shard."""

    name = "fsdp"

    def __init__(
        self, model: nn.Module, config: RunConfig, sizes: BatchSizes, ranks: Ranks, total_steps: int,
        kept: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.notes: list[str] = []
        section = config.deepspeed
        check_fsdp_section(section, config.where, ranks.world_size)
        self._stage = section.zero_optimization.stage
        mesh = _mesh(section, ranks)
        self._shards = mesh["shard"]
        self._replicas = mesh["replica"] if mesh.ndim == 2 else None
        self._units = _shard(model, section, mesh, config.source)
        if self._stage < 2:  # where gradients wait, FSDP asks for those of a block that no forward has gathered, too
            for unit in self._units:
                unit.unshard()
                unit.reshard()
        self.model = self.module = model if self._units else model.to(ranks.device)
        # the shards, kept because the modules themselves hold gathered copies at times
        self._parameters = list(model.named_parameters())
        # what is stepped and saved: this rank's part without DTensor, which costs more than a step of small ones
        self._local: dict[Tensor, nn.Parameter] = {
            p: nn.Parameter(local_part(p.detach()), p.requires_grad) for _, p in self._parameters
        }
        self._trainable = [parameter for _, parameter in self._parameters if parameter.requires_grad]
        # what the model computes with on one rank in 16 bits, in place of the parameters
        self._copies = [] if self._units else _narrow(model, parameter_dtype(section))
        if sizes.grad_accum_steps > 1:  # the gradients of several micro-batches add up in fp32
            for copy in self._copies:
                if copy.requires_grad:
                    copy.register_post_accumulate_grad_hook(self._hand_over)
        groups = parameter_groups(model, config, kept)
        for group in groups:
            group["params"] = [self._local[parameter] for parameter in group["params"]]
        self.optimizer = build_optimizer(groups, section.optimizer)
        self._scheduler = build_scheduler(self.optimizer, section.scheduler, total_steps)
        self._scaler = LossScaler.of(section.fp16)
        self._max_norm = section.gradient_clipping
        self._device = ranks.device
        self._is_last = True

    def backward(self, loss: Tensor, is_last: bool = True) -> None:
        if self._units and is_last != self._is_last:
            self._set_last(is_last)
        self._is_last = is_last
        (loss * self._scaler.scale if self._scaler.scale != 1 else loss).backward()

    def _set_last(self, is_last: bool) -> None:
        """Say whether the backward that comes is the step's last: what can wait for that one, waits."""
        root = self._units[-1]
        if self._stage < 2:
            root.set_requires_gradient_sync(is_last)
            if is_last:
                self._add_missing()
        if self._stage < 3:
            root.set_reshard_after_backward(is_last)
        root.set_requires_all_reduce(is_last)

    def _add_missing(self) -> None:
        """Give the gradient 0 to what no micro-batch of the step has used yet. In 16 bits the gradients that wait for
        the last backward are wide, and fully_shard, whose zeros would be narrow, wants one dtype."""
        for unit in self._units:
            for group in getattr(unit._get_fsdp_state(), "_fsdp_param_groups", ()):
                for each in group.fsdp_params:
                    wide, waiting = each.reduce_dtype, each.unsharded_accumulated_grad
                    if wide is not None and waiting is None and each.sharded_param.requires_grad:
                        each.unsharded_accumulated_grad = torch.zeros_like(each.unsharded_param, dtype=wide)

    def clip_at(self, max_norm: float) -> None:
        self._max_norm = max_norm

    def _hand_over(self, parameter: Tensor) -> None:
        """Add the gradient that autograd has left, if any, to that of what is stepped."""
        owner = self._local[parameter]
        if parameter.grad is not None:
            wide = local_part(parameter.grad).to(owner.dtype)
            owner.grad = wide if owner.grad is None else owner.grad.add_(wide)
            parameter.grad = None

    @torch.no_grad()  # to_local records no gradient of its own then
    def step(self) -> Stepped:
        trained = [copy for copy in self._copies if copy.requires_grad]
        for copy in trained:  # the memory is that of wide gradients meanwhile
            copy.untyped_storage().resize_(0)
        try:
            return self._step()
        finally:
            self._renew(trained)

    def _step(self) -> Stepped:
        gradients = []
        for parameter in self._trainable:
            self._hand_over(parameter)
            owner = self._local[parameter]
            if owner.grad is None:  # an unused parameter has the gradient 0, as where gradients are reduced
                owner.grad = torch.zeros_like(owner)
            gradients.append(owner.grad)
        norm = self._global_norm(gradients) / self._scaler.scale
        skipped = not math.isfinite(norm)
        if not skipped:
            factor = 1 / self._scaler.scale
            if self._max_norm > 0:
                factor *= min(1.0, self._max_norm / (norm + 1e-6))
            if factor != 1:
                torch._foreach_mul_(gradients, factor)
            self.optimizer.step()
            self._scheduler.step()
        for parameter in self._trainable:
            self._local[parameter].grad = None
        self._scaler.update(skipped)
        return Stepped(float("inf") if skipped else norm, skipped)

    def _global_norm(self, gradients: list[Tensor]) -> float:
        """The norm over all shards: each element counts once, replicas do not."""
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)), dtype=torch.float64)
        if self._shards.size() > 1:
            square = norm.to(self._device).square()
            dist.all_reduce(square, group=self._shards.get_group())
            norm = square.sqrt()
        return norm.item()

    def learning_rate(self) -> float:
        return self._scheduler.learning_rate

    def loss_scale(self) -> float:
        return self._scaler.scale

    def prefetch(self) -> None:
        if self._stage < 3:  # else a block is gathered when its turn comes, so that few are at a time
            for unit in self._units:
                unit.unshard(async_op=True)

    def fragments(self) -> list[Fragment]:
        return [self._fragment(name, parameter) for name, parameter in self._parameters]

    def _fragment(self, name: str, parameter: nn.Parameter) -> Fragment:
        """FSDP cuts the rows like torch.chunk: as many to each rank as to the first, until there are none left."""
        rows, row_size, owner = parameter.shape[0], math.prod(parameter.shape[1:]), self._local[parameter]
        first_row = min(rows, self._shards.get_local_rank() * -(-rows // self._shards.size()))
        return Fragment(
            name, tuple(parameter.shape), owner, offset=0, start=first_row * row_size, length=owner.numel(),
            replicas=self._replicas.size() if self._replicas else 1,
            replica=self._replicas.get_local_rank() if self._replicas else 0,
        )  # fmt: skip

    def loss_scaler(self) -> dict[str, float]:
        return self._scaler.state()

    def restore_derived(self, applied_steps: int, loss_scaler: dict[str, float]) -> None:
        self.refresh()
        self._scheduler.forward(applied_steps)
        self._scaler.load(loss_scaler)

    def close(self) -> None:
        for mesh in (self._shards, self._replicas):
            if mesh is not None and mesh.get_group() is not dist.group.WORLD:
                dist.destroy_process_group(mesh.get_group())  # each mesh makes groups anew, which hold device memory

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters:
            if isinstance(parameter, DTensor):
                whole = cast(DTensor, parameter.detach().to(self._device)).full_tensor()
            else:
                whole = self._local[parameter].detach()
            yield name, whole.to("cpu", copy=True)
        for name, buffer in persistent_buffers(self.module):
            yield name, buffer.detach().to("cpu", copy=True)

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """The model with whole parameters, entered on all ranks. Within, neither its forward nor its gradients take a
        collective, so that ranks may go different ways."""
        if not self._units:
            yield self.module
            return
        root = self._units[-1]
        root._get_fsdp_state()._lazy_init()  # else a block that is called before the model takes itself for the root
        for unit in self._units:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        root.set_reshard_after_backward(False)
        root.set_requires_gradient_sync(False)
        try:
            yield self.module
        finally:
            root.set_requires_gradient_sync(True)
            root.set_reshard_after_backward(True)
            for unit in self._units:
                unit.set_reshard_after_forward(self._stage == 3 and unit is not root, recurse=False)
                for group in getattr(unit._get_fsdp_state(), "_fsdp_param_groups", ()):  # before 2.13 one rank trains
                    group._post_forward_indices.clear()
            # by which backward prefetches: ranks that went different ways would gather in different orders
            root._get_fsdp_state()._comm_ctx.post_forward_order.clear()
            self.refresh()

    def whole(self) -> AbstractContextManager[nn.Module]:
        return self.gathered()

    def refresh(self) -> None:
        """Drop gathered copies, which do not follow what is written into the shards."""
        for unit in self._units:
            unit.reshard()
        self._renew(self._copies)

    @torch.no_grad()
    def _renew(self, copies: list[Tensor]) -> None:
        """Make narrow copies anew of what is stepped."""
        if copies:
            for copy in copies:
                copy.untyped_storage().resize_(copy.nbytes)
            torch._foreach_copy_(copies, [self._local[copy] for copy in copies])


def _mesh(section: DeepSpeedSection, ranks: Ranks) -> DeviceMesh:
    """The ranks as ("shard",), or as ("replica", "shard") where several of them hold the same elements."""
    together = shard_group_size(section, ranks.world_size)
    sizes: tuple[int, ...] = (together,)
    names: tuple[str, ...] = ("shard",)
    if together < ranks.world_size:
        sizes, names = (ranks.world_size // together, together), ("replica", "shard")
    return init_device_mesh(ranks.device.type, sizes, mesh_dim_names=names)


def _shard(model: nn.Module, section: DeepSpeedSection, mesh: DeviceMesh, source: str) -> list[FSDPModule]:
    """Shard the model in place, unless there is nothing to share.

    Returns what communicates as one: each block, and last the model with all the rest.
    """
    units = [*reversed(blocks(model)), model]  # a block inside a block before the one around it
    _check_parameters(model, units, source)
    if mesh.size() > 1 and not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigError(
            f"torch {torch.__version__}: several ranks of FSDP need torch 2.13 or newer, since before it a parameter "
            "that only some ranks use leaves the others waiting: install it, or use --backend deepspeed"
        )
    dtype = parameter_dtype(section)
    precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=reduce_dtype(section),
        cast_forward_inputs=section.fp16.auto_cast,
    )
    offload = _offload_policy(section, mesh.device_type)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    if needs_no_shards(section, mesh.size()):
        return []
    for unit in units:
        fully_shard(
            unit, mesh=mesh, mp_policy=precision, offload_policy=offload,
            # the parameters outside the blocks stay gathered: the backward begins with them
            reshard_after_forward=section.zero_optimization.stage == 3 and unit is not model,
        )  # fmt: skip
        shard = cast(FSDPModule, unit)
        if mesh.size() > 1:
            # a plain sum: gloo has no other reduction that FSDP would ask for, and NCCL none that is faster
            shard.set_gradient_divide_factor(1.0)
            shard.set_force_sum_reduction_for_comms(True)
        if hasattr(shard, "set_reduce_scatter_unused_params"):
            # a parameter that only some ranks use must not leave the others waiting
            shard.set_reduce_scatter_unused_params(True, recurse=False)
    return [cast(FSDPModule, unit) for unit in units]


def _narrow(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Make the parameters, whose values somebody else holds, narrow copies. Returns those that are copies now."""
    narrowed: list[Tensor] = [each for each in model.parameters() if each.is_floating_point() and each.dtype != dtype]
    for parameter in narrowed:
        parameter.data = parameter.data.to(dtype)
    return narrowed


def _check_parameters(model: nn.Module, units: list[nn.Module], source: str) -> None:
    """Raise ConfigError for what fully_shard cannot shard, by the parameter's name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, name in names.items():
        if parameter.ndim == 0:
            raise ConfigError(
                f"{source}: FSDP shards rows, and the model's parameter {name} is a scalar: give it the shape [1], or "
                "use --backend deepspeed"
            )
        if not parameter.is_contiguous():
            raise ConfigError(
                f"{source}: FSDP shards rows, and those of the model's parameter {name} are not contiguous (strides "
                f"{list(parameter.stride())}): make it from tensor.contiguous(), or use --backend deepspeed"
            )
    unit_of: dict[nn.Parameter, nn.Module] = {}
    taken: set[nn.Module] = set()
    for unit in units:
        for module in set(unit.modules()) - taken:
            for parameter in module.parameters(recurse=False):
                if unit_of.setdefault(parameter, unit) is not unit:
                    raise ConfigError(
                        f"{source}: FSDP gathers block by block, and the model's parameter {names[parameter]} belongs "
                        "to two blocks: keep it outside them (see _no_split_modules), or use --backend deepspeed"
                    )
            taken.add(module)


def _offload_policy(section: DeepSpeedSection, device_type: str) -> OffloadPolicy:
    """Where shards, gradients and optimizer states live between their uses."""
    zero = section.zero_optimization
    for options in (zero.offload_optimizer, zero.offload_param):
        if options is not None and options.device == "cpu":
            # on the CPU nothing moves, and there is nothing to pin memory for
            return CPUOffloadPolicy(pin_memory=device_type != "cpu" and options.pin_memory)
    return OffloadPolicy()
