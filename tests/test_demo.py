"""`make demo`, with a few steps."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_demo_trains_judges_and_reports(run_script: Callable, tmp_path: Path) -> None:
    command = ["-m", "eval.demo", "--output_dir", tmp_path / "demo", "--max_train_steps", 2, "--num_samples", 4]
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "demo" / "report.html").read_text()
    assert report.count('src="data:image/png;base64,') == 4
    assert "FD (efficientnet-lite0)" in report and "say nothing about the effect" in report
    assert (tmp_path / "demo-plain" / "model_index.json").exists()
    again = run_script(*command)
    assert again.stdout.count("is trained already") == 2, again.stderr
