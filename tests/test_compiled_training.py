"""main.py --compile: the numbers of an eager run, in few graphs, whatever the keep rate does."""

from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from conftest import PLAIN_FLAGS, RUN_FLAGS, TINY_FLAGS, Result, Run, RunMain, read_log
from torch import nn

from utils import find_amp

SHRINKING = ["--shrink-epochs", "1", "--shrink-start-epoch", "0"]


def train(call: RunMain, data_path: Path, folder: Path, *more: object, **options) -> Result:
    done = call(
        *TINY_FLAGS, *RUN_FLAGS, *PLAIN_FLAGS, "--data-path", data_path, "--epochs", "3",
        "--lr", "2e-3", "--unscale-lr", "--warmup-epochs", "0", "--keep-rate", "0.5",
        "--no-model-ema", "--output-dir", folder, *more, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """Counts the graphs of torch.compile, which are traced but not turned into C++."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("schedule", "most"), [([], 3), (SHRINKING, 4)], ids=["fixed", "shrinking"]
)
def test_compiled_run_equals_the_eager_one(
    call_main: RunMain, data_path: Path, tmp_path: Path, graphs: dict, schedule: list, most: int
) -> None:
    """A graph a keep rate for training and two for evaluation, whose last batch is smaller."""
    flags = ["--batch-size", "16", *schedule]
    train(call_main, data_path, tmp_path / "compiled", *flags, "--compile")
    assert 0 < graphs["unique_graphs"] <= most
    if not schedule:  # an eager run's keep rate shrinks within an epoch too
        train(call_main, data_path, tmp_path / "eager", *flags)
        for ours, theirs in zip(
            read_log(tmp_path / "compiled"), read_log(tmp_path / "eager"), strict=True
        ):
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-4)
            assert ours["test_loss"] == pytest.approx(theirs["test_loss"], abs=1e-4)
    else:
        rates = [entry["keep_rate"] for entry in read_log(tmp_path / "compiled")]
        assert rates == [[0.5, 0.5]] * 3  # of the evaluations; the first epoch trains at 1


def test_two_compiled_processes(
    run_main: RunMain, call_main: RunMain, data_path: Path, tmp_path: Path
) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    # Four images divide both sets, so that every process makes two graphs.
    small = ["--model-kwargs", "patch_size=8", "embed_dim=32", "depth=1", "num_heads=2"]
    small += ["--reduction-loc", "0", "--epochs", "2", "--batch-size"]
    train(run_main, data_path, tmp_path / "two", *small, "4", "--compile", launcher=launcher)
    train(call_main, data_path, tmp_path / "one", *small, "8")
    for two, one in zip(read_log(tmp_path / "two"), read_log(tmp_path / "one"), strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-4)
        assert two["test_acc1"] == one["test_acc1"]


def test_evaluation_is_compiled(call_main: RunMain, data_path: Path, graphs: dict) -> None:
    flags = ["--eval", *TINY_FLAGS, *RUN_FLAGS, "--data-path", data_path, "--batch-size", "24"]
    eager = call_main(*flags)
    assert graphs["unique_graphs"] == 0
    compiled = call_main(*flags, "--compile")
    assert graphs["unique_graphs"] == 1
    assert compiled.stdout.splitlines()[-1] == eager.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("has_bf16", "expected"), [(True, "bf16"), (False, "fp16")], ids=["bf16", "no bf16"]
)
def test_autocast_is_on_by_default_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: has_bf16)
    assert find_amp("auto", torch.device("cuda")) == expected
    assert find_amp("auto", torch.device("cpu")) == "off"
    assert find_amp("fp16", torch.device("cpu")) == "fp16"


def test_autocast_is_printed(trained: Run) -> None:
    assert trained.output.startswith("device: cpu, autocast: off\n")
