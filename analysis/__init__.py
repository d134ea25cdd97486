"""What `analyze.py` computes, one module a subcommand, and the files that all of them write."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Writes rows of equal keys; floats keep all their digits, lists are joined by spaces.

    Args:
        path: the file to make or replace.
        rows: at least one; the keys of the first become the header.
    """
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in row.items()})
    os.replace(partial, path)


def _cell(value: object) -> object:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
