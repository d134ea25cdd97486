"""A full disk, a vanished folder or a crash while files are renamed costs no checkpoint."""

import json
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fault_helpers import (
    Launcher,
    Run,
    assert_identical,
    assert_same_run,
    let_a_second_pass,
    load,
    newest_version,
    progress,
    read_entries,
)

from checkpoints import RunFolder, checkpoint_files, latest_checkpoint

pytest_plugins = ("fault_fixtures",)

EXIT_NOT_WRITTEN = 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB where the system lets us mount one, else an ordinary folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, run: Run | None = None) -> Callable[[], None]:
    """Leaves no room on a disk; in an ordinary folder, none for the files that are written next.

    Args:
        disk: the folder of `small_disk`.
        run: until it ends, the room of the checkpoints that it removes is taken too.

    Returns:
        What makes room again.
    """
    if not os.path.ismount(disk):
        full = [disk / "log.txt.partial", disk / "checkpoint.pending.pth.partial"]
        for path in full:
            while True:
                with suppress(FileExistsError):  # it is being written
                    path.symlink_to("/dev/full")
                    break
        return lambda: [path.unlink(missing_ok=True) for path in full]
    filler = disk / "filler"
    file = os.open(filler, os.O_WRONLY | os.O_CREAT)
    is_full = False
    while not is_full or (run and run.poll() is None):
        try:
            os.write(file, bytes(512))
        except OSError:
            is_full = True
    os.close(file)
    return filler.unlink


def assert_one_line(run: Run, *words: str) -> None:
    """The run has ended because its output could not be written, and said so in one line."""
    assert run.wait() == EXIT_NOT_WRITTEN, run.text()
    text = run.text()
    assert "Traceback" not in text and "Exception" not in text, text
    last = text.rstrip().splitlines()[-1]
    assert last.startswith("main.py: stopped: cannot write "), text
    assert all(word in last for word in words), last
    assert text.count("cannot write") == 1


def test_full_disk(
    launcher: Launcher, train_flags: list[str], undisturbed: Path, small_disk: Path
) -> None:
    flags = [*train_flags, "--output-dir", small_disk, "--resume", "auto"]
    flags += ["--checkpoint-interval", "1", "--keep-checkpoints", "2"]
    run = launcher.main(*flags)
    run.wait_for((small_disk / "checkpoint.1.pth").exists)
    make_room = fill(small_disk, run)
    assert_one_line(run, str(small_disk), "No space left on device")
    assert not list(small_disk.glob("checkpoint*.partial"))
    before = progress(small_disk)
    assert len(checkpoint_files(small_disk)) == 2
    make_room()
    let_a_second_pass()
    resumed = launcher.main(*flags).finish()
    assert f"at epoch {before[0]}, step {before[1]}\n" in resumed
    assert_same_run(small_disk, undisturbed)


def test_file_size_limit(
    launcher: Launcher, train_flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """The limit (SIGXFSZ, "File too large") stops checkpoints in their middle, log.txt not."""
    flags = [*train_flags, "--output-dir", tmp_path, "--resume", "auto"]
    run = launcher.main(*flags)
    run.wait_for((tmp_path / "checkpoint.pth").exists)
    before = newest_version(tmp_path)
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    assert_one_line(run, "checkpoint", "File too large")
    assert newest_version(tmp_path) == before and progress(tmp_path) == (1, 0)
    assert not list(tmp_path.glob("*.partial"))
    assert len(read_entries(tmp_path)) == 2  # of which one is dropped by what follows
    let_a_second_pass()
    launcher.main(*flags).finish()
    assert_same_run(tmp_path, undisturbed)


def test_start_on_a_full_disk(
    launcher: Launcher, train_flags: list[str], undisturbed: Path, small_disk: Path
) -> None:
    flags = [*train_flags, "--output-dir", small_disk, "--resume", "auto"]
    run = launcher.main(*flags, "--epochs", "1")
    run.finish()
    checkpoint, log = load(small_disk / "checkpoint.pth"), read_entries(small_disk)
    make_room = fill(small_disk)
    run = launcher.main(*flags)
    assert_one_line(run, str(small_disk), "No space left on device")
    assert_identical(load(small_disk / "checkpoint.pth"), checkpoint)
    assert read_entries(small_disk) == log
    make_room()


def test_vanished_folder(
    launcher: Launcher, train_flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    folder, moved = tmp_path / "output", tmp_path / "moved"
    flags = [*train_flags, "--output-dir", folder, "--resume", "auto"]
    flags += ["--checkpoint-interval", "3"]
    run = launcher.main(*flags)
    run.wait_for((folder / "checkpoint.pth").exists)
    folder.rename(moved)
    assert_one_line(run, str(folder), "No such file or directory")
    assert not folder.exists()
    before = progress(moved)
    moved.rename(folder)
    let_a_second_pass()
    resumed = launcher.main(*flags).finish()
    assert f"at epoch {before[0]}, step {before[1]}\n" in resumed
    assert_same_run(folder, undisturbed)


def test_newest_checkpoints_and_the_best_are_kept(
    launcher: Launcher, train_flags: list[str], tmp_path: Path
) -> None:
    flags = ["--checkpoint-interval", "3", "--keep-checkpoints", "3", "--output-dir", tmp_path]
    launcher.main(*train_flags, *flags).finish()
    names = ["best.pth", "checkpoint.1.pth", "checkpoint.2.pth", "checkpoint.pth"]
    assert sorted(path.name for path in tmp_path.glob("*.p*")) == names
    kept = [load(path) for path in checkpoint_files(tmp_path)]
    places = [(checkpoint["epoch"], checkpoint["step"]) for checkpoint in kept]
    assert places == [(3, 0), (2, 16), (2, 10)]  # after update 24 twice: interval, end of epoch
    accuracies = [entry["test_acc1"] for entry in read_entries(tmp_path)]
    best = load(tmp_path / "best.pth")
    assert best["best"]["test_acc1"] == max(accuracies)
    assert best["epoch"] == accuracies.index(max(accuracies))


def make_folder(path: Path, keep_checkpoints: int = 2) -> RunFolder:
    return RunFolder(path, SimpleNamespace(keep_checkpoints=keep_checkpoints), model_args={})


def make_state(epoch: int) -> SimpleNamespace:
    content = {"model": {"weight": torch.full((3,), float(epoch))}, "epoch": epoch, "step": 0}
    return SimpleNamespace(state_dict=lambda: content)


@pytest.mark.parametrize("crash_at", range(4))
def test_crash_between_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    """Whichever rename of the fourth checkpoint is the last, the newest one whole is found."""
    folder = make_folder(tmp_path, keep_checkpoints=3)
    for epoch in range(1, 4):
        folder.save(make_state(epoch))
    rename, done = os.replace, []

    def crash(source: Path, target: Path) -> None:
        if len(done) == crash_at:
            raise KeyboardInterrupt
        done.append(target)
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            folder.save(make_state(4))
    _, checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint["epoch"] == (3 if crash_at == 0 else 4)
    folder.save(make_state(5))
    found = [load(path)["epoch"] for path in checkpoint_files(tmp_path)]
    assert found[0] == 5 and found == sorted(found, reverse=True)


def test_log_line_cut_off_by_a_crash(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (tmp_path / "log.txt").write_text(json.dumps({"epoch": 0, "loss": 2.0}) + '\n{"epoch": 1, "lo')
    folder.start(1, {}, source=str(tmp_path / "checkpoint.pth"))
    folder.log_epoch({"epoch": 1, "loss": 1.0})
    folder.close()
    assert read_entries(tmp_path) == [{"epoch": 0, "loss": 2.0}, {"epoch": 1, "loss": 1.0}]


def test_new_run_sets_an_earlier_one_aside(tmp_path: Path) -> None:
    for epoch in (5, 6):
        make_folder(tmp_path).save(make_state(epoch))
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n')
    folder = make_folder(tmp_path)
    folder.start(0, {})
    folder.close()
    assert latest_checkpoint(tmp_path) is None and read_entries(tmp_path) == []
    previous = tmp_path / "previous-1"
    names = sorted(path.name for path in previous.iterdir())
    assert names == ["checkpoint.1.pth", "checkpoint.pth", "log.txt"]
    assert load(previous / "checkpoint.pth")["epoch"] == 6
    folder.save(make_state(7))
    for _ in range(2):  # the second finds arguments and events of the first, but no epoch
        folder = make_folder(tmp_path)
        folder.start(0, {})
        folder.close()
    assert load(previous / "checkpoint.pth")["epoch"] == 6, "never overwritten"
    assert load(tmp_path / "previous-2" / "checkpoint.pth")["epoch"] == 7
    assert not (tmp_path / "previous-3").exists()
