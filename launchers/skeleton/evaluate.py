"""`trunkline evaluate --run RUN`: the metrics on data that training has not seen."""

from __future__ import annotations

import json
from argparse import Namespace

from trunkline.engine.evaluation import evaluate
from trunkline.engine.ranks.distributed import Ranks
from trunkline.launchers.skeleton.trained import load_trained


def run(arguments: Namespace) -> int:
    """Print and write evaluation.json. Returns the exit status."""
    task, model = load_trained(arguments.run, arguments.device)
    ranks = Ranks(0, 1, 0, arguments.device)
    metrics = evaluate(task, model, ranks, split=arguments.split, num_samples=None, micro_batch_size=64)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "evaluation.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print("\n".join(f"{name} {value:.6g}" for name, value in metrics.items()))
    return 0
