"""FSDP as a backend: the losses of a plain loop and of ZeRO, exact sums, few reductions, and all that is optional.

Configurations share processes, because starting one costs more than training a tiny model in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_distributed_test
from tests.engine.test_trainer import lines, losses, reference_losses
from tests.engine.tiny import Block, Net, TinyTask, tiny_config
from tests.models.fluid.toy_network import write_toy_store
from trunkline.engine.backends.fsdp import FSDPBackend
from trunkline.engine.checkpoint.weights import load_weights
from trunkline.engine.config.deepspeed_section import Fp16, batch_sizes
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim import nonfinite
from trunkline.engine.optim.loss_scaling import LossScaler
from trunkline.engine.ranks.distributed import Ranks, start
from trunkline.engine.task import Batch
from trunkline.engine.trainer import Trainer
from trunkline.launchers.train import main

ROOT = Path(__file__).parents[3]


def train(folder: Path, config: RunConfig, backend: str = "fsdp") -> Trainer:
    trainer = Trainer(TinyTask(config.data, config.model), config, start(), folder, backend=backend)
    trainer.run()
    return trainer


def configuration(folder: Path, stage: int = 3, micro: int = 4, steps: int = 8, **section: Any) -> RunConfig:
    """Ragged batches of 16 out of 40 samples, so that the last of an epoch is short. Few evaluations and saves."""
    training = {"steps": steps, "save_every": 1000, "eval_every": steps // 2} | section.pop("training", {})
    zero = {"stage": stage} | section.pop("zero_optimization", {})
    sizes = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": micro}
    data, model = section.pop("data", {}), section.pop("model", {})
    return tiny_config(
        folder, data=data, model=model, training=training, deepspeed={"zero_optimization": zero} | sizes | section
    )


def runs_on_a_rank(rank: int, world_size: int, folder: Path, runs: Mapping[str, tuple[str, Mapping[str, Any]]]) -> None:
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        for name, (backend, keys) in runs.items():
            train(folder / name, configuration(folder / f"{name}-{rank}", **keys), backend)


def assert_same(folder: Path, name: str, other: str, *keys: str, split: str = "train") -> None:
    for key in keys:
        mine, expected = ([row[key] for row in lines(folder / run, split)] for run in (name, other))
        assert mine == pytest.approx(expected, rel=1e-5), (name, key)


@pytest.mark.distributed
def test_fsdp_and_zero_give_the_losses_of_a_plain_loop_at_every_stage(tmp_path: Path) -> None:
    """Ten steps on ragged data, on one rank and on two, with 1, 2 and 4 micro-batches a step; clipping acts."""
    runs: dict[str, tuple[str, dict[str, Any]]] = {}
    for stage in range(4):
        keys = {"stage": stage, "steps": 10, "micro": (4, 8)[stage // 2]}
        runs[f"fsdp-{stage}"] = ("fsdp", keys)
        runs[f"zero-{stage}"] = ("deepspeed", keys)
    run_distributed_test(runs_on_a_rank, 2, tmp_path / "two", runs, backend=None)
    run_distributed_test(
        runs_on_a_rank, 1, tmp_path / "one",
        {f"fsdp-{stage}": ("fsdp", {"stage": stage, "steps": 10, "micro": (16, 4)[stage % 2]}) for stage in range(4)},
        backend=None,
    )  # fmt: skip
    expected = reference_losses(configuration(tmp_path, steps=10))
    for name in runs:
        assert losses(tmp_path / "two" / name) == pytest.approx(expected, rel=1e-5), name
        assert_same(tmp_path / "two", name, "zero-2", "grad_norm", "lr")
        assert_same(tmp_path / "two", name, "zero-2", "loss", split="val")
    for stage in range(4):
        assert losses(tmp_path / "one" / f"fsdp-{stage}") == pytest.approx(expected, rel=1e-5)
    assert max(row["grad_norm"] for row in lines(tmp_path / "two/fsdp-3")) > 1  # the limit


@pytest.mark.distributed
def test_options_leave_the_losses_alone(tmp_path: Path) -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}
    runs: dict[str, tuple[str, dict[str, Any]]] = {
        "checkpointing": ("fsdp", {"training": {"activation_checkpointing": True}}),
        "checkpointing-2": ("fsdp", {"stage": 2, "training": {"activation_checkpointing": True}}),
        "compile": ("fsdp", {"training": {"compile": "aot_eager"}}),
        "compile-zero": (
            "deepspeed",
            {
                "training": {"compile": "aot_eager"},
                "zero_optimization": {"stage3_param_persistence_threshold": 0},
            },
        ),
        "offload": ("fsdp", {"stage": 2, "zero_optimization": offload}),
        "offload-param": ("fsdp", {"zero_optimization": offload | {"offload_param": {"device": "cpu"}}}),
        "uneven": ("fsdp", {"model": {"hidden": 7}}),
        "uneven-zero": ("deepspeed", {"model": {"hidden": 7}, "stage": 2}),
    }
    run_distributed_test(runs_on_a_rank, 2, tmp_path, runs, backend=None)
    expected = reference_losses(configuration(tmp_path))
    for name in runs:
        if not name.startswith("uneven"):
            assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-5), name
    assert_same(tmp_path, "uneven", "uneven-zero", "loss", "grad_norm")


@pytest.mark.distributed
def test_copies_of_the_state_on_groups_of_ranks_give_the_same_losses(tmp_path: Path) -> None:
    """HSDP: four ranks as two copies on two ranks each."""
    runs = {
        f"hsdp-{stage}": ("fsdp", {"stage": stage, "micro": 2, "zero_optimization": {"zero_hpz_partition_size": 2}})
        for stage in (1, 2, 3)
    }
    run_distributed_test(runs_on_a_rank, 4, tmp_path, runs, backend=None)
    expected = reference_losses(configuration(tmp_path))
    for name in runs:
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-5), name


def make_backend(folder: Path, ranks: Ranks, model: nn.Module | None = None, **keys: Any) -> FSDPBackend:
    config = configuration(folder / str(ranks.rank), **keys)
    torch.manual_seed(0)
    model = model or TinyTask(config.data, config.model).build_model()
    return FSDPBackend(model, config, batch_sizes(config.deepspeed, ranks.world_size), ranks, 100)


class Linear(nn.Module):
    """Its gradient is the input. Seven rows, which no number of ranks divides; a part is frozen, another unused."""

    _no_split_modules = ("Inner",)

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.frozen = nn.Parameter(torch.ones(3, 2), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(5))
        self.outer = nn.Parameter(torch.ones(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.outer * x).sum() + self.inner(x) + self.frozen.sum()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum() * 2


def layouts(world_size: int) -> list[dict[str, Any]]:
    """Keys of every way of sharding over these ranks."""
    hybrid = [{"stage": stage, "zero_optimization": {"zero_hpz_partition_size": 2}} for stage in (1, 2, 3)]
    return [{"stage": stage} for stage in range(4)] + hybrid * (world_size == 4)


def sum_gradients(rank: int, world_size: int, folder: Path) -> list[dict[str, Tensor]]:
    """Whole gradients after two micro-batches of whole numbers, and the norm that the step reports for them."""
    ranks, found = start(), []
    for keys in layouts(world_size):
        backend = make_backend(folder, ranks, Linear(), micro=16 // world_size // 2, **keys)
        for micro_batch in range(2):
            backend.backward(backend.model(inputs(rank, micro_batch)), is_last=micro_batch == 1)
        gradients = {
            name: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
            for name, p in backend.model.named_parameters()
            if p.grad is not None
        }
        found.append(gradients | {"norm": torch.tensor(backend.step().grad_norm)})
        assert len(backend.optimizer.state) == 3, "the unused parameter is stepped too, with the gradient 0"
    return found


def inputs(rank: int, micro_batch: int) -> Tensor:
    return torch.arange(21.0).reshape(7, 3) + 100 * rank + 1000 * micro_batch


def hold_fragments(rank: int, world_size: int, folder: Path) -> list[tuple[list[Any], dict[str, Tensor]]]:
    """For each layout: what this rank would write, as (name, shape, first element, values), and the whole state."""
    ranks, found = start(), []
    for keys in layouts(world_size):
        torch.manual_seed(0)
        model = Linear()
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        backend = make_backend(folder, ranks, model, micro=1, **keys)
        with torch.no_grad():
            backend.model(inputs(0, 0))  # leaves gathered copies in some places
        written = []
        for fragment in backend.fragments():
            first, stop = fragment.share()
            values = fragment.owner.detach().reshape(-1)[fragment.offset + first : fragment.offset + stop]
            written.append((fragment.name, fragment.shape, fragment.start + first, values.clone()))
        found.append((written, dict(backend.full_state())))
    return found


class Collectives(TorchDispatchMode):
    """Counts what the ranks say to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count_collectives(rank: int, world_size: int, folder: Path) -> list[tuple[int, ...]]:
    """All-gathers, reduce-scatters and all-reduces of a step of four micro-batches."""
    ranks, found = start(), []
    for keys in layouts(world_size):
        backend = make_backend(folder, ranks, micro=16 // world_size // 4, **keys)
        with Collectives() as seen:
            for micro_batch in range(4):
                backend.backward(backend.model(torch.ones(2, 6)).sum(), is_last=micro_batch == 3)
            backend.step()
        kinds = ("_allgather_base_", "_reduce_scatter_base_", "allreduce_")
        assert set(seen.counts) <= set(kinds)
        found.append(tuple(seen.counts[kind] for kind in kinds))
    return found


class Examined(NamedTuple):
    """What a rank found, layout by layout."""

    gradients: list[dict[str, Tensor]]
    fragments: list[tuple[list[Any], dict[str, Tensor]]]
    collectives: list[tuple[int, ...]]


def examine(*arguments: Any) -> Examined:
    return Examined(sum_gradients(*arguments), hold_fragments(*arguments), count_collectives(*arguments))


@pytest.fixture(scope="module", params=[1, 2, 4])
def examined(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Examined]:
    return run_distributed_test(examine, request.param, tmp_path_factory.mktemp("examined"), backend=None)


@pytest.mark.distributed
def test_gradients_are_summed_not_averaged_over_ranks_and_micro_batches(examined: list[Examined]) -> None:
    """Whole numbers, which fp32 adds up exactly: with gloo, a reduce-scatter that averages would show at once."""
    world_size = len(examined)
    total = sum(inputs(rank, micro_batch) for rank in range(world_size) for micro_batch in range(2))
    norm = float(torch.linalg.vector_norm(torch.stack([total, 2 * total])))
    for rank in examined:
        assert len(rank.gradients) == len(layouts(world_size))
        for gradients in rank.gradients:
            assert torch.equal(gradients["outer"], total)
            assert torch.equal(gradients["inner.weight"], 2 * total)
            if world_size > 1:  # where gradients are reduced; `step` makes it on one rank
                assert torch.equal(gradients["unused"], torch.zeros(5))
            assert gradients["norm"].item() == pytest.approx(norm, rel=1e-6)


@pytest.mark.distributed
def test_the_fragments_of_all_ranks_hold_every_element_once(examined: list[Examined]) -> None:
    for number in range(len(layouts(len(examined)))):
        whole = examined[0].fragments[number][1]
        assert list(whole) == ["frozen", "unused", "outer", "inner.weight"]
        built = {name: torch.full([value.numel()], torch.nan) for name, value in whole.items()}
        for rank in examined:
            for name, shape, start_at, values in rank.fragments[number][0]:
                assert shape == tuple(whole[name].shape)
                place = built[name][start_at : start_at + len(values)]
                assert place.isnan().all()  # nobody else wrote it
                place.copy_(values)
        for name, value in whole.items():
            assert torch.equal(built[name].reshape(value.shape), value), (number, name)


@pytest.mark.distributed
def test_a_step_has_no_needless_collective(examined: list[Examined]) -> None:
    """The tiny net is three groups: two blocks, and the rest. One all-reduce is that of the norm."""
    if len(examined) == 1:
        assert examined[0].collectives == [(0, 0, 0)] * 4
        return
    assert examined[0].collectives[:4] == [
        (0, 0, 3),  # stage 0: each group's gradients once; the norm is known to all
        (3, 3, 1),  # stage 1: parameters once, gradients once
        (3, 12, 1),  # stage 2: gradients after each micro-batch, so that they need not be kept whole
        (20, 12, 1),  # stage 3: each block for each forward and backward, the rest for each forward
    ]
    if len(examined) == 4:  # between the copies, once a step at every stage
        assert examined[0].collectives[4:] == [(3, 3, 4), (3, 12, 4), (20, 12, 4)]


@pytest.mark.distributed
def test_bf16_trains_with_fp32_master_weights(tmp_path: Path) -> None:
    bf16 = {"bf16": {"enabled": True}, "steps": 20}
    runs = {f"bf16-{stage}": ("fsdp", {"stage": stage, **bf16}) for stage in (1, 3)}
    run_distributed_test(runs_on_a_rank, 2, tmp_path, runs, backend=None)
    config = configuration(tmp_path, steps=20)
    for name in runs:
        assert losses(tmp_path / name) == pytest.approx(reference_losses(config), rel=0.05), name
        model = Net(config.data.width, config.model)
        load_weights(model, tmp_path / name / "final")
        weight = model.enter.weight.detach()
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, weight.bfloat16().float())  # what is saved is the master copy
        assert model.offset == 0.125


class Sometimes(Net):
    """A layer and a block are never used, and a layer in some micro-batches of a rank, a block in every second."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        hidden = self.leave.in_features
        self.unused, self.sometimes, self.calls = nn.Linear(3, 3), nn.Linear(hidden, 1), 0
        self.unused_block, self.sometimes_block = Block(hidden, 0.0), Block(hidden, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        y, hidden = super().forward(x), self.enter(x.to(self.enter.weight.dtype))
        if x.sum() > 0:  # where the forward of a plan, on fake tensors, ends before it is counted
            y = y + self.sometimes(hidden).float()
        if self.training:  # the micro-batches of two ranks are, one after the other, those of one
            self.calls += dist.get_world_size() if dist.is_initialized() else 1
            if (self.calls + 1) // 2 % 2 == 0:
                y = y + self.leave(self.sometimes_block(hidden)).float()
        return y


class SometimesTask(TinyTask):
    def build_model(self) -> nn.Module:
        return Sometimes(self.data.width, self.model)


def sometimes_on_a_rank(rank: int, world_size: int, folder: Path) -> list[list[float]]:
    """Losses of stages 0 to 3, two micro-batches a step on each of two ranks."""
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        for stage in range(4):
            config = configuration(folder / f"{stage}-{rank}", stage=stage, bf16={"enabled": True})
            task = SometimesTask(config.data, config.model)
            Trainer(task, config, start(), folder / f"{stage}", backend="fsdp").run()
    return [losses(folder / f"{stage}") for stage in range(4)]


@pytest.mark.distributed
def test_in_16_bits_parameters_and_blocks_may_be_used_by_some_micro_batches_or_none_at_every_stage(
    tmp_path: Path,
) -> None:
    found = run_distributed_test(sometimes_on_a_rank, 2, tmp_path, backend=None)[0]
    config = configuration(tmp_path)
    Trainer(SometimesTask(config.data, config.model), config, start(), tmp_path / "fp32", backend="fsdp").run()
    for stage in range(4):
        assert found[stage] == pytest.approx(losses(tmp_path / "fp32"), rel=0.02), stage


def train_fp16(rank: int, world_size: int, folder: Path, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The loss scale at the end of each run."""
    scales = {}
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        for name, keys in runs.items():
            config = configuration(folder / f"{name}-{rank}", steps=20, **keys)
            scales[name] = train(folder / name, config).backend.loss_scale()
    return scales


@pytest.mark.distributed
def test_fp16_skips_what_overflows_and_trains_on(tmp_path: Path) -> None:
    """DeepSpeed has no fp16 on the CPU, but tests/engine/optim/test_loss_scaling.py compares the scalers."""
    fp16 = {"enabled": True, "initial_scale_power": 18, "hysteresis": 2, "loss_scale_window": 8}
    runs: dict[str, Any] = {f"fp16-{stage}": {"stage": stage, "fp16": fp16} for stage in (1, 3)}
    runs["static"] = {"fp16": {"enabled": True, "loss_scale": 128, "auto_cast": True}}
    scales = run_distributed_test(train_fp16, 2, tmp_path, runs, backend=None)[0]
    assert losses(tmp_path / "static") == pytest.approx(reference_losses(configuration(tmp_path, steps=20)), rel=0.02)
    assert scales["static"] == 128
    for stage in (1, 3):
        folder = tmp_path / f"fp16-{stage}"
        skipped = [row["step"] for row in lines(folder, "skipped")]
        assert skipped[:3] == [1, 2, 3]
        assert len(skipped) < 10
        assert losses(folder) == pytest.approx(losses(tmp_path / "fp16-1"), rel=0.02)
        assert losses(folder)[-1] < losses(folder)[0] / 2
        replayed = LossScaler.of(Fp16(**fp16))
        for step in range(1, 21):
            replayed.update(step in skipped)
        assert scales[f"fp16-{stage}"] == replayed.scale


class Kink(Net):
    """Where an input is zero its output is finite, but the gradient of one bias is not: the square root at zero."""

    def forward(self, x: Tensor) -> Tensor:
        kink = (self.enter.bias - self.enter.bias.detach()).square().sum()
        return super().forward(x) + (kink.sqrt() if (x == 0).any() else kink)


class SumOfOutputs(TinyTask):
    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": model(batch["x"]).sum()}


def skip_a_step(rank: int, world_size: int, folder: Path) -> list[tuple[str, str]]:
    """Rank 1 alone has a gradient that is not finite, then rank 0 a loss. Returns where they are said to be."""
    ranks, found = start(), []
    for stage in range(4):
        config = configuration(folder / str(rank), stage=stage)
        task = SumOfOutputs(config.data, config.model)
        backend = make_backend(folder, ranks, Kink(6, config.model), stage=stage, micro=8)
        before = dict(backend.full_state())
        good, kink, broken = torch.ones(2, 6), torch.zeros(2, 6), torch.full((2, 6), torch.nan)
        rate = backend.learning_rate()
        backend.backward(backend.model(kink if rank == 1 else good).sum())
        assert backend.step().skipped
        assert all(torch.equal(before[name], value) for name, value in backend.full_state())
        assert all(parameter.grad is None for parameter in backend.model.parameters())
        assert backend.learning_rate() == rate

        with backend.gathered() as model:
            gradient = nonfinite.locate(task, model, [{"x": good}, {"x": kink if rank == 1 else good}], ranks)
        with backend.gathered() as model:
            loss = nonfinite.locate(task, model, [{"x": broken if rank == 0 else good}, {"x": good}], ranks)
        found.append((gradient, loss))

        assert all(isinstance(parameter, DTensor) for parameter in backend.model.parameters())
        backend.backward(backend.model(good).sum())
        assert not backend.step().skipped
        assert backend.learning_rate() > rate
        assert not any(torch.equal(before[name], value) for name, value in backend.full_state() if "blocks" in name)
    return found


@pytest.mark.distributed
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all_and_located(tmp_path: Path) -> None:
    told = ("rank 1: gradient of enter.bias in micro-batch 1", "rank 0: loss nan in micro-batch 0")
    assert run_distributed_test(skip_a_step, 2, tmp_path, backend=None) == [[told] * 4] * 2


@pytest.mark.parametrize("stage", [2, 3])
def test_an_evaluation_sees_the_weights_of_the_last_step(tmp_path: Path, stage: int) -> None:
    """What an evaluation gathers and leaves gathered must not outlive the next update."""
    config = configuration(tmp_path, stage=stage, micro=8, training={"eval_every": 1})
    trainer = train(tmp_path / "run", config)
    val = [row["loss"] for row in lines(tmp_path / "run", "val")]
    assert len(set(val[:-1])) == 7  # of 8: the last step has the rate 0
    model = Net(config.data.width, config.model)
    load_weights(model, tmp_path / "run/final")
    task = trainer.task
    batch = task.collate([task.dataset("val")[i] for i in range(11)]) | {"valid": torch.ones(11, dtype=torch.bool)}
    with torch.no_grad():
        assert task.summarize(task.evaluate(model.eval(), batch))["loss"] == pytest.approx(val[-1], rel=1e-5)
    assert losses(tmp_path / "run") == pytest.approx(reference_losses(config), rel=1e-5)


def test_the_shards_of_a_model_that_was_built_in_bf16_are_fp32(tmp_path: Path) -> None:
    backend = make_backend(tmp_path, start(), Linear().bfloat16())
    backend.backward(backend.model(inputs(0, 0)))
    assert not backend.step().skipped
    assert {value.dtype for _, value in backend.full_state()} == {torch.float32}


class Scalar(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))


class Transposed(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.ones(3, 4).T)


class Tied(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.other = Inner()
        self.other.weight = self.inner.weight


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Scalar, "temperature is a scalar: give it"),
        (Transposed, "turned are not contiguous"),
        (Tied, "inner.weight belo"),
    ],
)
def test_a_parameter_that_cannot_be_sharded_is_named(tmp_path: Path, model: type[nn.Module], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_backend(tmp_path, start(), model())


def refuse_an_older_torch(rank: int, world_size: int, folder: Path) -> str:
    del FSDPModule.set_reduce_scatter_unused_params
    with pytest.raises(ConfigError) as refused:
        make_backend(folder, start())
    return str(refused.value)


@pytest.mark.distributed
def test_before_torch_2_13_several_ranks_are_refused(tmp_path: Path) -> None:
    for message in run_distributed_test(refuse_an_older_torch, 2, tmp_path, backend=None):
        assert message.startswith(f"torch {torch.__version__}: several ranks of FSDP need torch 2.13 or newer")


def test_before_torch_2_13_one_rank_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params")
    trainer = train(tmp_path, configuration(tmp_path, steps=2))
    assert trainer.progress.step == 2


def run_without_deepspeed(folder: Path, *command: str) -> str:
    """Standard output of a launcher where `import deepspeed` fails."""
    hidden = folder / "hidden/deepspeed"
    hidden.mkdir(parents=True, exist_ok=True)
    (hidden / "__init__.py").write_text("raise ImportError('hidden by a test')")
    environment = os.environ | {"PYTHONPATH": f"{hidden.parent}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_torchrun_trains_two_ranks_where_deepspeed_is_not_installed(tmp_path: Path) -> None:
    write_toy_store(tmp_path / "store")
    config = json.loads((ROOT / "configs/fluid/nano.json").read_text())
    config["data"] |= {"store": str(tmp_path / "store"), "history": 2}
    config["training"] |= {"steps": 3, "eval_every": 3, "save_every": 3, "log_every": 1, "eval_samples": 8}
    config["training"] |= {"num_workers": 0, "trackers": []}
    config["training"].pop("epochs")
    config["deepspeed"] |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": False}}
    config["deepspeed"]["zero_optimization"] = {"stage": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["launchers/train.py", "--config", str(tmp_path / "config.json"), "--output-dir"]

    said = run_without_deepspeed(
        tmp_path, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
        str(29500 + os.getpid() % 1000), *flags, str(tmp_path / "two"),
    )  # fmt: skip
    told = "--backend auto: training with fsdp, because deepspeed cannot be imported (hidden by a test)"
    assert said.count(told) == 1
    assert main([*flags[1:], str(tmp_path / "one"), "--backend", "fsdp"]) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert (tmp_path / "two/final/model.safetensors").exists()
