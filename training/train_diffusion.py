r"""Train a diffusion model with fading shortcuts.

    accelerate launch training/train_diffusion.py --preset openmoji-decayed
    accelerate launch training/train_diffusion.py --train_data_dir my_images --resolution 64 --size S --patch_size 4 \
        --alpha_min 0.6 --max_train_steps 100000 --output_dir runs/mine
"""

import argparse
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from models.files import Parser, one_line_errors
from models.paths import PATHS
from models.pipeline import AutoencoderKL, Pipeline
from models.registry import create_model, names, sizes, takes
from models.shortcut import PLACEMENTS, SCHEDULES
from training.checkpoint import averaged, export_pipeline
from training.data import SPLITS, load_images
from training.latents import encode, latent_shape, load_vae
from training.loop import LoopOptions, check, describe, train
from training.monitor import save_grid
from training.objectives import BETA_SCHEDULES, OBJECTIVES, PREDICTION_TYPES, TIME_DISTRIBUTIONS, Diffusion, create_objective
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
    vae: str | None = option(None, "train on latents: an AutoencoderKL, a hub name or a folder; the images are encoded once")


@dataclass(frozen=True)
class ModelOptions:
    """Model."""

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
    init_from: str | None = option(None, "checkpoint whose averaged weights to begin with, such as models/pretrained/openmoji-plain")


@dataclass(frozen=True)
class ObjectiveOptions:
    """Objective."""

    objective: str = option("flow", "flow matching, or denoising diffusion (DDPM)", choices=tuple(OBJECTIVES))
    path: str | None = option(None, "flow: between noise and data; linear unless given", choices=tuple(PATHS))
    time_distribution: str | None = option(None, "flow: of the training times; uniform unless given", choices=tuple(TIME_DISTRIBUTIONS))
    prediction_type: str | None = option(None, "ddpm: what the network predicts; epsilon unless given", choices=PREDICTION_TYPES)
    beta_schedule: str | None = option(None, "ddpm: of the noise; linear unless given", choices=BETA_SCHEDULES)
    snr_gamma: float | None = option(None, "ddpm: min-SNR weighting, such as 5 (arXiv 2303.09556)", least=0)
    class_dropout: float = option(0.1, "share of labels dropped, for classifier-free guidance", least=0, most=1)


GROUPS = (DataOptions, ModelOptions, ObjectiveOptions, LoopOptions)


def parser() -> argparse.ArgumentParser:
    """Flags, with the presets listed in the help."""
    presets = "\n".join(f"  {name:18} {preset.about}" for name, preset in PRESETS.items())
    flags = Parser(description=__doc__, epilog=f"presets:\n{presets}")
    flags.add_argument("--preset", choices=tuple(PRESETS), metavar="NAME", help="a named run (listed below); other flags win over it")
    for group in GROUPS:
        add_options(flags, group)
    return flags


def build(options: ModelOptions, objective: str, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The model that the options describe, for inputs (C, H, W), with fresh weights."""
    # flow times lie in [0, 1], a DDPM's in [0, 999]; where the backbone stretches the first ones, the others are long enough
    time_scale = 1.0 if objective == "ddpm" and takes(options.backbone, "time_scale") else None
    return create_model(
        options.backbone,
        options.size,
        options.alpha_eff,
        image_size=shape[-1],
        patch_size=options.patch_size,
        in_channels=shape[0],
        num_classes=num_classes,
        alpha_min=options.alpha_min,
        shortcut_schedule=options.shortcut_schedule,
        shortcut_placement=options.shortcut_placement,
        learnable_alpha=options.learnable_alpha,
        long_skips=options.long_skips,
        zero_init=options.zero_init,
        time_scale=time_scale,
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


def sample_grid(path: Path, pipeline: Pipeline) -> None:
    """Write a picture of samples: the same seeds each time, one class after another."""
    pipeline.set_progress_bar_config(disable=True)
    labels = [i % pipeline.num_classes for i in range(GRID_IMAGES)] if pipeline.num_classes else None
    images = pipeline(GRID_IMAGES, labels, seed=0, guidance_scale=2.0 if labels else 1.0, output_type="np").images
    save_grid(path, images, GRID_COLUMNS)


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
        run(preset, *(read_options(parsed, group) for group in GROUPS))


def run(
    preset: str | None,
    data_options: DataOptions,
    model_options: ModelOptions,
    objective_options: ObjectiveOptions,
    loop_options: LoopOptions,
) -> None:
    """Load the data, build the model, train it.

    Raises:
        ValueError: options that do not fit together or with the data.
    """
    say = print if int(os.environ.get("RANK", 0)) == 0 else lambda *_, **__: None
    name = data_options.train_data_dir or data_options.dataset_name
    if name is None or (data_options.train_data_dir and data_options.dataset_name):
        raise ValueError("give one of --dataset_name (such as openmoji) and --train_data_dir")
    if data_options.train_data_dir and not Path(data_options.train_data_dir).is_dir():
        raise ValueError(f"--train_data_dir {data_options.train_data_dir} is not a folder")
    check(loop_options)
    vae = load_vae(data_options.vae) if data_options.vae else None
    shape = latent_shape(vae, data_options.resolution) if vae else (3, data_options.resolution, data_options.resolution)
    with torch.device("meta"):  # sizes that do not fit are told before the data are read
        build(model_options, objective_options.objective, shape, num_classes=0)
    create_objective_from(objective_options, 0, vae)

    data = load_images(name, data_options.resolution, data_options.dataset_split, data_options.image_column, data_options.label_column)
    num_classes = data.num_classes if model_options.class_conditional else 0
    classes = f" in {num_classes} classes ({', '.join(data.class_names[:5])}{', ...' * (num_classes > 5)})" if num_classes else ""
    set_seed(loop_options.seed)  # of the initial weights; nothing else uses the global streams
    model = build(model_options, objective_options.objective, shape, num_classes)
    images_before = begin_with(model, model_options.init_from) if model_options.init_from else 0
    objective = create_objective_from(objective_options, num_classes, vae)
    say(f"{len(data):,} images of {data.name}{classes}", flush=True)
    say(describe(f"{model_options.backbone}-{model_options.size}", model.alphas, model.num_parameters()), flush=True)

    def pipeline(network: nn.Module, training: dict[str, Any] | None = None) -> Pipeline:
        class_names = data.class_names if num_classes else ()
        return Pipeline(network, objective.scheduler, class_names, training, path=objective.path, vae=vae)

    step = train(
        loop_options,
        model,
        encode(data, vae.to("cuda" if torch.cuda.is_available() else "cpu"), loop_options.random_flip) if vae else data,
        objective,
        {"preset": preset, **asdict(data_options), **asdict(model_options), **asdict(objective_options), "images_before": images_before},
        lambda run, network, ema, training: export_pipeline(run, pipeline(network, training), ema),
        {
            loop_options.sample_steps: lambda run, step, network, ema: sample_grid(
                run / "samples" / f"step-{step}.png", pipeline(averaged(network, ema))
            )
        }
        if loop_options.sample_steps
        else None,
    )
    say(f"{loop_options.output_dir}: step {step} reached", flush=True)


def create_objective_from(options: ObjectiveOptions, num_classes: int, vae: AutoencoderKL | None) -> Diffusion:
    """The objective that the options describe."""
    given = asdict(options)
    clip = False if vae and options.objective == "ddpm" else None  # latents do not lie in [-1, 1]
    return create_objective(given.pop("objective"), num_classes=num_classes, clip=clip, **given)


if __name__ == "__main__":
    spread_over_cpu_processes()
    main()
