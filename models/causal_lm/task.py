"""The three tasks of causal language models: pre-training, SFT and DPO.

Pre-training and SFT are one: the sum of -log p(token) over the tokens that carry loss, all of a text's or an answer's.
DPO compares pairs of answers; its loss is in models/causal_lm/dpo.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from trunkline.engine.data.lazy import opened_late
from trunkline.engine.errors import ConfigError
from trunkline.engine.task import Batch, Sums, Task
from trunkline.kernels.attention.packed import packing_tables
from trunkline.models.causal_lm.build import AUTO_CLASS, head_dim_of, hf_config_of, make_network
from trunkline.models.causal_lm.config import DPO, CausalLMData, CausalLMModel
from trunkline.models.causal_lm.data import Packed, Padded, Pairs, Piece, collate, collate_pairs
from trunkline.models.causal_lm.dpo import REWARDS, PolicyAndReference, pair_sums
from trunkline.models.causal_lm.fit import check_fit
from trunkline.models.causal_lm.network import CausalLM
from trunkline.models.causal_lm.store import Store
from trunkline.models.causal_lm.tokenizer import stop_ids
from trunkline.models.text.assets import write_assets
from trunkline.models.text.file_format import FileFormat, shell_of
from trunkline.models.text.folder import read_generation, token_ids
from trunkline.models.text.linear_loss import IGNORE
from trunkline.models.text.skipped import remarks
from trunkline.models.text.tokenizer import pad_id, special_ids, vocabulary_digest

DIRECTIONS: dict[str, Literal["min", "max"]] = {
    "loss": "min", "perplexity": "min", "rewards/chosen": "max", "rewards/rejected": "min", "rewards/margins": "max",
    "rewards/accuracies": "max", "prefers_chosen": "max",
}  # fmt: skip
"""Which way a metric is better. What the frozen reference prefers is no merit of the model's."""

KIND_OF = {"pretrain": "text", "sft": "conversations", "dpo": "preferences"}


def make_task(data: CausalLMData, model: CausalLMModel) -> LanguageModelTask:
    """The task of the configured objective. Raises DataError or ConfigError if data and model do not fit."""
    return (PreferenceTask if model.objective.type == "dpo" else LanguageModelTask)(data, model)


class LanguageModelTask(Task):
    """Next-token prediction over a prepared data set: pre-training and SFT."""

    unit = "tokens"

    def __init__(self, data: CausalLMData, model: CausalLMModel) -> None:
        self.data, self.model = data, model
        self.store = Store.open(data.store)
        wanted = KIND_OF[model.objective.type]
        if self.store.kind != wanted:
            raise ConfigError(
                f"model.objective: {model.objective.type} learns from {wanted}, but data.store {data.store} holds "
                f"{self.store.kind}: prepare one with --kind {wanted}"
            )
        self.hf_config = hf_config_of(model, data.max_length)
        self.tokenizer = self.store.tokenizer()
        check_fit(self.store, self.tokenizer, data, model, self.hf_config)
        self.pad_id = pad_id(self.tokenizer)
        self._generation = read_generation(Path(model.path)) if model.path else {}
        self._own_stops = self._stops_of_config()
        self._model_notes: list[str] = []
        for split in ("train", "val"):  # what is wrong with either should be named now
            self.dataset(split)

    def build_model(self) -> nn.Module:
        """The network that `model` names, in fp32. Raises ConfigError if it cannot keep packed documents apart."""
        return self._network()

    def dataset(self, split: str) -> Padded | Packed | Pairs:
        """Samples of at most data.max_length tokens: one document each, or several packed."""
        kind = Packed if self.data.packing else Padded
        return kind(self.store.split(split), self.store.kind, self.data.max_length)

    def collate(self, samples: Sequence[Any]) -> Batch:
        """See models/causal_lm/data.py::collate. Packed rows come with the tables of kernels/attention/packed.py."""
        batch = collate(samples, self.pad_id, self.data.max_length)
        return batch | packing_tables(batch["document"]) if "document" in batch else batch

    def weight(self, batch: Batch) -> Tensor:
        """The number of tokens that are predicted."""
        return self.predicted(batch).sum()

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        """-log p, in nats, summed over the tokens that are predicted."""
        return {"loss": model(batch["input_ids"], _targets(batch), **_packing(batch))}

    def by_token(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """-log p of each target, fp32 [B, L], 0 where there is none; and where there is one, bool [B, L]."""
        loss = model(batch["input_ids"], _targets(batch), **_packing(batch), reduction="none")
        return loss, self.predicted(batch)

    def predicted(self, batch: Batch) -> Tensor:
        """bool [B, L], where a token is predicted."""
        return _targets(batch) != IGNORE

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        """The same sum, and the number of tokens."""
        return self.loss(model, batch) | {"tokens": self.weight(batch)}

    def summarize(self, sums: Sums) -> dict[str, float]:
        """ "loss": nats a token over all tokens; "perplexity": its exponential."""
        loss = float(sums["loss"] / sums["tokens"])
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def direction(self, metric: str) -> Literal["min", "max"] | None:
        """See `DIRECTIONS`."""
        return DIRECTIONS.get(metric)

    def largest_sample(self) -> Any:
        """data.max_length tokens that are all learned."""
        piece = Piece(np.zeros(self.data.max_length, np.int64), np.ones(self.data.max_length, bool))
        return [piece] if self.data.packing else piece

    def flops_per_sample(self) -> float:
        """Matrix products and visible attention pairs of an average sample, forward and backward (3 x forward)."""
        return 3.0 * self._forward_flops()

    def fingerprint(self) -> str:
        """Names the data set's content, and how samples are cut from it."""
        cut = f"{self.data.max_length}{' packed' if self.data.packing else ''}"
        return f"{self.store.fingerprint} in samples of {cut}"

    def meaning(self) -> dict[str, Any]:
        """Which token is which."""
        return {"vocabulary": vocabulary_digest(self.tokenizer)}

    def notes(self) -> list[str]:
        """What was left out of the data, and, once the network is built, which attention it uses and which tensors are
        not trained."""
        said = [f"{self.data.store}: {remark}" for remark in remarks(self.store.index)]
        said += [f"{split}: {note}" for split in ("train", "val") for note in self.dataset(split).notes]
        return said + self._model_notes

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
        eos, own = self.tokenizer.eos_token_id, self._own_stops
        stops = token_ids(self._generation.get("eos_token_id"), "eos_token_id") or own
        generation = {"pad_token_id": self.pad_id} | self._generation
        generation["eos_token_id"] = list(dict.fromkeys([*stops, *stop_ids(self.tokenizer)]))
        config = self.hf_config.to_dict() | {"eos_token_id": [*own, eos] if own and eos not in own else own or eos}
        return write_assets(folder, self.tokenizer, self.store.root, config, generation)

    @cached_property
    def _shell(self) -> Any:
        return shell_of(self.hf_config, AUTO_CLASS)

    @cached_property
    def _file_format(self) -> FileFormat:
        return FileFormat(self._shell, Path(self.model.path) if self.model.path else None)

    def _network(self) -> CausalLM:
        network = make_network(self.model, self.hf_config)
        why = f"; {network.attention_note}" if network.attention_note else ""
        self._model_notes = [f"attention: {network.attention}{why}"]
        self._model_notes += self._file_format.notes
        if self.data.packing and not network.packs:
            raise ConfigError(
                f"data.packing: documents packed into one row change one another's loss in the model of "
                f"{self.model.path} ({type(network.lm).__name__}, attention {network.attention}): set it to false"
            )
        return network

    def _forward_flops(self) -> float:
        """Of all training samples, divided by their number."""
        config: Any = self.hf_config.get_text_config()
        heads = getattr(config, "num_attention_heads", None) or 0
        matrices = sum(
            parameter.numel()
            for module in self._shell.modules() if not isinstance(module, nn.Embedding)
            for parameter in module.parameters(recurse=False) if parameter.ndim == 2
        )  # fmt: skip
        lengths, longest = self.store.split("train").lengths.astype(np.float64), self.data.max_length
        pieces, rest = np.divmod(lengths, longest) if self.store.kind == "text" else (0.0, lengths.clip(max=longest))
        tokens = (pieces * longest + rest).sum()
        pairs = (pieces * longest * (longest + 1) / 2 + rest * (rest + 1) / 2).sum()
        attention = 4.0 * config.num_hidden_layers * heads * head_dim_of(config) * pairs
        return float((2.0 * matrices * tokens + attention) / max(1, len(self.dataset("train"))))

    def _stops_of_config(self) -> list[int]:
        """The eos_token_id of config.json, but for what is no mark: the default of a family is 2, whatever 2 is."""
        config: Any = self.hf_config
        own = getattr(config, "eos_token_id", None) or getattr(config.get_text_config(), "eos_token_id", None)
        special = special_ids(self.tokenizer)
        return [token for token in token_ids(own, f"{self.model.path}/config.json: eos_token_id") if token in special]


class PreferenceTask(LanguageModelTask):
    """Direct preference optimization over pairs of answers to one prompt."""

    unit = "pairs"
    metric_units: Mapping[str, str] = {"accuracies": "accuracy, a share"}

    def __init__(self, data: CausalLMData, model: CausalLMModel) -> None:
        super().__init__(data, model)
        assert isinstance(model.objective, DPO)
        self.options = model.objective

    def build_model(self) -> nn.Module:
        """The policy, and as its reference a frozen copy."""
        policy = self._network()
        return PolicyAndReference(policy, copy.deepcopy(policy))

    def dataset(self, split: str) -> Pairs:
        """Two answers to one prompt, of at most data.max_length tokens each with it."""
        if self.data.packing:
            raise ConfigError("data.packing: pairs of answers are not packed; set it to false for the objective dpo")
        return Pairs(self.store.split(split), self.data.max_length)

    def collate(self, samples: Sequence[Any]) -> Batch:
        """See trunkline.models.causal_lm.data.collate_pairs."""
        return collate_pairs(samples, self.pad_id, self.data.max_length)

    def weight(self, batch: Batch) -> Tensor:
        """The number of pairs."""
        return batch["valid"].sum()

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        """The loss and, by TRL's names, the rewards, their margins, and how often the chosen one's is higher."""
        sums = self.evaluate(model, batch)
        return {key: sums[key] for key in ("loss", *REWARDS)}

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        """See trunkline.models.causal_lm.dpo.pair_sums."""
        return pair_sums(*self.log_probabilities(model, batch), batch, self.options)

    def log_probabilities(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """[B, 2] fp32 of (chosen, rejected) under policy and reference, summed over a response's tokens."""
        return model(batch["input_ids"], batch["targets"])

    def summarize(self, sums: Sums) -> dict[str, float]:
        """Means over pairs."""
        return {key: float(value / sums["pairs"]) for key, value in sums.items() if key != "pairs"}

    def largest_sample(self) -> Any:
        """Two answers of data.max_length tokens."""
        piece = super().largest_sample()
        return piece, piece

    def flops_per_sample(self) -> float:
        """Forward and backward of the policy, forward of the reference."""
        return 4.0 * self._forward_flops()

    def notes(self) -> list[str]:
        """Those of the data, and that the reference is frozen."""
        return [*super().notes(), "the reference model is a frozen copy of the policy: half of the parameters"]

    def tensor_name(self, name: str) -> str | None:
        """The policy's names in the Hugging Face model; the reference is left out."""
        return name.removeprefix("policy.lm.") if name.startswith("policy.") else None


class _WithoutData(LanguageModelTask):
    """The task without its data, which are read only where something is asked that needs them."""

    def __init__(self, data: CausalLMData, model: CausalLMModel) -> None:
        self.data, self.model, self.hf_config = data, model, hf_config_of(model, data.max_length)
        self.store, self.pad_id = opened_late(lambda: Store.open(data.store)), 0
        self.tokenizer = opened_late(lambda: self.store.tokenizer())


class _PairsWithoutData(PreferenceTask, _WithoutData):
    """The same of pairs of answers: `PreferenceTask` over `_WithoutData`."""


def weights_task(data: CausalLMData, model: CausalLMModel) -> LanguageModelTask:
    """The task of the configured objective without its data. Raises ConfigError."""
    return (_PairsWithoutData if model.objective.type == "dpo" else _WithoutData)(data, model)


def _targets(batch: Batch) -> Tensor:
    """The batch's targets, without those of samples that only fill it up."""
    return batch["targets"].masked_fill(~batch["valid"][:, None], IGNORE)


def _packing(batch: Batch) -> dict[str, Any]:
    """What a packed batch has beside its tokens."""
    if "document" not in batch:
        return {}
    tables = {key: value for key, value in batch.items() if key == "repack" or key.startswith("unpack_")}
    return {"position_ids": batch["position_ids"], "document": batch["document"], "packing": tables}
