"""Twenty people at once."""

import base64
import io
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

PEOPLE, WISHES = 20, 3
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


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


@pytest.mark.slow
def test_twenty_people_get_their_own_images_and_memory_stays(server: str, runs: Path) -> None:
    people = [Client(server, verbose=False) for _ in range(PEOPLE)]
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
