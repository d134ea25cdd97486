"""`--what model`: speed, latency and memory of inference beside timm's dense model."""

import statistics
from collections.abc import Sequence

from torch import Tensor

from .configurations import (
    Choice,
    Configuration,
    build_configurations,
    random_images,
    topk_rival,
)
from .report import Column, Report, line_name, make_report
from .timing import (
    Run,
    Setting,
    inference,
    interleaved_times,
    median_ratio,
    peak_mebibytes,
    percentile,
    tensor_bytes,
)

COLUMNS = [
    Column("reduction"),
    Column("keep"),
    Column("size"),
    Column("batch"),
    Column("tokens"),
    Column("gmacs", 5),
    Column("images/s", 2),
    Column("p50_ms", 2),
    Column("p95_ms", 2),
    Column("memory_mib", 1),
    Column("speedup", 4),
    Column("limit", 4),
    Column("of_limit", 4),
    Column("vs_topk", 4),
    Column("break_even"),
]

PROTOCOL = [
    "images/s: batch / median time of the rounds; every round runs each configuration once, in "
    "turn, with the device synchronised around each run",
    "p50_ms, p95_ms: latency of one image, in rounds of their own",
    "memory_mib: weights and the largest sum of tensors alive in one forward pass, at this batch",
    "speedup: median over the rounds of dense time / own time; the dense model is timm's, with "
    "fused attention",
    "limit: dense gmacs / own gmacs; of_limit: speedup / limit",
    "vs_topk: median over the rounds of the time of topk at this keep rate / own time",
]
BREAK_EVEN_PROTOCOL = (
    "break_even: smallest batch with a median speedup above 1, searched by doubling from 1 and "
    "halving the last step; none: not up to the largest batch of the table"
)


def benchmark_model(choice: Choice, setting: Setting, *, break_even: bool) -> Report:
    """Measures inference of every configuration: a line per size, batch and configuration.

    Args:
        choice: which models and sizes.
        setting: how they run.
        break_even: search the smallest batch at which a model is faster than the dense one.

    Raises:
        InputError: a model cannot be built.
    """
    rows, raw = [], []
    for img_size in choice.img_sizes:
        configurations = build_configurations(choice, img_size, setting)
        per_model = _latencies(configurations, img_size, setting)
        if break_even:
            found = [
                _break_even(configurations[0], other, img_size, setting, max(choice.batch_sizes))
                for other in configurations[1:]
            ]
            for columns, batch in zip(per_model[1:], found, strict=True):
                columns["break_even"] = str(batch or "none")
        for batch_size in choice.batch_sizes:
            images = random_images(batch_size, img_size, setting)
            times, memory = _throughputs(configurations, images, setting)
            for index, configuration in enumerate(configurations):
                row = configuration.row() | per_model[index]
                row |= {"size": "x".join(map(str, img_size)), "batch": batch_size}
                row |= _speed_columns(index, configurations, times, batch_size)
                rows.append(row | {"memory_mib": memory[index]})
                raw.append(line_name(row) | {"seconds": times[index]})
    protocol = PROTOCOL + [BREAK_EVEN_PROTOCOL] * break_even
    return make_report("model", COLUMNS, rows, protocol, raw)


def _runs(configurations: Sequence[Configuration], images: Tensor, setting: Setting) -> list[Run]:
    return [inference(c.model, images, setting) for c in configurations]


def _throughputs(
    configurations: Sequence[Configuration], images: Tensor, setting: Setting
) -> tuple[list[list[float]], list[float]]:
    """Seconds of the rounds, and memory, of each configuration."""
    runs = _runs(configurations, images, setting)
    times = interleaved_times(
        runs, setting.repetitions, warmup=setting.warmup, device=setting.device
    )
    memory = []
    for run, configuration in zip(runs, configurations, strict=True):
        resident = tensor_bytes(configuration.model.state_dict().values())
        memory.append(peak_mebibytes(run, setting.device, resident=resident))
    return times, memory


def _latencies(
    configurations: Sequence[Configuration], img_size: tuple[int, int], setting: Setting
) -> list[dict]:
    if setting.latency_repetitions == 0:
        return [{} for _ in configurations]
    images = random_images(1, img_size, setting)
    times = interleaved_times(
        _runs(configurations, images, setting),
        setting.latency_repetitions,
        warmup=setting.warmup,
        device=setting.device,
    )
    return [
        {"p50_ms": 1e3 * percentile(seconds, 0.5), "p95_ms": 1e3 * percentile(seconds, 0.95)}
        for seconds in times
    ]


def _speed_columns(
    index: int,
    configurations: Sequence[Configuration],
    times: Sequence[Sequence[float]],
    batch_size: int,
) -> dict:
    """Speed of one configuration, and its ratios to the dense model and to topk."""
    own, dense = configurations[index], configurations[0]
    speedup = median_ratio(times[0], times[index])
    limit = dense.gmacs / own.gmacs
    rival = topk_rival(own, configurations)
    return {
        "gmacs": own.gmacs,
        "images/s": batch_size / statistics.median(times[index]),
        "speedup": speedup,
        "limit": limit,
        "of_limit": speedup / limit,
        "vs_topk": None if rival is None else median_ratio(times[rival], times[index]),
    }


def _break_even(
    dense: Configuration,
    other: Configuration,
    img_size: tuple[int, int],
    setting: Setting,
    largest: int,
) -> int | None:
    """The smallest batch at which `other` is faster than `dense`; None: not up to the largest."""

    def is_faster(batch_size: int) -> bool:
        images = random_images(batch_size, img_size, setting)
        times = interleaved_times(
            _runs([dense, other], images, setting),
            setting.repetitions,
            warmup=setting.warmup,
            device=setting.device,
        )
        return median_ratio(*times) > 1

    slow, fast = 0, 1
    while not is_faster(fast):
        if fast == largest:
            return None
        slow, fast = fast, min(2 * fast, largest)
    while fast - slow > 1:
        middle = (slow + fast) // 2
        slow, fast = (slow, middle) if is_faster(middle) else (middle, fast)
    return fast
