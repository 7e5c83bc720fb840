"""Fitted baselines beside the data that they were fitted on.

    <store>/baselines/<name>-<key>/model.safetensors   the weights
                                   baseline.json       what they were fitted on, by which settings, what came of it

`about` is all that decides a baseline: the store's fingerprint, the normalisation, the settings, the time. The key is a
digest of it, so another data set's baseline is never taken for this one's. A folder gets its name when it is whole.

    kept(folder, about, module)    the baseline's weights go into `module`, if they are there
    keep(folder, about, module)    write them
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from trunkline.engine.data.store_writer import draft_of, publish
from trunkline.engine.machine.files import entry, save_tensors, sync, write_json
from trunkline.engine.machine.reading import read_object, read_whole, reason
from trunkline.models.fluid.normalization import Normalization

RECORD, WEIGHTS = "baseline.json", "model.safetensors"
_MOST_BYTES = 8 << 30


def folder_of(root: Path, name: str, about: dict[str, Any]) -> Path:
    """Where a baseline of the data set in `root` is kept."""
    text = json.dumps({"name": name, **about}, sort_keys=True)
    return root / "baselines" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def digest(normalization: Normalization) -> str:
    """Names the statistics that a baseline was fitted with."""
    found = hashlib.sha256()
    for name, tensor in sorted(normalization.state_dict().items()):
        found.update(name.encode() + tensor.cpu().numpy().tobytes())
    return found.hexdigest()


def kept(folder: Path, about: dict[str, Any], module: nn.Module) -> dict[str, Any] | None:
    """Load the weights into `module`; returns the facts that were kept with them, or None if nothing is there.

    Raises ValueError, which says what is wrong with what is there.
    """
    if not folder.exists():
        return None
    try:
        record = read_object(folder / RECORD, finite=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{RECORD}: {reason(error)}") from error
    try:
        if record.get("about") != json.loads(json.dumps(about)):
            raise ValueError(f"{RECORD} is of another data set or of other settings")
        if entry(folder / WEIGHTS, follow=True)["sha256"] != record.get("sha256"):
            raise ValueError(f"{WEIGHTS} is not the file that was written")
        module.load_state_dict(load(read_whole(folder / WEIGHTS, _MOST_BYTES)))
        return dict(record["facts"])
    except OSError as error:
        raise ValueError(f"{WEIGHTS}: {reason(error)}") from error
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"it does not fit: {reason(error)}") from error


def keep(folder: Path, about: dict[str, Any], module: nn.Module, facts: dict[str, Any]) -> None:
    """Write a baseline, in place of a damaged one. Raises OSError, or DataError while another process writes it."""
    folder.parent.mkdir(exist_ok=True)
    with draft_of(folder) as draft:
        save_tensors(_contiguous(module), draft / WEIGHTS)
        sync(draft / WEIGHTS)
        sha256 = entry(draft / WEIGHTS)["sha256"]
        write_json(draft / RECORD, {"about": about, "facts": facts, "sha256": sha256})
        shutil.rmtree(folder, ignore_errors=True)
        publish(draft, folder)


def minutes_kept(root: Path, name: str, about: dict[str, Any], notes: list[str]) -> list[float]:
    """How long those baselines of this name trained that differ from `about` in their "minutes" alone.

    A record that cannot be read is noted.
    """
    found = []
    for path in sorted((root / "baselines").glob(f"{name}-*/{RECORD}")):
        try:
            its = read_object(path, finite=False).get("about")
        except (OSError, ValueError) as error:
            notes.append(f"{path}: cannot be read ({reason(error)}): remove its folder")
            continue
        minutes = its.get("minutes") if isinstance(its, dict) else None
        if isinstance(minutes, float) and its == about | {"minutes": minutes}:
            found.append(minutes)
    return found


def _contiguous(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
