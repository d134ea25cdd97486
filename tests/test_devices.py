"""What must work on a GPU as on a CPU: where there is one, every test here runs on both."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import (
    DESIGN,
    INDUCTOR,
    PLAIN_FLAGS,
    TINY_FLAGS,
    Result,
    build_tiny,
    read_log,
    run_process,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_helpers import Task

from checkpoints import load_checkpoint
from models.reduction import bat_assignment

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
ONE_PROCESS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]

pytestmark = pytest.mark.parametrize("device", DEVICES)


def train(data_path: Path, folder: Path, device: str, *flags: object, **options) -> Result:
    """Two epochs of the small model on a device."""
    done = run_process(
        *TINY_FLAGS, *PLAIN_FLAGS, "--num-workers", "0", "--device", device, "--epochs", "2",
        "--batch-size", "16", "--warmup-epochs", "0", "--lr", "2e-3", "--unscale-lr", "--data-path",
        data_path, "--output-dir", folder, *flags, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"device: {device}" in done.stdout
    return done


def weights(folder: Path) -> list[Tensor]:
    return list(load_checkpoint(folder / "checkpoint.pth")["model"].values())


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_launcher_of_one_process(data_path: Path, tmp_path: Path, device: str, amp: str) -> None:
    """NCCL on a GPU, gloo on a CPU; the weights are those of a process without a launcher."""
    flags = ["--amp", amp, "--deterministic"]
    train(data_path, tmp_path / "launched", device, *flags, launcher=ONE_PROCESS)
    train(data_path, tmp_path / "alone", device, *flags)
    losses = [entry["train_loss"] for entry in read_log(tmp_path / "launched")]
    assert losses == [entry["train_loss"] for entry in read_log(tmp_path / "alone")]
    launched, alone = weights(tmp_path / "launched"), weights(tmp_path / "alone")
    assert all(torch.equal(a, b) for a, b in zip(launched, alone, strict=True))


def test_decoded_images_are_augmented_on_the_device(
    data_path: Path, tmp_path: Path, device: str
) -> None:
    train(data_path, tmp_path / "run", device, "--image-cache", tmp_path / "cache")
    assert read_log(tmp_path / "run")[-1]["test_acc1"] > 50


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Fails where the host waits for a GPU to copy something."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_step_does_not_wait(device: str, amp: str) -> None:
    task = Task(["--batch-size", "8", "--amp", amp], device=torch.device(device))
    first = task.train()["loss"]  # makes the optimizer's state
    task.next_epoch()
    with no_waiting(device):
        second = task.train()["loss"]
    assert 0 < second < first


@pytest.mark.parametrize("setting", ["on", "off"])
def test_attention_is_fused(device: str, setting: str) -> None:
    model = build_tiny(keep_rate=0.5, **DESIGN | {"proportional_attention": setting}).to(device)
    images = torch.randn(2, 3, 32, 32, device=device)
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
        with sdpa_kernel(FUSED):
            logits, assignments = model.forward_with_assignments(images)
        with sdpa_kernel(SDPBackend.MATH):
            expected, expected_assignments = model.forward_with_assignments(images)
    for own, other in zip(assignments, expected_assignments, strict=True):
        assert torch.equal(own, other)
    torch.testing.assert_close(logits.float(), expected.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("num_tokens", [196, 700])
def test_groups_are_those_of_a_cpu(device: str, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, num_tokens, 64, generator=generator)
    importance = torch.rand(2, num_tokens, generator=generator)
    arguments = 0.5, 0.4, 0.1
    for repeated in (1, 4):  # 4: of every token there are four, equal to the last bit
        x, importance = (y[:, : num_tokens // repeated].repeat_interleave(repeated, dim=1)
                         for y in (x, importance))  # fmt: skip
        expected = bat_assignment(x, importance, *arguments)
        compiled = torch.compile(bat_assignment, backend=INDUCTOR, fullgraph=True, dynamic=False)
        for assign in (bat_assignment, compiled):
            groups = assign(x.to(device), importance.to(device), *arguments)
            assert torch.equal(groups.cpu(), expected)
