"""DeiT's and EViT's flags and published commands, with only paths and the model's name changed."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, RUN_FLAGS, TINY_FLAGS, RunMain, build_tiny, read_log
from timm.data.auto_augment import AutoAugment
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torchvision import transforms
from training_helpers import CPU, parse

import main
from arguments import ANSWERS, NO_EFFECT, data_config, get_args_parser
from datasets import build_erasing, build_transform
from losses import CosubLoss

# Flags and defaults of facebookresearch/deit's main.py (with DeiT-III and Cosub).
DEIT = {
    "batch-size": 64, "epochs": 300, "bce-loss": False, "unscale-lr": False,
    "model": "deit_base_patch16_224", "input-size": 224, "drop": 0.0, "drop-path": 0.1,
    "model-ema": True, "model-ema-decay": 0.99996, "model-ema-force-cpu": False,
    "opt": "adamw", "opt-eps": 1e-8, "opt-betas": None, "clip-grad": None, "momentum": 0.9,
    "weight-decay": 0.05, "sched": "cosine", "lr": 5e-4, "lr-noise": None, "lr-noise-pct": 0.67,
    "lr-noise-std": 1.0, "warmup-lr": 1e-6, "min-lr": 1e-5, "decay-epochs": 30,
    "warmup-epochs": 5, "cooldown-epochs": 10, "patience-epochs": 10, "decay-rate": 0.1, "dr": 0.1,
    "color-jitter": 0.3, "aa": "rand-m9-mstd0.5-inc1", "smoothing": 0.1,
    "train-interpolation": "bicubic", "repeated-aug": True, "train-mode": True,
    "ThreeAugment": False, "src": False, "reprob": 0.25, "remode": "pixel", "recount": 1,
    "resplit": False, "mixup": 0.8, "cutmix": 1.0, "cutmix-minmax": None, "mixup-prob": 1.0,
    "mixup-switch-prob": 0.5, "mixup-mode": "batch", "teacher-model": "regnety_160",
    "teacher-path": "", "distillation-type": "none", "distillation-alpha": 0.5,
    "distillation-tau": 1.0, "cosub": False, "finetune": "", "attn-only": False,
    "data-path": "/datasets01/imagenet_full_size/061417/", "data-set": "IMNET",
    "inat-category": "name", "output_dir": "", "device": "cuda", "seed": 0, "resume": "",
    "start_epoch": 0, "eval": False, "eval-crop-ratio": 0.875, "dist-eval": False,
    "num_workers": 10, "pin-mem": True, "distributed": False, "world_size": 1,
    "dist_url": "env://",
}  # fmt: skip
# Those that only youweiliang/evit's main.py has, or has with another default.
EVIT = {
    "test_speed": False, "only_test_speed": False, "fuse_token": False, "base_keep_rate": 0.7,
    "shrink_epochs": 0, "shrink_start_epoch": 10, "drop_loc": "(3, 6, 9)", "color-jitter": 0.4,
    "use-lmdb": False, "visualize_mask": False, "n_visualization": 128,
}  # fmt: skip
# Defaults that differ on purpose; the README's table says why.
DIFFERENT = {
    "model", "input-size", "drop-path", "train-mode", "data-path", "device", "dist-eval",
    "num_workers", "eval-crop-ratio", "base_keep_rate", "shrink_epochs", "shrink_start_epoch",
    "drop_loc", "evit: color-jitter",
}  # fmt: skip


@pytest.mark.parametrize("name", [*DEIT, *(f"evit: {name}" for name in EVIT)])
def test_every_flag_is_taken_or_answered(name: str, capsys: pytest.CaptureFixture) -> None:
    flag = name.removeprefix("evit: ")
    default = EVIT[flag] if name.startswith("evit") else DEIT[flag]
    dashed = f"--{flag.replace('_', '-')}"
    if dashed in ANSWERS:
        with pytest.raises(SystemExit):
            parse([f"--{flag}"])
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and ANSWERS[dashed] in error
        return
    words = {"cutmix-minmax": "0.2 0.8", "finetune": __file__, "resume": __file__}
    words |= dict.fromkeys(("opt-betas", "lr-noise", "clip-grad"), "0.9")
    words = words.get(flag, "" if isinstance(default, bool) else str(default) or "x").split(" ")
    extra = ["--smoothing", "0"] if flag == "bce-loss" else []
    args = parse([f"--{flag}", *filter(None, words), *extra])
    if dashed in " ".join(NO_EFFECT.values()).split():
        assert args.no_effect == [dashed]
        return
    action = get_args_parser()._option_string_actions[dashed]
    if name not in DIFFERENT and flag not in DIFFERENT and not action.const:
        assert action.default == default
    elif action.const:  # an alias of a value: --fuse-token, --ThreeAugment
        assert getattr(args, action.dest) == action.const


def test_evits_names_mean_ours() -> None:
    args = parse(["--fuse_token", "--base_keep_rate", "0.5", "--drop_loc", "(3, 6, 9)"])
    assert (args.reduction, args.keep_rate, args.reduction_loc) == ("evit", [0.5], [3, 6, 9])
    assert parse(["--drop_loc", "[1,2]"]).reduction_loc == [1, 2]
    assert parse(["--drop_loc", "()"]).reduction_loc == []


def test_block_indices_must_be_numbers(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(["--drop_loc", "(3, six)"])
    assert "takes block indices, got '(3, six)'" in capsys.readouterr().err


# Published commands -----------------------------------------------------------------------------

# A line each, as printed by their authors; paths are in capitals.
COMMANDS = {
    "evit run_code.sh": "--model MODEL --fuse_token --base_keep_rate 0.7 --input-size 224 "
    "--batch-size 128 --warmup-epochs 5 --shrink_start_epoch 10 --shrink_epochs 100 --epochs 300 "
    "--dist-eval --data-path DATA --output_dir OUT",
    "evit finetune.sh": "--model MODEL --fuse_token --base_keep_rate 0.7 --input-size 224 "
    "--sched cosine --lr 2e-5 --min-lr 2e-6 --weight-decay 1e-6 --batch-size 128 "
    "--warmup-epochs 0 --shrink_epochs 0 --epochs 30 --dist-eval --finetune CKPT "
    "--data-path DATA --output_dir OUT",
    "evit evaluation": "--model MODEL --fuse_token --base_keep_rate 0.7 --eval --resume CKPT "
    "--data-path DATA",
    "deit training": "--model MODEL --batch-size 256 --data-path DATA --output_dir OUT",
    "deit evaluation": "--eval --resume CKPT --model MODEL --data-path DATA",
    "deit finetuning at 384": "--model MODEL --batch-size 32 --finetune CKPT --input-size 384 "
    "--use_volta32 --nodes 2 --lr 5e-6 --weight-decay 1e-8 --epochs 30 --min-lr 5e-6",
    "deit-iii training": "--model MODEL --data-path DATA --batch 256 --lr 4e-3 --epochs 800 "
    "--weight-decay 0.05 --sched cosine --input-size 224 --reprob 0.0 --node 1 --gpu 8 "
    "--smoothing 0.0 --warmup-epochs 5 --drop 0.0 --nb-classes 1000 --seed 0 --opt fusedlamb "
    "--warmup-lr 1e-6 --mixup .8 --drop-path 0.05 --cutmix 1.0 --unscale-lr --repeated-aug "
    "--bce-loss --color-jitter 0.3 --ThreeAugment",
    "deit-iii finetuning": "--model MODEL --data-path DATA --batch 64 --lr 1e-5 --epochs 20 "
    "--weight-decay 0.1 --sched cosine --input-size 224 --reprob 0.0 --node 1 --gpu 8 "
    "--smoothing 0.1 --warmup-epochs 5 --drop 0.0 --nb-classes 1000 --seed 0 --opt adamw "
    "--warmup-lr 1e-6 --mixup .8 --drop-path 0.2 --cutmix 1.0 --unscale-lr --aa "
    "rand-m9-mstd0.5-inc1 --no-repeated-aug --finetune CKPT",
    "deit-iii finetuning at 384": "--model MODEL --data-path DATA --batch 64 --lr 1e-5 --epochs 20 "
    "--weight-decay 0.1 --sched cosine --input-size 384 --reprob 0.0 --node 1 --gpu 8 "
    "--smoothing 0.1 --warmup-epochs 5 --drop 0.0 --nb-classes 1000 --seed 0 --opt adamw "
    "--warmup-lr 1e-6 --mixup .8 --drop-path 0.0 --cutmix 1.0 --unscale-lr --no-repeated-aug "
    "--color-jitter 0.3 --aa rand-m9-mstd0.5-inc1 --finetune CKPT",
    "deit-iii on imagenet-21k": "--model MODEL --data-path DATA --batch 128 --lr 0.001 "
    "--epochs 240 --weight-decay 0.02 --sched cosine --input-size 224 --reprob 0.0 --node 2 "
    "--gpu 8 --smoothing 0.1 --warmup-epochs 5 --drop 0.0 --nb-classes 1000 --seed 0 "
    "--opt fusedlamb --warmup-lr 1e-6 --mixup 0 --drop-path 0.05 --cutmix 1.0 --unscale-lr "
    "--no-repeated-aug --color-jitter 0.3 --ThreeAugment --src",
}
# Smaller than published, so that a CPU runs them: these follow the command and win.
SMALL = [
    *TINY_FLAGS[2:], *RUN_FLAGS, "--batch-size", "16", "--epochs", "1", "--nb-classes", "4",
]  # fmt: skip


@pytest.fixture(scope="module")
def deit_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deit") / "deit.pth"
    torch.save({"model": build_tiny().state_dict()}, path)
    return path


def published(name: str, data: Path, checkpoint: Path, out: Path) -> list[str]:
    """The words of a published command with its paths and its model's name filled in."""
    filled = {"MODEL": "bat_deit_tiny_patch16_224", "CKPT": checkpoint, "DATA": data, "OUT": out}
    words = [str(filled.get(word, word)) for word in shlex.split(COMMANDS[name])]
    return words if "DATA" in COMMANDS[name] else [*words, "--data-path", str(data)]


@pytest.mark.parametrize("name", COMMANDS)
def test_published_commands_run(
    name: str, call_main: RunMain, data_path: Path, deit_checkpoint: Path, tmp_path: Path
) -> None:
    done = call_main(*published(name, data_path, deit_checkpoint, tmp_path / "out"), *SMALL)
    assert done.returncode == 0, done.stderr
    if "evit" in name:
        assert "evit" in done.stdout  # the model line names the method
    if "OUT" in COMMANDS[name]:
        assert len(read_log(tmp_path / "out")) == 1
    for flag in ("--node", "--use-volta32"):
        given = flag.replace("-volta", "_volta") in COMMANDS[name]
        assert (": without effect, the launcher says it" in done.stdout) or not given


@pytest.mark.parametrize(
    "launcher", [["torch.distributed.run"], ["torch.distributed.launch", "--use_env"]]
)
def test_both_launchers(
    launcher: list[str], data_path: Path, deit_checkpoint: Path, tmp_path: Path
) -> None:
    words = published("evit finetune.sh", data_path, deit_checkpoint, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "--nproc_per_node=2", "--standalone", "main.py",
         *words, *SMALL, "--world_size", "2", "--dist_url", "env://"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(read_log(tmp_path / "out")) == 1


# What the flags do ------------------------------------------------------------------------------


def test_three_augment_is_deit_iiis() -> None:
    """One of grey, solarised, blurred; then colour jitter; no random erasing."""
    args = parse(["--ThreeAugment", "--src", "--color-jitter", "0.3"])
    steps = build_transform(True, args, data_config(args, 64, {})).transforms
    kinds = [type(step) for step in steps]
    assert kinds.index(AutoAugment) < kinds.index(transforms.ColorJitter)
    assert build_erasing(args) is None and isinstance(build_erasing(parse([])), RandomErasing)
    choice = next(step for step in steps if isinstance(step, AutoAugment))
    assert sorted(op.aug_fn.__name__ for [op] in choice.policy) == [
        "desaturate", "gaussian_blur_rand", "solarize",
    ]  # fmt: skip
    crop = next(step for step in steps if isinstance(step, transforms.RandomCrop))
    assert (crop.padding, crop.padding_mode) == (4, "reflect")


def test_bce_loss_is_deits() -> None:
    """Binary cross-entropy of every class that a mixed target names."""
    criterion = main.build_criterion(parse(["--bce-loss", "--smoothing", "0"]), 5, CPU)
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0.3, 0, 0.7, 0, 0], [0, 1.0, 0, 0, 0], [0.5, 0, 0, 0, 0.5]])
    expected = nn.BCEWithLogitsLoss()(logits, targets.gt(0).float())
    assert torch.equal(criterion(None, logits, targets), expected)


def test_bce_loss_with_smoothed_targets_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert_refused(["--bce-loss"], "--bce-loss needs --smoothing 0", capsys)


def assert_refused(flags: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as refused:
        main.main(flags)
    error = capsys.readouterr().err
    assert refused.value.code == 2 and words in error and error.count("\n") == 1


def test_cosub_loss_is_the_mean_of_four() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets = torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
    criterion = main.build_criterion(parse(["--cosub"]), 4, CPU)
    assert isinstance(criterion, CosubLoss)
    loss = criterion(None, logits, targets)
    first, second = logits[:3], logits[3:]

    def bce(student: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(student, target)

    parts = [
        bce(first, targets), bce(second, targets),
        bce(first, second.detach().sigmoid()), bce(second, first.detach().sigmoid()),
    ]  # fmt: skip
    assert torch.allclose(loss, sum(parts) / 4)
    [gradient] = torch.autograd.grad(loss, logits)
    [expected] = torch.autograd.grad(sum(parts) / 4, logits)
    assert torch.allclose(gradient, expected)


def test_cosub_trains_two_submodels(call_main: RunMain, data_path: Path, tmp_path: Path) -> None:
    flags = ["--cosub", "--drop-path", "0.5", "--data-path", data_path, "--output-dir", tmp_path]
    done = call_main(*TINY_FLAGS[:2], *SMALL, *flags)
    assert done.returncode == 0 and 0 < read_log(tmp_path)[0]["train_loss"] < 2


def test_attn_only_trains_attention_positions_and_head(
    call_main: RunMain, data_path: Path, deit_checkpoint: Path, tmp_path: Path
) -> None:
    flags = ["--attn-only", "--finetune", deit_checkpoint, "--data-path", data_path]
    done = call_main(*TINY_FLAGS[:2], *SMALL, *flags, "--output-dir", tmp_path, "--lr", "1")
    assert done.returncode == 0, done.stderr
    before = torch.load(deit_checkpoint, weights_only=True)["model"]
    after = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".attn." in n or n.startswith(("head.", "pos_embed")) for n in changed)
    assert {"head.weight", "pos_embed", "blocks.0.attn.qkv.weight"} <= changed


def test_fused_lamb_without_apex_is_lamb() -> None:
    state = main.build_state(parse(["--opt", "fusedlamb"]), build_tiny(), CPU)
    assert type(state.optimizer).__name__ == "Lamb"


@pytest.mark.parametrize("wrong", [{"num_classes": 5}, {"img_size": 48}])
def test_a_teacher_that_does_not_fit_is_refused(
    wrong: dict, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = timm.create_model("deit_tiny_patch16_224", **{"num_classes": 4, "img_size": 32} | wrong)
    path = tmp_path / "teacher.pth"
    about = {"model_name": "deit_tiny_patch16_224", "num_classes": 4, "img_size": 32} | wrong
    torch.save({"model": model.state_dict(), "model_args": about}, path)
    flags = ["--distillation-type", "hard", "--teacher-model", "deit_tiny_patch16_224"]
    flags += ["--teacher-path", str(path), "--data-path", str(data_path)]
    assert_refused([*TINY_FLAGS[:2], *SMALL, *flags], f"teacher {path}", capsys)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--opt", "adahessian"], "second-order gradients"),
        (["--opt", "adamw", "--opt-betas", "0.9"], "timm refuses --opt adamw"),
        (["--clip-grad", "0"], "--clip-grad must be at least"),
        (["--clip-grad", "-1"], "--clip-grad must be at least"),
        (["--cosub", "--distillation-type", "hard", "--teacher-path", "x"], "--cosub and"),
        (["--recount", "-1"], "--recount must be in"),
        (["--recount", "1000000"], "--recount must be in"),
        (["--start-epoch", "99999999999"], "--start-epoch must be in"),
        (["--keep-checkpoints", "99999999999"], "--keep-checkpoints must be in"),
    ],
)
def test_bad_values_are_one_line(
    flags: list[str], words: str, data_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert_refused([*TINY_FLAGS[:2], *SMALL, "--data-path", str(data_path), *flags], words, capsys)
