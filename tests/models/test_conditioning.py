"""Shift, scale and gate in the published order, with weights set by hand."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from src.models.conditioning import AdaLNBeforeTrunk, AdaLNLayer, Condition

VECTOR = np.asarray([[[0.5, -2.0]], [[1.5, 3.0]]], np.float32)  # [B, 1, D]
SILU = VECTOR / (1 + np.exp(-VECTOR))


def by_hand(linear, chunks):
    """Sets random weights [D, chunks · D] and returns what the layer then says of VECTOR, chunk by chunk [B, 1, D]."""
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(2, 2 * chunks)), rng.normal(size=2 * chunks)
    linear.kernel[...], linear.bias[...] = jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32)
    out = SILU @ kernel + bias
    return [out[..., 2 * i : 2 * i + 2] for i in range(chunks)]


def test_before_the_trunk_the_first_half_shifts_and_the_second_scales():
    layer = AdaLNBeforeTrunk(2, rngs=nnx.Rngs(0))
    shift, scale = by_hand(layer.linear, 2)
    x = np.random.default_rng(1).normal(size=(2, 3, 2)).astype(np.float32)
    np.testing.assert_allclose(layer.before(jnp.asarray(x), jnp.asarray(VECTOR)), x * (1 + scale) + shift, atol=1e-5)


def test_in_a_block_attention_comes_first_as_shift_scale_gate():
    layer = AdaLNLayer(2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    names = ("shift_attention", "scale_attention", "gate_attention", "shift_mlp", "scale_mlp", "gate_mlp")
    expected = by_hand(layer.linear, 6)
    said = layer(Condition(jnp.asarray(VECTOR), np.asarray([-1, 0], np.int32)))
    for name, part in zip(names, expected, strict=True):
        value = np.asarray(getattr(said, name))
        np.testing.assert_allclose(value[:, 1:], part, atol=1e-5, err_msg=name)
        assert (value[:, 0] == (1.0 if name.startswith("gate") else 0.0)).all(), "a token without time is left alone"
    assert said.add is None
