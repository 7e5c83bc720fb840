"""Fifty steps against a plain network and a plain loop, which are written from the recipe and not from our code."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tests.models.token_image.conftest import write_store
from tests.models.token_image.runs import losses, run_config
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.data.randomness import normal, seed_torch, uniform
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.models.registry import make_task

SIZE, PATCH, HEADS, LAYERS, SLOTS = 32, 4, 2, 2, 256
STEPS, WARMUP, RATE = 50, 5, 1e-3
EOS = 0


def texts_of_all_lengths() -> list[tuple[bytes, bytes]]:
    """Texts with their prompts: of one token, of a patch's row, of half an image, of a whole one, and above it."""
    chosen = random.Random(0)
    lengths = [
        (0, 0),
        (1, 5),
        (3, 40),
        (127, 0),
        (128, 200),
        (512, 7),
        (1000, 700),
        (1023, 0),
        (1024, 64),
        (1500, 1200),
    ]
    return [tuple(bytes(chosen.randrange(1, 256) for _ in range(n)) for n in pair) for pair in lengths]  # type: ignore[misc]


def picture(text: bytes) -> tuple[Tensor, Tensor]:
    """[S, S, 3] and [S, S]: a token a pixel, id in base 256 over 255; EOS where there is room, or as the last."""
    ids = [*text, EOS][: SIZE**2] if len(text) <= SIZE**2 else [*text[: SIZE**2 - 1], EOS]
    image, mask = torch.zeros(SIZE, SIZE, 3), torch.zeros(SIZE, SIZE)
    for place, token in enumerate(ids):
        digits = [token % 256, token // 256 % 256, token // 65536]
        image[place // SIZE, place % SIZE] = torch.tensor(digits) / 255
        mask[place // SIZE, place % SIZE] = 1
    return image, mask


NOTHING = torch.zeros(SIZE, SIZE, 3), torch.zeros(SIZE, SIZE)
"""The picture of a prompt that is not there."""


def embedded(image: Tensor, weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, patches, d]: the patch embedding as a convolution, and learned rows and columns."""
    kernel = weight.view(len(weight), PATCH, PATCH, 3).permute(0, 3, 1, 2)
    grid = F.conv2d(image.permute(0, 3, 1, 2), kernel, stride=PATCH)
    edge = grid.shape[-1]
    return (grid + rows[:edge].T[:, :, None] + columns[:edge].T[:, None]).flatten(2).mT


def shown(mask: Tensor) -> Tensor:
    """[B, patches]: 1 where any pixel is valid."""
    return F.max_pool2d(mask[:, None], PATCH).flatten(1)


def predicted(
    w: dict[str, Tensor], noisy: Tensor, t: Tensor, mask: Tensor, prompt: Tensor, prompt_mask: Tensor
) -> Tensor:
    """The network: [B, S, S, 3]."""
    target = embedded(noisy, w["patches.weight"], w["rows"], w["columns"])
    before = embedded(prompt, w["condition_patches.weight"], w["condition_rows"], w["condition_columns"])
    before = before * shown(prompt_mask)[..., None]
    (batch, _, d), free = target.shape, SLOTS - before.shape[1]
    x = torch.cat([before, torch.zeros(batch, free, d), target], 1)
    visible = torch.cat([shown(prompt_mask), torch.zeros(batch, free), shown(mask)], 1) > 0
    rates = torch.tensor([10000 ** (-i / (d / 2 - 1)) for i in range(d // 2)])
    c = F.silu(torch.cat([torch.sin(t[:, None] * rates), torch.cos(t[:, None] * rates)], 1))
    for layer in range(LAYERS):
        b = {name.removeprefix(f"blocks.{layer}."): v for name, v in w.items() if name.startswith(f"blocks.{layer}.")}
        modulation = c @ b["norm.modulation.weight"].T + b["norm.modulation.bias"]
        scale, shift = modulation[:, None, :d], modulation[:, None, d:]

        def norm(x: Tensor, b: dict[str, Tensor] = b, scale: Tensor = scale, shift: Tensor = shift) -> Tensor:
            rms = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * b["norm.norm.weight"]
            return rms * torch.clamp(1 + scale, 0.1, 10) + shift

        q, k, v = (norm(x) @ b["qkv.weight"].T).view(batch, -1, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / math.sqrt(d / HEADS)).masked_fill(~visible[:, None, None], -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        x = x + mixed @ b["projection.weight"].T + b["projection.bias"]
        gate, up = (norm(x) @ b["up.weight"].T + b["up.bias"]).split(4 * d, -1)
        x = x + (F.silu(gate) * up) @ b["down.weight"].T + b["down.bias"]
    flat = x[:, SLOTS:] @ w["output.weight"].T + w["output.bias"]
    edge = SIZE // PATCH
    return flat.view(batch, edge, edge, PATCH, PATCH, 3).permute(0, 1, 3, 2, 4, 5).reshape(batch, SIZE, SIZE, 3)


def plain_loop(weights: dict[str, Tensor], texts: list[tuple[bytes, bytes]], size: int, seed: int) -> list[float]:
    """Trains the weights in place. Returns the losses."""
    pictures = [(picture(text), picture(prompt) if prompt else NOTHING) for text, prompt in texts]
    order, recorded = GlobalBatches(len(texts), size, seed), []
    optimizer = torch.optim.AdamW(list(weights.values()), lr=RATE, betas=(0.9, 0.999), weight_decay=0.01)
    for step in range(STEPS):
        samples, keys = order.draws(step)
        chosen = [pictures[sample] for sample in samples[samples != FILLER]]
        draw = torch.from_numpy(keys[samples != FILLER])
        (clean, mask), (prompt, prompt_mask) = (map(torch.stack, zip(*side)) for side in zip(*chosen))
        t = torch.floor(uniform(draw, (), stream=0) * 1000)
        alpha = (1 - t / 1000)[:, None, None, None]
        noisy = alpha * clean + (1 - alpha) * normal(draw, (SIZE, SIZE, 3), stream=1)
        error = (predicted(weights, noisy, t, mask, prompt, prompt_mask) - clean).pow(2).sum(-1)
        loss = (mask * error).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        done = (step - WARMUP) / (STEPS - WARMUP)
        optimizer.param_groups[0]["lr"] = RATE * (step / WARMUP if done < 0 else (1 + math.cos(math.pi * done)) / 2)
        optimizer.step()
        recorded.append(loss.item())
    return recorded


def test_fifty_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    """With accumulation, a short batch an epoch, clipping, warm-up and cosine, prompts and texts without one."""
    texts = texts_of_all_lengths()
    store = write_store(tmp_path / "store", "dialogues", texts).root
    config = run_config(
        tmp_path, store, data={"img_size": SIZE},
        training={"steps": STEPS, "eval_every": STEPS, "save_every": STEPS},
    )  # fmt: skip
    Trainer(make_task(config), config, start(), tmp_path / "run").run()
    seed_torch(config.training.seed, 0)
    first = dict(make_task(config).build_model().named_parameters())
    weights = {name.removeprefix("jit."): value.detach().clone().requires_grad_() for name, value in first.items()}
    expected = plain_loop(weights, texts, 4, config.training.seed)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    assert min(expected[-10:]) < 0.5 * expected[0]
    found = load_file(tmp_path / "run/final/model.safetensors")
    for name, value in weights.items():
        torch.testing.assert_close(found[f"jit.{name}"], value.detach(), rtol=0, atol=1e-5, msg=name)
