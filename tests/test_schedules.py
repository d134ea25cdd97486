"""Learning rates, and keep rates while they shrink."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch.nn.functional as F
from conftest import REPOSITORY, build_tiny
from torch import Tensor
from training_helpers import CPU, Task, parse

from engine import shrunk_keep_rate
from main import build_state

RELEASED = json.loads((Path(__file__).parent / "fixtures" / "released_lrs.json").read_text())


# Learning rates ---------------------------------------------------------------------------------


def recipe_flags(keep_rate: str, folder: Path, gpus: int = 1, most: int = 64) -> list[str]:
    """The flags that a recipe's script hands to main.py, caught by programs of the same names."""
    name = "train_keep0.7" if keep_rate == "0.7" else f"finetune_keep{keep_rate}"
    for program in ("python", "torchrun"):
        catcher = folder / program
        catcher.write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@"\n')
        catcher.chmod(0o755)
    settings = {"GPUS": str(gpus), "MAX_BATCH": str(most), "VENV": str(folder / "none")}
    done = subprocess.run(
        ["bash", f"scripts/{name}.sh"],
        cwd=REPOSITORY,
        env=os.environ | settings | {"PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.splitlines()
    assert str(folder / ("python" if gpus == 1 else "torchrun")) in words
    return words[words.index("main.py") + 1 :]


@pytest.mark.parametrize("keep_rate", RELEASED)
def test_recipes_have_the_released_learning_rates(keep_rate: str, tmp_path: Path) -> None:
    args = parse(recipe_flags(keep_rate, tmp_path))
    assert args.keep_rate == [float(keep_rate)] and args.shrink_epochs is None
    assert bool(args.finetune) == (keep_rate != "0.7")
    assert args.batch_size * args.accum_steps == (2048 if keep_rate == "0.7" else 1024)
    state = build_state(args, build_tiny(), CPU)
    rates = []
    for epoch in range(args.epochs):  # as main.run_training does, without the training
        rates.append(state.optimizer.param_groups[0]["lr"])
        assert all(group["lr"] == rates[-1] for group in state.optimizer.param_groups)
        state.scheduler.step(epoch)
    released = RELEASED[keep_rate]
    assert args.epochs == released["epochs"] == len(released["lr_by_epoch"])
    # The file is rounded to six decimals.
    assert rates == pytest.approx(released["lr_by_epoch"], rel=0, abs=0.5e-6 + 1e-12)
    assert max(rates) == pytest.approx(2e-3 if keep_rate == "0.7" else 4e-5, rel=1e-3)


@pytest.mark.parametrize(("gpus", "most"), [(2, 256), (3, 128), (8, 256), (16, 256), (5, 100)])
def test_recipes_keep_their_total_batch(gpus: int, most: int, tmp_path: Path) -> None:
    for keep_rate, total in (("0.7", 2048), ("0.3", 1024)):
        if total % gpus:
            with pytest.raises(subprocess.CalledProcessError) as refused:
                recipe_flags(keep_rate, tmp_path, gpus, most)
            assert refused.value.returncode == 2
            continue
        args = parse(recipe_flags(keep_rate, tmp_path, gpus, most))
        assert args.batch_size * args.accum_steps * gpus == total
        assert args.batch_size <= most


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--lr", "1e-3", "--batch-size", "128"], 2.5e-4),
        (["--lr", "1e-3", "--batch-size", "64", "--accum-steps", "16"], 2e-3),
        (["--lr", "1e-3", "--batch-size", "128", "--unscale-lr"], 1e-3),
    ],
)
def test_learning_rate_follows_the_total_batch(flags: list[str], expected: float) -> None:
    state = build_state(parse([*flags, "--warmup-epochs", "0"]), build_tiny(), CPU)
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(expected)


# Keep rates while they shrink -------------------------------------------------------------------


def test_shrinking_follows_evits_cosine() -> None:
    settings = {"keep_rates": (0.7, 0.25), "start_epoch": 10, "shrink_epochs": 40}
    assert shrunk_keep_rate(0, **settings) == shrunk_keep_rate(9.99, **settings) == (1.0, 1.0)
    assert shrunk_keep_rate(50, **settings) == shrunk_keep_rate(99, **settings) == (0.7, 0.25)
    assert shrunk_keep_rate(30, **settings) == (0.85, 0.625)
    assert shrunk_keep_rate(20, **settings)[0] == 0.957  # 0.7 + 0.3 * (1 + sqrt(1/2)) / 2, up
    before = (1.0, 1.0)
    for step in range(0, 6000):
        epochs_done = step / 100
        rates = shrunk_keep_rate(epochs_done, **settings)
        progress = min(max((epochs_done - 10) / 40, 0), 1)
        for final, rate, past in zip((0.7, 0.25), rates, before, strict=True):
            exact = final + (1 - final) * (math.cos(math.pi * progress) + 1) / 2
            assert exact - 1e-9 <= rate < exact + 0.001 + 1e-9
            assert final <= rate <= past <= 1
            assert round(rate, 3) == rate, "thousandths: few graphs, few shapes"
        before = rates


def test_no_shrinking_is_a_step() -> None:
    assert shrunk_keep_rate(0.99, [0.5], start_epoch=1, shrink_epochs=0) == (1.0,)
    assert shrunk_keep_rate(1, [0.5], start_epoch=1, shrink_epochs=0) == (0.5,)
    assert shrunk_keep_rate(0, [0.5], start_epoch=0, shrink_epochs=2) == (1.0,)


@pytest.mark.parametrize("by_step", [True, False])
def test_keep_rate_shrinks_by_step_or_by_epoch(by_step: bool) -> None:
    task = Task(["--batch-size", "16", "--epochs", "3"])
    task.state.epoch = 1
    seen = []

    def note(images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        seen.append((task.state.model.keep_rates, task.state.ema.module.keep_rates))
        return F.cross_entropy(logits, targets)

    task.train(
        criterion=note,
        keep_rate_at=lambda done: (1 - done / 10, 1 - done / 20),
        shrink_by_step=by_step,
    )
    done = [1 + step / 4 if by_step else 1 for step in range(4)]
    expected = [pytest.approx((1 - value / 10, 1 - value / 20)) for value in done]
    assert [model for model, _ in seen] == [average for _, average in seen] == expected
