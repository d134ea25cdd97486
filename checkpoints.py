"""A run's folder: what is written there, and how a run or a model comes back from it."""

import argparse
import copy
import datetime
import json
import math
import os
import pickle
import re
import sys
import textwrap
import time
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch
import torch.distributed as dist
from timm.layers import resample_abs_pos_embed
from timm.models import eva
from timm.models._hub import (
    download_cached_file,
    download_from_hf,
    load_cfg_from_json,
    load_state_dict_from_hf,
    load_state_dict_from_path,
)
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from engine import TrainState
from models import REDUCTIONS, make_reducing
from models.vit import REDUCTION_KEYWORDS, check_convertible
from models.weights import (
    EVO_SETTINGS,
    WEIGHT_SOURCES,
    from_evo_names,
    merged_settings,
    shown_settings,
    with_timms_names,
)
from utils import (
    InputError,
    MetricLogger,
    all_reduce,
    get_world_size,
    git_hash,
    is_main_process,
    logger,
    read_log,
    refusing,
    versions,
    write_atomically,
    write_text,
    writing,
)

# Flags whose values a resumed run takes from its optimizer and scheduler, not from the command.
SCHEDULE_FLAGS = (
    "opt", "opt_eps", "opt_betas", "momentum", "weight_decay", "sched", "lr", "unscale_lr",
    "min_lr", "warmup_lr", "warmup_epochs", "cooldown_epochs", "decay_epochs", "decay_rate",
    "lr_noise", "lr_noise_pct", "lr_noise_std", "epochs",
)  # fmt: skip
PENDING = "checkpoint.pending.pth"  # whole, but not yet in its place
AGREE_EVERY = 10  # updates between asking rank 0's clock, which waits for the device
MOST_BLOCKS = 1000
HUB_INPUTS = ("crop_pct", "mean", "std", "interpolation", "crop_mode")
MOST_PIXELS = 2**13  # a side
# What an optimizer's parameter groups must agree in with the flags.
HYPERPARAMETERS = ("weight_decay", "betas", "eps", "momentum")
# What a scheduler's state may differ in from the flags': the epochs and the batch decide it.
RESCALED = ("base_values", "warmup_steps", "t_initial", "decay_t", "noise_range_t")
# What the reduction was where a checkpoint of this project does not say it: its first defaults.
FIRST_REDUCTION = {
    "reduction": "bat", "keep_rate": 0.7, "reduction_loc": (3, 6, 9), "cluster_ratio": 0.4,
    "match_ratio": 0.1, "merge_weights": "importance", "features": "tokens",
    "density_neighbors": 5, "proportional_attention": "off", "reduction_seed": 0,
}  # fmt: skip
# Plain values in the `args` of DeiT's and EViT's runs. NumPy and Python have moved these types from
# module to module, so all their names are listed. Paths are read as PurePosixPath: mere text.
SAFE_GLOBALS = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdSU"},
    *((np.float64().__reduce__()[0], f"numpy.{n}.multiarray.scalar") for n in ("core", "_core")),
    *(
        (PurePosixPath, f"{module}.{kind}Path")
        for module in ("pathlib", "pathlib._local")
        for kind in ("Posix", "PurePosix", "Windows", "PureWindows")
    ),
]

# Reading ----------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint to the CPU without running anything stored in it.

    Args:
        path: a file, an http(s) address, hf-hub:OWNER/NAME, or a folder as
            `timm.models.save_for_hf` writes it. This project's checkpoints, DeiT's, EViT's and
            Evo-ViT's, facebook's and timm's DeiT-III and DINOv2, and bare state dicts
            (.safetensors too) are all read.

    Returns:
        What is stored, in one layout: under "model" (and "model_ema") weights by timm's names, and
        dicts, empty where nothing is known, under "args", "model_args" (of other projects' files
        what the weights and EViT's args say, without "model_name") and "data_config".

    Raises:
        InputError: the file is missing, damaged, or not a checkpoint.
    """
    path = file = str(path)
    try:
        silent = warnings.catch_warnings(action="ignore")  # of tensors that are refused below
        with torch.serialization.safe_globals(SAFE_GLOBALS), silent:
            if path.startswith(("http://", "https://")):
                file = download_cached_file(path, check_hash=True)
            if path.startswith("hf-hub:") or os.path.isdir(file):
                checkpoint = _read_hub(file)
            elif not os.path.isfile(file):
                raise FileNotFoundError
            elif file.endswith(".safetensors"):
                checkpoint = safetensors.torch.load_file(file)
            else:
                _check_archive(file)
                checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, Mapping) or not checkpoint:
            raise InputError(f"it holds a {type(checkpoint).__name__}, not weights")
        return _in_one_layout(checkpoint)
    except FileNotFoundError as problem:
        raise InputError(f"no such checkpoint: {path}") from problem
    except pickle.UnpicklingError as problem:  # its message advises to run what is stored
        reason = _refused_types(file, problem)
    except InputError as problem:
        reason = str(problem)
    except Exception as problem:  # damaged files fail in every way that a reader can
        reason = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"
    raise InputError(f"checkpoint {path} cannot be read: {reason}")


def _read_hub(source: str) -> dict:
    """Weights and settings of `hf-hub:OWNER/NAME`, or of a folder of `timm.models.save_for_hf`.

    The reduction's settings are in its config.json where `tools.export --format hf` wrote it.
    """
    if source.startswith("hf-hub:"):
        name = source.removeprefix("hf-hub:")
        with refusing("neither the hub nor its cache gives it (a file or folder can be given too)"):
            config = load_cfg_from_json(download_from_hf(name, "config.json"))
            weights = load_state_dict_from_hf(name, weights_only=True)
    else:
        if not os.path.exists(Path(source, "config.json")):
            raise InputError("it is a folder without config.json: name one of its files")
        config = load_cfg_from_json(Path(source, "config.json"))
        weights = load_state_dict_from_path(Path(source))
    known = config["pretrained_cfg"]
    settings = {
        "model_name": config["architecture"],
        "num_classes": config["num_classes"],
        "img_size": tuple(known["input_size"][1:]),
    }
    settings |= config.get("model_args", {}) | config.get("reduction", {})
    data_config = {name: known[name] for name in HUB_INPUTS if name in known}
    return {"model": weights, "model_args": settings, "data_config": data_config}


def _check_archive(path: str) -> None:
    """Refuses a zip archive that `torch.load` would read with damage, or into too much memory."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # as torch.load tells them apart
            return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        names = {record.filename.lower() for record in records}  # torch ignores the case
        if len(names) < len(records):
            raise InputError("it is damaged: two of its records have one name")
        if any(record.external_attr & 0x10 for record in records):  # torch reads nothing of it
            raise InputError("it is damaged: one of its records is marked as a folder")
        if sum(record.file_size for record in records) > os.path.getsize(path):
            raise InputError("its records claim to be larger than the file")
        if (damaged := archive.testzip()) is not None:
            raise InputError(f"it is damaged: {damaged} does not match its checksum")
        orders = [r for r in records if r.filename.endswith("/byteorder")]
        if any(archive.read(record) != sys.byteorder.encode() for record in orders):
            raise InputError("its numbers are in the byte order of another machine")


def _refused_types(path: str, problem: pickle.UnpicklingError) -> str:
    """Says which types were refused, and how to save the weights without them."""
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            refused = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file of before torch 1.6, or a damaged one
        refused = re.findall(r"GLOBAL (\S+) ", str(problem))
    if not refused:
        return "it is damaged, or holds more than tensors and plain values"
    return (
        f"it holds {', '.join(sorted(refused))}, and reading that could run code. If you trust "
        'its source, save the weights alone: python -c "import torch; c = '
        f"torch.load('{path}', weights_only=False); torch.save(c.get('model', c), 'weights.pth')\""
    )


def _in_one_layout(stored: Mapping) -> dict:
    """The contents of a checkpoint as `load_checkpoint` returns them; InputError: senseless."""
    is_bare = "model" not in stored and "state_dict" not in stored
    checkpoint = {"model": stored} if is_bare else dict(stored)
    args = _plain_dict(checkpoint, "args")
    stored_weights = model_weights(checkpoint)
    weights = from_evo_names(stored_weights)
    shown = shown_settings(weights)
    settings = _plain_dict(checkpoint, "model_args")
    if checkpoint.get("model_args") is None:  # another project's
        settings = shown and _settings_in_args(args) | shown
        if weights is not stored_weights:
            settings |= EVO_SETTINGS
        weights = with_timms_names(weights, shown)
        if checkpoint.get("model_ema") is not None:
            average = from_evo_names(model_weights(checkpoint, ema=True))
            average = with_timms_names(average, shown)
            checkpoint["model_ema"] = average
    else:
        for name in shown.keys() & settings.keys() & {"embed_dim", "depth"}:
            if settings[name] != shown[name]:
                raise InputError(f"its {name} is {settings[name]}, its weights' {shown[name]}")
        # At first the names of this project were the only reducing ones.
        if "reduction" in settings or str(settings.get("model_name")).startswith("bat_"):
            settings = FIRST_REDUCTION | settings
    crop = args.get("eval_crop_ratio")  # what runs say that store no data_config
    data_config = _plain_dict(checkpoint, "data_config") or ({"crop_pct": crop} if crop else {})
    settings = {name: settings[name] for name in settings if name not in WEIGHT_SOURCES}
    known = {"args": args, "model_args": settings, "data_config": data_config}
    checkpoint |= known | {"model": weights}
    _check_values(checkpoint)
    return checkpoint


def _check_values(checkpoint: Mapping) -> None:
    """Refuses values that make no sense, whatever the checkpoint is read for."""
    classes = checkpoint.get("classes") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InputError("its classes are not a list of names")
    for mode in (checkpoint.get("training_mode"), checkpoint["args"].get("train_mode")):
        if not isinstance(mode, bool | None):
            raise InputError(f"its training mode is a {type(mode).__name__}")
    settings = checkpoint["model_args"] | checkpoint["data_config"]
    for name, value in settings.items():  # numbers, words, and lists of them
        parts = value if isinstance(value, list | tuple) else [value]
        is_plain = all(isinstance(part, str | int | float | None) for part in parts)
        if not is_plain or any(isinstance(p, float) and not math.isfinite(p) for p in parts):
            raise InputError(f"its {name} is no plain value")
    size = settings.get("img_size", 1)
    sides = [size] if isinstance(size, int) else size
    if len(sides) not in (1, 2) or not all(type(n) is int and 0 < n <= MOST_PIXELS for n in sides):
        raise InputError(f"its img_size is {size!r:.80}")


def _plain_dict(checkpoint: Mapping, name: str) -> dict:
    """A dict or Namespace of a checkpoint as a dict; {} if it has none."""
    value = checkpoint.get(name)
    value = vars(value) if isinstance(value, argparse.Namespace) else value
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(f"its {name} are a {type(value).__name__}, not values by name")
    return dict(value)


def _settings_in_args(args: Mapping) -> dict:
    """Keywords of the model that the args of a run of DeiT or EViT say."""
    settings = {}
    if "input_size" in args:
        settings["img_size"] = (args["input_size"],) * 2
    if "base_keep_rate" in args:
        settings["keep_rate"] = args["base_keep_rate"]
    if "fuse_token" in args:
        settings["reduction"] = "evit" if args["fuse_token"] else "topk"
    if "drop_loc" in args:
        words = re.findall(r"-?\w+", str(args["drop_loc"]))
        settings["reduction_loc"] = tuple(int(word) for word in words)
    return settings


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints of an output folder from which a run can go on, newest first.

    `RunFolder.save` names them by age; the pending one was written whole but not yet renamed.
    """
    numbered = {
        int(match[1]): path
        for path in folder.glob("checkpoint.*.pth")
        if (match := re.fullmatch(r"checkpoint\.(\d+)\.pth", path.name))
    }
    newest = [folder / PENDING, folder / "checkpoint.pth"]
    older = [numbered[index] for index in sorted(numbered)]
    return [path for path in newest + older if os.path.isfile(path)]


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


def starting_point(args: argparse.Namespace, output_dir: Path | None) -> StartingPoint:
    """The checkpoint that `--resume` names, or else the one that `--finetune` does."""
    if args.resume == "auto":
        has_folder = output_dir is not None and os.path.isdir(output_dir)
        found = latest_checkpoint(output_dir) if has_folder else None
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
        isinstance(name, str) and isinstance(value, Tensor) and _is_plain(value)
        for name, value in weights.items()
    ):
        raise InputError(f"the checkpoint holds no weights under '{key}'")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def _is_plain(tensor: Tensor) -> bool:
    is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return is_dense and not tensor.is_complex() and not tensor.is_quantized


def build_model(model_args: Mapping, *, reducing: bool = True) -> nn.Module:
    """The model of timm with these keywords, and (`reducing`) those of `make_reducing`.

    Raises:
        InputError: it does not exist, a keyword does not fit it, or it cannot reduce.
    """
    name = model_args["model_name"]
    if not isinstance(name, str) or not timm.is_model(name):
        own = ", ".join(timm.list_models(module="bat"))
        raise InputError(f"unknown model '{name}'; choose one of timm's plain ViTs, or {own}")
    own_method = str(model_args.get("reduction"))
    if ":" in own_method and own_method not in REDUCTIONS:  # no file has code imported
        raise InputError(f"the method is code of one's own: give --reduction {own_method}")
    what = f"cannot build {name}"
    if model_args.get("pretrained"):
        known = timm.get_pretrained_cfg(name)
        place = known.hf_hub_id or known.url or "nowhere"
        what += f" with timm's weights (from {place}; --finetune FILE takes them from a file)"
    with refusing(what):
        if not {"device", "dtype"}.isdisjoint(model_args):
            raise InputError(f"cannot build {name}: device and dtype are the run's to choose")
        if model_args.get("depth", 0) > MOST_BLOCKS:  # would be built for hours
            raise InputError(f"cannot build {name}: depth is above {MOST_BLOCKS}")
        reduction = {key: model_args[key] for key in REDUCTION_KEYWORDS if key in model_args}
        keywords = {key: value for key, value in model_args.items() if key not in reduction}
        try:
            model = timm.create_model(**keywords)
        except TypeError:  # the kind of the model may be why it does not take a keyword
            if reducing:
                check_convertible(timm.create_model(name))
            raise
    if 0 in getattr(getattr(model, "patch_embed", None), "grid_size", ()):
        size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
        raise InputError(f"cannot build {name}: img_size {size} is smaller than a patch, {patch}")
    if reducing:
        with refusing(f"{name} cannot reduce"):
            make_reducing(model, **reduction, check=not name.startswith("bat_"))
        # What is odd shows in a forward pass.
        with refusing(f"{name} cannot classify an image with these keywords"), torch.no_grad():
            meta = copy.deepcopy(model).to("meta").eval()
            logits = meta(torch.empty(1, 3, *meta.patch_embed.img_size, device="meta"))
            if logits.shape[1:] != (model.num_classes or model.num_features,):
                raise ValueError(f"its output is {tuple(logits.shape)}")
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
        The model in evaluation mode, on the CPU; its pretrained_cfg has the checkpoint's crop and
        normalisation.

    Raises:
        InputError: the checkpoint does not say how its model was made, does not fit it, or a
            keyword is out of range.
    """
    if ema and not checkpoint:
        raise InputError("--ema needs a checkpoint: random weights have no moving average")
    stored = dict(checkpoint.get("model_args") or {})
    model_args = merged_settings(stored, overrides)
    if "model_name" not in model_args:
        raise InputError(f"{source} does not say which model it is of (no 'model_args')")
    weights = model_weights(checkpoint, ema=ema) if checkpoint else {}
    if "head.bias" in weights:
        model_args.setdefault("num_classes", len(weights["head.bias"]))
    if checkpoint:
        model_args.pop("pretrained", None)
    model = build_model(model_args, reducing=reducing)
    if checkpoint:
        grid = _patch_grid(stored.get("img_size"), weights)
        fit_weights(model, weights, source, old_grid=grid, new_head=new_head)
        model.pretrained_cfg = {**model.pretrained_cfg, **checkpoint.get("data_config", {})}
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
    if isinstance(model, VisionTransformer | Eva):
        with suppress(Exception):  # what cannot be resampled is named below with all that differs
            weights = _fit_positions(model, dict(weights), old_grid, drop_distillation=new_head)
    if "head_cls.weight" in weights and "head_cls.weight" not in own:  # of a model with one head
        read_otherwise = {n for n in weights if n.startswith(("norm.", "head."))}
        kept = {n: v for n, v in weights.items() if n not in read_otherwise}
        weights = {name.replace("_cls.", "."): value for name, value in kept.items()}
    for name in own.keys() - weights.keys():  # Evo-ViT's second head starts as the first
        if name.startswith(("norm_cls.", "head_cls.")) and name.replace("_cls", "") in weights:
            weights = dict(weights) | {name: weights[name.replace("_cls", "")]}
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    reshaped = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    retyped = [
        n
        for n in own
        if n in weights and own[n].is_floating_point() != weights[n].is_floating_point()
    ]
    replaceable = ("head", "dist_token") if new_head else ()
    differing = [*missing, *unexpected, *reshaped, *retyped]
    if not all(name.startswith(replaceable) for name in differing):
        shapes = [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
            for name in reshaped
        ]
        kinds = {"of another shape": shapes, "of another type": retyped}
        kinds |= {"missing": missing, "unexpected": unexpected}
        words = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
        words = textwrap.shorten(words, 400, placeholder=" and more")
        kind = "another model"
        if "dist_token" in unexpected:
            kind = "a distilled model, from which --finetune can start"
        elif "blocks.0.mlp.fc1.weight" not in reshaped and "blocks.0.mlp.fc2.weight" in reshaped:
            kind = "a model with gated MLPs (SwiGLU)"
        raise InputError(f"{source} is for {kind}; {words}")
    model.load_state_dict(own | {n: weights[n] for n in own if n not in differing})
    if differing:
        logger.info(f"not loaded from {source}: {', '.join(differing)}")


def _fit_positions(
    model: VisionTransformer | Eva,
    weights: dict[str, Tensor],
    old_grid: tuple[int, int] | None,
    *,
    drop_distillation: bool,
) -> dict[str, Tensor]:
    """The weights with a position embedding for the model's tokens; DeiT's names made timm's."""
    embedding = weights.pop("pos_embed", None)
    if drop_distillation and "dist_token" in weights and not hasattr(model, "dist_token"):
        embedding = torch.cat([embedding[:, :1], embedding[:, 2:]], dim=1)  # class token, patches
    if isinstance(model, Eva):  # where facebook's names of LayerScale are timm's own
        weights = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", n): v for n, v in weights.items()}
        weights = eva.checkpoint_filter_fn(weights, model)
    else:
        weights = checkpoint_filter_fn(weights, model)
    if embedding is None:
        return weights
    new_grid, is_fit = model.patch_embed.grid_size, embedding.shape == model.pos_embed.shape
    if old_grid not in (None, new_grid) or (old_grid is None and not is_fit):
        embedding = resample_abs_pos_embed(
            embedding,
            new_size=list(new_grid),
            old_size=list(old_grid) if old_grid else None,
            num_prefix_tokens=0 if model.no_embed_class else model.num_prefix_tokens,
        )
    return weights | {"pos_embed": embedding}


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
    if checkpoint.get("optimizer") is None or "epoch" not in checkpoint:
        raise InputError(f"{source} holds no training state: use --finetune, or add --eval")
    own, weights = state.model.state_dict(), model_weights(checkpoint)
    if any(n in weights and own[n].shape != weights[n].shape for n in own):
        raise InputError(f"{source} was trained at another input size: use --finetune")
    now = (args.batch_size, get_world_size(), args.accum_steps)
    is_own = "updates" in checkpoint
    try:
        if is_own:
            stored = checkpoint["args"]
            _check_schedule(stored, args, source)
            before = (stored["batch_size"], checkpoint["world_size"], stored["accum_steps"])
            before = tuple(map(_whole, before))
        else:
            before, stored = now, vars(args)
            checkpoint = _as_own_state(state, checkpoint, source, args)
        _load_state(state, checkpoint, stored["epochs"])
        images = state.step * before[0] * before[1]  # of the epoch that are done
        state.step = images // (now[0] * now[1]) // args.accum_steps * args.accum_steps
    except InputError:
        raise
    except Exception as e:  # the state of another run fails in every way
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise InputError(
            f"{source} holds a training state that cannot be continued ({reason}): use --finetune, "
            "or add --eval"
        ) from e
    if state.ema is not None and checkpoint.get("model_ema") is not None:
        fit_weights(state.ema.module, model_weights(checkpoint, ema=True), source)
    logger.info(f"resumed {source} at epoch {state.epoch}, step {state.step}")
    if not is_own:
        average = "" if checkpoint.get("model_ema") is None else ", moving average"
        logger.info(
            f"it is DeiT's or EViT's: weights{average}, optimizer and learning rate go on; the "
            "order of the images and what is drawn for them are not that run's, and its best "
            "accuracy is not known"
        )
    if before != now:
        logger.info(
            f"batch size, processes and gradient accumulation steps were {before} and are {now}: "
            "the epoch goes on after as many images, the learning rates stay"
        )


def _whole(value: object) -> int:
    """The value, if it is an integer that can count something; ValueError otherwise."""
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"{value!r:.40} is not a count")
    return value


def _load_state(state: TrainState, checkpoint: Mapping, last_epoch: int) -> None:
    """`TrainState.load_state_dict`, and whether training could go on from what it loads."""
    flagged = [dict(group) for group in state.optimizer.param_groups]
    stored, own = checkpoint["lr_scheduler"], state.scheduler.state_dict()
    for name in own.keys() - set(RESCALED):
        if stored.get(name, own[name]) != own[name]:
            raise ValueError(f"the scheduler's {name} was {stored[name]} and is {own[name]}")
    kept = {name: stored[name] for name in RESCALED if name in stored}
    state.load_state_dict(checkpoint | {"lr_scheduler": kept})
    for value in (state.epoch, state.step, state.updates):
        _whole(value)
    if state.epoch > last_epoch:
        raise ValueError(f"epoch {state.epoch} of {last_epoch}")
    for group, flags in zip(state.optimizer.param_groups, flagged, strict=True):
        for name in HYPERPARAMETERS:
            if (name in group) != (name in flags) or not np.allclose(
                group.get(name, 0), flags.get(name, 0), rtol=1e-6, atol=0
            ):
                raise ValueError(f"{name} was {group.get(name)} and is {flags.get(name)}")
        group |= {name: value for name, value in flags.items() if isinstance(value, bool | None)}
    for parameter, moments in state.optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if name in moments and moments[name].shape not in ((), parameter.shape):
                raise ValueError(f"{name} has the shape of another parameter")
        _whole(int(moments.get("step", 0)))
    if state.epoch > 0:
        state.scheduler.step(state.epoch - 1)  # sets what is set already
    MetricLogger().load_state_dict(state.metrics)
    rates = [*state.scheduler.base_values, *(g["lr"] for g in state.optimizer.param_groups)]
    for number in [*state.best.values(), *rates]:
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"accuracy or learning rate {number!r:.40}")


def _as_own_state(
    state: TrainState, checkpoint: Mapping, source: str, args: argparse.Namespace
) -> dict:
    """The training state of a run of DeiT or EViT after an epoch, as `TrainState` has it.

    The schedule is the flags'. They overwrite --lr by its scaled value, so that the learning rate
    of the optimizer tells whether the flags are that run's.
    """
    if (opt := checkpoint["args"].get("opt", args.opt)) != args.opt:
        raise ValueError(f"--opt was {opt} and is {args.opt}")
    epoch, stored = _whole(checkpoint["epoch"]), checkpoint["optimizer"]
    own_groups = state.optimizer.state_dict()["param_groups"]
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    rank = {name: index for index, name in enumerate(model_weights(checkpoint))}
    state.scheduler.step(epoch)
    groups, moments = [], {}
    for live, own, theirs in zip(
        state.optimizer.param_groups, own_groups, stored["param_groups"], strict=True
    ):
        if not math.isclose(live["lr"], theirs["lr"], rel_tol=1e-6):
            raise InputError(
                f"{source} was at learning rate {theirs['lr']:.6g} after epoch {epoch}, but the "
                f"flags' schedule is at {live['lr']:.6g}: repeat that run's --lr, --min-lr, "
                "--epochs, --warmup-epochs and total batch, or start another run with --finetune"
            )
        kept = (*HYPERPARAMETERS, "step")  # Lamb counts its steps there
        groups.append(own | {name: theirs[name] for name in kept if name in theirs})
        # A group lists its parameters in their order in the model, which may be another here.
        places = [rank[names[id(parameter)]] for parameter in live["params"]]
        for place, number in zip(sorted(places), theirs["params"], strict=True):
            moments[own["params"][places.index(place)]] = stored["state"][number]
    return checkpoint | {
        "optimizer": {"state": moments, "param_groups": groups},
        "lr_scheduler": state.scheduler.state_dict(),
        "scaler": checkpoint.get("scaler"),
        "epoch": epoch + 1,
        "step": 0,
        "updates": int(max(entry.get("step", 0) for entry in moments.values())),
        "best": {},
        "metrics": {},
    }


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
        if dist.is_initialized() and updates % AGREE_EVERY:
            return False
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
            elif Path(source).name == PENDING:  # a kill came between writing and renaming
                self._put_in_place()
            kept = [entry for entry in read_log(self.log_path) if entry["epoch"] < first_epoch]
            lines = "".join(json.dumps(entry) + "\n" for entry in kept)
            # Always written anew: a crash may have cut off the last line.
            write_text(self.log_path, lines)
            write_text(self.folder / "args.json", json.dumps(facts, indent=2) + "\n")
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
        self._write(state.state_dict(), self.folder / PENDING)
        self._put_in_place()

    def _put_in_place(self) -> None:
        """Makes the pending checkpoint the newest; a kill at any rename leaves it to be done."""
        older = [self.folder / f"checkpoint.{i}.pth" for i in range(1, self.keep_checkpoints)]
        files = [self.folder / "checkpoint.pth", *older]
        with writing(files[0]):
            present = len(list(takewhile(Path.exists, files)))  # a gap takes the one before it
            for index in range(min(present, len(files) - 1), 0, -1):
                os.replace(files[index - 1], files[index])
            os.replace(self.folder / PENDING, files[0])

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
