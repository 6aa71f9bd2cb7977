"""Our functions against the published systems' numbers: Llama (transformers) and MonoFormer (the official code)."""

import pathlib
import types
from unittest.mock import create_autospec

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from src.codecs.patch import Patch
from src.common.tree import flatten, rebuild
from src.corruption.gaussian import Gaussian
from src.corruption.schedules import LinearBetas
from src.corruption.timesteps import Grid
from src.interfaces import Batch, Field, FieldSpec, Task, Tokens, View
from src.models.build import build_architecture
from src.models.model import bind
from src.models.pretrained.hf_config import read_config
from src.models.pretrained.llama_weights import Published, place_of
from src.objectives.diffusion import Diffusion
from src.objectives.losses.squared_error import SquaredError
from src.objectives.next_token import NextToken
from src.sampling.decoders.blocks import Blocks
from src.sampling.decoders.left_to_right import LeftToRight
from src.sampling.guidance import Guidance
from src.sampling.steps.ancestral import Ancestral
from src.sampling.walk import Walk, fill, plan_of
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment
from src.train.step import gradients
from src.train.system import System, TaskPlan, losses, prepare
from tests.helpers.published import read_checkpoint

GOLDEN = pathlib.Path(__file__).parent / "golden"
PAD, IMAGE = 92, 95
PATCH = Patch(2, before=types.SimpleNamespace(shape=(8, 8, 4)))
GUIDED = 3 * PATCH.size**2  # features of 3 of the 4 channels
IMAGE_KERNEL = "fields/image/embed/linear/kernel"
TEXT = {"embed": {"name": "tokens"}, "head": {"name": "categorical"}}
IMAGES = {"embed": {"name": "patches"}, "head": {"name": "adaln", "order": "rsc", "channels": 4}}


def process(cls=Gaussian):
    return cls(field=PATCH.spec, schedule=LinearBetas(), parameterization="eps", variance="learned_range")


def text(vocab):
    return Field("text", FieldSpec(vocab=vocab), None)


def images(process, step=None):
    return Field("image", PATCH.spec, None, process, step, time_token=True)


def load(name, conditioning, table, fields):
    """(architecture, parameters, expected arrays) of a golden checkpoint."""
    read = read_config(GOLDEN / name)
    trunk = {
        "width": read.hidden_size,
        "depth": read.num_hidden_layers,
        "heads": read.num_attention_heads,
        "kv_heads": read.num_key_value_heads,
        "mlp_width": read.intermediate_size,
    }
    model = {"dtype": "float32", "trunk": trunk, "conditioning": conditioning, "time": {}}
    architecture, init = build_architecture(model, fields, {field.name: field for field in table})
    params = read_checkpoint(GOLDEN / name / "model.safetensors", jax.eval_shape(init, jax.random.key(0)))
    return architecture, params, dict(np.load(GOLDEN / name / "expected.npz"))


@pytest.fixture(scope="module")
def llama():
    return load("llama", {"name": "conditioning:Conditioning"}, [text(97)], {"text": TEXT})


def monoformer_with(process, step=None):
    conditioning = {"name": "conditioning:TimeToken", "init": "official"}
    table = [text(96), images(process, step)]
    return load("monoformer", conditioning, table, {"text": TEXT, "image": IMAGES})


@pytest.fixture(scope="module")
def monoformer():
    return monoformer_with(process())


def tokens(value, valid=None, target=True):
    """Tokens of ids or vectors, all of them targets or as `target` says."""
    value = np.asarray(value)
    shape = value.shape[:2]
    valid = np.ones(shape, bool) if valid is None else np.asarray(valid)
    return Tokens(value, valid, np.broadcast_to(target, shape))


def text_view(value):
    """Rows of text alone."""
    value = value if isinstance(value, Tokens) else tokens(np.asarray(value, np.int32))
    layout = FixedLayout((Segment("text", value.value.shape[1]),))
    return View(jax.tree.map(jnp.asarray, Batch({"text": value})), layout)


def patches(x):
    """NCHW latents -> our patches."""
    return PATCH.encode(jnp.moveaxis(jnp.asarray(x), 1, -1))


def split_row(ids, prompt_length, tail_length):
    """One published row `prompt <image> tail PAD…` as our padded segments."""
    ids = [int(i) for i in ids if i != PAD]
    at = ids.index(IMAGE)
    out = {}
    for name, part, length in (("prompt", ids[:at], prompt_length), ("tail", ids[at + 1 :], tail_length)):
        out[f"text.{name}"] = np.array(part + [PAD] * (length - len(part)), np.int32), np.arange(length) < len(part)
    return out


def image_view(rows, prompt, tail, x0=None):
    """Rows with an image, a time token in front of it; without `x0` it is to be made."""
    image = Segment("image", 16, "bidirectional", role="noisy", lead=1)
    layout = FixedLayout((Segment("text.prompt", prompt), image, Segment("text.tail", tail)))
    parts = [split_row(row, prompt, tail) for row in rows]
    found = {n: tokens(*(np.stack([p[n][i] for p in parts]) for i in (0, 1)), target=False) for n in parts[0]}
    found["image"] = tokens(np.zeros((len(rows), 16, 16), np.float32) if x0 is None else x0)
    return View(Batch(found), layout)


def continued(architecture, params, prompt, length):
    """The ids that are drawn greedily after a prompt, up to a length, whatever ends a text."""
    value = np.zeros((len(prompt), length), np.int32)
    value[:, : prompt.shape[1]] = prompt
    view = text_view(tokens(value, target=np.arange(length) >= prompt.shape[1]))
    plan = plan_of(view.layout, view.batch)

    def run(params):
        walk = Walk.begin(bind(architecture, params), view, plan)
        return fill(walk, jax.random.key(0), {"text": LeftToRight(stop=False)})["text"]

    return jax.jit(run)(params)


def test_llama_logits_and_greedy_text(llama):
    architecture, params, want = llama

    @jax.jit
    def logits(params):
        net = bind(architecture, params)
        return net.field("text")(net.hidden({"text": text_view(want["input_ids"])})["text"].sequence)

    np.testing.assert_allclose(logits(params), want["logits"], atol=1e-5)
    out = continued(architecture, params, want["prompt"], want["greedy"].shape[1])
    np.testing.assert_array_equal(out, want["greedy"])


@pytest.fixture(scope="module")
def step_case(monoformer):
    """The golden batch as our two tasks: rows 0 and 2 hold images, rows 1 and 3 text; and what was drawn."""
    architecture, params, want = monoformer
    pictured = image_view(want["input_ids"][[0, 2]], 7, 3, patches(want["x0"]))
    ids = want["input_ids"][[1, 3]].astype(np.int32)
    written = text_view(tokens(ids, ids != PAD, want["labels"][[1, 3]] != -100))
    times = jnp.asarray((want["t"][[0, 2]] + 1) / 1000, jnp.float32)[:, None]
    draws = {"image": {"denoise": {"times": times, "noise": {"image": patches(want["noise"])}}},
             "text": {"lm": {"text": ()}}}  # fmt: skip
    unread = lambda *given: None  # there are no data
    task = create_autospec(Task, instance=True)
    denoise = Diffusion(("image",), SquaredError(), Grid())
    tasks = {
        "image": TaskPlan(task, pictured.layout, 2, {"denoise": (denoise, 1.0)}),
        "text": TaskPlan(task, written.layout, 2, {"lm": (NextToken(("text",)), 0.01)}),
    }
    system = System(None, architecture.table, architecture, unread, tasks)
    drawn = jax.tree.map(jnp.asarray, ({"image": pictured, "text": written}, draws))
    return system, params, drawn, want


def test_monoformer_forward(step_case):
    system, params, drawn, want = step_case

    @jax.jit
    def forward(params):
        net = bind(system.architecture, params)
        views, _ = prepare(system, net, drawn)
        hidden = net.hidden(views)
        logits = {task: net.field("text")(states.sequence) for task, states in hidden.items()}
        output = net.field("image")(hidden["image"].of("image"), hidden["image"].vectors["image"])
        return views["image"].noisy["image"], logits, output

    noisy, logits, output = forward(params)
    np.testing.assert_allclose(noisy, patches(want["x_t"]), atol=1e-6)
    for row, (task, index) in enumerate([("image", 0), ("text", 0), ("image", 1), ("text", 1)]):
        view = drawn[0][task]
        valid = np.asarray(view.layout.valid(view.batch)[index])
        found = np.asarray(logits[task])[index, valid]
        np.testing.assert_allclose(found, want["logits"][row, : valid.sum()], atol=1e-5)
    same_output(output, want["model_output"], 1e-5)


def same_output(output, want, tolerance):
    """Our head's output, values and then variances, against the published one's channels."""
    for ours, theirs in zip(jnp.split(output, 2, axis=-1), (want[:, :4], want[:, 4:]), strict=True):
        np.testing.assert_allclose(ours, patches(theirs), atol=tolerance)


def test_monoformer_losses(step_case):
    system, params, drawn, want = step_case
    terms = jax.jit(lambda params: losses(system, params, drawn))(params)
    mse, vlb = (terms[f"image/denoise/{name}"] for name in ("mse", "vlb"))
    np.testing.assert_allclose(mse.total / mse.count, want["mse"].mean(), rtol=1e-5)
    np.testing.assert_allclose(vlb.total / vlb.count, want["vb"].mean(), rtol=1e-4)
    lm = terms["text/lm/nll"]
    np.testing.assert_allclose(lm.total / lm.count, want["lm_loss"], rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_monoformer_gradient_and_adamw_step(step_case, accumulate):
    system, params, drawn, want = step_case
    clip = optax.clip_by_global_norm(2.0)
    optimizer = optax.chain(clip, optax.adamw(1e-3, 0.9, 0.999, 1e-8, weight_decay=0.0))

    @jax.jit
    def step(params):
        grads, _, total = gradients(system, params, drawn, accumulate)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        clipped = clip.update(grads, optax.EmptyState())[0]
        return total, optax.global_norm(grads), optax.apply_updates(params, updates), clipped

    total, norm, *trees = step(params)
    np.testing.assert_allclose(total, want["total"], rtol=1e-5)
    np.testing.assert_allclose(norm, want["grad_norm"], rtol=1e-4)
    after, clipped = map(flatten, jax.device_get(trees))
    for kind, ours, tolerance in (("grad_clipped", clipped, 1e-4), ("after_adamw", after, 1e-4)):
        for name in [k.split("/", 1)[1] for k in want if k.startswith(kind)]:
            path, block = place_of(name)
            leaf = np.asarray(ours[path] if block is None else ours[path][block])
            leaf = leaf.T if path.endswith("kernel") else leaf
            expected = want[f"{kind}/{name}"]
            np.testing.assert_allclose(
                leaf, expected, rtol=tolerance, atol=tolerance * abs(expected).max(), err_msg=name
            )


def guided(want):
    """Conditional and null rows of the golden guidance batch."""
    rows = want["cfg_input_ids"]
    return image_view(rows[:2], 6, 1), image_view(rows[2:], 6, 1)


def test_monoformer_guided_output(monoformer):
    architecture, params, want = monoformer
    view = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *guided(want))
    z, times = patches(want["cfg_z"]), jnp.full((4, 1), float(want["cfg_t"]))
    view = view.replace(noisy={"image": jnp.concatenate([z, z])}, times={"image": times})

    @jax.jit
    def output(params):
        net = bind(architecture, params)
        hidden = net.hidden({"image": view})["image"]
        return net.field("image")(hidden.of("image"), hidden.vectors["image"])

    both = output(params)
    out = Guidance(scale=float(want["cfg_scale"]))(*jnp.split(both, 2), jnp.asarray(0.7), GUIDED)
    same_output(out, want["cfg_output"][:2], 2e-5)


def test_monoformer_respaced_ancestral_steps(monoformer):
    """Eight guided DDPM steps through the cache and the sampling loop, with the recorded noise in place of ours."""
    want = monoformer[2]
    table = jnp.stack([patches(n) for n in want["cfg_step_noise"]])
    times = Ancestral().times(process(), len(table))

    class Recorded(Ancestral):
        def step(self, process, key, estimate, xt, t, s, state, again):
            mean, log_variance = process.posterior_moments(xt, estimate, t, s)
            index = jnp.argmin(jnp.abs(jnp.asarray(times) - t))
            return mean + jnp.where(s > 0, jnp.exp(0.5 * log_variance) * table[index], 0.0), state

    class Start(Gaussian):
        def prior(self, key, shape, past=None):
            return patches(want["cfg_z"])

    architecture, params, _ = monoformer_with(process(Start), Recorded())
    given, null = guided(want)
    guidance = Guidance(scale=float(want["cfg_scale"]), features=GUIDED)
    plan = plan_of(given.layout, given.batch)

    @jax.jit
    def drawn(params):
        walk = Walk.begin(bind(architecture, params), given, plan, null, guidance)
        return fill(walk, jax.random.key(0), {"image": Blocks(steps=len(table))})["image"]

    out = drawn(params)
    samples = patches(want["cfg_samples"])  # up to 607: the limit is what eight steps in f32 round
    np.testing.assert_allclose(out, samples, rtol=1e-5, atol=3e-6 * float(jnp.abs(samples).max()))


def test_monoformer_greedy_text(monoformer):
    architecture, params, want = monoformer
    prompt, sequence = want["greedy_prompt"], want["greedy_sequence"]
    np.testing.assert_array_equal(continued(architecture, params, prompt, sequence.shape[1]), sequence)


def test_checkpoint_reader_lists_what_does_not_fit(monoformer):
    _, params, _ = monoformer
    flat = flatten(params)
    path = GOLDEN / "monoformer" / "model.safetensors"
    with pytest.raises(ValueError, match="new/leaf is missing"):
        read_checkpoint(path, flat | {"new/leaf": jnp.zeros(2)})
    narrow = {k: (jnp.zeros((3, 3)) if k == IMAGE_KERNEL else v) for k, v in flat.items()}
    with pytest.raises(ValueError, match=rf"{IMAGE_KERNEL} has shape \(16, 64\), the model \(3, 3\)"):
        read_checkpoint(path, rebuild(narrow, params))
    assert "'surprise.weight' is no tensor" in Published({"surprise.weight": np.zeros(2)}).wrong[0]
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file"):
        read_checkpoint(GOLDEN / "nowhere.safetensors", params)
