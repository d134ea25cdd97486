"""Several gloo processes: killed and hanging ranks, restarts, and exact evaluation."""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from fault_helpers import (
    TRAIN_FLAGS,
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

pytest_plugins = ("fault_fixtures",)

EXIT_LOST_PROCESS = 5


def wait_for_checkpoints(runs: list[Run], folder: Path, count: int) -> None:
    """Waits until a run has written some more checkpoints."""
    for _ in range(count):
        version = newest_version(folder)
        runs[0].wait_for(lambda version=version: newest_version(folder) != version)


def assert_stopped_by_backend(survivor: Run, rank: int) -> None:
    """A process whose peer is gone has ended with its own code and the backend's own words."""
    assert survivor.wait() == EXIT_LOST_PROCESS, survivor.text()
    lines = survivor.text().splitlines()
    (line,) = (text for text in lines if text.startswith(f"main.py: rank {rank} "))
    assert " stopped: " in line and "gloo" in line, line
    assert "Traceback" not in survivor.text()


@pytest.mark.parametrize("lost", [0, 1])
def test_killed_rank(
    launcher: Launcher, train_flags: list[str], undisturbed_ranks: Path, tmp_path: Path, lost: int
) -> None:
    """The other one ends by itself; both resumed, nothing is different."""
    rng = random.Random(lost)
    flags = [*train_flags, "--output-dir", tmp_path, "--resume", "auto"]
    flags += ["--checkpoint-interval", "1", "--dist-timeout", "2"]
    runs = launcher.ranks(2, *flags)
    wait_for_checkpoints(runs, tmp_path, rng.randint(2, 5))
    time.sleep(rng.uniform(0, 0.1))
    runs[lost].send(signal.SIGKILL)
    killed = time.monotonic()
    assert_stopped_by_backend(runs[1 - lost], 1 - lost)
    assert time.monotonic() - killed < 60  # long before the two minutes are over
    let_a_second_pass()
    runs = launcher.ranks(2, *flags)
    texts = [run.finish() for run in runs]
    assert "resumed" in texts[0]
    assert_same_run(tmp_path, undisturbed_ranks)


@pytest.mark.parametrize(
    ("world_size", "more"), [(3, []), (4, ["--shrink-epochs", "1", "--shrink-start-epoch", "0"])]
)
def test_three_and_more_processes_sum_in_one_order(
    launcher: Launcher, train_flags: list[str], tmp_path: Path, world_size: int, more: list[str]
) -> None:
    """Resumed after the first of the updates: two summands commute, three do not."""
    flags = [*train_flags, "--epochs", "2", "--checkpoint-interval", "1", *more]
    flags += ["--keep-checkpoints", "6", "--output-dir"]
    for run in launcher.ranks(world_size, *flags, tmp_path / "undisturbed"):
        run.finish()
    first = tmp_path / "undisturbed" / "checkpoint.5.pth"
    assert load(first)["updates"] == 1
    for run in launcher.ranks(world_size, *flags, tmp_path / "resumed", "--resume", first):
        run.finish()
    assert_same_run(tmp_path / "resumed", tmp_path / "undisturbed")


def test_nodes_with_folders_of_their_own(
    launcher: Launcher, train_flags: list[str], undisturbed_ranks: Path, tmp_path: Path
) -> None:
    """Only the first one's folder ever holds checkpoints."""
    shutil.copytree(undisturbed_ranks, tmp_path / "0")
    before = (tmp_path / "0" / "log.txt").read_bytes()
    flags = [*train_flags, "--resume", "auto", "--output-dir", tmp_path / "{rank}"]
    for run in launcher.ranks(2, *flags):
        assert run.wait() == 2
        (line,) = (line for line in run.text().splitlines() if "error: " in line)
        assert "ranks [0] found epoch 3, step 0; ranks [1] found no checkpoint" in line
        assert line.endswith("must be on a file system that all nodes share")
        assert "Traceback" not in run.text()
    assert (tmp_path / "0" / "log.txt").read_bytes() == before and not (tmp_path / "1").exists()


def test_hanging_rank(launcher: Launcher, train_flags: list[str], tmp_path: Path) -> None:
    """A rank that is there and does nothing counts as lost after --dist-timeout minutes."""
    runs = {}
    for lost in (0, 1):  # two runs side by side, for they mostly wait
        folder = tmp_path / str(lost)
        flags = [*train_flags, "--output-dir", folder, "--checkpoint-interval", "1"]
        runs[lost] = launcher.ranks(2, *flags, "--dist-timeout", 20 / 60)
        wait_for_checkpoints(runs[lost], folder, 2)
        runs[lost][lost].send(signal.SIGSTOP)
    stopped = time.monotonic()
    for lost in (0, 1):
        assert_stopped_by_backend(runs[lost][1 - lost], 1 - lost)
        assert time.monotonic() - stopped < 90
        runs[lost][lost].kill()


def ranks_of(launcher_pid: int) -> dict[int, int]:
    """Process ids of torchrun's workers by rank."""
    children = Path(f"/proc/{launcher_pid}/task/{launcher_pid}/children").read_text().split()
    found = {}
    for pid in children:
        try:
            words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        environment = dict(word.split("=", 1) for word in words if "=" in word)
        if "RANK" in environment:
            found[int(environment["RANK"])] = int(pid)
    return found


def test_torchrun_restarts_a_killed_rank(
    launcher: Launcher, train_flags: list[str], undisturbed_ranks: Path, tmp_path: Path
) -> None:
    flags = [*train_flags, "--output-dir", tmp_path, "--resume", "auto"]
    flags += ["--checkpoint-interval", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "--max-restarts", "1", "main.py"]
    run = launcher.command(*torchrun, *flags, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)
    wait_for_checkpoints([run], tmp_path, 6)  # four before the next that is at step 0
    first = ranks_of(run.pid)
    assert sorted(first) == [0, 1]
    os.kill(first[1], signal.SIGKILL)
    run.wait_for(lambda: ranks_of(run.pid).get(1, first[1]) != first[1])
    text = run.finish()
    assert text.count("resumed ") == 1 and "step 0\n" not in text.split("resumed ")[1][:200]
    assert_same_run(tmp_path, undisturbed_ranks)


@pytest.fixture(scope="module")
def odd_data(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images less a few of the validation set: 19 are left, a prime number."""
    folder = tmp_path_factory.mktemp("odd")
    shutil.copytree(data_path, folder, dirs_exist_ok=True)
    for path in sorted((folder / "val").glob("*/*"))[::5]:
        path.unlink()
    return folder


def test_evaluation_counts_every_image_once(
    launcher: Launcher, undisturbed: Path, odd_data: Path, tmp_path: Path
) -> None:
    """One epoch at learning rate 0 leaves the weights alone and logs their score in full."""
    flags = [*TRAIN_FLAGS, "--data-path", odd_data, "--finetune", undisturbed / "best.pth"]
    flags += ["--epochs", "1", "--lr", "0", "--min-lr", "0", "--warmup-lr", "0", "--no-model-ema"]
    flags += ["--weight-decay", "0", "--mixup", "0", "--cutmix", "0"]
    scores = {}
    for world_size, batch_size in ((1, 1), (1, 19), (1, 5), (2, 3), (2, 5), (3, 7), (3, 1)):
        folder = tmp_path / f"{world_size}-{batch_size}"
        more = ["--batch-size", batch_size, "--output-dir", folder]
        runs = launcher.ranks(world_size, *flags, *more)
        for run in runs:
            run.finish()
        weights = load(folder / "checkpoint.pth")["model"]
        assert_identical(weights, load(undisturbed / "best.pth")["model"])
        scores[world_size, batch_size] = read_entries(folder)[0]
    expected = scores[1, 19]
    assert (
        0 < expected["test_acc1"] < 100
        and expected["test_acc1"] == 100 * round(expected["test_acc1"] / 100 * 19) / 19
    )
    for score in scores.values():
        for name in ("test_acc1", "test_acc5", "test_num_images", "test_bad_images"):
            assert score[name] == expected[name]
        assert score["test_num_images"] == 19
        assert score["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-6)


def test_epoch_goes_on_with_another_number_of_processes(
    launcher: Launcher, train_flags: list[str], tmp_path: Path
) -> None:
    """Not the same run any more, but every image of the epoch is still met once."""
    flags = [*train_flags, "--output-dir", tmp_path, "--resume", "auto", "--no-repeated-aug"]
    flags += ["--checkpoint-interval", "1"]
    run = launcher.main(*flags)
    run.wait_for("Epoch: [1]  [10/16]")
    run.kill()
    epoch, step = progress(tmp_path)
    assert epoch == 1 and step >= 8
    let_a_second_pass()
    runs = launcher.ranks(2, *flags)
    texts = [run.finish() for run in runs]
    new_step = step // 2 // 2 * 2  # two processes, whole updates of two batches
    assert f"at epoch 1, step {new_step}\n" in texts[0]
    assert f"Epoch: [1]  [{new_step}/8]" in texts[0]
    assert [entry["epoch"] for entry in read_entries(tmp_path)] == [0, 1, 2]
