"""A linear classifier on the features of a model that has none: a minute instead of a training.

    python -m tools.linear_head --checkpoint backbone.safetensors --data-path DATA

Exit codes: 0 done, 1 images could not be read (they are named and counted), 2 bad input.
"""

import sys
from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arguments import ArgumentParser, add_data_arguments, data_config, model_arguments
from checkpoints import load_checkpoint, model_from_checkpoint
from datasets import SampleDataset, build_source, build_transform
from tools import common
from utils import InputError, check_writable, logger, run_script, seed_everything, write_atomically

HELP = """Fits the head of a model to a training set by ridge regression of the one-hot classes on
the features of the whole images (keep rate 1, no augmentation). The penalty, and the factor that
turns the answers into logits, are those of the lowest cross-entropy on every tenth image, which the
regression has not seen. Writes head.pth, a checkpoint that every script reads."""
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

    Takes features (n, D) float64 and labels (n,), n at least 10.
    """
    targets = F.one_hot(labels, num_classes).to(features.dtype)
    held_out = torch.arange(len(labels)) % 10 == 9
    best = None
    for penalty in PENALTIES:
        head = ridge(features[~held_out], targets[~held_out], penalty)
        answers = head(features[held_out])
        accuracy = 100 * (answers.argmax(dim=1) == labels[held_out]).double().mean().item()
        for factor in FACTORS:
            loss = F.cross_entropy(factor * answers, labels[held_out]).item()
            if best is None or loss < best[0]:
                best = loss, accuracy, penalty, factor
    loss, accuracy, penalty, factor = best
    head = ridge(features, targets, penalty)
    for parameter in head.parameters():
        parameter.mul_(factor)
    return head, accuracy, loss


def get_args_parser() -> ArgumentParser:
    parser = common.tool_parser("linear_head", HELP, batch_size=64)
    add_data_arguments(parser)
    return parser


@torch.no_grad()
def run(args: Namespace) -> int:
    """Reads the images, fits the head and writes the checkpoint."""
    # Model
    device = common.find_device(args)
    checkpoint = load_checkpoint(args.checkpoint) if args.checkpoint else {}
    seed_everything(args.seed)
    keywords = model_arguments(args, checkpoint.get("model_args"))
    source = build_source(True, args)
    keywords["num_classes"] = len(source.classes)
    options = {"ema": args.ema, "source": args.checkpoint, "new_head": True}
    model = model_from_checkpoint(checkpoint, **options, **keywords).to(device)
    settings = model.reduction_settings() | keywords
    model.set_keep_rate(1.0)
    # Features of all images that can be read
    config = data_config(args, model.patch_embed.img_size, model.pretrained_cfg)
    transform = build_transform(False, args, config)
    dataset = SampleDataset(source, transform, config, bad_images=args.bad_images)
    if len(dataset) < 10:
        raise InputError(f"{args.data_path} has {len(dataset)} training images, fewer than 10")
    indices, bad = range(len(dataset)), []
    features, read = [], []
    for images, batch in common.readable_batches(dataset, indices, args, bad, device):
        tokens = model.forward_features(images)
        features.append(model.forward_head(tokens, pre_logits=True).double().cpu())
        read += batch
    labels = torch.from_numpy(dataset.targets[read])
    # Head
    head, accuracy, loss = fit_head(torch.cat(features), labels, len(source.classes))
    for own in {model.class_readout[1], getattr(model, "head_dist", model.class_readout[1])}:
        own.load_state_dict(head.state_dict())  # distilled: the mean of both is this head
    contents = {"model": model.cpu().state_dict(), "model_args": settings}
    contents |= {"data_config": config, "classes": source.classes}
    path = check_writable(args.output_dir) / "head.pth"
    write_atomically(path, lambda file: torch.save(contents, file))
    logger.info(f"Acc@1 {accuracy:.2f}, loss {loss:.4f} on every tenth image; wrote {path}")
    return common.report_bad_images(dataset, bad, len(dataset))


def main(argv: list[str] | None = None) -> int:
    return run_script(get_args_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
