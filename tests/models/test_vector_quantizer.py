"""A vector quantiser: what it learns, its gradients, and the run that trains it with the network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import showo_digits
from src.build import build_system
from src.codecs.kmeans import KMeans
from src.interfaces import FieldSpec
from src.models.vector_quantizer import VectorQuantizer
from tests.codecs.test_learned_codes import error, patches, vectors

SPEC = FieldSpec((4, 4), features=4)


def make(seed=0, **options):
    return VectorQuantizer(width=8, spec=SPEC, rngs=nnx.Rngs(seed), **options)


def trained(train, steps, far=0, **options):
    """A quantiser after so many steps on digits; the last `far` codes begin away from all data."""
    graph, params = nnx.split(make(**options))
    table = params["table"].get_value()
    params["table"].set_value(table.at[len(table) - far :].add(2.0 if far else 0.0))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def total(params, value):
        return sum(each.mean() for each in nnx.merge(graph, params).losses(value).values())

    @jax.jit
    def fit(params):
        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (128,), 0, len(train))
            updates, state = optimizer.update(jax.grad(total)(params, train[rows]), state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    return nnx.merge(graph, fit(params))


@pytest.mark.faults
def test_codes_over_whole_images_lose_no_more_than_those_of_patches(tmp_path):
    """Held-out digits: 64 codes, learned by gradients in 1000 steps, against 64 centroids of k-means."""
    images = patches()
    train, held_out = jnp.asarray(images[:1437]), jnp.asarray(images[1437:])
    codec = trained(train, 1000)
    lost = float(((codec.decode(codec.encode(held_out)) - held_out) ** 2).sum(-1).mean())
    kmeans = KMeans(64, vectors((4, 4), 4), folder=str(tmp_path)).fit(images[:1437].reshape(-1, 4))
    assert lost < 1.03 * error(images[1437:].reshape(-1, 4), kmeans.centroids)
    assert len(np.unique(codec.encode(train))) == 64


@pytest.mark.faults
def test_dead_codes_are_revived():
    train = jnp.asarray(patches()[:1437])
    used = {weight: len(np.unique(trained(train, 600, far=32, revive=weight).encode(train))) for weight in (0.0, 0.1)}
    assert used[0.0] <= 34 and used[0.1] >= 56


def test_gradients_go_straight_through():
    """The encoder learns from the error as if it were decoded itself; each other loss reaches one side only."""
    graph, params = nnx.split(make(codes=8))
    value = jax.random.normal(jax.random.key(0), (3, 16, 4))
    names = ("reconstruction", "codebook", "commitment", "dead")

    @jax.jit
    def gradients(params):
        losses = lambda p: {name: loss.sum() for name, loss in nnx.merge(graph, p).losses(value).items()}
        pull = jax.vjp(losses, params)[1]
        return {name: pull({n: jnp.float32(n == name) for n in names})[0] for name in names}

    found = gradients(params)
    moved = lambda tree, part: max(np.abs(np.asarray(x)).max() for x in jax.tree.leaves(tree[part]))
    for name, encoder, table, decoder in [
        ("reconstruction", True, False, True),
        ("codebook", False, True, False),
        ("commitment", True, False, False),
        ("dead", False, True, False),
    ]:
        got = [moved(found[name], part) > 0 for part in ("encoder", "table", "decoder")]
        assert got == [encoder, table, decoder], name

    @jax.jit
    def there_and_back(params, value):
        quantizer = nnx.merge(graph, params)
        ids = quantizer.encode(value)
        return ids, quantizer.decode(ids)

    ids, made = map(np.asarray, there_and_back(params, value))
    inner = lambda quantizer: (quantizer.latents(value), quantizer.losses(value)["reconstruction"])
    z, lost = map(np.asarray, jax.jit(lambda params: inner(nnx.merge(graph, params)))(params))
    table = np.asarray(nnx.merge(graph, params).table[...])
    np.testing.assert_array_equal(ids, ((z[:, :, None] - table) ** 2).sum(-1).argmin(-1))
    np.testing.assert_allclose(((made - value) ** 2).mean(-1), lost, rtol=1e-4)
    packed, again = there_and_back(params, value.reshape(1, 3, 16, 4))
    np.testing.assert_array_equal(packed[0], ids)
    np.testing.assert_allclose(again[0], made, rtol=1e-6)


def test_a_config_trains_it_and_refuses_what_does_not_fit():
    """The process has the ids, the field the vectors; a codec objective needs a learned codec."""
    system = build_system(showo_digits.get_config("learned,debug"))
    field = system.fields["image"]
    assert field.learned and field.spec == SPEC and field.process.field == FieldSpec((4, 4), vocab=64)
    assert "codec" in jax.eval_shape(system.init, jax.random.key(0))["fields"]["image"]
    config = showo_digits.get_config("learned,debug").unlock()
    del config.fields.image["learned"]
    config.fields.image.codec.codes = {"name": "kmeans", "codes": 64}
    with pytest.raises(ValueError, match=r"objectives.codec trains the codec of 'image', .* has no learned one"):
        build_system(config)
    for spec in (FieldSpec((4, 4), vocab=8), FieldSpec((), features=4)):
        with pytest.raises(ValueError, match="vectors of a fixed grid"):
            VectorQuantizer(width=8, spec=spec, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="codes=1 must"):
        make(codes=1)
