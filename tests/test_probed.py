"""Probes of several networks side by side: pairs, verdicts, the page, and what is refused."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from eval.intervals import difference, share, verdict
from eval.measure import accuracy, hash_of, packed, unpacked
from eval.probed import compare, notes_of, read_probed

LABELS = torch.arange(400) % 2


def result(right: float, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Of a network that is right that often; with the same seed a better one is right wherever a worse one is."""
    order = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
    found = accuracy(torch.where(order < 400 * right, LABELS, 1 - LABELS), LABELS)
    row = {
        "time": None, "pooling": "mean", "knn": {"20": found}, "linear": found, "ridge": found, "rank_entropy": 2.5,
        "rank_exponential": 12.2, "norm": 3.0, "spectrum": [3.0, 2.0, 1.0], "silhouette": 0.1,
    }  # fmt: skip
    return {
        "metric": "linear probe accuracy", "value": found["value"], "best": {"time": None, "block": 1, "pooling": "mean"}, "test_num": 400,
        "train_num": 800, "dataset": "some", "resolution": 16, "precision": "fp32", "crop": "centre", "seed": 0, "ema": False,
        "temperature": 0.07, "train_labels": hash_of(LABELS), "test_labels": hash_of(LABELS), "images_seen": 9600, "alpha_min": 0.6,
        "notes": [], "results": [{**row, "block": 0, "linear": {**found, "value": 0.9}}, {**row, "block": 1}], **changes,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """run("name", right=.7): a run's folder with probes and a log."""

    def make(name: str, right: float, **changes: Any) -> str:
        folder = tmp_path / name
        (folder / "eval").mkdir(parents=True)
        (folder / "eval" / "probe.json").write_text(json.dumps(result(right, **changes)))
        lines = [{"step": step, "images": 32 * step, "loss": 1 / step, "effective_rank": 2.0, "probe_knn": 0.3} for step in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(folder)

    return make


@pytest.fixture
def script(run_here: Callable) -> Callable[..., tuple[int, str, str]]:
    """eval/compare.py: returns (exit code, stdout, stderr)."""
    return partial(run_here, "eval/compare.py")


@pytest.mark.parametrize("num", [1, 8, 13])
def test_hits_survive_packing(num: int) -> None:
    hits = np.random.default_rng(0).random(num) < 0.5
    assert (unpacked(packed(hits), num) == hits).all()


def test_differences_are_of_pairs(run: Callable) -> None:
    """3 points apart on the same 400 images: the intervals overlap by far, that of the paired difference leaves out 0."""
    entries = read_probed([run("plain", 0.70), run("decayed", 0.73)])
    rows = compare(entries)
    assert [row["metric"] for row in rows] == ["linear probe", "kNN, k = 20", "ridge"]
    (plain, decayed), row = entries, rows[0]
    assert plain.accuracies["linear probe"]["high"] > decayed.accuracies["linear probe"]["low"]
    assert row["difference"] == pytest.approx(0.03)
    gained, lost = 13 / 402, 1 / 402  # 12 of 400 differ, all in one direction; and one more for either side
    middle, reach = gained - lost, 1.96 * ((gained + lost - (gained - lost) ** 2) / 402) ** 0.5
    assert (row["low"], row["high"]) == (pytest.approx(middle - reach, abs=1e-5), pytest.approx(middle + reach, abs=1e-5))
    assert row["verdict"] == "better"


@pytest.mark.parametrize(
    ("right", "seed", "verdict"), [(0.70, 0, "undecided"), (0.72, 1, "undecided"), (0.5, 1, "worse"), (0.9, 1, "better")]
)
def test_there_is_a_winner_only_where_the_interval_leaves_out_0(right: float, seed: int, verdict: str, run: Callable) -> None:
    rows = compare(read_probed([run("plain", 0.70), run("other", right, seed=seed)]))
    assert {row["verdict"] for row in rows} == {verdict}


@pytest.mark.parametrize("num", [0, 1, 3, 4, 5, 6, 9])
def test_verdicts_on_few_pairs_are_those_of_the_exact_test(num: int) -> None:
    """McNemar's; and where no pair differs, the difference is known to some images, not exactly."""
    hits = np.arange(400) < 200
    found = difference(share(np.arange(400) < 200 + num), share(hits))
    low, high = found.interval()
    exact = binomtest(num, num).pvalue if num else 1.0
    assert found.value == pytest.approx(num / 400) and low < found.value < high
    assert verdict(low, high, lower_is_better=False) == ("better" if exact < 0.05 else "undecided")


@pytest.mark.parametrize(("gained", "lost"), [(0.005, 0.0), (0.02, 0.005), (0.1, 0.05)])
def test_intervals_of_pairs_cover(gained: float, lost: float) -> None:
    draws = np.random.default_rng(0).random((1000, 350))
    covered = 0
    for draw in draws:
        low, high = difference(share((draw < gained) | (draw > 0.5)), share((draw > 0.5) | (abs(draw - 0.3) < lost / 2))).interval()
        covered += low <= gained - lost <= high
    assert covered >= 940


def test_the_chosen_place_is_compared_and_not_the_best_on_test_images(run: Callable) -> None:
    (entry,) = read_probed([run("plain", 0.70)])
    assert entry.best["block"] == 1 and entry.accuracies["linear probe"]["value"] == 0.7
    assert [row["block"] for row in entry.line] == [0, 1]


def test_a_page_with_everything(run: Callable, script: Callable, tmp_path: Path) -> None:
    few = [{"share": 0.1, "value": 0.5, "std": 0.02, "images": 80}]
    one, other = run("plain", 0.70, few_shot=few), run("decayed", 0.75, resolution=32, notes=["random weights"])
    code, out, err = script(one, other, "--output", tmp_path / "out")
    assert code == 0, err
    assert "70.0 [65.3, 74.3]" in out and "+5.0 [" in out and "better" in out and "50.0 ± 2.0" in out
    assert "not all have the same resolution: 16, 32" in out and f"{other}: random weights" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"comparison.json", "comparison.html", "probes.png"}
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "kNN accuracy on some of the training images" in page and "better" in page
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [entry["name"] for entry in kept["entries"]] == [one, other] and len(kept["differences"]) == 3


def test_unequal_efforts_are_told_or_not_compared(run: Callable) -> None:
    tuned = accuracy(LABELS, LABELS)
    changes = [{"pooling": "all", "times": None, "epochs": 2}, {"pooling": "class", "times": [0.5], "epochs": 50}]
    entries = read_probed(
        [run(str(i), 0.7, finetune={**tuned, "epochs": each.pop("epochs"), "batch_size": 64 + i}, **each) for i, each in enumerate(changes)]
    )
    assert not [row for row in compare(entries) if "tuned" in row["metric"]]
    assert [row["metric"] for row in compare([entries[0], entries[0]])][-1] == "fine-tuned, 2 epochs"
    notes = notes_of(entries)
    assert "not all have the same batch_size of fine-tuning: 64, 65" in notes and not [note for note in notes if "learning_rate" in note]
    assert "not all have the same pooling: all, class" in notes and "not all have the same times: None, [0.5]" in notes


def test_files_of_results_do_as_well(run: Callable, script: Callable, tmp_path: Path) -> None:
    files = [Path(run(name, 0.7)) / "eval" / "probe.json" for name in ("one", "other")]
    code, out, _ = script(*files)
    assert code == 0 and out.count("undecided") == 3
    gathered = [tmp_path / f"plain-{seed}.json" for seed in (0, 1)]  # as training.campaign does
    for seed, path in enumerate(gathered):
        probe, config = json.loads(files[0].read_text()), {"seed": seed, "learning_rate": 1e-3}
        path.write_text(json.dumps({"arm": "plain", "seed": seed, "config": config, "probe": probe, "comparison": "demo", "fd": {}}))
    code, out, _ = script(files[1], gathered[0], "--output", tmp_path / "page")
    assert code == 0 and out.count("undecided") == 3 and (tmp_path / "page" / "comparison.html").is_file()
    assert "of training" not in out and "measured, too" not in out
    code, out, _ = script(*gathered)
    assert code == 0 and "note: not all have the same seed of training: 0, 1\n" in out and "learning_rate of training" not in out
    assert "measured, too" not in out, "two seeds are no pair"
    other = tmp_path / "decayed-0.json"
    other.write_text(gathered[0].read_text().replace("plain", "decayed"))
    assert "note: their samples were measured, too: demo/compared-0.json holds" in script(gathered[0], other)[1]
    code, out, err = script(gathered[0], gone := tmp_path / "gone.json")
    assert (code, out) == (2, "")
    assert err == f"error: {gone} does not exist; give .json files of earlier evaluations, or folders of runs\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": "0"}, "not probed with the same images"),
        ({"temperature": 0.1}, "temperature 0.07 and 0.1"),
        ({"drawn": {"test_share": 0.2, "seed": 1}}, "drawn None and {'test_share': 0.2, 'seed': 1}"),  # other images of the same labels
        (None, "holds no result of eval/probe.py; probe it first"),
    ],
)
def test_what_cannot_stand_side_by_side(
    changes: dict[str, Any] | None, message: str, run: Callable, script: Callable, tmp_path: Path
) -> None:
    other = tmp_path / "empty" if changes is None else run("other", 0.7, **changes)
    code, out, err = script(run("plain", 0.7), other)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and message in err


def test_results_of_an_earlier_version_are_told(run: Callable, script: Callable) -> None:
    old = Path(run("old", 0.7)) / "eval" / "probe.json"
    kept = json.loads(old.read_text())
    old.write_text(json.dumps({key: value for key, value in kept.items() if key != "test_labels"}))
    code, _, err = script(run("new", 0.7), old)
    assert code == 2 and "lacks test_labels; probe again" in err
