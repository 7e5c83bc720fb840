"""What `launchers/evaluate.py` does for this workload: run(arguments)."""

from __future__ import annotations

import argparse
from typing import Any

from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.files import made_folder, write_json
from trunkline.engine.record.tables import markdown, metrics_table
from trunkline.models.token_image.evaluation import Evaluation, evaluate
from trunkline.models.token_image.shown import show


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and write evaluation.{md,json}, samples.txt and pictures; prints the tables. Returns the exit status."""
    for name, least in (("batch_size", 1), ("max_samples", 1), ("levels", 2), ("samples", 0), ("steps", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: use {least} or more")
    out = made_folder(arguments.out)
    result = evaluate(
        arguments.run, arguments.device, split=arguments.split, store=arguments.store,
        batch_size=arguments.batch_size, max_samples=arguments.max_samples, levels=arguments.levels,
        count=arguments.samples, steps=arguments.steps, seed=arguments.seed, progress=True,
    )  # fmt: skip
    pictures = show(result, out)
    text = render(result)
    links = "\n\n".join(f"![]({path.name})" for path in pictures)
    (out / "evaluation.md").write_text(f"# {arguments.run}\n\n{text}\n\n{links}\n", encoding="utf-8")
    write_json(out / "evaluation.json", _facts(result))
    written = ["evaluation.md", "evaluation.json", *(path.name for path in pictures)]
    if result.made:
        plain = result.trained.tokenizer.batch_decode(result.made, skip_special_tokens=True)
        (out / "samples.txt").write_text(f"\n{'-' * 72}\n".join(plain) + "\n", encoding="utf-8")
        written.append("samples.txt")
    print(f"{text}\nwrote {', '.join(written)} to {out}")
    return 0


def render(result: Evaluation) -> str:
    """Bits, accuracies and scores as tables in Markdown."""
    levels = result.levels
    rows = [["information", "time", *(f"{reader}, % right" for reader in levels.right)]]
    for level, share in enumerate(levels.shares):
        accuracies = (f"{100 * levels.accuracy(reader)[level]:.1f}" for reader in levels.right)
        rows.append([f"{100 * share:.1f} %", f"{levels.times[level]:.3g}", *accuracies])
    of = f"{len(levels.lengths):,} images of {result.split}, {int(levels.lengths.sum()):,} tokens"
    parts = [metrics_table(of, result.bits), markdown(rows, align="right")]
    if result.scores:
        parts.append(metrics_table(f"{len(result.made)} texts made up", result.scores))
    return "\n\n".join([*parts, *result.notes])


def _facts(result: Evaluation) -> dict[str, Any]:
    levels = result.levels
    return {
        "split": result.split,
        "images": len(levels.lengths),
        "tokens": int(levels.lengths.sum()),
        "bits": result.bits,
        "levels": {
            "share": levels.shares.tolist(),
            "time": levels.times.tolist(),
            "accuracy": {reader: levels.accuracy(reader).tolist() for reader in levels.right},
            "relative_error": {reader: levels.error(reader).tolist() for reader in levels.errors},
        },
        "samples": result.scores,
        "notes": result.notes,
    }
