"""Bad input ends in one clear line and exit code 2, before a single batch is computed."""

import argparse
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import (
    CLASSES,
    COLOURS,
    PLAIN_FLAGS,
    RUN_FLAGS,
    TINY_FLAGS,
    Result,
    Run,
    RunMain,
    build_tiny,
    write_images,
)
from torch.distributed import DistBackendError

import main
from engine import PreemptedError
from utils import InputError, OutputError, init_process

BEST = "<best.pth>"  # stands for a good checkpoint among a case's flags


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that gets as far as a batch fails the test."""

    def started(*args: object, **options: object) -> None:
        raise AssertionError("training or evaluation has started")

    monkeypatch.setattr(main, "train_one_epoch", started)
    monkeypatch.setattr(main, "evaluate", started)


def assert_refused(done: Result, *words: str) -> str:
    """Exit code 2 and one line on standard error that holds the words."""
    assert done.returncode == 2
    assert done.stderr.startswith("main.py: error: ") and done.stderr.endswith("\n")
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.strip().isprintable(), "no colours"
    for word in words:
        assert word in done.stderr, done.stderr
    return done.stderr


def flags_for(data_path: Path, *more: object) -> list[object]:
    """A run that would train; later flags win."""
    return [
        *TINY_FLAGS, *RUN_FLAGS, *PLAIN_FLAGS, "--data-path", data_path, "--batch-size", "16",
        "--epochs", "1", *more,
    ]  # fmt: skip


def test_the_base_flags_are_good(
    call_main: RunMain, data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every refusal below is due to what its case adds."""
    with pytest.raises(AssertionError, match="has started"):
        call_main(*flags_for(data_path, "--output-dir", tmp_path))
    with pytest.raises(AssertionError, match="has started"):
        call_main(*flags_for(data_path, "--eval"))


# Flags ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--keep-rate", "0"], ["keep_rate", "(0, 1]", "0.0"]),
        (["--keep-rate", "1.5"], ["keep_rate", "(0, 1]", "1.5"]),
        (["--base_keep_rate", "-0.2"], ["keep_rate", "(0, 1]", "-0.2"]),
        (["--keep-rate", "nan"], ["--keep-rate", "finite", "nan"]),
        (["--keep-rate", "0.5", "2"], ["keep_rate", "(0, 1]", "2.0"]),
        (["--keep-rate", "high"], ["--keep-rate", "high"]),
        (["--keep-rate", "0.5", "0.6", "0.7"], ["keep_rate", "1 value or 2", "got 3"]),
        (["--cluster-ratio", "1.1"], ["cluster_ratio", "[0, 1]", "1.1"]),
        (["--cluster-ratio", "-0.1"], ["cluster_ratio", "[0, 1]", "-0.1"]),
        (["--match-ratio", "7"], ["match_ratio", "[0, 1]", "7.0"]),
        (["--match_ratio", "nan"], ["--match-ratio", "finite", "nan"]),
        (["--reduction-loc", "1", "3"], ["reduction_loc", "0 .. 2", "[1, 3]"]),
        (["--reduction-loc", "-1"], ["reduction_loc", "0 .. 2", "[-1]"]),
        (["--reduction-loc", "1", "1"], ["reduction_loc", "different", "[1, 1]"]),
        (["--reduction-loc", "one"], ["--reduction-loc", "one"]),
        (["--model", "resnet_bat"], ["unknown model 'resnet_bat'", "bat_deit_small_patch16_224"]),
        (["--model", "resnet18"], ["resnet18"]),
        (["--reduction", "magic"], ["--reduction", "magic", "bat", "evit", "topk"]),
        (["--merge-weights", "median"], ["--merge-weights", "median", "importance", "mean"]),
        (["--model-kwargs", "heads=3"], ["heads"]),
        (["--distillation-type", "soft"], ["--distillation-type soft", "--teacher-path"]),
        (["--distillation-type", "hard"], ["--distillation-type hard", "--teacher-path"]),
        (["--batch-size", "0"], ["--batch-size", "at least 1", "0"]),
        (["--batch-size", "100"], ["--batch-size 100", "64 training images"]),
        (["--batch-size", "15", "--mixup", "0.5"], ["--batch-size", "even", "15"]),
        (["--nb-classes", "7"], ["7 classes", "4"]),
        (["--target-gmacs", "1e-9"], ["target_gmacs 1e-09", "smallest keep rate"]),
        (["--target-ms", "40"], ["--target-ms", "--describe"]),
        (["--save-speed", "speed.json"], ["--save-speed", "add --target-ms"]),
        (["--device", "toaster"], ["toaster"]),
        (["--device", "mps"], ["mps"]),
        (["--device", "meta"], ["unknown device 'meta'"]),
        (["--model-kwargs", "depth"], ["--model-kwargs", "KEY=VALUE", "depth"]),
        (["--model-kwargs", "img_size=64"], ["img_size", "--input-size"]),
        (["--opt", "nonsense"], ["nonsense"]),
        (["--opt-betas", "1"], ["beta"]),
        (["--sched", "nonsense"], ["nonsense"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--lr", "-1"], ["--lr", "-1"]),
        (["--drop-path", "2"], ["--drop-path", "2.0"]),
        (["--smoothing", "3"], ["--smoothing", "3.0"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--num-workers", "-1"], ["--num-workers", "-1"]),
        (["--cutmix-minmax", "0.5", "0.2"], ["--cutmix-minmax", "[0.5, 0.2]"]),
        (["--distillation-alpha", "1.5"], ["--distillation-alpha", "1.5"]),
        (["--distillation-tau", "0"], ["--distillation-tau", "0.0"]),
        (["--sched", "plateau"], ["--sched plateau", "resumed exactly"]),
        (["--lr-noise", "0.5", "--lr-noise-pct", "-1"], ["--lr-noise-pct", "at least 0", "-1.0"]),
        (["--model-kwargs", "keep_rate=0.5"], ["keep_rate", "use --keep-rate"]),
        (["--input-size", "4"], ["(4, 4)", "smaller than a patch"]),
        (["--ema"], ["--ema", "--eval"]),
        (["--model-kwargs", "drop_path_rate=0.3"], ["drop_path_rate", "use --drop-path"]),
        (["--clip-grad", "-1"], ["--clip-grad", "-1.0"]),
        (["--epoch-images", "1"], ["--batch-size 16", "1 training images"]),
        (["--checkpoint-interval", "soon"], ["--checkpoint-interval", "soon"]),
        (["--eval-crop-ratio", "0"], ["crop ratio is 0.0", "0.1 to 1"]),
        (["--resume", "auto", "--output-dir", "x" * 5000], ["output folder", "too long"]),
        (["--std", "0", "1", "1"], ["mean and std", "std above 0"]),
        (["--model-kwargs", "depth=9999999"], ["depth is above"]),
        (["--model-kwargs", "reduction_seed=x"], ["reduction_seed must be an integer"]),
        (["--model-kwargs", "device=meta"], ["device and dtype"]),
        (["--model-kwargs", "pretrained=True"], ["pretrained", "use --pretrained"]),
        (["--model-kwargs", "norm_layer=none"], ["cannot build", "none"]),
        (["--resume", "x" * 5000], ["no such checkpoint"]),
        (["--resume", "/"], ["checkpoint /", "a folder without config.json"]),
        (["--opt", "adamw", "--decay-epochs", "0"], ["--decay-epochs"]),
        (["--target-gmacs", "nan"], ["--target-gmacs", "finite"]),
        (["--nb-classes", "0"], ["--nb-classes", "at least 1"]),
        (["--model-kwargs", "global_pool="], ["main.py: error"]),
        (["--model-kwargs", "norm_layer=batchnorm2d"], ["cannot classify"]),
        (["--input-size", "65536"], ["--input-size", "8192"]),
        (["--seed=--"], ["--seed=--", "not a value"]),
        (["--no-such-flag"], ["--no-such-flag"]),
    ],
    ids=lambda value: " ".join(value) if str(value[0]).startswith("--") else "",
)
def test_flags(
    call_main: RunMain, data_path: Path, trained: Run, flags: list[str], words: list[str]
) -> None:
    flags = [trained.folder / "best.pth" if flag == BEST else flag for flag in flags]
    assert_refused(call_main(*flags_for(data_path, *flags)), *words)


@pytest.mark.parametrize("flags", [["--keep-rate", "3"], ["--reduction-loc", "12"]])
def test_describing_checks_the_model_too(call_main: RunMain, flags: list[str]) -> None:
    assert_refused(call_main("--describe", *flags), flags[1])


def test_options_are_never_evaluated(call_main: RunMain, data_path: Path, tmp_path: Path) -> None:
    """Flag values that would do something if they were run as code or by a shell."""
    trace = tmp_path / "trace"
    code = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    for flag in ("--reduction-loc", "--keep-rate", "--input-size", "--reduction", "--model"):
        assert_refused(call_main(*flags_for(data_path, flag, code)))
    assert_refused(call_main(*flags_for(data_path, "--model-kwargs", f"depth={code}")))
    assert_refused(call_main(*flags_for(data_path, "--finetune", f"$(touch {trace})")))
    assert not trace.exists()


# Data -------------------------------------------------------------------------------------------


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """A data set that a test may damage."""
    return write_images(tmp_path / "own", dict(zip(CLASSES, COLOURS, strict=True)))


def test_data_path_that_does_not_exist(call_main: RunMain, tmp_path: Path) -> None:
    for more in ([], ["--eval"]):
        missing = tmp_path / "nowhere"
        assert_refused(call_main(*flags_for(missing, *more)), str(missing), "does not exist")


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_split(call_main: RunMain, own_data: Path, split: str) -> None:
    shutil.rmtree(own_data / split)
    assert_refused(call_main(*flags_for(own_data)), f"{split}/", str(own_data))


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_class_folder(call_main: RunMain, own_data: Path, split: str) -> None:
    shutil.rmtree(own_data / split)
    (own_data / split).mkdir()
    (own_data / split / "picture.png").write_bytes(b"")
    assert_refused(call_main(*flags_for(own_data)), "class folder", str(own_data / split))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("emptied", [("red",), CLASSES], ids=["one class", "all classes"])
def test_no_image(call_main: RunMain, own_data: Path, split: str, emptied: tuple[str, ...]) -> None:
    for name in emptied:
        for path in (own_data / split / name).iterdir():
            path.rename(path.with_suffix(".txt"))
    assert_refused(call_main(*flags_for(own_data)), "no image", "red", str(own_data / split))


def test_train_and_val_with_different_classes(call_main: RunMain, own_data: Path) -> None:
    (own_data / "val" / "red").rename(own_data / "val" / "violet")
    line = assert_refused(call_main(*flags_for(own_data)), "different classes")
    assert "only in train: red" in line and "only in val: violet" in line


def test_checkpoint_for_other_classes(call_main: RunMain, own_data: Path, trained: Run) -> None:
    for split in ("train", "val"):
        shutil.rmtree(own_data / split / "red")
    flags = ["--eval", "--resume", trained.folder / "best.pth", *RUN_FLAGS]
    assert_refused(call_main(*flags, "--data-path", own_data), "4 classes", "3")


# Output -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["file", "file/folder"])
def test_output_folder_that_cannot_be_written(
    call_main: RunMain, data_path: Path, tmp_path: Path, below: str
) -> None:
    """A file is in the way; permissions would not stop a test that runs as root."""
    (tmp_path / "file").write_text("keep me")
    folder = tmp_path / below
    done = call_main(*flags_for(data_path, "--output-dir", folder))
    assert_refused(done, str(folder), "cannot be written")
    assert (tmp_path / "file").read_text() == "keep me"


# Checkpoints ------------------------------------------------------------------------------------


def damaged(kind: str, path: Path, whole: bytes) -> Path:
    """Writes a file that is no good checkpoint, unless it is to be missing."""
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "one byte short":
        path.write_bytes(whole[:-1])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "folder":
        path.mkdir()
    elif kind == "list":
        torch.save([1, 2], path)
    return path


UNREADABLE = ("missing", "truncated", "one byte short", "empty", "text", "folder", "list")


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize(
    "use", ["--resume", "--eval --resume", "--finetune", "--describe --resume"]
)
def test_checkpoint_that_cannot_be_read(
    call_main: RunMain, data_path: Path, trained: Run, tmp_path: Path, kind: str, use: str
) -> None:
    path = damaged(kind, tmp_path / "bad.pth", (trained.folder / "best.pth").read_bytes())
    done = call_main(*flags_for(data_path, *use.split(), path))
    assert_refused(done, str(path))
    assert len(done.stderr) < 600


@pytest.mark.parametrize("use", ["--resume", "--eval --resume", "--finetune"])
def test_checkpoint_without_weights(
    call_main: RunMain, data_path: Path, tmp_path: Path, use: str
) -> None:
    torch.save({"model": {"a": 1}, "epoch": 3}, tmp_path / "odd.pth")
    done = call_main(*flags_for(data_path, *use.split(), tmp_path / "odd.pth"))
    assert_refused(done, "no weights")


@pytest.mark.parametrize("kind", ["missing", "truncated", "other model"])
def test_bad_teacher_leaves_an_earlier_run_alone(
    call_main: RunMain, data_path: Path, trained: Run, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained.folder, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    path = damaged(kind, tmp_path / "bad.pth", (trained.folder / "best.pth").read_bytes())
    if kind == "other model":
        shutil.copy(trained.folder / "best.pth", path)
    done = call_main(
        *flags_for(data_path, "--distillation-type", "soft", "--teacher-path", path),
        "--teacher-model", "deit_tiny_patch16_224", "--output-dir", folder,
    )  # fmt: skip
    assert_refused(done, str(path))
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("use", ["--resume", "--eval --resume", "--finetune"])
def test_checkpoint_for_another_model(
    call_main: RunMain, data_path: Path, tmp_path: Path, use: str
) -> None:
    """The line says which keys and shapes differ."""
    path = tmp_path / "other.pth"
    weights = build_tiny(embed_dim=48).state_dict()
    weights["blocks.0.extra"] = torch.zeros(1)
    del weights["norm.bias"]
    torch.save({"model": weights}, path)
    line = assert_refused(call_main(*flags_for(data_path, *use.split(), path)), str(path))
    assert "another model" in line and "cls_token" in line
    assert "(1, 1, 48) instead of (1, 1, 32)" in line
    assert "more" in line, "a long list is cut off"
    weights = build_tiny().state_dict()
    weights["blocks.0.extra"] = torch.zeros(1)
    del weights["norm.bias"]
    torch.save({"model": weights}, path)
    line = assert_refused(call_main(*flags_for(data_path, *use.split(), path)))
    assert "blocks.0.extra" in line and "norm.bias" in line and "cls_token" not in line


def test_weights_alone_are_no_training_state(
    call_main: RunMain, data_path: Path, trained: Run
) -> None:
    best = trained.folder / "best.pth"
    assert_refused(call_main(*flags_for(data_path, "--resume", best)), "--finetune", "--eval")


def test_training_state_of_another_run(
    call_main: RunMain, data_path: Path, trained: Run, tmp_path: Path
) -> None:
    """An optimizer that has other parameters than the model."""
    stored = torch.load(trained.folder / "checkpoint.pth", weights_only=True)
    stored["optimizer"]["param_groups"].pop()
    torch.save(stored, tmp_path / "odd.pth")
    done = call_main(*flags_for(data_path, "--resume", tmp_path / "odd.pth"))
    assert_refused(done, str(tmp_path / "odd.pth"))


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("where", ["root", "model", "args", "legacy"])
@pytest.mark.parametrize("use", ["--resume", "--eval --resume", "--finetune", "--teacher-path"])
def test_pickled_program_is_refused_and_not_run(
    call_main: RunMain, data_path: Path, tmp_path: Path, where: str, use: str
) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.pth"
    evil = Touch(trace)
    weights = build_tiny().state_dict()
    contents = {
        "root": evil,
        "model": {"model": {**weights, "head.bias": evil}},
        "args": {"model": weights, "args": argparse.Namespace(lr=evil)},
        "legacy": {"model": weights, "epoch": evil},
    }[where]
    torch.save(contents, path, _use_new_zipfile_serialization=where != "legacy")
    flags = [*use.split(), path]
    if use == "--teacher-path":
        flags += ["--distillation-type", "hard"]
    done = call_main(*flags_for(data_path, *flags))
    assert not trace.exists(), "the pickle was run"
    assert_refused(done, str(path))
    torch.load(path, weights_only=False)
    assert trace.exists(), "the pickle would have done something"


# Processes --------------------------------------------------------------------------------------


def test_one_gpu_for_all_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--device cuda:1 would put every process on one GPU"):
        init_process("cuda:1")


@pytest.mark.parametrize(
    ("problem", "code", "words"),
    [
        (DistBackendError("NCCL error\nDuplicate GPU detected"), 5, "Duplicate GPU detected"),
        (RuntimeError("[gloo/pair.cc] Connection closed by peer"), 5, "Connection closed by peer"),
        (OutputError("cannot write x: No space left"), 4, "cannot write x: No space left"),
    ],
)
def test_what_the_system_says_is_printed(
    call_main: RunMain,
    data_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    problem: Exception,
    code: int,
    words: str,
) -> None:
    monkeypatch.setattr(main, "train", Mock(side_effect=problem))
    done = call_main(*flags_for(data_path))
    assert done.returncode == code and words in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("problem", [OSError(24, "Too many open files"), RuntimeError("a bug")])
def test_other_errors_keep_their_traceback(
    call_main: RunMain, data_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    """They are no failure to write, and nobody could mend them from one line."""
    monkeypatch.setattr(main, "train", Mock(side_effect=problem))
    with pytest.raises(type(problem), match=r"open files|a bug"):
        call_main(*flags_for(data_path))


@pytest.mark.parametrize("folder", [True, False])
def test_only_what_was_saved_is_promised(
    call_main: RunMain,
    data_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: bool,
) -> None:
    monkeypatch.setattr(main, "train", Mock(side_effect=PreemptedError("epoch 1, step 2")))
    done = call_main(*flags_for(data_path, *(["--output-dir", tmp_path] if folder else [])))
    assert done.returncode == 75
    assert ("--resume auto goes on" in done.stdout) is folder
    assert ("nothing is saved" in done.stdout) is not folder


# As a user sees it ------------------------------------------------------------------------------


def test_as_a_process(run_main: RunMain, data_path: Path, trained: Run, tmp_path: Path) -> None:
    """All that a shell gets to see, warnings of the libraries included."""
    path = damaged("truncated", tmp_path / "bad.pth", (trained.folder / "best.pth").read_bytes())
    done = run_main(*flags_for(data_path, "--eval", "--resume", path))
    assert_refused(done, str(path))
    assert done.stdout == ""
