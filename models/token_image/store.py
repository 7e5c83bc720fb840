"""The prepared data set: texts as tokens, and of dialogues also what stands before them."""

from __future__ import annotations

from trunkline.models.text.token_store import TokenStore


class Store(TokenStore):
    """Texts without EOS. Of kind "dialogues" the prompt is a condition, with a column of its own."""

    workload = "token_image"
    prepare = "python launchers/prepare.py token_image --out"
    columns = {"text": ("texts",), "dialogues": ("texts", "conditions")}  # noqa: RUF012 - a constant of the class
