"""Buckets of aspect ratios: exact there and back, cut like the square ones, and told to the model by their grids."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from src.codecs.buckets import Buckets, as_grids
from src.codecs.patch import Patch
from src.codecs.text import Bytes
from src.data.buckets import CaptionToImage, Documents, crop_to
from src.data.pictures import crop
from src.models.embedders import PatchEmbedder
from tests.data.test_documents import corpus

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
    square, own = Patch(2, 3, 8, 8), Patch(2, 3, 8, 8).shaped(grid)
    patches = square.encode(jnp.asarray(folded[None], jnp.float32))
    np.testing.assert_array_equal(patches, own.encode(jnp.asarray(image[None], jnp.float32)))
    np.testing.assert_array_equal(own.decode(patches)[0], image)
    np.testing.assert_array_equal(BUCKETS.fold(np.stack([image] * 2), grid)[1], folded)


def test_the_nearest_bucket_is_cut_out_of_the_middle():
    sizes = {(10, 10): (4, 4), (10, 39): (2, 8), (90, 25): (8, 2), (10, 19): (4, 4), (10, 21): (2, 8)}
    assert {size: BUCKETS.nearest(*size) for size in sizes} == sizes
    image = pixels(4, 20)
    np.testing.assert_array_equal(crop_to(image, 4, 16), image[:, 2:18])
    for height, width in ((8, 8), (9, 30), (40, 21), (100, 64)):  # where the target is square: the published crop
        image = pixels(height, width)
        np.testing.assert_array_equal(crop_to(image, 8, 8), crop(image, 8))
    with pytest.raises(ValueError, match="too long for their width"):
        crop_to(pixels(2, 40), 4, 16)


def test_positions_are_those_of_each_images_own_grid():
    make = lambda grid: PatchEmbedder(12, grid, 16, rngs=nnx.Rngs(0))
    patches = jax.random.normal(jax.random.key(0), (3, 16, 12))
    together = make((4, 4))(patches, jnp.asarray(GRIDS, jnp.int32))
    for i, grid in enumerate(GRIDS):
        np.testing.assert_allclose(together[i], make(grid)(patches)[i], atol=1e-6)
    np.testing.assert_array_equal(make((4, 4))(patches)[0], together[0])
    assert np.abs(together[1] - make((4, 4))(patches)[1]).max() > 0.1
    assert np.isfinite(make((4, 4))(patches, jnp.zeros((3, 2), jnp.int32))).all()


def test_a_folder_of_pictures_comes_in_buckets(tmp_path):
    shapes, lines = [(8, 8), (4, 16), (16, 4)], []
    for i, shape in enumerate(shapes):
        file = io.BytesIO()
        Image.fromarray(pixels(*shape, seed=i)).save(file, "PNG")
        (tmp_path / f"{i}.png").write_bytes(file.getvalue())
        lines.append(json.dumps({"image": f"{i}.png", "caption": "red"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    data = CaptionToImage(Bytes(), 8, 16, folder=tmp_path, buckets=GRIDS, patch=2)
    batch = next(data.iterator("train", 3, 0))
    found = {
        tuple(grid): values for grid, values in zip(batch["image"].grid.tolist(), batch["image"].values, strict=True)
    }
    for i, grid in enumerate(GRIDS):
        np.testing.assert_allclose(BUCKETS.unfold(found[grid], grid), pixels(*shapes[i], seed=i) / 127.5 - 1, atol=1e-6)
    shape = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert shape(batch) == shape(data.element_spec(3)) == shape(data.fake(3, 0))


def test_documents_come_in_buckets(tmp_path):
    folder = corpus(tmp_path / "d", 3)
    Image.fromarray(pixels(4, 16, seed=7)).save(folder / "a/0y.png")
    data = Documents(Bytes(), 128, folder=folder, buckets=GRIDS, patch=2, size=8, images=3, pictures=0)
    (folder / "documents.jsonl").write_text((folder / "documents.jsonl").read_text().split("\n")[0])
    batch = next(data.iterator("train", 1, 0))
    image, places = batch["image"], batch["places"].begins["image"][0]
    assert image.grid[0, :2].tolist() == [[4, 4], [2, 8]] and (places[:2] >= 0).all() and places[2] == -1
    np.testing.assert_allclose(BUCKETS.unfold(image.values[0, 1], (2, 8)), pixels(4, 16, seed=7) / 127.5 - 1, atol=1e-6)
    shape = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert shape(batch) == shape(data.element_spec(1)) == shape(data.fake(1, 0))


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: Buckets(((4, 4), (2, 9)), 2), "with one product"),
        (lambda: Buckets((), 2), "with one product"),
        (lambda: Buckets(((4, 4), (4, 4)), 2), "a grid twice"),
        (lambda: as_grids([[4, "4"]]), "pairs of whole numbers"),
        (lambda: as_grids(4), "list of pairs"),
        (lambda: CaptionToImage(Bytes(), 8, 16, buckets=((2, 8),), patch=2), r"of 8 x 8: give a first bucket \(4, 4\)"),
        (lambda: Patch(2, 3, 8, 8).shaped((4, 5)), "has not 16 patches"),
        (lambda: BUCKETS.fold(pixels(8, 8), (2, 8)), "has no 2 x 8 patches"),
    ],
)
def test_refusals(make, match):
    with pytest.raises(ValueError, match=match):
        make()
