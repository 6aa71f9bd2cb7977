"""The law of the next token, enumerated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.sampling.steps.next_token import Greedy, Sampled

LOGITS = np.log([0.08, 0.4, 0.02, 0.3, 0.2])


def enumerated(temperature, top_k, top_p):
    """The kept set found by going through all subsets: the likeliest of the smallest ones that reach top_p."""
    p = np.exp(LOGITS / temperature)
    p = np.where(p >= np.sort(p)[-(top_k or 5)], p, 0)
    p /= p.sum()
    if top_p is not None:
        for size in range(1, 6):
            best = max(itertools.combinations(range(5), size), key=lambda kept: p[list(kept)].sum())
            if p[list(best)].sum() >= top_p - 1e-9:
                break
        p = np.where(np.isin(np.arange(5), best), p, 0)
    return p / p.sum()


@pytest.mark.parametrize(
    "options",
    [(1.0, None, None), (0.5, None, None), (1.0, 3, None), (1.0, None, 0.75), (2.0, 4, 0.8), (1.0, None, 0.1)],
)
def test_law(options):
    temperature, top_k, top_p = options
    choose = Sampled(temperature=temperature, top_k=top_k, top_p=top_p)
    law = enumerated(*options)
    kept, ids = jax.jit(choose.candidates)(jnp.asarray(LOGITS)[None])
    exact = np.zeros(5)
    exact[np.asarray(ids[0])] = np.exp(kept[0]) / np.exp(kept[0]).sum()
    np.testing.assert_allclose(exact, law, atol=1e-6)
    n = 20000
    drawn = jax.jit(choose.__call__)(jax.random.key(0), jnp.tile(jnp.asarray(LOGITS), (n, 1)))
    frequency = np.bincount(drawn, minlength=5) / n
    assert (np.abs(frequency - law) <= 4.5 * np.sqrt(law * (1 - law) / n)).all()


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    """0.4 + 0.3 reaches 0.7 but not 0.71; a mass of 1 keeps everything."""
    count = lambda p: np.isfinite(jax.jit(Sampled(top_p=p).candidates)(jnp.asarray(LOGITS)[None])[0]).sum()
    assert [count(p) for p in (0.05, 0.39, 0.41, 0.69, 0.71, 0.89, 0.91, 0.99, 1.0)] == [1, 1, 2, 2, 3, 3, 4, 5, 5]


def test_cold_and_narrow_draws_are_greedy():
    logits = jax.random.normal(jax.random.key(0), (50, 11))
    best = np.argmax(logits, axis=-1)
    for i, choose in enumerate([Greedy(), Sampled(temperature=1e-5), Sampled(top_k=1), Sampled(top_p=1e-6)]):
        np.testing.assert_array_equal(jax.jit(choose.__call__)(jax.random.key(i + 1), logits), best)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_meaningless_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampled(**options)
