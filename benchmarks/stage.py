"""`--what stage`: how much of a forward pass the reduction stages take."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from models import bat
from models.grouping import class_token_importance
from models.reduction import ReducedTokens, StageInputs, reduce_tokens

from .configurations import DENSE, Choice, Configuration, each_size
from .report import Column, Report, line_name, make_report
from .timing import (
    Run,
    Setting,
    autocast,
    compiled,
    inference,
    interleaved_times,
    median_ratio,
    peak_mebibytes,
)

# A stage alone is launched faster than it is computed only if several calls queue up on a GPU; on
# a CPU every call stands alone, so that its inputs are no warmer in the caches than in the model.
CALLS_ON_GPU = 20

COLUMNS = [
    Column("reduction"),
    Column("keep"),
    Column("size"),
    Column("batch"),
    Column("tokens"),
    Column("forward_ms", 3),
    Column("stages_ms", 3),
    Column("share_all", 4),
    Column("stage_mib", 2),
    Column("attention_mib", 2),
]

PROTOCOL = [
    "a stage: the class token's attention row, the choice of the groups and the merging, run alone "
    "on the inputs that a forward pass gave it",
    "every round runs the forward pass and each stage in turn, with the device synchronised around "
    f"each; on a GPU the mean of {CALLS_ON_GPU} calls counts as one",
    "share_N: median over the rounds of the time of stage N / time of the forward pass; share_all: "
    "of their sum",
    "stage_mib: largest sum of tensors that the first stage adds to its inputs; attention_mib: the "
    "same of the attention layer before it; both eager",
]


class StageCall(NamedTuple):
    """What one stage was given in a forward pass.

    Attributes:
        query: (B, H, 1, D / H) the class token's query.
        keys: (B, H, L, D / H) keys of all tokens.
        scale: factor on their products.
        inputs: of `reduce_tokens`.
        method: a name in REDUCTIONS.
    """

    query: Tensor
    keys: Tensor
    scale: float
    inputs: StageInputs
    method: str


@contextmanager
def _recorded(name: str) -> Iterator[list[tuple]]:
    """Collects the arguments of every call that `models.bat` makes of a function."""
    calls: list[tuple] = []
    function = getattr(bat, name)

    def recording(*args):
        calls.append(args)
        return function(*args)

    with mock.patch.object(bat, name, recording):
        yield calls


def stage_calls(model: nn.Module, images: Tensor, setting: Setting) -> list[StageCall]:
    """Runs a forward pass (B, 3, height, width) and returns what it gave to each stage."""
    with (
        _recorded("class_token_importance") as rows,
        _recorded("reduce_tokens") as reductions,
        torch.inference_mode(),
        autocast(setting),
    ):
        model(images)
    return [StageCall(*row, *stage) for row, stage in zip(rows, reductions, strict=True)]


def first_attention(model: nn.Module, images: Tensor, setting: Setting) -> Run:
    """The attention layer of the first reducing block, on what a forward pass gives it."""
    block = model.blocks[model.reduction_loc[0]]
    inputs: list[Tensor] = []
    handle = block.norm1.register_forward_hook(lambda *call: inputs.append(call[-1]))
    with torch.inference_mode(), autocast(setting):
        model(images)
    handle.remove()

    def attend() -> Tensor:
        with torch.inference_mode(), autocast(setting):
            return block.attn(inputs[0])

    return attend


def run_stage(call: StageCall) -> ReducedTokens:
    """One stage as a block runs it: the class token's attention row, then the reduction."""
    row = class_token_importance(call.query, call.keys, call.scale)
    num_prefix = row.shape[1] - call.inputs.x.shape[1]
    return reduce_tokens(call.inputs._replace(importance=row[:, num_prefix:]), call.method)


def _stage(function: Callable, call: StageCall, setting: Setting) -> ReducedTokens:
    with torch.inference_mode(), autocast(setting):
        if setting.compile_mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        return function(call)


def benchmark_stage(choice: Choice, setting: Setting) -> Report:
    """Measures the stages: a line per size, batch and reducing configuration.

    Raises:
        InputError: a model cannot be built.
    """
    rows, raw = [], []
    for configurations, images, columns in each_size(choice, setting):
        for configuration in configurations:
            if configuration.reduction == DENSE:
                continue
            row, times = _shares(configuration, images, setting)
            rows.append(row | columns)
            seconds = {"forward_seconds": times[0], "stage_seconds": times[1:]}
            raw.append(line_name(rows[-1]) | seconds)
    num_stages = max(len(entry["stage_seconds"]) for entry in raw)
    shares = [Column(f"share_{number}", 4) for number in range(1, num_stages + 1)]
    return make_report("stage", COLUMNS + shares, rows, PROTOCOL, raw)


def _shares(
    configuration: Configuration, images: Tensor, setting: Setting
) -> tuple[dict, list[list[float]]]:
    """The columns of one configuration; seconds of the forward pass and of each stage."""
    calls = stage_calls(configuration.model, images, setting)
    runs: list[Run] = [inference(configuration.model, images, setting)]
    runs += [partial(_stage, compiled(run_stage, setting), call, setting) for call in calls]
    times = interleaved_times(
        runs,
        setting.repetitions,
        warmup=setting.warmup,
        device=setting.device,
        calls=CALLS_ON_GPU if setting.device.type == "cuda" else 1,
    )
    forward, stages = times[0], times[1:]
    together = [sum(seconds) for seconds in zip(*stages, strict=True)] or [0.0] * len(forward)
    row = configuration.row() | {
        "forward_ms": 1e3 * statistics.median(forward),
        "stages_ms": 1e3 * statistics.median(together),
        "share_all": median_ratio(together, forward),
    }
    row |= {f"share_{i + 1}": median_ratio(seconds, forward) for i, seconds in enumerate(stages)}
    memory = partial(peak_mebibytes, device=setting.device, resident=0)
    row["stage_mib"] = memory(partial(_stage, run_stage, calls[0], setting))
    row["attention_mib"] = memory(first_attention(configuration.model, images, setting))
    return row, times
