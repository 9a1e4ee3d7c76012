"""What stands behind the page, as functions: catalogue, settings, sampling, queue, recipes, grids."""

import asyncio
import base64
import io
import json
import os
import re
import shutil
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from gradio.utils import diff
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from app import catalog, recipe, render
from app.catalog import Source
from app.grid import AXES, MAX_COLUMNS, draw, plan, sample_grid, varying, words_of
from app.plots import LEFT, Line, plot
from app.sampler import Frame, PipelineCache, sample
from app.settings import MAX_IMAGES, MAX_SIDES, NO_LABEL, OWN_SAMPLER, RANDOM_SEED, Comparison, Settings, Side
from app.settings_panel import SettingsPanel
from app.site import Site, Updates, streams
from app.studio import DONE, FAILED, RUNNING, STOPPED, WAITING, Sampling, Studio
from app.ui import build
from app.votes import Votes
from models import Pipeline, create_model
from models.pipeline import INDEX, SAMPLER_NAMES
from tests.conftest import wait_for
from tests.tiny_pair import CLASSES, DECAYED, PAIR, PLAIN, write_pair
from training.objectives import DDPM, Diffusion, FlowMatching


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("app") / "runs")


def asked(*names: str, **options: object) -> Comparison:
    return Comparison.of_names(names or PAIR, **{"seed": 5, "num_images": 3, "steps": 4, "label": "circles", **options})


def last_frame(runs: Path, comparison: Comparison) -> Frame:
    *_, frame = sample(comparison, runs)
    assert frame.done
    return frame


def last_images(runs: Path, *names: str, **options: object) -> tuple[np.ndarray, ...]:
    return last_frame(runs, asked(*names, **options)).images


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
    page = render.table({"A": catalog.card("runs/other", tmp_path), "B": catalog.card("runs/tiny-plain", tmp_path)}, [[], []])
    assert ("attention only" if backbone == "unet" else "learned") in page and "1 (plain)" in page
    assert catalog.card("runs/other", tmp_path).alpha_eff == pytest.approx(float(np.prod(model.alphas)))


# -------------------------------------------------------------------------------------------------------------- catalogue


def test_a_card_is_read_without_the_weights(runs: Path) -> None:
    card = catalog.card(DECAYED, runs)
    loaded = Pipeline.from_pretrained(runs / "tiny-decayed").model
    assert (card.backbone, card.alpha_min, card.class_names, card.training["images_seen"]) == ("DiT", 0.6, CLASSES, 1234)
    assert card.num_parameters == loaded.num_parameters()
    assert card.alpha_eff == pytest.approx(float(np.prod(loaded.alphas)))


def test_the_folders_are_looked_through_once_for_all_cards(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Path] = []
    folders = catalog.folders
    monkeypatch.setattr(catalog, "folders", lambda runs: looked.append(runs) or folders(runs))
    assert len(catalog.cards(runs)) >= len(PAIR)
    assert set(catalog.all_results(runs)) >= set(PAIR)
    assert [card.name for card in catalog.cards_of(PAIR[::-1], runs)] == [*PAIR[::-1]]
    assert len(looked) == 3


def test_default_pair_is_a_plain_and_a_decayed_one_of_a_family(runs: Path) -> None:
    known = {name: card for name, card in catalog.cards(runs).items() if name in PAIR}
    assert catalog.default_pair(known) == PAIR
    assert catalog.default_pair({PLAIN: known[PLAIN]}) == (PLAIN, PLAIN)
    assert catalog.default_pair({}) is None


def test_the_shipped_pair_comes_first_then_those_that_have_seen_the_most_images(runs: Path) -> None:
    plain, decayed = (catalog.card(name, runs) for name in PAIR)

    def first(*cards: tuple[str, bool, object]) -> tuple[str, str] | None:
        made = [
            replace(plain if is_plain else decayed, name=name, training={"data": "shapes", "images_seen": seen})
            for name, is_plain, seen in cards
        ]
        return catalog.default_pair({card.name: card for card in made})

    noise = ("runs/x-plain", True, 9), ("runs/x-plain-2", False, 9)
    assert first(("x-decayed", False, 5), ("x-plain", True, 5), *noise) == ("x-plain", "x-decayed")
    later = ("y-decayed", False, 90), ("y-plain", True, 90)
    assert first(("x-decayed", False, 5), ("x-plain", True, 5), *later) == ("x-plain", "x-decayed"), "the first of the shipped ones"
    long = ("runs/long-decayed", False, 900), ("runs/long-plain", True, 900)
    assert first(*noise, *long, ("runs/old", False, None)) == ("runs/long-plain", "runs/long-decayed")
    assert first(("runs/a-plain", True, 9), ("runs/b-decayed", False, 9), ("runs/a-decayed", False, 9)) == (
        "runs/a-plain",
        "runs/a-decayed",
    )


def test_the_greeting_shows_the_pair_that_comes_first_now(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "PRETRAINED", tmp_path / "none")
    own = Path(shutil.copytree(runs, tmp_path / "runs"))
    site = Site(own, None, Votes(own))
    site.prepare()
    old = site.welcome
    assert old and old is site.welcome and [side.checkpoint for side in old.about.sides] == list(PAIR)
    shutil.copytree(own / "tiny-decayed", own / "longer")
    index = own / "longer" / INDEX
    index.write_text(index.read_text().replace("1234", "9999"))
    new = site.welcome
    assert new and new.about == site.first_comparison() and new.about.sides[1].checkpoint == "runs/longer" and new.lasting > old.lasting
    wait_for(lambda: new.over)


def test_a_greeting_is_the_same_for_all_is_not_left_and_tried_again_when_it_fails(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "PRETRAINED", runs / "none")
    works = []
    monkeypatch.setattr("app.site.sample", lambda *_: works.append(Work(9)) or works[-1]())
    site = Site(runs, None, Votes(runs))
    site.prepare()
    first = site.welcome
    wait_for(lambda: first.frame)
    site.studio.leave(first.id)
    assert site.welcome is first and not first.unwanted
    works[0].error = ValueError("the disk was full")
    works[0].go.set()
    wait_for(lambda: first.over)
    with ThreadPoolExecutor(8) as visitors:
        found = {each.id: each for each in visitors.map(lambda _: site.welcome, range(16))}
    (second,) = found.values()
    assert (first.state, first.lasting, second.lasting) == (FAILED, False, True) and second is not first
    wait_for(lambda: second.frame)
    works[1].go.set()
    wait_for(lambda: second.over)
    assert second.state == DONE and site.welcome is second


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


def panel_of(runs: Path) -> SettingsPanel:
    with gr.Blocks():
        return SettingsPanel(Site(runs, None, Votes(runs)), None)


class Browser(dict):
    """The values of a panel's widgets, as a browser keeps them while updates come."""

    def __init__(self, panel: SettingsPanel) -> None:
        super().__init__({widget: getattr(widget, "value", None) for widget in panel.outputs})
        self.panel = panel

    def take(self, updates: dict) -> "Browser":
        assert updates.keys() <= set(self.panel.outputs)
        for widget, update in updates.items():
            if not isinstance(update, dict):
                self[widget] = update
            elif "value" in update:
                self[widget] = update["value"]
        return self


def test_what_is_gone_or_damaged_is_left_out_and_the_others_move_up(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(gr, "Warning", told.append)
    own = Path(shutil.copytree(runs, tmp_path / "runs"))
    shutil.copytree(own / "tiny-plain", own / "damaged")
    (own / "damaged/model/config.json").unlink()
    panel = panel_of(own)
    asked = Side(PLAIN), Side("runs/<gone>"), Side("runs/damaged"), Side(DECAYED, {"steps": 6})
    updates = panel.fill(Comparison(Settings(), asked))
    assert updates.keys() == set(panel.outputs)
    assert [updates[side.checkpoint]["value"] for side in panel.sides] == [PLAIN, DECAYED, None, None]
    overridden = [False, True, False, False]
    assert [updates[side.override] for side in panel.sides] == [updates[side.group]["visible"] for side in panel.sides] == overridden
    assert [updates[side.box]["visible"] for side in panel.sides] == [True, True, False, False] and not updates[panel.remove]["visible"]
    assert updates[panel.sides[1].own["steps"]] == 6 and updates[panel.shared["label"]]["choices"] == [NO_LABEL, *CLASSES]
    assert told == ["runs/&lt;gone&gt; is not here any more, so it is left out.", "runs/damaged is damaged, so it is left out."]
    read = panel.read(Browser(panel).take(updates))
    assert [side.checkpoint for side in read.sides] == [PLAIN, DECAYED] and read.of(read.sides[1]).steps == 6


def test_letters_of_the_widgets_are_those_that_are_drawn(runs: Path) -> None:
    panel = panel_of(runs)
    values = Browser(panel).take(panel.fill(Comparison.of_names([*PAIR, PLAIN, DECAYED])))
    assert list(panel.cards(values)) == list("ABCD")
    for letter, names in (("D", [*PAIR, PLAIN]), ("C", [*PAIR])):
        assert values[panel.remove] == f"Remove {letter}"
        assert [side.checkpoint for side in panel.read(values.take(panel._remove(values))).sides] == names
    assert panel._remove(values)[panel.remove]["visible"] is False, "two stay"
    values[panel.sides[0].checkpoint] = None
    assert panel.cards(values)["B"].name == DECAYED
    with pytest.raises(ValueError, match="checkpoint A is empty; choose one there"):
        panel.read(values)


@pytest.fixture
def two_pairs(runs: Path, tmp_path: Path) -> Path:
    """Runs, half of which know other classes, by other numbers."""
    for old in ("tiny-plain", "tiny-decayed"):
        shutil.copytree(runs / old, tmp_path / "runs" / old)
        other = Path(shutil.copytree(runs / old, tmp_path / "runs" / old.replace("tiny", "other"))) / "model_index.json"
        other.write_text(json.dumps({**json.loads(other.read_text()), "class_names": ["oak", "elm", "ash"]}))
    return tmp_path / "runs"


OTHERS = ("runs/other-plain", "runs/other-decayed")


def test_a_label_comes_back_after_checkpoints_that_share_none(two_pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(gr, "Info", told.append)
    panel = panel_of(two_pairs)

    def updates(names: tuple, overrides: tuple, wanted: str, label: str) -> list[dict]:
        values = {panel.wanted: wanted, **dict.fromkeys(panel.labels, "squares"), panel.shared["label"]: label}
        for side, name, overridden in zip(panel.sides, names, overrides, strict=True):
            values |= {side.checkpoint: name, side.override: overridden}
        assert values.keys() == {*panel.choices}
        found = panel.label_updates(panel.cards(values), values)
        return [found[widget] for widget in panel.labels]

    no, alike = (False,) * MAX_SIDES, (*PAIR, None, None)
    assert "value" not in updates(alike, no, "squares", "squares")[0], "a label that stays is not sent"
    mixed = updates((OTHERS[0], PAIR[1], None, None), no, "squares", "squares")[0]
    assert (mixed["choices"], mixed["value"]) == ([NO_LABEL], NO_LABEL)
    assert told == [f"{OTHERS[0]} and {PAIR[1]} share no label, so they are drawn without one."]
    assert updates((*OTHERS, None, None), no, "squares", NO_LABEL)[0]["value"] == "oak"
    assert updates(alike, no, "squares", NO_LABEL)[0]["value"] == "squares"
    assert "value" not in updates((*OTHERS, None, None), no, NO_LABEL, NO_LABEL)[0], "none was chosen"
    both = updates((*PAIR, *OTHERS), (False, False, True, True), "squares", "squares")
    assert both[0]["choices"] == [NO_LABEL, *CLASSES], "sides with settings of their own have a label of their own"
    assert [each["value"] for each in both[3:]] == ["oak", "oak"]
    values = Browser(panel).take({panel.sides[1].checkpoint: OTHERS[0], panel.sides[1].override: True, panel.shared["steps"]: 7})
    for label, begun in (("squares", "oak"), (NO_LABEL, NO_LABEL)):
        values[panel.shared["label"]] = label
        own = panel._begin_own(panel.sides[1], values)
        assert own[panel.sides[1].own["label"]]["value"] == begun and own[panel.sides[1].own["steps"]] == 7


def test_a_side_is_added_that_shares_a_label(two_pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(gr, "Info", told.append)
    panel = panel_of(two_pairs)

    def added(*names: str | None) -> str:
        found = panel._add({**dict.fromkeys(panel.checkpoints), **dict(zip(panel.checkpoints, names, strict=False))})
        side = panel.sides[len(names)]
        assert found[side.box]["visible"] and found[panel.remove]["value"] == f"Remove {panel.sides[max(1, len(names))].letter}"
        return found[side.checkpoint]["value"]

    assert added(OTHERS[0]) == OTHERS[1] and not told
    assert added(*OTHERS) == OTHERS[0] and "once more" in told[0]


def test_both_pairs_come_back_with_a_label_each(two_pairs: Path) -> None:
    panel = panel_of(two_pairs)
    updates = panel.fill(Comparison(Settings(label="squares"), (Side(PLAIN), Side(OTHERS[0], {"label": "oak"}))))
    assert updates[panel.shared["label"]]["value"] == updates[panel.wanted] == "squares"
    assert updates[panel.sides[1].own["label"]]["value"] == "oak"
    numbered = panel.fill(Comparison(Settings(label="1"), (Side(PLAIN),)))
    assert numbered[panel.shared["label"]]["value"] == "squares", "programs may give a number"


def test_a_number_that_stands_for_two_classes_is_refused(two_pairs: Path) -> None:
    with pytest.raises(ValueError, match="label 1 stands for elm and squares here; give the name of one"):
        last_frame(two_pairs, asked(PLAIN, OTHERS[0], label="1"))


def test_a_grid_over_labels_needs_some(two_pairs: Path) -> None:
    with pytest.raises(ValueError, match="share no label; choose checkpoints that do, or another axis"):
        plan(asked(PLAIN, OTHERS[0], label=None), "label", "all", two_pairs)


def test_the_table_says_what_labels_there_are_and_keeps_letters(two_pairs: Path) -> None:
    few, many = catalog.card(PLAIN, two_pairs), replace(catalog.card(OTHERS[0], two_pairs), class_names=("oak", "elm", "ash", "<i>", "fir"))
    page = render.table({"B": few, "D": many}, [[], []])
    assert "<summary>5: oak, elm, ash, …</summary>&lt;i&gt;, fir</details>" in page and "3: circles, squares, &lt;b&gt;" in page
    assert [each in page for each in ('data-side="A"', 'data-side="B"', 'data-side="D"')] == [False, True, True]
    assert "Image size" in page and "16 × 16 px" in page
    assert page.count('class="differs"') == 1, "the labels"


def test_a_page_that_cannot_train_sends_nobody_there() -> None:
    assert [
        ("<b>Train</b>" in render.empty_stage(False, trains), "--preset" in render.empty_stage(False, trains)) for trains in (True, False)
    ] == [
        (True, True),
        (False, True),
    ]


def test_the_history_shows_small_pictures_of_large_ones() -> None:
    def shown(edge: int, channels: int) -> np.ndarray:
        image = np.zeros((edge, edge, channels), np.uint8)
        image[: edge // 2] = 200
        recipe = {"checkpoints": [{"name": "x", "own": {}}], "label": None, "seed": 0, "steps": 1}
        html = render.history([("id", Frame((image[None],), 1, 1, 0.1, recipe, True))])
        (url,) = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url))))

    large, small = shown(512, 3), shown(32, 1)
    assert large.shape == (85, 85, 3) and small.shape == (32, 32)
    assert (large[:42] == 200).all() and (large[43:] == 0).all() and (small[:16] == 200).all()


def test_names_from_outside_stay_text(runs: Path) -> None:
    html = render.table(dict.fromkeys("AB", catalog.card(PLAIN, runs)), [[], []])
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
    frames = list(sample(asked(label=None, seed=-1, num_images=1, steps=3, sampler="heun"), runs))
    assert [frame.step for frame in frames] == [1, 2, 3, 4, 5] and [frame.done for frame in frames] == [False] * 4 + [True]
    recipe = frames[-1].recipe
    again = last_images(runs, label=None, num_images=1, steps=3, sampler="heun", seed=recipe["seed"])
    np.testing.assert_array_equal(frames[-1].images[1], again[1])
    assert recipe["precision"] in ("fp32", "bf16 autocast") and recipe["same_noise"]


def test_closing_ends_the_sampling(runs: Path) -> None:
    cache = PipelineCache()
    frames = sample(asked(num_images=1, steps=100), runs, cache=cache)
    next(frames)
    evaluations = []
    for pipeline in (cache.get(catalog.find(name, runs)) for name in PAIR):
        pipeline.model.register_forward_hook(lambda *_: evaluations.append(1))
    next(frames)
    frames.close()
    assert len(evaluations) == 2
    assert list(frames) == []


def test_a_side_may_have_settings_of_its_own(runs: Path) -> None:
    shared = Settings(label="circles", seed=5, num_images=2, steps=4)
    own = {"steps": 7, "seed": 9, "label": None, "guidance_scale": 2.0}
    frames = list(sample(Comparison(shared, (Side(PLAIN), Side(PLAIN, own), Side(DECAYED))), runs))
    assert [frame.step for frame in frames] == list(range(1, 8)) and frames[-1].num_steps == 7
    first, second, third = frames[-1].images
    np.testing.assert_array_equal(first, last_images(runs, PLAIN, num_images=2)[0])
    np.testing.assert_array_equal(second, last_images(runs, PLAIN, num_images=2, steps=7, seed=9, label=None)[0])
    np.testing.assert_array_equal(third, last_images(runs, DECAYED, num_images=2)[0])
    told = frames[-1].recipe
    assert [side["own"] for side in told["checkpoints"]] == [{}, {"steps": 7, "seed": 9, "label": None}, {}], (
        "what overrides nothing is none"
    )
    assert not told["same_noise"] and "steps 7, seed 9, label no label" in render.stage(frames[-1])


def test_the_cache_is_bounded_and_notices_changes(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PipelineCache(size=2)
    paths = [Path(shutil.copytree(runs / "tiny-plain", tmp_path / str(i))) for i in range(3)]
    sources = [Source(path, averaged=False) for path in paths]
    first, before = cache.get(sources[0]), sources[0].hash
    assert cache.get(sources[0]) is first
    second, *_ = (cache.get(sources[i]) for i in (1, 0, 2))
    assert cache.get(sources[0]) is first and cache.get(sources[1]) is not second, "the one that was used longest ago went"
    os.utime(paths[0] / INDEX, ns=(1, 1))
    assert (again := cache.get(sources[0])) is not first and sources[0].hash == before, "the same bytes"
    cache.let_go()
    assert cache.get(sources[0]) is again, "there is no GPU to make room on"
    with monkeypatch.context() as there:
        there.setattr("torch.cuda.is_available", lambda: True)
        cache.let_go()
    assert cache.get(sources[0]) is not again
    (paths[0] / INDEX).write_text((paths[0] / INDEX).read_text() + "\n")
    assert sources[0].hash != before


def test_raw_weights_and_those_of_earlier_steps_have_names_of_their_own(runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "tiny-plain", tmp_path / "mine"))
    network = Pipeline.from_pretrained(run).model
    averages = [parameter.detach() * 0.5 for parameter in network.parameters()]
    shutil.copytree(run / "model", run / "ema")
    for step in (3, 7):  # 7 is the one that was exported
        snapshot = run / "checkpoints" / f"step-{step}"
        snapshot.mkdir(parents=True)
        (snapshot / "manifest.json").write_text("{}")
        save_file({name: 2 * weight.contiguous() for name, weight in network.state_dict().items()}, snapshot / "model.safetensors")
        torch.save({"averages": averages}, snapshot / "custom_checkpoint_0.pkl")
    (run / "config.json").write_text(json.dumps({"images_a_step": 10, "images_before": 5}))
    names = [name for name in catalog.variants(tmp_path) if name.startswith("runs/")]
    assert names == ["runs/mine", "runs/mine raw", "runs/mine step 3", "runs/mine step 3 raw"]
    cards = {name: catalog.card(name, tmp_path) for name in names}
    assert [card.averaged for card in cards.values()] == [True, False, True, False]
    assert (cards[names[2]].training["steps"], cards[names[2]].training["images_seen"]) == (3, 35)
    cache, first = PipelineCache(), next(iter(network.parameters())).detach()
    for name, factor in zip(names, (1, 1, 0.5, 2), strict=True):
        torch.testing.assert_close(next(iter(cache.get(cards[name].source).model.parameters())).detach(), factor * first)
    (run / "checkpoints/step-3/custom_checkpoint_0.pkl").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(ValueError, match="cannot be loaded"):
        PipelineCache().get(cards[names[2]].source)


@pytest.mark.parametrize(
    "bad",
    [
        *(dict(num_images=number) for number in (10_000, MAX_IMAGES + 1, 0, "8")),
        *(dict(steps=number) for number in (2.5, 0)),
        *(dict(seed=number) for number in (-2, float("nan"), 1e300, 2**53, None)),
        *(dict(guidance_scale=number) for number in (-1, "2", float("nan"))),
        *(dict(sampler=name) for name in ("magic", ["euler"])),
        *(dict(label=label) for label in (9, {}, "a\0b", "x" * 1000)),
    ],
    ids=lambda bad: str(bad)[:40],
)
def test_bad_input_is_one_clear_line(runs: Path, bad: dict) -> None:
    with pytest.raises(ValueError) as error:
        list(sample(asked(**{"label": None, **bad}), runs))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "told",
    [
        None, [], {}, {"checkpoints": None}, {"checkpoints": []}, {"checkpoints": [{}]}, {"checkpoints": ["runs/x"]},
        {"checkpoints": [{"name": PLAIN}] * (MAX_SIDES + 1)}, {"checkpoints": [{"name": PLAIN, "own": {"num_images": 3}}]},
        {"checkpoints": [{"name": PLAIN, "own": {"magic": 3}}]}, {"checkpoints": [{"name": PLAIN, "own": []}]},
        {"checkpoints": [{"name": PLAIN}], "steps": 10**9}, {"checkpoints": [{"name": "a\0"}]},
    ],
    ids=lambda told: str(told)[:40],
)  # fmt: skip
def test_settings_from_anywhere_are_checked(told: object) -> None:
    with pytest.raises(ValueError) as error:
        Comparison.from_json(told)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


# ---------------------------------------------------------------------------------------------------------------- recipes


def test_a_png_brings_its_image_back_bit_for_bit(runs: Path, tmp_path: Path) -> None:
    first = last_frame(runs, Comparison(asked(seed=-1).shared, (Side(PLAIN), Side(DECAYED, {"steps": 6}))))
    file = tmp_path / "downloaded.png"
    file.write_bytes(recipe.to_png(first.images[1][2], recipe.of_image(first.recipe, side=1, index=2)))
    told = recipe.from_png(file)
    assert told["image"] == {"side": 1, "index": 2, "seed": first.recipe["seed"] + 2}
    assert len(told["checkpoints"][1]["sha256"]) == 16 and told["versions"]["torch"] == torch.__version__
    again, changed = recipe.comparison(told, runs)
    assert changed == []
    frame = last_frame(runs, again)
    np.testing.assert_array_equal(frame.images[1][2], np.asarray(Image.open(file)))
    assert recipe.same_pixels(file, frame)
    assert not recipe.same_pixels(file, last_frame(runs, asked(seed=frame.recipe["seed"] + 1)))
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 255  # the recipe stands before the pixels
    file.write_bytes(content)
    with pytest.raises(ValueError, match="no PNG that can be read"):
        recipe.same_pixels(file, frame)


def test_a_recipe_tells_what_changed(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    told = last_frame(tmp_path / "runs", asked()).recipe
    index = tmp_path / "runs/tiny-plain" / INDEX
    index.write_text(index.read_text() + "\n")
    assert recipe.comparison(told, tmp_path / "runs")[1] == [f"{PLAIN} has other weights now, so the images will differ"]
    shutil.rmtree(tmp_path / "runs/tiny-plain")
    with pytest.raises(ValueError, match="there is no checkpoint"):
        recipe.comparison(told, tmp_path / "runs")


def test_a_recipe_finds_its_weights_under_another_name(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    first = last_frame(tmp_path / "runs", Comparison(asked().shared, (Side(PLAIN), Side(DECAYED, {"steps": 6}))))
    (tmp_path / "runs/tiny-decayed").rename(tmp_path / "runs/new-name")
    again, changed = recipe.comparison(first.recipe, tmp_path / "runs")
    assert again.sides == (Side(PLAIN), Side("runs/new-name", {"steps": 6}))
    assert changed == [f"{DECAYED} is called runs/new-name now"]
    np.testing.assert_array_equal(last_frame(tmp_path / "runs", again).images[1], first.images[1])
    for hash in ("0" * 16, None, []):
        sides = [{"name": "runs/nowhere", "sha256": hash}]
        with pytest.raises(ValueError, match="there is no checkpoint 'runs/nowhere'"):
            recipe.comparison({**first.recipe, "checkpoints": sides}, tmp_path / "runs")


def png_with(text: str | None = None, **chunks: bytes) -> bytes:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text(recipe.KEY, text)
    for name, data in chunks.items():
        info.add(name.encode(), data)
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "png", pnginfo=info)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"not a png", b"\x89PNG\r\n\x1a\n" + b"\0" * 100, png_with(), png_with("{"), png_with("[" * 50_000), png_with("{}"),
        png_with(json.dumps({"version": 99})), png_with(json.dumps({"version": recipe.VERSION, "pad": "x" * 100_000})),
        png_with(zTXt=recipe.KEY.encode() + b"\0\0" + zlib.compress(b"{" + b" " * 100_000_000)), png_with("{}")[:60],
    ],
    ids=lambda content: str(content[:20] + content[-20:]),
)  # fmt: skip
def test_hostile_pngs_are_told_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError) as error:
        recipe.from_png(tmp_path / "x.png")
    assert "PNG" in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------------ grids


@pytest.mark.parametrize(
    "axis, values, columns",
    [
        ("seed", "3", ("seed 5", "seed 6", "seed 7")),
        ("steps", "1, 4", ("1 step", "4 steps")),
        ("guidance_scale", "1,2.5", ("guidance 1", "guidance 2.5")),
        ("label", 'squares,"no label"', ("squares", "no label")),
        ("alpha_min", "2", (f"alpha_min 1: {PLAIN}", f"alpha_min 0.6: {DECAYED}")),
    ],
)
def test_every_cell_of_a_grid_is_the_image_that_its_labels_tell(runs: Path, axis: str, values: str, columns: tuple[str, ...]) -> None:
    grid = plan(asked(), axis, values, runs)
    *_, frame = sample_grid(grid, runs)
    assert frame.done and frame.step == frame.num_steps and grid.columns == columns
    assert grid.rows == (PAIR if axis != "alpha_min" else ("seed 5", "seed 6"))
    assert "steps" in grid.title or axis == "steps"
    picture = np.asarray(draw(grid, frame))
    setting = {"seed": 1, "steps": 4, "guidance_scale": 2.5, "label": None, "alpha_min": DECAYED}[axis]
    if axis == "seed":
        expected = last_images(runs, num_images=3)[1][-1]
    elif axis == "alpha_min":
        expected = last_images(runs, setting, num_images=2)[0][-1]
    else:
        expected = last_images(runs, num_images=1, **{axis: setting})[1][-1]
    enlarged = expected.repeat(6, axis=0).repeat(6, axis=1)  # 16 px in cells of 96: a whole number, without blur
    rows = [y for y in range(picture.shape[0] - 95) if (picture[y] == enlarged[0][0]).all(axis=1).any()]
    windows = (picture[y : y + 96, x : x + 96] for y in rows for x in range(picture.shape[1] - 95))
    assert any(np.array_equal(window, enlarged) for window in windows)


@pytest.mark.parametrize(
    "axis, values",
    [("magic", "1"), ("steps", ""), ("steps", "a"), ("steps", "0"), ("seed", "99"), ("seed", "1,2"), ("label", "triangles"),
     ("label", '"squares, crosses'), ("label", '"squares" crosses'), ("guidance_scale", ",".join(map(str, range(40))))],
)  # fmt: skip
def test_grids_that_cannot_be_drawn_are_told(runs: Path, axis: str, values: str) -> None:
    with pytest.raises(ValueError) as error:
        plan(asked(), axis, values, runs)
    assert "\n" not in str(error.value)


def test_a_grid_tells_what_it_leaves_out(runs: Path, tmp_path: Path) -> None:
    overridden = Comparison(asked().shared, (Side(PLAIN), Side(DECAYED, {"steps": 6})))
    assert plan(overridden, "label", "all", runs).notes == ("Settings of a checkpoint's own are left out.",)
    assert plan(Comparison(asked().shared, (Side(PLAIN, {"steps": asked().shared.steps}),)), "seed", "2", runs).notes == ()
    own = Path(shutil.copytree(runs, tmp_path / "runs"))
    for i in range(MAX_COLUMNS):
        copy = shutil.copytree(own / "tiny-decayed", own / f"copy-{i}")
        config = copy / "model/config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "alpha_min": 0.1 + i / 100}))
    for name in ("tiny-plain", "tiny-decayed"):
        for file, changes in ((INDEX, {"class_names": [*map(str, range(99))]}), ("model/config.json", {"num_classes": 99})):
            path = own / name / file
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    labels = plan(asked(label=None), "label", "all", own)
    assert len(labels.columns) == MAX_COLUMNS and labels.notes == ("These are the first 12 of 99 labels.",)
    family = plan(asked("runs/copy-0"), "alpha_min", "1", own)
    assert not family.notes, "there are no more"
    shutil.copytree(runs / "tiny-plain", own / "plain-again")
    family = plan(asked("runs/copy-0"), "alpha_min", "1", own)
    assert len(family.columns) == MAX_COLUMNS and family.notes == ("These are the first 12 of 13 values of alpha_min.",)


def test_names_between_commas_may_have_quotes_and_commas_themselves() -> None:
    assert words_of('5" disk, x ,"a, b"') == ['5" disk', "x", "a, b"]
    with pytest.raises(ValueError, match="must end with one"):
        words_of('"a, b')


def test_a_seed_that_is_drawn_for_all_is_drawn_once() -> None:
    shared = Settings(seed=RANDOM_SEED)
    settled = Comparison(shared, (Side("one"), Side("other", {"seed": RANDOM_SEED, "steps": 9}))).settled()
    assert settled.shared.seed >= 0 and settled.sides[1].own == {"steps": 9}
    alone = Comparison(Settings(seed=7), (Side("one", {"seed": RANDOM_SEED}),)).settled()
    assert alone.sides[0].own["seed"] != RANDOM_SEED


def test_a_label_with_a_comma_stands_in_quotes(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    for index in (tmp_path / "runs").glob("*/model_index.json"):
        index.write_text(index.read_text().replace('"squares"', '"tench, Tinca tinca"'))
    grid = plan(asked(label=None), "label", '"tench, Tinca tinca", no label', tmp_path / "runs")
    assert grid.columns == ("tench, Tinca tinca", "no label")
    *_, frame = sample_grid(grid, tmp_path / "runs")
    assert frame.done


def test_of_several_with_one_alpha_the_grid_takes_the_chosen_one_else_the_longest_trained(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    for name, steps in (("longest", 9999), ("short", 1)):
        shutil.copytree(runs / "tiny-decayed", tmp_path / "runs" / name)
        path = tmp_path / "runs" / name / "model_index.json"
        index = json.loads(path.read_text())
        path.write_text(json.dumps({**index, "training": {**index["training"], "images_seen": steps}}))

    def drawn(*names: str) -> tuple[str, ...]:
        return tuple(each.sides[0].checkpoint for each in plan(asked(*names), "alpha_min", "1", tmp_path / "runs").comparisons)

    assert drawn(PLAIN, "runs/short") == (PLAIN, "runs/short") and drawn("runs/short", PLAIN) == (PLAIN, "runs/short")
    assert drawn(PLAIN) == (PLAIN, "runs/longest")


def test_a_grid_is_asked_for_again_by_its_recipe(runs: Path) -> None:
    grid = plan(Comparison(asked(seed=-1).shared, (Side(PLAIN), Side(DECAYED, {"steps": 6}))), "steps", "1, 3", runs)
    *_, frame = sample_grid(grid, runs)
    told, changed = recipe.comparison(frame.recipe, runs)
    assert (*varying(frame.recipe), changed) == ("steps", "1, 3", [])
    assert told == Comparison.of_names(PAIR, **vars(told.shared)) and told.shared == grid.asked.shared
    *_, again = sample_grid(plan(told, *varying(frame.recipe), runs), runs)
    assert all(np.array_equal(*each) for each in zip(frame.images, again.images, strict=True))
    family = plan(asked(), "alpha_min", "2", runs)
    *_, frame = sample_grid(family, runs)
    assert recipe.comparison(frame.recipe, runs)[0].sides == family.asked.sides and varying(frame.recipe) == ("alpha_min", "2")
    for hostile in (None, [], {}, {"axis": "magic", "values": "1"}, {"axis": [], "values": "1"}, {"axis": "steps", "values": "1" * 301}):
        with pytest.raises(ValueError, match="does not draw"):
            varying({"grid": hostile})


def test_a_curve_of_one_point_has_one_tick_and_every_tick_fits() -> None:
    one = plot([Line("x", [3], [1.0])], "Loss", "step")
    assert one.count('text-anchor="middle"') == 1 and ">3</text>" in one and "2.5" not in one
    small = plot([Line("x", [1, 2, 3, 4], [-0.000883, 0.000883, 0.0001, -0.000123])], "Loss", "step")
    ticks = re.findall(r'text-anchor="end">([^<]+)<', small)
    assert max(map(len, ticks)) >= 8 and all(6.4 * len(tick) < LEFT - 6 for tick in ticks), "the font's digits are up to 6.4 px wide"


def test_the_page_offers_every_axis_and_names_every_sampler() -> None:
    from app.grid_section import AXES as offered

    assert tuple(offered) == AXES
    assert list(render.SAMPLERS) == [OWN_SAMPLER, *SAMPLER_NAMES]


# ------------------------------------------------------------------------------------------------------- the page's handlers


class Handlers:
    """The functions behind a page's widgets, called as Gradio calls them."""

    def __init__(self, site: Site) -> None:
        self.site, self.page = site, build(site)

    def widget(self, id: str) -> gr.components.Component:
        return next(block for block in self.page.blocks.values() if block.elem_id == id)

    def find(self, name: str, output: str) -> Callable:
        """By its name, and the id of a widget that it writes."""
        return next(each.fn for each in self.page.fns.values() if each.name == name and self.widget(output) in each.outputs)

    def watched(self, output: str, *values: object) -> list[dict]:
        """All that a watcher sends."""

        async def gather() -> list[dict]:
            return [news async for news in self.find("watch", output)(*values)]

        return asyncio.run(gather())


@pytest.fixture
def handlers(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Handlers:
    """Of a page over the tiny pair alone."""
    monkeypatch.setattr(catalog, "PRETRAINED", tmp_path / "none")
    own = Path(shutil.copytree(runs, tmp_path / "runs"))
    return Handlers(Site(own, None, Votes(own)))


def test_a_damaged_checkpoint_does_not_keep_what_a_visitor_left_from_coming_back(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(gr, "Warning", told.append)
    kept = {"settings": asked().as_json(), "shown": None}
    (handlers.site.runs / "tiny-decayed/model/config.json").unlink()
    filled = handlers.find("load", "checkpoint-a")(kept, "slider")
    assert [filled[handlers.widget(f"checkpoint-{letter}")]["value"] for letter in "ab"] == [PLAIN, None]
    assert filled[handlers.widget("view")] == "slider" and filled[handlers.widget("seed")] == 5
    assert told == [f"{DECAYED} is damaged, so it is left out."]


def test_pictures_are_not_sent_twice(handlers: Handlers) -> None:
    site, request = handlers.site, gr.Request(session_hash="me")
    pair, grid = asked(), plan(asked(), "seed", "2", handlers.site.runs)
    ballot = site.votes.new_ballot(PAIR, {"seed": 5}, "anna")
    sampling, drawn = (
        site.studio.ask(lambda: sample(pair, site.runs), "me", pair),
        site.studio.ask(lambda: sample_grid(grid, site.runs), "me", grid),
    )
    for output, values in {"stage": (sampling.id, None, request), "blind-stage": ((ballot, sampling.id),), "grid": (drawn.id,)}.items():
        *_, end, last = handlers.watched(output, *values)
        assert end[handlers.widget(output)].count("<img") == {"stage": 6, "blind-stage": 6, "grid": 1}[output]
        assert handlers.widget(output) not in last and "<img" not in str(last), "Gradio repeats what came last"


def test_previews_come_no_faster_than_a_link_takes_them(handlers: Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
    site, slow_link = handlers.site, 50_000
    monkeypatch.setattr("app.site.LINK_BYTES_PER_S", slow_link)
    pair = asked(num_images=16, steps=100)
    ballot = site.votes.new_ballot(PAIR, {"seed": 5}, "anna")
    for output, values in {
        "stage": lambda id: (id, None, gr.Request(session_hash="me")),
        "blind-stage": lambda id: ((ballot, id),),
    }.items():
        began = time.monotonic()
        *sent, _, _ = handlers.watched(output, *values(site.studio.ask(lambda: sample(pair, site.runs), "me", pair).id))
        previews = [len(news.get(handlers.widget(output), "")) for news in sent]
        assert max(previews) > 10_000
        assert sum(previews) <= slow_link * (time.monotonic() - began)


def test_nobody_can_stop_the_greeting_that_all_see(handlers: Handlers) -> None:
    stop, long = handlers.widget("stop"), asked(steps=200)
    press_stop = next(each.fn for each in handlers.page.fns.values() if (stop._id, "click") in each.targets)
    greeting, own = (
        handlers.site.studio.ask(lambda: sample(long, handlers.site.runs), who, long, lasting=who == "the page itself")
        for who in ("the page itself", "me")
    )
    for each in (greeting, own):
        press_stop(each.id)
    begun, *_ = handlers.watched("stage", greeting.id, None, gr.Request(session_hash="me"))
    assert begun[stop]["interactive"] is False, "it would do nothing"
    assert (greeting.state, own.state) == (DONE, STOPPED)


def test_what_stays_chosen_in_the_blind_test_is_not_sent(handlers: Handlers) -> None:
    one, other = (handlers.widget(f"blind-{i}") for i in range(2))
    found = handlers.find("refresh", "tallies")(PLAIN, "runs/gone")
    assert "value" not in found[one] and found[other]["value"] is None
    assert found[one]["choices"] == found[other]["choices"] == [*sorted(PAIR)]


def test_both_that_write_the_table_of_cards_take_turns(handlers: Handlers) -> None:
    writers = [each for each in handlers.page.fns.values() if handlers.widget("table") in each.outputs]
    assert {each.name for each in writers} == {"look_at_cards", "choose"} and len({each.concurrency_id for each in writers}) == 1


# -------------------------------------------------------------------------------------------------------------- the queue


class Work:
    """Frames that come when the test says so."""

    def __init__(self, frames: int = 3, error: Exception | None = None) -> None:
        self.go, self.frames, self.error, self.taken, self.closed = threading.Event(), frames, error, 0, threading.Event()

    def __call__(self) -> Iterator[Frame]:
        try:
            for i in range(1, self.frames + 1):
                self.taken = i
                yield Frame((np.zeros((1, 4, 4, 3), np.uint8),), i, self.frames, 0.1, {}, i == self.frames)
                assert self.go.wait(30)
                if self.error:
                    raise self.error
        finally:
            self.closed.set()


def test_samplings_wait_in_line_and_stop_within_a_step() -> None:
    studio = Studio()
    works = [Work(1000), Work(), Work()]
    first, second, third = (studio.ask(work, f"visitor {i}") for i, work in enumerate(works))
    wait_for(lambda: first.frame)
    assert [studio.position(each) for each in (first, second, third)] == [0, 1, 2]
    assert (first.state, second.state) == (RUNNING, WAITING)
    studio.stop(second.id)
    assert second.state == STOPPED and studio.position(third) == 1
    studio.stop(first.id)
    works[0].go.set()
    wait_for(lambda: first.over)
    assert first.state == STOPPED and works[0].taken <= 2 and works[0].closed.is_set()
    works[2].go.set()
    assert asyncio.run(studio.finished(third)).done and third.state == DONE and works[1].taken == 0
    assert studio.find(third.id) is third and studio.find("other") is None and studio.find(None) is None
    assert studio.kept(third.id) is third
    with pytest.raises(ValueError, match="not kept any more"):  # what tabs that watch it tell
        studio.kept("other")


def test_one_that_fails_or_is_left_alone_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    studio = Studio()
    bad, broken, last = Work(error=ValueError("no such\nlabel")), Work(error=RuntimeError("of torch")), Work()
    for work in (bad, broken, last):
        work.go.set()
    samplings: list[Sampling] = [studio.ask(work, "me") for work in (bad, broken, last)]
    wait_for(lambda: samplings[-1].over)
    assert [each.state for each in samplings] == [FAILED, FAILED, DONE]
    assert samplings[0].message == "no such label" and "torch" not in samplings[1].message
    monkeypatch.setattr("app.studio.GIVEN_UP_S", -1.0)
    alone, lasting = studio.ask(Work(), "me"), studio.ask(last, "me", lasting=True)
    wait_for(lambda: lasting.over)
    assert (alone.state, lasting.state) == (STOPPED, DONE)


def test_nobody_fills_the_queue_and_old_pictures_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.studio.MAX_WAITING_EACH", 2)
    monkeypatch.setattr("app.studio.MAX_WAITING", 3)
    monkeypatch.setattr("app.studio.MAX_KEPT", 2)
    studio, held = Studio(), Work()
    running = studio.ask(held, "a")
    wait_for(lambda: running.state == RUNNING)
    studio.ask(held, "a")
    with pytest.raises(ValueError, match="2 samplings of yours"):
        studio.ask(held, "a")
    for visitor in "bc":
        studio.ask(held, visitor)
    with pytest.raises(ValueError, match="3 samplings wait"):
        studio.ask(held, "d")
    held.go.set()
    wait_for(lambda: running.over and not studio._waiting)
    newest = studio.ask(held, "e")
    assert studio.find(running.id) is None and studio.find(newest.id) is newest


def test_a_browser_that_looks_late_loses_no_button() -> None:
    """As Gradio's client: a difference changes the dictionary that came first, looked at or not."""

    @streams
    async def watch() -> AsyncIterator[Updates]:
        yield {"stop": gr.update(interactive=True)}
        yield {"status": "1 of 2"}
        yield {"stop": gr.update(interactive=False), "status": "done"}

    async def all_sent() -> list[Updates]:
        return [news async for news in watch()]

    first, *others = [news.get("stop", gr.skip()) for news in asyncio.run(all_sent())]
    before, seen = first, dict(first)
    for now in others:
        for action, path, value in diff(before, now):
            assert action == "replace", "what was deleted is not seen any more"
            seen[path[0]] = value
        before = now
    assert seen == gr.update(interactive=False)
