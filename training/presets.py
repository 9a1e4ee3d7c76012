"""Named runs: flags, and what they cost. A flag on the command line wins over the preset's."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A row of the table.

    Attributes:
        about: what it is for, at which cost.
        flags: names and values of command-line flags.
    """

    about: str
    flags: dict[str, Any]


def _pair(name: str, about: str, decayed: dict[str, Any], **flags: Any) -> dict[str, Preset]:
    """A plain and a decayed run that differ in alpha alone."""
    return {
        f"{name}-plain": Preset(f"{about}; alpha = 1", {**flags, "alpha_min": 1.0}),
        f"{name}-decayed": Preset(f"{about}; alpha_min = {decayed['alpha_min']}", {**flags, **decayed}),
    }


_OPENMOJI = dict(
    dataset_name="openmoji", dataset_split="all", resolution=32, backbone="dit", size="XS", patch_size=4,
    train_batch_size=32, learning_rate=8e-4, adam_beta2=0.99, lr_scheduler="cosine", lr_warmup_steps=200, ema_decay=0.999,
)  # fmt: skip

PRESETS: dict[str, Preset] = {
    **_pair(
        "openmoji",
        "the pair that ships: all emoji, 32 px, 6,000 steps of 32, 1.2 hours on 2 cores with bf16, both at once",
        dict(alpha_min=0.5),
        **_OPENMOJI,
        max_train_steps=6000,
    ),
    **_pair(
        "demo",
        "what `make demo` trains: the same network for 500 steps, about 3 minutes, to see that everything works",
        dict(alpha_min=0.5),
        **{**_OPENMOJI, "dataset_split": "train", "lr_scheduler": "constant", "ema_decay": 0.99},
        max_train_steps=500,
        logging_steps=10,
        sample_steps=100,
    ),
}
