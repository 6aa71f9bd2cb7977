"""Kernels that differ by place or distance, and the published numbers of systems that have several mask ids or draw
replaced ids by their shares in the data."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from src.corruption import keep
from src.corruption.categorical import TINY, Categorical
from src.corruption.distance import Distance
from src.corruption.mask_and_uniform import GIDD, VQDiffusion
from src.interfaces import FieldSpec, Process
from tests.helpers.family import fixed_logits, golden
from tests.helpers.programs import compiled

V = 4
FIELD = FieldSpec((5,), vocab=V)


# --------------------------------------------------------------------------- by distance


def rates(width, vocab):
    """The generator L of `Distance`, in float64 by its definition."""
    gap = np.arange(vocab)[:, None] - np.arange(vocab)
    k = np.exp(-(gap**2) / (2 * width**2)) * (gap != 0)
    return k - np.diag(k.sum(1))


@pytest.mark.parametrize("width, vocab", [(0.7, 4), (2.0, 9)])
def test_distances_are_the_exponential_of_their_rates(width, vocab):
    """The matrices of all times, Bayes' rule, and steps that compose; a small step is D3PM's form I + L u."""
    schedule, generator = keep.CosineDecay(), rates(width, vocab)
    process = Distance(field=FieldSpec((5,), vocab=vocab), schedule=schedule, width=width)
    assert isinstance(process, Process) and process.ids == process.outputs == vocab
    slowest = np.sort(-np.linalg.eigvalsh(generator))[1]
    ids, draw = jnp.arange(vocab), np.random.default_rng(0)

    def jump(t, s):
        abar = [float(schedule.keep(time)) for time in (t, s)]
        return scipy.linalg.expm(generator * -np.log(abar[0] / abar[1]) / slowest)

    for t, s in [(0.2, 0.1), (0.5, 0.0), (0.9, 0.4), (0.99, 0.98), (1e-3, 0.0)]:
        got = np.asarray(compiled(process.arrival)(ids, jnp.float32(t), jnp.float32(s))).T
        np.testing.assert_allclose(got, jump(t, s), atol=2e-6)
        p = draw.dirichlet(np.ones(vocab), size=(1, vocab)).astype(np.float32)
        bayes = (p[0] / jump(t, 0.0).T) @ jump(s, 0.0) * jump(t, s).T
        bayes /= bayes.sum(-1, keepdims=True)
        found = compiled(process.reverse)(ids[None], jnp.asarray(p), t, s)[0]
        np.testing.assert_allclose(found, bayes, atol=3e-4 if t > 1e-2 else 2e-2)
    t = 1e-3
    small = (np.asarray(compiled(process.likelihood)(ids, jnp.float32(t))) - np.eye(vocab)) / -np.log(
        float(schedule.keep(t))
    )
    np.testing.assert_allclose(small, generator / slowest, rtol=0.02, atol=2e-3)
    at_one = np.asarray(compiled(process.likelihood)(ids, jnp.float32(1.0)))
    np.testing.assert_allclose(at_one, 1 / vocab, rtol=1e-5)


def test_distances_corrupt_by_their_matrix_and_a_large_width_is_the_uniform_kernel():
    n, process = 20_000, Distance(field=FIELD, width=0.8)
    x0, t = jnp.broadcast_to(jnp.arange(V), (n, V)), jnp.array([[0.0, 0.3, 0.7, 1.0]])
    xt = np.asarray(compiled(process.corrupt)(x0, compiled(process.noise)(jax.random.key(1), (n, V)), t).xt)
    np.testing.assert_array_equal(xt[:, 0], 0)
    for token in range(V):
        expected = compiled(process.likelihood)(jnp.arange(V), jnp.float32(t[0, token]))[token]
        assert np.abs(np.bincount(xt[:, token], minlength=V) / n - np.asarray(expected)).max() < 0.015
    wide, uniform = Distance(field=FIELD, width=1e4), Categorical(field=FIELD, mask=0.0)
    ids = jnp.arange(V)[None]
    p = jax.nn.softmax(jax.random.normal(jax.random.key(0), (1, V, V)))
    for t, s in [(0.0, 0.0), (0.5, 0.0), (0.7, 0.3), (1.0, 0.4), (1.0, 1.0)]:
        np.testing.assert_allclose(
            compiled(wide.reverse)(ids, p, t, s), compiled(uniform.reverse)(ids, p, t, s), atol=3e-6
        )
    prior = np.bincount(np.asarray(compiled(process.prior)(jax.random.key(2), (n, 1))).ravel(), minlength=V) / n
    assert np.abs(prior - 1 / V).max() < 0.015


# --------------------------------------------------------------------------- by place


@dataclasses.dataclass(frozen=True)
class OneOf:
    """The schedule of one place of a schedule by place."""

    base: Any
    place: int
    places: ClassVar[None] = None

    def keep(self, t):
        return self.base.keep(jnp.asarray(t)[..., None])[..., self.place]


@pytest.mark.parametrize(
    "options",
    [{"masks": 2}, pytest.param({"mask": 0.7, "absorbing": True}, marks=pytest.mark.faults)],
    ids=["masks", "mixed"],
)
def test_each_place_has_its_own_schedule(options):
    """A row is single tokens side by side; important ones are kept longer; both ends are those of the base."""
    schedule = keep.ByPlace(importance=(2, 0, 1, 1, 1), strength=0.3)
    process = Categorical(field=FIELD, schedule=schedule, **options)
    t, s = jnp.array([[0.8], [0.4]]), jnp.array([[0.3], [0.0]])
    xt = jnp.array([[0, 4, 4, 1, 2], [4, 4, 3, 3, 1]])
    p = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 5, V)))
    got, noise = compiled(process.reverse)(xt, p, t, s), compiled(process.noise)(jax.random.key(1), (2, 5))
    c = compiled(process.corrupt)(jnp.minimum(xt, 3), noise, t)
    for n in range(5):
        one = Categorical(field=FIELD, schedule=OneOf(schedule, n), **options)
        np.testing.assert_allclose(
            got[:, n], compiled(one.reverse)(xt[:, n : n + 1], p[:, n : n + 1], t, s)[:, 0], rtol=1e-5
        )
        own = jax.tree.map(lambda a, n=n: a[:, n : n + 1], noise)
        np.testing.assert_array_equal(
            compiled(one.corrupt)(jnp.minimum(xt, 3)[:, n : n + 1], own, t).xt[:, 0], c.xt[:, n]
        )
    middle = np.asarray(schedule.keep(0.5))
    np.testing.assert_allclose(middle, 0.5 + 0.3 * np.array([1, -1, 0, 0, 0]), rtol=1e-5)
    for end in (0.0, 1.0):
        np.testing.assert_array_equal(schedule.keep(end), jnp.full(5, 1 - end))
    with pytest.raises(ValueError, match="5 tokens, but times of shape"):
        schedule.keep(jnp.zeros((2, 3)))


def test_what_kernels_refuse():
    by_place = keep.ByPlace(importance=(1, 2))
    for words, make in [
        ("some tokens would be restored", lambda: keep.ByPlace(importance=(1, 2), strength=0.4)),
        (r"importance has shape \(0,\)", lambda: keep.ByPlace(importance=())),
        ("has 2 places, but the field", lambda: Categorical(field=FIELD, schedule=by_place)),
        ("has 2 places", lambda: Categorical(field=FieldSpec((2,), vocab=3, features=2), schedule=by_place)),
        ("no mask ids", lambda: Distance(field=FIELD, mask=1.0)),
        ("width=0", lambda: Distance(field=FIELD, width=0)),
        ("GIDD has its own schedule", lambda: GIDD(field=FIELD, mask=0.5)),
        ("share is 1", lambda: GIDD(field=FIELD, share=1.0)),
        ("VQDiffusion: steps=1", lambda: VQDiffusion(field=FIELD, steps=1)),
        ("no weighted cross-entropy", lambda: GIDD(field=FIELD).rate(0.5)),
        ("exponent=0.5", lambda: keep.CosinePower(exponent=0.5)),
        ("exponent is 0", lambda: keep.EarlyDecay(exponent=0)),
        ("total is 1", lambda: keep.LogDecay(total=1)),
        ("total is 0", lambda: keep.ExponentialDecay(total=0)),
        ("first=2", lambda: keep.GeometricRate(first=2.0, last=1.0)),
    ]:
        with pytest.raises(ValueError, match=words):
            make()


# --------------------------------------------------------------------------- published numbers


@pytest.mark.parametrize("masks", [1, 4])
def test_published_reddit_steps(masks):
    """Guided probabilities and draws as released, with all mass of the masks on the first id; and, as in the paper,
    spread over them."""
    arrays = golden(f"reddit/step_m{masks}")
    vocab, t = int(arrays["classes"]), arrays["t"]
    linear = keep.LinearDecay(least=1e-3)
    process = Categorical(field=FieldSpec((9,), vocab=vocab), schedule=linear, masks=masks, rehash=True)
    xt, s = jnp.asarray(arrays["x_t"]), t - arrays["dt"]
    given = fixed_logits(arrays, arrays["x_t"])
    unknown = arrays["x_t"] >= vocab
    for name in ("cfg1_const", "cfg2p5_const", "cfg2p5_linear", "cfg2p5_biaslinear"):
        null = given + arrays["null"]
        logits = null + arrays[f"{name}_scale"] * (given - null)
        p = jnp.exp(compiled(process.estimate)(logits[..., :vocab], xt, t))
        np.testing.assert_allclose(p[unknown], arrays[f"{name}_p_x0"][unknown][:, :vocab], atol=2e-4)
        law = np.array(compiled(process.reverse)(xt, p, t, s))
        law[..., vocab], law[..., vocab + 1 :] = law[..., vocab:].sum(-1), 0
        np.testing.assert_array_equal(np.argmax(law / arrays["race"], -1), arrays[f"{name}_x_s"])
    spread = np.asarray(compiled(process.reverse)(xt, p, t, s))
    published = arrays["q_spread"][unknown]
    np.testing.assert_allclose(spread[unknown], published / published.sum(-1, keepdims=True), atol=2e-6)


def test_rehash_draws_every_mask_id_anew():
    """Kept ids of masks need more than one step to change without it; with one mask id both are MDLM."""
    p = jnp.full((1, 3, V), 1 / V)
    xt = jnp.array([[4, 5, 1]])
    sticky, anew = (Categorical(field=FIELD, masks=2, rehash=rehash) for rehash in (False, True))
    for process, ratio in [(sticky, 19), (anew, 1)]:
        law = np.asarray(compiled(process.reverse)(xt, p, 0.5, 0.45))
        np.testing.assert_allclose(law[0, 0, 4] / law[0, 0, 5], ratio, rtol=0.2)
        np.testing.assert_allclose(law[0, :2, :V].sum(-1), 0.1, rtol=1e-4)
    one = [Categorical(field=FIELD, rehash=rehash) for rehash in (False, True)]
    xt = jnp.array([[4, 0, 4]])
    np.testing.assert_allclose(*(compiled(process.reverse)(xt, p, 0.8, 0.3) for process in one), rtol=1e-6)
    np.testing.assert_array_equal(
        *(compiled(process.posterior)(jax.random.key(0), xt, jnp.log(p), 0.8, 0.3) for process in one)
    )


def test_published_analytic_step_of_mdlm_is_bayes():
    """Tau-leaping with Tweedie's correction (Lou et al. 2024 "SEDD") of masks is the posterior itself."""
    process = Categorical(field=FieldSpec((8,), vocab=6), schedule=keep.LinearDecay(least=1e-3))
    arrays = golden("mdlm/ancestral")
    xt, t = jnp.asarray(arrays["x_t"]), arrays["t"]
    p = jnp.exp(compiled(process.estimate)(fixed_logits(arrays, arrays["x_t"], 6), xt, t))
    law = np.asarray(compiled(process.reverse)(xt, p, t, t - arrays["dt"]))
    np.testing.assert_array_equal(np.argmax(law / (1e-10 - np.log(arrays["u"] + 1e-10)), -1), arrays["x_s_analytic"])


@dataclasses.dataclass(frozen=True)
class Table:
    """alpha_bar of the steps 0, 1, …, at t = step / steps."""

    values: tuple[float, ...]
    steps: int
    places: ClassVar[None] = None

    def keep(self, t):
        return jnp.asarray(self.values)[jnp.round(jnp.asarray(t) * self.steps).astype(jnp.int32)]


def test_published_digress():
    """Marginal kernels of nodes and edges: matrices, posteriors given x_0 and given probabilities, draws."""
    arrays, schedule = golden("digress/transition_and_posterior"), golden("digress/schedule")
    steps = int(arrays["steps"])
    assert steps == int(schedule["steps"])
    grid = np.cos(0.5 * np.pi * (np.linspace(0, steps + 2, steps + 2) / (steps + 2) + 0.008) / 1.008) ** 2
    table = np.float32(np.cumprod(1 - np.minimum(1 - grid[1:] / grid[:-1], 0.9999)))
    np.testing.assert_allclose(table[schedule["index"]], schedule["alpha_bar"], atol=1e-5)
    t, s = arrays["t"] / steps, (arrays["t"] - 1) / steps
    real = arrays["node_mask"]
    for name, size in [("x", 4), ("e", 3)]:
        marginal = tuple(arrays[f"{name}_marginal"].tolist())
        process = Categorical(
            field=FieldSpec((5,), vocab=size), schedule=Table(tuple(table.tolist()), steps), mask=0.0, marginal=marginal
        )
        for row in range(2):
            found = compiled(process.likelihood)(jnp.arange(size), jnp.float32(t[row])).T
            np.testing.assert_allclose(found, arrays[f"q_t_bar_{name}"][row], atol=1e-5)
            if name == "x":
                one = compiled(process.arrival)(jnp.arange(size), jnp.float32(t[row]), jnp.float32(s[row])).T
                np.testing.assert_allclose(one, arrays["q_t_x"][row], atol=1e-5)
        pairs = real if name == "x" else (real[:, :, None] & real[:, None, :] & ~np.eye(5, dtype=bool))
        xt, p = jnp.asarray(arrays[f"{name}_t"]), jax.nn.softmax(jnp.asarray(arrays[f"logits_{name}"]), axis=-1)
        flat = lambda a, axes=pairs.ndim: a.reshape(2, -1, *a.shape[axes:])
        law = np.asarray(compiled(process.reverse)(flat(xt), flat(p), t[:, None], s[:, None]))
        np.testing.assert_allclose(law[flat(pairs)], flat(arrays[f"p_s_{name}"])[flat(pairs)], atol=1e-4)
        if name == "x":
            sure = compiled(process.reverse)(xt, jax.nn.one_hot(arrays["x"], 4), t[:, None], s[:, None])
            np.testing.assert_allclose(np.asarray(sure)[real], arrays["posterior_x"][real], atol=1e-4)
            drawn = np.argmax(law / np.maximum(arrays["race_s_x"], TINY), -1)
            np.testing.assert_array_equal(drawn[real], arrays["x_s"][real])
