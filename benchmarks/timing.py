"""Timing: interleaved rounds, ratios of pairs, compiled calls, peak memory."""

import inspect
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]
MANY_GRAPHS = 256  # more than a benchmark ever compiles


@dataclass(frozen=True)
class Setting:
    """How everything is run and timed.

    Attributes:
        device: where the models run.
        dtype: autocast type, or None for float32 throughout.
        compile_mode: mode of `torch.compile`, or None for eager.
        repetitions: timed rounds.
        warmup: rounds before them that are not timed.
        latency_repetitions: timed rounds of single images; 0: no latency.
        seed: of weights and images.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    compile_mode: str | None = None
    repetitions: int = 10
    warmup: int = 3
    latency_repetitions: int = 50
    seed: int = 0


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved_times(
    runs: Sequence[Run], repetitions: int, *, warmup: int, device: torch.device, calls: int = 1
) -> list[list[float]]:
    """Times every run once a round, in a round-robin that starts one further each round.

    Args:
        runs: what to time.
        repetitions: timed rounds.
        warmup: rounds before them that are not timed.
        device: synchronised before each start and each stop of the clock.
        calls: calls of a run between start and stop; their mean counts.

    Returns:
        Seconds of each run, in rounds.
    """
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(warmup + repetitions):
        for offset in range(len(runs)):
            index = (turn + offset) % len(runs)
            synchronize(device)
            begin = time.perf_counter()
            for _ in range(calls):
                runs[index]()
            synchronize(device)
            seconds = (time.perf_counter() - begin) / calls
            if turn >= warmup:
                times[index].append(seconds)
    return times


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over the rounds of the ratio within each round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, interpolated."""
    return torch.quantile(torch.tensor(values, dtype=torch.float64), share).item()


def autocast(setting: Setting):
    """The context in which the models run."""
    if setting.dtype is None:
        return nullcontext()
    return torch.autocast(setting.device.type, dtype=setting.dtype)


def compiled(function: Callable, setting: Setting) -> Callable:
    """The function itself, or its compiled form with a cache of its own.

    The cache matters: models of one class share their code, and one cache for all of them would
    reach the recompilation limit and check the guards of every other model first. PyTorch before
    `isolate_recompiles` has one cache only; its limit is then raised.
    """
    if setting.compile_mode is None:
        return function
    options = {}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    else:
        torch._dynamo.config.recompile_limit = MANY_GRAPHS
    return torch.compile(
        function, fullgraph=True, dynamic=False, mode=setting.compile_mode, **options
    )


def inference(model: nn.Module, images: Tensor, setting: Setting) -> Run:
    """A call without arguments that runs the model on the images (B, 3, height, width)."""
    return partial(_infer, compiled(model, setting), images, setting)


def _infer(function: Callable, images: Tensor, setting: Setting) -> Tensor:
    with torch.inference_mode(), autocast(setting):
        if setting.compile_mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        return function(images)


def peak_mebibytes(run: Run, device: torch.device, *, resident: int) -> float:
    """Memory that a run needs at its worst moment, in MiB.

    On CUDA the caching allocator counts; on a CPU the allocations of PyTorch's CPU allocator that
    its profiler records (scratch memory inside oneDNN and MKL is not among them).

    Args:
        run: a call that has been warmed up.
        device: where it runs.
        resident: bytes of weights and optimizer state, allocated already, to be added.
    """
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        above = torch.cuda.max_memory_allocated(device) - before
    else:
        # The profiler's own messages, about missing GPUs for one, would land in the table.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            run()
        events = recorded.profiler.kineto_results.events()
        changes = [(event.start_ns(), event.nbytes()) for event in events if _is_memory(event)]
        above = current = 0
        for _, nbytes in sorted(changes, key=lambda change: change[0]):
            current += nbytes
            above = max(above, current)
    return (resident + above) / 2**20


def _is_memory(event) -> bool:
    return event.name() == "[memory]"


def tensor_bytes(tensors) -> int:
    """Bytes of an iterable of tensors; other values count nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
