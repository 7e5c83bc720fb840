"""The three tasks of causal language models, as the engine wants them stated: pre-training, SFT, and DPO.

Pre-training and SFT are one: the sum of -log p(token) over the tokens that carry loss, all of a text's or an answer's.
DPO compares pairs of answers; its loss is in models/causal_lm/dpo.py.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from engine.errors import ConfigError
from engine.task import Batch, Sums
from kernels.packed_attention import packing_tables
from models.causal_lm.config import DPO, CausalLMData, CausalLMModel
from models.causal_lm.data import IGNORE, Packed, Padded, Pairs, collate, collate_pairs
from models.causal_lm.dpo import PolicyAndReference, dpo_loss
from models.causal_lm.network import CausalLM, hf_config_of, make_network
from models.causal_lm.skipped import remarks
from models.causal_lm.store import Store
from models.causal_lm.tokenizer import load_tokenizer, pad_id, stop_ids

KIND_OF = {"pretrain": "text", "sft": "conversations", "dpo": "preferences"}


def make_task(data: CausalLMData, model: CausalLMModel) -> LanguageModelTask:
    """The task of the configured objective. Raises DataError or ConfigError if data and model do not fit."""
    return (PreferenceTask if model.objective.type == "dpo" else LanguageModelTask)(data, model)


class LanguageModelTask:
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
        self._check_vocabulary()
        self._check_window()
        self.tokenizer = self.store.tokenizer()
        self._check_tokenizer()
        self.pad_id = pad_id(self.tokenizer)
        self._datasets: dict[str, Any] = {split: self._dataset(split) for split in ("train", "val")}

    def build_model(self) -> nn.Module:
        """The network that `model` names, in fp32. Raises ConfigError if it cannot keep packed documents apart."""
        return self._network()

    def datasets(self) -> dict[str, Dataset[Any]]:
        """Samples of at most data.max_length tokens: one document each, or several packed."""
        return self._datasets

    def collate(self, samples: Sequence[Any]) -> Batch:
        """See models.causal_lm.data.collate. Packed rows come with the tables of kernels.packed_attention."""
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

    def flops_per_sample(self) -> float:
        """Matrix products and visible attention pairs of an average sample, forward and backward (3 x forward)."""
        return 3.0 * self._forward_flops()

    def fingerprint(self) -> str:
        """Names the data set's content, and how samples are cut from it."""
        cut = f"{self.data.max_length}{' packed' if self.data.packing else ''}"
        return f"{self.store.fingerprint} in samples of {cut}"

    def notes(self) -> list[str]:
        """What was left out of the data, of all records and then split by split."""
        said = [f"{self.data.store}: {remark}" for remark in remarks(self.store.index)]
        return said + [f"{split}: {note}" for split, data in self._datasets.items() for note in data.notes]

    def weight_name(self, name: str) -> str | None:
        """The name in the Hugging Face model."""
        return name.removeprefix("lm.")

    def save_assets(self, folder: Path) -> dict[str, Any]:
        """The tokenizer and generation_config.json; config.json is the Hugging Face model's."""
        from transformers import GenerationConfig

        shutil.copytree(self.store.root / "tokenizer", folder, dirs_exist_ok=True)
        stops = stop_ids(self.tokenizer)
        generation = GenerationConfig(eos_token_id=stops, pad_token_id=self.pad_id)
        generation.save_pretrained(folder)
        config = self.hf_config.to_dict() | {"eos_token_id": self.tokenizer.eos_token_id}
        config.pop("_name_or_path", None)
        return json.loads(json.dumps(config, default=str))

    def _network(self) -> CausalLM:
        network = make_network(self.model, self.hf_config)
        if self.data.packing and not network.packs:
            raise ConfigError(
                f"data.packing: documents packed into one row change one another's loss in the model of "
                f"{self.model.path} ({type(network.lm).__name__}, attention {network.attention}): set it to false"
            )
        return network

    def _dataset(self, split: str) -> Any:
        kind = Packed if self.data.packing else Padded
        return kind(self.store.split(split), self.store.kind, self.data.max_length)

    def _forward_flops(self) -> float:
        """Of all training samples, divided by their number."""
        from transformers import AutoModelForCausalLM

        config: Any = self.hf_config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(self.hf_config)
        matrices = sum(
            parameter.numel()
            for module in network.modules() if not isinstance(module, nn.Embedding)
            for parameter in module.parameters(recurse=False) if parameter.ndim == 2
        )  # fmt: skip
        lengths, longest = self.store.split("train").lengths.astype(np.float64), self.data.max_length
        pieces, rest = np.divmod(lengths, longest) if self.store.kind == "text" else (0.0, lengths.clip(max=longest))
        tokens = (pieces * longest + rest).sum()
        pairs = (pieces * longest * (longest + 1) / 2 + rest * (rest + 1) / 2).sum()
        attention = 4.0 * config.num_hidden_layers * config.num_attention_heads * head_dim * pairs
        return float((2.0 * matrices * tokens + attention) / max(1, len(self._datasets["train"])))

    def _check_vocabulary(self) -> None:
        known = self.hf_config.get_text_config().vocab_size
        if self.store.vocab_size > known:
            where = f"the model of {self.model.path}" if self.model.path else "the model's shape"
            raise ConfigError(
                f"data.store: {self.data.store}: its tokenizer has {self.store.vocab_size} tokens, but {where} has "
                f"{known}: prepare the data with the model's own tokenizer (--tokenizer), or choose a larger vocabulary"
            )

    def _check_tokenizer(self) -> None:
        """An id must mean what it means to the model that training starts from; new tokens may be added."""
        folder = Path(self.model.path or "")
        if self.model.path is None or not (folder / "tokenizer_config.json").is_file():
            return
        known = {number: token for token, number in load_tokenizer(folder).get_vocab().items()}
        for token, number in self.tokenizer.get_vocab().items():
            if known.get(number, token) != token:
                raise ConfigError(
                    f"data.store: {self.data.store}: its token {number} is {token!r}, but {known[number]!r} to the "
                    f"model of {folder}: prepare the data with --tokenizer {folder}"
                )

    def _check_window(self) -> None:
        window = getattr(self.hf_config.get_text_config(), "sliding_window", None)
        if self.data.packing and window is not None and window < self.data.max_length:
            raise ConfigError(
                f"data.packing: the attention of {self.model.path} slides a window of {window} tokens, which packed "
                f"rows of data.max_length = {self.data.max_length} tokens would not: set packing to false, or "
                f"max_length to {window} or less"
            )


class PreferenceTask(LanguageModelTask):
    """Direct preference optimization over pairs of answers to one prompt."""

    unit = "pairs"

    def __init__(self, data: CausalLMData, model: CausalLMModel) -> None:
        super().__init__(data, model)
        assert isinstance(model.objective, DPO)
        self.options = model.objective

    def build_model(self) -> nn.Module:
        """The policy, and as its reference a frozen copy."""
        policy = self._network()
        return PolicyAndReference(policy, copy.deepcopy(policy))

    def collate(self, samples: Sequence[Any]) -> Batch:
        """See models.causal_lm.data.collate_pairs."""
        return collate_pairs(samples, self.pad_id, self.data.max_length)

    def weight(self, batch: Batch) -> Tensor:
        """The number of pairs."""
        return batch["valid"].sum()

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        """The loss and, by TRL's names, the rewards, their margins, and how often the chosen one's is higher."""
        sums = self.evaluate(model, batch)
        return {key: sums[key] for key in ("loss", *_REWARDS)}

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        """See `statistics`."""
        return self.statistics(*self.log_probabilities(model, batch), batch)

    def log_probabilities(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """[B, 2] fp32 of (chosen, rejected) under policy and reference, summed over a response's tokens."""
        return model(batch["input_ids"], batch["targets"])

    def statistics(self, policy: Tensor, reference: Tensor, batch: Batch) -> Sums:
        """Loss and rewards, and how often the chosen answer's tokens are the likelier ones on average, under both."""
        tokens = (batch["targets"] != IGNORE).sum(2).clamp(min=1)
        policy_mean, reference_mean = policy / tokens, reference / tokens
        compared = (policy_mean, reference_mean) if self.options.length_average else (policy, reference)
        found = dpo_loss(*compared, self.options)
        margin = found.chosen_reward - found.rejected_reward
        each = {
            "loss": found.loss,
            "rewards/chosen": found.chosen_reward,
            "rewards/rejected": found.rejected_reward,
            "rewards/margins": margin,
            "rewards/accuracies": margin > 0,
            "prefers_chosen": policy_mean[:, 0] > policy_mean[:, 1],
            "reference_prefers_chosen": reference_mean[:, 0] > reference_mean[:, 1],
        }
        return {key: (value * batch["valid"]).sum() for key, value in each.items()} | {"pairs": self.weight(batch)}

    def summarize(self, sums: Sums) -> dict[str, float]:
        """Means over pairs."""
        return {key: float(value / sums["pairs"]) for key, value in sums.items() if key != "pairs"}

    def flops_per_sample(self) -> float:
        """Forward and backward of the policy, forward of the reference."""
        return 4.0 * self._forward_flops()

    def notes(self) -> list[str]:
        """Those of the data, and that the reference is frozen."""
        return [*super().notes(), "the reference model is a frozen copy of the policy: half of the parameters"]

    def weight_name(self, name: str) -> str | None:
        """The policy's names in the Hugging Face model; the reference is left out."""
        return name.removeprefix("policy.lm.") if name.startswith("policy.") else None

    def _dataset(self, split: str) -> Any:
        if self.data.packing:
            raise ConfigError("data.packing: pairs of answers are not packed; set it to false for the objective dpo")
        return Pairs(self.store.split(split), self.data.max_length)


_REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def _targets(batch: Batch) -> Tensor:
    """The batch's targets, without those of samples that only fill it up."""
    return batch["targets"].masked_fill(~batch["valid"][:, None], IGNORE)


def _packing(batch: Batch) -> dict[str, Any]:
    """What a packed batch has beside its tokens."""
    if "document" not in batch:
        return {}
    tables = {key: value for key, value in batch.items() if key == "repack" or key.startswith("unpack_")}
    return {"position_ids": batch["position_ids"], "document": batch["document"], "packing": tables}
