"""Shared by the tests: a small ImageFolder, a small model, and ways to run the command line."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: small work, shared cores

import contextlib
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import main
import models  # noqa: F401 (registers the models)
from utils import STOP_SIGNALS
from utils import logger as LOGGER

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent
CLASSES = ("blue", "green", "red", "yellow")
COLOURS = ((40, 60, 200), (40, 180, 60), (200, 50, 40), (210, 200, 50))
TRAIN_IMAGES, VAL_IMAGES = 16, 6  # per class

# Inductor's kernels; its decompositions alone where there is no compiler for them.
HAS_COMPILER = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
INDUCTOR = "inductor" if HAS_COMPILER else "aot_eager_decomp_partition"

# BAT as it was designed: all of its parts take part.
DESIGN = {"cluster_ratio": 0.4, "match_ratio": 0.1, "proportional_attention": "off"}
# Keywords of a model that a CPU runs in milliseconds: 4 x 4 patches, stages in two of its blocks.
TINY = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 4,
    "reduction_loc": (1, 2),
} | DESIGN
# Of these timm's own.
TIMMS = {name: value for name, value in TINY.items() if name not in DESIGN | {"reduction_loc": ()}}
# The same as flags of main.py, and no time spent on worker processes.
TINY_FLAGS = [
    "--model", "bat_deit_tiny_patch16_224", "--input-size", "32", "--reduction-loc", "1", "2",
    "--model-kwargs", "patch_size=8", "embed_dim=32", "depth=3", "num_heads=2",
]  # fmt: skip
RUN_FLAGS = ["--num-workers", "0", "--device", "cpu", "--print-freq", "100"]
# Nothing random in a step: the loss is a function of the weights and the batch.
PLAIN_FLAGS = [
    "--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--aa", "none", "--color-jitter", "0",
    "--reprob", "0",
]  # fmt: skip

Result = subprocess.CompletedProcess
RunMain = Callable[..., Result]


@pytest.fixture(autouse=True)
def keep_global_state() -> Iterator[None]:
    """Puts back what running the program in this process changes."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    level = LOGGER.level
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    _drop_log_handlers()
    LOGGER.level = level


def _drop_log_handlers() -> None:
    """The handler holds on to the standard output of its test; pytest adds its own without it."""
    LOGGER.handlers.clear()
    LOGGER.propagate = True


def build_tiny(**changes: object) -> nn.Module:
    """The small model with random weights that give the class token strong preferences."""
    torch.manual_seed(0)
    keywords = {"model_name": "bat_deit_tiny_patch16_224"} | TINY | changes
    return randomise(timm.create_model(**keywords))


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Moves every parameter away from its initial value, so that none is 0, 1 or constant."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("qkv.weight"):  # attention logits of about 1: importances far apart
            noise *= parameter.shape[1] ** -0.5
            parameter.copy_(noise)
        else:
            parameter.add_(0.05 * noise)
    return model.eval()


def draw_batch(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_images(root: Path, classes: dict[str, tuple[int, int, int]], *, size: int = 32) -> Path:
    """An ImageFolder in which a class is a colour; every image has noise of its own."""
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        for name, colour in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.array(colour) + rng.normal(0, 40, (size, size, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageFolder of four classes: 64 training and 24 validation images of 32 x 32 pixels."""
    root = tmp_path_factory.mktemp("images")
    return write_images(root, dict(zip(CLASSES, COLOURS, strict=True)))


def run_process(*flags: object, launcher: tuple[str, ...] = ()) -> Result:
    """Runs `python main.py` with the flags; `launcher` are the words between the two."""
    return subprocess.run(
        [sys.executable, *launcher, "main.py", *map(str, flags)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,  # compiling takes a minute on an idle machine
    )


@pytest.fixture(scope="session")
def run_main() -> RunMain:
    """`run_main(*flags)` runs main.py as a process of its own."""
    return run_process


class Run(NamedTuple):
    """A finished training run: its output folder, its flags, and what it printed."""

    folder: Path
    flags: list[str]
    output: str


def read_log(folder: Path) -> list[dict]:
    """Every line of log.txt."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="session")
def trained(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four epochs of the small model at keep rates 0.6 and 0.8, with a moving average."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [
        *TINY_FLAGS, *RUN_FLAGS, *PLAIN_FLAGS, "--data-path", str(data_path), "--epochs", "4",
        "--batch-size", "16", "--lr", "2e-3", "--unscale-lr", "--warmup-epochs", "1",
        "--model-ema-decay", "0.9", "--keep-rate", "0.6", "0.8", "--seed", "3",
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main_in_process([*flags, "--output-dir", folder]) == 0
    return Run(folder, flags, output.getvalue())


@pytest.fixture
def call_main(capsys: pytest.CaptureFixture) -> RunMain:
    """`call_main(*flags)` runs main.main in this process, with what a process would print."""

    def call(*flags: object) -> Result:
        capsys.readouterr()
        code = main_in_process(flags)
        captured = capsys.readouterr()
        return Result(list(flags), code, captured.out, captured.err)

    return call


def main_in_process(flags: Iterable[object]) -> int:
    """Exit code of main.main; its warnings go to standard error as they would in a process."""
    _drop_log_handlers()  # the next one made takes today's standard output
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning):
            warnings.simplefilter("ignore", category)
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.showwarning = _print_warning
        try:
            return main.main([str(flag) for flag in flags])
        except SystemExit as stop:
            return stop.code
        finally:
            _drop_log_handlers()


def _print_warning(message, category, filename, lineno, file=None, line=None) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


@pytest.fixture(scope="module")
def small_model():
    """DeiT-S, without values."""
    with torch.device("meta"):
        return timm.create_model("bat_deit_small_patch16_224", **DESIGN)
