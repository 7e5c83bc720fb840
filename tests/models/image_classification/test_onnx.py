"""The network as ONNX: onnxruntime's logits, for batches of any size."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.image_classification.trained_run import EDGE, write_images, write_run
from trunkline.models.image_classification.trained import load_trained

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


@pytest.mark.slow
def test_onnxruntime_computes_the_same_logits(tmp_path: Path) -> None:
    from trunkline.models.image_classification.onnx import write_onnx

    folder = write_run(tmp_path, write_images(tmp_path / "images")) / "best"
    write_onnx(folder)
    (moved := tmp_path / "moved").mkdir()
    shutil.move(folder / "model.onnx", moved / "model.onnx")  # it is one file, whole
    session = onnxruntime.InferenceSession(moved / "model.onnx", providers=["CPUExecutionProvider"])
    network = load_trained(folder, torch.device("cpu")).network
    for count in (1, 5):
        pixels = torch.randn(count, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            want = network(pixel_values=pixels).logits.numpy()
        np.testing.assert_allclose(session.run(None, {"pixel_values": pixels.numpy()})[0], want, rtol=1e-4, atol=1e-4)
