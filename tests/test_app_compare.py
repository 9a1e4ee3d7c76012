"""Compare, in a real browser: sampling, looking, stopping, bringing back."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from app.recipe import to_png
from app.render import SAMPLERS
from app.settings import OWN_SAMPLER
from tests.screenshot import PATIENCE_MS, app_server, chromium, open_page
from tests.tiny_pair import DECAYED, PAIR, PLAIN, write_pair

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Locator, Page

pytestmark = pytest.mark.slow
expect.set_options(timeout=20_000)
LEFT = re.compile("AbortError|Stream|stream|errored out")  # what Gradio says of a connection that a reload cuts
PROGRAM_CALL = dict(label="squares", seed=11, num_images=3, steps=4, guidance_scale=2.0, sampler="heun")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real `python -m app` over the tiny pair, beside the shipped one."""
    with app_server(write_pair(tmp_path_factory.mktemp("page") / "runs")) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def context(browser: Browser) -> Iterator["BrowserContext"]:
    """A visitor; their browser remembers."""
    visitor = browser.new_context(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
    yield visitor
    visitor.close()


@pytest.fixture
def opened(context: "BrowserContext", server: str) -> tuple["Page", list[str]]:
    """The page with the tiny pair chosen, and what was complained about in the console or loaded from elsewhere."""
    page, trouble = context.new_page(), []
    page.on("console", lambda message: trouble.append(message.text) if message.type == "error" and not LEFT.search(message.text) else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: trouble.append(request.url) if not request.url.startswith((server, "data:", "blob:")) else None)
    open_page(page, server)
    for side, name in zip("AB", PAIR, strict=True):
        choose(page, f"Checkpoint {side}", name)
    expect(page.locator("table.cards thead")).to_contain_text(DECAYED)
    return page, trouble


@pytest.fixture
def page(opened: tuple["Page", list[str]]) -> Iterator["Page"]:
    """The visitor's page; a test leaves the two checkpoints of the pair."""
    page, trouble = opened
    page.get_by_label("Side by side", exact=True).check()
    choose(page, "Label", "squares")
    for element, value in {"seed": 0, "num-images": 8, "steps": 20}.items():
        put(page, element, value)
    yield page
    assert trouble == []


def choose(page: "Page", dropdown: str, option: str) -> None:
    """Pick from a dropdown, and wait until its list has faded."""
    page.get_by_label(dropdown, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()
    page.get_by_role("option").first.wait_for(state="detached")


def put(page: "Page", element: str, value: object) -> None:
    field = page.locator(f"#{element} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def compare(page: "Page", expected: str) -> None:
    """Sample, until the status begins with, or tells, what is expected, and what it does not say yet."""
    words = re.compile(rf"(^|· )\s*({re.escape(expected)}|[^·]*, {re.escape(expected)})")
    expect(page.locator("#status")).not_to_contain_text(words)
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#status")).to_contain_text(words, timeout=PATIENCE_MS)


def slow(page: "Page") -> None:
    """Ask for what takes minutes: the tiny pair alone is done in seconds, before it could be interrupted."""
    choose(page, "Checkpoint B", "openmoji-plain")
    expect(page.get_by_text("share no label").first).to_be_visible()  # the label is gone before it could be asked for
    put(page, "num-images", 64)
    put(page, "steps", 250)


def unfold(page: "Page", section: str) -> "Locator":
    """Open an accordion."""
    part = page.locator(f"#{section}")
    part.locator("button.label-wrap").click()
    return part


def pixels(image: "Locator") -> np.ndarray:
    """Of an <img>, as the file has them."""
    source = image.get_attribute("src").removeprefix("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))


def test_a_first_visit_shows_a_finished_comparison(browser: Browser, server: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    open_page(page, server)
    expect(page.locator("#stage img")).to_have_count(16)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#stage img").first.bounding_box()["y"] + 32 < 844, "images are seen before anything is scrolled"
    names = page.locator("#checkpoints input[role=combobox]:visible")
    expect(names).to_have_count(2)
    assert names.evaluate_all("all => all.every(name => name.scrollWidth <= name.clientWidth)"), "the shipped names fit"
    page.set_viewport_size({"width": 320, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.set_viewport_size({"width": 390, "height": 844})
    page.get_by_label("Difference", exact=True).check()
    expect(page.locator(".second .measured")).to_contain_text("of 255")
    assert page.locator(".side").evaluate_all("all => all.every(side => side.scrollWidth <= side.clientWidth)"), "captions wrap"
    tops = page.locator(".side.first .tile").evaluate_all("all => all.map(tile => tile.getBoundingClientRect().top)")
    assert tops[0] == tops[1] < tops[2], "two images in a row"
    expect(page.locator("table.cards")).to_contain_text("openmoji-decayed")
    assert page.locator("table.cards svg").count() == 2, "the alphas of both"
    assert page.locator("#table .wide").evaluate("table => table.scrollWidth <= table.clientWidth"), "two checkpoints fit a phone"
    expect(page.locator("table.cards")).to_contain_text("samples against")
    page.close()


def test_the_open_tab_stands_in_the_address(browser: Browser, server: str) -> None:
    page = browser.new_page()
    page.goto(f"{server}#train")
    tabs = {name: page.get_by_role("tab", name=name, exact=True) for name in ("Compare", "Look inside", "Train")}
    opened = "aria-selected", "true"
    expect(tabs["Train"]).to_have_attribute(*opened)
    expect(page.locator("#jobs")).to_contain_text("No run yet", timeout=PATIENCE_MS)
    tabs["Look inside"].click()
    page.reload()  # as Gradio does it when the page was started anew
    expect(tabs["Look inside"]).to_have_attribute(*opened)
    page.go_back()
    expect(tabs["Train"]).to_have_attribute(*opened)
    tabs["Compare"].click()
    expect(page).to_have_url(server)
    page.close()


def test_two_checkpoints_are_sampled_and_looked_at_in_four_ways(page: "Page") -> None:
    compare(page, "squares")
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
    assert page.locator("table.cards tr.differs th").all_inner_texts()[0] == "αmin"

    divider = page.get_by_label("Divider")
    expect(divider).to_be_hidden()
    page.get_by_label("Slider", exact=True).check()
    expect(divider).to_be_visible()
    divider.fill("25")
    assert page.locator(".tiles").nth(1).evaluate("e => getComputedStyle(e).clipPath").startswith("inset(0px 0px 0px")
    assert page.locator("#comparison").evaluate("e => e.style.getPropertyValue('--at')") == "0.25"

    page.get_by_label("Flicker", exact=True).check()
    visible = page.locator(".side.on .letter")
    seen = {visible.inner_text()}
    expect(visible).not_to_have_text(seen.pop())

    page.get_by_label("Difference", exact=True).check()
    canvas = page.locator(".side").nth(1).locator("canvas")
    expect(canvas).to_have_count(8)
    shown = canvas.nth(3).evaluate("c => [...c.getContext('2d').getImageData(0, 0, 16, 16).data]")
    plain, decayed = (pixels(images.nth(i)).astype(int) for i in (3, 11))
    np.testing.assert_array_equal(np.array(shown).reshape(16, 16, 4)[..., :3], np.abs(plain - decayed))
    expect(page.locator(".side").nth(1).locator(".measured")).to_contain_text("|B − A|, mean")


def test_a_view_stays_while_pictures_are_replaced(page: "Page") -> None:
    put(page, "num-images", 4)
    put(page, "steps", 40)  # several previews: from the second one on Gradio changes what it finds
    page.get_by_label("Difference", exact=True).check()
    compare(page, "4 + 4 images in")
    canvas, images = page.locator(".side.second canvas"), page.locator("#stage img")
    expect(canvas).to_have_count(4)
    expect(canvas.last).to_be_visible()
    plain, decayed = (pixels(images.nth(i)).astype(int) for i in (3, 7))
    shown = canvas.nth(3).evaluate("c => [...c.getContext('2d').getImageData(0, 0, 16, 16).data]")
    np.testing.assert_array_equal(np.array(shown).reshape(16, 16, 4)[..., :3], np.abs(plain - decayed))
    page.get_by_label("Slider", exact=True).check()
    put(page, "seed", 1)
    compare(page, "seed 1")
    expect(page.locator("#stage .side:visible")).to_have_count(2)
    page.get_by_label("Side by side", exact=True).check()


def test_flickering_is_for_keyboards_too(page: "Page") -> None:
    page.get_by_label("Flicker", exact=True).check()
    visible = page.locator(".side.on .letter")
    took = "() => { const tile = document.querySelector('.side:not(.on) .tile'); tile.focus(); return document.activeElement === tile }"
    assert page.evaluate(took) is False, "what is hidden gets no focus"
    page.locator(".side.on .tile").first.click()
    page.get_by_label("Close full screen").click()
    expect(visible).not_to_have_text(visible.inner_text())  # it goes on
    page.get_by_label("Difference", exact=True).focus()  # the last one before the pictures
    page.keyboard.press("Tab")
    expect(page.locator(".side.on .tile").first).to_be_focused()
    letter = visible.inner_text()
    page.wait_for_timeout(1500)
    expect(visible).to_have_text(letter)  # and waits for keys
    page.keyboard.press("Enter")
    expect(page.locator("#viewer")).to_be_visible()
    page.keyboard.press("Escape")
    page.get_by_label("Side by side", exact=True).check()


def test_nothing_flickers_for_who_asked_for_calm(browser: Browser, server: str) -> None:
    page = browser.new_page(reduced_motion="reduce")
    open_page(page, server)
    following = page.get_by_role("button", name="Show the next one")
    expect(following).to_be_hidden()
    page.get_by_label("Flicker", exact=True).check()
    visible = page.locator(".side.on .letter")
    letter = visible.inner_text()
    page.wait_for_timeout(1500)
    expect(visible).to_have_text(letter)
    following.press("Enter")
    expect(visible).not_to_have_text(letter)
    following.click()
    expect(visible).to_have_text(letter)
    page.close()


def test_four_at_once_and_an_override_is_flagged(page: "Page") -> None:
    for side in "CD":
        page.get_by_role("button", name="Add a checkpoint").click()
        expect(page.get_by_label(f"Checkpoint {side}", exact=True)).not_to_have_value("")
    shown = [page.get_by_label(f"Checkpoint {side}", exact=True).input_value() for side in "ABCD"]
    assert set(shown) == {PLAIN, DECAYED}, "the shipped ones have other labels"
    choose(page, "Checkpoint C", PLAIN)
    choose(page, "Checkpoint D", PLAIN)
    expect(page.locator("table.cards thead th")).to_have_count(4)
    page.get_by_label("Own settings for D").check()
    put(page, "d-steps", 3)
    put(page, "num-images", 2)
    put(page, "steps", 5)
    compare(page, "2 + 2 + 2 + 2 images in")
    expect(page.locator("#stage .flag")).to_have_text(["steps 3"])
    page.locator("#stage .tile").first.click()
    expect(page.locator("#viewer figcaption").last).to_contain_text("D runs/tiny-plain steps 3")
    page.keyboard.press("Escape")
    tops = page.locator("#stage .tiles").evaluate_all("all => all.map(tiles => tiles.getBoundingClientRect().top)")
    assert tops[0] == tops[1] and tops[2] == tops[3], "images of a row are level, whatever their captions say"
    images = page.locator("#stage img")
    np.testing.assert_array_equal(pixels(images.nth(0)), pixels(images.nth(4)))
    assert (pixels(images.nth(0)) != pixels(images.nth(6))).any()
    page.get_by_label("Slider", exact=True).check()
    page.get_by_label("Compare A with").get_by_text("C").click()
    expect(page.locator(".side.second .letter")).to_have_text("C")
    page.get_by_role("button", name="Remove D").click()
    expect(page.get_by_label("Checkpoint D", exact=True)).to_be_hidden()
    page.get_by_role("button", name="Add a checkpoint").click()
    expect(page.get_by_label("Checkpoint D", exact=True)).to_be_visible()
    expect(page.get_by_label("Own settings for D")).not_to_be_checked()
    expect(page.locator("#d-steps")).to_be_hidden()
    page.get_by_role("button", name="Remove D").click()
    expect(page.get_by_label("Checkpoint D", exact=True)).to_be_hidden()
    compare(page, "2 + 2 + 2 images in")
    page.get_by_role("button", name="Remove C").click()
    choose(page, "Checkpoint B", DECAYED)


def test_stop_stops_and_a_refresh_brings_all_back(page: "Page", server: str) -> None:
    choose(page, "Sampler", SAMPLERS["heun"])
    for side in "CD":
        page.get_by_role("button", name="Add a checkpoint").click()
        expect(page.get_by_label(f"Checkpoint {side}", exact=True)).not_to_have_value("")
    choose(page, "Checkpoint D", "openmoji-plain")  # takes minutes: the tiny ones are done before a busy machine has loaded the page anew
    expect(page.locator("table.cards thead th").last).to_contain_text("openmoji-plain")
    put(page, "num-images", 64)
    put(page, "steps", 250)
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#status")).to_contain_text("s left", timeout=PATIENCE_MS)
    page.reload()  # in the midst of it
    expect(page.locator("#status")).to_contain_text("s left", timeout=PATIENCE_MS)
    expect(page.locator("#steps input[type=number]")).to_have_value("250")
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator("#status")).to_contain_text("Stopped", timeout=5000)
    expect(page.get_by_role("button", name="Compare", exact=True)).to_be_enabled()

    choose(page, "Sampler", SAMPLERS[OWN_SAMPLER])
    for side in "DC":
        page.get_by_role("button", name=f"Remove {side}").click()
        expect(page.get_by_label(f"Checkpoint {side}", exact=True)).to_be_hidden()
    put(page, "num-images", 2)
    put(page, "steps", 3)
    put(page, "seed", 40)
    compare(page, "2 + 2 images in")
    before = pixels(page.locator("#stage img").nth(1))
    page.get_by_label("Difference", exact=True).check()
    page.wait_for_timeout(300)
    page.reload()
    expect(page.locator("#status")).to_contain_text("2 + 2 images in", timeout=PATIENCE_MS)
    expect(page.locator("#seed input")).to_have_value("40")
    expect(page.get_by_label("Checkpoint B", exact=True)).to_have_value(DECAYED)
    expect(page.get_by_label("Difference", exact=True)).to_be_checked()
    expect(page.locator("#comparison")).to_have_attribute("data-view", "difference")
    np.testing.assert_array_equal(pixels(page.locator("#stage img").nth(1)), before)
    page.get_by_label("Side by side", exact=True).check()


def test_a_downloaded_picture_comes_back_bit_for_bit(page: "Page", context: "BrowserContext", server: str, tmp_path: Path) -> None:
    put(page, "num-images", 3)
    put(page, "steps", 4)
    put(page, "seed", 7)
    compare(page, "3 + 3 images in")
    page.locator(".side").nth(1).locator(".tile").nth(2).click()
    viewer = page.locator("#viewer")
    expect(viewer).to_be_visible()
    expect(viewer).to_contain_text("image 3 of 3")
    assert viewer.locator("img").first.evaluate("i => i.width % i.naturalWidth === 0 && i.width > 200")
    page.keyboard.press("ArrowRight")
    expect(viewer).to_contain_text("image 1 of 3")
    page.keyboard.press("ArrowLeft")
    with page.expect_download() as download:
        viewer.get_by_text("Download PNG").nth(1).click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.name == "runs-tiny-decayed-seed-9.png"
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    page.locator("#stage .tile").nth(2).click()  # once more: the keys are the viewer's again
    page.keyboard.press("ArrowLeft")
    expect(viewer).to_contain_text("image 2 of 3")
    viewer.get_by_label("Next image").click()
    page.keyboard.press("Enter")
    expect(viewer).to_contain_text("image 1 of 3")
    assert viewer.evaluate("element => element.getBoundingClientRect().width <= innerWidth")
    page.keyboard.press("Escape")

    other = context.new_page()
    open_page(other, server)
    put(other, "seed", 123)
    unfold(other, "restore-section")
    other.locator("#drop input[type=file]").set_input_files(file)
    expect(other.locator("#status")).to_contain_text("the same, bit for bit", timeout=PATIENCE_MS)
    expect(other.locator("#seed input")).to_have_value("7")
    expect(other.get_by_label("Checkpoint B", exact=True)).to_have_value(DECAYED)
    np.testing.assert_array_equal(pixels(other.locator("#stage img").nth(5)), np.asarray(Image.open(file)))
    (tmp_path / "hostile.png").write_bytes(file.read_bytes()[:40])
    foreign: list[str] = []
    other.on("request", lambda request: foreign.append(request.url) if "evil" in request.url else None)
    markup = "<img src=/evil.png><b>"
    for told in ({"checkpoints": [{"name": markup}]}, {"checkpoints": [{"name": PLAIN}], "seed": markup}):
        (tmp_path / "markup.png").write_bytes(to_png(np.zeros((4, 4, 3), np.uint8), told))
        other.locator("#drop button[aria-label*=lear]").click()
        other.locator("#drop input[type=file]").set_input_files(tmp_path / "markup.png")
        said = other.get_by_test_id("toast-text").filter(has_text=markup)
        expect(said).to_be_visible()
        assert said.locator("*").count() == 0 and foreign == []
        other.get_by_test_id("toast-close").click()
    other.locator("#drop button[aria-label*=lear]").click()
    other.locator("#drop input[type=file]").set_input_files(tmp_path / "hostile.png")
    expect(other.get_by_test_id("toast-body")).to_contain_text("no PNG that can be read")
    other.close()


def test_the_history_brings_back_and_puts_beside(page: "Page") -> None:
    put(page, "num-images", 2)
    put(page, "steps", 2)
    compare(page, "2 + 2 images in")
    first = pixels(page.locator("#stage img").first)
    put(page, "seed", 50)
    choose(page, "Checkpoint B", PLAIN)
    compare(page, "seed 50")
    items = unfold(page, "history-section").locator("li")
    expect(items.first).to_contain_text("seed 50")
    number = items.count()
    items.nth(1).get_by_role("button", name="Add").click()
    expect(page.locator("#status")).to_contain_text("2 + 2 + 2 + 2 images in", timeout=PATIENCE_MS)
    expect(page.locator("#stage .flag")).to_have_text(["seed 0", "seed 0"])
    np.testing.assert_array_equal(pixels(page.locator("#stage img").nth(4)), first)
    expect(page.locator("#status")).to_contain_text("the noise is not the same")
    expect(items).to_have_count(number + 1)
    items.nth(2).get_by_role("button", name="Bring back").click()
    expect(page.locator("#stage img")).to_have_count(4)
    expect(page.locator("#seed input")).to_have_value("0")
    np.testing.assert_array_equal(pixels(page.locator("#stage img").first), first)


def test_what_is_brought_back_stays_while_another_one_was_running(page: "Page") -> None:
    put(page, "num-images", 2)
    put(page, "steps", 3)
    compare(page, "3 steps")
    first = pixels(page.locator("#stage img").first)
    slow(page)
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#status")).to_contain_text("s left", timeout=PATIENCE_MS)
    page.get_by_label("Difference", exact=True).check()
    unfold(page, "history-section").locator("li").first.get_by_role("button", name="Bring back").click()
    expect(page.locator("#status")).to_contain_text("2 + 2 images in")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_disabled()
    page.wait_for_timeout(1500)  # the other one would have painted again
    expect(page.locator("#status")).to_contain_text("2 + 2 images in")
    expect(page.locator("#stage img")).to_have_count(4)
    np.testing.assert_array_equal(pixels(page.locator("#stage img").first), first)
    page.reload()
    expect(page.get_by_label("Difference", exact=True)).to_be_checked()  # chosen while it ran, and not forgotten at its end
    expect(page.locator("#status")).to_contain_text("2 + 2 images in", timeout=PATIENCE_MS)


def test_one_more_can_be_put_beside_before_the_last_one_is_sampled(page: "Page") -> None:
    put(page, "num-images", 2)
    put(page, "steps", 2)
    compare(page, "2 + 2 images in")
    history = unfold(page, "history-section")
    id = history.locator("li").first.get_by_role("button", name="Add").get_attribute("data-id")
    add = history.locator(f'[data-do="add"][data-id="{id}"]')  # that one, also when the sampling that begins now is the first of them
    slow(page)
    add.click()
    expect(page.get_by_label("Checkpoint D", exact=True)).to_be_visible()
    expect(page.locator("#status")).to_contain_text("s left", timeout=PATIENCE_MS)
    for side in "DC":
        page.get_by_role("button", name=f"Remove {side}").click()
        expect(page.get_by_label(f"Checkpoint {side}", exact=True)).to_be_hidden()
    put(page, "num-images", 2)
    put(page, "steps", 4)
    add.click()
    expect(page.locator("#status")).to_contain_text("2 + 2 + 2 + 2 images in", timeout=PATIENCE_MS)
    for side in "DC":
        page.get_by_role("button", name=f"Remove {side}").click()


def test_a_list_that_is_left_by_keyboard_covers_nothing(page: "Page") -> None:
    page.get_by_label("Label", exact=True).focus()
    expect(page.get_by_role("listbox")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.locator("[role=listbox]:visible")).to_have_count(0)
    page.wait_for_timeout(400)  # Gradio opens it once more
    assert page.locator("[role=listbox]:visible").count() == 0


def test_a_grid_is_one_picture_to_download(page: "Page", tmp_path: Path) -> None:
    put(page, "steps", 2)
    unfold(page, "grid-section")
    choose(page, "What varies", "Steps")
    expect(page.get_by_label("Values")).to_have_value("2, 5, 10, 20")
    page.get_by_label("Values").fill("1, 2, 3")
    page.get_by_role("button", name="Draw the grid").click()
    expect(page.locator("#grid-status")).to_contain_text("Done", timeout=PATIENCE_MS)
    assert "1 step, 2 steps, 3 steps" in page.locator("#grid img").get_attribute("alt")
    with page.expect_download() as download:
        page.get_by_text("Download this grid").click()
    download.value.save_as(tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").width > 3 * 96
    put(page, "steps", 3)
    page.get_by_label("Values").fill("9")
    unfold(page, "restore-section").locator("#drop input[type=file]").set_input_files(tmp_path / "grid.png")
    expect(page.get_by_test_id("toast-body")).to_contain_text("settings of a grid")
    expect(page.get_by_label("Values")).to_have_value("1, 2, 3")
    expect(page.locator("#steps input[type=number]")).to_have_value("2")


def test_bad_input_is_one_line_on_the_page(page: "Page") -> None:
    put(page, "seed", -7)
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_text("seed cannot be -7; give a whole number")).to_be_visible()
    put(page, "seed", 1.5)
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_text("seed cannot be 1.5; give a whole number")).to_be_visible()
    expect(page.get_by_role("button", name="Compare", exact=True)).to_be_enabled()


def test_programs_compare_too(server: str) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(server, verbose=False)
    (a, b), recipe = client.predict(list(PAIR), **PROGRAM_CALL, api_name="/compare")
    assert ([a, b], recipe["seed"]) == (client.predict(list(PAIR), **PROGRAM_CALL, api_name="/compare")[0], 11)
    alone, _ = client.predict(DECAYED, **PROGRAM_CALL, api_name="/sample")
    assert [pixels_of(url).tolist() for url in alone] == [pixels_of(url).tolist() for url in b] and a != b and len(a) == 3
    assert [each["sampler"] for each in recipe["checkpoints"]] == ["heun", "heun"]
    known = {each["name"]: each for each in client.predict(api_name="/checkpoints")}
    assert known[DECAYED]["alpha_min"] == 0.6 and known[DECAYED]["sha256"] == recipe["checkpoints"][1]["sha256"]
    for bad, complaint in (
        ({"num_images": 10_000}, "number of images"),
        ({"label": "9"}, "out of range"),
        ({"checkpoints": ["../../etc"]}, "there is no checkpoint"),
        ({"checkpoints": []}, "1 to 4 checkpoints"),
        ({"checkpoints": "runs"}, "as a list"),
    ):
        with pytest.raises(AppError, match=complaint):
            client.predict(**{"checkpoints": list(PAIR), **PROGRAM_CALL, **bad}, api_name="/compare")


def pixels_of(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


def test_a_port_in_use_is_one_line(server: str, run_script: object) -> None:
    port = re.search(r":(\d+)/", server).group(1)
    ended = run_script("-m", "app", "--port", port)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and port in ended.stderr and "--port" in ended.stderr
