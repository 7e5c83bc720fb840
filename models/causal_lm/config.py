"""The `data` and `model` sections of a causal language model's configuration, and the four presets."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from trunkline.engine.config.meaning import HOW, FolderPath
from trunkline.engine.config.strict import Strict


class LlamaShape(NamedTuple):
    """Widths of a Llama: vocabulary, model, blocks, attention heads, key heads, feed-forward."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int


PRESETS = {
    "tiny": LlamaShape(10_000, 128, 8, 4, 1, 384),
    "small": LlamaShape(10_000, 384, 12, 12, 3, 1536),
    "medium": LlamaShape(20_000, 512, 16, 16, 4, 1536),
    "large": LlamaShape(32_000, 768, 32, 24, 6, 3072),
}


class CausalLMData(Strict):
    """Where the prepared data set is and how sequences are cut from it."""

    store: FolderPath = Field(description="folder that launchers/prepare.py wrote")
    max_length: int = Field(512, ge=2, description="tokens a sample at most")
    packing: bool = Field(
        default=False,
        description="put several documents into one sample of max_length tokens; none attends to another",
    )


class Pretrain(Strict):
    """Next-token prediction over whole texts."""

    type: Literal["pretrain"] = Field(description="what is learned")


class SFT(Strict):
    """Supervised fine-tuning: next-token prediction over what the assistant says."""

    type: Literal["sft"] = Field(description="what is learned")


class DPO(Strict):
    """Direct preference optimization against a frozen copy of the model that training starts from."""

    type: Literal["dpo"] = Field(description="what is learned")
    beta: float = Field(0.1, gt=0, description="how strongly the policy is held to the reference")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="the share of preferences taken to be wrong")
    length_average: bool = Field(
        default=False, description="mean log-probability of a response's tokens in place of their sum"
    )


class CausalLMModel(Strict):
    """The network (a preset, six widths, or the folder of a Hugging Face model) and what it is trained for."""

    objective: Annotated[Pretrain | SFT | DPO, Field(discriminator="type")] = Field(
        description="what the network is trained for"
    )
    path: FolderPath | None = Field(None, description="folder with the weights that training starts from")
    preset: Literal["tiny", "small", "medium", "large"] | None = Field(
        None, description="a named shape, in place of the widths"
    )
    vocab_size: int | None = Field(None, ge=1, description="tokens of the vocabulary")
    hidden_size: int | None = Field(None, ge=16, description="width of the model")
    num_layers: int | None = Field(None, ge=1, description="blocks")
    num_heads: int | None = Field(None, ge=1, description="attention heads of a block")
    num_kv_heads: int | None = Field(None, ge=1, description="heads of keys and values, which divide num_heads")
    intermediate_size: int | None = Field(None, ge=1, description="width of the feed-forward layer")
    attention: Annotated[Literal["auto", "trunkline", "sdpa", "eager"], HOW] = Field(
        "auto",
        description="auto: kernels/attention/flash.py where it can do the model's attention, else what torch has",
    )

    @property
    def shape(self) -> LlamaShape:
        """The widths, from the preset or as given; of a model without a path."""
        if self.preset is not None:
            return PRESETS[self.preset]
        widths = [getattr(self, name) for name in LlamaShape._fields]
        return LlamaShape(*widths)

    def in_full(self) -> CausalLMModel:
        """The same with its widths in place of the preset."""
        return self if self.preset is None else self.model_copy(update={"preset": None} | self.shape._asdict())

    @model_validator(mode="after")
    def _one_source(self) -> CausalLMModel:
        widths = [name for name in LlamaShape._fields if getattr(self, name) is not None]
        given = [name for name in ("path", "preset") if getattr(self, name) is not None] + widths
        if self.path is not None or self.preset is not None:
            if len(given) > 1:
                raise ValueError(f"give one of path, preset or all widths; {', '.join(given)} are set")
            return self
        if missing := [name for name in LlamaShape._fields if name not in widths]:
            raise ValueError(
                f"give path, a preset ({', '.join(PRESETS)}), or all widths; {', '.join(missing)} is missing"
            )
        shape = self.shape
        if shape.hidden_size % (2 * shape.num_heads) or not 16 <= shape.hidden_size // shape.num_heads <= 256:
            raise ValueError(
                f"hidden_size must be an even multiple of num_heads with 16 to 256 channels a head; got "
                f"{shape.hidden_size} with {shape.num_heads} heads"
            )
        if shape.num_heads % shape.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads; got {shape.num_heads} and {shape.num_kv_heads}"
            )
        return self

    @model_validator(mode="after")
    def _preferences_need_a_model(self) -> CausalLMModel:
        if self.objective.type == "dpo" and self.path is None:
            raise ValueError("the objective dpo starts from a trained model: set model.path to its folder")
        return self


Data, Model = CausalLMData, CausalLMModel
