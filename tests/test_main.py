"""The command line end to end: training, evaluating, describing."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import (
    CLASSES,
    PLAIN_FLAGS,
    RUN_FLAGS,
    TINY_FLAGS,
    Run,
    RunMain,
    build_tiny,
    read_log,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from arguments import data_config
from checkpoints import load_checkpoint, model_from_checkpoint
from engine import evaluate
from inputs.demo import make_demo
from models import REDUCTIONS, count_gmacs
from models.reduction import Reduction

CPU = torch.device("cpu")


def printed_accuracy(output: str, header: str = "Test:") -> float:
    found = re.findall(rf"^{header} Acc@1 ([\d.]+)", output, re.MULTILINE)
    assert len(found) == 1, output
    return float(found[0])


def printed_gmacs(output: str) -> float:
    return float(re.search(r"parameters, ([\d.]+) GMACs", output)[1])


# What a run leaves ------------------------------------------------------------------------------


def test_log_has_one_object_an_epoch(trained: Run) -> None:
    entries = read_log(trained.folder)
    assert [entry["epoch"] for entry in entries] == [0, 1, 2, 3]
    for entry in entries:
        assert entry["keep_rate"] == [0.6, 0.8]
        assert entry["images_per_second"] > 0 and entry["epoch_seconds"] > 0
        assert entry["test_num_images"] == entry["test_ema_num_images"] == 24
        assert entry["train_bad_images"] == entry["test_bad_images"] == 0
        assert 0 <= entry["test_acc1"] <= entry["test_acc5"] <= 100
    # Warm-up of one epoch from 1e-6, then half a cosine from the peak at epoch 0 to 1e-5.
    lrs = [entry["train_lr"] for entry in entries]
    assert lrs[:2] == pytest.approx([1e-6, 1e-6])
    assert lrs[2] == pytest.approx(1e-5 + (2e-3 - 1e-5) * (1 + 2**-0.5) / 2, rel=1e-3)
    assert lrs[3] == pytest.approx(1e-5 + (2e-3 - 1e-5) / 2, rel=1e-3)
    assert entries[-1]["train_loss"] < 0.8 * entries[0]["train_loss"]
    assert entries[-1]["test_acc1"] > 50


def test_progress_lines_are_deits(trained: Run) -> None:
    assert re.search(
        r"^Epoch: \[2\]  \[3/4\]  eta: 0:00:00  lr: [\d.]+  loss: [\d.]+ \([\d.]+\) .*"
        r" time: [\d.]+  data: [\d.]+",
        trained.output,
        re.MULTILINE,
    )
    gmacs = printed_gmacs(trained.output)
    assert gmacs == pytest.approx(count_gmacs(build_tiny(keep_rate=(0.6, 0.8))), abs=1e-4)
    assert re.search(r"[\d,]+ parameters", trained.output)


def test_arguments_are_saved_beside_the_log(trained: Run) -> None:
    facts = json.loads((trained.folder / "args.json").read_text())
    assert facts["args"]["keep_rate"] == [0.6, 0.8] and facts["args"]["batch_size"] == 16
    assert facts["model_args"]["embed_dim"] == 32 and facts["classes"] == list(CLASSES)
    assert facts["args"]["lr"] == 2e-3, "as typed, not as scaled"
    assert {"git_hash", "versions", "gmacs", "parameters"} <= facts.keys()


def test_tensorboard_has_the_logs_numbers(trained: Run) -> None:
    events = EventAccumulator(str(trained.folder / "tensorboard"))
    events.Reload()
    entries = read_log(trained.folder)
    names = {
        "train_loss", "train_lr", "images_per_second", "test_acc1", "test_acc5", "test_loss",
        "test_ema_acc1",
    }  # fmt: skip
    assert names <= set(events.Tags()["scalars"])
    for name in names:
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [0, 1, 2, 3]
        expected = [entry[name] for entry in entries]
        assert [scalar.value for scalar in scalars] == pytest.approx(expected, rel=1e-6)
    for stage, rate in ((1, 0.6), (2, 0.8)):
        scalars = events.Scalars(f"keep_rate/stage_{stage}")
        assert [scalar.value for scalar in scalars] == pytest.approx([rate] * 4)


def test_checkpoints_hold_plain_values_and_the_moving_average(trained: Run) -> None:
    last = torch.load(trained.folder / "checkpoint.pth", weights_only=True)
    best = torch.load(trained.folder / "best.pth", weights_only=True)
    entries = read_log(trained.folder)
    assert last["epoch"] == 4 and last["step"] == 0 and last["updates"] == 16
    assert last["best"]["test_acc1"] == max(entry["test_acc1"] for entry in entries)
    assert best["epoch"] == max(entries, key=lambda entry: entry["test_acc1"])["epoch"]
    assert "optimizer" in last and "optimizer" not in best
    for stored in (last, best):
        assert stored["classes"] == list(CLASSES)
        assert isinstance(stored["args"], dict) and stored["args"]["batch_size"] == 16
        assert stored["model"].keys() == stored["model_ema"].keys()
    assert any(not torch.equal(value, last["model"][n]) for n, value in last["model_ema"].items())


# Evaluating -------------------------------------------------------------------------------------


def evaluate_by_hand(model, data_path: Path) -> float:
    args = main.get_args_parser().parse_args([*RUN_FLAGS, "--data-path", str(data_path), "--eval"])
    loader = main.build_val_loader(
        args, main.build_datasets(args, data_config(args, 32, {}), CPU)[1], CPU
    )
    return evaluate(loader, model, CPU)["acc1"]


def test_evaluating_rebuilds_the_model_from_the_file(
    call_main: RunMain, trained: Run, tmp_path: Path
) -> None:
    """From best.pth alone, with val/ alone, without a single model flag."""
    data_path = Path(trained.flags[trained.flags.index("--data-path") + 1])
    (tmp_path / "val").symlink_to(data_path / "val")
    best = max(read_log(trained.folder), key=lambda entry: entry["test_acc1"])
    done = call_main(
        "--eval", "--resume", trained.folder / "best.pth", *RUN_FLAGS, "--data-path", tmp_path
    )
    assert done.returncode == 0
    assert printed_accuracy(done.stdout) == pytest.approx(best["test_acc1"], abs=1e-3)
    assert f"loss {best['test_loss']:.4f}" in done.stdout
    assert printed_gmacs(done.stdout) == printed_gmacs(trained.output)
    assert "Epoch" not in done.stdout


@pytest.mark.parametrize("flag", ["--keep-rate", "--keep_rate", "--base_keep_rate"])
def test_keep_rate_flag_overrides_the_files(
    call_main: RunMain, trained: Run, data_path: Path, flag: str
) -> None:
    best = trained.folder / "best.pth"
    done = call_main("--eval", "--resume", best, *RUN_FLAGS, "--data_path", data_path, flag, "0.1")
    assert done.returncode == 0
    model = model_from_checkpoint(load_checkpoint(best), keep_rate=0.1)
    assert printed_gmacs(done.stdout) == pytest.approx(count_gmacs(model), abs=1e-4)
    assert printed_gmacs(done.stdout) < printed_gmacs(trained.output)
    assert printed_accuracy(done.stdout) == pytest.approx(
        evaluate_by_hand(model, data_path), abs=1e-3
    )


def test_one_keep_rate_per_block_and_another_method(
    call_main: RunMain, trained: Run, data_path: Path
) -> None:
    best = trained.folder / "best.pth"
    done = call_main(
        "--eval", "--resume", best, *RUN_FLAGS, "--data-path", data_path,
        "--keep-rate", "1.0", "0.3", "--reduction", "topk", "--amp", "bf16",
    )  # fmt: skip
    assert done.returncode == 0
    model = model_from_checkpoint(load_checkpoint(best), keep_rate=(1.0, 0.3), reduction="topk")
    assert printed_gmacs(done.stdout) == pytest.approx(count_gmacs(model), abs=1e-4)
    assert "'reduction': 'topk'" in done.stdout


def test_evaluating_needs_no_output_folder_and_no_checkpoint(
    call_main: RunMain, data_path: Path
) -> None:
    done = call_main("--eval", *TINY_FLAGS, *RUN_FLAGS, "--data-path", data_path)
    assert done.returncode == 0 and "on 24 images" in done.stdout


# Training options -------------------------------------------------------------------------------


def train_flags(data_path: Path, *more: object) -> list[object]:
    return [*TINY_FLAGS, *RUN_FLAGS, "--data-path", data_path, "--batch-size", "32", *more]


def test_every_augmentation_on_and_evaluation_at_intervals(
    call_main: RunMain, data_path: Path, tmp_path: Path
) -> None:
    """DeiT's defaults (mixup, cutmix, RandAugment, erasing, stochastic depth), underscores."""
    done = call_main(
        *train_flags(data_path), "--epochs", "4", "--eval_interval", "3", "--no-model-ema",
        "--output_dir", tmp_path, "--accum_steps", "2", "--clip_grad", "1", "--amp", "bf16",
    )  # fmt: skip
    assert done.returncode == 0
    entries = read_log(tmp_path)
    assert ["test_acc1" in entry for entry in entries] == [False, False, True, True]
    assert not any("test_ema_acc1" in entry for entry in entries)
    assert all(0 < entry["train_loss"] < 10 for entry in entries)


def test_accumulation_on_the_command_line(
    call_main: RunMain, data_path: Path, tmp_path: Path
) -> None:
    logs = []
    for batch_size, accum_steps in ((32, 1), (8, 4)):
        folder = tmp_path / str(batch_size)
        done = call_main(
            *TINY_FLAGS, *RUN_FLAGS, *PLAIN_FLAGS, "--data-path", data_path, "--epochs", "2",
            "--batch-size", batch_size, "--accum-steps", accum_steps, "--output-dir", folder,
            "--warmup-epochs", "0", "--lr", "1e-2", "--opt", "momentum", "--no-model-ema",
        )  # fmt: skip
        assert done.returncode == 0
        assert "total batch: 32 images, peak learning rate: 0.000625" in done.stdout
        logs.append(read_log(folder))
    for whole, parts in zip(*logs, strict=True):
        assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)
        assert parts["train_lr"] == whole["train_lr"]


def test_shrinking_keep_rate_ends_at_its_value(
    call_main: RunMain, data_path: Path, tmp_path: Path
) -> None:
    done = call_main(
        *train_flags(data_path, *PLAIN_FLAGS), "--epochs", "4", "--keep-rate", "0.4", "0.6",
        "--shrink-epochs", "2", "--shrink-start-epoch", "1", "--output-dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0
    rates = [tuple(entry["keep_rate"]) for entry in read_log(tmp_path)]
    assert rates[0] == (1.0, 1.0) and rates[3] == (0.4, 0.6)
    for stage in zip(*rates, strict=True):
        assert sorted(stage, reverse=True) == list(stage) and len(set(stage)) > 2
    saved = torch.load(tmp_path / "best.pth", weights_only=True)
    assert tuple(saved["model_args"]["keep_rate"]) == (0.4, 0.6)


def test_best_is_of_the_final_keep_rate(
    call_main: RunMain, data_path: Path, tmp_path: Path
) -> None:
    """Epochs at a higher keep rate do not compete, however good they are."""
    shrink = ["--shrink-epochs", "0", "--shrink-start-epoch", "2", "--keep-rate", "0.3"]
    base = [*train_flags(data_path, *PLAIN_FLAGS), "--output-dir", tmp_path, *shrink]
    assert call_main(*base, "--epochs", "4", "--lr", "0").returncode == 0  # every epoch alike
    entries = read_log(tmp_path)
    assert [entry["keep_rate"] for entry in entries] == [[1, 1], [0.3, 0.3], [0.3, 0.3], [0.3, 0.3]]
    saved = torch.load(tmp_path / "best.pth", weights_only=True)
    assert saved["epoch"] == 1 and saved["best"]["test_acc1"] == entries[1]["test_acc1"]
    again = call_main("--eval", "--resume", tmp_path / "best.pth", *RUN_FLAGS, "--data-path",
                      data_path)  # fmt: skip
    assert f"Acc@1 {entries[1]['test_acc1']:.3f}" in again.stdout


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation(
    call_main: RunMain, trained: Run, data_path: Path, tmp_path: Path, kind: str
) -> None:
    """A teacher rebuilt from a checkpoint of this project; a term of weight 0 changes nothing."""
    losses = []
    for alpha, extra in ((0.0, []), (0.0, ["--distillation-type", kind]), (1.0, [
        "--distillation-type", kind
    ])):  # fmt: skip
        folder = tmp_path / f"{alpha}{len(extra)}"
        done = call_main(
            *train_flags(data_path, *PLAIN_FLAGS), "--epochs", "1", "--output-dir", folder, *extra,
            "--teacher-model", "bat_deit_tiny_patch16_224",
            "--teacher-path", trained.folder / "best.pth", "--distillation-alpha", alpha,
        )  # fmt: skip
        assert done.returncode == 0
        losses.append(read_log(folder)[0]["train_loss"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("wrong", ["shape", "value"])
def test_method_of_ones_own_that_is_wrong(
    call_main: RunMain, data_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """The shape is seen when GMACs are counted, the values with the first batch."""
    topk = REDUCTIONS["topk"].assign
    assign = {
        "shape": lambda stage, budget: topk(stage, budget)[0],
        "value": lambda stage, budget: topk(stage, budget) + 1,
    }
    monkeypatch.setitem(REDUCTIONS, "mine", Reduction(assign[wrong]))
    flags = [*TINY_FLAGS, *RUN_FLAGS, *PLAIN_FLAGS, "--data-path", data_path, "--batch-size", "16"]
    done = call_main(*flags, "--reduction", "mine", "--epochs", "1")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("main.py: error: reduction 'mine' gave an assignment ")
    assert ("of shape (16,)" if wrong == "shape" else "with an index 12") in line
    assert ("parameters" in done.stdout) == (wrong == "value")


def test_loss_that_is_not_finite(call_main: RunMain, data_path: Path, tmp_path: Path) -> None:
    """Two good epochs of warm-up, then a learning rate that no weight survives."""
    flags = [
        *train_flags(data_path, *PLAIN_FLAGS), "--epochs", "6", "--warmup-epochs", "2",
        "--warmup-lr", "1e-4", "--lr", "1e30", "--unscale-lr", "--output-dir", tmp_path,
    ]  # fmt: skip
    done = call_main(*flags)
    assert done.returncode == 3
    last_line = done.stdout.splitlines()[-1]
    assert re.search(r"stopped: the .* (nan|inf) in epoch 2, step \d+", last_line)
    assert [entry["epoch"] for entry in read_log(tmp_path)] == [0, 1]
    names = ("checkpoint.pth", "best.pth")
    good = {name: (tmp_path / name).read_bytes() for name in names}
    for name in names:
        stored = torch.load(tmp_path / name, weights_only=True)
        assert all(value.isfinite().all() for value in stored["model"].values())
        assert all(value.isfinite().all() for value in stored["model_ema"].values())
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 2
    again = call_main(*flags, "--resume", "auto")
    assert again.returncode == 3 and "resumed" in again.stdout
    assert good == {name: (tmp_path / name).read_bytes() for name in names}
    assert [entry["epoch"] for entry in read_log(tmp_path)] == [0, 1]


def test_best_is_the_first_of_the_highest(
    call_main: RunMain, data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accuracy of the weights decides, not that of their average."""
    accuracies = iter([30.0, 99.0, 70.0, 20.0, 70.0, 80.0, 50.0, 10.0])  # weights, average, ...
    monkeypatch.setattr(main, "evaluate", lambda *args, **options: {
        "acc1": next(accuracies), "acc5": 99.0, "loss": 1.0, "num_images": 24, "bad_images": 0
    })  # fmt: skip
    done = call_main(
        *train_flags(data_path, *PLAIN_FLAGS), "--epochs", "4", "--output-dir", tmp_path
    )
    assert done.returncode == 0
    assert load_checkpoint(tmp_path / "best.pth")["epoch"] == 1
    last = load_checkpoint(tmp_path / "checkpoint.pth")
    assert last["best"] == {"test_acc1": 70.0, "test_ema_acc1": 99.0}
    assert [entry["test_acc1"] for entry in read_log(tmp_path)] == [30.0, 70.0, 70.0, 50.0]


# Describing -------------------------------------------------------------------------------------


def test_describe_needs_no_data(call_main: RunMain, tmp_path: Path) -> None:
    done = call_main(
        "--describe", *TINY_FLAGS, "--keep-rate", "0.5", "--data-path", tmp_path / "no"
    )
    assert done.returncode == 0 and done.stderr == ""
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"\s*\d", line)]
    assert [row[:3] for row in rows] == [["0", "16", "16"], ["1", "16", "8"], ["2", "8", "4"]]
    gmacs = float(re.search(r"total: ([\d.]+) GMACs", done.stdout)[1])
    assert gmacs == pytest.approx(
        count_gmacs(build_tiny(keep_rate=0.5, num_classes=1000)), abs=6e-5
    )


def test_describe_reads_a_checkpoint(call_main: RunMain, trained: Run) -> None:
    done = call_main("--describe", "--resume", trained.folder / "best.pth")
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"\s*\d", line)]
    assert done.returncode == 0
    assert [row[1:4] for row in rows] == [["16", "16", rows[0][3]], ["16", "10", "0.6"], [
        "10", "8", "0.8"
    ]]  # fmt: skip


def test_target_gmacs_sets_the_keep_rate(
    call_main: RunMain, data_path: Path, tmp_path: Path
) -> None:
    model = build_tiny(keep_rate=1.0)
    target = 0.7 * count_gmacs(model)
    done = call_main(
        *train_flags(data_path, *PLAIN_FLAGS), "--epochs", "1", "--output-dir", tmp_path,
        "--target-gmacs", target,
    )  # fmt: skip
    assert done.returncode == 0
    (entry,) = read_log(tmp_path)
    keep_rate = entry["keep_rate"][0]
    assert f"keep rate {keep_rate}" in done.stdout and entry["keep_rate"] == [keep_rate] * 2
    model.set_keep_rate(keep_rate)
    assert count_gmacs(model) <= target
    model.set_keep_rate(keep_rate + 0.001)
    assert count_gmacs(model) > target
    stored = load_checkpoint(tmp_path / "best.pth")
    assert model_from_checkpoint(stored).keep_rates == (keep_rate,) * 2


def test_described_target(call_main: RunMain) -> None:
    target = 0.8 * count_gmacs(build_tiny(keep_rate=1.0, num_classes=1000))
    done = call_main("--describe", *TINY_FLAGS, "--target-gmacs", target)
    assert done.returncode == 0
    total = float(re.search(r"total: ([\d.]+) GMACs", done.stdout)[1])
    assert 0.9 * target < total <= target + 1e-4
    assert re.search(r"--target-gmacs .*: keep rate 0\.\d+", done.stdout)


# As a user runs it ------------------------------------------------------------------------------


def test_demo_set_as_processes(run_main: RunMain, tmp_path: Path) -> None:
    """main.py as a program of its own, with worker processes: train, then evaluate."""
    root = make_demo(tmp_path / "demo", num_train=8, num_val=4, size=64)
    model = ["--input-size", "64", "--reduction-loc", "1", "--model-kwargs", "patch_size=16",
             "embed_dim=32", "depth=2", "num_heads=2"]  # fmt: skip
    data = ["--data-set", "DEMO", "--data-path", root, "--num-workers", "1"]
    trained = run_main(
        "--model", "bat_deit_tiny_patch16_224", *model, *data, "--epochs", "1",
        "--batch-size", "8", "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "Traceback" not in trained.stderr
    entries = read_log(tmp_path / "out")
    assert [entry["test_num_images"] for entry in entries] == [24]
    best = tmp_path / "out" / "best.pth"
    done = run_main("--eval", "--resume", best, *data, "--keep-rate", "0.7")
    assert done.returncode == 0, done.stderr
    assert printed_accuracy(done.stdout) == pytest.approx(entries[0]["test_acc1"], abs=1e-3)
