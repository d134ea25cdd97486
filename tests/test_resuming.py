"""The command line end to end: resuming and fine-tuning."""

from pathlib import Path

import pytest
import torch
from conftest import PLAIN_FLAGS, RUN_FLAGS, Run, RunMain, read_log, write_images
from timm.layers import resample_abs_pos_embed

from checkpoints import RunFolder, load_checkpoint


def test_resume_auto_continues_where_the_run_stopped(
    call_main: RunMain, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crash(Exception):
        pass

    save = RunFolder.save

    def crash_in_third_epoch(self, state) -> None:
        if state.epoch == 3:  # logged already, not yet saved
            raise Crash
        save(self, state)

    flags = [*trained.flags, "--output-dir", tmp_path, "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", crash_in_third_epoch)
        with pytest.raises(Crash):
            call_main(*flags)
    assert len(read_log(tmp_path)) == 3, "one entry more than the checkpoint knows of"
    done = call_main(*flags)
    assert done.returncode == 0
    assert "at epoch 2, step 0" in done.stdout and "Epoch: [1]" not in done.stdout
    same = (
        "epoch",
        "train_loss",
        "train_lr",
        "keep_rate",
        "test_acc1",
        "test_loss",
        "test_ema_acc1",
    )
    undisturbed = [{name: entry[name] for name in same} for entry in read_log(trained.folder)]
    assert [{name: entry[name] for name in same} for entry in read_log(tmp_path)] == undisturbed
    expected, resumed = (
        torch.load(folder / "checkpoint.pth", weights_only=True)
        for folder in (trained.folder, tmp_path)
    )
    for key in ("model", "model_ema"):
        for name, value in expected[key].items():
            assert torch.equal(resumed[key][name], value), f"{key} {name}"
    finished = call_main(*flags)
    assert finished.returncode == 0 and "Epoch: [" not in finished.stdout


def test_resuming_by_path_into_another_folder(
    call_main: RunMain, trained: Run, tmp_path: Path
) -> None:
    flags = [flag if flag != "4" else "5" for flag in trained.flags]  # --epochs
    checkpoint = trained.folder / "checkpoint.pth"
    done = call_main(*flags, "--resume", checkpoint, "--output-dir", tmp_path)
    assert done.returncode == 0 and f"resumed {checkpoint} at epoch 4" in done.stdout
    assert [entry["epoch"] for entry in read_log(tmp_path)] == [4]


def test_finetuning_for_other_classes_and_another_size(
    call_main: RunMain, trained: Run, tmp_path: Path
) -> None:
    source = trained.folder / "best.pth"
    root = write_images(tmp_path / "two", {"black": (0, 0, 0), "white": (255, 255, 255)}, size=48)
    folder = tmp_path / "run"
    done = call_main(
        "--finetune", source, "--data-path", root, "--input-size", "48", "40", *RUN_FLAGS,
        *PLAIN_FLAGS, "--epochs", "1", "--batch-size", "8", "--lr", "0", "--min-lr", "0",
        "--warmup-epochs", "0", "--output-dir", folder, "--keep-rate", "0.5",
    )  # fmt: skip
    assert done.returncode == 0
    assert f"not loaded from {source}: head.weight, head.bias\n" in done.stdout
    before = load_checkpoint(source)
    after = load_checkpoint(folder / "checkpoint.pth")
    assert after["model_args"]["num_classes"] == 2 and after["model_args"]["embed_dim"] == 32
    assert tuple(after["model_args"]["img_size"]) == (48, 40)
    assert after["classes"] == ["black", "white"]
    resampled = resample_abs_pos_embed(before["model"]["pos_embed"], new_size=(6, 5))
    for name, value in after["model"].items():  # at a learning rate of 0 nothing moves
        if name == "pos_embed":
            torch.testing.assert_close(value, resampled, rtol=0, atol=1e-6)
        elif name.startswith("head"):
            assert value.shape[0] == 2
        else:
            torch.testing.assert_close(value, before["model"][name], rtol=0, atol=0)
    assert after["epoch"] == 1 and after["updates"] == read_log(folder)[0]["epoch"] + 4


def test_finetuning_the_same_task_loads_everything(
    call_main: RunMain, trained: Run, data_path: Path, tmp_path: Path
) -> None:
    best = max(read_log(trained.folder), key=lambda entry: entry["test_acc1"])
    done = call_main(
        "--finetune", trained.folder / "best.pth", "--data-path", data_path, *RUN_FLAGS,
        *PLAIN_FLAGS, "--epochs", "1", "--batch-size", "16", "--lr", "0", "--min-lr", "0",
        "--warmup-epochs", "0", "--output-dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and "not loaded" not in done.stdout
    assert read_log(tmp_path)[0]["test_acc1"] == best["test_acc1"]
    assert read_log(tmp_path)[0]["keep_rate"] == [0.6, 0.8], "the file's own"
