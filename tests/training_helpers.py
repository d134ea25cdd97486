"""What the tests of training share: parsed flags, and a small task to train on."""

from argparse import Namespace
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from conftest import PLAIN_FLAGS, RUN_FLAGS, TINY_FLAGS, build_tiny
from torch import Tensor

from arguments import check_args, get_args_parser
from engine import TrainOptions, train_one_epoch
from main import build_state
from utils import AMP_DTYPES, find_amp

CPU = torch.device("cpu")


def parse(flags: list[str]) -> Namespace:
    """The checked arguments of main.py."""
    parser = get_args_parser()
    args = parser.parse_args(flags)
    check_args(parser, args)
    return args


class Task:
    """A small model, 64 images in memory whose class is their colour, and the settings."""

    def __init__(
        self, flags: list[str], device: torch.device = CPU, **model_changes: object
    ) -> None:
        self.args = parse([*TINY_FLAGS, *RUN_FLAGS, *PLAIN_FLAGS, "--warmup-epochs", "0", *flags])
        self.device = device
        self.model = build_tiny(keep_rate=0.5, **model_changes).to(device)
        self.state = build_state(self.args, self.model, device)
        generator = torch.Generator().manual_seed(0)
        self.targets = torch.arange(64) % 4
        colours = torch.randn(4, 3, 1, 1, generator=generator)[self.targets]
        self.images = colours + torch.randn(64, 3, 32, 32, generator=generator)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        size = self.args.batch_size
        for start in range(0, 64, size):
            chosen = slice(start, start + size)
            # Mixup writes into the images.
            images, targets = self.images[chosen].clone(), self.targets[chosen]
            if self.device.type == "cuda":
                images, targets = images.pin_memory(), targets.pin_memory()
            yield images, targets, torch.zeros(len(targets), dtype=torch.int64)

    def train(self, criterion=None, *, mixup=None, calls=None, **options) -> dict:
        """One epoch; `calls` are what the engine may call, options more of TrainOptions."""
        settings = {
            "amp_dtype": AMP_DTYPES[find_amp(self.args.amp, self.device)],
            "accum_steps": self.args.accum_steps,
            "clip_grad": self.args.clip_grad,
            "print_freq": 100,
        }
        return train_one_epoch(
            self.state,
            self.model,
            criterion or (lambda images, logits, targets: F.cross_entropy(logits, targets)),
            self.batches(),
            device=self.device,
            num_steps=64 // self.args.batch_size,
            options=TrainOptions(**settings | options),
            mixup=mixup,
            **calls or {},
        )

    def next_epoch(self) -> None:
        self.state.epoch, self.state.step, self.state.metrics = self.state.epoch + 1, 0, {}
