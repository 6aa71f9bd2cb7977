"""The head that diffuses one token: what it recovers, and that all chance is drawn before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from src.corruption.schedules import CosineBetas, Linear
from src.interfaces import FieldSpec, Head
from src.models.heads.linear import LinearHead as MeanHead
from src.models.heads.token_diffusion import TokenDiffusionHead
from src.sampling.guidance import paired

WIDTH, SPEC = 8, FieldSpec((4,), features=2)
MODES = jnp.asarray([[1.0, -0.5], [-0.5, 1.0]])
ALONE = lambda output, t: output


def make(cls=TokenDiffusionHead, **options):
    """A head, and its parameters; every tensor random, so that nothing hides behind a zero."""
    options = {"mlp_width": 32, "depth": 2} | options if cls is TokenDiffusionHead else options
    head = cls(width=WIDTH, spec=SPEC, outputs=2, rngs=nnx.Rngs(0), **options)
    graph, state = nnx.split(head)
    leaves, structure = jax.tree.flatten(nnx.to_pure_dict(state))
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noisy = [a + 0.2 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return head, graph, jax.tree.unflatten(structure, noisy)


def bind(graph, params):
    return nnx.merge(graph, nnx.State(params))


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def sampled(graph, params, key, states, guide, choose):
    """What the head draws, as one program."""
    return bind(graph, params).sample(key, states, guide, choose)


def trained(cls, updates, **options):
    """(graph, parameters) of a head that was trained on one state, and two equally frequent vectors behind it."""
    head, graph, _ = make(cls, **options)
    params, hidden = nnx.to_pure_dict(nnx.state(head)), jnp.ones((1, 64, WIDTH))
    optimizer = optax.adam(3e-3)

    def step(index, carry):
        params, state = carry
        choice, noise = jax.random.split(jax.random.fold_in(jax.random.key(1), index))
        target = MODES[jax.random.randint(choice, (1, 64), 0, 2)]
        draws = head.noise(noise, (1, 64))
        grads = jax.grad(lambda p: bind(graph, p).nll(hidden, target, draws).mean())(params)
        change, state = optimizer.update(grads, state)
        return optax.apply_updates(params, change), state

    fit = jax.jit(lambda params: jax.lax.fori_loop(0, updates, step, (params, optimizer.init(params)))[0])
    return graph, fit(params)


@pytest.mark.faults
@pytest.mark.parametrize("options", [{}, {"schedule": CosineBetas(), "parameterization": "v", "sampler": "ancestral"}])
def test_two_modes_are_recovered_where_a_mean_head_is_between_them(options):
    head = trained(TokenDiffusionHead, 500, steps=16, **options)
    found = np.asarray(sampled(*head, jax.random.key(2), jnp.ones((400, WIDTH)), ALONE, ALONE))
    distance = np.linalg.norm(found[:, None] - MODES, axis=-1)
    assert (distance.min(-1) < 0.25).mean() > 0.9
    assert 0.4 < (distance.argmin(-1) == 0).mean() < 0.6
    mean = sampled(*trained(MeanHead, 200), jax.random.key(2), jnp.ones((1, WIDTH)), ALONE, ALONE)
    np.testing.assert_allclose(mean[0], MODES.mean(0), atol=0.1)


def test_the_loss_is_that_of_its_definition_and_not_random():
    """Row by row and draw by draw: each token's own state, its own times and its own noise."""
    head, graph, params = make(draws=3)
    assert isinstance(head, Head)
    head = bind(graph, params)
    hidden = np.asarray(jax.random.normal(jax.random.key(0), (2, 4, WIDTH)))
    target = np.asarray(jax.random.normal(jax.random.key(1), (2, 4, 2)))
    draws = head.noise(jax.random.key(2), (2, 4))
    nll = jax.jit(lambda params, hidden, target: bind(graph, params).nll(hidden, target, draws))
    found = np.asarray(nll(params, hidden, target))
    np.testing.assert_array_equal(found, nll(params, hidden, target))
    network = jax.jit(lambda xt, time, state: head.network(xt, time, head.state(state)))
    t, noise = np.asarray(draws.t).reshape(2, 4, 3), np.asarray(draws.noise).reshape(2, 4, 3, 2)
    assert len(np.unique(t)) == 24
    for row, token in ((0, 0), (1, 2)):
        errors = []
        for i in range(3):
            time, eps, x0 = t[row, token, i], noise[row, token, i], target[row, token]
            xt = ((1 - time) * x0 + time * eps)[None, None]
            out = network(xt, time[None, None], hidden[row : row + 1, token : token + 1])
            errors.append(((out - (eps - x0)) ** 2).mean())
        np.testing.assert_allclose(found[row, token], np.mean(errors), rtol=1e-5)


def test_accumulation_changes_neither_loss_nor_gradient():
    head, graph, params = make()
    hidden = jax.random.normal(jax.random.key(0), (4, 3, WIDTH))
    target = jax.random.normal(jax.random.key(1), (4, 3, 2))
    draws = head.noise(jax.random.key(2), (4, 3))
    assert all(leaf.shape[0] == 4 for leaf in jax.tree.leaves(draws))

    def total(params, part):
        return bind(graph, params).nll(*jax.tree.map(lambda a: a[part], (hidden, target, draws))).sum()

    value = jax.jit(jax.value_and_grad(total))
    whole, *halves = (value(params, jnp.arange(*part)) for part in ((0, 4), (0, 2), (2, 4)))
    summed = jax.tree.map(lambda a, b: a + b, *halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, summed)


@pytest.mark.parametrize("sampler", ["ddim", pytest.param("ancestral", marks=pytest.mark.faults)])
def test_guided_states_share_all_noise(sampler):
    """Guidance between equal states, and of scale 1, is none; of scale 0 it is that of the other state."""
    _, graph, params = make(sampler=sampler, steps=5)
    given, null = jax.random.normal(jax.random.key(0), (2, 6, WIDTH))
    scaled = lambda scale: lambda output, t: output[1::2] + scale * (output[::2] - output[1::2])
    sample = lambda states, guide: sampled(graph, params, jax.random.key(1), states, guide, ALONE)
    alone = sample(given, ALONE)
    assert alone.shape == (6, 2)
    np.testing.assert_allclose(sample(paired(given, given), scaled(3.0)), alone, atol=1e-5)
    both = paired(given, null)
    np.testing.assert_allclose(sample(both, scaled(1.0)), alone, atol=1e-5)
    np.testing.assert_allclose(sample(both, scaled(0.0)), sample(null, ALONE), atol=1e-5)
    assert jnp.abs(sample(both, scaled(2.0)) - alone).max() > 1e-2


@pytest.mark.parametrize(
    "options, match",
    [
        ({"draws": 0}, r"head\.draws=0"),
        ({"sampler": "heun"}, r"head\.sampler='heun'"),
        ({"noise_scale": -1.0}, r"head\.noise_scale=-1"),
        ({"norm": "batch"}, r"head\.norm='batch'"),
        ({"mlp": "relu"}, r"head\.mlp='relu'"),
        ({"schedule": Linear(), "parameterization": "mean"}, "parameterization"),
    ],
)
def test_refusals(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)


def test_it_takes_no_process_from_outside():
    head, *_ = make()
    with pytest.raises(ValueError, match=r"head\.name=token_diffusion"):
        head(jnp.ones((1, 4, WIDTH)))
    with pytest.raises(ValueError, match=r"head\.name=token_diffusion"):
        TokenDiffusionHead(width=WIDTH, spec=FieldSpec((4,), vocab=5), outputs=5, rngs=nnx.Rngs(0))
