"""Seq2SeqTask: the response to a prompt, or a text's missing spans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn

from trunkline.engine.data.lazy import opened_late
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.engine.task import Batch, Sums, Task
from trunkline.models.seq2seq.build import head_of, hf_config_of, load_weights, make_network, shell
from trunkline.models.seq2seq.config import Pairs, Seq2SeqData, Seq2SeqModel
from trunkline.models.seq2seq.data import PackedPairs, PairRows, PairSamples
from trunkline.models.seq2seq.flops import forward_flops
from trunkline.models.seq2seq.generated import Generated, GeneratedTexts
from trunkline.models.seq2seq.generation import write
from trunkline.models.seq2seq.network import Seq2Seq
from trunkline.models.seq2seq.span_corruption import corrupted
from trunkline.models.seq2seq.store import Store
from trunkline.models.seq2seq.text_metrics import NAMES, TextMetrics
from trunkline.models.seq2seq.texts import TextPieces, Texts
from trunkline.models.seq2seq.tokenizer import check_marks, sentinels
from trunkline.models.seq2seq.trained import stop_ids
from trunkline.models.text.assets import write_assets
from trunkline.models.text.file_format import FileFormat
from trunkline.models.text.folder import read_generation, token_ids
from trunkline.models.text.linear_loss import IGNORE
from trunkline.models.text.skipped import remarks
from trunkline.models.text.tokenizer import check_ids, vocabulary_digest

KIND_OF = {"pairs": "pairs", "span_corruption": "text"}


class Seq2SeqTask(Task):
    """The workload over a prepared data set. Raises DataError or ConfigError if data and model do not fit."""

    unit = "tokens"

    def __init__(self, data: Seq2SeqData, model: Seq2SeqModel) -> None:
        self.data, self.model = data, model
        self.store = Store.open(data.store)
        if self.store.kind != (wanted := KIND_OF[model.objective.type]):
            other = next(objective for objective, kind in KIND_OF.items() if kind == self.store.kind)
            raise ConfigError(
                f"model.objective: {model.objective.type} learns from {wanted}, but data.store {data.store} holds "
                f"{self.store.kind}: prepare one with --kind {wanted}, or set model.objective.type to {other}"
            )
        self.hf_config: Any = hf_config_of(model)
        if model.weights and not Path(model.weights).is_file():
            raise CheckpointError(f"model.weights: {model.weights}: no such file: check the path")
        if self.store.vocab_size > self.hf_config.vocab_size:
            where = f"the model of {model.path}" if model.path else "the model's shape"
            raise ConfigError(
                f"data.store: {data.store}: its tokenizer has {self.store.vocab_size} tokens, but {where} has "
                f"{self.hf_config.vocab_size}: set model.vocab_size, or prepare the data with the model's own tokenizer"
            )
        self.head = head_of(model)
        self.generates = model.objective.type == "pairs" and model.generation.samples > 0
        self.tokenizer = self.store.tokenizer()
        check_marks(self.tokenizer, self.store.root)
        self._generation: dict[str, Any] = {}
        if model.path:
            check_ids(self.tokenizer, Path(model.path), data.store)
            self._generation = read_generation(Path(model.path))
            self._check_start()
        self._model_notes: list[str] = []
        for split in ("train", "val"):  # what is wrong with either should be named now
            self.dataset(split)

    def build_model(self) -> nn.Module:
        """The network that `model` names, in fp32."""
        return make_network(self.model, self.hf_config, self.head)

    def initialize(self, model: nn.Module) -> None:
        """The weights of `model.weights`. Raises CheckpointError."""
        if self.model.weights:
            self._model_notes = [load_weights(cast(Seq2Seq, model), Path(self.model.weights), self.head)]

    def dataset(self, split: str) -> PairSamples | PackedPairs | Texts:
        """The samples of "train", "val" or "test": pairs, rows of packed pairs, or pieces of texts."""
        return self._samples.dataset(split)

    def collate(self, samples: Sequence[Any]) -> Batch:
        """See trunkline.models.seq2seq.data, and of texts trunkline.models.seq2seq.texts."""
        return self._samples.collate(samples)

    def complete(self, batch: Batch) -> Batch:
        """The batch with what encoder and decoder read and write: of texts, their spans are taken out by `draw`."""
        return corrupted(batch, self._pad, self._eos) if "texts" in batch else batch

    def weight(self, batch: Batch) -> Tensor:
        """The number of tokens that the decoder is to write, EOS included."""
        return ((batch["target_document"] >= 0) & batch["valid"][:, None]).sum()

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        """-log p, in nats, summed over the targets."""
        batch = self.complete(batch)
        return {"loss": model(**_read(batch), targets=_targets(batch))}

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        """What `likelihood` gives and, where texts are generated, what GeneratedTexts sums of them."""
        sums = self.likelihood(model, batch)
        if self.generates:
            made = self.texts.sums(self.generated(model, batch))
            sums |= {name: value.to(sums["loss"].device) for name, value in made.items()}
        return sums

    def likelihood(self, model: nn.Module, batch: Batch) -> Sums:
        """ "loss" as `loss` sums it; "correct", how many targets are the likeliest token; "tokens", of all targets."""
        batch = self.complete(batch)
        loss, correct = model(**_read(batch), targets=_targets(batch), reduction="measured")
        return {"loss": loss, "correct": correct, "tokens": self.weight(batch)}

    def generated(self, model: nn.Module, batch: Batch) -> list[Generated]:
        """The likeliest text, token by token, for each numbered sample of the batch. `model` has whole weights."""
        some = (batch["number"] >= 0) & batch["valid"]
        if not some.any():
            return []
        seen = batch["input_document"][some] >= 0
        inputs, targets = batch["input_ids"][some], batch["targets"][some]
        made = write(
            cast(Seq2Seq, model).lm, inputs, seen, stop_ids(self._eos, self._generation), self._pad,
            max_new_tokens=self._max_new_tokens,
        )  # fmt: skip
        return [
            Generated(int(number), prompt[there][:-1].tolist(), target[target != IGNORE][:-1].tolist(), text)
            for number, prompt, there, target, text in zip(
                batch["number"][some], inputs, seen, targets, made, strict=True
            )
        ]

    def summarize(self, sums: Sums) -> dict[str, float]:
        """ "loss", nats a token over all targets; "perplexity", its exponential; "token_accuracy".

        Of generated texts those of TextMetrics.scores.
        """
        loss = float(sums["loss"] / sums["tokens"])
        found = {
            "loss": loss, "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": float(sums["correct"] / sums["tokens"]),
        }  # fmt: skip
        return found | (self._metrics.scores(sums) if self.generates else {})

    @property
    def signatures(self) -> dict[str, str]:
        """By metric, how sacrebleu computes it; empty where no texts are generated."""
        return self._metrics.signatures if self.generates else {}

    def show(self, sums: Sums, folder: Path) -> None:
        """Write generated.md: see GeneratedTexts."""
        if self.generates:
            self.texts.show(sums, folder)

    def judged_by(self, metric: str) -> dict[str, Any]:
        """How texts are generated, for what is measured of them."""
        return {"model.generation": self.model.generation.model_dump()} if metric in NAMES else {}

    def direction(self, metric: str) -> Literal["min", "max"] | None:
        """Whether it is better high or low."""
        return "min" if metric == "perplexity" else "max" if metric in ("token_accuracy", *NAMES) else None

    def flops_per_sample(self) -> float:
        """Matrix products and visible attention pairs of an average sample, forward and backward (3 x forward).

        A frozen encoder needs less.
        """
        sides = self._samples.sides("train")
        return 3.0 * forward_flops(shell(self.hf_config, self.head), sides) / len(self.dataset("train"))

    def fingerprint(self) -> str:
        """Names the data set's content, and how samples are cut from it."""
        return f"{self.store.fingerprint} in samples of {self._samples.cut}"

    def meaning(self) -> dict[str, Any]:
        """Which token is which."""
        return {"vocabulary": vocabulary_digest(self.tokenizer)}

    def notes(self) -> list[str]:
        """What was left out of the data, how it is cut, and which weights training starts from."""
        said = [f"{self.data.store}: {remark}" for remark in remarks(self.store.index)] + self._samples.notes
        said += [f"{split}: {note}" for split in ("train", "val") for note in self.dataset(split).notes]
        if self.model.path is None and 2 * self.store.vocab_size < (rows := self.hf_config.vocab_size):
            said.append(
                f"the network has {rows:,} rows of embeddings, and the tokenizer of {self.data.store} "
                f"{self.store.vocab_size:,} tokens: the others are never used; set model.vocab_size"
            )
        return said + self._model_notes + self._file_format.notes

    def tensor_name(self, name: str) -> str | None:
        """The name in the Hugging Face model."""
        return name.removeprefix("lm.")

    def file_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named and shaped as in the folder that training starts from; see trunkline.models.text.file_format."""
        return self._file_format(tensors)

    def save_assets(self, folder: Path) -> dict[str, Any]:
        """The tokenizer and generation_config.json; config.json is the Hugging Face model's.

        What the model that training starts from says of generation is kept, with all its stops. Raises ConfigError if
        transformers would not tokenize there as the store was tokenized.
        """
        ids = {"pad_token_id": self._pad, "eos_token_id": self._eos, "decoder_start_token_id": self._pad}
        generation = ids | self._generation
        stops = token_ids(generation["eos_token_id"], "eos_token_id")
        if self._eos not in stops:
            generation["eos_token_id"] = [*stops, self._eos]
        config: dict[str, Any] = self.hf_config.to_dict() | ids
        if self.head == "untied":
            config["scale_decoder_outputs"] = False
        # by which transformers scales a T5's hidden states; other programs tie by it
        config["tie_word_embeddings"] = config.get("scale_decoder_outputs", self.head == "tied")
        return write_assets(folder, self.tokenizer, self.store.root, config, generation)

    @cached_property
    def _eos(self) -> int:
        eos: int = self.tokenizer.eos_token_id
        return eos

    @cached_property
    def _pad(self) -> int:
        pad: int = self.tokenizer.pad_token_id
        return pad

    @cached_property
    def _metrics(self) -> TextMetrics:
        return TextMetrics(self.model.generation.bleu_tokenizer)

    @cached_property
    def texts(self) -> GeneratedTexts:
        """What is summed and shown of generated texts."""
        return GeneratedTexts(self.tokenizer, self.data, self._max_new_tokens, self._metrics)

    @property
    def _max_new_tokens(self) -> int:
        return self.model.generation.max_new_tokens or self.data.max_target_length

    @cached_property
    def _samples(self) -> PairRows | TextPieces:
        if isinstance(objective := self.model.objective, Pairs):
            return PairRows(self.store, self.data, self._pad, self._eos, self.model.generation.samples)
        return TextPieces(self.store, self.data, objective, self._pad, self._eos, self._sentinels)

    @cached_property
    def _sentinels(self) -> list[int]:
        return sentinels(self.tokenizer, self.hf_config.vocab_size)

    @cached_property
    def _file_format(self) -> FileFormat:
        return FileFormat(shell(self.hf_config, self.head), Path(self.model.path) if self.model.path else None)

    def _check_start(self) -> None:
        start = self.hf_config.decoder_start_token_id
        if start not in (None, self._pad):
            raise ConfigError(
                f"model.path: {self.model.path}: its decoder starts with token {start}, and the PAD token of "
                f"{self.data.store} is {self._pad}: only models whose decoder starts with PAD are trained"
            )


class _WithoutData(Seq2SeqTask):
    """The task without its data, which are read only where something is asked that needs them.

    Which tokens are marks is of no account.
    """

    _pad, _eos = 0, 1

    def __init__(self, data: Seq2SeqData, model: Seq2SeqModel) -> None:
        self.data, self.model, self.hf_config, self.head = data, model, hf_config_of(model), head_of(model)
        self.store = opened_late(lambda: Store.open(data.store))
        self.tokenizer = opened_late(lambda: self.store.tokenizer())

    @cached_property
    def _sentinels(self) -> list[int]:
        return list(range(self.hf_config.vocab_size))

    def largest_sample(self) -> Any:
        """The longest row, or text."""
        return self._samples.largest()


make_task, weights_task = Seq2SeqTask, _WithoutData


def _targets(batch: Batch) -> Tensor:
    """The batch's targets, without those of samples that only fill it up."""
    return batch["targets"].masked_fill(~batch["valid"][:, None], IGNORE)


def _read(batch: Batch) -> dict[str, Tensor]:
    """What the network reads."""
    return {name: batch[name] for name in ("input_ids", "input_document", "decoder_input_ids", "target_document")}
