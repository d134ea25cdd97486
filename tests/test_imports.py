"""Every room imports only what its row of the README's table of rooms allows; none imports tools/.

A room is a Python file or a folder of the top level; tests/ is none.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
LOWER_ROOMS = {
    "arguments", "checkpoints", "datasets", "engine", "inputs", "losses", "models", "samplers",
    "utils",
}  # fmt: skip
MAY_IMPORT = {
    "main": LOWER_ROOMS,
    "visualize_mask": LOWER_ROOMS,
    "tools": LOWER_ROOMS,
    "arguments": {"models"},
    "checkpoints": {"models", "engine", "utils"},
    "datasets": {"samplers", "inputs", "utils"},
    "engine": {"utils"},
    "hubconf": {"models"},
    "inputs": {"samplers", "utils"},
    "losses": set(),
    "models": set(),
    "samplers": set(),
    "utils": set(),
}
FOLDERS = {"models", "inputs", "tools"}  # the other rooms are files
# Rooms whose libraries are limited too.
LIBRARIES = {"models": {"torch", "timm"}, "losses": {"torch"}, "samplers": {"torch"}}


def module_name(path: Path, root: Path) -> str:
    """Dotted name of a file, such as models.vit; a package has that of its folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path, root: Path) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(root).parts[: -node.level] if node.level else ()
            source = ".".join([*above, *filter(None, [node.module])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def find_violations(root: Path) -> set[str]:
    """What is wrong with the files below `root`, each as one line."""
    files = [
        *root.glob("*.py"),
        *(path for room in FOLDERS for path in root.glob(f"{room}/**/*.py")),
    ]
    modules = {module_name(path, root): path for path in files}
    scripts = {name for name, path in modules.items() if "__main__" in path.read_text()}
    found = set()
    for name, path in modules.items():
        room = name.partition(".")[0]
        if room not in MAY_IMPORT:
            found.add(f"{name} is no room")
            continue
        for imported in imported_names(path, root):
            other = imported.partition(".")[0]
            if other in MAY_IMPORT:
                if other not in MAY_IMPORT[room] | {room}:
                    found.add(f"{name} imports {other}")
            elif other not in LIBRARIES.get(room, {other}) | sys.stdlib_module_names:
                found.add(f"{name} imports {other}")
            if imported in scripts:
                found.add(f"{name} imports the script {imported}")
    return found


def test_every_room_imports_what_its_row_allows():
    assert not find_violations(REPOSITORY)


def test_the_top_level_is_the_rooms():
    assert {path.stem for path in REPOSITORY.glob("*.py")} == MAY_IMPORT.keys() - FOLDERS
    folders = {path.parent.name for path in REPOSITORY.glob("*/*.py")} - {"tests"}
    assert folders == FOLDERS


@pytest.mark.parametrize(
    ("path", "line", "violation"),
    [
        ("engine.py", "import models", "engine imports models"),
        ("engine.py", "def late():\n    from datasets import build", "engine imports datasets"),
        ("main.py", "from tools.figures import draw", "main imports tools"),
        ("inputs/demo.py", "import datasets as data", "inputs.demo imports datasets"),
        ("models/vit.py", "import numpy", "models.vit imports numpy"),
        ("models/deep/vit.py", "from ...utils import x", "models.deep.vit imports utils"),
        ("tools/table.py", "from . import sweep", "tools.table imports the script tools.sweep"),
        ("tools/table.py", "import visualize_mask", "tools.table imports visualize_mask"),
        ("helpers.py", "", "helpers is no room"),
    ],
)
def test_a_violation_is_found(tmp_path, path, line, violation):
    allowed = {
        "models/vit.py": "import math, timm.layers\nfrom torch import nn\nfrom . import bat",
        "engine.py": "import numpy\nfrom utils import logger",
        "main.py": "import engine\nfrom models.vit import x\nif __name__ == '__main__': pass",
        "tools/sweep.py": "from tools.figures import x\nif __name__ == '__main__': pass",
        "tools/figures.py": "from datasets import x",
    }
    for name, text in allowed.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert not find_violations(tmp_path)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(line)
    assert violation in find_violations(tmp_path)
