"""Compares finished runs of main.py on the same validation images.

    python -m tools.table output/runs/* --baseline output/runs/evit_keep0.5

Runs that differ in their random seed alone make one row: acc1 is the mean of theirs, acc1_std the
standard deviation, difference what acc1 is above the baseline's, in points, and standard_error that
of the difference over the images. The table goes to standard output as Markdown; --output-dir also
writes table.md, table.csv, accuracy.png and accuracy.pdf.
"""

import json
import os
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import sem

from arguments import ArgumentParser
from checkpoints import FIRST_REDUCTION
from tools.common import to_markdown, write_table
from tools.figures import plot_accuracy, save_figure
from utils import InputError, check_writable, read_log, run_script, write_text

# Arguments of main.py that do not change what a run is meant to reach.
INCIDENTAL = (
    "seed", "output_dir", "resume", "device", "num_workers", "pin_mem", "print_freq",
    "image_cache", "checkpoint_interval", "keep_checkpoints", "dist_timeout",
)  # fmt: skip
# Settings of the model, which the args.json of old runs may leave out.
SETTINGS = (
    "reduction", "proportional_attention", "tome_r", "cluster_ratio", "match_ratio",
    "merge_weights",
)  # fmt: skip
OF_ALL = SETTINGS[:3]  # the others are BAT's alone
FORMATS = {"gmacs": ".4g", "acc1": ".2f", "acc1_std": ".2f"}
FORMATS |= {"difference": "+.2f", "standard_error": ".2f"}


class FinishedRun(NamedTuple):
    """What a run's folder says of its last evaluated epoch."""

    folder: Path
    about: dict  # contents of args.json; the model's defaults are in its model_args
    last: dict  # that epoch's entry of log.txt
    correct: np.ndarray | None  # (images,) bool, which it gets right, where the run has noted it


def read_run(folder: Path) -> FinishedRun:
    """Reads a run's folder; `InputError` unless it is whole and has an evaluated epoch."""
    if not os.path.isfile(folder / "log.txt"):
        raise InputError(f"{folder} is not the folder of a run: it has no log.txt")
    evaluated = [entry for entry in read_log(folder / "log.txt") if "test_acc1" in entry]
    if not evaluated:
        raise InputError(f"{folder}: log.txt has no evaluated epoch")
    last, path = evaluated[-1], folder / "correct.npy"
    try:
        about = json.loads((folder / "args.json").read_text())
        about["model_args"] = FIRST_REDUCTION | about["model_args"]
        about["classes"] = list(about["classes"])
        correct = np.load(path) if path.is_file() else None
    except (KeyError, OSError, TypeError, ValueError) as problem:
        raise InputError(f"{folder} cannot be read: {problem!r}") from problem
    if correct is not None and (
        len(correct) != last["test_num_images"]
        or abs(100 * correct.mean() - last["test_acc1"]) > 1e-3
    ):
        raise InputError(f"{path} does not belong to the last evaluated epoch of log.txt")
    return FinishedRun(folder.resolve(), about, last, correct)


def group_seeds(runs: Sequence[FinishedRun]) -> list[list[FinishedRun]]:
    """Puts runs together that differ in their random seed alone, in the order of the first ones."""
    groups = defaultdict(list)
    for run in runs:
        args = run.about["args"].items()
        settings = {name: value for name, value in args if name not in INCIDENTAL}
        key = json.dumps([settings, run.about["model_args"], run.last["epoch"]], sort_keys=True)
        groups[key].append(run)
    return list(groups.values())


def paired_difference(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray]
) -> tuple[float, float]:
    """Difference of two accuracies on the same images, and its standard error, in points.

    Both groups hold (images,) bool arrays, the right answers of each run.
    With d_i the share of the first runs that get image i right, less that share of the second runs,
    the difference is the mean of d, and its standard error is sqrt(sum (d_i - mean)^2 / (n (n-1)))
    for n images (paired differences in Miller, Adding Error Bars to Evals, arXiv:2411.00640). It
    says how sure the difference is for these weights on other images, not what another random seed
    would give; acc1_std says that.
    """
    differences = np.mean(first, axis=0) - np.mean(second, axis=0)
    return 100 * float(differences.mean()), 100 * float(sem(differences))


def table_row(runs: Sequence[FinishedRun], baseline: Sequence[FinishedRun]) -> dict:
    """One row of plain values; None and NaN: not known, or without a meaning."""
    about, last = runs[0].about, runs[0].last
    acc1, acc1_baseline = ([run.last["test_acc1"] for run in group] for group in (runs, baseline))
    difference, standard_error = float(np.mean(acc1) - np.mean(acc1_baseline)), np.nan
    correct, correct_baseline = ([run.correct for run in group] for group in (runs, baseline))
    if all(each is not None for each in correct + correct_baseline):
        difference, standard_error = paired_difference(correct, correct_baseline)
    rates = [f"{rate:g}" for rate in last["keep_rate"]] or ["1"]
    reduction = about["model_args"]["reduction"]
    shown = SETTINGS if reduction == "bat" else OF_ALL
    known = {name: about["model_args"].get(name) for name in shown}
    return {
        "run": runs[0].folder.name,
        **{name: known.get(name) for name in SETTINGS},
        "keep_rate": " ".join(rates if len(set(rates)) > 1 else rates[:1]),
        "gmacs": about["gmacs"],
        "acc1": float(np.mean(acc1)),
        "acc1_std": pd.Series(acc1).std(),  # missing for one run
        "difference": difference,
        "standard_error": standard_error,
        "epochs": last["epoch"] + 1,
        "seeds": " ".join(str(run.about["args"]["seed"]) for run in runs),
    }


def make_table(folders: Sequence[Path], baseline: Path) -> pd.DataFrame:
    """A row for every group of runs; the baseline's other seeds among the folders count with it.

    Raises:
        InputError: a folder cannot be read, or two have different validation sets.
    """
    wanted = dict.fromkeys(folder.resolve() for folder in [*folders, baseline])
    runs = [read_run(folder) for folder in wanted]
    baseline_run = next(run for run in runs if run.folder == baseline.resolve())
    for run in runs:
        sizes = run.last["test_num_images"], baseline_run.last["test_num_images"]
        if sizes[0] != sizes[1] or run.about["classes"] != baseline_run.about["classes"]:
            raise InputError(
                f"{run.folder} and {baseline_run.folder} have different validation sets: "
                f"{sizes[0]} and {sizes[1]} images, or other classes"
            )
    groups = group_seeds(runs)
    baselines = next(group for group in groups if any(run is baseline_run for run in group))
    return pd.DataFrame([table_row(group, baselines) for group in groups])


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m tools.table", description="\n\n".join(__doc__.split("\n\n")[::2])
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run")
    add("--baseline", type=Path, required=True, metavar="RUN", help="run to subtract from each")
    add("--title", default="", help="words above the table, such as the size of the study")
    add("--output-dir", default="", help="where to write table and figure; default: nowhere")
    return parser


def run(args: Namespace) -> int:
    """Reads the runs, and writes their table and figure."""
    table = make_table(args.runs, args.baseline)
    text = (f"{args.title}\n\n" if args.title else "") + to_markdown(table, FORMATS)
    print(text, end="")
    if args.output_dir:
        folder = check_writable(args.output_dir)
        write_text(folder / "table.md", text)
        write_table(table, folder / "table.csv")  # pandas takes some folders for addresses
        margin = 1.96 * table.standard_error
        rows = table.assign(
            acc1_low=table.acc1 - margin,
            acc1_high=table.acc1 + margin,
            keep_rate=[
                np.mean([float(rate) for rate in rates.split()]) for rates in table.keep_rate
            ],
        )  # a point's label: the mean of its stages' keep rates
        figure = plot_accuracy(rows, bars="95 % interval of the difference to the baseline")
        save_figure(figure, folder / "accuracy")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(get_args_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
