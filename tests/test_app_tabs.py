"""Blind test, Look inside, Train and Judge, in a real browser and through the endpoints for programs; real trainings of tiny models."""

import base64
import csv
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, expect

from app import catalog
from app.inside import colours, reconstruct, sample_features
from app.jobs import Jobs
from app.look_tab import probe_curves, probed
from app.recipe import KEY
from app.settings import Comparison
from app.site import Site
from app.ui import build
from app.votes import Votes
from models import Pipeline, create_model
from models.files import read_json, write_json
from tests.screenshot import PATIENCE_MS, app_server, chromium, open_page
from tests.test_vae import make_vae
from tests.tiny_pair import CLASSES, PAIR, write_pair
from training.checkpoint import export_network
from training.ema import EMA
from training.objectives import FlowMatching

if TYPE_CHECKING:
    from playwright.sync_api import Page

expect.set_options(timeout=20_000)
slow = pytest.mark.slow
TINY = {"resolution": 8, "patch_size": 4, "alpha_min": 0.6, "train_batch_size": 4}
FLAGS = {"dataset_name": "openmoji"}
MAES = "runs/mae-plain", "runs/mae-decayed"


def write_autoencoders(runs: Path) -> None:
    for name, alpha_min in zip(MAES, (1.0, 0.6), strict=True):
        torch.manual_seed(0)
        model = create_model("mae", "XS", image_size=16, patch_size=4, alpha_min=alpha_min)
        export_network(runs.parent / name, model, EMA(model.parameters(), 0.0), (), {"steps": 1, "images_seen": 2, "data": "x"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_pair(tmp_path_factory.mktemp("tabs") / "runs")
    write_autoencoders(folder)
    return folder


@pytest.fixture(scope="module")
def server(runs: Path, image_folder: Path) -> Iterator[str]:
    """Address of a page whose trainings read images from one folder only."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with app_server(runs, "--data", str(image_folder.parent)) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def opened(browser: Browser, server: str) -> tuple["Page", list[str]]:
    """The page, and what was complained about in the console."""
    page, trouble = browser.new_page(viewport={"width": 1280, "height": 1000}), []
    page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    open_page(page, server)
    return page, trouble


@pytest.fixture
def page(opened: tuple["Page", list[str]]) -> Iterator["Page"]:
    page, trouble = opened
    yield page
    assert trouble == []


def handler(page: gr.Blocks, name: str, of: str = "") -> Any:
    """What the page does when a widget is used, without a browser; of several of that name the one that writes to that element."""
    found = [each for each in page.fns.values() if each.name == name]
    return next(each for each in found if not of or of in [output.elem_id for output in each.outputs])


def by_element(updates: dict[Any, Any]) -> dict[str | None, Any]:
    """What a handler gives, by the elements of the widgets; None is the page's memory."""
    return {widget.elem_id: update for widget, update in updates.items()}


def write_job(runs: Path, name: str) -> Path:
    """A training that was cancelled in the queue."""
    write_json(runs / name / "job.json", {"options": {}, "queued_at": 1.0, "stop_asked_at": 2.0})
    return runs / name


def visit(page: "Page", tab: str) -> None:
    page.get_by_role("tab", name=tab, exact=True).click()


def pick(page: "Page", element: str, *options: str) -> None:
    """Choose from a dropdown, of which several may be chosen."""
    box = page.locator(f"#{element} input")
    for option in options:
        box.click()
        page.get_by_role("option", name=option, exact=True).click()
    page.keyboard.press("Escape")
    page.get_by_role("option").first.wait_for(state="detached")  # it fades


def write(page: "Page", element: str, value: object) -> None:
    page.locator(f"#{element} :is(textarea, input)").first.fill(str(value))


def press(page: "Page", name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


# -------------------------------------------------------------------------------------------------------------- blind test


@slow
def test_votes_are_blind_counted_once_and_exported(page: "Page", runs: Path, tmp_path: Path) -> None:
    visit(page, "Blind test")
    for element, name in zip(("blind-0", "blind-1"), PAIR, strict=True):
        pick(page, element, name)
    pick(page, "blind-1", PAIR[0])
    press(page, "Show a pair")
    expect(page.get_by_test_id("toast-text")).to_have_text(f"{PAIR[0]} cannot be compared with itself; choose two checkpoints")
    page.get_by_test_id("toast-close").click()
    pick(page, "blind-1", PAIR[1])
    told = page.locator("#blind-status")
    left, files = [], []
    for i in range(2):
        press(page, "Show a pair")
        expect(told).to_contain_text("Which side is better?", timeout=PATIENCE_MS)
        expect(page.locator("#blind-stage img")).to_have_count(12)
        markup = page.locator("#blind-stage").inner_html()
        assert not any(word in markup for word in ("tiny", "plain", "decayed", "seed", "α"))
        source = page.locator("#blind-stage img").first.get_attribute("src")
        assert KEY.encode() not in base64.b64decode(source.partition(",")[2])
        press(page, ("Left is better", "Both bad")[i])
        expect(told).to_contain_text("Your vote")
        left.append(told.inner_text().split("Left was ")[1].split(",")[0])
        expect(page.get_by_role("button", name="Left is better")).to_be_disabled()
        with page.expect_download() as download:
            page.locator("#votes-csv").click()
        files.append(download.value)
    assert set(left) <= set(PAIR)
    expect(page.locator("#tallies tbody tr")).to_have_count(1)
    expect(page.locator("#tallies tbody td:last-child")).to_have_text("1")
    assert files[0].url == files[1].url, "no copy of each version is kept"
    rows = list(csv.DictReader(Path(files[1].path()).read_text().splitlines()))
    assert [row["choice"] for row in rows] == ["left", "both bad"] and rows[0]["winner"].startswith(f"{left[0]} (")
    with closing(sqlite3.connect(runs / "votes.sqlite")) as base:
        assert base.execute("PRAGMA journal_mode").fetchone() == ("wal",)


# ------------------------------------------------------------------------------------------------------------- look inside


def test_colours_follow_the_principal_components() -> None:
    ramp = np.linspace(-1, 1, 16).repeat(8).reshape(2, 64, 1)
    tokens = ramp * np.array([[3.0, 0.0, 4.0]]) + 1e-9 * np.random.default_rng(0).normal(size=(2, 64, 3))
    maps = colours(tokens)
    assert maps.shape == (2, 8, 8, 3) and maps.dtype == np.uint8
    first = maps[..., 0].astype(int).ravel()
    assert (np.diff(first) >= 0).all() and (first.min(), first.max()) == (0, 255), "one component, over both moments together"
    assert colours(np.ones((1, 6, 2))).shape == (1, 1, 6, 3)
    tokens = np.random.default_rng(0).normal(size=(2, 64, 24)) * np.arange(1, 25)
    flat = tokens.reshape(-1, 24) - tokens.mean(axis=(0, 1))
    *_, third, second, first = np.linalg.eigh(flat.T @ flat)[1].T
    for colour, axis in enumerate((first, second, third)):
        assert abs(np.corrcoef(colours(tokens)[..., colour].ravel(), flat @ axis)[0, 1]) > 0.99


def test_features_of_latents_stand_beside_pictures_of_one_size(tmp_path: Path) -> None:
    sizes = dict(image_size=8, in_channels=4, patch_size=2, depth=2, dim=16, num_heads=2)
    model, objective = create_model("dit", alpha_min=0.6, **sizes), FlowMatching()
    Pipeline(model, objective.scheduler, (), path=objective.path, vae=make_vae()).save_pretrained(tmp_path / "latents")
    *before, frame = sample_features(Comparison.of_names(["runs/latents"], num_images=1, steps=4, seed=0), tmp_path)
    moments = [len(each.recipe["moments"]) for each in before]
    assert moments == [0] * 3 + [1] * 4 + [2] * 4 + [3] * 4, "a frame for the previews and each of two blocks: it can be stopped there"
    assert not any(each.done for each in before) and frame.done
    assert all(len(each.images[-1]) == number for each, number in zip(before, moments, strict=True) if number), "while it is denoised"
    assert [images.shape for images in frame.images] == [(4, 16, 16, 3), (4, 4, 4, 3), (4, 4, 4, 3)]


def test_a_reconstruction_keeps_what_is_visible(runs: Path, tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(picture)
    (_, one), (_, other) = reconstruct(MAES, runs, picture, 0.5)
    np.testing.assert_array_equal(one[0], np.asarray(Image.open(picture)))
    np.testing.assert_array_equal(one[1], other[1])
    visible = (one[1] == one[0]).all(axis=-1)
    assert 0.4 < visible.mean() < 0.6
    np.testing.assert_array_equal(one[2][visible], one[0][visible])
    turned = Image.Exif()
    turned[0x0112] = 6  # as of a phone that was held upright: to be turned to the right
    Image.open(picture).save(lying := tmp_path / "lying.png", exif=turned)
    np.testing.assert_array_equal(reconstruct(MAES[:1], runs, lying, 0.5)[0][1][0], np.rot90(np.asarray(Image.open(picture)), -1))
    Image.open(picture).save(tmp_path / "damaged.png", exif=b"Exif\0\0II*\0")
    with pytest.raises(ValueError, match="no picture that can be read"):
        reconstruct(MAES[:1], runs, tmp_path / "damaged.png", 0.5)
    (tmp_path / "no.png").write_bytes(b"GIF89a")
    for names, file, ratio in ((["runs/x"], picture, 0.5), (MAES, picture, 1.0), (MAES, tmp_path / "no.png", 0.5)):
        with pytest.raises(ValueError) as error:
            reconstruct(names, runs, file, ratio)
        assert "\n" not in str(error.value)


def test_probes_of_the_shipped_pair_are_there_without_one_of_ones_own(runs: Path) -> None:
    found = probed(Site(runs, None, Votes(runs)))
    assert list(found) == ["openmoji-plain", "openmoji-decayed"]
    page = probe_curves(list(found), found)
    assert page.count("<figure") == 4 and page.count("images of openmoji, fitted to") == page.count("held-out part") == 2


@slow
def test_features_and_reconstructions_are_shown(page: "Page", image_folder: Path) -> None:
    visit(page, "Look inside")
    press(page, "Look")
    expect(page.locator("#maps table").first).to_be_visible(timeout=PATIENCE_MS)
    expect(page.locator("#look-status")).to_contain_text("Done", timeout=PATIENCE_MS)
    expect(page.locator("#maps table")).to_have_count(2)
    assert page.locator("#maps img").count() == 2 * 6 * (1 + 8), "moments x (image and blocks)"
    expect(page.locator("#maps img").nth(3)).to_have_attribute("alt", "openmoji-plain at step 1: Block 2")
    visit(page, "Compare")  # takes a while: looking alone could be over before it is stopped
    write(page, "steps", 250)
    page.keyboard.press("Tab")
    press(page, "Compare")
    expect(page.locator("#status")).to_contain_text("s left", timeout=PATIENCE_MS)
    visit(page, "Look inside")
    press(page, "Look")
    expect(page.locator("#look-status")).to_contain_text("In the queue")
    press(page, "Stop looking")
    expect(page.locator("#look-status")).to_contain_text("Stopped.")
    visit(page, "Compare")
    press(page, "Stop")
    visit(page, "Look inside")
    page.locator("#mae-picture input[type=file]").set_input_files(next(image_folder.glob("*/*.png")))
    expect(page.locator("#mae-picture")).to_contain_text(".png")
    press(page, "Hide and paint")
    expect(page.locator("#reconstructions img")).to_have_count(6)


# ---------------------------------------------------------------------------------------------------------------- training


def test_a_check_says_what_a_start_would(tmp_path: Path) -> None:
    site = Site(tmp_path, Jobs(tmp_path), Votes(tmp_path))
    page = build(site)
    asked = handler(page, "on_check")
    form = {widget.elem_id: widget for widget in asked.inputs}

    def check(**values: object) -> str:
        changed = {form[element.replace("_", "-")]: value for element, value in values.items()}
        return asked.fn({**{widget: widget.value for widget in asked.inputs}, **changed})

    for name in ("estimate", "mine", "other-decayed"):
        write_job(tmp_path, name)
    assert "This can be started once it has a name" in check()
    with pytest.raises(gr.Error, match="a run or a file mine already"):
        check(run_name="mine")
    assert "This can be started. " in check(run_name="mine", pair=True), "mine-plain and mine-decayed are free"
    with pytest.raises(gr.Error, match="a run or a file other-decayed already"):
        check(run_name="other", pair=True)
    with pytest.raises(gr.Error, match="a pair needs an alpha_min below 1"):
        check(run_name="mine", preset="demo-plain", pair=True)


def test_a_run_that_is_gone_leaves_nothing_to_click_on(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    page = build(Site(tmp_path, jobs, Votes(tmp_path)))
    fresh, act = handler(page, "fresh", of="jobs"), handler(page, "handle", of="told")
    buttons = [f"{what}-training" for what in ("stop", "resume", "rename", "archive", "delete")]
    write_job(tmp_path, "mine")
    shown = by_element(fresh.fn(None, None, {}))
    assert shown["run"]["value"] == "mine", "the first one, where nothing is chosen yet"
    assert [shown[button]["interactive"] for button in buttons] == [False, True, True, True, True]
    write_job(tmp_path, "another")
    assert "value" not in by_element(fresh.fn("mine", None, {}))["run"], "the visitor may choose another one meanwhile"
    jobs.rename("mine", "yours")
    for chosen in ("mine", ""):  # what the browser has at the next look, and at the one after it
        shown = by_element(fresh.fn(chosen, None, {}))
        assert shown["run"].get("value", chosen) == "" and shown["run-details"] == ""
        assert not any(shown[button]["interactive"] for button in buttons)
        with pytest.raises(gr.Error, match=r"there is no run 'mine'|choose a run first"):
            act.fn(chosen, None)


def test_a_visitor_is_told_what_has_changed_and_little_is_kept_of_it(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    fresh = handler(build(Site(tmp_path, jobs, Votes(tmp_path))), "fresh", of="jobs")
    run = write_job(tmp_path, "mine")
    first = by_element(fresh.fn("mine", None, {}))
    seen = first.pop(None)
    assert {"jobs", "run", "run-details", "stop-training", "archived"} <= set(first)
    (run / "samples").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(run / "samples" / "step-5.png")
    changed = by_element(fresh.fn("mine", None, seen))
    seen = changed.pop(None)
    assert set(changed) == {"run-details"} and len(changed["run-details"]) > 10_000 > 10 * len(repr([*seen.values()]))
    assert set(by_element(fresh.fn("mine", None, seen))) == {None}, "nothing has"


def test_runs_are_looked_through_once_and_only_for_who_opens_the_tab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(tmp_path)
    page = build(Site(tmp_path, jobs, Votes(tmp_path)))
    for name in ("one", "other"):
        write_job(tmp_path, name)
    looked, statuses = [], jobs._statuses
    monkeypatch.setattr(jobs, "_statuses", lambda: looked.append(1) or statuses())
    handler(page, "fresh", of="jobs").fn("one", "other", {})
    assert len(looked) == 1
    at_once = [each.outputs for each in page.fns.values() if (page._id, "load") in each.targets]
    assert at_once and not any(output.elem_id == "jobs" for outputs in at_once for output in outputs)


def test_lists_that_are_filled_anew_keep_what_is_chosen(runs: Path, tmp_path: Path) -> None:
    page = build(Site(runs, None, Votes(tmp_path)))
    first = {"probed": ["openmoji-plain", "openmoji-decayed"], "maes": sorted(MAES)}
    for element, names in first.items():
        offer = handler(page, "offer", of=element).fn
        assert offer([])["value"] == names
        assert "value" not in offer(names[1:]), "a choice that was made meanwhile would snap back"
        assert offer([names[1], "gone"])["value"] == names[1:]


def test_labels_follow_the_checkpoints_and_return(runs: Path, tmp_path: Path) -> None:
    follow = handler(build(Site(runs, None, Votes(tmp_path))), "follow", of="inside-label").fn
    assert follow("squares", "squares", list(PAIR)) == gr.update(choices=["no label", *CLASSES])
    assert follow("circles", "squares", list(PAIR))["value"] == "squares"
    assert follow("squares", "squares", ["openmoji-plain"])["value"] != "squares"
    with pytest.raises(gr.Error, match="there is no checkpoint"):
        follow("squares", "squares", ["gone"])


@slow
def test_a_pair_is_trained_watched_stopped_continued_and_put_away(page: "Page", runs: Path, image_folder: Path) -> None:
    visit(page, "Train")
    write(page, "run-name", "../escape")
    write(page, "data", image_folder.name)
    for flag, value in {**TINY, "max_train_steps": 100_000}.items():
        write(page, f"flag-{flag}", value)
    press(page, "Start")
    expect(page.get_by_test_id("toast-body")).to_contain_text("the name of a run must be")
    page.get_by_test_id("toast-close").click()
    write(page, "run-name", "pair")
    press(page, "Check, and estimate the time")
    expect(page.locator("#advice")).to_contain_text("This can be started", timeout=PATIENCE_MS)
    write(page, "flag-seed", "1.5")
    press(page, "Check, and estimate the time")
    expect(page.get_by_test_id("toast-body")).to_contain_text("Seed cannot be '1.5'; give a whole number")
    expect(page.locator("#advice")).not_to_contain_text("This can be started")
    page.get_by_test_id("toast-close").click()
    write(page, "flag-seed", "")
    page.get_by_label("A pair").check()
    press(page, "Check, and estimate the time")
    expect(page.locator("#advice")).to_contain_text("advises alpha_min above 0.4, up to 0.53", timeout=PATIENCE_MS)
    press(page, "Start")
    expect(page.locator("#advice")).to_contain_text("pair-plain (running), pair-decayed (place 1 in the queue)")
    options = [read_json(runs / name / "job.json")["options"] for name in ("pair-plain", "pair-decayed")]
    assert [each.pop("alpha_min") for each in options] == [1.0, 0.6] and options[0] == options[1]

    expect(page.locator("#run-details svg").first).to_be_visible(timeout=PATIENCE_MS)
    expect(page.locator("#run-details")).to_contain_text("left")
    log = page.locator("#run-details .log")
    first = log.inner_text()
    expect(log).not_to_have_text(first, timeout=PATIENCE_MS)
    expect(log).to_be_visible()  # it grows under the eyes of who reads it
    pid = read_json(runs / "pair-plain/job.json")["pid"]
    press(page, "Stop (saves)")
    expect(page.locator("#jobs tr", has_text="pair-plain")).to_contain_text("stopped; the last checkpoint", timeout=PATIENCE_MS)
    assert not Path(f"/proc/{pid}").exists()
    expect(page.locator("#jobs tr", has_text="pair-decayed")).to_contain_text("running", timeout=PATIENCE_MS)
    step = read_json(runs / "pair-plain/model_index.json")["training"]["steps"]

    write(page, "more-steps", step + 3)
    press(page, "Go on")
    expect(page.locator("#jobs tr", has_text="pair-plain")).to_contain_text("place 1 in the queue")
    pick(page, "run", "pair-decayed")
    expect(page.locator("#run-details h3")).to_have_text("pair-decayed")
    press(page, "Stop (saves)")
    expect(page.locator("#jobs tr", has_text="pair-decayed")).to_contain_text("interrupted", timeout=PATIENCE_MS)
    expect(page.locator("#jobs tr", has_text="pair-plain")).to_contain_text(f"all {step + 3} steps are done", timeout=PATIENCE_MS)
    pick(page, "beside", "pair-plain")

    write(page, "new-name", "renamed")
    press(page, "Rename")
    expect(page.locator("#told")).to_contain_text("renamed: is its name now")
    assert (runs / "renamed").is_dir() and not (runs / "pair-decayed").exists()
    press(page, "Archive")
    expect(page.locator("#told")).to_contain_text("put into the archive")
    assert (runs / ".archive/renamed").is_dir()
    pick(page, "archived", "renamed")
    press(page, "Bring back from the archive")
    expect(page.locator("#told")).to_contain_text("back from the archive")
    press(page, "Delete")
    press(page, "Really delete renamed?")
    expect(page.locator("#told")).to_contain_text("renamed: deleted")
    assert not (runs / "renamed").exists()
    visit(page, "Compare")


@slow
def test_judging_is_a_job_whose_result_stands_in_the_leaderboard(page: "Page", runs: Path) -> None:
    folder = runs / ".evaluations" / "0123abcd"
    options = {"measure": "FD", "checkpoints": list(PAIR), "paths": ["/a", "/b"], "reference": "openmoji", "num_samples": 64}
    write_json(folder / "job.json", {"options": options, "queued_at": 1.0, "pid": 2**22 - 1, "process_began": 0.0, "kind": "evaluation"})
    about = {"reference": "openmoji", "num_samples": 64, "reference_num": 9, "images_seen": 5, "alpha_min": 1.0}
    entries = [{"name": name, "metrics": {"FD": {"value": 7.5 - i, "low": 1.0, "high": 9.0}}, **about} for i, name in enumerate(PAIR)]
    row = {"contender": "/b", "against": "/a", "metric": "FD", "difference": -1.0, "low": -2.0, "high": -0.5, "verdict": "better"}
    row["interval"] = "paired, on the same noise"
    write_json(folder / "comparison.json", {"entries": entries, "differences": [row]})
    visit(page, "Judge")
    board = page.locator("#leaderboard")
    expect(board.locator("tr", has_text=PAIR[1])).to_contain_text("6.5 [1, 9]")
    expect(board).to_contain_text(
        f"{PAIR[1]} against {PAIR[0]} -1 [-2, -0.5], better (95 %, paired, on the same noise; 64 samples against 9 of openmoji"
    )
    pick(page, "judged", PAIR[0])
    write(page, "reference", "/etc")
    press(page, "Judge")
    expect(page.get_by_test_id("toast-body")).to_contain_text("outside")
    page.get_by_test_id("toast-close").click()


@slow
def test_programs_train_and_judge_too(server: str, runs: Path, image_folder: Path) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(server, verbose=False)
    options = {
        **TINY,
        "train_data_dir": image_folder.name,
        "max_train_steps": 2,
        "logging_steps": 1,
        "sample_steps": 0,
        "report_to": "none",
    }
    (started,) = client.predict("by-program", options, api_name="/start_training")
    judged = client.predict([PAIR[0]], "FD", image_folder.name, 24, api_name="/judge")
    assert (started["state"], started["options"]["alpha_min"]) == ("running", 0.6)
    assert (judged["kind"], judged["state"], judged["position"]) == ("evaluation", "queued", 1)
    until(lambda: client.predict("by-program", api_name="/training")["state"] == "finished")
    assert client.predict("by-program", api_name="/training")["step"] == 2
    until(lambda: client.predict(judged["name"], api_name="/training")["state"] in ("finished", "failed"))
    told = client.predict(judged["name"], api_name="/training")
    assert told["state"] == "finished", told
    known = {each["name"]: each for each in client.predict(api_name="/checkpoints")}
    assert known["runs/by-program"]["training"]["steps"] == 2
    assert any(each["metric"] == "FD" and each["num_samples"] == 24 for each in known[PAIR[0]]["results"])
    before = sorted(path.name for path in runs.parent.iterdir())
    for name in ("../x", "/tmp/x", "a/b", "..", "x\0", "", ".hidden", "runs"):
        for endpoint, arguments in (("start_training", (options,)), ("stop_training", ()), ("training", ()), ("resume_training", ())):
            if name == "runs" and endpoint == "start_training":
                continue
            with pytest.raises(AppError, match=r"the name of a run must be|there is no run"):
                client.predict(name, *arguments, api_name=f"/{endpoint}")
    sly = (
        {"train_data_dir": "/etc"},
        {"dataset_name": "openmoji", "output_dir": "/tmp/x"},
        {"dataset_name": "openmoji", "init_from": "/etc"},
    )
    for options in sly:
        with pytest.raises(AppError, match=r"outside|the page gives it|there is no checkpoint"):
            client.predict("sly", {**options, "max_train_steps": 1}, api_name="/start_training")
    assert sorted(path.name for path in runs.parent.iterdir()) == before and not (runs / "sly").exists()


@slow
def test_a_page_that_is_killed_loses_nothing(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradio_client import Client

    options = {**TINY, "train_data_dir": str(image_folder), "max_train_steps": 100_000, "report_to": "none"}
    with ExitStack() as stack:
        url = stack.enter_context(app_server(tmp_path / "runs", mkdir=True))
        Client(url, verbose=False).predict("long", options, api_name="/start_training")
        port = url.split(":")[2][:-1]
        page = next(each for each in psutil.process_iter(["cmdline"]) if {"app", port} <= set(each.info["cmdline"] or ()))
        page.kill()
    monkeypatch.setenv("FADING_SHORTCUTS_AUTH", "me:secret")
    with app_server(tmp_path / "runs", "--root-path", "/under") as url:
        client = Client(url, auth=("me", "secret"), verbose=False)
        assert client.predict("long", api_name="/training")["state"] == "running"
        assert client.predict("long", api_name="/stop_training")["state"] in ("stopping", "interrupted")
        until(lambda: client.predict("long", api_name="/training")["state"] == "interrupted")
        with pytest.raises(Exception, match=r"auth|401|Could not"):
            Client(url, verbose=False)


def test_a_public_page_changes_nothing_and_sends_nobody_to_what_does(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything, public = (build(Site(runs, jobs, Votes(runs))) for jobs in (Jobs(runs), None))
    reading = {"/compare", "/sample", "/checkpoints"}
    assert set(public.get_api_info()["named_endpoints"]) == reading < set(everything.get_api_info()["named_endpoints"])
    told = everything.get_api_info()["named_endpoints"]
    described = {(name, each["parameter_name"]): each["python_type"]["description"] for name in told for each in told[name]["parameters"]}
    assert len(described) > 20 and all(described.values()), "a program's user reads what each argument is"
    assert "preset" in described["/start_training", "options"] and "probes" in described["/judge", "measure"]
    monkeypatch.setattr(catalog, "PRETRAINED", tmp_path / "none")
    for jobs in (Jobs(tmp_path), None):  # nothing is measured, and nothing there to be
        page = build(Site(tmp_path, jobs, Votes(tmp_path)))
        board = by_element(handler(page, "fresh", of="leaderboard").fn({}))["leaderboard"]
        probes = handler(page, "curves").fn([])
        assert "Nothing is measured" in board and "No checkpoint was probed" in probes
        assert all(("<b>Judge</b>" in words) == (jobs is not None) for words in (board, probes))
    tabs = {block.label for block in public.blocks.values() if isinstance(block, gr.Tab)}
    assert tabs == {"Compare", "Blind test", "Look inside", "Judge"}


def until(condition: object, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.5)
