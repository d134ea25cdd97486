"""Runs many commands, a few at a time, and stops them so that they can go on later."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils import logger

POLL_SECONDS = 0.2
GRACE_SECONDS = 60.0  # for a stopped run to write its checkpoint
REPOSITORY = Path(__file__).resolve().parent.parent

DONE, FAILED, STOPPED, SKIPPED = "done", "failed", "stopped", "skipped"


@dataclass(frozen=True)
class Job:
    """A command of the study.

    Attributes:
        name: unique among the jobs.
        command: words after the Python interpreter.
        output: file that its output is appended to.
        is_done: whether its results are there; asked before it starts and after it ends.
        needs: name of the job that must be done before, or "".
    """

    name: str
    command: Sequence[str]
    output: Path
    is_done: Callable[[], bool]
    needs: str = ""


@dataclass
class Outcome:
    """What became of the jobs.

    Attributes:
        status: "done", "failed", "stopped" or "skipped" (what it needs failed), by name.
        reasons: why a job failed, one line each.
        was_stopped: some jobs were not run to their end, since the time was up or a signal came.
    """

    status: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    was_stopped: bool = False


class Runner:
    """Starts jobs in their order as soon as there is room and what they need is there."""

    def __init__(self, slots: int, *, threads: int, deadline: float = float("inf")) -> None:
        """Sets the limits.

        Args:
            slots: jobs at a time.
            threads: of PyTorch on the CPU, in each job.
            deadline: `time.monotonic()` after which the jobs are asked to stop.
        """
        self.slots = slots
        self.environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
        }
        self.deadline = deadline
        self.is_asked_to_stop = False
        self._running: dict[str, tuple[Job, subprocess.Popen]] = {}

    def run(self, jobs: Sequence[Job]) -> Outcome:
        """Runs all jobs that are not done yet; a failed one does not hold up the others."""
        outcome = Outcome()
        handlers = {
            number: signal.signal(number, self._ask_to_stop)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        waiting = [job for job in jobs if not self._known(job, outcome)]
        total, begin = len(jobs), time.monotonic()
        try:
            while (waiting or self._running) and not self._must_stop():
                for job in self._startable(waiting, outcome):
                    waiting.remove(job)
                    self._start(job)
                for job in self._ended():
                    self._judge(job, outcome)
                    minutes = (time.monotonic() - begin) / 60
                    status = outcome.status[job.name]
                    done = sum(value == DONE for value in outcome.status.values())
                    logger.info(f"[{minutes:5.1f} min] {done}/{total}  {job.name}: {status}")
                time.sleep(POLL_SECONDS)
            if waiting or self._running:
                outcome.was_stopped = True
                self._stop(outcome)
        finally:
            self._kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        for job in waiting:
            outcome.status.setdefault(job.name, STOPPED)
        return outcome

    def _known(self, job: Job, outcome: Outcome) -> bool:
        if job.is_done():
            outcome.status[job.name] = DONE
        return job.name in outcome.status

    def _ask_to_stop(self, *_: object) -> None:
        self.is_asked_to_stop = True

    def _must_stop(self) -> bool:
        return self.is_asked_to_stop or time.monotonic() >= self.deadline

    def _startable(self, waiting: list[Job], outcome: Outcome) -> list[Job]:
        """The next jobs that fit; those whose needs failed are struck off."""
        chosen = []
        for job in list(waiting):
            need = outcome.status.get(job.needs, DONE if not job.needs else None)
            if need in (FAILED, SKIPPED):
                waiting.remove(job)
                outcome.status[job.name] = SKIPPED
                outcome.reasons[job.name] = f"{job.needs} failed"
            elif need == DONE and len(self._running) + len(chosen) < self.slots:
                chosen.append(job)
        return chosen

    def _start(self, job: Job) -> None:
        job.output.parent.mkdir(parents=True, exist_ok=True)
        with open(job.output, "ab") as file:
            process = subprocess.Popen(
                [sys.executable, *job.command],
                cwd=REPOSITORY,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which stops the jobs
            )
        self._running[job.name] = job, process

    def _ended(self) -> list[Job]:
        return [job for job, process in self._running.values() if process.poll() is not None]

    def _judge(self, job: Job, outcome: Outcome) -> None:
        """Notes how a job ended: its results count, not its exit code alone."""
        _, process = self._running.pop(job.name)
        if process.returncode == 0 and job.is_done():
            outcome.status[job.name] = DONE
            return
        outcome.status[job.name] = FAILED
        outcome.reasons[job.name] = f"exit code {process.returncode}: {last_line(job.output)}"

    def _stop(self, outcome: Outcome) -> None:
        """Asks the running jobs to save and end, and waits for them."""
        for _, process in self._running.values():
            process.terminate()
        limit = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < limit and len(self._ended()) < len(self._running):
            time.sleep(POLL_SECONDS)
        for job in self._ended():
            outcome.status[job.name] = DONE if job.is_done() else STOPPED
            del self._running[job.name]
        for name in self._running:
            outcome.status[name] = STOPPED

    def _kill(self) -> None:
        """Leaves no process behind."""
        for _, process in self._running.values():
            process.kill()
            process.wait()
        self._running.clear()


def last_line(path: Path) -> str:
    """The last line of a file that is not empty, or "no output"."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"
