"""Where DeepSpeed keeps the fp32 values of each parameter, at every ZeRO stage, and how they come from there.

    ZeRO 0     the parameter itself; in bf16 and fp16 a whole master on each rank, alone or within one of its group
    ZeRO 1, 2  the parameters of a group end to end, and a part of the whole on each rank
    ZeRO 3     an equal part of each parameter on each rank

Checkpoints do not depend on the stage, so they find the values through here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trunkline.engine.ranks.distributed import Ranks
from trunkline.engine.state.sharded_state import Fragment


class ZeroLayout:
    """The values of one DeepSpeed engine's parameters."""

    def __init__(self, engine: Any, ranks: Ranks) -> None:
        self.engine, self._ranks = engine, ranks

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer inside DeepSpeed's wrapper."""
        return getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)

    def fragments(self) -> list[Fragment]:
        """This rank's part of each parameter, in the order of the names."""
        world = (self._ranks.world_size, self._ranks.rank)
        masters = self.unsharded_masters()
        found = []
        for name, parameter in self.engine.module.named_parameters():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if hasattr(parameter, "ds_id"):
                found.append(self._zero3_fragment(name, shape, parameter))
            elif hasattr(parameter, "_hp_mapping"):
                found.append(self._zero12_fragment(name, shape, parameter))
            else:
                owner, offset = masters.get(parameter, (parameter, 0))
                found.append(Fragment(name, shape, owner, offset, 0, parameter.numel(), *world))
        return found

    def _zero3_fragment(self, name: str, shape: tuple[int, ...], parameter: Any) -> Fragment:
        """ZeRO 3 splits each parameter into equal parts, the last of them filled up."""
        zero = self.engine.optimizer
        part = parameter.partition_numel()
        start = min(part * self._ranks.rank, parameter.ds_numel)
        length = min(part, parameter.ds_numel - start)
        if not parameter.requires_grad:
            return Fragment(name, shape, parameter.ds_tensor, 0, start, length)
        group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        return Fragment(name, shape, zero.fp32_partitioned_groups_flat[group], offset, start, length)

    def _zero12_fragment(self, name: str, shape: tuple[int, ...], parameter: Any) -> Fragment:
        """ZeRO 1 and 2 lay the parameters of a group end to end and split the whole; a part may lie elsewhere."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return Fragment(name, shape, parameter, 0, 0, 0)
        owner = self.optimizer.param_groups[mapping.param_group_index]["params"][0]
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Fragment(name, shape, owner, here.start, there.start, here.numel)

    def refresh(self) -> None:
        """Take the parameters from the masters, which have changed."""
        wrapper = self.engine.optimizer
        if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # ZeRO 3
            wrapper.checkpoint_event_prologue()  # else small parameters, which stay gathered, are not gathered anew
            for group in range(len(wrapper.fp32_partitioned_groups_flat)):
                wrapper._reassign_or_swap_out_partitioned_parameters(group)
            wrapper.checkpoint_event_epilogue()
        elif hasattr(wrapper, "update_lp_params"):  # ZeRO 1 and 2
            wrapper._hp_optimizer_states_linked = False
            wrapper.update_lp_params()
        for parameter, (master, offset) in self.unsharded_masters().items():
            parameter.data.copy_(master.view(-1)[offset : offset + parameter.numel()].view(parameter.shape))

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Name and fp32 values of each, on the CPU. Called on all ranks."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        masters = self.unsharded_masters()
        for name, parameter in self.engine.module.named_parameters():
            if parameter in masters:
                owner, offset = masters[parameter]
                whole = owner.view(-1)[offset : offset + parameter.numel()].view(parameter.shape)
            else:
                whole = safe_get_full_fp32_param(parameter)
            with GatheredParameters([parameter], enabled=whole is None and hasattr(parameter, "ds_id")):  # frozen
                yield name, (parameter if whole is None else whole).detach().to("cpu", copy=True)

    def unsharded_masters(self) -> dict[nn.Parameter, tuple[Tensor, int]]:
        """Where ZeRO 0 keeps the fp32 copy of a half-precision parameter: a tensor, and the offset in it."""
        wrapper = self.engine.optimizer
        if self.engine.zero_optimization() or not hasattr(wrapper, "fp16_groups"):
            return {}
        found = {}
        for index, group in enumerate(wrapper.fp16_groups):
            offset = 0
            for place, parameter in enumerate(group):
                if hasattr(wrapper, "fp32_groups_flat"):
                    found[parameter] = wrapper.fp32_groups_flat[index], offset
                    offset += parameter.numel()
                else:
                    found[parameter] = wrapper.fp32_groups[index][place], 0
        return found
