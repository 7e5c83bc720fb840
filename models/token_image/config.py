"""The `data` and `model` sections of diffusion on token images, and the presets."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trunkline.engine.config.meaning import FolderPath
from trunkline.engine.config.strict import Strict
from trunkline.models.token_image.encodings import Kind
from trunkline.models.token_image.network import PRESETS, JiTShape
from trunkline.models.token_image.noise import Schedule


class TokenImageData(Strict):
    """Where the prepared data set is and how texts become images."""

    store: FolderPath = Field(description="folder that launchers/prepare.py wrote")
    img_size: int = Field(64, ge=4, le=256, description="edge of an image in pixels, a token each")
    max_tokens: int | None = Field(
        None, ge=2, description="tokens of a text at most, EOS included; all pixels unless given"
    )
    encoding: Kind = Field("rgb", description="rgb: the id in base 256; bits: the bits of the id as -1 and 1")

    @property
    def capacity(self) -> int:
        """Tokens of a text at most, EOS included."""
        return self.img_size**2 if self.max_tokens is None else self.max_tokens

    @model_validator(mode="after")
    def _fits(self) -> TokenImageData:
        if self.capacity > self.img_size**2:
            raise ValueError(
                f"max_tokens {self.max_tokens}: an image of img_size {self.img_size} has {self.img_size**2}"
            )
        return self


class TokenImageModel(Strict):
    """The network and what it is trained for."""

    preset: Literal["B/4", "B/16", "B/32", "L/16", "L/32", "H/16", "H/32"] | None = None
    patch: int | None = Field(None, ge=1)
    d_model: int | None = Field(None, ge=16)
    num_layers: int | None = Field(None, ge=1)
    num_heads: int | None = Field(None, ge=1)
    schedule: Schedule = Field("linear", description="how the share of the image falls with the time")
    loss: Literal["x", "v"] = Field("x", description="squared error of the clean image, or of the velocity")

    @property
    def shape(self) -> JiTShape:
        """The widths, from the preset or as given. Widths given beside a preset win."""
        given = {name: value for name in JiTShape._fields if (value := getattr(self, name)) is not None}
        return PRESETS[self.preset]._replace(**given) if self.preset else JiTShape(**given)

    def in_full(self) -> TokenImageModel:
        """The same with its widths in place of the preset."""
        return self.model_copy(update={"preset": None} | self.shape._asdict())

    @model_validator(mode="after")
    def _whole(self) -> TokenImageModel:
        if self.preset is None and (missing := [name for name in JiTShape._fields if getattr(self, name) is None]):
            raise ValueError(f"give a preset ({', '.join(PRESETS)}), or all widths; {', '.join(missing)} is missing")
        d, heads = self.shape.d_model, self.shape.num_heads
        if d % (2 * heads):
            raise ValueError(f"d_model must be an even multiple of num_heads; got {d} with {heads} heads")
        return self


Data, Model = TokenImageData, TokenImageModel
