"""Loss scaling for fp16, with the rules and the settings of DeepSpeed's DynamicLossScaler."""

from __future__ import annotations

from dataclasses import dataclass

from trunkline.engine.config.deepspeed_section import Fp16


@dataclass
class LossScaler:
    """`scale` is the factor in force. A dynamic one is halved after overflows and doubled after a quiet window."""

    scale: float
    dynamic: bool
    settings: Fp16
    iteration: int = 0
    last_overflow: int = -1
    hysteresis: int = 1
    """Overflows that are still forgiven, plus one."""

    @classmethod
    def of(cls, settings: Fp16) -> LossScaler:
        """The scaler at the beginning of a run: 1 for ever where fp16 is off."""
        if not settings.enabled:
            return cls(1.0, False, settings)
        dynamic = settings.loss_scale == 0
        scale = 2.0**settings.initial_scale_power if dynamic else settings.loss_scale
        return cls(scale, dynamic, settings, hysteresis=settings.hysteresis)

    def update(self, overflow: bool) -> None:
        """Take note of a step. At the lowest scale allowed an overflow changes nothing: whoever counts steps that are
        skipped (training.nonfinite_limit) ends the run."""
        if not self.dynamic:
            return
        full, lowest = self.settings.hysteresis, self.settings.min_loss_scale
        if overflow:
            if full == 1 or self.hysteresis == 1:
                self.scale = max(self.scale / 2, lowest)
            else:
                self.hysteresis -= 1
            self.last_overflow = self.iteration
        else:
            quiet = self.iteration - self.last_overflow - 1
            window_over = quiet > 0 and quiet % self.settings.loss_scale_window == 0
            if self.settings.consecutive_hysteresis or window_over:
                self.hysteresis = full
            if window_over:
                self.scale *= 2
        self.iteration += 1

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps; empty unless the scale is dynamic."""
        if not self.dynamic:
            return {}
        return {
            "scale": self.scale,
            "iteration": self.iteration,
            "last_overflow": self.last_overflow,
            "hysteresis": self.hysteresis,
        }

    def load(self, state: dict[str, float]) -> None:
        """Continue from `state`. A run that begins to scale now begins afresh."""
        if self.dynamic and state:
            self.scale = float(state["scale"])
            self.iteration, self.last_overflow = int(state["iteration"]), int(state["last_overflow"])
            self.hysteresis = int(state.get("hysteresis", self.hysteresis))  # not all of DeepSpeed's scalers have one
