"""Progress where nobody looks at a terminal; how the page is told stands in test_jobs.py."""

import time

import pytest

from models import progress


def test_a_log_gets_lines_of_what_takes_long(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress.progress_bar(range(3), "packing", unit=" images"):
        pass
    assert capsys.readouterr().err == "", "what is done at once has none"
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.05)
    for _ in progress.progress_bar(range(4), "generating", unit=" images"):
        time.sleep(0.06)
    assert len(capsys.readouterr().err.splitlines()) == 1, "the next would be due in a minute"
    monkeypatch.setattr(progress, "LINE_S", 0.05)
    for i in progress.progress_bar(range(400), "generating", unit=" images"):
        time.sleep(0.03 if i < 8 else 0.0002)  # faster from the first lines on
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert "\r" not in said and 2 <= len(lines) <= 20, said
    assert all(line.startswith("generating: ") and " of 400 images, " in line and line.endswith(" left") for line in lines), said
    assert [int(line.split()[1]) for line in lines] == sorted({int(line.split()[1]) for line in lines}), "counted on"
