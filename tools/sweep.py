"""Accuracy and cost of checkpoints x methods x keep rates in one pass over a data set.

    python -m tools.sweep --checkpoint best.pth --reduction topk evit bat --keep-rate 0.7 0.5 \\
        --data-path data/demo --output-dir output/sweep

Every batch is decoded once and shown to all configurations; methods and keep rates are switched on
the same weights. What is known so far is in one file, predictions.npz, from which an interrupted
sweep goes on. Exit codes: 0 done, 1 images could not be read (they are named and counted), 2 bad
input, 130 interrupted (Ctrl-C, SIGTERM).
"""

import hashlib
import json
import signal
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import permutations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from arguments import AMP_CHOICES, ArgumentParser, add_data_arguments
from datasets import SampleDataset, build_dataset
from engine import score_batch
from inputs.cache import digest_dataset
from models import REDUCTIONS, BATVisionTransformer, count_gmacs
from tools import common
from tools.figures import plot_accuracy, save_figure
from utils import (
    AMP_DTYPES,
    InputError,
    check_writable,
    find_amp,
    git_hash,
    logger,
    run_script,
    versions,
    write_atomically,
)

NUM_RESAMPLES = 10_000
HELP = """Evaluates checkpoints x methods x keep rates in one pass over the validation images
and compares the answers image by image. Writes sweep.csv and sweep.json (Acc@1, Acc@5, loss, GMACs,
images/s of the forward pass, patch tokens that leave each stage), sweep.png and sweep.pdf,
comparisons.csv (bat against every other method, and every method against evit: difference of Acc@1
in points, its 95 percent bootstrap interval, p-value of McNemar's exact test, not corrected for
the number of comparisons) and predictions.npz (what every configuration predicts for every image).
An interrupted sweep goes on when the same command is given again."""

# What is evaluated -------------------------------------------------------------------------------


class Configuration(NamedTuple):
    """What is evaluated: one method at one keep rate on one checkpoint's weights."""

    checkpoint: str  # label of the checkpoint
    reduction: str
    keep_rate: float

    @property
    def short_name(self) -> str:
        """Such as bat@0.5."""
        return f"{self.reduction}@{self.keep_rate:g}"

    @property
    def name(self) -> str:
        """Such as best:bat@0.5."""
        return f"{self.checkpoint}:{self.short_name}"


def make_configurations(
    checkpoints: Sequence[str], reductions: Sequence[str], keep_rates: Sequence[float]
) -> list[Configuration]:
    """All combinations; what keeps every token is one configuration a checkpoint, none@1."""
    chosen = dict.fromkeys(
        (checkpoint, "none", 1.0) if reduction == "none" or keep_rate == 1
        else (checkpoint, reduction, keep_rate)
        for checkpoint, reduction, keep_rate in product(checkpoints, reductions, keep_rates)
    )  # fmt: skip
    return [Configuration(*choice) for choice in chosen]


def find_configuration(configurations: Sequence[Configuration], name: str) -> int:
    """Index of a configuration by name, such as bat@0.5, or best:bat@0.5 with several checkpoints.

    Raises:
        InputError: no configuration has the name, or several have; the message lists the choices.
    """
    label, _, short_name = name.rpartition(":")
    method, _, rate = short_name.partition("@")
    with suppress(ValueError):
        rate = float(rate)
    wanted = ("none" if rate == 1 else method, rate)
    found = [
        index
        for index, entry in enumerate(configurations)
        if entry[1:] == wanted and label in ("", entry.checkpoint)
    ]
    if len(found) == 1:
        return found[0]
    alone = len({entry.checkpoint for entry in configurations}) == 1
    names = ", ".join(entry.short_name if alone else entry.name for entry in configurations)
    problem = "more than one" if found else "no"
    raise InputError(f"{problem} configuration is named '{name}'; choose from {names}")


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


def switch(
    models: Mapping[str, BATVisionTransformer], configuration: Configuration
) -> BATVisionTransformer:
    """The configuration's model, by checkpoint label, switched to its method and keep rate."""
    model = models[configuration.checkpoint]
    model.set_reduction(configuration.reduction)
    model.set_keep_rate(configuration.keep_rate)
    return model


# What is known -----------------------------------------------------------------------------------


Predictions = dict[str, np.ndarray]  # the arrays of predictions.npz, see `open_predictions`


def open_predictions(
    path: Path, settings: dict, num_configurations: int, num_images: int, *, restart: bool
) -> Predictions:
    """What an earlier, perhaps interrupted sweep with the same settings knows, or nothing yet.

    Args:
        path: of predictions.npz.
        settings: as `sweep_settings` gives them.
        num_configurations: configurations of the sweep.
        num_images: images of the data set.
        restart: leave an earlier sweep alone; it is replaced at the first saving.

    Returns:
        By name: settings, as JSON; num_done, the images that every configuration has seen: columns
        from there on are open; of shape (configurations, images) predicted, the class of the
        largest logit, correct1, correct5 and loss, see `BatchScores`, and seconds, the image's
        share of its batch's forward time (NaN: not timed); of shape (images,) is_bad, whether the
        image could not be read and counts as wrong.

    Raises:
        InputError: the file is damaged, or the earlier sweep had other settings (they are named).
    """
    if restart or not path.exists():
        shape = (num_configurations, num_images)
        return {
            "settings": np.array(json.dumps(settings)),
            "num_done": np.array(0),
            "predicted": np.full(shape, -1, dtype=np.int32),
            "correct1": np.zeros(shape, dtype=bool),
            "correct5": np.zeros(shape, dtype=bool),
            "loss": np.zeros(shape, dtype=np.float32),
            "seconds": np.full(shape, np.nan, dtype=np.float32),
            "is_bad": np.zeros(num_images, dtype=bool),
        }
    try:
        with np.load(path, allow_pickle=False) as stored:
            earlier = dict(stored)
        # One level, with keys such as data.path.
        then = pd.json_normalize(json.loads(str(earlier["settings"]))).to_dict("records")[0]
    except Exception as problem:  # damaged files fail in every way that a reader can
        raise InputError(f"{path} cannot be read; --restart replaces it") from problem
    now = pd.json_normalize(settings).to_dict("records")[0]
    differing = [
        f"{name} was {then.get(name)}, is {now.get(name)}"
        for name in then | now
        if then.get(name) != now.get(name)
    ]
    if differing:
        raise InputError(
            f"{path.parent} holds a sweep with other settings: {'; '.join(differing)}; "
            "give another --output-dir, or --restart to begin anew"
        )
    return earlier


def save_predictions(predictions: Predictions, path: Path) -> None:
    write_atomically(path, lambda file: np.savez(file, **predictions))


def sweep_settings(
    args: Namespace,
    models: Mapping[str, BATVisionTransformer],
    configurations: Sequence[Configuration],
    dataset: SampleDataset,
    amp: str,
) -> dict:
    """Everything that the predictions of a sweep depend on, as plain values of JSON."""
    names = ("reduction_loc", "cluster_ratio", "match_ratio", "merge_weights")
    settings = {
        "configurations": [entry.name for entry in configurations],
        "checkpoints": {
            label: {"path": path, "ema": args.ema, "weights": digest_weights(model)}
            | {name: getattr(model, name) for name in names}
            for path, (label, model) in zip(args.checkpoint, models.items(), strict=True)
        },
        "model_kwargs": args.model_kwargs,
        "data": {"path": args.data_path, "files": digest_dataset(dataset)},
        "input_size": dataset.image_size,
        "eval_crop_ratio": args.eval_crop_ratio,
        "bad_images": args.bad_images,
        "batch_size": args.batch_size,
        "amp": amp,
        "device": next(iter(models.values())).head.weight.device.type,
    }
    return json.loads(json.dumps(settings))  # tuples become lists, as in the file


def digest_weights(model: nn.Module) -> str:
    """Short hash of a model's weights."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# The pass over the data --------------------------------------------------------------------------


@torch.no_grad()
def timed_forward(
    model: BATVisionTransformer, images: Tensor, amp_dtype: torch.dtype | None
) -> tuple[Tensor, float]:
    """Logits of images (B, 3, H, W) that lie on the model's device, and the seconds they took."""
    on_gpu = images.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(images.device)
    begin = time.perf_counter()
    with torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        logits = model(images)
    if on_gpu:
        torch.cuda.synchronize(images.device)
    return logits, time.perf_counter() - begin


def run_sweep(
    predictions: Predictions,
    models: Mapping[str, BATVisionTransformer],
    configurations: Sequence[Configuration],
    *,
    loader: DataLoader,
    amp_dtype: torch.dtype | None,
    save_every: int,
    path: Path,
) -> None:
    """Evaluates what is still open, and saves every few batches and however the loop ends.

    The first batch after a start warms up and is not timed, unless there is no other.

    Args:
        predictions: changed in place.
        models: by checkpoint label, all on one device; method and keep rate are switched.
        configurations: in the order of the rows of the predictions.
        loader: gives the images that are still open, in order.
        amp_dtype: autocast type, or None for none.
        save_every: batches between savings.
        path: of predictions.npz.
    """
    device = next(iter(models.values())).head.weight.device
    # One unit is one batch through one configuration; their speeds differ, so the mean is taken.
    total = len(configurations) * len(loader)
    bar = tqdm(desc="Sweep", unit="batch", mininterval=1, smoothing=0, total=total)
    try:
        with bar:
            for number, batch in enumerate(loader, 1):
                images, targets, is_bad = (part.to(device, non_blocking=True) for part in batch)
                start = int(predictions["num_done"])
                here = slice(start, start + len(images))
                for row, configuration in enumerate(configurations):
                    model = switch(models, configuration)
                    logits, seconds = timed_forward(model, images, amp_dtype)
                    predictions["predicted"][row, here] = logits.float().argmax(dim=1).cpu()
                    for name, values in score_batch(logits, targets, is_bad)._asdict().items():
                        predictions[name][row, here] = values.cpu()
                    if number > 1 or len(loader) == 1:
                        predictions["seconds"][row, here] = seconds / len(images)
                    bar.update()
                predictions["is_bad"][here] = is_bad.cpu()
                predictions["num_done"] = np.array(here.stop)  # last: till then the batch is open
                if number % save_every == 0:
                    save_predictions(predictions, path)
    finally:
        save_predictions(predictions, path)


# Results -----------------------------------------------------------------------------------------


def summarize(
    predictions: Predictions,
    models: Mapping[str, BATVisionTransformer],
    configurations: Sequence[Configuration],
) -> list[dict]:
    """One row a configuration of a finished sweep: accuracy, cost, speed and tokens.

    Args:
        predictions: of all images.
        models: by checkpoint label; method and keep rate are switched.
        configurations: in the order of the rows of the predictions.

    Returns:
        Plain values: checkpoint, reduction, keep_rate, acc1 and acc5 in percent, loss (mean
        cross-entropy), gmacs and images_per_second of the forward pass, tokens (patch tokens that
        leave each reducing block), num_images, bad_images.
    """
    num_images = int(predictions["num_done"])
    images_per_second = 1 / np.nanmean(predictions["seconds"], axis=1, dtype=np.float64)
    rows = []
    for index, configuration in enumerate(configurations):
        model = switch(models, configuration)
        rows.append({
            **configuration._asdict(),
            "acc1": 100 * float(predictions["correct1"][index].sum()) / num_images,
            "acc5": 100 * float(predictions["correct5"][index].sum()) / num_images,
            "loss": float(predictions["loss"][index].mean(dtype=np.float64)),
            "gmacs": count_gmacs(model),
            "images_per_second": float(images_per_second[index]),
            "tokens": [stage.num_outputs for stage in model.stages()],
            "num_images": num_images,
            "bad_images": int(predictions["is_bad"].sum()),
        })  # fmt: skip
    return rows


def compare_paired(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> dict:
    """Compares which images two configurations get right.

    The bootstrap draws the images with replacement, both answers to an image together, 10,000
    times, and takes the 2.5th and 97.5th percentile (Efron and Tibshirani 1993, chapter 13). Only
    how many images fall to either side matters, and these counts are multinomial: they are drawn
    directly. McNemar's exact test asks how likely so uneven a split of the images that only one
    gets right is, if each fell to either side with probability 1/2 (two-sided binomial test).

    Args:
        first: (images,) bool, right answers of one configuration.
        second: (images,) bool, of the other.
        seed: random seed of the bootstrap.

    Returns:
        difference: accuracy of the first less that of the second, in percentage points; low and
        high: ends of its 95 % interval; only_first and only_second: images that one alone gets
        right; p_value: of McNemar's test.
    """
    num_images = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    counts = np.array([only_first, only_second, num_images - only_first - only_second])
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(num_images, counts / num_images, size=NUM_RESAMPLES)
    low, high = np.quantile(100 * (drawn[:, 0] - drawn[:, 1]) / num_images, [0.025, 0.975])
    discordant = only_first + only_second
    return {
        "difference": 100 * (only_first - only_second) / num_images,
        "low": float(low),
        "high": float(high),
        "only_first": only_first,
        "only_second": only_second,
        "p_value": float(binomtest(only_first, discordant).pvalue) if discordant else 1.0,
    }


def comparison_pairs(configurations: Sequence[Configuration]) -> list[tuple[int, int]]:
    """Bat against every other method, and every other one against evit, at each keep rate."""
    return [
        (index, rival_index)
        for (index, entry), (rival_index, rival) in permutations(enumerate(configurations), 2)
        if (entry.checkpoint, entry.keep_rate) == (rival.checkpoint, rival.keep_rate)
        and (entry.reduction == "bat" or rival.reduction == "evit")
    ]


def compare(
    predictions: Predictions,
    configurations: Sequence[Configuration],
    pairs: Iterable[tuple[int, int]],
    *,
    seed: int = 0,
) -> list[dict]:
    """One row of plain values a pair: the two names, their Acc@1, and `compare_paired`'s."""
    right = predictions["correct1"]
    acc1 = 100 * right.mean(axis=1)
    return [
        {
            "first": configurations[first].name,
            "second": configurations[second].name,
            "acc1_first": float(acc1[first]),
            "acc1_second": float(acc1[second]),
        }
        | compare_paired(right[first], right[second], seed=seed)
        for first, second in dict.fromkeys(pairs)
    ]


def write_sweep(folder: Path, rows: list[dict], comparisons: list[dict], settings: dict) -> None:
    """Writes the tables and the figure of a finished sweep, and prints the main columns."""
    table = pd.DataFrame(rows)
    tokens = table.tokens.map(lambda counts: " ".join(map(str, counts)))
    common.write_table(table.assign(tokens=tokens), folder / "sweep.csv")
    whole = {
        "results": rows,
        "comparisons": comparisons,
        "settings": settings,
        "git_hash": git_hash(),
        "versions": versions(),
    }
    (folder / "sweep.json").write_text(json.dumps(whole, indent=2) + "\n")
    (folder / "comparisons.csv").unlink(missing_ok=True)  # an earlier sweep's
    written = "sweep.csv, .json, .png and .pdf"
    if comparisons:
        common.write_table(pd.DataFrame(comparisons), folder / "comparisons.csv")
        written += ", comparisons.csv"
    save_figure(plot_accuracy(rows), folder / "sweep")
    shown = table.drop(columns=["num_images", "bad_images"])
    digits = {"acc1": 3, "acc5": 3, "loss": 4, "gmacs": 4, "images_per_second": 1}
    logger.info(shown.round(digits).to_string(index=False))
    logger.info(f"wrote {written} to {folder}")


# Command line ------------------------------------------------------------------------------------


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"must be in (0, 1], got {value}")
    return value


def get_parser() -> ArgumentParser:
    """The parser of this script."""
    parser = common.tool_parser("sweep", HELP, batch_size=64)
    add_data_arguments(parser)
    parser.set_defaults(bad_images="skip")
    add = parser.add_argument_group("what to evaluate").add_argument
    add("--checkpoint", nargs="+", required=True, help="files of main.py")
    add(
        "--reduction", nargs="+", choices=tuple(REDUCTIONS), default=["topk", "evit", "bat"],
        metavar="METHOD", help=f"methods: {', '.join(REDUCTIONS)}",
    )  # fmt: skip
    add(
        "--keep-rate", "--base-keep-rate", type=_rate, nargs="+", default=[1.0, 0.7, 0.5, 0.3],
        metavar="RATE", help="keep rates of all stages, in (0, 1]; 1 is the dense model",
    )  # fmt: skip
    add(
        "--compare", nargs=2, action="append", default=[], metavar=("A", "B"),
        help="print one pair and add it to comparisons.csv, such as bat@0.5 evit@0.7; with several "
        "checkpoints best:bat@0.5; may be given again",
    )  # fmt: skip
    add("--amp", choices=AMP_CHOICES, default="off", help="autocast type; auto: the GPU's best")
    add("--save-every", type=common.at_least(1), default=20, metavar="N",
        help="batches between savings")  # fmt: skip
    add("--restart", action="store_true", help="replace an earlier sweep")
    return parser


def load_inputs(
    args: Namespace, device: torch.device
) -> tuple[dict[str, BATVisionTransformer], SampleDataset]:
    """The models by the label of their checkpoint, and the validation set that fits them all."""
    own = Namespace(**vars(args) | {"keep_rate": None, "reduction": None})
    models = [common.load_model(own, path, device) for path in args.checkpoint]
    sizes = {model.patch_embed.img_size for model in models}
    if len(sizes) > 1:
        raise InputError(f"the checkpoints must share one input size, got {sorted(sizes)}")
    dataset, num_classes = build_dataset(False, args, *sizes)
    for path, model in zip(args.checkpoint, models, strict=True):
        if model.num_classes != num_classes:
            raise InputError(
                f"{path} has {model.num_classes} classes, the data set {args.data_path} has "
                f"{num_classes}"
            )
    return dict(zip(short_labels(args.checkpoint), models, strict=True)), dataset


def run(args: Namespace) -> int:
    """Evaluates, compares, writes the tables and the figure, and returns the exit code."""
    # What to evaluate.
    device = common.find_device(args)
    models, dataset = load_inputs(args, device)
    configurations = make_configurations(list(models), args.reduction, args.keep_rate)
    asked = [
        (find_configuration(configurations, first), find_configuration(configurations, second))
        for first, second in args.compare
    ]
    # What an earlier sweep knows already.
    folder = check_writable(args.output_dir)
    path = folder / "predictions.npz"
    amp = find_amp(args.amp, device)
    settings = sweep_settings(args, models, configurations, dataset, amp)
    counts = len(configurations), len(dataset)
    predictions = open_predictions(path, settings, *counts, restart=args.restart)
    num_done = int(predictions["num_done"])
    logger.info(f"{counts[0]} configurations on {counts[1]} images, {num_done} done earlier")
    # The pass over the data.
    loader = DataLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=range(num_done, len(dataset)),
        num_workers=args.num_workers,
        pin_memory=device.type == "cuda",
    )
    run_sweep(
        predictions,
        models,
        configurations,
        loader=loader,
        amp_dtype=AMP_DTYPES[amp],
        save_every=args.save_every,
        path=path,
    )
    # Results.
    rows = summarize(predictions, models, configurations)
    pairs = comparison_pairs(configurations) + asked
    comparisons = compare(predictions, configurations, pairs, seed=args.seed)
    write_sweep(folder, rows, comparisons, settings)
    for row in compare(predictions, configurations, asked, seed=args.seed):
        logger.info(
            f"{row['first']} less {row['second']}: {row['difference']:+.3f} points of Acc@1, 95 % "
            f"interval {row['low']:+.3f} to {row['high']:+.3f}, McNemar's p {row['p_value']:.3g}"
        )
    return common.report_bad_images(dataset, np.flatnonzero(predictions["is_bad"]), len(dataset))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: saves before it ends
    try:
        return run_script(get_parser(), run, argv)
    except KeyboardInterrupt:
        print(
            "interrupted: the same command, without --restart, goes on from there", file=sys.stderr
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
