"""Shared by all tests: caches that vanish, tiny models, scripts run as users run them."""

import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

# No test reads or fills the user's caches; the hub is off, so nothing waits for a network. Libraries read these when imported.
_cache = tempfile.TemporaryDirectory(prefix="fading-shortcuts-tests-")
os.environ["XDG_CACHE_HOME"] = os.environ["HF_HOME"] = _cache.name
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first: files with many slow tests, so that workers who take a file at a time end together."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess]:
    """Run a script of the project by path from its root: run_script("eval/fid.py", "--help")."""

    def run(*command: str, **options: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, env=script_environment(), capture_output=True, text=True, timeout=300, **options
        )

    return run


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """run_here("eval/fid.py", "--help"): as run_script, but in this process; returns (exit code, stdout, stderr)."""
    from accelerate.state import AcceleratorState

    def run(script: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        AcceleratorState._reset_state(True)  # else it keeps the precision of whatever ran before
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    """Until the condition holds; fails after so long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def script_environment() -> dict[str, str]:
    """Environment for subprocesses: the project is importable even where it is not installed, tiny models stay on one thread, and
    a crash tells where."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


@pytest.fixture
def tiny_dit() -> Callable[..., torch.nn.Module]:
    """A DiT with random weights everywhere, the zero-initialised parts too: tiny_dit(alpha_min=0.5)."""
    from models import DiT

    def make(seed: int = 0, **options: object) -> torch.nn.Module:
        torch.manual_seed(seed)
        sizes = dict(image_size=16, patch_size=4, depth=4, dim=32, num_heads=2, num_classes=3)
        model = DiT(**{**sizes, **options})
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 coloured pictures in two classes, of mixed modes and sizes."""
    folder = tmp_path_factory.mktemp("images")
    draws = np.random.default_rng(0)
    for i in range(24):
        directory = folder / ("warm" if i % 2 else "cold")
        directory.mkdir(exist_ok=True)
        size = int(draws.integers(12, 40)), int(draws.integers(12, 40))
        image = Image.fromarray(draws.integers(0, 255, (*size, 3), dtype=np.uint8))
        image.convert(("RGB", "L", "RGBA", "P")[i % 4]).save(directory / f"{i:02}.png")
    return folder
