"""Confidence sampling against published runs, and what holds for every kernel."""

from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.corruption import keep
from src.corruption.categorical import Categorical
from src.interfaces import FieldSpec, StepSampler
from src.sampling.loop import sample
from src.sampling.steps.categorical import Confidence, choose
from tests.helpers.family import fixed_logits, golden


def never(xt, t):
    """A second evaluation, which no step asks for."""
    raise AssertionError


def steps(sampler, process, logits, xt, steps, draws):
    """Tokens after each step; `draws` are the Gumbel noise of the draw and of the confidence, by step."""
    state, times = sampler.init(process, xt), sampler.times(process, steps)
    for k in range(steps):
        t, s = times[k], times[k + 1]
        estimate = process.estimate(logits(np.asarray(xt)), xt, t)
        with patch("jax.random.gumbel", side_effect=[jnp.asarray(draw) for draw in draws(k)]):
            xt, state = sampler.step(process, jax.random.key(0), estimate, xt, t, s, state, never)
        yield np.asarray(xt), state


def test_published_maskgit():
    """Its loop masks one token again after the last round; here all are known then."""
    arrays = golden("maskgit/decode")
    process = Categorical(field=FieldSpec((16,), vocab=8), schedule=keep.CosineDecay())
    ours, theirs = (lambda x: np.where(x == 10, 8, x)), (lambda x: np.where(x == 8, 10, x))
    sampler = Confidence(gumbel=float(arrays["choice_temperature"]))
    draws = lambda k: [arrays["categorical_gumbel"][k], arrays["choice_gumbel"][k]]
    logits = lambda xt: fixed_logits(arrays, theirs(xt))
    start = jnp.asarray(ours(arrays["start_ids"]))
    for k, (xt, _) in enumerate(steps(sampler, process, logits, start, 8, draws)):
        if k < 7:
            np.testing.assert_array_equal(theirs(xt), arrays["state_after_step"][k + 1])
            np.testing.assert_array_equal((xt == 8).sum(1), arrays["mask_len"][k])
    np.testing.assert_array_equal(xt, arrays["ids_per_step"][:, 7])


@pytest.mark.parametrize(
    "name, guidance, gumbel, schedule",
    [
        ("g0_T1_cosine", 0, 1, keep.CosineDecay()),
        ("g3_T1_cosine", 3, 1, keep.CosineDecay()),
        ("g3_T4p5_cosine", 3, 4.5, keep.CosineDecay()),
        ("g1p5_T2_linear", 1.5, 2, keep.LinearDecay()),
    ],
)
def test_published_show_o(name, guidance, gumbel, schedule):
    """Guided logits of the codes; the counts are shares of all places, and the temperature compounds."""
    arrays = golden("showo/t2i_sampling")
    process = Categorical(field=FieldSpec((9,), vocab=6), schedule=schedule)
    sampler = Confidence(gumbel=gumbel, compound=True, of_all=True)
    rows = [arrays["ids"].copy(), arrays["uncond_ids"].copy()]
    ours = lambda x: np.where(x == 29, 6, x - 23)

    def logits(xt):
        for ids in rows:
            ids[:, 6:15] = np.where(xt == 6, 29, xt + 23)
        cond, null = (fixed_logits(arrays, ids)[:, 6:15, 23:29] for ids in rows)
        return (1 + guidance) * cond - guidance * null

    draws = lambda k: [-np.log(arrays["race"][k]), arrays["gumbel"][k]]
    for k, (xt, state) in enumerate(steps(sampler, process, logits, jnp.asarray(ours(rows[0][:, 6:15])), 8, draws)):
        np.testing.assert_allclose(state[2][:, 0], arrays[f"{name}_temperatures"][k], rtol=1e-5)
        if k < 7:
            np.testing.assert_array_equal((xt == 6).sum(1), arrays[f"{name}_masked"][k])
    np.testing.assert_array_equal(xt, arrays[f"{name}_codes"])


def test_published_choice():
    arrays = golden("maskgit/mask_by_random_topk")
    known, count = np.isinf(arrays["probs"]), jnp.asarray(arrays["mask_len"], jnp.int32)
    logs = jnp.log(jnp.where(known, 1.0, arrays["probs"]))[..., None]
    tokens = jnp.zeros(known.shape, jnp.int32)
    for temperature in (0.0, 1.0, 4.5):
        choice = temperature * jnp.asarray(arrays["gumbel"])
        masked = choose(logs, tokens, jnp.asarray(known), count, jnp.zeros_like(logs), choice)[1]
        np.testing.assert_array_equal(masked, arrays[f"masking_T{str(temperature).replace('.', 'p')}"])


KERNELS = [
    Categorical(field=FieldSpec((6,), vocab=5)),
    Categorical(field=FieldSpec((6,), vocab=5), masks=3, schedule=keep.CosineDecay()),
    Categorical(field=FieldSpec((6,), vocab=5), mask=0.7),
    Categorical(field=FieldSpec((6,), vocab=5, features=2), mask=0.7),
]


MARKED = [KERNELS[1], *(pytest.param(k, marks=pytest.mark.faults) for k in (KERNELS[0], KERNELS[2])), KERNELS[3]]


@pytest.mark.parametrize("process", MARKED, ids=["masks", "mask", "mixed", "numbers"])
def test_tokens_stay_once_they_are_known(process):
    """Every step makes one token or more, given tokens stay as they are, and none is replaced at the end."""
    xt = process.prior(jax.random.key(0), (3, 6)).at[:, 1].set(2)
    given = jnp.zeros((3, 6), bool).at[:, 1].set(True)
    sampler, state, known = Confidence(gumbel=2.0), Confidence().init(process, xt), given
    times = sampler.times(process, 4)
    numbers = (process.field.features or 1,)

    @jax.jit
    def step(key, xt, t, s, state):
        shape = (*xt.shape, 5)
        logits = jax.random.normal(jax.random.key(9), shape).reshape(*xt.shape[:2], -1)
        t, s = (jnp.where(given, 0.0, time) for time in (t, s))
        estimate = process.estimate(logits, xt, t)
        return sampler.step(process, key, estimate, xt, t, s, state, never)

    for k in range(4):
        before = xt
        xt, state = step(jax.random.key(k), xt, times[k], times[k + 1], state)
        same = np.asarray(xt == before).reshape(3, 6, *numbers).all(-1)
        assert same[known].all()
        assert (state[0] & ~known).any(axis=1).all() or known.all()
        known = state[0]
    assert known.all() and (xt < 5).all() and (xt[:, 1] == 2).all()


def test_the_loop_carries_ids():
    process = KERNELS[0]
    logits = jax.random.normal(jax.random.key(0), (2, 6, 5))
    denoise = lambda xt, t: process.estimate(logits, xt, t)
    xt = process.prior(jax.random.key(1), (2, 6))
    x0 = jax.jit(lambda key: sample(Confidence(gumbel=0), process, denoise, key, xt, 3))(jax.random.key(2))
    assert x0.dtype == jnp.int32 and (x0 < 5).all()
    assert isinstance(Confidence(), StepSampler)
    with pytest.raises(ValueError, match="gumbel is -1"):
        Confidence(gumbel=-1)
