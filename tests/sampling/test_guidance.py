"""Guidance by hand: the formula, the official three-of-four quirk, the interval and the rescaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.sampling.guidance import Guidance
from tests.helpers.family import golden
from tests.helpers.small import close

A, B = jax.random.split(jax.random.key(0))
COND, NULL = (jax.random.normal(key, (2, 3, 16)) for key in (A, B))


def test_extrapolates_what_may_be_guided_and_keeps_the_rest():
    guided = Guidance(scale=4.0)(COND, NULL, 0.5)
    close(guided, 4 * COND - 3 * NULL)
    close(Guidance(scale=1.0)(COND, NULL, 0.5), COND)
    np.testing.assert_array_equal(Guidance(scale=0.0)(COND, NULL, 0.5), NULL)
    some = Guidance(scale=4.0)(COND, NULL, 0.5, 12)
    close(some[..., :12], guided[..., :12])
    np.testing.assert_array_equal(some[..., 12:], COND[..., 12:])
    close(Guidance(scale=4.0)(COND[:, 0], NULL[:, 0], 0.5), guided[:, 0])


def test_interval_is_closed_and_works_on_traced_times():
    guide = jax.jit(lambda t: Guidance(scale=3.0, interval=(0.25, 0.75))(COND, NULL, t))
    full = 3 * COND - 2 * NULL
    for t, expected in [(0.2, COND), (0.25, full), (0.5, full), (0.75, full), (0.8, COND)]:
        close(guide(t), expected)


def test_a_ramp_rises_from_no_guidance_as_published():
    """ReDDiT's scale of the step from t to s is ours at s."""
    for masks in (1, 4):
        arrays = golden(f"reddit/step_m{masks}")
        scale = arrays["cfg2p5_linear_scale"]
        s = arrays["t"] - arrays["dt"]
        close(Guidance(scale=2.5, ramp=1.0)(COND, NULL, s), NULL + scale * (COND - NULL))
    for t, expected in [(1.0, COND), (0.0, 3 * COND - 2 * NULL), (0.5, 2 * COND - NULL)]:
        close(Guidance(scale=3.0, ramp=1.0)(COND, NULL, t), expected)
    close(Guidance(scale=3.0, ramp=0.5)(COND, NULL, 1.0), 2 * COND - NULL)


def test_rescale_matches_the_standard_deviation_of_each_row():
    full = Guidance(scale=7.0)(COND, NULL, 0.5)
    matched = Guidance(scale=7.0, rescale=1.0)(COND, NULL, 0.5)
    np.testing.assert_allclose(matched.std((1, 2)), COND.std((1, 2)), rtol=1e-5)
    ratio = matched / full
    np.testing.assert_allclose(ratio, jnp.broadcast_to(ratio[:, :1, :1], ratio.shape), rtol=1e-5)
    part = Guidance(scale=7.0, rescale=0.7)(COND, NULL, 0.5)
    close(part, 0.7 * matched + 0.3 * full)


def test_meaningless_options_are_refused():
    with pytest.raises(ValueError, match=r"guidance.interval"):
        Guidance(interval=(0.8, 0.2))
    with pytest.raises(ValueError, match=r"guidance.rescale=1\.5"):
        Guidance(rescale=1.5)
    with pytest.raises(ValueError, match=r"guidance.ramp=-0\.5"):
        Guidance(ramp=-0.5)
    with pytest.raises(ValueError, match=r"guidance.features=-1"):
        Guidance(features=-1)
