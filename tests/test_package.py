"""`pip install .` installs models/ as bat_vit, which works in any folder."""

import os
import shutil
import subprocess
import sys
import tomllib

from conftest import REPOSITORY, TINY

SOURCES = ("pyproject.toml", "LICENSE", "README.md", "models")
PROGRAM = f"""
import bat_vit, timm, torch
from bat_vit.trace import trace_patches
model = timm.create_model("bat_deit_tiny_patch16_224", **{TINY}).eval()
logits, assignments = model.forward_with_assignments(torch.zeros(2, 3, 32, 32))
traces = trace_patches(assignments, model.stages())
assert type(model).__module__ == "bat_vit.vit" and len(traces) == 2
print(bat_vit.__file__, *logits.shape)
"""


def run(folder, *command, **env):
    """Standard output of a Python command, run in a folder."""
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(
        command, cwd=folder, env=os.environ | env, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_installed_package_registers_the_models_anywhere(tmp_path):
    source, installed, elsewhere = (tmp_path / name for name in ("source", "installed", "else"))
    elsewhere.mkdir()
    for name in SOURCES:  # a copy: building leaves files beside them
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(REPOSITORY / name, source / name)
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", installed]
    run(elsewhere, "-m", "pip", "install", *flags, source)
    names = {path.name for path in installed.iterdir()}
    assert names == {"bat_vit", next(name for name in names if name.endswith(".dist-info"))}
    printed = run(elsewhere, "-c", PROGRAM, PYTHONPATH=str(installed), OMP_NUM_THREADS="1")
    assert printed.split() == [str(installed / "bat_vit" / "__init__.py"), "2", "4"]


def test_installed_requirements_are_those_of_the_repository():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(project["dependencies"]) < set((REPOSITORY / "requirements.txt").read_text().split())
