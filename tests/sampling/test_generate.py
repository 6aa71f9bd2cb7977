"""Generation over the cache: rows of different lengths, stops, guidance, and text after an image."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from src.corruption.gaussian import Gaussian
from src.corruption.schedules import Linear
from src.interfaces import View
from src.models.build import Fields, build_model
from src.models.model import bind
from src.sampling.generate import ImageSampler, TextSampler, generate
from src.sampling.guidance import Guidance
from src.sampling.steps.gaussian import Euler, sample
from src.sampling.steps.next_token import Greedy
from src.sequence.layout import Layout, Segment, with_time_tokens

VOCAB, PAD = 13, 0
PROCESS = Gaussian(Linear(), "velocity")
IMAGE = ImageSampler(PROCESS, Euler(), 3, Guidance(scale=1.0), 4, 4)
TEXT = TextSampler(Greedy(), stop=-1, pad=PAD)


@pytest.fixture(scope="module")
def net():
    config = {
        "dtype": "float32",
        "trunk": {"width": 16, "depth": 2, "heads": 2, "init": 0.3},
        "conditioning": {"name": "conditioning:TimeToken"},
        "text": {"init": 1.0},
        "text_head": {"init": 0.5},
        "image_head": {"init": 0.3, "adaln_init": 0.3},
        "time": {"init": 0.3},
        "image": {},
    }
    graph, state = nnx.split(build_model(config, Fields(VOCAB, 4, 1, (2, 2)), nnx.Rngs(3)))
    params = nnx.to_pure_dict(state)
    return lambda: bind(graph, params)


def padded(rows, width):
    ids = np.full((len(rows), width), PAD, np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return jnp.asarray(ids), jnp.asarray([[j < len(row) for j in range(width)] for row in rows])


def test_prompts_of_different_lengths_in_one_batch_are_as_each_alone(net):
    prompts, more = [[1, 5, 2, 7], [1, 9], [1, 3, 3]], 5

    def run(rows, width):
        ids, valid = padded(rows, width)
        layout = Layout((Segment("s", "text", width + more),))
        view = View({"s": ids}, {"s": valid}, {})
        return generate(net(), layout, view, jax.random.key(0), generated=("s",), text=TEXT)["s"]

    together = jax.jit(lambda: run(prompts, 4))()
    for i, prompt in enumerate(prompts):
        alone = jax.jit(lambda prompt=prompt: run([prompt], len(prompt)))()
        np.testing.assert_array_equal(together[i], alone[0])
    # and greedy decoding is the argmax of the full forward pass, token by token
    row = [*prompts[1], *together[1].tolist()]
    full = net().hidden({"t": (Layout((Segment("s", "text", len(row)),)), View({"s": jnp.asarray([row])}, {}, {}))})
    best = jnp.argmax(net().text_logits(full["t"].sequence)[0], axis=-1)
    np.testing.assert_array_equal(best[len(prompts[1]) - 1 : -1], together[1])


def test_a_row_that_stops_is_padded_and_the_others_go_on(net):
    ids, valid = padded([[1, 5], [1, 9]], 2)
    layout = Layout((Segment("s", "text", 9),))
    view = View({"s": ids}, {"s": valid}, {})
    run = lambda text: generate(net(), layout, view, jax.random.key(0), generated=("s",), text=text)["s"]
    free = np.asarray(run(TEXT))
    stop = next(int(t) for t in free[0] if t not in free[1])
    stopped = np.asarray(run(dataclasses.replace(TEXT, stop=stop)))
    at = free[0].tolist().index(stop)
    assert stopped[0].tolist() == [*free[0][: at + 1], *[PAD] * (7 - at - 1)]
    np.testing.assert_array_equal(stopped[1], free[1])


def image_layout():
    segments = (Segment("p", "text", 3), Segment("i", "image", 4, "bidirectional"), Segment("c", "text", 4))
    return with_time_tokens(Layout(segments))


def test_image_generation_is_the_sampler_on_the_full_forward_pass(net):
    """Cached denoising = denoising with whole rows; a guidance that mixes nothing changes nothing; text may follow."""
    layout, key = image_layout(), jax.random.key(7)
    ids, valid = padded([[1, 5, 2], [1, 9]], 3)
    view = View({"p": ids}, {"p": valid}, {})
    out = generate(net(), layout, view, key, generated=("i", "c"), image=IMAGE, text=TEXT)
    assert out["c"].shape == (2, 4)

    tail = {"c": jnp.zeros((2, 4), jnp.int32)}
    unseen = {"c": jnp.zeros((2, 4), bool)}

    def denoise(xt, t):
        times = {"i": jnp.broadcast_to(PROCESS.time_input(t), (2, 1))}
        whole = View(view.inputs | tail | {"i": xt}, view.valid | unseen, times)
        hidden = net().hidden({"t": (layout, whole)})["t"]
        return PROCESS.convert(net().image_prediction(hidden.of("i"), hidden.vectors["i"]), xt, t)

    from src.common.rng import stream

    start, loop = jax.random.split(stream(key, "i"))
    expected = sample(Euler(), PROCESS, denoise, loop, PROCESS.prior(start, (2, 4, 4)), 3)
    np.testing.assert_allclose(out["i"], expected, atol=1e-4)

    null = view.replace(inputs={"p": ids.at[:, 1:].set(3)})
    same = generate(net(), layout, view, key, generated=("i",), image=IMAGE, null=null)["i"]
    np.testing.assert_allclose(same, expected, atol=1e-4)
    strong = dataclasses.replace(IMAGE, guidance=Guidance(scale=3.0))
    guided = generate(net(), layout, view, key, generated=("i",), image=strong, null=null)["i"]
    assert jnp.abs(guided - expected).max() > 1e-2


def test_refusals(net):
    layout, view = image_layout(), View({"p": jnp.ones((1, 3), jnp.int32)}, {}, {})
    with pytest.raises(ValueError, match="guidance needs every text segment given"):
        generate(net(), layout, view, jax.random.key(0), generated=("i", "c"), image=IMAGE, text=TEXT, null=view)
    with pytest.raises(ValueError, match="starts the row"):
        empty = View({"other": jnp.ones((1, 3), jnp.int32)}, {}, {})
        generate(net(), Layout((Segment("s", "text", 2),)), empty, jax.random.key(0), generated=("s",), text=TEXT)
