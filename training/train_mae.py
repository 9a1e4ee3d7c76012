r"""Pre-train a masked autoencoder: plain, with long skips, or with shortcuts that fade in its encoder.

    accelerate launch training/train_mae.py --preset mae-openmoji-decayed
    accelerate launch training/train_mae.py --preset mae-64px-decayed --train_data_dir my_images
    accelerate launch training/train_mae.py --train_data_dir my_images --resolution 96 --size S --patch_size 8 --alpha_min 0.6 \
        --train_batch_size 256 --max_train_steps 100000 --lr_warmup_steps 5000 --lr_scheduler cosine --output_dir runs/mine

The plain MAE is --alpha_min 1 --no-long_skips. The paper reports what fading shortcuts are good for after 800 epochs of ImageNet; small
ones here were behind after 20 and after 102 epochs (eval/results).
"""

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from models.files import one_line_errors
from models.pipeline import to_uint8
from models.precision import autocast, precision
from models.registry import LARGEST, backbone_name, create_model, in_words, names, sizes
from training.augment import with_crops
from training.checkpoint import averaged, export_network
from training.command import DataOptions, ShortcutOptions, begin_with, describe, parse, say, say_end
from training.data import ImageData
from training.ema import EMA
from training.loop import Callback, train
from training.loop_options import LoopOptions, check
from training.monitor import save_grid
from training.objectives import MaskedAutoencoding
from training.options import option
from training.presets import MAE_PRESETS
from training.processes import spread_over_cpu_processes
from training.stream import at_hand

PICTURES, PICTURES_A_ROW = 12, 4


@dataclass(frozen=True)
class ModelOptions:
    """Model."""

    backbone: str = option("mae", "architecture", choices=names("mae"))
    size: str = option("XS", "width and depth of encoder and decoder", choices=sizes("mae"))
    depth: int | None = option(
        None, "blocks of the encoder, an even number with long skips; the size's own unless given", least=1, most=LARGEST["depth"]
    )
    patch_size: int | None = option(None, "edge of a patch in pixels; divides the resolution", least=1)
    norm_pixels: bool = option(True, "predict pixels normalised by the mean and the deviation of their patch")
    init_from: str | None = option(None, "checkpoint whose averaged weights to begin with")


@dataclass(frozen=True)
class TaskOptions:
    """Masks and crops."""

    mask_ratio: float = option(0.75, "share of the patches that are hidden", least=0, most=1)
    crop_min_scale: float = option(
        0.2, "least area of a random crop, which is blown up to the whole resolution; 1 for no crops", least=0, most=1
    )


@dataclass(frozen=True)
class MAELoopOptions(LoopOptions):
    """Optimisation and run."""

    learning_rate: float | None = option(  # type: ignore[assignment]  # `settled` fills it in
        None, "of AdamW, after the warm-up; base_learning_rate * images of a step / 256 unless given", least=0
    )
    base_learning_rate: float = option(1.5e-4, "learning rate for 256 images a step (all processes and accumulation together)", least=0)
    adam_beta2: float = option(0.95, "AdamW", least=0, most=1)
    adam_weight_decay: float = option(0.05, "AdamW, on matrices and tokens; never on biases, norms and alphas", least=0)
    max_grad_norm: float = option(0.0, "gradients are clipped to this norm; 0 leaves them", least=0)
    ema_decay: float = option(0.0, "of averaged weights, after min(., (1 + step) / (10 + step)); 0: none", least=0, most=1)
    random_flip: bool = option(True, "mirror half of the images")

    def settled(self, images_a_step: int) -> "MAELoopOptions":
        scaled = self.base_learning_rate * images_a_step / 256
        return dataclasses.replace(self, learning_rate=scaled) if self.learning_rate is None else self


GROUPS = (DataOptions, ModelOptions, ShortcutOptions, TaskOptions, MAELoopOptions)


def build(options: ModelOptions, shortcuts: ShortcutOptions, resolution: int) -> nn.Module:
    """The model that the options describe, with fresh weights."""
    return create_model(
        options.backbone,
        options.size,
        **asdict(shortcuts),
        image_size=resolution,
        depth=options.depth,
        patch_size=options.patch_size,
        norm_pixels=options.norm_pixels,
    )


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """All parameters; those that are no matrices or tokens (biases, norms, learned alphas) without weight decay, as MAE has it."""
    parameters = list(model.parameters())
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def reconstructions(model: nn.Module, images: Tensor, mask_ratio: float) -> np.ndarray:
    """uint8 (3 * N, H, W, C): of every image the original, what the encoder sees of it, and what the decoder makes of that.

    The masks are the same each time.
    """
    images = images.to(model.device)
    seen, painted = model.reconstruct(images, mask_ratio=mask_ratio, generator=torch.Generator().manual_seed(0))
    return to_uint8(torch.stack([images, seen, painted], dim=1).flatten(0, 1))


def quick_probe(data: ImageData, options: MAELoopOptions) -> Callback:
    """What --probe_every asks for."""
    from eval.encoders import MAEEncoder  # probes take seconds to import
    from eval.quick import QuickProbe

    def encoder_of(network: nn.Module) -> MAEEncoder:
        return MAEEncoder(network, {"backbone": backbone_name(network)}, data.shape[-1])

    return QuickProbe(data, encoder_of, MaskedAutoencoding.bottleneck, options.mixed_precision, options.probe_images)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    with one_line_errors():
        preset, options = parse(__doc__, GROUPS, MAE_PRESETS, arguments)
        run(preset, *options)


def run(
    preset: str | None,
    data_options: DataOptions,
    model_options: ModelOptions,
    shortcut_options: ShortcutOptions,
    task_options: TaskOptions,
    loop_options: MAELoopOptions,
) -> None:
    """Load the data, build the model, train it.

    Raises:
        ValueError: options that do not fit together or with the data.
    """
    data_options.source()  # before anything is spent
    folder = check(loop_options)
    resolution, mask_ratio = data_options.resolution, task_options.mask_ratio
    with torch.device("meta"):  # sizes that do not fit are told before the data are read
        build(model_options, shortcut_options, resolution)(torch.empty(1, 3, resolution, resolution), mask_ratio=mask_ratio)

    data = data_options.load()
    set_seed(loop_options.seed)  # of the initial weights; nothing else uses the global streams
    model = build(model_options, shortcut_options, resolution)
    resuming = loop_options.resume_from_checkpoint is not None
    images_before = begin_with(model, model_options.init_from, folder, resuming) if model_options.init_from else 0
    say(f"{data.extent} of {data.name}")
    say(describe(in_words(model_options.backbone, model_options.size, model_options.depth), model))

    groups = (data_options, model_options, shortcut_options, task_options)
    config = {"preset": preset, "images_before": images_before}
    shown = data.some(PICTURES)

    def show(run: Path, step: int, network: nn.Module, ema: EMA) -> None:
        with autocast(network.device, precision(loop_options.mixed_precision)):
            pictures = reconstructions(averaged(network, ema), shown, mask_ratio)
        save_grid(run / "samples" / f"step-{step}.png", pictures, 3 * PICTURES_A_ROW)

    looks: list[tuple[int, Callback]] = [(loop_options.sample_steps, show)] if loop_options.sample_steps else []
    if loop_options.probe_every:
        looks.append((loop_options.probe_every, quick_probe(at_hand(data, "--probe_every"), loop_options)))

    step = train(
        loop_options,
        model,
        with_crops(data, task_options.crop_min_scale),
        MaskedAutoencoding(model.num_patches, mask_ratio),
        {**config, **{name: value for group in groups for name, value in asdict(group).items()}},
        lambda run, network, ema, training: export_network(run, network, ema, data.class_names, training),
        looks,
        parameter_groups(model),
    )
    say_end(step, loop_options)


if __name__ == "__main__":
    with one_line_errors():
        spread_over_cpu_processes()
    main()
