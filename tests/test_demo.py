"""`make demo`, with a few steps."""

from collections.abc import Callable
from pathlib import Path

import pytest

from eval.demo import PAIR, train


@pytest.mark.slow
def test_the_demo_trains_judges_and_reports(run_script: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    done = run_script("-m", "eval.demo", "--output_dir", tmp_path / "demo", "--max_train_steps", 2, "--num_samples", 4)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "demo" / "report.html").read_text()
    assert report.count('src="data:image/png;base64,') == 4
    assert "FD (efficientnet-lite0)" in report and "say nothing about the effect" in report
    for kind in PAIR:
        train(kind, tmp_path / f"demo-{kind}", 2)
    assert capsys.readouterr().out.count("is trained already") == 2
