"""The same model, opened and run by transformers alone, one prompt at a time: what texts are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer


class ByTransformers:
    """The weights of a run's folder."""

    def __init__(self, folder: Path) -> None:
        lm: Any = AutoModelForSeq2SeqLM
        tokenizer: Any = AutoTokenizer
        self.lm = lm.from_pretrained(folder, local_files_only=True).eval()
        self.tokenizer = tokenizer.from_pretrained(folder, local_files_only=True)

    def answer(self, *turns: str, **options: Any) -> str:
        """The answer to a talk: each turn's tokens and EOS, one after another."""
        text = "".join(turn + self.tokenizer.eos_token for turn in turns)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        made = self.lm.generate(ids, **options)
        return str(self.tokenizer.decode(made[0], skip_special_tokens=True))

    def likeliest(self, prompt: list[int], target: list[int]) -> list[int]:
        """The likeliest token in place of each of `target`."""
        with torch.no_grad():
            logits = self.lm(input_ids=torch.tensor([prompt]), labels=torch.tensor([target])).logits
        return list(logits[0].argmax(-1).tolist())
