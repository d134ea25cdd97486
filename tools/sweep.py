"""Accuracy and cost of checkpoints x methods x keep rates in one pass over a data set.

    python -m tools.sweep --checkpoint best.pth --keep-rate 0.7 0.5 --data-path data/demo

Exit codes: 0 done, 1 images could not be read (they are named and counted), 2 bad input, 130
interrupted (Ctrl-C, SIGTERM).
"""

import hashlib
import json
import math
import signal
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import permutations, product
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from tqdm import tqdm

from arguments import (
    AMP_CHOICES,
    ArgumentParser,
    at_least,
    data_config,
    reduction_variant,
)
from datasets import SampleDataset, build_dataset
from engine import score_batch
from inputs.batches import device_loader
from inputs.cache import digest_dataset
from models import ReducingTransformer, count_gmacs
from models.speed import Setting
from models.vit import LeadingTokens
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
    write_text,
)

T = TypeVar("T")
NUM_RESAMPLES = 10_000
DIGITS = {
    "acc1": 2, "acc1_low": 2, "acc1_high": 2, "acc5": 2, "loss": 4, "gmacs": 4,
    "images_per_second": 1,
}  # fmt: skip
OWN_RATE = ("keep_rate", "tome_r")  # settings with which a method is one configuration
HELP = """Evaluates checkpoints x methods x keep rates in one pass over the validation images
and compares the answers image by image. A method may bring settings of its own, as in
bat,cluster_ratio=0.25,proportional_attention=off or tome,tome_r=13, which has no keep rate; the
blocks before the first stage run once for all of them. Writes sweep.csv, .md and .json (Acc@1,
Acc@5, loss, GMACs, images/s of the forward pass, patch tokens that leave each stage), sweep.png and
sweep.pdf, comparisons.csv (bat against every other method, and every method against evit:
difference of Acc@1 in points, its 95 percent bootstrap interval, p-value of McNemar's exact test,
not corrected for the number of comparisons) and predictions.npz (what every configuration predicts
for every image). acc1_low and acc1_high are the ends of Acc@1's 95 percent interval over images
(Wilson's); methods whose intervals overlap may still differ clearly on the same images:
comparisons.csv tells. An interrupted sweep goes on when the same command is given again."""

# What is evaluated -------------------------------------------------------------------------------


class Configuration(NamedTuple):
    """What is evaluated: one method at one keep rate on one checkpoint's weights."""

    checkpoint: str  # label of the checkpoint
    reduction: str  # such as bat, or bat,cluster_ratio=0.25: see `arguments.reduction_variant`
    keep_rate: float  # NaN: the method's settings say it

    @property
    def short_name(self) -> str:
        """Such as bat@0.5."""
        return self.reduction + ("" if math.isnan(self.keep_rate) else f"@{self.keep_rate:g}")

    @property
    def name(self) -> str:
        """Such as best:bat@0.5."""
        return f"{self.checkpoint}:{self.short_name}"


def make_configurations(
    checkpoints: Sequence[str], reductions: Sequence[str], keep_rates: Sequence[float]
) -> list[Configuration]:
    """All combinations; what keeps every token is one configuration a checkpoint, none@1."""
    chosen = {}
    for checkpoint, reduction, keep_rate in product(checkpoints, reductions, keep_rates):
        if not reduction_variant(reduction).keys().isdisjoint(OWN_RATE):
            keep_rate = math.nan
        elif reduction == "none" or keep_rate == 1:
            reduction, keep_rate = "none", 1.0
        chosen[checkpoint, reduction, str(keep_rate)] = (checkpoint, reduction, keep_rate)
    return [Configuration(*choice) for choice in chosen.values()]


def find_configuration(configurations: Sequence[Configuration], name: str) -> int:
    """Index of a configuration by its name, such as best:bat@0.5, or by its short name, bat@0.5.

    Raises:
        InputError: no configuration has the name, or several have; the message lists the choices.
    """
    found = [i for i, entry in enumerate(configurations) if name in (entry.name, entry.short_name)]
    if len(found) != 1:
        names = ", ".join(entry.name for entry in configurations)
        problem = "more than one" if found else "no"
        raise InputError(f"{problem} configuration is named '{name}'; choose from {names}")
    return found[0]


def short_labels(paths: Sequence[str]) -> list[str]:
    """Names for checkpoints: as few of the last parts of their paths as tell them apart."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(own[-count:]) for own in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise InputError(f"checkpoints must differ, got {', '.join(paths)}")


# What is known -----------------------------------------------------------------------------------

Predictions = dict[str, np.ndarray]  # the arrays of predictions.npz, see `open_predictions`


def open_predictions(
    path: Path, settings: dict, shape: tuple[int, int], *, restart: bool
) -> Predictions:
    """What an earlier, perhaps interrupted sweep with the same settings knows, or nothing yet.

    With `restart` nothing is read; the earlier file is replaced at the first saving.

    Returns:
        By name: settings, as JSON; num_done, the images that every configuration has seen: columns
        from there on are open; of `shape` (configurations, images) predicted, correct1, correct5
        and loss, see `BatchScores`, and seconds, the image's share of its batch's forward time
        (NaN: not timed); of shape (images,) is_bad, whether the image could not be read and counts
        as wrong.

    Raises:
        InputError: the file is damaged, or the earlier sweep had other settings (they are named).
    """
    if restart or not path.exists():
        return {
            "settings": np.array(json.dumps(settings)),
            "num_done": np.array(0),
            "predicted": np.full(shape, -1, dtype=np.int32),
            "correct1": np.zeros(shape, dtype=bool),
            "correct5": np.zeros(shape, dtype=bool),
            "loss": np.zeros(shape, dtype=np.float32),
            "seconds": np.full(shape, np.nan, dtype=np.float32),
            "is_bad": np.zeros(shape[1], dtype=bool),
        }
    try:
        with np.load(path, allow_pickle=False) as stored:
            earlier = dict(stored)
        then = json.loads(str(earlier["settings"]))
    except Exception as problem:  # damaged files fail in every way that a reader can
        raise InputError(f"{path} cannot be read; --restart replaces it") from problem
    differing = [
        f"{name} was {then.get(name)}, is {settings.get(name)}"
        for name in then | settings
        if then.get(name) != settings.get(name)
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
    contenders: Mapping[str, common.Contender],
    configurations: Sequence[Configuration],
    dataset: SampleDataset,
) -> dict:
    """Everything that the predictions of a sweep depend on, as plain values of JSON."""
    device = make_setting(args, contenders).device
    settings = {
        "configurations": [entry.name for entry in configurations],
        "model_kwargs": args.model_kwargs,
        "data_path": args.data_path,
        "data_files": digest_dataset(dataset),
        "input_size": dataset.image_size,
        **dataset.data_config,
        "part": list(args.part),
        "bad_images": args.bad_images,
        "batch_size": args.batch_size,
        "ema": args.ema,
        "amp": find_amp(args.amp, device),
        "device": device.type,
    }
    for path, (label, contender) in zip(args.checkpoint, contenders.items(), strict=True):
        settings |= {f"{label}.path": path, f"{label}.weights": digest_weights(contender.model)}
        for name, value in contender.model.reduction_settings().items():
            settings[f"{label}.{name}"] = value  # as it comes from the file and the flags
    return json.loads(json.dumps(settings))  # tuples become lists, as in the file


def digest_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# The pass over the data --------------------------------------------------------------------------


def switch(
    contenders: Mapping[str, common.Contender], configuration: Configuration
) -> ReducingTransformer:
    """The configuration's model, with its method and keep rate."""
    checkpoint, reduction, keep_rate = configuration
    return contenders[checkpoint].switch(reduction, None if math.isnan(keep_rate) else keep_rate)


def make_setting(args: Namespace, contenders: Mapping[str, common.Contender]) -> Setting:
    device = next(iter(contenders.values())).model.patch_embed.proj.weight.device
    return Setting(device, AMP_DTYPES[find_amp(args.amp, device)])


@torch.no_grad()
def timed(run: Callable[[], T], setting: Setting) -> tuple[T, float]:
    """What a function of the model gives under autocast, and the seconds that it took."""
    setting.synchronize()
    begin = time.perf_counter()
    with setting.autocast():
        result = run()
    setting.synchronize()
    return result, time.perf_counter() - begin


def timed_logits(
    contenders: Mapping[str, common.Contender],
    configurations: Sequence[Configuration],
    images: Tensor,
    setting: Setting,
) -> Iterator[tuple[Tensor, float]]:
    """Each configuration's logits (B, classes) of images (B, 3, H, W), and the seconds they took.

    Configurations of a checkpoint share the blocks before the first stage, whose time counts for
    each of them.
    """
    shared: dict[tuple[str, int], tuple[LeadingTokens, float]] = {}
    for configuration in configurations:
        model = switch(contenders, configuration)
        key = configuration.checkpoint, model.num_leading_blocks
        if key not in shared:
            shared[key] = timed(partial(model.run_leading_blocks, images), setting)
        tokens, leading_seconds = shared[key]
        rest = partial(model.forward_with_assignments, tokens)
        (logits, _), seconds = timed(rest, setting)
        yield logits, leading_seconds + seconds


def run_sweep(
    args: Namespace,
    predictions: Predictions,
    contenders: Mapping[str, common.Contender],
    configurations: Sequence[Configuration],
    dataset: SampleDataset,
    path: Path,
) -> None:
    """Evaluates the images that are open, and saves every few batches and however the loop ends.

    The first batch after a start warms up and is not timed, nor is a last one that is smaller, for
    which a GPU makes new plans; all are where no other is left. Changed in place: the predictions,
    and the models' methods and keep rates.
    """
    setting = make_setting(args, contenders)
    indices = chosen_images(args, dataset)[int(predictions["num_done"]) :]
    options = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    loader = device_loader(dataset, setting.device, sampler=indices, **options)
    times_all = len(indices) < 2 * args.batch_size
    # One unit is one batch through one configuration; their speeds differ, so the mean is taken.
    total = len(configurations) * len(loader)
    try:
        with tqdm(desc="Sweep", unit="batch", mininterval=1, smoothing=0, total=total) as bar:
            for number, (images, targets, is_bad) in enumerate(loader, 1):
                is_bad = is_bad.to(setting.device)
                start = int(predictions["num_done"])
                here = slice(start, start + len(images))
                answers = timed_logits(contenders, configurations, images, setting)
                for row, (logits, seconds) in enumerate(answers):
                    for name, values in score_batch(logits, targets, is_bad)._asdict().items():
                        predictions[name][row, here] = values.cpu()
                    if times_all or (number > 1 and len(images) == args.batch_size):
                        predictions["seconds"][row, here] = seconds / len(images)
                    bar.update()
                predictions["is_bad"][here] = is_bad.cpu()
                predictions["num_done"] = np.array(here.stop)  # last: till then the batch is open
                if number % args.save_every == 0:
                    save_predictions(predictions, path)
    finally:
        save_predictions(predictions, path)


# Results -----------------------------------------------------------------------------------------


def summarize(
    predictions: Predictions,
    contenders: Mapping[str, common.Contender],
    configurations: Sequence[Configuration],
) -> pd.DataFrame:
    """A row for every configuration of a finished sweep.

    acc1 and acc5 are in percent, acc1_low and acc1_high the ends of acc1's 95 % interval over
    images (Wilson 1927), loss is the mean cross-entropy, gmacs and images_per_second are of the
    forward pass, tokens are the patch tokens that leave each reducing block.
    """
    num_images = len(predictions["is_bad"])
    intervals = [
        binomtest(count, num_images).proportion_ci(0.95, method="wilson")
        for count in predictions["correct1"].sum(axis=1).tolist()
    ]
    gmacs, tokens = [], []
    for configuration in configurations:
        model = switch(contenders, configuration)
        gmacs.append(count_gmacs(model))
        tokens.append([stage.num_outputs for stage in model.stages()])
    return pd.DataFrame(configurations).assign(
        acc1=100 * predictions["correct1"].mean(axis=1),
        acc1_low=[100 * interval.low for interval in intervals],
        acc1_high=[100 * interval.high for interval in intervals],
        acc5=100 * predictions["correct5"].mean(axis=1),
        loss=predictions["loss"].mean(axis=1, dtype=np.float64),
        gmacs=gmacs,
        images_per_second=1 / np.nanmean(predictions["seconds"], axis=1, dtype=np.float64),
        tokens=tokens,
        num_images=num_images,
        bad_images=predictions["is_bad"].sum(),
    )


def compare_paired(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> dict:
    """Compares which images two configurations get right: first and second, (images,) bool.

    The bootstrap draws the images with replacement, both answers to an image together, 10,000
    times, and takes the 2.5th and 97.5th percentile (Efron and Tibshirani 1993, chapter 13). Only
    how many images fall to either side matters, and these counts are multinomial: they are drawn
    directly. McNemar's exact test asks how likely so uneven a split of the images that only one
    gets right is, if each fell to either side with probability 1/2 (two-sided binomial test).

    Returns:
        In percentage points acc1_first, acc1_second, their difference, and difference_low and
        difference_high, the ends of its 95 % interval; only_first and only_second, the images that
        one alone gets right; and p_value of McNemar's test.
    """
    num_images = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    counts = np.array([only_first, only_second, num_images - only_first - only_second])
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(num_images, counts / num_images, size=NUM_RESAMPLES)
    low, high = np.quantile(100 * (drawn[:, 0] - drawn[:, 1]) / num_images, [0.025, 0.975])
    discordant = only_first + only_second
    return {
        "acc1_first": 100 * float(first.mean()),
        "acc1_second": 100 * float(second.mean()),
        "difference": 100 * (only_first - only_second) / num_images,
        "difference_low": float(low),
        "difference_high": float(high),
        "only_first": only_first,
        "only_second": only_second,
        "p_value": float(binomtest(only_first, discordant).pvalue) if discordant else 1.0,
    }


def comparison_pairs(configurations: Sequence[Configuration]) -> list[tuple[int, int]]:
    """Bat against every other method, and every other one against evit, at each keep rate.

    A method with settings of its own counts as another one.
    """
    return [
        (index, rival_index)
        for (index, entry), (rival_index, rival) in permutations(enumerate(configurations), 2)
        if (entry.checkpoint, entry.keep_rate) == (rival.checkpoint, rival.keep_rate)
        and (entry.reduction == "bat" or rival.reduction == "evit")
    ]


def write_sweep(folder: Path, table: pd.DataFrame, comparisons: list[dict], settings: dict) -> None:
    """Writes the tables and the figure of a finished sweep, and prints the main columns."""
    tokens = table.tokens.map(lambda counts: " ".join(map(str, counts)))
    common.write_table(table.assign(tokens=tokens), folder / "sweep.csv")
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    whole = {
        "results": rows,
        "comparisons": comparisons,
        "settings": settings,
        "git_hash": git_hash(),
        "versions": versions(),
    }
    write_text(folder / "sweep.json", json.dumps(whole, indent=2) + "\n")
    (folder / "comparisons.csv").unlink(missing_ok=True)  # an earlier sweep's
    if comparisons:
        common.write_table(pd.DataFrame(comparisons), folder / "comparisons.csv")
        common.say_written(folder / "comparisons", ".csv")
    save_figure(plot_accuracy(table, bars="95 % interval over images"), folder / "sweep")
    shown = table.drop(columns=["num_images", "bad_images"])
    logger.info(shown.round(DIGITS).to_string(index=False))
    formats = {name: f".{digits}f" for name, digits in DIGITS.items()}
    markdown = common.to_markdown(shown.assign(tokens=tokens), formats)
    write_text(folder / "sweep.md", markdown)
    common.say_written(folder / "sweep", ".csv", ".json", ".md", ".png", ".pdf")


# Command line ------------------------------------------------------------------------------------


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"must be in (0, 1], got {value}")
    return value


def _part(text: str) -> tuple[int, int]:
    with suppress(ValueError):
        number, count = map(int, text.split("/"))
        if 1 <= number <= count:
            return number, count
    raise ArgumentTypeError(f"must be 1/N to N/N, got {text}")


def chosen_images(args: Namespace, dataset: SampleDataset) -> range:
    """Indices of the validation images that --part takes; InputError: there is none."""
    number, count = args.part
    if not (images := range(number - 1, len(dataset), count)):
        raise InputError(f"--part {number}/{count}: there are {len(dataset)} images")
    return images


def get_args_parser() -> ArgumentParser:
    parser, add = common.comparison_parser("sweep", HELP, batch_size=64)
    parser.set_defaults(reductions=["topk", "evit", "bat"], keep_rate=None)
    # fmt: off
    add("--checkpoint", nargs="+", required=True, help="checkpoints of main.py")
    add("--keep-rate", "--base-keep-rate", dest="keep_rates", type=_rate, nargs="+",
        default=[1.0, 0.7, 0.5, 0.3], metavar="RATE",
        help="keep rates of all stages, in (0, 1]; 1 is the dense model")
    add("--part", type=_part, default=(1, 1), metavar="K/N",
        help="every N-th validation image from the K-th on, such as 1/2 to search and 2/2 to "
        "report; default: all")
    add("--compare", nargs=2, action="append", default=[], metavar=("A", "B"),
        help="print one pair and add it to comparisons.csv, such as bat@0.5 evit@0.7; with several "
        "checkpoints best:bat@0.5; may be given again")
    add("--amp", choices=AMP_CHOICES, default="off", help="autocast type; auto: the GPU's best")
    add("--save-every", type=at_least(1), default=20, metavar="N",
        help="batches between two writings of predictions.npz")
    # fmt: on
    add("--restart", action="store_true", help="replace an earlier sweep")
    return parser


def load_inputs(args: Namespace) -> tuple[dict[str, common.Contender], SampleDataset]:
    """The models by the label of their checkpoint, and the validation set that fits them all."""
    device = common.find_device(args)
    contenders = [common.load_contender(args, path, device) for path in args.checkpoint]
    models = [contender.model for contender in contenders]
    configs = [data_config(args, m.patch_embed.img_size, m.pretrained_cfg) for m in models]
    for config in configs:
        if config != configs[0]:
            raise InputError(f"the checkpoints need other inputs each: {configs[0]} and {config}")
    dataset, num_classes = build_dataset(False, args, configs[0])
    for path, model in zip(args.checkpoint, models, strict=True):
        if model.num_classes != num_classes:
            raise InputError(
                f"{path} has {model.num_classes} classes, {args.data_path} has {num_classes}"
            )
    return dict(zip(short_labels(args.checkpoint), contenders, strict=True)), dataset


def run(args: Namespace) -> int:
    """Evaluates, compares, writes the tables and the figure, and returns the exit code."""
    # What to evaluate.
    contenders, dataset = load_inputs(args)
    configurations = make_configurations(list(contenders), args.reductions, args.keep_rates)
    asked = [tuple(find_configuration(configurations, name) for name in pair)
             for pair in args.compare]  # fmt: skip
    settings = sweep_settings(args, contenders, configurations, dataset)
    for configuration in configurations:  # bad settings are refused before anything runs
        switch(contenders, configuration)
    # What an earlier sweep knows already.
    folder = check_writable(args.output_dir)
    path = folder / "predictions.npz"
    images = chosen_images(args, dataset)
    shape = len(configurations), len(images)
    predictions = open_predictions(path, settings, shape, restart=args.restart)
    done = predictions["num_done"]
    logger.info(f"{shape[0]} configurations on {shape[1]} images, {done} of them done earlier")
    # The pass over the data.
    run_sweep(args, predictions, contenders, configurations, dataset, path)
    # Results.
    table = summarize(predictions, contenders, configurations)
    correct = predictions["correct1"]
    comparisons = {}
    for first, second in comparison_pairs(configurations) + asked:
        names = {"first": configurations[first].name, "second": configurations[second].name}
        difference = compare_paired(correct[first], correct[second], seed=args.seed)
        comparisons[first, second] = names | difference
    write_sweep(folder, table, list(comparisons.values()), settings)
    for pair in asked:
        row = comparisons[pair]
        logger.info(
            f"{row['first']} less {row['second']}: {row['difference']:+.3f} points of Acc@1, 95 % "
            f"interval {row['difference_low']:+.3f} to {row['difference_high']:+.3f}, "
            f"McNemar's p {row['p_value']:.3g}"
        )
    bad = [images[number] for number in np.flatnonzero(predictions["is_bad"])]
    return common.report_bad_images(dataset, bad, len(images))


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: saves before it ends
    try:
        return run_script(get_args_parser(), run, argv)
    except KeyboardInterrupt:
        print("sweep: interrupted; the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
