"""Each law of training times against its distribution function."""

import math

import jax
import numpy as np
import pytest

from src.corruption.timesteps import Grid, LogitNormal, Shifted, Stratified, Uniform

N = 20000
PHI = np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))
LAWS = {
    "uniform": (Uniform(t_min=0.1, t_max=0.9), lambda t: (t - 0.1) / 0.8),
    "stratified": (Stratified(t_min=0.2), lambda t: (t - 0.2) / 0.8),
    "logit normal": (LogitNormal(mean=0.5, std=0.8), lambda t: PHI((np.log(t / (1 - t)) - 0.5) / 0.8)),
    "shifted": (Shifted(shift=3.0), lambda t: t / (3 - 2 * t)),
    "shifted logit normal": (Shifted(base=LogitNormal(), shift=0.5), lambda t: PHI(np.log(2 * t / (1 - t)))),
}


@pytest.mark.parametrize("name", LAWS)
def test_law(name):
    """Kolmogorov-Smirnov at the level 1e-4 (a fixed key: no flakes)."""
    law, distribution = LAWS[name]
    t = np.asarray(law(jax.random.key(7), (N // 4, 4)), np.float64)
    assert t.shape == (N // 4, 4)
    level = np.sort(distribution(t.ravel()))
    assert level[0] >= 0 and level[-1] <= 1
    assert np.abs(level - (np.arange(N) + 0.5) / N).max() < 2.2 / math.sqrt(N)


def test_stratified_puts_one_time_in_each_part_in_random_order():
    t = np.asarray(Stratified()(jax.random.key(1), (8, 25)))
    assert sorted(np.floor(t * 200).astype(int).ravel()) == list(range(200))
    assert (np.diff(t.ravel()) < 0).sum() > 50


def test_grid_is_uniform_over_the_indices():
    t = np.asarray(Grid(steps=10)(jax.random.key(2), (N,)))
    values, counts = np.unique(t, return_counts=True)
    np.testing.assert_allclose(values, np.arange(1, 11) / 10, rtol=1e-6)
    chi2 = ((counts - N / 10) ** 2 / (N / 10)).sum()
    assert chi2 < 33.7  # the 1e-4 quantile with 9 degrees of freedom


def test_a_shift_that_turns_time_around_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        Shifted(shift=0.0)
