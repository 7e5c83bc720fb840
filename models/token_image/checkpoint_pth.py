"""checkpoint_epoch_N.pth and best_model.pth of a training loop of plain torch, read by --resume.

    read(path, model, steps_per_epoch)    a WholeState in the names of `model`; tensors alone are weights, from epoch 0

    {"epoch": 12, "model_state_dict": ..., "optimizer_state_dict": ..., "scheduler_state_dict": ...,
     "scaler_state_dict": ..., "best_loss": 0.31}

The network's names are those of JiT, with or without `jit.` and what DistributedDataParallel and torch.compile put
before them. The schedule needs no state: the rate follows from the step. Nothing that a file holds is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from trunkline.engine.checkpoint.foreign import load_foreign, read_torch
from trunkline.engine.checkpoint.training_loops import finished_epochs, kept_by_optimizer, number, state_of
from trunkline.engine.errors import CheckpointError
from trunkline.engine.whole_state import WholeState

WEIGHTS, OPTIMIZER = "model_state_dict", "optimizer_state_dict"
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")


def read(path: Path, model: nn.Module, steps_per_epoch: int) -> WholeState:
    """The state in such a file. `model` is a new Denoiser, and holds the file's weights afterwards.

    What the model knows of tokens, its buffers, is of this run's data. Raises CheckpointError.
    """
    held = read_torch(path)
    if isinstance(held, Mapping) and held and all(isinstance(value, Tensor) for value in held.values()):
        held = {WEIGHTS: held}
    if not isinstance(held, Mapping) or not isinstance(weights := held.get(WEIGHTS), Mapping):
        raise CheckpointError(
            f"{path}: holds no '{WEIGHTS}' as checkpoint_epoch_N.pth does, nor tensors alone: name such a file"
        )
    parameters, buffers = ([name for name, _ in named] for named in (model.named_parameters(), model.named_buffers()))

    def called(name: str) -> str | None:
        name = _WRAPPERS.sub("", name)
        if name in buffers:
            return None
        return name if name.startswith("jit.") else f"jit.{name}"

    load_foreign(model, path, called, fresh=buffers)
    order = [new for name in weights if isinstance(name, str) and (new := called(name)) in parameters]
    kept, notes = kept_by_optimizer(held.get(OPTIMIZER), order, OPTIMIZER)
    finished, said = finished_epochs(number(held.get("epoch")), kept, steps_per_epoch)
    notes += said
    if held.get("scaler_state_dict"):
        notes += ("its gradient scale is left out: fp16 begins with that of the configuration, bf16 has none",)
    loss = next((found for key in ("best_loss", "loss") if (found := number(held.get(key))) is not None), None)
    if loss is not None:
        notes += (f"its best loss, {loss:g}, is left out: it is of training texts, and the best is judged on others",)
    return state_of(model, finished * steps_per_epoch, steps_per_epoch, kept, {}, notes)
