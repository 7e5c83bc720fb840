"""Adaptive clipping: a gradient is cut to a multiple of recent gradients.

A fixed limit that tames the first steps does nothing later, when norms are a tenth; one that fits later would throttle
the start. Here the limit of a step is `factor` times an exponential moving average of the global norms of the steps
before it, each as it was after clipping, so that a spike moves the limit by little. It is the idea of ZClip (Kumar et
al. 2025, arXiv:2504.02507) and AdaGC (Wang et al. 2025, arXiv:2502.11034) in its plainest form. The limit follows from
what is in `Progress`, so every backend gets the same and a resumed run continues exactly.
"""

from __future__ import annotations

from trunkline.engine.config.run_config import AdaptiveClipping
from trunkline.engine.progress import Progress


def clip_norm(adaptive: AdaptiveClipping, fixed: float, progress: Progress) -> float:
    """The norm that the coming step's gradient is clipped to; 0 for none. `fixed` holds too: the smaller one wins."""
    if progress.norms_seen < max(1, adaptive.warmup_steps):
        return fixed
    average = progress.norm_average / (1 - adaptive.beta**progress.norms_seen)  # it began with 0
    limit = adaptive.factor * average
    return min(limit, fixed) if fixed else limit


def note_norm(adaptive: AdaptiveClipping, fixed: float, progress: Progress, norm: float) -> None:
    """Let the norm of a step that was made, before clipping, enter the average."""
    limit = clip_norm(adaptive, fixed, progress)
    clipped = min(norm, limit) if limit else norm
    progress.norm_average = adaptive.beta * progress.norm_average + (1 - adaptive.beta) * clipped
    progress.norms_seen += 1
