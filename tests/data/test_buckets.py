"""Buckets of aspect ratios: exact there and back, cut like the square ones, and told to the model by places."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from src.codecs.buckets import Buckets, as_grids
from src.codecs.patch import Patch
from src.codecs.pixels import Pixels, crop
from src.data.pipeline.stream import Stream
from src.data.sources.captions import Captions
from src.data.sources.documents import Documents
from src.data.task import SourceTask
from src.data.templates.caption_to_image import CaptionToImage
from src.data.templates.packed import Packed
from tests.data.test_documents import corpus
from tests.helpers.fields import table
from tests.helpers.rows import told

GRIDS = ((4, 4), (2, 8), (8, 2))
BUCKETS = Buckets(GRIDS, 2)


def pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_an_image_of_a_bucket_goes_there_and_back_patch_by_patch(grid):
    image = pixels(*BUCKETS.pixels(grid))
    folded = BUCKETS.fold(image, grid)
    assert folded.shape == (8, 8, 3)
    np.testing.assert_array_equal(BUCKETS.unfold(folded, grid), image)
    np.testing.assert_array_equal(BUCKETS.unfold(jnp.asarray(folded), grid), image)
    square, own = Patch(2, Pixels(8, 8)), Patch(2, Pixels(8, 8)).shaped(grid)
    patches = square.encode(jnp.asarray(folded[None], jnp.float32))
    np.testing.assert_array_equal(patches, own.encode(jnp.asarray(image[None], jnp.float32)))
    np.testing.assert_array_equal(own.decode(patches)[0], image)
    np.testing.assert_array_equal(BUCKETS.fold(np.stack([image] * 2), grid)[1], folded)


def test_the_nearest_bucket_is_cut_out_of_the_middle():
    sizes = {(10, 10): (4, 4), (10, 39): (2, 8), (90, 25): (8, 2), (10, 19): (4, 4), (10, 21): (2, 8)}
    assert {size: BUCKETS.nearest(*size) for size in sizes} == sizes
    image = pixels(4, 20)
    np.testing.assert_array_equal(crop(image, 4, 16), image[:, 2:18])
    with pytest.raises(ValueError, match="too long for their width"):
        crop(pixels(2, 40), 4, 16)


def captions(source, buckets=GRIDS):
    return SourceTask("t", source, CaptionToImage(16, buckets=buckets), table(size=(8, 8, 3)))


def first(data, rows):
    stream = Stream(data, rows, 0)
    batch = next(stream)
    stream.close()
    assert told(batch) == told(data.element_spec(rows)) == told(data.fake(rows, 0))
    return batch


def grid_of(place):
    """Rows and columns of the places [N, 2] of an image's tokens, which lie row by row."""
    rows, columns = place[-1] + 1
    np.testing.assert_array_equal(place, np.stack(np.divmod(np.arange(rows * columns), columns), axis=-1))
    return int(rows), int(columns)


def test_a_folder_of_images_comes_in_buckets(tmp_path):
    shapes, lines = [(8, 8), (4, 16), (16, 4)], []
    for i, shape in enumerate(shapes):
        file = io.BytesIO()
        Image.fromarray(pixels(*shape, seed=i)).save(file, "PNG")
        (tmp_path / f"{i}.png").write_bytes(file.getvalue())
        lines.append(json.dumps({"image": f"{i}.png", "caption": "red"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    data = captions(Captions(tmp_path))
    image = first(data, 3).tokens["image"]
    found = {grid_of(place): value for place, value in zip(image.place, image.value, strict=True)}
    for i, grid in enumerate(GRIDS):
        np.testing.assert_allclose(BUCKETS.unfold(found[grid], grid), pixels(*shapes[i], seed=i) / 127.5 - 1, atol=1e-6)
    assert {grid_of(place) for place in data.fake(3, 0).tokens["image"].place} == set(GRIDS)
    asked = data.prompt([{"caption": "a"}, {"caption": "a", "grid": (1, 16)}])[1].tokens["image"]
    assert [grid_of(place) for place in asked.place] == [(4, 4), (1, 16)]
    for refused, buckets in (((4, 5), GRIDS), ((2, 8), ())):
        with pytest.raises(ValueError, match=rf"grid={refused}".replace("(", r"\(").replace(")", r"\)")):
            captions(Captions(tmp_path), buckets).prompt([{"grid": refused}])


def test_documents_come_in_buckets(tmp_path):
    folder = corpus(tmp_path / "d", 3)
    Image.fromarray(pixels(4, 16, seed=7)).save(folder / "a/0y.png")
    data = SourceTask("t", Documents(folder), Packed(128, images=3, buckets=GRIDS), table(size=(8, 8, 3)))
    (folder / "documents.jsonl").write_text((folder / "documents.jsonl").read_text().split("\n")[0])
    batch = first(data, 1)
    image, begins = batch.tokens["image"], batch.packing.begins["image"][0]
    assert [grid_of(place) for place in image.place[0, :2]] == [(4, 4), (2, 8)]
    assert (begins[:2] >= 0).all() and begins[2] == -1
    np.testing.assert_allclose(BUCKETS.unfold(image.value[0, 1], (2, 8)), pixels(4, 16, seed=7) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: Buckets(((4, 4), (2, 9)), 2), "with one product"),
        (lambda: Buckets((), 2), "with one product"),
        (lambda: Buckets(((4, 4), (4, 4)), 2), "a grid twice"),
        (lambda: as_grids([[4, "4"]]), "pairs of whole numbers"),
        (lambda: as_grids(4), "list of pairs"),
        (lambda: captions(Captions(""), ((2, 8),)), r"first of the buckets is \(2, 8\), .* grid of \(4, 4\)"),
        (lambda: Patch(2, Pixels(8, 8)).shaped((4, 5)), "has not 16 patches"),
        (lambda: BUCKETS.fold(pixels(8, 8), (2, 8)), "has no 2 x 8 patches"),
    ],
)
def test_refusals(make, match):
    with pytest.raises(ValueError, match=match):
        make()
