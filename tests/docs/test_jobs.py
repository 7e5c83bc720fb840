"""docs/examples and the loop of a supervisor: what they start, and what they do with the exit status."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import yaml

from tests.docs.pages import ROOT, blocks, section

PAGE = "docs/operating.md"


def test_the_job_asks_for_its_next_turn_after_status_75_alone(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@" >srun.log\nexit "$STATUS"\n')
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" >scontrol.log\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    for status in (0, 1, 2, 75, 76, 143):
        (tmp_path / "scontrol.log").unlink(missing_ok=True)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "71", "STATUS": str(status)}
        job = ["bash", ROOT / "docs/examples/slurm.sh", "--config", "a b"]
        assert subprocess.run(job, cwd=tmp_path, env=environment, check=False).returncode == status
        assert (tmp_path / "scontrol.log").exists() == (status == 75)
    assert "launchers/train.py --resume auto --config a b\n" in (tmp_path / "srun.log").read_text()


def test_the_loop_of_a_supervisor_repeats_the_command_while_its_status_is_75(tmp_path: Path) -> None:
    (loop,) = [block for block in blocks(section(PAGE, "One machine")) if block.startswith("until")]
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" >>calls\nexit $(sed -n "$(wc -l <calls)p" statuses)\n')
    (tmp_path / "python").chmod(0o755)
    for statuses, calls in (("75 75 0", 3), ("0", 1), ("75 2 0", 2), ("76 0", 1)):
        (tmp_path / "statuses").write_text(statuses.replace(" ", "\n") + "\n")
        (tmp_path / "calls").write_text("")
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-c", loop], cwd=tmp_path, env=environment, check=False, timeout=60)
        assert (tmp_path / "calls").read_text().count("\n") == calls


def test_the_kubernetes_job_gives_a_save_its_time_and_starts_what_the_launcher_understands() -> None:
    job = yaml.safe_load((ROOT / "docs/examples/kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"], job["spec"]["parallelism"]) == ("batch/v1", "Job", 1)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = [*container["command"], *container["args"]]
    assert pod["terminationGracePeriodSeconds"] > int(words[words.index("--shutdown-timeout") + 1])
    assert int(words[words.index("--nproc_per_node") + 1]) == container["resources"]["limits"]["nvidia.com/gpu"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    from trunkline.launchers.command_line import parse

    assert parse(words[words.index("launchers/train.py") + 1 :]).arguments.resume == "auto"
