"""Many people at once.

FADING_SHORTCUTS_LOAD_S=300 keeps fifty of them busy for five minutes instead of a few seconds.
"""

import base64
import io
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from gradio_client import Client
from PIL import Image

from app.sampler import sample
from app.settings import Comparison
from tests.screenshot import app_server
from tests.tiny_pair import PAIR, write_pair

PEOPLE, WISHES = 20, 2
CROWD, CROWD_S = 50, float(os.environ.get("FADING_SHORTCUTS_LOAD_S", 10))
SETTINGS = dict(label="squares", num_images=4, steps=3, guidance_scale=2.0, sampler="euler")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("load") / "runs")


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[str]:
    with app_server(runs, "--no-training") as url:
        yield url


def memory_of(url: str) -> int:
    """Bytes of the page's process that nobody else has."""
    port = url.split(":")[2].strip("/")
    page = next(each for each in psutil.process_iter(["cmdline"]) if {"app", port} <= set(each.info["cmdline"] or ()))
    return page.memory_full_info().uss


def visitors(url: str, how_many: int) -> list[Client]:
    """They share one processor with the page: without certificates, which every request would read anew, they leave it most of it."""
    return [Client(url, verbose=False, ssl_verify=False, httpx_kwargs={"timeout": 60}) for _ in range(how_many)]


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


@pytest.mark.slow
def test_twenty_people_get_their_own_images_and_memory_stays(server: str, runs: Path) -> None:
    people = visitors(server, PEOPLE)
    people[0].predict(list(PAIR), seed=0, **SETTINGS, api_name="/compare")  # loads the libraries
    idle = memory_of(server)

    def ask(person: int) -> list[list[list[np.ndarray]]]:
        asked = [people[person].submit(list(PAIR), seed=100 * person + wish, **SETTINGS, api_name="/compare") for wish in range(WISHES)]
        return [[[pixels(image) for image in images] for images in each.result(timeout=300)[0]] for each in asked]

    with ThreadPoolExecutor(PEOPLE) as together:
        answers = list(together.map(ask, range(PEOPLE)))
    for person, wishes in enumerate(answers):
        for wish, images in enumerate(wishes):
            *_, expected = sample(Comparison.of_names(PAIR, seed=100 * person + wish, **SETTINGS), runs)
            for got, wanted in zip(images, expected.images, strict=True):
                assert np.abs(np.stack(got).astype(int) - wanted).max() <= 8, "another process may round otherwise"
    assert memory_of(server) < 1.5 * idle


@pytest.mark.slow
def test_fifty_people_keep_asking_without_an_error_and_memory_is_flat(server: str, runs: Path) -> None:
    people = visitors(server, CROWD)
    seeds = range(4)  # few, so that every answer can be checked
    expected = {}
    for seed in seeds:
        *_, last = sample(Comparison.of_names(PAIR, seed=seed, **SETTINGS), runs)
        expected[seed] = np.stack(last.images).astype(int)
    people[0].predict(list(PAIR), seed=0, **SETTINGS, api_name="/compare")  # loads the libraries
    used, ends = [memory_of(server)], time.monotonic() + CROWD_S

    def keep_asking(person: int) -> list[float]:
        waited: list[float] = []
        while not waited or time.monotonic() < ends:
            began, seed = time.monotonic(), (person + len(waited)) % len(seeds)
            images, *_ = people[person].predict(list(PAIR), seed=seed, **SETTINGS, api_name="/compare")
            waited.append(time.monotonic() - began)
            got = np.stack([[pixels(image) for image in side] for side in images]).astype(int)
            assert np.abs(got - expected[seed]).max() <= 8, "another process may round otherwise"
            if person == 0:
                used.append(memory_of(server))
        return waited

    with ThreadPoolExecutor(CROWD) as together:
        waited = [seconds for each in together.map(keep_asking, range(CROWD)) for seconds in each]
    print(f"{len(waited)} comparisons, median wait {statistics.median(waited):.1f} s, longest {max(waited):.1f} s, memory in MiB:")
    print(*(f"{each / 2**20:.0f}" for each in used))
    assert len(waited) >= CROWD
    third = len(used) // 3
    if third >= 3:  # what a page needs is there after the first third of the time
        assert max(used[-third:]) < 1.1 * max(used[third:-third]), "memory grows with the number of comparisons"
    assert used[-1] < 1.5 * used[0]
