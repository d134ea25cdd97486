"""Speed of the input pipeline beside timm's prefetching loader: files to normalised batches.

python -m tools.loading --data-path DATA --num-workers 0 2
"""

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
from timm.data import create_dataset, create_loader

import arguments
from arguments import ArgumentParser, at_least, data_config
from datasets import build_dataset
from inputs.batches import DeviceLoader, device_loader
from inputs.images import allow_posterize_to_black
from models.speed import Setting, time_rounds
from samplers import TrainSampler
from tools import timing
from utils import find_device, run_script

HELP = """Measures how many images a second the input pipeline makes of an ImageFolder, in training
(DeiT's augmentation) and in evaluation, beside timm's prefetching loader with the same settings."""
PROTOCOL = [
    "images/s: images / median time of the rounds; every round runs both pipelines over the whole "
    "data set, in an order drawn anew",
    "of_timm: median over the rounds of timm's time / own time",
]


# fmt: off
def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m tools.loading", description=HELP)
    add = parser.add_argument
    add("--data-path", required=True, help="folder with train/ and val/")
    add("--num-workers", type=at_least(0), nargs="+", default=[0, 2],
        help="data loader worker processes; 0: none but the process itself")
    add("--batch-size", type=at_least(1), default=64, help="images a batch")
    add("--repetitions", type=at_least(1), default=12, help="timed rounds")
    add("--warmup", type=at_least(0), default=1, help="rounds before them")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--output-dir", default="", help="folder for the .txt, .csv and .json; empty: none")
    return parser
# fmt: on


def own_loader(args: Namespace, setting: Setting, *, workers: int, is_train: bool) -> DeviceLoader:
    """Batches as main.py makes them, without repeated augmentation, which timm's have not."""
    flags = ["--data-path", args.data_path]
    run_args = arguments.get_args_parser().parse_args(flags)
    dataset, _ = build_dataset(is_train, run_args, data_config(run_args, 224, {}))
    sampler = TrainSampler(len(dataset)) if is_train else range(len(dataset))
    options = {"batch_size": args.batch_size, "num_workers": workers, "drop_last": is_train}
    return device_loader(dataset, setting.device, sampler=sampler, **options)


def timm_loader(args: Namespace, setting: Setting, *, workers: int, is_train: bool) -> Iterable:
    """The same with timm's data set, transforms and loader."""
    run_args = arguments.get_args_parser().parse_args([])
    split = "train" if is_train else "val"
    loader = create_loader(
        create_dataset("", root=f"{args.data_path}/{split}", is_training=is_train),
        input_size=(3, 224, 224),
        batch_size=args.batch_size,
        is_training=is_train,
        re_prob=run_args.reprob if is_train else 0,
        re_mode=run_args.remode,
        color_jitter=run_args.color_jitter,
        auto_augment=run_args.aa,
        interpolation=run_args.train_interpolation,
        crop_pct=arguments.DEFAULT_CROP,
        num_workers=workers,
        pin_memory=setting.device.type == "cuda",
        device=setting.device,
        persistent_workers=workers > 0,
    )
    if is_train:
        allow_posterize_to_black(loader.dataset.transform)
    return loader


def measure(args: Namespace, setting: Setting) -> Iterator[dict]:
    """A line per split and number of workers."""
    for workers in args.num_workers:
        for is_train in (True, False):
            make = {"args": args, "setting": setting, "workers": workers, "is_train": is_train}
            loaders = own_loader(**make), timm_loader(**make)
            count = sum(len(batch[0]) for batch in loaders[0])
            times = time_rounds([partial(run_through, loader) for loader in loaders], setting)
            own, theirs = times.numpy()
            yield {
                "split": "train" if is_train else "val",
                "workers": workers,
                "images": count,
                "images/s": count / np.median(own),
                "timm images/s": count / np.median(theirs),
                "of_timm": timing.median_ratio(theirs, own),
                "own_seconds": own.tolist(),
                "timm_seconds": theirs.tolist(),
            }


def run_through(batches: Iterable) -> None:
    for _ in batches:
        pass


def run(args: Namespace) -> int:
    """Measures, prints and writes; returns the exit code."""
    device = find_device(args.device)
    setting = Setting(device, repetitions=args.repetitions, warmup=args.warmup)
    about = timing.environment() | {"device": str(device)}
    timing.report(measure(args, setting), PROTOCOL, about, args.output_dir, "loading")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_script(get_args_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
