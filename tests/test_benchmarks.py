"""The parts of the benchmarks that decide what is compared."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from eval.generate import SamplingOptions
from eval.intervals import Estimate
from models.files import read_json
from models.pipeline import Pipeline
from tests.benchmarks.cases import write_shards
from tests.benchmarks.measure import Case, measure
from tests.benchmarks.peers import network_of
from tests.benchmarks.published import SAMPLER_STEPS, published_sampler
from tests.benchmarks.report import page
from tests.benchmarks.sampling import LADDER, Sampling, Tried, quality_notes, search, taken
from tests.benchmarks.steps import SMALL
from tests.conftest import ROOT
from training.stream import open_stream


@pytest.fixture
def pipeline(tiny_dit: Callable) -> Pipeline:
    pipeline = Pipeline(tiny_dit(num_classes=2), FlowMatchEulerDiscreteScheduler(), class_names=("cold", "warm"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_published_sampler_is_that_of_the_pipeline(pipeline: Pipeline) -> None:
    labels, noise = [0, 1, 1], pipeline.noise(3, seed=5)
    expected = [step.x for step in pipeline.steps(3, labels, 5, SAMPLER_STEPS, guidance_scale=2.5)]
    found = published_sampler(pipeline.model, noise, torch.tensor(labels), 2.5, num_classes=2)
    assert torch.allclose(found, expected[-1], rtol=1e-4, atol=1e-4)
    some = published_sampler(pipeline.model, noise, torch.tensor(labels), 2.5, num_classes=2, steps=25)
    assert torch.allclose(some, expected[24], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(some, found, rtol=1e-2, atol=1e-2)


def test_the_cheapest_setting_that_is_as_good_is_taken() -> None:
    asked = []

    def judge(options: SamplingOptions) -> Tried:
        asked.append(options.num_inference_steps)
        ratio = {4: 1.3, 6: 1.1, 8: 1.019, 10: 1.0}.get(options.num_inference_steps, 1.2)
        return Tried(options, 0, 64, 100 * ratio, ratio, ratio - 0.01, ratio + 0.01)

    settings = [options for options in LADDER if options.sampler == "dpm++" and options.guidance_to == 1]
    cost = lambda options: options.num_inference_steps  # noqa: E731
    tried = search(reversed(settings), judge, cost)
    assert asked == [4, 5, 6, 8]
    assert taken(tried).options.num_inference_steps == 8 and taken(tried).quality == "quality equal as far as these few images tell"
    tried = search(settings[:3], judge, cost)
    assert taken(tried).options.num_inference_steps == 6 and taken(tried).quality == "QUALITY NOT EQUAL"


def ours_and_published(backbone: str) -> tuple[nn.Module, nn.Module]:
    """The plain network and the published one with its weights."""
    torch.manual_seed(0)
    model, published = SMALL.create(backbone, long_skips=False, zero_init=False), network_of(None, backbone, SMALL.sizes(backbone))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if backbone == "dit":
        dim = model.config.dim
        for end in ("weight", "bias"):
            *rows, final = weights.pop(f"modulation.{end}").split(6 * dim)
            weights |= {f"blocks.{i}.modulation.1.{end}": part for i, part in enumerate(rows)} | {f"modulation.1.{end}": final}
    else:
        channels = model.config.in_channels
        for end in ("weight", "bias"):  # the published head puts the channels of a patch first
            pixels = weights.pop(f"decoder_pred.{end}").unflatten(0, (-1, channels))
            weights[f"head.{end}"] = pixels.transpose(0, 1).flatten(0, 1)
    missing, unexpected = published.load_state_dict(weights, strict=False)
    assert not unexpected and all("positions" in name for name in missing)
    return model, published


@pytest.mark.parametrize("backbone", ["dit", "mae"])
def test_the_published_networks_do_the_same_work(backbone: str) -> None:
    model, published = ours_and_published(backbone)
    images, t, labels = torch.randn(3, 3, 32, 32), torch.rand(3), torch.tensor([0, 8, 9])
    found = []
    for network in (published, model):
        torch.manual_seed(1)  # of the masks
        output = network(images, t, labels) if backbone == "dit" else network(images)[0]
        output.square().mean().backward()
        found.append((output, network.blocks[0].mlp.fc1.weight.grad))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backbone", ["dit", "mae"])
def test_the_published_networks_run_wherever_they_lie(backbone: str) -> None:
    with torch.device("meta"):
        network = network_of(None, backbone, SMALL.sizes(backbone))
    images, t, labels = (torch.empty(2, *shape, device="meta") for shape in ((3, 32, 32), (), ()))
    output = network(images, t, labels.long()) if backbone == "dit" else network(images)[0]
    assert output.device.type == "meta"


@pytest.mark.slow
def test_sides_of_sampling_have_one_quality_where_they_are_one_sampler(
    pipeline: Pipeline, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.benchmarks.sampling.BATCH", 4)
    pipeline.save_pretrained(tmp_path)
    sides = Sampling(6, tmp_path, str(image_folder), "train")
    full = SamplingOptions(sampler="euler", num_inference_steps=SAMPLER_STEPS, guidance_scale=1.5)
    same = sides.judge(full)
    assert same.passes == 2 * SAMPLER_STEPS
    assert same.ratio == pytest.approx(1, abs=0.02) and same.low <= same.ratio <= same.high
    assert same.num_images == 6, "a part, of 4 images, does not rule it out"
    with monkeypatch.context() as strict:
        strict.setattr("tests.benchmarks.sampling.TOLERANCE", 0.5)
        assert sides.judge(full).num_images == 4
    monkeypatch.delattr(Sampling, "theirs_of")  # what was drawn once is not drawn again
    half = Sampling(6, tmp_path, str(image_folder), "train")
    assert half.judge(SamplingOptions(sampler="unipc", num_inference_steps=4, guidance_scale=1.5, guidance_to=0.5)).passes in (6, 7)
    assert half.their_distance.value == sides.their_distance.value


def test_a_part_of_their_work_counts_as_often_as_the_whole_needs_it() -> None:
    work = lambda: sum(range(2_000_000))  # noqa: E731
    found = measure(Case("", work, work, theirs_times=1000), pairs=3)
    assert found["ratio_median"] < 0.1
    assert found["processor_ratio_median"] < 0.1


def test_a_peer_has_a_row_of_its_own() -> None:
    case, of_peer = Case("", list, list), Case("", list, list, peer="SiT")
    assert [case.row("loop"), of_peer.row("loop"), case.row("loop", "cold"), of_peer.row("loop", "cold")] == [
        "loop", "loop (SiT)", "loop (cold)", "loop (SiT, cold)",
    ]  # fmt: skip


def test_notes_of_quality_leave_out_what_was_no_nearer_than_cheaper_ones() -> None:
    tried = [Tried(options, 0, 64, 100 * ratio, ratio, ratio, ratio) for options, ratio in zip(LADDER, (1.3, 1.4, 1.2, 1.01), strict=False)]
    head, *notes = quality_notes(tried, Estimate(100.0, np.zeros(0)), 64)
    assert "64 images (so few" in head and "of 4 settings" in head
    assert [note.split(": ")[1].split(", ")[0] for note in notes] == ["130.0", "120.0", "101.0"] and notes[-1].endswith(": within 2 %")


def test_words_that_do_not_fit_are_told_before_anything_is_measured(tmp_path: Path, run_here: Callable) -> None:
    for words, told in ((["crops", "--peer", tmp_path], "--peer is for the cases loop, "), (["bogus"], "there is no benchmark 'bogus'")):
        code, _, said = run_here("tests/benchmarks/__main__.py", *words)
        assert code == 2 and told in said and said.count("\n") == 1, said


def test_the_page_that_ships_is_that_of_its_results() -> None:
    folder = ROOT / "tests/benchmarks"
    tried = (folder / "TRIED.md").read_text(encoding="utf-8")
    assert (folder / "RESULTS.md").read_text(encoding="utf-8") == page(read_json(folder / "results.json"), tried)


def test_shards_hold_as_many_images_as_they_say(tmp_path: Path) -> None:
    stream = open_stream(str(write_shards(tmp_path / "shards", 30, in_each=10)), 32, "train", "image", None, shuffle_buffer=5)
    assert sum(1 for _ in stream.table) == 30
    assert stream.num_classes == 9


def test_the_page_tells_what_was_reached() -> None:
    found = {
        "about": "ours / theirs", "processor_ratio_median": 0.5, "pairs": 40, "notes": ["some words"],
        "machine": {"device": "2 CPU threads", "torch_threads": 2, "precision": "no", "versions": {"torch": "2"}, "date": "today"},
    }  # fmt: skip
    cases = {
        "reached": {"goal": 2, "ratio_median": 0.4, "ratio_interval_95": [0.3, 0.45]},
        "nearly": {"goal": 2, "ratio_median": 0.4, "ratio_interval_95": [0.3, 0.6]},
        "perhaps": {"goal": 2, "ratio_median": 0.55, "ratio_interval_95": [0.45, 0.6]},
        "missed": {"goal": 2, "ratio_median": 0.8, "ratio_interval_95": None},
        "of other quality": {"goal": 2, "ratio_median": 0.1, "ratio_interval_95": None, "valid": False},
        "without": {"goal": None, "ratio_median": 1.0, "ratio_interval_95": None, "ours_peak_bytes": 90, "theirs_peak_bytes": 100},
        "step": {"ratio_median": 1, "ours_s_median": 0.4, "limits": {"products_s": 0.15, "traffic_s": 0.05}},
        "on a GPU": {
            "ratio_median": 1,
            "ours_s_median": 0.4,
            "limits": {"products_s": 0.15, "traffic_s": 0.05, "flops": 10, "data_sheet_flops_per_s": 100.0},
        },
    }
    assert "Tried" not in page({}), "that is of the machine of those who tried"
    lines = page({name: found | case for name, case in cases.items()}, tried="- once").splitlines()
    assert lines[lines.index("Tried, and what came of it:") + 2] == "- once"
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines if line.startswith("|")}
    goals = ("reached", "nearly", "perhaps", "missed", "of other quality", "without")
    assert [rows[name][6] for name in goals] == ["yes", "undecided", "undecided", "no", "no", ""]
    assert rows["reached"][2] == "2.5 [2.22, 3.33]" and rows["without"][4] == "0.900"
    assert rows["step"][-2:] == ["2.00", " |"] and rows["on a GPU"][-1] == "25% |"
    assert lines.count("- some words") == len(cases)
    assert len([line for line in lines if "2 CPU threads" in line]) == 1, "one machine, one line"
