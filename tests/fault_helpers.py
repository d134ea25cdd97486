"""Starts, kills and compares real training processes, for the fault-injection tests.

Importing torch takes seconds, so most processes are forked from a server that has imported the
program and done nothing else. Each is a process of its own that runs main.py as `__main__`.
"""

import atexit
import gc
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
TIMEOUT = 150.0  # seconds until a process counts as stuck; generous: machines are shared
TIMES = ("epoch_seconds", "images_per_second")  # what two equal runs' logs differ in

# A model of 12 thousand parameters; 8 updates of 2 batches in each of 3 epochs (on one process),
# with everything random switched on: RandAugment, erasing, mixup, cutmix, stochastic depth.
MODEL_FLAGS = [
    "--model", "bat_deit_tiny_patch16_224", "--input-size", "32", "--reduction-loc", "1",
    "--model-kwargs", "embed_dim=16", "depth=3", "num_heads=2", "patch_size=8",
]  # fmt: skip
TRAIN_FLAGS = [
    *MODEL_FLAGS, "--batch-size", "4", "--accum-steps", "2", "--epochs", "3", "--lr", "0.003",
    "--unscale-lr", "--warmup-epochs", "1", "--drop-path", "0.2", "--model-ema-decay", "0.9",
    "--device", "cpu", "--num-workers", "0", "--print-freq", "1",
]  # fmt: skip


class Run:
    """A process under test, the leader of a process group."""

    def __init__(self, pid: int, output: Path, poll: Callable[[], int | None]) -> None:
        """Watches a process.

        Args:
            pid: of the process.
            output: file that gets its standard output and error.
            poll: its exit code (minus the signal that killed it), or None while it runs.
        """
        self.pid = pid
        self.output = output
        self.poll = poll

    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text()

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Exit code, once it has ended."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < end, f"still running after {timeout} s:\n{self.text()}"
            time.sleep(0.01)
        return code

    def finish(self) -> str:
        """What it printed, once it has ended well."""
        assert self.wait() == 0, self.text()
        return self.text()

    def wait_for(self, event: str | Callable[[], object]) -> None:
        """Waits until it has printed a text, or something has happened, while it still runs."""
        end = time.monotonic() + TIMEOUT
        while not (event in self.text() if isinstance(event, str) else event()):
            assert self.poll() is None, f"ended before {event}:\n{self.text()}"
            assert time.monotonic() < end, f"waited too long for {event}:\n{self.text()}"
            time.sleep(0.001)

    def send(self, number: int, *, group: bool = False) -> None:
        """Sends a signal to the process, or to its whole process group."""
        (os.killpg if group else os.kill)(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to the process and its children, unless it has ended already."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended in between
                self.send(signal.SIGKILL, group=True)
            assert self.wait() in (-signal.SIGKILL, 0)


class Launcher:
    """Starts `main.py` processes, and ends them."""

    def __init__(self, folder: Path) -> None:
        """Starts the server; the outputs of the processes go to `folder`."""
        self.folder = folder
        self.codes: dict[int, int] = {}
        self.runs: list[Run] = []
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.unread = b""

    def main(self, *flags: object, **environment: object) -> Run:
        """Starts main.py with flags and more environment variables."""
        output = self._new_output()
        request = {
            "flags": [str(flag) for flag in flags],
            "environment": {name: str(value) for name, value in environment.items()},
            "output": str(output),
        }
        self.server.stdin.write(json.dumps(request).encode() + b"\n")
        self.server.stdin.flush()
        while not (started := self._read_events(TIMEOUT)):
            assert self.server.poll() is None, "the server has ended"
        return self._keep(Run(started[0], output, lambda: self._poll(started[0])))

    def ranks(self, world_size: int, *flags: object) -> list[Run]:
        """Starts main.py as several gloo processes; {rank} in a flag is the process's rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.main(
                *(str(flag).replace("{rank}", str(rank)) for flag in flags),
                RANK=rank,
                LOCAL_RANK=rank,
                **shared,
            )
            for rank in range(world_size)
        ]

    def command(self, *words: object, **environment: object) -> Run:
        """Starts any program, without the server."""
        output = self._new_output()
        with open(output, "w") as file:
            process = subprocess.Popen(
                [str(word) for word in words],
                cwd=REPOSITORY,
                env=os.environ
                | {"OMP_NUM_THREADS": "1"}
                | {name: str(value) for name, value in environment.items()},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self._keep(Run(process.pid, output, process.poll))

    def end_all(self) -> None:
        """Kills what still runs."""
        for run in self.runs:
            if run.poll() is None:
                run.kill()
        self.runs.clear()

    def close(self) -> None:
        """Ends the server, which kills what it has started."""
        self.end_all()
        self.server.stdin.close()
        self.server.wait(TIMEOUT)
        self.server.stdout.close()

    def _new_output(self) -> Path:
        path = self.folder / f"{len(list(self.folder.iterdir()))}.txt"
        path.touch()
        return path

    def _keep(self, run: Run) -> Run:
        self.runs.append(run)
        return run

    def _poll(self, pid: int) -> int | None:
        if pid not in self.codes:
            self._read_events(timeout=0)
        return self.codes.get(pid)

    def _read_events(self, timeout: float) -> list[int]:
        """Notes which processes have ended; returns the ids of those that have started."""
        started = []
        if select.select([self.server.stdout], [], [], timeout)[0]:
            self.unread += os.read(self.server.stdout.fileno(), 65536)
            *lines, self.unread = self.unread.split(b"\n")
            for event, pid, code in map(json.loads, lines):
                if event == "started":
                    started.append(pid)
                else:
                    self.codes[pid] = code
        return started


def load(path: Path) -> dict:
    """A checkpoint as it is, without the program's own checks."""
    return torch.load(path, weights_only=True)


def rewrite_archive(source: Path, target: Path, changes: dict[str, Callable]) -> None:
    """Copies a checkpoint with valid checksums; `changes` are functions of bytes by record name."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for record in old.namelist():
            change = changes.get(record.partition("/")[2], bytes)
            new.writestr(record, change(old.read(record)))


def newest_version(folder: Path) -> int | None:
    """Changes whenever a run writes a checkpoint; None before the first."""
    try:
        return (folder / "checkpoint.pth").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def progress(folder: Path) -> tuple[int, int]:
    """Epoch and step of a run's newest checkpoint, which may not be in its place yet."""
    pending = folder / "checkpoint.pending.pth"
    checkpoint = load(pending if pending.exists() else folder / "checkpoint.pth")
    return checkpoint["epoch"], checkpoint["step"]


def read_entries(folder: Path) -> list[dict]:
    """Every line of log.txt, times left out."""
    entries = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{name: value for name, value in e.items() if name not in TIMES} for e in entries]


def read_points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (step, value) pairs by name, times left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag not in TIMES
    }


def assert_identical(value: object, expected: object, name: str = "") -> None:
    """Compares nested values, tensors bit for bit."""
    assert type(value) is type(expected), name
    if isinstance(value, dict):
        assert value.keys() == expected.keys(), name
        for key in value:
            assert_identical(value[key], expected[key], f"{name}.{key}")
    elif isinstance(value, list | tuple):
        assert len(value) == len(expected), name
        for index, pair in enumerate(zip(value, expected, strict=True)):
            assert_identical(*pair, f"{name}.{index}")
    elif isinstance(value, torch.Tensor):
        assert value.dtype == expected.dtype, name
        assert torch.equal(value, expected), name
    else:
        assert value == expected, name


def assert_same_run(folder: Path, expected: Path) -> None:
    """Compares all that two runs left behind, times and arguments aside."""
    for file in ("checkpoint.pth", "best.pth"):
        ours, theirs = load(folder / file), load(expected / file)
        for name in theirs.keys() - {"args", "git_hash"}:
            assert_identical(ours[name], theirs[name], name)
    entries = read_entries(folder)
    assert entries == read_entries(expected)
    points = read_points(folder)
    assert points == read_points(expected)
    steps = [entry["epoch"] for entry in entries]
    assert len(points) > 10 and all([s for s, _ in tag] == steps for tag in points.values())


def let_a_second_pass() -> None:
    """TensorBoard's files are named by the second: one second must hold one start of a run.

    Real runs take longer to import torch.
    """
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.02)


def _serve() -> dict | None:
    """Forks a process for each request, a JSON line; in that process returns the request.

    Answers ["started", pid, None], and ["ended", pid, code] when a process has ended. Without
    requester it kills them all and ends.
    """
    running: set[int] = set()
    while True:
        if select.select([sys.stdin], [], [], 0.005)[0]:
            line = sys.stdin.readline()
            if not line:
                for pid in running:
                    os.killpg(pid, signal.SIGKILL)
                return None
            pid = os.fork()
            if pid == 0:
                return json.loads(line)
            os.setpgid(pid, pid)
            running.add(pid)
            print(json.dumps(["started", pid, None]), flush=True)
        if running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                running.remove(pid)
                print(json.dumps(["ended", pid, os.waitstatus_to_exitcode(status)]), flush=True)


def _become_main(request: dict) -> None:
    """Runs main.py as a fresh process would, with random states of its own."""
    os.setpgid(0, 0)
    for source, number in (("/dev/null", 0), (request["output"], 1), (request["output"], 2)):
        os.dup2(os.open(source, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # off where tests run in background
    random.seed()
    np.random.seed()
    torch.default_generator.seed()
    os.environ.update(request["environment"])
    sys.argv = ["main.py", *request["flags"]]
    code = 1
    try:
        runpy.run_path("main.py", run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        traceback.print_exc()
        sys.last_value = error  # as Python does, which keeps the frames and all that is in them
    # The interpreter's own end would first write to all the memory shared with the server.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    import main  # noqa: F401 (imported once for all)

    gc.freeze()  # a collection in a fork would write to all the memory that it shares
    if request := _serve():
        _become_main(request)
    gc.unfreeze()
