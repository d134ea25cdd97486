"""What the tests of the tools share: a small checkpoint, and the line of a refused command."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY, randomise

from utils import logger

CPU_FLAGS = ["--device", "cpu", "--num-workers", "0"]


def write_checkpoint(path: Path, seed: int = 0, **changes: object) -> dict:
    """Writes a model with random weights, and others as their moving average.

    Returns:
        The checkpoint.
    """
    keywords = {"model_name": "bat_deit_tiny_patch16_224"} | TINY | changes
    model = randomise(timm.create_model(**keywords), seed)
    averaged = randomise(timm.create_model(**keywords), seed + 100).state_dict()
    checkpoint = {"model": model.state_dict(), "model_ema": averaged, "model_args": keywords}
    torch.save(checkpoint, path)
    return checkpoint


def run_tool(main: Callable[[list[str]], int], argv: list) -> int:
    """Exit code of a command; what it logs goes to today's standard output."""
    logger.handlers.clear()  # pytest's among them
    return main([str(word) for word in argv])


def refusal(capsys: pytest.CaptureFixture, main: Callable[[list[str]], int], argv: list) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_tool(main, argv)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1
    return lines[0]
