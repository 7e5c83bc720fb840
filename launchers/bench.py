"""Measure: `python launchers/bench.py <benchmark>`. `python launchers/bench.py <benchmark> --help` lists its flags."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from trunkline.engine.config.flags import Parser
from trunkline.engine.errors import TrunklineError
from trunkline.launchers.entry import status_of

BENCHMARKS = {
    "attention": ("trunkline.benchmarks.attention", "flash_attention beside cuDNN, FlexAttention and plain SDPA"),
    "masked_mse": ("trunkline.benchmarks.masked_mse", "masked_mse and linear_masked_mse against the device's own copy"),
    "profile": ("trunkline.benchmarks.kernel_profile", "what limits each kernel, by NVIDIA's profiler, ncu"),
    "training": ("trunkline.benchmarks.training", "a training step of the fluid surrogate against a plain loop's"),
    "engine": ("trunkline.benchmarks.engine_overhead", "the engine's step against a bare loop of DeepSpeed or FSDP"),
    "save": ("trunkline.benchmarks.save", "how long a save delays training, in the background and blocking"),
    "numbers": ("trunkline.benchmarks.numbers", "the demo of seq2seq beside tables, rules and neighbours"),
    "prepare": ("trunkline.benchmarks.fluid_prepare", "reading CSV cases, against pandas"),
    "memory": ("trunkline.benchmarks.fluid_memory", "memory of preparing and reading, by number of cases"),
    "fluid_training": ("trunkline.benchmarks.fluid_training", "training of the surrogate against transformers"),
    "images": ("trunkline.benchmarks.image_reading", "reading images, against a DataLoader with Pillow transforms"),
    "image_training": ("trunkline.benchmarks.image_training", "training of image classifiers against transformers"),
    "batch_norm": ("trunkline.benchmarks.batch_norm", "a step with BatchNorm by groups, against torch's BatchNorm"),
    "causal_lm": ("trunkline.benchmarks.causal_lm", "training of language models against transformers and Accelerate"),
    "seq2seq_training": ("trunkline.benchmarks.seq2seq_training", "training of encoder-decoders against transformers"),
    "seq2seq_memory": ("trunkline.benchmarks.seq2seq_memory", "what encoder-decoders keep for the backward pass"),
    "token_information": ("trunkline.benchmarks.token_information", "what noisy pixels tell of tokens, by encoding"),
    "token_image_training": ("trunkline.benchmarks.token_image_training", "training of token images beside Accelerate"),
    "resume_picture": ("trunkline.benchmarks.resume_picture", "a run killed and moved, on one that nothing stopped"),
}
"""Name -> module with `run(arguments)`, and what it measures. trunkline.benchmarks.flags has its flags, by name."""


def main(argv: list[str] | None = None) -> int:
    """Parse and call the benchmark. Returns the exit status: 0 done, 1 a limit was missed, 2 a user's error."""
    return status_of(lambda: _measure(sys.argv[1:] if argv is None else argv))


def _measure(argv: list[str]) -> int:
    if importlib.util.find_spec("trunkline.benchmarks") is None:
        raise TrunklineError("an installed Trunkline has no benchmarks: run launchers/bench.py in a clone")
    flags = importlib.import_module("trunkline.benchmarks.flags")
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="benchmark")
    for name, (_, summary) in BENCHMARKS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in argv[:1]:
            getattr(flags, name)(command)
    arguments = parser.parse_args(argv)
    return importlib.import_module(BENCHMARKS[arguments.benchmark][0]).run(arguments)


if __name__ == "__main__":
    sys.exit(main())
