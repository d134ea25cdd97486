"""What the tools that run a model share: flags, loading, batches, and what the blocks give."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

import utils
from arguments import (
    ArgumentParser,
    add_data_arguments,
    add_model_arguments,
    at_least,
    folder,
    model_arguments,
    random_seed,
    reduction_variant,
    variant_name,
)
from checkpoints import load_checkpoint, model_from_checkpoint
from datasets import SampleDataset
from inputs.batches import device_loader
from models import REDUCTIONS, ReducingTransformer, describe_reduction, make_reducing
from models.reduction import ReducedTokens
from models.vit import REDUCTION_KEYWORDS
from utils import (
    InputError,
    logger,
    refusing,
    seed_everything,
    write_atomically,
)


def tool_parser(name: str, description: str, *, batch_size: int) -> ArgumentParser:
    """The parser of `python -m tools.NAME` with the flags of a model and of a run."""
    parser = ArgumentParser(
        prog=f"python -m tools.{name}", description=description, conflict_handler="resolve"
    )
    add_model_arguments(parser)
    add = parser.add_argument_group("run").add_argument
    add("--checkpoint", default="", help="of main.py; without it: random weights")
    add("--output-dir", type=folder, default=f"output/{name}", help="where to write")
    add("--batch-size", type=at_least(1), default=batch_size, help="images at a time")
    add("--num-workers", type=at_least(0), default=2, help="data loader worker processes")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--seed", type=random_seed, default=0, help="random seed")
    return parser


def comparison_parser(
    name: str, description: str, *, batch_size: int
) -> tuple[ArgumentParser, Callable]:
    """A `tool_parser` for several methods on the same validation images, and what adds its flags.

    --reduction takes several methods, which become args.reductions; args.reduction is None.
    """
    parser = tool_parser(name, description, batch_size=batch_size)
    add_data_arguments(parser)
    parser.set_defaults(bad_images="skip", reduction=None)
    add = parser.add_argument_group("what to compare").add_argument
    add(
        "--reduction", dest="reductions", nargs="+", type=variant_name, metavar="METHOD",
        default=list(REDUCTIONS), help=f"methods: {', '.join(REDUCTIONS)}; with settings: "
        "METHOD,NAME=VALUE,...",
    )  # fmt: skip
    return parser, add


def find_device(args: Namespace) -> torch.device:
    """The device that the flags name; `InputError` under a launcher."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("this tool runs in one process, without torchrun")
    return utils.find_device(args.device)


def load_model(args: Namespace, path: str, device: torch.device) -> ReducingTransformer:
    """The model of a checkpoint ("": random weights) with what the flags change, to evaluate."""
    return load_contender(args, path, device).model


def load_contender(args: Namespace, path: str, device: torch.device) -> "Contender":
    """As `load_model`, to be switched between methods."""
    checkpoint = load_checkpoint(path) if path else {}
    seed_everything(args.seed)
    stored = checkpoint.get("model_args") or {}
    keywords = model_arguments(args, stored)
    model = model_from_checkpoint(checkpoint, ema=args.ema, source=path, **keywords)
    logger.info(describe_reduction(model))
    return Contender(model.to(device), args, stored)


class Contender(NamedTuple):
    """A model that is switched between methods."""

    model: ReducingTransformer
    args: Namespace  # the flags, which are over what is stored
    stored: dict  # the checkpoint's keywords of the model

    def switch(self, reduction: str, keep_rate: float | None = None) -> ReducingTransformer:
        """The model with a method, which may bring settings, and maybe with a keep rate."""
        variant = {"keep_rate": keep_rate} if keep_rate is not None else {}
        keywords = model_arguments(self.args, self.stored, variant | reduction_variant(reduction))
        chosen = {name: keywords[name] for name in REDUCTION_KEYWORDS if name in keywords}
        with refusing(reduction):
            return make_reducing(self.model, **chosen, check=False)


def readable_batches(
    dataset: SampleDataset,
    indices: Sequence[int],
    args: Namespace,
    bad: list[int],
    device: torch.device,
) -> Iterator[tuple[Tensor, list[int]]]:
    """Batches of those images that can be read, each with their indices; `bad` gets the others'.

    Raises:
        InputError: none of them can be read.
    """
    options = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    num_seen = 0
    for images, _, is_bad in device_loader(dataset, device, sampler=indices, **options):
        batch = indices[num_seen : num_seen + len(images)]
        bad += compress(batch, is_bad)
        num_seen += len(images)
        logger.info(f"image {num_seen} of {len(indices)}")
        good = is_bad == 0
        if good.any():
            yield images[good.to(device)], list(compress(batch, good))
    if len(bad) == num_seen:
        raise InputError(f"none of the {num_seen} images can be read")


def report_bad_images(dataset: SampleDataset, indices: Sequence[int], num_images: int) -> int:
    """Names the unreadable ones of `num_images` images, and gives the exit code."""
    samples = getattr(dataset.source, "samples", None)
    for index in indices:
        name = samples[index][0] if samples else f"number {index}"
        print(f"cannot read image {name}", file=sys.stderr)
    if len(indices):
        print(f"{len(indices)} of {num_images} images could not be read", file=sys.stderr)
    return int(len(indices) > 0)


@contextmanager
def block_outputs(model: ReducingTransformer) -> Iterator[list[ReducedTokens]]:
    """Gives a list to which every forward pass inside appends what each block returns."""
    outputs = []
    handles = [
        block.register_forward_hook(lambda block, inputs, output: outputs.append(output))
        for block in model.blocks
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Writes a CSV file; floats keep all their digits."""
    write_atomically(path, lambda file: table.to_csv(file, index=False, mode="wb"))


def to_markdown(table: pd.DataFrame, formats: Mapping[str, str]) -> str:
    """The table with numbers formatted by column; empty cells for values that are missing."""
    lines = [list(table), ["---"] * table.shape[1]]
    for row in table.to_dict("records"):
        cells = ((value, formats.get(name, "")) for name, value in row.items())
        lines.append(["" if pd.isna(value) else format(value, spec) for value, spec in cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def say_written(stem: Path, *suffixes: str) -> None:
    """Says on one line which files a tool wrote: a stem with each of the suffixes."""
    logger.info(f"wrote {', '.join(str(stem.with_name(stem.name + each)) for each in suffixes)}")
