"""Pictures in buckets and a frozen codec: each is encoded in its own grid, once, wherever its row lies."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from src.build import build_system
from src.codecs.buckets import Buckets
from src.common.mesh.sharding import batch_sharding, make_mesh
from src.common.rng import stream
from src.interfaces import BucketField, ImageField
from src.sequence.layout import Layout, Segment
from src.train.encode_batch import Frozen

GRIDS = ((4, 4), (2, 8), (8, 2))
PIXELS, LATENTS = Buckets(GRIDS, 4), Buckets(GRIDS, 2)


class Blurred:
    """Latents of 2 x 2 pixels each that depend on all their neighbours, with noise."""

    rows, calls = 8, 0

    def encodes(self, channels):
        return channels == 3

    def compute(self, params, values):
        return jax.lax.conv_general_dilated(values, params, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def draw(self, values, key):
        return values + jax.random.normal(key, values.shape)


def test_each_picture_is_encoded_in_its_own_grid_on_any_number_of_devices():
    """In rows of one picture and in packed rows, whose empty places stay zero before the noise."""
    frozen = Frozen(Blurred(), buckets={"one": PIXELS, "packed": PIXELS})
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(5, 5, 3, 4)), jnp.float32)
    order = [GRIDS[k] for k in rng.permutation(16) % 3]
    grids = np.asarray(order, np.int32)
    values, there = rng.normal(size=(16, 16, 16, 3)).astype(np.float32), rng.random(16) < 0.6
    batch = {
        "one": {"image": BucketField(values, None, grids)},
        "packed": {
            "image": BucketField(values.reshape(8, 2, 16, 16, 3), there.reshape(8, 2), grids.reshape(8, 2, 2)),
            "plain": ImageField(values.reshape(8, 2, 16, 16, 3)),
        },
    }
    alone = [frozen.image.compute(params, PIXELS.unfold(v, g)[None])[0] for v, g in zip(values, order, strict=True)]
    own = np.stack([LATENTS.fold(np.asarray(m), g) for m, g in zip(alone, order, strict=True)])
    together = np.asarray(frozen.image.compute(params, jnp.asarray(values)))
    assert np.abs(own - together)[grids[:, 0] != 4].max() > 1, "folded pictures have other neighbours"
    wanted = {"one": own, "packed": np.where(there[:, None, None, None], own, 0).reshape(8, 2, 8, 8, 4)}
    layouts = dict.fromkeys(batch, Layout((Segment("image", "image", 16), Segment("plain", "text", 1))))
    noise = {task: jax.random.normal(stream(jax.random.key(2), f"{task}/image/codec"), (16, 8, 8, 4)) for task in batch}
    for axes, ways in (({"data": 1}, 1), ({"data": 8}, 8), ({"data": 2, "fsdp": 2, "tensor": 2}, 4)):
        mesh = make_mesh(axes, jax.devices()[: math.prod(axes.values())])
        rows = jax.device_put(batch, batch_sharding(mesh))
        encode = lambda batch, ways=ways: frozen.encode({"image": params}, layouts, batch, jax.random.key(2), ways)
        with jax.set_mesh(mesh):
            program = jax.jit(encode).lower(rows).compile()
            found = program(rows)
        assert "all-" not in program.as_text(), "no row goes to another device"
        for task, clean in wanted.items():
            drawn = clean + noise[task].reshape(clean.shape)
            np.testing.assert_allclose(found[task]["image"].values, drawn, atol=1e-5)
        np.testing.assert_array_equal(found["packed"]["plain"].values, batch["packed"]["plain"].values)


@pytest.mark.parametrize("size, channels, patch", [(16, 3, 4), (8, 8, 2), (8, 4, 2)])
def test_a_config_with_buckets_of_pictures_moments_or_latents_is_built(size, channels, patch):
    config = common.base()
    config.text_codec.name = "text:Bytes"
    data = {"name": "buckets:CaptionToImage", "folder": "", "size": size, "channels": channels, "length": 16}
    data["buckets"] = GRIDS
    config.tasks = {"draw": {"share": 1.0, "data": data, "objectives": {"diffusion": common.diffusion()}}}
    with config.unlocked():
        config.image_codec = {"name": "vae_latents", "path": "none", "factor": 2}
    system = build_system(common.debug(config))
    assert system.frozen.buckets == {"draw": Buckets(GRIDS, patch)}
    assert system.delivered()["draw"]["image"].values.shape[1:] == (size, size, channels)
    spec = system.spec()["draw"]["image"]
    assert spec.values.shape[1:] == (8, 8, 4) and spec.grid.shape[1:] == (2,) and system.predictor.shape == (16, 16, 3)
    config.tasks.draw.data.size = 2 * size
    with pytest.raises(ValueError, match="give size="):
        build_system(common.debug(config))
