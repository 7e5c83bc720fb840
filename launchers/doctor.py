"""Say whether training can start on this machine: `python launchers/doctor.py`. Exit status 0: it can; 1: it cannot."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trunkline.engine.machine.doctor import Finding

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    """Examine, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    parser.add_argument("--quick", action="store_true", help="leave out what takes seconds: collectives and imports")
    arguments = parser.parse_args(argv)
    try:
        from trunkline.engine.machine.doctor import can_train, examine
        from trunkline.launchers.entry import status_of
    except ImportError as error:
        print(f"Trunkline is not installed in {sys.executable} ({error}).\n  -> run in {ROOT}: "
              "pip install -c constraints.txt -e .", file=sys.stderr)  # fmt: skip
        return 1

    def report() -> int:
        findings = examine(quick=arguments.quick)
        _print(findings, can_train(findings), arguments.json)
        return 0 if can_train(findings) else 1

    return status_of(report)


def _print(findings: Sequence[Finding], ready: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"can_train": ready, "findings": [asdict(each) for each in findings]}, indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        marks = {"ok": "  ", "warning": "! ", "problem": "X "}
        for finding in findings:
            detail = finding.detail.replace("\n", "\n" + " " * (width + 4))
            print(f"{marks[finding.status]}{finding.name:<{width}}  {detail}")
            if finding.remedy:
                print(f"{'':<{width + 4}}-> {finding.remedy}")
        print("\nTraining can start." if ready else "\nTraining cannot start: see the lines marked X.")


if __name__ == "__main__":
    sys.exit(main())
