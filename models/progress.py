"""Progress bars: drawn on a terminal, or told in a file to whoever started the program."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from models.files import remove, write_json

PROGRESS_FILE = "FADING_SHORTCUTS_PROGRESS"  # environment: where to tell it, instead of drawing
TOLD_S = 0.5  # at most so often


def progress_bar(*arguments: Any, **options: Any) -> tqdm:
    """A bar of tqdm that leaves nothing behind; there is none where nobody would see it."""
    if os.environ.get(PROGRESS_FILE):
        return _InFile(*arguments, **options, leave=False, mininterval=TOLD_S)
    return tqdm(*arguments, **options, leave=False, disable=None)


class _InFile(tqdm):
    """JSON with "part" (what is being done), "done", "of" and "seconds_left"; when the part is over the file goes."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Called by tqdm: `msg` is "" at the end."""
        path = Path(os.environ[PROGRESS_FILE])
        with suppress(OSError):  # what is measured is worth more
            if msg == "":
                remove(path)
                return False
            now = self.format_dict
            rate = now["rate"] or (self.n / now["elapsed"] if now["elapsed"] else 0)
            left = max(0, self.total - self.n) / rate if self.total and rate else None
            write_json(path, {"part": self.desc.removesuffix(": "), "done": self.n, "of": self.total, "seconds_left": left})
        return True
