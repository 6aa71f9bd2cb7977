"""Heads that diffuse one token against closed forms and published values, without training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from src.common.rng import stream
from src.corruption.gaussian import Gaussian
from src.corruption.schedules import GVP, CosineBetas
from src.corruption.timesteps import Stratified
from src.interfaces import FieldSpec
from src.models.heads._token_diffusion import TokenDiffusion
from src.models.heads.token_diffusion import TokenDiffusionHead
from src.sampling.guidance import paired
from tests.helpers.family import FOLDER, golden

ALONE = lambda output, t: output
SPEC = FieldSpec((4,), features=2)
VARIANCE = 0.3


class Exact(TokenDiffusion):
    """A token that is N(h, VARIANCE), or, with `modes`, one of two narrow modes: the exact posterior mean of x_0."""

    def __init__(self, modes=None, **options):
        options = {"steps": 16, "schedule": GVP(t_max=1.0), "sampler": "dpm", "tau": 1.0, "drop": 0.0} | options
        options = {"spacing": "uniform", "noise_scale": 1.0, "guidance": 1.0, "draws": 1} | options
        super().__init__(spec=SPEC, outputs=2, parameterization="x0", timesteps=Stratified(), **options)
        self.modes = None if modes is None else nnx.Variable(jnp.asarray(modes))

    def context(self, hidden, past):
        return hidden

    def network(self, xt, t, context):
        a, s = (f(t)[..., None] for f in (self.process.schedule.alpha, self.process.schedule.sigma))
        variance = VARIANCE if self.modes is None else 0.01
        mean = lambda m: m + a * variance / (a**2 * variance + s**2) * (xt - a * m)
        if self.modes is None:
            return mean(context)
        far = [((xt - a * m) ** 2).sum(-1) / (a**2 * variance + s**2)[..., 0] for m in self.modes[...]]
        share = jax.nn.sigmoid((far[1] - far[0]) / 2)[..., None]
        return share * mean(self.modes[0]) + (1 - share) * mean(self.modes[1])


KEY, ROWS = jax.random.key(3), 256
MEAN = jnp.asarray([0.8, -1.5])
HIDDEN = jnp.broadcast_to(MEAN, (ROWS, 2))


def error(head, factor):
    """Largest distance of a head's samples from MEAN + factor · the noise that it drew."""
    drawn = head.sample(KEY, HIDDEN, ALONE, ALONE)
    return jnp.abs(drawn - MEAN - factor * jax.random.normal(stream(KEY, "prior"), (ROWS, 1, 2))[:, 0]).max(), drawn


def test_tau_and_noise_scale_against_the_closed_form_of_a_gaussian_token():
    """The flow keeps (x_t - a_t m) / deviation_t. From 0, without noise, it is at the mean; noise enters at tau."""
    taus = (0.0, 0.2, 0.45, 0.8, 1.0)

    def factor(tau, scale=1.0):
        a, s = GVP().alpha(tau), GVP().sigma(tau)
        return scale * s * (VARIANCE / (a**2 * VARIANCE + s**2)) ** 0.5

    cases = [({"tau": tau}, factor(tau)) for tau in taus] + [({"noise_scale": 0.6}, factor(1.0, 0.6))]
    found = jax.jit(lambda: [error(Exact(steps=160, **options), by) for options, by in cases])()
    np.testing.assert_allclose([off for off, _ in found], 0.0, atol=3e-3)
    assert np.ptp(found[0][1], axis=0).max() == 0
    assert (np.diff([np.var(drawn, axis=0).max() for _, drawn in found[: len(taus)]]) > 0.005).all()


def test_noise_scale_of_ancestral_steps_is_that_of_each_step_and_not_of_the_first_noise():
    """MAR's. Samples of a Gaussian token are linear in all noise."""
    options = {"sampler": "ancestral", "steps": 4, "schedule": GVP(t_max=0.9)}
    draw = lambda scale: Exact(noise_scale=scale, **options).sample(KEY, HIDDEN, ALONE, ALONE)
    none, half, whole = jax.jit(lambda: [draw(scale) for scale in (0.0, 0.5, 1.0)])()
    np.testing.assert_allclose(half - none, 0.5 * (whole - none), atol=1e-5)
    assert np.ptp(none, axis=0).min() > 0.1 and jnp.abs(whole - none).max() > 0.1


def test_the_order_of_the_solvers_inside_the_token_loop():
    """The flow from t = 0.8 on against its closed form: errors fall as 1/steps, and for DPM-Solver as 1/steps²."""
    schedule, counts = GVP(t_max=0.8), (80, 160, 320, 640)
    a, s = schedule.alpha(0.8), schedule.sigma(0.8)
    by = (VARIANCE / (a**2 * VARIANCE + s**2)) ** 0.5

    def errors(sampler):
        heads = [Exact(steps=n, schedule=schedule, sampler=sampler, noise_scale=1.0) for n in counts]
        drawn = [head.sample(KEY, HIDDEN, ALONE, ALONE) for head in heads]
        start = jax.random.normal(stream(KEY, "prior"), (ROWS, 1, 2))[:, 0]
        return jnp.stack([jnp.abs(x - MEAN - by * (start - a * MEAN)).max() for x in drawn])

    found = np.asarray(jax.jit(lambda: [errors("ddim"), errors("dpm")])())
    ddim, dpm = np.log2(found[:, :-1] / found[:, 1:])
    np.testing.assert_allclose(ddim, 1, atol=0.2)
    assert (dpm > 1.55).all() and (np.diff(dpm) > 0).all() and (found[1] < 0.15 * found[0]).all()


def test_two_modes_are_found_in_equal_shares():
    modes = [[1.0, -0.5], [-0.5, 1.0]]
    drawn = jax.jit(lambda: Exact(modes, steps=32).sample(KEY, HIDDEN, ALONE, ALONE))()
    distance = np.linalg.norm(np.asarray(drawn)[:, None] - np.asarray(modes), axis=-1)
    assert (distance.min(-1) < 0.45).mean() > 0.97
    assert 0.4 < (distance.argmin(-1) == 0).mean() < 0.6


def abstract(**options):
    """A head's graph, and its parameters as shapes."""
    return nnx.split(nnx.eval_shape(lambda: TokenDiffusionHead(rngs=nnx.Rngs(0), **options)))


def random_head(seed=7, **options):
    """A head whose tensors are all random, so that nothing hides behind a zero."""
    graph, state = abstract(width=2, spec=SPEC, outputs=2, mlp_width=16, depth=1, **options)
    leaves, structure = jax.tree.flatten(nnx.to_pure_dict(state))
    draw = np.random.default_rng(seed)
    noisy = [jnp.asarray(0.4 * draw.normal(size=a.shape), jnp.float32) for a in leaves]
    return nnx.merge(graph, nnx.State(jax.tree.unflatten(structure, noisy)))


def test_guidance_in_the_head_is_guidance_on_the_outputs_and_training_drops_states():
    """DiTAR's: the state against no state, with one pass of the transformer for both."""
    plain, guided = random_head(steps=3, sampler="dpm"), random_head(steps=3, sampler="dpm", drop=0.5, guidance=2.5)
    states = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32)
    target = jnp.ones((2, 3, 2))

    @jax.jit
    def both():
        outside = lambda output, t: output[1::2] + 2.5 * (output[::2] - output[1::2])
        samples = [
            guided.sample(KEY, states, ALONE, ALONE),
            plain.sample(KEY, paired(states, 0 * states), outside, ALONE),
            plain.sample(KEY, states, ALONE, ALONE),
        ]
        draws = guided.noise(jax.random.key(4), (2, 3))
        hidden = states.reshape(2, 3, 2)
        kept = jnp.where(draws.kept[..., None], hidden, 0)
        losses = guided.nll(hidden, target, draws), plain.nll(kept, target, draws._replace(kept=None))
        return samples, losses, guided.noise(jax.random.key(5), (64, 64)).kept.mean()

    (inside, outside, none), losses, share = both()
    np.testing.assert_allclose(inside, outside, atol=1e-5)
    assert np.abs(inside - none).max() > 0.1
    np.testing.assert_array_equal(*losses)
    assert 0.45 < share < 0.55


EPS = {"spec": FieldSpec((1,), features=4), "outputs": 4, "schedule": CosineBetas(), "parameterization": "eps"}


def published(weights, names, **options):
    """The head with the matrices of a published one; names: ours -> theirs."""
    graph, state = abstract(**options)
    flat = dict(nnx.to_flat_state(state))
    told = lambda path: ".".join(str(part) for part in path)
    flat = {path: jnp.asarray(weights[names(told(path))].T.astype(np.float32)) for path in flat}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def arrays_of(name):
    return {key: jnp.asarray(value) for key, value in golden(name).items()}


def renamed(table, name):
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


def test_the_network_is_mars():
    arrays, weights = arrays_of("mar/diffloss"), load_file(FOLDER / "mar" / "diffloss.safetensors")
    weights |= {f"net.final_layer.linear.{k}": weights[f"net.final_layer.linear.{k}"][:4] for k in ("weight", "bias")}
    options = {"width": 10, "mlp_width": 16, "depth": 2, "norm": "affine"} | EPS
    table = {"kernel": "weight", "block_": "res_blocks.", "scale": "weight", ".norm.": ".in_ln.", ".up.": ".mlp.0."}
    table |= {".down.": ".mlp.2.", "time.first": "time_embed.mlp.0", "time.second": "time_embed.mlp.2"}
    table |= {".adaln.": ".adaLN_modulation.1.", "state.": "cond_embed.", "last.": "final_layer.linear."}
    table |= {"net.adaln.": "net.final_layer.adaLN_modulation.1.", "net.first.": "net.input_proj."}
    head = published(weights, lambda name: renamed(dict(reversed(table.items())), f"net.{name}"), **options)
    t = (arrays["t"][:, None] + 1) / 1000
    out = jax.jit(lambda: head.network(arrays["x0"][:, None], t, head.context(arrays["z"][:, None])))()
    np.testing.assert_allclose(out[:, 0], arrays["net_output"][:, :4], atol=1e-5)


def test_head_loss_and_guided_samples_are_latentlms(monkeypatch):
    arrays, weights = arrays_of("latentlm/head_schedule_sigma_vae"), load_file(FOLDER / "latentlm" / "head.safetensors")
    options = {"width": 24, "mlp_width": 24, "depth": 2, "norm": "rms", "mlp": "swiglu", "inner": 64, "bias": False}
    options |= {"draws": 1, "steps": 8, "sampler": "dpm", "spacing": "linspace"} | EPS
    table = {"last.": "final_layer.linear.", "first.": "noisy_x_embedder.", "adaln.": "adaLN_modulation.1."}
    table |= {"block_": "diffusion_blocks.", "state.": "condition_layer.linear.", "kernel": "weight"}
    table |= {"swiglu.gate": "mlp.fc1", "swiglu.up": "mlp.gate", "swiglu.down": "mlp.fc2", "second.": "mlp.2."}
    table |= {"time.noisy_x_embedder": "t_embedder.mlp.0", "time.mlp.2": "t_embedder.mlp.2"}
    theirs = lambda name: renamed(table, name if "block" in name else name.replace("adaln", "final_layer.adaln"))
    head = published(weights, theirs, **options)
    rms = lambda h: h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)  # the trunk's last norm
    t = (arrays["t"][:, None] + 1) / 1000
    noise = arrays["sample_noise"][:2]
    monkeypatch.setattr(Gaussian, "prior", lambda self, key, shape, past=None: noise)
    order = np.asarray([0, 2, 1, 3])  # each row and behind it its unconditional one
    states = rms(arrays["sample_hidden"])[order, 0]
    scaled = lambda scale: lambda output, t: output[1::2] + scale * (output[::2] - output[1::2])

    @jax.jit
    def run():
        hidden = rms(arrays["hidden"])
        context = head.context(hidden)
        out = head.network(arrays["x0"], t, context)
        draws = head.noise(jax.random.key(4), (5, 1))._replace(t=t, noise=arrays["noise"])
        loss = head.nll(hidden, arrays["x0"], draws).mean()
        return context, out, loss, [head.sample(KEY, states, scaled(scale), ALONE) for scale in (1.0, 4.0)]

    context, out, loss, samples = run()
    np.testing.assert_allclose(context, arrays["condition"], atol=1e-5)
    np.testing.assert_allclose(out, arrays["head_at_x0"], atol=1e-5)
    np.testing.assert_allclose(loss, arrays["mse"], rtol=1e-5)
    for found, scale in zip(samples, (1, 4), strict=True):
        np.testing.assert_allclose(found, arrays[f"sample_cfg{scale}"][:, 0], rtol=1e-4)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"tau": 0.5, "sampler": "ancestral"}, r"head\.tau=0\.5"),
        ({"tau": 1.5}, r"head\.tau=1\.5"),
        ({"guidance": 2.0}, r"head\.guidance=2\.0.*head\.drop"),
        ({"drop": 1.0}, r"head\.drop=1\.0"),
        ({"steps": 20, "schedule": CosineBetas(steps=10)}, "at most 10"),
        ({"spacing": "karras"}, "'karras'"),
    ],
)
def test_refusals(options, match):
    with pytest.raises(ValueError, match=match):
        Exact(**options)
