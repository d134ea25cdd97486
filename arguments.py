"""Command-line flags: the parser of `main.py` and the groups that every script shares.

Names and defaults are DeiT's and EViT's. Dashes and underscores are both accepted.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from timm.utils.misc import ParseKwargs

from datasets import BAD_IMAGE_POLICIES, DATA_SETS
from models.reduction import MERGE_WEIGHTS, REDUCTIONS
from utils import InputError

# Flags and the interval, ends included, that their values must be in.
RANGES = {
    "batch_size": (1, math.inf),
    "epochs": (1, math.inf),
    "epoch_images": (1, math.inf),
    "accum_steps": (1, math.inf),
    "eval_interval": (1, math.inf),
    "print_freq": (1, math.inf),
    "keep_checkpoints": (1, math.inf),
    "lr": (0, math.inf),
    "min_lr": (0, math.inf),
    "warmup_lr": (0, math.inf),
    "weight_decay": (0, math.inf),
    "drop_path": (0, 0.999),
    "smoothing": (0, 0.999),
    "mixup": (0, math.inf),
    "cutmix": (0, math.inf),
    "mixup_prob": (0, 1),
    "mixup_switch_prob": (0, 1),
    "model_ema_decay": (0, 1),
    "distillation_alpha": (0, 1),
    "distillation_tau": (1e-9, math.inf),
    "seed": (0, 2**63 - 1),
    "num_workers": (0, math.inf),
    "start_epoch": (0, math.inf),
    "warmup_epochs": (0, math.inf),
    "shrink_epochs": (0, math.inf),
    "shrink_start_epoch": (0, math.inf),
}
AMP_CHOICES = ("off", "fp16", "bf16")
REDUCTION_FLAGS = (
    "keep_rate",
    "reduction",
    "reduction_loc",
    "cluster_ratio",
    "match_ratio",
    "merge_weights",
)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one that the help does not explain already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", {}) or "default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with one-line errors that takes `--batch_size` for `--batch-size`."""

    def __init__(self, *args, **kwargs) -> None:
        """Takes argparse's arguments; abbreviated flags are off and defaults are shown."""
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        """argparse's, after turning the underscores of flag names into dashes."""
        args = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args([_dashed(word) for word in args], namespace)

    def error(self, message: str) -> None:
        """Prints the message on one line and exits with code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")

    @contextmanager
    def exit_on_bad_input(self, *more: type[Exception]):
        """Turns an `InputError`, or another named exception, into `error`."""
        try:
            yield
        except (InputError, *more) as problem:
            self.error(str(problem))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class _KeyValues(ParseKwargs):
    """timm's KEY=VALUE pairs, of names that have no flag of their own."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        owners = {
            "model_name": "--model",
            "img_size": "--input-size",
            "num_classes": "--nb-classes",
        }
        for word in values:
            name, equals, _ = word.partition("=")
            if not equals:
                parser.error(f"{option_string} takes KEY=VALUE pairs, got '{word}'")
            if name in owners:
                parser.error(f"{option_string} {name}: use {owners[name]}")
        super().__call__(parser, namespace, values, option_string)


class _Size(argparse.Action):
    """Stores one or two lengths as (height, width)."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if len(values) > 2 or min(values) < 1:
            parser.error(f"{option_string} takes one or two lengths of at least 1, got {values}")
        setattr(namespace, self.dest, (values[0], values[-1]))


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def add_switch(group, flag: str, *, default: bool | None, help: str) -> None:
    """Adds `--flag` and `--no-flag`."""
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose a model; None means the model's (or the checkpoint's) own."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=None,
        help="name registered with timm; default: the checkpoint's, or bat_deit_small_patch16_224",
    )
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=_KeyValues,
        metavar="KEY=VALUE",
        help="more keywords of the model, e.g. embed_dim=192 depth=6 patch_size=4",
    )
    group.add_argument(
        "--input-size", type=int, nargs="+", default=None, metavar="PIXELS", action=_Size,
        help="side of the square input, or height and width; default: the checkpoint's, or 224",
    )  # fmt: skip
    group.add_argument(
        "--nb-classes", type=int, default=None, help="classes; default: those of the data set"
    )
    group = parser.add_argument_group("token reduction")
    group.add_argument(
        "--keep-rate", "--base-keep-rate", type=float, nargs="+", default=None, metavar="RATE",
        help="share of the tokens that leave a reducing block, in (0, 1]: one value, or one per "
        "block; default: 0.7, or the checkpoint's",
    )  # fmt: skip
    group.add_argument(
        "--reduction", choices=tuple(REDUCTIONS), default=None, help="method; default: bat"
    )
    group.add_argument(
        "--reduction-loc", type=int, nargs="*", default=None, metavar="BLOCK",
        help="indices of the reducing blocks, from 0; default: 3 6 9",
    )  # fmt: skip
    group.add_argument(
        "--cluster-ratio", type=float, default=None,
        help="share of the kept tokens spent on clusters, in [0, 1]; 0 drops the inattentive "
        "tokens; default: 0.4",
    )  # fmt: skip
    group.add_argument(
        "--match-ratio", type=float, default=None,
        help="matched pairs per kept token that is no cluster, in [0, 1]; default: 0.1",
    )  # fmt: skip
    group.add_argument(
        "--merge-weights", choices=MERGE_WEIGHTS, default=None,
        help="weights inside a merged token; default: importance",
    )  # fmt: skip


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose a data set."""
    group = parser.add_argument_group("data")
    group.add_argument("--data-path", default="data", help="folder with train/ and val/")
    group.add_argument("--data-set", choices=DATA_SETS, default="IMNET", help="kind of data set")
    group.add_argument(
        "--inat-category", default="name", help="iNaturalist's level of the taxonomy"
    )
    add_switch(group, "--download", default=False, help="let torchvision download the data set")
    group.add_argument(
        "--bad-images", choices=BAD_IMAGE_POLICIES, default="error",
        help="an unreadable image ends the run with its path, or is replaced and counted",
    )  # fmt: skip
    group.add_argument(
        "--eval-crop-ratio", type=float, default=0.875, help="crop of the resized image, in (0, 1]"
    )


def _add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", default="adamw", help="optimizer, by timm's name")
    group.add_argument("--opt-eps", type=float, default=1e-8, help="epsilon")
    group.add_argument(
        "--opt-betas", type=float, nargs="+", default=None, help="betas; default: the optimizer's"
    )
    group.add_argument("--momentum", type=float, default=0.9, help="SGD momentum")
    group.add_argument("--weight-decay", type=float, default=0.05, help="weight decay")
    group.add_argument(
        "--clip-grad", type=float, default=None, help="largest gradient norm; default: no limit"
    )
    group.add_argument(
        "--accum-steps",
        "--grad-accum-steps",
        type=int,
        default=1,
        help="batches whose gradients make one update",
    )
    group = parser.add_argument_group("learning rate")
    group.add_argument("--sched", default="cosine", help="scheduler, by timm's name")
    group.add_argument(
        "--lr", type=float, default=5e-4, help="learning rate for a total batch of 512 images"
    )
    add_switch(group, "--unscale-lr", default=False, help="use --lr whatever the total batch")
    group.add_argument(
        "--lr-noise", type=float, nargs="+", default=None, help="epochs with noise, as shares"
    )
    group.add_argument("--lr-noise-pct", type=float, default=0.67, help="limit of the noise")
    group.add_argument("--lr-noise-std", type=float, default=1.0, help="deviation of the noise")
    group.add_argument("--warmup-lr", type=float, default=1e-6, help="first rate of the warm-up")
    group.add_argument("--min-lr", type=float, default=1e-5, help="lowest rate, never scaled")
    group.add_argument("--decay-epochs", type=float, default=30, help="epochs a step (step)")
    group.add_argument("--warmup-epochs", type=int, default=5, help="epochs of warm-up")
    group.add_argument("--cooldown-epochs", type=int, default=10, help="epochs at the end")
    group.add_argument("--patience-epochs", type=int, default=10, help="patience (plateau)")
    group.add_argument("--decay-rate", type=float, default=0.1, help="factor of a step")


def _add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("augmentation")
    add_switch(group, "--src", default=False, help="simple random crop instead of a resized one")
    group.add_argument("--color-jitter", type=float, default=0.3, help="strength without --aa")
    group.add_argument(
        "--aa", default="rand-m9-mstd0.5-inc1", help="RandAugment or AutoAugment policy, or none"
    )
    group.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    group.add_argument("--train-interpolation", default="bicubic", help="bilinear, bicubic, random")
    add_switch(group, "--repeated-aug", default=True, help="every sample three times an epoch")
    group.add_argument("--reprob", type=float, default=0.25, help="random erasing probability")
    group.add_argument("--remode", default="pixel", help="random erasing fill")
    group.add_argument("--recount", type=int, default=1, help="random erasing boxes")
    group.add_argument("--mixup", type=float, default=0.8, help="mixup alpha, 0 for none")
    group.add_argument("--cutmix", type=float, default=1.0, help="cutmix alpha, 0 for none")
    group.add_argument("--cutmix-minmax", type=float, nargs=2, default=None, help="box sides")
    group.add_argument("--mixup-prob", type=float, default=1.0, help="probability of either")
    group.add_argument("--mixup-switch-prob", type=float, default=0.5, help="of cutmix if both")
    group.add_argument(
        "--mixup-mode", choices=("batch", "pair", "elem"), default="batch", help="granularity"
    )


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--batch-size", type=int, default=64, help="images per process and step")
    group.add_argument("--epochs", type=int, default=300, help="passes over the training set")
    group.add_argument(
        "--epoch-images", type=int, default=None, metavar="N",
        help="end an epoch after so many images, drawn anew each time; default: all",
    )  # fmt: skip
    group.add_argument("--drop", type=float, default=0.0, help="dropout")
    group.add_argument("--drop-path", type=float, default=0.1, help="stochastic depth")
    add_switch(group, "--model-ema", default=True, help="keep a moving average of the weights")
    group.add_argument("--model-ema-decay", type=float, default=0.99996, help="its decay")
    add_switch(group, "--model-ema-force-cpu", default=False, help="keep it in host memory")
    group.add_argument(
        "--shrink-epochs", type=int, default=0,
        help="epochs in which the keep rate falls from 1 along a cosine; 0: none",
    )  # fmt: skip
    group.add_argument("--shrink-start-epoch", type=int, default=10, help="first of them")
    text = "stochastic depth and dropout on; default: on, but off when fine-tuning"
    add_switch(group, "--train-mode", default=None, help=text)
    group.add_argument("--amp", choices=AMP_CHOICES, default="off", help="autocast type")
    add_switch(group, "--compile", default=False, help="torch.compile the model")
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--distillation-type", choices=("none", "soft", "hard"), default="none",
        help="pull the model to a teacher's distribution (soft) or decisions (hard)",
    )  # fmt: skip
    group.add_argument("--teacher-model", default="regnety_160", help="timm model")
    group.add_argument("--teacher-path", default="", help="checkpoint of the teacher")
    group.add_argument("--distillation-alpha", type=float, default=0.5, help="weight, in [0, 1]")
    group.add_argument("--distillation-tau", type=float, default=1.0, help="temperature")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", default="", help="where to write; empty: nowhere")
    group.add_argument("--finetune", default="", help="checkpoint to start from, head included")
    group.add_argument(
        "--resume", default="",
        help="checkpoint to continue (or to evaluate); 'auto': the newest valid one of the output "
        "folder, if there is one",
    )  # fmt: skip
    group.add_argument("--start-epoch", type=int, default=0, help="first epoch without --resume")
    add_switch(group, "--eval", default=False, help="evaluate and stop")
    group.add_argument("--eval-interval", type=int, default=1, help="epochs between evaluations")
    add_switch(group, "--dist-eval", default=True, help="share the evaluation among processes")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--seed", type=int, default=0, help="of everything random")
    group.add_argument(
        "--num-workers",
        type=int,
        default=min(10, _num_cores()),
        help="loader processes of each process; default: one a core, 10 at most",
    )
    group.add_argument(
        "--image-cache", default="", metavar="FOLDER",
        help="keep decoded images there and augment on the device: random crop and flip only",
    )  # fmt: skip
    add_switch(group, "--pin-mem", default=True, help="page-locked batches (GPU only)")
    group.add_argument("--print-freq", type=int, default=10, help="steps between progress lines")
    add_switch(group, "--deterministic", default=False, help="bit-identical runs, if slower ones")
    group = parser.add_argument_group("surviving")
    group.add_argument(
        "--checkpoint-interval", default="0", metavar="UPDATES|MINUTESm",
        help="write checkpoints within an epoch too: every 500 updates, or every 10m; 0: never",
    )  # fmt: skip
    group.add_argument(
        "--keep-checkpoints", type=int, default=1, help="newest checkpoints to keep, and the best"
    )
    group.add_argument(
        "--dist-timeout", type=float, default=30, help="minutes to wait for another process"
    )
    group = parser.add_argument_group("what the model costs")
    add_switch(group, "--describe", default=False, help="print tokens and GMACs a block and stop")
    group.add_argument(
        "--target-gmacs", type=float, default=None,
        help="find the keep rate for this many GMACs an image; replaces --keep-rate",
    )  # fmt: skip


def get_args_parser() -> ArgumentParser:
    """The parser of `main.py`."""
    parser = ArgumentParser(
        prog="main.py", description="Train and evaluate token-reducing Vision Transformers."
    )
    add_model_arguments(parser)
    add_data_arguments(parser)
    _add_training_arguments(parser)
    _add_optimizer_arguments(parser)
    _add_augmentation_arguments(parser)
    _add_run_arguments(parser)
    return parser


def check_args(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a one-line error when flags clash or are out of range.

    What the model itself checks (keep rates, ratios, locations) is left to it.
    """
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and (not low <= value <= high or value == math.inf):
            limits = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
            parser.error(f"--{name.replace('_', '-')} must be {limits}, got {value}")
    if args.cutmix_minmax and not 0 <= args.cutmix_minmax[0] < args.cutmix_minmax[1] <= 1:
        parser.error(f"--cutmix-minmax must be 0 <= MIN < MAX <= 1, got {args.cutmix_minmax}")
    if not 0 < args.eval_crop_ratio <= 1:
        parser.error(f"--eval-crop-ratio must be in (0, 1], got {args.eval_crop_ratio}")
    if args.distillation_type != "none" and not args.teacher_path:
        parser.error(f"--distillation-type {args.distillation_type} needs --teacher-path")
    if args.distillation_type != "none" and args.finetune:
        parser.error("--finetune and --distillation-type cannot be combined, as in DeiT")
    if args.finetune and args.resume not in ("", "auto"):
        parser.error("--finetune starts a run and --resume continues one: give only one of them")
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixes and not args.eval and args.batch_size % 2:
        parser.error(f"--batch-size must be even with mixup or cutmix, got {args.batch_size}")
    for flag, path in (("--resume", args.resume), ("--finetune", args.finetune)):
        if path and path != "auto" and "://" not in path and not Path(path).is_file():
            parser.error(f"{flag}: no such file: {path}")


def reduction_arguments(args: argparse.Namespace) -> dict:
    """The model keywords of the reduction flags that were given, as plain values."""
    keywords = {name: getattr(args, name) for name in REDUCTION_FLAGS}
    return {name: _plain(value) for name, value in keywords.items() if value is not None}


def _plain(value: object) -> object:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return value[0] if len(value) == 1 and isinstance(value[0], float) else tuple(value)
    return value
