"""Progress bars: drawn on a terminal, lines in a log, or told in a file to whoever started the program."""

import io
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from models.files import remove, write_json

PROGRESS_FILE = "FADING_SHORTCUTS_PROGRESS"  # environment: where to tell it, instead of drawing
TOLD_S = 0.5  # at most so often
FIRST_LINE_S, LINE_S = 10.0, 60.0  # until the first line of a log, and between two; what is done sooner has none


def progress_bar(*arguments: Any, **options: Any) -> tqdm:
    """A bar of tqdm that leaves nothing behind on a terminal; elsewhere the first of several processes says the same in lines."""
    if os.environ.get(PROGRESS_FILE):
        return _InFile(*arguments, **options, leave=False, mininterval=TOLD_S)
    if int(os.environ.get("RANK", 0)):
        return tqdm(*arguments, **options, disable=True)
    if not sys.stderr.isatty():
        words = "{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed} so far, {remaining} left"
        seldom = dict(mininterval=FIRST_LINE_S, maxinterval=FIRST_LINE_S, delay=FIRST_LINE_S)
        return _InLines(*arguments, **options, **seldom, leave=False, bar_format=words, file=io.StringIO())  # no carriage returns
    return tqdm(*arguments, **options, leave=False)


class _InLines(tqdm):
    """A line now and then, instead of one that is written over."""

    due = 0.0  # on the clock, the next line

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Called by tqdm: `msg` is "" at the end."""
        if msg != "" and time.monotonic() >= self.due:
            self.due = time.monotonic() + LINE_S
            with suppress(OSError):  # a pipe that nobody reads any more
                print(self, file=sys.stderr, flush=True)
        return True


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
