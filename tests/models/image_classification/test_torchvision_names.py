"""The names of a ResNet's tensors, there and back."""

from __future__ import annotations

import pytest
import torch

from tests.models.image_classification.small_images import PlainResNet, small_resnet
from trunkline.models.image_classification.config import ImageModel
from trunkline.models.image_classification.network import make_network
from trunkline.models.image_classification.torchvision_names import (
    from_torchvision,
    in_torchvision_order,
    torchvision_names,
)


@pytest.mark.parametrize("arch", ["resnet18", "resnet152"])
def test_each_name_comes_back(arch: str) -> None:
    with torch.device("meta"):
        names = list(make_network(ImageModel(arch=arch), 7, 64).state_dict())
    called = torchvision_names(names)
    assert len({*called.values()}) == len(names)
    assert {from_torchvision(name): name for name in called.values()} == called


def test_the_order_is_that_of_torchvisions_modules() -> None:
    plain = [name for name, _ in PlainResNet().named_parameters()]
    ours = [name for name, _ in small_resnet().named_parameters()]
    assert sorted(torchvision_names(ours).values(), key=in_torchvision_order) == plain
    assert list(torchvision_names(ours).values()) != plain


def test_other_networks_keep_their_names() -> None:
    names = ["vit.embeddings.cls_token", "classifier.1.weight"]
    assert torchvision_names(names) == dict(zip(names, names, strict=True))
