"""best/: the weights of the best evaluation of the run as it stands, and nothing else under that name.

    settle(...)      at the start: which best value still counts, and that best/ and final/ are of the run as it goes on
    outcome(...)     what a finished run says of it

What makes best/ the run's own is the SHA-256 of its weights, which the state in a checkpoint carries: after a resume
from an earlier step, best/ may hold what was abandoned there.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

from engine.assets import Assets
from engine.checkpoint import Checkpoint, Checkpoints, verify
from engine.config import Best
from engine.digests import check_digests, recorded, replace_files
from engine.distributed import Ranks, from_main, on_main
from engine.errors import CheckpointError
from engine.export import export_weights
from engine.files import unused
from engine.progress import Progress
from engine.weights import WEIGHTS, saved_facts

BEST, FINAL = "best", "final"


def settle(
    folder: Path, progress: Progress, best: Best, found: Checkpoint | None, checkpoints: Checkpoints, ranks: Ranks
) -> list[str]:
    """Make best value, best/ and final/ those of the state that the run begins in. Called on all ranks.

    Weights that are of another metric, of an abandoned branch or of an earlier run are set aside under a name. The best
    ones are brought back from the run that this one goes on from, or from a checkpoint, if they are there.

    Returns what was done, for whoever starts the run. Raises CheckpointError.
    """
    notes = []
    if progress.best_metric and (progress.best_metric, progress.best_mode) != (best.metric, best.mode):
        notes.append(
            f"the best weights so far were judged by {progress.best_metric} ({progress.best_mode}), from now on they "
            f"are by {best.metric} ({best.mode}): the next evaluation is the first to count"
        )
        progress.forget_best()

    def put_in_place() -> None:
        notes.extend(_set_aside(folder, progress, best))
        if found is not None and progress.best is not None and not (folder / BEST / WEIGHTS).exists():
            notes.append(_bring_back(folder, progress, best, found, checkpoints))

    on_main(put_in_place, ranks, f"{folder}: cannot put {BEST}/ in place")
    progress.best_weights = from_main(progress.best_weights, ranks)
    return notes


def outcome(folder: Path, progress: Progress, best: Best, report: Path) -> str:
    """What a finished run's folder holds, and why there is no best/ if there is none."""
    last = f"{FINAL}/ and {report.relative_to(folder)}"
    if progress.best is None:
        return f"{last}; no {BEST}/: no evaluation has measured a finite {best.metric}"
    value = f"{best.metric} {progress.best:.6g} at step {progress.best_step}"
    if not (folder / BEST / WEIGHTS).exists():
        return f"{last}; no {BEST}/: nothing was better than {value}, whose weights are not here"
    return f"{BEST}/ ({value}), {last}"


def _set_aside(folder: Path, progress: Progress, best: Best) -> list[str]:
    notes = []
    for name in (BEST, FINAL):
        held = folder / name
        if not (held / WEIGHTS).exists():
            continue
        facts = saved_facts(held)
        step = facts.get("step", math.nan)
        if name == BEST and _is_best(held, progress, best):
            continue
        if name == FINAL and not step > progress.step:
            continue
        label = f"{step:.0f}" if math.isfinite(step) else "unknown"
        target = folder / f"aside-{name}-step-{label}"
        if target.exists() and (mine := _weights(held)) is not None and mine == _weights(target):
            shutil.rmtree(target)  # the same weights, set aside by an earlier start
        target = unused(target)
        held.rename(target)
        notes.append(
            f"{held} holds weights of step {label} that are not of the run as it goes on from step {progress.step}; "
            f"renamed to {target.name}"
        )
    return notes


def _is_best(held: Path, progress: Progress, best: Best) -> bool:
    if progress.best is None:
        return False
    if progress.best_weights:
        return _weights(held) == progress.best_weights
    # a checkpoint of an earlier version names no weights
    facts = saved_facts(held)
    return facts.get("step") == progress.best_step and facts.get(best.metric) == progress.best


def _weights(folder: Path) -> str | None:
    try:
        return recorded(folder, WEIGHTS)
    except CheckpointError:
        return None


def _bring_back(folder: Path, progress: Progress, best: Best, found: Checkpoint, checkpoints: Checkpoints) -> str:
    value = f"the best {best.metric} so far, {progress.best:.6g} at step {progress.best_step}"
    other = found.path.parent.parent / BEST
    kept = (place / f"step-{progress.best_step:08d}" for place in {found.path.parent: 0, checkpoints.folder: 0})
    for source in (other, *kept):
        try:
            if source == other:
                write = _copy(source, progress, best)
            else:
                write = _export(source, progress, best, found, folder)
            if write is not None:
                progress.best_weights = replace_files(folder / BEST, write)[WEIGHTS]["sha256"]
                return f"{value}: {BEST}/ is made from {source}"
        except CheckpointError as error:
            print(f"warning: {error}", flush=True)
    return f"{value}: its weights are not kept, so there is no {BEST}/ before the next gain"


def _copy(other: Path, progress: Progress, best: Best) -> Callable[[Path], object] | None:
    """Copies another run's best/, if that holds the best weights of the state."""
    if not (other / WEIGHTS).exists() or not _is_best(other, progress, best):
        return None
    check_digests(other)
    return lambda draft: shutil.copytree(other, draft, dirs_exist_ok=True)


def _export(
    path: Path, progress: Progress, best: Best, found: Checkpoint, folder: Path
) -> Callable[[Path], object] | None:
    """Writes the weights of the checkpoint of the best step, if it is there and of this branch."""
    if path != found.path and not path.is_dir():
        return None
    kept = found if path == found.path else verify(path)
    if (kept.state["step"], kept.state.get("best")) != (progress.best_step, progress.best):
        return None
    assert progress.best is not None
    assets, facts = Assets(folder), {"step": progress.best_step, best.metric: progress.best}

    def write(draft: Path) -> None:
        export_weights(kept, draft, 1 << 62, called=assets.weight_name, facts=facts)
        assets.copy_to(draft, "float32")

    return write
