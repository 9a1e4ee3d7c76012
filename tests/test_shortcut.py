"""The equation, the schedule, the depth rule."""

import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import alpha_min_for, alpha_window, decayed_add, effective_alpha, linear_schedule
from models.shortcut import SCHEDULES, advice, advised, make_shortcuts


def test_equation() -> None:
    x, branch = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    torch.testing.assert_close(decayed_add(x, branch, 0.3), 0.3 * x + branch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_one_is_the_plain_residual_bit_for_bit(dtype: torch.dtype) -> None:
    x, branch = torch.randn(2, 1000, dtype=dtype), torch.randn(2, 1000, dtype=dtype)
    assert torch.equal(decayed_add(x, branch, 1.0), x + branch)


def test_only_the_shortcut_is_scaled_in_the_gradient() -> None:
    x, branch = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    decayed_add(x, branch, 0.25).sum().backward()
    assert x.grad.tolist() == [0.25] * 3
    assert branch.grad.tolist() == [1.0] * 3


@given(st.integers(2, 200), st.floats(1e-3, 1))
@settings(max_examples=100, deadline=None)
def test_linear_schedule_is_linspace(num_sublayers: int, alpha_min: float) -> None:
    alphas = linear_schedule(num_sublayers, alpha_min)
    assert alphas[0] == 1
    assert alphas[-1] == alpha_min
    np.testing.assert_allclose(alphas, np.linspace(1, alpha_min, num_sublayers), rtol=1e-12)


def test_effective_alpha_is_the_product() -> None:
    assert math.isclose(effective_alpha((1.0, 0.5, 0.4)), 0.2)


@given(st.integers(2, 200), st.floats(1e-3, 0.99))
@settings(max_examples=50, deadline=None)
def test_alpha_min_for_inverts_effective_alpha(num_sublayers: int, effective: float) -> None:
    alphas = linear_schedule(num_sublayers, alpha_min_for(num_sublayers, effective))
    assert math.isclose(effective_alpha(alphas), effective, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("blocks", "low", "high"),
    [(6, 0.23, 0.41), (8, 0.36, 0.53), (12, 0.53, 0.66), (24, 0.74, 0.82), (28, 0.77, 0.84), (32, 0.80, 0.86)],
)
def test_window_is_the_papers(blocks: int, low: float, high: float) -> None:
    assert alpha_window(2 * blocks) == pytest.approx((low, high), abs=0.0051)


@pytest.mark.parametrize("alpha_min", [0, -0.5, 1.01, math.nan, math.inf])
def test_alpha_min_outside_its_range_is_refused(alpha_min: float) -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        linear_schedule(24, alpha_min)


def test_counts_and_shares_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        linear_schedule(0, 0.5)
    with pytest.raises(ValueError, match="at least 2"):
        alpha_min_for(1)
    with pytest.raises(ValueError, match="alpha_eff"):
        alpha_min_for(24, 0)


def test_importing_models_is_cheap() -> None:
    heavy = {"diffusers", "timm", "accelerate", "datasets", "torchvision"}
    code = f"import sys, models; models.linear_schedule; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("blocks", "placement", "words"),
    [
        (4, "both", "more blocks"),
        (6, "both", "alpha_min above 0.4, up to 0.41 for 12 sub-layers"),
        (12, "both", "alpha_min from 0.53 to 0.66 for 24 sub-layers"),
        (12, "mlp", "alpha_min above 0.4, up to 0.41 for 12 sub-layers"),
    ],
)
def test_what_is_unstable_is_not_advised(blocks: int, placement: str, words: str) -> None:
    for alpha_min in (0.7, 1):
        shortcuts = make_shortcuts(("attention", "mlp") * blocks, alpha_min, placement=placement)
        assert advised(shortcuts, "linear", placement) == words
    assert advised(shortcuts, "sqrt-half") is None


@pytest.mark.parametrize("name", [name for name, schedule in SCHEDULES.items() if schedule.takes_alpha_min])
@given(st.integers(2, 60), st.floats(0.05, 1))
@settings(max_examples=30, deadline=None)
def test_schedules_fall_to_alpha_min(name: str, num_sublayers: int, alpha_min: float) -> None:
    alphas = SCHEDULES[name].alphas(num_sublayers, alpha_min)
    assert len(alphas) == num_sublayers and alphas[-1] == alpha_min
    assert all(a >= b for a, b in pairwise(alphas)) and alphas[0] == (alpha_min if name == "constant" else 1)
    if alpha_min == 1:
        assert set(alphas) == {1.0}


def test_cosine_is_its_formula() -> None:
    expected = [0.4 + 0.6 * (1 + math.cos(math.pi * layer / 10)) / 2 for layer in range(11)]
    assert SCHEDULES["cosine"].alphas(11, 0.4) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "alpha", "branch"), [("sqrt-half", 0.5**0.5, 0.5**0.5), ("sqrt-half-branch", 1, 0.5**0.5)])
def test_ablations_that_scale_the_branch(name: str, alpha: float, branch: float) -> None:
    x, f = torch.randn(5), torch.randn(5)
    for shortcut in make_shortcuts(("attention", "mlp"), schedule=name):
        torch.testing.assert_close(shortcut(x, f), alpha * x + branch * f)


def test_a_placement_leaves_the_others_plain() -> None:
    shortcuts = make_shortcuts(("attention", "mlp") * 3, 0.5, placement="mlp")
    assert [shortcut.value for shortcut in shortcuts] == [1, 1, 1, 0.75, 1, 0.5]


def test_a_learned_alpha_starts_at_the_schedule_and_has_a_gradient() -> None:
    first, last = make_shortcuts(("attention", "mlp"), 0.5, learnable=True)
    x, f = torch.randn(5), torch.randn(5)
    assert torch.equal(first(x, f), x + f)
    last(x, f).sum().backward()
    torch.testing.assert_close(last.alpha.grad, x.sum())
    assert last.value == 0.5


@pytest.mark.parametrize("name", ["cosine", "constant"])
def test_alpha_min_for_other_schedules(name: str) -> None:
    assert effective_alpha(SCHEDULES[name].alphas(24, alpha_min_for(24, 3e-3, name))) == pytest.approx(3e-3)


@pytest.mark.parametrize(
    ("depth", "alpha_min", "lines", "warnings"),
    [
        (12, None, ["alpha_min 0.527 to 0.663", "alpha_min 0.590, alpha_eff 0.003"], 0),
        (12, 0.9, ["alpha_eff 0.288"], 1),
        (12, 0.3, ["at 0.4 and less", "alpha_eff is 8e-06"], 2),
        (6, 0.41, ["only 0.4 < alpha_min < 0.413"], 1),
        (6, 0.4, ["alpha falls to 0.4; at 0.4 and less", "only 0.4 < alpha_min < 0.413"], 2),
        (4, 0.5, ["the whole window is unstable", "alpha_eff is"], 2),
    ],
)
def test_advice(depth: int, alpha_min: float | None, lines: list[str], warnings: int) -> None:
    text = advice(depth, alpha_min)
    assert all(line in text for line in lines), text
    assert text.count("warning") == warnings, text


def test_advice_is_a_command(run_script: Callable) -> None:
    result = run_script("-m", "models.shortcut", "--depth", 12, "--schedule", "cosine")
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 4 and not result.stderr
    for bad, told in (
        (("--depth", 0), "at least"),
        (("--depth", 8, "--alpha_min", 2), "(0, 1]"),
        (("--depth", "x"), "give a whole number"),
    ):
        result = run_script("-m", "models.shortcut", *bad)
        assert result.returncode == 2 and told in result.stderr and result.stderr.count("\n") == 1
