"""A run's folder: what is written there, and how a run or a model comes back from it."""

import argparse
import datetime
import json
import os
import pickle
import re
import textwrap
import time
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from engine import TrainState, set_keep_rate
from models import BATVisionTransformer
from utils import (
    InputError,
    all_reduce,
    get_world_size,
    git_hash,
    is_main_process,
    logger,
    read_log,
    versions,
    write_atomically,
    writing,
)

# Flags whose values a resumed run takes from its optimizer and scheduler, not from the command.
SCHEDULE_FLAGS = (
    "opt", "opt_eps", "opt_betas", "momentum", "weight_decay", "sched", "lr", "unscale_lr",
    "min_lr", "warmup_lr", "warmup_epochs", "cooldown_epochs", "decay_epochs", "decay_rate",
    "lr_noise", "lr_noise_pct", "lr_noise_std", "epochs",
)  # fmt: skip

# Reading ----------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint to the CPU without running anything stored in it.

    Args:
        path: a file, or an http(s) address. This project's checkpoints, DeiT's and EViT's, and
            bare state dicts are all read.

    Returns:
        The stored mapping.

    Raises:
        InputError: the file is missing, damaged, or not a checkpoint.
    """
    path = str(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            if path.startswith(("http://", "https://")):
                checkpoint = torch.hub.load_state_dict_from_url(
                    path, map_location="cpu", check_hash=True, weights_only=True
                )
            else:
                _check_archive(path)
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as problem:
        raise InputError(f"no such checkpoint: {path}") from problem
    except pickle.UnpicklingError as problem:  # its message advises to run what is stored
        raise InputError(
            f"checkpoint {path} cannot be read: it is damaged, or holds more than tensors and "
            "plain values"
        ) from problem
    except Exception as problem:  # damaged files fail in every way that a reader can
        reason = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"
        raise InputError(f"checkpoint {path} cannot be read ({reason})") from problem
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        raise InputError(f"checkpoint {path} holds a {type(checkpoint).__name__}, not weights")
    if not isinstance(checkpoint.get("model_args") or {}, Mapping):
        raise InputError(f"checkpoint {path}: its model_args are {checkpoint['model_args']!r:.80}")
    return checkpoint


def _check_archive(path: str) -> None:
    """Compares the checksums in a zip archive, which `torch.load` does not look at."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"damaged: {damaged} does not match its checksum")


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints of an output folder from which a run can go on, newest first.

    `RunFolder.save` names them by age; the pending one was written whole but not yet renamed.
    """
    numbered = {
        int(match[1]): path
        for path in folder.glob("checkpoint.*.pth")
        if (match := re.fullmatch(r"checkpoint\.(\d+)\.pth", path.name))
    }
    newest = [folder / "checkpoint.pending.pth", folder / "checkpoint.pth"]
    older = [numbered[index] for index in sorted(numbered)]
    return [path for path in newest + older if path.is_file()]


def latest_checkpoint(folder: Path) -> tuple[Path, dict] | None:
    """Path and contents of the newest checkpoint of an output folder that can be read, or None.

    Damaged ones are named in the log, passed over and kept.
    """
    for path in checkpoint_files(folder):
        try:
            return path, load_checkpoint(path)
        except InputError as problem:
            logger.info(f"passed over: {problem}")
    return None


class StartingPoint(NamedTuple):
    """Where a run starts: a checkpoint's path and contents, "" and {} for none."""

    source: str
    checkpoint: dict
    resumes: bool  # goes on with that run, or evaluates it; False: takes its weights alone


def starting_point(args: argparse.Namespace) -> StartingPoint:
    """The checkpoint that `--resume` names, or else the one that `--finetune` does."""
    if args.resume == "auto":
        found = latest_checkpoint(Path(args.output_dir)) if args.output_dir else None
        if found is not None:
            return StartingPoint(str(found[0]), found[1], True)
    resumes = args.resume not in ("", "auto")
    source = args.resume if resumes else args.finetune
    return StartingPoint(source, load_checkpoint(source) if source else {}, resumes)


# Models -----------------------------------------------------------------------------------------


def model_weights(checkpoint: Mapping, *, ema: bool = False) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without a DistributedDataParallel prefix.

    `ema` takes the exponential moving average; `InputError` where there is no such state dict.
    """
    key = "model_ema" if ema else "model"
    weights = checkpoint.get(key, None if ema else checkpoint.get("state_dict", checkpoint))
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise InputError(f"the checkpoint holds no weights under '{key}'")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def build_model(model_args: Mapping, *, reducing: bool = True) -> nn.Module:
    """`timm.create_model(**model_args)`; what does not fit or (`reducing`) reduce: `InputError`."""
    name = model_args["model_name"]
    own = ", ".join(timm.list_models(module="bat"))
    if not timm.is_model(name):
        raise InputError(f"unknown model '{name}'; choose from {own}")
    try:
        model = timm.create_model(**model_args)
    except (TypeError, ValueError, AssertionError) as problem:
        raise InputError(f"cannot build {name}: {problem}") from problem
    if not reducing:
        return model
    if not isinstance(model, BATVisionTransformer):
        raise InputError(
            f"'{name}' does not reduce tokens; choose from {own} "
            "(with --reduction none they are plain DeiT)"
        )
    if 0 in model.patch_embed.grid_size:
        size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
        raise InputError(f"cannot build {name}: img_size {size} is smaller than a patch, {patch}")
    return model


def model_from_checkpoint(
    checkpoint: Mapping,
    *,
    ema: bool = False,
    source: str = "the checkpoint",
    new_head: bool = False,
    reducing: bool = True,
    **overrides: object,
) -> nn.Module:
    """Rebuilds the model of a checkpoint with its weights: the only way back from a file.

    A position embedding of another input size is resampled from the grid that it was trained on.

    Args:
        checkpoint: as `load_checkpoint` returns it; an empty one gives random weights.
        ema: take the exponential moving average of the weights.
        source: where the checkpoint comes from, for the messages.
        new_head: a head of another class count, and a distillation token, may be left out (for
            fine-tuning); what is not loaded is logged.
        reducing: refuse a model that does not reduce its tokens.
        **overrides: model keywords that replace the stored ones, e.g. keep_rate=0.5.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        InputError: the checkpoint does not say how its model was made, does not fit it, or a
            keyword is out of range.
    """
    if ema and not checkpoint:
        raise InputError("--ema needs a checkpoint: random weights have no moving average")
    stored = dict(checkpoint.get("model_args") or {})
    model_args = stored | overrides
    if "model_name" not in model_args:
        raise InputError(f"{source} does not say how its model was made (no 'model_args')")
    weights = model_weights(checkpoint, ema=ema) if checkpoint else {}
    if "head.bias" in weights:
        model_args.setdefault("num_classes", len(weights["head.bias"]))
    model = build_model(model_args, reducing=reducing)
    if checkpoint:
        grid = _patch_grid(stored.get("img_size"), weights)
        fit_weights(model, weights, source, old_grid=grid, new_head=new_head)
    return model.eval()


def _patch_grid(img_size: object, weights: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Rows and columns of patches that weights were trained with; None if nothing says it."""
    kernel = weights.get("patch_embed.proj.weight")
    if img_size is None or kernel is None:
        return None
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return height // kernel.shape[2], width // kernel.shape[3]


def fit_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    *,
    old_grid: tuple[int, int] | None = None,
    new_head: bool = False,
) -> None:
    """Puts weights into a model; the position embedding is resampled to its grid of patches.

    Args:
        model: changed in place, or not at all.
        weights: tensors by parameter name.
        source: where they come from, for the messages.
        old_grid: rows and columns of patches that they were trained with; None: a square.
        new_head: a head or a distillation token that does not fit is left out, and logged.

    Raises:
        InputError: the weights are for another architecture; the message names what differs.
    """
    own = model.state_dict()
    if isinstance(model, VisionTransformer):
        weights = _fit_positions(model, dict(weights), old_grid, drop_distillation=new_head)
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    reshaped = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    replaceable = ("head", "dist_token") if new_head else ()
    differing = [*missing, *unexpected, *reshaped]
    if not all(name.startswith(replaceable) for name in differing):
        shapes = [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
            for name in reshaped
        ]
        kinds = {"of another shape": shapes, "missing": missing, "unexpected": unexpected}
        words = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
        words = textwrap.shorten(words, 400, placeholder=" and more")
        raise InputError(f"{source} is for another model; {words}")
    model.load_state_dict(own | {n: weights[n] for n in own if n not in differing})
    if differing:
        logger.info(f"not loaded from {source}: {', '.join(differing)}")


def _fit_positions(
    model: VisionTransformer,
    weights: dict[str, Tensor],
    old_grid: tuple[int, int] | None,
    *,
    drop_distillation: bool,
) -> dict[str, Tensor]:
    """The weights with a position embedding for the model's tokens; DeiT's names made timm's."""
    embedding = weights.get("pos_embed")
    if drop_distillation and "dist_token" in weights and not hasattr(model, "dist_token"):
        embedding = torch.cat([embedding[:, :1], embedding[:, 2:]], dim=1)  # class token, patches
    if embedding is not None and old_grid not in (None, model.patch_embed.grid_size):
        embedding = resample_abs_pos_embed(
            embedding,
            new_size=list(model.patch_embed.grid_size),
            old_size=list(old_grid),
            num_prefix_tokens=0 if model.no_embed_class else model.num_prefix_tokens,
        )
    if embedding is not None:
        weights["pos_embed"] = embedding
    return checkpoint_filter_fn(weights, model)


# Resuming ---------------------------------------------------------------------------------------


def restore(state: TrainState, checkpoint: Mapping, source: str, args: argparse.Namespace) -> None:
    """Continues an interrupted run: everything but the weights, which the model has already.

    Where the batch or the number of processes differs from the interrupted run's, the epoch goes on
    after as many images, rounded down, and the learning rates stay.

    Args:
        state: changed in place.
        checkpoint: as `RunFolder.save` wrote it.
        source: where it comes from, for the messages.
        args: reads batch_size, accum_steps and the schedule's flags.

    Raises:
        InputError: the checkpoint holds weights only, its training state makes no sense, or the
            flags ask for another schedule.
    """
    if checkpoint.get("optimizer") is None or "updates" not in checkpoint:
        raise InputError(f"{source} holds no training state: use --finetune, or add --eval")
    own = state.model.state_dict()
    if any(own[n].shape != value.shape for n, value in model_weights(checkpoint).items()):
        raise InputError(f"{source} was trained at another input size: use --finetune")
    try:
        _check_schedule(checkpoint["args"], args, source)
        state.load_state_dict(checkpoint)
        stored = checkpoint["args"]
        before = (stored["batch_size"], checkpoint["world_size"], stored["accum_steps"])
        now = (args.batch_size, get_world_size(), args.accum_steps)
        images = state.step * before[0] * before[1]  # of the epoch that are done
        state.step = images // (now[0] * now[1]) // args.accum_steps * args.accum_steps
        if state.epoch < 0 or state.step < 0:
            raise ValueError(f"epoch {state.epoch}, step {state.step}")
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise InputError(f"{source} holds a training state of another run: {reason}") from e
    if state.ema is not None and checkpoint.get("model_ema") is not None:
        fit_weights(state.ema.module, model_weights(checkpoint, ema=True), source)
    set_keep_rate(state, state.model.keep_rates)
    logger.info(f"resumed {source} at epoch {state.epoch}, step {state.step}")
    if before != now:
        logger.info(
            f"batch size, processes and gradient accumulation steps were {before} and are {now}: "
            "the epoch goes on after as many images, the learning rates stay"
        )


def _check_schedule(stored: Mapping, args: argparse.Namespace, source: str) -> None:
    """Refuses flags that ask for another schedule than the one that is resumed, but more epochs."""
    changed = [n for n in SCHEDULE_FLAGS if n in stored and stored[n] != getattr(args, n)]
    words = ", ".join(
        f"--{n.replace('_', '-')} was {stored[n]} and is {getattr(args, n)}" for n in changed
    )
    if changed == ["epochs"] and args.epochs > stored["epochs"]:
        logger.info(f"{words}; the learning rate schedule stays the one of before")
    elif changed:
        raise InputError(
            f"{source} goes on with its own schedule, but {words}: repeat the run's flags, or "
            "start another run with --finetune"
        )


class CheckpointSchedule:
    """Says after which updates a checkpoint is due, beside the end of every epoch."""

    def __init__(self, interval: str) -> None:
        """Reads "500" (every 500 updates), "10m" (every 10 minutes) or "0" (never)."""
        if not re.fullmatch(r"\d+|\d+(\.\d+)?m", interval):
            raise InputError(
                f"--checkpoint-interval must be updates (500) or minutes (10m), got '{interval}'"
            )
        self.in_minutes = interval.endswith("m")
        self.interval = float(interval.removesuffix("m"))
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


# Writing ----------------------------------------------------------------------------------------


class RunFolder:
    """Writes log.txt, TensorBoard events, checkpoints and the arguments of one run.

    One JSON object an epoch goes to log.txt before the checkpoint of that epoch is written;
    resuming drops the entries that the checkpoint does not know yet: none is doubled or missing.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, **about: object) -> None:
        """Prepares an existing folder.

        Args:
            folder: where to write.
            args: kept as typed.
            **about: plain values for every checkpoint: model_args, which rebuild the model;
                data_config, of its inputs; classes, their names; training_mode.
        """
        self.folder = folder
        self.keep_checkpoints = args.keep_checkpoints
        self.about = {
            "args": vars(args),
            "git_hash": git_hash(),
            "world_size": get_world_size(),
        } | about
        self.log_path = folder / "log.txt"
        self.writer: SummaryWriter | None = None

    def start(self, first_epoch: int, facts: dict, *, source: str = "") -> None:
        """Opens the logs for epochs from `first_epoch` on, and notes the arguments.

        Args:
            first_epoch: entries of log.txt from this epoch on are dropped.
            facts: more facts for args.json.
            source: the checkpoint that the run goes on from, or "". Unless it is one of this
                folder, a run that the folder holds is set aside whole, as previous-N/.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        facts = self.about | facts | {"versions": versions(), "resumed": source, "started": now}
        with writing(self.folder):
            if not source or Path(source).resolve().parent != self.folder.resolve():
                self._set_aside()
            kept = [entry for entry in read_log(self.log_path) if entry["epoch"] < first_epoch]
            lines = "".join(json.dumps(entry) + "\n" for entry in kept)
            # Always written anew: a crash may have cut off the last line.
            write_atomically(self.log_path, lambda file: file.write(lines.encode()))
            text = json.dumps(facts, indent=2) + "\n"
            write_atomically(self.folder / "args.json", lambda file: file.write(text.encode()))
            self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=first_epoch)

    def _set_aside(self) -> None:
        names = ("best.pth", "log.txt", "args.json", "correct.npy", "tensorboard")
        files = checkpoint_files(self.folder) + [self.folder / name for name in names]
        found = [path for path in files if path.exists()]
        if not read_log(self.log_path) and not any(path.suffix == ".pth" for path in found):
            return  # it did not come far
        number = 1
        while (previous := self.folder / f"previous-{number}").exists():
            number += 1
        previous.mkdir()
        for path in found:
            path.replace(previous / path.name)
        logger.info(f"{self.folder} holds another run: moved to {previous}")

    def log_epoch(self, entry: dict) -> None:
        """Appends one epoch, which has a key "epoch", to log.txt and to TensorBoard."""
        with writing(self.log_path), open(self.log_path, "a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())  # the checkpoint that follows relies on it
        with writing(self.folder / "tensorboard"):
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
        older = [self.folder / f"checkpoint.{i}.pth" for i in range(1, self.keep_checkpoints)]
        newest, pending = self.folder / "checkpoint.pth", self.folder / "checkpoint.pending.pth"
        self._write(state.state_dict(), pending)
        with writing(newest):
            for younger, path in reversed(list(pairwise([newest, *older]))):
                if younger.exists():
                    os.replace(younger, path)
            os.replace(pending, newest)

    def save_best(self, state: TrainState) -> None:
        """Writes best.pth: the weights and what rebuilds the model, without the optimizer.

        Its model_args have the keep rates that the weights were evaluated at.
        """
        whole = state.state_dict()
        kept = {name: whole[name] for name in ("model", "model_ema", "epoch", "best")}
        kept["model_args"] = self.about["model_args"] | {"keep_rate": state.model.keep_rates}
        self._write(kept, self.folder / "best.pth")

    def _write(self, contents: dict, path: Path) -> None:
        write_atomically(path, lambda file: torch.save(self.about | contents, file))

    def save_correct(self, correct: Tensor | None) -> None:
        """Writes correct.npy: (images,) bool, which images the weights get right; None: unknown."""
        path = self.folder / "correct.npy"
        if correct is None:
            path.unlink(missing_ok=True)
        else:
            write_atomically(path, lambda file: np.save(file, correct.numpy()))

    def close(self) -> None:
        """Closes the TensorBoard file; `log_epoch` has written all that there is to write."""
        if self.writer is not None:
            with suppress(OSError):
                self.writer.close()
