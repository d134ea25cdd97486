"""Learning rates, steps and their options, and several processes against one."""

import json
import math
import os
import subprocess
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    PLAIN_FLAGS,
    REPOSITORY,
    RUN_FLAGS,
    TINY_FLAGS,
    RunMain,
    build_tiny,
)
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from arguments import check_args, get_args_parser
from builders import AMP_DTYPES, build_criterion, build_mixup, build_state
from engine import (
    DivergenceError,
    TrainOptions,
    TrainState,
    evaluate,
    num_training_steps,
    shrunk_keep_rate,
    train_one_epoch,
)
from main import train_options
from utils import InputError

CPU = torch.device("cpu")
RELEASED = json.loads((Path(__file__).parent / "fixtures" / "released_lrs.json").read_text())
SGD = ["--opt", "momentum", "--momentum", "0", "--weight-decay", "0", "--unscale-lr"]


# Learning rates ---------------------------------------------------------------------------------


def recipe_flags(keep_rate: str, folder: Path, gpus: int = 1, most: int = 64) -> list[str]:
    """The flags that a recipe's script hands to main.py, caught by programs of the same names."""
    name = "train_keep0.7" if keep_rate == "0.7" else f"finetune_keep{keep_rate}"
    for program in ("python", "torchrun"):
        stub = folder / program
        stub.write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@"\n')
        stub.chmod(0o755)
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


def parse(flags: list[str]) -> Namespace:
    parser = get_args_parser()
    args = parser.parse_args(flags)
    check_args(parser, args)
    return args


@pytest.mark.parametrize("keep_rate", RELEASED)
def test_recipes_have_the_released_learning_rates(keep_rate: str, tmp_path: Path) -> None:
    args = parse(recipe_flags(keep_rate, tmp_path))
    assert args.keep_rate == [float(keep_rate)] and args.shrink_epochs == 0
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


def test_no_shrinking_is_the_keep_rate_at_once() -> None:
    assert shrunk_keep_rate(0, [0.5], start_epoch=10, shrink_epochs=0) == (0.5,)
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


# Steps ------------------------------------------------------------------------------------------


class Task:
    """A small model, 64 images in memory whose class is their colour, and the settings."""

    def __init__(self, flags: list[str], **model_changes: object) -> None:
        self.args = parse([*TINY_FLAGS, *RUN_FLAGS, *PLAIN_FLAGS, "--warmup-epochs", "0", *flags])
        self.model = build_tiny(keep_rate=0.5, **model_changes)
        self.state = build_state(self.args, self.model, CPU)
        generator = torch.Generator().manual_seed(0)
        self.targets = torch.arange(64) % 4
        colours = torch.randn(4, 3, 1, 1, generator=generator)[self.targets]
        self.images = colours + torch.randn(64, 3, 32, 32, generator=generator)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        size = self.args.batch_size
        for start in range(0, 64, size):
            chosen = slice(start, start + size)
            # Mixup writes into the images.
            images, targets = self.images[chosen].clone(), self.targets[chosen]
            yield images, targets, torch.zeros_like(targets)

    def train(self, criterion=None, *, mixup=None, after_update=None, **options) -> dict:
        """One epoch; options are those of TrainOptions beside the flags' own."""
        settings = {
            "amp_dtype": AMP_DTYPES[self.args.amp],
            "accum_steps": self.args.accum_steps,
            "clip_grad": self.args.clip_grad,
            "print_freq": 100,
        }
        return train_one_epoch(
            self.state,
            self.model,
            criterion or (lambda images, logits, targets: F.cross_entropy(logits, targets)),
            self.batches(),
            device=CPU,
            num_steps=64 // self.args.batch_size,
            options=TrainOptions(**settings | options),
            mixup=mixup,
            after_update=after_update,
        )

    def next_epoch(self) -> None:
        self.state.epoch, self.state.step, self.state.metrics = self.state.epoch + 1, 0, {}


@pytest.mark.parametrize("method", ["bat", "evit", "topk"])
def test_training_decreases_the_loss(method: str) -> None:
    flags = ["--batch-size", "16", "--lr", "2e-3", "--unscale-lr"]
    task = Task(flags, reduction=method)
    losses = []
    for _ in range(8):
        losses.append(task.train()["loss"])
        task.next_epoch()
    assert losses[-1] < 0.3 * losses[0] and losses[0] > 1
    assert task.state.updates == 32
    with torch.no_grad():
        right = (task.model.eval()(task.images).argmax(dim=1) == task.targets).double().mean()
    assert right > 0.9


def test_result_is_the_mean_over_the_epoch() -> None:
    task = Task(["--batch-size", "16", *SGD, "--lr", "0.01"])
    losses = []

    def criterion(images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        losses.append(F.cross_entropy(logits, targets))
        return losses[-1]

    result = task.train(criterion)
    assert len(losses) == 4
    assert result["loss"] == pytest.approx(sum(loss.item() for loss in losses) / 4, rel=1e-6)
    assert result["lr"] == pytest.approx(0.01) and result["bad_images"] == 0


@pytest.mark.parametrize("clip", [[], ["--clip-grad", "0.5"]])
def test_accumulation_equals_a_larger_batch(clip: list[str]) -> None:
    results = []
    for flags in (["--batch-size", "32"], ["--batch-size", "8", "--accum-steps", "4"]):
        task = Task([*flags, *SGD, "--lr", "0.1", *clip])
        before = {name: value.clone() for name, value in task.model.state_dict().items()}
        result = task.train()
        assert task.state.updates == 2
        results.append((result["loss"], task.model.state_dict()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=0, atol=1e-6)
    moved = max((value - before[name]).abs().max() for name, value in results[0][1].items())
    assert moved > 1e-3, "the updates must be larger than the tolerance"


@pytest.mark.parametrize(
    ("num_batches", "accum_steps", "expected"), [(10, 1, 10), (10, 3, 9), (2, 4, 4), (0, 4, 0)]
)
def test_an_epoch_has_whole_updates(num_batches: int, accum_steps: int, expected: int) -> None:
    assert num_training_steps(num_batches, accum_steps) == expected


def test_gradient_clipping_bounds_the_step() -> None:
    flags = ["--batch-size", "64", *SGD, "--lr", "0.5", "--clip-grad", "0.01"]
    task = Task(flags)
    before = torch.cat([value.flatten().clone() for value in task.model.parameters()])
    task.train()
    after = torch.cat([value.flatten() for value in task.model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_moving_average_of_the_weights() -> None:
    task = Task(["--batch-size", "16", "--lr", "1e-3", "--model-ema-decay", "0.8"])
    expected = {name: value.clone() for name, value in task.model.state_dict().items()}
    start = {name: value.clone() for name, value in expected.items()}

    def follow(state: TrainState) -> None:
        for name, value in state.model.state_dict().items():
            expected[name] = 0.8 * expected[name] + 0.2 * value

    task.train(after_update=follow)
    average = task.state.ema.module.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(average[name], value, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(average[name], value) for name, value in start.items())
    assert Task(["--no-model-ema"]).state.ema is None


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_step(amp: str) -> None:
    task = Task(["--batch-size", "16", "--lr", "1e-3", "--unscale-lr", "--amp", amp])
    before = {name: value.clone() for name, value in task.model.named_parameters()}
    dtypes = []

    def criterion(images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        dtypes.append(logits.dtype)
        return F.cross_entropy(logits, targets)

    losses = []
    for _ in range(3):
        losses.append(task.train(criterion)["loss"])
        task.next_epoch()
    assert set(dtypes) == {AMP_DTYPES[amp]}
    assert task.state.scaler.is_enabled() == (amp == "fp16")
    assert losses[-1] < losses[0]
    for name, parameter in task.model.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.isfinite().all()
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_stops_before_the_weights_are_spoilt(where: str, value: float) -> None:
    task = Task(["--batch-size", "16", "--lr", "1e-3"])
    calls = []

    def criterion(images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, targets)
        calls.append(task.model.state_dict())
        if len(calls) < 3:
            return loss
        calls[-1] = {name: value.clone() for name, value in calls[-1].items()}
        return loss * value if where == "loss" else _SpoilGradient.apply(loss, value)

    with pytest.raises(DivergenceError, match=rf"the {where} is \w+ in epoch 0, step 2") as error:
        task.train(criterion)
    assert len(calls) == 3 and task.state.updates == 2
    assert len(str(error.value).splitlines()) == 1
    for name, weight in task.model.state_dict().items():
        assert torch.equal(weight, calls[-1][name])


class _SpoilGradient(torch.autograd.Function):
    """The identity whose gradient is not finite."""

    @staticmethod
    def forward(context, loss: Tensor, value: float) -> Tensor:
        context.value = value
        return loss.clone()

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * context.value, None


def test_fine_tuning_runs_in_evaluation_mode_unless_asked() -> None:
    rates = (0.5, 0.5)
    finetune = ["--finetune", "https://example.org/deit.pth"]
    assert train_options(parse([]), rates).training_mode
    assert not train_options(parse(finetune), rates).training_mode
    assert train_options(parse([*finetune, "--train-mode"]), rates).training_mode
    assert not train_options(parse(["--no-train-mode"]), rates).training_mode
    for flag, expected in (("--compile", False), ("--no-compile", True)):
        options = train_options(parse(["--shrink-epochs", "5", flag]), rates)
        assert options.shrink_by_step is expected and options.keep_rate_at(99) == rates
    assert train_options(parse([]), rates).keep_rate_at is None


@pytest.mark.parametrize("training_mode", [True, False])
def test_training_mode_switches_stochastic_depth(training_mode: bool) -> None:
    task = Task(["--batch-size", "64", *SGD, "--lr", "0"], drop_path_rate=0.9)
    losses = []
    for _ in range(3):
        losses.append(task.train(training_mode=training_mode)["loss"])
        assert task.model.training is training_mode
        task.next_epoch()
    assert (len(set(losses)) == 1) is not training_mode


# Targets ----------------------------------------------------------------------------------------


def test_mixup_gives_the_criterion_soft_targets() -> None:
    flags = ["--batch-size", "16", "--mixup", "0.8", "--cutmix", "1.0", "--smoothing", "0.1"]
    task = Task(flags)
    mixup = build_mixup(task.args, num_classes=4)
    criterion = build_criterion(task.args, 4, CPU, soft_targets=True)
    assert isinstance(criterion.base_criterion, SoftTargetCrossEntropy)
    seen = []

    def note(images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        seen.append((images, targets))
        return criterion(images, logits, targets)

    loss = task.train(note, mixup=mixup)["loss"]
    assert math.isfinite(loss) and loss > 0
    for (images, targets), (plain, _, _) in zip(seen, task.batches(), strict=True):
        assert targets.shape == (16, 4)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(16))
        assert targets.min() == pytest.approx(0.1 / 4)
        assert not torch.equal(images, plain)
    mixed = torch.cat([targets for _, targets in seen])
    assert (mixed.sort(dim=1).values[:, 2] > 0.03).any(), "two classes share an image"


def test_criterion_without_mixup() -> None:
    args = parse([*PLAIN_FLAGS, "--smoothing", "0.1"])
    assert build_mixup(args, 4) is None
    smoothed = build_criterion(args, 4, CPU, soft_targets=False).base_criterion
    assert isinstance(smoothed, LabelSmoothingCrossEntropy) and smoothed.smoothing == 0.1
    args = parse([*PLAIN_FLAGS, "--smoothing", "0"])
    plain = build_criterion(args, 4, CPU, soft_targets=False).base_criterion
    assert isinstance(plain, nn.CrossEntropyLoss)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_teacher_is_built_from_its_checkpoint(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "teacher.pth"
    teacher = build_tiny(keep_rate=1.0)
    keywords = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    stored = {"model_name": "vit_tiny_patch16_224", "num_classes": 4, **keywords}
    torch.save({"model": teacher.state_dict(), "model_args": stored}, path)
    flags = ["--distillation-type", kind, "--teacher-model", "vit_tiny_patch16_224"]
    args = parse([*PLAIN_FLAGS, *flags, "--teacher-path", str(path), "--smoothing", "0"])
    criterion = build_criterion(args, 4, CPU, soft_targets=False)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = teacher(images)
        torch.testing.assert_close(criterion.teacher_model(images), expected, rtol=0, atol=1e-5)
    assert not criterion.teacher_model.training
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be read"):
        build_criterion(args, 4, CPU, soft_targets=False)


# Evaluation -------------------------------------------------------------------------------------


class FixedLogits(nn.Module):
    """Logits that an image's first pixel chooses from a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        return self.table[images[:, 0, 0, 0].long()]


def test_evaluation_counts_every_image_once() -> None:
    table = torch.randn(11, 9, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1])
    targets[:4] = table[:4].argmax(dim=1)
    is_bad = torch.zeros(11, dtype=torch.int64)
    is_bad[1] = 1  # would be right, but could not be read
    images = torch.arange(11.0).view(11, 1, 1, 1).expand(11, 3, 1, 1)
    batches = [(images[i : i + 4], targets[i : i + 4], is_bad[i : i + 4]) for i in (0, 4, 8)]
    result = evaluate(batches, FixedLogits(table).train(), CPU)
    acc1 = acc5 = loss = 0.0
    for index in range(11):
        row = table[index].tolist()
        rank = sorted(row, reverse=True).index(row[targets[index]])
        acc1 += (rank < 1 and not is_bad[index]) * 100 / 11
        acc5 += (rank < 5 and not is_bad[index]) * 100 / 11
        loss += (math.log(sum(math.exp(v) for v in row)) - row[targets[index]]) / 11
    expected = {"acc1": acc1, "acc5": acc5, "loss": loss, "num_images": 11, "bad_images": 1}
    assert result == pytest.approx(expected, rel=1e-6)
    assert 0 < acc1 < acc5 < 100


def test_top5_of_fewer_than_five_classes() -> None:
    batch = (torch.zeros(3, 3, 1, 1), torch.tensor([0, 1, 2]), torch.zeros(3))
    result = evaluate([batch], FixedLogits(torch.tensor([[0.0, 1.0, 2.0]])), CPU)
    assert (result["acc1"], result["acc5"]) == (pytest.approx(100 / 3), 100)


# Several processes ------------------------------------------------------------------------------


def test_two_processes_train_as_one(
    call_main: RunMain, run_main: RunMain, data_path: Path, tmp_path: Path
) -> None:
    flags = [
        *TINY_FLAGS, *RUN_FLAGS, *PLAIN_FLAGS, "--data-path", data_path, "--epochs", "3",
        "--lr", "2e-3", "--unscale-lr", "--warmup-epochs", "0", "--keep-rate", "0.5",
        "--model-ema-decay", "0.9",
    ]  # fmt: skip
    alone = call_main(*flags, "--batch-size", "16", "--output-dir", tmp_path / "one")
    assert alone.returncode == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    both = run_main(
        *flags, "--batch-size", "8", "--output-dir", tmp_path / "two", launcher=launcher
    )
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("Epoch: [0] Total time") == 1, "one process prints"
    logs = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "log.txt").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    assert [entry["epoch"] for entry in logs[1]] == [0, 1, 2]
    for one, two in zip(*logs, strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-4)
        assert two["train_lr"] == one["train_lr"]
        for name in ("test_acc1", "test_acc5", "test_ema_acc1", "test_num_images"):
            assert two[name] == one[name]
        assert two["test_loss"] == pytest.approx(one["test_loss"], abs=1e-4)
    assert logs[0][-1]["train_loss"] < 0.9 * logs[0][0]["train_loss"], "there is something to learn"
    assert logs[0][0]["test_num_images"] == 24
