"""The page: its catalogue and sampler as functions, and the whole of it in a real browser."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from app import catalog, render
from app.sampler import MAX_IMAGES, OWN_SAMPLER, PipelineCache, compare
from models import DiT, Pipeline, create_model
from models.pipeline import INDEX, SAMPLER_NAMES, SAMPLERS
from training.objectives import DDPM, Diffusion, FlowMatching

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parent.parent
PLAIN, DECAYED = PAIR = "runs/tiny-plain", "runs/tiny-decayed"
CLASSES = ("circles", "squares", "<b>{{odd}} & ${names}</b>")
PROGRAM_CALL = dict(label="squares", seed=11, num_images=3, steps=4, guidance_scale=2.0, sampler="heun")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain and a decayed checkpoint with random weights everywhere."""
    folder = tmp_path_factory.mktemp("app") / "runs"
    for name, alpha_min in (("tiny-plain", 1.0), ("tiny-decayed", 0.6)):
        torch.manual_seed(0)
        model = DiT(image_size=16, patch_size=4, depth=4, dim=32, num_heads=2, num_classes=3, alpha_min=alpha_min)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        training = {"steps": 7, "images_seen": 1234, "data": "shapes"}
        Pipeline(model, SAMPLERS["euler"](), CLASSES, training).save_pretrained(folder / name)
    return folder


def last_images(runs: Path, *names: str, **options: object) -> tuple[np.ndarray, ...]:
    *_, frame = compare(names or PAIR, runs, **{"seed": 5, "num_images": 3, "steps": 4, "label": "circles", **options})
    assert frame.done
    return frame.images


@pytest.mark.parametrize(
    ("backbone", "options", "objective"),
    [
        ("unet", dict(channels=(8, 8), layers_per_block=1, attention_levels=(1,), head_dim=4, shortcut_placement="attention"), DDPM(3)),
        ("uvit", dict(patch_size=4, depth=2, dim=16, num_heads=2, learnable_alpha=True), FlowMatching(3, path="gvp")),
    ],
)
def test_every_kind_of_checkpoint_is_shown_and_sampled(
    runs: Path, backbone: str, options: dict, objective: Diffusion, tmp_path: Path
) -> None:
    model = create_model(backbone, image_size=16, num_classes=3, alpha_min=0.6, **options)
    Pipeline(model, objective.scheduler, CLASSES, path=objective.path).save_pretrained(tmp_path / "other")
    shutil.copytree(runs / "tiny-plain", tmp_path / "tiny-plain")
    images = last_images(tmp_path, "runs/other", "runs/tiny-plain")
    assert images[0].shape == images[1].shape == (3, 16, 16, 3)
    page = render.table([catalog.card("runs/other", tmp_path), catalog.card("runs/tiny-plain", tmp_path)])
    assert ("attention only" if backbone == "unet" else "learned") in page and "1 (plain)" in page
    assert catalog.card("runs/other", tmp_path).alpha_eff == pytest.approx(float(np.prod(model.alphas)))


# -------------------------------------------------------------------------------------------------------------- catalogue


def test_a_card_is_read_without_the_weights(runs: Path) -> None:
    card = catalog.card(DECAYED, runs)
    loaded = Pipeline.from_pretrained(runs / "tiny-decayed").model
    assert (card.backbone, card.alpha_min, card.class_names, card.training["images_seen"]) == ("DiT", 0.6, CLASSES, 1234)
    assert card.num_parameters == loaded.num_parameters()
    assert card.alpha_eff == pytest.approx(float(np.prod(loaded.alphas)))


def test_default_pair_is_a_plain_and_a_decayed_one_of_a_family(runs: Path) -> None:
    known = {name: card for name, card in catalog.cards(runs).items() if name in PAIR}
    assert catalog.default_pair(known) == PAIR
    assert catalog.default_pair({PLAIN: known[PLAIN]}) == (PLAIN, PLAIN)
    assert catalog.default_pair({}) is None


@pytest.mark.parametrize(
    "name", ["../runs/tiny-plain", "runs/../tiny-plain", "/etc", "runs/", "", "runs/tiny-plain\0", "tiny-plain", None, ["x"]]
)
def test_only_names_of_the_catalogue_are_found(runs: Path, name: object) -> None:
    with pytest.raises(ValueError, match="there is no checkpoint"):
        catalog.find(name, runs)


def test_links_that_lead_out_and_damaged_runs_are_left_out(runs: Path, tmp_path: Path) -> None:
    inside = tmp_path / "runs"
    inside.mkdir()
    (inside / "link").symlink_to(runs / "tiny-plain")
    shutil.copytree(runs / "tiny-plain", inside / "damaged")
    (inside / "damaged" / INDEX).write_text("{")
    assert "runs/link" not in catalog.checkpoints(inside)
    assert not [name for name in catalog.cards(inside) if name.startswith("runs/")]
    with pytest.raises(ValueError, match="not valid JSON"):
        catalog.card("runs/damaged", inside)


def test_labels_by_name_and_number(runs: Path) -> None:
    card = catalog.card(PLAIN, runs)
    assert [catalog.label_index(card, label) for label in ("squares", 1, "1", None)] == [1, 1, 1, None]
    for label in (3, -1, "3", "triangles"):
        with pytest.raises(ValueError, match=r"out of range|has no label"):
            catalog.label_index(card, label)


def test_names_from_outside_stay_text(runs: Path) -> None:
    html = render.table([catalog.card(PLAIN, runs)] * 2)
    assert "<b>" not in html and "{" not in html and "$" not in html


# --------------------------------------------------------------------------------------------------------------- sampling


def test_both_start_from_the_same_noise(runs: Path) -> None:
    first, second = last_images(runs, PLAIN, PLAIN)
    np.testing.assert_array_equal(first, second)
    plain, decayed = last_images(runs)
    np.testing.assert_array_equal(plain, first)
    assert (plain != decayed).any()


def test_image_i_depends_on_seed_plus_i_alone(runs: Path) -> None:
    four, two, shifted = (
        last_images(runs, **options)[1] for options in (dict(num_images=4), dict(num_images=2), dict(num_images=2, seed=7))
    )
    # another batch may round otherwise in bf16; another seed changes everything
    assert np.abs(four[:2].astype(int) - two).max() <= 8
    assert np.abs(four[2:].astype(int) - shifted).max() <= 8
    assert np.abs(four[0].astype(int) - four[1]).max() > 50


def test_frames_come_step_by_step_and_a_random_seed_is_told(runs: Path) -> None:
    frames = list(compare(PAIR, runs, num_images=1, steps=3, sampler="heun"))
    assert [frame.step for frame in frames] == [1, 2, 3, 4, 5] and [frame.done for frame in frames] == [False] * 4 + [True]
    recipe = frames[-1].recipe
    again = last_images(runs, label=None, num_images=1, steps=3, sampler="heun", seed=recipe["seed"])
    np.testing.assert_array_equal(frames[-1].images[1], again[1])
    assert recipe["precision"] in ("fp32", "bf16 autocast") and recipe["same_noise"]


def test_closing_ends_the_sampling(runs: Path) -> None:
    cache = PipelineCache()
    frames = compare(PAIR, runs, num_images=1, steps=100, cache=cache)
    next(frames)
    evaluations = []
    for pipeline in (cache.get(catalog.find(name, runs)) for name in PAIR):
        pipeline.model.register_forward_hook(lambda *_: evaluations.append(1))
    next(frames)
    frames.close()
    assert len(evaluations) == 2
    assert list(frames) == []


def test_the_cache_is_bounded_and_notices_changes(runs: Path, tmp_path: Path) -> None:
    cache = PipelineCache(size=2)
    paths = [Path(shutil.copytree(runs / "tiny-plain", tmp_path / str(i))) for i in range(3)]
    first = cache.get(paths[0])
    assert cache.get(paths[0]) is first
    for path in (paths[1], paths[0], paths[2]):
        cache.get(path)
    assert len(cache) == 2 and paths[0] in cache and paths[1] not in cache
    os.utime(paths[0] / INDEX, ns=(1, 1))
    assert cache.get(paths[0]) is not first


@pytest.mark.parametrize(
    "bad",
    [
        *(dict(num_images=number) for number in (10_000, MAX_IMAGES + 1, 0, "8")),
        *(dict(steps=number) for number in (2.5, 0)),
        *(dict(seed=number) for number in (-2, float("nan"), 1e300)),
        *(dict(guidance_scale=number) for number in (-1, "2", float("nan"))),
        *(dict(sampler=name) for name in ("magic", ["euler"])),
        *(dict(label=label) for label in (9, {})),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_line(runs: Path, bad: dict) -> None:
    with pytest.raises(ValueError) as error:
        list(compare(PAIR, runs, **{"label": None, **bad}))
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


# ----------------------------------------------------------------------------------------------- the page, in a browser


@pytest.fixture(scope="session")
def server(runs: Path) -> Iterator[str]:
    """Address of a real `python -m app` over the tiny pair."""
    from tests.screenshot import app_server

    with app_server(runs) as url:
        yield url


def choose(page: "Page", dropdown: str, option: str) -> None:
    """Pick from a dropdown, and wait until its list has faded."""
    page.get_by_label(dropdown, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()
    page.get_by_role("option").first.wait_for(state="detached")


@pytest.mark.slow
def test_the_page_samples_and_compares(server: str) -> None:
    from playwright.sync_api import expect

    from tests.screenshot import PATIENCE_MS, chromium

    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        trouble: list[str] = []
        page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: trouble.append(request.url) if not request.url.startswith((server, "data:")) else None)
        page.goto(server)
        page.locator("table.cards").wait_for(timeout=PATIENCE_MS)
        for side, name in zip("AB", PAIR, strict=True):  # the shipped pair comes first where there is one
            choose(page, f"Checkpoint {side}", name)
            expect(page.locator("table.cards thead")).to_contain_text(name)
        expect(page.locator("table.cards")).to_contain_text("1,234")
        choose(page, "Label", "squares")

        page.get_by_role("button", name="Compare").click()
        expect(page.locator("#status")).to_contain_text("8 + 8 images in", timeout=PATIENCE_MS)
        expect(page.locator("#status")).to_contain_text("seed 0")
        expect(page.locator("#status")).to_contain_text("squares")
        images = page.locator("#stage img")
        expect(images).to_have_count(16)
        assert images.nth(9).get_attribute("alt") == f"{DECAYED}, image 2 of 8, seed 1"
        for image in images.all():
            natural, shown, rendering = image.evaluate(
                "i => [i.naturalWidth, i.getBoundingClientRect().width, getComputedStyle(i).imageRendering]"
            )
            assert natural == 16 and shown > natural and shown % natural == 0 and rendering == "pixelated"

        divider = page.get_by_label("Divider between A and B")
        expect(divider).to_be_hidden()
        page.get_by_label("Slider", exact=True).check()
        expect(divider).to_be_visible()
        divider.fill("25")
        assert page.locator(".tiles").nth(1).evaluate("e => getComputedStyle(e).clipPath").startswith("inset(0px 0px 0px")
        assert page.locator("#comparison").evaluate("e => e.style.getPropertyValue('--at')") == "0.25"

        page.get_by_label("Side by side").check()
        for number, value in (("num-images", "64"), ("steps", "250")):
            page.locator(f"#{number} input[type=number]").fill(value)
            page.locator(f"#{number} input[type=number]").press("Tab")
        for _ in range(3):  # on a busy machine the last step may come before the click
            page.get_by_role("button", name="Compare").click()
            expect(page.locator("#status")).to_contain_text("step", timeout=PATIENCE_MS)
            page.get_by_role("button", name="Stop", exact=True).click()
            expect(page.get_by_role("button", name="Compare")).to_be_enabled(timeout=PATIENCE_MS)
            if "Stopped" in page.locator("#status").inner_text():
                break
        expect(page.locator("#status")).to_contain_text("Stopped")
        expect(page.get_by_role("button", name="Compare")).to_be_enabled()

        page.locator("#seed input").fill("-7")
        page.locator("#seed input").press("Tab")
        page.get_by_role("button", name="Compare").click()
        expect(page.get_by_test_id("toast-body")).to_contain_text("-7")
        expect(page.get_by_role("button", name="Compare")).to_be_enabled()

        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert trouble == []


@pytest.mark.slow
def test_programs_compare_too(server: str, runs: Path) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(server, verbose=False)
    a, b, recipe = client.predict(*PAIR, **PROGRAM_CALL, api_name="/compare")
    again = client.predict(*PAIR, **PROGRAM_CALL, api_name="/compare")
    assert (a, b) == tuple(again[:2]) and len(a) == len(b) == 3 and a != b
    assert recipe["seed"] == 11 and recipe["sampler"] == "heun" and [each["name"] for each in recipe["checkpoints"]] == list(PAIR)
    image = Image.open(io.BytesIO(base64.b64decode(a[0].removeprefix("data:image/png;base64,"))))
    assert image.size == (16, 16)
    for bad, complaint in (
        ({"num_images": 10_000}, "number of images"),
        ({"label": "9"}, "out of range"),
        ({"checkpoint_a": "../../etc"}, "there is no checkpoint"),
    ):
        with pytest.raises(AppError, match=complaint):
            client.predict(**{"checkpoint_a": PLAIN, "checkpoint_b": DECAYED, **PROGRAM_CALL, **bad}, api_name="/compare")


@pytest.mark.slow
def test_a_port_in_use_is_one_line(server: str) -> None:
    port = re.search(r":(\d+)/", server).group(1)
    ended = subprocess.run([sys.executable, "-m", "app", "--port", port], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and port in ended.stderr and "--port" in ended.stderr


def test_the_page_names_every_sampler() -> None:
    from app.ui import SAMPLERS as named

    assert list(named.values()) == [OWN_SAMPLER, *SAMPLER_NAMES]
