r"""Train a diffusion model with fading shortcuts.

    accelerate launch training/train_diffusion.py --preset openmoji-decayed
    accelerate launch training/train_diffusion.py --train_data_dir my_images --resolution 64 --size S --patch_size 4 \
        --alpha_min 0.6 --max_train_steps 100000 --output_dir runs/mine
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from torch import nn

from eval.while_training import WatchOptions, small_distance
from models.files import one_line_errors, read_json
from models.paths import PATHS
from models.pipeline import Pipeline
from models.precision import autocast, precision
from models.registry import LARGEST, backbone_name, create_model, in_words, names, read_index, sizes, takes
from models.vae import AutoencoderKL, latent_shape, load_vae
from training.checkpoint import averaged, export_pipeline
from training.command import DataOptions, ShortcutOptions, begin_with, describe, parse, say, say_end
from training.data import ImageData
from training.ema import EMA
from training.latents import encode
from training.loop import Callback, train
from training.loop_options import LoopOptions, check
from training.monitor import save_grid
from training.objectives import BETA_SCHEDULES, DDPM, OBJECTIVES, PREDICTION_TYPES, TIME_DISTRIBUTIONS, Diffusion, create_objective
from training.options import option
from training.presets import PRESETS
from training.processes import PATIENCE, spread_over_cpu_processes
from training.stream import at_hand

GRID_IMAGES, GRID_COLUMNS = 36, 9


@dataclass(frozen=True)
class LatentOptions(DataOptions):
    """Data."""

    vae: str | None = option(None, "train on latents: an AutoencoderKL, a hub name or a folder; the images are encoded once")


@dataclass(frozen=True)
class ModelOptions:
    """Model."""

    backbone: str = option("dit", "architecture", choices=names("diffusion"))
    size: str = option("XS", "width and depth", choices=sizes("diffusion"))
    depth: int | None = option(
        None, "blocks of a transformer, an even number with long skips; the size's own unless given", least=1, most=LARGEST["depth"]
    )
    patch_size: int | None = option(None, "edge of a patch in pixels; divides the resolution", least=1)
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
    snr_gamma: float | None = option(None, "ddpm: min-SNR weighting, such as 5 (arXiv 2303.09556)")
    class_dropout: float = option(0.1, "share of labels dropped, for classifier-free guidance", least=0, most=1)


GROUPS = (LatentOptions, ModelOptions, ShortcutOptions, ObjectiveOptions, WatchOptions, LoopOptions)


def build(options: ModelOptions, shortcuts: ShortcutOptions, objective: str, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The model that the options describe, for inputs (C, H, W), with fresh weights."""
    # flow times lie in [0, 1], and backbones with a `time_scale` multiply them by 1000; a DDPM's are that large already
    time_scale = 1.0 if objective == "ddpm" and takes(options.backbone, "time_scale") else None
    return create_model(
        options.backbone,
        options.size,
        **asdict(shortcuts),
        image_size=shape[-1],
        depth=options.depth,
        patch_size=options.patch_size,
        in_channels=shape[0],
        num_classes=num_classes,
        time_scale=time_scale,
    )


def sample_grid(path: Path, pipeline: Pipeline) -> None:
    """Write a picture of samples: the same seeds each time, one class after another."""
    pipeline.set_progress_bar_config(disable=True)
    labels = [i % pipeline.num_classes for i in range(GRID_IMAGES)] if pipeline.num_classes else None
    images = pipeline(GRID_IMAGES, labels, seed=0, guidance_scale=2.0 if labels else 1.0, output_type="np", return_dict=False)[0]
    save_grid(path, images, GRID_COLUMNS)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    with one_line_errors():
        preset, options = parse(__doc__, GROUPS, PRESETS, arguments)
        run(preset, *options)


def run(
    preset: str | None,
    data_options: LatentOptions,
    model_options: ModelOptions,
    shortcut_options: ShortcutOptions,
    objective_options: ObjectiveOptions,
    watch_options: WatchOptions,
    loop_options: LoopOptions,
) -> None:
    """Load the data, build the model, train it.

    Raises:
        ValueError: options that do not fit together or with the data.
    """
    data_options.source()  # before anything is spent
    folder = check(loop_options)
    # where the loop will compute; PartialState alone does not look at `accelerate launch --cpu`
    device = PartialState(parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE).device
    vae = load_vae(data_options.vae).to(device) if data_options.vae else None
    shape = latent_shape(vae, data_options.resolution) if vae else (3, data_options.resolution, data_options.resolution)
    with torch.device("meta"):  # sizes that do not fit are told before the data are read
        build(model_options, shortcut_options, objective_options.objective, shape, num_classes=0)
    create_objective_from(objective_options, 0, vae)

    data = data_options.load()
    num_classes = data.num_classes if model_options.class_conditional else 0
    classes = f" in {num_classes} classes ({', '.join(data.class_names[:5])}{', ...' * (num_classes > 5)})" if num_classes else ""
    set_seed(loop_options.seed)  # of the initial weights; nothing else uses the global streams
    model = build(model_options, shortcut_options, objective_options.objective, shape, num_classes)
    resuming = loop_options.resume_from_checkpoint is not None
    images_before = begin_with(model, model_options.init_from, folder, resuming) if model_options.init_from else 0
    objective = create_objective_from(objective_options, num_classes, vae)
    if model_options.init_from and not resuming:
        check_time(model_options.init_from, objective)
    say(f"{data.extent} of {data.name}{classes}")
    say(describe(in_words(model_options.backbone, model_options.size, model_options.depth), model))

    def pipeline(network: nn.Module, training: dict[str, Any] | None = None) -> Pipeline:
        class_names = data.class_names if num_classes else ()
        return Pipeline(network, objective.scheduler, class_names, training, path=objective.path, vae=vae)

    def show(run: Path, step: int, network: nn.Module, ema: EMA) -> None:
        with autocast(network.device, precision(loop_options.mixed_precision)):
            sample_grid(run / "samples" / f"step-{step}.png", pipeline(averaged(network, ema)))

    looks: list[tuple[int, Callback]] = [(loop_options.sample_steps, show)] if loop_options.sample_steps else []
    if watch_options.metrics_during_training:
        class_names, images = data.class_names if num_classes else (), at_hand(data, "--metrics_during_training")
        looks.append((watch_options.metrics_during_training, small_distance(watch_options, images, class_names, pipeline)))
    if loop_options.probe_every:
        looks.append((loop_options.probe_every, quick_probe(at_hand(data, "--probe_every"), pipeline, objective, loop_options)))

    step = train(
        loop_options,
        model,
        encode(at_hand(data, "--vae"), vae, loop_options.random_flip) if vae else data,
        objective,
        {
            "preset": preset,
            **asdict(data_options),
            **asdict(model_options),
            **asdict(shortcut_options),
            **asdict(objective_options),
            **asdict(watch_options),
            "images_before": images_before,
        },
        lambda run, network, ema, training: export_pipeline(run, pipeline(network, training), ema),
        looks,
    )
    say_end(step, loop_options)


def quick_probe(data: ImageData, pipeline: Callable[[nn.Module], Pipeline], objective: Diffusion, options: LoopOptions) -> Callback:
    """What --probe_every asks for."""
    from eval.encoders import DiffusionEncoder  # probes take seconds to import
    from eval.quick import TIME, QuickProbe

    def encoder_of(network: nn.Module) -> DiffusionEncoder:
        return DiffusionEncoder(pipeline(network), {"backbone": backbone_name(network)}, (TIME,))

    return QuickProbe(data, encoder_of, objective.bottleneck, options.mixed_precision, options.probe_images)


def check_time(checkpoint: str, objective: Diffusion) -> None:
    """Raise ValueError if a checkpoint to begin with counts its time otherwise than the objective does."""
    index = read_index(checkpoint)
    theirs = "a DDPM" if "Flow" not in index.get("scheduler", ["", ""])[1] else f"a flow on the {index.get('path', 'linear')} path"
    ours = "a DDPM" if isinstance(objective, DDPM) else f"a flow on the {objective.path} path"
    if theirs != ours:
        raise ValueError(f"--init_from {checkpoint} is {theirs}, and this would train {ours}; give its --objective and --path")
    if isinstance(objective, DDPM):
        config = read_json(Path(checkpoint) / "scheduler" / "scheduler_config.json")
        for name in ("prediction_type", "beta_schedule"):
            if (was := config.get(name)) != (now := objective.scheduler.config[name]):
                raise ValueError(f"--init_from {checkpoint} has {name} {was}, and this would train {now}; give the same")


def create_objective_from(options: ObjectiveOptions, num_classes: int, vae: AutoencoderKL | None) -> Diffusion:
    """The objective that the options describe."""
    given = asdict(options)
    clip = False if vae and options.objective == "ddpm" else None  # latents do not lie in [-1, 1]
    return create_objective(given.pop("objective"), num_classes=num_classes, clip=clip, **given)


if __name__ == "__main__":
    with one_line_errors():
        spread_over_cpu_processes()
    main()
