"""Accuracy and cost of many configurations in one pass over a data set.

A configuration is a checkpoint, a method and a keep rate. Every batch is decoded once and shown to
all of them; methods and keep rates are switched on the same weights. What is known so far is in one
file, predictions.npz, from which an interrupted sweep goes on.
"""

import copy
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from analysis import write_csv
from analysis.figures import plot_sweep, save_figure
from analysis.predictions import Answer, Predictions
from datasets import SampleDataset
from engine import score_batch
from models import BATVisionTransformer, count_gmacs
from recorder import versions
from utils import InputError, git_hash, logger

DENSE = "none"


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
    configurations = []
    for checkpoint in checkpoints:
        for reduction in reductions:
            for keep_rate in keep_rates:
                dense = reduction == DENSE or keep_rate == 1
                choice = (DENSE, 1.0) if dense else (reduction, keep_rate)
                configurations.append(Configuration(checkpoint, *choice))
    return list(dict.fromkeys(configurations))


def find_configuration(configurations: Sequence[Configuration], name: str) -> int:
    """Index of a configuration by name, such as bat@0.5, or best:bat@0.5 with several checkpoints.

    Raises:
        InputError: no configuration has the name, or several have; the message lists the choices.
    """
    label, _, short_name = name.rpartition(":")
    method, _, rate = short_name.partition("@")
    try:
        keep_rate = float(rate)
    except ValueError:
        keep_rate = float("nan")
    if keep_rate == 1:
        method = DENSE
    found = [
        index
        for index, entry in enumerate(configurations)
        if (entry.reduction, entry.keep_rate) == (method, keep_rate)
        and label in ("", entry.checkpoint)
    ]
    if len(found) == 1:
        return found[0]
    alone = len({entry.checkpoint for entry in configurations}) == 1
    names = ", ".join(entry.short_name if alone else entry.name for entry in configurations)
    problem = "more than one" if found else "no"
    raise InputError(f"{problem} configuration is named '{name}'; choose from {names}")


def digest_weights(model: nn.Module) -> str:
    """Short hash of a model's weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def answer_batch(
    model: BATVisionTransformer,
    images: Tensor,
    targets: Tensor,
    is_bad: Tensor,
    *,
    amp_dtype: torch.dtype | None = None,
) -> Answer:
    """Runs and times a model on images (B, 3, H, W) that lie on its device."""
    _synchronize(images.device)
    begin = time.perf_counter()
    with torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        logits = model(images)
    _synchronize(images.device)
    seconds = time.perf_counter() - begin
    return Answer(score_batch(logits, targets, is_bad), logits.float().argmax(dim=1), seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def switch(
    models: Mapping[str, BATVisionTransformer], configuration: Configuration
) -> BATVisionTransformer:
    """The configuration's model, by checkpoint label, switched to its method and keep rate."""
    model = models[configuration.checkpoint]
    model.set_reduction(configuration.reduction)
    model.set_keep_rate(configuration.keep_rate)
    return model


def run_sweep(
    predictions: Predictions,
    models: Mapping[str, BATVisionTransformer],
    configurations: Sequence[Configuration],
    dataset: SampleDataset,
    path: Path,
    *,
    batch_size: int,
    num_workers: int = 0,
    amp_dtype: torch.dtype | None = None,
    save_every: int = 20,
) -> None:
    """Evaluates what is still open, and saves every few batches and however the loop ends.

    The first batch after a start warms up and is not timed, unless there is no other.

    Args:
        predictions: changed in place.
        models: by checkpoint label, all on one device; method and keep rate are switched.
        configurations: in the order of the rows of the predictions.
        dataset: whose images are evaluated, in order.
        path: of predictions.npz.
        batch_size: images a batch; decides in which order losses are added up.
        num_workers: processes that read images.
        amp_dtype: autocast type, or None for none.
        save_every: batches between savings.
    """
    device = next(iter(models.values())).head.weight.device
    first = predictions.progress.num_done
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(first, len(dataset)),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    for model in models.values():
        model.eval()
    # One unit is one batch through one configuration.
    bar = tqdm(
        desc="Sweep",
        unit="batch",
        mininterval=1,
        smoothing=0,  # configurations differ in speed: the mean is the steadier guess
        total=len(configurations) * -(-len(dataset) // batch_size),
        initial=len(configurations) * (first // batch_size),
    )
    try:
        with bar:
            for number, batch in enumerate(loader, 1):
                batch = [part.to(device, non_blocking=True) for part in batch]
                answers = []
                for configuration in configurations:
                    model = switch(models, configuration)
                    answers.append(answer_batch(model, *batch, amp_dtype=amp_dtype))
                    bar.update()
                predictions.add(answers, batch[2], timed=number > 1 or len(loader) == 1)
                if number % save_every == 0:
                    predictions.save(path)
    finally:
        predictions.save(path)


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
    num_images = predictions.progress.num_done
    bare = {label: copy.deepcopy(model).to("meta") for label, model in models.items()}
    rows = []
    for index, configuration in enumerate(configurations):
        model = switch(bare, configuration)
        seconds = float(predictions.progress.seconds[index])
        rows.append({
            **configuration._asdict(),
            "acc1": 100 * int(predictions.correct1[index].sum()) / num_images,
            "acc5": 100 * int(predictions.correct5[index].sum()) / num_images,
            "loss": float(predictions.progress.loss_sums[index]) / num_images,
            "gmacs": count_gmacs(model),
            "images_per_second": predictions.progress.num_timed / seconds if seconds else None,
            "tokens": [stage.num_outputs for stage in model.stages()],
            "num_images": num_images,
            "bad_images": int(predictions.is_bad.sum()),
        })  # fmt: skip
    return rows


def write_sweep(
    folder: Path, rows: Sequence[dict], comparisons: Sequence[dict], settings: dict
) -> None:
    """Writes the tables and the figure of a finished sweep, and prints the main columns."""
    write_csv(folder / "sweep.csv", rows)
    whole = {
        "results": rows,
        "comparisons": comparisons,
        "settings": settings,
        "git_hash": git_hash(),
        "versions": versions(),
    }
    (folder / "sweep.json").write_text(json.dumps(whole, indent=2) + "\n")
    if comparisons:
        write_csv(folder / "comparisons.csv", comparisons)
    save_figure(plot_sweep(rows), folder / "sweep")
    logger.info(sweep_table(rows))


def sweep_table(rows: Sequence[dict]) -> str:
    """The main columns of `summarize` as aligned text, one line a configuration."""
    width = max(len("checkpoint"), *(len(row["checkpoint"]) for row in rows))
    lines = [
        f"{'checkpoint':<{width}}  {'method':<6}  {'keep':>4}  {'Acc@1':>7}  {'Acc@5':>7}  "
        f"{'loss':>7}  {'GMACs':>8}  {'images/s':>8}  tokens after the stages"
    ]
    for row in rows:
        speed = f"{row['images_per_second']:.1f}" if row["images_per_second"] else "-"
        lines.append(
            f"{row['checkpoint']:<{width}}  {row['reduction']:<6}  {row['keep_rate']:>4g}  "
            f"{row['acc1']:>7.3f}  {row['acc5']:>7.3f}  {row['loss']:>7.4f}  {row['gmacs']:>8.4f}  "
            f"{speed:>8}  {', '.join(map(str, row['tokens']))}"
        )
    return "\n".join(lines)


def log_comparisons(rows: Sequence[dict]) -> None:
    """Prints rows of `paired.compare`."""
    for row in rows:
        logger.info(
            f"{row['first']} less {row['second']}: {row['difference']:+.3f} points of Acc@1, 95 % "
            f"interval {row['low']:+.3f} to {row['high']:+.3f}, McNemar's p {row['p_value']:.3g}"
        )
