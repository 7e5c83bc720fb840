"""The `data` and `model` sections of diffusion on token images, and the presets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trunkline.engine.config.meaning import FolderPath
from trunkline.engine.config.strict import Strict
from trunkline.models.token_image.encodings import Kind
from trunkline.models.token_image.network import PRESETS, JiTShape
from trunkline.models.token_image.noise import Schedule

Edge = Annotated[int, Field(ge=1)]


class TokenImageData(Strict):
    """Where the prepared data set is and how texts become images."""

    store: FolderPath = Field(description="folder that launchers/prepare.py wrote")
    img_size: int = Field(64, ge=4, le=256, description="edge of an image in pixels, a token each")
    max_tokens: int | None = Field(
        None, ge=2, description="tokens of an image at most, EOS included; all pixels unless given"
    )
    stride: int | None = Field(
        None, ge=1,
        description="where a text is longer, images start at every such token; unless given its first image is all",
    )  # fmt: skip
    tokenizer: FolderPath | None = Field(
        None, description="the tokenizer that the data must have been prepared with; any unless given"
    )
    chat_template: bool | None = Field(
        None, description="whether it must have been prepared with the tokenizer's chat template; either unless given"
    )
    encoding: Kind = Field("rgb", description="rgb: the id in base 256; bits: the bits of the id as -1 and 1")

    @property
    def capacity(self) -> int:
        """Tokens of an image at most, EOS included."""
        return self.img_size**2 if self.max_tokens is None else self.max_tokens

    @model_validator(mode="after")
    def _fits(self) -> TokenImageData:
        if self.capacity > self.img_size**2:
            raise ValueError(
                f"max_tokens {self.max_tokens}: an image of img_size {self.img_size} has {self.img_size**2}"
            )
        if self.stride is not None and self.stride > self.capacity:
            raise ValueError(
                f"stride {self.stride}: tokens would be lost between images of {self.capacity}: lower it to that"
            )
        return self


class TokenImageModel(Strict):
    """The network and what it is trained for."""

    preset: Literal["B/4", "B/16", "B/32", "L/16", "L/32", "H/16", "H/32"] | None = Field(
        None, description="a named shape; widths beside it win"
    )
    patch: Edge | Annotated[list[Edge], Field(min_length=2, max_length=2)] | None = Field(
        None, description="pixels of a patch's edge, or its rows and columns; [1, n] keeps the order of the text"
    )
    d_model: int | None = Field(None, ge=16, description="width of the model")
    num_layers: int | None = Field(None, ge=1, description="blocks")
    num_heads: int | None = Field(None, ge=1, description="attention heads of a block")
    block: Literal["shared_norm", "official"] = Field(
        "shared_norm", description="shared_norm: one adaptive norm a block; official: JiT's own, with adaLN-Zero"
    )
    stem: int = Field(
        0, ge=0, description="neighbours in the text, an odd number, that each patch of [1, n] is mixed with at first"
    )
    condition: bool = Field(default=True, description="places for a condition's patches before the image's")
    noise: Schedule = Field(
        "linear",
        description="how noise grows with the time; information: so that equal times hide equal information",
    )
    prior: Literal["none", "unigram"] = Field(
        "none", description="unigram: the network corrects what the tokens' frequencies say of a noisy pixel"
    )
    self_conditioning: bool = Field(
        default=False, description="the network also sees its own estimate, half the time in training"
    )
    loss: Literal["x", "v", "cross_entropy"] = Field(
        "x", description="squared error of the clean image or of the velocity, or the token's -log p"
    )

    @property
    def shape(self) -> JiTShape:
        """The widths, from the preset or as given. Widths given beside a preset win."""
        given = {name: value for name in JiTShape._fields if (value := getattr(self, name)) is not None}
        if self.patch is not None:
            rows, columns = [self.patch] * 2 if isinstance(self.patch, int) else self.patch
            given["patch"] = (rows, columns)
        return PRESETS[self.preset]._replace(**given) if self.preset else JiTShape(**given)

    def in_full(self) -> TokenImageModel:
        """The same with its widths in place of the preset."""
        return self.model_copy(update={"preset": None} | self.shape._asdict() | {"patch": list(self.shape.patch)})

    @model_validator(mode="after")
    def _whole(self) -> TokenImageModel:
        if self.preset is None and (missing := [name for name in JiTShape._fields if getattr(self, name) is None]):
            raise ValueError(f"give a preset ({', '.join(PRESETS)}), or all widths; {', '.join(missing)} is missing")
        (rows, _), d, _, heads = self.shape
        whole = d % (2 * heads) == 0 and (self.block == "shared_norm" or d // heads % 4 == 0)
        if not whole or not 16 <= d // heads <= 256:
            multiple = "num_heads" if self.block == "shared_norm" else "four times num_heads"
            raise ValueError(
                f"d_model must be an even multiple of {multiple} with 16 to 256 channels a head; got {d} with {heads} "
                "heads"
            )
        if self.stem and (self.stem % 2 == 0 or rows > 1):
            wrong = "it is even: use an odd number" if self.stem % 2 == 0 else f"a patch has {rows} rows: use [1, n]"
            raise ValueError(f"stem {self.stem}: {wrong}")
        if self.prior == "unigram" and self.loss != "cross_entropy":
            raise ValueError("prior 'unigram' speaks of tokens: set loss to 'cross_entropy'")
        return self


Data, Model = TokenImageData, TokenImageModel
