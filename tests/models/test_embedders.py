"""Embedders: positions of grids, ids with masks, the class that stands for none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from src.interfaces import FieldSpec
from src.models.embedders.classes import ClassEmbedder
from src.models.embedders.features import FeatureEmbedder
from src.models.embedders.patches import PatchEmbedder
from src.models.embedders.tokens import TokenEmbedder
from src.models.layers import sincos_2d

WIDTH = 16


def make(cls, spec, **options):
    return cls(spec=spec, width=WIDTH, rngs=nnx.Rngs(0), **options)


def test_places_of_other_grids_are_those_of_their_own_table():
    """An image of another grid with as many patches gets the positions of that grid."""
    embed = make(PatchEmbedder, FieldSpec((4, 2), features=3))
    value = jax.random.normal(jax.random.key(0), (3, 8, 3))
    linear = value @ embed.linear.kernel[...]
    np.testing.assert_allclose(embed(value), linear + sincos_2d(4, 2, WIDTH), atol=1e-6)
    grids = [(4, 2), (1, 8), (8, 1)]
    places = np.stack([np.stack(np.unravel_index(np.arange(8), grid), axis=-1) for grid in grids])
    expected = linear + np.stack([sincos_2d(*grid, WIDTH) for grid in grids])
    np.testing.assert_allclose(embed(value, jnp.asarray(places)), expected, atol=1e-6)
    np.testing.assert_array_equal(embed(value[:1], jnp.asarray(places[:1])), embed(value[:1]))


def test_ids_of_a_grid_have_places_only_when_asked():
    spec = FieldSpec((2, 2), vocab=9)  # eight codes and a mask
    ids, mixed = jnp.full((1, 4), 8), jnp.asarray([[[1, 1], [0, 0], [0, 1], [1, 0]]])
    plain, placed = make(TokenEmbedder, spec), make(TokenEmbedder, spec, positions="sincos")
    assert plain.table.embedding.shape == (9, WIDTH)
    row = plain.table.embedding[...][8]
    np.testing.assert_array_equal(plain(ids, mixed), jnp.broadcast_to(row, (1, 4, WIDTH)))
    table = sincos_2d(2, 2, WIDTH)
    np.testing.assert_allclose(placed(ids)[0], row + table, atol=1e-6)
    np.testing.assert_allclose(placed(ids, mixed)[0], row + table[[3, 0, 1, 2]], atol=1e-6)


@pytest.mark.parametrize("grid, width", [((5,), 16), ((2, 3, 2), 12)])
def test_grids_of_one_and_three_axes_tell_all_their_tokens_apart(grid, width):
    embed = PatchEmbedder(spec=FieldSpec(grid, features=2), width=width, rngs=nnx.Rngs(0))
    positions = np.asarray(embed(jnp.zeros((np.prod(grid), 2))))
    assert len(np.unique(positions.round(4), axis=0)) == np.prod(grid)


def test_classes_have_a_row_for_none_and_features_pass_two_layers():
    table = make(ClassEmbedder, FieldSpec(vocab=10))
    assert table(jnp.asarray([0, 10])).shape == (2, WIDTH)
    np.testing.assert_array_equal(table(jnp.asarray([10]))[0], table.table.embedding[...][-1])
    embed = make(FeatureEmbedder, FieldSpec((4,), features=5), init=1.0)
    value = jax.random.normal(jax.random.key(0), (2, 4, 5))
    inner = jax.nn.gelu(value @ embed.first.kernel[...], approximate=False)
    np.testing.assert_allclose(embed(value), inner @ embed.second.kernel[...], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "cls, spec, options, match",
    [
        (TokenEmbedder, FieldSpec((4,), features=3), {}, r"embed\.name=tokens"),
        (TokenEmbedder, FieldSpec((4,), vocab=3), {"positions": "learned"}, r"embed\.positions='learned'"),
        (TokenEmbedder, FieldSpec((), vocab=3), {"positions": "sincos"}, r"embed: sin-cos"),
        (PatchEmbedder, FieldSpec((4,), vocab=3), {}, r"embed\.name=patches"),
        (PatchEmbedder, FieldSpec((2, 2, 2), features=3), {}, r"model\.trunk\.width=16"),
        (FeatureEmbedder, FieldSpec((4,), vocab=3), {}, r"embed\.name=features"),
        (ClassEmbedder, FieldSpec((4,), features=3), {}, r"embed\.name=classes"),
    ],
)
def test_refusals(cls, spec, options, match):
    with pytest.raises(ValueError, match=match):
        make(cls, spec, **options)
