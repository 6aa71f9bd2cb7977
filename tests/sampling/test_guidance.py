"""Guidance by hand: the formula, the official three-of-four quirk, the interval and the rescaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.interfaces import Prediction
from src.sampling.guidance import Guidance

A, B, C = jax.random.split(jax.random.key(0), 3)
COND = Prediction(value=jax.random.normal(A, (2, 3, 16)), variance=jax.random.normal(B, (2, 3, 16)))
NULL = Prediction(value=jax.random.normal(C, (2, 3, 16)), variance=jnp.zeros((2, 3, 16)))


def test_extrapolates_the_value_and_keeps_the_variance():
    guided = Guidance(scale=4.0)(COND, NULL, 0.5)
    np.testing.assert_allclose(guided.value, 4 * COND.value - 3 * NULL.value, atol=1e-5)
    np.testing.assert_array_equal(guided.variance, COND.variance)
    np.testing.assert_allclose(Guidance(scale=1.0)(COND, NULL, 0.5).value, COND.value, atol=1e-6)
    np.testing.assert_array_equal(Guidance(scale=0.0)(COND, NULL, 0.5).value, NULL.value)


def test_official_quirk_guides_three_of_four_channels():
    """Patches of 2 x 2 with the channel slowest: the features 12 ... 15 are the fourth channel."""
    guided = Guidance(scale=4.0, channels=3)(COND, NULL, 0.5, 4).value
    np.testing.assert_allclose(guided[..., :12], (4 * COND.value - 3 * NULL.value)[..., :12], atol=1e-5)
    np.testing.assert_array_equal(guided[..., 12:], COND.value[..., 12:])
    with pytest.raises(ValueError, match="patch features per channel"):
        Guidance(channels=3)(COND, NULL, 0.5)
    with pytest.raises(ValueError, match="does not fit 16"):
        Guidance(channels=5)(COND, NULL, 0.5, 4)


def test_interval_is_closed_and_works_on_traced_times():
    guide = jax.jit(lambda t: Guidance(scale=3.0, interval=(0.25, 0.75))(COND, NULL, t).value)
    full = 3 * COND.value - 2 * NULL.value
    for t, expected in [(0.2, COND.value), (0.25, full), (0.5, full), (0.75, full), (0.8, COND.value)]:
        np.testing.assert_allclose(guide(t), expected, atol=1e-5)


def test_rescale_matches_the_standard_deviation_of_each_row():
    full = Guidance(scale=7.0)(COND, NULL, 0.5).value
    matched = Guidance(scale=7.0, rescale=1.0)(COND, NULL, 0.5).value
    np.testing.assert_allclose(matched.std((1, 2)), COND.value.std((1, 2)), rtol=1e-5)
    ratio = matched / full
    np.testing.assert_allclose(ratio, jnp.broadcast_to(ratio[:, :1, :1], ratio.shape), rtol=1e-5)
    part = Guidance(scale=7.0, rescale=0.7)(COND, NULL, 0.5).value
    np.testing.assert_allclose(part, 0.7 * matched + 0.3 * full, atol=1e-5)


def test_meaningless_options_are_refused():
    with pytest.raises(ValueError, match="empty"):
        Guidance(interval=(0.8, 0.2))
    with pytest.raises(ValueError, match=r"rescale is 1\.5"):
        Guidance(rescale=1.5)
