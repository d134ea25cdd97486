"""What the benchmarks share: interleaved rounds, compiled calls, peak memory, tables in files."""

import datetime
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from utils import git_hash, versions

Call = Callable[[], object]


class Setting(NamedTuple):
    """How everything is run and timed."""

    device: torch.device
    dtype: torch.dtype | None = None  # of autocast; None: float32 throughout
    compile_mode: str | None = None  # of torch.compile; None: eager
    repetitions: int = 10  # timed rounds
    warmup: int = 3  # rounds before them that are not timed
    latency_repetitions: int = 50  # timed rounds of single images; 0: no latency
    seed: int = 0  # random seed of weights and images

    def autocast(self):
        """The context in which the models run."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def synchronize(self) -> None:
        """Waits until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# Running ----------------------------------------------------------------------------------------


def compiled(function: Callable, setting: Setting) -> Callable:
    """The function itself, or its compiled form with a cache of its own."""
    if setting.compile_mode is None:
        return function

    def call(*inputs):
        return function(*inputs)

    # torch.compile keeps its graphs by code object. Models of one class would share theirs, reach
    # the limit of recompilations and have the guards of each other checked within the timing.
    call.__code__ = call.__code__.replace()
    graph = torch.compile(call, fullgraph=True, dynamic=False, mode=setting.compile_mode)

    def begin(*inputs):
        if setting.compile_mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        return graph(*inputs)

    return begin


def inference(function: Callable, setting: Setting, *inputs) -> Call:
    """A call without arguments that runs the function on the inputs, without gradients."""
    function = compiled(function, setting)

    def run():
        with torch.inference_mode(), setting.autocast():
            return function(*inputs)

    return run


def time_rounds(
    runs: Sequence[Call], setting: Setting, *, repetitions: int | None = None, calls: int = 1
) -> np.ndarray:
    """Times every run once a round, in a round-robin that starts one further each round.

    The device is synchronised before each start and stop of the clock; a run is called `calls`
    times in between, and the mean counts.

    Returns:
        (runs, repetitions) seconds of the timed rounds, the setting's unless given.
    """
    repetitions = repetitions or setting.repetitions
    times = np.zeros((len(runs), setting.warmup + repetitions))
    for turn in range(times.shape[1]):
        for offset in range(len(runs)):
            index = (turn + offset) % len(runs)
            setting.synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                runs[index]()
            setting.synchronize()
            times[index, turn] = (time.perf_counter() - begin) / calls
    return times[:, setting.warmup :]


def median_ratio(numerators: np.ndarray, denominators: np.ndarray) -> float:
    """Median over the rounds of the ratio within each round."""
    return float(np.median(numerators / denominators))


def peak_mebibytes(run: Call, setting: Setting, *, resident: int = 0) -> float:
    """Memory that a run needs at its worst moment, in MiB.

    On CUDA the caching allocator counts; on a CPU the allocations of PyTorch's CPU allocator that
    its profiler records (scratch memory inside oneDNN and MKL is not among them).

    Args:
        run: a call that has been warmed up.
        setting: says the device.
        resident: bytes allocated before, to be added; see `resident_bytes`.
    """
    setting.synchronize()
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setting.device)
        before = torch.cuda.memory_allocated(setting.device)
        run()
        setting.synchronize()
        above = torch.cuda.max_memory_allocated(setting.device) - before
    else:
        # The profiler's own messages, about missing GPUs for one, would land in the table.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU]
        with profile(activities=activities, profile_memory=True, acc_events=True) as recorded:
            run()
        events = recorded.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        alive = np.cumsum([nbytes for _, nbytes in sorted(changes, key=lambda change: change[0])])
        above = max(0, alive.max(initial=0))
    return float(resident + above) / 2**20


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
    """What a figure depends on beside the flags: date, machine, load, versions, code."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        **versions(),
        "code": git_hash(),
    }


def report_text(table: pd.DataFrame, protocol: list[str], about: dict) -> str:
    """The table ("-": not measured), how it was measured (a sentence a line), and on what."""
    shown = [f"{name}: {value}" for name, value in about.items() if value is not None]
    lines = without_seconds(table).to_string(index=False, na_rep="-")
    return "\n".join([lines, "", *protocol, "", *shown])


def write_report(stem: Path, table: pd.DataFrame, protocol: list[str], about: dict) -> None:
    """Writes stem.txt, stem.csv and stem.json; the last has the seconds of every round too."""
    rows = json.loads(table.to_json(orient="records", double_precision=15))
    content = {"setting": about, "protocol": protocol, "rows": rows}
    Path(f"{stem}.txt").write_text(report_text(table, protocol, about) + "\n")
    Path(f"{stem}.csv").write_text(without_seconds(table).to_csv(index=False))
    Path(f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
