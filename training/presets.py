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


def _arms(name: str, about: str, arms: dict[str, dict[str, Any]], **flags: Any) -> dict[str, Preset]:
    """Runs that differ in their shortcuts alone."""
    return {
        f"{name}-{arm}": Preset(f"{about}; {', '.join(f'{key} {value}' for key, value in differing.items())}", {**flags, **differing})
        for arm, differing in arms.items()
    }


def _family(name: str, about: str, told: dict[str, str], alpha_min: float, **flags: Any) -> dict[str, Preset]:
    """Three masked autoencoders: the plain one, with long skips, and with shortcuts that fade as well.

    Args:
        told: form -> the result to expect.
    """
    forms = {
        "plain": ("the plain MAE", dict(alpha_min=1.0, long_skips=False)),
        "skips": ("long skips alone, alpha = 1", dict(alpha_min=1.0, long_skips=True)),
        "decayed": (f"long skips and alpha_min = {alpha_min}", dict(alpha_min=alpha_min, long_skips=True)),
    }
    return {
        f"mae-{name}-{form}": Preset(f"{about}; {what}; {told.get(form, 'not measured here')}", {**flags, **form_flags})
        for form, (what, form_flags) in forms.items()
    }


_SMALL = dict(
    resolution=32, backbone="dit", size="XS", patch_size=4,
    train_batch_size=32, learning_rate=8e-4, adam_beta2=0.99, lr_scheduler="cosine", lr_warmup_steps=200, ema_decay=0.999,
)  # fmt: skip
_OPENMOJI = dict(dataset_name="openmoji", dataset_split="all", **_SMALL)

PRESETS: dict[str, Preset] = {
    **_pair(
        "openmoji",
        "the first half of the emoji that ship (eval/README.md tells the other): 32 px, 6,000 steps of 32, 1.2 hours on 2 cores with bf16, "
        "both at once",
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
    **_pair(
        "photographs",
        "your --train_data_dir at 32 px, the network of the emoji, 30,000 steps of 32 (192 epochs of 5,000 images), 1.5 to 1.7 hours on 2 "
        "cores with bf16 and --compile, both at once; FD (Lite0) 56.7 plain and 51.6 decayed, three seeds, ten classes of Tiny-ImageNet",
        dict(alpha_min=0.5),
        **_SMALL,
        random_flip=True,
        max_train_steps=30_000,
        sample_steps=3000,
    ),
    **_arms(
        "dit-64px",
        "your --train_data_dir at 64 px, DiT-S/4, 10,000 steps of 256 (51 epochs of 50,000 images), not measured here",
        {
            "plain": dict(alpha_min=1.0, long_skips=False),
            "skips": dict(alpha_min=1.0, long_skips=True),
            "decayed": dict(alpha_min=0.8, long_skips=True),  # as the paper's of 28 blocks
            "rule": dict(alpha_eff=3e-3, long_skips=True),
        },
        resolution=64,
        backbone="dit",
        size="S",
        patch_size=4,
        train_batch_size=256,
        learning_rate=2e-4,
        lr_warmup_steps=500,
        random_flip=True,
        max_train_steps=10_000,
        sample_steps=2000,
    ),
    **_arms(
        "unet-32px",
        "your --train_data_dir at 32 px, the U-Net of DDPM (35.7 M), 20,000 steps of 128 (51 epochs of 50,000 images), not measured here",
        {"plain": dict(alpha_min=1.0), "decayed": dict(alpha_min=0.8)},
        resolution=32,
        backbone="unet",
        size="S",
        train_batch_size=128,
        learning_rate=2e-4,
        lr_warmup_steps=1000,
        random_flip=True,
        max_train_steps=20_000,
        sample_steps=2000,
    ),
}

_MAE = dict(backbone="mae", lr_scheduler="cosine")
_IMAGENET_EPOCH = 1_281_167 / 4096  # steps

MAE_PRESETS: dict[str, Preset] = {
    **_family(
        "openmoji",
        "the embedded emoji, 32 px, XS/4, 1,000 steps of 64 (20 epochs, to see that it works)",
        {"decayed": "10 minutes of one CPU core with bf16, loss 0.44 at the end"},
        alpha_min=0.4,
        **_MAE,
        dataset_name="openmoji",
        resolution=32,
        size="XS",
        patch_size=4,
        train_batch_size=64,
        base_learning_rate=4e-3,
        lr_warmup_steps=100,
        max_train_steps=1000,
    ),
    **_family(
        "64px",
        "your --train_data_dir at 64 px, S/8, 78,000 steps of 256 (400 epochs of 50,000 images), for a GPU: a CPU core with bf16 takes "
        "19 images/s",
        {},
        alpha_min=0.6,
        **_MAE,
        resolution=64,
        size="S",
        patch_size=8,
        train_batch_size=256,
        lr_warmup_steps=3900,
        max_train_steps=78_000,
    ),
    **_family(
        "32px",
        "your --train_data_dir at 32 px, XS/8, 4,000 steps of 256 (20 epochs of 50,000 images), 16 minutes of one CPU core with bf16",
        {
            "plain": "linear probe 18.8 %, kNN 11.4 %, three seeds, 100 classes of Tiny-ImageNet",
            "skips": "linear probe 19.6 %, kNN 11.6 %, as above, but of later code than the plain one's",
            "decayed": "linear probe 16.0 % (undecided), kNN 6.7 % (worse), as above; with --base_learning_rate 5e-4 17.8 and "
            "7.2 % (both worse), with --no-zero_init 18.6 and 10.6 % (both undecided, from --no-zero_init --alpha_min 1)",
        },
        alpha_min=0.4,
        **_MAE,
        resolution=32,
        size="XS",
        patch_size=8,
        train_batch_size=256,
        base_learning_rate=1e-3,
        lr_warmup_steps=200,
        max_train_steps=4000,
    ),
    **_family(
        "imagenet",
        "the paper's ViT-B/16 on ImageNet-1K (your --train_data_dir or --dataset_name), 800 epochs of 4096 images a step with "
        "--num_processes 8, 193 GB of pixels on the disk (or --streaming), for GPUs: a CPU core with bf16 takes 2 images/s",
        {
            "plain": "kNN 27.4, linear probe 67.8, fine-tuned 83.6 in the paper, not measured here",
            "decayed": "kNN 63.9, linear probe 72.7, fine-tuned 82.9 in the paper (8192 images a step), not measured here",
        },
        alpha_min=0.6,
        **_MAE,
        resolution=224,
        size="B",
        patch_size=16,
        train_batch_size=64,
        gradient_accumulation_steps=8,
        lr_warmup_steps=round(40 * _IMAGENET_EPOCH),
        max_train_steps=round(800 * _IMAGENET_EPOCH),
        checkpointing_steps=2500,
        sample_steps=2500,
    ),
}
