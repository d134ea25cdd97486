"""Exports a model with its reduction inside the graph, and checks the file against the model.

    python -m tools.export --checkpoint best.pth --output model.onnx

The suffix decides: `.onnx` is run by onnxruntime, `.pt2` (a torch.export program) by PyTorch. The
batch dimension is dynamic, the image size and the keep rate are fixed. `--format hf` writes a
folder for the Hugging Face hub instead: timm's own model, which `timm.create_model` loads without
this code, and beside it the reduction, which `--resume` and `--checkpoint` take from there. Exit
codes: 0 done, 1 the file disagrees with the model (it is removed), 2 bad input.
"""

import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.export import Dim

from arguments import ArgumentParser, add_model_arguments, add_switch, model_arguments, random_seed
from models import ReducingTransformer, count_gmacs
from models.vit import drop_second_head, restore_timm
from tools.common import load_contender, load_model
from utils import InputError, check_writable, run_script

LIMIT = 1e-4  # of the difference of a logit, in float32
EXTRAS = ("onnx", "onnxscript", "onnxruntime")
TRACED_BATCH = 2  # any batch above 1 leaves the dimension dynamic
CHECKED_BATCHES = (1, 3)
SUFFIXES = (".onnx", ".pt2")
# PyTorch's own, about its exporters; each is the start of a message.
KNOWN_WARNINGS = ("The given buffer is not writable", r"`isinstance\(treespec, LeafSpec\)`")


class ExportedModel(nn.Module):
    """A model whose outputs are one flat tuple, as exporters want it."""

    def __init__(self, model: ReducingTransformer, *, assignments: bool) -> None:
        super().__init__()
        self.model = model
        self.assignments = assignments

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, height, width) to logits, and one (B, N_i) assignment per stage if any."""
        if not self.assignments:
            return (self.model(images),)
        logits, assignments = self.model.forward_with_assignments(images)
        return logits, *assignments


def missing_extras() -> list[str]:
    """The packages behind ONNX that are not installed."""
    return [name for name in EXTRAS if find_spec(name) is None]


def _sort_translation() -> dict:
    """ONNX for stable sorts, which torch.onnx does not know: TopK puts the lower index first."""
    from onnxscript import opset18 as op

    def stable_sort(values, stable=True, dim=-1, descending=False):
        length = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
        return op.TopK(values, length, axis=dim, largest=int(descending), sorted=1)

    return {torch.ops.aten.sort.stable: stable_sort}


@torch.no_grad()
def export_file(module: nn.Module, images: Tensor, path: Path) -> None:
    """Traces a module with images (B, 3, height, width), B > 1; the suffix names the format."""
    dynamic_shapes = ({0: Dim("batch")},)
    if path.suffix == ".pt2":
        program = torch.export.export(module, (images,), dynamic_shapes=dynamic_shapes)
        torch.export.save(program, path)
        return
    num_stages = len(module(images)) - 1
    torch.onnx.export(
        module,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits", *(f"assignment_{stage + 1}" for stage in range(num_stages))],
        dynamic_shapes=dynamic_shapes,
        custom_translation_table=_sort_translation(),
        verbose=False,
    ).save(path)


def load_file(path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    """An exported file as a function from images to its outputs."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(o) for o in session.run(None, {name: images.numpy()})]


@torch.no_grad()
def compare(
    path: Path, module: nn.Module, img_size: tuple[int, int], seed: int
) -> tuple[float, int]:
    """Reloads a file and runs it and the exported module on the same noise, in float32.

    Returns:
        The largest absolute difference of a logit (infinite where one is not a number or the
        shapes differ), and how many tokens were assigned to another group.
    """
    run = load_file(path)
    generator = torch.Generator().manual_seed(seed)
    largest, moved = 0.0, 0
    for batch_size in CHECKED_BATCHES:
        images = torch.randn(batch_size, 3, *img_size, generator=generator)
        (logits, *assignments), (own_logits, *own_assignments) = run(images), module(images)
        if logits.shape != own_logits.shape:
            return torch.inf, moved
        difference = (logits - own_logits).abs().nan_to_num(nan=torch.inf)
        largest = max(largest, difference.max().item())
        pairs = zip(assignments, own_assignments, strict=True)
        moved += sum(int((theirs != own).sum()) for theirs, own in pairs)
    return largest, moved


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m tools.export", description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    group = parser.add_argument_group("export")
    group.add_argument("--checkpoint", default="", help="weights; without one they are random")
    group.add_argument("--output", required=True,
        help=f"file to write, {' or '.join(SUFFIXES)}, or the folder of --format hf")  # fmt: skip
    group.add_argument("--format", choices=("suffix", "hf"), default="suffix",
        help="what --output's suffix says, or a folder for the Hugging Face hub")  # fmt: skip
    add_switch(group, "--assignments", default=False, help="output where every token went, too")
    group.add_argument(
        "--seed", type=random_seed, default=0, help="random seed of weights and check"
    )
    return parser


def export_folder(args: Namespace) -> int:
    """Writes config.json and model.safetensors as timm has them; returns the exit code."""
    model, _, stored = load_contender(args, args.checkpoint, torch.device("cpu"))
    keywords = model_arguments(args, stored)
    drop_second_head(model)
    settings = model.reduction_settings() | {"evo_readout": "class"}
    restore_timm(model)
    architecture = keywords.pop("model_name").removeprefix("bat_")
    known = {"architecture": architecture, "input_size": (3, *model.patch_embed.img_size)}
    model.pretrained_cfg = {**model.pretrained_cfg, **known}
    rest = {"num_classes", "pretrained", *settings}
    save_for_hf(
        model,
        str(check_writable(args.output)),
        model_config={"reduction": settings},
        model_args={name: value for name, value in keywords.items() if name not in rest},
        safe_serialization=True,
    )
    print(f"done: {args.output}")
    return 0


def run(args: Namespace) -> int:
    """Exports, compares and says how it went; returns the exit code."""
    path = Path(args.output)
    if args.format == "hf":
        return export_folder(args)
    if path.suffix not in SUFFIXES:
        raise InputError(f"--output must end in {' or '.join(SUFFIXES)}, got '{args.output}'")
    if not os.path.isdir(path.parent):
        raise InputError(f"--output: no such folder: {path.parent}")
    if os.path.isdir(path):
        raise InputError(f"--output: {path} is a folder")
    if path.suffix == ".onnx" and (missing := missing_extras()):
        raise InputError(f"ONNX needs optional packages: pip install {' '.join(missing)}")
    if not args.checkpoint:
        print("no --checkpoint: the weights are random")
    model = load_model(args, args.checkpoint, torch.device("cpu"))
    img_size = model.patch_embed.img_size
    print(f"{count_gmacs(model):.4f} GMACs an image of {img_size[0]}x{img_size[1]}")
    module = ExportedModel(model, assignments=args.assignments).eval()
    with warnings.catch_warnings():
        for message in KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message)
        export_file(module, torch.zeros(TRACED_BATCH, 3, *img_size), path)
        largest, moved = compare(path, module, img_size, args.seed)
    batches = " and ".join(map(str, CHECKED_BATCHES))
    print(f"largest logit difference on batches of {batches}: {largest:.2e} (limit {LIMIT:g})")
    if args.assignments:
        print(f"tokens in another group: {moved}")
    if not largest <= LIMIT:
        path.unlink()
        print(f"not done: {path} disagrees with the model and was removed")
        return 1
    print(f"done: {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(get_args_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
