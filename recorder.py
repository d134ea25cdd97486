"""What a run leaves in its output folder."""

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import timm
import torch
import torchvision
from torch.utils.tensorboard import SummaryWriter

from checkpoints import save_atomically
from engine import TrainState
from utils import InputError, all_reduce, git_hash, is_main_process, read_log


def check_writable(folder: str | Path) -> Path:
    """Makes an output folder.

    Raises:
        InputError: nothing can be written there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        reason = problem.strerror or problem
        raise InputError(f"output folder {folder} cannot be written: {reason}") from problem
    return folder


class Recorder:
    """Writes log.txt, TensorBoard events, checkpoints and the arguments of one run.

    One JSON object an epoch goes to log.txt before the checkpoint of that epoch is written;
    resuming drops the entries that the checkpoint does not know yet: none is doubled or missing.
    """

    def __init__(
        self,
        folder: Path,
        args: argparse.Namespace,
        model_args: dict,
        classes: list[str],
        *,
        keep_checkpoints: int = 1,
    ) -> None:
        """Prepares an existing folder.

        Args:
            folder: where everything goes.
            args: the arguments as typed.
            model_args: keywords of `timm.create_model` that rebuild the model.
            classes: class names by index.
            keep_checkpoints: newest checkpoints to keep, beside the best.
        """
        self.folder = folder
        self.keep_checkpoints = keep_checkpoints
        self.about = {
            "args": vars(args),
            "model_args": model_args,
            "classes": list(classes),
            "git_hash": git_hash(),
        }
        self.log_path = folder / "log.txt"
        self.writer: SummaryWriter | None = None

    def start(self, first_epoch: int, extra: dict) -> None:
        """Opens the logs for epochs from `first_epoch` on, and notes the arguments.

        Args:
            first_epoch: entries from this epoch on are dropped; 0 starts a new log and keeps an
                earlier run's as log.previous.txt.
            extra: more facts for args.json.
        """
        entries = read_log(self.log_path)
        kept = [entry for entry in entries if entry["epoch"] < first_epoch]
        if entries and first_epoch == 0:
            self.log_path.replace(self.folder / "log.previous.txt")
        if len(kept) != len(entries) or not entries:
            partial = self.log_path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
            partial.replace(self.log_path)
        self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=first_epoch)
        facts = self.about | extra | {"versions": versions(), "started": _now()}
        (self.folder / "args.json").write_text(json.dumps(facts, indent=2) + "\n")

    def log_epoch(self, entry: dict) -> None:
        """Appends one epoch, which has a key "epoch", to log.txt and to TensorBoard."""
        with open(self.log_path, "a") as file:
            file.write(json.dumps(entry) + "\n")
        for name, value in entry.items():
            if name == "keep_rate":
                for stage, rate in enumerate(value, 1):
                    self.writer.add_scalar(f"keep_rate/stage_{stage}", rate, entry["epoch"])
            elif name != "epoch" and isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, entry["epoch"])
        self.writer.flush()

    def save(self, state: TrainState) -> None:
        """Writes checkpoint.pth, from which the run can go on exactly.

        The ones before it stay as checkpoint.1.pth (the newest of them), checkpoint.2.pth, ...
        """
        newest = self.folder / "checkpoint.pth"
        pending = self.folder / "checkpoint.pending.pth"
        save_atomically(state.state_dict() | self.about, pending)
        names = [newest, *(self.folder / f"checkpoint.{i}.pth" for i in range(1, 1000))]
        for index in reversed(range(self.keep_checkpoints - 1)):
            if names[index].exists():
                os.replace(names[index], names[index + 1])
        os.replace(pending, newest)

    def save_best(self, state: TrainState) -> None:
        """Writes best.pth: the weights and what rebuilds the model, without the optimizer."""
        whole = state.state_dict()
        kept = {name: whole[name] for name in ("model", "model_ema", "epoch", "best")}
        save_atomically(kept | self.about, self.folder / "best.pth")

    def close(self) -> None:
        """Closes the TensorBoard file."""
        if self.writer is not None:
            self.writer.close()


class CheckpointSchedule:
    """Says after which updates a checkpoint is due, beside the end of every epoch."""

    def __init__(self, interval: str) -> None:
        """Reads the interval.

        Args:
            interval: "500": every 500 updates; "10m": every 10 minutes; "0": never.

        Raises:
            InputError: it is neither.
        """
        number = interval.removesuffix("m")
        try:
            self.interval = float(number) if interval.endswith("m") else int(number)
        except ValueError:
            self.interval = -1
        if self.interval < 0:
            raise InputError(
                f"--checkpoint-interval must be updates (500) or minutes (10m), got '{interval}'"
            )
        self.in_minutes = interval.endswith("m")
        self.last = time.monotonic()

    def due(self, updates: int, device: torch.device) -> bool:
        """Whether to write one now; all processes get the same answer, rank 0's clock decides."""
        if not self.interval:
            return False
        if not self.in_minutes:
            return updates % self.interval == 0
        late = is_main_process() and time.monotonic() - self.last >= 60 * self.interval
        is_due = all_reduce([float(late)], device)[0] > 0
        if is_due:
            self.last = time.monotonic()
        return is_due


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, and the device."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "machine": platform.machine(),
        "gpu": gpu,
        "threads": str(torch.get_num_threads()),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
