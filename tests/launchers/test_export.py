"""launchers/export.py: the weights of any checkpoint, whole, and what it says to mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_distributed_test
from tests.engine.checkpoint.test_resume import SAVED, Layout, save_all
from tests.engine.state.test_sharded_state import ALONE, Alone
from trunkline.engine.checkpoint.checkpoints import Checkpoints
from trunkline.engine.checkpoint.digests import check_digests
from trunkline.engine.checkpoint.export import export_weights
from trunkline.engine.checkpoint.manifest import verify
from trunkline.engine.state.sharded_state import capture
from trunkline.launchers.export import main
from trunkline.models.fluid.trained import load_trained


def test_the_newest_checkpoint_gives_the_final_weights(toy: Path, tmp_path: Path) -> None:
    assert main(["--run", str(toy / "run"), "--out", str(tmp_path / "out")]) == 0
    exported, final = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", toy / "run/final"))
    assert exported.keys() == final.keys()
    assert all(torch.equal(exported[name], final[name]) for name in final)
    assert json.loads((tmp_path / "out/config.json").read_text())["workload"] == "fluid"


def test_the_training_data_is_not_needed(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(toy / "run", tmp_path / "run")
    monkeypatch.setattr("trunkline.models.fluid.task.Store.open", None)  # whoever opens it fails
    monkeypatch.chdir(tmp_path)
    assert main(["--run", "run", "--out", "out", "--dtype", "float16"]) == 0
    assert load_trained(tmp_path / "out", torch.device("cpu")).schema == load_trained(toy / "run", "cpu").schema
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float16"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in (toy / "run/best").iterdir()}
    (tmp_path / "run/assets/schema.json").write_text("{}")
    assert main(["--run", "run", "--out", "again"]) == 2


def test_a_run_of_an_earlier_version_is_exported_with_its_data(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/assets")
    assert main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert load_trained(tmp_path / "out", torch.device("cpu")).facts == {}


def test_shards_have_an_index_and_can_be_loaded(toy: Path, tmp_path: Path) -> None:
    assert main(["--run", str(toy / "run"), "--out", str(tmp_path / "out"), "--max-shard-gib", "1e-4"]) == 0
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert [file.name for file in files] == [
        f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))
    ]
    whole = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert {key: index["weight_map"][key] for key in whole} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert max(file.stat().st_size for file in files) < 2e-4 * 2**30
    folders = tmp_path / "out", toy / "run/final"
    one, two = (load_trained(folder, torch.device("cpu")).model.state_dict() for folder in folders)
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_weights_are_cast_where_asked(toy: Path, tmp_path: Path) -> None:
    assert main(["--run", str(toy / "run"), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    final = load_file(toy / "run/final/model.safetensors")
    buffers = dict(load_trained(toy / "run/final", torch.device("cpu")).model.named_buffers())
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(tensor, final[name] if name in buffers else final[name].to(torch.bfloat16))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.distributed
def test_a_checkpoint_in_parts_is_put_together(tmp_path: Path) -> None:
    layout = Layout("deepspeed", 3, 2)
    run_distributed_test(save_all, 2, tmp_path, [layout], backend=None)
    run = tmp_path / f"from-{layout}"
    export_weights(verify(run / f"checkpoints/step-{SAVED:08d}"), tmp_path / "out", 2**30)
    exported, final = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run / "final"))
    assert exported.keys() == final.keys()
    assert all(torch.equal(exported[name], final[name]) for name in final)


def test_a_buffer_without_a_dimension_is_exported_too(tmp_path: Path) -> None:
    model = torch.nn.BatchNorm1d(4)
    backend = Alone(model, torch.optim.SGD(model.parameters(), lr=0.1))
    checkpoints = Checkpoints(tmp_path / "checkpoints", ALONE, keep_last=1)
    checkpoints.open_for_writing()
    path = checkpoints.save(capture(backend), {"step": 1}, probe_loss=0.0, in_background=False)
    export_weights(verify(path), tmp_path / "out", 2**30)
    exported = load_file(tmp_path / "out/model.safetensors")
    assert exported.keys() == model.state_dict().keys()
    assert exported["num_batches_tracked"].shape == ()


def test_buffers_are_not_cast(tmp_path: Path) -> None:
    """A variance of 1e6 is infinity in fp16."""
    model = torch.nn.BatchNorm1d(4)
    model.running_var.fill_(1e6)  # type: ignore[union-attr, operator]
    backend = Alone(model, torch.optim.SGD(model.parameters(), lr=0.1))
    checkpoints = Checkpoints(tmp_path / "checkpoints", ALONE, keep_last=1)
    checkpoints.open_for_writing()
    path = checkpoints.save(capture(backend), {"step": 1}, probe_loss=0.0, in_background=False)
    export_weights(verify(path), tmp_path / "out", 2**30, torch.float16)
    exported = load_file(tmp_path / "out/model.safetensors")
    assert exported["weight"].dtype == torch.float16
    assert torch.equal(exported["running_var"], torch.full((4,), 1e6))


def test_mistakes_are_named(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(toy / "run", run)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").touch()
    damaged = next((run / "checkpoints/step-00000003").rglob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for flags, message in (
        (["--run", str(run), "--out", str(tmp_path / "full")], "is not an empty folder"),
        (["--run", str(tmp_path / "nowhere"), "--out", str(tmp_path / "new")], "holds no checkpoint"),
        (["--run", str(run), "--out", str(tmp_path / "new"), "--step", "5"], "MANIFEST.json cannot be read"),
        (["--run", str(run), "--out", str(tmp_path / "new"), "--step", "3"], "bytes; its manifest says"),
        (["--run", str(run), "--out", str(tmp_path / "new"), "--max-shard-gib", "nan"], "give a size above 0"),
    ):
        assert main(flags) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_workload_without_onnx_says_so_before_anything_is_written(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", str(toy / "run"), "--out", str(tmp_path / "out"), "--onnx"]) == 2
    assert "--onnx: workload 'fluid': Trunkline gives no module trunkline.models.fluid.onnx" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_that_was_killed_is_made_again_by_the_same_command(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".draft").mkdir(parents=True)
    (out / ".draft/model.safetensors").write_bytes(b"half of it")
    assert main(["--run", str(toy / "run"), "--out", str(out)]) == 0
    check_digests(out)
    assert not (out / ".draft").exists()
