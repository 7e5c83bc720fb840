"""The `data` and `model` sections of an encoder-decoder language model's configuration, and the presets."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from trunkline.engine.config.meaning import HOW, FolderPath
from trunkline.engine.config.strict import Strict


class T5Shape(NamedTuple):
    """Widths of a T5: vocabulary, model, a head, feed-forward, blocks of encoder and decoder, heads, activation, and
    the buckets of relative positions with the distance from which on all share one."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    feed_forward_proj: str
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128


PRESETS = {
    "tiny": T5Shape(512, 128, 32, 256, 3, 2, 4, "gated-gelu", 32, 64),
    "small": T5Shape(32_128, 512, 64, 2048, 6, 6, 8, "relu"),
    "chat": T5Shape(29_298, 768, 64, 3072, 10, 10, 12, "relu"),
    "base": T5Shape(32_128, 768, 64, 2048, 12, 12, 12, "gated-gelu"),
}
"""tiny is for examples; small is T5's; chat is ChatLM-mini-Chinese's; base is T5 v1.1's, but tied."""


class Seq2SeqData(Strict):
    """Where the prepared data set is and how samples are cut from it."""

    store: FolderPath = Field(description="folder that launchers/prepare.py wrote")
    max_source_length: int = Field(256, ge=2, description="tokens that the encoder reads at most, EOS included")
    max_target_length: int = Field(256, ge=2, description="tokens that the decoder writes at most, EOS included")
    packing: bool = Field(
        default=False,
        description="train on rows of several pairs, where none attends to another; texts are joined and cut, T5's way",
    )
    packed_source_length: Annotated[int, Field(ge=2)] | Literal["auto"] = Field(
        "auto", description="tokens of a packed row that the encoder reads; auto: what the data fill best"
    )
    packed_target_length: Annotated[int, Field(ge=2)] | Literal["auto"] = Field(
        "auto", description="tokens of a packed row that the decoder writes"
    )

    @model_validator(mode="after")
    def _room_for_the_longest(self) -> Seq2SeqData:
        for side in ("source", "target"):
            packed, most = getattr(self, f"packed_{side}_length"), getattr(self, f"max_{side}_length")
            if packed != "auto" and not self.packing:
                raise ValueError(f"packed_{side}_length goes with packing: set packing to true, or leave it out")
            if packed != "auto" and packed < most:
                raise ValueError(
                    f"packed_{side}_length {packed} has no room for a sample of max_{side}_length {most}: raise it, or "
                    "lower that"
                )
        return self


class Pairs(Strict):
    """The response to a prompt."""

    type: Literal["pairs"] = Field(description="what is learned")


class SpanCorruption(Strict):
    """T5's pre-training: spans of a text are replaced by sentinels, and are what the decoder writes."""

    type: Literal["span_corruption"] = Field(description="what is learned")
    noise_density: float = Field(0.15, gt=0, lt=1, description="the share of tokens that is taken out")
    mean_span_length: float = Field(3.0, ge=1, description="tokens of a span on average")


class Generation(Strict):
    """How texts are generated where the model is evaluated during training: greedily."""

    samples: int = Field(256, ge=0, description="evenly spaced samples of the split for which a text is generated")
    max_new_tokens: int | None = Field(
        None, ge=1, description="tokens of a text at most; by default data.max_target_length"
    )
    bleu_tokenizer: Literal["13a", "zh", "char", "intl", "none"] = Field(
        "13a", description="sacrebleu's tokenizer; zh for Chinese"
    )


class Seq2SeqModel(Strict):
    """The network (a preset, its widths, or the folder of a Hugging Face model) and what it is trained for."""

    objective: Annotated[Pairs | SpanCorruption, Field(discriminator="type")] = Field(
        Pairs(type="pairs"), description="what the network is trained for"
    )
    path: FolderPath | None = Field(None, description="folder with the model that training starts from")
    weights: FolderPath | None = Field(
        None, description="file of weights that training starts from, such as pytorch_model.bin, for a preset or widths"
    )
    preset: Literal["tiny", "small", "chat", "base"] | None = Field(
        None, description="a named shape; widths beside it win"
    )
    vocab_size: int | None = Field(None, ge=1, description="tokens of the vocabulary")
    d_model: int | None = Field(None, ge=1, description="width of the model")
    d_kv: int | None = Field(None, ge=1, description="width of an attention head")
    d_ff: int | None = Field(None, ge=1, description="width of the feed-forward layer")
    num_layers: int | None = Field(None, ge=1, description="blocks of the encoder")
    num_decoder_layers: int | None = Field(None, ge=1, description="blocks of the decoder")
    num_heads: int | None = Field(None, ge=1, description="attention heads of a block")
    feed_forward_proj: Literal["relu", "gated-gelu"] | None = Field(
        None, description="activation of the feed-forward layer"
    )
    relative_attention_num_buckets: int | None = Field(None, ge=4, description="buckets of relative positions")
    relative_attention_max_distance: int | None = Field(
        None, ge=8, description="distance in tokens from which on all positions share a bucket"
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="share of activations set to 0; by default the folder's, or 0.1"
    )
    tie_word_embeddings: bool | None = Field(
        None, description="whether the head is the shared embedding; by default as in the folder, or true"
    )
    attention: Annotated[Literal["trunkline", "sdpa", "eager"], HOW] = Field(
        "trunkline", description="trunkline keeps no scores for the backward pass; the others are transformers'"
    )
    generation: Annotated[Generation, HOW] = Field(Generation(), description="how texts are generated in evaluations")

    @property
    def shape(self) -> T5Shape:
        """The widths, from the preset or as given; of a model without a path. Widths given beside a preset win."""
        given = {name: value for name in T5Shape._fields if (value := getattr(self, name)) is not None}
        return PRESETS[self.preset]._replace(**given) if self.preset else T5Shape(**given)

    def in_full(self) -> Seq2SeqModel:
        """The same with its widths in place of the preset."""
        return self if self.path else self.model_copy(update={"preset": None} | self.shape._asdict())

    @model_validator(mode="after")
    def _one_source(self) -> Seq2SeqModel:
        widths = [name for name in T5Shape._fields if getattr(self, name) is not None]
        if self.path is not None:
            if others := [name for name in ("preset", "weights") if getattr(self, name) is not None] + widths:
                raise ValueError(f"path gives the whole model: remove {', '.join(others)}")
            return self
        needed = [name for name in T5Shape._fields if name not in T5Shape._field_defaults]
        if self.preset is None and (missing := [name for name in needed if name not in widths]):
            raise ValueError(
                f"give path, a preset ({', '.join(PRESETS)}), or all widths; {', '.join(missing)} is missing"
            )
        return self


Data, Model = Seq2SeqData, Seq2SeqModel
