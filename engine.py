"""One epoch of training, and evaluation."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.nn.parallel import DistributedDataParallel

from utils import (
    MetricLogger,
    SmoothedValue,
    all_reduce,
    get_rank,
    get_world_size,
    seed_everything,
    sum_later,
)


class DivergenceError(RuntimeError):
    """The loss or the gradient is not finite: going on would only spoil the weights."""


class PreemptedError(RuntimeError):
    """The run was asked to stop; its state is at the end of an update, ready to be saved."""


def _never(*_: object) -> bool:
    return False


@dataclass(frozen=True)
class TrainOptions:
    """How to run the steps of an epoch.

    Attributes:
        amp_dtype: autocast type, or None for none.
        accum_steps: gradient accumulation steps.
        clip_grad: largest gradient norm, or None.
        print_freq: steps between progress lines.
        seed: random seed of the run.
        training_mode: False keeps stochastic depth and dropout off (fine-tuning).
        keep_rate_at: epochs done, as a fraction -> one keep rate per reducing block; None: fixed.
        shrink_by_step: the keep rate follows `keep_rate_at` within an epoch too.
    """

    amp_dtype: torch.dtype | None = None
    accum_steps: int = 1
    clip_grad: float | None = None
    print_freq: int = 10
    seed: int = 0
    training_mode: bool = True
    keep_rate_at: Callable[[float], tuple[float, ...]] | None = None
    shrink_by_step: bool = True


@dataclass
class TrainState:
    """Everything that changes while a run trains, and that a checkpoint therefore holds.

    Attributes:
        model: the bare model, without a DistributedDataParallel wrapper.
        optimizer: its optimizer.
        scheduler: timm scheduler, stepped after every epoch.
        scaler: gradient scaler, disabled unless fp16.
        ema: exponential moving average of the weights, or None.
        epoch: the epoch to train next, or being trained.
        step: batches of it that are done; a multiple of the gradient accumulation steps.
        updates: optimizer updates since the start.
        best: best validation accuracy by name, in percent.
        metrics: the meters of the epoch being trained.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: object
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    epoch: int = 0
    step: int = 0
    updates: int = 0
    best: dict[str, float] = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The model and, if there is one, its exponential moving average."""
        return (self.model,) if self.ema is None else (self.model, self.ema.module)

    def state_dict(self) -> dict:
        """Tensors and plain values that `load_state_dict` takes."""
        return {
            "model": self.model.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "updates": self.updates,
            "best": self.best,
            "metrics": self.metrics,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues where `state_dict` was taken; the weights are loaded by the caller."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["lr_scheduler"])
        if state["scaler"]:  # empty when it was disabled
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.updates, self.best = state["updates"], dict(state["best"])
        self.metrics = dict(state["metrics"])


def shrunk_keep_rate(
    epochs_done: float, keep_rates: Sequence[float], *, start_epoch: int, shrink_epochs: int
) -> tuple[float, ...]:
    """EViT's gradual shrinking: 1 before, a cosine from 1 to the keep rate, the keep rate after.

    Args:
        epochs_done: epochs since the start, as a fraction.
        keep_rates: the final keep rate of each reducing block.
        start_epoch: epoch in which the shrinking starts.
        shrink_epochs: how many epochs it takes; 0: the keep rate falls at once.

    Returns:
        The keep rate of each reducing block, rounded up to thousandths and so in (0, 1].
    """
    if epochs_done >= start_epoch + shrink_epochs:
        return tuple(keep_rates)
    if epochs_done < start_epoch:
        return (1.0,) * len(keep_rates)
    progress = (epochs_done - start_epoch) / shrink_epochs
    share = (math.cos(math.pi * progress) + 1) / 2  # 1 -> 0
    return tuple(
        min(1.0, math.ceil((rate + (1 - rate) * share) * 1000) / 1000) for rate in keep_rates
    )


def _autocast(device: torch.device, amp_dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None)


def train_one_epoch(
    state: TrainState,
    model: nn.Module,
    criterion: nn.Module,
    data_loader: Iterable,
    *,
    device: torch.device,
    num_steps: int,
    options: TrainOptions,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    checkpoint_due: Callable[[int], bool] = _never,
    save: Callable[[TrainState], None] | None = None,
    stop_requested: Callable[[], bool] = _never,
) -> dict[str, float]:
    """Trains for one epoch, or for the rest of one.

    What an update tells the host (loss, gradient norm, bad images, stop requests) is read one
    update later, so that the device never waits for the host. Nothing is unread when a
    checkpoint is written, an epoch ends or a `PreemptedError` leaves. With fp16 the gradient scaler
    waits for the device by itself, unless the optimizer is a fused one.

    Args:
        state: what changes; `state.step` batches of the epoch are done already.
        model: the model to call: `state.model` or its DistributedDataParallel wrapper.
        criterion: (images, logits, targets) -> loss.
        data_loader: (images, targets, is_bad) batches from number `state.step` on; is_bad is on
            the CPU.
        device: where the model is.
        num_steps: batches of the whole epoch, a multiple of the gradient accumulation steps.
        options: how to run the steps.
        mixup: changes images and targets on the device, e.g. timm's mixup and cutmix; or None.
        checkpoint_due: number of updates since the start -> whether to save now, asked after every
            update; all processes say the same.
        save: called then.
        stop_requested: asked after every update; all processes stop when one says True.

    Returns:
        Means of loss and lr over the epoch and all processes, and the number of bad images.

    Raises:
        DivergenceError: the loss or the gradient norm is not finite; one more update may be done.
        PreemptedError: a stop was requested; the update after it is done, or the epoch.
    """
    model.train(options.training_mode)
    metrics = _new_metrics(state.metrics)
    unread: deque[tuple[int, Callable[[], list[float]]]] = deque()  # first batch, what to read
    batches = metrics.log_every(
        islice(data_loader, num_steps - state.step),
        options.print_freq,
        header=f"Epoch: [{state.epoch}]",
        total=num_steps,
        start=state.step,
    )
    state.optimizer.zero_grad()
    _shrink(state, options, max(0, state.step - 1), num_steps)  # resumed: as the last step left it
    for _ in range(state.step, num_steps, options.accum_steps):
        loss_sum, num_bad = 0.0, 0
        for index, batch in enumerate(islice(batches, options.accum_steps)):
            # Load
            seed_everything(options.seed, get_rank(), state.epoch, state.step + index)
            _shrink(state, options, state.step + index, num_steps)
            images, targets = (part.to(device, non_blocking=True) for part in batch[:2])
            if mixup is not None:
                images, targets = mixup(images, targets)
            # Forward and backward; gradients are shared among processes with the last batch
            waits = isinstance(model, DistributedDataParallel) and index + 1 < options.accum_steps
            with model.no_sync() if waits else nullcontext():
                with _autocast(device, options.amp_dtype):
                    loss = criterion(images, model(images), targets)
                state.scaler.scale(loss / options.accum_steps).backward()
            loss_sum = loss_sum + loss.detach().double()
            num_bad += sum(batch[2].tolist())
        # Update
        norm = _update(state, options.clip_grad)
        mean_loss = loss_sum / (options.accum_steps * get_world_size())
        counts = (mean_loss.new_full((), float(count)) for count in (num_bad, stop_requested()))
        unread.append((state.step, sum_later(torch.stack([mean_loss, norm.double(), *counts]))))
        state.step += options.accum_steps
        # Log and save
        is_due = checkpoint_due(state.updates)
        _read(unread, 0 if is_due or state.step == num_steps else 1, state, metrics)
        if is_due:
            save(state)
    next(batches, None)  # the last progress line
    means = {name: metrics.meters[name].global_avg for name in ("loss", "lr")}
    return means | {"bad_images": metrics.meters["bad_images"].total}


def _shrink(state: TrainState, options: TrainOptions, step: int, num_steps: int) -> None:
    """Sets the keep rate of one of the epoch's steps, if there is a schedule."""
    if options.keep_rate_at is not None:
        within = step / num_steps if options.shrink_by_step else 0
        for model in state.models:
            model.set_keep_rate(options.keep_rate_at(state.epoch + within))


def _new_metrics(saved: dict) -> MetricLogger:
    metrics = MetricLogger()
    metrics.meters["lr"] = SmoothedValue(window_size=1, fmt="{value:.6f}")
    metrics.meters["loss"] = SmoothedValue()
    metrics.meters["bad_images"] = SmoothedValue(fmt="{value:.0f}")
    metrics.load_state_dict(saved)
    return metrics


def _read(unread: deque, num_left: int, state: TrainState, metrics: MetricLogger) -> None:
    """Reads what updates told the host into the meters, all but the newest `num_left`.

    It comes from all processes, so that all stop after the same update. With fp16 a gradient may
    overflow now and then: the scaler has then skipped the step by itself.
    """
    lr, stopping = max(group["lr"] for group in state.optimizer.param_groups), False
    while len(unread) > num_left:
        step, read = unread.popleft()
        loss, norm, num_bad, num_stops = read()
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value) and (name == "loss" or not state.scaler.is_enabled()):
                history = ", ".join(f"{past:.4g}" for past in metrics.meters["loss"].deque)
                raise DivergenceError(
                    f"the {name} is {value} in epoch {state.epoch}, step {step}, at learning rate "
                    f"{lr:.3g}; losses before: {history or 'none'}"
                )
        metrics.update(loss=loss, lr=lr, bad_images=num_bad)
        if num_stops:
            num_left, stopping = 0, True
    state.metrics = metrics.state_dict()
    if stopping:
        raise PreemptedError(f"epoch {state.epoch}, step {state.step}")


def _update(state: TrainState, clip_grad: float | None) -> Tensor:
    """One optimizer step from the gradients at hand, and the moving average after it.

    Returns:
        () the norm of the gradient before clipping.
    """
    state.scaler.unscale_(state.optimizer)
    limit = math.inf if clip_grad is None else clip_grad
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), limit)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    state.updates += 1
    if state.ema is not None:
        state.ema.update(state.model)
    return norm


class BatchScores(NamedTuple):
    """Per-image scores of a batch.

    Attributes:
        correct1: (B,) bool, the target has the largest logit.
        correct5: (B,) bool, the target is among the five largest logits.
        loss: (B,) float32 cross-entropy.
        predicted: (B,) int64 class of the largest logit; of several equal ones, which low precision
            makes likely, the first.
    """

    correct1: Tensor
    correct5: Tensor
    loss: Tensor
    predicted: Tensor


def score_batch(logits: Tensor, targets: Tensor, is_bad: Tensor) -> BatchScores:
    """Scores logits (B, classes) against targets (B,); an unreadable image counts as wrong."""
    logits, is_good = logits.float(), ~is_bad.bool()
    predicted = logits.argmax(dim=1)
    correct1 = (predicted == targets) & is_good
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
    correct5 = (top == targets.unsqueeze(1)).any(dim=1) & is_good
    loss = F.cross_entropy(logits, targets, reduction="none")
    return BatchScores(correct1, correct1 | correct5, loss, predicted)


@torch.no_grad()
def evaluate(
    data_loader: Iterable,
    model: nn.Module,
    device: torch.device,
    *,
    amp_dtype: torch.dtype | None = None,
    print_freq: int = 10,
    header: str = "Test:",
    all_ranks: bool = True,
    stop_requested: Callable[[], bool] = _never,
    correct: list[Tensor] | None = None,
) -> dict[str, float]:
    """Accuracy and loss over a data set, every image counted once.

    Args:
        data_loader: (images, targets, is_bad) batches; each process has its own share.
        model: put into evaluation mode and left there.
        device: where the model is.
        amp_dtype: autocast type, or None for none.
        print_freq: batches between progress lines.
        header: first words of the progress lines.
        all_ranks: the processes share the data set, so their counts are added up.
        stop_requested: asked after every batch; all processes stop when one says True.
        correct: gets (B,) bools on the device, right or wrong, a batch at a time.

    Returns:
        acc1 and acc5 in percent, loss (mean cross-entropy), and how many images were evaluated and
        how many of them could not be read.

    Raises:
        PreemptedError: a stop was requested.
    """
    model.eval()
    metrics = MetricLogger()
    # Shares differ by an image, so a process may have one batch more, which it spends alone.
    common = all_reduce([float(len(data_loader))], device, ReduceOp.MIN)[0]
    sums = torch.zeros(5, dtype=torch.float64)  # correct1, correct5, loss, images, bad images
    unread: list[Tensor] = []  # those of batches, on the device until a progress line shows them
    batches = metrics.log_every(data_loader, print_freq, header=header, total=len(data_loader))
    for index, (images, targets, is_bad) in enumerate(batches):
        if index < common and all_reduce([float(stop_requested())], device)[0]:
            raise PreemptedError("during the evaluation")
        images = images.to(device, non_blocking=True)
        with _autocast(device, amp_dtype):
            logits = model(images)
        targets, is_bad = (part.to(device, non_blocking=True) for part in (targets, is_bad))
        scores = score_batch(logits, targets, is_bad)
        if correct is not None:
            correct.append(scores.correct1)
        parts = [part.double().sum() for part in (*scores[:3], torch.ones_like(targets), is_bad)]
        unread.append(torch.stack(parts))
        if index % print_freq == 0 or index == len(data_loader) - 1:
            for batch in torch.stack(unread).cpu():
                metrics.update(loss=batch[2] / batch[3], acc1=100 * batch[0] / batch[3])
                sums += batch
            unread.clear()
    totals = all_reduce(sums.tolist(), device) if all_ranks else sums.tolist()
    correct1, correct5, loss, num_images, num_bad = totals
    return {
        "acc1": 100 * correct1 / num_images,
        "acc5": 100 * correct5 / num_images,
        "loss": loss / num_images,
        "num_images": int(num_images),
        "bad_images": int(num_bad),
    }
