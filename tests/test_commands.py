"""Small commands, run as users run them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from models.files import read_json
from tests.conftest import ROOT

PRODUCT = [path for folder in ("models", "training", "eval", "app") for path in sorted((ROOT / folder).glob("*.py"))]
COMMANDS = [str(path.relative_to(ROOT)) for path in PRODUCT if '\nif __name__ == "__main__":' in path.read_text()]


@pytest.mark.parametrize("command", [*COMMANDS, "tests/benchmarks/__main__.py", "tests/screenshot.py"])
def test_every_command_has_help_with_defaults(command: str, run_here: Callable) -> None:
    code, said, errors = run_here(command, "--help")
    assert code == 0 and not errors
    assert "usage:" in said and ("default" in said or command == "training/publish.py")


@pytest.mark.parametrize("code", ["import models, torchvision.transforms, timm", "import eval.encoders"])
def test_torchvision_imports_whatever_it_was_built_for(code: str, run_script: Callable) -> None:
    # -S leaves out the environment's own hook, so that the cure is tested and not its trace; PYTHONPATH brings the packages back
    import torch

    packages = Path(torch.__file__).parent.parent
    setup = f"import sys; sys.path.append({str(packages)!r})"
    program = f"{setup}; {code}; import torchvision.ops; print('fine')"
    done = run_script("-S", "-c", program)
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.slow
def test_benchmarks_run(run_script: Callable, run_here: Callable, tmp_path: Path) -> None:
    done = run_script("-m", "tests.benchmarks", "alpha", "--pairs", 1, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    case = read_json(tmp_path / "out.json")["alpha"]
    assert case["ratio_median"] == pytest.approx(case["ours_s_median"] / case["theirs_s_median"])
    assert "| alpha | dit: decayed step / plain step, of one network |" in (tmp_path / "RESULTS.md").read_text()
    for bad in (["nonsense"], ["loop", "--peer", tmp_path], ["uvit-loop"]):
        code, _, error = run_here("tests/benchmarks/__main__.py", *bad)
        assert (code, error.count("\n")) == (2, 1), error


def test_the_cure_can_be_installed_again(run_script: Callable) -> None:
    """`make` does so when the requirements have changed."""
    for _ in range(2):
        done = run_script("-c", "from models.compat import install; install()")
        assert done.returncode == 0, done.stderr
