"""AdamW whose step is relative: each parameter's is scaled by the root mean square of the parameter.

    p <- p - lr weight_decay p - lr max(RMS(p), min_rms) m / (sqrt(v) + eps)        m, v bias-corrected, as AdamW's

This is what makes Adafactor (Shazeer and Stern, arXiv:1804.04235) train a T5 well, without its factored second moment:
"AdamWScale" of nanoT5 (Nawrot, arXiv:2309.02373). What it keeps is AdamW's, an element at a time, so that a run is
saved, split over ranks and resumed as any other. Only RMS(p) is of the whole parameter: a sum of squares for each one,
added over ranks once a step. Adafactor's means over rows and columns would be cut anywhere by ZeRO's flat partitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trunkline.engine.ranks.distributed import Ranks, sum_over_ranks
from trunkline.engine.state.sharded_state import Fragment, local_part


class AdamWScale(torch.optim.Optimizer):
    """Each tensor that it is given is a whole parameter, until `split` says which parts of parameters lie in which."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.0, min_rms: float = 1e-3,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._min_rms = min_rms
        owners = [owner for group in self.param_groups for owner in group["params"]]
        self.split(
            [Fragment(str(place), tuple(p.shape), p, 0, 0, p.numel()) for place, p in enumerate(owners)],
            Ranks(0, 1, 0, torch.device("cpu")),
        )

    def split(self, fragments: Sequence[Fragment], ranks: Ranks) -> None:
        """Say which parts of which parameters the tensors hold that are stepped, over all ranks."""
        self._ranks = ranks
        self._numels = {fragment.name: math.prod(fragment.shape) for fragment in fragments}
        self._parts: dict[int, list[Fragment]] = {}
        for fragment in fragments:
            if fragment.length:
                self._parts.setdefault(id(fragment.owner), []).append(fragment)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of the tensors that have a gradient. Called on all ranks."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scales = self._scales()
        for group in self.param_groups:
            for owner in group["params"]:
                if owner.grad is not None:
                    self._update(owner, owner.grad, group, scales)
        return loss

    def _scales(self) -> dict[str, Tensor]:
        """max(RMS, min_rms) of each parameter, over the tensors of the present groups."""
        squares = dict.fromkeys(self._numels, torch.zeros((), dtype=torch.float64, device=self._ranks.device))
        for group in self.param_groups:
            for owner in group["params"]:
                flat = local_part(owner).reshape(-1)
                for part in self._parts.get(id(owner), ()):
                    first, stop = part.share()
                    norm = torch.linalg.vector_norm(flat[part.offset + first : part.offset + stop], dtype=torch.float64)
                    squares[part.name] = squares[part.name] + norm.square().to(self._ranks.device)
        sums = sum_over_ranks({"squares": torch.stack(list(squares.values()))}, self._ranks)["squares"]
        means = sums / torch.tensor(list(self._numels.values()), dtype=torch.float64, device=sums.device)
        return dict(zip(squares, means.sqrt().clamp(min=self._min_rms).unbind(), strict=True))

    def _update(self, owner: Tensor, gradient: Tensor, group: dict[str, Any], scales: dict[str, Tensor]) -> None:
        state = self.state[owner]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(owner, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(owner, memory_format=torch.preserve_format)
        state["step"] += 1
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        value, gradient = local_part(owner), local_part(gradient)
        mean, square = local_part(state["exp_avg"]), local_part(state["exp_avg_sq"])
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        change = mean / (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        flat = change.reshape(-1)
        for part in self._parts.get(id(owner), ()):
            scale = scales[part.name].to(flat)
            flat[part.offset : part.offset + part.length].mul_(scale)
        value.mul_(1 - group["lr"] * group["weight_decay"])
        value.sub_(flat.view(value.shape), alpha=group["lr"] / (1 - beta1**step))
