"""The folder of a job that draws."""

import numpy as np
import pytest
from etils import epath

from src.evals.scores.drawn_images import DrawnImages, draw, join, read_about, read_drawn
from src.evals.scores.statistics import read_samples

LABELS = np.arange(10) % 3


def job(folder, **changes):
    return DrawnImages(epath.Path(folder), {"seed": 1, "guidance": 1.5} | changes, 10, 4)


def make(rows, seed):
    return np.random.default_rng(seed).integers(0, 256, (len(rows), 2, 2, 1)).astype(np.uint8)


def test_a_job_that_was_stopped_goes_on_with_shards_of_their_own_noise(tmp_path):
    def stop(done):
        if done == 8:
            raise KeyboardInterrupt

    draw(job(tmp_path / "whole"), make, LABELS, lambda done: None, True)
    with pytest.raises(KeyboardInterrupt):
        draw(job(tmp_path / "parts"), make, LABELS, stop, True)
    with pytest.raises(ValueError, match=r"1 of the 3 shards .* are missing, such as 00002\.npz"):
        read_about(epath.Path(tmp_path / "parts"))
    assert job(tmp_path / "parts").missing() == [2]
    draw(job(tmp_path / "parts"), make, LABELS, lambda done: None, True)
    whole, parts = (np.concatenate(list(read_drawn(epath.Path(tmp_path / n), 3))) for n in ("whole", "parts"))
    np.testing.assert_array_equal(whole, parts)
    assert whole.shape == (10, 2, 2, 3) and not (whole[:4] == whole[4:8]).all(), "each shard has its own seed"
    join(epath.Path(tmp_path / "whole"), tmp_path / "all.npz")
    np.testing.assert_array_equal(np.concatenate(list(read_samples(tmp_path / "all.npz"))), whole)
    np.testing.assert_array_equal(np.load(tmp_path / "all.npz")["arr_1"], LABELS)


def test_other_images_are_not_mixed_in(tmp_path):
    draw(job(tmp_path / "a"), make, None, lambda done: None, True)
    job(tmp_path / "a", version="2")
    with pytest.raises(ValueError, match=r"holds other images \(guidance 1\.5, now 2\.0\): give another --out"):
        job(tmp_path / "a", guidance=2.0)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and has no about\.json"):
        job(tmp_path / "b")
