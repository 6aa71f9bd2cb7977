"""CausalFusion: the published pass and loss, training = sampling in blocks of any size and order, its configs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from configs import causalfusion_digits
from src.build import build_system
from src.common.tree import count_parameters, flatten, unflatten
from src.corruption.gaussian import Gaussian
from src.corruption.schedules import LinearBetas
from src.interfaces import Batch, Field, FieldSpec, View
from src.models.build import build_architecture
from src.models.model import bind
from src.objectives.diffusion import Diffusion
from src.objectives.losses.squared_error import SquaredError
from src.sampling.decoders.blocks import Blocks
from src.sampling.steps.ancestral import Ancestral
from src.sampling.walk import NoisyTokens, SamplingPlan, Walk, fill, plan_of
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment
from src.train.flops import _tied
from tests.helpers.family import FOLDER, golden
from tests.helpers.small import batch, close, tokens, view_of

CLASSES, FRONT, GRID, CHANNELS = 5, 3, (4, 4), 3


class WithShift(nnx.LayerNorm):
    """The published norm of queries and keys, in place of the house's, which has no mean and no shift."""

    def __init__(self, width, *, epsilon, dtype, rngs):
        super().__init__(width, epsilon=epsilon, dtype=dtype, rngs=rngs)


def published_weights(shapes):
    """The published parameters by the paths of `shapes`; scale and shift of a norm go into the layer behind it."""
    old = {
        name: value.astype(np.float64) for name, value in load_file(FOLDER / "causalfusion/model.safetensors").items()
    }
    linear = lambda name: {"kernel": old[f"{name}.weight"].T, "bias": old[f"{name}.bias"]}

    def behind(norm, kernel, bias=0.0):
        scale, shift = old[f"{norm}.weight"], old[f"{norm}.bias"]
        return {"kernel": scale[:, None] * kernel, "bias": shift @ kernel + bias}

    blocks = []
    for number in range(2):
        at = f"blocks.{number}"
        q, k, v = np.split(old[f"{at}.attn.qkv.weight"].T, 3, axis=1)
        norms = {
            f"{n}_norm": {"scale": old[f"{at}.attn.{n}_norm.weight"], "bias": old[f"{at}.attn.{n}_norm.bias"]}
            for n in "qk"
        }
        attention = {name: behind(f"{at}.norm1", each) for name, each in zip("qkv", (q, k, v), strict=True)}
        up = behind(f"{at}.norm2", old[f"{at}.mlp.fc1.weight"].T, old[f"{at}.mlp.fc1.bias"])
        mlp = {"up": up, "down": linear(f"{at}.mlp.fc2")}
        blocks.append({"attention": attention | norms | {"out": linear(f"{at}.attn.proj")}, "mlp": mlp})
    table = old["y_embedder.embedding_table.weight"].reshape(-1, FRONT, 16) + old["cond_pos_embed"]
    found = {
        "trunk": {"layers": jax.tree.map(lambda *a: np.stack(a), *blocks)},
        "time": {"first": linear("t_embedder.mlp.0"), "second": linear("t_embedder.mlp.2")},
        "fields": {
            "label": {"embed": {"table": {"embedding": table.reshape(-1, 16)}}},
            "image": {
                "embed": {"linear": linear("x_proj"), "table": {"embedding": old["pos_embed"][0]}},
                "head": {"linear": behind("final_layer.0", old["final_layer.1.weight"].T, old["final_layer.1.bias"])},
            },
        },
    }
    found = flatten(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), found))
    wanted = flatten(shapes)
    assert {path: a.shape for path, a in found.items()} == {path: a.shape for path, a in wanted.items()}
    return unflatten(found)


@pytest.fixture(scope="module")
def published():
    """The published network of width 16 with its own norms of queries and keys."""
    process = Gaussian(field=FieldSpec(GRID, features=CHANNELS), schedule=LinearBetas(), variance="fixed_large")
    table = {
        "label": Field("label", FieldSpec(vocab=(CLASSES + 1) * FRONT), None),
        "image": Field("image", process.field, None, process),
    }
    groups = {
        "label": {"embed": {"name": "tokens"}},
        "image": {"embed": {"name": "patches", "positions": "trained"}, "head": {"name": "linear"}},
    }
    trunk = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 64, "norm": "layer", "norm_epsilon": 1e-5}
    trunk |= {"mlp": "gelu", "bias": True, "rope": False, "qk_norm": True}
    model = {
        "dtype": "float32",
        "trunk": trunk,
        "conditioning": {"name": "conditioning:AddBeforeTrunk"},
        "time": {},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("src.models.attention.RMSNorm", WithShift)
        architecture, init = build_architecture(model, groups, table)
        shapes = jax.eval_shape(init, jax.random.key(0))
    return bind(architecture, published_weights(shapes))


def published_rows(arrays):
    """The rows of the golden file, in their orders and splits."""
    order = arrays["order"]
    x0, noise = (np.moveaxis(arrays[name].reshape(2, CHANNELS, -1), 1, 2) for name in ("x0", "noise"))
    x0, noise = (np.take_along_axis(a, order[..., None], 1) for a in (x0, noise))
    place = np.stack(np.unravel_index(order, GRID), -1).astype(np.int32)
    block = np.repeat(np.arange(len(arrays["splits"])), arrays["splits"]).astype(np.int32)
    front = arrays["label"][:, None] * FRONT + np.arange(FRONT)
    rows = Batch(
        {
            "label": tokens(front.astype(np.int32)),
            "image": tokens(x0, target=True, place=place, block=np.broadcast_to(block, order.shape).copy()),
        }
    )
    segments = Segment("label", FRONT, 0), Segment("image", 16, role="copies")
    return View(jax.tree.map(jnp.asarray, rows), FixedLayout(segments)), noise


def test_the_published_loss(published):
    """Shuffled tokens, three splits, time on the noised tokens alone, weights from 2 to 1."""
    arrays = golden("causalfusion/training_and_sampling")
    assert np.array_equal(np.argsort(arrays["u_order"], 1), arrays["order"])
    view, noise = published_rows(arrays)
    draws = {
        "times": jnp.asarray((arrays["t"][:, None] + 1) / 1000, jnp.float32),
        "noise": {"image": jnp.asarray(noise)},
    }
    objective = Diffusion("image", SquaredError(), lambda key, shape: None, first_weight=2.0)
    plain = Diffusion("image", SquaredError(), lambda key, shape: None)

    @jax.jit
    def losses():
        there, aux = objective.prepare(published, view, draws)
        hidden = published.hidden({"": there})[""]
        output = published.field("image")(hidden.of("image"))
        return output, *(o.loss(published, hidden, aux)["mse"] for o in (objective, plain))

    output, weighted, plain = losses()
    np.testing.assert_allclose((output - noise) ** 2, arrays["squared_error"], rtol=2e-4, atol=1e-6)
    close(weighted.total / weighted.count, arrays["loss"], 1e-5)
    close(plain.total / plain.count, arrays["squared_error"].mean(), 1e-5)


SPLITS = ((1, 3), (2, 1, 1))


@pytest.mark.faults
def test_training_in_blocks_of_any_size_and_order_is_sampling_over_the_cache(published):
    """Rows of one pass with orders and blocks of their own, against each row alone, in static blocks one by one: the
    noisy tokens of a block, and its clean ones, which are read behind them."""
    rng, rows, length = np.random.default_rng(0), len(SPLITS), 4
    numbers = np.stack([rng.permutation(16)[:length] for _ in SPLITS])
    place = np.stack(np.unravel_index(numbers, GRID), -1).astype(np.int32)
    block = np.stack([np.repeat(np.arange(len(sizes)), sizes) for sizes in SPLITS]).astype(np.int32)
    x0, xt = (rng.normal(size=(rows, length, CHANNELS)).astype(np.float32) for _ in range(2))
    front, t = np.arange(rows * FRONT, dtype=np.int32).reshape(rows, FRONT), np.float32([[0.9], [0.5]])

    def view(rows, sizes, block):
        image = tokens(x0[rows], place=place[rows], block=block)
        segments = Segment("label", FRONT, 0), Segment("image", length, sizes, role="copies")
        return view_of(segments, batch(label=tokens(front[rows]), image=image))

    def block_by_block(row, sizes):
        """Noisy and clean states of a row alone."""
        one, found = view(slice(row, row + 1), sizes, None), {"noisy": [], "clean": []}
        walk, (label, image) = Walk.begin(published, one, SamplingPlan(())), one.layout.segments
        walk.read(label)
        for start, size in zip(np.cumsum((0, *sizes[:-1])).tolist(), sizes, strict=True):
            piece = NoisyTokens(jnp.asarray(xt[row : row + 1, start : start + size]), jnp.asarray(t[row : row + 1]))
            there = walk.with_noisy(image, {"image": piece}, start)
            found["noisy"].append(there.run(image, "noisy", start, size, keep=False))
            found["clean"].append(walk.run(image, "clean", start, size, keep=True))
        return {copy: jnp.concatenate(states, axis=1)[0] for copy, states in found.items()}

    @jax.jit
    def compare():
        time = published.field("image").process.network(jnp.asarray(xt), jnp.asarray(t))[1]
        whole = view(slice(None), 1, block).replace(noisy={"image": jnp.asarray(xt)}, times={"image": time})
        hidden = published.hidden({"": whole})[""]
        alone = [block_by_block(row, sizes) for row, sizes in enumerate(SPLITS)]
        return [(jnp.stack([a[copy] for a in alone]), hidden.of("image", copy)) for copy in ("noisy", "clean")]

    for ours, wanted in compare():
        close(ours, wanted, 1e-5)


def test_equal_blocks_are_one_loop(published):
    """The program of many blocks passes the network no more often than that of few, so it compiles as fast."""

    def passes(blocks):
        seen = []

        class Counted(type(published)):
            def extend(self, view, segment, copy, start, size, spec, cache):
                seen.append(size)
                return jnp.zeros((1, size, 16)), cache

        image = tokens(np.zeros((1, 16, CHANNELS), np.float32), target=True)
        rows = batch(label=tokens(np.zeros((1, FRONT), np.int32)), image=image)
        view = view_of((Segment("label", FRONT, 0), Segment("image", 16, blocks, role="copies")), rows)
        plan, decoders = plan_of(view.layout, rows), {"image": Blocks(steps=2, step=Ancestral())}
        network = Counted(published.architecture, published.model)
        jax.eval_shape(lambda: fill(Walk.begin(network, view, plan), jax.random.key(0), decoders))
        return len(seen)

    assert passes(1) == passes(8)


def test_the_published_size_builds():
    """Without the published scales and shifts of norms, the shifts of those of queries and keys, and the places of
    class tokens, which the table of ids has; with biases of queries, keys and values."""
    width, depth, head = 1280, 32, 64
    block = 12 * width**2 + 10 * width + 4 * head
    public = 1001 * 64 * width + (64 + 256) * width + depth * block + 2 * width  # classes, places, blocks, last norm
    public += 17 * width + 257 * width + width**2 + width + 16 * width + 16  # patches in, time, patches out
    system = build_system(causalfusion_digits.get_config("published"))
    found = count_parameters(jax.eval_shape(system.init, jax.random.key(0)))
    assert found == public - 64 * width - depth * (4 * width + 2 * head) - 2 * width + depth * 3 * width
    assert found == 713_858_832
    segment = system.tasks["label_to_image"].task.template.columns[-1]
    assert (segment.count, segment.orders.splits, system.tasks["label_to_image"].layout.length) == (256, 0.9, 64 + 512)


def test_operations_are_counted_of_a_field_without_a_head():
    system = build_system(causalfusion_digits.get_config("debug"))
    assert _tied("fields/label/embed/table/embedding", system) == ""
