"""One run that is killed three times and moved between layouts, drawn on one that nothing stopped.

    python launchers/bench.py resume_picture --out docs       docs/resume.png and docs/resume.json, in about two minutes

A small language model learns the documentation of Python, on the CPU. Every process of the second run ends by SIGKILL
once its next steps are made. `--resume auto` takes the newest checkpoint with another launcher. What was trained past
that checkpoint is lost, and trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
from PIL import Image

from trunkline.engine.errors import TrunklineError
from trunkline.engine.record.metrics_file import RESUMED, read_metrics
from trunkline.engine.record.pictures import INK, RED, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1e-5
"""Of the relative difference of a loss: what the engine promises of a resume with another layout."""
_PATIENCE_S = 600.0


class Layout(NamedTuple):
    """How a piece of the run is started. The flags of launchers/train.py follow `launch`."""

    ranks: str
    engine: str
    colour: str
    launch: tuple[str, ...]
    flags: tuple[str, ...] = ()


def _layouts() -> list[Layout]:
    train = str(ROOT / "launchers/train.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    deepspeed = (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", port, train)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", train)
    one = Layout("1 process", "DeepSpeed ZeRO 1", "#00798c", (sys.executable, train))
    return [
        one,
        Layout("2 ranks", "DeepSpeed ZeRO 3", "#d1782f", deepspeed, ("--set", "deepspeed.zero_optimization.stage=3")),
        Layout("2 ranks", "FSDP", "#7b4ea3", torchrun, ("--backend", "fsdp")),
        one,
    ]


def run(arguments: argparse.Namespace) -> int:
    """Train both runs, write the figures and the picture. Returns 1 if a loss is farther off than LIMIT, else 0."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="resume-picture-") as folder:
        measured = measure(Path(folder), arguments.steps)
    (out / "resume.json").write_text(json.dumps(measured, indent=1) + "\n")
    draw(measured, out / "resume.png")
    worst = measured["largest_relative_difference"]
    print(f"{out / 'resume.png'}: losses differ by {worst:.2g} of themselves at most, {LIMIT:g} is allowed")
    return int(worst > LIMIT)


def measure(folder: Path, steps: int) -> dict[str, Any]:
    """The losses of both runs, and where the second was killed and resumed, ready for JSON."""
    save_every = max(1, steps // 12)
    store = folder / "store"
    _finish([sys.executable, str(ROOT / "launchers/prepare.py"), "causal_lm", "--example", "--kind", "text",
             "--train-tokenizer", "--vocab-size", "1024", "--out", str(store)], folder / "prepare.log")  # fmt: skip
    settings = {
        "data.store": store, "data.max_length": 128, "model.vocab_size": 1024, "model.num_layers": 2,
        "training.steps": steps, "training.log_every": 1, "training.save_every": save_every,
        "training.eval_every": steps, "training.trackers": "[]",
    }  # fmt: skip
    flags = ["--config", str(ROOT / "configs/causal_lm/demo.json"), "--resume", "auto"]
    flags += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    unbroken, broken = folder / "unbroken", folder / "broken"
    layouts = _layouts()
    _finish([*layouts[0].launch, *flags, "--output-dir", str(unbroken)], folder / "unbroken.log")
    kills = []
    for place, layout in enumerate(layouts):
        command, log = [*layout.launch, *flags, *layout.flags, "--output-dir", str(broken)], folder / f"{place}.log"
        if place == len(layouts) - 1:
            _finish(command, log)
            break
        saved = save_every * 3 * (place + 1)
        _kill_after(command, log, broken, saved, saved + max(1, save_every // 2))
        kills.append(_losses(broken))
    mine, theirs = _losses(unbroken), _losses(broken)
    if list(mine) != list(theirs):
        raise TrunklineError(f"the runs logged {len(mine)} and {len(theirs)} steps, not the same ones")
    begins = [row for row in read_metrics(broken / "metrics.jsonl") if row["split"] == RESUMED]
    return {
        "command": "python launchers/bench.py resume_picture",
        "steps": list(mine),
        "unbroken": list(mine.values()),
        "interrupted": list(theirs.values()),
        "layouts": [begins[0]["from"], *(row["to"] for row in begins)],
        "killed_after": [max(before) for before in kills],
        "resumed_from": [row["step"] for row in begins],
        "lost": [
            {str(step): loss for step, loss in before.items() if step > row["step"]}
            for before, row in zip(kills, begins, strict=True)
        ],
        "largest_difference": max(abs(mine[step] - theirs[step]) for step in mine),
        "largest_relative_difference": max(abs(mine[step] - theirs[step]) / abs(mine[step]) for step in mine),
    }


def _losses(run: Path) -> dict[int, float]:
    path = run / "metrics.jsonl"
    return {row["step"]: row["loss"] for row in read_metrics(path) if row["split"] == "train"} if path.exists() else {}


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"
    }  # fmt: skip
    print(f"{' '.join(Path(word).name for word in command[:8])} ...", flush=True)
    with log.open("wb") as said:
        return subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT, cwd=ROOT)


def _finish(command: list[str], log: Path) -> None:
    if status := _start(command, log).wait():
        raise TrunklineError(f"ended with status {status}: {_last(log)}")


def _kill_after(command: list[str], log: Path, run: Path, saved: int, step: int) -> None:
    """Send SIGKILL to the program and all that it started, once it has made a step and has saved another."""
    program, end = _start(command, log), time.monotonic() + _PATIENCE_S
    while max(_losses(run), default=0) < step or not (run / f"checkpoints/step-{saved:08d}").is_dir():
        if program.poll() is not None or time.monotonic() > end:
            program.kill()
            raise TrunklineError(f"did not come to step {step}: {_last(log)}")
        time.sleep(0.02)
    parent = psutil.Process(program.pid)
    ranks = parent.children(recursive=True)
    for process in [*ranks, parent]:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(ranks)
    program.wait()


def _last(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def draw(measured: dict[str, Any], path: Path) -> None:
    """The losses of both runs on top of each other, and below how far they are from each other."""
    with picture(path, 9.0, 5.8, **{"font.size": 10.5, "figure.dpi": 100}) as figure:
        figure.suptitle(
            "Killed three times, resumed on other ranks and backends (colours):\nthe losses are those of the run that "
            "nothing stopped (grey)", x=0.01, ha="left", fontsize=13.5, fontweight="bold", color=INK,
        )  # fmt: skip
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.3, 1))
        _draw_losses(above, measured)
        _draw_difference(below, measured)
        below.set_xlim(-0.01 * measured["steps"][-1], 1.01 * measured["steps"][-1])
    with Image.open(path) as drawn:
        drawn.convert("RGB").quantize(128).save(path, optimize=True)  # a third of the size


def _pieces(measured: dict[str, Any]) -> list[tuple[int, int, Layout]]:
    """First and last step of each piece that counts, and how it was trained."""
    ends = [0, *measured["resumed_from"], measured["steps"][-1]]
    return list(zip(ends, ends[1:], _layouts(), strict=False))


def _draw_losses(axes: Axes, measured: dict[str, Any]) -> None:
    steps, losses = measured["steps"], measured["interrupted"]
    high, low = max(losses), min(losses)
    span = high - low
    axes.plot(steps, measured["unbroken"], color="#c9ccd1", lw=8, solid_capstyle="round")
    for first, last, layout in _pieces(measured):
        inside = [place for place, step in enumerate(steps) if first <= step <= last]
        axes.plot([steps[place] for place in inside], [losses[place] for place in inside], color=layout.colour, lw=1.8)
        axes.text((first + last) / 2, high + 0.34 * span, f"{layout.ranks}\n{layout.engine}", color=layout.colour,
                  ha="center", va="top", fontweight="bold")  # fmt: skip
    kills = zip(measured["killed_after"], measured["resumed_from"], measured["lost"], strict=True)
    for killed, resumed, lost in kills:
        loss = lost.get(str(killed), losses[steps.index(killed)])  # a checkpoint may be whole when the kill comes
        axes.axvspan(resumed, killed, color=RED, alpha=0.10, lw=0)
        axes.plot([killed], [loss], "X", color=RED, ms=10, mec="white", zorder=5)
        axes.annotate(f"kill -9 after step {killed},\nresumed from {resumed}", (killed, loss), xytext=(8, 20),
                      textcoords="offset points", color=RED, fontsize=9.5)  # fmt: skip
    axes.text(0, low, "shaded: steps past the last\ncheckpoint, trained again", color=RED, fontsize=9.5)
    axes.set_ylim(low - 0.1 * span, high + 0.36 * span)
    axes.set_ylabel("training loss")


def _draw_difference(axes: Axes, measured: dict[str, Any]) -> None:
    steps = measured["steps"]
    pairs = zip(measured["unbroken"], measured["interrupted"], strict=True)
    differences = dict(zip(steps, (abs(one - other) for one, other in pairs), strict=True))
    worst = max(differences.values())
    zero = min((value for value in differences.values() if value), default=1e-9) / 20  # which a log axis does not have
    for first, last, layout in _pieces(measured):
        inside = [step for step in steps if first < step <= last]
        axes.plot(inside, [differences[step] or zero for step in inside], ".", color=layout.colour, ms=6)
    for resumed in measured["resumed_from"]:
        axes.axvline(resumed, color=RED, lw=0.8, alpha=0.5)
    axes.set_yscale("log")
    axes.axhline(worst, color=INK, lw=0.9, ls="--")
    low, high = min(measured["unbroken"]), max(measured["unbroken"])
    axes.text(0, 1.4 * worst, f"largest difference: {worst:.1e}, of losses from {low:.1f} to {high:.1f}", color=INK,
              va="bottom", fontweight="bold")  # fmt: skip
    axes.set_ylim(zero / 3, 30 * worst)
    shown = [10.0**power for power in range(-12, 3) if 4 * zero < 10.0**power < 30 * worst]
    axes.set_yticks([zero, *shown], ["exactly 0", *(f"{value:.0e}" for value in shown)])
    axes.minorticks_off()
    axes.set_ylabel("difference")
    axes.set_xlabel("optimizer step")
