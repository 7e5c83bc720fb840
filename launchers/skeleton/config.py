"""The "data" and "model" sections of a configuration. An unknown key, or a wrong type, is an error."""

from __future__ import annotations

from pydantic import Field

from trunkline.engine.config.strict import Strict


class Data(Strict):
    """What is trained on."""

    points: int = Field(default=512, gt=0, description="points of each split")
    noise: float = Field(default=0.1, ge=0, description="standard deviation of what is added to y")


class Model(Strict):
    """The network."""

    width: int = Field(default=32, gt=0, description="of the hidden layer")
