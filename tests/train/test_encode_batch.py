"""Frozen networks: what the step gets of pictures, on any number of devices, and what comes out as pictures again."""

import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src import run
from src.build import build_system
from src.codecs import clip
from src.codecs.clip_vision import ClipVision
from src.codecs.pixels import letterbox
from src.codecs.vae_files import read_vae
from src.codecs.vae_latents import VaeLatents
from src.sampling.frozen_links import FrozenLinks
from src.train.checkpoints.config_changes import check_config
from src.train.trainer import make_trainer, open_data
from tests.helpers.autoencoder import config_of, make_folder
from tests.helpers.published import write_clip

PIXELS = types.SimpleNamespace(shape=(4, 4, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("frozen"), 8)


def images(batch):
    return np.asarray(batch["draw"].tokens["image"].value)


@pytest.mark.faults
def test_the_step_gets_latents_of_pictures_alike_on_any_number_of_devices(folder):
    """8 devices, or one that encodes two rows at a time: the very latents of the autoencoder's own `encode`."""
    got = []
    for devices in (1, 8):
        config = config_of(folder)
        config.mesh.data = devices
        system = build_system(config)
        assert system.encoders.nets["image"].rows == 2
        trainer = make_trainer(system, jax.devices()[:devices])
        data = open_data(trainer)
        rows = next(data)
        assert images(rows).shape == (8, 16, 16, 3)
        batch = trainer.place(rows, 3)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), batch) == jax.tree.map(
            lambda a: (a.shape, a.dtype), system.spec()
        )
        got.append(images(batch))
        again, other = (images(trainer.place(rows, step)) for step in (3, 4))
        np.testing.assert_array_equal(got[-1], again)
        assert np.abs(got[-1] - other).max() > 1e-3, "another step draws other latents"
        data.close()
    np.testing.assert_allclose(*got, atol=1e-6)
    vae, params = read_vae(folder / "vae")
    mean, log_variance = vae.moments(params, jnp.asarray(images(rows)))
    drawn = (got[0] / vae.config.scaling_factor - np.asarray(mean)) / np.exp(0.5 * np.asarray(log_variance))
    assert abs(drawn.mean()) < 0.1 and abs(drawn.std() - 1) < 0.1, "standard normal noise around the mean"


@pytest.mark.faults
def test_moments_are_drawn_from_and_latents_stay(folder):
    codec = VaeLatents(folder / "vae", PIXELS, factor=2)
    values = jax.random.normal(jax.random.key(2), (3, 4, 4, 3))
    moments = codec.compute(codec.params, values)
    assert codec.shape == (2, 2, 4) and codec.moments == moments.shape[1:]
    drawn = codec.draw(codec.compute(codec.params, moments), jax.random.key(0))
    np.testing.assert_array_equal(drawn, codec.network.encode(codec.params, values, jax.random.key(0)))
    np.testing.assert_array_equal(codec.draw(drawn, jax.random.key(1)), drawn)
    with pytest.raises(ValueError, match=r"\(5, 4, 4\) are neither pixels \(4, 4, 3\)"):
        codec.encodes((5, 4, 4))
    with pytest.raises(ValueError, match=r"makes 4 channels for 2 x 2 pixels: .* factor of vae_latents"):
        _ = VaeLatents(folder / "vae", types.SimpleNamespace(shape=(8, 8, 3))).network
    with pytest.raises(FileNotFoundError, match=r"path of vae_latents \(fields"):
        _ = VaeLatents(folder / "nothing", PIXELS, factor=2).params


@pytest.mark.faults
def test_images_are_made_of_latents(folder):
    config = config_of(folder)
    config.sample.batch_size, config.decode.image.steps, config.mesh.data = 2, 1, 1
    system = build_system(config)
    pipeline = system.pipeline.with_params(make_trainer(system, jax.devices()[:1]).init_params())
    given = [{"caption": words} for words in "abc"]
    values = pipeline.values("draw", given, seed=0)["image"]
    assert values.shape == (3, 16, 16, 3) and np.abs(values).max() <= 1 and values.std() > 0
    assert [made["image"].dtype for made in pipeline("draw", given, seed=0)] == [np.uint8] * 3
    wanted = {"VaeLatents": VaeLatents(folder / "vae", PIXELS, factor=2).fingerprint}
    assert system.identity()["codecs"]["image"] == wanted


def test_letterbox_puts_the_whole_picture_into_a_black_square():
    pixels = np.full((10, 20, 3), 200, np.uint8)
    square = letterbox(pixels, 8, 8)
    assert square.shape == (8, 8, 3)
    np.testing.assert_array_equal(square[[0, 1, 6, 7]], 0)
    np.testing.assert_array_equal(square[2:6], 200)


def test_clip_gives_its_features_and_refuses_another_tower(tmp_path):
    """As MonoFormer and LLaVA take them; a data worker gets the encoder without its parameters."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = clip.Clip(clip.ClipConfig(**small, image_size=8, patch_size=4))
    write_clip(tmp_path, tower, tower.init(jax.random.key(0)))
    encoder = ClipVision(tmp_path, size=8, patch=4, features=16, rows=2)
    pictures = [np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8) for i in range(3)]
    shown = jnp.stack([jnp.asarray(encoder.preprocess(pixels)) for pixels in pictures])
    assert shown.shape[1:] == encoder.takes and encoder.spec.tokens == 4
    found = FrozenLinks({"vision": encoder}).encode("vision", np.asarray(shown), None)
    np.testing.assert_allclose(found, tower.features(encoder.params, shown), atol=1e-5)
    assert found.shape == (3, *encoder.shape) == (3, 4, 16)
    sent = pickle.loads(pickle.dumps(encoder))
    assert "params" not in vars(sent) and sent.fingerprint == encoder.fingerprint
    with pytest.raises(ValueError, match=r"has hidden_size 16, not 1024: .* features of clip_vision"):
        _ = ClipVision(tmp_path, size=8, patch=4).params


def test_a_frozen_network_may_move_and_not_change():
    def of(path, digest):
        codec = {"frozen": {"name": "vae_latents", "path": path}}
        return {"fields": {"image": {"codec": codec}}, "codecs": {"image": {"VaeLatents": digest}}}

    assert list(check_config(of("a", "1f"), of("b", "1f"))) == ["fields.image.codec.frozen.path"]
    with pytest.raises(ValueError, match=r"restore the files of fields\.image\.codec with the fingerprint 1f"):
        check_config(of("a", "1f"), of("a", "2e"))


def test_data_that_do_not_fit_are_refused_before_anything_compiles(folder, tmp_path, monkeypatch):
    config = config_of(folder)
    config.mesh.data = 8
    config.tasks.draw.source.folder = str(tmp_path / "nowhere")
    config.init_from.path = str(tmp_path / "weights")  # not there either, and read later
    monkeypatch.setattr(run, "use_program_cache", lambda **_: None)
    monkeypatch.setattr(run.stopping, "before_leaving", lambda release: None)
    monkeypatch.setattr(run.loop, "train", lambda *a, **k: pytest.fail("the training began"))
    monkeypatch.setattr(run, "make_doctor", lambda trainer: pytest.fail("the doctor looked at the data first"))
    flags = types.SimpleNamespace(config=config, workdir=str(tmp_path / "run"), profile=None)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run.train(flags, 0.0)
