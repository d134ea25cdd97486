"""Compares the methods of token reduction, measures their tokens, and follows every patch.

    python analyze.py sweep --checkpoint best.pth --reduction topk evit bat --keep-rate 0.7 0.5 \\
        --data-path data/demo --output-dir output/sweep
    python analyze.py diversity --checkpoint best.pth --data-path data/demo
    python analyze.py tokens --checkpoint best.pth --data-path FOLDER

Exit codes: 0 done, 1 images could not be read (they are named, and counted at the end), 2 bad
input, 130 and 143 interrupted (Ctrl-C, SIGTERM).
"""

import os
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from analysis import write_csv
from analysis.diversity import measure_methods
from analysis.figures import plot_diversity, plot_patches, save_figure
from analysis.paired import compare, comparison_pairs
from analysis.predictions import open_predictions
from analysis.sweep import (
    Configuration,
    digest_weights,
    find_configuration,
    log_comparisons,
    make_configurations,
    run_sweep,
    summarize,
    write_sweep,
)
from analysis.tokens import follow_files
from arguments import AMP_CHOICES, ArgumentParser, add_data_arguments, add_model_arguments
from builders import AMP_DTYPES, with_stored_model
from checkpoints import load_checkpoint
from datasets import SampleDataset, build_dataset, build_transform
from image_cache import digest_dataset
from models import REDUCTIONS, BATVisionTransformer
from recorder import check_writable
from utils import InputError, init_process, logger, setup_logging
from visualize_mask import list_images, load_model

ALL_METHODS = tuple(REDUCTIONS)
SWEEP_HELP = """Evaluates checkpoints x methods x keep rates in one pass over the validation images
and compares the answers image by image. Writes sweep.csv and sweep.json (Acc@1, Acc@5, loss, GMACs,
images/s of the forward pass, patch tokens that leave each stage), sweep.png and sweep.pdf,
comparisons.csv (bat against every other method, and every method against evit: difference of Acc@1
in points, its 95 percent bootstrap interval, p-value of McNemar's exact test, not corrected for
the number of comparisons) and predictions.npz (what every configuration predicts for every image).
An interrupted sweep goes on when the same command is given again."""
DIVERSITY_HELP = """Measures the patch tokens X (one a row) that leave each block: the relative
distance to equal tokens ||X - 1 m^T||_F / ||X||_F with m the mean token; the mean cosine of all
pairs of tokens; the effective rank, exp of the entropy of the normalised singular values (Roy and
Vetterli 2007); and for each reducing block the share of the class token's attention to patch tokens
that the attentive ones carry: BAT's attentive tokens, for other methods the K most attended tokens,
K being how many the keep rate leaves. Writes diversity.csv, .png and .pdf."""
TOKENS_HELP = """Says for every patch of every image what became of it. tokens.csv has a row a
patch, with lost_at, the first stage (from 1) after which no token stands for the patch alone, and
for each stage: the kind of token that the patch is in afterwards (single, pair, cluster, dropped),
the number of that token, the importance that the patch's token had before, and that token's weight
in the one it went into; final_weight is the product of the weights: with what share the patch is in
final_token; these shares sum to 1 over the patches of a final token. For evit's fused token, a sum,
weights are importances divided by their sum. tokens.png and .pdf show the means over the images."""


def get_args_parser() -> ArgumentParser:
    """The parser of this script."""
    parser = ArgumentParser(prog="analyze.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_sweep(commands)
    _add_diversity(commands)
    _add_tokens(commands)
    return parser


def _add_command(commands, name: str, description: str, *, summary: str, batch_size: int):
    """A subcommand's parser with the flags that all of them have."""
    # "resolve": some of the shared flags mean more here.
    parser = commands.add_parser(
        name, help=summary, description=description, conflict_handler="resolve"
    )
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.set_defaults(bad_images="skip")
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", default=f"output/{name}", help="where to write")
    group.add_argument("--batch-size", type=int, default=batch_size, help="images at a time")
    group.add_argument("--num-workers", type=int, default=2, help="processes that read images")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--seed", type=int, default=0, help="of everything random")
    return parser


def _add_sweep(commands) -> None:
    parser = _add_command(
        commands, "sweep", SWEEP_HELP, summary="accuracy against cost", batch_size=64
    )
    group = parser.add_argument_group("what to evaluate")
    group.add_argument("--checkpoint", nargs="+", required=True, help="files of main.py")
    group.add_argument(
        "--reduction", nargs="+", choices=ALL_METHODS, default=["topk", "evit", "bat"],
        metavar="METHOD", help=f"methods: {', '.join(ALL_METHODS)}",
    )  # fmt: skip
    group.add_argument(
        "--keep-rate", "--base-keep-rate", type=float, nargs="+", default=[1.0, 0.7, 0.5, 0.3],
        metavar="RATE", help="keep rates of all stages, in (0, 1]; 1 is the dense model",
    )  # fmt: skip
    group.add_argument(
        "--compare", nargs=2, action="append", default=[], metavar=("A", "B"),
        help="print one pair and add it to comparisons.csv, such as bat@0.5 evit@0.7; with several "
        "checkpoints best:bat@0.5; may be given again",
    )  # fmt: skip
    group.add_argument("--amp", choices=AMP_CHOICES, default="off", help="autocast type")
    group.add_argument(
        "--save-every", type=int, default=20, metavar="N", help="batches between savings"
    )
    group.add_argument("--restart", action="store_true", help="replace an earlier sweep")


def _add_diversity(commands) -> None:
    parser = _add_command(
        commands, "diversity", DIVERSITY_HELP, summary="how different the tokens are", batch_size=16
    )
    group = parser.add_argument_group("what to measure")
    group.add_argument("--checkpoint", default="", help="of main.py; without it: random weights")
    group.add_argument(
        "--reduction", nargs="+", choices=ALL_METHODS, default=list(ALL_METHODS),
        metavar="METHOD", help=f"methods: {', '.join(ALL_METHODS)}",
    )  # fmt: skip
    group.add_argument(
        "--num-images", type=int, default=64, metavar="N",
        help="images to measure, spread evenly over the validation images",
    )  # fmt: skip


def _add_tokens(commands) -> None:
    parser = _add_command(
        commands, "tokens", TOKENS_HELP, summary="what happened to every patch", batch_size=16
    )
    group = parser.add_argument_group("what to follow")
    group.add_argument("--checkpoint", default="", help="of main.py; without it: random weights")
    group.add_argument(
        "--data-path", required=True,
        help="an image, a folder of images (searched recursively), or a text file with one path a "
        "line",
    )  # fmt: skip
    group.add_argument(
        "--num-images", type=int, default=None, metavar="N",
        help="follow the first N images; default: all",
    )  # fmt: skip


class Subject(NamedTuple):
    """A checkpoint and the arguments that rebuild its model."""

    path: str
    checkpoint: dict
    args: Namespace  # no model flag is left open


def read_subject(args: Namespace, path: str, **choices: object) -> Subject:
    """Reads a checkpoint; "" stands for random weights.

    Args:
        args: as parsed; not changed.
        path: of the checkpoint.
        **choices: arguments to replace; None leaves them to the checkpoint.
    """
    checkpoint = load_checkpoint(path) if path else {}
    own = Namespace(**vars(args) | {"checkpoint": path} | choices)
    return Subject(path, checkpoint, with_stored_model(own, checkpoint.get("model_args")))


def load_subject(
    subject: Subject, dataset: SampleDataset | None, device: torch.device
) -> BATVisionTransformer:
    """Builds a checkpoint's model on its device.

    Raises:
        InputError: it does not fit its own weights, or has not as many classes as the data set.
    """
    loaded = load_model(subject.args, subject.checkpoint, dataset.classes if dataset else ())
    num_classes = loaded.model.num_classes
    if dataset is not None and num_classes != len(dataset.classes):
        raise InputError(
            f"{subject.path} has {num_classes} classes, the data set "
            f"{subject.args.data_path} has {len(dataset.classes)}"
        )
    return loaded.model.to(device)


def short_labels(paths: Sequence[str]) -> list[str]:
    """Names for checkpoints: as few of the last parts of their paths as tell them apart.

    Raises:
        InputError: a checkpoint is given twice.
    """
    parts = [Path(path).with_suffix("").parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(own[-count:]) for own in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise InputError(f"checkpoints must differ, got {', '.join(paths)}")


def name_bad_images(dataset: SampleDataset, indices: Sequence[int]) -> int:
    """Names the unreadable images of a data set, and gives the exit code."""
    samples = getattr(dataset.source, "samples", None)
    for index in indices:
        name = samples[index][0] if samples else f"number {index}"
        print(f"cannot read image {name}", file=sys.stderr)
    return report_bad_images(len(indices), len(dataset))


def report_bad_images(num_bad: int, num_images: int) -> int:
    """Says how many images could not be read, and gives the exit code."""
    if num_bad:
        print(f"{num_bad} of {num_images} images could not be read", file=sys.stderr)
    return 1 if num_bad else 0


def sweep(args: Namespace) -> int:
    """Runs `analyze.py sweep` and returns the exit code."""
    for rate in args.keep_rate:
        if not 0 < rate <= 1:
            raise InputError(f"--keep-rate must be in (0, 1], got {rate}")
    device = init_process(args.device)
    labels = short_labels(args.checkpoint)
    own = {"keep_rate": None, "reduction": None}
    subjects = [read_subject(args, path, **own) for path in args.checkpoint]
    sizes = {subject.args.input_size for subject in subjects}
    if len(sizes) > 1:
        raise InputError(f"the checkpoints must share one input size, got {sorted(sizes)}")
    dataset, _ = build_dataset(False, subjects[0].args)
    models = {
        label: load_subject(subject, dataset, device)
        for label, subject in zip(labels, subjects, strict=True)
    }
    configurations = make_configurations(labels, args.reduction, args.keep_rate)
    asked = [
        (find_configuration(configurations, first), find_configuration(configurations, second))
        for first, second in args.compare
    ]
    folder = check_writable(args.output_dir)
    settings = sweep_settings(args, subjects, models, configurations, dataset)
    path = folder / "predictions.npz"
    counts = len(configurations), len(dataset)
    predictions = open_predictions(path, settings, *counts, restart=args.restart)
    done = f", {predictions.progress.num_done} of them done earlier"
    logger.info(f"{counts[0]} configurations on {counts[1]} images{done}")
    run_sweep(
        predictions,
        models,
        configurations,
        dataset,
        path,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        amp_dtype=AMP_DTYPES[args.amp],
        save_every=args.save_every,
    )
    rows = summarize(predictions, models, configurations)
    pairs = comparison_pairs(configurations) + asked
    comparisons = compare(predictions, configurations, pairs, seed=args.seed)
    write_sweep(folder, rows, comparisons, settings)
    log_comparisons(compare(predictions, configurations, asked, seed=args.seed))
    return name_bad_images(dataset, np.flatnonzero(predictions.is_bad))


def sweep_settings(
    args: Namespace,
    subjects: Sequence[Subject],
    models: Mapping[str, BATVisionTransformer],
    configurations: Sequence[Configuration],
    dataset: SampleDataset,
) -> dict:
    """Everything that the predictions of a sweep depend on, as plain values."""
    return {
        "configurations": [entry.name for entry in configurations],
        "checkpoints": {
            label: {"path": subject.path, "weights": digest_weights(models[label])}
            | _reduction_settings(models[label])
            for label, subject in zip(models, subjects, strict=True)
        },
        "data": {"path": args.data_path, "files": digest_dataset(dataset)},
        "input_size": subjects[0].args.input_size,
        "eval_crop_ratio": args.eval_crop_ratio,
        "bad_images": args.bad_images,
        "batch_size": args.batch_size,
        "amp": args.amp,
        "device": next(iter(models.values())).head.weight.device.type,
    }


def _reduction_settings(model: BATVisionTransformer) -> dict:
    """What a model's results depend on beside its weights, method and keep rate."""
    block = model.blocks[model.reduction_loc[0]] if model.reduction_loc else None
    names = ("cluster_ratio", "match_ratio", "merge_weights", "reduction_seed")
    values = {name: getattr(block, name) for name in names} if block else {}
    return {"reduction_loc": list(model.reduction_loc)} | values


def diversity(args: Namespace) -> int:
    """Runs `analyze.py diversity` and returns the exit code."""
    device = init_process(args.device)
    subject = read_subject(args, args.checkpoint, reduction=None)
    dataset, _ = build_dataset(False, subject.args)
    model = load_subject(subject, dataset, device)
    folder = check_writable(args.output_dir)
    count = min(args.num_images, len(dataset))
    indices = np.arange(count) * len(dataset) // count
    loader = DataLoader(
        Subset(dataset, indices.tolist()),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
    )
    bad: list[bool] = []

    def readable() -> Iterator[Tensor]:
        for images, _, is_bad in loader:
            bad.extend(is_bad.bool().tolist())
            logger.info(f"measuring image {len(bad)} of {count}")
            if not is_bad.all():
                yield images[~is_bad.bool()].to(device)

    rows = measure_methods(model, args.reduction, readable())
    write_csv(folder / "diversity.csv", rows)
    save_figure(plot_diversity(rows), folder / "diversity")
    return name_bad_images(dataset, indices[np.flatnonzero(bad)])


def tokens(args: Namespace) -> int:
    """Runs `analyze.py tokens` and returns the exit code."""
    root = Path(args.data_path).expanduser()
    files = list_images(root)[: args.num_images]
    device = init_process(args.device)
    subject = read_subject(args, args.checkpoint)
    model = load_subject(subject, None, device)
    folder = check_writable(args.output_dir)
    names = [str(path.relative_to(root)) if root.is_dir() else path.name for path in files]
    transform = build_transform(False, subject.args)
    table = folder / "tokens.csv"
    means = follow_files(model, files, names, transform, table, batch_size=args.batch_size)
    if not means.num_images:
        raise InputError(f"none of the {len(files)} images of {root} can be read")
    rows, columns = model.patch_embed.grid_size
    figure = plot_patches(
        means.importance().reshape(-1, rows, columns),
        means.lost_at().reshape(rows, columns),
        model.reduction_loc,
        means.num_images,
    )
    save_figure(figure, folder / "tokens")
    return report_bad_images(len(files) - means.num_images, len(files))


COMMANDS = {"sweep": sweep, "diversity": diversity, "tokens": tokens}


class Terminated(KeyboardInterrupt):
    """SIGTERM came; handled as Ctrl-C."""


def _terminate(*_: object) -> None:
    raise Terminated


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    setup_logging()
    parser = get_args_parser()
    args = parser.parse_args(argv)
    for name in ("batch_size", "num_images", "save_every"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("analyze.py runs in one process, without torchrun")
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        with parser.exit_on_bad_input():
            return COMMANDS[args.command](args)
    except KeyboardInterrupt as signalled:
        kept = "; the same command goes on from there" if args.command == "sweep" else ""
        print(f"{parser.prog}: interrupted{kept}", file=sys.stderr)
        return 143 if isinstance(signalled, Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
