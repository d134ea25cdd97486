"""Exports a model with its reduction inside the graph, and checks the file against the model.

    python export.py --checkpoint best.pth --output model.onnx

The suffix decides: `.onnx` is run by onnxruntime, `.pt2` (a torch.export program) by PyTorch. The
batch dimension is dynamic, the image size and the keep rate are fixed. Exit codes: 0 done, 1 the
file disagrees with the model (it is removed), 2 bad input.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from arguments import ArgumentParser, add_model_arguments
from builders import build_model, model_arguments, with_stored_model
from checkpoints import load_checkpoint, load_weights, model_weights
from models import BATVisionTransformer, count_gmacs
from utils import InputError

MAX_DIFFERENCE = 1e-4  # of a logit, in float32
EXTRAS = ("onnx", "onnxscript", "onnxruntime")
TRACED_BATCH = 2  # any batch above 1 leaves the dimension dynamic
CHECKED_BATCHES = (1, 3)
SUFFIXES = (".onnx", ".pt2")


class TracedModel(nn.Module):
    """A model that returns its assignments too, as the flat outputs that exporters want."""

    def __init__(self, model: BATVisionTransformer) -> None:
        """Wraps a model."""
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, height, width) to logits and one (B, N_i) assignment per stage."""
        logits, assignments = self.model.forward_with_assignments(images)
        return logits, *assignments


class LogitModel(nn.Module):
    """A model whose output is a tuple of one, as `TracedModel`'s is of several."""

    def __init__(self, model: nn.Module) -> None:
        """Wraps a model."""
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, height, width) to (B, num_classes) logits."""
        return (self.model(images),)


class Comparison(NamedTuple):
    """How an exported file differs from its model.

    Attributes:
        logits: largest absolute difference of a logit.
        moved: tokens that were assigned to another group; 0 without assignments in the file.
    """

    logits: float
    moved: int


def check_extras() -> None:
    """Raises InputError with the pip command unless the packages behind ONNX are installed."""
    missing = [name for name in EXTRAS if not is_installed(name)]
    if missing:
        raise InputError(f"ONNX needs optional packages: pip install {' '.join(missing)}")


def is_installed(name: str) -> bool:
    """Whether a package can be imported; the module is not run."""
    return name in sys.modules or find_spec(name) is not None


def _sort_translation() -> dict:
    """ONNX for stable sorts, which torch.onnx does not know: TopK puts the lower index first."""
    from onnxscript import opset18 as op

    def stable_sort(values, stable=True, dim=-1, descending=False):
        length = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
        return op.TopK(values, length, axis=dim, largest=int(descending), sorted=1)

    return {torch.ops.aten.sort.stable: stable_sort}


def export_onnx(module: nn.Module, images: Tensor, path: Path) -> None:
    """Writes ONNX; inputs and outputs are named, the first dimension of each is "batch".

    Args:
        module: `LogitModel` or `TracedModel`, in evaluation mode.
        images: (B, 3, height, width) with B > 1, to trace with.
        path: of the file, weights included.
    """
    with torch.no_grad():
        num_stages = len(module(images)) - 1
        names = ["logits", *(f"assignment_{stage + 1}" for stage in range(num_stages))]
        program = torch.onnx.export(
            module,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=names,
            dynamic_shapes=({0: Dim("batch")},),
            custom_translation_table=_sort_translation(),
            verbose=False,
        )
    program.save(path)


def export_program(module: nn.Module, images: Tensor, path: Path) -> None:
    """Writes a torch.export program; arguments as `export_onnx`."""
    with torch.no_grad():
        program = torch.export.export(module, (images,), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, path)


def load_onnx(path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    """Loads an ONNX file as a function from images to its outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(o) for o in session.run(None, {name: images.numpy()})]


def load_program(path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    """Loads a torch.export program as a function from images to its outputs."""
    return torch.export.load(path).module()


def export_file(module: nn.Module, images: Tensor, path: Path) -> None:
    """Writes the format that the suffix of the path names; arguments as `export_onnx`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own deprecations
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        (export_onnx if path.suffix == ".onnx" else export_program)(module, images, path)


def compare(path: Path, module: nn.Module, img_size: tuple[int, int], seed: int = 0) -> Comparison:
    """Reloads a file and runs it and the model on the same batches of noise, in float32.

    Args:
        path: of the exported file.
        module: what was exported.
        img_size: (height, width) in pixels.
        seed: of the noise.
    """
    run = load_onnx(path) if path.suffix == ".onnx" else load_program(path)
    generator = torch.Generator().manual_seed(seed)
    logits, moved = 0.0, 0
    for batch_size in CHECKED_BATCHES:
        images = torch.randn(batch_size, 3, *img_size, generator=generator)
        with torch.no_grad():
            expected, actual = module(images), run(images)
        logits = max(logits, _largest_difference(expected[0], actual[0]))
        moved += sum(int((a != b).sum()) for a, b in zip(expected[1:], actual[1:], strict=True))
    return Comparison(logits, moved)


def _largest_difference(expected: Tensor, actual: Tensor) -> float:
    """Largest absolute difference; infinite where a value is not a number or shapes differ."""
    if expected.shape != actual.shape:
        return float("inf")
    return (expected - actual).abs().nan_to_num(nan=float("inf")).max().item()


def get_parser() -> ArgumentParser:
    """The parser of `export.py`."""
    parser = ArgumentParser(prog="export.py", description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    group = parser.add_argument_group("export")
    group.add_argument("--checkpoint", default="", help="weights; without one they are random")
    group.add_argument(
        "--ema", action="store_true", help="take the checkpoint's moving average of the weights"
    )
    group.add_argument("--output", required=True, help=f"file to write, {' or '.join(SUFFIXES)}")
    group.add_argument(
        "--assignments", action="store_true", help="output where every token went, too"
    )
    group.add_argument("--seed", type=int, default=0, help="of random weights and of the check")
    return parser


def build_module(args: argparse.Namespace) -> nn.Module:
    """The model to export, in evaluation mode, wrapped to return a tuple.

    Raises:
        InputError: the checkpoint cannot be read or does not fit, or the model cannot be built.
    """
    checkpoint = load_checkpoint(args.checkpoint) if args.checkpoint else {}
    args = with_stored_model(args, checkpoint.get("model_args"))
    torch.manual_seed(args.seed)
    model = build_model(model_arguments(args, num_classes=1000))
    if checkpoint:
        load_weights(model, model_weights(checkpoint, ema=args.ema), args.checkpoint)
    else:
        print("no --checkpoint: the weights are random")
    model.eval()
    return TracedModel(model) if args.assignments else LogitModel(model)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = get_parser()
    args = parser.parse_args(argv)
    path = Path(args.output)
    if path.suffix not in SUFFIXES:
        parser.error(f"--output must end in {' or '.join(SUFFIXES)}, got '{args.output}'")
    if not path.parent.is_dir():
        parser.error(f"--output: no such folder: {path.parent}")
    if args.ema and not args.checkpoint:
        parser.error("--ema needs --checkpoint")
    with parser.exit_on_bad_input():
        if path.suffix == ".onnx":
            check_extras()
        module = build_module(args)
    model = module.model
    img_size = model.patch_embed.img_size
    print(
        f"{model.reduction}, keep rates {list(model.keep_rates)}, {count_gmacs(model):.4f} GMACs "
        f"an image of {img_size[0]}x{img_size[1]}"
    )
    export_file(module, torch.zeros(TRACED_BATCH, 3, *img_size), path)
    result = compare(path, module, img_size, args.seed)
    batches = " and ".join(map(str, CHECKED_BATCHES))
    print(
        f"largest logit difference on batches of {batches}: {result.logits:.2e} "
        f"(limit {MAX_DIFFERENCE:g})"
        + (f"; tokens in another group: {result.moved}" if args.assignments else "")
    )
    if not result.logits <= MAX_DIFFERENCE:
        path.unlink()
        print(f"not done: {path} disagrees with the model and was removed")
        return 1
    print(f"done: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
