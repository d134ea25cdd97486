"""Fixtures of the fault-injection tests, a pytest plugin."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_helpers import TRAIN_FLAGS, Launcher


@pytest.fixture(scope="session")
def fault_launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """The launcher of the whole session; tests take `launcher`."""
    launcher = Launcher(tmp_path_factory.mktemp("fault_output"))
    yield launcher
    launcher.close()


@pytest.fixture
def launcher(fault_launcher: Launcher) -> Iterator[Launcher]:
    """Starts processes; what still runs at the end of the test is killed."""
    yield fault_launcher
    fault_launcher.end_all()


@pytest.fixture(scope="session")
def train_flags(data_path: Path) -> list[str]:
    """The flags of the run that most tests disturb, all but the output folder."""
    return [*TRAIN_FLAGS, "--data-set", "IMNET", "--data-path", str(data_path)]


@pytest.fixture(scope="session")
def undisturbed(
    fault_launcher: Launcher, train_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Output folder of that run in a plain `python main.py`, without checkpoints on the way."""
    folder = tmp_path_factory.mktemp("undisturbed")
    flags = [*train_flags, "--output-dir", folder]
    fault_launcher.command(sys.executable, "main.py", *flags).finish()
    return folder


@pytest.fixture(scope="session")
def undisturbed_ranks(
    fault_launcher: Launcher, train_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Output folder of the run on two gloo processes."""
    folder = tmp_path_factory.mktemp("undisturbed_ranks")
    for run in fault_launcher.ranks(2, *train_flags, "--output-dir", folder):
        run.finish()
    return folder
