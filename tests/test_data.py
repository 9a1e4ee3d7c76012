"""The embedded data set, folders, parquet; modes, sizes, faults."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, script_environment
from training.augment import with_crops
from training.data import Order, ReadAhead, copied, in_unit_range
from training.images import to_rgb
from training.openmoji import draw, emoji_groups, family, motifs
from training.packing import cache_dir, load_images


@pytest.fixture(scope="module")
def splits() -> dict:
    return {split: load_images("openmoji", 16, split) for split in ("train", "validation", "all")}


def test_openmoji_has_all_groups_with_labels(splits: dict) -> None:
    data = splits["all"]
    assert data.images.shape == (3529, 16, 16, 3) and data.images.dtype == np.uint8
    assert data.class_names[0] == "Smileys & Emotion" and data.num_classes == 9
    assert np.bincount(data.labels).tolist() == [len(members) for members in emoji_groups().values()]


def test_openmoji_splits_are_a_partition_with_every_class_on_both_sides(splits: dict) -> None:
    train, validation = splits["train"], splits["validation"]
    assert len(train) + len(validation) == 3529
    assert 0.05 < len(validation) / 3529 < 0.2
    assert np.bincount(train.labels, minlength=9).min() > 0
    assert np.bincount(validation.labels, minlength=9).min() > 0


def test_no_validation_picture_has_a_near_duplicate_in_training(splits: dict) -> None:
    train, validation = (splits[split].images.reshape(len(splits[split]), -1).astype(np.float32) / 255 for split in ("train", "validation"))
    mse = ((train**2).sum(1) + (validation**2).sum(1)[:, None] - 2 * validation @ train.T) / train.shape[1]
    assert mse.min() > 5e-3


def test_variants_are_one_motif() -> None:
    assert family("👍🏿") == family("👍")
    assert family("👩🏽‍🚀") == family("👨‍🚀") == family("🧑‍🚀")
    assert family("🏃‍♀️‍➡️") == family("🏃")
    assert family("🚗") != family("🚕")
    clocks_and_twin_flags = motifs(["🕐", "🕑", "🇳🇴", "🇧🇻", "🍎"])
    assert clocks_and_twin_flags.tolist() == [0, 0, 2, 2, 4]


def test_every_emoji_is_drawn() -> None:
    images = draw([emoji for members in emoji_groups().values() for emoji in members], 16)
    assert (images.reshape(len(images), -1).min(1) < 230).all(), "a blank picture: the font lacks the emoji"
    assert draw(["🍎"], 50).shape == (1, 50, 50, 3)
    red, green, blue = draw(["🍎"], 32)[0, 20, 16].astype(int)
    assert red > 150 > max(green, blue), "colours are lost"


def test_packs_are_made_once(splits: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.openmoji.openmoji", lambda *_: pytest.fail("drawn again"))
    again = load_images("openmoji", 16, "train")
    assert np.array_equal(again.images, splits["train"].images)
    assert again.fingerprint == splits["train"].fingerprint != splits["validation"].fingerprint


def test_folders_give_classes_and_any_mode_becomes_rgb(image_folder: Path) -> None:
    data = load_images(str(image_folder), 8)
    assert data.images.shape == (24, 8, 8, 3)
    assert data.class_names == ("cold", "warm")
    assert np.bincount(data.labels).tolist() == [12, 12]


def test_batches_are_the_same_from_a_copy_on_the_device(image_folder: Path) -> None:
    data, cpu = load_images(str(image_folder), 16), torch.device("cpu")
    assert data.held(cpu) is data, "in memory already"
    held = replace(data, on_device=copied(data.images, cpu), images=np.zeros_like(data.images))
    assert not isinstance(held.reader(0, 1), ReadAhead), "there is nothing to read"
    for min_scale in (1, 0.3):
        one, other = (
            with_crops(each, min_scale).batch(each.rows(np.array([7, 0, 23])), cpu, torch.Generator().manual_seed(0), flip=True)
            for each in (data, held)
        )
        assert one.keys() == other.keys() == {"images", "labels"}
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_fits_is_held_on_a_gpu(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_images(str(image_folder), 16)
    monkeypatch.setattr("training.data.copied", lambda array, device: (array.nbytes, device.type))
    for free, expected in ((8 * data.images.nbytes, (data.images.nbytes, "cuda")), (8 * data.images.nbytes - 8, None)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _, free=free: (free, 2 * free))
        assert data.held(torch.device("cuda")).on_device == expected


def test_rows_are_read_while_the_step_runs(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_images(str(image_folder), 16)
    read, rows_of = [], type(data).rows
    monkeypatch.setattr(type(data), "rows", lambda self, indices: read.append(indices.tolist()) or rows_of(self, indices))
    reader, order = data.reader(seed=3, batches_a_step=1), Order(len(data), seed=3)
    with closing(reader):
        # two processes with batches of 4, of which this is the second; then it goes on elsewhere, with batches of another size
        for count, positions in ((4, range(4, 100, 8)), (6, (30, 0, 6, 12))):
            for position in positions:
                before = len(read)
                rows, where = reader.rows(position, count), order.indices(position, count)
                assert np.array_equal(rows.samples, data.images[where]) and rows.labels.tolist() == data.labels[where].tolist()
                reader.thread.submit(int).result()  # what was begun is done
                if count == 4 and position > 12:
                    assert read[before:] == [order.indices(position + 8, 4).tolist()], "the next batch, and none twice"


def test_what_cannot_be_read_is_told(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_images(str(image_folder), 16)
    monkeypatch.setattr(type(data), "rows", lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
    with closing(data.reader(0, 1)) as reader, pytest.raises(OSError, match="the disk is gone"):
        reader.rows(0, 4)


@pytest.mark.parametrize("file", ["labels.npy", "images.npy", "data.json"])
def test_a_damaged_pack_is_told_with_its_remedy(file: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_images(str(image_folder), 8)
    (path,) = tmp_path.rglob(file)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=f"are damaged .* delete {path.parent}, and they are made anew"):
        load_images(str(image_folder), 8)
    shutil.rmtree(path.parent)
    assert len(load_images(str(image_folder), 8)) == 24


def test_pixels_are_scaled_and_some_are_turned_round() -> None:
    pixels = torch.randint(256, (5, 4, 6, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    expected = pixels.double() / 127.5 - 1
    for mirrored in ([True, False, True, False, False], [False] * 5, [True] * 5):
        turned = torch.stack([image.flip(2) if turn else image for image, turn in zip(expected, mirrored, strict=True)])
        found = in_unit_range(pixels, torch.tensor(mirrored))
        assert found.is_contiguous() and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), turned, rtol=0, atol=1e-7)
    torch.testing.assert_close(in_unit_range(pixels, None).double(), expected, rtol=0, atol=1e-7)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / f"{i}.png")
    data = load_images(str(tmp_path), 4)
    assert data.labels is None and data.num_classes == 0
    assert sorted(data.images[:, 0, 0, 0].tolist()) == [0, 1, 2]


def test_split_folders_are_found(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        (tmp_path / split / "x").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4)).save(tmp_path / split / "x" / f"{i}.png")
    assert [len(load_images(str(tmp_path), 4, split)) for split in ("train", "validation", "all")] == [3, 2, 5]


def test_parquet_folders(tmp_path: Path) -> None:
    import datasets

    images = [Image.new("RGB", (5, 5), (i, i, i)) for i in range(6)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    table = datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(6)]}, features)
    table.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    data = load_images(str(tmp_path), 5)
    assert data.class_names == ("even", "odd")
    assert data.labels.tolist() == [0, 1] * 3
    assert data.images[:, 0, 0, 0].tolist() == list(range(6))
    with pytest.raises(ValueError, match=r"no column 'picture'.*image, label"):
        load_images(str(tmp_path), 5, image_column="picture")
    with pytest.raises(ValueError, match="only train"):
        load_images(str(tmp_path), 5, "validation")


def test_missing_labels_are_counted(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (5, 5))] * 3, "label": [0, None, None]},
        datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    table.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"image 1 has no label \(2 in all"):
        load_images(str(tmp_path), 5)


def test_transparency_lies_on_white_and_16_bits_are_scaled() -> None:
    assert to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 255))).getpixel((0, 0)) == (255, 0, 0)
    assert to_rgb(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)
    assert to_rgb(Image.fromarray(np.full((1, 1), 65535, np.uint16))).getpixel((0, 0)) == (255, 255, 255)


def test_photographs_stand_upright() -> None:
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    image.getexif()[0x0112] = 6  # turned by 90 degrees
    assert to_rgb(image).size == (1, 2)


def test_columns_of_another_kind_are_named(tmp_path: Path) -> None:
    import datasets

    table = {"image": [Image.new("RGB", (5, 5))] * 2, "label": [0, 1], "box": [[1, 2], [3, 4]]}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("int64"), "box": datasets.List(datasets.Value("int64"))}
    )
    datasets.Dataset.from_dict(table, features).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"'label'.*holds no images"):
        load_images(str(tmp_path), 5, image_column="label")
    with pytest.raises(ValueError, match=r"'box'.*holds no labels"):
        load_images(str(tmp_path), 5, label_column="box")


def test_processes_that_need_the_same_pack_wait_for_one(image_folder: Path, tmp_path: Path, run_script: Callable) -> None:
    program = f"from training.packing import load_images; print(load_images({str(image_folder)!r}, 6).fingerprint)"
    environment = {**script_environment(), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", program]
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    prints = {process.communicate()[0] for process in processes}
    assert all(process.returncode == 0 for process in processes) and len(prints) == 1


def test_the_centre_is_kept(tmp_path: Path) -> None:
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (load_images(str(tmp_path), 4).images == 200).all()


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images"):
        load_images(str(tmp_path), 8)
    (tmp_path / "good.png").touch()
    with pytest.raises(ValueError, match=r"good\.png cannot be read as an image"):
        load_images(str(tmp_path), 8)
    with pytest.raises(ValueError, match="is a file"):
        load_images(str(tmp_path / "good.png"), 8)
    with pytest.raises(ValueError, match="no folder 'nowhere/to/be/found'"):
        load_images("nowhere/to/be/found", 8)
    with pytest.raises(ValueError, match="no split 'test'"):
        load_images("openmoji", 8, "test")
    with pytest.raises(ValueError, match="GiB"):
        load_images("openmoji", 1_000_000)
    assert not list(cache_dir().rglob("*.partial*")), "a pack was left half-written"


def test_what_a_killed_packing_left_is_removed(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "a.png")
    pack = Path(load_images(str(tmp_path), 4).images.filename).parent
    shutil.rmtree(pack)
    left = pack.with_name(f".{pack.name}.partial-1")
    left.mkdir()
    assert load_images(str(tmp_path), 4).images[0, 0, 0].tolist() == [0, 0, 255]
    assert pack.is_dir() and not left.exists()


def test_a_changed_folder_is_packed_anew(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    before = load_images(str(tmp_path), 4)
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "a.png")
    os.utime(tmp_path / "a.png", (1, 1))
    after = load_images(str(tmp_path), 4)
    assert before.fingerprint != after.fingerprint
    assert after.images[0, 0, 0].tolist() == [0, 0, 255]
