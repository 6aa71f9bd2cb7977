"""Files of reference statistics and of samples."""

import numpy as np
import pytest

from src.evals.scores.statistics import Statistics, read_samples, read_statistics, write_statistics

RNG = np.random.default_rng(0)
ROOT = RNG.standard_normal((6, 4))
MEAN, SIGMA = RNG.standard_normal(4), ROOT.T @ ROOT
SMALL = np.eye(3)


def test_moments_survive_a_file(tmp_path):
    path = tmp_path / "a.npz"
    write_statistics(path, Statistics(MEAN, SIGMA), Statistics(MEAN[:3], SMALL))
    for spatial, mean, sigma in ((False, MEAN, SIGMA), (True, MEAN[:3], SMALL)):
        found = read_statistics(path, len(mean), spatial=spatial)
        np.testing.assert_array_equal(found.mean, mean)
        np.testing.assert_array_equal(found.covariance, sigma)


def test_a_reference_of_adm_is_read(tmp_path):
    """Moments, spatial moments and images in one archive, compressed or not."""
    images = RNG.integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    parts = {"mu": MEAN, "sigma": np.asfortranarray(SIGMA), "mu_s": MEAN[:3], "sigma_s": SMALL, "arr_0": images}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "VIRTUAL_imagenet256_labeled.npz", **parts)
        path = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
        np.testing.assert_array_equal(read_statistics(path, 4).covariance, SIGMA)
        blocks = list(read_samples(path, block=2))
        assert [len(block) for block in blocks] == [2, 2, 1]
        np.testing.assert_array_equal(np.concatenate(blocks), images)


class Code:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"mu": MEAN}, "have no mu and sigma, only mu"),
        ({"mu": MEAN[:2], "sigma": SIGMA}, r"of another network: mu \[2\] and sigma \[4, 4\] instead of \[4\]"),
        ({"mu": MEAN, "sigma": SIGMA * np.nan}, "not finite"),
        ({"mu": MEAN, "sigma": SIGMA + np.triu(SIGMA, 1)}, "is not symmetric"),
        ({"mu": MEAN, "sigma": SIGMA - 2 * np.eye(4) * np.trace(SIGMA)}, "has an eigenvalue of -"),
        ({"mu": MEAN, "sigma": np.array([Code()], dtype=object)}, "holds .* and not numbers"),
        ({"mu": MEAN, "sigma": np.array(["x"])}, "holds .* and not numbers"),
    ],
)
def test_what_is_no_statistics_of_this_network_is_one_sentence(tmp_path, arrays, told, capsys):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=told) as error:
        read_statistics(tmp_path / "a.npz", 4)
    assert "\n" not in str(error.value) and "a.npz" in str(error.value) and not capsys.readouterr().out


def test_damage_at_every_byte_is_one_sentence_or_the_same_numbers(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", mu=MEAN, sigma=SIGMA)
    whole = (tmp_path / "a.npz").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.npz"):
            read_statistics(tmp_path / "cut.npz", 4)
    for place in range(0, len(whole), 3):
        (tmp_path / "bad.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            found = read_statistics(tmp_path / "bad.npz", 4)
        except ValueError as error:
            assert "bad.npz" in str(error) and "\n" not in str(error)
        else:
            np.testing.assert_array_equal(found.covariance, SIGMA)
    with pytest.raises(FileNotFoundError, match="does not exist: correct the path"):
        read_statistics(tmp_path / "none.npz", 4)


def test_samples_of_another_form(tmp_path):
    for array in (np.zeros((2, 8, 8, 3)), np.zeros((2, 3, 8, 8), np.uint8)):
        np.savez(tmp_path / "a.npz", array)
        with pytest.raises(ValueError, match=r"instead of uint8 \[n, h, w, 3\]"):
            list(read_samples(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", other=np.zeros(2))
    with pytest.raises(ValueError, match="have no arr_0"):
        list(read_samples(tmp_path / "a.npz"))
