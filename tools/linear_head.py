"""A linear classifier on the features of a model that has none: a minute instead of a training.

    python -m tools.linear_head --checkpoint backbone.safetensors --data-path DATA --output head.pth

Exit codes: 0 done, 2 bad input.
"""

import os
import sys
from argparse import Namespace
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from arguments import ArgumentParser, add_data_arguments, data_config, model_arguments
from checkpoints import load_checkpoint, model_from_checkpoint
from datasets import DATA_SETS, SampleDataset, build_transform
from tools import common
from utils import check_writable, logger, run_script, seed_everything, write_atomically

HELP = """Fits the head of a model to a training set by ridge regression of the one-hot classes on
the features of the whole images (keep rate 1, no augmentation). The penalty, and the factor that
turns the answers into logits, are those of the lowest cross-entropy on every tenth image, which the
regression has not seen. Writes a checkpoint that every script reads."""
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # shares of the mean squared feature
FACTORS = (1, 2, 4, 8, 16, 32)


def ridge(features: Tensor, targets: Tensor, penalty: float) -> nn.Linear:
    """The linear map with the least squared error and penalty, in float64.

    Args:
        features: (n, D).
        targets: (n, classes).
        penalty: on the squared weights, relative to the mean squared centred feature.
    """
    mean, target_mean = features.mean(dim=0), targets.mean(dim=0)
    x, y = features - mean, targets - target_mean
    gram = x.T @ x
    gram.diagonal().add_(penalty * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, x.T @ y).T  # (classes, D)
    head = nn.Linear(*weight.T.shape, dtype=weight.dtype)
    head.load_state_dict({"weight": weight, "bias": target_mean - weight @ mean})
    return head


@torch.no_grad()
def fit_head(features: Tensor, labels: Tensor, num_classes: int) -> tuple[nn.Linear, float, float]:
    """The head, in float64, and Acc@1 in percent and cross-entropy on every tenth image.

    Takes features (n, D) float64 and labels (n,).
    """
    targets = F.one_hot(labels, num_classes).to(features.dtype)
    held_out = torch.arange(len(labels)) % 10 == 9
    best = None
    for penalty, factor in product(PENALTIES, FACTORS):
        logits = factor * ridge(features[~held_out], targets[~held_out], penalty)(
            features[held_out]
        )
        loss = F.cross_entropy(logits, labels[held_out]).item()
        if best is None or loss < best[0]:
            accuracy = 100 * (logits.argmax(dim=1) == labels[held_out]).double().mean().item()
            best = loss, accuracy, penalty, factor
    loss, accuracy, penalty, factor = best
    head = ridge(features, targets, penalty)
    for parameter in head.parameters():
        parameter.mul_(factor)
    return head, accuracy, loss


def get_args_parser() -> ArgumentParser:
    parser = common.tool_parser("linear_head", HELP, batch_size=64)
    add_data_arguments(parser)
    parser.add_argument("--output", default="output/linear_head.pth", help="checkpoint to write")
    return parser


@torch.no_grad()
def run(args: Namespace) -> int:
    """Reads the images, fits the head and writes the checkpoint."""
    device = common.find_device(args)
    checkpoint = load_checkpoint(args.checkpoint)
    seed_everything(args.seed)
    keywords = model_arguments(args, checkpoint["model_args"]) | {"keep_rate": 1.0}
    source = DATA_SETS[args.data_set](Path(os.path.expanduser(args.data_path)), True, args)
    keywords["num_classes"] = len(source.classes)
    model = model_from_checkpoint(
        checkpoint, ema=args.ema, source=args.checkpoint, new_head=True, **keywords
    ).to(device)
    config = data_config(args, model.patch_embed.img_size, model.pretrained_cfg)
    dataset = SampleDataset(source, build_transform(False, args, config), config)
    loader = DataLoader(dataset, batch_size=args.batch_size, num_workers=args.num_workers)
    features, labels = [], []
    for images, targets, _ in loader:
        tokens = model.forward_features(images.to(device))
        features.append(model.forward_head(tokens, pre_logits=True).double().cpu())
        labels.append(targets)
        logger.info(f"image {args.batch_size * len(features)} of {len(dataset)}")
    head, accuracy, loss = fit_head(torch.cat(features), torch.cat(labels), len(source.classes))
    model.head.load_state_dict(head.state_dict())
    settings = model.reduction_settings() | keywords
    contents = {"model": model.cpu().state_dict(), "model_args": settings}
    contents |= {"data_config": config, "classes": source.classes}
    path = Path(args.output)
    check_writable(path.parent)
    write_atomically(path, lambda file: torch.save(contents, file))
    logger.info(f"Acc@1 {accuracy:.2f}, loss {loss:.4f} on every tenth image; wrote {path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_script(get_args_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
