"""Whether an optimizer can be saved, split over ranks and resumed.

It is found by trying the optimizer on two small parameters.

Nothing is judged by its name, but what DeepSpeed builds itself: that would have to be compiled to be tried.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trunkline.engine.config.deepspeed_section import DeepSpeedSection, Optimizer
from trunkline.engine.config.strict import show
from trunkline.engine.config.typed_params import ADAMW_SCALE
from trunkline.engine.errors import ConfigError, TrunklineError
from trunkline.engine.optim.optimizers import build_optimizer, tell_fragments
from trunkline.engine.optim.schedules import learning_rates
from trunkline.engine.ranks.distributed import Ranks
from trunkline.engine.state.sharded_state import Fragment, capture, restore


def check_optimizer(section: DeepSpeedSection, backend: str, total_steps: int, device: torch.device) -> None:
    """Raise ConfigError for an optimizer that could not train, be saved or be resumed under this backend and stage,
    or that the schedule cannot drive for `total_steps`."""
    optimizer, stage = section.optimizer, section.zero_optimization.stage
    if optimizer.is_deepspeed_only:
        if optimizer.type.lower() == "lamb" and stage > 0:
            raise _refused(optimizer, _WHOLE.format(where=f"ZeRO {stage}"))
        return
    try:
        scheduled = build_optimizer([nn.Parameter(torch.zeros(1, device=device))], optimizer)
        learning_rates(section.scheduler, 0.0, total_steps, [0, min(total_steps, 1000)], scheduled)
        whole = _Probe(optimizer, device, flat=False)
        groups = whole.groups()
        whole.step()
        if changed := [key for key, value in whole.groups().items() if groups[key] != value]:
            raise _refused(optimizer, f"a step changes {', '.join(changed)} of its parameter group, which is not saved")
        resumed = whole.saved_and_resumed()
        cut = _Probe(optimizer, device, flat=True)
        cut.step()
        for probe in {whole, resumed, cut}:  # two of them are one where nothing could be saved
            probe.step()
        if not whole.equals(resumed):
            raise _refused(optimizer, "it keeps more than its state, so a resumed run would not be the same run")
        if (stage > 0 or backend == "fsdp") and not whole.equals(cut, exactly=False):
            raise _refused(optimizer, _WHOLE.format(where="FSDP" if backend == "fsdp" else f"ZeRO {stage}"))
    except ConfigError:
        raise
    except Exception as error:  # whatever the class raises, it is the same news for whoever chose it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        known = isinstance(error, TrunklineError)
        raise _refused(optimizer, reason if known else f"it cannot step here ({reason})") from error


_WHOLE = "it changes an element by what others of its parameter are, and {where} splits parameters over ranks"


def _refused(optimizer: Optimizer, why: str) -> ConfigError:
    return ConfigError(
        f"deepspeed.optimizer: {optimizer.type} with {show(optimizer.params)} is not supported here: "
        f"{why.removesuffix('; use AdamW')}; use {_instead(optimizer.type)}"
    )


def _instead(kind: str) -> str:
    if kind == "Adafactor":
        return f"{ADAMW_SCALE}, whose steps are relative to the parameter as Adafactor's are"
    return "AdamW with its defaults"


class _Probe:
    """A matrix and a vector under the optimizer; `flat` gives it the same elements in pieces, as ranks hold them."""

    def __init__(self, section: Optimizer, device: torch.device, flat: bool) -> None:
        self.section, self.device, self.flat = section, device, flat
        weights = [torch.linspace(-1.0, 2.0, 12).view(4, 3), torch.tensor([0.5, -0.25])]
        self.parameters = [nn.Parameter(piece.to(device)) for piece in self._pieces(weights)]
        self.places = self._places(weights)
        self.module: nn.Module = nn.ParameterList(self.parameters)
        visible = section.model_copy(update={"params": section.params | {"lr": 0.1}})
        self.optimizer = build_optimizer(self.parameters, visible)
        self.steps = 0
        tell_fragments(self.optimizer, self.fragments(), Ranks(0, 1, 0, device))

    def _places(self, tensors: list[Tensor]) -> list[tuple[str, tuple[int, ...], int]]:
        """Of each piece, the whole that it is of, by name and shape, and where it begins in it."""
        places = []
        for number, tensor in enumerate(tensors):
            starts = self._pieces([torch.arange(tensor.numel()).view(tensor.shape)])
            places += [(str(number), tuple(tensor.shape), int(piece.flatten()[0])) for piece in starts]
        return places

    def _pieces(self, tensors: list[Tensor]) -> list[Tensor]:
        if not self.flat:
            return [tensor.clone() for tensor in tensors]
        return [piece.clone() for tensor in tensors for piece in tensor.reshape(-1).tensor_split(2)]

    def step(self) -> None:
        self.steps += 1
        gradients = [torch.linspace(2.0, -0.7, 12).view(4, 3) / self.steps, torch.tensor([1.5, 0.3])]
        for parameter, gradient in zip(self.parameters, self._pieces(gradients), strict=True):
            parameter.grad = gradient.to(self.device)
        self.optimizer.step()

    def groups(self) -> dict[str, Any]:
        return {key: value for key, value in self.optimizer.param_groups[0].items() if key != "params"}

    def saved_and_resumed(self) -> _Probe:
        """Another one in the same state, through the files of a checkpoint; this one where there is no room for them,
        which says nothing about the optimizer."""
        other, snapshot = _Probe(self.section, self.device, self.flat), capture(self)
        other.steps = self.steps
        try:
            with tempfile.TemporaryDirectory() as folder:
                digests = snapshot.write(Path(folder), 0, 1)
                restore(other, Path(folder), digests, Ranks(0, 1, 0, self.device))
        except OSError:
            return self
        return other

    def fragments(self) -> list[Fragment]:
        return [
            Fragment(name, shape, parameter, 0, start, parameter.numel())
            for (name, shape, start), parameter in zip(self.places, self.parameters, strict=True)
        ]

    def equals(self, other: _Probe, exactly: bool = True) -> bool:
        mine, theirs = (
            torch.cat([p.detach().reshape(-1) for p in probe.parameters]).nan_to_num() for probe in (self, other)
        )
        return torch.equal(mine, theirs) if exactly else torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)
