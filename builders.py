"""Builds what a run needs from the parsed arguments: loaders, model, criterion, optimizer."""

import argparse
import copy
from pathlib import Path

import timm
import torch
from timm.data import Mixup
from timm.layers import to_2tuple
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from arguments import REDUCTION_FLAGS, reduction_arguments
from checkpoints import latest_checkpoint, load_checkpoint, load_weights, model_weights
from datasets import SampleDataset, build_dataset, check_same_classes
from engine import TrainState
from image_cache import CachedLoader, build_cached_loader
from losses import DistillationLoss
from models import BATVisionTransformer, find_keep_rate
from samplers import EvalSampler, TrainSampler
from utils import InputError, get_rank, get_world_size, ignore_stop_signals, logger

NUM_REPEATS = 3  # DeiT's repeated augmentation
REFERENCE_BATCH = 512  # the total batch that --lr is given for, as in DeiT
AMP_DTYPES = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def starting_point(args: argparse.Namespace) -> tuple[str, dict]:
    """Path and contents of the checkpoint that the run starts from; "" and {} for none.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    if args.resume == "auto":
        found = latest_checkpoint(Path(args.output_dir)) if args.output_dir else None
        if found is not None:
            return str(found[0]), found[1]
    source = args.finetune if args.resume in ("", "auto") else args.resume
    return source, load_checkpoint(source) if source else {}


def with_stored_model(args: argparse.Namespace, stored: dict | None) -> argparse.Namespace:
    """A copy of the arguments in which no model flag is left open.

    Flags that were given win, then come the checkpoint's (unless another model is asked for), then
    the defaults.

    Args:
        args: parsed arguments; not changed.
        stored: `model_args` of the checkpoint that the run starts from, if it has any.
    """
    stored = dict(stored or {})
    if args.model is not None and args.model != stored.get("model_name"):
        stored = {}
    filled = dict(vars(args))
    filled["model"] = args.model or stored.pop("model_name", "bat_deit_small_patch16_224")
    stored.pop("model_name", None)
    filled["input_size"] = args.input_size or tuple(to_2tuple(stored.pop("img_size", 224)))
    filled["nb_classes"] = args.nb_classes or stored.pop("num_classes", None)
    for name in REDUCTION_FLAGS:
        value = stored.pop(name, None)
        if filled[name] is None:
            filled[name] = value
    for name in ("img_size", "num_classes"):
        stored.pop(name, None)
    filled["model_kwargs"] = stored | args.model_kwargs
    return argparse.Namespace(**filled)


def model_arguments(args: argparse.Namespace, num_classes: int) -> dict:
    """Keywords of `timm.create_model`, as plain values that a checkpoint can hold."""
    keywords = {
        "model_name": args.model,
        "num_classes": args.nb_classes or num_classes,
        "img_size": args.input_size,
    }
    return keywords | reduction_arguments(args) | args.model_kwargs


def build_model(model_args: dict, **regularisation: float) -> BATVisionTransformer:
    """Creates a reducing model by its registered name.

    Args:
        model_args: keywords of `timm.create_model`, `model_name` among them.
        **regularisation: `drop_rate` and `drop_path_rate` for training.

    Raises:
        InputError: the name is unknown or not a reducing model, or a keyword does not fit.
    """
    name = model_args["model_name"]
    own = timm.list_models(module="bat")
    if not timm.is_model(name):
        raise InputError(f"unknown model '{name}'; choose from {', '.join(own)}")
    try:
        model = timm.create_model(**(model_args | regularisation))
    except (TypeError, ValueError, AssertionError) as problem:
        raise InputError(f"cannot build {name}: {problem}") from problem
    if not isinstance(model, BATVisionTransformer):
        raise InputError(
            f"'{name}' does not reduce tokens; choose from {', '.join(own)} "
            "(with --reduction none they are plain DeiT)"
        )
    return model


def apply_target_gmacs(model: BATVisionTransformer, target_gmacs: float, model_args: dict) -> None:
    """Sets the largest keep rate within the budget, in the model and in its keywords.

    Raises:
        InputError: no keep rate is cheap enough.
    """
    try:
        keep_rate = find_keep_rate(model, target_gmacs)
    except ValueError as problem:
        raise InputError(str(problem)) from problem
    model.set_keep_rate(keep_rate)
    model_args["keep_rate"] = keep_rate
    logger.info(f"--target-gmacs {target_gmacs}: keep rate {keep_rate}")


def build_train_loader(
    args: argparse.Namespace, dataset: SampleDataset, device: torch.device
) -> DataLoader | CachedLoader:
    """Batches of this process's share of the training set; the sampler yields `SampleKey`s.

    Raises:
        InputError: the set is smaller than one batch of every process.
    """
    sampler = TrainSampler(
        len(dataset),
        seed=args.seed,
        num_repeats=NUM_REPEATS if args.repeated_aug else 1,
        rank=get_rank(),
        world_size=get_world_size(),
        epoch_samples=args.epoch_images,
    )
    if len(sampler) < args.batch_size * args.accum_steps:
        raise InputError(
            f"--batch-size {args.batch_size} times --accum-steps {args.accum_steps} is more than "
            f"the {len(sampler)} training images of a process"
        )
    return _loader(args, dataset, sampler, device, drop_last=True)


def build_val_loader(
    args: argparse.Namespace, dataset: SampleDataset, device: torch.device
) -> DataLoader | CachedLoader:
    """Batches of this process's share of the validation set, or of all of it."""
    ranks = {"rank": get_rank(), "world_size": get_world_size()} if args.dist_eval else {}
    sampler = EvalSampler(len(dataset), **ranks)
    return _loader(args, dataset, sampler, device, drop_last=False)


def _loader(args, dataset, sampler, device, *, drop_last: bool) -> DataLoader | CachedLoader:
    if args.image_cache:
        return build_cached_loader(args, dataset, sampler, device)
    return DataLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=sampler,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
        drop_last=drop_last,
        persistent_workers=args.num_workers > 0,
        worker_init_fn=ignore_stop_signals,
    )


def build_datasets(args: argparse.Namespace) -> tuple[SampleDataset | None, SampleDataset, int]:
    """The training set (None for --eval), the validation set, and the number of classes.

    Raises:
        InputError: the data set is missing, empty, or its two parts have different classes.
    """
    val_dataset, num_classes = build_dataset(False, args)
    if args.eval:
        return None, val_dataset, num_classes
    train_dataset, _ = build_dataset(True, args)
    check_same_classes(train_dataset, val_dataset)
    return train_dataset, val_dataset, num_classes


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, or None when both are off."""
    if args.mixup <= 0 and args.cutmix <= 0 and args.cutmix_minmax is None:
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def build_criterion(
    args: argparse.Namespace, num_classes: int, device: torch.device, *, soft_targets: bool
) -> DistillationLoss:
    """Label-smoothed or soft-target cross-entropy, and distillation around it.

    Raises:
        InputError: the teacher is unknown, or its checkpoint does not fit.
    """
    if soft_targets:
        base_criterion = SoftTargetCrossEntropy()
    elif args.smoothing > 0:
        base_criterion = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    else:
        base_criterion = nn.CrossEntropyLoss()
    teacher = None
    if args.distillation_type != "none":
        teacher = _build_teacher(args, num_classes).to(device)
    return DistillationLoss(
        base_criterion,
        teacher,
        args.distillation_type,
        args.distillation_alpha,
        args.distillation_tau,
    )


def _build_teacher(args: argparse.Namespace, num_classes: int) -> nn.Module:
    checkpoint = load_checkpoint(args.teacher_path)
    stored = checkpoint.get("model_args") or {}
    if stored.get("model_name", args.teacher_model) != args.teacher_model:
        stored = {}
    if not timm.is_model(args.teacher_model):
        raise InputError(f"unknown teacher model '{args.teacher_model}'")
    keywords = {"num_classes": num_classes} | stored | {"model_name": args.teacher_model}
    teacher = timm.create_model(**keywords)
    load_weights(teacher, model_weights(checkpoint), f"teacher {args.teacher_path}")
    return teacher


def build_state(
    args: argparse.Namespace, model: BATVisionTransformer, device: torch.device
) -> TrainState:
    """Optimizer, scheduler, gradient scaler and moving average around a model on its device.

    Raises:
        InputError: the optimizer or the scheduler is unknown, or a setting does not suit it.
    """
    total_batch = args.batch_size * args.accum_steps * get_world_size()
    lr = args.lr if args.unscale_lr else args.lr * total_batch / REFERENCE_BATCH
    logger.info(f"total batch: {total_batch} images, peak learning rate: {lr:.6g}")
    try:
        optimizer = create_optimizer_v2(model, **(optimizer_kwargs(args) | {"lr": lr}))
        scheduler, _ = create_scheduler(args, optimizer)
    except (AssertionError, RuntimeError, TypeError, ValueError) as problem:
        options = f"--opt {args.opt} --sched {args.sched}"
        raise InputError(f"timm refuses {options}: {problem}") from problem
    ema = None
    if args.model_ema:
        ema_device = torch.device("cpu") if args.model_ema_force_cpu else None
        ema = ModelEmaV3(model, decay=args.model_ema_decay, device=ema_device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    return TrainState(model, optimizer, scheduler, scaler, ema)


def evaluation_models(state: TrainState, device: torch.device) -> dict[str, nn.Module]:
    """The models to validate by prefix of their results: the model, and its moving average."""
    models = {"test": state.model}
    if state.ema is not None:
        average = state.ema.module
        on_device = next(average.parameters()).device == device
        models["test_ema"] = average if on_device else copy.deepcopy(average).to(device)
    return models
