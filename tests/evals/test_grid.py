import numpy as np
import pytest
from PIL import Image

from src.data.sources import digits
from src.evals.grid import _wrap, caption_grid, save_png


def test_grid_places_images_below_their_captions():
    images = np.stack([np.full((8, 8, 1), v, np.float32) for v in (-1.0, 1.0, 0.0)])
    images[0, 0, 0] = 1.0  # a corner that shows orientation and scale
    grid = caption_grid(images, ["one", "an image of an eight and more", "three"], 2, colors=["black", "red", "black"])
    assert grid.dtype == np.uint8 and grid.shape[2] == 3
    height = (grid.shape[0] - 8) // 2  # two rows of gap, caption and image
    left, top, side = 8, 8 + height - 8 - 112, 112
    first = grid[top : top + side, left : left + side]
    assert (first[:14, :14] == 255).all() and (first[14:] == 0).all() and (first[:14, 14:] == 0).all()
    below = grid[top + height : top + height + side, left : left + side]
    assert (below == 128).all()
    red = (grid == [255, 0, 0]).all(axis=2)
    rows, columns = np.nonzero(red)
    assert len(rows) and rows.max() < top and columns.min() >= left + side  # above the second image only
    assert (grid[:, :8] == 255).all() and (grid[top + height :, left + side + 8 :] == 255).all()  # an empty place


def test_colors_nan_and_scale():
    image = np.full((1, 2, 3, 3), np.nan)
    image[0, 0, 0] = [1, -1, 5]
    grid = caption_grid(image, [""], 4, scale=5)
    assert (grid[-18:-13, 8:13] == [255, 0, 255]).all() and (grid[-13:-8, 8:23] == 128).all()


def test_wrapping_fits_every_line():
    class Monospace:
        getlength = staticmethod(len)

    assert _wrap("seven left of two above", Monospace, 10) == ["seven left", "of two", "above"]
    assert _wrap("  ", Monospace, 10) == [""]
    assert _wrap("abcdefghijklmno x", Monospace, 5) == ["abcd…", "x"]
    assert _wrap("aa bb cc dd ee", Monospace, 2) == ["aa", "bb", "cc", "d…"]


def test_grid_refuses_in_words():
    images = digits.load("test").values[:2]
    with pytest.raises(ValueError, match="2 images needs as many captions and colors, and at least one; got 1"):
        caption_grid(images, ["a"], 2)
    with pytest.raises(ValueError, match="at least one"):
        caption_grid(images[:0], [], 2)
    with pytest.raises(ValueError, match="1 or 3"):
        caption_grid(np.zeros((1, 8, 8, 4)), ["latent"], 2)


def test_save_png(tmp_path, monkeypatch):
    picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    path = tmp_path / "new" / "a.png"
    save_png(path, picture[::-1])
    save_png(path, picture)
    assert (np.asarray(Image.open(path)) == picture).all()
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    with pytest.raises(OSError, match=r"cannot be written .*: free room or change the folder"):
        save_png(path / "b.png", picture)  # its folder is a file

    def full(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("etils.epath.gpath._GPath.replace", full)
        with pytest.raises(OSError, match="No space left"):
            save_png(path, picture[::-1])
    assert (np.asarray(Image.open(path)) == picture).all()  # the old picture is whole, and no draft is left
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
