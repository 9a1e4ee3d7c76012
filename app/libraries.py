"""Torch and diffusers: they take seconds to import, so the page answers before; and they must not be imported by two threads at once."""

import threading

_lock = threading.Lock()


def load_libraries() -> None:
    """Import what sampling needs, or wait until another thread has. To be called before `models` or `training` is imported late."""
    with _lock:
        import models.pipeline
        import models.registry  # noqa: F401
