"""Tiny CSV cases for the tests: few columns, and values that tell their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

COLUMNS = {
    "Boundary": ("B_001:FR", "T_001:SNQ"),
    "B": ("B_001_p_in", "B_001_q_out"),
    "C": ("C_001_pwr",),
    "H": (),
    "N": ("N_001_p", "N_001_t"),
    "P": ("P_001_inv",),
    "R": ("R_001_q",),
    "T&E": ("T_001_p", "E_001_q"),
}
STATES = [name for file, names in COLUMNS.items() if file != "Boundary" for name in names]
OUTPUT_FILES = [file for file in COLUMNS if file != "Boundary"]
Edit = Callable[[list[str]], list[str]]


def time(minute: int) -> str:
    """Minute of the first of January as the files write it."""
    return f"2025/1/{1 + minute // 1440} {minute % 1440 // 60}:{minute % 60:02d}"


def set_point(column: int, row: int) -> float:
    """Boundary.csv's value: it changes every row."""
    return 100 * column + row


def output(column: int, minute: int, case: int = 1) -> float:
    """An output's value in column `column` of the state vector: exact in float32 for the cases that tests use."""
    return 10_000 * case + 1_500 * column + minute


@lru_cache
def lines(file: str, case: int = 1) -> tuple[str, ...]:
    """The lines of a file, without line ends."""
    out = [",".join(["TIME", *COLUMNS[file]])]
    if file == "Boundary":
        for row in range(48):
            out.append(",".join([time(30 * row), *(str(set_point(k, row)) for k in range(2))]))
        return tuple(out)
    first = STATES.index(COLUMNS[file][0]) if COLUMNS[file] else 0
    for minute in range(1, 1441):
        cells = [str(output(first + k, minute, case)) for k in range(len(COLUMNS[file]))]
        out.append(",".join([time(minute), *cells]))
    return tuple(out)


def write_case(folder: Path, case: int = 1, edits: Mapping[str, Edit] | None = None, *, outputs: bool = True) -> Path:
    """Write a case; `edits` change the lines of the files that they name."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in COLUMNS if outputs else ("Boundary",):
        text = list(lines(file, case))
        if edits and file in edits:
            text = edits[file](text)
        (folder / f"{file}.csv").write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    return folder


def write_source(root: Path, train: int = 4, test: int = 1) -> Path:
    """A source of `train` training cases and `test` cases of Boundary.csv only."""
    for number in range(1, train + 1):
        write_case(root / "train" / f"case_{number:04d}", number)
    for number in range(1, test + 1):
        write_case(root / "test" / f"case_{number:04d}", number, outputs=False)
    return root
