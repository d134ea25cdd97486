"""What a run leaves in its output folder."""

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import PIL
import timm
import torch
import torchvision
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from checkpoints import checkpoint_files, load_weights, model_weights, save_atomically
from engine import TrainState, set_keep_rate
from utils import (
    InputError,
    all_reduce,
    get_world_size,
    git_hash,
    is_main_process,
    logger,
    read_log,
    write_atomically,
)


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
            "world_size": get_world_size(),
        }
        self.log_path = folder / "log.txt"
        self.writer: SummaryWriter | None = None

    def start(self, first_epoch: int, extra: dict, *, resumed: bool = False) -> None:
        """Opens the logs for epochs from `first_epoch` on, and notes the arguments.

        Args:
            first_epoch: entries of log.txt from this epoch on are dropped.
            extra: more facts for args.json.
            resumed: the run goes on from a checkpoint. A new one sets an earlier run's log and
                checkpoints aside (previous.*), so that it is never resumed in their place.

        Raises:
            OSError: nothing can be written there.
        """
        facts = self.about | extra | {"versions": versions(), "started": _now()}
        with _naming(self.folder):
            if not resumed:
                log = [self.log_path] if self.log_path.exists() else []
                for path in [*checkpoint_files(self.folder), *log]:
                    path.replace(self.folder / f"previous.{path.name}")
            kept = [entry for entry in read_log(self.log_path) if entry["epoch"] < first_epoch]
            # Always written anew: a crash may have cut off the last line.
            partial = self.log_path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
            partial.replace(self.log_path)
            (self.folder / "args.json").write_text(json.dumps(facts, indent=2) + "\n")
            self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=first_epoch)

    def log_epoch(self, entry: dict) -> None:
        """Appends one epoch, which has a key "epoch", to log.txt and to TensorBoard.

        Raises:
            OSError: the disk is full or the folder is gone.
        """
        with _naming(self.log_path), open(self.log_path, "a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())  # the checkpoint that follows relies on it
        with _naming(self.folder / "tensorboard"):
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

    def save_hits(self, hits: Tensor) -> None:
        """Writes correct.npy: (images,) bool, which images the validated weights get right."""
        path = self.folder / "correct.npy"
        with _naming(path):
            write_atomically(path, lambda file: np.save(file, hits.numpy()))

    def close(self) -> None:
        """Closes the TensorBoard file; `log_epoch` has written all that there is to write."""
        if self.writer is not None:
            with suppress(OSError):
                self.writer.close()


def restore(
    state: TrainState, checkpoint: Mapping, source: str, *, batch_size: int, accum_steps: int
) -> None:
    """Continues an interrupted run: everything but the weights, which the model has already.

    Args:
        state: changed in place.
        checkpoint: as `Recorder.save` wrote it.
        source: where it comes from, for the messages.
        batch_size: images per process and step. Where it or the number of processes differs from
            the interrupted run's, the epoch goes on after as many images, rounded down.
        accum_steps: batches whose gradients make one update.

    Raises:
        InputError: the checkpoint holds weights only, or its training state makes no sense.
    """
    if checkpoint.get("optimizer") is None or "updates" not in checkpoint:
        raise InputError(f"{source} holds no training state: use --finetune, or add --eval")
    try:
        state.load_state_dict(checkpoint)
        world_size = checkpoint.get("world_size", get_world_size())
        before = checkpoint["args"]["batch_size"] * world_size
        step = state.step * before // (batch_size * get_world_size())
        state.step = step // accum_steps * accum_steps
        if state.epoch < 0 or state.step < 0:
            raise ValueError(f"epoch {state.epoch}, step {state.step}")
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise InputError(f"{source} holds a training state of another run: {reason}") from e
    if state.ema is not None and checkpoint.get("model_ema") is not None:
        load_weights(state.ema.module, model_weights(checkpoint, ema=True), source)
    set_keep_rate(state, state.model.keep_rates)
    logger.info(f"resumed {source} at epoch {state.epoch}, step {state.step}")


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


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the path into an OSError: the system's text seldom has it."""
    try:
        yield
    except OSError as problem:
        raise OSError(f"cannot write {path}: {problem.strerror or problem}") from problem


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
