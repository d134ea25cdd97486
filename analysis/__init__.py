"""What `analyze.py` computes, one module a subcommand, and the files that all of them write."""

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file that is there whole or not at all, even if the process is killed.

    Args:
        path: the file to make or replace.
        write: called with the open binary file.
    """
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


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
