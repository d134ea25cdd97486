"""`--what train`: time and memory of a training step beside timm's dense model."""

import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .configurations import Choice, Configuration, each_size
from .report import Column, Report, line_name, make_report
from .timing import (
    Run,
    Setting,
    autocast,
    compiled,
    interleaved_times,
    median_ratio,
    peak_mebibytes,
    tensor_bytes,
)

COLUMNS = [
    Column("reduction"),
    Column("keep"),
    Column("size"),
    Column("batch"),
    Column("tokens"),
    Column("gmacs", 5),
    Column("step_ms", 2),
    Column("images/s", 2),
    Column("memory_mib", 1),
    Column("time_ratio", 4),
    Column("memory_ratio", 4),
]

PROTOCOL = [
    "a step: forward, cross-entropy, backward and AdamW on one batch of noise, in training mode",
    "step_ms: median of the rounds; every round runs one step of each configuration, in turn, with "
    "the device synchronised around each step",
    "memory_mib: weights, optimizer state, and the largest sum of tensors alive in one step",
    "time_ratio: median over the rounds of own time / time of timm's dense model, with fused "
    "attention; memory_ratio: likewise",
]


def benchmark_train(choice: Choice, setting: Setting) -> Report:
    """Measures training steps of every configuration: a line per size, batch and configuration.

    Raises:
        InputError: a model cannot be built.
    """
    rows, raw = [], []
    for configurations, images, columns in each_size(choice, setting):
        for configuration in configurations:
            configuration.model.train()
        for row, seconds in _steps(configurations, images, setting):
            rows.append(row | columns)
            raw.append(line_name(rows[-1]) | {"seconds": seconds})
    return make_report("train", COLUMNS, rows, PROTOCOL, raw)


def _steps(
    configurations: Sequence[Configuration], images: Tensor, setting: Setting
) -> list[tuple[dict, list[float]]]:
    """The columns and the seconds of each configuration."""
    optimizers = [torch.optim.AdamW(c.model.parameters(), lr=1e-5) for c in configurations]
    runs = [
        _training_step(c, optimizer, images, setting)
        for c, optimizer in zip(configurations, optimizers, strict=True)
    ]
    times = interleaved_times(
        runs, setting.repetitions, warmup=setting.warmup, device=setting.device
    )
    memory = []
    for run, c, optimizer in zip(runs, configurations, optimizers, strict=True):
        resident = tensor_bytes(c.model.state_dict().values())
        resident += sum(tensor_bytes(state.values()) for state in optimizer.state.values())
        memory.append(peak_mebibytes(run, setting.device, resident=resident))
    steps = []
    for index, configuration in enumerate(configurations):
        median = statistics.median(times[index])
        row = configuration.row() | {
            "gmacs": configuration.gmacs,
            "step_ms": 1e3 * median,
            "images/s": len(images) / median,
            "memory_mib": memory[index],
            "time_ratio": median_ratio(times[index], times[0]),
            "memory_ratio": memory[index] / memory[0],
        }
        steps.append((row, times[index]))
    return steps


def _training_step(
    configuration: Configuration,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    setting: Setting,
) -> Run:
    model = configuration.model
    targets = torch.arange(len(images), device=images.device) % model.num_classes
    scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.dtype == torch.float16)
    forward = compiled(model, setting)

    def step() -> None:
        with autocast(setting):
            if setting.compile_mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            loss = F.cross_entropy(forward(images), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step
