"""Samplers that jump at rates, or take tokens back: the exact posterior for their network, and what they keep exactly.

An exact sampler with the exact posterior tends to the law; for fixed `eta` ReMDM does not, because at every step a
share of the tokens is drawn at once, but it comes near."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.corruption import keep
from src.corruption.categorical import Categorical
from src.corruption.distance import Distance
from src.corruption.mask_and_uniform import GIDD
from src.interfaces import FieldSpec, StepSampler
from src.sampling.steps.categorical import Confidence
from src.sampling.steps.jumps import FlowMatching, ReMDM, TauLeaping
from tests.helpers.oracle import CategoricalOracle, floor, total_variation
from tests.sampling.test_oracle import KERNELS

MASKS = ("absorbing", "several mask ids", "cosine")
ONE_LAW = (*MASKS, "uniform", "marginal", "mask and uniform")
PAIRS = [
    *((kernel, FlowMatching()) for kernel in ONE_LAW),
    *((kernel, FlowMatching(corrector=0.5)) for kernel in ("absorbing", "uniform", "mask and uniform")),
    *((kernel, TauLeaping()) for kernel in KERNELS if kernel not in ("gidd", "distance", "cosine", "marginal")),
    ("distance", TauLeaping(ordered=True)),
    *((kernel, ReMDM(eta=0.02)) for kernel in MASKS),
    ("absorbing", ReMDM(rule="rescale", eta=0.05)),
]
IN_THE_SUITE = ("mask and uniform",)  # the others are of the group `faults`


def never(xt, t):
    """A second evaluation, which no step asks for."""
    raise AssertionError


def words(value):
    """Of a kernel or a sampler, for the test's name."""
    return value if isinstance(value, str) else f"{type(value).__name__}-{getattr(value, 'corrector', '')}"


@pytest.mark.parametrize(
    "kernel, sampler",
    [pytest.param(*pair, marks=() if pair[0] in IN_THE_SUITE else pytest.mark.faults) for pair in PAIRS],
    ids=words,
)
def test_samples_tend_to_the_law(kernel, sampler):
    oracle = CategoricalOracle(KERNELS[kernel])
    few, many = (total_variation(oracle, sampler, steps) for steps in (4, 48))
    assert 0.08 < few < 0.25
    assert many < floor(oracle) + 0.02 < few / 2


@pytest.mark.faults
def test_samplers_that_do_not_tend_to_the_law_come_near():
    """ReMDM with a fixed share, and confidence that revises or masks again; without noise confidence stays far."""
    for options, sampler, least, most in [
        ({}, ReMDM(eta=0.2), 0.03, 0.08),
        ({"mask": 0.8, "carry_over": False}, Confidence(gumbel=4.0, revise=True), 0.0, 0.12),
        ({"carry_over": False}, Confidence(gumbel=4.0, remask=0.3), 0.0, 0.06),
        ({}, Confidence(gumbel=0.0), 0.2, 0.4),
    ]:
        oracle = CategoricalOracle(dataclasses.replace(KERNELS["absorbing"], **options))
        assert least <= total_variation(oracle, sampler, 16) < most, (options, sampler)


@pytest.mark.parametrize("sampler", [ReMDM(eta=0.3), ReMDM(rule="rescale", eta=0.7)], ids=["cap", "rescale"])
def test_remasking_keeps_the_marginals(sampler):
    """With x_0 for certain, the share of known tokens after every step is abar, exactly as without remasking."""
    process, tokens = Categorical(field=FieldSpec((4000,), vocab=3), schedule=keep.CosineDecay()), 4000
    x0 = jnp.arange(tokens)[None] % 3
    estimate = jnp.where(jnp.arange(3) == x0[..., None], 0.0, -85.0)
    xt, times = process.prior(jax.random.key(0), (1, tokens)), sampler.times(process, 8)
    step = jax.jit(lambda key, xt, t, s: sampler.step(process, key, estimate, xt, t, s, (), never)[0])
    back, kept, x0 = 0, process.schedule.keep(times), np.asarray(x0)
    for k in range(8):
        before = np.asarray(xt)
        xt = np.asarray(step(jax.random.key(k), before, times[k], times[k + 1]))
        np.testing.assert_allclose((xt < 3).mean(), kept[k + 1], atol=0.03)
        assert (xt[xt < 3] == x0[xt < 3]).all()
        back += int(((before < 3) & (xt == 3)).sum())
    assert (xt == x0).all() and back > 500


def leave_one_out(xt, vocab):
    """What a network that has learned "all tokens are equal" says of each token from the others."""
    counts = jax.nn.one_hot(xt, vocab).sum(1, keepdims=True) - jax.nn.one_hot(xt, vocab)
    return jnp.log((counts + 1e-3) / (counts + 1e-3).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    "options, sampler, repairs",
    [
        ({"carry_over": False}, Confidence(gumbel=0.0, remask=0.5), True),
        ({"carry_over": False}, Confidence(gumbel=0.0, drop=0.6), True),
        ({"carry_over": False, "mask": 0.8}, Confidence(gumbel=0.0, revise=True), True),
        ({"carry_over": False}, Confidence(gumbel=0.0), False),
        ({}, Confidence(gumbel=0.0), False),
        ({"mask": 0.8}, FlowMatching(corrector=2.0), True),
    ],
    ids=["remask", "drop", "revise", "plain", "carried over", "corrector"],
)
def test_a_planted_error_is_repaired_by_samplers_that_take_back(options, sampler, repairs):
    """One wrong token is known already. Given tokens are never touched."""
    process = Categorical(field=FieldSpec((8,), vocab=3), **options)
    xt = jnp.broadcast_to(jnp.array([1, 1, 1, 2, 1, 3, 3, 3]), (50, 8))
    times, state = np.asarray(sampler.times(process, 12)), sampler.init(process, xt)
    if isinstance(sampler, Confidence):  # as if all were made in earlier steps, with probability 0.9
        state = (xt < 3, jnp.full((50, 1), 8), state[2], jnp.full((50, 8), 0.9))
    given = np.arange(8) == 0
    step = jax.jit(lambda key, xt, t, s, state: sampler.step(
        process, key, process.estimate(leave_one_out(xt, 3), xt, t), xt, t, s, state, never
    ))  # fmt: skip
    for k in range(6, 12):
        t, s = (np.where(given, 0.0, time)[None].astype(np.float32) for time in (times[k], times[k + 1]))
        xt, state = step(jax.random.key(k), xt, t, s, state)
    xt = np.asarray(xt)
    assert (xt[:, 0] == 1).all() and (xt < 3).all()
    assert ((xt[:, 3] == 1).mean() > 0.75) == repairs and ((xt[:, 3] == 2).mean() > 0.75) != repairs


def test_refusals():
    two, mixed = Categorical(field=FieldSpec((2,), vocab=2)), Categorical(field=FieldSpec((2,), vocab=2), mask=0.5)
    moving, near = GIDD(field=FieldSpec((2,), vocab=2)), Distance(field=FieldSpec((2,), vocab=2))
    xt = jnp.zeros((1, 2), jnp.int32)
    for sampler in (ReMDM(), FlowMatching(), TauLeaping()):
        assert isinstance(sampler, StepSampler)
    for told, make in [
        ("rule='loop'", lambda: ReMDM(rule="loop")),
        ("eta=2", lambda: ReMDM(eta=2)),
        ("masks only", lambda: ReMDM().init(mixed, xt)),
        ("masks only", lambda: ReMDM().init(moving, xt)),
        ("corrector is -1", lambda: FlowMatching(corrector=-1)),
        ("which GIDD has not", lambda: FlowMatching().init(moving, xt)),
        ("which Distance has not", lambda: FlowMatching().init(near, xt)),
        ("no place in an order", lambda: TauLeaping(ordered=True).init(mixed, xt)),
        ("remask=2", lambda: Confidence(remask=2)),
        ("carry_over=False", lambda: Confidence(revise=True).init(two, xt)),
    ]:
        with pytest.raises(ValueError, match=told):
            make()
