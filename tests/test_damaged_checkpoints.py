"""A damaged checkpoint is refused in one line, or it gives back exactly what was stored."""

import math
import os
import pickle
import random
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY_FLAGS, Run, RunMain
from fault_helpers import (
    MODEL_FLAGS,
    REPOSITORY,
    Launcher,
    assert_identical,
    assert_same_run,
    let_a_second_pass,
    load,
    rewrite_archive,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tool_helpers import refusal

import tools.tokens
import visualize_mask
from checkpoints import latest_checkpoint, load_checkpoint, model_from_checkpoint
from utils import InputError, write_atomically

pytest_plugins = ("fault_fixtures",)

torch.manual_seed(0)
STORED = {
    "model": {"head.weight": torch.randn(16, 12), "head.bias": torch.randn(16)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(16, 12)}}},
    "epoch": 3,
    "step": 8,
    "args": {"lr": 5e-4, "reduction_loc": (1,)},
    "classes": ["a", "b"],
}


def stored_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pth"
        write_atomically(path, lambda file: torch.save(STORED, file))
        return path.read_bytes()


WHOLE = stored_bytes()
places = st.integers(0, len(WHOLE) - 1)


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A checkpoint after one kind of damage, at random places."""
    data = bytearray(WHOLE)
    kind = draw(st.sampled_from(["flips", "cut", "overwritten", "inserted", "shifted", "random"]))
    if kind == "flips":
        for place in draw(st.lists(places, min_size=1, max_size=3)):
            data[place] ^= draw(st.integers(1, 255))
    elif kind == "cut":
        del data[draw(places) :]
    elif kind == "overwritten":
        place, noise = draw(places), draw(st.binary(min_size=1, max_size=512))
        data[place : place + len(noise)] = noise
    elif kind == "inserted":
        place = draw(places)
        data[place:place] = draw(st.binary(min_size=1, max_size=64))
    elif kind == "shifted":
        begin, end = sorted((draw(places), draw(places)))
        del data[begin:end]
    else:
        start = draw(st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", WHOLE[:64]]))
        data = start + draw(st.binary(max_size=512))
    return bytes(data)


def refused(path: Path) -> bool:
    """Whether a file is refused, in one line with its name; if not, it must be whole."""
    try:
        found = load_checkpoint(path)
        assert_identical({name: found[name] for name in STORED}, STORED)
        return False
    except InputError as problem:
        assert str(path) in str(problem) and "\n" not in str(problem)
        return True


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=damaged_files())
def test_random_damage(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(data)
    refused(path)


def test_every_changed_byte_of_a_tensor_is_noticed(tmp_path: Path) -> None:
    """PyTorch itself does not compare the archive's checksums."""
    path = tmp_path / "checkpoint.pth"
    weight = STORED["model"]["head.weight"].numpy().tobytes()
    begin = WHOLE.index(weight)
    for place in random.Random(0).sample(range(begin, begin + len(weight)), 50):
        damaged = bytearray(WHOLE)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        torch.load(path, weights_only=True)  # goes through
        assert refused(path)
    path.write_bytes(WHOLE)
    assert not refused(path)


def test_every_changed_bit_of_the_tail_is_noticed_or_harmless(tmp_path: Path) -> None:
    """The archive's directory, which readers of zip files are free to understand differently."""
    path = tmp_path / "checkpoint.pth"
    for place in range(WHOLE.index(b"PK\x01\x02"), len(WHOLE)):
        for bit in (1, 16, 128):
            damaged = bytearray(WHOLE)
            damaged[place] ^= bit
            path.write_bytes(damaged)
            refused(path)


def swapped(data: bytes) -> bytes:
    return b"big" if data == b"little" else b"little"


def test_byte_order_of_another_machine(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.pth", tmp_path / "checkpoint.pth"
    whole.write_bytes(WHOLE)
    rewrite_archive(whole, path, {"byteorder": swapped})
    torch.load(path, weights_only=True)  # goes through, with other numbers
    assert refused(path)
    rewrite_archive(whole, path, {})
    assert not refused(path)


@pytest.mark.parametrize("name", ["data/0", "DATA/0", "data.pkl"])
def test_two_records_of_one_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(WHOLE)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what zipfile says to it
        folder, _, _ = archive.namelist()[0].partition("/")
        archive.writestr(f"{folder}/{name}", archive.read(f"{folder}/{name.lower()}"))
    assert refused(path)


def peak_memory_of_reading(path: Path) -> float:
    """MiB that reading a checkpoint takes, beside what the imports have taken."""
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from checkpoints import load_checkpoint\n"
        "from utils import InputError\n"
        # Not getrusage's, which a process has from the one that started it.
        "status = lambda: Path('/proc/self/status').read_text()\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+) kB', status())[1]) / 1024\n"
        "before = peak()\n"
        "try: load_checkpoint(sys.argv[1])\n"
        "except InputError as problem: print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.parametrize("kind", ["compressed", "storage", "legacy"])
def test_claims_of_a_gigabyte_take_no_memory(tmp_path: Path, kind: str) -> None:
    path, plain = tmp_path / "checkpoint.pth", tmp_path / "plain.pth"
    torch.save({"model": {"weight": torch.ones(200)}}, plain,
               _use_new_zipfile_serialization=kind != "legacy")  # fmt: skip
    few, many = b"K\xc8", b"J" + (2**28).to_bytes(4, "little")  # 200 and a gigabyte of floats
    if kind == "legacy":
        path.write_bytes(plain.read_bytes().replace(few, many))
    elif kind == "storage":
        rewrite_archive(plain, path, {"data.pkl": lambda data: data.replace(few, many)})
    else:
        with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, bytes(2**30) if name.endswith("data/0") else old.read(name))
    assert peak_memory_of_reading(path) < 100


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_cut_off(tmp_path: Path, share: float) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(WHOLE[: int(share * len(WHOLE))])
    assert refused(path)


@pytest.mark.parametrize("content", [[1, 2], "text", 5, None, torch.zeros(3), {}, (1,), {1, 2}])
def test_no_mapping(tmp_path: Path, content: object) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    assert refused(path)


class Payload:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file_format", ["archive", "legacy", "pickle"])
def test_payload_is_refused_without_running(tmp_path: Path, file_format: str) -> None:
    proof, path = tmp_path / "proof", tmp_path / "checkpoint.pth"
    content = STORED | {"args": Payload(proof)}
    if file_format == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=file_format == "archive")
    assert refused(path)
    assert not proof.exists()
    if file_format == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert proof.exists()  # it is a working payload


def as_text(value: object) -> str:
    return "text"


WRONG_STATES = {
    "optimizer-text": ("optimizer", as_text),
    "optimizer-empty": ("optimizer", lambda value: {}),
    "optimizer-groups": ("optimizer", lambda value: value | {"param_groups": []}),
    "scheduler": ("lr_scheduler", lambda value: [1]),
    "epoch": ("epoch", as_text),
    "epoch-none": ("epoch", lambda value: None),
    "step": ("step", lambda value: -4),
    "best": ("best", lambda value: 7),
    "metrics": ("metrics", lambda value: [3]),
    "args": ("args", lambda value: None),
    "model-list": ("model", lambda value: list(value)),
    "model-shapes": ("model", lambda value: {key: value[key][:1] for key in value}),
    "model-numbers": ("model", lambda value: dict.fromkeys(value, 1)),
    "ema": ("model_ema", lambda value: 1),
    "model-args": ("model_args", lambda value: 5),
    "model-args-list": ("model_args", lambda value: ["keep_rate"]),
    "model-args-size": ("model_args", lambda value: value | {"img_size": 5}),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_wrong_types_inside(
    launcher: Launcher, train_flags: list[str], undisturbed: Path, tmp_path: Path, name: str
) -> None:
    """Well-formed files with nonsense in them end the run with one line and code 2."""
    key, change = WRONG_STATES[name]
    content = load(undisturbed / "checkpoint.pth")
    path = tmp_path / "checkpoint.pth"
    torch.save(content | {key: change(content[key])}, path)
    flags = train_flags[len(MODEL_FLAGS) :]  # the model is the checkpoint's
    run = launcher.main(*flags, "--epochs", "4", "--resume", path)
    assert run.wait() == 2, run.text()
    assert "Traceback" not in run.text()
    last = run.text().rstrip().splitlines()[-1]
    assert last.startswith("main.py: error: ") and ("checkpoint" in last or key == "model_args")


SENSELESS = {"tensor": torch.ones(3), "nan": math.nan, "huge": 10**30, "text": "text"}
READ_TO_RESUME = (
    "epoch", "step", "updates", "best", "metrics", "optimizer", "lr_scheduler", "model_ema",
    "world_size",
)  # fmt: skip
READ_BY_ALL = ("model", "model_args", "classes", "args", "data_config", "training_mode")


@pytest.fixture
def refusing(
    call_main: RunMain, trained: Run, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> Callable[[dict, bool], None]:
    """Checks that a checkpoint is refused in one line: on resuming, or whatever it is read for."""
    path, out = tmp_path / "checkpoint.pth", tmp_path / "out"
    flags = trained.flags[len(TINY_FLAGS) :]
    tool_flags = ["--checkpoint", path, "--data-path", data_path, "--output-dir", out]

    def check(contents: dict, always: bool) -> None:
        torch.save(contents, path)
        for mode in (["--resume"], ["--eval", "--resume"], ["--finetune"])[: 3 if always else 1]:
            done = call_main(*flags, "--epochs", "5", *mode, path)
            *_, last = done.stderr.splitlines()  # torch warns of some
            assert done.returncode == 2 and last.startswith("main.py: error: "), mode
        for script in (visualize_mask, tools.tokens) if always else ():
            assert refusal(capsys, script.main, tool_flags).count("\n") <= 1
        assert not out.exists()

    return check


@pytest.mark.parametrize("value", SENSELESS)
def test_senseless_values(trained: Run, refusing: Callable, value: str) -> None:
    whole = load(trained.folder / "checkpoint.pth")
    for key in READ_TO_RESUME:
        refusing(whole | {key: SENSELESS[value]}, False)
    for key in READ_BY_ALL:
        refusing(whole | {key: SENSELESS[value]}, True)


INSIDE = {
    "model_args": [
        {"depth": 10**9}, {"embed_dim": math.nan}, {"img_size": "a"}, {"img_size": -4},
        {"model_name": ["a"]}, {"nonsense": 1}, {"num_heads": torch.ones(2)}, {"device": "meta"},
        {"in_chans": 1}, {"features_only": True}, {"reduction_loc": 7},
    ],
    "data_config": [
        {"crop_pct": "a"}, {"crop_pct": 0}, {"mean": [1, 2]}, {"std": [0, 1, 1]},
        {"crop_mode": "border"},
    ],
    "model": [
        {"norm.weight": torch.ones(32, dtype=torch.complex64)},
        {"norm.weight": torch.ones(32, dtype=torch.int64)},
        {"norm.weight": torch.ones(32).to_sparse()},
        {"norm.weight": torch.ones(32, device="meta")},
        {"norm.weight": torch.ones(1).expand(10**6, 10**6)},
        {"norm.weight": 1.0},
        {"pos_embed": torch.ones(3)},
    ],
}  # fmt: skip


@pytest.mark.parametrize("key", INSIDE)
def test_senseless_values_inside(trained: Run, refusing: Callable, key: str) -> None:
    whole = load(trained.folder / "checkpoint.pth")
    for changes in INSIDE[key]:
        refusing(whole | {key: whole[key] | changes}, True)


def test_weights_come_from_the_file_alone(trained: Run, tmp_path: Path) -> None:
    """Keywords that would fetch others, from anywhere, are not even tried."""
    whole = load(trained.folder / "best.pth")
    fetching = {"pretrained": True, "checkpoint_path": "/nowhere", "cache_dir": "/nowhere"}
    torch.save(whole | {"model_args": whole["model_args"] | fetching}, tmp_path / "file.pth")
    found = model_from_checkpoint(load_checkpoint(tmp_path / "file.pth")).state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole["model"].items())


def test_older_checkpoint_takes_the_place_of_a_damaged_one(
    launcher: Launcher, train_flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """Both of the newest are damaged: named, passed over, not deleted; the third is good."""
    flags = [*train_flags, "--output-dir", tmp_path, "--resume", "auto"]
    flags += ["--checkpoint-interval", "2", "--keep-checkpoints", "4"]
    launcher.main(*flags).finish()
    for name in ("checkpoint.pth", "checkpoint.1.pth"):
        data = bytearray((tmp_path / name).read_bytes())
        data[len(data) // 2] ^= 255
        (tmp_path / name).write_bytes(data)
    left = {path: path.read_bytes() for path in tmp_path.glob("*.pth")}
    found, _ = latest_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoint.2.pth"
    assert {path: path.read_bytes() for path in tmp_path.glob("*.pth")} == left
    let_a_second_pass()
    text = launcher.main(*flags).finish()
    for name in ("checkpoint.pth", "checkpoint.1.pth"):
        assert text.count(f"passed over: checkpoint {tmp_path / name} cannot be read") == 1
    assert f"resumed {found} at epoch " in text
    assert_same_run(tmp_path, undisturbed)


def test_only_damaged_checkpoints_mean_a_fresh_start(tmp_path: Path) -> None:
    for name in ("checkpoint.pth", "checkpoint.1.pth"):
        (tmp_path / name).write_bytes(WHOLE[:100])
    assert latest_checkpoint(tmp_path) is None
    assert len(list(tmp_path.iterdir())) == 2


def test_nested_settings_end_at_once(tmp_path: Path) -> None:
    """Lists of lists that share their parts: 2**40 numbers in a few bytes."""
    nested = [1]
    for _ in range(40):
        nested = [nested, nested]
    path = tmp_path / "nested.pth"
    torch.save({"model": {"head.bias": torch.zeros(2)}, "model_args": {"depth": nested}}, path)
    with pytest.raises(InputError, match="its depth is no plain value"):
        load_checkpoint(path)


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "pipe.pth")
