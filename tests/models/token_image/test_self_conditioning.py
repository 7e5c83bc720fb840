"""The network's own estimate as an input; and what else could change it: layouts, recomputation, compilation, EMA."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.distributed import run_distributed_test
from tests.models.token_image.runs import losses, run_config
from tests.models.token_image.test_loss import made
from trunkline.engine.backends.model_options import apply_options
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.randomness import seed_torch, uniform
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.models.registry import make_task
from trunkline.models.token_image.noise import drawn_coins

LEARNABLE = {
    "patch": [1, 4], "block": "official", "stem": 3, "condition": False, "prior": "unigram", "loss": "cross_entropy"
}  # fmt: skip


class Recorded(nn.Module):
    """A network, and what it was called with."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, list[tuple[bool, Tensor | None, Tensor]]()

    def forward(self, *given: Tensor, previous: Tensor | None = None) -> Tensor:
        output: Tensor = self.network(*given, previous=previous)
        self.calls.append((torch.is_grad_enabled(), previous, output))
        return output

    def clean(self, output: Tensor) -> Tensor:
        found: Tensor = self.network.clean(output)  # type: ignore[operator]
        return found


def test_a_coin_is_fair_and_independent_of_the_time() -> None:
    keys = torch.arange(100_000)
    coins = drawn_coins(keys).double()
    assert float(coins.mean()) == pytest.approx(0.5, abs=0.01)
    assert abs(float(torch.corrcoef(torch.stack([coins, uniform(keys, ()).double()]))[0, 1])) < 0.01


@pytest.mark.parametrize(
    "model", [{"loss": "x"}, {"loss": "cross_entropy"}, LEARNABLE], ids=["x", "logits", "learnable"]
)
def test_half_of_the_samples_see_an_estimate_made_without_gradient(texts: Path, model: dict[str, Any]) -> None:
    task, batch = made(texts, self_conditioning=True, **model)
    batch["draw"] = torch.arange(20)[drawn_coins(torch.arange(20)).argsort(stable=True)][8:12]
    sees = drawn_coins(batch["draw"])
    assert sees.any()
    assert not sees.all()
    torch.manual_seed(0)
    network = Recorded(task.build_model())
    torch.nn.init.normal_(network.network.jit.output.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    loss = task.loss(network, batch)["loss"]
    (first_learns, nothing, first), (second_learns, seen, second) = network.calls
    assert (first_learns, second_learns, nothing) == (False, True, None)
    assert seen is not None
    assert not first.requires_grad
    torch.testing.assert_close(seen, task_estimate(task, first) * sees[:, None, None, None])
    assert (seen[sees] != 0).any()
    torch.testing.assert_close(second[~sees], first[~sees])
    assert not torch.allclose(second[sees], first[sees])
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def task_estimate(task: Any, output: Tensor) -> Tensor:
    """The image itself, or the mean of the tokens' codes."""
    if task.model.loss == "x":
        return output
    codes = torch.stack([task.encoding.encode(torch.tensor(token)) for token in range(256)])
    return torch.einsum("bijv,vc->bijc", output.softmax(-1), codes)


def test_without_an_estimate_black_is_seen_and_padding_always_is(texts: Path) -> None:
    task, batch = made(texts, self_conditioning=True)
    network = task.build_model()
    clean, held = task.images(batch)
    t = torch.full((4,), 100)
    without = network(clean, t, held)
    assert torch.equal(network(clean, t, held, previous=torch.zeros_like(clean)), without)
    assert torch.equal(
        network(clean, t, held, previous=torch.where(held[..., None], 0.0, torch.randn(clean.shape))), without
    )
    assert not torch.equal(network(clean, t, held, previous=clean), without)


@pytest.mark.parametrize(
    ("block", "option"),
    [
        ("shared_norm", {"activation_checkpointing": True}),
        ("official", {"activation_checkpointing": True}),
        pytest.param("official", {"compile": "eager"}, marks=pytest.mark.slow),
    ],
    ids=["recomputed", "official-recomputed", "official-compiled"],
)
def test_recomputed_and_compiled_it_is_the_same(texts: Path, block: str, option: dict[str, Any]) -> None:
    settings = run_config(texts.parent, texts, training=option).training
    found = []
    for applied in (False, True):
        task, batch = made(texts, block=block, self_conditioning=True)
        torch.manual_seed(0)
        network = task.build_model()
        if applied:
            apply_options(network, settings)
        loss = task.loss(network, batch)["loss"]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other)


Case = tuple[RunConfig, Path, str]


def train(rank: int, world_size: int, cases: list[Case]) -> None:
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        for config, folder, backend in cases:
            Trainer(make_task(config), config, start(), folder, backend=backend).run()


def cases_of(folder: Path, store: Path, layouts: list[tuple[str, int]], micro: int, **sections: Any) -> list[Case]:
    """One run of three steps a layout, with ragged texts and short batches."""
    sections = {"training": {"steps": 3, "eval_every": 3, "save_every": 3}} | sections
    return [
        (
            run_config(
                folder / f"{backend}-{stage}", store,
                deepspeed={"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": micro}, **sections,
            ),
            folder / f"{backend}-{stage}/run", backend,
        )
        for backend, stage in layouts
    ]  # fmt: skip


ALL = [*(("deepspeed", stage) for stage in range(4)), ("fsdp", 2), ("fsdp", 3)]
SOME = [("fsdp", 3)]


@pytest.mark.distributed
@pytest.mark.parametrize("layouts", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "every"])
def test_two_ranks_train_as_one_with_self_conditioning(
    texts: Path, tmp_path: Path, layouts: list[tuple[str, int]]
) -> None:
    """Texts are ragged, so ranks hold different numbers of pixels: a ratio on each rank would show."""
    model = {"self_conditioning": True, "block": "official"}
    [whole] = cases_of(tmp_path / "whole", texts, [("deepspeed", 0)], 4, model=model)
    train(0, 1, [whole])
    cases = cases_of(tmp_path, texts, layouts, 1, model=model)
    run_distributed_test(train, 2, cases, backend=None, timeout_s=300)
    expected = load_file(whole[1] / "final/model.safetensors")
    for _, folder, _ in cases:
        assert losses(folder) == pytest.approx(losses(whole[1]), rel=1e-5), folder
        for name, value in load_file(folder / "final/model.safetensors").items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5, msg=f"{folder}: {name}")


def test_in_bf16_it_is_nearly_as_in_fp32(texts: Path, tmp_path: Path) -> None:
    """Whether a backend narrows the weights or autocast the products; FSDP wants one dtype of all gradients."""
    found = []
    for backend, narrow in (
        ("deepspeed", {}), ("deepspeed", {"bf16": {"enabled": True}}), ("fsdp", {"bf16": {"enabled": True}}),
        ("deepspeed", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    ):  # fmt: skip
        folder = tmp_path / f"{backend} {[*narrow]}"
        steps = {"steps": 2, "eval_every": 2, "save_every": 2}
        train(0, 1, [(run_config(folder, texts, training=steps, deepspeed=narrow), folder / "run", backend)])
        found.append(losses(folder / "run"))
    assert found[1] != found[0]
    for narrow_losses in found[1:]:
        assert narrow_losses == pytest.approx(found[0], rel=1e-2)


def test_what_is_kept_is_the_average_of_the_weights(texts: Path, tmp_path: Path) -> None:
    """training.ema: after each step the average comes a quarter of the way to the weights."""
    kept = {}
    for steps, ema in ((1, None), (2, None), (2, {"decay": 0.75, "warmup": False})):
        config = run_config(
            tmp_path, texts, training={"steps": steps, "eval_every": steps, "save_every": steps, "ema": ema},
            deepspeed={"scheduler": {"type": "Constant", "params": {"warmup": 0}}},
        )  # fmt: skip
        folder = tmp_path / f"{steps} {ema is None}"
        train(0, 1, [(config, folder, "deepspeed")])
        kept[steps, ema is None] = load_file(folder / "final/model.safetensors")
    seed_torch(config.training.seed, 0)
    for name, first in make_task(config).build_model().state_dict().items():
        average = first
        for step in (1, 2):
            average = 0.75 * average + 0.25 * kept[step, True][name]
        torch.testing.assert_close(kept[2, False][name], average, rtol=1e-5, atol=1e-7, msg=name)
    assert not torch.equal(kept[2, False]["jit.output.weight"], kept[2, True]["jit.output.weight"])
