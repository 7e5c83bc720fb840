"""BatchNorm by groups, beside torch's.

    run(arguments)    `python launchers/bench.py batch_norm`

Plain steps in fp32 on the same random images, with torch's BatchNorm and with ours of one, two and four groups. Turns
of some steps alternate.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.benchmarks.pairs import ratio_of
from trunkline.benchmarks.report import the_device
from trunkline.benchmarks.sides import Clock, Side, take_turns
from trunkline.models.image_classification.config import ImageModel
from trunkline.models.image_classification.network import make_network

CLASSES = 10


def run(arguments: argparse.Namespace) -> int:
    """Check that one group gives what torch's BatchNorm does, time and print. Returns 0."""
    from transformers import AutoModelForImageClassification

    device, size = the_device(), arguments.micro_batch_size
    torch.manual_seed(0)
    images = torch.randn(size, 3, arguments.img_size, arguments.img_size, device=device)
    labels = torch.arange(size, device=device) % CLASSES
    names = {1: "one group", 2: "two groups", 4: "four groups"}
    ours = {
        name: make_network(
            ImageModel(arch=arguments.arch, batch_norm_group=-(-size // count)), CLASSES, images.shape[-1]
        )
        for count, name in names.items()
    }
    loader: Any = AutoModelForImageClassification
    networks = {"torch": loader.from_config(ours["one group"].config), **ours}
    for network in networks.values():
        network.load_state_dict(ours["one group"].state_dict())
        network.to(device)
    found, wanted = (networks[name].train()(pixel_values=images).logits for name in ("one group", "torch"))
    torch.testing.assert_close(found, wanted)
    steps = [_Steps(name, network, images, labels, arguments.steps) for name, network in networks.items()]
    theirs, *sides = take_turns(steps, arguments.turns)
    for side in sides:
        ratio = ratio_of(theirs.speeds, side.speeds)
        print(f"time, {side.name} / torch's BatchNorm {ratio.median:.3f} (95 %: {ratio.low:.3f} ... {ratio.high:.3f})")
    return 0


class _Steps:
    """Steps of a plain loop; the first of a turn does not count."""

    def __init__(self, name: str, network: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
        self.side, self.network, self.images, self.labels, self.steps = Side(name), network, images, labels, steps
        self.optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        self.clock = Clock(self.side, images.device, cpu_time=True)

    def take_turn(self) -> None:
        for step in range(1 + self.steps):
            if step == 1:
                self.clock.begin()
            F.cross_entropy(self.network(pixel_values=self.images).logits, self.labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.clock.end()
        self.side.units.append(self.steps * len(self.images))
