"""Measures inference, training steps or the reduction stages, beside timm's dense model.

    python -m tools.benchmark --what model --keep-rate 0.7 0.5 0.3 0.2 --reduction bat topk

Every method at every keep rate is a line of one table, printed and written as .txt, .csv and .json.
"""

import argparse
import datetime
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.utils.misc import ParseKwargs
from torch import Tensor, nn

from arguments import DEFAULT_MODEL, KEYWORD_FLAGS, ArgumentParser, add_switch
from checkpoints import build_model
from models import REDUCTIONS, BATVisionTransformer, count_gmacs
from models.clustering import class_token_importance
from models.reduction import MERGE_WEIGHTS, ReducedTokens, Stage, reduce_tokens
from models.vit import BATBlock
from tools import timing
from tools.timing import Run, Setting, inference, median_ratio, peak_mebibytes, resident_bytes
from utils import InputError, check_writable, init_process

DENSE = "dense"
PREFIX = "bat_"  # a reducing model's registered name is this and the name of timm's dense one
REDUCTION_KEYWORDS = ("reduction_loc", "cluster_ratio", "match_ratio", "merge_weights")
DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FEWEST_REPETITIONS = 10  # a median of fewer says little
# A stage alone is launched faster than it is computed only if several calls queue up on a GPU; on
# a CPU every call stands alone, so that its inputs are no warmer in the caches than in the model.
CALLS_ON_GPU = 20

Line = tuple[dict, dict]  # columns of the table, and lists of raw seconds

# Candidates -------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """What a line of the table is about."""

    reduction: str  # a name in REDUCTIONS, or "dense" for timm's own model
    keep_rate: float  # share of the tokens that leave a stage; 1 for the dense model
    model: nn.Module  # on its device
    gmacs: float  # multiply-accumulates of one image, in 10^9

    def name_line(self, images: Tensor) -> dict:
        """The columns that name the line of this model and a batch (B, 3, height, width)."""
        tokens = [self.model.patch_embed.num_patches]
        if isinstance(self.model, BATVisionTransformer):
            tokens += [stage.num_outputs for stage in self.model.stages()]
        return {
            "reduction": self.reduction,
            "keep": self.keep_rate,
            "size": "x".join(map(str, images.shape[2:])),
            "batch": len(images),
            "tokens": ">".join(map(str, tokens)),
        }


def build_candidates(
    args: argparse.Namespace, img_size: tuple[int, int], setting: Setting
) -> list[Candidate]:
    """timm's dense model, then every reduction at every keep rate, in evaluation mode.

    Raises:
        InputError: a model cannot be built.
    """
    given = {name: getattr(args, name) for name in REDUCTION_KEYWORDS}
    given = {name: value for name, value in given.items() if value is not None}
    lines = [(DENSE, 1.0)]
    lines += [(reduction, rate) for rate in args.keep_rate for reduction in args.reduction]
    candidates = []
    for reduction, rate in lines:
        torch.manual_seed(setting.seed)
        keywords = {"img_size": img_size, **args.model_kwargs}
        if reduction == DENSE:
            model = build_dense(args.model, keywords)
        else:
            keywords |= {"model_name": args.model, "reduction": reduction, "keep_rate": rate}
            model = build_model(keywords | given)
        gmacs = count_gmacs(model)
        candidates.append(Candidate(reduction, rate, model.eval().to(setting.device), gmacs))
    return candidates


def build_dense(name: str, keywords: dict) -> nn.Module:
    """timm's own model of the same shape as a reducing one, with fused attention.

    Raises:
        InputError: there is no such model, or timm's fused attention is switched off.
    """
    dense = name.removeprefix(PREFIX)
    if dense == name or not timm.is_model(dense):
        raise InputError(f"--model must be a reducing model, e.g. {DEFAULT_MODEL}, got '{name}'")
    try:
        model = timm.create_model(dense, **keywords)
    except (TypeError, ValueError, AssertionError) as problem:
        raise InputError(f"cannot build {dense}: {problem}") from problem
    if not all(block.attn.fused_attn for block in model.blocks):
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
    "vs_topk: median over the rounds of the time of topk at this keep rate / own time",
]


def measure_models(
    candidates: Sequence[Candidate], batches: Sequence[Tensor], setting: Setting
) -> Iterator[Line]:
    """Speed, latency and memory of inference: a line per batch (B, 3, height, width)."""
    latencies = _latencies(candidates, batches[0][:1], setting)
    position = {(c.reduction, c.keep_rate): index for index, c in enumerate(candidates)}
    for images in batches:
        runs = [inference(c.model, setting, images) for c in candidates]
        times = timing.time_rounds(runs, setting)
        for run, own, candidate, latency in zip(runs, times, candidates, latencies, strict=True):
            memory = peak_mebibytes(run, setting, resident=resident_bytes(candidate.model))
            speedup = median_ratio(times[0], own)
            limit = candidates[0].gmacs / candidate.gmacs
            topk = position.get(("topk", candidate.keep_rate))
            columns = candidate.name_line(images) | {
                "gmacs": candidate.gmacs,
                "images/s": len(images) / np.median(own),
                **latency,
                "memory_mib": memory,
                "speedup": speedup,
                "limit": limit,
                "of_limit": speedup / limit,
                "vs_topk": np.nan if topk is None else median_ratio(times[topk], own),
            }
            yield columns, {"seconds": own.tolist()}


def _latencies(candidates: Sequence[Candidate], image: Tensor, setting: Setting) -> list[dict]:
    """Percentiles of the time that one image (1, 3, height, width) takes, by candidate."""
    if setting.latency_repetitions == 0:
        return [{} for _ in candidates]
    runs = [inference(c.model, setting, image) for c in candidates]
    times = timing.time_rounds(runs, setting, repetitions=setting.latency_repetitions)
    middle, late = np.percentile(1e3 * times, (50, 95), axis=1)
    return [{"p50_ms": p50, "p95_ms": p95} for p50, p95 in zip(middle, late, strict=True)]


# Training steps ---------------------------------------------------------------------------------

TRAIN_PROTOCOL = [
    "a step: forward, cross-entropy, backward and AdamW on one batch of noise, in training mode",
    "step_ms: median of the rounds; every round runs one step of each candidate, in turn, with "
    "the device synchronised around each step",
    "memory_mib: weights, optimizer state, and the largest sum of tensors alive in one step",
    "time_ratio: median over the rounds of own time / dense time; dense is timm's, with fused "
    "attention; memory_ratio: likewise",
]


def measure_training(
    candidates: Sequence[Candidate], batches: Sequence[Tensor], setting: Setting
) -> Iterator[Line]:
    """Time and memory of a training step: a line per batch (B, 3, height, width)."""
    for images in batches:
        optimizers = [torch.optim.AdamW(c.model.train().parameters()) for c in candidates]
        runs = [
            _training_step(candidate.model, optimizer, images, setting)
            for candidate, optimizer in zip(candidates, optimizers, strict=True)
        ]
        times = timing.time_rounds(runs, setting)
        memory = [
            peak_mebibytes(run, setting, resident=resident_bytes(candidate.model, optimizer))
            for run, candidate, optimizer in zip(runs, candidates, optimizers, strict=True)
        ]
        for candidate, own, mebibytes in zip(candidates, times, memory, strict=True):
            columns = candidate.name_line(images) | {
                "gmacs": candidate.gmacs,
                "step_ms": 1e3 * np.median(own),
                "images/s": len(images) / np.median(own),
                "memory_mib": mebibytes,
                "time_ratio": median_ratio(own, times[0]),
                "memory_ratio": mebibytes / memory[0],
            }
            yield columns, {"seconds": own.tolist()}


def _training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, setting: Setting
) -> Run:
    targets = torch.arange(len(images), device=images.device) % model.num_classes
    scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.dtype == torch.float16)
    forward = timing.compiled(model, setting)

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
    f"each; on a GPU the mean of {CALLS_ON_GPU} calls counts as one",
    "share_N: median over the rounds of the time of stage N / time of the forward pass; share_all: "
    "of their sum",
    "stage_mib: largest sum of tensors that the first stage adds to its inputs; attention_mib: the "
    "same of the attention layer before it; both eager",
]


class StageInputs(NamedTuple):
    """What a forward pass gave to the stage of one block, and to the attention layer before it."""

    query: Tensor  # (B, H, 1, D / H) the class token's
    keys: Tensor  # (B, H, L, D / H) of all tokens
    patches: Tensor  # (B, N, D) after the attention residual
    sizes: Tensor  # (B, N) float32 number of patches that each of them stands for
    normed: Tensor  # (B, L, D) tokens that entered the attention layer


def record_stages(
    model: BATVisionTransformer, images: Tensor, setting: Setting
) -> list[StageInputs]:
    """Runs a forward pass (B, 3, height, width) and says what it gave to each stage."""
    outputs: dict[nn.Module, Tensor] = {}
    stages: list[StageInputs] = []

    def keep(part: nn.Module, inputs: tuple, output: Tensor) -> None:
        outputs[part] = output

    def collect(block: BATBlock, inputs: tuple, output: ReducedTokens) -> None:
        x, sizes = inputs
        patches = (x + outputs[block.drop_path1])[:, block.num_prefix_tokens :]
        sizes = torch.ones(patches.shape[:2], device=x.device) if sizes is None else sizes
        query, keys = outputs[block.attn.q_norm][:, :, :1], outputs[block.attn.k_norm]
        stages.append(StageInputs(query, keys, patches, sizes, outputs[block.norm1]))

    handles = []
    for block in (model.blocks[index] for index in model.reduction_loc):
        parts = (block.norm1, block.attn.q_norm, block.attn.k_norm, block.drop_path1)
        handles += [part.register_forward_hook(keep) for part in parts]
        handles.append(block.register_forward_hook(collect))
    with torch.inference_mode(), setting.autocast():
        model(images)
    for handle in handles:
        handle.remove()
    return stages


def run_stage(block: BATBlock, inputs: StageInputs) -> ReducedTokens:
    """A block's stage alone: the class token's attention row, the groups and the merging."""
    row = class_token_importance(inputs.query, inputs.keys, block.attn.scale)
    importance = row[:, block.num_prefix_tokens :]
    return reduce_tokens(
        Stage(inputs.patches, importance, inputs.sizes, block.stage, block.reduction_seed),
        block.reduction,
        block.keep_rate,
        cluster_ratio=block.cluster_ratio,
        match_ratio=block.match_ratio,
        merge_weights=block.merge_weights,
    )


def measure_stages(
    candidates: Sequence[Candidate], batches: Sequence[Tensor], setting: Setting
) -> Iterator[Line]:
    """Share of the stages in a forward pass: a line per batch and reducing candidate."""
    calls = CALLS_ON_GPU if setting.device.type == "cuda" else 1
    for images in batches:
        for candidate in candidates[1:]:
            model = candidate.model
            blocks = [model.blocks[index] for index in model.reduction_loc]
            inputs = record_stages(model, images, setting)
            stages = [partial(run_stage, block) for block in blocks]
            runs = [inference(model, setting, images)]
            runs += [inference(s, setting, i) for s, i in zip(stages, inputs, strict=True)]
            forward, *alone = timing.time_rounds(runs, setting, calls=calls)
            together = np.sum(alone, axis=0)
            eager = setting._replace(compile_mode=None)
            stage = inference(stages[0], eager, inputs[0])
            attention = inference(blocks[0].attn, eager, inputs[0].normed)
            columns = candidate.name_line(images) | {
                "forward_ms": 1e3 * np.median(forward),
                "stages_ms": 1e3 * np.median(together),
                "share_all": median_ratio(together, forward),
                "stage_mib": peak_mebibytes(stage, eager),
                "attention_mib": peak_mebibytes(attention, eager),
            }
            shares = {f"share_{i}": median_ratio(own, forward) for i, own in enumerate(alone, 1)}
            seconds = [own.tolist() for own in alone]
            yield columns | shares, {"forward_seconds": forward.tolist(), "stage_seconds": seconds}


# Command line -----------------------------------------------------------------------------------

MEASURES = {
    "model": (measure_models, MODEL_PROTOCOL),
    "train": (measure_training, TRAIN_PROTOCOL),
    "stage": (measure_stages, STAGE_PROTOCOL),
}


def _size(text: str) -> tuple[int, int]:
    """(height, width) from "224" or "192x256"."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is neither SIDE nor HEIGHTxWIDTH in pixels")
    return int(parts[0]), int(parts[-1])


def _rate(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text}")
    return float(text)


def _at_least(smallest: int):
    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}, got '{text}'")
        return int(text)

    return parse


def _key_value(text: str) -> str:
    name, equals, value = text.partition("=")
    if not name or not equals or "=" in value:
        raise argparse.ArgumentTypeError(f"takes KEY=VALUE pairs, got '{text}'")
    if name in KEYWORD_FLAGS and name != "num_classes":
        raise argparse.ArgumentTypeError(f"{name}: use {KEYWORD_FLAGS[name]}")
    return text


# fmt: off
def get_parser() -> ArgumentParser:
    """The parser of `python -m tools.benchmark`."""
    parser = ArgumentParser(prog="tools.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=tuple(MEASURES), default="model",
        help="inference, training step, or share of the reduction stages")
    add = parser.add_argument_group("models; every combination is a line").add_argument
    add("--model", default=DEFAULT_MODEL, help="registered reducing model")
    add("--model-kwargs", nargs="*", default={}, type=_key_value, action=ParseKwargs,
        metavar="KEY=VALUE", help="more keywords of all models, e.g. embed_dim=192 depth=6")
    add("--keep-rate", type=_rate, nargs="+", default=[0.7, 0.5, 0.3, 0.2], metavar="RATE",
        help="keep rates to compare, each in (0, 1] and the same in all stages")
    add("--reduction", nargs="+", choices=tuple(REDUCTIONS), default=["bat", "topk"],
        help="methods to compare")
    add("--reduction-loc", type=int, nargs="*", metavar="BLOCK",
        help="indices of the reducing blocks, from 0; default: 3 6 9")
    add("--cluster-ratio", type=float, help="default: 0.4")
    add("--match-ratio", type=float, help="default: 0.1")
    add("--merge-weights", choices=MERGE_WEIGHTS, help="default: importance")
    add("--input-size", type=_size, nargs="+", default=[(224, 224)], metavar="SIZE",
        help="image sizes to compare: SIDE or HEIGHTxWIDTH, in pixels")
    add("--batch-size", type=_at_least(1), nargs="+", default=[16], help="batches to compare")
    group = parser.add_argument_group("how to run")
    add = group.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=tuple(DTYPES), default="float32",
        help="float32 (TF32 off), or autocast to bf16 or fp16 (the weights stay float32)")
    add_switch(group, "--compile", default=False, help="torch.compile, one graph a shape")
    add_switch(group, "--cuda-graphs", default=False, help="--compile as 'reduce-overhead'")
    add("--threads", type=_at_least(1), help="of PyTorch on the CPU")
    add("--repetitions", type=_at_least(FEWEST_REPETITIONS), default=20, help="timed rounds")
    add("--warmup", type=_at_least(1), default=3, help="rounds before them")
    add("--latency-repetitions", type=_at_least(0), default=50,
        help="timed rounds of single images (--what model); 0: no latency")
    add("--seed", type=int, default=0, help="random seed of weights and images")
    add("--output-dir", default="", help="folder for the .txt, .csv and .json; empty: none")
    return parser
# fmt: on


def measure(args: argparse.Namespace, setting: Setting) -> Iterator[Line]:
    """The lines of the benchmark that was asked for, by image size, batch and candidate."""
    for img_size in args.input_size:
        candidates = build_candidates(args, img_size, setting)
        generator = torch.Generator().manual_seed(setting.seed)
        batches = [
            torch.randn(batch_size, 3, *img_size, generator=generator).to(setting.device)
            for batch_size in args.batch_size
        ]
        yield from MEASURES[args.what][0](candidates, batches, setting)


def run(args: argparse.Namespace, command: str) -> int:
    """Measures, prints and writes; returns the exit code."""
    device = init_process(args.device)
    if args.cuda_graphs and device.type != "cuda":
        raise InputError(f"--cuda-graphs needs a GPU, the device is {device}")
    if args.what == "stage" and args.reduction_loc == []:
        raise InputError("--what stage needs a reducing block in --reduction-loc")
    folder = check_writable(args.output_dir) if args.output_dir else None
    if args.threads:
        torch.set_num_threads(args.threads)
    mode = "reduce-overhead" if args.cuda_graphs else "default" if args.compile else None
    names = ("repetitions", "warmup", "latency_repetitions", "seed")
    flags = {name: getattr(args, name) for name in names}
    setting = Setting(device, DTYPES[args.dtype], mode, **flags)
    # Before the measurement: the load is that of other programs.
    about = timing.environment() | {"command": command, "device": str(device)}
    about |= {"dtype": args.dtype, "compile": mode}
    about |= {"repetitions": args.repetitions, "warmup": args.warmup}

    rows, raw = [], []
    for columns, seconds in measure(args, setting):
        rows.append(columns)
        name = {key: columns[key] for key in ("reduction", "keep", "size", "batch")}
        raw.append(name | seconds)

    table, protocol = timing.make_table(rows), MEASURES[args.what][1]
    print(timing.report_text(table, protocol, about))
    if folder is not None:
        stamp = datetime.datetime.fromisoformat(about["date"]).strftime("%Y%m%d-%H%M%S")
        stem = folder / f"{args.what}-{device.type}-{stamp}"
        timing.write_report(stem, table, protocol, about, raw)
        print(f"written: {stem}.txt, .csv, .json")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = get_parser()
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    try:
        return run(args, shlex.join(["python", "-m", "tools.benchmark", *argv]))
    except InputError as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    raise SystemExit(main())
