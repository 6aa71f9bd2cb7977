"""The categorical process against Bayes' rule in float64, against its own algebra, and against published numbers."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.corruption import keep
from src.corruption.categorical import TINY, Categorical
from src.corruption.mask_and_uniform import GIDD, MaskAndWrong, VQDiffusion
from src.interfaces import FieldSpec, Process
from tests.helpers.family import fixed_logits, golden
from tests.helpers.programs import compiled

V = 4
FIELD = FieldSpec((5,), vocab=V)
PAIRS = [
    (0.9, 0.1),
    (0.9, 0.899),
    (0.5, 0.0),
    (0.004, 0.001),
    (1.0, 0.6),
    (0.3, 0.3),
    (0.0, 0.0),
    (1.0, 1.0),
    (1.0, 0.0),
]


KERNELS = {
    "mask": Categorical(field=FIELD),
    "masks": Categorical(field=FIELD, masks=3),
    "cosine": Categorical(field=FIELD, schedule=keep.CosineDecay()),
    "power": Categorical(field=FIELD, schedule=keep.PowerDecay(exponent=3.0), mask=0.5),
    "uniform": Categorical(field=FIELD, mask=0.0),
    "marginal": Categorical(field=FIELD, mask=0.0, marginal=(1, 2, 0, 5), schedule=keep.CosineDecay()),
    "mixed": Categorical(field=FIELD, mask=0.8, masks=2),
    "absorbing": Categorical(field=FIELD, mask=0.8, masks=2, absorbing=True),
    "rehash": Categorical(field=FIELD, masks=3, rehash=True),
    "rehash, mixed": Categorical(field=FIELD, mask=0.8, masks=2, rehash=True),
    "gidd": GIDD(field=FIELD, share=0.2),
    "vqdiffusion": VQDiffusion(field=FIELD, steps=10, keep=(0.9, 0.0), masked=(0.06, 0.8)),
    "wrong": MaskAndWrong(field=FIELD, wrong=0.4),
}
each_kernel = pytest.mark.parametrize("name", KERNELS)
REVERSE = jax.jit(Categorical.reverse, static_argnums=0)


def marginal_matrix(process, t):
    """q(x_t | x_0), [V, K] in float64, by its definition."""
    a, m, u = (float(x) for x in compiled(process.masses)(jnp.float32(t)))
    law = np.full(V, 1 / V) if process.marginal is None else np.array(process.marginal)
    masks = process.ids - V
    return a * np.eye(V, process.ids) + np.concatenate([u * law, np.full(masks, m / max(masks, 1))])


def jump_matrix(process, t, s):
    """q(x_t | x_s), [K, K] in float64, by its definition."""
    (a_t, m_t, u_t), (a_s, m_s, u_s) = (
        [float(x) for x in compiled(process.masses)(jnp.float32(time))] for time in (t, s)
    )
    a = a_t / a_s if a_s else 1.0
    m, u = m_t - a * m_s, u_t - a * u_s
    if process.absorbing or process.rehash:
        m = (m_t - m_s) / max(1 - m_s, TINY)
        u = 1 - a - m
    law = np.full(V, 1 / V) if process.marginal is None else np.array(process.marginal)
    masks = process.ids - V
    added = np.maximum(np.concatenate([u * law, np.full(masks, m / max(masks, 1))]), 0)
    jump = a * np.eye(process.ids) + added
    if process.absorbing or process.rehash:
        jump[V:] = np.eye(process.ids)[V:]
    if process.rehash and t > s:
        jump[V:, V:] = 1 / masks
    return jump


@each_kernel
def test_posterior_is_bayes(name):
    """The sum over x_0 of p(x_0) q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0), for every x_t that is possible."""
    process = KERNELS[name]
    draw = np.random.default_rng(0)
    xt = np.arange(process.ids)[None]
    for t, s in PAIRS:
        p = draw.dirichlet(np.ones(V), size=(1, process.ids))
        at_t, at_s, jump = marginal_matrix(process, t), marginal_matrix(process, s), jump_matrix(process, t, s)
        got = np.asarray(REVERSE(process, xt, jnp.asarray(p, jnp.float32), t, s))
        np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)
        for x in range(process.ids):
            q = at_t[:, x]
            if not (q > 0).any():
                np.testing.assert_array_equal(got[0, x], np.eye(process.ids)[x])  # it stays
                continue
            r = np.where(q > 0, p[0, x] / np.maximum(q, TINY), 0)
            expected = (r @ at_s) * jump[:, x]
            expected /= expected.sum()
            np.testing.assert_allclose(got[0, x], expected, rtol=2e-4, atol=1e-6, err_msg=f"{x} {t} -> {s}")


@each_kernel
def test_jumps_compose(name):
    """Chapman-Kolmogorov: s -> r -> t is s -> t, and 0 -> t are the marginals; all are laws."""
    process = KERNELS[name]

    def jump(t, s):
        return np.asarray(compiled(process.arrival)(jnp.arange(process.ids), jnp.float32(t), jnp.float32(s))).T

    def law(t):
        _, mask, rest = compiled(process.masses)(jnp.float32(t))
        ids = jnp.arange(process.ids)
        return compiled(process.masses)(jnp.float32(t))[0] * np.eye(V, process.ids) + compiled(process.mass_at)(
            ids, mask, rest
        )

    for t, r, s in [(0.9, 0.5, 0.1), (0.7, 0.69, 0.2), (0.4, 0.001, 0.0), (1.0, 0.999, 0.3)]:
        np.testing.assert_allclose(jump(r, s) @ jump(t, r), jump(t, s), atol=5e-6)
        np.testing.assert_allclose(jump(t, s).sum(1), 1, atol=5e-6)
        np.testing.assert_allclose(law(s) @ jump(t, s), law(t), atol=5e-6)
        np.testing.assert_allclose(law(t), marginal_matrix(process, t), atol=1e-6)


@each_kernel
def test_ends_are_exact_and_everything_between_is_finite(name):
    process = KERNELS[name]
    p = jax.nn.softmax(jax.random.normal(jax.random.key(0), (1, process.ids, V)))
    xt = jnp.arange(process.ids)[None]
    for t, s in itertools.product((0.0, 1e-6, 1e-3, 0.5, 1.0), repeat=2):
        got = np.asarray(REVERSE(process, xt, p, jnp.float32(max(t, s)), jnp.float32(min(t, s))))
        assert np.isfinite(got).all() and (got >= 0).all()
        if s == t:  # a token whose time stays keeps its value
            np.testing.assert_array_equal(got[0] > 0, np.eye(process.ids))
    for t in (0.001, 0.5, 1.0):
        got = np.asarray(REVERSE(process, xt, p, t, 0.0))
        possible = marginal_matrix(process, t).min(axis=0) > 0  # under every x_0
        assert not got[0, possible, V:].any()  # no mask is left
        np.testing.assert_allclose(got[0, possible, :V], p[0, possible], rtol=1e-4, atol=1e-7)


@each_kernel
def test_corruption_has_the_marginals(name):
    """Each token by its own time; clean tokens bit for bit."""
    process, n = KERNELS[name], 20_000
    t = np.array([0.0, 0.2, 0.7, 1.0], np.float32)
    x0 = jnp.broadcast_to(jnp.arange(V), (n, V))
    c = compiled(process.corrupt)(x0, compiled(process.noise)(jax.random.key(1), (n, V)), t[None])
    xt = np.asarray(c.xt)
    assert c.xt.dtype == x0.dtype
    np.testing.assert_array_equal(xt[:, 0], 0)
    for token, time in enumerate(t):
        expected = marginal_matrix(process, time)[token]
        shares = np.bincount(xt[:, token], minlength=process.ids) / n
        assert np.abs(shares - expected).max() < 4 * 0.5 / np.sqrt(n)
        np.testing.assert_array_equal(shares[expected == 0], 0)
    prior = np.asarray(compiled(process.prior)(jax.random.key(2), (n, 2)))
    expected = marginal_matrix(process, 1.0).mean(axis=0)
    assert np.abs(np.bincount(prior.ravel(), minlength=process.ids) / prior.size - expected).max() < 0.01


def test_draws_follow_the_posterior():
    process, n = KERNELS["mixed"], 20_000
    estimate = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (1, process.ids, V)))
    xt = jnp.broadcast_to(jnp.arange(process.ids), (n, process.ids))
    logs = jnp.broadcast_to(estimate, (n, process.ids, V))
    xs = np.asarray(compiled(process.posterior)(jax.random.key(1), xt, logs, 0.8, 0.3))
    expected = np.asarray(REVERSE(process, xt[:1], jnp.exp(estimate), 0.8, 0.3))[0]
    for token in range(process.ids):
        assert np.abs(np.bincount(xs[:, token], minlength=process.ids) / n - expected[token]).max() < 0.015


def test_known_tokens_are_carried_over():
    """With masks alone every other id is known; with a law, those that are clean; NaN and -inf are nowhere."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, V)), jnp.float32).at[0, 2, 0].set(-jnp.inf)
    xt, t = jnp.array([[0, 1, V, 2, V]]), jnp.array([[0.0, 0.5, 0.5, 0.5, 1.0]])
    plain = jax.nn.log_softmax(logits)
    for name, known in [("mask", [0, 1, 3]), ("uniform", [0]), ("mixed", [0])]:
        process = KERNELS[name]
        given = jnp.minimum(xt, process.ids - 1)
        estimate = np.asarray(compiled(process.estimate)(logits, given, t))
        assert np.isfinite(estimate).all()
        for token in range(5):
            if token in known:
                assert estimate[0, token].argmax() == xt[0, token] and estimate[0, token].max() == 0
                assert np.sort(estimate[0, token])[-2] < -80
            else:
                np.testing.assert_allclose(estimate[0, token], np.maximum(plain[0, token], np.log(TINY)), rtol=1e-6)
        np.testing.assert_allclose(process.hint(jnp.asarray(estimate)).sum(-1), 1, rtol=1e-5)


def test_without_carry_over_the_head_says_what_it_thinks_and_the_posterior_is_the_same():
    """A known token stays known in every reverse step, whatever probability the head gives it."""
    process, other = KERNELS["mask"], dataclasses.replace(KERNELS["mask"], carry_over=False)
    logits, xt = jax.random.normal(jax.random.key(0), (1, 3, V)), jnp.array([[1, V, 3]])
    ours, theirs = (compiled(p.estimate)(logits, xt, 0.5) for p in (process, other))
    np.testing.assert_allclose(theirs, jax.nn.log_softmax(logits), rtol=1e-6)
    np.testing.assert_allclose(
        compiled(process.reverse)(xt, jnp.exp(ours), 0.5, 0.2),
        compiled(other.reverse)(xt, jnp.exp(theirs), 0.5, 0.2),
        atol=1e-6,
    )


def test_numbers_of_a_token_are_independent():
    """A field of 3 numbers below V is three fields of ids side by side."""
    one = KERNELS["mixed"]
    process = dataclasses.replace(one, field=FieldSpec((5,), vocab=V, features=3))
    assert (process.outputs, process.inputs) == (3 * V, FieldSpec((5,), vocab=V + 2, features=3))
    x0 = jnp.asarray(np.random.default_rng(0).integers(0, V, size=(2, 5, 3)))
    noise = compiled(process.noise)(jax.random.key(0), (2, 5))
    t, s = jnp.array([[0.4], [0.9]]), jnp.array([[0.1], [0.0]])
    output = jax.random.normal(jax.random.key(1), (2, 5, 3 * V))

    @functools.partial(jax.jit, static_argnums=0)
    def run(process, x0, noise, output):
        c = process.corrupt(x0, noise, t)
        estimate = process.estimate(output, c.xt, t)
        return c, estimate, process.reverse(c.xt, jnp.exp(estimate), t, s)

    c, estimate, p = run(process, x0, noise, output)
    for i in range(3):
        own = jax.tree.map(lambda a, i=i: a[..., i], noise)
        alone, part, reverse = run(one, x0[..., i], own, output[..., i * V : (i + 1) * V])
        np.testing.assert_array_equal(alone.xt, c.xt[..., i])
        np.testing.assert_array_equal(part, estimate[..., i, :])
        np.testing.assert_allclose(reverse, p[..., i, :], rtol=1e-6)
    assert compiled(process.posterior)(jax.random.key(2), c.xt, estimate, t, s).shape == (2, 5, 3)
    assert compiled(process.prior)(jax.random.key(3), (2, 5)).shape == (2, 5, 3)
    assert process.hint(estimate).shape == (2, 5, 3 * V)


def test_the_contract_and_its_refusals():
    for process in KERNELS.values():
        assert isinstance(process, Process) and process.guided == process.outputs == V
    assert [KERNELS[n].inputs.vocab for n in ("mask", "masks", "uniform", "mixed")] == [V + 1, V + 3, V, V + 2]
    value, time = KERNELS["mask"].network(jnp.array([[1, 4]]), jnp.array([[0.25]]))
    np.testing.assert_array_equal(value, [[1, 4]])
    assert time == 250
    for words, options in [
        ("must have ids .*features=2", {"field": FieldSpec((5,), features=2)}),
        ("mask=1.5", {"mask": 1.5}),
        ("masks=0", {"masks": 0}),
        ("3 weights; give 4, all", {"marginal": (1, 2, 3)}),
    ]:
        with pytest.raises(ValueError, match=words):
            Categorical(**{"field": FIELD} | options)
    with pytest.raises(ValueError, match="only for mask=1"):
        KERNELS["mixed"].rate(0.5)


@pytest.mark.parametrize(
    "schedule",
    [
        keep.LinearDecay(),
        keep.LinearDecay(least=0.1),
        keep.CosineDecay(),
        keep.PowerDecay(exponent=3.0),
        keep.CosinePower(exponent=2),
        keep.EarlyDecay(exponent=1.5),
        keep.ExponentialDecay(total=9),
        keep.LogDecay(total=256),
        keep.ByPlace(importance=(3, 1, 1), base=keep.CosineDecay(), strength=0.0),
    ],
)
def test_schedules_begin_at_exactly_1_and_their_slope_is_autodiff(schedule):
    assert (np.asarray(schedule.keep(0.0)) == 1).all()
    t = jnp.linspace(0.01, 0.99, 50)
    if schedule.places:
        t = t[:, None]
        np.testing.assert_allclose(schedule.keep(t), jnp.repeat(schedule.base.keep(t), 3, axis=1))
        np.testing.assert_allclose(schedule.slope(t), jnp.repeat(schedule.base.slope(t), 3, axis=1), rtol=1e-6)
        return
    np.testing.assert_allclose(schedule.slope(t), jax.vmap(jax.grad(schedule.keep))(t), rtol=1e-4, atol=1e-6)
    ends = {keep.LinearDecay(least=0.1): 0.1, keep.ExponentialDecay(total=9): 1 / 9}
    np.testing.assert_allclose(schedule.keep(1.0), ends.get(schedule, 0.0), rtol=1e-6)


# --------------------------------------------------------------------------- published numbers


def test_published_schedules():
    arrays = golden("maskgit/mask_schedule")
    for form, schedule in [
        ("cosine", keep.CosineDecay()),
        ("uniform", keep.LinearDecay()),
        *((f"pow{n}".replace(".", "p"), keep.EarlyDecay(exponent=n)) for n in (2, 3, 2.5)),
        ("log", keep.LogDecay(total=int(arrays["total"]))),
        ("exp", keep.ExponentialDecay(total=int(arrays["total"]))),
    ]:
        masked = 1 - schedule.keep(1 - arrays["ratio"])
        np.testing.assert_allclose(masked, arrays[f"mask_{form}"], atol=2e-6)
    arrays = golden("mdlm/schedules")
    inside = arrays["t"] > 0
    for form, schedule in [
        ("cosine", keep.CosinePower(least=1e-3)),
        ("cosinesqr", keep.CosinePower(exponent=2, least=1e-3)),
        ("geometric", keep.GeometricRate()),
    ]:
        sigma, rate = -jnp.log(schedule.keep(arrays["t"])), -schedule.slope(arrays["t"]) / schedule.keep(arrays["t"])
        np.testing.assert_allclose(sigma[inside], arrays[f"{form}_sigma"][inside], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(rate[inside], arrays[f"{form}_dsigma"][inside], rtol=2e-3, atol=2e-4)
    process = Categorical(field=FIELD, schedule=keep.LinearDecay(least=1e-3))
    np.testing.assert_allclose(1 - process.schedule.keep(arrays["t"]), arrays["loglinear_move"], atol=1e-6)
    np.testing.assert_allclose(process.rate(arrays["t"]), arrays["loglinear_weight"], rtol=5e-5)
    arrays, cut = golden("md4/schedules"), 1 - 2e-4
    inside = arrays["t"] > 0
    for form, schedule in [
        ("linear", keep.LinearDecay()),
        ("cosine", keep.CosineDecay()),
        *((f"poly{n}".replace(".", "p"), keep.PowerDecay(exponent=float(n))) for n in (0.5, 2, 3)),
    ]:
        np.testing.assert_allclose(schedule.keep(arrays["t"]) * cut + 1e-4, arrays[f"{form}_alpha"], atol=1e-6)
        slope = np.asarray(schedule.slope(arrays["t"]) * cut)
        np.testing.assert_allclose(slope[inside], arrays[f"{form}_dalpha"][inside], rtol=1e-5, atol=1e-6)


def test_published_mdlm_steps():
    """Draws are races of unnormalised probabilities; times go from 1 to 1e-5."""
    process = Categorical(field=FieldSpec((8,), vocab=6), schedule=keep.LinearDecay(least=1e-3))
    arrays = golden("mdlm/ancestral")

    def step(ids, u, t, s):
        xt = jnp.asarray(ids)
        estimate = compiled(process.estimate)(fixed_logits(arrays, ids, 6), xt, t)
        p = np.asarray(REVERSE(process, xt, jnp.exp(estimate), t, s))
        return np.exp(estimate), np.argmax(p / (1e-10 - np.log(u + 1e-10)), axis=-1)

    t = arrays["t"]
    p, xs = step(arrays["x_t"], arrays["u"], t, t - arrays["dt"])
    np.testing.assert_allclose(p, arrays["p_x0"][..., :6], atol=1e-6)
    np.testing.assert_array_equal(xs, arrays["x_s"])
    times, length = np.linspace(1, 1e-5, 7, dtype=np.float32), np.float32((1 - 1e-5) / 6)
    for k in range(6):
        ids = step(arrays["run_states"][k], arrays["run_u"][k], times[k], times[k] - length)[1]
        np.testing.assert_array_equal(ids, arrays["run_states"][k + 1])


@pytest.mark.parametrize("form", ["linear", "cosine"])
@pytest.mark.parametrize("grid", ["uniform", "cosine"])
def test_published_md4_steps(form, grid):
    process = Categorical(field=FieldSpec((8,), vocab=6), schedule=getattr(keep, f"{form.title()}Decay")())
    arrays = golden("md4/ancestral")
    states = arrays[f"{grid}_{form}_states"]
    for k in range(8):
        t, s = arrays[f"{grid}_{form}_t"][k], np.maximum(arrays[f"{grid}_{form}_s"][k], 0)
        xt = jnp.asarray(states[k])
        p = REVERSE(process, xt, jnp.exp(compiled(process.estimate)(fixed_logits(arrays, states[k]), xt, t)), t, s)
        drawn = np.argmax(np.log(np.maximum(p, TINY)) + arrays["gumbel"][k], axis=-1)
        np.testing.assert_array_equal(drawn, states[k + 1])


def test_published_vq_diffusion():
    """Absorbing masks and a little uniform noise: tables, one-step tables, posterior, model and draw."""
    process = VQDiffusion(field=FieldSpec((6,), vocab=5), steps=10)
    tables, k = golden("vqdiffusion/tables"), jnp.arange(10)
    for time, index in [((k + 1) / 10, k), (jnp.zeros(1), jnp.array([-1]))]:
        for found, name, scale in zip(compiled(process.masses)(time), ("att", "ctt", "btt"), (1, 1, 5), strict=True):
            np.testing.assert_allclose(found, scale * tables[name][index], rtol=1e-5, atol=2e-7)
    for x, name in [(2, "bt"), (5, "ct")]:
        keep_in_one, added, _ = process.jump(jnp.full(10, x), (k + 1) / 10, k / 10)
        np.testing.assert_allclose(keep_in_one, tables["at"], rtol=1e-5)
        np.testing.assert_allclose(added, tables[name], rtol=1e-3 if x == 2 else 1e-5)
    arrays = golden("vqdiffusion/posterior_and_loss")
    by_class = {name: np.moveaxis(arrays[name], 1, -1) for name in ("log_posterior", "log_model", "u_p")}
    xt, t, s = jnp.asarray(arrays["x_t"]), (arrays["t"][:, None] + 1) / 10, arrays["t"][:, None] / 10
    truth = compiled(process.reverse)(xt, jax.nn.one_hot(arrays["x0"], 5), t, s)
    np.testing.assert_allclose(truth, np.exp(by_class["log_posterior"]), atol=1e-5)
    model = compiled(process.reverse)(
        xt, jnp.exp(compiled(process.estimate)(fixed_logits(arrays, arrays["x_t"]), xt, t)), t, s
    )
    np.testing.assert_allclose(model, np.exp(by_class["log_model"]), atol=1e-5)
    gumbel = -np.log(-np.log(by_class["u_p"] + 1e-30) + 1e-30)
    drawn = np.argmax(np.log(np.maximum(model, TINY)) + gumbel, axis=-1)
    np.testing.assert_array_equal(drawn, arrays["x_prev"])


@pytest.mark.parametrize("share, name", [(float(np.exp(-20)), "pu0"), (0.1, "pu0p1"), (0.2, "pu0p2")])
def test_published_gidd(share, name):
    """The law that moves, and the step of masked tokens (of others GIDD does not take the mean of posteriors)."""
    process = GIDD(field=FieldSpec((6,), vocab=6), share=share)
    arrays = golden("gidd/hybrid")
    alpha, mask, rest = compiled(process.masses)(jnp.asarray(arrays["t"][:, None]))
    np.testing.assert_allclose(alpha, arrays[f"{name}_alpha"], rtol=1e-6)
    np.testing.assert_allclose(
        compiled(process.mass_at)(jnp.arange(7)[None], mask, rest), arrays[f"{name}_beta_pi"], atol=1e-6
    )
    xt = arrays[f"{name}_x_t"]
    p = jnp.exp(process.logits(jnp.asarray(arrays["logits"][..., :6])))
    got = np.asarray(compiled(process.reverse)(jnp.asarray(xt), p, 0.6, 0.45))
    masked = xt == arrays["mask_id"]
    np.testing.assert_allclose(got[masked], arrays[f"{name}_q_step"][masked], atol=1e-6)
