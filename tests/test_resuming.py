"""The command line end to end: resuming and fine-tuning."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PLAIN_FLAGS, RUN_FLAGS, Run, RunMain, read_log, write_images
from timm.layers import resample_abs_pos_embed

import main
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--lr": "1e-3"}, ["--lr was 0.002 and is 0.001"]),
        ({"--epochs": "3"}, ["--epochs was 4 and is 3"]),
        ({"--epochs": "5", "--weight-decay": "0"}, ["--weight-decay was 0.05", "--epochs was 4"]),
        ({"--sched": "step"}, ["--sched was cosine and is step"]),
    ],
)
def test_another_schedule_is_refused(
    call_main: RunMain, trained: Run, changes: dict[str, str], words: list[str]
) -> None:
    """The optimizer and the scheduler go on with their own settings, whatever the flags say."""
    flags = [*trained.flags, *(word for change in changes.items() for word in change)]
    done = call_main(*flags, "--resume", trained.folder / "checkpoint.pth")
    assert done.returncode == 2 and "--finetune" in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_more_epochs_keep_the_schedule_and_say_so(
    call_main: RunMain, trained: Run, tmp_path: Path
) -> None:
    flags = [*trained.flags, "--epochs", "6", "--resume", trained.folder / "checkpoint.pth"]
    done = call_main(*flags, "--output-dir", tmp_path)
    assert done.returncode == 0
    assert "--epochs was 4 and is 6; the learning rate schedule stays" in done.stdout
    facts = json.loads((tmp_path / "args.json").read_text())
    assert facts["args"]["epochs"] == 6 and facts["schedule_epochs"] == 4
    assert [entry["train_lr"] for entry in read_log(tmp_path)][1:] == [1e-5], "the lowest rate"


def test_another_batch_keeps_the_learning_rates_and_says_so(
    call_main: RunMain, trained: Run, tmp_path: Path
) -> None:
    flags = [flag for flag in trained.flags if flag != "--unscale-lr"]
    first = call_main(*flags, "--epochs", "2", "--output-dir", tmp_path)
    assert first.returncode == 0
    peak = 2e-3 * 16 / 512
    assert f"total batch: 16 images, peak learning rate: {peak:.6g}" in first.stdout
    flags += ["--batch-size", "32", "--epochs", "3", "--resume", "auto"]
    done = call_main(*flags, "--output-dir", tmp_path)
    assert done.returncode == 0
    assert "were (16, 1, 1) and are (32, 1, 1): the epoch goes on" in done.stdout
    assert f"total batch: 32 images, peak learning rate: {peak:.6g}" in done.stdout
    facts = json.loads((tmp_path / "args.json").read_text())
    assert facts["total_batch"] == 32 and facts["peak_lr"] == pytest.approx(peak)
    assert facts["resumed"] == str(tmp_path / "checkpoint.pth")


def test_a_folder_with_another_run_is_set_aside_whole(
    call_main: RunMain, trained: Run, tmp_path: Path
) -> None:
    """--resume A --output-dir B: the run that B held stays whole and is named."""
    other = tmp_path / "other"
    shutil.copytree(trained.folder, other)
    held = {p.name: p.read_bytes() for p in other.iterdir() if p.is_file()}
    source = trained.folder / "checkpoint.pth"
    done = call_main(*trained.flags, "--epochs", "5", "--resume", source, "--output-dir", other)
    assert done.returncode == 0 and f"moved to {other / 'previous-1'}" in done.stdout
    assert [entry["epoch"] for entry in read_log(other)] == [4]
    moved = {p.name: p.read_bytes() for p in (other / "previous-1").iterdir() if p.is_file()}
    assert moved == held and (other / "previous-1" / "tensorboard").is_dir()


def test_an_epoch_that_has_become_shorter(
    call_main: RunMain, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*trained.flags, "--output-dir", tmp_path, "--checkpoint-interval", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(main, "validate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call_main(*flags)
    done = call_main(*flags, "--resume", "auto", "--epoch-images", "32")
    assert done.returncode == 2
    assert "stopped after 48 images" in done.stderr and "--epoch-images 32" in done.stderr


def test_another_input_size_needs_finetune(call_main: RunMain, trained: Run) -> None:
    flags = [*trained.flags, "--input-size", "48", "--resume", trained.folder / "checkpoint.pth"]
    done = call_main(*flags)
    assert done.returncode == 2 and "another input size: use --finetune" in done.stderr


@pytest.mark.parametrize("with_finetune", [False, True])
def test_fine_tuning_goes_on_in_its_mode(
    call_main: RunMain, trained: Run, data_path: Path, tmp_path: Path, with_finetune: bool
) -> None:
    """Resumed by path, with or without --finetune beside it: stochastic depth stays off."""
    finetune = ["--finetune", trained.folder / "best.pth"]
    base = [*RUN_FLAGS, "--data-path", data_path, "--batch-size", "16", "--warmup-epochs", "0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call_main(*base, *finetune, "--epochs", "2", "--output-dir", whole).returncode == 0
    assert (
        call_main(
            *base, *finetune, "--epochs", "2", "--output-dir", parts, "--keep-checkpoints", "2"
        ).returncode
        == 0
    )
    resume = ["--resume", parts / "checkpoint.1.pth", *(finetune if with_finetune else [])]
    done = call_main(*base, *resume, "--epochs", "2", "--output-dir", parts)
    assert done.returncode == 0 and "resumed" in done.stdout
    losses = [[entry["train_loss"] for entry in read_log(folder)] for folder in (whole, parts)]
    assert losses[0] == losses[1]
    again = load_checkpoint(parts / "checkpoint.pth")
    assert again["training_mode"] is False


def test_a_head_of_other_classes_is_not_evaluated(
    call_main: RunMain, trained: Run, tmp_path: Path
) -> None:
    root = write_images(tmp_path / "two", {"black": (0, 0, 0), "white": (255, 255, 255)}, size=32)
    best = trained.folder / "best.pth"
    done = call_main("--eval", "--finetune", best, "--data-path", root, *RUN_FLAGS)
    assert done.returncode == 2 and "the model has 4 classes, the data set 2" in done.stderr


def test_crop_and_normalisation_travel_with_the_checkpoint(
    call_main: RunMain, trained: Run, data_path: Path, tmp_path: Path
) -> None:
    own = ["--eval-crop-ratio", "0.5", "--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.3", "0.4"]
    base = [*RUN_FLAGS, "--data-path", data_path, "--input-size", "48"]
    flags = ["--finetune", trained.folder / "best.pth", "--epochs", "1", "--batch-size", "16"]
    assert call_main(*base, *flags, *own, "--output-dir", tmp_path).returncode == 0
    config = load_checkpoint(tmp_path / "best.pth")["data_config"]
    values = {"input_size": (48, 48), "crop_pct": 0.5, "mean": (0.5, 0.4, 0.3)}
    assert config == values | {"std": (0.2, 0.3, 0.4), "interpolation": "bicubic"} | {
        "crop_mode": "center"
    }
    [entry] = read_log(tmp_path)
    evaluated = ["--eval", "--resume", tmp_path / "best.pth", *RUN_FLAGS, "--data-path", data_path]
    line = f"Acc@1 {entry['test_acc1']:.3f}  Acc@5 100.000  loss {entry['test_loss']:.4f}"
    assert line in call_main(*evaluated).stdout
    assert line not in call_main(*evaluated, "--eval-crop-ratio", "1").stdout  # a flag wins


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


# The moving average -----------------------------------------------------------------------------


def test_moving_average_is_evaluated(call_main: RunMain, trained: Run, data_path: Path) -> None:
    last = read_log(trained.folder)[-1]
    flags = [*RUN_FLAGS, "--data-path", data_path, "--resume", trained.folder / "checkpoint.pth"]
    for ema, prefix in (([], "test"), (["--ema"], "test_ema")):
        done = call_main("--eval", *flags, *ema)
        assert done.returncode == 0
        assert f"Acc@1 {last[f'{prefix}_acc1']:.3f}" in done.stdout
        assert f"loss {last[f'{prefix}_loss']:.4f}" in done.stdout
    assert last["test_loss"] != last["test_ema_loss"]
    done = call_main(*trained.flags, "--resume", trained.folder / "checkpoint.pth", "--ema")
    assert done.returncode == 2 and "--ema goes with --eval or --finetune" in done.stderr
    done = call_main("--eval", *trained.flags, "--ema")
    assert done.returncode == 2 and "random weights have no moving average" in done.stderr


def test_finetuning_the_moving_average_goes_on_with_its_own_weights(
    call_main: RunMain, trained: Run, tmp_path: Path
) -> None:
    """--ema is about the source, not about the run's own checkpoint."""
    best = trained.folder / "best.pth"
    flags = [*trained.flags, "--finetune", best, "--ema", "--output-dir", tmp_path]
    assert call_main(*flags, "--epochs", "1", "--lr", "0", "--min-lr", "0", "--warmup-lr", "0",
                     "--weight-decay", "0", "--warmup-epochs", "0").returncode == 0  # fmt: skip
    first, source = load_checkpoint(tmp_path / "checkpoint.pth"), load_checkpoint(best)
    for name, value in source["model_ema"].items():
        assert torch.equal(first["model"][name], value)
    assert call_main(*flags, "--epochs", "1").returncode == 0
    whole = load_checkpoint(tmp_path / "checkpoint.pth")
    resumed = call_main(*flags, "--epochs", "1", "--resume", "auto")
    assert resumed.returncode == 0 and "resumed" in resumed.stdout
    again = load_checkpoint(tmp_path / "checkpoint.pth")
    assert all(torch.equal(whole["model"][name], again["model"][name]) for name in whole["model"])


def test_an_output_folder_at_home_is_found_again(
    call_main: RunMain, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = [*trained.flags, "--epochs", "1", "--output-dir", "~/run", "--resume", "auto"]
    assert call_main(*flags).returncode == 0
    assert "resumed" in call_main(*flags).stdout
    assert not (tmp_path / "run" / "previous-1").exists()
