"""Samplings that visitors ask for: they wait for the machine in one queue, can be watched, stopped, and looked at again later.

A sampling belongs to the page and not to the connection that asked: after a refresh the visitor finds it again by its id, which
nobody else can guess. One that nobody has looked at for a while is given up.
"""

import asyncio
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from app.sampler import Frame, Frames

WAITING, RUNNING, DONE, STOPPED, FAILED = "waiting", "running", "done", "stopped", "failed"
LOOK_S = 0.1  # how often watchers look
GIVEN_UP_S = 30.0  # without a watcher
MAX_WAITING, MAX_WAITING_EACH = 100, 4
MAX_KEPT, MAX_KEPT_BYTES = 400, 128 * 2**20  # finished ones


@dataclass(eq=False)
class Sampling:
    """A sampling on its way or finished.

    Attributes:
        id: to find it again.
        visitor: who asked.
        work: gives the frames.
        about: what was asked for, to ask again.
        state: one of the words above.
        frame: the newest one.
        message: why it failed.
        lasting: nobody needs to watch it, and it is kept as long as the page runs.
    """

    id: str
    visitor: str
    work: Callable[[], Frames] = field(repr=False)
    about: Any = None
    state: str = WAITING
    frame: Frame | None = field(default=None, repr=False)
    message: str = ""
    lasting: bool = False
    stop_asked: bool = False
    seen_at: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        return self.state in (DONE, STOPPED, FAILED)

    @property
    def result(self) -> Frame:
        """The last frame, of one that is done."""
        assert self.frame is not None
        return self.frame

    @property
    def ending(self) -> str:
        """How it ended, for the status line of the visitor."""
        return {DONE: "Done.", FAILED: self.message}.get(self.state, "Stopped.")

    @property
    def unwanted(self) -> bool:
        """Stopped by its visitor, or left alone."""
        return self.stop_asked or (not self.lasting and time.monotonic() - self.seen_at > GIVEN_UP_S)


class Studio:
    """The queue, and what came of it. Any number of threads may use it."""

    def __init__(self) -> None:
        self._samplings: OrderedDict[str, Sampling] = OrderedDict()
        self._waiting: deque[Sampling] = deque()
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None

    def ask(self, work: Callable[[], Frames], visitor: str, about: Any = None, lasting: bool = False) -> Sampling:
        """Queue a sampling.

        Args:
            work: called when its turn has come; its frames are taken one by one, and closed when it is stopped.
            visitor: nobody may have more than `MAX_WAITING_EACH` on their way.
            about, lasting: see `Sampling`.

        Raises:
            ValueError: too many wait already.
        """
        with self._changed:
            own = sum(not each.over and each.visitor == visitor for each in self._samplings.values())
            if own >= MAX_WAITING_EACH:
                raise ValueError(f"{own} samplings of yours are on their way already; wait for one, or stop it")
            if len(self._waiting) >= MAX_WAITING:
                raise ValueError(f"{MAX_WAITING} samplings wait for this machine already; try again later")
            sampling = Sampling(secrets.token_urlsafe(12), visitor, work, about, lasting=lasting)
            self._samplings[sampling.id] = sampling
            self._waiting.append(sampling)
            self._forget()
            if self._worker is None:
                self._worker = threading.Thread(target=self._run, daemon=True, name="studio")
                self._worker.start()
            self._changed.notify()
        return sampling

    def find(self, id: Any) -> Sampling | None:
        """The sampling of that id, if it is kept still."""
        return self._samplings.get(id) if isinstance(id, str) else None

    def kept(self, id: Any) -> Sampling:
        """As `find`; ValueError if it is not kept any more."""
        sampling = self.find(id)
        if sampling is None:
            raise ValueError("this sampling is not kept any more; ask for it again")
        return sampling

    def position(self, sampling: Sampling) -> int:
        """How many come before it; 0 for the one that runs, and for those that are over."""
        with self._changed:
            if sampling not in self._waiting:
                return 0
            return self._waiting.index(sampling) + any(each.state == RUNNING for each in self._samplings.values())

    def stop(self, id: Any) -> None:
        """End a sampling within a step, or take it out of the queue."""
        with self._changed:
            sampling = self.find(id)
            if sampling is None or sampling.over:
                return
            sampling.stop_asked = True
            if sampling in self._waiting:
                self._waiting.remove(sampling)
                sampling.state = STOPPED

    def leave(self, id: Any) -> None:
        """Stop a sampling for a visitor that it is not wanted by any more; one that nobody asked for is for all, and goes on."""
        sampling = self.find(id)
        if sampling is not None and not sampling.lasting:
            self.stop(id)

    async def watch(self, sampling: Sampling) -> AsyncIterator[tuple[str, Frame | None, int]]:
        """State, newest frame and position, whenever one of them has changed, until it is over."""
        told = None
        while True:
            sampling.seen_at = time.monotonic()
            state, frame = sampling.state, sampling.frame  # in this order: the last frame comes before its state
            now = state, frame, self.position(sampling)
            if now != told:
                yield now
                told = now
            if state in (DONE, STOPPED, FAILED):
                return
            await asyncio.sleep(LOOK_S)

    async def finished(self, sampling: Sampling) -> Frame:
        """Wait for the last frame.

        Raises:
            ValueError: it failed or was stopped.
        """
        async for _ in self.watch(sampling):
            pass
        if sampling.state != DONE:
            raise ValueError(sampling.message or "the sampling was stopped")
        return sampling.result

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                sampling = self._waiting.popleft()
                sampling.state = RUNNING
            sampling.state = STOPPED if sampling.unwanted else self._take(sampling)

    def _take(self, sampling: Sampling) -> str:
        """Sample to the end; returns the state that it ends in."""
        try:
            with closing(sampling.work()) as frames:
                for frame in frames:
                    sampling.frame = frame
                    if sampling.unwanted and not frame.done:
                        return STOPPED
            return DONE
        except (ValueError, OSError) as error:
            sampling.message = " ".join(str(error).split())
        except Exception as error:  # whatever it is, the next one has its turn
            print(f"a sampling failed: {type(error).__name__}: {error}", flush=True)
            sampling.message = "the sampling broke down; ask for fewer images, or for another checkpoint"
        return FAILED

    def _forget(self) -> None:
        """The oldest that are over, where too many are kept. Only with the lock."""
        over = [each for each in self._samplings.values() if each.over and not each.lasting]
        held = sum(each.frame.num_bytes for each in over if each.frame)
        for sampling in over:
            if len(self._samplings) <= MAX_KEPT and held <= MAX_KEPT_BYTES:
                return
            held -= sampling.frame.num_bytes if sampling.frame else 0
            del self._samplings[sampling.id]
