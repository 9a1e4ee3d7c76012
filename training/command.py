"""What the training commands share: their flags for data and shortcuts, presets, weights to begin with, and what they say."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from models.files import Parser, read_json
from models.registry import backbone_name, load_backbone, read_index
from models.shortcut import PLACEMENTS, SCHEDULES, advised, effective_alpha, warnings_for
from models.shortcut import describe as describe_shortcuts
from training.checkpoint import CONFIG
from training.data import ImageData
from training.images import SPLITS
from training.loop_options import LoopOptions
from training.options import add_options, option, read_options
from training.packing import load_images
from training.presets import Preset
from training.stream import ImageStream, open_stream

# What a preset says no more once a flag is given that says the same in another way, or that needs other values.
EXCLUDES = {"alpha_min": ("alpha_eff",), "alpha_eff": ("alpha_min",), "backbone": ("patch_size",)}

# Arguments of backbones that no shape of a weight tells.
MEANING = ("num_heads", "decoder_num_heads", "head_dim", "time_scale", "time_offset")


@dataclass(frozen=True)
class DataOptions:
    """Data."""

    dataset_name: str | None = option(None, 'the embedded "openmoji", a hub name, or a folder of parquet files or of WebDataset archives')
    train_data_dir: str | None = option(None, "folder of images, a subfolder for each class or none")
    dataset_split: str = option("train", "what to train on", choices=SPLITS)
    image_column: str = option("image", "column of the images")
    label_column: str | None = option(None, 'column of the labels; "label" is found by itself')
    resolution: int = option(32, "edge in pixels after centre crop and resize", least=1)
    streaming: bool = option(False, "read the images while training, every epoch anew, instead of packing them once on the disk")
    shuffle_buffer: int = option(1000, "streaming: images of a batch's stream among which the next one is drawn", least=1)

    def source(self) -> str:
        """Where the images come from, as the user wrote it.

        Raises:
            ValueError: not exactly one source is given, or a folder that is not there.
        """
        name = self.train_data_dir or self.dataset_name
        if name is None or (self.train_data_dir and self.dataset_name):
            raise ValueError("give one of --dataset_name (such as openmoji) and --train_data_dir")
        if self.train_data_dir and not Path(self.train_data_dir).is_dir():
            raise ValueError(f"--train_data_dir {self.train_data_dir} is not a folder; give one with images")
        return name

    def load(self) -> ImageData | ImageStream:
        """The images; ValueError as `load_images`."""
        where = self.source(), self.resolution, self.dataset_split, self.image_column, self.label_column
        return open_stream(*where, self.shuffle_buffer) if self.streaming else load_images(*where)


@dataclass(frozen=True)
class ShortcutOptions:
    """Shortcuts."""

    alpha_min: float = option(1.0, "share of the shortcut kept by the last sub-layer, in (0, 1]; 1 is the plain network")
    alpha_eff: float | None = option(
        None, "instead of alpha_min: share of the input that reaches the last layer by shortcuts alone, such as 3e-3"
    )
    shortcut_schedule: str = option(
        "linear", "how alpha falls; " + "; ".join(f"{name}: {each.about}" for name, each in SCHEDULES.items()), choices=tuple(SCHEDULES)
    )
    shortcut_placement: str = option("both", "which sub-layers' shortcuts fade", choices=PLACEMENTS)
    learnable_alpha: bool = option(False, "train the alphas, from the schedule on")
    long_skips: bool | None = option(None, "connect encoder blocks to decoder blocks; on where the backbone can do without")
    zero_init: bool | None = option(None, "start every branch at zero; unless given, as the backbone does it")


def parse(
    about: str, groups: Sequence[type], presets: dict[str, Preset], arguments: list[str] | None, parser: type[Parser] = Parser
) -> tuple[str | None, list[Any]]:
    """Read a command line; bad flags end the program in one line.

    Args:
        about: description, for the help, which lists the presets too.
        groups: dataclasses of options, one of them `DataOptions`, one with an `output_dir`.
        arguments: None takes those of the program.
        parser: one that does something else about bad flags than to end the program.

    Returns:
        The name of the preset, if one is asked for, and an instance of every group.

    Raises:
        ValueError: a value out of its range.
    """
    listed = "\n".join(f"  {name:24} {preset.about}" for name, preset in presets.items())
    flags = parser(description=about, epilog=f"presets:\n{listed}")
    flags.add_argument("--preset", choices=tuple(presets), metavar="NAME", help="a named run (listed below); other flags win over it")
    for group in groups:
        add_options(flags, group)
    known = flags.parse_known_args(arguments)[0]
    if preset := known.preset:
        words = sys.argv[1:] if arguments is None else arguments
        given = {word.partition("=")[0].removeprefix("--") for word in words}
        excluded = {name for flag in given for name in EXCLUDES.get(flag, ())}
        if not SCHEDULES[known.shortcut_schedule].takes_alpha_min:
            excluded |= {"alpha_min", "alpha_eff"}
        values = {name: value for name, value in presets[preset].flags.items() if name not in excluded}
        flags.set_defaults(output_dir=f"runs/{preset}", **values)
    parsed = flags.parse_args(arguments)
    if preset and parsed.train_data_dir and parsed.dataset_name == presets[preset].flags.get("dataset_name"):
        parsed.dataset_name = None  # the user's images instead of the preset's
    return preset, [read_options(parsed, group) for group in groups]


def describe(name: str, model: nn.Module) -> str:
    """What is about to be trained, and a warning where the paper saw instability or advises another alpha."""
    alphas, against = model.alphas, warnings_for(model.alphas)
    first = f"{name} with {model.num_parameters() / 1e6:.1f} M parameters, {describe_shortcuts(model.shortcuts)} "
    first += f"over {len(alphas)} sub-layers, alpha_eff {effective_alpha(alphas):.2g}"
    instead = advised(model.shortcuts, model.config.shortcut_schedule, model.config.shortcut_placement) if against else None
    return "\n".join([first, *(f"warning: {line}" for line in against), *[f"the depth rule advises {instead}"] * bool(instead)])


def begin_with(model: nn.Module, checkpoint: str, run: Path, resuming: bool) -> int:
    """Copy the averaged weights of a checkpoint into the model; a label table of another size stays fresh, and variances stay behind.

    Args:
        run: the run that begins.
        resuming: it began before, and its own checkpoint has the weights.

    Returns:
        How many images the checkpoint had seen.

    Raises:
        ValueError: not a checkpoint, or its parts are not those of the model.
    """
    if resuming:
        return read_json(run / CONFIG).get("images_before", 0) if (run / CONFIG).is_file() else 0
    source = load_backbone(checkpoint)
    if source.config.get("learn_sigma") and not model.config.get("learn_sigma"):  # published SiT and DiT; nothing here trains variances
        source.drop_variance()
    told = [f"{name} was {there} and is {here}" for name, there, here in differences(source, model)]
    if backbone_name(source) != backbone_name(model):
        told = [f"it is a {backbone_name(source)} and this a {backbone_name(model)}"]
    silent = [text for text in told if text.startswith(MEANING)]  # weights of the same shapes would mean something else
    if silent:
        raise ValueError(f"--init_from {checkpoint} does not fit: {', '.join(silent)}; give this model the same")
    ours, weights = model.state_dict(), source.state_dict()
    differ = [name for name in {**ours, **weights} if name not in ours or name not in weights or ours[name].shape != weights[name].shape]
    fresh = [name for name in differ if name.startswith(("label_embed", "unet.class_embedding"))]
    if len(differ) > len(fresh):
        what = ", ".join(told) or f"{sorted(set(differ) - set(fresh))[0]} is of another size"
        raise ValueError(f"--init_from {checkpoint} does not fit: {what}; give this model the same")
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name not in fresh}, strict=not fresh)
    before, now = describe_shortcuts(source.shortcuts), describe_shortcuts(model.shortcuts)
    if before != now:
        say(f"warning: {checkpoint} was trained with {before}, and this trains {now}")
    return read_index(checkpoint).get("training", {}).get("images_seen", 0)


def differences(one: nn.Module, other: nn.Module) -> list[tuple[str, Any, Any]]:
    """(name, value, other value) of the sizes in which the configs of two backbones differ."""
    irrelevant = ("num_classes", "alpha_min", "shortcut_schedule", "shortcut_placement", "zero_init", "learn_sigma")
    names = [name for name in one.config if name in other.config and not name.startswith("_") and name not in irrelevant]
    return [(name, one.config[name], other.config[name]) for name in names if one.config[name] != other.config[name]]


def say_end(step: int, options: LoopOptions) -> None:
    """How far a training came, and how it goes on if that is not its end."""
    if not step:
        say(f"{options.output_dir}: left before its first step was done, so there is nothing to go on with; begin again")
    elif options.max_train_steps is None or step >= options.max_train_steps:
        say(f"{options.output_dir}: step {step} reached")
    else:
        say(f"{options.output_dir}: step {step} of {options.max_train_steps} reached; --resume_from_checkpoint latest goes on")


def say(text: str) -> None:
    """Print, on the main process alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)
