"""Evaluations that the page runs as jobs: which there are, their command lines, and what became of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from app.catalog import Source, Version, find, folders, hash_of_version, numbers_of, sources
from app.render import protocol
from app.settings import whole
from models.files import INDEX, has_averages, read_json
from training.images import EMBEDDED

RESULT, COMPARISON = "result.json", "comparison.json"  # of eval/fid.py and eval/probe.py as they are told; of eval/compare.py
MAX_CHECKPOINTS = 4
MOST_SAMPLES = 50_000
UNKNOWN = "unknown"  # instead of the hash of weights


@dataclass(frozen=True)
class Measure:
    """A row of the table.

    Attributes:
        about: for people.
        script: of `eval/`, which judges one checkpoint; several are compared by eval/compare.py, where it can.
        flags: that make it this measure.
        paints: it is about images, which a masked autoencoder does not draw.
    """

    about: str
    script: str
    flags: tuple[str, ...]
    paints: bool = True


LITE0 = "--feature_extractor=efficientnet-lite0"
MEASURES = {
    "FD": Measure("FD: Fréchet distance through EfficientNet-Lite0", "fid", (LITE0, "--mixed_precision=auto")),
    "KD": Measure("KD: FD and the kernel distance, for few samples", "fid", (LITE0, "--mixed_precision=auto", "--kid")),
    "FID": Measure("FID and KID: Inception, whose weights are downloaded once", "fid", ("--mixed_precision=auto", "--kid")),
    "probes": Measure("Probes of every block: kNN, linear, rank", "probe", ("--mixed_precision=auto", "--k=10,20"), paints=False),
}


def checked(options: dict[str, Any], runs: Path) -> dict[str, Any]:
    """Options of an evaluation, as `job.json` keeps them.

    Args:
        options: "measure", a key of `MEASURES`; "checkpoints", names of the catalogue, several of them for a comparison on the same
            noise; "reference", "openmoji" or a folder of images; "num_samples", of each checkpoint, or images to probe with.

    Raises:
        ValueError: another name, or a number out of range.
    """
    measure, names = options.get("measure"), options.get("checkpoints")
    if not isinstance(measure, str) or measure not in MEASURES:
        raise ValueError(f"there is no measure {str(measure)[:50]!r}; choose from {', '.join(MEASURES)}")
    if not isinstance(names, list) or not 1 <= len(names) <= MAX_CHECKPOINTS:
        raise ValueError(f"choose 1 to {MAX_CHECKPOINTS} checkpoints to judge")
    if not MEASURES[measure].paints and len(names) > 1:
        raise ValueError("probes look at one checkpoint at a time; choose one")
    number = whole("the number of samples", options.get("num_samples", 2048), 2, MOST_SAMPLES)
    reference = options.get("reference", EMBEDDED)
    if not isinstance(reference, str) or not 0 < len(reference) <= 500 or not reference.isprintable():
        raise ValueError("the reference must be openmoji or a folder of images")
    paths = [str(_folder(name, MEASURES[measure], runs)) for name in names]
    return {"measure": measure, "checkpoints": names, "paths": paths, "reference": reference, "num_samples": number}


def training_data(name: str, runs: Path) -> str:
    """What a checkpoint was trained on, if it can be judged against: the embedded images or a folder that is here; else nothing."""
    try:
        data = read_json(sources(runs)[name].folder / INDEX)["training"]["data"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return data if data == EMBEDDED or (isinstance(data, str) and Path(data).is_absolute() and Path(data).is_dir()) else ""


def versions_of(names: Sequence[str], now: dict[str, Source]) -> list[Version | None]:
    """The versions that checkpoints have now; None where there are none, or a training is about to write them."""
    found: list[Version | None] = []
    for name in names:
        try:
            found.append(now[name].version)
        except (KeyError, OSError):
            found.append(None)
    return found


def hash_of(version: Version | list[list[Any]] | None) -> str:
    """Of the weights of a version, maybe as JSON has it, which are read to know it; `UNKNOWN` where they are not there any more."""
    try:
        return hash_of_version(tuple((path, changed, size) for path, changed, size in version)) if version else UNKNOWN
    except OSError:
        return UNKNOWN


def weights_of(names: Sequence[str], now: dict[str, Source]) -> list[str]:
    """Hashes of the weights that checkpoints have now."""
    return [hash_of(version) for version in versions_of(names, now)]


def _folder(name: Any, measure: Measure, runs: Path) -> str:
    known = folders(runs)
    if not measure.paints and isinstance(name, str) and name in known:
        return str(known[name].resolve())
    source = find(name, runs)
    if source.step is not None:
        raise ValueError(f"{name} is an earlier step; only the newest weights of a run are judged")
    return f"{source.folder.resolve()}" + ("" if source.averaged or not has_averages(source.folder) else "@raw")


def command(options: dict[str, Any], folder: Path) -> list[str]:
    """What to run, without the interpreter, from the project's root; the numbers go to `folder`."""
    measure, paths = MEASURES[options["measure"]], options["paths"]
    number, reference = options["num_samples"], options["reference"]
    if measure.script == "probe":
        limits = [f"--max_train_images={number}", f"--max_test_images={number}"]
        places = [f"--output={folder}", "--no-pictures", f"--json={folder / RESULT}"]
        return ["eval/probe.py", *_checkpoint(paths[0]), f"--dataset={reference}", *limits, *places, *measure.flags]
    # all of the embedded set, as in the numbers of the shipped checkpoints
    split = ["--reference_split=all"] if reference == EMBEDDED else []
    common = [f"--reference={reference}", *split, f"--num_samples={number}", *measure.flags]
    if len(paths) > 1:
        return ["eval/compare.py", *paths, *common, f"--output={folder}"]
    return ["eval/fid.py", *_checkpoint(paths[0]), *common, f"--json={folder / RESULT}"]


def _checkpoint(path: str) -> list[str]:
    return [f"--checkpoint={path.removesuffix('@raw')}", *["--no-ema"] * path.endswith("@raw")]


def title(options: dict[str, Any]) -> str:
    """In words."""
    return f"{options['measure']} of {' and '.join(options['checkpoints'])}, {options['num_samples']:,} images"


def is_done(folder: Path) -> bool:
    """Whether an evaluation came to its end."""
    return (folder / RESULT).is_file() or (folder / COMPARISON).is_file()


def read_results(folder: Path, options: dict[str, Any]) -> tuple[list[list[dict[str, Any]]], list[str]]:
    """What an evaluation found.

    Args:
        options: its own, which know by which name of the catalogue each path was asked for.

    Returns:
        For each checkpoint its numbers, each with "metric", "value" and the protocol; and what a comparison says of the differences, one
        line each.
    """
    try:
        if (folder / RESULT).is_file():
            return [numbers_of(_read(folder / RESULT))], []
        told = _read(folder / COMPARISON)
        names = dict(zip(options["paths"], options["checkpoints"], strict=False))
        shared = {key: value for key, value in told["entries"][0].items() if key not in ("ema", "images_seen", "notes")}
        differences = [_difference(row, names, protocol(shared)) for row in told["differences"]]
        return [numbers_of(entry) for entry in told["entries"]], differences
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return [], []


def _read(file: Path) -> Any:
    return _read_version(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _read_version(file: Path, changed_ns: int) -> Any:
    """Of up to 250 KB, which every visitor's leaderboard asks for every few seconds."""
    return read_json(file)


class Judged(NamedTuple):
    """Numbers of a checkpoint, and whether it still has the weights that they are about (those it had when its evaluation began)."""

    name: str
    same: bool
    numbers: list[dict[str, Any]]


def results_of(folder: Path, options: dict[str, Any], now: dict[str, Source]) -> tuple[list[Judged], list[str]]:
    """What an evaluation found, and whether that is about what its checkpoints are now.

    Args:
        now: what the catalogue has, see `sources`.

    Returns:
        For each checkpoint what was found; and the differences, none if one of the checkpoints has other weights now.
    """
    numbers, differences = read_results(folder, options)
    names = options["checkpoints"]
    has = weights_of(names, now)
    same = [was == is_now != UNKNOWN for was, is_now in zip(options.get("weights") or has, has, strict=False)]
    return list(map(Judged, names, same, numbers)), differences if all(same) else []


def _difference(row: dict[str, Any], names: dict[str, str], how: str) -> str:
    one, other = (names.get(row[key], row[key]) for key in ("contender", "against"))
    interval = f"{row['difference']:+.3g} [{row['low']:+.3g}, {row['high']:+.3g}]"
    return f"{row['metric']}: {one} against {other} {interval}, {row['verdict']} (95 %, {row['interval']}; {how})"
