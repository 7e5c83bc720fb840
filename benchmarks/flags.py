"""The flags of each of launchers/bench.py's benchmarks, by its name. This module imports nothing that takes long."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

PASSES = ("forward", "backward", "backward_dq")  # whose tiles can be swept


def attention(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py attention`."""
    add_common_arguments(parser)
    parser.add_argument("--head-dims", type=integers, metavar="D,...", help="head dimensions (default: 32,64,128)")
    parser.add_argument(
        "--blocks", type=integers, metavar="T,...", help="lengths, in blocks of 6,712 (default: 3,5,7,10)"
    )
    parser.add_argument("--heads", type=int, default=8, help="query and key heads (8)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--sweep", choices=PASSES, help="time tiles of a pass instead, at the shortest length (GPU)")
    instead.add_argument(
        "--borders", action="store_true", help="time what borders between kernels choose instead (GPU)"
    )


def masked_mse(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py masked_mse`."""
    add_common_arguments(parser)
    parser.add_argument("--values", type=integers, metavar="N,...", help="numbers of predictions of masked_mse")
    parser.add_argument("--rows", type=integers, metavar="N,...", help="numbers of rows of 384 for the linear one")
    parser.add_argument(
        "--sweep", action="store_true", help="time tiles, warps, programs and stages of the kernels instead (GPU)"
    )


def profile(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py profile`."""
    add_common_arguments(parser)
    parser.add_argument(
        "--ncu", metavar="PATH", help="NVIDIA's profiler (default: ncu on the PATH, or else /usr/local/cuda/bin/ncu)"
    )


def training(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py training`."""
    add_common_arguments(parser)
    parser.add_argument(
        "--config", type=Path, help="of the workload fluid (configs/fluid/large.json; --quick: nano.json)"
    )
    parser.add_argument("--micro-batch", type=int, default=8, help="samples a step (8)")
    parser.add_argument("--steps", type=int, default=6, help="steps that count (6)")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="of what has all these words in its name")


def engine(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py engine`."""
    parser.add_argument("--tensors", type=int, nargs="+", default=[10, 150, 1000], help="models by number of tensors")
    parser.add_argument("--backend", default="deepspeed", choices=["deepspeed", "fsdp"], help="(deepspeed)")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2], choices=range(4), help="ZeRO stages")
    parser.add_argument("--bf16", action="store_true", help="both sides in bf16 (fp32)")
    parser.add_argument("--pairs", type=int, default=200, help="pairs of steps a model and stage (200)")
    parser.add_argument("--cpu-time", action="store_true", help="of this process: on a machine that is busy otherwise")


def save(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py save`."""
    parser.add_argument("--config", type=Path, default=Path("configs/fluid/demo.json"))
    parser.add_argument("--backend", default="auto", help="deepspeed, fsdp, or auto (default)")
    parser.add_argument("--saves", type=int, default=20, help="saves of each kind")


def resume_picture(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py resume_picture`."""
    parser.add_argument("--out", type=Path, required=True, help="folder of resume.png and resume.json")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps, 24 or more (120)")


def numbers(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py numbers`."""
    parser.add_argument(
        "--example", type=Path, default=Path("data/seq2seq-demo/numbers"), metavar="FOLDER",
        help="what launchers/prepare.py seq2seq --example numbers wrote (data/seq2seq-demo/numbers)",
    )  # fmt: skip
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/seq2seq-demo"), metavar="FOLDER",
        help="with the runs pretrained, sv, sv-frozen and sv-scratch (runs/seq2seq-demo)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the tables (default: RUNS/numbers)")
    parser.add_argument("--device", default="cpu", help="where the networks answer (cpu)")


def prepare(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py prepare`."""
    parser.add_argument("--case", type=Path, metavar="FOLDER", help="a case's CSV files (default: random, V = 6,712)")
    parser.add_argument("--rounds", type=int, default=7, help="how often each reader reads the case (7)")


def memory(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py memory`."""
    parser.add_argument("--case", type=Path, metavar="FOLDER", help="a case's CSV files (default: random, V = 6,712)")
    parser.add_argument("--counts", default="5,20,60", help="numbers of cases (5,20,60)")
    parser.add_argument("--windows", type=int, default=5000, help="windows to read from each store (5000)")
    parser.add_argument("--steps", type=int, default=6, help="steps to train on each store (6)")
    parser.add_argument("--workers", type=int, default=2, help="cases prepared at a time (2)")


def images(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py images`."""
    parser.add_argument("--images", type=int, default=256, help="how many are made and read (256)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of every side (9)")
    parser.add_argument("--cpu-time", action="store_true", help="of this process: on a machine that is busy otherwise")


def fluid_training(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py fluid_training`."""
    demo = Path("configs/fluid/demo.json")
    parser.add_argument("--config", type=Path, metavar="FILE", default=demo, help=f"what is trained ({demo})")
    parser.add_argument("--backend", default="deepspeed", choices=["deepspeed", "fsdp"], help="(deepspeed)")
    parser.add_argument("--stage", type=int, choices=range(4), help="ZeRO stage (the configuration's)")
    parser.add_argument("--turns", type=int, default=12, help="turns of each side (12)")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn that count (20)")


def image_training(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py image_training`."""
    parser.add_argument("--arch", default="resnet18", help="the network (resnet18)")
    parser.add_argument("--img-size", type=int, default=64, help="edge of the pictures in pixels (64)")
    parser.add_argument("--micro-batch-size", type=int, default=32, help="images a step (32)")
    parser.add_argument("--backend", default="deepspeed", choices=["deepspeed", "fsdp"], help="(deepspeed)")
    parser.add_argument("--turns", type=int, default=8, help="turns of each side (8)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn that count (4)")
    add_workers(parser)
    add_out(parser)


def batch_norm(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py batch_norm`."""
    from trunkline.models.image_classification.architectures import ARCHITECTURES, BATCH_NORMALIZED

    networks = [name for name, network in ARCHITECTURES.items() if network.series in BATCH_NORMALIZED]
    parser.add_argument("--arch", choices=networks, default="resnet18", help="the network (resnet18)")
    parser.add_argument("--img-size", type=int, default=64, help="edge of the images in pixels (64)")
    parser.add_argument("--micro-batch-size", type=int, default=32, help="images a step (32)")
    parser.add_argument("--turns", type=int, default=8, help="turns of each side (8)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn that count (4)")


def causal_lm(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py causal_lm`."""
    from trunkline.models.causal_lm.config import PRESETS

    model = parser.add_mutually_exclusive_group()
    model.add_argument("--preset", choices=[*PRESETS, "110m"], default="tiny", help="the model (tiny)")
    model.add_argument(
        "--config", type=Path, metavar="FILE", help="a configuration: its model, optimizer, schedule and clipping"
    )
    parser.add_argument("--store", type=Path, help="a prepared store (default: the example, prepared in a moment)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples a micro-batch (16)")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step (1)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens a sample at most (256)")
    parser.add_argument("--backend", default="deepspeed", choices=["deepspeed", "fsdp"], help="(deepspeed)")
    parser.add_argument("--stage", type=int, choices=range(4), help="ZeRO stage (the configuration's; a preset's is 0)")
    parser.add_argument("--pairs", type=int, default=30, help="turns of every side (30)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn that count (3)")
    parser.add_argument("--batches", choices=["padded", "packed", "both"], default="both", help="the engine's (both)")
    parser.add_argument(
        "--padding-mask", action="store_true", help="give the others the attention mask that tokenizers make"
    )
    parser.add_argument("--cpu-time", action="store_true", help="of this process: on a machine that is busy otherwise")
    parser.add_argument(
        "--random", action="store_true", help="in place of a store: documents of random bytes, all of --max-length"
    )
    add_out(parser)


def seq2seq_training(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py seq2seq_training`."""
    parser.add_argument("--preset", default="small", choices=["tiny", "small", "chat", "base"], help="(small)")
    parser.add_argument("--micro-batch-size", type=int, default=16, help="samples a step, padded (16)")
    parser.add_argument("--backend", default="deepspeed", choices=["deepspeed", "fsdp"], help="(deepspeed)")
    parser.add_argument("--turns", type=int, default=8, help="turns of each side (8)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn that count (3)")
    add_out(parser)


def seq2seq_memory(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py seq2seq_memory`."""
    from trunkline.models.seq2seq.config import PRESETS

    parser.add_argument("--preset", choices=PRESETS, default="base", help="the model (base)")
    parser.add_argument("--layers", type=int, help="blocks of the encoder, and of the decoder (the preset's)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples (16)")
    parser.add_argument("--source-length", type=int, default=512, help="tokens that the encoder reads (512)")
    parser.add_argument("--target-length", type=int, default=512, help="tokens that the decoder writes (512)")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of parameters and activations (fp32)"
    )
    parser.add_argument("--steps", type=int, default=0, help="steps to time as well, after one that is not (0)")


def token_information(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py token_information`."""
    parser.add_argument("--store", type=Path, required=True, help="a store of token_image")
    parser.add_argument(
        "--times", type=integers, default=[1, 4, 12, 100, 300, 500, 700], metavar="T,...", help="of 1,000 (1 to 700)"
    )
    parser.add_argument("--draws", type=int, default=8192, help="tokens and noise drawn at each time (8192)")


def token_image_training(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py token_image_training`."""
    from trunkline.models.token_image.jit_flags import MODELS

    presets = [name.removeprefix("JiT-") for name in MODELS]
    parser.add_argument(
        "--beside", choices=("accelerate", "size", "bf16"), default="accelerate",
        help="the other side: a plain loop (default), images of four times the edge, or bf16",
    )  # fmt: skip
    parser.add_argument("--preset", default="B/4", choices=presets, help="(B/4)")
    parser.add_argument("--layers", type=int, help="blocks (the preset's)")
    parser.add_argument("--img-size", type=int, default=64, help="edge of the images in pixels (64)")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="images a step (4)")
    parser.add_argument("--backend", default="deepspeed", choices=["deepspeed", "fsdp"], help="(deepspeed)")
    parser.add_argument("--turns", type=int, default=8, help="turns of each side (8)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn that count (3)")
    add_workers(parser)
    add_out(parser)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Of the sides that read ahead."""
    parser.add_argument("--workers", type=int, default=0, help="processes of each side that read ahead (0)")


def add_out(parser: argparse.ArgumentParser) -> None:
    """Of the training benchmarks whose figures benchmarks/summary.py shows."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="figures also go to DIR/<device>/<name>.json")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that all of them have."""
    parser.add_argument("--minutes", type=minutes, metavar="M", help="start nothing more after M minutes")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("runs/benchmarks"), help="files go to DIR/<device>"
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes, fewer runs")


def integers(text: str) -> list[int]:
    """An argparse type: "32,64" -> [32, 64]."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers such as 32,64")
    return [int(part) for part in text.split(",")]


def minutes(text: str) -> float:
    """An argparse type: "2.5" -> 2.5."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of minutes such as 2.5")
    return number
