"""One rank. In fp32 every ZeRO stage and FSDP leave the model as it is, and train it as a plain loop does.

In 16 bits FSDP narrows it without fully_shard, whose numbers and checkpoints it gives to the last bit.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile, record_function

from tests.distributed import run_distributed_test
from tests.engine.conftest import shares_nothing
from tests.engine.test_trainer import lines, losses, reference_losses
from tests.engine.tiny import Net, TinyTask, tiny_config
from trunkline.engine.backends.fsdp import FSDPBackend
from trunkline.engine.config import deepspeed_section
from trunkline.engine.config.deepspeed_section import batch_sizes
from trunkline.engine.config.fsdp_section import needs_no_shards
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.ranks.distributed import Ranks, start
from trunkline.engine.trainer import Trainer


@pytest.mark.parametrize(("backend", "stage"), [*(("deepspeed", stage) for stage in range(4)), ("fsdp", 3)])
def test_nothing_is_sharded_and_the_losses_are_a_plain_loop_s(
    backend: str, stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed_section, "shares_nothing", shares_nothing)
    config = tiny_config(tmp_path, training={"steps": 8}, deepspeed={"zero_optimization": {"stage": stage}})
    task = TinyTask(config.data, config.model)
    trainer = Trainer(task, config, start(), tmp_path / "run", backend=backend)
    if backend == "deepspeed":
        assert trainer.backend.engine.zero_optimization_stage() == 0  # type: ignore[attr-defined]
    else:
        assert type(trainer.backend.module) is type(task.build_model())  # fully_shard changes a module's class
    trainer.run()
    assert losses(tmp_path / "run") == pytest.approx(reference_losses(config), rel=1e-5)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"wall_clock_breakdown": True}, "fwd_microstep: "),
        ({"memory_breakdown": True}, "Engine before forward"),
        ({"steps_per_print": 1}, "RunningAvgSamplesPerSec="),
        ({"flops_profiler": {"enabled": True, "profile_step": 2}}, "(enter): Linear("),
        ({"dump_state": True}, "lr_scheduler ..."),
        ({}, ""),
    ],
)
def test_deepspeed_reports_what_it_is_asked_to_and_the_losses_stay(
    section: dict, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deepspeed_section, "shares_nothing", shares_nothing)
    log = io.StringIO()
    for handler in logging.getLogger("DeepSpeed").handlers:
        monkeypatch.setattr(handler, "stream", log)
    config = tiny_config(tmp_path, training={"steps": 8}, deepspeed=section)
    trainer = Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / "run")
    assert (trainer.backend.model is trainer.backend.module) == (section.keys() <= {"dump_state"})
    trainer.run()
    assert said in log.getvalue() + capfd.readouterr().out
    assert ("[INFO]" in log.getvalue()) == bool(section.keys() & {"steps_per_print", "flops_profiler", "dump_state"})
    assert losses(tmp_path / "run") == pytest.approx(reference_losses(config), rel=1e-5)


@pytest.mark.parametrize(
    ("section", "world_size", "nothing"),
    [
        ({}, 1, True),
        ({}, 2, False),
        ({"bf16": {"enabled": True}}, 1, False),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, 1, False),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, 1, False),
    ],
)
def test_what_shares_nothing(section: dict, world_size: int, nothing: bool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, deepspeed=section)
    assert shares_nothing(config.deepspeed, world_size) == nothing


BF16: dict[str, Any] = {"bf16": {"enabled": True}}
FP16: dict[str, Any] = {"fp16": {"enabled": True, "initial_scale_power": 18, "hysteresis": 2, "loss_scale_window": 3}}


@pytest.mark.parametrize(
    ("section", "world_size", "none"),
    [
        ({"zero_optimization": {"stage": 3}}, 1, True),
        (BF16, 1, True),
        (BF16 | {"zero_optimization": {"stage": 2}}, 1, True),
        (FP16, 1, True),
        (BF16, 2, False),
        (BF16 | {"zero_optimization": {"stage": 3}}, 1, False),
        ({"fp16": {"enabled": True, "auto_cast": True}}, 1, False),
        (BF16 | {"communication_data_type": "bf16"}, 1, False),
        (BF16 | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, 1, False),
    ],
)
def test_what_needs_no_shards(
    section: dict, world_size: int, none: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed_section, "shares_nothing", shares_nothing)
    assert needs_no_shards(tiny_config(tmp_path, deepspeed=section).deepspeed, world_size) == none


class Tied(Net):
    """One weight serves two layers."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.again = nn.Linear(*reversed(self.enter.weight.shape))
        self.again.weight = self.enter.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.sin(x)) + self.again(x.to(self.again.weight.dtype)).float().mean(-1, keepdim=True)


class TiedTask(TinyTask):
    def build_model(self) -> nn.Module:
        return Tied(self.data.width, self.model)


def configuration(
    folder: Path, section: dict[str, Any], training: dict[str, Any] | None = None, stage: int = 1, **data: Any
) -> RunConfig:
    """Two micro-batches a step, clipping that acts."""
    zero = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "gradient_clipping": 0.5}
    return tiny_config(folder, data=data, training=training or {}, deepspeed=zero | section)


def train(folder: Path, config: RunConfig, alone: bool, backend: str = "fsdp", resume: str = "none") -> Trainer:
    """A run whose model is sharded, or left `alone` where that is possible."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_section, "shares_nothing", shares_nothing if alone else lambda *_: False)
        trainer = Trainer(TiedTask(config.data, config.model), config, start(), folder, backend=backend, resume=resume)
    assert isinstance(trainer.backend.module, FSDPModule) is (backend == "fsdp" and not alone)
    trainer.run()
    return trainer


def assert_same_tensors(one: Path, other: Path) -> None:
    found, wanted = load_file(one), load_file(other)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


@pytest.mark.parametrize(
    "options",
    [
        {"section": BF16},
        {"section": BF16, "stage": 2},
        {"section": BF16 | {"train_micro_batch_size_per_gpu": 8}},
        {"section": FP16},
        {"section": BF16, "training": {"activation_checkpointing": True}},
        {"section": BF16, "training": {"compile": "aot_eager"}},
        {"section": BF16, "training": {"parameters": [{"names": ["blocks.0.*", "leave.bias"], "frozen": True}]}},
        {"section": BF16, "training": {"ema": {"decay": 0.9}}},
        {"section": BF16, "poison": (3,)},
    ],
    ids=["accumulated", "stage 2", "one micro-batch", "fp16", "checkpointing", "compile", "frozen", "ema", "skipped"],
)
def test_in_16_bits_the_numbers_and_the_checkpoints_are_fully_shard_s(tmp_path: Path, options: dict[str, Any]) -> None:
    config = configuration(tmp_path, **options)
    for name in ("alone", "sharded"):
        train(tmp_path / name, config, name == "alone")
    for split in ("train", "val", "skipped"):
        found, wanted = ([_numbers(row) for row in lines(tmp_path / name, split)] for name in ("alone", "sharded"))
        assert found == wanted, split
    assert bool(wanted) == ("poison" in options or "fp16" in options["section"])  # steps that were skipped
    if not wanted:
        assert max(row["grad_norm"] for row in lines(tmp_path / "alone")) > 0.5  # the limit
    files = sorted(path.relative_to(tmp_path / "sharded") for path in (tmp_path / "sharded").rglob("*.safetensors"))
    assert len(files) > 3  # checkpoints and final/, where there is one also best/
    for file in files:
        assert_same_tensors(tmp_path / "alone" / file, tmp_path / "sharded" / file)


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("step", "loss", "grad_norm", "lr", "absolute", "skipped_steps") if key in row}


@pytest.mark.parametrize("first", [True, False], ids=["alone first", "sharded first"])
def test_a_checkpoint_of_either_goes_on_as_the_other_to_the_last_bit(tmp_path: Path, first: bool) -> None:
    config = configuration(tmp_path, BF16)
    train(tmp_path / "whole", config, first)
    saved = tmp_path / "whole/checkpoints/step-00000004"
    train(tmp_path / "on", config, not first, resume=str(saved))
    assert losses(tmp_path / "on") == losses(tmp_path / "whole")[4:]
    assert_same_tensors(tmp_path / "on/final/model.safetensors", tmp_path / "whole/final/model.safetensors")


@pytest.mark.parametrize("section", [BF16, FP16])
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_gathers_no_gradients_unless_told_and_the_numbers_are_the_same(
    tmp_path: Path, stage: int, section: dict[str, Any]
) -> None:
    options = {
        "told": {"stage": stage, "contiguous_gradients": True},
        "left": {"stage": stage, "contiguous_gradients": "auto"},
    }
    for name, zero in options.items():
        config = configuration(tmp_path, section | {"zero_optimization": zero})
        trainer = train(tmp_path / name, config, alone=True, backend="deepspeed")
        gathers = name == "told"
        assert trainer.backend.engine.optimizer.contiguous_gradients == gathers  # type: ignore[attr-defined]
        assert trainer.assembly.plan["config"]["deepspeed"]["zero_optimization"]["contiguous_gradients"] == gathers
    assert [_numbers(row) for row in lines(tmp_path / "left")] == [_numbers(row) for row in lines(tmp_path / "told")]
    train(tmp_path / "on", config, True, "deepspeed", resume=str(tmp_path / "told/checkpoints/step-00000004"))
    assert losses(tmp_path / "on") == losses(tmp_path / "told")[4:]
    for name in ("left", "on"):
        assert_same_tensors(tmp_path / name / "final/model.safetensors", tmp_path / "told/final/model.safetensors")


def go_on(rank: int, world_size: int, folder: Path, source: str, names: Sequence[tuple[str, str]]) -> None:
    """Go on from the first checkpoint of `source`: as many runs as there are names, each on a backend."""
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
        for name, backend in names:
            config = configuration(folder / f"{name}-{rank}", BF16 | {"train_micro_batch_size_per_gpu": 2})
            saved = sorted((folder / source / "checkpoints").glob("step-*"))[0]
            train(folder / name, config, alone=world_size == 1, backend=backend, resume=str(saved))


@pytest.mark.distributed
def test_a_checkpoint_goes_on_on_two_ranks_on_deepspeed_and_back(tmp_path: Path) -> None:
    """Two ranks round other sums to bf16 than one."""
    expected = losses(train(tmp_path / "whole", configuration(tmp_path, BF16), alone=True).folder)
    run_distributed_test(go_on, 2, tmp_path, "whole", [("two", "fsdp"), ("zero two", "deepspeed")], backend=None)
    run_distributed_test(go_on, 1, tmp_path, "whole", [("zero", "deepspeed")], backend=None)
    for name in ("two", "zero two", "zero"):
        assert losses(tmp_path / name) == pytest.approx(expected[4:], rel=0.02), name
        run_distributed_test(go_on, 1, tmp_path, name, [(f"{name} back", "fsdp")], backend=None)
        assert losses(tmp_path / f"{name} back") == pytest.approx(expected[8:], rel=0.02), name


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_peak_of_memory_is_no_higher_than_fully_shard_s(tmp_path: Path, micro_batches: int) -> None:
    """Hardly any activations, so that it is made of parameters, gradients and what the optimizer keeps."""
    section = BF16 | {"train_batch_size": micro_batches, "train_micro_batch_size_per_gpu": 1}
    config = tiny_config(tmp_path, model={"hidden": 256, "layers": 4}, deepspeed=section)
    peaks = {}
    for alone in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deepspeed_section, "shares_nothing", shares_nothing if alone else lambda *_: False)
            model = TinyTask(config.data, config.model).build_model()
            backend = FSDPBackend(model, config, batch_sizes(config.deepspeed, 1), start(), 100)
        size = sum(parameter.numel() for parameter in model.parameters())
        peaks[alone] = 12 + _peak(backend, micro_batches) / size  # masters and AdamW's two moments
    assert 16 <= peaks[True] <= peaks[False]  # with wide gradients


def _peak(backend: FSDPBackend, micro_batches: int) -> int:
    """The most bytes that a step holds, without masters and the optimizer's state. What is freed is only seen where it
    was made in sight, so it is the second of two steps that counts."""

    def step() -> None:
        for number in range(1, micro_batches + 1):
            backend.backward(backend.model(torch.ones(1, 6)).sum(), number == micro_batches)
        backend.step()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
        with record_function("second"):
            step()
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    (begin,) = (event.start_ns() for event in events if event.name() == "second")
    held, peak = 0, 0
    for at, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += change
        peak = max(peak, held) if at > begin else 0
    return peak


def test_a_step_that_fails_leaves_the_model_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_section, "shares_nothing", shares_nothing)
    config = configuration(tmp_path, BF16)
    model = TinyTask(config.data, config.model).build_model()
    backend = FSDPBackend(model, config, batch_sizes(config.deepspeed, 1), start(), 100)
    before = backend.model(torch.ones(1, 6)).detach()
    backend.backward(backend.model(torch.ones(1, 6)).sum(), True)

    def fails() -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(backend.optimizer, "step", fails)
    with pytest.raises(RuntimeError, match="no room"):
        backend.step()
    assert torch.equal(backend.model(torch.ones(1, 6)), before)


@pytest.mark.parametrize("section", [{}, BF16], ids=["fp32", "bf16"])
def test_a_model_that_is_left_alone_is_on_the_ranks_device(
    section: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is "meta", which a machine without a GPU has too."""
    monkeypatch.setattr(deepspeed_section, "shares_nothing", shares_nothing)
    start()
    config = configuration(tmp_path, section)
    sizes, ranks = batch_sizes(config.deepspeed, 1), Ranks(0, 1, 0, torch.device("meta"))
    model = FSDPBackend(TinyTask(config.data, config.model).build_model(), config, sizes, ranks, 100).module
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
