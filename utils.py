"""Processes, meters, random seeds, and the files that every script writes."""

import argparse
import datetime
import json
import logging
import math
import multiprocessing
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median_low
from types import FrameType
from typing import IO

import numpy as np
import PIL
import timm
import torch
import torch.distributed as dist
import torchvision

logger = logging.getLogger("bat")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_NOT_WRITTEN = 4
AMP_DTYPES = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class InputError(ValueError):
    """Bad input from outside: scripts turn it into one line and exit code 2."""

    is_bad_input = True


class OutputError(OSError):
    """An output file cannot be written; the message has its path and the reason."""


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns whatever fails while something is built from the user's values into an `InputError`."""
    try:
        yield
    except OutputError:
        raise
    except Exception as problem:  # a library refuses odd values in every way there is
        if getattr(problem, "is_bad_input", False):
            raise
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise InputError(f"{what}: {reason:.300}") from problem


# Processes --------------------------------------------------------------------------------------


def get_rank() -> int:
    """Index of this process, 0 without a launcher."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Number of processes, 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """True in the process that prints and writes."""
    return get_rank() == 0


def setup_logging() -> None:
    """Sends the project's messages to standard output: all from rank 0, errors from the others."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it announces every retry
    logger.setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.ERROR)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def init_process(device: str, timeout_minutes: float = 30) -> torch.device:
    """Joins the process group that a launcher such as torchrun describes, if there is one.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1", ...; with several processes "cuda" means the
            process's own GPU.
        timeout_minutes: how long a collective waits for the other processes.

    Returns:
        The device of this process.

    Raises:
        InputError: the device does not exist here, or all processes would share it.
    """
    chosen = find_device(device)
    launched = dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", 1)) > 1
    if launched and not dist.is_initialized():
        dist.init_process_group(
            backend="nccl" if chosen.type == "cuda" else "gloo",
            timeout=datetime.timedelta(minutes=timeout_minutes),
        )
    return chosen


def find_device(device: str) -> torch.device:
    """The device of this process, without joining others; see `init_process`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            torch.zeros(1, device=chosen).item()  # fails where there is none, and on "meta"
    except (NotImplementedError, RuntimeError) as problem:
        raise InputError(f"unknown device '{device}', or there is none here") from problem
    if chosen.type != "cuda":
        return chosen
    if chosen.index is not None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"--device {device} would put every process on one GPU: use --device cuda")
    if not torch.cuda.is_available():
        raise InputError(f"device '{device}' asked for, but no GPU is available")
    index = chosen.index if chosen.index is not None else int(os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise InputError(f"device cuda:{index} asked for, of {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def all_reduce(
    values: list[float], device: torch.device, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> list[float]:
    """Adds numbers over all processes (or takes another reduction of them), in float64."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total, op)
    return total.tolist()


def sum_later(values: torch.Tensor) -> Callable[[], list[float]]:
    """Starts adding numbers over all processes, without waiting for the device.

    Args:
        values: (n,) on the device; with several processes they become the sums.

    Returns:
        What waits for the sums, on their way to the host's memory, and returns them.
    """
    if dist.is_initialized():
        dist.all_reduce(values)
    sums = values.to("cpu", non_blocking=values.is_cuda)
    if not values.is_cuda:
        return sums.tolist
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        return sums.tolist()

    return read


def barrier(device: torch.device) -> None:
    """Waits until every process has come here."""
    all_reduce([0.0], device)


def check_agreement(finding: str, advice: str) -> None:
    """Raises `InputError` in all processes, naming what each found, unless all found the same."""
    if get_world_size() == 1:
        return
    findings = [""] * get_world_size()
    dist.all_gather_object(findings, finding)
    if len(set(findings)) > 1:
        ranks = {text: [r for r, own in enumerate(findings) if own == text] for text in findings}
        words = "; ".join(f"ranks {numbers} found {text}" for text, numbers in ranks.items())
        raise InputError(f"{words}: {advice}")


@contextmanager
def in_turns(device: torch.device) -> Iterator[None]:
    """Runs the body in rank 0 first, then once on every other machine, then in the rest.

    For what one process should prepare (a download, a cache) and the others then find.
    """
    turn = 0 if is_main_process() else 1 if int(os.environ.get("LOCAL_RANK", 0)) == 0 else 2
    for _ in range(turn):
        barrier(device)
    try:
        yield
    finally:
        for _ in range(turn, 3):
            barrier(device)


class StopRequest:
    """Notes a signal that asks the run to stop (SIGTERM, SIGUSR1), for the loop to act on."""

    def __init__(self) -> None:
        """Installs the handlers; only a process's main thread may do that."""
        self.signal_name = ""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    def __call__(self) -> bool:
        """True once a signal has come."""
        return bool(self.signal_name)


def ignore_stop_signals(worker: int) -> None:
    """For loader workers: a signal to the whole process group must not break the last step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Ends loader workers that an exception has left behind.

    At its end Python sends them the SIGTERM that they ignore, and then waits for them.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's handler would raise
    for child in multiprocessing.active_children():
        child.kill()


def run_script(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
    argv: list[str] | None,
) -> int:
    """Parses a command line, runs the script and returns its exit code; bad input is one line."""
    setup_logging()
    args = parser.parse_args(argv)
    try:
        return run(args)
    except OutputError as problem:
        logger.error(f"{parser.prog}: stopped: {problem}")
        return EXIT_NOT_WRITTEN
    except ValueError as problem:
        if not getattr(problem, "is_bad_input", False):
            raise
        parser.error(str(problem))


# Numbers ----------------------------------------------------------------------------------------


def seed_everything(*fields: int) -> None:
    """Seeds every random generator of this process from integers: (seed, rank, epoch, step).

    Called before every step, so that a resumed run draws what an undisturbed one would have drawn
    and no random state has to be stored.
    """
    seed = int(np.random.SeedSequence(fields).generate_state(1, np.uint64)[0] >> 1)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_deterministic() -> None:
    """Makes every later operation reproducible on this machine; slower on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def find_amp(choice: str, device: torch.device) -> str:
    """A key of `AMP_DTYPES`; "auto" means bf16 on GPUs that have it, fp16 on others, else off."""
    if choice != "auto":
        return choice
    if device.type != "cuda":
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


# Meters -----------------------------------------------------------------------------------------


class SmoothedValue:
    """A number's latest values, and its mean over everything it was updated with."""

    def __init__(self, window_size: int = 20, fmt: str = "{median:.4f} ({global_avg:.4f})") -> None:
        """`window_size` values count as the latest; `fmt` names median, avg, global_avg, value."""
        self.deque: deque[float] = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0
        self.fmt = fmt

    def update(self, value: float) -> None:
        self.deque.append(value)
        self.count += 1
        self.total += value

    @property
    def avg(self) -> float:
        """Mean of the latest values."""
        return fmean(self.deque) if self.deque else math.nan

    @property
    def global_avg(self) -> float:
        """Mean of all values."""
        return self.total / self.count if self.count else math.nan

    def __str__(self) -> str:
        latest = self.deque or [math.nan]
        means = {"avg": self.avg, "global_avg": self.global_avg}
        return self.fmt.format(median=median_low(latest), value=latest[-1], **means)

    def state_dict(self) -> dict:
        return {"latest": list(self.deque), "total": self.total, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.deque.clear()
        self.deque.extend(state["latest"])
        self.total, self.count = state["total"], state["count"]


class MetricLogger:
    """Meters by name, and DeiT's progress lines with an ETA."""

    def __init__(self) -> None:
        self.meters: dict[str, SmoothedValue] = defaultdict(SmoothedValue)

    def update(self, **values: float) -> None:
        for name, value in values.items():
            self.meters[name].update(float(value))

    def __str__(self) -> str:
        return "  ".join(f"{name}: {meter}" for name, meter in self.meters.items() if meter.count)

    def state_dict(self) -> dict:
        return {name: meter.state_dict() for name, meter in self.meters.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, meter_state in state.items():
            self.meters[name].load_state_dict(meter_state)

    def log_every(
        self, iterable: Iterable, print_freq: int, *, header: str, total: int, start: int = 0
    ) -> Iterator:
        """Passes items on, from number `start` of `total`, and logs every `print_freq` of them."""
        begin = end = time.perf_counter()
        iteration, loading = SmoothedValue(fmt="{avg:.4f}"), SmoothedValue(fmt="{avg:.4f}")
        width = len(str(total))
        for index, item in enumerate(iterable, start):
            loading.update(time.perf_counter() - end)
            yield item
            iteration.update(time.perf_counter() - end)
            end = time.perf_counter()
            if index % print_freq == 0 or index == total - 1:
                left = datetime.timedelta(seconds=int(iteration.avg * (total - 1 - index)))
                logger.info(
                    f"{header}  [{index:>{width}}/{total}]  eta: {left}  {self}  "
                    f"time: {iteration}  data: {loading}{_memory()}"
                )
        took = end - begin
        per_item = took / max(1, total - start)
        logger.info(
            f"{header} Total time: {datetime.timedelta(seconds=int(took))} ({per_item:.4f} s / it)"
        )


def _memory() -> str:
    if not torch.cuda.is_available():
        return ""
    return f"  max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"


# Files ------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write into an `OutputError` with the path."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, RuntimeError) as problem:
        # torch.save fails at what an OSError left, and has it as its context.
        cause = problem if isinstance(problem, OSError) else problem.__context__
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or str(cause).strip().partition("\n")[0]
        raise OutputError(f"cannot write {path}: {reason}") from problem


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file that is there whole or not at all, even if the machine goes down.

    `write` is called with the open binary file. After an `OutputError` (the disk is full, the
    folder is gone) the file at `path` is as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with writing(path):
            with open(partial, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OutputError:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file as `write_atomically` does."""
    write_atomically(path, lambda file: file.write(text.encode()))


def check_writable(folder: str | Path) -> Path:
    """Makes an output folder; InputError when nothing can be written there."""
    folder = Path(os.path.expanduser(folder))  # pathlib's raises for an unknown user
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        reason = problem.strerror or problem
        raise InputError(f"output folder {folder} cannot be written: {reason}") from problem
    return folder


def read_log(path: Path) -> list[dict]:
    """The lines of a `log.txt`; a last line that was cut off by a crash is left out."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            entries.append(dict(json.loads(line)))
        except (TypeError, ValueError):
            break
    return entries


def git_hash() -> str:
    """Commit of the code that runs, with "-dirty" when files differ from it; "unknown" outside."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, and the device."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "machine": platform.machine(),
        "processor": names[0] if names else platform.processor(),
        "gpu": gpu,
        "cudnn": str(torch.backends.cudnn.version()),
        "threads": str(torch.get_num_threads()),
    }
