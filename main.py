"""Trains and evaluates token-reducing Vision Transformers; `python main.py --help` lists all flags.

One process needs no launcher; several are started with torchrun. Exit codes: 0 done, 2 bad input,
3 the loss is not finite.
"""

import argparse
import datetime
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from arguments import check_args, get_args_parser
from builders import (
    AMP_DTYPES,
    apply_target_gmacs,
    build_criterion,
    build_datasets,
    build_mixup,
    build_model,
    build_state,
    build_train_loader,
    build_val_loader,
    evaluation_models,
    model_arguments,
    with_stored_model,
)
from checkpoints import (
    latest_checkpoint,
    load_checkpoint,
    load_pretrained,
    load_weights,
    model_weights,
)
from engine import (
    DivergenceError,
    TrainOptions,
    TrainState,
    evaluate,
    num_training_steps,
    set_keep_rate,
    shrunk_keep_rate,
    train_one_epoch,
)
from models import BATVisionTransformer, count_gmacs, count_parameters, describe
from recorder import Recorder, check_writable
from utils import (
    InputError,
    get_world_size,
    init_process,
    is_main_process,
    logger,
    seed_everything,
    setup_logging,
)

EXIT_DIVERGED = 3


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


def build_run_model(
    args: argparse.Namespace, model_args: dict, source: str, checkpoint: dict
) -> BATVisionTransformer:
    """The model of the run with its first weights, on the CPU.

    Raises:
        InputError: the model cannot be built, or the checkpoint does not fit it.
    """
    seed_everything(args.seed)  # the same first weights in every process
    model = build_model(model_args, drop_rate=args.drop, drop_path_rate=args.drop_path)
    if args.target_gmacs is not None:
        apply_target_gmacs(model, args.target_gmacs, model_args)
    if source and source == args.finetune:
        load_pretrained(model, model_weights(checkpoint), source)
    elif source:
        load_weights(model, model_weights(checkpoint), source)
    return model


def run_evaluation(
    args: argparse.Namespace,
    model: BATVisionTransformer,
    val_loader: DataLoader,
    device: torch.device,
    header: str = "Test:",
) -> dict[str, float]:
    """Evaluates a model on its device and logs the result."""
    result = evaluate(
        val_loader,
        model,
        device,
        amp_dtype=AMP_DTYPES[args.amp],
        print_freq=args.print_freq,
        header=header,
        all_ranks=args.dist_eval,
    )
    logger.info(
        f"{header} Acc@1 {result['acc1']:.3f}  Acc@5 {result['acc5']:.3f}  "
        f"loss {result['loss']:.4f}  on {result['num_images']} images"
    )
    if result["bad_images"]:
        logger.info(f"{header} {result['bad_images']} unreadable images were counted as wrong")
    return result


def run_training(
    args: argparse.Namespace,
    state: TrainState,
    train_loader: DataLoader,
    val_loader: DataLoader,
    *,
    device: torch.device,
    num_classes: int,
    recorder: Recorder | None,
) -> None:
    """Trains from `state.epoch` to the last epoch.

    Raises:
        DivergenceError: the loss is not finite.
    """
    model = state.model
    options = train_options(args, model.keep_rates)
    if args.compile:
        model.compile()
    if get_world_size() > 1:
        model = DistributedDataParallel(model, device_ids=_device_ids(device))
    mixup = build_mixup(args, num_classes)
    criterion = build_criterion(args, num_classes, device, soft_targets=mixup is not None)
    num_steps = num_training_steps(
        train_loader.sampler.epoch_length // args.batch_size, args.accum_steps
    )
    begin = time.time()
    for epoch in range(state.epoch, args.epochs):
        first_step, epoch_begin = state.step, time.time()
        train_loader.sampler.set_epoch(epoch, start=state.step * args.batch_size)
        train_result = train_one_epoch(
            state,
            model,
            criterion,
            train_loader,
            device=device,
            num_steps=num_steps,
            options=options,
            mixup=mixup,
        )
        seconds = time.time() - epoch_begin
        images = (num_steps - first_step) * args.batch_size * get_world_size()
        state.scheduler.step(epoch)
        state.epoch, state.step, state.metrics = epoch + 1, 0, {}
        entry = {f"train_{name}": value for name, value in train_result.items()}
        entry |= {"epoch": epoch, "keep_rate": list(state.model.keep_rates)}
        entry |= {"images_per_second": images / seconds, "epoch_seconds": seconds}
        if state.epoch % args.eval_interval == 0 or state.epoch == args.epochs:
            entry |= validate(args, state, val_loader, device, recorder)
        if recorder is not None:
            recorder.log_epoch(entry)
            recorder.save(state)
    took = datetime.timedelta(seconds=int(time.time() - begin))
    logger.info(f"Training time {took}, best Acc@1 {state.best.get('test_acc1', math.nan):.3f}")


def train_options(args: argparse.Namespace, keep_rates: tuple[float, ...]) -> TrainOptions:
    """How to run the steps; fine-tuning keeps dropout and stochastic depth off, as in DeiT."""
    shrink = partial(
        shrunk_keep_rate,
        keep_rates=keep_rates,
        start_epoch=args.shrink_start_epoch,
        shrink_epochs=args.shrink_epochs,
    )
    return TrainOptions(
        amp_dtype=AMP_DTYPES[args.amp],
        accum_steps=args.accum_steps,
        clip_grad=args.clip_grad,
        print_freq=args.print_freq,
        seed=args.seed,
        training_mode=not args.finetune if args.train_mode is None else args.train_mode,
        keep_rate_at=shrink if args.shrink_epochs > 0 else None,
        shrink_by_step=not args.compile,
    )


def _device_ids(device: torch.device) -> list[int] | None:
    return [device.index] if device.type == "cuda" else None


def validate(
    args: argparse.Namespace,
    state: TrainState,
    val_loader: DataLoader,
    device: torch.device,
    recorder: Recorder | None,
) -> dict[str, float]:
    """Evaluates the weights and their moving average, and keeps the best of the former."""
    entry = {}
    for prefix, model in evaluation_models(state, device).items():
        result = run_evaluation(args, model, val_loader, device, f"{prefix}:")
        entry |= {f"{prefix}_{name}": value for name, value in result.items()}
        best = max(state.best.get(f"{prefix}_acc1", -1.0), result["acc1"])
        improved = best > state.best.get(f"{prefix}_acc1", -1.0)
        state.best[f"{prefix}_acc1"] = best
        if prefix == "test" and improved and recorder is not None:
            recorder.save_best(state)
    logger.info(f"Best Acc@1 so far: {state.best['test_acc1']:.3f}")
    return entry


def describe_only(args: argparse.Namespace, checkpoint: dict) -> None:
    """Prints what the model's keep rate means; needs no data."""
    args = with_stored_model(args, checkpoint.get("model_args"))
    model_args = model_arguments(args, num_classes=1000)
    model = build_model(model_args)
    if args.target_gmacs is not None:
        apply_target_gmacs(model, args.target_gmacs, model_args)
    logger.info(describe(model))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    setup_logging()
    parser = get_args_parser()
    typed = parser.parse_args(argv)
    with parser.exit_on_bad_input():
        check_args(parser, typed)
        source, checkpoint = starting_point(typed)
        if typed.describe:
            describe_only(typed, checkpoint)
            return 0
        # A fine-tuned model may have other classes than its source, a resumed one may not.
        stored = dict(checkpoint.get("model_args") or {})
        if typed.finetune and source == typed.finetune:
            stored.pop("num_classes", None)
        args = with_stored_model(typed, stored)
        device = init_process(args.device)
        folder = check_writable(args.output_dir) if args.output_dir else None
        train_dataset, val_dataset, num_classes = build_datasets(args)
        if args.nb_classes not in (None, num_classes):
            raise InputError(f"the model has {args.nb_classes} classes, the data set {num_classes}")
        model_args = model_arguments(args, num_classes)
        model = build_run_model(args, model_args, source, checkpoint)
        gmacs = count_gmacs(model)
        logger.info(f"{model_args}\n{count_parameters(model):,} parameters, {gmacs:.4f} GMACs")
        val_loader = build_val_loader(args, val_dataset, device)
        if not args.eval:
            train_loader = build_train_loader(args, train_dataset, device)
            state = build_state(args, model.to(device), device)
            state.epoch = args.start_epoch
            if source not in ("", typed.finetune):
                resume(state, checkpoint, source)
    if args.eval:
        run_evaluation(args, model.to(device), val_loader, device)
        return 0

    recorder = None
    if folder is not None and is_main_process():
        recorder = Recorder(folder, typed, model_args, val_dataset.classes)
        recorder.start(state.epoch, {"gmacs": gmacs, "parameters": count_parameters(model)})
    try:
        run_training(
            args,
            state,
            train_loader,
            val_loader,
            device=device,
            num_classes=num_classes,
            recorder=recorder,
        )
    except InputError as problem:  # an unreadable image
        parser.error(str(problem))
    except DivergenceError as problem:
        logger.error(f"{parser.prog}: stopped: {problem}")
        return EXIT_DIVERGED
    finally:
        if recorder is not None:
            recorder.close()
    return 0


def resume(state: TrainState, checkpoint: dict, source: str) -> None:
    """Continues an interrupted run: everything but the weights, which the model has already.

    Raises:
        InputError: the checkpoint holds weights only.
    """
    if checkpoint.get("optimizer") is None or "updates" not in checkpoint:
        raise InputError(f"{source} holds no training state: use --finetune, or add --eval")
    state.load_state_dict(checkpoint)
    if state.ema is not None and checkpoint.get("model_ema") is not None:
        load_weights(state.ema.module, model_weights(checkpoint, ema=True), source)
    set_keep_rate(state, state.model.keep_rates)
    logger.info(f"resumed {source} at epoch {state.epoch}, step {state.step}")


if __name__ == "__main__":
    code = main()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
