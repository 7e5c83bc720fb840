"""As much of Slurm as docs/examples/slurm.sh needs, on this machine: `fake_slurm.py sbatch|srun|scontrol ...`.

`sbatch` runs a job file in the foreground, again each time that it was requeued, and prints the status of every turn.
It stands for a cluster of machines that are called 127.0.0.1, 127.0.0.2, ... FAKE_SLURM is the folder of its notes.
A turn's time limit is a number of lines in a file, so that no test depends on speed: FAKE_LIMITS="20,40" sends the
signal of `--signal` to the tasks of the first turn at line 20 of the file FAKE_PROGRESS, and to those of the second at
line 40. Later turns have no limit.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

NOTES = Path(os.environ["FAKE_SLURM"])
STEP, REQUEUED = NOTES / "step", NOTES / "requeued"
JOB = "71"


def sbatch(words: list[str]) -> int:
    """Options of the command line win over those of the job file, as in Slurm."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for option in ("--nodes", "--ntasks-per-node", "--signal"):
        parser.add_argument(option)
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("script", type=Path)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    script = parser.parse_args(words).script
    directives = re.findall(r"^#SBATCH (\S+)", script.read_text(), re.MULTILINE)
    options = parser.parse_known_args([*directives, *words])[0]
    nodes, tasks = int(options.nodes), int(options.ntasks_per_node)
    limits = [int(limit) for limit in os.environ["FAKE_LIMITS"].split(",")]
    for turn in range(20):
        job = {
            "SLURM_JOB_ID": JOB, "SLURM_PROCID": "0", "SLURM_NTASKS": str(nodes * tasks), "SLURM_NNODES": str(nodes),
            "SLURM_JOB_NODELIST": f"127.0.0.[1-{nodes}]", "SLURM_RESTART_COUNT": str(turn),
        }  # fmt: skip
        process = subprocess.Popen(["bash", options.script, *options.words], env=os.environ | job)
        while process.poll() is None:
            if turn < len(limits) and STEP.exists() and _lines() >= limits[turn]:
                for task in STEP.read_text().split():
                    os.kill(int(task), getattr(signal, f"SIG{options.signal.partition('@')[0]}"))
                STEP.unlink()
            time.sleep(0.05)
        STEP.unlink(missing_ok=True)
        print(f"turn {turn}: status {process.returncode}", flush=True)
        if not (options.requeue and REQUEUED.exists()):
            return process.returncode
        REQUEUED.unlink()
    raise AssertionError("20 turns")


def srun(words: list[str]) -> int:
    """Start the tasks. Returns the highest of their statuses."""
    command = words[next(place for place, word in enumerate(words) if not word.startswith("-")) :]
    size, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
    step = {
        "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
    }  # fmt: skip
    tasks = []
    for task in range(size):
        place = {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % (size // nodes))}
        tasks.append(subprocess.Popen(command, env=os.environ | step | place))
    draft = STEP.with_suffix(".draft")
    draft.write_text(" ".join(str(task.pid) for task in tasks))
    draft.replace(STEP)
    return max(128 - status if (status := task.wait()) < 0 else status for task in tasks)


def scontrol(words: list[str]) -> int:
    """`scontrol requeue JOB` alone."""
    assert words == ["requeue", JOB], words
    REQUEUED.touch()
    return 0


def _lines() -> int:
    try:
        return Path(os.environ["FAKE_PROGRESS"]).read_text().count("\n")
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
