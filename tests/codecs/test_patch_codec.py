"""The patch codec: orders written out by hand, and its inverse."""

import jax.numpy as jnp
import numpy as np
import pytest

from src.codecs.chain import Chain
from src.codecs.patch import Patch
from src.codecs.pixels import Pixels
from src.interfaces import FieldSpec
from tests.helpers.published import reorder


def test_encode_orders_grid_and_features_as_published():
    # The value of a pixel tells its place: 100 channel + 10 row + column.
    rows, columns, channels = np.meshgrid(np.arange(4), np.arange(6), np.arange(2), indexing="ij")
    image = jnp.asarray(100 * channels + 10 * rows + columns, jnp.float32)[None]
    tokens = np.asarray(Patch(2, Pixels(4, 6, 2)).encode(image))[0]
    assert tokens.shape == (6, 8)
    assert tokens[0].tolist() == [0, 1, 10, 11, 100, 101, 110, 111]
    assert tokens[1].tolist() == [2, 3, 12, 13, 102, 103, 112, 113]  # next column first
    assert tokens[3].tolist() == [20, 21, 30, 31, 120, 121, 130, 131]  # then the next row


def test_decode_inverts_encode_with_scale_and_shift():
    codec = Patch(2, Pixels(4, 8), scale=0.25, shift=0.5)
    values = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 8, 3)), jnp.float32)
    tokens = codec.encode(values)
    assert tokens.shape == (2, codec.tokens, codec.features) == (2, 8, 12)
    np.testing.assert_allclose(tokens[0, 0, 0], (values[0, 0, 0, 0] - 0.5) * 0.25, rtol=1e-6)
    np.testing.assert_allclose(codec.decode(tokens), values, atol=1e-6)


def test_a_chain_of_pixels_and_patches_knows_its_tokens():
    chain = Chain((before := Pixels(8, 12, 3), Patch(4, before)))
    assert chain.spec == FieldSpec((2, 3), features=48) and chain.device[0].shape == (6, 48)
    assert chain.device[0].shaped((3, 2)).spec == FieldSpec((3, 2), features=48)
    assert hash(chain.device[0].shaped((1, 6))) and chain.encode(jnp.zeros((2, 8, 12, 3))).shape == (2, 6, 48)
    values = before.encode(np.full((20, 12, 3), 100, np.uint8))
    assert values.shape == (8, 12, 3) and (before.decode(values / 127.5 - 1) == 100).all()


def test_reorder_turns_the_official_output_into_input_order():
    # Official output: (row, column, channel), channel fastest; here with three channels.
    official = jnp.asarray([[100 * c + 10 * r + s for r in range(2) for s in range(2) for c in range(3)]], jnp.float32)
    ours = [100 * c + 10 * r + s for c in range(3) for r in range(2) for s in range(2)]
    assert reorder(official, 2, "rsc", "crs")[0].tolist() == ours
    np.testing.assert_array_equal(reorder(reorder(official, 2, "rsc", "crs"), 2, "crs", "rsc"), official)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Patch(3, Pixels(8, 9, 1)), "3 does not divide an image of 8 x 9"),
        (lambda: Patch(2, Pixels(8, 8, 1)).encode(jnp.zeros((1, 8, 4, 1))), r"\(8, 4, 1\).*\(8, 8, 1\)"),
        (lambda: Patch(2, Pixels(8, 8, 1)).decode(jnp.zeros((1, 4, 4))), r"\(4, 4\).*\(16, 4\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
