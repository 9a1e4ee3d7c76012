"""The walls of the house: models -> training -> eval, app."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

ORDER = {"models": 0, "training": 1, "eval": 2, "app": 2}
MODULES = [path for folder in ORDER for path in sorted((ROOT / folder).glob("*.py"))]
SUM = r"addcmul|torch\.add\(|alpha \* |\* (\w+\.)?alpha\b|\balpha=(\w+\.)?alpha\b|\.mul_?\((\w+\.)?alpha|lerp.*\balpha\b"
BACKBONES = {"dit", "uvit", "unet", "mae"}


def is_script(path: Path) -> bool:
    """Entry scripts are the roof: they may use everything, and nothing imports them."""
    return path.name in {"train_diffusion.py", "train_mae.py", "campaign.py", "fid.py", "probe.py", "compare.py", "demo.py"}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_run_leftward(path: Path) -> None:
    here = path.parent.name
    for name in imports(path):
        there, _, module = name.partition(".")
        if there not in ORDER:
            continue
        assert not is_script(ROOT / there / f"{module}.py"), f"{path} imports the script {name}"
        if there != here and not is_script(path):
            assert ORDER[there] < ORDER[here], f"{path} imports {name}"
        if here == there == "models" and path.stem in BACKBONES:
            assert module not in BACKBONES, f"the backbone {path} imports the backbone {name}"


def test_the_equation_stands_in_one_place() -> None:
    for path in MODULES:
        if path.name != "shortcut.py":
            found = re.search(SUM, path.read_text())
            assert not found, f"{path} writes the decayed sum once more ({found[0]}); use decayed_add"


def test_the_image_is_given_all_that_it_copies() -> None:
    given = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [line.split()[1:-1] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
    assert copies and {source for line in copies for source in line} == given
