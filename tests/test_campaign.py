"""Whole comparisons: trained and judged for real, cut short and gone on with; their tables."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from filelock import FileLock

from eval import curves, tables
from eval.measure import packed
from eval.probed import Probed, compare
from tests.conftest import ROOT, script_environment, wait_for
from training import campaign
from training.campaign import as_seen_from_here, main, require_common, runs_of
from training.checkpoint import find_checkpoint
from training.comparisons import COMPARISONS, PROBE, Comparison, Judge
from training.monitor import read_metrics
from training.presets import MAE_PRESETS, PRESETS

TRAINING = [
    "--resolution", "8", "--patch_size", "4", "--train_batch_size", "4", "--sample_steps", "0", "--report_to", "none",
    "--mixed_precision", "no", "--max_train_steps", "3", "--logging_steps", "1", "--lr_warmup_steps", "0",
]  # fmt: skip


QUICK_PROBE = Judge(PROBE.script, PROBE.data, ("--k", "3", "--test_share", "0.5", "--no-pictures"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons that take seconds: the presets of the table, the judges' real scripts."""
    monkeypatch.setitem(COMPARISONS, "demo", Comparison("a try", COMPARISONS["demo"].arms, {"probe": QUICK_PROBE}))


def two_at_once(images: Path, folder: Path) -> list[object]:
    """Flags: the demo's arms with one seed, into runs/ and results/ of a folder."""
    folders = ["--output", folder / "runs", "--results", folder / "results"]
    return ["demo", "--data", images, "--seeds", "0", "--at_once", 2, *folders]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["campaign", *map(str, arguments)])
    main()


@pytest.mark.slow
def test_a_comparison_is_finished_in_slices(small: None, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    flags = two_at_once(image_folder, tmp_path)
    monkeypatch.setattr(campaign, "SAVING_S", 0.0)
    command(monkeypatch, *flags, "--max_minutes", 0.001, *TRAINING)  # nothing, or a beginning
    assert "0 of 2 runs are done; the same command goes on" in capsys.readouterr().out
    command(monkeypatch, *flags, *TRAINING, "--arms", "decayed")
    said = capsys.readouterr().out
    assert "1 of 2 runs are done; the same command without --arms goes on" in said
    assert said.count("note (probe): the network has seen the test images in its training\n") == 1
    assert [path.stem for path in (tmp_path / "results/demo").glob("*.json")] == ["decayed-0"]
    command(monkeypatch, *flags, *TRAINING)
    assert "2 of 2 runs are done" in capsys.readouterr().out
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results/demo").glob("*.json")}
    compared = results.pop("compared-0")
    assert results.keys() == {"plain-0", "decayed-0"}
    assert {(each["contender"], each["against"]) for each in compared} == {("decayed", "plain")}
    gap = results["decayed-0"]["probe"]["value"] - results["plain-0"]["probe"]["value"]
    assert next(each for each in compared if each["metric"] == "linear probe")["difference"] == pytest.approx(gap)
    assert str(tmp_path) not in (tmp_path / "results/demo/decayed-0.json").read_text(), "results name no machine's folders"
    for result in results.values():
        assert [line["step"] for line in result["curves"]] == [1, 2, 3]
        assert 0 <= result["probe"]["value"] <= 1
    assert all(result["flags"] == [*map(str, TRAINING)] for result in results.values())
    assert results["decayed-0"]["config"]["alpha_min"] == min(results["decayed-0"]["alphas"]) == 0.5

    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, *flags, *TRAINING, "--random_flip")
    assert "plain-0 was begun without --random_flip; give the same --data and flags, or another" in capsys.readouterr().err
    with FileLock(tmp_path / "runs/.demo.lock"), pytest.raises(SystemExit, match="2"):
        command(monkeypatch, *flags, *TRAINING)
    assert "being worked on by another campaign" in capsys.readouterr().err

    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"}
    command(monkeypatch, *flags, *TRAINING)
    assert {path: path.stat().st_mtime_ns for path in times} == times, "done twice"

    runs = runs_of("demo", [0], tmp_path / "runs", tmp_path / "results")
    runs[1].gather([])  # as if it had been trained again
    assert not campaign.comparison_of(runs[0]).exists(), "it was of another run"
    assert not campaign.compare(runs, str(image_folder), deadline=time.monotonic() - 1), "there was no time"
    command(monkeypatch, *flags, *TRAINING)
    assert json.loads(campaign.comparison_of(runs[0]).read_text()) == compared

    tables.write(tmp_path / "results")
    text = (tmp_path / "results/README.md").read_text()
    assert "| decayed | 0.5 | 0.0071 | 12 | 1 |" in text and "linear probe, %" in text and "k = 3" in text
    assert all((tmp_path / f"results/demo/{name}.png").stat().st_size > 1000 for name in ("curves", "blocks"))


def test_a_training_that_fails_is_told(small: None, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "demo", "--data", image_folder, "--seeds", 0, "--output", tmp_path, "--results", tmp_path, "--patch_size", 5)
    error = capsys.readouterr().err
    assert "plain with seed 0 failed: resolution 32 is not divisible by patch_size 5" in error and error.count("\n") == 1
    run = runs_of("demo", [0], tmp_path, tmp_path)[0]
    run.begin(str(image_folder), [])  # the mended command is not refused


def test_a_project_can_be_moved_with_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "tests")
    assert as_seen_from_here("../app") == "app" and as_seen_from_here(str(tmp_path)) == str(tmp_path)
    assert as_seen_from_here("somebody/images") == "somebody/images"
    (run,) = runs_of("demo", [0], tmp_path, tmp_path)[:1]
    assert run.training("app", [])[3:5] == ["--train_data_dir", "app"], "a folder, from wherever it is called"
    run.begin("app", ["--sample_steps", "0", "--compile"])
    (run.folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="was begun with --train_data_dir app --sample_steps 0; give the same"):
        run.begin("somebody/images", ["--compile"])


@pytest.mark.slow
def test_a_training_that_breaks_down_is_a_result_and_the_others_go_on(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    wild = {"learning_rate": 1e30, "max_grad_norm": 0, "checkpointing_steps": 1}
    arms = {"plain": ("demo-plain", {}), "wild": ("demo-decayed", wild), "decayed": ("demo-decayed", {})}
    monkeypatch.setitem(COMPARISONS, "demo", Comparison("a try", arms, {"probe": QUICK_PROBE}))
    flags = [*two_at_once(image_folder, tmp_path), *TRAINING]
    command(monkeypatch, *flags)
    assert "3 of 3 runs are done (1 broke down; to train one again, delete its folder and its result)" in capsys.readouterr().out
    broke = json.loads((tmp_path / "results/demo/wild-0.json").read_text())
    assert "not finite" in broke["broke"] and "begin again" not in broke["broke"] and broke["alphas"][-1] == 0.5
    assert broke["training"]["images_seen"] in (4, 8), "of one step or two, not of the last logged line"
    assert {each["contender"] for each in json.loads((tmp_path / "results/demo/compared-0.json").read_text())} == {"decayed"}
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    command(monkeypatch, *flags)
    assert {path: path.stat().st_mtime_ns for path in times} == times, "tried again"
    tables.write(tmp_path / "results")
    text = (tmp_path / "results/README.md").read_text()
    assert "| wild | 0.5 | 0.0071 |" in text and f"images: {broke['broke']}." in text


@pytest.mark.slow
def test_a_campaign_that_is_terminated_takes_its_runs_along(image_folder: Path, tmp_path: Path) -> None:
    flags = [*two_at_once(image_folder, tmp_path), *TRAINING, "--max_train_steps", 10**6]
    process = subprocess.Popen([sys.executable, "-m", "training.campaign", *map(str, flags)], cwd=ROOT, env=script_environment())
    folders = [tmp_path / f"runs/demo/{arm}-0" for arm in ("plain", "decayed")]
    wait_for(lambda: all(read_metrics(folder) for folder in folders))
    runs = psutil.Process(process.pid).children()
    process.terminate()
    assert process.wait(60) == 130
    assert len(runs) == 2 and not any(run.is_running() for run in runs)
    assert all(find_checkpoint(folder, "latest") for folder in folders), "what was trained is kept"


def test_a_run_that_takes_too_long_to_stop_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "GRACE_S", 0.2)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
    process.stdout.readline()
    (run,) = runs_of("demo", [0], tmp_path, tmp_path)[:1]
    assert campaign._Busy(run, process, is_training=True).ended(left=-1)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("code", "told"), [("os.kill(os.getpid(), 9)", "it was killed, as a machine does"), ("sys.exit(130)", "failed: ")])
def test_a_run_that_others_ended_is_told_and_not_begun_again(code: str, told: str, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", f"import os, sys; {code}"])
    (run,) = runs_of("demo", [0], tmp_path, tmp_path)[:1]
    run.folder.mkdir(parents=True)
    run.log.touch()
    process.wait()
    with pytest.raises(ValueError, match=told):
        campaign._Busy(run, process, is_training=True).ended(left=60)


def test_what_is_compared_is_known_by_its_arms(tmp_path: Path) -> None:
    (run,) = runs_of("demo", [0], tmp_path, tmp_path)[:1]
    compared = campaign.comparison_of(run)
    assert (compared.name, campaign._compared(compared)) == ("compared-0.json", set())
    compared.parent.mkdir()
    compared.write_text(json.dumps([{"contender": "decayed", "against": "plain", "metric": each} for each in ("ridge", "kNN")]))
    assert campaign._compared(compared) == {"plain", "decayed"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--seeds", "a"], "whole numbers"),
        (["--seeds", ""], "--seeds '' cannot be read"),
        (["--seeds", "0,-1"], "-1 is below 0"),
        (["--arms", "plain,faded"], "demo has no 'faded'; choose from plain, decayed"),
        (["--arms", ""], "demo has no ''; choose from"),
        (["--at_once", "0"], "at least one"),
        (["--data", "/nowhere"], "does not exist"),
        (["--data", "models"], "holds no images"),
        (["--data", "README.md"], "holds no images"),
        (["--output", "README.md"], "cannot be written (Not a directory); choose another --output"),
        (["--results", "README.md"], "cannot be written (Not a directory); choose another --results"),
        (["--max_minutes", "0"], "give more"),
        (["--seed", "5"], "--seed tells the runs of demo apart, and cannot be given to all; give --seeds"),
        (["--alpha_min=0.7"], "--alpha_min tells the runs of demo apart"),
    ],
)
def test_bad_flags_are_told(flags: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "demo", "--data", "openmoji", *flags)
    assert told in capsys.readouterr().err


def test_flags_that_win_over_those_of_arms_are_refused() -> None:
    for name, flag in (("mae-32px-lr", "--learning_rate"), ("mae-64px-depth", "--depth"), ("mae-32px-ablation", "--no-long_skips")):
        with pytest.raises(ValueError, match=f"{flag.replace('no-', '')} tells the runs of {name} apart"):
            require_common(name, ["--compile", flag, "1e-3"])
    require_common("photographs", ["--compile", "--no-long_skips", "--learning_rate", "1e-3", "--depth=4"])


def test_arms_name_presets_and_differ(parse: Callable, tmp_path: Path) -> None:
    for name, comparison in COMPARISONS.items():
        settings = []
        for run in runs_of(name, [0], tmp_path, tmp_path):
            script, *flags = run.next_command("openmoji", 60, [])
            assert run.preset in (MAE_PRESETS if "mae" in script else PRESETS)
            settings.append(parse(script, flags))
        assert len(settings) == len(comparison.arms) > 1
        assert all(a != b for i, a in enumerate(settings) for b in settings[:i]), f"two arms of {name} are the same"


@pytest.fixture
def parse() -> Callable:
    """parse(script, flags) -> what is computed, as the script would read it."""
    from training import train_diffusion, train_mae
    from training.command import parse

    def read(script: str, flags: list[str]) -> list:
        module, presets = (train_mae, MAE_PRESETS) if "mae" in script else (train_diffusion, PRESETS)
        *groups, loop = parse("", module.GROUPS, presets, flags)[1]
        return [*groups, loop.seed, loop.max_train_steps, loop.settled(256).learning_rate]

    return read


def test_seeds_are_paired() -> None:
    mean, low, high = tables.paired({0: 3.0, 1: 5.0, 2: 4.0, 9: 100.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert mean == 2  # of 2, 3, 1: the standard deviation is 1, and t(2) at 97.5 % is 4.303
    assert (high - mean, mean - low) == pytest.approx((4.3027 / math.sqrt(3),) * 2, rel=1e-4)
    assert tables.paired({0: 1.0}, {0: 2.0}) is None


def probed(alpha_min: float, accuracy: float, backbone: str = "mae", code: str = "abc") -> dict[str, Any]:
    """A result of a probe whose best block is not the last."""
    hits = {"hits": packed(np.arange(8) < 8 * accuracy)}
    rows = [
        {
            "block": block, "time": None, "pooling": "mean", "knn": {"20": {"value": accuracy / (1 + block), **hits}},
            "linear": {"value": accuracy - 0.1 * block, "held_out_accuracy": 1.0 - block, **hits}, "ridge": hits, "norm": 1.0,
            "rank_entropy": accuracy,
        }
        for block in range(2)
    ]  # fmt: skip
    config = {"backbone": backbone, "size": "XS", "resolution": 32, "images_a_step": 2, "precision": "bf16", "learning_rate": 1e-3}
    probe = {
        "value": accuracy,
        "results": rows,
        "best": rows[0],
        "num_samples": 8,
        "test_num": 8,
        "train_num": 10,
        "rank_images": 10,
        "device": "cpu",
    }
    logged = ((500, 2 / alpha_min), (1000, 1 / alpha_min))
    curves = [
        {"images": images, "images_per_s": 5.0, "loss": loss, "block_norms": [1.0, 4 * loss], "probe_knn": 0.5} for images, loss in logged
    ]
    return {
        "config": {**config, "git_revision": code}, "training": {"images_seen": 1000, "data": "photographs"}, "alphas": [1.0, alpha_min],
        "probe": probe, "curves": curves,
    }  # fmt: skip


def broken(result: dict[str, Any], images: int) -> dict[str, Any]:
    """What is written of a training that broke down before anything was logged."""
    kept = {name: value for name, value in result.items() if name != "probe"}
    config = {**result["config"], "learning_rate": 7.0}
    return {**kept, "config": config, "broke": "the loss is not finite", "training": {"images_seen": images}, "curves": []}


def test_tables_tell_differences_from_the_first_arm_and_what_fading_alone_does() -> None:
    arms = {
        "plain": {0: probed(1.0, 0.5), 1: probed(1.0, 0.6)},
        "skips": {0: probed(1.0, 0.5), 1: probed(1.0, 0.61)},
        "decayed": {0: probed(0.5, 0.3), 1: probed(0.5, 0.4)},
    }
    means, from_plain, from_skips = grids(tables.table(arms))
    assert means["arm"]["decayed"] == "decayed"
    assert [means[name]["decayed"] for name in ("alpha_min", "seeds", "linear probe, %", "loss")] == ["0.5", "2", "35", "2"]
    assert from_plain["decayed"]["linear probe, %"] == "-20.0 [-20.0, -20.0] worse"
    assert from_plain["decayed"]["linear probe, last block, %"] == "-20.0 [-20.0, -20.0] worse"
    assert from_plain["decayed"]["kNN, last block, %"] == "-10.0 [-10.0, -10.0] worse"
    assert from_plain["decayed"]["effective rank (entropy)"] == "-0.2 [-0.2, -0.2] lower", "less is not better by itself"
    assert from_plain["decayed"]["loss"] == "+1 [+1, +1] higher", "and neither is a loss"
    assert from_plain["decayed"]["largest RMS"] == "+8 [+8, +8] higher"
    assert set(from_plain) == {"", "skips", "decayed"} and set(from_skips) == {"", "decayed"}
    assert from_skips["decayed"]["kNN, %"] == "-20.5 [-26.9, -14.1] worse"
    assert len(grids(tables.table({arm: arms[arm] for arm in ("plain", "decayed")}))) == 2, "without an arm of skips"
    assert len(grids(tables.table({arm: {0: of_seeds[0]} for arm, of_seeds in arms.items()}))) == 1, "one seed has no spread"


def grids(lines: list[str]) -> list[dict[str, dict[str, str]]]:
    """Tables in Markdown as column -> first cell of a row -> cell."""
    found, rows = [], list[list[str]]()
    for line in [*lines, ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            head, _, *body = rows
            found.append({name: {row[0]: row[i] for row in body} for i, name in enumerate(head)})
            rows = []
    return found


def test_tables_turn_to_be_higher_than_wide() -> None:
    few, many = {"a": {"x": "1", "y": "2"}, "b": {"y": "3"}}, {"a": {"x": "1"}, "b": {"x": "3"}}
    assert tables.crossed(few) == ["| | a | b |", "|---|---|---|", "| x | 1 |  |", "| y | 2 | 3 |"]
    assert tables.crossed(many) == ["| | x |", "|---|---|", "| a | 1 |", "| b | 3 |"]


def test_arms_that_broke_down_have_no_numbers() -> None:
    good, lost = probed(1.0, 0.5), broken(probed(0.5, 0.9), images=400)
    _, _, plain, decayed, _, told = tables.table({"plain": {0: good}, "decayed": {0: probed(0.5, 0.9), 1: lost}})
    assert "| 50 |" in plain and "| 1,000 | 2, 1 broke down | - |" in decayed and "90" not in decayed, "the seed that is left says too much"
    assert told == "decayed with seed 1 broke down after 400 images: the loss is not finite."
    _, _, plain, decayed, _, told = tables.table({"plain": {0: lost, 1: good}, "decayed": {0: good, 1: good}})
    assert "broke down" in plain and "| 50 |" in decayed and told.endswith("So there are no differences from it.")


def test_comparisons_are_written_whatever_broke_down(tmp_path: Path) -> None:
    good, lost = probed(1.0, 0.5), broken(probed(0.5, 0.5), images=0)

    def written(**arms: dict[str, Any]) -> str:
        for arm, result in arms.items():
            (tmp_path / "mae-32px").mkdir(exist_ok=True)
            (tmp_path / f"mae-32px/{arm}-0.json").write_text(json.dumps({**result, "comparison": "mae-32px", "arm": arm, "seed": 0}))
        tables.write(tmp_path)
        return (tmp_path / "README.md").read_text()

    text = written(plain=good, skips=good, decayed=lost)
    assert "decayed with seed 0 broke down after 0 images" in text and "learning rate 0.001 / 7," in text and "curves.png" in text
    assert "Ahead of plain in kNN" in text
    text = written(plain=lost, skips=good, decayed=good)
    assert "plain with seed 0 broke down" in text and "Ahead of" not in text, "another arm became what others are compared with"
    text = written(plain=lost, skips=lost, decayed=lost)
    assert text.count("broke down after 0 images") == 3 and "curves.png" not in text and "blocks.png" not in text


def test_runs_that_say_nothing_about_each_other_share_no_table(tmp_path: Path) -> None:
    """As when a seed was added with other images, or under a name that is not its own."""
    good, (folder, name) = probed(1.0, 0.5), (tmp_path / "mae-32px", "mae-32px")
    folder.mkdir()
    for seed, images in enumerate(("a", "a", "b")):
        found = {**good, "config": {**good["config"], "data_fingerprint": images, "seed": seed}}
        (folder / f"plain-{seed}.json").write_text(json.dumps({**found, "comparison": name, "arm": "plain", "seed": seed}))
        if images == "a":
            assert len(tables.read_results(tmp_path)[name]["plain"]) == seed + 1
    with pytest.raises(ValueError, match="mae-32px holds runs that were trained on 2 sets of images; give each a --results of its own"):
        tables.read_results(tmp_path)
    (folder / "plain-2.json").write_text(json.dumps({**found, "comparison": name, "arm": "plain", "seed": 7}))
    with pytest.raises(ValueError, match=r"plain-2\.json is of seed 2"):
        tables.read_results(tmp_path)
    looked = {"config": {**good["config"], "data_fingerprint": "a", "seed": 2, "probe_images": 10_000}, "arm": "plain", "seed": 2}
    (folder / "plain-2.json").write_text(json.dumps({**good, "comparison": name, **looked}))
    with pytest.raises(ValueError, match="mae-32px holds runs that were looked at with 2 sets of images"):
        tables.read_results(tmp_path)


def test_protocols_name_every_network() -> None:
    small, large = probed(1.0, 0.5), probed(0.5, 0.5)
    large["config"] |= {"size": "S", "depth": 24, "precision": "no"}
    assert "; quick looks at 2,500 training images (or at all, where there are fewer); device" in tables.protocol({"plain": {0: small}}), (
        "before there was a flag"
    )
    looked = {**small, "config": {**small["config"], "probe_images": 10_000}}
    assert "; quick looks at 10,000 training images (or at all, where there are fewer);" in tables.protocol({"plain": {0: looked}})
    assert "32 px, mae-XS / 32 px, mae-S of 24 blocks; 2 images a step, learning rate 0.001, bf16 / no" in tables.protocol(
        {"plain": {0: small}, "decayed": {0: large}}
    )


def test_tables_have_no_last_block_of_diffusion_models() -> None:
    head = tables.table({"plain": {0: probed(1.0, 0.5, "dit")}})[0]
    assert "linear probe, %" in head and "last block" not in head


def test_protocols_tell_of_different_code() -> None:
    arms = {"plain": {0: probed(1.0, 0.5)}, "decayed": {0: probed(0.5, 0.3), 1: probed(0.5, 0.3, code="def")}}
    assert tables.protocol(arms).endswith("trained by different revisions: plain abc, decayed abc def.")
    assert "revisions" not in tables.protocol({"plain": arms["plain"]})


def test_where_curves_cross() -> None:
    theirs = [(10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0)]
    assert tables.crossing([(10, 2.0), (20, 1.0), (30, 3.5), (40, 5.0)], theirs) == 30
    assert tables.crossing([(10, 2.0), (20, 3.0), (30, 4.0), (40, 5.0)], theirs) == 10
    assert tables.crossing([(10, 2.0), (20, 3.0), (30, 4.0), (40, 4.0)], theirs) is None
    assert tables.crossing([(10, 0.0), (20, 0.0), (30, 0.0), (40, 5.0)], theirs) is None, "one look may be chance"


def log(**curves: list[Any]) -> dict[str, Any]:
    """A result with these curves, a look at every 10 images."""
    lines = [dict(zip(curves, values, strict=True)) for values in zip(*curves.values(), strict=True)]
    return {"curves": [{"images": 10 * (i + 1), **line} for i, line in enumerate(lines)], "config": {"size": "XS"}}


def test_crossings_are_told_seed_by_seed() -> None:
    plain, decayed = log(probe_knn=[0.2, 0.2, 0.2], fd=[9, 9, 9]), log(probe_knn=[0.1, 0.3, 0.3], fd=[8, 8, 8])
    arms = {"plain": {0: plain, 1: plain}, "decayed": {0: decayed, 1: plain, 2: decayed}}
    told = "Ahead of plain in {}, for two looks or more and to the end: decayed {} (seed 0), never (seed 1)."
    assert tables.crossings(arms, curves.KNN, 1) == told.format(curves.KNN.label, "from 20 images on")
    assert tables.crossings(arms, curves.FD, -1) == told.format(curves.FD.label, "from the first look on")
    several = {"plain": {0: plain, 1: plain, 2: plain}, "decayed": arms["decayed"]}
    assert tables.crossings(several, curves.KNN, 1).endswith("decayed from 20 images on (seeds 0, 2), never (seed 1).")
    assert tables.crossings(several, curves.LINEAR, 1) == "", "nobody looked at that"
    looked = {arm: {0: log(probe_linear=[0.1 * (arm == "decayed")] * 3)} for arm in arms}
    assert "linear probe of a quick look, %" in tables.crossings(looked, curves.LINEAR, 1)
    without = {arm: {0: log(probe_knn=[None])} for arm in arms}
    assert tables.crossings(without, curves.KNN, 1) == "", "nothing was looked at"


def test_differences_over_images_are_told(tmp_path: Path) -> None:
    each = {"contender": "decayed", "against": "plain", "difference": 0.012, "low": 0.0031, "high": 0.021, "verdict": "better"}
    drawn = {**each, "metric": "FD", "difference": -5.4321, "low": -6.0, "high": -5.0}
    path = tmp_path / "compared-7.json"
    path.write_text(
        json.dumps([{**each, "metric": "linear probe"}, {**each, "metric": "ridge"}, drawn, {**drawn, "metric": "FD_infinity"}])
    )
    told = tables.over_images(path, {})
    assert "of seed 7" in told[1]
    (cells,) = grids(told)
    assert {name: cells["decayed"][name] for name in ("linear probe", "ridge")} == dict.fromkeys(
        ("linear probe", "ridge"), "+1.2 [+0.3, +2.1] better"
    )
    assert cells["decayed"]["FD"] == cells["decayed"]["FD_infinity"] == "-5.43 [-6, -5] better"
    assert told[1].startswith("Differences from plain, of seed 7"), "though plain may have broken down with another seed"
    path.write_text(json.dumps([{**each, "metric": "ridge"}, {**each, "metric": "ridge", "against": "skips"}]))
    with pytest.raises(ValueError, match="compares arms with plain and skips"):
        tables.over_images(path, {})
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="does not compare arms of training"):
        tables.over_images(path, {})


def test_probes_are_paired_over_images_without_a_file(tmp_path: Path) -> None:
    def result(hits: list[int]) -> dict[str, Any]:
        found = {"hits": packed(np.array(hits, bool)), "value": np.mean(hits)}
        row = {"time": None, "block": 0, "pooling": "mean", "linear": found, "knn": {"3": found}, "ridge": found}
        return {"probe": {"results": [row], "best": row, "test_num": len(hits)}}

    arms = {"plain": {0: result([1, 0, 0, 0] * 25)}, "decayed": {0: result([1, 1, 0, 0] * 25)}}
    (cells,) = grids(told := tables.over_images(tmp_path / "compared-0.json", arms))
    assert told[1].startswith("Differences from plain, of seed 0")
    assert cells["decayed"]["linear probe"] == cells["decayed"]["ridge"] == "+25.0 [+15.7, +33.3] better"
    path = tmp_path / "compared-0.json"  # of some of the arms
    path.write_text(json.dumps(before := compare([Probed(arm, None, arms[arm][0]["probe"]) for arm in arms])))
    assert len(before) == 3 and "faded" in grids(tables.over_images(path, {**arms, "faded": arms["plain"]}))[0]
    path.unlink()
    assert tables.over_images(path, {"plain": {0: {"fd": {}}}, "decayed": {0: {"fd": {}}}}) == []


def test_hopes_are_answered_by_the_largest_comparison_over_seeds() -> None:
    small = {"plain": {0: probed(1.0, 0.5), 1: probed(1.0, 0.4)}, "decayed-lr-0.0005": {0: probed(0.5, 0.25), 1: probed(0.5, 0.2)}}
    for result in (run for of_seeds in small.values() for run in of_seeds.values()):
        result["config"] |= {"size": "XS", "resolution": 32}
    line = "| masked autoencoder, linear probe, % | 1.07 times or more | 0.50 [0.50, 0.50] times | `mae-32px` (mae-XS, 32 px): {} |"
    assert line.format("decayed-lr-0.0005 against plain") in tables.hopes({"mae-32px": small})
    large = {"plain": small["plain"], "decayed": small["plain"]}
    assert any("1.00 [1.00, 1.00] times | `mae-64px`" in line for line in tables.hopes({"mae-32px": small, "mae-64px": large}))
    assert tables.hopes({"mae-32px": {arm: {0: of_seeds[0]} for arm, of_seeds in small.items()}}) == [], "one seed answers nothing"


def test_sides_of_intervals_can_be_seen() -> None:
    assert tables._points(0.87, 0.026, 1.71) == "+0.87 [+0.03, +1.71]", "not +0.0, which may lie on either side"
    assert tables._points(-0.7, -1.5, -0.004) == "-0.700 [-1.500, -0.004]"
    assert tables._points(0.0, 0.0, 1.0) == "+0.0 [+0.0, +1.0]" and tables._points(1.0, -0.25, 2.25) == "+1.0 [-0.2, +2.2]"


def test_what_repeats_a_comparison_names_seeds_and_arms() -> None:
    compiled = {"config": {"compile": True}}
    command = "`python -m training.campaign demo --data FOLDER --seeds {}`"
    assert tables.commands("demo", {arm: {0: compiled, 1: compiled} for arm in ("plain", "decayed")}) == (
        f"Repeated by {command.format('0,1 --compile')}."
    )
    flags = {"config": {"compile": True}, "flags": ["--compile", "--num_workers", "2"]}
    assert "--seeds 0 --compile --num_workers 2`" in tables.commands("demo", {arm: {0: flags} for arm in ("plain", "decayed")})
    told = tables.commands("demo", {"plain": {0: flags, 1: compiled}, "decayed": {0: flags, 1: compiled}})
    assert told == (
        f"Repeated by {command.format('0 --arms plain,decayed --compile --num_workers 2')} and "
        f"{command.format('1 --arms plain,decayed --compile')}."
    )
    eager = {"config": {}}
    assert tables.commands("demo", {"plain": {0: eager, 1: eager}, "decayed": {0: eager}}) == (
        f"Repeated by {command.format('0,1 --arms plain')} and {command.format('0 --arms decayed')}."
    )


def test_curves_leave_out_what_is_missing_or_infinite() -> None:
    result = log(probe_knn=[None, 0.5, math.nan], block_norms=[[1.0, 2.0], [math.inf, 1.0], None])
    (largest,) = (panel for panel in curves.CURVES if panel.label == "largest RMS of a block")
    assert curves.points(result, curves.KNN) == [(20, 50.0)]
    assert curves.points(result, largest) == [(10, 2.0)]
    assert curves.points(result, curves.FD) == []


def test_blocks_are_compared_at_one_place() -> None:
    def run(best_time: float, missing: int | None) -> dict[str, Any]:
        rows = [
            {
                "time": time, "pooling": pooling, "block": block, "knn": {"3": {"value": 0.1 * block}}, "norm": 1.0,
                "linear": {"value": 0.5, "held_out_accuracy": float(time == best_time)},
                "rank_entropy": None if block == missing else 1.0,
            }
            for time in (0.5, 0.7) for pooling in ("mean", "class") for block in range(3)
        ]  # fmt: skip
        return {"probe": {"results": rows}}

    arms = {"plain": {0: run(0.7, missing=0)}, "decayed": {0: run(0.5, missing=None)}}
    figure, where = curves.by_block(arms)
    assert where == "by block, of the mean of all tokens at t = 0.7"
    knn, _, rank, _ = figure.axes
    assert [line.get_xydata().tolist() for line in knn.lines] == [[[0, 0], [1, 10], [2, 20]]] * 2
    plain, decayed = rank.lines
    assert plain.get_xdata().tolist() == [1, 2] and decayed.get_xdata().tolist() == [0, 1, 2], "a rank that is not known is left out"
    assert plain.get_color() != decayed.get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "decayed"]


def test_curves_are_drawn_over_images_and_over_time() -> None:
    arms = {
        "plain": {0: log(loss=[3, 2], images_per_s=[5, 5]), 1: log(loss=[2, 1], images_per_s=[5, 5])},
        "decayed": {0: log(loss=[4, 2], images_per_s=[10, 10])},  # which shared its machine less
    }
    (over_images,) = curves.curves(arms).axes  # what no run has looked at gets no panel
    assert [line.get_xydata().tolist() for line in over_images.lines] == [[[10, 3], [20, 2]], [[10, 2], [20, 1]], [[10, 4], [20, 2]]]
    assert len({line.get_color() for line in over_images.lines}) == 2, "a colour for each arm"
    (minutes,) = over_images.child_axes
    minutes.figure.draw_without_rendering()
    assert minutes.get_xlim() == pytest.approx([end / 600 for end in over_images.get_xlim()]), "at the fastest run's speed"


def test_networks_that_cost_more_have_a_time_of_their_own() -> None:
    deep = {**log(loss=[4, 2], images_per_s=[1, 1]), "config": {"size": "XS", "depth": 12}}
    arms = {
        "plain": {0: log(loss=[3, 2], images_per_s=[5, 5])},
        "deep": {0: deep},
        "lost": {0: {**deep, "broke": "the loss is not finite"}},
    }
    _, over_time = curves.curves(arms).axes
    assert [line.get_xdata()[-1] for line in over_time.lines] == pytest.approx([20 / 300, 20 / 60, 20 / 60])
    alone = {"plain": arms["plain"], "lost": {0: {**deep, "broke": "", "curves": []}}}
    assert len(curves.curves(alone).axes) == 2, "one that broke down before anything was logged has no speed"


def test_time_is_that_of_training() -> None:
    assert curves.images_a_minute(log(images_per_s=[5, 1, 7])) == 60 * 5
    deep = {**log(images_per_s=[2, 2]), "config": {"size": "XS", "depth": 12}}
    speeds = curves.fastest([log(images_per_s=[4]), log(images_per_s=[9]), deep])
    assert sorted(speeds.values()) == [60 * 2, 60 * 9], "deeper ones have a speed of their own"


def test_folders_without_results_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no results of a campaign; python -m training\.campaign"):
        tables.write(tmp_path)
