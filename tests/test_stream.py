"""Training from streams: every image once an epoch, whoever reads it, and from where a run was left."""

import inspect
import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from models.pipeline import Pipeline
from tests.processes import run_together
from training.packing import load_images
from training.stream import ImageStream, Streams, at_hand, open_stream

COUNT, SHARDS = 48, 4
FLAGS = "--resolution 16 --size XS --patch_size 8 --alpha_min 0.6 --train_batch_size 4 --mixed_precision no --report_to none"
MORE = "--logging_steps 1 --sample_steps 0 --checkpointing_steps 3 --shuffle_buffer 5 --streaming"


def picture(number: int) -> Image.Image:
    """One whose pixels tell its number."""
    return Image.new("RGB", (16, 16), (5 * number, 255 - 5 * number, 100))


def numbers(images: np.ndarray) -> list[int]:
    return [int(image[0, 0, 0]) // 5 for image in images]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four parquet files; the label of image i is i % 3."""
    folder = tmp_path_factory.mktemp("shards")
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "green", "blue"])})
    for shard in range(SHARDS):
        mine = range(shard * COUNT // SHARDS, (shard + 1) * COUNT // SHARDS)
        table = datasets.Dataset.from_dict({"image": [picture(i) for i in mine], "label": [i % 3 for i in mine]}, features=columns)
        table.to_parquet(folder / f"train-{shard:05}-of-{SHARDS:05}.parquet")
    return folder


@pytest.fixture(scope="module")
def stream(shards: Path) -> ImageStream:
    return open_stream(str(shards), 16, "train", "image", None, shuffle_buffer=5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])  # fewer than files, uneven, as many, more
def test_streams_share_out_every_image_once_an_epoch_and_draw_a_new_order(stream: ImageStream, count: int) -> None:
    streams = Streams(stream, seed=0, count=count)
    epochs = []
    for epoch in range(2):
        parts = [streams.part(number) for number in range(count)]
        for part in parts:
            part.set_epoch(epoch)
        epochs.append([numbers([stream.decode(row) for row in part]) for part in parts])
    for parts in epochs:
        assert sorted(number for part in parts for number in part) == list(range(COUNT))
    assert epochs[0] != epochs[1]
    assert epochs[0] != [sorted(part) for part in epochs[0]], "shuffled"


def test_a_batch_holds_the_images_with_their_labels(stream: ImageStream) -> None:
    generator = torch.Generator().manual_seed(0)
    reader, seen = stream.reader(seed=1, batches_a_step=2), []
    for position in range(0, 2 * COUNT, 8):
        batch = stream.batch(reader.rows(position, 8), torch.device("cpu"), generator, flip=True)
        found = numbers(((batch["images"].permute(0, 2, 3, 1) + 1) * 127.5).round().numpy())
        assert batch["labels"].tolist() == [number % 3 for number in found]
        seen += found
    assert sorted(seen) == sorted([*range(COUNT)] * 2)
    assert stream.class_names == ("red", "green", "blue")
    assert stream.some(4).shape == (4, 3, 16, 16)


def test_streams_go_on_where_they_were(stream: ImageStream) -> None:
    """Within the second epoch, whatever was read ahead."""
    whole, begun, resumed = (stream.reader(seed=3, batches_a_step=2) for _ in range(3))
    expected = [numbers(whole.rows(position, 5).samples) for position in range(0, 150, 5)]
    for position in range(0, 70, 5):
        begun.rows(position, 5)
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict()), object_hook=_whole_keys))
    assert [numbers(resumed.rows(position, 5).samples) for position in range(70, 150, 5)] == expected[14:]


def _whole_keys(found: dict) -> dict:
    return {int(key) if key.isdigit() else key: value for key, value in found.items()}


def test_folders_and_archives_stream_as_they_pack(tmp_path: Path) -> None:
    folder, archives = tmp_path / "folder", tmp_path / "archives"
    archives.mkdir()
    for shard in range(2):
        with tarfile.open(archives / f"train-{shard}.tar", "w") as archive:
            for i in range(6 * shard, 6 * shard + 6):
                path = folder / f"kind{i % 2}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(i).save(path)
                for name, content in ((f"{i:03}.png", path.read_bytes()), (f"{i:03}.cls", str(10 * (i % 2)).encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    for name, image_column, label_column, class_names in (
        (folder, "image", None, ("kind0", "kind1")),
        (archives, "png", "cls", ("0", "10")),
    ):
        stream = open_stream(str(name), 16, "train", image_column, label_column, shuffle_buffer=100)
        packed = load_images(str(name), 16, "train", image_column, label_column)
        assert stream.class_names == packed.class_names == class_names
        rows = stream.reader(seed=0, batches_a_step=1).rows(0, 12)
        assert dict(zip(numbers(rows.samples), rows.labels.tolist(), strict=True)) == {i: i % 2 for i in range(12)}
        assert dict(zip(numbers(packed.images), packed.labels.tolist(), strict=True)) == {i: i % 2 for i in range(12)}


def test_the_fingerprint_follows_the_files(shards: Path, stream: ImageStream, tmp_path: Path) -> None:
    def fingerprint(resolution: int, *names: str) -> str:
        folder = tmp_path / "-".join(names)
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).write_bytes((shards / name).read_bytes())
        return open_stream(str(folder), resolution, "train", "image", None, 5).fingerprint

    every = [path.name for path in sorted(shards.iterdir())]
    assert fingerprint(16, *every) == stream.fingerprint, "wherever they are"
    assert len({stream.fingerprint, fingerprint(16, *every[:3]), fingerprint(8, *every)}) == 3


def test_what_streams_cannot_do_is_told(shards: Path, stream: ImageStream, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="openmoji is drawn once and packed; leave --streaming away"):
        open_stream("openmoji", 16, "train", "image", None, 5)
    with pytest.raises(ValueError, match="has no column 'picture'"):
        open_stream(str(shards), 16, "train", "picture", None, 5)
    with pytest.raises(ValueError, match="--vae needs all images at hand"):
        at_hand(stream, "--vae")
    picture(1).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    broken = open_stream(str(tmp_path), 16, "train", "image", None, 5)
    with pytest.raises(ValueError, match=r"bad\.png cannot be read as an image"):
        broken.reader(0, 1).rows(0, 2)
    with pytest.raises(ValueError, match="an image of some is missing; mend or remove it"):
        replace(broken, name="some").decode({"image": None})
    with pytest.raises(ValueError, match="no images for one of 3 streams"):
        broken.reader(0, 3).rows(4, 2)


def test_packing_does_not_hold_the_images(tmp_path: Path) -> None:
    columns = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": [picture(i % 50) for i in range(1000)]}, features=columns).to_parquet(tmp_path / "train.parquet")
    load_images(str(tmp_path), 4)  # what libraries keep
    tracemalloc.start()
    try:
        images = load_images(str(tmp_path), 96).images
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < images.nbytes / 2, "of 28 MB"
    assert numbers(images) == [i % 50 for i in range(1000)]


def run_flags(shards: Path, run: Path) -> list[object]:
    return ["training/train_diffusion.py", "--train_data_dir", shards, *FLAGS.split(), *MORE.split(), "--output_dir", run]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_that_stream_are_one_and_go_on_as_if_never_stopped(shards: Path, run_here: Callable, tmp_path: Path) -> None:
    """Seven steps of 16 images: into the third epoch. Stopped after the first, in the middle of files."""
    alone, resumed, spread = (tmp_path / name for name in ("alone", "resumed", "spread"))
    assert run_here(*run_flags(shards, alone), "--gradient_accumulation_steps", 4, "--max_train_steps", 7)[0] == 0
    assert run_here(*run_flags(shards, resumed), "--gradient_accumulation_steps", 4, "--max_train_steps", 4)[0] == 0
    more = ["--gradient_accumulation_steps", 4, "--max_train_steps", 7, "--resume_from_checkpoint", "latest"]
    assert run_here(*run_flags(shards, resumed), *more)[0] == 0
    for steps, flags in ((2, []), *((steps, ["--resume_from_checkpoint", "latest"]) for steps in (4, 7))):  # resumed, and once more
        done = run_together(2, *run_flags(shards, spread), "--gradient_accumulation_steps", 2, "--max_train_steps", steps, *flags)
        assert done.returncode == 0, done.stderr

    assert losses(resumed) == losses(alone)
    np.testing.assert_allclose(losses(spread), losses(alone), rtol=1e-5)
    one, again, two = (Pipeline.from_pretrained(run, ema=False).model.state_dict() for run in (alone, resumed, spread))
    for name in one:
        assert torch.equal(again[name], one[name])
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6)


def test_nothing_of_a_stream_stays_open(stream: ImageStream) -> None:
    streams = Streams(stream, seed=0, count=2)
    for batch in range(4):
        streams.rows(4 * batch, 4)
    rows = [each.rows for each in streams.opened.values()]
    streams.close()
    assert [inspect.getgeneratorstate(each) for each in rows] == [inspect.GEN_CLOSED] * 2


@pytest.mark.slow
def test_a_process_that_streamed_ends_well(shards: Path, run_script: Callable, tmp_path: Path) -> None:
    """In the middle of an epoch, and at an image that cannot be read; Arrow is known to crash then."""
    done = run_script(*run_flags(shards, tmp_path / "run"), "--max_train_steps", 1)
    assert done.returncode == 0, done.stderr
    images = [{"bytes": b"no image", "path": None}] * 48
    broken = datasets.Dataset.from_dict({"image": images}, features=datasets.Features(image=datasets.Image()))
    (tmp_path / "broken").mkdir()
    broken.to_parquet(tmp_path / "broken/train-00000-of-00001.parquet")
    done = run_script(*run_flags(tmp_path / "broken", tmp_path / "other"), "--max_train_steps", 1)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "error:" in done.stderr, done.stderr


def test_an_autoencoder_trains_from_a_stream(shards: Path, run_here: Callable, tmp_path: Path) -> None:
    flags = "--resolution 16 --size XS --patch_size 4 --train_batch_size 4 --mixed_precision no --max_train_steps 2 --sample_steps 2"
    command = ["training/train_mae.py", "--train_data_dir", shards, *flags.split(), "--report_to", "none", "--streaming"]
    code, _, errors = run_here(*command, "--output_dir", tmp_path / "run")
    assert code == 0, errors
    assert (tmp_path / "run" / "samples" / "step-2.png").is_file()
    code, _, errors = run_here(*command, "--output_dir", tmp_path / "other", "--probe_every", 1)
    assert code == 2
    assert "--probe_every needs all images at hand, and --streaming does not keep them" in errors
