"""Named comparisons: which presets are held against each other, and by what. `python -m training.campaign` runs them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path("runs/results")  # what is published lies in eval/results


@dataclass(frozen=True)
class Judge:
    """A command that judges a run.

    Attributes:
        script: from the project's root; it takes --checkpoint and --json.
        data: its flag for the images.
        flags: the others.
    """

    script: str
    data: str
    flags: tuple[str, ...] = ()


PROBE = Judge("eval/probe.py", "--dataset", ("--few_shot", "0.01,0.1"))
# at the depth of noise where features of diffusion models are known to be best, and around it
DIFFUSION_PROBE = Judge("eval/probe.py", "--dataset", ("--times", "0.5,0.7,0.9", "--max_train_images", "20000"))
FD = Judge("eval/fid.py", "--reference", ("--feature_extractor", "efficientnet-lite0", "--kid", "--num_samples", "10000"))
FEW_PROBE = Judge(PROBE.script, PROBE.data, ("--max_train_images", "5000"))
FEW_FD = Judge(FD.script, FD.data, (*FD.flags[:-1], "2000"))


@dataclass(frozen=True)
class Comparison:
    """A row of the table.

    Attributes:
        about: what it asks.
        arms: name -> preset, and flags beside it; the first arm is what the others are compared with.
        judges: name -> command.
        looks: flags of every training that measure on the way, for curves over images seen.
    """

    about: str
    arms: dict[str, tuple[str, dict[str, Any]]]
    judges: dict[str, Judge]
    looks: tuple[str, ...] = ()


def _presets(family: str, *arms: str) -> dict[str, tuple[str, dict[str, Any]]]:
    return {arm: (f"{family}-{arm}", {}) for arm in arms}


def _fd_every(steps: int, samples: int = 2048) -> tuple[str, ...]:
    return ("--metrics_during_training", str(steps), "--metrics_samples", str(samples))


_LOOKED_AT = 10_000  # images; the first comparisons at 32 px took the default


def _features_every(steps: int, images: int | None = None) -> tuple[str, ...]:
    return ("--probe_every", str(steps), *(("--probe_images", str(images)) if images else ()))


def _rates(preset: str, alphas: tuple[float, ...], rates: tuple[float, ...], **flags: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """The same small sweep of the learning rate (of masked autoencoders: for 256 images) for every alpha."""
    return {
        f"{alpha}-lr-{rate:g}": (preset, {"alpha_min": alpha, "base_learning_rate": rate, **flags}) for rate in rates for alpha in alphas
    }


_ALPHAS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_MAE_ROWS: dict[str, dict[str, Any]] = {
    "linear": {},
    "no-skips": {"long_skips": False},  # and so, unless asked for, without zeros
    "no-skips-zeros": {"long_skips": False, "zero_init": True},
    "no-zero-init": {"zero_init": False},
    "cosine": {"shortcut_schedule": "cosine"},
    "constant": {"shortcut_schedule": "constant"},
    "sqrt-half": {"shortcut_schedule": "sqrt-half"},
    "sqrt-half-branch": {"shortcut_schedule": "sqrt-half-branch"},
    "attention": {"shortcut_placement": "attention"},
    "mlp": {"shortcut_placement": "mlp"},
    "learned": {"learnable_alpha": True},
}
COMPARISONS: dict[str, Comparison] = {
    "mae-64px": Comparison(
        "MAE-S/8 on 64 px photographs: do features get better?",
        _presets("mae-64px", "plain", "skips", "decayed"),
        {"probe": PROBE},
        _features_every(1000, _LOOKED_AT),
    ),
    "dit-64px": Comparison(
        "DiT-S/4 on 64 px photographs: do images and features get better?",
        _presets("dit-64px", "plain", "skips", "decayed", "rule"),
        {"fd": FD, "probe": DIFFUSION_PROBE},
        (*_features_every(500, _LOOKED_AT), *_fd_every(1000)),
    ),
    "dit-64px-lr": Comparison(
        "DiT-S/4 at other learning rates, 10 epochs: what dit-64px-plain, -skips and -decayed should have in training/presets.py",
        {
            f"{arm}-lr-{rate:g}": (f"dit-64px-{arm}", {"learning_rate": rate, "max_train_steps": 2000, "lr_warmup_steps": 200})
            for rate in (2e-4, 1e-4, 4e-4, 8e-4)
            for arm in ("plain", "skips", "decayed")
        },
        {"fd": FEW_FD},
        _fd_every(500),
    ),
    "unet-32px": Comparison("a convolutional U-Net at 32 px", _presets("unet-32px", "plain", "decayed"), {"fd": FD}, _fd_every(1000)),
    "mae-64px-alpha": Comparison(
        "MAE-S/8 over alpha_min",
        {f"{alpha}": ("mae-64px-decayed", {"alpha_min": alpha}) for alpha in _ALPHAS},
        {"probe": PROBE},
        _features_every(1000, _LOOKED_AT),
    ),
    "mae-64px-lr": Comparison(
        "MAE-S/8 at other learning rates, 20 epochs: what mae-64px-plain, -skips and -decayed should have in training/presets.py",
        {
            f"{arm}-lr-{rate:g}": (f"mae-64px-{arm}", {"base_learning_rate": rate, "max_train_steps": 4000, "lr_warmup_steps": 400})
            for rate in (1.5e-4, 7.5e-5, 3e-4, 6e-4, 1.2e-3)
            for arm in ("plain", "skips", "decayed")
        },
        {"probe": PROBE},
        _features_every(1000, _LOOKED_AT),
    ),
    "mae-64px-ablation": Comparison(
        "the paper's ablation rows, MAE-S/8",
        {name: ("mae-64px-decayed", flags) for name, flags in _MAE_ROWS.items()},
        {"probe": PROBE},
        _features_every(1000, _LOOKED_AT),
    ),
    "mae-64px-depth": Comparison(
        "the depth rule, alpha_eff = 3e-3, and a milder fading, in MAE-S/8 of 6 and of 12 blocks",
        {
            f"{depth}-{name}": ("mae-64px-decayed", {"depth": depth, **flags})
            for depth in (6, 12)
            for name, flags in (("skips", {"alpha_min": 1.0}), ("0.8", {"alpha_min": 0.8}), ("rule", {"alpha_eff": 3e-3}))
        },
        {"probe": PROBE},
        _features_every(1000, _LOOKED_AT),
    ),
    "mae-32px": Comparison(
        "MAE-XS/8 at 32 px (16 patches, 4 of them visible), small enough for a CPU: curves, and no proof at the paper's sizes; also at the "
        "learning rates that mae-32px-lr prefers for alpha_min 1 and 0.4",
        {
            **_presets("mae-32px", "plain", "skips", "decayed"),
            "skips-lr-0.002": ("mae-32px-skips", {"base_learning_rate": 2e-3}),
            "decayed-lr-0.0005": ("mae-32px-decayed", {"base_learning_rate": 5e-4}),
        },
        {"probe": PROBE},
        _features_every(500),
    ),
    "mae-32px-alpha": Comparison(
        "MAE-XS/8 at 32 px with long skips over alpha_min, one seed on a CPU: whether a milder fading is behind as well",
        {f"{alpha}": ("mae-32px-decayed", {"alpha_min": alpha}) for alpha in _ALPHAS},
        {"probe": PROBE},
        _features_every(500),
    ),
    "mae-32px-lr": Comparison(
        "the ends of mae-32px-alpha at other learning rates, 5 epochs, one seed: too early to choose by, as mae-32px shows",
        _rates("mae-32px-decayed", (1.0, 0.4), (1e-3, 2.5e-4, 5e-4, 2e-3), max_train_steps=1000, lr_warmup_steps=100),
        {"probe": FEW_PROBE},
        _features_every(250),
    ),
    "mae-32px-rates": Comparison(
        "the arms of mae-32px at the same three learning rates, one seed on a CPU, with looks at more images",
        {
            f"{arm}-lr-{rate:g}": (f"mae-32px-{arm}", {"base_learning_rate": rate})
            for rate in (1e-3, 5e-4, 2e-3)
            for arm in ("plain", "skips", "decayed")
        },
        {"probe": PROBE},
        _features_every(500, _LOOKED_AT),
    ),
    "mae-32px-init": Comparison(
        "MAE-XS/8 at 32 px with long skips that does not begin with zeros in the last linear of every branch: with them, where alpha "
        "fades, hardly anything reaches the last block at first",
        _rates("mae-32px-decayed", (1.0, 0.4), (1e-3, 2e-3), zero_init=False),
        {"probe": PROBE},
        _features_every(500),
    ),
    "mae-32px-depth": Comparison(
        "MAE-XS/8 at 32 px with 12 blocks instead of 6, one seed on a CPU: there 0.6 lies in the depth rule's window, as 0.4 does at 6; "
        "mae-32px-alpha has 6 blocks",
        {
            f"{alpha}-lr-{rate:g}": ("mae-32px-decayed", {"depth": 12, "alpha_min": alpha, "base_learning_rate": rate})
            for alpha, rate in ((1.0, 1e-3), (0.6, 1e-3), (0.4, 1e-3))
        },
        {"probe": PROBE},
        _features_every(500),
    ),
    "mae-32px-ablation": Comparison(
        "the paper's ablation rows, MAE-XS/8 at 32 px, at the rate that is nominally better for what fades in mae-32px; one seed on a CPU",
        {name: ("mae-32px-decayed", {"base_learning_rate": 5e-4, **flags}) for name, flags in _MAE_ROWS.items()},
        {"probe": PROBE},
        _features_every(500),
    ),
    "mae-32px-long": Comparison(
        "102 epochs with long skips, alpha_min 1 and 0.4, each at the rate that is nominally better for it in mae-32px; and 1 at 2e-3, "
        "which looked best after 5 epochs",
        {
            f"{alpha}-lr-{rate:g}": (
                "mae-32px-decayed",
                {"alpha_min": alpha, "base_learning_rate": rate, "max_train_steps": 20_000, "lr_warmup_steps": 1000},
            )
            for alpha, rate in ((1.0, 1e-3), (0.4, 5e-4), (1.0, 2e-3))
        },
        {"probe": PROBE},
        _features_every(1000),
    ),
    "photographs": Comparison(
        "DiT-XS/4 on ten classes of photographs at 32 px, small enough for a CPU: do images and features get better?",
        _presets("photographs", "plain", "decayed"),
        {"fd": FEW_FD, "probe": DIFFUSION_PROBE},
        _fd_every(3000, 1024),
    ),
    "demo": Comparison(
        "the pair of `make demo`, for a try: a few minutes, and no evidence",
        _presets("demo", "plain", "decayed"),
        {"fd": Judge(FD.script, FD.data, (*FD.flags[:-1], "256"))},
    ),
}
