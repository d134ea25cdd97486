"""One table of a benchmark: as text, as CSV and as JSON, with everything that explains it."""

import csv
import datetime
import io
import json
import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import PIL
import timm
import torch
import torchvision

from utils import git_hash


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        name: key of the rows and heading.
        digits: decimals that are kept; None: the value as it is.
    """

    name: str
    digits: int | None = None


class Report(NamedTuple):
    """A benchmark's outcome.

    Attributes:
        what: which benchmark.
        columns: of the table, in order; a column without any value is left out.
        rows: one mapping per line by column name, rounded; None where nothing was measured.
        protocol: how it was measured, one sentence a line.
        raw: the single timings, for JSON only.
    """

    what: str
    columns: list[Column]
    rows: list[dict]
    protocol: list[str]
    raw: list[dict]


def line_name(row: dict) -> dict:
    """The columns that tell the lines of a table apart."""
    return {name: row[name] for name in ("reduction", "keep", "size", "batch")}


def make_report(
    what: str, columns: list[Column], rows: list[dict], protocol: list[str], raw: list[dict]
) -> Report:
    """Rounds every value once, so that all three forms say the same; see `Report`."""
    rounded = [{column.name: _rounded(row, column) for column in columns} for row in rows]
    used = [c for c in columns if any(row[c.name] is not None for row in rounded)]
    rows = [{column.name: row[column.name] for column in used} for row in rounded]
    return Report(what, used, rows, protocol, raw)


def _rounded(row: dict, column: Column) -> object:
    value = row.get(column.name)
    return value if column.digits is None or value is None else round(value, column.digits)


def _text(value: object, column: Column) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and column.digits is not None:
        return f"{value:.{column.digits}f}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def table_text(report: Report) -> str:
    """The table with aligned columns: text to the left, numbers to the right."""
    cells = [[_text(row[c.name], c) for c in report.columns] for row in report.rows]
    lines = [[column.name for column in report.columns], *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(report.columns))]
    is_text = [
        any(isinstance(row[column.name], str) for row in report.rows) for column in report.columns
    ]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in lines
    )


def table_csv(report: Report) -> str:
    """The rows as comma-separated values; an empty cell where nothing was measured."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [c.name for c in report.columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows(report.rows)
    return file.getvalue()


def environment(device: torch.device) -> dict:
    """What a figure depends on beside the code: machine, versions, threads, load, date."""
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": [round(value, 2) for value in load] if load else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "code": git_hash(),
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report_text(report: Report, setting: dict) -> str:
    """The table, how it was measured, and on what."""
    shown = [f"{name}: {value}" for name, value in setting.items() if value is not None]
    return "\n".join([table_text(report), "", *report.protocol, "", *shown])


def write_report(report: Report, setting: dict, folder: Path, device: torch.device) -> list[Path]:
    """Writes the report as .txt, .csv and .json, named after what, device and time.

    Args:
        report: what to write.
        setting: of `environment`.
        folder: an existing folder.
        device: where it was measured.

    Returns:
        The three paths.
    """
    stamp = datetime.datetime.fromisoformat(setting["date"]).strftime("%Y%m%d-%H%M%S")
    stem = folder / f"{report.what}-{device.type}-{stamp}"
    content = {
        "what": report.what,
        "setting": setting,
        "protocol": report.protocol,
        "rows": report.rows,
        "raw": report.raw,
    }
    texts = {
        ".txt": report_text(report, setting) + "\n",
        ".csv": table_csv(report),
        ".json": json.dumps(content, indent=1) + "\n",
    }
    paths = []
    for suffix, text in texts.items():
        paths.append(stem.with_name(stem.name + suffix))
        paths[-1].write_text(text)
    return paths
