"""A run that is killed and resumed is the run that was never killed, bit for bit."""

import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import Run, RunMain
from fault_helpers import (
    Launcher,
    assert_identical,
    assert_same_run,
    let_a_second_pass,
    load,
    newest_version,
    progress,
    read_entries,
)

from checkpoints import RunFolder, latest_checkpoint, load_checkpoint
from utils import InputError, make_deterministic

pytest_plugins = ("fault_fixtures",)


def test_worker_count_changes_nothing(
    launcher: Launcher, train_flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    runs = [
        launcher.main(*train_flags, "--num-workers", workers, "--output-dir", tmp_path / workers)
        for workers in ("1", "2")
    ]
    for run, workers in zip(runs, ("1", "2"), strict=True):
        run.finish()
        assert_same_run(tmp_path / workers, undisturbed)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(
    launcher: Launcher, train_flags: list[str], undisturbed: Path, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    flags = [*train_flags, "--output-dir", tmp_path, "--resume", "auto"]
    flags += ["--checkpoint-interval", "1", "--num-workers", rng.choice("02")]
    kills, most, resumed_at = 0, 5, set()
    while True:
        run = launcher.main(*flags)
        if kills < most:
            before = newest_version(tmp_path)
            run.wait_for(lambda before=before: newest_version(tmp_path) != before)
            time.sleep(rng.uniform(0, 0.1))
        else:
            run.wait()
        if "resumed" in run.text():
            resumed_at.add(run.text().split("at epoch ")[1].split("\n")[0])
        if run.poll() is not None:
            break
        with suppress(ProcessLookupError):
            run.send(signal.SIGKILL, group=True)
        if run.wait() == 0:  # it was done just before
            break
        assert run.wait() == -signal.SIGKILL
        kills += 1
        if progress(tmp_path)[0] == 3:  # its last checkpoint was there: it will write no other
            most = kills
        let_a_second_pass()
    assert run.wait() == 0, run.text()
    assert kills >= 3 and len(resumed_at) >= 3
    assert any(not place.endswith("step 0") for place in resumed_at)  # inside an epoch
    assert_same_run(tmp_path, undisturbed)


def test_killed_inside_a_checkpoint_write(
    launcher: Launcher, train_flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """The process is frozen while the temporary file grows, looked at, and killed if that is so."""
    flags = [*train_flags, "--output-dir", tmp_path, "--resume", "auto"]
    flags += ["--checkpoint-interval", "1"]
    torn = tmp_path / "checkpoint.pending.pth.partial"
    run = launcher.main(*flags)
    run.wait_for((tmp_path / "checkpoint.pth").exists)
    while True:
        run.wait_for(torn.exists)
        run.send(signal.SIGSTOP)
        if torn.exists() and torn.stat().st_size < (tmp_path / "checkpoint.pth").stat().st_size / 2:
            break
        run.send(signal.SIGCONT)
    run.send(signal.SIGKILL)
    run.wait()
    with pytest.raises(InputError):
        load_checkpoint(torn)
    path, checkpoint = latest_checkpoint(tmp_path)
    assert path.name == "checkpoint.pth" and checkpoint["updates"] > 0
    let_a_second_pass()
    run = launcher.main(*flags)
    run.finish()
    assert f"at epoch {checkpoint['epoch']}, step {checkpoint['step']}\n" in run.text()
    assert_same_run(tmp_path, undisturbed)
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*pending*"))


def test_killed_between_log_and_checkpoint(
    launcher: Launcher, train_flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """A pipe in the temporary file's place holds the process up after log.txt has its line."""
    flags = [*train_flags, "--output-dir", tmp_path, "--resume", "auto"]
    run = launcher.main(*flags)
    run.wait_for((tmp_path / "checkpoint.pth").exists)
    pipe = tmp_path / "checkpoint.pending.pth.partial"
    os.mkfifo(pipe)
    run.wait_for(lambda: len(read_entries(tmp_path)) == 2)
    time.sleep(0.2)
    assert run.poll() is None and progress(tmp_path) == (1, 0)
    run.kill()
    pipe.unlink()
    let_a_second_pass()
    assert "at epoch 1, step 0\n" in launcher.main(*flags).finish()
    assert_same_run(tmp_path, undisturbed)


def test_killed_before_the_first_checkpoint(
    launcher: Launcher, train_flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    flags = [*train_flags, "--output-dir", tmp_path, "--resume", "auto"]
    run = launcher.main(*flags)
    run.wait_for("Epoch: [0]  [ 5/16]")
    run.kill()
    assert latest_checkpoint(tmp_path) is None
    let_a_second_pass()
    assert "resumed" not in launcher.main(*flags).finish()
    assert_same_run(tmp_path, undisturbed)


class Killed(BaseException):
    """Nothing is cleaned up after it, as after a kill."""


def killed_in_last_save(patch: pytest.MonkeyPatch, number: int) -> None:
    """Raises `Killed` before one of the file operations that write the last checkpoint."""
    left = iter(range(number, -1, -1))
    is_last = False

    def watch(owner: object, name: str) -> None:
        operation = getattr(owner, name)

        def call(*args: object) -> object:
            if is_last and next(left) == 0:
                raise Killed
            return operation(*args)

        patch.setattr(owner, name, call)

    def save(self, state) -> None:
        nonlocal is_last
        is_last = state.epoch == 4
        whole_save(self, state)

    whole_save = RunFolder.save
    patch.setattr(RunFolder, "save", save)
    for owner, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
        watch(owner, name)


@pytest.mark.parametrize(("keep", "operations"), [(1, 5), (3, 7)])
def test_killed_at_every_file_operation_of_a_save(
    call_main: RunMain, trained: Run, tmp_path: Path, keep: int, operations: int
) -> None:
    """Of the last save, so that nothing but the resumed run's start can mend the folder."""
    flags = [*trained.flags, "--keep-checkpoints", keep, "--resume", "auto", "--output-dir"]
    undisturbed, three_epochs = tmp_path / "undisturbed", tmp_path / "three_epochs"
    assert call_main(*flags, undisturbed).returncode == 0
    for number in range(operations):
        folder = tmp_path / str(number)
        if number:
            shutil.copytree(three_epochs, folder)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            killed_in_last_save(patch, number)
            call_main(*flags, folder if number else three_epochs)
        if not number:
            shutil.copytree(three_epochs, folder)
        assert call_main(*flags, folder).returncode == 0
        files = {path.name for path in undisturbed.iterdir()}
        assert {path.name for path in folder.iterdir()} == files
        for name in (name for name in files if name.endswith(".pth")):
            found, expected = load(folder / name), load(undisturbed / name)
            for key in expected.keys() - {"args", "git_hash"}:
                assert_identical(found[key], expected[key], f"{number} {name} {key}")
        assert read_entries(folder) == read_entries(undisturbed)
    with pytest.MonkeyPatch.context() as patch:  # there are no more operations than these
        killed_in_last_save(patch, operations)
        assert call_main(*flags, three_epochs).returncode == 0


def test_deterministic_runs_agree(
    launcher: Launcher, train_flags: list[str], tmp_path: Path
) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    runs = [
        launcher.main(*train_flags, "--deterministic", "--output-dir", folder) for folder in folders
    ]
    for run in runs:
        run.finish()
    assert_same_run(*folders)
    speeds = [json.loads(line) for line in (folders[0] / "log.txt").read_text().splitlines()]
    assert all(entry["images_per_second"] > 0 for entry in speeds)


def test_deterministic_reaches_pytorch() -> None:
    try:
        make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
