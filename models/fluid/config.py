"""The `data` and `model` sections of a fluid run's configuration, and the six presets."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from trunkline.engine.config.meaning import FolderPath
from trunkline.engine.config.strict import Strict


class DecoderShape(NamedTuple):
    """Widths of a FluidDecoder: model, attention heads, blocks, feed-forward, token (embedding and head)."""

    d_model: int
    num_heads: int
    num_layers: int
    d_ff: int
    d_token: int


PRESETS = {
    "nano": DecoderShape(32, 2, 2, 128, 32),
    "tiny": DecoderShape(64, 4, 2, 256, 64),
    "small": DecoderShape(256, 8, 4, 1024, 128),
    "medium": DecoderShape(512, 8, 6, 2048, 256),
    "large": DecoderShape(768, 12, 8, 3072, 384),
    "xl": DecoderShape(1024, 16, 12, 4096, 512),
}


class FluidData(Strict):
    """Where the prepared data set is and how windows are cut from it."""

    store: FolderPath = Field(description="folder that launchers/prepare.py wrote")
    history: int = Field(3, ge=1, le=1439, description="minutes the model sees, T")
    normalization: Literal["standard", "minmax", "robust"] = Field(
        "standard", description="per column: mean and deviation, range to [-1, 1], or median and quartiles"
    )
    event_repeats: int = Field(
        1,
        ge=1,
        le=1000,
        description="how often an event stands in an epoch of training, each time with that much less weight; an event "
        "is a window of which the next minute has other set-points",
    )


class FluidModel(Strict):
    """The decoder: a preset, or the five widths; and what it predicts."""

    path: FolderPath | None = Field(
        None, description="folder of a trained run whose weights training starts from; the model must be the same"
    )
    preset: Literal["nano", "tiny", "small", "medium", "large", "xl"] | None = Field(
        None, description="a named shape, in place of the widths"
    )
    d_model: int | None = Field(None, ge=16, description="width of the model")
    num_heads: int | None = Field(None, ge=1, description="attention heads of a block")
    num_layers: int | None = Field(None, ge=1, description="blocks")
    d_ff: int | None = Field(None, ge=1, description="width of the feed-forward layer")
    d_token: int | None = Field(None, ge=1, description="width of a token's embedding and head")
    tokens: Literal["scalar", "device"] = Field(
        "scalar", description="whether a token is a value, or a device with all its values"
    )
    window: int = Field(
        1, ge=1, description='minutes that a token looks back, with tokens "device"; at most data.history'
    )
    own_weights: bool = Field(
        default=False,
        description='with tokens "device", whether each device has an embedding and a head of its own, for networks of '
        "some dozens; else devices with the same quantities share them",
    )
    target: Literal["level", "change"] = Field(
        "level", description="whether the output is the next state or its change since the last minute"
    )
    input_noise: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="deviation, in normalised units, of noise on the input states in training, most of it common to "
        "the minutes of a window, as the error of a rollout is; the target leads back to the true next state",
    )
    rollout_minutes: int = Field(
        1,
        ge=1,
        le=120,
        description="minutes that training follows the model's own predictions, with gradients through all of them",
    )
    linear_skip: bool | Literal["switches"] = Field(
        default=False,
        description="add to a ridge autoregression, fitted before training; with 'switches' it also sees the "
        "set-points of the minute before, and each device's values times its own switches; needs data.history >= 2",
    )
    dense_skip: int = Field(
        0,
        ge=0,
        description="hidden width of a small network beside the decoder that sees all values at once, 0 for none: for "
        "small gas networks and short trainings, in which the tokens of a Transformer learn slowly",
    )

    @property
    def shape(self) -> DecoderShape:
        """The widths, from the preset or as given."""
        if self.preset is not None:
            return PRESETS[self.preset]
        widths = (self.d_model, self.num_heads, self.num_layers, self.d_ff, self.d_token)
        return DecoderShape(*[width for width in widths if width is not None])

    def in_full(self) -> FluidModel:
        """The same with its widths in place of the preset."""
        return self.model_copy(update={"preset": None} | self.shape._asdict())

    @model_validator(mode="after")
    def _one_complete_shape(self) -> FluidModel:
        given = [name for name in DecoderShape._fields if getattr(self, name) is not None]
        if self.preset is not None and given:
            raise ValueError(
                f"give either preset or widths; preset is {self.preset!r} and {', '.join(given)} is set too"
            )
        missing = [name for name in DecoderShape._fields if name not in given]
        if self.preset is None and missing:
            raise ValueError(f"give a preset ({', '.join(PRESETS)}) or all widths; {', '.join(missing)} is missing")
        if self.tokens == "scalar" and (self.window > 1 or self.own_weights):
            raise ValueError(
                'window and own_weights are of tokens that are devices: set tokens to "device", or leave them out'
            )
        shape = self.shape
        if shape.d_model % (2 * shape.num_heads) or not 16 <= shape.d_model // shape.num_heads <= 256:
            raise ValueError(
                f"d_model must be an even multiple of num_heads with 16 to 256 channels a head; got {shape.d_model} "
                f"with {shape.num_heads} heads"
            )
        return self


Data, Model = FluidData, FluidModel
