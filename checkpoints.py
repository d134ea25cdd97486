"""Writing and reading checkpoints, and putting their weights into models."""

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from utils import InputError, logger

SHOWN_KEYS = 8  # differing keys that an error message spells out


def save_atomically(state: dict, path: Path) -> None:
    """Writes a checkpoint that is there whole or not at all, even if the machine goes down.

    Args:
        state: tensors and plain values, as `load_checkpoint` reads.
        path: the file to make or replace.

    Raises:
        OSError: the disk is full or the folder is gone; the file at `path` is as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as problem:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write checkpoint {path}: {_first_line(problem)}") from problem
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
        reason = f"{type(problem).__name__}: {_first_line(problem)}"
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


def _first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints of an output folder from which a run can go on, newest first.

    `Recorder.save` names them by age; the pending one was written whole but not yet renamed.
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
    """The newest checkpoint of an output folder that can be read.

    Args:
        folder: output folder of a run.

    Returns:
        Its path and contents, or None; damaged ones are named in the log, passed over and kept.
    """
    for path in checkpoint_files(folder):
        try:
            return path, load_checkpoint(path)
        except InputError as problem:
            logger.info(f"passed over: {problem}")
    return None


def model_weights(checkpoint: Mapping, *, ema: bool = False) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without a DistributedDataParallel prefix.

    Args:
        checkpoint: as `load_checkpoint` returns it.
        ema: take the moving average of the weights.

    Returns:
        Tensors by parameter name.

    Raises:
        InputError: there is no such state dict.
    """
    key = "model_ema" if ema else "model"
    weights = checkpoint.get(key, None if ema else checkpoint.get("state_dict", checkpoint))
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise InputError(f"the checkpoint holds no weights under '{key}'")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN_KEYS
    return ", ".join(names[:SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Puts weights into a model that must fit them exactly.

    Args:
        model: changed in place.
        weights: tensors by parameter name.
        source: where they come from, for the message.

    Raises:
        InputError: keys or shapes differ; the message says which.
    """
    own = model.state_dict()
    differing = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
            for name, value in own.items()
            if name in weights and weights[name].shape != value.shape
        ],
    }
    problems = [f"{kind}: {_listed(names)}" for kind, names in differing.items() if names]
    if problems:
        raise InputError(f"{source} is for another model; {'; '.join(problems)}")
    model.load_state_dict(dict(weights))


def patch_grid(checkpoint: Mapping) -> tuple[int, int] | None:
    """Rows and columns of patches of the model that wrote a checkpoint; None if it does not say."""
    size = (checkpoint.get("model_args") or {}).get("img_size")
    kernel = model_weights(checkpoint).get("patch_embed.proj.weight")
    if size is None or kernel is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return height // kernel.shape[2], width // kernel.shape[3]


def load_pretrained(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    *,
    grid_size: tuple[int, int] | None = None,
) -> list[str]:
    """Starts a fine-tuning run from weights that need not fit in input size or class count.

    The position embedding is resampled to the model's input size (timm's bicubic), a head of
    another class count is left as it was initialised, and a distillation token's entries are
    left out.

    Args:
        model: changed in place.
        weights: tensors by parameter name.
        source: where they come from, for the message.
        grid_size: rows and columns of patches that they were trained with; None: a square.

    Returns:
        What was not loaded, in words.

    Raises:
        InputError: the weights are for another architecture.
    """
    weights = dict(weights)
    if "dist_token" in weights and "dist_token" not in model.state_dict():
        embedding = weights["pos_embed"]  # class token, distillation token, patches
        weights["pos_embed"] = torch.cat([embedding[:, :1], embedding[:, 2:]], dim=1)
    if grid_size not in (None, model.patch_embed.grid_size) and "pos_embed" in weights:
        weights["pos_embed"] = resample_abs_pos_embed(
            weights["pos_embed"],
            new_size=list(model.patch_embed.grid_size),
            old_size=list(grid_size),
            num_prefix_tokens=0 if model.no_embed_class else model.num_prefix_tokens,
        )
    weights = checkpoint_filter_fn(weights, model)
    own = model.state_dict()
    left_out = [f"{name} (not in the model)" for name in weights if name not in own]
    for name, value in own.items():
        if name not in weights:
            left_out.append(f"{name} (not in the checkpoint)")
        elif weights[name].shape != value.shape:
            shape = tuple(weights[name].shape)
            left_out.append(f"{name} (shape {shape} instead of {tuple(value.shape)})")
    broken = [text for text in left_out if not text.startswith(("head", "dist_token"))]
    if broken:
        raise InputError(f"{source} is for another model; {_listed(broken)}")
    unchanged = {name: own[name] for name in own if name.startswith("head")}
    fitting = {
        name: weights[name]
        for name, value in own.items()
        if name in weights and weights[name].shape == value.shape
    }
    model.load_state_dict(unchanged | fitting)
    for text in left_out:
        logger.info(f"not loaded from {source}: {text}")
    return left_out


def model_from_checkpoint(checkpoint: Mapping, *, ema: bool = False, **overrides) -> nn.Module:
    """Rebuilds the model that wrote a checkpoint of this project, weights included.

    Args:
        checkpoint: as `load_checkpoint` returns it.
        ema: take the moving average of the weights.
        **overrides: model keywords that replace the stored ones, e.g. keep_rate=0.5.

    Returns:
        The model, on the CPU.

    Raises:
        InputError: the checkpoint does not say how its model was made, or does not fit it.
        ValueError: an override is outside its range.
    """
    if "model_args" not in checkpoint:
        raise InputError("the checkpoint does not say how its model was made (no 'model_args')")
    model = timm.create_model(**(checkpoint["model_args"] | overrides))
    load_weights(model, model_weights(checkpoint, ema=ema), "the checkpoint")
    return model
