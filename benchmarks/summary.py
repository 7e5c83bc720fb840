"""The tables of what a GPU reached, from the files of `make gpu-bench` and of bench.py's trainings.

    python -m trunkline.benchmarks.summary [--write]   print the tables; --write puts them into docs/measured.md too

Only a right result gives a number; what was not measured, or only in part, says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from trunkline.benchmarks.attention import AIMS, SHARE_AIMS
from trunkline.benchmarks.contenders import CONTENDERS, FULL, MASKED, PATTERNS
from trunkline.benchmarks.masked_mse import AIM, AIMED_AT, STRETCH
from trunkline.benchmarks.report import OK, Row
from trunkline.engine.record.tables import markdown

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results" / "nvidia-h200"
BEGIN, END = "<!-- `make gpu-bench` writes what follows -->", "<!-- up to here -->"
NOT_YET = "not yet measured"
WORKLOADS = ("causal_lm", "image_training", "seq2seq_training", "token_image_training")
STEPS = ("training", "training-compiled")  # of bench.py training, and of its --only compiled
OURS = "ours"
KERNELS = {
    ("forward", 64): "`flash_attention` forward, block-causal with a key mask, 20,136 to 67,120 tokens, D = 64",
    ("forward", 32): "the same, D = 32",
    ("backward", 64): "backward, D = 64",
    ("backward", 32): "backward, D = 32",
}


def table(folder: Path) -> str:
    """In Markdown, from attention.json and masked_mse.json in `folder` as far as they exist."""
    paths = [folder / f"{name}.json" for name in ("attention", "masked_mse")]
    attention, masked_mse = (json.loads(path.read_text()) if path.exists() else {"rows": []} for path in paths)
    rows = [["kernel", "aim", "stretch", "reached"]]
    for (direction, head_dim), label in KERNELS.items():
        aim, stretch = AIMS[direction, head_dim]
        reached = _span(_ours(attention["rows"], direction, head_dim, MASKED), "tflop_per_s", "TFLOP/s")
        rows.append([label, f"{aim} TFLOP/s", f"{stretch} TFLOP/s", reached])
    aims, stretches = (
        ", ".join(f"{100 * aim_and_stretch[at]:.0f} % {which}" for which, aim_and_stretch in SHARE_AIMS.items())
        for at in (0, 1)
    )
    shares = {which: _span(_shares(attention["rows"], which), "share", "%", 100) for which in SHARE_AIMS}
    rows.append(["block-causal against dense, per useful FLOP", aims, stretches, _in_both(shares)])
    rates = {which: _span(_of_copy(masked_mse["rows"], which), "of_copy", "%", 100) for which in SHARE_AIMS}
    mse = "`masked_mse`, `linear_masked_mse`, forward and backward"
    aim_of_copy = f"{100 * AIM:.0f} % of the measured copy bandwidth"
    rows.append([mse, aim_of_copy, f"{100 * STRETCH:.0f} %", _in_both(rates)])
    with_data = [report for report in (attention, masked_mse) if report["rows"]]
    measured = dict.fromkeys(f"{report['device']}, {report['versions']}, {report['date'][:10]}" for report in with_data)
    return "\n\n".join([markdown(rows), *measured]) + "\n"


def beside_others(folder: Path) -> str:
    """In Markdown: our rate over that of what else solves the same problem, from attention.json; "" without any."""
    path = folder / "attention.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    right = [row for row in rows if row["status"] == OK]
    ours_on = {_problem(row): row["tflop_per_s"] for row in right if row["contender"] == OURS}
    spans: dict[tuple[str, int, str, str], list[tuple[float, float]]] = {}
    for row in right:
        if _problem(row) in ours_on and not row["contender"].startswith(OURS):
            key = row["pattern"], row["head_dim"], row["direction"], row["contender"]
            spans.setdefault(key, []).append((ours_on[_problem(row)], row["tflop_per_s"]))
    if not spans:
        return ""
    written = [["pattern", "D", "pass", "flash_attention", "beside it", "ratio"]]
    for (pattern, head_dim, direction, contender), pairs in sorted(spans.items(), key=lambda item: _place(*item[0])):
        ours, theirs = ([pair[at] for pair in pairs] for at in (0, 1))
        ratios = [our / their for our, their in pairs]
        cells = [_ends(ours, ".0f"), f"{contender} {_ends(theirs, '.0f')}", _ends(ratios, ".2f")]
        written.append([pattern, str(head_dim), direction, *cells])
    return markdown(written) + "\n"


def _problem(row: Row) -> tuple[str, int, str, int]:
    return row["pattern"], row["head_dim"], row["direction"], row["tokens"]


def _place(pattern: str, head_dim: int, direction: str, contender: str) -> tuple[int, int, bool, int]:
    return list(PATTERNS).index(pattern), -head_dim, direction == "backward", list(CONTENDERS).index(contender)


def training_step(folder: Path) -> str:
    """In Markdown, from the files of STEPS: every contender that was right, the fastest first; "" without any."""
    parts = []
    for path in (folder / f"{name}.json" for name in STEPS):
        report = json.loads(path.read_text()) if path.exists() else {"rows": []}
        rows = sorted((row for row in report["rows"] if row["status"] == OK), key=lambda row: row["median_s"])
        if not rows:
            continue
        written = [["training step", "median", "slowest", "tokens a second", "TFLOP/s of the model", "memory"]]
        for row in rows:
            seconds = [f"{row[key]:.3f} s" for key in ("median_s", "slowest_s")]
            rates = [f"{row['tokens_per_s']:,.0f}", f"{row['tflop_per_s']:.0f}", f"{row['peak_gib']:.1f} GiB"]
            written.append([row["contender"], *seconds, *rates])
        origin = f"{report['device']}, {report['versions']}, {report['date'][:10]}: `{report['command']}`"
        parts += [markdown(written), *(note for note in report["notes"] if note not in parts), origin]
    return "\n\n".join(parts) + "\n" if parts else ""


def other_workloads(results: Path) -> str:
    """In Markdown, from <benchmark>-<backend>.json in the folders of `results`, one for each device."""
    written = [["workload", "backend", "ours", "beside it", "ratio (95 %)", "TFLOP/s (of a product)", "memory"]]
    origins = []
    for name in WORKLOADS:
        for backend in ("deepspeed", "fsdp"):
            paths = sorted(results.glob(f"*/{name}-{backend}.json"))
            for report in (json.loads(path.read_text()) for path in paths):
                written += [[name, backend, *_beside(row)] for row in report["rows"]]
                origins.append(
                    f"{', '.join(report['notes'])}: {report['device']}, {report['versions']}, {report['date'][:10]}: "
                    f"`{report['command']}`"
                )
            if not paths:
                written.append([name, backend, NOT_YET, "", "", "", ""])
    about = "Training of the other workloads on a GPU. Memory is what steps take beyond weights and optimizer states."
    return "\n\n".join([about, markdown(written), *origins]) + "\n"


def _beside(row: Row) -> list[str]:
    """A pair's cells."""
    speeds = [f"{row[side]}: {row[f'{side}_per_s']:,.0f} {row['unit']}/s" for side in ("ours", "theirs")]
    rate = "" if row["tflop_per_s"] is None else f"{row['tflop_per_s']:.0f} ({100 * row['of_matmul']:.0f} %)"
    peaks = [row["ours_peak_gib"], row["theirs_peak_gib"]]
    memory = "" if None in peaks else " and ".join(f"{peak:.1f}" for peak in peaks) + " GiB"
    return [*speeds, f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})", rate, memory]


def everything(folder: Path) -> str:
    """All tables of `folder`, and those of other workloads in all folders beside it."""
    parts = table(folder), beside_others(folder), training_step(folder), other_workloads(folder.parent)
    return "\n".join(part for part in parts if part)


def _ours(rows: list[Row], direction: str, head_dim: int, pattern: str) -> list[Row]:
    wanted = (OURS, direction, head_dim, pattern)
    return [row for row in rows if (row["contender"], row["direction"], row["head_dim"], row["pattern"]) == wanted]


def _shares(rows: list[Row], direction: str) -> list[Row]:
    """Of each head dimension with an aim and each length: the rate with blocks and padding over the dense one."""
    shares = []
    for head_dim in (head_dim for which, head_dim in AIMS if which == direction):
        dense = {row["tokens"]: row for row in _ours(rows, direction, head_dim, FULL)}
        for row in _ours(rows, direction, head_dim, MASKED):
            both = (row, dense[row["tokens"]])
            bad = [one["status"] for one in both if one["status"] != OK]
            share = None if bad else row["tflop_per_s"] / both[1]["tflop_per_s"]
            shares.append({"share": share, "status": bad[0] if bad else OK})
    return shares


def _of_copy(rows: list[Row], direction: str) -> list[Row]:
    """Ours of both kernels, at the sizes from AIMED_AT on: 2^28 and 2^30 values, 2^22 rows."""
    ours = [row for row in rows if (row["contender"], row["direction"]) == (OURS, direction)]
    return [row for row in ours if row["values"] >= AIMED_AT[row["kernel"]]]


def _span(rows: list[Row], figure: str, unit: str, scale: float = 1) -> str:
    """The least and the greatest figure of the right rows; none beside a wrong one."""
    if any(row["status"].startswith("wrong") for row in rows):
        return "wrong results"
    figures = [scale * row[figure] for row in rows if row["status"] == OK]
    if not figures:
        return NOT_YET
    return f"{_ends(figures, '.0f')} {unit}" + (
        f" ({len(figures)} of {len(rows)} sizes)" if len(figures) < len(rows) else ""
    )


def _ends(figures: list[float], form: str) -> str:
    return " to ".join(dict.fromkeys(f"{end:{form}}" for end in (min(figures), max(figures))))


def _in_both(spans: dict[str, str]) -> str:
    if len(set(spans.values())) == 1 and NOT_YET in spans.values():
        return NOT_YET
    return ", ".join(f"{direction} {span}" for direction, span in spans.items())


def put_into(text: str, new: str) -> str:
    """The text with what stands between BEGIN and END replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"docs/measured.md must hold {BEGIN} and {END} once each, around its tables")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{new}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    """Print, and with --write write. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put them into docs/measured.md")
    arguments = parser.parse_args(argv)
    new = everything(FOLDER)
    print(new, end="")
    if arguments.write:
        page = ROOT / "docs/measured.md"
        page.write_text(put_into(page.read_text(encoding="utf-8"), new), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
