"""Trains and evaluates token-reducing Vision Transformers; `python main.py --help` lists all flags.

One process needs no launcher; several are started with torchrun. Exit codes: 0 done, 2 bad input,
3 the loss or the gradient is not finite, 4 the output cannot be written, 5 another process is gone,
75 stopped by SIGTERM or SIGUSR1 after writing a checkpoint (start again with --resume auto).
"""

import argparse
import datetime
import math
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from timm.data import Mixup
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from arguments import ArgumentParser, check_args, get_args_parser
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
    starting_point,
    with_stored_model,
)
from checkpoints import (
    load_pretrained,
    load_weights,
    model_weights,
    patch_grid,
)
from engine import (
    DivergenceError,
    PreemptedError,
    TrainOptions,
    TrainState,
    evaluate,
    num_training_steps,
    set_keep_rate,
    shrunk_keep_rate,
    train_one_epoch,
)
from models import BATVisionTransformer, count_gmacs, count_parameters, describe
from recorder import CheckpointSchedule, Recorder, check_writable, restore
from utils import (
    InputError,
    StopRequest,
    Survivors,
    barrier,
    end_workers,
    get_rank,
    get_world_size,
    init_process,
    is_main_process,
    logger,
    make_deterministic,
    seed_everything,
    setup_logging,
)

EXIT_DIVERGED = 3
EXIT_NOT_WRITTEN = 4
EXIT_LOST_PROCESS = 5
EXIT_PREEMPTED = 75


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
        grid_size = patch_grid(checkpoint)
        load_pretrained(model, model_weights(checkpoint), source, grid_size=grid_size)
    elif source:
        load_weights(model, model_weights(checkpoint), source)
    return model


def run_evaluation(
    args: argparse.Namespace,
    model: BATVisionTransformer,
    val_loader: DataLoader,
    device: torch.device,
    header: str = "Test:",
    **options,
) -> dict[str, float]:
    """Evaluates a model on its device and logs the result; options are those of `evaluate`."""
    result = evaluate(
        val_loader,
        model,
        device,
        amp_dtype=AMP_DTYPES[args.amp],
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


def run_training(
    args: argparse.Namespace,
    state: TrainState,
    train_loader: DataLoader,
    val_loader: DataLoader,
    *,
    device: torch.device,
    criterion: nn.Module,
    mixup: Mixup | None,
    recorder: Recorder | None,
) -> None:
    """Trains from `state.epoch` to the last epoch.

    Raises:
        DivergenceError: the loss or the gradient is not finite.
        PreemptedError: a signal asked the run to stop; a checkpoint has been written.
    """
    options = train_options(args, state.model.keep_rates)
    model = wrap_model(state.model, device, compiled=args.compile)
    stop_requested = StopRequest()
    schedule = CheckpointSchedule(args.checkpoint_interval)

    def save_if_due(state: TrainState) -> None:
        if schedule.due(state.updates, device):
            save_checkpoint(state, recorder, device)

    begin = time.time()
    try:
        for epoch in range(state.epoch, args.epochs):
            entry = train_and_time(
                state,
                model,
                criterion,
                train_loader,
                device=device,
                options=options,
                accum_steps=args.accum_steps,
                mixup=mixup,
                after_update=save_if_due,
                stop_requested=stop_requested,
            )
            if options.keep_rate_at is not None:
                set_keep_rate(state, options.keep_rate_at(epoch + 1))
            if (epoch + 1) % args.eval_interval == 0 or epoch + 1 == args.epochs:
                entry |= validate(args, state, val_loader, device, recorder, stop_requested)
            state.scheduler.step(epoch)
            state.epoch, state.step, state.metrics = epoch + 1, 0, {}
            if recorder is not None:
                recorder.log_epoch(entry)
            save_checkpoint(state, recorder, device)
    except PreemptedError:
        save_checkpoint(state, recorder, device)
        raise
    took = datetime.timedelta(seconds=int(time.time() - begin))
    logger.info(f"Training time {took}, best Acc@1 {state.best.get('test_acc1', math.nan):.3f}")


def wrap_model(model: nn.Module, device: torch.device, *, compiled: bool) -> nn.Module:
    """The model to call in training: compiled, and with gradients shared among processes."""
    if compiled:
        model.compile()
    if get_world_size() == 1:
        return model
    return DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)


def save_checkpoint(state: TrainState, recorder: Recorder | None, device: torch.device) -> None:
    """Writes a checkpoint while no process is behind it, and none runs ahead of it."""
    barrier(device)
    if recorder is not None:
        recorder.save(state)
    barrier(device)


def train_and_time(
    state: TrainState,
    model: nn.Module,
    criterion: nn.Module,
    train_loader: DataLoader,
    *,
    accum_steps: int,
    **options,
) -> dict:
    """Trains for (the rest of) an epoch and returns what log.txt says of it."""
    first_step, begin = state.step, time.time()
    sampler, batch_size = train_loader.sampler, train_loader.batch_size
    num_steps = num_training_steps(sampler.epoch_length // batch_size, accum_steps)
    sampler.set_epoch(state.epoch, start=first_step * batch_size)
    result = train_one_epoch(state, model, criterion, train_loader, num_steps=num_steps, **options)
    seconds = time.time() - begin
    images = (num_steps - first_step) * batch_size * get_world_size()
    return {
        "epoch": state.epoch,
        **{f"train_{name}": value for name, value in result.items()},
        "keep_rate": list(state.model.keep_rates),
        "images_per_second": images / seconds,
        "epoch_seconds": seconds,
    }


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


def validate(
    args: argparse.Namespace,
    state: TrainState,
    val_loader: DataLoader,
    device: torch.device,
    recorder: Recorder | None,
    stop_requested: StopRequest,
) -> dict[str, float]:
    """Evaluates the weights and their moving average, and keeps the best of the former."""
    entry, hits = {}, []
    for prefix, model in evaluation_models(state, device).items():
        result = run_evaluation(
            args,
            model,
            val_loader,
            device,
            f"{prefix}:",
            stop_requested=stop_requested,
            hits=hits if prefix == "test" else None,
        )
        entry |= {f"{prefix}_{name}": value for name, value in result.items()}
        best = max(state.best.get(f"{prefix}_acc1", -1.0), result["acc1"])
        improved = best > state.best.get(f"{prefix}_acc1", -1.0)
        state.best[f"{prefix}_acc1"] = best
        if prefix == "test" and improved and recorder is not None:
            recorder.save_best(state)
    if hits and recorder is not None and get_world_size() == 1:
        recorder.save_hits(torch.cat(hits))
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
        resumed = source not in ("", typed.finetune)
        # A fine-tuned model may have other classes than its source, a resumed one may not.
        stored = dict(checkpoint.get("model_args") or {})
        if typed.finetune and source == typed.finetune:
            stored.pop("num_classes", None)
        args = with_stored_model(typed, stored)
        CheckpointSchedule(args.checkpoint_interval)  # refused before anything is built
        if args.deterministic:
            make_deterministic()
        device = init_process(args.device, args.dist_timeout)
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
            mixup = build_mixup(args, num_classes)
            criterion = build_criterion(args, num_classes, device, soft_targets=mixup is not None)
            state = build_state(args, model.to(device), device)
            if args.start_epoch > 0:
                state.epoch = args.start_epoch
                state.scheduler.step(args.start_epoch - 1)
            if resumed:
                sizes = {"batch_size": args.batch_size, "accum_steps": args.accum_steps}
                restore(state, checkpoint, source, **sizes)
    if args.eval:
        evaluation = partial(run_evaluation, args, model.to(device), val_loader, device)
        return exit_code(parser, evaluation)

    recorder = None
    if folder is not None and is_main_process():
        recorder = Recorder(
            folder, typed, model_args, val_dataset.classes, keep_checkpoints=args.keep_checkpoints
        )
        facts = {"gmacs": gmacs, "parameters": count_parameters(model)}
        opening = partial(recorder.start, state.epoch, facts, resumed=resumed)
        if code := exit_code(parser, opening):
            return code
    training = partial(
        run_training,
        args,
        state,
        train_loader,
        val_loader,
        device=device,
        criterion=criterion,
        mixup=mixup,
        recorder=recorder,
    )
    code = exit_code(parser, training)
    if recorder is not None:
        recorder.close()
    return code


def exit_code(parser: ArgumentParser, run: Callable[[], object]) -> int:
    """Runs the expensive part; what can go wrong in it becomes one line and an exit code."""
    try:
        run()
        return 0
    except InputError as problem:  # an unreadable image
        parser.error(str(problem))
    except DivergenceError as problem:
        code, message = EXIT_DIVERGED, f"stopped: {problem}"
    except PreemptedError as problem:
        code, message = EXIT_PREEMPTED, f"stopped as asked, {problem}; --resume auto goes on"
    except OSError as problem:
        code, message = EXIT_NOT_WRITTEN, f"stopped: {problem}"
    except RuntimeError as problem:
        if not isinstance(problem, dist.DistError) and "gloo" not in str(problem):
            raise
        lost = Survivors.lost_ranks()
        code, message = EXIT_LOST_PROCESS, f"rank {get_rank()} stopped: lost rank(s) {lost}"
    logger.error(f"{parser.prog}: {message}")
    return code


if __name__ == "__main__":
    try:
        code = main()
    finally:
        end_workers()
    if dist.is_initialized() and code in (0, EXIT_PREEMPTED):
        dist.destroy_process_group()
    sys.exit(code)
