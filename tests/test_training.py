"""Steps, targets and evaluation with their options, and several processes against one."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import PLAIN_FLAGS, RUN_FLAGS, TINY_FLAGS, RunMain, build_tiny
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import CPU, Task, parse

import engine
from engine import DivergenceError, PreemptedError, TrainState, evaluate, score_batch
from main import build_criterion, build_mixup, find_training_mode, train_options
from utils import AMP_DTYPES, InputError, logger, sum_later

aten = torch.ops.aten
SGD = ["--opt", "momentum", "--momentum", "0", "--weight-decay", "0", "--unscale-lr"]


# Steps ------------------------------------------------------------------------------------------


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

    task.train(calls={"checkpoint_due": lambda updates: True, "save": follow})
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
@pytest.mark.parametrize(
    ("bad", "interval", "noticed"),
    [(2, 100, 3), (2, 1, 2), (2, 2, 3), (3, 100, 3)],
    ids=["an update later", "before a save", "before a later save", "at the end of the epoch"],
)
def test_not_finite_is_noticed_before_anything_is_saved(
    where: str, value: float, bad: int, interval: int, noticed: int
) -> None:
    """Updates count from 0."""
    task = Task(["--batch-size", "16", "--lr", "1e-3", "--unscale-lr"])
    losses, saved = [], []

    def criterion(images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        losses.append(F.cross_entropy(logits, targets))
        if len(losses) <= bad:
            return losses[-1]
        return losses[-1] * value if where == "loss" else _SpoilGradient.apply(losses[-1], value)

    def save(state: TrainState) -> None:
        assert all(weight.isfinite().all() for weight in state.model.state_dict().values())
        saved.append((state.updates, state.metrics["loss"]["count"]))

    with pytest.raises(DivergenceError) as error:
        task.train(
            criterion,
            calls={"checkpoint_due": lambda updates: updates % interval == 0, "save": save},
        )
    history = ", ".join(f"{loss.item():.4g}" for loss in losses[:bad])
    assert re.fullmatch(
        rf"the {where} is (nan|inf) in epoch 0, step {bad}, at learning rate 0\.001; "
        rf"losses before: {re.escape(history)}",
        str(error.value),
    )
    assert len(losses) == task.state.updates == noticed + 1
    assert saved == [(n, n) for n in range(interval, bad + 1, interval)]


class _SpoilGradient(torch.autograd.Function):
    """The identity whose gradient is not finite."""

    @staticmethod
    def forward(context, loss: Tensor, value: float) -> Tensor:
        context.value = value
        return loss.clone()

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * context.value, None


@pytest.mark.parametrize(("asked", "stopped"), [(1, 2), (2, 3), (3, 4), (4, 4)])
def test_stop_request_is_met_an_update_later(asked: int, stopped: int) -> None:
    task = Task(["--batch-size", "8", "--accum-steps", "2", "--lr", "1e-3"])
    requests = iter([number >= asked for number in range(1, 5)])
    with pytest.raises(PreemptedError, match=f"^epoch 0, step {2 * stopped}$"):
        task.train(calls={"stop_requested": lambda: next(requests)})
    assert (task.state.step, task.state.updates) == (2 * stopped, stopped)
    assert {meter["count"] for meter in task.state.metrics.values()} == {stopped}


class _HostReads(TorchDispatchMode):
    """Counts the operations for whose result the host waits."""

    waiting = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in self.waiting
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_step_does_not_wait_for_the_device(amp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Momentum: on a CPU, AdamW reads its own number of steps, which lies there on a GPU too."""
    flags = ["--batch-size", "4", "--opt", "momentum", "--clip-grad", "1", "--amp", amp]
    task = Task([*flags, "--model-ema-decay", "0.9", "--mixup", "0.8", "--cutmix", "1"])
    mixup = build_mixup(task.args, num_classes=4)
    criterion = build_criterion(task.args, 4, CPU)
    order = []

    def note(values: Tensor) -> Callable[[], list[float]]:
        number, read = len(order), sum_later(values)
        order.append(("started", number))
        return lambda: order.append(("read", number)) or read()

    monkeypatch.setattr(engine, "sum_later", note)
    with _HostReads() as reads:
        task.train(criterion, mixup=mixup, print_freq=5)
        assert reads.count <= 4  # 16 steps, and lines after steps 0, 5, 10 and 15
        before = reads.count
        torch.ones(1).item()
        assert reads.count == before + 1
    started = [index for index, (event, _) in enumerate(order) if event == "started"]
    read = [order.index(("read", index)) for index in started]
    assert len(started) == 16 and len(order) == 32
    assert read[:-1] == [index + 1 for index in started[1:]]  # each right after the next started


FINETUNE = ["--finetune", "https://example.org/deit.pth"]


@pytest.mark.parametrize(
    ("flags", "resumed", "expected"),
    [
        ([], {}, True),
        (FINETUNE, {}, False),
        ([*FINETUNE, "--train-mode"], {}, True),
        (["--no-train-mode"], {}, False),
        ([], {"training_mode": False, "args": {"finetune": ""}}, False),
        (["--train-mode"], {"training_mode": False}, True),
        (FINETUNE, {"training_mode": True}, True),
        ([], {"args": {"finetune": "deit.pth"}}, False),  # EViT's, or an older run of ours
        ([], {"args": {"finetune": "deit.pth", "train_mode": True}}, True),  # DeiT's
        (FINETUNE, {"args": {"finetune": ""}}, True),
    ],
)
def test_fine_tuning_runs_in_evaluation_mode_unless_asked(flags, resumed, expected) -> None:
    assert find_training_mode(parse(flags), resumed) is expected


@pytest.mark.parametrize("flags", [["--drop-path", "0.1"], ["--drop", "0.2"], []])
def test_flags_without_effect_in_fine_tuning_are_said(flags, monkeypatch) -> None:
    messages = []
    monkeypatch.setattr(logger, "info", messages.append)
    find_training_mode(parse([*FINETUNE, *flags]), {})
    assert any("have no effect" in message for message in messages) == bool(flags)


def test_keep_rate_schedule_needs_a_flag() -> None:
    def schedule(*flags: str) -> Callable | None:
        return train_options(parse([*flags]), (0.5, 0.5), CPU, training_mode=True).keep_rate_at

    assert schedule() is None
    once = schedule("--shrink-start-epoch", "1")
    assert [once(epoch) for epoch in (0, 0.99, 1)] == [(1, 1), (1, 1), (0.5, 0.5)]
    evits = schedule("--shrink_epochs", "0")  # as EViT's finetune.sh has it
    assert [evits(epoch) for epoch in (9.9, 10)] == [(1, 1), (0.5, 0.5)]
    for flag, expected in (("--compile", False), ("--no-compile", True)):
        args = parse(["--shrink-epochs", "5", flag])
        options = train_options(args, (0.5, 0.5), CPU, training_mode=True)
        assert options.shrink_by_step is expected and options.keep_rate_at(99) == (0.5, 0.5)


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
    criterion = build_criterion(task.args, 4, CPU)
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
    smoothed = build_criterion(args, 4, CPU).base_criterion
    assert isinstance(smoothed, LabelSmoothingCrossEntropy) and smoothed.smoothing == 0.1
    args = parse([*PLAIN_FLAGS, "--smoothing", "0"])
    plain = build_criterion(args, 4, CPU).base_criterion
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
    criterion = build_criterion(args, 4, CPU, (32, 32))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = teacher(images)
        torch.testing.assert_close(criterion.teacher_model(images), expected, rtol=0, atol=1e-5)
    assert not criterion.teacher_model.training
    bare = timm.create_model("test_byobnet", num_classes=4)
    torch.save(bare.state_dict(), path)  # weights alone, as they are often published
    args.teacher_model = "test_byobnet"
    found = build_criterion(args, 4, CPU, (32, 32)).teacher_model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in bare.state_dict().items())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be read"):
        build_criterion(args, 4, CPU)


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


def test_of_equal_logits_the_first_counts() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0, 0.0, 0.0, 0.0]] * 4, dtype=torch.bfloat16)
    scores = score_batch(logits, torch.tensor([1, 2, 6, 1]), torch.tensor([0, 0, 0, 1]))
    assert scores.predicted.tolist() == [1] * 4
    assert scores.correct1.tolist() == [True, False, False, False], "the last is unreadable"
    assert scores.correct5[:2].all() and not scores.correct5[3]
