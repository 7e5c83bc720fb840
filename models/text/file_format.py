"""FileFormat: a network's tensors as the folder holds them that they came from.

transformers renames and fuses tensors when it loads a folder: the experts of a layer become one tensor, a prefix moves.
What is written is put back, so that the names and the shapes are those of the folder, for whatever reads it next. What
the folder holds beside the network (a part that sees pictures, heads for further tokens) is written as it was.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trunkline.engine.errors import CheckpointError
from trunkline.models.text.folder import no_floats, read_tensors, reading, tensor_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


_MADE = 1 << 24  # values that a network may compute for itself, such as sines of positions


class FileFormat:
    """Turns the tensors of a network into those of files.

    Args:
        shell: transformers' model, which may be without values (on the device "meta").
        folder: where its tensors came from; None for a new model, which gets the names that transformers gives.

    beside: the folder's tensors that the network does not have; notes: the same for a person to read.
    Raises CheckpointError for a folder that cannot be read, or whose tensors have other shapes than the network's.
    """

    def __init__(self, shell: Any, folder: Path | None) -> None:
        self._shell, self._folder = shell, folder
        self._file_name: dict[str, str] = {}  # by the network's name, of tensors that are only renamed
        shared: dict[int, list[str]] = defaultdict(list)
        for name, parameter in shell.named_parameters(remove_duplicate=False):
            shared[id(parameter)].append(name)
        self._names = {name: names for names in shared.values() for name in names}  # all those of a tied tensor
        self._first = set(next(iter(shared.values())))
        self.beside: list[str] = []
        if folder is None:
            return
        self._shapes = tensor_shapes(folder)
        with reading(folder):
            self._learn_names()
            written = self({name: torch.empty_like(tensor) for name, tensor in shell.state_dict().items()})
        for name, tensor in written.items():
            if self._shapes.get(name, tensor.shape) != tensor.shape:
                raise CheckpointError(
                    f"model.path: {folder}: transformers would write {name} as {list(tensor.shape)}, not as the "
                    f"folder's {list(self._shapes[name])}: update transformers"
                )
        self.beside = sorted(self._shapes.keys() - written.keys())

    @property
    def notes(self) -> list[str]:
        """What the folder holds beside the network, in a line."""
        if not self.beside:
            return []
        shown = f"{', '.join(self.beside[:3])}{', ...' if self.beside[3:] else ''}"
        return [
            f"{len(self.beside)} tensors of {self._folder} are none of {type(self._shell).__name__}'s: they are not "
            f"trained, and are written as they are: {shown}"
        ]

    def _learn_names(self) -> None:
        """Replay how transformers renames what it loads, and note which of its conversions that takes."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        assert self._folder is not None
        shell = self._shell
        transforms = get_model_conversion_mapping(shell)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        known = shell.state_dict()
        wrong, others = list[str](), no_floats(self._folder)
        for name in sorted(self._shapes, key=dot_natural_key):  # some depend on the order
            ours, converted = rename_source_key(name, renamings, converters, shell.base_model_prefix, known)
            if ours not in known and name in known:  # a name that is ours already
                ours, converted = name, None
            if ours in known and converted is None:
                self._file_name[ours] = name
                if known[ours].shape != self._shapes[name]:
                    wrong.append(f"{ours} is {list(self._shapes[name])}, not {list(known[ours].shape)}")
                elif name in others and known[ours].is_floating_point():
                    wrong.append(f"{ours} holds no floating-point numbers")
        needed = sum(parameter.numel() for parameter in shell.parameters())
        held = sum(map(math.prod, self._shapes.values()))
        if wrong or needed > 2 * held + _MADE:  # then transformers would first take the memory for all of it
            raise misfit(self._folder, wrong or [f"{needed:,} values are wanted, and {held:,} are there"])
        shell._weight_conversions = [entry for entry in transforms if entry.was_used()]

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same values under the files' names. Tensors that belong together there must be given together.

        What the folder holds beside the network comes with the network's first tensor. Raises CheckpointError if it
        cannot be read any more.
        """
        from transformers.core_model_loading import revert_weight_conversion

        found: dict[str, Tensor] = {}
        rest: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            files = [self._file_name[twin] for twin in self._names.get(name, [name]) if twin in self._file_name]
            for place, file_name in enumerate(files):
                found[file_name] = tensor.clone() if place else tensor  # tensors of a file do not share memory
            if not files:
                rest[name] = tensor
        if rest:
            found |= revert_weight_conversion(self._shell, rest)
        if self.beside:
            for name in self._first & tensors.keys():
                found |= self._read_beside(tensors[name].device)
        return found

    def _read_beside(self, device: torch.device) -> dict[str, Tensor]:
        assert self._folder is not None
        if device.type == "meta":
            return {name: torch.empty(self._shapes[name], device=device) for name in self.beside}
        return read_tensors(self._folder, self.beside)


def misfit(folder: Path | None, wrong: list[str]) -> CheckpointError:
    """The error that lists the tensors that do not fit a network."""
    return CheckpointError(
        f"model.path: {folder}: its weights do not fit its config.json; missing or of another shape or kind: "
        f"{', '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if wrong[3:] else ''}"
    )


def shell_of(hf_config: PreTrainedConfig, auto_class: str) -> Any:
    """transformers' model without values, of one of its auto classes, such as "AutoModelForCausalLM"."""
    import transformers

    with torch.device("meta"):
        return getattr(transformers, auto_class).from_config(hf_config, dtype=torch.float32, trust_remote_code=False)
