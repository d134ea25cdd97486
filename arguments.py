"""Command-line flags: the parser of `main.py` and the groups that every script shares.

Names and defaults are DeiT's and EViT's. Dashes and underscores are both accepted.
"""

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config
from timm.layers import to_2tuple
from timm.utils.misc import ParseKwargs

from models import REDUCTIONS
from models.reduction import CHOICES, Reduction, ReductionSettings
from models.vit import REDUCTION_KEYWORDS
from models.weights import WEIGHT_SOURCES, merged_settings

DEFAULTS = ReductionSettings()
DEFAULT_MODEL = "bat_deit_small_patch16_224"
DEFAULT_SIZE = (224, 224)
DATA_SETS = ("IMNET", "CIFAR10", "CIFAR100", "CIFAR", "INAT", "INAT19", "DEMO")
DEFAULT_CROP = 0.875
DEFAULT_DROP_PATH = 0.1
AMP_CHOICES = ("auto", "off", "fp16", "bf16")
# Keywords of the model that have a flag, or another way, and so cannot be given in --model-kwargs.
KEYWORD_FLAGS = {
    **dict.fromkeys(WEIGHT_SOURCES, "--finetune"),
    "pretrained": "--pretrained",
    "features_only": "forward_with_assignments in Python",
    "out_indices": "forward_with_assignments in Python",
    "in_chans": "images of three channels",
    "model_name": "--model",
    "img_size": "--input-size",
    "num_classes": "--nb-classes",
    "drop_rate": "--drop",
    "drop_path_rate": "--drop-path",
}
REDUCTION_FLAGS = tuple(name for name in REDUCTION_KEYWORDS if name != "reduction_seed")
KEYWORD_FLAGS |= {name: f"--{name.replace('_', '-')}" for name in REDUCTION_FLAGS}
# Flags of DeiT's and EViT's parsers that change nothing here, and why.
NO_EFFECT = {
    "the launcher says it": "--world-size --dist-url --dist-backend --distributed --local-rank "
    "--nodes --node --ngpus --gpu --use-volta32",
    "DeiT has no use for it either": "--resplit",
    "--sched plateau is not offered": "--patience-epochs",
}
# Flags of theirs that start something else, and the command that does it here.
ANSWERS = {
    "--test-speed": "python -m tools.benchmark measures the speed",
    "--only-test-speed": "python -m tools.benchmark measures the speed",
    "--visualize-mask": "python visualize_mask.py --checkpoint FILE --data-path FOLDER draws it",
    "--n-visualization": "python visualize_mask.py takes --num-images N",
    "--use-lmdb": "--data-path reads the image files themselves; for small images, --image-cache "
    "FOLDER keeps them decoded in one file",
}
# The interval, ends included, that the values of flags must be in.
RANGES = {
    (1, math.inf): "batch_size epoch_images accum_steps eval_interval print_freq max_image_pixels",
    (1, 10**6): "epochs keep_checkpoints",
    (0, math.inf): "lr min_lr warmup_lr lr_noise_pct weight_decay mixup cutmix num_workers",
    (0, 10**6): "start_epoch warmup_epochs cooldown_epochs shrink_epochs shrink_start_epoch",
    (1e-3, 1): "layer_decay",
    (0, 1): "mixup_prob mixup_switch_prob model_ema_decay distillation_alpha reprob",
    (1, 1000): "recount",
    (0, 100): "color_jitter",
    (0, 0.999): "drop drop_path smoothing",
    (1e-9, math.inf): "clip_grad distillation_tau dist_timeout",
    (1e-3, 10**6): "decay_epochs target_ms",
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one that the help does not explain already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is False or action.default in (None, "", {})
        if silent or "default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with one-line errors that takes `--batch_size` for `--batch-size`."""

    def __init__(self, *args, **kwargs) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        if empty := [word for word in args if word.startswith("--") and word.endswith("=--")]:
            self.error(f"{empty[0]}: not a value")  # argparse would make a list of it
        return super().parse_known_args([_dashed(word) for word in args], namespace)

    def error(self, message: str) -> None:
        """Prints the message on one line and exits with code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


class _KeyValues(ParseKwargs):
    """timm's KEY=VALUE pairs, of names that have no flag of their own."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for word in values:
            name, equals, _ = word.partition("=")
            if not equals:
                parser.error(f"{option_string} takes KEY=VALUE pairs, got '{word}'")
            if name in KEYWORD_FLAGS:
                parser.error(f"{option_string} {name}: use {KEYWORD_FLAGS[name]}")
        try:
            super().__call__(parser, namespace, values, option_string)
        except (MemoryError, RecursionError, SyntaxError, ValueError):  # as older timm leaves it
            parser.error(f"{option_string} takes KEY=VALUE pairs, got {values}")


class _Blocks(argparse.Action):
    """Stores block indices, given as 3 6 9 or, as EViT has it, as "(3, 6, 9)"."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        words = " ".join(values).translate(str.maketrans("(),[]", "     ")).split()
        try:
            setattr(namespace, self.dest, [int(word) for word in words])
        except ValueError:
            parser.error(f"{option_string} takes block indices, got '{' '.join(values)}'")


class _NoEffect(argparse.Action):
    """Takes a flag that changes nothing, with or without a value, and notes that it was given."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), option_string])


class _Answer(argparse.Action):
    """Ends the program with what to run instead of a flag."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        parser.error(f"{option_string}: {ANSWERS[option_string]}")


class _Size(argparse.Action):
    """Stores one or two lengths as (height, width)."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if len(values) > 2 or not 1 <= min(values) <= max(values) <= 2**13:
            parser.error(f"{option_string} takes one or two lengths of 1 to 8192, got {values}")
        setattr(namespace, self.dest, (values[0], values[-1]))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def finite(text: str) -> float:
    """argparse's type for a number that is neither infinite nor NaN."""
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


def at_least(low: int, high: int = 10**6) -> Callable[[str], int]:
    """argparse's type for an integer from `low` up, within reason."""

    def integer(text: str) -> int:  # argparse says "invalid integer value"
        if not low <= (value := int(text)) <= high:
            limit = f"at least {low}" if value < low else f"at most {high}"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {value}")
        return value

    return integer


random_seed = at_least(0, 2**63 - 1)


def folder(text: str) -> Path:
    """argparse's type for an output folder, which must have a name."""
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got ''")
    return Path(os.path.expanduser(text))


def add_switch(group, flag: str, *, default: bool | None, help: str) -> None:
    """Adds `--flag` and `--no-flag`."""
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)


# fmt: off
def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose a model; None means the checkpoint's value, or the default."""
    add = parser.add_argument_group("model").add_argument
    add("--model", help=f"name registered with timm; default: the checkpoint's, or {DEFAULT_MODEL}")
    add("--pretrained", action="store_true",
        help="start from timm's weights of --model, where no checkpoint is given")
    add("--model-kwargs", nargs="*", default={}, action=_KeyValues, metavar="KEY=VALUE",
        help="more keywords of the model, e.g. embed_dim=192 depth=6 patch_size=4")
    add("--input-size", type=int, nargs="+", metavar="PIXELS", action=_Size,
        help="side of the square input, or height and width; default: the checkpoint's, or that of "
        "timm's weights of --model")
    add("--nb-classes", type=at_least(1), help="classes; default: those of the data set")
    add("--ema", action="store_true",
        help="take the checkpoint's exponential moving average of the weights")
    add = parser.add_argument_group("token reduction").add_argument
    add("--keep-rate", "--base-keep-rate", type=finite, nargs="+", metavar="RATE",
        help="share of the tokens that leave a reducing block, in (0, 1]: one value, or one per "
        "block; default: the checkpoint's, or 0.7")
    add("--reduction", type=reduction_method, metavar="METHOD",
        help=f"{', '.join(REDUCTIONS)}, or my_module:my_method, which is imported; tome is a "
        "variant of ToMe at the other methods' blocks, and as published with --tome-r; default: "
        f"the checkpoint's, or {DEFAULTS.reduction}")
    add("--reduction-loc", "--drop-loc", nargs="*", metavar="BLOCK", action=_Blocks,
        help="indices of the reducing blocks, from 0; default: the checkpoint's, or those after a "
        "quarter, half and three quarters of the depth")
    add("--cluster-ratio", type=finite,
        help="share of the kept tokens spent on clusters, in [0, 1]; 0 drops the inattentive "
        f"tokens; default: the checkpoint's, or {DEFAULTS.cluster_ratio:g}")
    add("--match-ratio", type=finite,
        help="matched pairs per kept token that is not a cluster, in [0, 1]; default: the "
        f"checkpoint's, or {DEFAULTS.match_ratio:g}")
    add("--merge-weights", choices=CHOICES["merge_weights"],
        help="weights inside a merged token: of bat, its importance, 1, or the patches it stands "
        f"for; default: the checkpoint's, or {DEFAULTS.merge_weights}")
    add("--features", choices=CHOICES["features"],
        help="what clustering and matching compare: tokens, or keys of the block's attention "
        f"(mean over heads); default: the checkpoint's, or {DEFAULTS.features}")
    add("--density-neighbors", type=at_least(0), metavar="N",
        help="nearest tokens, itself included, that a density is the mean over; 0: all; default: "
        f"the checkpoint's, or {DEFAULTS.density_neighbors}")
    add("--proportional-attention", choices=CHOICES["proportional_attention"],
        help="attend to a merged token as to the patches it stands for (log size on its key's "
        "logits); auto: on for bat, tome, dpcknn and ppt; default: the checkpoint's, or "
        f"{DEFAULTS.proportional_attention}")
    add("--tome-r", type=at_least(1), metavar="R",
        help="tokens that each stage removes, ToMe's r, instead of --keep-rate, which ends it. "
        "Makes tome the published method (on keys, in all blocks by default); for tome and ppt")
    add("--ppt-threshold", type=finite,
        help="variance of the scores from which on ppt prunes; default: the checkpoint's, or "
        f"{DEFAULTS.ppt_threshold:g}")
    add("--evo-readout", choices=CHOICES["evo_readout"],
        help="evo classifies the class token, or the mean patch with a second head in training; "
        f"default: the checkpoint's, or {DEFAULTS.evo_readout}")
    add("--importance", choices=CHOICES["importance"][1:],
        help="of a token: the class token's attention to it, or what it receives from all tokens; "
        "default: the checkpoint's, or class where there is a class token")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose a data set."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data-path", default="data", help="folder with train/ and val/")
    add("--data-set", choices=DATA_SETS, default="IMNET", help="kind of data set")
    add("--inat-category", default="name", help="iNaturalist's level of the taxonomy")
    add_switch(group, "--download", default=False, help="let torchvision download the data set")
    add("--bad-images", choices=("error", "skip"), default="error",
        help="an unreadable image ends the run with its path, or is replaced and counted")
    add_image_arguments(add)


def add_image_arguments(add: Callable) -> None:
    """Adds the flags that say how an image becomes the model's input; `add` is add_argument."""
    add("--max-image-pixels", type=int, default=89_000_000, metavar="N",
        help="larger images count as unreadable, before they are decoded; the default is 1/4 GiB "
        "of RGB, and 178956970 is as far as Pillow goes")
    add("--eval-crop-ratio", type=finite,
        help="crop of the resized image, in [0.1, 1]; default: the checkpoint's, or "
        f"{DEFAULT_CROP}")
    for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        add(f"--{name}", type=finite, nargs=3, metavar=("R", "G", "B"),
            help=f"{name} of the images, in 0 to 1; default: the checkpoint's, or that of timm's "
            f"weights of --model, as {values}")
    add("--interpolation", choices=("bilinear", "bicubic"),
        help="of the evaluation; default: the checkpoint's, or that of timm's weights")


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--batch-size", "--batch", type=int, default=64,
        help="images per process and accumulation step")
    add("--epochs", type=int, default=300, help="passes over the training set")
    add("--epoch-images", type=int, metavar="N",
        help="end an epoch after so many images, drawn anew each time; default: all")
    add("--drop", type=finite, default=0.0, help="dropout probability")
    add("--drop-path", type=finite,
        help=f"stochastic depth probability; default: {DEFAULT_DROP_PATH}")
    add_switch(group, "--model-ema", default=True,
               help="keep an exponential moving average of the weights")
    add("--model-ema-decay", type=finite, default=0.99996, help="decay of the moving average")
    add_switch(group, "--model-ema-force-cpu", default=False, help="keep it in host memory")
    add("--shrink-epochs", type=int,
        help="epochs in which the keep rate falls from 1 along a cosine; default: 0 where "
        "--shrink-start-epoch is given, else the keep rate is fixed")
    add("--shrink-start-epoch", type=int,
        help="first epoch of the shrinking, all tokens are kept before it; default: 10 where "
        "--shrink-epochs is given")
    add_switch(group, "--train-mode", default=None,
               help="stochastic depth and dropout on; default: the resumed run's, else on, but off "
               "with --finetune")
    add("--evo-layerwise-epochs", type=at_least(0), default=0, metavar="N",
        help="first epochs in which evo selects before every block from its first stage on; the "
        "published recipe has 200 of 300")
    add("--attn-only", action="store_true",
        help="train the attention, the position embedding and the head alone")
    add("--bce-loss", action="store_true", help="binary cross-entropy; needs --smoothing 0")
    add("--cosub", action="store_true",
        help="co-train two random submodels on every image (needs stochastic depth: --train-mode "
        "with --finetune)")
    add("--amp", choices=AMP_CHOICES, default="auto",
        help="autocast type; auto: bf16 on GPUs that have it, fp16 on others, off on a CPU")
    add_switch(group, "--compile", default=False, help="torch.compile the model")
    add = parser.add_argument_group("distillation").add_argument
    add("--distillation-type", choices=("none", "soft", "hard"), default="none",
        help="pull the model to a teacher's distribution (soft) or decisions (hard)")
    add("--teacher-model", default="regnety_160", help="timm model")
    add("--teacher-path", default="", help="checkpoint of the teacher")
    add("--distillation-alpha", type=finite, default=0.5, help="weight, in [0, 1]")
    add("--distillation-tau", type=finite, default=1.0, help="temperature")


def _add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimizer").add_argument
    add("--opt", default="adamw", help="optimizer, by timm's name")
    add("--opt-eps", type=finite, default=1e-8, help="epsilon")
    add("--opt-betas", type=finite, nargs="+", help="betas; default: the optimizer's")
    add("--momentum", type=finite, default=0.9, help="SGD momentum")
    add("--weight-decay", type=finite, default=0.05, help="weight decay")
    add("--layer-decay", type=finite,
        help="factor on the learning rate from each block to the one before it, in (0, 1]")
    add("--clip-grad", type=finite, help="largest gradient norm; default: no limit")
    add("--accum-steps", "--grad-accum-steps", type=int, default=1,
        help="gradient accumulation steps")
    group = parser.add_argument_group("learning rate")
    add = group.add_argument
    add("--sched", default="cosine", help="scheduler, by timm's name")
    add("--lr", type=finite, default=5e-4,
        help="peak learning rate for a total batch of 512 images, scaled to the actual one")
    add_switch(group, "--unscale-lr", default=False, help="use --lr whatever the total batch")
    add("--lr-noise", type=finite, nargs="+",
        help="first and last epoch with noise, as shares of all")
    add("--lr-noise-pct", type=finite, default=0.67, help="limit of the noise")
    add("--lr-noise-std", type=finite, default=1.0, help="deviation of the noise")
    add("--warmup-lr", type=finite, default=1e-6, help="first learning rate of the warm-up")
    add("--min-lr", type=finite, default=1e-5, help="lowest learning rate, never scaled")
    add("--decay-epochs", type=finite, default=30, help="epochs between the steps of --sched step")
    add("--warmup-epochs", type=int, default=5, help="epochs of warm-up")
    add("--cooldown-epochs", type=int, default=10, help="epochs at the lowest learning rate")
    add("--decay-rate", "--dr", type=finite, default=0.1, help="factor of a step")


def _add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("augmentation")
    add = group.add_argument
    add_switch(group, "--src", default=False, help="simple random crop instead of a resized one")
    add("--color-jitter", type=finite, default=0.3, help="strength without --aa")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="RandAugment or AutoAugment policy, or none")
    add("--ThreeAugment", dest="aa", action="store_const", const="3a",
        help="DeiT-III's, the same as --aa 3a: no random erasing; with --src mirrored borders")
    add("--smoothing", type=finite, default=0.1, help="label smoothing")
    add("--train-interpolation", default="bicubic", help="bilinear, bicubic, random")
    add_switch(group, "--repeated-aug", default=True, help="repeated augmentation, three times")
    add("--reprob", type=finite, default=0.25, help="random erasing probability")
    add("--remode", default="pixel", help="random erasing fill")
    add("--recount", type=int, default=1, help="random erasing boxes")
    add("--mixup", type=finite, default=0.8, help="mixup alpha, 0 for none")
    add("--cutmix", type=finite, default=1.0, help="cutmix alpha, 0 for none")
    add("--cutmix-minmax", type=finite, nargs=2, help="cutmix box sides, as shares")
    add("--mixup-prob", type=finite, default=1.0, help="probability of mixup or cutmix")
    add("--mixup-switch-prob", type=finite, default=0.5, help="probability of cutmix if both")
    add("--mixup-mode", choices=("batch", "pair", "elem"), default="batch", help="granularity")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--output-dir", default="", help="where to write; empty: nowhere")
    add("--finetune", default="",
        help="checkpoint to start from, head included: a file (.pth, .safetensors), an address, "
        "hf-hub:OWNER/NAME, or a folder of tools.export --format hf")
    add("--resume", default="",
        help="checkpoint to continue (or to evaluate), as for --finetune; 'auto': the newest valid "
        "one of the output folder, if there is one")
    add("--start-epoch", type=int, default=0, help="first epoch without --resume")
    add_switch(group, "--eval", default=False, help="evaluate and stop")
    add("--eval-interval", type=int, default=1, help="epochs between evaluations")
    add_switch(group, "--dist-eval", default=True, help="share the evaluation among processes")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--seed", type=random_seed, default=0, help="random seed")
    add("--num-workers", type=int, default=min(10, _num_cores()),
        help="data loader worker processes of each process; default: one a core, 10 at most")
    add("--image-cache", default="", metavar="FOLDER",
        help="keep decoded images there and augment on the device: random crop and flip only")
    add_switch(group, "--pin-mem", default=True, help="page-locked batches (GPU only)")
    add("--print-freq", type=int, default=10, help="steps between progress lines")
    add_switch(group, "--deterministic", default=False, help="bit-identical runs, if slower ones")
    add("--checkpoint-interval", default="0", metavar="UPDATES|MINUTESm",
        help="write checkpoints within an epoch too: every 500 updates, or every 10m; 0: never")
    add("--keep-checkpoints", type=int, default=1,
        help="newest checkpoints to keep, beside the best")
    add("--dist-timeout", type=finite, default=30,
        help="minutes to wait for another process, and for what one of them prepares")
    add("--fuse-token", dest="reduction", action="store_const", const="evit",
        help="EViT's, the same as --reduction evit")
    for flag in " ".join(NO_EFFECT.values()).split():
        add(flag, nargs="?", dest="no_effect", default=[], action=_NoEffect, help=argparse.SUPPRESS)
    for flag in ANSWERS:
        add(flag, nargs="?", action=_Answer, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    group = parser.add_argument_group("what the model costs")
    add_switch(group, "--describe", default=False, help="print tokens and GMACs a block and stop")
    group.add_argument("--target-gmacs", type=finite,
        help="find the keep rate for this many GMACs an image; replaces --keep-rate")
    group.add_argument("--target-ms", type=finite,
        help="with --describe: measure this machine, and find the largest keep rate whose forward "
        "pass of --batch-size images takes at most so many milliseconds")
    group.add_argument("--save-speed", default="", metavar="FILE",
        help="keep what --target-ms measures there; where the file exists nothing is measured")
# fmt: on


def reduction_method(text: str) -> str:
    """The name of a method; my_module:my_method is imported and registered under that name."""
    module, colon, function = text.partition(":")
    if colon and text not in REDUCTIONS:
        sys.path.insert(0, os.getcwd())
        try:
            method = getattr(importlib.import_module(module), function)
            if not isinstance(method, Reduction | Callable):
                raise TypeError(f"it is a {type(method).__name__}")
        except Exception as problem:
            reason = f"{type(problem).__name__}: {problem}"
            raise argparse.ArgumentTypeError(f"cannot import {text}: {reason}") from problem
        finally:
            sys.path.remove(os.getcwd())
        REDUCTIONS[text] = method if isinstance(method, Reduction) else Reduction(method)
    if text not in REDUCTIONS:
        choices = ", ".join(REDUCTIONS)
        raise argparse.ArgumentTypeError(f"unknown method '{text}'; choose from {choices}")
    return text


def reduction_variant(text: str) -> dict:
    """Keywords of `make_reducing` in METHOD,NAME=VALUE,...; of several values: 4+8.

    Raises:
        ValueError: a word is no pair, or there is no such setting.
    """
    method, *pairs = text.split(",")
    variant = {"reduction": method}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in REDUCTION_KEYWORDS:
            raise ValueError(f"'{pair}' is not NAME=VALUE; names: {', '.join(REDUCTION_KEYWORDS)}")
        parts = [_number(part) for part in value.split("+")]
        variant[name] = parts if len(parts) > 1 or name == "reduction_loc" else parts[0]
    return variant


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def variant_name(text: str) -> str:
    """argparse's type for a `reduction_variant`, which stays text."""
    try:
        reduction_method(reduction_variant(text)["reduction"])
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from problem
    return text


def get_args_parser() -> ArgumentParser:
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
    for (low, high), names in RANGES.items():
        limits = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not low <= value <= high:
                parser.error(f"--{name.replace('_', '-')} must be {limits}, got {value}")
    if args.cutmix_minmax and not 0 <= args.cutmix_minmax[0] < args.cutmix_minmax[1] <= 1:
        parser.error(f"--cutmix-minmax must be 0 <= MIN < MAX <= 1, got {args.cutmix_minmax}")
    if args.distillation_type != "none" and not args.teacher_path:
        parser.error(f"--distillation-type {args.distillation_type} needs --teacher-path")
    if args.distillation_type != "none" and args.finetune:
        parser.error("--finetune and --distillation-type cannot be combined, as in DeiT")
    if args.bce_loss and args.smoothing:
        parser.error("--bce-loss needs --smoothing 0: it takes every target above 0 for 1")
    if args.cosub and args.distillation_type != "none":
        parser.error("--cosub and --distillation-type cannot be combined")
    if args.ema and not (args.eval or args.describe or args.finetune):
        parser.error("--ema goes with --eval or --finetune: a resumed run has both weights")
    if args.target_ms is not None and (not args.describe or args.target_gmacs is not None):
        parser.error("--target-ms goes with --describe, and not with --target-gmacs")
    if args.save_speed and args.target_ms is None:
        parser.error("--save-speed keeps what --target-ms measures: add --target-ms")
    if args.sched == "plateau":
        parser.error("--sched plateau cannot be resumed exactly: choose another scheduler")
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixes and not (args.eval or args.describe) and args.batch_size % 2:
        parser.error(f"--batch-size must be even with mixup or cutmix, got {args.batch_size}")


def model_arguments(
    args: argparse.Namespace, stored: Mapping | None = None, variant: Mapping | None = None
) -> dict:
    """Keywords of `timm.create_model`: the flags given, over a checkpoint's, over the defaults.

    Args:
        args: reads the flags of `add_model_arguments`.
        stored: `model_args` of the checkpoint, if it has any; see `merged_settings`.
        variant: a `reduction_variant`, which is over the flags.

    Returns:
        Plain values that a checkpoint can hold; "num_classes" only where something says it.
    """
    stored = stored or {}
    flags = {"model_name": args.model, "img_size": args.input_size, "num_classes": args.nb_classes}
    flags |= {name: getattr(args, name) for name in REDUCTION_FLAGS}
    given = {name: _plain(value) for name, value in flags.items() if value is not None}
    if args.pretrained:
        given["pretrained"] = True
    name = args.model or stored.get("model_name", DEFAULT_MODEL)
    defaults = {"model_name": name, "img_size": to_2tuple(pretrained_config(name)["input_size"])}
    return defaults | merged_settings(stored, given | dict(variant or {})) | args.model_kwargs


def pretrained_config(model_name: str) -> dict:
    """Input size and the other values of `data_config` for timm's weights of a model, or DeiT's."""
    known = None
    with suppress(Exception):  # no name, or no tag of it: building the model says so
        known = timm.get_pretrained_cfg(model_name)
    config = resolve_data_config({"in_chans": 3}, known.to_dict() if known else None)
    return config | {"input_size": config["input_size"][1:]}


def data_config(
    args: argparse.Namespace, input_size: int | tuple[int, int], stored: Mapping
) -> dict:
    """What makes an image the model's input: the flags given, over stored values.

    Args:
        args: reads eval_crop_ratio, mean, std and interpolation.
        input_size: (H, W), or one number for both.
        stored: a model's pretrained_cfg, or `pretrained_config` with a checkpoint's data_config.

    Returns:
        Plain values by timm's names: input_size (H, W), crop_pct in [0.1, 1], mean and std of the
        channels, interpolation, crop_mode ("center" or "squash").
    """
    flags = {"crop_pct": args.eval_crop_ratio, "mean": args.mean, "std": args.std}
    flags |= {"interpolation": args.interpolation}
    known = pretrained_config(DEFAULT_MODEL) | dict(stored)
    config = {name: _plain(known[name] if v is None else v) for name, v in flags.items()}
    fixed = {"input_size": to_2tuple(input_size), "crop_mode": known["crop_mode"]}
    return fixed | config


def _plain(value: object) -> object:
    if isinstance(value, list):
        return value[0] if len(value) == 1 and isinstance(value[0], float) else tuple(value)
    return value
