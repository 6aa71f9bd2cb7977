"""The checker of shapes around the functions of `src`."""

import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float, TypeCheckError, jaxtyped

from src.models.rotary import rotate
from tests.helpers import checking


def outer():
    @jaxtyped(typechecker=checking.checked)
    def inner(x: Float[Array, "n 2"], y: Float[Array, " n"]) -> Float[Array, " n"]:
        return y if x.sum() > 0 else y[:1]

    return inner


def test_a_nested_function_is_checked_whenever_it_is_made():
    before = len(checking._made)
    for _ in range(2):
        inner = outer()
        assert inner(jnp.ones((3, 2)), jnp.ones(3)).shape == (3,)
        for wrong in (
            (jnp.ones((3, 3)), jnp.ones(3)),
            (jnp.ones((3, 2)), jnp.ones(2)),
            (-jnp.ones((3, 2)), jnp.ones(3)),
        ):
            with pytest.raises(TypeCheckError):
                inner(*wrong)
    assert len(checking._made) == before + 2, "one for the arguments, and one for the result"


def test_functions_of_src_are_checked():
    with pytest.raises(TypeCheckError):
        rotate(jnp.ones((2, 3)), jnp.ones((3, 2)))
