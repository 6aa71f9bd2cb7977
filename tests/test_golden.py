"""Our functions against the published systems' numbers: Llama (transformers) and MonoFormer (the official code)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from src.codecs.patch import Patch
from src.common.tree import flatten, rebuild
from src.corruption.gaussian import Gaussian
from src.corruption.schedules import LinearBetas
from src.corruption.timesteps import Grid
from src.interfaces import TokenField, View
from src.models.build import Fields, build_model
from src.models.model import bind
from src.models.pretrained.hf_config import read_config
from src.models.pretrained.llama_weights import Published, place_of, read_checkpoint
from src.objectives.diffusion import Diffusion
from src.objectives.losses.weighting import Constant
from src.objectives.next_token import NextToken
from src.sampling.generate import ImageSampler, TextSampler, generate
from src.sampling.guidance import Guidance
from src.sampling.steps import gaussian
from src.sampling.steps.next_token import Greedy
from src.sequence.layout import Layout, Segment, with_time_tokens
from src.train.step import gradients
from src.train.system import System, TaskPlan, losses

GOLDEN = pathlib.Path(__file__).parent / "golden"
PAD, IMAGE = 92, 95
PATCH = Patch(size=2, channels=4, height=8, width=8)
PROCESS = Gaussian(LinearBetas(), "eps", "learned_range")


def load(name, conditioning, fields, image=None):
    """(graph, parameters, expected arrays) of a golden checkpoint."""
    read = read_config(GOLDEN / name)
    trunk = {
        "width": read.hidden_size,
        "depth": read.num_hidden_layers,
        "heads": read.num_attention_heads,
        "kv_heads": read.num_key_value_heads,
        "mlp_width": read.intermediate_size,
    }
    config = {"dtype": "float32", "trunk": trunk, "conditioning": conditioning, "time": {}, "image": {}}
    config |= {"text": {}, "text_head": {}, "image_head": image}
    graph, state = nnx.split(nnx.eval_shape(lambda: build_model(config, fields, nnx.Rngs(0))))
    params = read_checkpoint(GOLDEN / name / "model.safetensors", nnx.to_pure_dict(state))
    return graph, params, dict(np.load(GOLDEN / name / "expected.npz"))


@pytest.fixture(scope="module")
def llama():
    return load("llama", {"name": "conditioning:Conditioning"}, Fields(vocab=97))


@pytest.fixture(scope="module")
def monoformer():
    image = {"variance": "learned", "order": "rsc"}
    fields = Fields(vocab=96, patch_features=16, channels=4, grid=(4, 4))
    return load("monoformer", {"name": "conditioning:TimeToken", "init": "official"}, fields, image)


def text_view(ids, valid=None):
    ids = jnp.asarray(ids, jnp.int32)
    return View({"text": ids}, {"text": jnp.ones(ids.shape, bool) if valid is None else jnp.asarray(valid)}, {})


def patches(x):
    """NCHW latents -> our patches."""
    return PATCH.encode(jnp.moveaxis(jnp.asarray(x), 1, -1))


def split_row(ids, prompt_length, tail_length):
    """One published row `prompt <image> tail PAD…` as our padded segments."""
    ids = [int(i) for i in ids if i != PAD]
    at = ids.index(IMAGE)
    out = {}
    for name, part, length in (("prompt", ids[:at], prompt_length), ("tail", ids[at + 1 :], tail_length)):
        out[name] = np.array(part + [PAD] * (length - len(part)), np.int32), np.arange(length) < len(part)
    return out


def image_layout(prompt, tail):
    segments = (Segment("prompt", "text", prompt), Segment("image", "image", 16, "bidirectional"))
    return with_time_tokens(Layout((*segments, Segment("tail", "text", tail))))


def image_view(rows, layout):
    parts = [split_row(r, layout.segment("prompt").length, layout.segment("tail").length) for r in rows]
    stacked = {n: [jnp.stack([jnp.asarray(p[n][i]) for p in parts]) for i in (0, 1)] for n in ("prompt", "tail")}
    return View({n: s[0] for n, s in stacked.items()}, {n: s[1] for n, s in stacked.items()}, {})


def test_llama_logits_and_greedy_text(llama):
    graph, params, want = llama
    net = bind(graph, params)
    layout = Layout((Segment("text", "text", want["input_ids"].shape[1]),))
    hidden = net.hidden({"text": (layout, text_view(want["input_ids"]))})["text"]
    np.testing.assert_allclose(net.text_logits(hidden.sequence), want["logits"], atol=1e-5)

    layout = Layout((Segment("text", "text", want["greedy"].shape[1]),))
    out = jax.jit(
        lambda p, ids, key: generate(
            bind(graph, p), layout, text_view(ids), key, generated=("text",), text=TextSampler(Greedy(), -1, 0)
        )
    )(params, want["prompt"], jax.random.key(0))
    np.testing.assert_array_equal(np.concatenate([want["prompt"], out["text"]], axis=1), want["greedy"])


@pytest.fixture(scope="module")
def step_case(monoformer):
    """The golden batch as our two tasks: rows 0 and 2 hold images, rows 1 and 3 text."""
    graph, params, want = monoformer
    layout = image_layout(7, 3)
    view = image_view(want["input_ids"][[0, 2]], layout)
    t = jnp.asarray((want["t"][[0, 2]] + 1) / 1000, jnp.float32)[:, None]
    x0 = patches(want["x0"])
    noised = PROCESS.mix(x0, patches(want["noise"]), t)
    view = view.replace(inputs=view.inputs | {"image": noised.xt}, times={"image": PROCESS.time_input(t)})
    ids = want["input_ids"][[1, 3]]
    text = text_view(ids, ids != PAD)
    loss = jnp.asarray(want["labels"][[1, 3]] != -100)
    batch = {"image": {}, "text": {"text": TokenField(jnp.asarray(ids, jnp.int32), text.valid["text"], loss)}}
    denoise = Diffusion("image", process=PROCESS, times=Grid(), weight=Constant())
    tasks = {
        "image": TaskPlan(None, layout, 2, {"denoise": (denoise, 1.0)}),
        "text": TaskPlan(None, Layout((Segment("text", "text", 19),)), 2, {"lm": (NextToken(("text",)), 0.01)}),
    }
    system = System(None, graph, None, tasks, PATCH.encode)
    prepared = {"image": view, "text": text}, {"image": {"denoise": (x0, noised, t)}, "text": {"lm": None}}
    return system, params, batch, prepared, want


def test_monoformer_forward(step_case):
    system, params, _, (views, _), want = step_case
    net = bind(system.graph, params)
    hidden = net.hidden({n: (system.tasks[n].layout, v) for n, v in views.items()})
    np.testing.assert_allclose(views["image"].inputs["image"], patches(want["x_t"]), atol=1e-6)
    for row, (task, index) in enumerate([("image", 0), ("text", 0), ("image", 1), ("text", 1)]):
        valid = np.asarray(hidden[task].valid[index])
        logits = np.asarray(net.text_logits(hidden[task].sequence))[index, valid]
        np.testing.assert_allclose(logits, want["logits"][row, : valid.sum()], atol=1e-5)
    prediction = net.image_prediction(hidden["image"].of("image"), hidden["image"].vectors["image"])
    np.testing.assert_allclose(prediction.value, patches(want["model_output"][:, :4]), atol=1e-5)
    np.testing.assert_allclose(prediction.variance, patches(want["model_output"][:, 4:]), atol=1e-5)


def test_monoformer_losses(step_case):
    system, params, batch, prepared, want = step_case
    terms = losses(system, params, batch, prepared)
    diffusion = terms["image/denoise/mse"], terms["image/denoise/vlb"]
    np.testing.assert_allclose(diffusion[0].total / 2, want["mse"].mean(), rtol=1e-5)
    np.testing.assert_allclose(diffusion[1].total / 2, want["vb"].mean(), rtol=1e-4)
    lm = terms["text/lm/nats"]
    np.testing.assert_allclose(lm.total / lm.count, want["lm_loss"], rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_monoformer_gradient_and_adamw_step(step_case, accumulate):
    system, params, batch, prepared, want = step_case
    grads, _, total = jax.jit(lambda p: gradients(system, p, batch, prepared, accumulate))(params)
    np.testing.assert_allclose(total, want["total"], rtol=1e-5)
    np.testing.assert_allclose(optax.global_norm(grads), want["grad_norm"], rtol=1e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(2.0), optax.adamw(1e-3, 0.9, 0.999, 1e-8, weight_decay=0.0))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    after = flatten(optax.apply_updates(params, updates))
    clipped = flatten(optax.clip_by_global_norm(2.0).update(grads, optax.EmptyState())[0])
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
    """Conditional and null views, and the layout, of the golden guidance batch."""
    layout = image_layout(6, 1)
    rows = want["cfg_input_ids"]
    return layout, image_view(rows[:2], layout), image_view(rows[2:], layout)


def test_monoformer_guided_output(monoformer):
    graph, params, want = monoformer
    layout, cond, null = guided(want)
    view = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
    z = patches(want["cfg_z"])
    times = jnp.full((4, 1), float(want["cfg_t"]))
    view = view.replace(inputs=view.inputs | {"image": jnp.concatenate([z, z])}, times={"image": times})
    net = bind(graph, params)
    hidden = net.hidden({"image": (layout, view)})["image"]
    both = net.image_prediction(hidden.of("image"), hidden.vectors["image"])
    cond_half, null_half = (jax.tree.map(lambda a, i=i: a[2 * i : 2 * i + 2], both) for i in (0, 1))
    out = Guidance(scale=float(want["cfg_scale"]), channels=3)(cond_half, null_half, jnp.asarray(0.7), 4)
    np.testing.assert_allclose(out.value, patches(want["cfg_output"][:2, :4]), atol=2e-5)
    np.testing.assert_allclose(out.variance, patches(want["cfg_output"][:2, 4:]), atol=2e-5)


def test_monoformer_respaced_ancestral_steps(monoformer):
    """Eight guided DDPM steps through the cache and the sampling loop, with the recorded noise in place of ours."""
    graph, params, want = monoformer
    layout, cond, null = guided(want)
    noise = [patches(n) for n in want["cfg_step_noise"]]
    times = gaussian.Ancestral().times(PROCESS, len(noise))
    table = jnp.stack(noise)

    class Recorded(gaussian.Ancestral):
        def step(self, process, key, denoise, xt, t, s, state):
            mean, log_variance = process.posterior_moments(xt, denoise(xt, t), t, s)
            index = jnp.argmin(jnp.abs(jnp.asarray(times) - t))
            return mean + jnp.where(s > 0, jnp.exp(0.5 * log_variance) * table[index], 0.0), state

    class Start(Gaussian):
        def prior(self, key, shape):
            return patches(want["cfg_z"])

    process = Start(LinearBetas(), "eps", "learned_range")
    image = ImageSampler(process, Recorded(), len(noise), Guidance(scale=float(want["cfg_scale"]), channels=3), 16, 4)
    out = generate(bind(graph, params), layout, cond, jax.random.key(0), generated=("image",), image=image, null=null)[
        "image"
    ]
    np.testing.assert_allclose(out, patches(want["cfg_samples"]), rtol=1e-5, atol=1e-4)


def test_monoformer_greedy_text(monoformer):
    graph, params, want = monoformer
    layout = Layout((Segment("text", "text", want["greedy_sequence"].shape[1]),))
    view = text_view(want["greedy_prompt"])
    out = generate(
        bind(graph, params), layout, view, jax.random.key(0), generated=("text",), text=TextSampler(Greedy(), -1, 0)
    )
    np.testing.assert_array_equal(out["text"], want["greedy_sequence"][:, want["greedy_prompt"].shape[1] :])


def test_checkpoint_reader_lists_what_does_not_fit(monoformer):
    _, params, _ = monoformer
    flat = flatten(params)
    path = GOLDEN / "monoformer" / "model.safetensors"
    with pytest.raises(ValueError, match="new/leaf is missing"):
        read_checkpoint(path, flat | {"new/leaf": jnp.zeros(2)})
    narrow = {k: (jnp.zeros((3, 3)) if k == "image/linear/kernel" else v) for k, v in flat.items()}
    with pytest.raises(ValueError, match=r"image/linear/kernel has shape \(16, 64\), the model \(3, 3\)"):
        read_checkpoint(path, rebuild(narrow, params))
    assert "'surprise.weight' is no tensor" in Published({"surprise.weight": np.zeros(2)}).wrong[0]
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file"):
        read_checkpoint(GOLDEN / "nowhere.safetensors", params)
