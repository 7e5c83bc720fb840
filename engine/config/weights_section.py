"""What a run's "training" section says of parameters and weights: the rules for groups of them, and their average."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from trunkline.engine.config.strict import Strict


class ParameterRule(Strict):
    """How the parameters are trained that one of the globs names. Of several rules the first that matches wins."""

    names: tuple[str, ...] = Field(min_length=1, description="globs over the names of the model's parameters")
    weight_decay: float | None = Field(
        default=None, ge=0, description="the optimizer's where it is left out, and 0 on norms and biases"
    )
    lr_scale: float = Field(default=1.0, gt=0, description="the learning rate is the schedule's times this")
    frozen: bool = Field(default=False, description="not trained; if false, as the task has it")

    @model_validator(mode="after")
    def _frozen_alone(self) -> ParameterRule:
        if self.frozen and (self.weight_decay is not None or self.lr_scale != 1.0):
            raise ValueError("what is frozen has neither weight_decay nor lr_scale: leave them out")
        return self


class Ema(Strict):
    """A moving average of the weights: after update n (from 0), average += (1 - d) (weights - average).

    d is min(decay, (1 + n) / (10 + n)) with `warmup`, as in TensorFlow's ExponentialMovingAverage, else `decay`.
    """

    decay: float = Field(default=0.999, gt=0, lt=1, description="share of the average that is kept at an update")
    warmup: bool = Field(default=True, description="begin with a short average")
    every: int = Field(default=1, gt=0, description="optimizer steps between updates")
    use: tuple[Literal["evaluation", "final"], ...] = Field(
        default=("evaluation", "final"), description="where the average stands for the weights; best/ is as evaluated"
    )

    @field_validator("use")
    @classmethod
    def _each_once(cls, use: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(use)) < len(use):
            raise ValueError("name each use once")
        return use
