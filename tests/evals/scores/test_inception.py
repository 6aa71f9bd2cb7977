"""The FID's Inception against torch-fidelity 0.4.0 (golden arrays of random weights)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.evals.networks import inception
from tests.golden.inception.make import weights

GOLDEN = pathlib.Path(__file__).parents[2] / "golden/inception/expected.npz"


def test_features_are_those_of_torch_fidelity():
    expected = np.load(GOLDEN)
    params = inception.prepare(weights(inception.shapes()))
    found = jax.jit(inception.features)(params, expected["images"])
    for name in inception.Features._fields:
        want = expected[name]
        np.testing.assert_allclose(getattr(found, name), want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=name)
    assert found.pool.shape == (2, inception.POOL) and found.spatial.shape == (2, inception.SPATIAL)


def test_resizing_is_that_of_tensorflow_1():
    """Output i lies at input i · h / side: no half pixels, and the last row is repeated."""
    image = jnp.arange(4, dtype=jnp.float32).reshape(1, 4, 1, 1)
    rows = inception.resize(image, 8)[0, :, 0, 0]
    np.testing.assert_allclose(rows, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
    assert inception.resize(image, 2)[0, :, 0, 0].tolist() == [0, 2], "no anti-aliasing"


def test_wrong_tensors_are_told():
    tensors = {name: np.zeros(shape, np.float32) for name, shape in inception.shapes().items()}
    with pytest.raises(
        ValueError, match=r"fc.weight has the shape \[1000, 2048\], and the FID's Inception \[1008, 2048\]"
    ):
        inception.prepare(tensors | {"fc.weight": np.zeros((1000, 2048))})
    del tensors["fc.bias"]
    with pytest.raises(ValueError, match=r"1 tensors of the FID's Inception are missing, such as fc\.bias"):
        inception.prepare(tensors)
