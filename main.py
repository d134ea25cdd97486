"""Trains and evaluates token-reducing Vision Transformers; `python main.py --help` lists all flags.

One process needs no launcher; several are started with torchrun. Exit codes: 0 done, 2 bad input,
3 the loss or the gradient is not finite, 4 the output cannot be written, 5 another process is gone,
75 stopped by SIGTERM or SIGUSR1 after writing a checkpoint (start again with --resume auto).
"""

import argparse
import copy
import datetime
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from arguments import (
    DEFAULT_DROP_PATH,
    NO_EFFECT,
    check_args,
    data_config,
    get_args_parser,
    model_arguments,
    pretrained_config,
)
from checkpoints import (
    CheckpointSchedule,
    RunFolder,
    StartingPoint,
    build_model,
    load_checkpoint,
    model_from_checkpoint,
    restore,
    starting_point,
)
from datasets import SampleDataset, build_dataset, check_same_classes
from engine import (
    DivergenceError,
    PreemptedError,
    TrainOptions,
    TrainState,
    evaluate,
    shrunk_keep_rate,
    train_one_epoch,
)
from inputs.batches import DeviceLoader, device_loader
from inputs.cache import build_cached_loader
from losses import CosubLoss, DistillationLoss, TwoHeadLoss
from models import (
    ReducingTransformer,
    count_gmacs,
    count_parameters,
    describe,
    describe_reduction,
    find_keep_rate,
)
from models.complexity import check_adjustable
from models.speed import MEASURED_RATES, Setting, fast_enough, measure_keep_rates
from samplers import TrainSampler
from utils import (
    AMP_DTYPES,
    InputError,
    StopRequest,
    barrier,
    check_agreement,
    check_writable,
    end_workers,
    find_amp,
    get_rank,
    get_world_size,
    ignore_stop_signals,
    in_turns,
    init_process,
    is_main_process,
    logger,
    make_deterministic,
    refusing,
    run_script,
    seed_everything,
    versions,
    write_text,
)

EXIT_DIVERGED = 3
EXIT_LOST_PROCESS = 5
EXIT_PREEMPTED = 75
NUM_REPEATS = 3  # DeiT's repeated augmentation
REFERENCE_BATCH = 512  # the total batch that --lr is given for, as in DeiT


# Building ---------------------------------------------------------------------------------------


def find_start(
    args: argparse.Namespace, output_dir: Path | None, device: torch.device
) -> StartingPoint:
    """The checkpoint that all processes start from."""
    with in_turns(device):  # one process downloads what is not there
        start = starting_point(args, output_dir)
    found = "no checkpoint"
    if start.source:
        found = f"epoch {start.checkpoint.get('epoch')}, step {start.checkpoint.get('step')}"
    place = args.output_dir if args.resume == "auto" else start.source
    check_agreement(found, f"{place} must be on a file system that all nodes share")
    return start


def build_datasets(
    args: argparse.Namespace, config: dict, device: torch.device
) -> tuple[SampleDataset | None, SampleDataset]:
    """The training set (None for --eval) and the validation set, checked against each other."""
    with in_turns(device):
        val_dataset, _ = build_dataset(False, args, config)
        train_dataset = None if args.eval else build_dataset(True, args, config)[0]
    if train_dataset is not None:
        check_same_classes(train_dataset, val_dataset)
    return train_dataset, val_dataset


def build_train_loader(
    args: argparse.Namespace, dataset: SampleDataset, device: torch.device
) -> DeviceLoader:
    """Batches of this process's share of the training set; the sampler yields `SampleKey`s."""
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
    return _build_loader(args, dataset, sampler, device)


def build_val_loader(
    args: argparse.Namespace, dataset: SampleDataset, device: torch.device
) -> DeviceLoader:
    """Batches of this process's share of the validation set, or of all of it."""
    rank, world_size = (get_rank(), get_world_size()) if args.dist_eval else (0, 1)
    return _build_loader(args, dataset, range(rank, len(dataset), world_size), device)


def _build_loader(args, dataset, sampler, device) -> DeviceLoader:
    if args.image_cache:
        batches = build_cached_loader(args, dataset, sampler, device)
        return DeviceLoader(batches, dataset, device)
    return device_loader(
        dataset,
        device,
        batch_size=args.batch_size,
        sampler=sampler,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem,
        drop_last=isinstance(sampler, TrainSampler),
        worker_init_fn=ignore_stop_signals,
    )


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
    args: argparse.Namespace,
    num_classes: int,
    device: torch.device,
    input_size: Sequence[int] = (224, 224),
) -> DistillationLoss | CosubLoss:
    """Cross-entropy of the kind that the targets ask for, and distillation or co-training."""
    if args.bce_loss or args.cosub:
        threshold = 0 if args.bce_loss else None
        base_criterion = BinaryCrossEntropy(args.smoothing, target_threshold=threshold)
    elif build_mixup(args, num_classes) is not None:
        base_criterion = SoftTargetCrossEntropy()
    elif args.smoothing > 0:
        base_criterion = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    else:
        base_criterion = nn.CrossEntropyLoss()
    if args.cosub:
        return CosubLoss(base_criterion)
    teacher = None
    if args.distillation_type != "none":
        teacher = model_from_checkpoint(
            load_checkpoint(args.teacher_path),
            source=f"teacher {args.teacher_path}",
            reducing=False,
            model_name=args.teacher_model,
            num_classes=num_classes,
        ).to(device)
        with refusing(f"teacher {args.teacher_path}"), torch.no_grad():
            teacher(torch.zeros(1, 3, *input_size, device=device))
    return DistillationLoss(
        base_criterion,
        teacher,
        args.distillation_type,
        args.distillation_alpha,
        args.distillation_tau,
    )


def build_run_model(
    args: argparse.Namespace, model_args: dict, start: StartingPoint
) -> ReducingTransformer:
    """The model of the run with its first weights, on the CPU."""
    seed_everything(args.seed)  # the same first weights in every process
    drop_path = DEFAULT_DROP_PATH if args.drop_path is None else args.drop_path
    model = model_from_checkpoint(
        start.checkpoint,
        ema=args.ema and (args.eval or not start.resumes),  # a resumed run goes on with both
        source=start.source,
        new_head=not start.resumes and not args.eval,
        **model_args | {"drop_rate": args.drop, "drop_path_rate": drop_path},
    )
    apply_target_gmacs(args.target_gmacs, model, model_args)
    if args.distillation_type != "none" and hasattr(model, "set_distilled_training"):
        model.set_distilled_training()  # the distillation token learns from the teacher
    if args.attn_only:  # as in DeiT
        for name, parameter in model.named_parameters():
            parameter.requires_grad = ".attn." in name or name.startswith(("head", "pos_embed"))
    return model


def apply_target_gmacs(
    target_gmacs: float | None, model: ReducingTransformer, model_args: dict
) -> None:
    """Sets the largest keep rate within a budget, in the model and in its keywords."""
    if target_gmacs is None:
        return
    try:
        keep_rate = find_keep_rate(model, target_gmacs)
    except ValueError as problem:
        raise InputError(str(problem)) from problem
    model.set_keep_rate(keep_rate)
    model_args["keep_rate"] = keep_rate
    logger.info(f"--target-gmacs {target_gmacs}: keep rate {keep_rate}")


def apply_target_ms(
    args: argparse.Namespace, model: ReducingTransformer, model_args: dict, device: torch.device
) -> None:
    """Sets the largest keep rate that is fast enough on this machine, if that is asked for."""
    if args.target_ms is None:
        return
    milliseconds = find_speed(args, model, model_args, device)
    with refusing(f"--target-ms {args.target_ms:g}"):
        model.set_keep_rate(fast_enough(milliseconds, args.target_ms))
    shown = ", ".join(f"{value:.4g} at {rate:g}" for rate, value in milliseconds.items())
    logger.info(f"milliseconds a batch of {args.batch_size}, by keep rate: {shown}")
    logger.info(f"--target-ms {args.target_ms:g}: keep rate {model.keep_rates[0]:g}")


def find_speed(
    args: argparse.Namespace, model: ReducingTransformer, model_args: dict, device: torch.device
) -> dict[float, float]:
    """Milliseconds of a forward pass by keep rate: from --save-speed's file, or measured now."""
    if get_world_size() > 1:
        raise InputError("--target-ms measures one process: run it without a launcher")
    with refusing("--target-ms"):
        check_adjustable(model)
    amp, machine = find_amp(args.amp, device), versions()
    settings = model_args | model.reduction_settings() | {"keep_rate": MEASURED_RATES}
    settings.pop("pretrained", None)
    what = {
        **{name: str(value) for name, value in settings.items()},
        **{name: machine[name] for name in ("torch", "processor", "gpu", "threads")},
        **{"batch_size": args.batch_size, "device": str(device), "amp": amp},
        "compile": args.compile,
    }
    path = Path(os.path.expanduser(args.save_speed))
    if args.save_speed and path.exists():
        with refusing(f"--save-speed {path}"):
            stored = json.loads(path.read_text())
            for name in what:
                if stored["of"].get(name) != what[name]:
                    raise ValueError(f"it was measured with another {name}")
            return {float(rate): float(ms) for rate, ms in stored["milliseconds"].items()}
    if args.save_speed:
        check_writable(path.parent)
    logger.info(f"measuring on {machine['processor'] if device.type == 'cpu' else machine['gpu']}")
    setting = Setting(device, AMP_DTYPES[amp], "default" if args.compile else None)
    images = torch.randn(args.batch_size, 3, *model.patch_embed.img_size).to(device)
    milliseconds = measure_keep_rates(model.eval().to(device), images, setting)
    if args.save_speed:
        write_text(path, json.dumps({"of": what, "milliseconds": milliseconds}, indent=1))
    return milliseconds


def build_state(
    args: argparse.Namespace, model: ReducingTransformer, device: torch.device
) -> TrainState:
    """Optimizer, scheduler, gradient scaler and moving average around a model on its device."""
    total_batch = args.batch_size * args.accum_steps * get_world_size()
    lr = args.lr if args.unscale_lr else args.lr * total_batch / REFERENCE_BATCH
    opt = args.opt
    if opt == "fusedlamb" and find_spec("apex") is None:  # DeiT-III's
        opt = "lamb"
        logger.info("--opt fusedlamb: lamb, since apex is not installed")
    with refusing(f"timm refuses --opt {args.opt} --sched {args.sched}"):
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(args) | {"opt": opt, "lr": lr})
        scheduler, _ = create_scheduler(args, optimizer)
    if scheduler is None:  # what timm makes of an unknown name
        raise InputError(f"unknown --sched {args.sched}")
    if getattr(optimizer, "is_second_order", False):
        raise InputError(f"--opt {args.opt} needs second-order gradients, which are not computed")
    ema = None
    if args.model_ema:
        ema_device = torch.device("cpu") if args.model_ema_force_cpu else None
        ema = ModelEmaV3(model, decay=args.model_ema_decay, device=ema_device)
    scaler = torch.amp.GradScaler(device.type, enabled=find_amp(args.amp, device) == "fp16")
    return TrainState(model, optimizer, scheduler, scaler, ema)


def find_training_mode(args: argparse.Namespace, resumed: dict) -> bool:
    """Whether dropout and stochastic depth are on: as said, as in the resumed run, or by default.

    Fine-tuning keeps them off, as EViT and the first DeiT do.
    """
    stored = resumed.get("args") or {}
    said = (args.train_mode, resumed.get("training_mode"), stored.get("train_mode"))
    default = not (stored.get("finetune") if resumed else args.finetune)
    training_mode = next((mode for mode in said if mode is not None), default)
    if not training_mode and (args.drop or args.drop_path or args.cosub):
        logger.info(
            "--drop, --drop-path and --cosub have no effect: stochastic depth and dropout are off "
            "without --train-mode"
        )
    return training_mode


def train_options(
    args: argparse.Namespace,
    keep_rates: tuple[float, ...],
    device: torch.device,
    *,
    training_mode: bool,
) -> TrainOptions:
    """How to run the steps; the keep rate follows a schedule where a flag of it is given."""
    shrinks = args.shrink_epochs is not None or args.shrink_start_epoch is not None
    shrink = partial(
        shrunk_keep_rate,
        keep_rates=keep_rates,
        start_epoch=10 if args.shrink_start_epoch is None else args.shrink_start_epoch,
        shrink_epochs=args.shrink_epochs or 0,
    )
    return TrainOptions(
        amp_dtype=AMP_DTYPES[find_amp(args.amp, device)],
        accum_steps=args.accum_steps,
        clip_grad=args.clip_grad,
        print_freq=args.print_freq,
        seed=args.seed,
        training_mode=training_mode,
        keep_rate_at=shrink if shrinks else None,
        shrink_by_step=not args.compile,
    )


def wrap_model(model: ReducingTransformer, device: torch.device, *, compiled: bool) -> nn.Module:
    """The model to call in training: compiled, and with gradients shared among processes.

    DistributedDataParallel makes its buckets of gradients anew after the first backward pass, which
    changes the order of the sums. A pass whose gradients are 0 gets that over before the training,
    so that a resumed run sums in the order of an undisturbed one.
    """
    wrapped = model
    if dist.is_initialized():
        wrapped = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)
        image = torch.zeros(1, 3, *model.patch_embed.img_size, device=device)
        model.train(model.settings.evo_readout == "mean")  # with both heads
        outputs = wrapped(image)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        (0 * sum(map(torch.sum, outputs))).backward()
        model.zero_grad()
    if compiled:  # after the pass above, whose one image would need a graph of its own
        model.compile(dynamic=False)
    return wrapped


# Evaluating -------------------------------------------------------------------------------------


def run_evaluation(
    args: argparse.Namespace,
    model: ReducingTransformer,
    val_loader: DeviceLoader,
    device: torch.device,
    header: str = "Test:",
    **options,
) -> dict[str, float]:
    """Evaluates a model on its device and logs the result; options are those of `evaluate`."""
    result = evaluate(
        val_loader,
        model,
        device,
        amp_dtype=AMP_DTYPES[find_amp(args.amp, device)],
        print_freq=args.print_freq,
        header=header,
        all_ranks=args.dist_eval,
        **options,
    )
    logger.info(
        f"{header} Acc@1 {result['acc1']:.3f}  Acc@5 {result['acc5']:.3f}  "
        f"loss {result['loss']:.4f}  on {result['num_images']} images"
    )
    if result["bad_images"]:
        logger.info(f"{header} {result['bad_images']} unreadable images were counted as wrong")
    return result


def validate(
    args: argparse.Namespace,
    state: TrainState,
    val_loader: DeviceLoader,
    device: torch.device,
    folder: RunFolder | None,
    stop_requested: StopRequest,
    final_keep_rates: tuple[float, ...],
) -> dict[str, float]:
    """Evaluates the weights and their moving average, and keeps the best of the former.

    While the keep rate shrinks, or Evo-ViT warms up layer-wise, no epoch counts as the best.
    """
    evaluated = partial(
        run_evaluation, args, val_loader=val_loader, device=device, stop_requested=stop_requested
    )
    correct: list[torch.Tensor] = []
    results = {"test": evaluated(state.model, header="test:", correct=correct)}
    if state.ema is not None:
        average = state.ema.module
        if next(average.parameters()).device != device:
            average = copy.deepcopy(average).to(device)
        results["test_ema"] = evaluated(average, header="test_ema:")
    if folder is not None:
        folder.save_correct(torch.cat(correct).cpu() if correct and get_world_size() == 1 else None)
    if state.model.keep_rates == final_keep_rates and not state.model.layer_wise:
        improved = results["test"]["acc1"] > state.best.get("test_acc1", -1.0)
        for prefix, result in results.items():
            name = f"{prefix}_acc1"
            state.best[name] = max(state.best.get(name, -1.0), result["acc1"])
        if improved and folder is not None:
            folder.save_best(state)
        logger.info(f"Best Acc@1 so far: {state.best['test_acc1']:.3f}")
    return {f"{p}_{name}": value for p, result in results.items() for name, value in result.items()}


# Training ---------------------------------------------------------------------------------------


def save_checkpoint(state: TrainState, folder: RunFolder | None, device: torch.device) -> None:
    """Writes a checkpoint while no process is behind it, and none runs ahead of it."""
    barrier(device)
    if folder is not None:
        folder.save(state)
    barrier(device)


def change_reduction(
    state: TrainState, keep_rates: tuple[float, ...], layer_wise: bool, *, compiled: bool
) -> None:
    """Sets the keep rates, and starts or ends Evo-ViT's layer-wise warm-up."""
    if compiled and (state.model.keep_rates, state.model.layer_wise) != (keep_rates, layer_wise):
        torch.compiler.reset()  # the graphs of before are of no more use
    for model in state.models:
        model.set_keep_rate(keep_rates)
        model.layer_wise = layer_wise


def cosub_batch(
    images: torch.Tensor, targets: torch.Tensor, mixup: Mixup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixed images (B, 3, height, width) twice, for `CosubLoss`, and their targets once."""
    if mixup is not None:
        images, targets = mixup(images, targets)
    return images.repeat(2, 1, 1, 1), targets


def epoch_entry(state: TrainState, result: dict, num_images: int, seconds: float) -> dict:
    """What log.txt says of the training of an epoch."""
    return {
        "epoch": state.epoch,
        **{f"train_{name}": value for name, value in result.items()},
        "keep_rate": list(state.model.keep_rates),
        "images_per_second": num_images / seconds,
        "epoch_seconds": seconds,
    }


def train(
    args: argparse.Namespace,
    state: TrainState,
    train_loader: DeviceLoader,
    val_loader: DeviceLoader,
    *,
    device: torch.device,
    criterion: nn.Module,
    options: TrainOptions,
    folder: RunFolder | None,
) -> None:
    """Trains from `state.epoch` to the last epoch; after a PreemptedError a checkpoint is there."""
    model = wrap_model(state.model, device, compiled=args.compile)
    mixup = build_mixup(args, state.model.num_classes)
    if args.cosub:
        mixup = partial(cosub_batch, mixup=mixup)
    stop_requested = StopRequest()
    schedule = CheckpointSchedule(args.checkpoint_interval)
    sampler = train_loader.sampler
    num_steps = sampler.epoch_length // args.batch_size // args.accum_steps * args.accum_steps
    save = partial(save_checkpoint, folder=folder, device=device)
    final = options.keep_rate_at(args.epochs) if options.keep_rate_at else state.model.keep_rates
    begin = time.monotonic()
    try:
        for epoch in range(state.epoch, args.epochs):
            # Train
            is_warm_up = epoch < args.evo_layerwise_epochs
            change_reduction(state, state.model.keep_rates, is_warm_up, compiled=args.compile)
            first_step, epoch_begin = state.step, time.monotonic()
            sampler.set_epoch(epoch, start=first_step * args.batch_size)
            result = train_one_epoch(
                state,
                model,
                criterion,
                train_loader,
                device=device,
                num_steps=num_steps,
                options=options,
                mixup=mixup,
                checkpoint_due=partial(schedule.due, device=device),
                save=save,
                stop_requested=stop_requested,
            )
            # Evaluate, at the keep rate that the epoch ends with
            if options.keep_rate_at is not None:
                rates = options.keep_rate_at(epoch + 1)
                change_reduction(state, rates, is_warm_up, compiled=args.compile)
            images = (num_steps - first_step) * args.batch_size * get_world_size()
            entry = epoch_entry(state, result, images, time.monotonic() - epoch_begin)
            if (epoch + 1) % args.eval_interval == 0 or epoch + 1 == args.epochs:
                entry |= validate(args, state, val_loader, device, folder, stop_requested, final)
            # Log and save
            state.scheduler.step(epoch)
            state.epoch, state.step, state.metrics = epoch + 1, 0, {}
            if folder is not None:
                folder.log_epoch(entry)
            save(state)
    except PreemptedError:
        save(state)
        raise
    took = datetime.timedelta(seconds=int(time.monotonic() - begin))
    logger.info(f"Training time {took}, best Acc@1 {state.best.get('test_acc1', math.nan):.3f}")


def start_state(
    args: argparse.Namespace,
    state: TrainState,
    train_loader: DeviceLoader,
    start: StartingPoint,
) -> dict:
    """Puts the state where the run begins; returns the facts about it for args.json."""
    if start.resumes:
        restore(state, start.checkpoint, start.source, args)
        num_done, length = state.step * args.batch_size, train_loader.sampler.epoch_length
        if num_done > length:
            raise InputError(
                f"{start.source} stopped after {num_done} images of an epoch that now has {length} "
                f"in each process (--epoch-images {args.epoch_images or 'not given'})"
            )
    elif args.start_epoch > 0:
        state.epoch = args.start_epoch
        state.scheduler.step(args.start_epoch - 1)
    total_batch = args.batch_size * args.accum_steps * get_world_size()
    peak_lr = max(state.scheduler.base_values)
    logger.info(f"total batch: {total_batch} images, peak learning rate: {peak_lr:.6g}")
    epochs = getattr(state.scheduler, "t_initial", args.epochs)
    return {"total_batch": total_batch, "peak_lr": peak_lr, "schedule_epochs": epochs}


# The command line -------------------------------------------------------------------------------


def say_no_effect(args: argparse.Namespace) -> None:
    """Names the flags that were taken for the sake of others' commands, and why they do nothing."""
    for reason, flags in NO_EFFECT.items():
        if given := [flag for flag in flags.split() if flag in args.no_effect]:
            logger.info(f"{' '.join(given)}: without effect, {reason}")


def check_evo(args: argparse.Namespace, model: ReducingTransformer, *, training_mode: bool) -> None:
    """Refuses flags of Evo-ViT's training that would have no effect, or half of one."""
    if args.evo_layerwise_epochs > 0 and not model.settings.method.waits:
        raise InputError(f"--evo-layerwise-epochs is for evo, not for {model.reduction}")
    if model.settings.evo_readout == "mean" and not training_mode:
        raise InputError("--evo-readout mean trains two heads: add --train-mode")


def run(args: argparse.Namespace) -> None:
    """Builds everything, then trains or evaluates."""
    # Start
    CheckpointSchedule(args.checkpoint_interval)  # refused before anything is built
    if args.deterministic:
        make_deterministic()
    device = init_process(args.device, args.dist_timeout)
    say_no_effect(args)
    output_dir = Path(os.path.expanduser(args.output_dir)) if args.output_dir else None
    start = find_start(args, output_dir, device)
    stored = dict(start.checkpoint.get("model_args") or {})
    if not start.resumes and not args.eval:  # may have other classes than its source
        stored.pop("num_classes", None)
    model_args = model_arguments(args, stored)
    if args.describe:
        model = build_model(model_args | {"pretrained": False})
        apply_target_gmacs(args.target_gmacs, model, model_args)
        apply_target_ms(args, model, model_args, device)
        logger.info(describe(model))
        return
    logger.info(f"device: {device}, autocast: {find_amp(args.amp, device)}")
    if output_dir is not None:
        check_writable(output_dir)

    # Data
    known = pretrained_config(model_args["model_name"]) | start.checkpoint.get("data_config", {})
    config = data_config(args, model_args["img_size"], known)
    train_dataset, val_dataset = build_datasets(args, config, device)
    num_classes = len(val_dataset.classes)
    if model_args.setdefault("num_classes", num_classes) != num_classes:
        raise InputError(
            f"the model has {model_args['num_classes']} classes, the data set {num_classes}"
        )
    val_loader = build_val_loader(args, val_dataset, device)

    # Model
    model = build_run_model(args, model_args, start).to(device)
    model_args.pop("pretrained", None)
    facts = {"gmacs": count_gmacs(model), "parameters": count_parameters(model)}
    logger.info(f"{model_args}\n{describe_reduction(model)}")
    logger.info(f"{facts['parameters']:,} parameters, {facts['gmacs']:.4f} GMACs")
    if args.eval:
        if args.compile:
            model.compile(dynamic=False)
        run_evaluation(args, model, val_loader, device)
        return

    # Training
    train_loader = build_train_loader(args, train_dataset, device)
    criterion = build_criterion(args, num_classes, device, config["input_size"])
    if model.settings.evo_readout == "mean":
        criterion = TwoHeadLoss(criterion)
    state = build_state(args, model, device)
    facts |= start_state(args, state, train_loader, start)
    mode = find_training_mode(args, start.checkpoint if start.resumes else {})
    check_evo(args, model, training_mode=mode)
    options = train_options(args, model.keep_rates, device, training_mode=mode)
    folder = None
    if output_dir is not None and is_main_process():
        about = {"data_config": config, "training_mode": mode}
        about["model_args"] = model.reduction_settings() | model_args  # defaults too
        proportional = "on" if model.settings.is_proportional else "off"  # whatever "auto" will be
        about["model_args"]["proportional_attention"] = proportional
        folder = RunFolder(output_dir, args, classes=val_dataset.classes, **about)
        folder.start(state.epoch, facts, source=start.source if start.resumes else "")
    loaders = train_loader, val_loader
    builds = {"device": device, "criterion": criterion, "options": options, "folder": folder}
    try:
        train(args, state, *loaders, **builds)
    finally:
        if folder is not None:
            folder.close()


def run_to_end(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Runs, and returns the exit code of what ended the run, after saying it in one line."""
    check_args(parser, args)
    try:
        run(args)
        return 0
    except DivergenceError as problem:
        code, message = EXIT_DIVERGED, f"stopped: {problem}"
    except PreemptedError as problem:
        advice = "--resume auto goes on" if args.output_dir else "nothing is saved: no --output-dir"
        code, message = EXIT_PREEMPTED, f"stopped as asked, {problem}; {advice}"
    except RuntimeError as problem:
        # gloo's errors have no type of their own
        if not isinstance(problem, dist.DistError) and "gloo" not in str(problem):
            raise
        reason = " ".join(str(problem).split())
        code, message = EXIT_LOST_PROCESS, f"rank {get_rank()} stopped: {reason}"
    logger.error(f"{parser.prog}: {message}")
    return code


def main(argv: list[str] | None = None) -> int:
    parser = get_args_parser()
    return run_script(parser, partial(run_to_end, parser), argv)


if __name__ == "__main__":
    try:
        code = main()
    finally:
        end_workers()
    if dist.is_initialized() and code in (0, EXIT_PREEMPTED):
        dist.destroy_process_group()
    sys.exit(code)
