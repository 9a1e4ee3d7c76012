"""What a visitor asks of a training: checked as far as the page's own rules go, with folders that it may read."""

import re
from pathlib import Path
from typing import Any

from app.catalog import find
from app.job_flags import OWN_OPTIONS, parse, plain
from app.job_process import ROOT
from training.images import EMBEDDED, holds_images

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
MOST = {"resolution": 1024, "train_batch_size": 4096, "gradient_accumulation_steps": 4096}


def settled(options: dict[str, Any], runs: Path, data: Path | None) -> dict[str, Any]:
    """Options with folders as absolute paths, each of which the page may read.

    Args:
        runs: folder of the runs, among which `init_from` is looked for.
        data: folder that others must lie in; None allows all.

    Raises:
        ValueError: options that are not for the form, or more than the page starts; a folder that it may not read, or without images.
    """
    options = plain(options)
    if taken := [option for option in OWN_OPTIONS if option in options]:
        raise ValueError(f"--{taken[0]} is not for the form; the page gives it")
    for option, most in MOST.items():
        if _number(options.get(option)) > most:
            raise ValueError(f"--{option} is {options[option]}; the page starts trainings up to {most}")
    if "init_from" in options:
        source = find(options["init_from"], runs)
        if not source.is_newest:
            raise ValueError(f"--init_from {options['init_from']}: trainings begin with the newest weights of a run; give its name alone")
        options["init_from"] = str(source.folder.resolve())
    if "train_data_dir" in options:
        options["train_data_dir"] = folder_of_images("train_data_dir", str(options["train_data_dir"]), data)
    for option, folder_of in {"dataset_name": folder_of_images, "vae": _folder}.items():  # names of the hub, or folders
        name = str(options.get(option, EMBEDDED))
        there = any((base / name).exists() for base in (ROOT, data or Path.cwd()))
        if name != EMBEDDED and (there or not HUB_NAME.fullmatch(name)):
            options[option] = folder_of(option, name, data)
    return options


def pair_of(name: str, options: dict[str, Any], runs: Path, data: Path | None) -> list[tuple[str, dict[str, Any]]]:
    """NAME-plain and NAME-decayed, with their options, as they were asked for.

    Raises:
        ValueError: as `settled`, options that the training script refuses, or both would be plain.
    """
    values = parse(settled(options, runs, data), runs / "pair")
    from models.shortcut import SCHEDULES  # `parse` has loaded the libraries

    fades = values["alpha_min"] < 1 or values["alpha_eff"] is not None or not SCHEDULES[values["shortcut_schedule"]].takes_alpha_min
    if not fades and not values["learnable_alpha"]:
        raise ValueError("a pair needs an alpha_min below 1 for the decayed one")
    plain_one = {**options, "alpha_min": 1.0, "alpha_eff": None, "shortcut_schedule": None, "learnable_alpha": None}
    return [(f"{name}-plain", plain_one), (f"{name}-decayed", options)]


def folder_of_images(option: str, name: str, data: Path | None) -> str:
    """As `settled` has it; what is wrong with the images only reading tells."""
    folder = _folder(option, name, data)
    if not holds_images(Path(folder)):
        raise ValueError(f"--{option} {name} holds no images; give one that does")
    return folder


def _folder(option: str, name: str, data: Path | None) -> str:
    folder = ((data or Path.cwd()) / name).resolve()
    if data and not folder.is_relative_to(data):
        raise ValueError(f"--{option} {name} lies outside of {data}; this page reads no other folders")
    if not folder.is_dir():
        raise ValueError(f"--{option} {name} is not a folder; give the path of one")
    return str(folder)


def _number(value: Any) -> float:
    """0 for what is none; the script tells that."""
    try:
        return float(value or 0)
    except ValueError:
        return 0.0
