"""The shell scripts give main.py flags that it knows; `python` and `torchrun` are stand-ins."""

import os
import shlex
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest

from arguments import check_args, get_args_parser
from tools import benchmark

REPOSITORY = Path(__file__).resolve().parent.parent
# Notes its words, and the setting that keeps a restarted torchrun from its dead processes. CODE:
# what it ends with.
STAND_IN = """#!/usr/bin/env bash
printf '%s ' "$(basename "$0")" "${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-}" "$@" >>"$CALLS"
echo >>"$CALLS"
exit "${CODE:-0}"
"""


def run_script(folder: Path, name: str, *words: str, **settings: object) -> list[list[str]]:
    """The commands, in words, that a script starts."""
    (folder / "bin").mkdir()
    for command in ("python", "torchrun"):
        (folder / "bin" / command).write_text(STAND_IN)
        (folder / "bin" / command).chmod(0o755)
    own = {"VENV": folder, "CALLS": folder / "calls", "OUTPUT": folder / "out", "GPUS": 1}
    environment = os.environ | {key: str(value) for key, value in (own | settings).items()}
    subprocess.run(["bash", REPOSITORY / "scripts" / name, *words], env=environment, check=True)
    return [shlex.split(line) for line in (folder / "calls").read_text().splitlines()]


def parse(words: list[str]) -> Namespace:
    """What main.py makes of a command."""
    parser = get_args_parser()
    args = parser.parse_args(words[words.index("main.py") + 1 :])
    check_args(parser, args)
    return args


@pytest.mark.parametrize(
    "path", sorted(REPOSITORY.glob("scripts/*.sh")), ids=lambda path: path.name
)
def test_scripts_are_bash(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("rate", [0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
def test_recipes_have_their_batch_and_keep_rate(tmp_path, rate):
    (tmp_path / "deit.pth").touch()
    name = "train_keep0.7.sh" if rate == 0.7 else f"finetune_keep{rate}.sh"
    (words,) = run_script(tmp_path, name, "--seed", "5", DEIT=tmp_path / "deit.pth")
    args = parse(words)
    assert args.keep_rate == [rate] and args.seed == 5 and args.amp == "fp16"
    assert args.batch_size * args.accum_steps == (2048 if rate == 0.7 else 1024)


def test_torchrun_starts_anew_without_the_old_store(tmp_path):
    (words,) = run_script(tmp_path, "train_keep0.7.sh", GPUS=2)
    assert words[:2] == ["torchrun", "1"] and parse(words).batch_size == 256


@pytest.mark.parametrize(("size", "count"), [("cpu", 15), ("gpu", 85), ("smoke", 8)])
def test_the_study_of_photographs_has_its_runs(tmp_path, size, count):
    (tmp_path / "out/runs").mkdir(parents=True)
    commands = run_script(tmp_path, "study_imagenet20.sh", SIZE=size, JOBS=1)
    runs = [parse(words) for words in commands if "main.py" in words]
    assert len({args.output_dir for args in runs}) == len(runs) == count
    starts = {args.finetune for args in runs}
    assert starts == {f"{tmp_path}/out/head.pth", f"{tmp_path}/out/runs/dense/checkpoint.pth"}
    settings = {(args.lr, args.epochs, args.epoch_images, args.batch_size) for args in runs}
    assert len(settings) == 1, "the same recipe for all"
    tools = {word for words in commands for word in words if word.startswith("tools.")}
    assert tools == {"tools.linear_head", "tools.sweep", "tools.diversity", "tools.table"}


def test_the_recipe_of_evo(tmp_path):
    (words,) = run_script(tmp_path, "train_evo.sh")
    args = parse(words)
    assert (args.reduction, args.keep_rate, args.reduction_loc) == ("evo", [0.5], [4, 8])
    assert (args.evo_readout, args.evo_layerwise_epochs, args.epochs) == ("mean", 200, 300)
    assert args.batch_size * args.accum_steps == 1024


@pytest.mark.parametrize(("size", "count"), [("cpu", 28), ("gpu", 97), ("smoke", 10)])
def test_the_study_has_its_runs(tmp_path, size, count):
    (tmp_path / "out/runs/dense").mkdir(parents=True)
    (tmp_path / "out/runs/dense/checkpoint.pth").touch()  # of a run that was stopped
    commands = run_script(tmp_path, "study_cifar10.sh", SIZE=size, JOBS=1)  # one line at a time
    runs = [parse(words) for words in commands if "main.py" in words]
    assert len({args.output_dir for args in runs}) == len(runs) == count
    tools = {word for words in commands for word in words if word.startswith("tools.")}
    assert tools == {"tools.sweep", "tools.diversity", "tools.table"}


@pytest.mark.parametrize(
    ("script", "settings", "folders"),
    [
        ("cpu", {}, "eager compiled autotuned operation stage train pixels384 memory"),
        (
            "gpu",
            {"LIMIT": 70, "CODE": 3},  # a measurement that fails does not end the others
            "operation eager stage train eager_cudnn_last pixels384",
        ),
        (
            "gpu",
            {"LIMIT": 600, "DEVICE": "cpu", "METHODS": "topk evit"},
            "operation eager compiled graphs compiled graphs stage train train_compiled "
            "eager_cudnn_last pixels384 compiled_topk compiled_evit",
        ),
    ],
)
def test_benchmarks(tmp_path, script, settings, folders):
    commands = run_script(tmp_path, f"benchmark_{script}.sh", "--warmup", "7", **settings)
    parsed = [benchmark.get_args_parser().parse_args(words[3:]) for words in commands]
    assert [Path(args.output_dir).name for args in parsed] == folders.split()
    assert {args.warmup for args in parsed} == {7}
    device = settings.get("DEVICE", {"cpu": "cpu", "gpu": "cuda"}[script])
    assert {args.device for args in parsed} == {device}
