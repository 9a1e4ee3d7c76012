"""Retake the picture of the page: python -m tests.screenshot OUT.png [--runs DIR] [--width PX]"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).parent.parent
CHROMIUM_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PATIENCE_MS = 120_000  # the first comparison may wait for torch to load on a busy machine


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def app_server(runs: Path, *flags: str, mkdir: bool = False) -> Iterator[str]:
    """Run `python -m app` until it is ready; yields its address. With `mkdir` over a new folder of runs."""
    if mkdir:
        runs.mkdir(parents=True)
    port = free_port()
    command = [sys.executable, "-m", "app", "--runs", str(runs), "--port", str(port), "--nice", "0", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if "is ready on" in line:
                    break
            else:
                raise RuntimeError("the page did not start:\n" + "".join(lines))
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, headless."""
    executable = shutil.which("chromium")
    if executable is None:
        raise RuntimeError("there is no chromium; install Debian's package")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def open_page(page: Page, url: str) -> None:
    """Open the page and wait for the comparison that it begins with."""
    page.goto(url)
    expect(page.locator("#status")).to_contain_text("images in", timeout=PATIENCE_MS)
    page.locator("table.cards").wait_for(timeout=PATIENCE_MS)


def main() -> None:
    """The command line."""
    flags = argparse.ArgumentParser(prog="python -m tests.screenshot", description=__doc__)
    flags.add_argument("output", type=Path)
    flags.add_argument("--runs", help="folder of runs (default: %(default)s)", type=Path, default=Path("runs"))
    flags.add_argument("--width", help="pixels (default: %(default)s)", type=int, default=1280)
    flags.add_argument("--height", help="pixels (default: %(default)s)", type=int, default=1000)
    flags.add_argument("--dark", action="store_true")
    flags.add_argument("--tab", default="Compare", help="(default: %(default)s)")
    flags.add_argument("--view", choices=("Side by side", "Slider", "Flicker", "Difference"), default="Side by side")
    parsed = flags.parse_args()
    with app_server(parsed.runs.resolve()) as url, chromium() as browser:
        page = browser.new_page(viewport={"width": parsed.width, "height": parsed.height}, color_scheme="dark" if parsed.dark else "light")
        open_page(page, url)
        page.get_by_label(parsed.view, exact=True).check()
        page.get_by_role("tab", name=parsed.tab, exact=True).click()
        page.wait_for_timeout(2000)  # until lists are filled and transitions over
        parsed.output.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=parsed.output)
    print(f"wrote {parsed.output}")


if __name__ == "__main__":
    main()
