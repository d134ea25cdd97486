"""Runs that diverge, overflow in half precision, or meet images that cannot be read."""

import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fault_helpers import (
    TRAIN_FLAGS,
    Launcher,
    assert_same_run,
    let_a_second_pass,
    load,
    progress,
    read_entries,
)
from torch import Tensor

import main
from utils import STOP_SIGNALS

pytest_plugins = ("fault_fixtures",)

EXIT_DIVERGED = 3
CALM_FLAGS = [  # the first epoch trains at 1e-6, the next ones at what --lr says
    "--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--accum-steps", "1",
    "--warmup-lr", "1e-6", "--warmup-epochs", "1", "--opt", "momentum", "--momentum", "0",
]  # fmt: skip


def assert_diverged(text: str, name: str, epoch: int) -> None:
    """The last line tells what happened where, at which learning rate, after which losses."""
    assert "Traceback" not in text
    found = re.fullmatch(
        r"main.py: stopped: the (.*) is (nan|inf|-inf) in epoch (\d), step \d+, "
        r"at learning rate [-+.e\d]+; losses before: [-+.e\d]+(, [-+.e\d]+)*",
        text.rstrip().splitlines()[-1],
    )
    assert found and found[1] == name and found[3] == str(epoch), text


def assert_last_checkpoint_is_good(folder: Path, epoch: int, step: int = 0) -> None:
    assert progress(folder) == (epoch, step)
    weights = load(folder / "checkpoint.pth")["model"]
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
    assert len(read_entries(folder)) == epoch


@pytest.mark.parametrize("world_size", [1, 2])
def test_loss_that_is_not_finite(
    launcher: Launcher, train_flags: list[str], tmp_path: Path, world_size: int
) -> None:
    """The learning rate is sane in the warm-up and makes the third epoch's loss leave float32."""
    flags = [*train_flags, *CALM_FLAGS, "--lr", "1e38", "--output-dir", tmp_path]
    for run in launcher.ranks(world_size, *flags):
        assert run.wait() == EXIT_DIVERGED, run.text()
        assert_diverged(run.text(), "loss", 2)
    assert_last_checkpoint_is_good(tmp_path, 2)


@pytest.mark.parametrize(("interval", "num_losses", "saved"), [(0, 24, 0), (1, 22, 4), (3, 24, 2)])
def test_gradient_that_is_not_finite(
    call_main: Callable,
    train_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interval: int,
    num_losses: int,
    saved: int,
) -> None:
    """A loss whose value is in order and whose gradient is not: infinity times zero.

    It is noticed an update later, or before the next checkpoint.
    """
    build_criterion, losses = main.build_criterion, []

    def build(*args: object, **options: object) -> Callable[..., Tensor]:
        criterion = build_criterion(*args, **options)

        def spoilt(images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
            losses.append(criterion(images, logits, targets))
            bad = len(losses) > 20  # from the third update of the second epoch on
            return losses[-1] + (torch.sqrt(0 * logits.sum()) if bad else 0)

        return spoilt

    monkeypatch.setattr(main, "build_criterion", build)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        flags = ["--checkpoint-interval", interval, "--output-dir", tmp_path]
        result = call_main(*train_flags, *flags)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert result.returncode == EXIT_DIVERGED, result.stderr
    assert_diverged(result.stdout, "gradient norm", 1)
    assert "in epoch 1, step 4, " in result.stdout
    assert len(losses) == num_losses and all(loss.isfinite() for loss in losses[:22])
    assert_last_checkpoint_is_good(tmp_path, 1, saved)


def test_half_precision_survives_overflows(
    launcher: Launcher, train_flags: list[str], tmp_path: Path
) -> None:
    """A scale that is too large makes gradients overflow: updates are left out until it fits."""
    flags = [*train_flags, "--amp", "fp16", "--output-dir", tmp_path, "--resume", "auto"]
    launcher.main(*flags, "--epochs", "1").finish()
    path = tmp_path / "checkpoint.pth"
    checkpoint = load(path)
    scale = 2.0**24
    checkpoint["scaler"]["scale"] = scale
    torch.save(checkpoint, path)
    text = launcher.main(*flags).finish()
    assert "resumed" in text
    after = load(path)
    backoffs = math.log2(scale / after["scaler"]["scale"])
    steps = {int(state["step"]) for state in after["optimizer"]["state"].values()}
    assert 0 < backoffs < 16 and after["updates"] == 24
    assert steps == {24 - int(backoffs)}
    assert all(bool(weight.isfinite().all()) for weight in after["model"].values())
    assert not torch.equal(after["model"]["head.weight"], checkpoint["model"]["head.weight"])


def test_half_precision_resumes_exactly(
    launcher: Launcher, train_flags: list[str], tmp_path: Path
) -> None:
    """The scaler's state goes on too."""
    flags = [*train_flags, "--amp", "fp16", "--checkpoint-interval", "1"]
    whole = launcher.main(*flags, "--output-dir", tmp_path / "whole")
    flags += ["--output-dir", tmp_path / "killed", "--resume", "auto"]
    run = launcher.main(*flags)
    run.wait_for("Epoch: [1]  [ 7/16]")
    run.kill()
    whole.finish()
    let_a_second_pass()
    assert "resumed" in launcher.main(*flags).finish()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    scaler = load(tmp_path / "killed" / "checkpoint.pth")["scaler"]
    assert scaler["_growth_tracker"] == 24


@pytest.fixture(scope="module")
def broken_data(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images, of which one to train on and two to evaluate on are cut off or empty."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(data_path, folder, dirs_exist_ok=True)
    for name, size in (("train/red/3.png", 900), ("val/blue/1.png", 300), ("val/green/2.png", 0)):
        whole = (folder / name).read_bytes()
        assert len(whole) > size
        (folder / name).write_bytes(whole[:size])
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_image_ends_the_run(
    launcher: Launcher, broken_data: Path, tmp_path: Path, workers: int
) -> None:
    flags = [*TRAIN_FLAGS, "--data-path", broken_data, "--num-workers", workers]
    run = launcher.main(*flags, "--output-dir", tmp_path)
    assert run.wait() == 2, run.text()
    last = run.text().rstrip().splitlines()[-1]
    assert last.startswith("main.py: error: cannot read image ")
    assert any(str(path) in last for path in broken_data.glob("*/*/*.png"))
    assert "Traceback" not in run.text()


def test_interrupt_ends_the_run_and_its_workers(
    launcher: Launcher, train_flags: list[str], tmp_path: Path
) -> None:
    """The workers ignore the signal that Python ends them with: nobody may wait for them."""
    run = launcher.main(*train_flags, "--num-workers", "2")
    run.wait_for("Epoch: [0]  [ 3/16]")
    run.send(signal.SIGINT)
    assert run.wait(30) != 0
    assert "KeyboardInterrupt" in run.text()
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)


def test_bad_images_are_skipped_and_counted(
    launcher: Launcher, broken_data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Without repetitions an epoch meets the bad training image once."""
    flags = [*TRAIN_FLAGS, "--data-path", broken_data, "--bad-images", "skip", "--no-repeated-aug"]
    run = launcher.main(*flags, "--output-dir", tmp_path)
    text = run.finish()
    assert text.count("test: 2 unreadable images were counted as wrong") == 3
    for entry in read_entries(tmp_path):
        assert entry["train_bad_images"] == 1
        assert entry["test_bad_images"] == entry["test_ema_bad_images"] == 2
        assert entry["test_num_images"] == 24
        assert entry["test_acc1"] <= entry["test_acc5"] == pytest.approx(100 * 22 / 24)
