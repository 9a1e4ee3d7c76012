"""Guidance against the formula, in its interval, and by another network."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eval.generate import load_guide
from models import Pipeline
from models.guidance import Guidance
from training.objectives import DDPM, Diffusion, FlowMatching


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 3, 16, 16), torch.full((4,), 0.4), torch.tensor([0, 1, 2, 0])


@torch.inference_mode()
def test_classifier_free(tiny_dit: Callable[..., nn.Module]) -> None:
    model, (x, t, labels) = tiny_dit(), inputs()
    strong, weak = model(x, t, labels), model(x, t, torch.full_like(labels, 3))
    torch.testing.assert_close(Guidance(2.5)(model, x, t, labels, 0.4, 3), weak + 2.5 * (strong - weak), rtol=1e-4, atol=1e-5)
    some = Guidance(2.5, channels=1)(model, x, t, labels, 0.4, 3)
    torch.testing.assert_close(some[:, 1:], strong[:, 1:], rtol=1e-4, atol=1e-5)
    assert (some[:, 0] - strong[:, 0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("guidance", "time", "labelled"),
    [(Guidance(), 0.4, True), (Guidance(3.0, (0.5, 0.9)), 0.4, True), (Guidance(3.0, (0.0, 0.3)), 0.4, True), (Guidance(3.0), 0.4, False)],
)
@torch.inference_mode()
def test_nothing_is_done_where_it_does_not_act(guidance: Guidance, time: float, labelled: bool, tiny_dit: Callable[..., nn.Module]) -> None:
    model, (x, t, labels) = tiny_dit(), inputs()
    labels = labels if labelled else None
    assert torch.equal(guidance(model, x, t, labels, time, 3), model(x, t, labels))


@torch.inference_mode()
def test_another_network_guides_with_the_same_label(tiny_dit: Callable[..., nn.Module]) -> None:
    model, guide, (x, t, labels) = tiny_dit(), tiny_dit(seed=1), inputs()
    for given in (labels, None):
        strong, weak = model(x, t, given), guide(x, t, given)
        assert torch.equal(Guidance(2.0, guide=guide)(model, x, t, given, 0.4, 3), weak + 2.0 * (strong - weak))
    torch.testing.assert_close(Guidance(2.0, guide=model)(model, x, t, labels, 0.4, 3), model(x, t, labels))


@pytest.mark.parametrize(("scale", "interval"), [(-1, (0, 1)), (float("nan"), (0, 1)), (2, (0.5, 0.4)), (2, (-0.1, 1)), (2, (0, 1.5))])
def test_refuses(scale: float, interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="choose"):
        Guidance(scale, interval)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (FlowMatching(3, path="gvp"), "has path gvp, and the checkpoint that it shall guide linear"),
        (DDPM(3), "has objective ddpm, and the checkpoint that it shall guide flow"),
    ],
)
def test_a_guide_must_predict_the_same(other: Diffusion, told: str, tiny_dit: Callable[..., nn.Module], tmp_path: Path) -> None:
    strong = Pipeline(tiny_dit(), FlowMatching(3).scheduler, ["a", "b", "c"])
    Pipeline(tiny_dit(seed=1), other.scheduler, ["a", "b", "c"], path=other.path).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=told):
        load_guide(strong, str(tmp_path / "other"))
    Pipeline(tiny_dit(seed=1), FlowMatching(3).scheduler, ["a", "b", "c"]).save_pretrained(tmp_path / "weak")
    assert load_guide(strong, str(tmp_path / "weak")).config.dim == strong.model.config.dim
