"""Flags of the trainings, as a form gives them: checked by the scripts' own parsers, and made into command lines.

The scripts, which no module imports, are asked for by name, as a shell does it: their flags are the only truth about what can be
trained. With them torch loads, on first use: the page answers before.
"""

import importlib
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from app.libraries import load_libraries
from models.files import Parser
from training.presets import MAE_PRESETS, PRESETS

SCRIPTS = {"diffusion": "train_diffusion", "mae": "train_mae"}  # task of the backbone -> module of training/
OWN_OPTIONS = ("output_dir", "resume_from_checkpoint")  # the page gives these
MAX_TEXT = 500  # characters of an option
ALL_PRESETS = {**PRESETS, **MAE_PRESETS}


class _Flags(Parser):
    """Tells a bad flag instead of ending the page."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(self.words(message))


def plain(options: Any) -> dict[str, Any]:
    """Without those that are None.

    Raises:
        ValueError: not names with texts, numbers or yes and no.
    """
    if not isinstance(options, dict) or not all(isinstance(option, str) for option in options):
        raise ValueError("options must be names with values")
    for option, value in options.items():
        if isinstance(value, str) and not (len(value) <= MAX_TEXT and value.isprintable()):
            raise ValueError(f"the option {option[:MAX_TEXT]!r} must be printable text of at most {MAX_TEXT} characters")
        if not isinstance(value, str | int | float | None) or (isinstance(value, int) and abs(value) >= 2**63):
            raise ValueError(f"the option {option[:MAX_TEXT]!r} must be a text, a number below 2^63, or yes or no")
    return {option: value for option, value in options.items() if value is not None}


def task(options: dict[str, Any]) -> str:
    """Which script the options are for: a key of `SCRIPTS`."""
    load_libraries()
    from models.registry import names

    preset = ALL_PRESETS.get(options.get("preset", ""))
    backbone = options.get("backbone") or (preset.flags.get("backbone") if preset else None)
    return "mae" if backbone in names("mae") else "diffusion"


def _groups(options: dict[str, Any]) -> tuple[type, ...]:
    """The groups of options that the script takes."""
    load_libraries()
    return importlib.import_module(f"training.{SCRIPTS[task(options)]}").GROUPS


def flag_names(options: dict[str, Any]) -> set[str]:
    """Names of the flags that the script takes."""
    return {"preset", *(field.name for group in _groups(options) for field in fields(group))}


def command(options: dict[str, Any], run: Path, resume: bool = False) -> list[str]:
    """What to run, without the interpreter, from the project's root."""
    return [f"training/{SCRIPTS[task(options)]}.py", *arguments(options, run, resume)]


def output_dir(run: Path) -> str:
    """The word of a command line that tells which run it is."""
    return f"--output_dir={run}"


def arguments(options: dict[str, Any], run: Path, resume: bool = False) -> list[str]:
    """The command line. Every value shares a word with its flag, so none can pass for another flag."""
    words = [output_dir(run), *["--resume_from_checkpoint=latest"] * resume]
    for option, value in options.items():
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            words.append(f"--{option}={value}")
    return words


def parse(options: dict[str, Any], run: Path) -> dict[str, Any]:
    """All flags of the script with their values, after the script's own checks of flags and sizes.

    What only the data can tell comes out as a failed run.

    Raises:
        ValueError: options that the script refuses.
    """
    load_libraries()
    from training.command import DataOptions, parse
    from training.loop_options import LoopOptions, check
    from training.objectives import create_objective

    if unknown := sorted(set(options) - flag_names(options)):
        raise ValueError(f"there is no option {unknown[0][:MAX_TEXT]!r} for this training")
    presets = MAE_PRESETS if task(options) == "mae" else PRESETS
    preset, groups = parse("", _groups(options), presets, arguments(options, run), _Flags)
    values = {"preset": preset, **{option: value for group in groups for option, value in asdict(group).items()}}
    for group in groups:
        if isinstance(group, DataOptions):
            group.source()
        if isinstance(group, LoopOptions):
            check(replace(group, resume_from_checkpoint="latest"))  # whether a run is there already was asked before
        if hasattr(group, "objective"):
            given = asdict(group)
            create_objective(given.pop("objective"), num_classes=0, **given)
    _network(values)
    return values


def _network(values: dict[str, Any]) -> Any:
    """That of all flags, without weights; None of latents, whose size is not known here. ValueError: options that it refuses."""
    import torch

    from models.registry import create_model
    from training.command import ShortcutOptions

    if values.get("vae") is not None:
        return None
    shortcuts = {field.name: values[field.name] for field in fields(ShortcutOptions)}
    sizes = dict(image_size=values["resolution"], depth=values["depth"], patch_size=values["patch_size"])
    with torch.device("meta"):
        return create_model(values["backbone"], values["size"], **shortcuts, **sizes)


@cache
def choices(option: str) -> tuple[str, ...]:
    """What an option may be, over all scripts."""
    groups = [group for backbone in ("dit", "mae") for group in _groups({"backbone": backbone})]
    found = [field.metadata["choices"] for group in groups for field in fields(group) if field.name == option]
    return tuple(dict.fromkeys(name for names in found for name in names or ()))


def advice(options: dict[str, Any]) -> str:
    """What the depth rule advises for the network, and what speaks against the alpha that is chosen; of latents nothing.

    Raises:
        ValueError: options that the training script refuses.
    """
    load_libraries()
    from models.shortcut import advised, warnings_for

    network = _network(parse(options, Path("advice")))
    if network is None:
        return ""
    window = advised(network.shortcuts, network.config.shortcut_schedule, network.config.shortcut_placement)
    told = [f"The depth rule advises {window}"] if window else []
    return "".join(f"{line}. " for line in [*told, *warnings_for(network.alphas)]).rstrip()
