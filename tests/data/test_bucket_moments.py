"""Moments of pictures in buckets: written in their own sizes, read back folded, and refused by other tasks."""

import json

import numpy as np
import pytest
from PIL import Image

from src.codecs.buckets import Buckets
from src.codecs.text import Bytes
from src.codecs.vision import Pixels
from src.data import buckets, pictures
from src.data.example import Example
from src.data.files.latent_shards import HELD, Encoding, Moments, moments_in_bucket
from src.data.files.shards import SEVERAL, pack
from src.data.pipeline.bad_rows import BadRow, Ledger
from src.data.prepare import Plan, prepare
from src.tools.latents import reader

GRIDS = ((4, 4), (2, 8), (8, 2))
PIXELS, LATENTS = Buckets(GRIDS, 4), Buckets(GRIDS, 2)
SIDES = [(20, 18), (9, 35), (40, 9), (17, 16), (8, 40), (33, 8), (16, 16), (12, 40), (4, 80)]
VISION = Pixels(8, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine pictures of three ratios, the last too narrow and another broken; captions, and documents of two."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, (height, width) in enumerate(SIDES):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"broken")
    captions = [{"image": f"{i}.png", "caption": f"picture {i}"} for i in range(len(SIDES))]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    lines = []
    for i in range(len(SIDES) - 1):
        seen = {"image": f"{(i + 2) % 8}.png", "role": "understand"}
        lines.append(json.dumps({"parts": [{"image": f"{i}.png"}, {"text": str(i)}, seen, {"image": f"{i + 1}.png"}]}))
    (folder / "documents.jsonl").write_text("\n".join(lines))
    return folder


def encode(pixels):
    """Stands for an autoencoder: one pixel of each four, as float16."""
    values = np.concatenate([pixels[:, ::2, ::2], pixels[:, 1::2, 1::2], pixels[:, ::2, 1::2, :2]], -1) / 16 - 3
    return values.astype(np.float16)


def captions(records="", moments=True, **options):
    shape = {"size": 8, "channels": 8, "patch": 2} if moments else {"size": 16, "patch": 4}
    return buckets.CaptionToImage(Bytes(), length=16, records=records, **{"buckets": GRIDS} | shape | options)


def documents(records="", moments=True, **options):
    shape = {"size": 8, "channels": 8, "patch": 2} if moments else {"size": 16, "patch": 4}
    more = {"images": 4, "pictures": 2, "vision": VISION, "buckets": GRIDS}
    return buckets.Documents(Bytes(), 160, records=records, **more | shape | options)


def write(task, out, batch):
    """As `tools.latents` does."""
    sizes, shapes = Buckets(tuple(map(PIXELS.pixels, GRIDS)), 1), []

    def counted(pixels):
        shapes.append(pixels.shape)
        return encode(pixels)

    moments = Moments(16, (8, 8, 8), "codec", tuple(map(LATENTS.pixels, GRIDS)))
    record = lambda kind, told, images: pack(told, *images, sized=kind in SEVERAL)
    plan = Encoding(moments, 100, batch, reader(16, sizes), counted, record)
    return prepare(task.open, out, plan), shapes


def rows_of(task):
    out = []
    for row in range(task.rows("train")):
        try:
            out.append(task.read("train", row))
        except BadRow as flaw:
            out += [] if flaw.rest is None else [flaw.rest]
    return out


def folded(image, grid):
    """What a row of moments holds where a row of pixels holds this image."""
    grid = tuple(grid.tolist())
    return LATENTS.fold(encode(PIXELS.unfold(image, grid)[None])[0], grid)


def of_documents(rows, change):
    """The generated images of each document, by its ids."""
    out = {}
    for row in rows:
        for number in range(1, row["segment"].max() + 1):
            own = [i for i, begin in enumerate(row["image_begins"]) if begin >= 0 and row["segment"][begin] == number]
            images = [change(row["image"][i], row["image_grid"][i]) for i in own]
            out[row["ids"][row["segment"] == number].tobytes()] = images
    return out


@pytest.mark.parametrize("make", [captions, documents])
@pytest.mark.parametrize("batch", [2, 3])
def test_moments_are_those_of_each_picture_in_its_bucket(folder, tmp_path, make, batch):
    files = make(moments=False, folder=folder)
    manifest, shapes = write(files, tmp_path / "out", batch)
    assert set(shapes) == {(batch, *PIXELS.pixels(grid), 3) for grid in GRIDS}
    drawn = 7 if make is captions else 10
    assert manifest["bad_rows"] == (2 if make is captions else 4) and len(shapes) <= drawn // batch + len(GRIDS)
    told = manifest["schema"]["image"]
    assert told["buckets"] == [[8, 8], [4, 16], [16, 4]] and told["shape"] == [8, 8, 8]
    found, wanted = rows_of(make(tmp_path / "out")), rows_of(files)
    assert {tuple(g) for row in found for g in row["image_grid"].reshape(-1, 2).tolist()} == set(GRIDS)
    if make is documents:  # without the bad ones they are packed anew
        have = of_documents(found, lambda image, grid: image)
        want = of_documents(wanted, folded)
        assert have.keys() == want.keys() and len(have) == 4
        np.testing.assert_array_equal(list(have.values()), [want[words] for words in have])
        return
    assert len(found) == len(wanted) == 7
    for have, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(have["image"], folded(want["image"], want["image_grid"]))
        np.testing.assert_array_equal(have["image_grid"], want["image_grid"])
        np.testing.assert_array_equal(have["ids"], want["ids"])


def test_other_buckets_and_damaged_sides_are_refused(folder, tmp_path):
    write(captions(moments=False, folder=folder), tmp_path / "out", 4)
    asked = r"holds moments of the buckets 8 x 8, 4 x 16, 16 x 4, and the task reads "
    assert captions(tmp_path / "out", buckets=((4, 4), (8, 2), (2, 8))).rows("train") == 7
    with pytest.raises(ValueError, match=asked + "the buckets 8 x 8, 4 x 16: write moments"):
        captions(tmp_path / "out", buckets=GRIDS[:2]).rows("train")
    with pytest.raises(ValueError, match=asked + "no buckets"):
        pictures.CaptionToImage(Bytes(), 8, 16, channels=8, records=tmp_path / "out").rows("train")
    path = tmp_path / "out" / "manifest.json"
    told = json.loads(path.read_text())
    for wrong in ([[8, 8], [4, 8]], [[8, 8], [64, "1"]], [[4, 16], [8, 8]], 3, [[8, 8], [0, 64]]):
        told["schema"]["image"]["buckets"] = wrong
        path.write_text(json.dumps(told))
        with pytest.raises(ValueError, match=r"no manifest of shards \(it"):
            captions(tmp_path / "out").rows("train")
    del told["schema"]["image"]["buckets"]
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="holds moments of no buckets"):
        captions(tmp_path / "out").rows("train")
    for data in (None, b"\x08\0", b"\x08\0\x10\0" + bytes(1024)):
        with pytest.raises(BadRow, match="the moments are of no bucket"):
            moments_in_bucket(data, [(8, 8)], 8, "here")
    with pytest.raises(BadRow, match="there are no such moments"):
        moments_in_bucket(b"\x08\0\x08\0" + bytes(1023), [(8, 8)], 8, "here")


def test_a_rare_size_does_not_hold_back_all_others():
    """The pictures in memory are at most so many, whatever comes."""
    asked = []

    class Source:
        kind = "captions"

        def __getitem__(self, row):
            asked.append(row)
            return Example("", {"row": row})

    shape = lambda row: PIXELS.pixels(GRIDS[row == 0])
    read = lambda kind, example: [np.full((*shape(example.told["row"]), 3), example.told["row"], np.uint8)]
    moments = Moments(16, (8, 8, 8), "codec", tuple(map(LATENTS.pixels, GRIDS)))
    write = lambda kind, told, images: bytes([told["row"]])
    plan = Encoding(moments, 100, 2, read, encode, write, threads=1)
    found = plan.records(Source(), range(100))
    assert next(found) == (0, b"\0") and len(asked) < 2 * HELD + 9
    assert list(found) == [(row, bytes([row])) for row in range(1, 100)]


def test_pictures_that_were_cut_to_squares_are_refused(folder, tmp_path):
    source = captions(moments=False, folder=folder)
    ledger = Ledger(tmp_path / "cut", share=1)
    prepare(source.open, tmp_path / "cut", Plan(rows=4, size=16), ledger=ledger)
    with pytest.raises(ValueError, match="were cut to squares of 16 pixels: prepare them anew without --size"):
        captions(tmp_path / "cut", moments=False).rows("train")
    assert pictures.CaptionToImage(Bytes(), 16, 16, records=tmp_path / "cut").rows("train") == 7
