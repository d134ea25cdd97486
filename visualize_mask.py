"""Draws what each reduction stage of a model did to an image: kept, merged or dropped.

One PNG an image: the image as the model sees it, then one panel a stage. A token that stands for
one patch shows the patch's pixels; a merged token shows its mean colour, with a border around each
connected region; dropped patches are white. `contact_sheet.png` shows all images together.

    python visualize_mask.py --checkpoint output/demo/best.pth --data-path FOLDER --output-dir pics
"""

import random
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from arguments import (
    ArgumentParser,
    add_data_arguments,
    add_model_arguments,
)
from builders import build_model, model_arguments, with_stored_model
from checkpoints import load_checkpoint, load_pretrained, load_weights, model_weights
from datasets import DATA_SETS, SampleDataset, build_dataset, build_transform
from images import BadImageError, load_image
from models.trace import trace_patches
from pictures import Picture, StagePanel, draw_contact_sheet, draw_picture, draw_strip
from utils import InputError, init_process

DEFAULT_NUM_IMAGES = 16
DEFAULT_NUM_CLASSES = 1000


class Source(NamedTuple):
    """One image to draw."""

    name: str  # shown in the picture
    true_class: str  # "" when not known
    load: Callable[[], Tensor]  # gives (3, H, W) normalised; raises BadImageError


class LoadedModel(NamedTuple):
    """A model and what the titles say about it."""

    model: nn.Module
    description: str
    classes: Sequence[str]  # names of the outputs; empty: not known
    is_trained: bool


def get_args_parser() -> ArgumentParser:
    """The parser of this script."""
    parser = ArgumentParser(
        prog="visualize_mask.py",
        description=__doc__.split("\n\n")[0],
        conflict_handler="resolve",  # two of the shared flags mean more here
    )
    add_model_arguments(parser)
    add_data_arguments(parser)
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--data-path", required=True,
        help="folder of images (searched recursively), one image, or a text file with one path a "
        "line, relative to the current folder; with --data-set the folder of the data set",
    )  # fmt: skip
    group.add_argument(
        "--data-set", choices=DATA_SETS, default=None, help="draw the validation images of this set"
    )
    group.add_argument("--checkpoint", default="", help="of main.py; without it: random weights")
    group.add_argument("--output-dir", default="output/pictures", help="where to write")
    group.add_argument(
        "--num-images", type=int, default=None, metavar="N",
        help=f"draw the first N images; default: {DEFAULT_NUM_IMAGES}, or a whole list",
    )  # fmt: skip
    group.add_argument("--shuffle", action="store_true", help="draw a random choice of the images")
    group.add_argument("--seed", type=int, default=0, help="of the choice and of random weights")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser


def file_sources(files: Sequence[Path], classes: Sequence[str], args: Namespace) -> list[Source]:
    """Makes a source of each image file; its folder's name is the class if `classes` has it.

    Args:
        files: image files.
        classes: class names, may be empty.
        args: what `build_transform` reads.
    """
    transform = build_transform(False, args)

    def load(file: Path) -> Tensor:
        return transform(load_image(str(file)))

    class_names = [file.parent.name if file.parent.name in classes else "" for file in files]
    return [
        Source(file.name, name, partial(load, file))
        for file, name in zip(files, class_names, strict=True)
    ]


def dataset_sources(dataset: SampleDataset) -> list[Source]:
    """Makes a source of each sample of a validation set whose bad images raise an error."""

    def load(index: int) -> Tensor:
        return dataset[index][0]

    class_names = [dataset.classes[target] for target in dataset.targets.tolist()]
    return [
        Source(f"{name}_{index:05d}", name, partial(load, index))
        for index, name in enumerate(class_names)
    ]


def choose_sources(sources: Sequence[Source], args: Namespace, *, default: int) -> list[Source]:
    """Takes the first --num-images sources, or a random choice of them with --shuffle.

    Args:
        sources: all images there are.
        args: reads num_images, shuffle and seed.
        default: how many without --num-images.
    """
    sources = list(sources)
    if args.shuffle:
        random.Random(args.seed).shuffle(sources)
    return sources[: default if args.num_images is None else args.num_images]


def load_model(args: Namespace, checkpoint: Mapping, dataset_classes: Sequence[str]) -> LoadedModel:
    """Builds the model of the checkpoint, or one with random weights.

    Args:
        args: checkpoint, seed, and the model flags with none left open.
        checkpoint: as `load_checkpoint` returns it; empty: random weights.
        dataset_classes: class names of the data set, empty when there is none.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        InputError: the checkpoint does not fit, or a flag is out of range.
    """
    weights = model_weights(checkpoint) if checkpoint else {}
    num_classes = len(weights.get("head.bias", dataset_classes)) or DEFAULT_NUM_CLASSES
    torch.manual_seed(args.seed)
    model = build_model(model_arguments(args, num_classes)).eval()
    if tuple(model.patch_embed.img_size) != tuple(args.input_size):
        raise InputError("give the size of the input as --input-size, not in --model-kwargs")
    if checkpoint:
        # Only another input size calls for resampling the position embedding.
        stored_size = checkpoint.get("model_args", {}).get("img_size", args.input_size)
        fits = tuple(stored_size) == tuple(args.input_size)
        (load_weights if fits else load_pretrained)(model, weights, args.checkpoint)
    rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(model.keep_rates))
    origin = "/".join(Path(args.checkpoint).parts[-2:]) if checkpoint else "random weights"
    classes = checkpoint.get("classes") or dataset_classes
    return LoadedModel(
        model,
        f"{args.model}, {model.reduction}, keep rate {rates}, {origin}",
        classes if len(classes) == model.num_classes else (),
        bool(checkpoint),
    )


@torch.no_grad()
def make_picture(loaded: LoadedModel, source: Source, image: Tensor) -> Picture:
    """Runs one image through the model and notes what became of each patch.

    Args:
        loaded: the model and its description.
        source: where the image is from.
        image: (3, H, W) float32, normalised, of the model's input size.

    Raises:
        InputError: the model does not cut this image into the grid of patches that it names.
    """
    model = loaded.model
    device = next(model.parameters()).device
    logits, assignments = model.forward_with_assignments(image[None].to(device))
    rows, columns = model.patch_embed.grid_size
    patch_height, patch_width = model.patch_embed.patch_size
    stages = model.stages()
    if stages and assignments[0].shape[1] != rows * columns:
        raise InputError(
            f"{assignments[0].shape[1]} patches enter stage 1; must be {rows} x {columns}"
        )
    panels = []
    for stage, trace in zip(stages, trace_patches(assignments, stages), strict=True):
        place = f"stage {len(panels) + 1} (block {stage.block + 1})"
        title = f"{place}: {stage.num_tokens} -> {stage.num_outputs} tokens"
        panels.append(StagePanel(title, trace.group[0].cpu().numpy(), trace.kind[0].cpu().numpy()))
    pixels = denormalize(image)[: rows * patch_height, : columns * patch_width]
    return Picture(
        header=f"{source.name}  |  {loaded.description}",
        true_class=source.true_class,
        prediction=describe_prediction(loaded, logits[0].softmax(0).cpu()),
        image=pixels,
        grid_size=(rows, columns),
        stages=tuple(panels),
    )


def denormalize(image: Tensor) -> np.ndarray:
    """Turns a (3, H, W) image with ImageNet's normalisation into (H, W, 3) uint8 pixels."""
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    pixels = ((image * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(1, 2, 0).contiguous().numpy()


def describe_prediction(loaded: LoadedModel, probabilities: Tensor) -> str:
    """Names the class that a trained model predicts; random weights predict nothing.

    Args:
        loaded: the model and its class names.
        probabilities: (num_classes,) of the image.
    """
    if not loaded.is_trained or not probabilities.numel():
        return ""
    index = int(probabilities.argmax())
    name = loaded.classes[index] if loaded.classes else f"class {index}"
    return f"predicted: {name} ({100 * float(probabilities[index]):.0f} %)"


def draw_all(loaded: LoadedModel, sources: Sequence[Source], output_dir: Path) -> int:
    """Draws every source and the contact sheet; unreadable images are named and left out.

    Args:
        loaded: the model.
        sources: what to draw.
        output_dir: an existing folder.

    Returns:
        How many images could not be read.
    """
    strips = []
    for number, source in enumerate(sources, 1):
        try:
            image = source.load()
        except BadImageError as problem:
            print(problem, file=sys.stderr)
            continue
        picture = make_picture(loaded, source, image)
        path = output_dir / f"{number:03d}_{Path(source.name).stem}.png"
        draw_picture(picture).save(path, optimize=True)
        strips.append(draw_strip(picture, source.name))
        print(path, flush=True)
    if strips:
        blocks = ", ".join(str(stage.block + 1) for stage in loaded.model.stages())
        header = f"{loaded.description}  |  panels: original, after blocks {blocks}"
        sheet = draw_contact_sheet(strips, header if blocks else loaded.description)
        sheet.save(output_dir / "contact_sheet.png", optimize=True)
        print(output_dir / "contact_sheet.png")
    return len(sources) - len(strips)


def prepare(args: Namespace) -> tuple[LoadedModel, list[Source], Path]:
    """Checks everything and builds the model and the list of images, before anything is drawn.

    Args:
        args: all flags.

    Returns:
        The model on its device, the images to draw and the output folder.

    Raises:
        InputError: any of the flags or files is bad.
    """
    if args.num_images is not None and args.num_images < 1:
        raise InputError(f"--num-images must be at least 1, got {args.num_images}")
    device = init_process(args.device)
    path = Path(args.data_path).expanduser()
    files = [] if args.data_set else list_images(path)
    checkpoint = load_checkpoint(args.checkpoint) if args.checkpoint else {}
    filled = with_stored_model(args, checkpoint.get("model_args"))
    reading = Namespace(**{**vars(filled), "bad_images": "error"})
    dataset = build_dataset(False, reading)[0] if args.data_set else None
    loaded = load_model(filled, checkpoint, () if dataset is None else dataset.classes)
    if dataset is not None:
        sources, default = dataset_sources(dataset), DEFAULT_NUM_IMAGES
    else:
        sources = file_sources(files, loaded.classes, reading)
        default = len(files) if path.is_file() else DEFAULT_NUM_IMAGES
    chosen = choose_sources(sources, args, default=default)
    print(f"drawing {len(chosen)} of {len(sources)} images: {loaded.description}")
    output_dir = Path(args.output_dir).expanduser()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass  # the folder can be written
    except OSError as problem:
        raise InputError(f"cannot write to --output-dir {output_dir}: {problem}") from problem
    loaded.model.to(device)
    return loaded, chosen, output_dir


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script.

    Args:
        argv: flags; default: the command line's.

    Returns:
        The exit code: 1 when an image could not be read, else 0.
    """
    parser = get_args_parser()
    args = parser.parse_args(argv)
    with parser.exit_on_bad_input():
        loaded, sources, output_dir = prepare(args)
        num_bad = draw_all(loaded, sources, output_dir)
    if num_bad:
        print(f"{num_bad} of {len(sources)} images could not be read", file=sys.stderr)
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
