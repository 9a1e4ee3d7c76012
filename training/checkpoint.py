"""A run on disk: resumable checkpoints, and the pipeline that anyone can load."""

import copy
import fcntl
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.files import AVERAGES_SAVED, INDEX, WEIGHTS_SAVED, is_checkpoint, read_json, remove, sha256, write_json, written_aside
from models.pipeline import Pipeline
from models.precision import cpu_name, device_name
from training.ema import EMA

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # of a full disk: RuntimeError is torch.save's
CONFIG = "config.json"
BROKE = "broke.json"  # of a training that broke down: why, after how many images, with which alphas; until it is begun again
MANIFEST = "manifest.json"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """While it lasts no other training begins in this folder. It ends with the process, however that ends.

    Raises:
        ValueError: another one works there.
    """
    if int(os.environ.get("RANK", 0)):  # the first of a training's processes speaks for all
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another training works in {run}; let it end, stop it, or choose another --output_dir") from None
        except OSError:  # some network file systems have no locks
            pass
        try:
            yield
        finally:
            with suppress(OSError):  # nothing came of it
                run.rmdir()
    finally:
        os.close(descriptor)


def step_of(checkpoint: Path) -> int:
    """The N of a folder named step-N."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that were written to their end, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if (path / MANIFEST).is_file() and path.name[5:].isdigit()]
    return sorted(found, key=step_of)


def save_checkpoint(accelerator: Accelerator, run: Path, step: int, limit: int | None) -> None:
    """Write `checkpoints/step-N` aside, rename it when whole, then delete the oldest beyond `limit`. Every process calls this.

    Raises:
        OSError: it cannot be written; the checkpoints before stay.
    """
    target = run / "checkpoints" / f"step-{step}"
    aside = target.with_name(f".{target.name}.partial")
    try:
        accelerator.save_state(str(aside))
    except WRITE_ERRORS as error:
        remove(aside)
        raise not_written(target, error) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(aside)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
        write_json(aside / MANIFEST, {"step": step, "files": manifest})
        _drop(target)
        aside.rename(target)
        drop_before(run, limit)
    accelerator.wait_for_everyone()


def drop_before(run: Path, limit: int | None) -> None:
    """Delete all but the last so many checkpoints; none if there is no limit."""
    for old in checkpoints(run)[: -limit if limit else 0]:
        _drop(old)


def drop_after(run: Path, checkpoint: Path) -> None:
    """Delete the checkpoints of later steps than this one."""
    for later in (path for path in checkpoints(run) if step_of(path) > step_of(checkpoint)):
        _drop(later)


def _drop(checkpoint: Path) -> None:
    """Delete a checkpoint if it is there; half of one never bears its name."""
    if checkpoint.is_dir():
        gone = checkpoint.with_name(f".{checkpoint.name}.old-{os.getpid()}")
        checkpoint.rename(gone)
        remove(gone)


def remove_leftovers(run: Path) -> None:
    """Delete what a process that was killed had not yet renamed, or not yet deleted."""
    for folder in (run, run / "samples", run / "checkpoints"):
        for pattern in (".*.partial*", ".*.old-*"):
            for leftover in folder.glob(pattern):
                remove(leftover)


def find_checkpoint(run: Path, which: str) -> Path:
    """The checkpoint to resume from.

    Args:
        which: "latest", or a name such as "step-1000".

    Raises:
        ValueError: there is none, or it is damaged.
    """
    found = checkpoints(run)
    if not found:
        raise ValueError(f"{run} has no checkpoint to resume from; leave --resume_from_checkpoint away to start anew")
    if which == "latest":
        for checkpoint in reversed(found):
            damage = _damage(checkpoint)
            if damage is None:
                return checkpoint
            print(f"{checkpoint} is damaged ({damage}); trying the one before", flush=True)
        raise ValueError(f"every checkpoint of {run} is damaged; start anew in another folder")
    checkpoint = run / "checkpoints" / Path(which).name
    if checkpoint not in found:
        raise ValueError(f"{run} has no checkpoint {which!r}; it has {', '.join(path.name for path in found)}")
    if damage := _damage(checkpoint):
        raise ValueError(f"{checkpoint} is damaged: {damage}; resume from another one")
    return checkpoint


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        files = {name: (expected["bytes"], expected["sha256"]) for name, expected in read_json(checkpoint / MANIFEST)["files"].items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} is not as it was written"
    for name, (size, digest) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or sha256(path) != digest:
            return f"{name} has changed"
    return None


def weights_in(checkpoint: Path) -> dict[str, Tensor]:
    """The model's weights as they were trained; FSDP2 and DeepSpeed leave them in files of torch's.

    Raises:
        OSError, SafetensorError, RuntimeError, UnpicklingError: damaged files.
    """
    whole, *others = (checkpoint / name for name in WEIGHTS_SAVED)
    if whole.is_file():
        return load_file(whole)
    saved = torch.load(next(filter(Path.is_file, others), others[0]), map_location="cpu", weights_only=True)
    return saved.get("module", saved)


def averages_in(checkpoint: Path) -> dict[str, list[Tensor]]:
    """What `EMA.load_state_dict` takes.

    Raises:
        OSError, RuntimeError, UnpicklingError: damaged files.
    """
    return torch.load(checkpoint / AVERAGES_SAVED, map_location="cpu", weights_only=True)


def not_written(path: Path, error: Exception) -> OSError:
    """What to tell of a failure that libraries tell in many ways."""
    free = shutil.disk_usage(path.parent).free / 2**20
    reason = " ".join(str(error).split())
    return OSError(f"{path} cannot be written ({reason}); {free:,.0f} MiB are free there; what was saved before is whole")


def export_pipeline(run: Path, pipeline: Pipeline, ema: EMA) -> None:
    """Write `model/`, `ema/` where weights are averaged, `scheduler/`, once `vae/`, and the index, for `Pipeline.from_pretrained(run)`."""
    parts = {"model": pipeline.model, **({"ema": averaged(pipeline.model, ema)} if ema.decay else {}), "scheduler": pipeline.scheduler}
    if pipeline.vae is not None and not (run / "vae").is_dir():
        parts["vae"] = pipeline.vae
    _write(run, parts, dict(pipeline.config))


def export_network(run: Path, model: nn.Module, ema: EMA, class_names: Sequence[str], training: dict[str, Any]) -> None:
    """Write `model/`, `ema/` where weights are averaged, and the index: `models.registry.load_backbone(run)` loads the network."""
    parts = {"model": model, **({"ema": averaged(model, ema)} if ema.decay else {})}
    kind = [type(model).__module__, type(model).__name__]
    _write(run, parts, {"model": kind, "class_names": list(class_names), "training": training})


def _write(run: Path, parts: dict[str, Any], index: dict[str, Any]) -> None:
    for name, part in parts.items():
        try:
            with written_aside(run / name) as aside:
                part.save_pretrained(aside)
        except WRITE_ERRORS as error:
            raise not_written(run / name, error) from error
    write_json(run / INDEX, index)


def exported_step(run: Path) -> int | None:
    """The step of what `Pipeline.from_pretrained(run)` loads; the index is written last. None if nothing was exported yet."""
    return read_json(run / INDEX)["training"]["steps"] if is_checkpoint(run) else None


def averaged(model: nn.Module, ema: EMA) -> nn.Module:
    """A copy of the model in evaluation mode with the averaged parameters; it computes in the precision of whoever calls it."""
    twin = copy.deepcopy(model).eval()
    for name in ("forward", "_original_forward"):  # of a prepared model; bound to the twin they would keep it until a garbage collection
        vars(twin).pop(name, None)
    ema.copy_to(twin.parameters())
    return twin


def continued(config: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """From which steps on a run was made with other code, on another machine or with other threads than its config.json begins with,
    as far as that tells, now that it goes on at `step`."""
    before = [each for each in config.get("continued", ()) if each["step"] < step]  # later steps are given up
    now, last = run_metadata(), [config, *before][-1]
    return before if all(last[name] == value for name, value in now.items() if name in last) else [*before, {"step": step, **now}]


def revisions(config: dict[str, Any]) -> list[str]:
    """The code that a run was made with, in order; "unknown" where git could not tell."""
    codes = (str(each.get("git_revision") or "unknown") for each in (config, *config.get("continued", ())))
    return [code for code, _ in itertools.groupby(codes)]


def run_metadata() -> dict[str, Any]:
    """What a run was made with and on: versions of the libraries that matter, the git revision, and the machine."""
    versions = {name: version(name) for name in ("torch", "diffusers", "accelerate")}
    revision = None
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        revision = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip() or None
    cpu = {"cpu": cpu_name(), "cpu_capability": torch.backends.cpu.get_cpu_capability(), "cpu_threads": torch.get_num_threads()}
    return {"versions": versions, "git_revision": revision, "device": device_name(), **cpu}
