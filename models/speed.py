"""How long a forward pass takes on this machine, and the largest keep rate that is fast enough."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .vit import ReducingTransformer

Call = Callable[[], object]
# Measured to choose a keep rate by its time. Above 0.9 a stage costs about what it saves.
MEASURED_RATES = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)


class Setting(NamedTuple):
    """How everything is run and timed."""

    device: torch.device
    dtype: torch.dtype | None = None  # of autocast; None: float32 throughout
    compile_mode: str | None = None  # of torch.compile; None: eager
    repetitions: int = 10  # timed rounds
    warmup: int = 3  # rounds before them that are not timed
    latency_repetitions: int = 50  # timed rounds of single images; 0: no latency
    seed: int = 0  # random seed of weights and images

    def autocast(self):
        """The context in which the models run."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def synchronize(self) -> None:
        """Waits until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def compiled(function: Callable, setting: Setting) -> Callable:
    """The function itself, or its compiled form with a cache of its own."""
    if setting.compile_mode is None:
        return function

    def call(*inputs):
        return function(*inputs)

    # torch.compile keeps its graphs by code object. Models of one class would share theirs, reach
    # the limit of recompilations and have the guards of each other checked within the timing.
    call.__code__ = call.__code__.replace()
    graph = torch.compile(call, fullgraph=True, dynamic=False, mode=setting.compile_mode)

    def begin(*inputs):
        torch.compiler.cudagraph_mark_step_begin()  # of use where the mode has CUDA graphs
        return graph(*inputs)

    return begin


def inference(function: Callable, setting: Setting, *inputs) -> Call:
    """A call without arguments that runs the function on the inputs, without gradients."""
    function = compiled(function, setting)

    def run():
        with torch.inference_mode(), setting.autocast():
            return function(*inputs)

    return run


def time_rounds(
    runs: Sequence[Call], setting: Setting, *, repetitions: int | None = None
) -> Tensor:
    """Times every run once a round, in an order drawn anew for each round.

    The device is synchronised before each start and stop of the clock.

    Returns:
        (runs, repetitions) float64 seconds of the timed rounds, the setting's unless given.
    """
    repetitions = repetitions or setting.repetitions
    times = torch.zeros(len(runs), setting.warmup + repetitions, dtype=torch.float64)
    generator = torch.Generator().manual_seed(setting.seed)
    for turn in range(times.shape[1]):
        for index in torch.randperm(len(runs), generator=generator).tolist():
            setting.synchronize()
            begin = time.perf_counter()
            runs[index]()
            setting.synchronize()
            times[index, turn] = time.perf_counter() - begin
    return times[:, setting.warmup :]


def measure_keep_rates(
    model: ReducingTransformer, images: Tensor, setting: Setting
) -> dict[float, float]:
    """Median milliseconds of a forward pass at each of `MEASURED_RATES`, interleaved.

    Args:
        model: in evaluation mode, on the device; its own keep rate is not changed.
        images: (B, 3, height, width) on the device.
        setting: how to run and time.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    runs = []
    for rate in MEASURED_RATES:
        candidate = copy.deepcopy(model, dict(shared))  # with the same weights
        candidate.set_keep_rate(rate)
        runs.append(inference(candidate, setting, images))
    milliseconds = 1e3 * time_rounds(runs, setting).quantile(0.5, dim=1)
    return dict(zip(MEASURED_RATES, milliseconds.tolist(), strict=True))


def fast_enough(milliseconds: Mapping[float, float], target: float) -> float:
    """The largest keep rate, to three decimals, whose forward pass takes at most `target` ms.

    Between the measured rates time is interpolated, and taken never to fall with the rate. It is 1,
    or at most the largest measured one below.

    Raises:
        ValueError: even the smallest measured rate takes longer.
    """
    if milliseconds[1.0] <= target:
        return 1.0
    rates = sorted(rate for rate in milliseconds if rate < 1)
    times = list(accumulate((milliseconds[rate] for rate in rates), max))
    if times[0] > target:
        raise ValueError(f"even keep rate {rates[0]:g} takes {times[0]:.3g} ms")
    if times[-1] <= target:
        return rates[-1]
    segments = zip(pairwise(rates), pairwise(times), strict=True)
    (low, high), (fast, slow) = next(s for s in segments if s[1][1] > target)
    return math.floor(1000 * (low + (high - low) * (target - fast) / (slow - fast)) + 1e-9) / 1000
