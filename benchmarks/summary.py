"""The table of what the kernels reach, from the files of `make gpu-bench`.

    python -m trunkline.benchmarks.summary [--write]   print the table; --write puts it into docs/measured.md too

Only a right result gives a number; what was not measured, or only in part, says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from trunkline.benchmarks.attention import AIMS, SHARE_AIMS
from trunkline.benchmarks.contenders import FULL, MASKED
from trunkline.benchmarks.masked_mse import AIM, AIMED_AT, STRETCH
from trunkline.benchmarks.report import OK, Row
from trunkline.engine.record.tables import markdown

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results" / "nvidia-h200"
BEGIN, END = "<!-- `make gpu-bench` writes what follows -->", "<!-- up to here -->"
NOT_YET = "not yet measured"
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


def _ours(rows: list[Row], direction: str, head_dim: int, pattern: str) -> list[Row]:
    wanted = ("ours", direction, head_dim, pattern)
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
    ours = [row for row in rows if (row["contender"], row["direction"]) == ("ours", direction)]
    return [row for row in ours if row["values"] >= AIMED_AT[row["kernel"]]]


def _span(rows: list[Row], figure: str, unit: str, scale: float = 1) -> str:
    """The least and the greatest figure of the right rows; none beside a wrong one."""
    if any(row["status"].startswith("wrong") for row in rows):
        return "wrong results"
    figures = [scale * row[figure] for row in rows if row["status"] == OK]
    if not figures:
        return NOT_YET
    span = " to ".join(dict.fromkeys(f"{end:.0f}" for end in (min(figures), max(figures))))
    return f"{span} {unit}" + (f" ({len(figures)} of {len(rows)} sizes)" if len(figures) < len(rows) else "")


def _in_both(spans: dict[str, str]) -> str:
    if len(set(spans.values())) == 1 and NOT_YET in spans.values():
        return NOT_YET
    return ", ".join(f"{direction} {span}" for direction, span in spans.items())


def put_into(text: str, new: str) -> str:
    """The text with what stands between BEGIN and END replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"docs/measured.md must hold {BEGIN} and {END} once each, around its table of the kernels")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{new}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    """Print, and with --write write. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/measured.md")
    arguments = parser.parse_args(argv)
    new = table(FOLDER)
    print(new, end="")
    if arguments.write:
        page = ROOT / "docs/measured.md"
        page.write_text(put_into(page.read_text(encoding="utf-8"), new), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
