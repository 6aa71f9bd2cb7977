"""Moments of pictures in buckets: written in their own sizes, read back folded, and refused by other tasks."""

import json

import numpy as np
import pytest
from PIL import Image

from src.codecs.buckets import Buckets
from src.codecs.pixels import Pixels
from src.data.example import BadRow, Example
from src.data.files.latent_shards import HELD, Encoding, Moments, moments_in_bucket
from src.data.files.shards import SEVERAL, pack, values_of
from src.data.pipeline.bad_rows import Ledger
from src.data.prepare import ShardPlan, prepare
from src.data.sources.captions import Captions
from src.data.sources.documents import Documents
from src.data.sources.records import Records
from src.data.task import SourceTask
from src.data.templates.caption_to_image import CaptionToImage
from src.data.templates.packed import Packed
from src.tools.latents import reader
from tests.helpers.fields import field, patches, table

GRIDS = ((4, 4), (2, 8), (8, 2))
PIXELS, LATENTS = Buckets(GRIDS, 4), Buckets(GRIDS, 2)
SIDES = [(20, 18), (9, 35), (40, 9), (17, 16), (8, 40), (33, 8), (16, 16), (12, 40), (4, 80)]
VISION = field("vision", Pixels(8, 8, fit="letterbox"), patches(4))


class Autoencoder:
    """A frozen network that makes latents [8, 8, 4] of images of 16 x 16."""

    where, spec, shape = "frozen", None, (8, 8, 4)


LATENT = field("image", Pixels(16, 16), Autoencoder(), patches(2))


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


def task(source, template):
    return SourceTask("t", source, template, table(vision=VISION, image=LATENT))


def captions(source, buckets=GRIDS):
    return task(source, CaptionToImage(16, buckets=buckets))


def documents(source, buckets=GRIDS):
    return task(source, Packed(160, images=4, visions=2, buckets=buckets))


def records(folder):
    return Records(folder, moments=True)


def write(source, out, batch):
    """As `tools.latents` does."""
    sizes, shapes = Buckets(tuple(map(PIXELS.pixels, GRIDS)), 1), []

    def counted(pixels):
        shapes.append(pixels.shape)
        return encode(pixels)

    moments = Moments(16, (8, 8, 8), "codec", tuple(map(LATENTS.pixels, GRIDS)))
    record = lambda kind, example, images: pack(values_of(example, kind), *images, sized=kind in SEVERAL)
    plan = Encoding(moments, 100, batch, reader(16, sizes), counted, record)
    return prepare(source, out, plan), shapes


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
            own = [i for i, begin in enumerate(row["image/begins"]) if begin >= 0 and row["segment"][begin] == number]
            images = [change(row["image"][i], row["image/grid"][i]) for i in own]
            out[row["text/ids"][row["segment"] == number].tobytes()] = images
    return out


@pytest.mark.parametrize("make", [captions, documents])
@pytest.mark.parametrize("batch", [2, 3])
def test_moments_are_those_of_each_picture_in_its_bucket(folder, tmp_path, make, batch):
    source = (Captions if make is captions else Documents)(folder)
    manifest, shapes = write(source, tmp_path / "out", batch)
    assert set(shapes) == {(batch, *PIXELS.pixels(grid), 3) for grid in GRIDS}
    drawn = 7 if make is captions else 10
    assert manifest["bad_rows"] == (2 if make is captions else 4) and len(shapes) <= drawn // batch + len(GRIDS)
    told = manifest["schema"]["image"]
    assert told["buckets"] == [[8, 8], [4, 16], [16, 4]] and told["shape"] == [8, 8, 8]
    found, wanted = rows_of(make(records(tmp_path / "out"))), rows_of(make(source))
    assert {tuple(g) for row in found for g in row["image/grid"].reshape(-1, 2).tolist()} == set(GRIDS)
    if make is documents:  # without the bad ones they are packed anew
        have = of_documents(found, lambda image, grid: image)
        want = of_documents(wanted, folded)
        assert have.keys() == want.keys() and len(have) == 4
        np.testing.assert_array_equal(list(have.values()), [want[words] for words in have])
        return
    assert len(found) == len(wanted) == 7
    for have, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(have["image"], folded(want["image"], want["image/grid"]))
        np.testing.assert_array_equal(have["image/grid"], want["image/grid"])
        np.testing.assert_array_equal(have["text.prompt/ids"], want["text.prompt/ids"])


def test_other_buckets_and_damaged_sides_are_refused(folder, tmp_path):
    write(Captions(folder), tmp_path / "out", 4)
    asked = r"hold moments of the buckets 8 x 8, 4 x 16, 16 x 4, and the task reads "
    assert captions(records(tmp_path / "out"), ((4, 4), (8, 2), (2, 8))).rows("train") == 7
    assert captions(records(tmp_path / "out")).latents_of == "codec" and captions(Captions(folder)).latents_of is None
    with pytest.raises(ValueError, match=asked + "the buckets 8 x 8, 4 x 16: give"):
        captions(records(tmp_path / "out"), GRIDS[:2]).rows("train")
    with pytest.raises(ValueError, match=asked + "no buckets"):
        captions(records(tmp_path / "out"), ()).rows("train")
    with pytest.raises(ValueError, match=r"moments of latents 8 x 8 x 8: set source\.moments=True"):
        captions(Records(tmp_path / "out")).rows("train")
    other = field("image", Pixels(16, 16), type("Other", (Autoencoder,), {"shape": (4, 4, 4)})(), patches(1))
    with pytest.raises(ValueError, match="moments of latents 8 x 8 x 8, and the field's codec makes 4 x 4 x 8"):
        SourceTask("t", records(tmp_path / "out"), CaptionToImage(16), table(image=other)).rows("train")
    with pytest.raises(ValueError, match="which are shards already"):
        prepare(records(tmp_path / "out"), tmp_path / "again", ShardPlan())
    path = tmp_path / "out" / "manifest.json"
    told = json.loads(path.read_text())
    for wrong in ([[8, 8], [4, 8]], [[8, 8], [64, "1"]], [[4, 16], [8, 8]], 3, [[8, 8], [0, 64]]):
        told["schema"]["image"]["buckets"] = wrong
        path.write_text(json.dumps(told))
        with pytest.raises(ValueError, match=r"no manifest of shards \(it"):
            captions(records(tmp_path / "out")).rows("train")
    del told["schema"]["image"]["buckets"]
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="hold moments of no buckets"):
        captions(records(tmp_path / "out")).rows("train")
    for data in (None, b"\x08\0", b"\x08\0\x10\0" + bytes(1024)):
        with pytest.raises(BadRow, match="the moments are of no bucket"):
            moments_in_bucket(data, [(8, 8)], 8, "here")
    with pytest.raises(BadRow, match="there are no such moments"):
        moments_in_bucket(b"\x08\0\x08\0" + bytes(1023), [(8, 8)], 8, "here")


def test_a_rare_size_does_not_hold_back_all_others():
    """The pictures in memory are at most so many, whatever comes."""
    asked = []

    class Source:
        def __len__(self):
            return 100

        def __getitem__(self, row):
            asked.append(row)
            return Example({"row": row})

    shape = lambda row: PIXELS.pixels(GRIDS[row == 0])
    read = lambda kind, example: [np.full((*shape(example["row"]), 3), example["row"], np.uint8)]
    moments = Moments(16, (8, 8, 8), "codec", tuple(map(LATENTS.pixels, GRIDS)))
    write = lambda kind, example, images: bytes([example["row"]])
    plan = Encoding(moments, 100, 2, read, encode, write, threads=1)
    found = plan.records(Source(), "captions", range(100))
    assert next(found) == (0, b"\0") and len(asked) < 2 * HELD + 9
    assert list(found) == [(row, bytes([row])) for row in range(1, 100)]


def test_images_that_were_cut_to_squares_are_refused(folder, tmp_path):
    prepare(Captions(folder), tmp_path / "cut", ShardPlan(rows=4, size=16), ledger=Ledger(tmp_path / "cut", share=1))
    with pytest.raises(ValueError, match="were cut to squares of 16 pixels: prepare them anew without --size"):
        captions(Records(tmp_path / "cut")).rows("train")
    assert captions(Records(tmp_path / "cut"), ()).rows("train") == 7
    with pytest.raises(ValueError, match=r"source\.moments is True and the shards hold images"):
        captions(records(tmp_path / "cut"), ()).rows("train")
