"""Measures models, training steps, the input pipeline and the reduction stages: one table each.

python benchmark.py --what model --keep-rate 0.7 0.5 0.3 0.2 --reduction bat topk
"""

import argparse
import math
from pathlib import Path

import torch
from timm.utils.misc import ParseKwargs

from arguments import ArgumentParser, get_args_parser
from benchmarks.configurations import Choice
from benchmarks.data import DataChoice, benchmark_data
from benchmarks.model import benchmark_model
from benchmarks.report import Report, environment, report_text, write_report
from benchmarks.stage import benchmark_stage
from benchmarks.timing import Setting
from benchmarks.train import benchmark_train
from models.reduction import MERGE_WEIGHTS, REDUCTIONS
from recorder import check_writable
from utils import InputError, init_process

DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FEWEST_REPETITIONS = 10  # a median of fewer says little


def _size(text: str) -> tuple[int, int]:
    """Parses "224" or "192x256" (height x width)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is neither SIDE nor HEIGHTxWIDTH in pixels")
    return int(parts[0]), int(parts[-1])


def _at_least(smallest: int):
    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}, got '{text}'")
        return int(text)

    return parse


def _add_model_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("models; every combination becomes a line")
    group.add_argument(
        "--model", default="bat_deit_small_patch16_224", help="registered reducing model"
    )
    group.add_argument(
        "--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE",
        help="more keywords of the model and of the dense one, e.g. embed_dim=192 depth=6",
    )  # fmt: skip
    group.add_argument(
        "--keep-rate", type=float, nargs="+", default=[0.7, 0.5, 0.3, 0.2], metavar="RATE",
        help="keep rates to compare, each in (0, 1] and the same in all stages",
    )  # fmt: skip
    group.add_argument(
        "--reduction", nargs="+", choices=tuple(REDUCTIONS), default=["bat", "topk"],
        help="methods to compare",
    )  # fmt: skip
    group.add_argument(
        "--reduction-loc", type=int, nargs="*", default=None, metavar="BLOCK",
        help="indices of the reducing blocks, from 0; default: 3 6 9",
    )  # fmt: skip
    group.add_argument("--cluster-ratio", type=float, default=None, help="default: 0.4")
    group.add_argument("--match-ratio", type=float, default=None, help="default: 0.1")
    group.add_argument(
        "--merge-weights", choices=MERGE_WEIGHTS, default=None, help="default: importance"
    )
    group.add_argument(
        "--input-size", type=_size, nargs="+", default=[(224, 224)], metavar="SIZE",
        help="image sizes to compare: SIDE or HEIGHTxWIDTH, in pixels",
    )  # fmt: skip
    group.add_argument(
        "--batch-size", type=_at_least(1), nargs="+", default=[16], help="batches to compare"
    )


def _add_run_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("how to run")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32",
        help="float32 (TF32 off), or autocast to bf16 or fp16 (the weights stay float32)",
    )  # fmt: skip
    group.add_argument("--compile", action="store_true", help="torch.compile, one graph a shape")
    group.add_argument(
        "--cuda-graphs", action="store_true", help="--compile with mode='reduce-overhead'"
    )
    group.add_argument("--threads", type=_at_least(1), default=None, help="of PyTorch on the CPU")
    group.add_argument(
        "--repetitions", type=_at_least(FEWEST_REPETITIONS), default=20, help="timed rounds"
    )
    group.add_argument("--warmup", type=_at_least(1), default=3, help="rounds before them")
    group.add_argument(
        "--latency-repetitions", type=_at_least(0), default=50,
        help="timed rounds of single images (--what model); 0: no latency",
    )  # fmt: skip
    group.add_argument(
        "--break-even", action="store_true",
        help="find the smallest batch at which a model is faster than dense (--what model)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of weights and images")
    group.add_argument(
        "--output-dir", default="", help="folder for the .txt, .csv and .json; empty: none"
    )
    group = parser.add_argument_group("--what data")
    group.add_argument("--data-path", default="data", help="folder of images, subfolders included")
    group.add_argument("--num-images", type=_at_least(1), default=256, help="files to read")
    group.add_argument("--num-workers", type=_at_least(0), default=0, help="0: this process")


def get_parser() -> ArgumentParser:
    """The parser of `benchmark.py`."""
    parser = ArgumentParser(prog="benchmark.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--what", choices=("model", "train", "data", "stage"), default="model",
        help="inference, training step, input pipeline, or share of the reduction stages",
    )  # fmt: skip
    _add_model_arguments(parser)
    _add_run_arguments(parser)
    return parser


def _check(args: argparse.Namespace, device: torch.device) -> None:
    """Raises InputError when flags clash or a keep rate is outside its range."""
    for rate in args.keep_rate:
        if not 0 < rate <= 1 or math.isnan(rate):
            raise InputError(f"--keep-rate must be in (0, 1], got {rate}")
    if args.cuda_graphs and device.type != "cuda":
        raise InputError(f"--cuda-graphs needs a GPU, the device is {device}")
    if args.break_even and args.what != "model":
        raise InputError(f"--break-even belongs to --what model, not to --what {args.what}")
    if args.what == "data" and (len(args.batch_size) > 1 or len(args.input_size) > 1):
        raise InputError("--what data takes one --batch-size and one --input-size")


def _choice(args: argparse.Namespace) -> Choice:
    """Which models to compare."""
    names = ("reduction_loc", "cluster_ratio", "match_ratio", "merge_weights")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return Choice(
        args.model,
        args.model_kwargs | given,
        args.reduction,
        args.keep_rate,
        args.input_size,
        args.batch_size,
    )


def _data_choice(args: argparse.Namespace) -> DataChoice:
    """What to read; the augmentation is the default one of `main.py`."""
    options = get_args_parser().parse_args([])
    options.input_size = args.input_size[0]
    return DataChoice(
        Path(args.data_path),
        args.num_images,
        args.batch_size[0],
        args.num_workers,
        args.repetitions,
        args.warmup,
        options,
    )


def _setting(args: argparse.Namespace, device: torch.device) -> Setting:
    mode = "default" if args.compile else None
    return Setting(
        device,
        DTYPES[args.dtype],
        "reduce-overhead" if args.cuda_graphs else mode,
        args.repetitions,
        args.warmup,
        args.latency_repetitions,
        args.seed,
    )


def measure(args: argparse.Namespace, device: torch.device) -> Report:
    """Runs the benchmark that was asked for.

    Raises:
        InputError: a model cannot be built, or there is nothing to read.
    """
    if args.what == "data":
        return benchmark_data(_data_choice(args))
    choice, setting = _choice(args), _setting(args, device)
    if args.what == "train":
        return benchmark_train(choice, setting)
    if args.what == "stage":
        return benchmark_stage(choice, setting)
    return benchmark_model(choice, setting, break_even=args.break_even)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.exit_on_bad_input():
        device = init_process("cpu" if args.what == "data" else args.device)
        _check(args, device)
        folder = check_writable(args.output_dir) if args.output_dir else None
        if args.threads or args.what == "data":
            torch.set_num_threads(args.threads or 1)
        setting = environment(device)
        if args.what != "data":
            mode = "reduce-overhead" if args.cuda_graphs else "default" if args.compile else None
            setting |= {"dtype": args.dtype, "compile": mode}
        setting |= {"repetitions": args.repetitions, "warmup": args.warmup}
        report = measure(args, device)
    print(report_text(report, setting))
    if folder is not None:
        for path in write_report(report, setting, folder, device):
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
