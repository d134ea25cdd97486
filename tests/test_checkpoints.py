"""Reading and writing checkpoints: this project's, DeiT's and EViT's, whole or not at all."""

import argparse
import math
import os
from pathlib import Path
from types import ModuleType
from typing import IO
from unittest.mock import Mock

import pytest
import timm
import torch
from conftest import RUN_FLAGS, TIMMS, TINY, TINY_FLAGS, Run, RunMain, build_tiny, randomise
from timm.layers import resample_abs_pos_embed
from torch import Tensor

import checkpoints
import tools.common
import tools.diversity
import tools.sweep
import tools.tokens
import visualize_mask
from checkpoints import (
    CheckpointSchedule,
    fit_weights,
    latest_checkpoint,
    load_checkpoint,
    model_from_checkpoint,
    model_weights,
)
from utils import InputError, OutputError, write_atomically


def draw_images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def save_as_deit(model, path: Path, **more: object) -> Path:
    """As DeiT's and EViT's main.py write it: the arguments are an argparse.Namespace."""
    args = argparse.Namespace(model="deit_tiny_patch16_224", lr=5e-4, drop_loc="(3, 6, 9)")
    contents = {
        "model": model.state_dict(),
        "optimizer": {"state": {}, "param_groups": []},
        "lr_scheduler": {"step_size": 1},
        "epoch": 299,
        "model_ema": model.state_dict(),
        "scaler": {},
        "args": args,
    }
    torch.save(contents | more, path)
    return path


# Reading ----------------------------------------------------------------------------------------


def test_deits_checkpoints_evaluate(call_main: RunMain, data_path: Path, tmp_path: Path) -> None:
    path = save_as_deit(build_tiny(), tmp_path / "deit.pth")
    assert load_checkpoint(path)["args"]["drop_loc"] == "(3, 6, 9)"
    for reduction in ("evit", "none"):
        done = call_main(
            *TINY_FLAGS, *RUN_FLAGS, "--data-path", data_path, "--eval", "--resume", path,
            "--reduction", reduction,
        )  # fmt: skip
        assert done.returncode == 0 and "on 24 images" in done.stdout


def deit_tiny(**changes: object):
    """timm's own DeiT with the small model's sizes."""
    keywords = TIMMS
    return randomise(
        timm.create_model(**{"model_name": "deit_tiny_patch16_224"}, **keywords | changes)
    )


def test_deits_checkpoint_finetunes(call_main: RunMain, data_path: Path, tmp_path: Path) -> None:
    path = save_as_deit(deit_tiny(num_classes=9), tmp_path / "deit.pth")
    done = call_main(
        *TINY_FLAGS, *RUN_FLAGS, "--data-path", data_path, "--finetune", path, "--epochs", "1",
        "--batch-size", "32", "--output-dir", tmp_path / "out", "--mixup", "0", "--cutmix", "0",
    )  # fmt: skip
    assert done.returncode == 0
    assert "not loaded from" in done.stdout and "head.weight, head.bias" in done.stdout
    assert load_checkpoint(tmp_path / "out" / "best.pth")["model_args"]["num_classes"] == 4


@pytest.mark.parametrize("layout", ["bare", "model", "state_dict", "module."])
def test_layouts_of_weights(layout: str, tmp_path: Path) -> None:
    weights = build_tiny().state_dict()
    contents = {
        "bare": weights,
        "model": {"model": weights},
        "state_dict": {"state_dict": weights, "epoch": 3},
        "module.": {"model": {f"module.{name}": value for name, value in weights.items()}},
    }[layout]
    torch.save(contents, tmp_path / "weights.pth")
    read = model_weights(load_checkpoint(tmp_path / "weights.pth"))
    assert list(read) == list(weights)
    assert all(torch.equal(read[name], value) for name, value in weights.items())


def test_moving_average_is_asked_for_by_name(tmp_path: Path) -> None:
    weights, average = build_tiny().state_dict(), {"a": torch.ones(1)}
    checkpoint = {"model": weights, "model_ema": average}
    assert model_weights(checkpoint, ema=True)["a"] == 1
    for without in ({"model": weights}, {"model": weights, "model_ema": None}):
        with pytest.raises(InputError, match="model_ema"):
            model_weights(without, ema=True)


def test_damage_within_the_file_is_found(tmp_path: Path) -> None:
    """One flipped bit in the middle of the weights."""
    path = save_as_deit(build_tiny(), tmp_path / "flipped.pth")
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)
    with pytest.raises(InputError, match=r"flipped\.pth"):
        load_checkpoint(path)


def test_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    torch.save({"model": {}, "epoch": 3, "step": 0}, tmp_path / "checkpoint.1.pth")
    torch.save({"model": {}, "epoch": 4, "step": 0}, tmp_path / "checkpoint.pth")
    torch.save({"model": {}, "epoch": 9, "step": 0}, tmp_path / "best.pth")
    path, contents = latest_checkpoint(tmp_path)
    assert path.name == "checkpoint.pth" and contents["epoch"] == 4
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    found, contents = latest_checkpoint(tmp_path)
    assert found.name == "checkpoint.1.pth" and contents["epoch"] == 3
    assert path.read_bytes() == whole[: len(whole) // 2], "the damaged one is kept"


def test_resume_auto_passes_over_a_damaged_checkpoint(
    call_main: RunMain, trained: Run, tmp_path: Path
) -> None:
    """Nothing else is there, so the run starts over, and says why."""
    whole = (trained.folder / "checkpoint.pth").read_bytes()
    (tmp_path / "checkpoint.pth").write_bytes(whole[:-200])
    flags = [flag if flag != "4" else "1" for flag in trained.flags]  # --epochs
    done = call_main(*flags, "--output-dir", tmp_path, "--resume", "auto")
    assert done.returncode == 0
    assert "passed over" in done.stdout and str(tmp_path / "checkpoint.pth") in done.stdout
    assert load_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 1


# Writing ----------------------------------------------------------------------------------------


def test_interrupted_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pth"

    def save(epoch: int) -> None:
        write_atomically(path, lambda file: torch.save({"model": {}, "epoch": epoch}, file))

    save(1)
    before = path.read_bytes()

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full_disk)
            with pytest.raises(OutputError, match=r"cannot write .*No space left"):
                save(2)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["checkpoint.pth"], "no part of the new one stays"
    save(2)
    assert load_checkpoint(path)["epoch"] == 2
    with pytest.raises(RuntimeError, match="out of memory"):  # no failure to write
        write_atomically(path, Mock(side_effect=RuntimeError("CUDA error: out of memory")))


def test_disk_that_is_full_for_a_moment(tmp_path: Path) -> None:
    """`torch.save` ends its file all the same; what that makes of the gap is not the reason."""
    state = {str(index): torch.zeros(9000) for index in range(4)}

    class File:
        def __init__(self, file: IO[bytes], fails_at: int) -> None:
            self.file, self.left, self.flush = file, fails_at, file.flush

        def write(self, data: bytes) -> int:
            self.left -= 1
            if self.left == 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

    def save(fails_at: int) -> None:
        write_atomically(tmp_path / "a.pth", lambda file: torch.save(state, File(file, fails_at)))

    causes = set()
    for fails_at in range(1, 40):
        with pytest.raises(OutputError, match=r"/a.pth: No space left on device$") as raised:
            save(fails_at)
        causes.add(type(raised.value.__cause__))
        assert not os.listdir(tmp_path)
    assert causes == {OSError, RuntimeError}


def test_minutes_are_agreed_on_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among several processes this waits for the device; alone it does not."""
    agreed = []
    monkeypatch.setattr(checkpoints, "all_reduce", lambda values, _: agreed.append(1) or values)
    monkeypatch.setattr(checkpoints, "is_main_process", lambda: True)
    schedule, device = CheckpointSchedule("10m"), torch.device("cpu")
    for launched, expected in ((False, 25), (True, 2)):
        agreed.clear()
        monkeypatch.setattr(checkpoints.dist, "is_initialized", lambda known=launched: known)
        for updates in range(1, 26):
            schedule.last = -math.inf
            assert schedule.due(updates, device) == (not launched or updates % 10 == 0)
        assert len(agreed) == expected
    assert schedule.due(30, device) and not schedule.due(40, device)


# Into models ------------------------------------------------------------------------------------


def test_model_from_checkpoint(trained: Run) -> None:
    checkpoint = load_checkpoint(trained.folder / "best.pth")
    images = draw_images()
    with torch.no_grad():
        model = model_from_checkpoint(checkpoint).eval()
        average = model_from_checkpoint(checkpoint, ema=True).eval()
        changed = model_from_checkpoint(checkpoint, keep_rate=0.3, reduction="topk").eval()
        assert model.keep_rates == (0.6, 0.8) and model.reduction == "bat"
        assert changed.keep_rates == (0.3, 0.3) and changed.reduction == "topk"
        assert not torch.allclose(model(images), average(images), atol=1e-5)
        for built, key in ((model, "model"), (average, "model_ema"), (changed, "model")):
            for name, value in built.state_dict().items():
                assert torch.equal(value, checkpoint[key][name])
    with pytest.raises(InputError, match="model_args"):
        model_from_checkpoint({"model": {}})
    with pytest.raises(ValueError, match="keep_rate"):
        model_from_checkpoint(checkpoint, keep_rate=2.0)


def test_differences_are_named_and_nothing_is_loaded() -> None:
    model = build_tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = build_tiny(num_classes=9).state_dict()
    weights["surplus"] = weights.pop("norm.weight")
    with pytest.raises(InputError) as error:
        fit_weights(model, weights, "there.pth")
    text = str(error.value)
    assert text.startswith("there.pth is for another model") and "\n" not in text
    for part in (
        "missing: norm.weight",
        "unexpected: surplus",
        "head.weight (9, 32) instead of (4, 32)",
    ):
        assert part in text
    for changes in ({"depth": 2}, {"embed_dim": 64}, {"depth": 4}):
        with pytest.raises(InputError, match=r"wide\.pth is for another model; .*(blocks|cls)"):
            fit_weights(model, deit_tiny(**changes).state_dict(), "wide.pth", new_head=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_pretrained_weights_of_another_size_and_class_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dense = deit_tiny(img_size=48, num_classes=9)
    model = build_tiny(img_size=(32, 64))
    head = model.head.weight.detach().clone()
    with caplog.at_level("INFO", logger="bat"):
        fit_weights(model, dense.state_dict(), "deit.pth", new_head=True)
    assert caplog.messages == ["not loaded from deit.pth: head.weight, head.bias"]
    assert torch.equal(model.head.weight, head)
    expected = resample_abs_pos_embed(dense.pos_embed, new_size=(4, 8), old_size=(6, 6))
    torch.testing.assert_close(model.pos_embed, expected, rtol=0, atol=1e-6)
    assert torch.equal(model.blocks[2].mlp.fc1.weight, dense.blocks[2].mlp.fc1.weight)


def write_flat(path: Path, size: tuple[int, int]) -> Tensor:
    """A checkpoint of a model for images that are not square; returns its position embedding."""
    source = build_tiny(img_size=size)
    model_args = {"model_name": "bat_deit_tiny_patch16_224", **TINY, "img_size": size}
    torch.save({"model": source.state_dict(), "model_args": model_args}, path)
    return source.pos_embed.detach()


@pytest.mark.parametrize(
    ("old", "new"), [((16, 64), (32, 128)), ((48, 40), (32, 32)), ((64, 16), (32, 32))]
)
def test_positions_are_resampled_from_their_own_grid(
    tmp_path: Path, old: tuple[int, int], new: tuple[int, int]
) -> None:
    """The number of patches does not say whether they were a square: the file does."""
    positions = write_flat(tmp_path / "flat.pth", old)
    model = model_from_checkpoint(load_checkpoint(tmp_path / "flat.pth"), img_size=new)
    old_grid, new_grid = ([length // 8 for length in size] for size in (old, new))
    expected = resample_abs_pos_embed(positions, new_size=new_grid, old_size=old_grid)
    torch.testing.assert_close(model.pos_embed, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("script", [visualize_mask, tools.sweep, tools.diversity, tools.tokens])
def test_every_script_resamples_from_the_positions_own_grid(
    script: ModuleType, data_path: Path, tmp_path: Path
) -> None:
    positions = write_flat(tmp_path / "flat.pth", (32, 128))
    expected = resample_abs_pos_embed(positions, new_size=(8, 32), old_size=(4, 16))
    flags = ["--checkpoint", str(tmp_path / "flat.pth"), "--data-path", str(data_path)]
    args = script.get_args_parser().parse_args([*flags, "--input-size", "64", "256"])
    if script is visualize_mask:
        model = script.prepare(args)[0].model
    else:
        own = argparse.Namespace(**vars(args) | {"keep_rate": None, "reduction": None})
        model = tools.common.load_model(own, str(tmp_path / "flat.pth"), torch.device("cpu"))
    torch.testing.assert_close(model.pos_embed, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(48, 32), (64, 16)], ids=["other count", "same count"])
def test_finetuning_from_an_input_that_is_not_square(
    call_main: RunMain, data_path: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    positions = write_flat(tmp_path / "flat.pth", size)
    done = call_main(
        "--finetune", tmp_path / "flat.pth", "--input-size", "32", *RUN_FLAGS, "--epochs", "1",
        "--data-path", data_path, "--batch-size", "32", "--lr", "0", "--min-lr", "0",
        "--warmup-epochs", "0", "--weight-decay", "0", "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grid = (size[0] // 8, size[1] // 8)
    expected = resample_abs_pos_embed(positions, new_size=(4, 4), old_size=grid)
    found = load_checkpoint(tmp_path / "out" / "checkpoint.pth")["model"]["pos_embed"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_pretrained_distilled_deit_loses_its_second_token(
    caplog: pytest.LogCaptureFixture,
) -> None:
    keywords = TIMMS
    distilled = randomise(timm.create_model("deit_tiny_distilled_patch16_224", **keywords))
    model = build_tiny()
    with caplog.at_level("INFO", logger="bat"):
        fit_weights(model, distilled.state_dict(), "distilled.pth", new_head=True)
    names = set(caplog.messages[0].partition(": ")[2].split(", "))
    assert names == {"dist_token", "head_dist.weight", "head_dist.bias"}
    embedding = distilled.pos_embed
    assert torch.equal(model.pos_embed[:, 0], embedding[:, 0]), "the class token's"
    assert torch.equal(model.pos_embed[:, 1:], embedding[:, 2:]), "the patches'"
