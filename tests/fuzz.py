# ruff: noqa: E402
"""Odd command lines and damaged checkpoints by the hundred; run by hand, not by pytest.

    python tests/fuzz.py command-lines --number 500 --seed 0
    python tests/fuzz.py checkpoints --number 300 --seed 0

A case passes when it ends in time, with a documented exit code, without a traceback, bad input on
one line of standard error, and no file outside the folders that its flags name; a checkpoint that
is damaged in its bytes is refused or reads as the original. Prints every failure with its command,
by cause; exit code 1 if there is any.
"""

import argparse
import contextlib
import inspect
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}

import torch
from conftest import CLASSES, COLOURS, PLAIN_FLAGS, RUN_FLAGS, TINY_FLAGS, write_images
from fault_helpers import assert_identical
from timm.models.vision_transformer import VisionTransformer
from timm.optim import list_optimizers

from checkpoints import load_checkpoint, model_from_checkpoint
from models import ReducingTransformer
from utils import InputError

SECONDS, MEMORY = 20, 3 * 2**30  # of one case; the memory is beside what the imports took
EXIT_CODES, EXIT_OTHER = (0, 1, 2, 3, 4, 75), 9
SKIPPED = ("help", "download", "compile")  # another program's work, or minutes
ODD = (
    "", " ", "0", "1", "2", "-1", "3.7", "-0.5", "0.5", "1e-9", "1e308", "nan", "inf", "-inf", "x",
    "2147483648", "9" * 25, "None", "True", "[]", "(1, 2)", "{}", "é\n☃", "a=b", "--", "x" * 300,
    "y" * 5000, "~nobody", "/dev/null", "/dev/zero", "/dev/null/x", "x/../y", "http://", "%s",
)  # fmt: skip
MORE = {
    "device": ("meta", "mps", "cuda", "cuda:9", "cpu:1"),
    "model": ("resnet18", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
    "opt": tuple(list_optimizers()),
    "sched": ("none", "plateau", "step", "multistep", "tanh", "poly"),
    "aa": ("v0", "original", "augmix", "3a", "rand-m99-n99-mstd99", "rand-n-1", "rand--"),
    "checkpoint_interval": ("1", "1m", "0.00001m", "-1m"),
}
FEW = ("num_workers", "threads")  # not thousands: they would be started
KEYWORDS = sorted({
    *inspect.signature(VisionTransformer).parameters,
    *inspect.signature(ReducingTransformer).parameters,
    "pretrained", "pretrained_cfg", "checkpoint_path", "features_only", "out_indices", "no_such",
})  # fmt: skip


class Outcome(NamedTuple):
    command: str
    code: int | str  # "hang": it had to be killed
    cause: str  # as `find_cause` says it


# One case in a process of its own ----------------------------------------------------------------


def run_case(command: str, body: Callable[[], int | None], argv: list[str], root: Path) -> Outcome:
    """Runs `body` in a fork, in an empty folder and within the limits, and judges how it ended."""
    folder, outputs = root / "empty", (root / "stdout", root / "stderr")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    before = set(os.listdir(REPOSITORY))
    if (pid := os.fork()) == 0:
        _child(body, folder, outputs)
    end, asked = time.monotonic() + SECONDS, False
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > end:  # a long run is in order if it stops when asked to
            os.kill(pid, signal.SIGKILL if asked else signal.SIGTERM)
            asked, end = True, time.monotonic() + SECONDS
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # loader workers
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = "hang" if asked and code != 75 else code
    strangers = {name for name in os.listdir(folder) if not any(name in word for word in argv)}
    strangers |= set(os.listdir(REPOSITORY)) - before
    printed = [path.read_text(errors="replace") for path in outputs]
    return Outcome(command, code, find_cause(code, *printed, strangers))


def _child(body: Callable[[], int | None], folder: Path, outputs: tuple[Path, Path]) -> None:
    os.setsid()
    os.chdir(folder)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, [pages * resource.getpagesize() + MEMORY] * 2)
    code = 1
    try:
        code = body() or 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def find_cause(code: int | str, output: str, errors: str, strangers: set[str]) -> str:
    """What is wrong, in words that are the same for the same cause; "": nothing."""
    lines = re.sub(r"'[^'\n]*'", "'...'", errors.strip()).splitlines() or [""]
    if "Traceback" in output + errors:
        frames = re.findall(rf'File "{REPOSITORY}/(?!tests/fuzz)(.*)", line \d+, in (.*)', errors)
        return f"traceback in {':'.join((frames or [('?', '?')])[-1])}: {lines[-1]:.90}"
    if code not in EXIT_CODES:
        return f"exit code {code}: {lines[-1]:.90}"
    if strangers:
        return f"files outside the output folder: {', '.join(sorted(strangers)):.90}"
    if code == 2 and (len(lines) > 1 or not lines[0]):
        return f"{len(lines)} lines of errors: {lines[0]:.90}"
    return ""


# Command lines -----------------------------------------------------------------------------------


def make_good_run(root: Path) -> list[str]:
    """Writes a small data set and a run on it, root/run; returns the flags of its data."""
    data = write_images(root / "data", dict(zip(CLASSES[:2], COLOURS[:2], strict=True)))
    flags = ["--data-path", str(data), "--batch-size", "4"]
    argv = [*TINY_FLAGS, *RUN_FLAGS, *flags, "--epochs", "1", "--output-dir", str(root / "run")]
    outcome = run_case("", partial(import_module("main").main, argv), argv, root)
    assert outcome[1:] == (0, ""), outcome
    return flags


def good_command_lines(root: Path) -> list[list[str]]:
    """One or more of every script; the first word is its module."""
    data, run = make_good_run(root), str(root / "run")
    checkpoint, best = f"{run}/checkpoint.pth", f"{run}/best.pth"
    out, light = ["--output-dir", "out"], ["--device", "cpu", "--num-workers", "0"]
    train = ["main", *RUN_FLAGS, *data, *out, "--epochs", "1"]
    tool = [*data[:2], "--checkpoint", best, *out]
    timed = ["--repetitions", "10", "--warmup", "1", "--latency-repetitions", "0"]
    return [
        [*train, *TINY_FLAGS, *PLAIN_FLAGS],
        [*train, *TINY_FLAGS],
        [*train, *TINY_FLAGS, "--finetune", best],
        [*train, "--resume", checkpoint],
        [*train, "--resume", best, "--eval"],
        ["main", *TINY_FLAGS, "--describe"],
        ["visualize_mask", *tool, *light[:2], "--num-images", "1"],
        ["tools.sweep", *tool, *light, "--keep-rate", "1", "0.5"],
        ["tools.diversity", *tool, *light, "--num-images", "4"],
        ["tools.tokens", *tool, *light, "--num-images", "2"],
        ["tools.benchmark", *TINY_FLAGS, *light[:2], *out, *timed, "--batch-size", "1"],
        ["tools.export", "--checkpoint", best, "--output", "out.pt2"],
        ["tools.table", run, "--baseline", run, *out],
    ]


def odd_words(rng: random.Random, action: argparse.Action) -> list[str]:
    """A flag with values that it may not like, mostly of its type."""
    values = [*ODD, *MORE.get(action.dest, ()) * 3, *map(str, action.choices or ())]
    if action.dest in FEW:
        values = [value for value in values if len(value) < 4]
    if action.type is not None and rng.random() < 0.8:
        values = [value for value in values if _converts(action, value)] or values
    flag = rng.choice(action.option_strings or [""])
    if action.nargs is None and flag:
        return [f"{flag}={rng.choice(values)}"]
    if action.dest == "model_kwargs":
        chosen = [f"{rng.choice(KEYWORDS)}={rng.choice(values)}" for _ in range(rng.randint(1, 2))]
        return [flag, *TINY_FLAGS[-4:], *chosen]
    count = action.nargs if isinstance(action.nargs, int) else rng.randint(1, 3)
    return [*filter(None, [flag]), *rng.choices(values, k=count)]


def _converts(action: argparse.Action, value: str) -> bool:
    with contextlib.suppress(Exception):
        action.type(value)
        return True
    return False


def fuzz_command_lines(rng: random.Random, number: int, root: Path) -> Iterator[Outcome]:
    """Every flag of every script in turn, alone or with another one, on a good command line."""
    cases = []
    for module, *argv in good_command_lines(root):
        actions = import_module(module).get_args_parser()._actions
        actions = [action for action in actions if action.dest not in SKIPPED]
        often = [action for action in actions if action.dest == "model_kwargs"] * 20
        cases += [(module, argv, actions, action) for action in actions + often]
    rng.shuffle(cases)
    for index in range(number):
        module, argv, actions, action = cases[index % len(cases)]
        words = odd_words(rng, action)
        if rng.random() < 0.4:
            words += odd_words(rng, rng.choice(actions))
        argv = [*argv, *words]
        body = partial(import_module(module).main, argv)
        yield run_case(shlex.join([module, *argv]), body, argv, root)


# Checkpoints -------------------------------------------------------------------------------------


def damage_bytes(rng: random.Random, path: Path) -> str:
    """Changes bytes of a file, or its archive's records; says how."""
    kind = rng.choice(("flip", "flip near the end", "cut", "append", "twice", "byte order"))
    if kind in ("twice", "byte order"):
        with zipfile.ZipFile(path) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
        name, content = rng.choice(records)
        if kind == "twice":
            records.insert(rng.randrange(len(records)), (name, rng.randbytes(len(content))))
        else:
            records = [(n, b"big" if n.endswith("/byteorder") else c) for n, c in records]
        with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):
            for record in records:
                archive.writestr(*record)
        return f"{kind}: {name}"
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\1\2")
    place = rng.randrange(directory if kind == "flip near the end" else 0, len(data))
    if kind == "cut":
        del data[place:]
    elif kind == "append":
        data += rng.randbytes(place % 1000 + 1)
    else:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{kind}: byte {place}"


def odd_objects() -> list[object]:
    return [
        None, True, 0, -1, 10**30, 2**63, math.nan, math.inf, "", "x" * 300, [], {}, (), [[]],
        {"a": 1}, {1: 2}, ["a", 2], torch.tensor(3), torch.tensor(math.nan), torch.zeros(0),
        torch.zeros(2, 3), torch.zeros(1).expand(10**6, 10**6), torch.ones(3, dtype=torch.int8),
        torch.ones(2, 2) * 1j, torch.eye(3).to_sparse(), torch.full((32,), math.nan),
    ]  # fmt: skip


def damage_meaning(rng: random.Random, path: Path) -> str:
    """Replaces one value of a checkpoint, at any depth, or leaves it out; says which."""
    whole = torch.load(path, weights_only=True)
    parent, keys = whole, [rng.choice(list(whole))]
    while isinstance(parent[keys[-1]], dict) and parent[keys[-1]] and rng.random() < 0.6:
        parent = parent[keys[-1]]
        keys.append(rng.choice(list(parent)))
    parent[keys[-1]] = odd = rng.choice(odd_objects())
    if rng.random() < 0.1:
        odd = parent.pop(keys[-1])
    torch.save(whole, path)
    return f"{'.'.join(map(str, keys))}: {odd!r:.60}"


def read_back(path: Path, original: dict | None) -> int:
    """Reads a checkpoint and builds its model; with an `original` the contents must be the same."""
    try:
        checkpoint = load_checkpoint(path)
        model_from_checkpoint(checkpoint, source=path.name)
    except InputError as problem:
        print(problem, file=sys.stderr)
        return 2
    try:
        if original is not None:
            assert_identical(checkpoint, original)
        return 0
    except AssertionError:
        print("read with other contents", file=sys.stderr)
        return EXIT_OTHER


def fuzz_checkpoints(rng: random.Random, number: int, root: Path) -> Iterator[Outcome]:
    """Half of them damaged in bytes, half in meaning; each is read, and then given to main.py."""
    flags = [*RUN_FLAGS, *make_good_run(root), "--epochs", "2"]
    good, path = root / "run" / "checkpoint.pth", root / "damaged.pth"
    original = load_checkpoint(good)
    uses = (["--eval", "--resume"], ["--output-dir", "out", "--resume"], ["--finetune"])
    for index in range(number):
        shutil.copy(good, path)
        what = (damage_meaning if index % 2 else damage_bytes)(rng, path)
        read = partial(read_back, path, None if index % 2 else original)
        yield run_case(f"read_back: {what}", read, [], root)
        argv = [*flags, *rng.choice(uses), str(path)]
        body = partial(import_module("main").main, argv)
        yield run_case(f"{shlex.join(['main', *argv])}: {what}", body, argv, root)


def main() -> int:
    attacks = {"command-lines": fuzz_command_lines, "checkpoints": fuzz_checkpoints}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=attacks)
    parser.add_argument("--number", type=int, default=100, help="of command lines or checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        outcomes = list(attacks[args.what](random.Random(args.seed), args.number, Path(folder)))
    commands = defaultdict(list)
    for outcome in outcomes:
        commands[outcome.cause].append(outcome.command)
    num_good = len(commands.pop("", []))
    for cause, failed in sorted(commands.items(), key=lambda item: -len(item[1])):
        print(f"{len(failed)} x {cause}", *(f"    {each:.800}" for each in failed), "", sep="\n")
    codes = Counter(outcome.code for outcome in outcomes)
    print(f"{len(outcomes)} cases, {len(outcomes) - num_good} failed; by exit code: {dict(codes)}")
    return int(num_good < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
