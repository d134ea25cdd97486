"""Meters, the rank-aware logger, process groups and seeding."""

import datetime
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

logger = logging.getLogger("bat")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LOST_RANK_WAIT = 3.0  # seconds that survivors wait for each other's sign of life


class InputError(ValueError):
    """Bad input from outside: scripts turn it into one line and exit code 2."""


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
        InputError: the device does not exist here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            torch.empty(0, device=chosen)  # fails where there is none
    except (NotImplementedError, RuntimeError) as problem:
        raise InputError(f"unknown device '{device}', or there is none here") from problem
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"device '{device}' asked for, but no GPU is available")
        index = chosen.index if chosen.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        if index >= torch.cuda.device_count():
            raise InputError(f"device cuda:{index} asked for, of {torch.cuda.device_count()} GPUs")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        # torchrun keeps one store through all restarts, with the addresses of the dead in it.
        store = dist.PrefixStore(f"attempt_{_restart_count(world_size)}", store)
        Survivors.store = store
        dist.init_process_group(
            backend="nccl" if chosen.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    return chosen


def _restart_count(world_size: int) -> str:
    """How often torchrun has restarted the processes; on several nodes each has its own count."""
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(world_size)
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"


class Survivors:
    """Finds out which ranks are gone once a collective has failed."""

    store: dist.Store | None = None

    @classmethod
    def lost_ranks(cls) -> list[int]:
        """Ranks that give no sign of life within a few seconds; called by every survivor.

        The store lives in rank 0 or in the launcher; when it is gone or does not answer, so is
        rank 0. It may then keep whoever asks waiting for ever, hence the thread.
        """
        found: list[list[int]] = []
        thread = threading.Thread(target=lambda: found.append(cls._ask()), daemon=True)
        thread.start()
        thread.join(2 * LOST_RANK_WAIT)
        return found[0] if found else [0]

    @classmethod
    def _ask(cls) -> list[int]:
        try:
            cls.store.set(f"survivor/{get_rank()}", "here")
            time.sleep(LOST_RANK_WAIT)
            ranks = range(get_world_size())
            return [rank for rank in ranks if not cls.store.check([f"survivor/{rank}"])]
        except RuntimeError:
            return [0]


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


def seed_everything(*fields: int) -> None:
    """Seeds every random stream of this process from integers such as (seed, rank, epoch, step).

    Called before every step, so that a resumed run draws what an undisturbed one would have drawn
    and no random state has to be stored.
    """
    seed = int(np.random.SeedSequence(fields).generate_state(1, np.uint64)[0] >> 1)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def all_reduce(
    values: list[float], device: torch.device, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> list[float]:
    """Adds numbers over all processes (or takes another reduction of them), in float64."""
    if get_world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total, op)
    return total.tolist()


def barrier(device: torch.device) -> None:
    """Waits until every process has come here."""
    all_reduce([0.0], device)


def make_deterministic() -> None:
    """Makes every later operation reproducible on this machine; slower on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


class SmoothedValue:
    """A number's latest values, and its mean over everything it was updated with."""

    def __init__(self, window_size: int = 20, fmt: str = "{median:.4f} ({global_avg:.4f})") -> None:
        """Builds the meter.

        Args:
            window_size: how many values count as the latest.
            fmt: how to print it: median, avg, global_avg and value may be named.
        """
        self.deque: deque[float] = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0
        self.fmt = fmt

    def update(self, value: float, n: int = 1) -> None:
        """Adds a value that stands for n of them."""
        self.deque.append(value)
        self.count += n
        self.total += value * n

    @property
    def median(self) -> float:
        """Lower median of the latest values."""
        ordered = sorted(self.deque)
        return ordered[(len(ordered) - 1) // 2] if ordered else float("nan")

    @property
    def avg(self) -> float:
        """Mean of the latest values."""
        return sum(self.deque) / len(self.deque) if self.deque else float("nan")

    @property
    def global_avg(self) -> float:
        """Mean of all values."""
        return self.total / self.count if self.count else float("nan")

    @property
    def value(self) -> float:
        """The last value."""
        return self.deque[-1] if self.deque else float("nan")

    def __str__(self) -> str:
        return self.fmt.format(
            median=self.median, avg=self.avg, global_avg=self.global_avg, value=self.value
        )

    def state_dict(self) -> dict:
        """Plain values that `load_state_dict` takes."""
        return {"latest": list(self.deque), "total": self.total, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        """Continues where `state_dict` was taken."""
        self.deque.clear()
        self.deque.extend(state["latest"])
        self.total, self.count = state["total"], state["count"]


class MetricLogger:
    """Meters by name, and DeiT's progress lines with an ETA."""

    def __init__(self) -> None:
        """Starts without meters."""
        self.meters: dict[str, SmoothedValue] = defaultdict(SmoothedValue)

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Adds a meter with a format of its own."""
        self.meters[name] = meter

    def update(self, **values: float) -> None:
        """Updates meters by name."""
        for name, value in values.items():
            self.meters[name].update(float(value))

    def __str__(self) -> str:
        return "  ".join(f"{name}: {meter}" for name, meter in self.meters.items())

    def averages(self) -> dict[str, float]:
        """Mean of every meter."""
        return {name: meter.global_avg for name, meter in self.meters.items()}

    def state_dict(self) -> dict:
        """Plain values that `load_state_dict` takes."""
        return {name: meter.state_dict() for name, meter in self.meters.items()}

    def load_state_dict(self, state: dict) -> None:
        """Continues where `state_dict` was taken."""
        for name, meter_state in state.items():
            self.meters[name].load_state_dict(meter_state)

    def log_every(
        self, iterable: Iterable, print_freq: int, *, header: str, total: int, start: int = 0
    ) -> Iterator:
        """Passes items on and logs a line every `print_freq` of them, and after the last.

        Args:
            iterable: the items from number `start` on.
            print_freq: items between lines.
            header: first words of every line.
            total: number of the last item plus one.
            start: number of the first item.
        """
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


def read_log(path: Path) -> list[dict]:
    """The lines of a `log.txt`; a last line that was cut off by a crash is left out."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries
