"""Speed and memory of models and of their reduction stages, beside timm's dense model.

python -m tools.benchmark --what model --keep-rate 0.7 0.5 0.3 0.2 --reduction bat topk
"""

import sys
from argparse import SUPPRESS, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from arguments import (
    ArgumentParser,
    add_model_arguments,
    at_least,
    model_arguments,
    random_seed,
    reduction_variant,
    variant_name,
)
from checkpoints import build_model
from models import REDUCTIONS, ReducingTransformer, count_gmacs
from models.reduction import ReducedTokens, get_reduction
from models.speed import Call, Setting, compiled, inference, time_rounds
from models.vit import Attended, ReducingBlock, find_importance, project, timm_class
from tools import timing
from tools.timing import median_ratio, peak_mebibytes, resident_bytes
from utils import InputError, find_device, run_script

HELP = """Measures inference, training steps or the reduction stages of models with random weights,
beside timm's dense model. Every method at every keep rate is a line of one table, printed and
written as .txt, .csv and .json."""
DENSE = "dense"
PREFIX = "bat_"  # the registered models' names are this and the name of timm's dense one
DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FEWEST_REPETITIONS = 10  # a median of fewer says little

# Candidates -------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """What a line of the table is about."""

    reduction: str  # a method, with its settings, or "dense" for timm's own model
    keep_rate: float  # share of the tokens that leave a stage; 1 for the dense model
    model: nn.Module  # on its device
    gmacs: float  # multiply-accumulates of one image, in 10^9

    def name_line(self, images: Tensor) -> dict:
        """The columns that name the line of this model and a batch (B, 3, height, width)."""
        tokens = [self.model.patch_embed.num_patches]
        if isinstance(self.model, ReducingTransformer):
            tokens += [stage.num_outputs for stage in self.model.stages()]
        return {
            "reduction": self.reduction,
            "keep": self.keep_rate,
            "size": "x".join(map(str, images.shape[2:])),
            "batch": len(images),
            "tokens": ">".join(map(str, tokens)),
        }


def build_candidates(
    args: Namespace, img_size: tuple[int, int], setting: Setting
) -> list[Candidate]:
    """timm's dense model, then every reduction at every keep rate, in evaluation mode."""
    lines = [(DENSE, 1.0)]
    lines += [(reduction, rate) for rate in args.keep_rate for reduction in args.reduction]
    candidates = []
    for reduction, rate in lines:
        own = {"input_size": img_size, "keep_rate": None, "reduction": None}
        variant = {} if reduction == DENSE else {"keep_rate": rate} | reduction_variant(reduction)
        model_args = model_arguments(Namespace(**vars(args) | own), None, variant)
        torch.manual_seed(setting.seed)
        model = build_dense(model_args) if reduction == DENSE else build_model(model_args)
        gmacs = count_gmacs(model)
        candidates.append(Candidate(reduction, rate, model.eval().to(setting.device), gmacs))
    return candidates


def build_dense(model_args: dict) -> nn.Module:
    """timm's own model of the same shape as a reducing one, with fused attention."""
    dense = model_args["model_name"].removeprefix(PREFIX)
    model = build_model(model_args | {"model_name": dense}, reducing=False)
    if not all(getattr(module, "fused_attn", True) for module in model.modules()):
        raise InputError("timm's fused attention is switched off: unset TIMM_FUSED_ATTN")
    return model


# Inference --------------------------------------------------------------------------------------

MODEL_PROTOCOL = [
    "images/s: batch / median time of the rounds; every round runs each candidate once, in turn, "
    "with the device synchronised around each run",
    "p50_ms, p95_ms: latency of one image, in rounds of their own",
    "memory_mib: weights and the largest sum of tensors alive in one forward pass, at this batch",
    "speedup: median over the rounds of dense time / own time; dense is timm's, fused attention",
    "limit: dense gmacs / own gmacs; of_limit: speedup / limit",
    "limit_2: dense time / (read_ms + the rest of the dense time, shrunk by the limit), where "
    "read_ms is the time of reading all weights once, which no token saves; of_limit_2: likewise; "
    "float32 only",
    "vs_topk: median over the rounds of the time of topk at this keep rate / own time",
]


def measure_models(
    candidates: Sequence[Candidate], batches: Sequence[Tensor], setting: Setting
) -> Iterator[dict]:
    """Speed, latency and memory of inference: a line per batch (B, 3, height, width)."""
    latencies = _latencies(candidates, batches[0][:1], setting)
    position = {(c.reduction, c.keep_rate): index for index, c in enumerate(candidates)}
    for images in batches:
        runs = [inference(c.model, setting, images) for c in candidates]
        weights = parameters_to_vector(candidates[0].model.parameters()).detach()
        *times, read = time_rounds([*runs, weights.sum], setting).numpy()
        if setting.dtype is not None:  # autocast reads and writes them more than once
            read = np.full_like(read, np.nan)
        for run, own, candidate, latency in zip(runs, times, candidates, latencies, strict=True):
            memory = peak_mebibytes(run, setting, resident=resident_bytes(candidate.model))
            speedup = median_ratio(times[0], own)
            limit = candidates[0].gmacs / candidate.gmacs
            limit_2 = median_ratio(times[0], read + (times[0] - read) / limit)
            topk = position.get(("topk", candidate.keep_rate))
            yield candidate.name_line(images) | {
                "gmacs": candidate.gmacs,
                "images/s": len(images) / np.median(own),
                **latency,
                "memory_mib": memory,
                "speedup": speedup,
                "limit": limit,
                "of_limit": speedup / limit,
                "read_ms": 1e3 * np.median(read),
                "limit_2": limit_2,
                "of_limit_2": speedup / limit_2,
                "vs_topk": np.nan if topk is None else median_ratio(times[topk], own),
                "seconds": own.tolist(),
            }


def _latencies(candidates: Sequence[Candidate], image: Tensor, setting: Setting) -> list[dict]:
    """Percentiles of the time that one image (1, 3, height, width) takes, by candidate."""
    if setting.latency_repetitions == 0:
        return [{} for _ in candidates]
    runs = [inference(c.model, setting, image) for c in candidates]
    times = time_rounds(runs, setting, repetitions=setting.latency_repetitions).numpy()
    middle, late = np.percentile(1e3 * times, (50, 95), axis=1)
    return [{"p50_ms": p50, "p95_ms": p95} for p50, p95 in zip(middle, late, strict=True)]


# Training steps ---------------------------------------------------------------------------------

TRAIN_PROTOCOL = [
    "a step: forward, cross-entropy, backward and AdamW on one batch of noise, in training mode",
    "step_ms: median of the rounds; every round runs one step of each candidate, in turn, with the "
    "device synchronised around each step",
    "memory_mib: weights, optimizer state, and the largest sum of tensors alive in one step",
    "time_ratio: median over the rounds of own time / dense time; dense is timm's, with fused "
    "attention; memory_ratio: likewise",
]


def measure_training(
    candidates: Sequence[Candidate], batches: Sequence[Tensor], setting: Setting
) -> Iterator[dict]:
    """Time and memory of a training step: a line per batch (B, 3, height, width)."""
    for images in batches:
        optimizers = [torch.optim.AdamW(c.model.train().parameters()) for c in candidates]
        models = [(c.model, optimizer) for c, optimizer in zip(candidates, optimizers, strict=True)]
        runs = [training_step(*pair, images, setting) for pair in models]
        times = time_rounds(runs, setting).numpy()
        memory = [
            peak_mebibytes(run, setting, resident=resident_bytes(*pair))
            for run, pair in zip(runs, models, strict=True)
        ]
        for candidate, own, mebibytes in zip(candidates, times, memory, strict=True):
            yield candidate.name_line(images) | {
                "gmacs": candidate.gmacs,
                "step_ms": 1e3 * np.median(own),
                "images/s": len(images) / np.median(own),
                "memory_mib": mebibytes,
                "time_ratio": median_ratio(own, times[0]),
                "memory_ratio": mebibytes / memory[0],
                "seconds": own.tolist(),
            }


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, setting: Setting
) -> Call:
    """A call that trains the model for one step on images (B, 3, height, width)."""
    targets = torch.arange(len(images), device=images.device) % model.num_classes
    scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.dtype == torch.float16)
    forward = compiled(model, setting)

    def step() -> None:
        with setting.autocast():
            loss = F.cross_entropy(forward(images), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


# Reduction stages -------------------------------------------------------------------------------

STAGE_PROTOCOL = [
    "a stage: the class token's attention row, the choice of the groups and the merging, run alone "
    "on the inputs that a forward pass gave it",
    "every round runs the forward pass and each stage in turn, with the device synchronised around "
    "each; on a GPU the times are those of the kernels, means of all rounds, since launching a "
    "stage alone takes longer than computing it",
    "share_N: median over the rounds of the time of stage N / time of the forward pass; share_all: "
    "of their sum",
    "stage_mib: largest sum of tensors that the first stage adds to its inputs; attention_mib: the "
    "same of the attention layer before it; both eager",
]


class Recorded(NamedTuple):
    """What a forward pass gave to the stage of one block, and to the attention layer before it."""

    queries: Tensor  # (B, H, L, D / H) queries of all tokens
    attended: Attended  # its keys are those of all tokens
    sizes: Tensor | None  # (B, N) float32 number of patches of each token; None: one
    normed: Tensor  # (B, L, D) tokens that entered the attention layer


def record_stages(model: ReducingTransformer, images: Tensor, setting: Setting) -> list[Recorded]:
    """Runs a forward pass (B, 3, height, width) and says what it gave to each stage."""
    inputs: dict[nn.Module, tuple] = {}
    blocks = [model.blocks[index] for index in model.reduction_loc]
    for block in blocks:
        if not isinstance(block, Block | EvaBlock):
            name = timm_class(block).__name__
            raise InputError(f"--what stage takes blocks that normalise first, not a {name}")
    keep = lambda block, given: inputs.update({block: given})  # noqa: E731
    handles = [block.register_forward_pre_hook(keep) for block in blocks]
    stages = []
    with torch.inference_mode(), setting.autocast():
        model(images)
        for block in blocks:
            x, rope, sizes = inputs[block]
            normed = block.norm1(x)
            attended = block.attend(x, rope, block.attention_bias(sizes))
            stages.append(Recorded(project(block.attn, normed)[0], attended, sizes, normed))
    for handle in handles:
        handle.remove()
    return stages


def run_stage(block: ReducingBlock, inputs: Recorded) -> ReducedTokens:
    """A block's stage alone: the importance, the groups and the merging."""
    attended, kind = inputs.attended, block.settings.importance
    bias = block.attention_bias(inputs.sizes)
    row = find_importance(inputs.queries, attended.keys, block.attn.scale, kind, bias)
    return block.reduce(attended._replace(importance=row), inputs.sizes)


def measure_stages(
    candidates: Sequence[Candidate], batches: Sequence[Tensor], setting: Setting
) -> Iterator[dict]:
    """Share of the stages in a forward pass: a line per batch and reducing candidate."""
    for images in batches:
        for candidate in candidates[1:]:
            model = candidate.model
            first = model.blocks[model.reduction_loc[0]]
            inputs = record_stages(model, images, setting)
            runs = [inference(model, setting, images)]
            for index, given in zip(model.reduction_loc, inputs, strict=True):
                runs.append(inference(partial(run_stage, model.blocks[index]), setting, given))
            forward, *alone = _stage_seconds(runs, setting)
            together = np.sum(alone, axis=0)
            eager = setting._replace(compile_mode=None)
            stage = inference(partial(run_stage, first), eager, inputs[0])
            attention = inference(first.attn, eager, inputs[0].normed)
            shares = {f"share_{i}": median_ratio(own, forward) for i, own in enumerate(alone, 1)}
            yield candidate.name_line(images) | {
                "forward_ms": 1e3 * np.median(forward),
                "stages_ms": 1e3 * np.median(together),
                "share_all": median_ratio(together, forward),
                "stage_mib": peak_mebibytes(stage, eager),
                "attention_mib": peak_mebibytes(attention, eager),
                **shares,
                "forward_seconds": forward.tolist(),
                "stage_seconds": [own.tolist() for own in alone],
            }


def _stage_seconds(runs: Sequence[Call], setting: Setting) -> np.ndarray:
    """(runs, rounds) seconds of each run in each round; on a GPU (runs, 1) of its kernels."""
    if setting.device.type != "cuda":
        return time_rounds(runs, setting).numpy()
    kernels = [timing.operations(run, setting, calls=setting.repetitions) for run in runs]
    return np.array([[sum(seconds for _, seconds in own.values())] for own in kernels])


# Operations -------------------------------------------------------------------------------------

PROFILED_CALLS = 10
MOST_OPERATIONS = 10  # of a candidate
LONGEST_NAME = 80  # of an operation; some of a GPU's kernels have ten times as many letters
OPERATIONS_PROTOCOL = [
    f"the {MOST_OPERATIONS} operations (on a GPU: kernels) that take most of a forward pass; ms: "
    f"without what they call, mean of {PROFILED_CALLS} forward passes under PyTorch's profiler",
    "share: of the time of all operations; calls: of the operation in one forward pass",
]


def measure_operations(
    candidates: Sequence[Candidate], batches: Sequence[Tensor], setting: Setting
) -> Iterator[dict]:
    """Where the time of inference goes: a line per batch, candidate and operation."""
    for images in batches:
        for candidate in candidates:
            run = inference(candidate.model, setting, images)
            own_times = timing.operations(run, setting, calls=PROFILED_CALLS)
            total = sum(seconds for _, seconds in own_times.values())
            for name, (calls, seconds) in list(own_times.items())[:MOST_OPERATIONS]:
                shares = {"ms": 1e3 * seconds, "share": seconds / total, "calls": calls}
                short = "".join(name.split())[:LONGEST_NAME]
                yield candidate.name_line(images) | {"operation": short} | shares


# Command line -----------------------------------------------------------------------------------

MEASURES = {
    "model": (measure_models, MODEL_PROTOCOL),
    "train": (measure_training, TRAIN_PROTOCOL),
    "stage": (measure_stages, STAGE_PROTOCOL),
    "operation": (measure_operations, OPERATIONS_PROTOCOL),
}


def _size(text: str) -> tuple[int, int]:
    """(height, width) from "224" or "192x256"."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ArgumentTypeError(f"'{text}' is neither SIDE nor HEIGHTxWIDTH in pixels")
    return int(parts[0]), int(parts[-1])


# fmt: off
def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m tools.benchmark", description=HELP, conflict_handler="resolve"
    )
    parser.add_argument("--what", choices=tuple(MEASURES), default="model",
        help="inference, training step, share of the reduction stages, or the operations that "
        "inference spends its time on")
    add_model_arguments(parser)  # of these, the next ones are replaced
    parser.add_argument("--ema", action="store_true", help=SUPPRESS)
    add = parser.add_argument_group("what to compare; every combination is a line").add_argument
    add("--keep-rate", "--base-keep-rate", type=float, nargs="+", default=[0.7, 0.5, 0.3, 0.2],
        metavar="RATE", help="keep rates, each in (0, 1] and the same in all stages")
    add("--reduction", nargs="+", type=variant_name, default=["bat", "topk"], metavar="METHOD",
        help=f"methods: {', '.join(REDUCTIONS)}; with settings: METHOD,NAME=VALUE,...")
    add("--input-size", type=_size, nargs="+", default=[(224, 224)], metavar="SIZE",
        help="image sizes, SIDE or HEIGHTxWIDTH in pixels; default: 224")
    add("--batch-size", type=at_least(1), nargs="+", default=[16], help="images at a time")
    add("--nb-classes", type=at_least(1), help="classes of all models; default: 1000")
    add = parser.add_argument_group("how to run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=tuple(DTYPES), default="float32",
        help="float32 (matrix products without TF32), or autocast to bf16 or fp16, the weights "
        "staying float32")
    add("--compile", nargs="?", const="default", metavar="MODE",
        choices=("default", *timing.GRAPH_MODES),
        help="torch.compile, one graph a shape; MODE: default, reduce-overhead (CUDA graphs), "
        "max-autotune")
    add("--threads", type=at_least(1), help="of PyTorch on the CPU")
    add("--repetitions", type=at_least(FEWEST_REPETITIONS), default=20,
        help=f"timed rounds, at least {FEWEST_REPETITIONS}")
    add("--warmup", type=at_least(1), default=3, help="rounds before them")
    add("--latency-repetitions", type=at_least(0), default=50,
        help="timed rounds of single images (--what model); 0: no latency")
    add("--seed", type=random_seed, default=0, help="random seed of weights and images")
    add("--output-dir", default="", help="folder for the .txt, .csv and .json; empty: none")
    return parser
# fmt: on


def make_setting(args: Namespace) -> Setting:
    """The device and the settings that the flags name; InputError when they do not go together."""
    device = find_device(args.device)
    if args.compile == "reduce-overhead" and device.type != "cuda":
        raise InputError(f"--compile reduce-overhead needs a GPU, the device is {device}")
    if args.what == "stage" and args.reduction_loc == []:
        raise InputError("--what stage needs a reducing block in --reduction-loc")
    if args.what == "stage" and any(
        get_reduction(reduction_variant(name)["reduction"]).waits for name in args.reduction
    ):
        raise InputError("--what stage: the stages of evo stand between blocks")
    if args.ema:
        raise InputError("--ema needs a checkpoint, but these weights are random")
    if args.threads:
        torch.set_num_threads(args.threads)
    names = ("repetitions", "warmup", "latency_repetitions", "seed")
    flags = {name: getattr(args, name) for name in names}
    return Setting(device, DTYPES[args.dtype], args.compile, **flags)


def measure(args: Namespace, setting: Setting) -> Iterator[dict]:
    """The lines of the benchmark that was asked for, by image size, batch and candidate."""
    for img_size in args.input_size:
        candidates = build_candidates(args, img_size, setting)
        generator = torch.Generator().manual_seed(setting.seed)
        batches = [
            torch.randn(batch_size, 3, *img_size, generator=generator).to(setting.device)
            for batch_size in args.batch_size
        ]
        yield from MEASURES[args.what][0](candidates, batches, setting)


def run(args: Namespace) -> int:
    """Measures, prints and writes; returns the exit code."""
    setting = make_setting(args)
    about = timing.environment()  # before the measurement: the load is that of other programs
    about |= {"device": str(setting.device), "compile": setting.compile_mode}
    about |= {name: getattr(args, name) for name in ("dtype", "repetitions", "warmup")}
    protocol = MEASURES[args.what][1]
    timing.report(measure(args, setting), protocol, about, args.output_dir, args.what)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_script(get_args_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
