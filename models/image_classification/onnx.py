"""The network as ONNX, for programs without PyTorch: what `launchers/export.py --onnx` does for this workload.

    write_onnx(folder)    model.onnx beside the weights, compared with the network that it was made from

Its input "pixel_values" is fp32 [B, 3, S, S], RGB from 0 to 1, each channel less data.mean and divided by data.std.
B is free. Its output "logits" is [B, C], in the order of the classes.
"""

from __future__ import annotations

import logging
from pathlib import Path

import onnxruntime
import onnxscript  # noqa: F401  # without it torch.onnx cannot export
import torch
from torch import Tensor, nn

from trunkline.engine.errors import CheckpointError
from trunkline.models.image_classification.trained import load_trained

ONNX = "model.onnx"
_TOLERANCE = 1e-4


class _Logits(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=pixel_values).logits
        return logits


@torch.no_grad()
def write_onnx(folder: Path) -> None:
    """Write it. Raises CheckpointError if onnxruntime does not compute what PyTorch does."""
    trained = load_trained(folder, torch.device("cpu"))
    network, path = _Logits(trained.network).eval(), folder / ONNX
    shape = (3, trained.data.img_size, trained.data.img_size)
    generator = torch.Generator().manual_seed(0)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not there
    torch.onnx.export(
        network,
        (torch.randn(2, *shape, generator=generator),),
        path,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        external_data=False,
        dynamo=True,
        verbose=False,
    )
    pixels = torch.randn(3, *shape, generator=generator)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found, expected = torch.from_numpy(session.run(["logits"], {"pixel_values": pixels.numpy()})[0]), network(pixels)
    if not torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise CheckpointError(
            f"{path}: onnxruntime {onnxruntime.__version__} computes other logits than PyTorch, by up to "
            f"{(found - expected).abs().max():.2g}: export without --onnx, or with another onnxruntime"
        )
