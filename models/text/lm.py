"""transformers' language model of a configuration, in fp32: new, or with a folder's weights.

What changes is its GELU, where that is the formula by tanh: it becomes torch's, one pass in place of eight.

load_lm(auto_class, hf_config, folder, attention)    the model
check_size(folder, hf_config)                        before it is built
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trunkline.engine.checkpoint.weights import is_finite
from trunkline.engine.errors import CheckpointError
from trunkline.models.text.file_format import misfit
from trunkline.models.text.folder import tensor_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def load_lm(auto_class: str, hf_config: PreTrainedConfig, folder: Path | None, attention: str) -> Any:
    """Initialised from torch's global generator, or with the weights of `folder`; none of its code runs.

    Raises CheckpointError that lists the tensors of which transformers did not find what the network needs, or that are
    not finite.
    """
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # every rank would draw one, in the middle of what the run says
    loader: Any = getattr(transformers, auto_class)
    if folder is None:
        return _with_torchs_gelu(loader.from_config(hf_config, attn_implementation=attention, dtype=torch.float32))
    lm, found = loader.from_pretrained(
        folder, config=hf_config, attn_implementation=attention, dtype=torch.float32, output_loading_info=True,
        ignore_mismatched_sizes=True, local_files_only=True, trust_remote_code=False, weights_only=True,
    )  # fmt: skip
    wrong = sorted(found["missing_keys"]) + [
        f"{name} is {list(theirs)}, not {list(ours)}" for name, theirs, ours in sorted(found["mismatched_keys"])
    ]
    if wrong:
        raise misfit(folder, wrong)
    if broken := [name for name, parameter in lm.named_parameters() if not is_finite(parameter)]:
        raise CheckpointError(
            f"model.path: {folder}: holds NaN or infinity in {', '.join(broken[:3])}"
            f"{f' and {len(broken) - 3} more' if broken[3:] else ''}: give weights that work"
        )
    return _with_torchs_gelu(lm)


def _with_torchs_gelu(lm: nn.Module) -> Any:
    from transformers.activations import NewGELUActivation

    for module in list(lm.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU("tanh"))
    return lm


def check_size(folder: Path, hf_config: PreTrainedConfig) -> None:
    """Raises CheckpointError for more layers than tensors, which would take a while to be built."""
    layers, tensors = getattr(hf_config.get_text_config(), "num_hidden_layers", 0), len(tensor_shapes(folder))
    if isinstance(layers, int) and layers > tensors:
        raise misfit(folder, [f"num_hidden_layers is {layers}, and there are {tensors} tensors"])
