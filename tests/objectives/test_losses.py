"""Losses of ids and counts: the bound by enumeration, and published numbers."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.corruption import keep
from src.corruption.categorical import Categorical
from src.corruption.counts import Counts
from src.corruption.mask_and_uniform import GIDD, VQDiffusion
from src.interfaces import Corrupted, FieldSpec
from src.objectives.losses.cross_entropy import CrossEntropy
from src.objectives.losses.gidd import MixtureBound
from src.objectives.losses.poisson import Poisson
from src.objectives.losses.posterior_kl import PosteriorKL
from tests.helpers.family import fixed_logits, golden

V = 3


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_of(loss, process, output, c, target):
    return loss(process, output, c, target)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradient_of(loss, process, output, c):
    """And the loss itself behind it."""
    total = lambda output: sum(x.sum() for x in loss(process, output, c, c.x0).values())
    value, gradient = jax.value_and_grad(total)(output)
    return jnp.append(gradient, value)


def process(**options):
    return Categorical(field=FieldSpec((2,), vocab=V), **options)


@dataclasses.dataclass(frozen=True)
class Cut:
    """MD4 keeps its schedules away from 0 and 1."""

    base: Any

    places: ClassVar[None] = None

    def keep(self, t):
        return self.base.keep(t) * (1 - 2e-4) + 1e-4

    def slope(self, t):
        return self.base.slope(t) * (1 - 2e-4)


@pytest.mark.parametrize(
    "kernel",
    [process(), process(mask=0.0), process(mask=0.6, masks=2), process(mask=0.6, absorbing=True)],
    ids=["mask", "uniform", "mixed", "absorbing"],
)
def test_posterior_kl_is_the_bound(kernel):
    """With the exact posterior of one token for the network, the mean losses of all steps add up to H(x_0), by the
    chain rule: what is left at t = 1 does not know x_0."""
    steps, law = 5, np.array([0.5, 0.3, 0.2])
    t = (jnp.arange(steps)[:, None] + 1) / steps
    ids = jnp.broadcast_to(jnp.arange(kernel.ids), (steps, kernel.ids))  # every x_t, one after the other
    a, m, u = kernel.masses(t)
    q = np.asarray(kernel.mass_at(ids, m, u))[:, None] + np.asarray(a)[..., None] * np.eye(V, kernel.ids)
    joint = law[:, None] * q  # [steps, x_0, x_t]
    logits = jnp.log(np.maximum(joint / np.maximum(joint.sum(1, keepdims=True), 1e-30), 1e-30)).swapaxes(1, 2)
    total = 0.0
    for x0 in range(V):
        c = Corrupted(x0=jnp.full_like(ids, x0), xt=ids, t=t, noise=None)
        total += (joint[:, x0] * loss_of(PosteriorKL(steps=steps), kernel, logits, c, c.x0)["kl"]).sum() / steps
    np.testing.assert_allclose(total, -(law * np.log(law)).sum(), rtol=2e-3)


def test_the_weighted_cross_entropy_is_the_limit_of_the_posterior_kl():
    """MDLM, equation 8: for many steps both are the same bound, at every time."""
    for schedule in (keep.LinearDecay(), keep.CosineDecay()):
        kernel = process(schedule=schedule)
        xt, t = jnp.array([[V, 1], [V, V]]), jnp.array([[0.3], [0.8]])
        c = Corrupted(x0=jnp.array([[0, 1], [2, 1]]), xt=xt, t=t, noise=None)
        output = jax.random.normal(jax.random.key(0), (2, 2, V))
        bound = loss_of(CrossEntropy(elbo=True), kernel, output, c, c.x0)["nll"]
        steps = loss_of(PosteriorKL(steps=1000), kernel, output, c, c.x0)["kl"]
        np.testing.assert_allclose(steps, bound, rtol=3e-3)
        assert bound[0, 1] == 0  # it is known


@pytest.mark.parametrize("kernel", [GIDD(field=FieldSpec((2,), vocab=V), share=0.3), process(mask=0.6), process()])
def test_the_bound_of_a_mixture_is_the_limit_of_small_steps(kernel):
    """GIDD, theorem 3.1: T KL(q(x_s | x_t, x_0) || q(x_s | x_t, p)), the mean over x_t, in float64 for T = 10^5."""
    k, p, length = kernel.ids, np.array([0.5, 0.2, 0.3]), 1e-5
    for t, x0 in [(0.2, 0), (0.7, 1), (0.9, 2)]:

        def law(time):  # [V, K] in float64; masses are float32 in the process
            if isinstance(kernel, GIDD):
                c = 2 * kernel.share / (1 - kernel.share) * np.sqrt(time * (1 - time))
                a, m, u = (1 - time) / (1 + c), time / (1 + c), c / (1 + c)
            else:
                a, m, u = 1 - time, kernel.mask * time, (1 - kernel.mask) * time
            return a, np.concatenate([np.full(V, u / V), np.full(k - V, m / max(k - V, 1))])

        (a, b), (a_s, b_s) = law(t), law(t - length)
        jump = a / a_s * np.eye(k) + (b - a / a_s * b_s)  # [x_s, x_t]

        def back(start, jump=jump, a_s=a_s, b_s=b_s):  # [x_s, x_t] given a law of x_0
            joint = (np.pad(a_s * start, (0, k - V)) + b_s)[:, None] * jump
            return joint / np.maximum(joint.sum(0), 1e-300)

        truth, model = back(np.eye(V)[x0]), back(p)
        kl = (truth * (np.log(np.maximum(truth, 1e-300)) - np.log(np.maximum(model, 1e-300)))).sum(0) / length
        shares = a * np.eye(V, k)[x0] + b
        ids = jnp.arange(k)[None]
        c = Corrupted(x0=jnp.full((1, k), x0), xt=ids, t=jnp.full((1, 1), t), noise=None)
        output = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (1, k, V))
        each = np.asarray(loss_of(MixtureBound(), kernel, output, c, c.x0)["bound"])[0]
        np.testing.assert_allclose((shares * each).sum(), (shares * kl).sum(), rtol=2e-3)
        if kernel.mask == 1 and not isinstance(kernel, GIDD):
            nll = loss_of(CrossEntropy(elbo=True), kernel, output, c, c.x0)["nll"][0]
            np.testing.assert_allclose(each[V:], nll[V:], rtol=1e-4)


def test_weights_of_the_bound():
    """Softened and clipped; smoothed targets lose what the mean over the vocabulary says."""
    kernel, output = process(), jax.random.normal(jax.random.key(0), (1, 2, V))
    c = Corrupted(x0=jnp.array([[0, 1]]), xt=jnp.array([[V, V]]), t=jnp.array([[0.1, 0.8]]), noise=None)
    run = lambda **options: loss_of(CrossEntropy(**options), kernel, output, c, c.x0)["nll"]
    plain = run()
    np.testing.assert_allclose(run(elbo=True), plain / c.t, rtol=1e-5)
    np.testing.assert_allclose(run(elbo=True, clip=2), plain * np.array([2, 1.25]), rtol=1e-5)
    np.testing.assert_allclose(run(elbo=True, soften=0.2), plain / (c.t + 0.2 * (1 - c.t)), rtol=1e-5)
    logs = jax.nn.log_softmax(output)
    np.testing.assert_allclose(run(smoothing=0.1), 0.9 * plain - 0.1 * logs.mean(-1), rtol=1e-5)


def test_cross_entropy_on_changed_or_all_tokens():
    kernel = Categorical(field=FieldSpec((2,), vocab=V, features=2))
    x0 = jnp.array([[[0, 1], [2, 2]]])
    xt = jnp.array([[[V, 1], [2, 2]]])
    c = Corrupted(x0=x0, xt=xt, t=jnp.full((1, 1), 0.5), noise=None)
    output = jax.random.normal(jax.random.key(0), (1, 2, 2 * V))
    logs = np.asarray(jax.nn.log_softmax(output.reshape(1, 2, 2, V)))
    each = -np.take_along_axis(logs, np.asarray(x0)[..., None], -1)[..., 0]
    every = loss_of(CrossEntropy(on="all"), kernel, output, c, x0)["nll"]
    np.testing.assert_allclose(every, each.mean(-1), rtol=1e-6)
    changed = loss_of(CrossEntropy(), kernel, output, c, x0)["nll"]
    np.testing.assert_allclose(changed, [[each[0, 0, 0] / 2, 0]], rtol=1e-6)


def test_losses_and_gradients_are_finite_at_the_ends():
    x0 = jnp.array([[0, 1], [2, 1]])
    output = jnp.asarray([[[300.0, -300, 0], [0, 0, -1e4]], [[0, -1e4, -1e4], [0, 0, 0]]])
    for kernel in (process(), process(mask=0.0), process(mask=0.5, masks=2, absorbing=True)):
        losses = [CrossEntropy(), CrossEntropy(on="all"), PosteriorKL(steps=100, auxiliary=0.1)]
        losses += [CrossEntropy(elbo=True), CrossEntropy(elbo=True, soften=0.2)] if kernel.mask == 1 else []
        losses += [] if kernel.absorbing else [MixtureBound(clip=2.0)]
        for t in (0.0, 1e-6, 0.01, 1.0):
            times = jnp.full((2, 1), t)
            c = kernel.corrupt(x0, kernel.noise(jax.random.key(1), (2, 2)), times)
            for loss in losses:
                assert np.isfinite(gradient_of(loss, kernel, output, c)).all()
    counts = Counts(field=FieldSpec((2,), vocab=9, features=3))
    x0, output = jnp.full((2, 2, 3), 8), jnp.asarray([-200.0, 0.0, 200.0]) * jnp.ones((2, 2, 3))
    for t in (0.0, 1e-6, 0.5, 1.0):
        c = counts.corrupt(x0, counts.noise(jax.random.key(2), (2, 2)), jnp.full((2, 1), t))
        assert np.isfinite(gradient_of(Poisson(), counts, output, c)).all()


def test_poisson_is_least_at_the_mean_of_what_is_missing():
    """By token the mean over its numbers; the weight of a token is that of its own time."""
    counts = Counts(field=FieldSpec((2,), vocab=9, features=2))
    xt, x0 = jnp.array([[[1, 4], [0, 0]]]), jnp.array([[[4, 4], [2, 8]]])
    c = Corrupted(x0=x0, xt=xt, t=jnp.array([[0.4, 0.6]]), noise=None)
    raw = lambda rate: jnp.log(jnp.expm1(rate))
    gradient = jax.grad(lambda output: loss_of(Poisson(weight="none"), counts, output, c, x0)["poisson"].sum())
    np.testing.assert_allclose(gradient(raw((x0 - xt).astype(jnp.float32)).at[0, 0, 1].set(-80.0)), 0, atol=1e-6)
    output = jnp.full((1, 2, 2), 0.3)
    plain = loss_of(Poisson(weight="none"), counts, output, c, x0)["poisson"]
    rate = np.log1p(np.exp(0.3))
    np.testing.assert_allclose(plain, (rate - np.asarray(x0 - xt) * np.log(rate)).mean(-1), rtol=1e-5)
    for name, weight in zip(("instantaneous", "finite"), counts.weights(c.t), strict=True):
        np.testing.assert_allclose(
            loss_of(Poisson(weight=name), counts, output, c, x0)["poisson"], plain * weight, rtol=1e-5
        )
        times = (jnp.arange(1000) + 1) / 1000
        np.testing.assert_allclose(counts.weights(times)[name == "finite"].mean(), 1, atol=1e-2)


def test_refusals():
    for words, make in [
        ("'none' is unknown", lambda: CrossEntropy(on="none")),
        ("on='changed'", lambda: CrossEntropy(on="all", elbo=True)),
        ("give elbo=True", lambda: CrossEntropy(clip=2.0)),
        ("smoothing=1", lambda: CrossEntropy(smoothing=1.0)),
        ("clip is -1", lambda: MixtureBound(clip=-1)),
        ("steps is 0", lambda: PosteriorKL(steps=0)),
        ("'half' is unknown", lambda: Poisson(weight="half")),
    ]:
        with pytest.raises(ValueError, match=words):
            make()
    c = Corrupted(x0=jnp.zeros((1, 2), int), xt=jnp.zeros((1, 2), int), t=jnp.full((1, 1), 0.5), noise=None)
    with pytest.raises(ValueError, match="only for mask=1"):
        CrossEntropy(elbo=True)(process(mask=0.0), jnp.zeros((1, 2, V)), c, c.x0)
    with pytest.raises(ValueError, match="not that of Categorical: take posterior_kl"):
        MixtureBound()(process(mask=0.5, absorbing=True), jnp.zeros((1, 2, V)), c, c.x0)


# --------------------------------------------------------------------------- published numbers


def masking(uniform):
    """The noise of a process of 6 ids and one mask id that keeps where `uniform` is below abar."""
    uniform = jnp.asarray(uniform)
    return {"uniform": uniform, "mask": jnp.full(uniform.shape, 6), "other": jnp.zeros(uniform.shape, jnp.int32)}


def test_published_mdlm():
    arrays = golden("mdlm/loss")
    kernel = Categorical(field=FieldSpec((8,), vocab=6), schedule=keep.LinearDecay(least=1e-3))
    noise = masking(1 - arrays["u_mask"])
    c = kernel.corrupt(jnp.asarray(arrays["x0"]), noise, arrays["t"][:, None])
    np.testing.assert_array_equal(c.xt, arrays["x_t"])
    nll = loss_of(CrossEntropy(elbo=True), kernel, fixed_logits(arrays, arrays["x_t"], 6), c, c.x0)["nll"]
    np.testing.assert_allclose(nll * arrays["valid"], arrays["nll"], rtol=1e-4)
    np.testing.assert_allclose((nll * arrays["valid"]).sum() / arrays["valid"].sum(), arrays["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    "form, schedule",
    [("linear", keep.LinearDecay()), ("cosine", keep.CosineDecay()), ("poly2", keep.PowerDecay(exponent=2.0))],
)
def test_published_md4(form, schedule):
    """In continuous time, and with ten times."""
    arrays = golden("md4/loss")
    kernel = Categorical(field=FieldSpec((8,), vocab=6), schedule=Cut(schedule))
    noise = masking(arrays["u_mask"])
    for kind, loss in [("cont", CrossEntropy(elbo=True)), ("T10", PosteriorKL(steps=10))]:
        name = f"{form}_{kind}"
        c = kernel.corrupt(jnp.asarray(arrays["x"]), noise, arrays[f"{name}_t"][:, None])
        np.testing.assert_array_equal(c.xt, arrays[f"{name}_z_t"])
        (each,) = loss_of(loss, kernel, fixed_logits(arrays, arrays[f"{name}_z_t"]), c, c.x0).values()
        np.testing.assert_allclose(each.sum(1), arrays[f"{name}_per_row"], rtol=3e-4, atol=1e-6)


def test_published_show_o():
    """The image's loss is the mean over the masked places: the mean over all, divided by their share."""
    arrays = golden("showo/losses")
    rows, begin = arrays["rows"][0], arrays["max_text"] + 1
    labels, logits = arrays["labels"][:rows, begin:], jnp.asarray(arrays["logits"][:rows, begin:])
    x0, masked = np.maximum(labels, 0), labels >= 0
    kernel = Categorical(field=FieldSpec((labels.shape[1],), vocab=30))
    c = Corrupted(x0=jnp.asarray(x0), xt=jnp.asarray(np.where(masked, 30, x0)), t=jnp.full((2, 1), 0.5), noise=None)
    nll = loss_of(CrossEntropy(), kernel, logits, c, c.x0)["nll"]
    np.testing.assert_allclose(nll.mean() / masked.mean(), arrays["loss_image"], rtol=1e-5)


def test_published_vq_diffusion():
    """T KL and the auxiliary term, whose weight 0.0005 falls with t from 2 to 1 there."""
    kernel = VQDiffusion(field=FieldSpec((6,), vocab=5), steps=10)
    arrays = golden("vqdiffusion/posterior_and_loss")
    x0, xt, k = (jnp.asarray(arrays[name]) for name in ("x0", "x_t", "t"))
    c = Corrupted(x0=x0, xt=xt, t=(k[:, None] + 1) / 10, noise=None)
    output = fixed_logits(arrays, arrays["x_t"])
    kl, more = (
        loss_of(PosteriorKL(steps=10, auxiliary=auxiliary), kernel, output, c, x0)["kl"].sum(1)
        for auxiliary in (0.0, 10 * 0.0005)
    )
    np.testing.assert_allclose(kl + (2 - k / 10) * (more - kl), arrays["loss"], rtol=1e-4)


@pytest.mark.parametrize("masks", [1, 4])
def test_published_reddit(masks):
    """The softened weight; the auxiliary term of features is not here."""
    arrays = golden(f"reddit/loss_m{masks}")
    vocab = int(arrays["classes"])
    linear = keep.LinearDecay(least=1e-3)
    kernel = Categorical(field=FieldSpec((9,), vocab=vocab), schedule=linear, masks=masks, rehash=True)
    x0, t = jnp.asarray(arrays["x0"]), arrays["t"][:, None]
    noise = {"uniform": 1 - jnp.asarray(arrays["u_mask"]), "mask": jnp.asarray(arrays["mask_draw"]), "other": x0}
    noise["mask"] = jnp.where(noise["mask"] < vocab, noise["mask"] + vocab, noise["mask"])
    c = kernel.corrupt(x0, noise, t)
    np.testing.assert_array_equal(c.xt, arrays["x_t"])
    np.testing.assert_allclose(kernel.rate(t[:, 0], 0.2), arrays["weight"], rtol=1e-4)
    output = fixed_logits(arrays, arrays["x_t"], vocab)
    nll = loss_of(CrossEntropy(elbo=True, soften=0.2), kernel, output, c, x0)["nll"]
    np.testing.assert_allclose(nll, arrays["nll"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(nll.mean(), arrays["loss_ce"], rtol=1e-4)


@pytest.mark.parametrize("share, name", [(float(np.exp(-20)), "pu0"), (0.1, "pu0p1"), (0.2, "pu0p2")])
def test_published_gidd(share, name):
    """The bound and its clipped form."""
    arrays = golden("gidd/hybrid")
    kernel = GIDD(field=FieldSpec((6,), vocab=6), share=share)
    c = Corrupted(jnp.asarray(arrays["x0"]), jnp.asarray(arrays[f"{name}_x_t"]), arrays["t"][:, None], None)
    output = jnp.asarray(arrays["logits"][..., :6])
    for loss, told in [(MixtureBound(), "elbo"), (MixtureBound(clip=2), "loss_clip")]:
        found = loss_of(loss, kernel, output, c, c.x0)["bound"]
        np.testing.assert_allclose(found, arrays[f"{name}_{told}"], rtol=2e-3, atol=1e-6)


def test_published_blackout():
    arrays = golden("blackout/bridge_and_loss")
    counts = Counts(field=FieldSpec((2,), vocab=256, features=16))
    x0, xt, output = (jnp.asarray(arrays[name].reshape(3, 2, 16)) for name in ("x0", "x_t", "net_output"))
    c = Corrupted(x0=x0, xt=xt, t=jnp.asarray((arrays["step"][:, None] + 1) / 1000), noise=None)
    for weight, name, scale in [("instantaneous", "loss_instant", 1), ("finite", "loss_finite", 1000)]:
        loss = loss_of(Poisson(weight=weight), counts, output, c, x0)["poisson"].mean()
        np.testing.assert_allclose(loss, scale * arrays[name], rtol=1e-5)
