"""The paper's main table and ablation in small: trains, fine-tunes, evaluates and reports.

    python study.py --preset cpu --data-path data/cifar10 --output-dir output/study_cifar10

The same command goes on after an interruption. Exit codes: 0 done, 1 some runs failed (the report
says which), 2 bad input, 75 stopped by a signal or --stop-after.
"""

import json
import os
import shlex
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

from arguments import ArgumentParser, get_args_parser
from benchmarks.report import device_name
from builders import build_datasets
from datasets import SampleDataset
from image_cache import cached_images
from recorder import check_writable, versions
from studies.plan import DENSE, Run, all_runs, run_command
from studies.presets import PRESETS, Preset, choose_preset
from studies.report import write_report
from studies.results import load_result
from studies.runner import Job, Outcome, Runner
from studies.scores import DATA_FILE, GROUPS, scores_folder
from utils import (
    InputError,
    git_hash,
    init_process,
    logger,
    setup_logging,
    write_atomically,
)

EXIT_FAILED = 1
EXIT_STOPPED = 75
DIVERSITY_IMAGES = 64
DIVERSITY_RATE = 0.5


def get_parser() -> ArgumentParser:
    """The parser of `study.py`."""
    parser = ArgumentParser(prog="study.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), default="cpu",
        help="sizes: a reduced study on CPU cores, all of it on a GPU, or a trial of the code",
    )  # fmt: skip
    parser.add_argument(
        "--budget-minutes", type=float, default=None, metavar="M",
        help="scale the training to so many minutes on a machine like the preset's; default: the "
        "preset's own",
    )  # fmt: skip
    parser.add_argument("--data-path", default="data/cifar10", help="folder with train/ and val/")
    parser.add_argument(
        "--num-images", type=int, nargs=2, default=None, metavar=("TRAIN", "VAL"),
        help="refuse a data set of other sizes, such as one half extracted",
    )  # fmt: skip
    parser.add_argument("--output-dir", default="output/study", help="where everything goes")
    parser.add_argument("--device", default=None, help="default: the preset's")
    parser.add_argument(
        "--jobs", type=int, default=None, help="runs at a time; default: the preset's"
    )
    parser.add_argument(
        "--stop-after", type=float, default=None, metavar="MINUTES",
        help="save and stop after so many minutes; the same command goes on",
    )  # fmt: skip
    parser.add_argument("--title", default="Token reduction in small", help="of the report")
    return parser


def check_data(args: Namespace, preset: Preset, dense: Namespace) -> tuple[SampleDataset, ...]:
    """The training and the validation set.

    Args:
        args: of `study.py`.
        preset: its sizes.
        dense: arguments of the dense run.

    Raises:
        InputError: one is missing, incomplete, or smaller than the preset wants.
    """
    train, val, _ = build_datasets(dense)
    if args.num_images is not None:
        parts = "train", "val"
        for part, dataset, expected in zip(parts, (train, val), args.num_images, strict=True):
            if len(dataset) != expected:
                raise InputError(
                    f"{args.data_path}/{part} has {len(dataset):,} images, expected {expected:,}: "
                    "extract the whole archive again"
                )
    if len(train) < preset.epoch_images:
        raise InputError(
            f"{args.data_path}/train has {len(train):,} images, preset {preset.name} takes "
            f"{preset.epoch_images:,} an epoch"
        )
    return train, val


def open_study(folder: Path, about: dict) -> None:
    """Notes what the study is, or checks that the folder holds the same one.

    Raises:
        InputError: the folder holds a study with other settings.
    """
    path = folder / DATA_FILE
    if path.is_file():
        earlier = json.loads(path.read_text())
        now = json.loads(json.dumps(about))  # tuples become lists, as in the file
        differing = [
            key
            for key in ("preset", "data_path", "device", "train_images", "val_images")
            if earlier.get(key) != now[key]
        ]
        if differing:
            raise InputError(
                f"{folder} holds a study with another {', '.join(differing)}: give another "
                "--output-dir"
            )
        about["minutes_taken"] = earlier.get("minutes_taken", 0.0)
        commits = [*earlier["git_hash"].split(", "), about["git_hash"]]
        about["git_hash"] = ", ".join(dict.fromkeys(commits))
    save_about(folder, about)


def save_about(folder: Path, about: dict) -> None:
    """Writes study.json whole or not at all."""
    text = json.dumps(about, indent=2) + "\n"
    write_atomically(folder / DATA_FILE, lambda file: file.write(text.encode()))


def make_jobs(args: Namespace, preset: Preset, folder: Path, device: str) -> list[Job]:
    """All commands of the study: the dense model and what does not need it first."""

    def training(run: Run) -> Job:
        return Job(
            run.name,
            run_command(run, preset, data_path=args.data_path, folder=folder, device=device),
            folder / "output" / f"{run.name}.txt",
            partial(_is_trained, folder, run, preset),
            DENSE.name if run.is_tuned else "",
        )

    runs = all_runs(preset)
    first = [training(run) for run in runs if not run.is_tuned]
    scoring = [
        Job(
            group,
            ["-m", "studies.scores", "--group", group, "--folder", str(folder)],
            folder / "output" / f"{group}.txt",
            (scores_folder(folder, group) / "scores.json").is_file,
            DENSE.name,
        )
        for group in GROUPS
    ]
    # fmt: off
    words = [
        "analyze.py", "diversity", "--checkpoint", folder / "runs" / DENSE.name / "checkpoint.pth",
        "--data-path", args.data_path, "--keep-rate", DIVERSITY_RATE, "--eval-crop-ratio", 1.0,
        "--num-images", DIVERSITY_IMAGES, "--num-workers", 0, "--device", device,
        "--output-dir", folder / "diversity",
    ]
    # fmt: on
    diversity = Job(
        "diversity",
        [str(word) for word in words],
        folder / "output" / "diversity.txt",
        (folder / "diversity" / "diversity.pdf").is_file,
        DENSE.name,
    )
    tuning = [training(run) for run in runs if run.is_tuned]
    return [*first, *scoring, diversity, *tuning]


def _is_trained(folder: Path, run: Run, preset: Preset) -> bool:
    return load_result(folder, run, preset) is not None


def describe_preset(preset: Preset, slots: int, threads: int) -> str:
    """What a preset implies, as text."""
    values = preset.describe()
    cuts = values.pop("cuts")
    lines = [f"  {key}: {value}" for key, value in values.items()]
    lines += [f"  cut: {text}" for text in cuts]
    lines.append(f"  {len(all_runs(preset))} runs, {slots} at a time with {threads} thread(s) each")
    return "\n".join([f"preset {preset.name}:", *lines])


def run_study(args: Namespace) -> tuple[Outcome, Path]:
    """Checks everything, runs what is not done yet, and writes the report.

    Raises:
        InputError: see `main`.
    """
    begin = time.monotonic()
    deadline = begin + 60 * args.stop_after if args.stop_after else float("inf")
    preset = choose_preset(args.preset, args.budget_minutes)
    wanted = args.device or preset.device
    if args.device is None and wanted == "cuda" and not torch.cuda.is_available():
        raise InputError(f"preset {preset.name} needs a GPU, and there is none: try --preset cpu")
    device = init_process(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    slots = args.jobs or preset.jobs or cores
    threads = max(1, cores // slots)
    folder = Path(args.output_dir)
    words = run_command(DENSE, preset, data_path=args.data_path, folder=folder, device=wanted)
    dense = get_args_parser().parse_args(words[1:])
    train, val = check_data(args, preset, dense)
    check_writable(folder)
    about = {
        "title": args.title,
        "preset": preset.describe(),
        "data_path": args.data_path,
        "device": wanted,
        "train_images": len(train),
        "val_images": len(val),
        "device_name": device_name(device),
        "jobs": slots,
        "versions": versions(),
        "git_hash": git_hash(),
        "command": shlex.join(["python", "study.py", *sys.argv[1:]]),
    }
    open_study(folder, about)
    logger.info(describe_preset(preset, slots, threads))
    for dataset, is_train in ((train, True), (val, False)):
        cached_images(dense, dataset, is_train, device)  # once, before any run wants them
    outcome = Runner(slots, threads=threads, deadline=deadline).run(
        make_jobs(args, preset, folder, wanted)
    )
    about["minutes_taken"] = about.get("minutes_taken", 0.0) + (time.monotonic() - begin) / 60
    save_about(folder, about)
    return outcome, write_report(folder, outcome.reasons)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    setup_logging()
    parser = get_parser()
    args = parser.parse_args(argv)
    for name in ("budget_minutes", "jobs", "stop_after"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    with parser.exit_on_bad_input():
        outcome, report = run_study(args)
    for name, reason in outcome.reasons.items():
        logger.info(f"{name}: {outcome.status[name]}, {reason}")
    done = sum(status == "done" for status in outcome.status.values())
    logger.info(f"{done} of {len(outcome.status)} steps done; report: {report / 'README.md'}")
    if outcome.was_stopped:
        logger.info("stopped; the same command goes on")
        return EXIT_STOPPED
    return EXIT_FAILED if outcome.reasons else 0


if __name__ == "__main__":
    sys.exit(main())
