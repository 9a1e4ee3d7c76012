"""Guards: files that are whole or not there, memory asked for before it is taken, errors that are one line."""

import argparse
import atexit
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil

EXIT_BAD_INPUT = 2
HEARD_S = 3.0  # within that a launcher notices that a process has ended, and ends the others
OUT_OF_MEMORY = r"out of memory|can't allocate memory|CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)"
# what torch's backends say where a process waits for another one: gloo names its transport, NCCL speaks of a remote process
LOST_PROCESS = r"gloo/transport|remote process exit|Connection (reset|closed) by peer"
INDEX = "model_index.json"  # names the parts of a checkpoint; a folder that has one can be loaded
# of a training's checkpoint, as accelerate names them: what the loop registers first; the weights, those by FSDP2 and those by DeepSpeed
AVERAGES_SAVED = "custom_checkpoint_0.pkl"
WEIGHTS_SAVED = ("model.safetensors", "pytorch_model_fsdp.bin", "pytorch_model/mp_rank_00_model_states.pt")


def is_checkpoint(folder: str | Path) -> bool:
    """Whether it can be loaded: a run that has saved, or a shipped one."""
    return (Path(folder) / INDEX).is_file()


def has_averages(checkpoint: str | Path) -> bool:
    """Whether there are averaged weights beside the raw ones."""
    return (Path(checkpoint) / "ema").is_dir()


@contextlib.contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Yield a sibling of `path` to write (as a file or a folder); rename it to `path` when the block ends well.

    On an exception what was written is removed and what was at `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    remove(aside)
    try:
        yield aside
        _open_to_readers(aside)
        replace(aside, path)
    finally:
        remove(aside)


def _open_to_readers(path: Path) -> None:
    """The permissions that the user's umask asks for; some libraries write files that only their owner may read."""
    umask = os.umask(0)
    os.umask(umask)
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            file.chmod(0o666 & ~umask)


def replace(source: Path, target: Path) -> None:
    """Rename a file or a folder over whatever is at `target`."""
    if target.is_dir() and not target.is_symlink():  # a folder cannot be renamed over a full one: move that out of the way first
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old)
    else:
        os.replace(source, target)


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read JSON; a broken file is a ValueError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it or delete it") from None


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_memory(num_bytes: int, what: str, free: int | None = None) -> None:
    """Raise ValueError if that many bytes are not free: of this machine's memory, unless it is said how many are."""
    if free is None:
        free = psutil.virtual_memory().available
    if num_bytes > free:
        need, have = num_bytes / 2**30, free / 2**30
        raise ValueError(f"{what} would take about {need:,.0f} GiB of memory, and {have:.0f} GiB are free; ask for less")


def temporary_folder(parent: Path | None = None) -> Path:
    """A new folder, deleted when the program ends; `parent` is made where it is not there."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="fading-shortcuts-", dir=parent)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def require_writable(folder: Path, remedy: str) -> None:
    """Raise ValueError if nothing can be written in a folder, or where it is to be; before hours are spent on what comes there."""
    there = folder
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{there} cannot be written ({error.strerror}); {remedy}") from None


def require_disk(folder: Path, num_bytes: int, what: str) -> None:
    """Raise ValueError if that many bytes are not free where the folder is."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        sizes = f"{num_bytes / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free"
        raise ValueError(f"{what} take {sizes} in {folder}; make room, or set XDG_CACHE_HOME to another disk")


class Parser(argparse.ArgumentParser):
    """Flags; a bad one is answered in one line too. The description keeps its line breaks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"error: {self.words(message)}; --help lists all flags\n")

    @staticmethod
    def words(message: str) -> str:
        """What argparse says, in words for people."""
        kinds = {"int": "a whole number", "float": "a number"}
        message = re.sub(r"^argument (\S+): invalid choice: (.*) \(choose from (.*)\)$", r"\1 cannot be \2; choose from \3", message)
        return re.sub(
            r"^argument (\S+): invalid (int|float) value: (.*)$",
            lambda found: f"{found[1]} cannot be {found[3]}; give {kinds[found[2]]}",
            message,
        ).removeprefix("argument ")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """For command lines: bad input (ValueError, OSError) ends as one line on stderr and exit code 2, a training that broke
    down (FloatingPointError) or lost one of its processes as one and exit code 1, Ctrl-C as exit code 130.

    FADING_SHORTCUTS_DEBUG=1 shows the traceback instead.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error))
        left_alone = int(os.environ.get("WORLD_SIZE", 1)) > 1 and re.search(LOST_PROCESS, str(error))
        not_compiled = type(error).__name__ == "InductorError"  # torch's; to import it takes long
        known = out_of_memory or left_alone or not_compiled
        if os.environ.get("FADING_SHORTCUTS_DEBUG") or (isinstance(error, RuntimeError) and not known):
            raise
        if left_alone:  # told at once: the launcher is about to end this one too
            kept = "whole checkpoints are kept, and --resume_from_checkpoint latest goes on from them"
            print(f"error: another process of this training has ended, so this one ends too; {kept}", file=sys.stderr, flush=True)
            sys.exit(1)
        if out_of_memory:
            text = "there is not enough memory for this; ask for fewer or smaller images"
        elif not_compiled:
            why = str(error).splitlines()[0]
            text = f"torch.compile failed ({why}); mend the compiler (FADING_SHORTCUTS_DEBUG=1 tells more), or give --no-compile"
        else:
            text = " ".join(str(error).split())
        _tell(f"error: {text}")
        sys.exit(1 if isinstance(error, FloatingPointError) else EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        _tell("interrupted")
        sys.exit(130)


def _tell(line: str) -> None:
    """Print to stderr. Of several processes with the same to say the first one does, and its end lets the launcher end the others."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(HEARD_S)
    print(line, file=sys.stderr, flush=True)


def anywhere(found: Any) -> Any:
    """Of every absolute path its last part alone: results are published, and fingerprints tell what they are of."""
    if isinstance(found, dict):
        return {name: anywhere(value) for name, value in found.items()}
    if isinstance(found, list):
        return [anywhere(value) for value in found]
    return Path(found).name if isinstance(found, str) and found.startswith("/") else found
