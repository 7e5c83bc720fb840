"""The Triton kernels in a run of the fluid workload, through Triton's interpreter, on two ranks that share weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trunkline.launchers import train

ROOT = Path(__file__).parents[2]
NOTES_KERNELS = """
import os, sys
from pathlib import Path
from triton.runtime.interpreter import GridExecutor
from trunkline.launchers import train

launched, execute = set(), GridExecutor.__call__

def note(self, *args, **kwargs):
    launched.add(self.fn.__name__)
    return execute(self, *args, **kwargs)

GridExecutor.__call__ = note
status = train.main(sys.argv[2:])
Path(sys.argv[1], f"rank{os.environ['RANK']}").write_text(" ".join(sorted(launched)))
sys.exit(status)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["deepspeed", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_with_sharded_weights_the_kernels_give_the_losses_of_torch_on_one_rank(toy: Path, tmp_path: Path, backend):
    pytest.importorskip("triton")
    script = tmp_path / "train.py"
    script.write_text(NOTES_KERNELS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    few = ["--config", str(toy / "config.json"), "--set", "training.steps=2", "--set", "training.eval_samples=2"]
    few += ["--set", "deepspeed.optimizer.params.lr=0.01"]  # so that a gradient counts at once
    command += [str(tmp_path), *few, "--output-dir", str(tmp_path / "run"), "--backend", backend]
    command += ["--set", "deepspeed.zero_optimization.stage=3", "--set", "deepspeed.train_micro_batch_size_per_gpu=4"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        launched = (tmp_path / f"rank{rank}").read_text().split()
        assert {
            f"_{kernel}_{which}_kernel" for kernel in ("flash", "linear_masked_mse") for which in ("fwd", "bwd")
        } <= {*launched}
    assert train.main([*few, "--output-dir", str(tmp_path / "one")]) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]
