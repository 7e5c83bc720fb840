"""The one look of all pictures, drawn as PNG files without a display."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, BLUE, RED, GREY = "#1b1b1b", "#4477aa", "#d1495b", "#777777"
_STYLE: Any = {  # matplotlib's own type for it differs from release to release
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.edgecolor": "#888888",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 120,
}


@contextmanager
def picture(path: Path, width: float, height: float, **style: Any) -> Iterator[Figure]:
    """An empty figure of that size in inches, written to `path` when the block ends well. `style` adds to the look."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE | style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path)


def plain(text: str) -> str:
    """The text as it stands, where matplotlib would take what is between two $ for mathematics."""
    return text.replace("$", r"\$")
