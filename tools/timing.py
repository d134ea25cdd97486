"""What the benchmarks share: peak memory, and tables in files."""

import datetime
import json
import math
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from models.speed import Call, Setting
from utils import InputError, check_writable, git_hash, versions, write_text

GRAPH_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile, which have CUDA graphs


def median_ratio(numerators: np.ndarray, denominators: np.ndarray) -> float:
    """Median over the rounds of the ratio within each round."""
    return float(np.median(numerators / denominators))


def peak_mebibytes(run: Call, setting: Setting, *, resident: int = 0) -> float:
    """Memory that a run needs at its worst moment, in MiB.

    On CUDA the caching allocator counts; on a CPU the allocations of PyTorch's CPU allocator that
    its profiler records (scratch memory inside oneDNN and MKL is not among them).

    Args:
        run: a call that has been warmed up.
        setting: says the device; NaN where it replays CUDA graphs, which allocate nothing.
        resident: bytes allocated before, to be added; see `resident_bytes`.
    """
    setting.synchronize()
    if setting.device.type == "cuda":
        if setting.compile_mode in GRAPH_MODES:
            return math.nan
        torch.cuda.reset_peak_memory_stats(setting.device)
        before = torch.cuda.memory_allocated(setting.device)
        run()
        setting.synchronize()
        above = torch.cuda.max_memory_allocated(setting.device) - before
    else:
        with _profile(on_gpu=False, memory=True) as recorded:
            run()
        events = recorded.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        alive = np.cumsum([nbytes for _, nbytes in sorted(changes, key=lambda change: change[0])])
        above = max(0, alive.max(initial=0))
    return float(resident + above) / 2**20


def operations(run: Call, setting: Setting, *, calls: int) -> dict[str, tuple[float, float]]:
    """Calls and own seconds of every operation of a run, by name, the longest first.

    Args:
        run: a call; it is warmed up first.
        setting: says the device; on a GPU its kernels are counted.
        calls: how often the run is called; the means are returned.

    Raises:
        InputError: PyTorch's profiler may not look at the GPU.
    """
    for _ in range(setting.warmup):
        run()
    on_gpu = setting.device.type == "cuda"
    with _profile(on_gpu=on_gpu) as recorded:
        for _ in range(calls):
            run()
        setting.synchronize()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [
        event
        for event in recorded.key_averages()
        if event.device_type == kind and not event.is_user_annotation
    ]
    if not events:
        raise InputError("the profiler records nothing of the GPU: it may lack the permission")
    events.sort(key=lambda event: getattr(event, field), reverse=True)
    return {e.key: (e.count / calls, getattr(e, field) / 1e6 / calls) for e in events}


def _profile(*, on_gpu: bool, memory: bool = False) -> profile:
    # The profiler's own messages, about missing GPUs for one, would land in the table.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    return profile(activities=activities, profile_memory=memory, acc_events=True)


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of a model's weights and of its optimizer's state."""
    states = optimizer.state.values() if optimizer else ()
    values = [*model.state_dict().values(), *(v for state in states for v in state.values())]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


# Reporting --------------------------------------------------------------------------------------


def make_table(rows: Iterable[dict]) -> pd.DataFrame:
    """A line per row, rounded once so that text, CSV and JSON say the same."""
    return pd.DataFrame(list(rows)).dropna(axis=1, how="all").round(6)


def without_seconds(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that have one value a line."""
    return table.drop(columns=[name for name in table if name.endswith("seconds")])


def environment() -> dict:
    """What a figure depends on: date, machine, load, versions, code and command."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "freezing": os.environ.get("TORCHINDUCTOR_FREEZING"),
        "cudnn_attention_last": os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED"),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        **versions(),
        "code": git_hash(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def report_text(table: pd.DataFrame, protocol: list[str], about: dict) -> str:
    """The table ("-": not measured), how it was measured (a sentence a line), and on what."""
    shown = [f"{name}: {value}" for name, value in about.items() if value is not None]
    lines = without_seconds(table).to_string(index=False, na_rep="-")
    return "\n".join([lines, "", *protocol, "", *shown])


def report(
    rows: Iterable[dict], protocol: list[str], about: dict, output_dir: str, name: str
) -> None:
    """Makes a table of the rows, prints it, and writes it as .txt, .csv and .json.

    Args:
        rows: measured while they are taken; the .json has their seconds of every round too.
        protocol: how, a sentence a line.
        about: on what; see `environment`.
        output_dir: folder; "": nothing is written.
        name: first word of the files' names.
    """
    folder = check_writable(output_dir) if output_dir else None  # before the measurement
    table = make_table(rows)
    text = report_text(table, protocol, about)
    print(text)
    if folder is None:
        return
    stamp = datetime.datetime.fromisoformat(about["date"]).strftime("%Y%m%d-%H%M%S")
    stem = folder / f"{name}-{about['device'].partition(':')[0]}-{stamp}"
    content = {"setting": about, "protocol": protocol}
    content["rows"] = json.loads(table.to_json(orient="records", double_precision=15))
    write_text(Path(f"{stem}.txt"), text + "\n")
    write_text(Path(f"{stem}.csv"), without_seconds(table).to_csv(index=False))
    write_text(Path(f"{stem}.json"), json.dumps(content, indent=1) + "\n")
    print(f"written: {stem}.txt, .csv, .json")
