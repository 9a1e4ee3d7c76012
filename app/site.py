"""What all tabs of the page share."""

import asyncio
import contextlib
import functools
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from app import render
from app.catalog import cards, default_pair
from app.jobs import Jobs
from app.sampler import sample
from app.settings import Comparison, Settings, Side
from app.studio import FAILED, STOPPED, Sampling, Studio
from app.votes import Votes

QUIET: dict[str, Any] = dict(show_progress="hidden", api_visibility="private")
AT_ONCE: dict[str, Any] = dict(**QUIET, queue=False)  # for what takes milliseconds and never fails: errors are told by the queue alone
# for what reads lists whose choices change: else Gradio refuses what it did not offer last, which the browser may not have got yet
AS_SENT: dict[str, Any] = dict(**QUIET, preprocess=False)
LATEST: dict[str, Any] = dict(**AS_SENT, trigger_mode="always_last")  # for several widgets at once: the last change is never left out
WATCHING: dict[str, Any] = dict(**QUIET, concurrency_limit=None)  # for what waits, and costs nothing meanwhile
Values = Mapping[Any, Any]  # of widgets: what Gradio gives a handler whose inputs are a set
Updates = dict[Any, Any]  # of widgets: what a handler may answer with; those that are left out stay as they are
LINK_BYTES_PER_S = 2e6  # of a visitor; slower ones get old previews late


@dataclass(eq=False)
class Site:
    """The services behind the page.

    Attributes:
        runs: folder of the runs.
        jobs: trainings and evaluations; None where they are switched off.
    """

    runs: Path
    jobs: Jobs | None
    votes: Votes
    studio: Studio = field(default_factory=Studio)
    _welcome: Sampling | None = None
    _greeting: threading.Lock = field(default_factory=threading.Lock)

    def first_comparison(self) -> Comparison | None:
        """What a visitor sees first; None without a checkpoint."""
        known = cards(self.runs)
        pair = default_pair(known)
        if pair is None:
            return None
        labels = known[pair[0]].class_names
        return Comparison(Settings(label=labels[0] if labels else None, seed=0), tuple(Side(name) for name in dict.fromkeys(pair)))

    def prepare(self) -> None:
        """Load the libraries in threads: sample what visitors see first, make the check of trainings ready, and keep their queue moving."""
        with self._greeting:
            self._greet()
        if self.jobs is not None:
            threading.Thread(target=self.jobs.warm_up, daemon=True, name="warm-up").start()
            self.jobs.keep_moving()

    def _greet(self) -> None:
        """Only with the lock."""
        before = self._welcome
        if first := self.first_comparison():
            self._welcome = self.studio.ask(lambda: sample(first, self.runs), "the page itself", first, lasting=True)
        if before:
            before.lasting = False

    @property
    def welcome(self) -> Sampling | None:
        """On its way or finished; once more where it was stopped or failed, or other checkpoints are seen first by now."""
        with self._greeting:
            before = self._welcome
            if before and (before.state in (STOPPED, FAILED) or before.about != self.first_comparison()):
                with contextlib.suppress(ValueError):  # the queue is full
                    self._greet()
            return self._welcome


def clears(events: Sequence[Any], told: gr.HTML) -> None:
    """What was said before goes as soon as one of the events happens: it stood beside the next error else. Done in the browser.

    To be declared before what the events do otherwise: in this order they happen.
    """
    gr.on(events, None, None, told, js=f"() => {json.dumps(render.message(''))}", **AT_ONCE)


async def sent(preview: str | None) -> None:
    """Wait as long as a preview takes on its way: Gradio keeps all that is yielded until the browser has it, so the rest would pile up."""
    if preview:
        await asyncio.sleep(len(preview) / LINK_BYTES_PER_S)


def streams(watch: Callable[..., AsyncIterator[Updates]]) -> Callable[..., AsyncIterator[Updates]]:
    """What a handler yields, so that a busy browser loses none of it.

    Gradio sends how each value differs from the one before, and its client changes that very dictionary, whether it was looked at or
    not: a button's update that is left out the next time may never be seen. So each one is repeated, which costs nothing on the way.
    What comes last is sent once more at the end; pictures are not, so it is the dictionaries alone.
    """

    @functools.wraps(watch)
    async def streamed(*inputs: Any) -> AsyncIterator[Updates]:
        dictionaries: Updates = {}
        async for news in watch(*inputs):
            dictionaries |= {widget: update for widget, update in news.items() if isinstance(update, dict)}
            yield {**dictionaries, **news}
        yield dictionaries

    return streamed


@contextlib.contextmanager
def page_errors() -> Iterator[None]:
    """Bad input becomes one sentence on the page or in the client."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(" ".join(str(error).split()), print_exception=False) from error
