"""Training of diffusion on token images: beside a plain loop, beside larger images, or beside bf16.

    run(arguments)    `python launchers/bench.py token_image_training`

Sides are processes of their own and take turns of some steps. The first does not count, nor what the --workers
processes of each may have read ahead. Nobody logs, evaluates or saves. All train a preset with torch's fused AdamW from
the same weights on, on a GPU in bf16, else and beside bf16 in fp32:

    accelerate    the loop of Accelerate's documentation, on the same network in plain PyTorch:
                  scaled_dot_product_attention with a mask, noise of torch.randn, the squared error written out. That
                  both networks say the same is checked first
    size          images of four times the edge, at the same patch
    bf16          the same in bf16

Texts are random bytes of all lengths up to a whole image. What a side keeps for its backward pass is what --plan says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from trunkline.benchmarks.pairs import ratio_of
from trunkline.benchmarks.report import the_device
from trunkline.benchmarks.sides import Clock, Ours, Side, apart, write
from trunkline.engine.config.run_config import RunConfig, load_config
from trunkline.engine.data.randomness import seed_torch
from trunkline.engine.plan import sizes_of
from trunkline.engine.planned_memory import activation_bytes
from trunkline.engine.ranks.distributed import world
from trunkline.engine.trainer import Trainer
from trunkline.models.registry import config_sections, make_task
from trunkline.models.text.byte_tokenizer import plain_bytes
from trunkline.models.text.column_store import ColumnWriter
from trunkline.models.token_image.network import JiT, time_features
from trunkline.models.token_image.noise import LAST
from trunkline.models.token_image.store import Store

OURS, THEIRS = "Trunkline", "Accelerate loop"
TEXTS, LARGER = 32, 4


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write. Returns 0."""
    sides, kept, flops = measure(
        arguments.beside, arguments.preset, arguments.layers, arguments.img_size, arguments.micro_batch_size,
        arguments.turns, arguments.steps, arguments.backend, arguments.workers,
    )  # fmt: skip
    for side in sides:
        memory = f", {kept[side.name] / 2**20:,.0f} MiB kept for the backward pass" if side.name in kept else ""
        print(f"{side.name:<20} {statistics.median(side.speeds):10,.4g} images/s{memory}")
    ours, other = sides
    ratio = ratio_of(ours.speeds, other.speeds)
    print(f"speed, {OURS} / {other.name} {ratio.median:.3f} (95 %: {ratio.low:.3f} ... {ratio.high:.3f})")
    layers = "" if arguments.layers is None else f" with {arguments.layers} blocks"
    about = (
        f"JiT-{arguments.preset}{layers}, {arguments.img_size} x {arguments.img_size} pixels, micro-batch "
        f"{arguments.micro_batch_size}, {arguments.workers} loader processes a side"
    )
    write(arguments, [(ours, other)], "images", about, flops)
    return 0


def measure(
    beside: str, preset: str, layers: int | None, img_size: int, micro_batch_size: int, turns: int, steps: int,
    backend: str, workers: int,
) -> tuple[list[Side], dict[str, int], float]:  # fmt: skip
    """The sides, on a CPU by the process's own time; bytes kept for the backward pass; useful FLOPs of an image."""
    with tempfile.TemporaryDirectory() as name:
        folder, total = Path(name), turns * (steps + 1 + 2 * workers)
        larger = img_size * LARGER if beside == "size" else img_size
        _write_texts(folder, larger**2, micro_batch_size)

        def config(side: str, size: int = img_size, bf16: bool = torch.cuda.is_available()) -> RunConfig:
            return _config(folder / f"{side}.json", preset, layers, size, bf16, micro_batch_size, total, workers)

        ours = {OURS: config(OURS, bf16=torch.cuda.is_available() and beside != "bf16")}
        if beside == "size":
            ours |= {(other := f"{larger} x {larger}"): config(other, size=larger)}
        elif beside == "bf16":
            ours |= {"bf16": config("bf16", bf16=True)}
        warm_up, kept = 1 + 2 * workers, {}
        for side, each in ours.items():
            task = make_task(each)
            found = activation_bytes(task, task.build_model(), each, micro_batch_size, torch.cuda.is_available())
            if found is not None:
                kept[side] = found
        flops = make_task(ours[OURS]).flops_per_sample()
        makers: list[Callable[[], AbstractContextManager[Any]]] = [
            partial(_ours, side, each, folder / side, backend, steps, warm_up) for side, each in ours.items()
        ]
        if beside == "accelerate":
            makers.append(partial(_theirs, ours[OURS], steps, warm_up))
        return apart(makers, turns), kept, flops


@contextmanager
def _ours(side: str, config: RunConfig, folder: Path, backend: str, steps: int, warm_up: int) -> Iterator[Ours]:
    with world() as ranks:
        trainer = Trainer(make_task(config), config, ranks, folder, backend)
        yield Ours(side, trainer, steps, lambda batch: int(batch["valid"].sum()), warm_up)
        trainer.close()


def _theirs(config: RunConfig, steps: int, warm_up: int) -> AbstractContextManager[_Theirs]:
    return nullcontext(_Theirs(config, steps, warm_up))


def _write_texts(folder: Path, longest: int, micro_batch_size: int) -> None:
    generator = np.random.default_rng(0)
    (draft := folder / "draft").mkdir()
    plain_bytes().save_pretrained(draft / "tokenizer")
    with ColumnWriter(draft, Store, "texts", 256, ["train", "val"]) as writer:
        for split in ("train", "val"):
            for length in generator.integers(1, longest, max(TEXTS, 8 * micro_batch_size)):
                writer.add(split, generator.integers(1, 256, length).tolist())
        writer.finish(folder / "store")


def _config(
    path: Path, preset: str, layers: int | None, img_size: int, bf16: bool, micro_batch_size: int, steps: int,
    workers: int,
) -> RunConfig:  # fmt: skip
    never = steps + 1
    raw = {
        "workload": "token_image",
        "data": {"store": str(path.parent / "store"), "img_size": img_size},
        "model": {"preset": preset} | ({} if layers is None else {"num_layers": layers}),
        "training": {
            "steps": steps, "eval_every": never, "save_every": never, "log_every": never, "trackers": [],
            "num_workers": workers,
        },
        "deepspeed": {
            "train_batch_size": micro_batch_size,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01, "fused": True}},
            "gradient_clipping": 1.0,
            "bf16": {"enabled": bf16},
            "zero_optimization": {"stage": 0},
        },
    }  # fmt: skip
    path.write_text(json.dumps(raw))
    return load_config(path, sections=config_sections)


class Plain(nn.Module):
    """The same network of the original block, without condition, in plain PyTorch. It shares the modules of `jit`."""

    def __init__(self, jit: JiT) -> None:
        super().__init__()
        self.jit = jit

    def forward(self, x: Tensor, t: Tensor, valid: Tensor) -> Tensor:
        """[B, S, S, C]; see JiT.forward."""
        jit, (p, q), (height, width) = self.jit, self.jit.patch, self.jit.grid
        patches = x.unflatten(2, (width, q)).unflatten(1, (height, p)).transpose(2, 3).flatten(3).flatten(1, 2)
        seen = valid.unflatten(2, (width, q)).unflatten(1, (height, p)).any(4).any(2).flatten(1)
        h = jit.patches(patches) + (jit.rows[:, None] + jit.columns).flatten(0, 1)
        h = torch.cat([h.new_zeros(len(h), jit.slots, jit.d_model), h], 1)
        seen = torch.cat([seen.new_zeros(len(h), jit.slots), seen], 1)[:, None, None]
        c = F.silu(time_features(t, jit.d_model))
        block: Any
        for block in jit.blocks:
            scale, shift = block.norm.modulation(c)[:, None].chunk(2, -1)
            scale = (1 + scale).clamp(0.1, 10)
            heads = block.qkv(block.norm.norm(h) * scale + shift).unflatten(-1, (3, block.num_heads, -1))
            query, key, value = heads.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
            h = h + block.projection(mixed.transpose(1, 2).flatten(2))
            gate, up = block.up(block.norm.norm(h) * scale + shift).chunk(2, -1)
            h = h + block.down(F.silu(gate) * up)
        out = jit.output(h[:, jit.slots :]).view(-1, height, width, p, q, jit.values)
        return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class _Samples(Dataset[dict[str, Tensor]]):
    """A text as its image and mask, made as it is read."""

    def __init__(self, texts: Any, size: int) -> None:
        self.texts, self.size = texts, size

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.texts[index].text)
        pixels, mask = torch.zeros(self.size**2, 3), torch.zeros(self.size**2)
        pixels[: len(ids)] = torch.stack([ids % 256, ids // 256 % 256, ids // 65536], 1).float() / 255
        mask[: len(ids)] = 1
        return {"image": pixels.view(self.size, self.size, 3), "mask": mask.view(self.size, self.size)}


class _Theirs:
    """Accelerate's loop, with the weights that the engine began with."""

    def __init__(self, config: RunConfig, steps: int, warm_up: int) -> None:
        from accelerate import Accelerator

        task: Any = make_task(config)
        seed_torch(config.training.seed, 0)  # as the engine does
        denoiser = task.build_model()
        network = Plain(denoiser.jit)
        _check(network, denoiser, task)
        self.side, self.steps, self.warm_up = Side(THEIRS), steps, warm_up
        self.clock = Clock(self.side, the_device(), cpu_time=True)
        cuda, workers = torch.cuda.is_available(), config.training.num_workers
        self._accelerator = Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no")
        params = config.deepspeed.optimizer.params
        samples = _Samples(task.dataset("train"), task.data.img_size)
        loader = DataLoader(
            samples, sizes_of(task, config, 1).micro_batch_size, shuffle=True, drop_last=True, num_workers=workers,
            pin_memory=cuda, persistent_workers=workers > 0,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(network.parameters(), **params)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        self._prepared = self._accelerator.prepare(network, optimizer, schedule, loader)
        self._batches = self._endless()

    def _endless(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self._prepared[3]

    def take_turn(self) -> None:
        images, (network, optimizer, schedule, _) = 0, self._prepared
        for step in range(self.warm_up + self.steps):
            if step == self.warm_up:
                images = 0
                self.clock.begin()
            batch = next(self._batches)
            clean, mask = batch["image"], batch["mask"]
            images += len(clean)
            t = torch.randint(LAST, (len(clean),), device=clean.device)
            alpha = (1 - t / LAST)[:, None, None, None]
            found = network(alpha * clean + (1 - alpha) * torch.randn_like(clean), t, mask > 0)
            loss = ((found - clean).square().sum(-1) * mask).sum() / mask.sum()
            self._accelerator.backward(loss)
            self._accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            loss.item()  # as it is shown by anyone who looks at a run
        self.clock.end()
        self.side.units.append(images)


@torch.no_grad()
def _check(plain: Plain, denoiser: nn.Module, task: Any) -> None:
    """Raises AssertionError if the two networks do not say the same."""
    clean, held = task.images(task.collate([task.dataset("train")[index] for index in range(2)]))
    t = torch.tensor([100, 900])
    torch.testing.assert_close(plain(clean, t, held), denoiser(clean, t, held), rtol=1e-3, atol=1e-4)
