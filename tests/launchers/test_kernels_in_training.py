"""The Triton kernels in a run of the fluid workload, through Triton's interpreter, on two ranks that share weights."""

import importlib
import json
from pathlib import Path

import pytest

from tests.distributed import run_distributed_test
from tests.kernels.conftest import interpreted
from trunkline.launchers import train


def train_and_note_kernels(rank: int, world_size: int, arguments: list[str]) -> set[str]:
    """The names of the kernels that were launched."""
    triton_path = importlib.reload(importlib.import_module("trunkline.kernels.triton_path"))
    assert triton_path.INTERPRETED, "from the environment"
    executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
    launched, execute = set(), executor.__call__

    def note(self, *args, **kwargs):
        launched.add(self.fn.__name__)
        return execute(self, *args, **kwargs)

    executor.__call__ = note
    with interpreted():
        assert train.main(arguments) == 0
    return launched


@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["deepspeed", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_with_sharded_weights_the_kernels_give_the_losses_of_torch_on_one_rank(toy: Path, tmp_path: Path, backend):
    pytest.importorskip("triton")
    few = ["--config", str(toy / "config.json"), "--set", "training.steps=2", "--set", "training.eval_samples=2"]
    few += ["--set", "deepspeed.optimizer.params.lr=0.01"]  # so that a gradient counts at once
    sharded = [*few, "--output-dir", str(tmp_path / "run"), "--backend", backend]
    sharded += ["--set", "deepspeed.zero_optimization.stage=3", "--set", "deepspeed.train_micro_batch_size_per_gpu=4"]
    environment = {"TRITON_INTERPRET": "1"}
    ranks = run_distributed_test(train_and_note_kernels, 2, sharded, backend=None, environment=environment)
    for launched in ranks:
        assert {
            f"_{kernel}_{which}_kernel" for kernel in ("flash", "linear_masked_mse") for which in ("fwd", "bwd")
        } <= launched
    assert train.main([*few, "--output-dir", str(tmp_path / "one")]) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]
