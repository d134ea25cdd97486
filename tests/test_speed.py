"""Choosing a keep rate by its time. No test asserts a time of this machine."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY_FLAGS, RunMain, build_tiny

from models import speed
from models.speed import MEASURED_RATES, Setting, fast_enough, measure_keep_rates

TIMES = {1.0: 50.0, 0.9: 52.0, 0.7: 40.0, 0.5: 30.0, 0.3: 31.0, 0.1: 20.0}


@pytest.mark.parametrize(
    "target, keep_rate",
    [
        (50, 1.0),
        (49.9, 0.865),
        (46, 0.8),
        (40, 0.7),
        (35.5, 0.6),
        (31, 0.5),
        (25.5, 0.2),
        (20, 0.1),
    ],
)
def test_the_largest_rate_that_is_fast_enough(target: float, keep_rate: float) -> None:
    assert fast_enough(TIMES, target) == pytest.approx(keep_rate, abs=1.1e-3)


def test_a_target_out_of_reach() -> None:
    with pytest.raises(ValueError, match=r"keep rate 0\.1 takes 20 ms"):
        fast_enough(TIMES, 19.9)


def test_every_rate_is_measured_with_the_same_weights(monkeypatch) -> None:
    model = build_tiny(keep_rate=0.6).eval()
    measured = []

    def time_rounds(runs, setting):
        measured.extend(run() for run in runs)
        return torch.arange(1.0, len(runs) + 1)[:, None] / 1e3

    monkeypatch.setattr(speed, "time_rounds", time_rounds)
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    times = measure_keep_rates(model, images, Setting(torch.device("cpu")))
    assert times == pytest.approx({rate: turn for turn, rate in enumerate(MEASURED_RATES, 1)})
    assert model.keep_rates == (0.6,) * len(model.reduction_loc)
    with torch.inference_mode():
        for rate, logits in zip(MEASURED_RATES, measured, strict=True):
            model.set_keep_rate(rate)
            assert torch.equal(logits, model(images))


@pytest.fixture
def saved(tmp_path: Path, call_main: RunMain) -> list[str]:
    """Flags with a file of --save-speed that says `TIMES`."""
    file = tmp_path / "new" / "speed.json"
    flags = ["--describe", *TINY_FLAGS, "--batch-size", "1", "--save-speed", str(file)]
    done = call_main(*flags, "--target-ms", "1e5")
    assert "measuring" in done.stdout and "--target-ms 100000: keep rate 1\n" in done.stdout
    content = json.loads(file.read_text())
    assert [float(rate) for rate in content["milliseconds"]] == list(TIMES)
    content["milliseconds"] = {str(rate): value for rate, value in TIMES.items()}
    file.write_text(json.dumps(content))
    return flags


def test_a_saved_table_is_not_measured_again(saved: list[str], call_main: RunMain) -> None:
    done = call_main(*saved, "--target-ms", "40")
    assert "measuring" not in done.stdout and "--target-ms 40: keep rate 0.7\n" in done.stdout
    assert "40 at 0.7" in done.stdout
    assert "keep rates 0.7" in done.stdout  # what is described


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--target-ms", "1", "--batch-size", "2"], "another batch_size"),
        (["--target-ms", "1", "--reduction", "topk"], "another reduction"),
        (["--target-ms", "0.01"], "--target-ms 0.01: even keep rate 0.1 takes 20 ms"),
        (["--target-ms", "1", "--reduction-loc"], "a model that reduces"),
        (["--target-ms", "1", "--target-gmacs", "1"], "not with --target-gmacs"),
    ],
)
def test_no_answer(saved: list[str], call_main: RunMain, flags: list[str], expected: str) -> None:
    done = call_main(*saved, *flags)
    assert done.returncode == 2 and expected in done.stderr


def test_a_damaged_table(tmp_path: Path, call_main: RunMain) -> None:
    for content in ("", "[]", "{}", '{"of": 1}'):
        file = tmp_path / "speed.json"
        file.write_text(content)
        done = call_main("--describe", *TINY_FLAGS, "--target-ms", "1", "--save-speed", file)
        assert done.returncode == 2 and f"--save-speed {file}: " in done.stderr
        assert len(done.stderr.splitlines()) == 1
