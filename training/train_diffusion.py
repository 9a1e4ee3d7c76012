r"""Train a diffusion model with fading shortcuts.

    accelerate launch training/train_diffusion.py --preset openmoji-decayed
    accelerate launch training/train_diffusion.py --train_data_dir my_images --resolution 64 --size S --patch_size 4 \
        --alpha_min 0.6 --max_train_steps 100000 --output_dir runs/mine
"""

import argparse
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import nn

from models.files import Parser, one_line_errors
from models.pipeline import SAMPLERS, Pipeline, to_uint8
from models.registry import create_model, names, sizes
from models.shortcut import PLACEMENTS, SCHEDULES
from training.checkpoint import averaged
from training.data import SPLITS, load_images
from training.ema import EMA
from training.loop import LoopOptions, check, describe, train
from training.monitor import save_grid
from training.objectives import FlowMatching
from training.options import add_options, option, read_options
from training.presets import PRESETS
from training.processes import spread_over_cpu_processes

GRID_IMAGES, GRID_COLUMNS = 36, 9


@dataclass(frozen=True)
class DataOptions:
    """Data."""

    dataset_name: str | None = option(None, 'the embedded "openmoji", a hub name, or a folder of parquet files')
    train_data_dir: str | None = option(None, "folder of images, a subfolder for each class or none")
    dataset_split: str = option("train", "what to train on", choices=SPLITS)
    image_column: str = option("image", "column of the images")
    label_column: str | None = option(None, 'column of the labels; "label" is found by itself')
    resolution: int = option(32, "edge in pixels after centre crop and resize", least=1)


@dataclass(frozen=True)
class ModelOptions:
    """Model and objective."""

    backbone: str = option("dit", "architecture", choices=names("diffusion"))
    size: str = option("XS", "width and depth", choices=sizes("diffusion"))
    patch_size: int | None = option(None, "edge of a patch in pixels; divides the resolution", least=1)
    alpha_min: float = option(1.0, "share of the shortcut kept by the last sub-layer, in (0, 1]; 1 is the plain network")
    alpha_eff: float | None = option(None, "instead of alpha_min: share of the input that reaches the last layer, such as 3e-3")
    shortcut_schedule: str = option("linear", "how alpha falls", choices=tuple(SCHEDULES))
    shortcut_placement: str = option("both", "which sub-layers' shortcuts fade", choices=PLACEMENTS)
    learnable_alpha: bool = option(False, "train the alphas, from the schedule on")
    long_skips: bool | None = option(None, "connect encoder blocks to decoder blocks; on where the backbone can do without")
    zero_init: bool | None = option(None, "start every branch at zero; on where the backbone can do without")
    class_conditional: bool = option(True, "use the labels of the data, where it has them")
    class_dropout: float = option(0.1, "share of labels dropped, for classifier-free guidance", least=0, most=1)
    init_from: str | None = option(None, "checkpoint whose averaged weights to begin with, such as models/pretrained/openmoji-plain")


def parser() -> argparse.ArgumentParser:
    """Flags, with the presets listed in the help."""
    presets = "\n".join(f"  {name:18} {preset.about}" for name, preset in PRESETS.items())
    flags = Parser(description=__doc__, epilog=f"presets:\n{presets}")
    flags.add_argument("--preset", choices=tuple(PRESETS), metavar="NAME", help="a named run (listed below); other flags win over it")
    for group in (DataOptions, ModelOptions, LoopOptions):
        add_options(flags, group)
    return flags


def build(options: ModelOptions, data: DataOptions, num_classes: int) -> nn.Module:
    """The model that the options describe, with fresh weights."""
    return create_model(
        options.backbone,
        options.size,
        options.alpha_eff,
        image_size=data.resolution,
        patch_size=options.patch_size,
        num_classes=num_classes,
        alpha_min=options.alpha_min,
        shortcut_schedule=options.shortcut_schedule,
        shortcut_placement=options.shortcut_placement,
        learnable_alpha=options.learnable_alpha,
        long_skips=options.long_skips,
        zero_init=options.zero_init,
    )


def begin_with(model: nn.Module, checkpoint: str) -> int:
    """Copy the averaged weights of a checkpoint into the model; a label table of another size stays fresh.

    Returns:
        How many images the checkpoint has seen.

    Raises:
        ValueError: not a checkpoint, or its parts are not those of the model.
    """
    pipeline = Pipeline.from_pretrained(checkpoint)
    ours, weights = model.state_dict(), pipeline.model.state_dict()
    differ = [name for name in {**ours, **weights} if name not in ours or name not in weights or ours[name].shape != weights[name].shape]
    fresh = [name for name in differ if name.startswith("label_embed")]
    if len(differ) > len(fresh):
        names = ", ".join(sorted(set(differ) - set(fresh))[:3])
        raise ValueError(
            f"--init_from {checkpoint} does not fit: {names}, ... differ; give its --backbone, --size, --patch_size and --long_skips"
        )
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name not in fresh}, strict=not fresh)
    return pipeline.config.training.get("images_seen", 0)


def sample_grid(run: Path, step: int, model: nn.Module, ema: EMA) -> None:
    """Write samples/step-N.png from the averaged weights: the same seeds each time, one class after another."""
    pipeline = Pipeline(averaged(model, ema), SAMPLERS["euler"]())
    pipeline.set_progress_bar_config(disable=True)
    labels = [i % pipeline.num_classes for i in range(GRID_IMAGES)] if pipeline.num_classes else None
    images = pipeline(GRID_IMAGES, labels, seed=0, guidance_scale=2.0 if labels else 1.0, output_type="pt").images
    save_grid(run / "samples" / f"step-{step}.png", to_uint8(images), GRID_COLUMNS)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    flags = parser()
    preset = flags.parse_known_args(arguments)[0].preset
    if preset:
        flags.set_defaults(output_dir=f"runs/{preset}", **PRESETS[preset].flags)
    parsed = flags.parse_args(arguments)
    if preset and parsed.train_data_dir and parsed.dataset_name == PRESETS[preset].flags.get("dataset_name"):
        parsed.dataset_name = None  # the user's images instead of the preset's
    with one_line_errors():
        data_options, model_options, loop_options = (read_options(parsed, group) for group in (DataOptions, ModelOptions, LoopOptions))
        name = data_options.train_data_dir or data_options.dataset_name
        if name is None or (data_options.train_data_dir and data_options.dataset_name):
            raise ValueError("give one of --dataset_name (such as openmoji) and --train_data_dir")
        if data_options.train_data_dir and not Path(data_options.train_data_dir).is_dir():
            raise ValueError(f"--train_data_dir {data_options.train_data_dir} is not a folder")
        check(loop_options)
        with torch.device("meta"):  # sizes that do not fit are told before the data are read
            build(model_options, data_options, num_classes=0)
        set_seed(loop_options.seed)  # of the initial weights; nothing else uses the global streams
        data = load_images(name, data_options.resolution, data_options.dataset_split, data_options.image_column, data_options.label_column)
        num_classes = data.num_classes if model_options.class_conditional else 0
        model = build(model_options, data_options, num_classes)
        images_before = begin_with(model, model_options.init_from) if model_options.init_from else 0
        config = {"preset": preset, **asdict(data_options), **asdict(model_options), "images_before": images_before}
        classes = f" in {data.num_classes} classes ({', '.join(data.class_names[:5])}{', ...' * (data.num_classes > 5)})" * bool(
            num_classes
        )
        if int(os.environ.get("RANK", 0)) == 0:
            print(
                f"{len(data):,} images of {data.name}{classes}",
                describe(f"{model_options.backbone}-{model_options.size}", model.alphas, model.num_parameters()),
                sep="\n",
                flush=True,
            )
        step = train(
            loop_options,
            model,
            data,
            FlowMatching(num_classes, model_options.class_dropout),
            config,
            {loop_options.sample_steps: sample_grid} if loop_options.sample_steps else None,
        )
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{loop_options.output_dir}: step {step} reached", flush=True)


if __name__ == "__main__":
    spread_over_cpu_processes()
    main()
