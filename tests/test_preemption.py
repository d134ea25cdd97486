"""SIGTERM and SIGUSR1 end a run with a checkpoint and code 75; scripts/slurm.sh queues it again."""

import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from fault_helpers import (
    REPOSITORY,
    TIMEOUT,
    Launcher,
    Run,
    assert_same_run,
    let_a_second_pass,
    load,
    progress,
)

pytest_plugins = ("fault_fixtures",)

EXIT_PREEMPTED = 75
TIME_TO_STOP = 30.0  # seconds


def freeze_in(run: Run, phase: str) -> str:
    """Holds a process up while its last line starts with a pattern; returns the line."""
    end = time.monotonic() + TIMEOUT
    while True:
        assert run.poll() is None and time.monotonic() < end, f"never in {phase}:\n{run.text()}"
        if re.match(phase, _last_line(run)):
            run.send(signal.SIGSTOP)
            time.sleep(0.02)
            if re.match(phase, line := _last_line(run)):
                return line
            run.send(signal.SIGCONT)
        time.sleep(0.001)


def _last_line(run: Run) -> str:
    return run.text().rpartition("\n")[0].rpartition("\n")[2]


def stop(run: Run, number: int, *, group: bool = False) -> None:
    """Sends a signal to a frozen process, lets it go on, and times how long it takes to end."""
    run.send(number, group=group)
    begin = time.monotonic()
    run.send(signal.SIGCONT)
    assert run.wait() == EXIT_PREEMPTED, run.text()
    assert time.monotonic() - begin < TIME_TO_STOP
    assert "Traceback" not in run.text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_in_training(
    launcher: Launcher, train_flags: list[str], undisturbed: Path, tmp_path: Path, number: int
) -> None:
    """Between the two batches of an update; to the loader's workers too, as a terminal does.

    The next update is the last, or the one after it when the process has asked already.
    """
    flags = [*train_flags, "--output-dir", tmp_path, "--resume", "auto", "--num-workers", "2"]
    run = launcher.main(*flags)
    line = freeze_in(run, r"Epoch: \[[12]\]  \[ ?\d?[02468]/16\]")
    epoch, step = (int(found) for found in re.findall(r"\[ *(\d+)", line)[:2])
    stop(run, number, group=True)
    assert progress(tmp_path) in ((epoch, min(step + more, 16)) for more in (4, 6))
    last = run.text().rstrip().splitlines()[-1]
    assert last.startswith(f"main.py: stopped as asked, epoch {epoch}, step ")
    let_a_second_pass()
    assert "resumed" in launcher.main(*flags).finish()
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize(
    ("number", "prefix"), [(signal.SIGUSR1, "test"), (signal.SIGTERM, "test_ema")]
)
def test_signal_in_evaluation(
    launcher: Launcher,
    train_flags: list[str],
    undisturbed: Path,
    tmp_path: Path,
    number: int,
    prefix: str,
) -> None:
    flags = [*train_flags, "--output-dir", tmp_path, "--resume", "auto"]
    run = launcher.main(*flags)
    freeze_in(run, rf"{prefix}:  \[[0-3]/6\]")
    stop(run, number)
    assert progress(tmp_path)[1] == 16  # all of the epoch's batches, and none of the next's
    assert "during the evaluation" in run.text().rstrip().splitlines()[-1]
    let_a_second_pass()
    assert "resumed" in launcher.main(*flags).finish()
    assert_same_run(tmp_path, undisturbed)


def test_stop_while_the_keep_rate_shrinks(
    launcher: Launcher, train_flags: list[str], tmp_path: Path
) -> None:
    """The evaluation that is made up for uses, and log.txt notes, the keep rates of that time."""
    flags = [*train_flags, "--shrink-epochs", "3", "--shrink-start-epoch", "0"]
    whole = launcher.main(*flags, "--output-dir", tmp_path / "whole")
    flags += ["--output-dir", tmp_path / "stopped", "--resume", "auto"]
    run = launcher.main(*flags)
    freeze_in(run, r"test:  \[[0-3]/6\]")
    stop(run, signal.SIGTERM)
    whole.finish()
    let_a_second_pass()
    launcher.main(*flags).finish()
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_signal_to_one_rank_stops_both(
    launcher: Launcher, train_flags: list[str], undisturbed_ranks: Path, tmp_path: Path
) -> None:
    flags = [*train_flags, "--output-dir", tmp_path, "--resume", "auto"]
    runs = launcher.ranks(2, *flags)
    line = freeze_in(runs[0], r"Epoch: \[[12]\]  \[[024]/8\]")  # rank 1 waits in the same update
    epoch, step = map(int, re.findall(r"\[ *(\d+)", line)[:2])
    runs[1].send(signal.SIGUSR1)
    begin = time.monotonic()
    runs[0].send(signal.SIGCONT)
    assert [run.wait() for run in runs] == [EXIT_PREEMPTED, EXIT_PREEMPTED]
    assert time.monotonic() - begin < TIME_TO_STOP
    stopped = progress(tmp_path)
    assert stopped in ((epoch, min(step + more, 8)) for more in (4, 6))
    for run in runs:
        assert f"stopped as asked, epoch {epoch}, step {stopped[1]};" in run.text()
    let_a_second_pass()
    for run in launcher.ranks(2, *flags):
        run.finish()
    assert_same_run(tmp_path, undisturbed_ranks)


# What Slurm's programs do to a job of two nodes, on this machine: srun starts a task per node,
# scancel --signal sends to these tasks, scontrol keeps a record of what it was asked.
SLURM_PROGRAMS = {
    "srun": """
        "$@" & first=$!
        "$@" & second=$!
        echo "$first $second" > "$SLURM_TEST/tasks"
        code=0
        wait "$first" || code=$?
        wait "$second" || code=$?
        exit "$code"
    """,
    "scancel": """
        [ "$*" = "--signal=TERM 42" ] && kill -TERM $(cat "$SLURM_TEST/tasks")
    """,
    "scontrol": """
        case "$1 $2" in
            "show hostnames") printf 'localhost\\nlocalhost\\n' ;;
            "show job") echo "JobId=$3 JobState=${SLURM_TEST_STATE:-RUNNING} Requeue=1" ;;
            *) echo "$*" >> "$SLURM_TEST/requests" ;;
        esac
    """,
}
RECIPE = """
source scripts/lib.sh
use_env
find_gpus
launch "$@"
"""


class Slurm:
    """Runs scripts/slurm.sh as a batch job whose Slurm is a few shell scripts."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        """Writes the programs."""
        self.launcher = launcher
        self.folder = folder
        folder.mkdir()
        for name, text in SLURM_PROGRAMS.items():
            (folder / name).write_text("#!/usr/bin/env bash\n" + text)
            (folder / name).chmod(0o755)
        (folder / "recipe.sh").write_text(RECIPE)

    def batch(self, num_nodes: int, *flags: object, **environment: str) -> Run:
        """Starts the batch script with one process a node."""
        path = os.environ["PATH"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return self.launcher.command(
            "bash",
            "scripts/slurm.sh",
            self.folder / "recipe.sh",
            *flags,
            PATH=f"{self.folder}:{path}",
            VENV=sys.prefix,
            GPUS=1,
            PORT=port,
            SLURM_TEST=self.folder,
            SLURM_SUBMIT_DIR=REPOSITORY,
            SLURM_JOB_ID=42,
            SLURM_NNODES=num_nodes,
            SLURM_JOB_NODELIST="node[1-2]",
            **environment,
        )

    def requests(self) -> str:
        """What scontrol was asked to do."""
        path = self.folder / "requests"
        return path.read_text() if path.exists() else ""


def test_slurm_job_is_queued_again(
    launcher: Launcher, train_flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """One process, stopped by USR1 to the batch shell alone."""
    slurm = Slurm(launcher, tmp_path / "slurm")
    output = tmp_path / "output"
    flags = [*train_flags, "--output-dir", output, "--resume", "auto"]
    run = slurm.batch(1, *flags)
    run.wait_for("Epoch: [1]")
    run.send(signal.SIGUSR1)
    begin = time.monotonic()
    assert run.wait() == EXIT_PREEMPTED, run.text()
    assert time.monotonic() - begin < TIME_TO_STOP
    assert "job 42 is queued again" in run.text() and slurm.requests() == "requeue 42\n"
    assert load(output / "checkpoint.pth")["epoch"] >= 1
    assert "resumed" in launcher.main(*flags).finish()
    assert_same_run(output, undisturbed)


def test_slurm_job_of_two_nodes_is_queued_again(
    launcher: Launcher, train_flags: list[str], undisturbed_ranks: Path, tmp_path: Path
) -> None:
    """Two torchruns as srun would start them; the signal goes through scancel to the ranks."""
    slurm = Slurm(launcher, tmp_path / "slurm")
    output = tmp_path / "output"
    flags = [*train_flags, "--output-dir", output, "--resume", "auto"]
    run = slurm.batch(2, *flags)
    run.wait_for("Epoch: [1]")
    run.send(signal.SIGTERM)
    begin = time.monotonic()
    assert run.wait() == 1, run.text()
    assert time.monotonic() - begin < TIME_TO_STOP
    assert "main.py: stopped as asked" in run.text()
    assert slurm.requests() == "requeue 42\n"
    for rank in launcher.ranks(2, *flags):
        rank.finish()
    assert_same_run(output, undisturbed_ranks)


WAITS = "touch $SLURM_TEST/up; while sleep 0.1; do :; done"


@pytest.mark.parametrize(
    ("command", "state", "signalled", "queued"),
    [
        ("exit 75", "RUNNING", False, True),
        ("exit 75", "CANCELLED", False, False),
        ("exit 1", "RUNNING", False, False),
        ("exit 0", "RUNNING", False, False),
        (
            "trap 'exit 3' TERM; " + WAITS,
            "RUNNING",
            True,
            False,
        ),
        (
            "trap 'exit 0' TERM; " + WAITS,
            "RUNNING",
            True,
            False,
        ),
        (WAITS, "RUNNING", True, True),
    ],
)
def test_what_slurm_queues_again(
    launcher: Launcher, tmp_path: Path, command: str, state: str, signalled: bool, queued: bool
) -> None:
    slurm = Slurm(launcher, tmp_path / "slurm")
    (slurm.folder / "recipe.sh").write_text(command + "\n")
    run = slurm.batch(1, SLURM_TEST_STATE=state)
    if signalled:
        run.wait_for((slurm.folder / "up").exists)
        run.send(signal.SIGUSR1)
    run.wait()
    assert slurm.requests() == ("requeue 42\n" if queued else ""), run.text()
