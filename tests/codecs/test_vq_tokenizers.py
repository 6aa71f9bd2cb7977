"""Published tokenizers with codes: numbers of their own code, and what is refused."""

import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from src.codecs.chain import Link, build_chain
from src.codecs.codebook import Codebook, Signs
from src.codecs.vq_latents import VqLatents
from src.codecs.vqgan_files import read_vqgan
from tests.helpers.family import FOLDER, golden

SYSTEMS = {"llamagen_vq": "cosine", "taming_vqgan": "nearest", "magvitv2": "signs"}
SIZES = {"llamagen_vq": (8, 24), "taming_vqgan": (10, 20), "magvitv2": (5, 32)}


def links(system, **options):
    """The codec of a config."""
    channels, codes = SIZES[system]
    path = str(FOLDER / system)
    table = {"name": "codebook:Codebook", "codes": codes, "path": path, "lookup": SYSTEMS[system]}
    return {
        "host": {"name": "pixels", "height": 16, "width": 16, "channels": 3},
        "frozen": {"name": "vq_latents", "path": path, "channels": channels, "factor": 2} | options,
        "device": table if SYSTEMS[system] != "signs" else {"name": "codebook:Signs"},
    }


@pytest.mark.parametrize("system", SYSTEMS)
def test_published_tokenizers(system):
    """Latents, ids and images of a network with random weights, in the published layout of names."""
    arrays, last = golden(f"{system}/encode_decode"), lambda x: np.moveaxis(x, 1, -1)
    chain = build_chain(links(system), "fields.image.codec", lambda what, link: pytest.fail("data were read"))
    network, codes = chain.frozen, chain.device[0]
    assert isinstance(network, Link) and isinstance(codes, Link) and chain.spec.vocab == SIZES[system][1]
    assert chain.spec.grid == (8, 8) and len(network.fingerprint) == 64

    @jax.jit
    def run(params, images, given):
        latents = network.draw(network.compute(params, images), None)
        ids = codes.encode(latents)
        clipped = network.decode(params, codes.decode(given))
        return latents, ids, *(network.network.decode(params, codes.decode(i)) for i in (ids, given)), clipped

    given = jnp.asarray(arrays["given_ids"].reshape(2, -1))
    latents, ids, decoded, decoded_given, clipped = run(network.params, last(arrays["image"]), given)
    np.testing.assert_allclose(latents, last(arrays["latent"]), atol=1e-4)
    np.testing.assert_array_equal(ids, arrays["ids"].reshape(2, -1))
    np.testing.assert_allclose(decoded, last(arrays["decoded"]), atol=1e-4)
    np.testing.assert_allclose(decoded_given, last(arrays["decoded_given"]), atol=1e-4)
    np.testing.assert_allclose(clipped, np.clip(last(arrays["decoded_given"]), -1, 1), atol=1e-4)
    if system == "taming_vqgan":
        inner = Codebook(20, network, str(FOLDER / system), lookup="inner")
        np.testing.assert_array_equal(inner.encode(latents), arrays["ids_ibq"].reshape(2, -1))


def test_the_published_llamagen_builds():
    """VQ-16 as far as shapes go: 16,384 codes of 8 numbers, 71.9 million parameters."""
    links = {
        "host": {"name": "pixels", "height": 256, "width": 256, "channels": 3},
        "frozen": {"name": "vq_latents", "path": ""},
        "device": {"name": "codebook:Codebook", "codes": 16384, "lookup": "cosine"},
    }
    chain = build_chain(links, "fields.image.codec", lambda what, link: pytest.fail("data were read"))
    twin, assumed = chain.frozen.sketch()
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(twin.shapes()))
    assert chain.spec.grid == (16, 16) and chain.spec.vocab == 16384 and "VQGAN of 128, 128, 256" in assumed
    assert 70e6 < count + 16384 * 8 < 73e6


def test_what_is_refused(tmp_path):
    """One sentence each: a codec of another size, other tensors, folders that are not there."""
    before = types.SimpleNamespace(shape=(16, 16, 3), spec=None)
    source, latents = FOLDER / "taming_vqgan", types.SimpleNamespace(shape=(8, 8, 10), spec=None)
    for words, make in [
        ("makes 10 channels for 2 x 2 pixels", lambda: VqLatents(source, before).params),
        (r"makes 10 channels", lambda: VqLatents(source, before, channels=10, factor=4).params),
        (
            r"no table .* of \(21, 10\) codes and numbers, but one of \(20, 10\)",
            lambda: Codebook(21, latents, source).table,
        ),
        ("but none", lambda: Codebook(32, latents, FOLDER / "magvitv2").fingerprint),
        ("codes=1", lambda: Codebook(1, latents)),
        ("lookup='far'", lambda: Codebook(4, latents, lookup="far")),
        ("needs a link in front", lambda: Codebook(4, types.SimpleNamespace(shape=(4, 4), spec=None))),
        ("at most 24 bits", lambda: Signs(types.SimpleNamespace(shape=(8, 8, 32), spec=None))),
        ("16 x 16 x 3 have no latents", lambda: VqLatents(source, before, factor=3)),
        ("neither pixels", lambda: VqLatents(source, before).encodes((16, 16, 4))),
    ]:
        with pytest.raises(ValueError, match=words):
            make()
    with pytest.raises(FileNotFoundError, match="set path of vq_latents"):
        _ = VqLatents(tmp_path / "nowhere", before).params
    tensors = load_file(source / "model.safetensors")
    for change, words in [
        (lambda t: t.pop("encoder.conv_in.weight"), "no tokenizer of a known layout"),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("decoder.up.1")], "2 resolutions in its encoder and 1"),
        (lambda t: t.pop("encoder.mid.attn_1.q.bias"), "attn_1.q.bias is missing"),
        (lambda t: t.update({"decoder.more.weight": np.zeros(3, np.float32)}), "more.weight.* is not in this model"),
    ]:
        changed = dict(tensors)
        change(changed)
        folder = tmp_path / words.split()[0]
        folder.mkdir()
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(ValueError, match=words):
            read_vqgan(folder)
        shutil.rmtree(folder)
