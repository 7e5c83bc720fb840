"""`trunkline predict --run RUN --x 0.5 1`: y for each x."""

from __future__ import annotations

from argparse import Namespace

import torch

from trunkline.launchers.skeleton.trained import load_trained


def run(arguments: Namespace) -> int:
    """Print. Returns the exit status."""
    _, model = load_trained(arguments.run, arguments.device)
    with torch.inference_mode():
        y = model(torch.tensor(arguments.x, device=arguments.device)[:, None])
    print("\n".join(f"{a:g} {b:.6g}" for a, b in zip(arguments.x, y[:, 0].tolist(), strict=True)))
    return 0
