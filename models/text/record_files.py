"""Files of records, as an example's are: JSON lines.

write_records(folder, files)   all files or none
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trunkline.engine.data.store_writer import draft_of, publish


def write_records(folder: Path, files: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, int]:
    """Write the records of each name, and return how many each has.

    Raises DataError if `folder` is there and not empty.
    """
    counts = {}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(folder) as draft:
        for name, records in files.items():
            with (draft / name).open("w", encoding="utf-8") as file:
                counts[name] = sum(
                    bool(file.write(json.dumps(record, ensure_ascii=False) + "\n")) for record in records
                )
        publish(draft, folder)
    return counts
