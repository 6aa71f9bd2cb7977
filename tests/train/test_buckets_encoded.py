"""Pictures in buckets and a frozen codec: each is encoded in its own grid, once, wherever its row lies."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.build import build_system
from src.codecs.buckets import Buckets
from src.common.mesh.sharding import batch_sharding, make_mesh
from src.common.rng import stream
from src.interfaces import Batch, Tokens
from src.train.encode_batch import Encoders
from tests.helpers.autoencoder import config_of

GRIDS = ((4, 4), (2, 8), (8, 2))
PIXELS, LATENTS = Buckets(GRIDS, 4), Buckets(GRIDS, 2)


class Blurred:
    """Latents of 2 x 2 pixels each that depend on all their neighbours, with noise."""

    rows, calls = 8, 0

    def encodes(self, shape):
        return shape[2] == 3

    def compute(self, params, values):
        return jax.lax.conv_general_dilated(values, params, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def draw(self, values, key):
        return values + jax.random.normal(key, values.shape)


def tokens(values, grids, there):
    """Folded images [B, …, h, w, C] whose tokens lie in grids of their own."""
    numbers, columns = np.arange(16, dtype=np.int32), grids[..., None, 1]
    place = np.stack([numbers // columns, numbers % columns], axis=-1)
    valid = np.repeat(there[..., None], 16, axis=-1)
    return Tokens(values, valid, valid, place)


def test_each_picture_is_encoded_in_its_own_grid_on_any_number_of_devices():
    """In rows of one picture and in packed rows, whose empty places stay zero before the noise."""
    net = Blurred()
    encoders = Encoders({"image": net}, buckets={"one": PIXELS, "packed": PIXELS})
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(5, 5, 3, 4)), jnp.float32)
    order = [GRIDS[k] for k in rng.permutation(16) % 3]
    grids = np.asarray(order, np.int32)
    values, there = rng.normal(size=(16, 16, 16, 3)).astype(np.float32), rng.random(16) < 0.6
    plain = Tokens(values.reshape(8, 2, 16, 16, 3), np.ones((8, 2, 1), bool), np.zeros((8, 2, 1), bool))
    packed = tokens(values.reshape(8, 2, 16, 16, 3), grids.reshape(8, 2, 2), there.reshape(8, 2))
    batch = {
        "one": Batch({"image": tokens(values, grids, np.ones(16, bool))}),
        "packed": Batch({"image": packed, "plain": plain}),
    }
    alone = [net.compute(params, PIXELS.unfold(v, g)[None])[0] for v, g in zip(values, order, strict=True)]
    own = np.stack([LATENTS.fold(np.asarray(m), g) for m, g in zip(alone, order, strict=True)])
    together = np.asarray(net.compute(params, jnp.asarray(values)))
    assert np.abs(own - together)[grids[:, 0] != 4].max() > 1, "folded pictures have other neighbours"
    wanted = {"one": own, "packed": np.where(there[:, None, None, None], own, 0).reshape(8, 2, 8, 8, 4)}
    noise = {task: jax.random.normal(stream(jax.random.key(2), f"{task}/image/codec"), (16, 8, 8, 4)) for task in batch}
    for axes, ways in (({"data": 1}, 1), ({"data": 8}, 8), ({"data": 2, "fsdp": 2, "tensor": 2}, 4)):
        mesh = make_mesh(axes, jax.devices()[: math.prod(axes.values())])
        rows = jax.device_put(batch, batch_sharding(mesh))
        encode = lambda batch, ways=ways: encoders.encode({"image": params}, batch, jax.random.key(2), ways)
        with jax.set_mesh(mesh):
            program = jax.jit(encode).lower(rows).compile()
            found = program(rows)
        assert "all-" not in program.as_text(), "no row goes to another device"
        for task, clean in wanted.items():
            drawn = clean + noise[task].reshape(clean.shape)
            np.testing.assert_allclose(found[task].tokens["image"].value, drawn, atol=1e-5)
        np.testing.assert_array_equal(found["packed"].tokens["plain"].value, plain.value)


@pytest.mark.parametrize("holds, shape, patch", [("pixels", (16, 16, 3), 4), ("moments", (8, 8, 8), 2)])
def test_a_config_with_buckets_of_pictures_or_moments_is_built(tmp_path, holds, shape, patch):
    config = config_of(tmp_path)
    with config.unlocked():
        config.tasks.draw.template.buckets = GRIDS
        if holds == "moments":
            config.tasks.draw.source = {"name": "records", "folder": str(tmp_path), "moments": True}
    system = build_system(config)
    assert system.encoders.buckets == {"draw": Buckets(GRIDS, patch)}
    assert system.raw_spec()["draw"].tokens["image"].value.shape[1:] == shape
    spec = system.spec()["draw"].tokens["image"]
    assert spec.value.shape[1:] == (8, 8, 4) and spec.place.shape[1:] == (16, 2)
    config.tasks.draw.template.buckets = ((2, 4), (4, 2))
    with pytest.raises(ValueError, match=r"tasks\.draw\.template: .*buckets"):
        build_system(config)
