"""Frozen networks: what the step gets of pictures, on any number of devices, and what comes out as pictures again."""

import json
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from src.codecs.vision import Clip, Pixels, letterbox

from configs import common
from src import run
from src.build import build_system
from src.codecs import clip
from src.codecs.clip_files import write_clip
from src.codecs.vae import Vae, VaeConfig
from src.codecs.vae_files import read_vae, write_vae
from src.codecs.vae_latents import Latents
from src.train.checkpoints.config_changes import check_config
from src.train.encode_batch import Frozen
from src.train.trainer import make_trainer, open_data

TINY = VaeConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)  # one latent for 2 x 2 pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny autoencoder, and eight pictures with captions."""
    folder = tmp_path_factory.mktemp("frozen")
    vae = Vae(TINY)
    write_vae(folder / "vae", vae, vae.init(jax.random.key(0)))
    (folder / "pictures").mkdir()
    lines = []
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": f"picture {i}"}))
    (folder / "pictures" / "captions.jsonl").write_text("\n".join(lines))
    return folder


def config_of(folder, batch=8):
    config = common.base()
    config.text_codec.name = "text:Bytes"
    data = {"name": "pictures:CaptionToImage", "folder": str(folder / "pictures"), "size": 16, "length": 16}
    config.tasks = {"draw": {"share": 1.0, "data": data, "objectives": {"diffusion": common.diffusion()}}}
    with config.unlocked():
        config.image_codec = {"name": "vae_latents", "path": str(folder / "vae"), "factor": 2, "rows": 2}
    config = common.debug(config)
    config.batch, config.mesh.data = batch, 1
    return config


def test_the_step_gets_latents_of_pictures_alike_on_any_number_of_devices(folder):
    """8 devices, or one that encodes two rows at a time: the very latents of the autoencoder's own `encode`."""
    got = []
    for devices in (1, 8):
        config = config_of(folder)
        config.mesh.data = devices
        system = build_system(config)
        assert system.frozen.image.rows == 2
        trainer = make_trainer(system, jax.devices()[:devices])
        data = open_data(trainer)
        rows = next(data)
        assert rows["draw"]["image"].values.shape == (8, 16, 16, 3)
        batch = trainer.place(rows, 3)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), batch) == jax.tree.map(
            lambda a: (a.shape, a.dtype), system.spec()
        )
        got.append(np.asarray(batch["draw"]["image"].values))
        again, other = (np.asarray(trainer.place(rows, step)["draw"]["image"].values) for step in (3, 4))
        np.testing.assert_array_equal(got[-1], again)
        assert np.abs(got[-1] - other).max() > 1e-3, "another step draws other latents"
        data.close()
    np.testing.assert_allclose(*got, atol=1e-6)
    vae, params = read_vae(folder / "vae")
    mean, log_variance = vae.moments(params, jnp.asarray(rows["draw"]["image"].values))
    drawn = (got[0] / vae.config.scaling_factor - np.asarray(mean)) / np.exp(0.5 * np.asarray(log_variance))
    assert abs(drawn.mean()) < 0.1 and abs(drawn.std() - 1) < 0.1, "standard normal noise around the mean"


def test_moments_are_drawn_from_and_latents_stay(folder):
    codec = Latents(folder / "vae", factor=2)
    values = jax.random.normal(jax.random.key(2), (3, 4, 4, 3))
    moments = codec.compute(codec.params, values)
    assert codec.shape((4, 4, 3)) == codec.shape((2, 2, 8)) == codec.shape((2, 2, 4)) == (2, 2, 4)
    drawn = codec.draw(codec.compute(codec.params, moments), jax.random.key(0))
    np.testing.assert_array_equal(drawn, codec.vae.encode(codec.params, values, jax.random.key(0)))
    np.testing.assert_array_equal(codec.draw(drawn, jax.random.key(1)), drawn)
    with pytest.raises(ValueError, match="neither pictures"):
        codec.shape((5, 4, 3))
    with pytest.raises(ValueError, match=r"4 channels for 2 x 2.*image_codec\.factor"):
        _ = Latents(folder / "vae").vae
    with pytest.raises(FileNotFoundError, match=r"image_codec\.path"):
        _ = Latents(folder / "nothing").params


def test_pictures_are_drawn_of_latents(folder):
    config = config_of(folder)
    config.sample.rows, config.sample.image.steps = 2, 1
    system = build_system(config)
    assert system.predictor.shape == (16, 16, 3)
    predict = system.predictor.with_params(make_trainer(system, jax.devices()[:1]).init_params())
    images = predict.draw("draw", words=["a", "b", "c"])
    assert images.shape == (3, 16, 16, 3) and np.abs(images).max() <= 1 and images.std() > 0
    assert system.identity()["frozen"] == {"image": Latents(folder / "vae", factor=2).fingerprint}


def test_letterbox_puts_the_whole_picture_into_a_black_square():
    pixels = np.full((10, 20, 3), 200, np.uint8)
    square = letterbox(pixels, 8)
    assert square.shape == (8, 8, 3)
    np.testing.assert_array_equal(square[[0, 1, 6, 7]], -1)
    np.testing.assert_allclose(square[2:6], 200 / 127.5 - 1)
    encoder = Pixels(8, 4)
    assert encoder.compute({}, jnp.asarray(square[None])).shape == (1, encoder.tokens, encoder.features)


def test_clip_gives_its_features_and_refuses_another_tower(tmp_path):
    """As MonoFormer and LLaVA take them; a data worker gets the encoder without its parameters."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = clip.Clip(clip.ClipConfig(**small, image_size=8, patch_size=4))
    write_clip(tmp_path, tower, tower.init(jax.random.key(0)))
    encoder = Clip(tmp_path, size=8, patch=4, features=16, rows=2)
    pictures = [np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8) for i in range(3)]
    shown = jnp.stack([jnp.asarray(encoder.preprocess(pixels)) for pixels in pictures])
    assert shown.shape[1:] == encoder.shape and encoder.tokens == 4
    found = Frozen(vision=encoder).shown("vision", np.asarray(shown))
    np.testing.assert_allclose(found, tower.features(encoder.params, shown), atol=1e-5)
    assert found.shape == (3, encoder.tokens, encoder.features)
    sent = pickle.loads(pickle.dumps(encoder))
    assert "params" not in vars(sent) and sent.fingerprint == encoder.fingerprint
    with pytest.raises(ValueError, match=r"has hidden_size 16, not 1024: set vision\.size"):
        _ = Clip(tmp_path, size=8, patch=4).params


def test_a_frozen_network_may_move_and_not_change():
    def of(path, digest):
        return {"image_codec": {"name": "vae_latents", "path": path}, "frozen": {"image": digest}}

    assert list(check_config(of("a", "1f"), of("b", "1f"))) == ["image_codec.path"]
    with pytest.raises(ValueError, match=r"give the image_codec that it began with"):
        check_config(of("a", "1f"), of("a", "2e"))


def test_data_that_do_not_fit_are_refused_before_anything_compiles(folder, tmp_path, monkeypatch):
    config = config_of(folder)
    config.mesh.data = 8
    config.tasks.draw.data.folder = str(tmp_path / "nowhere")
    config.init_from.path = str(tmp_path / "weights")  # not there either, and read later
    monkeypatch.setattr(run, "use_program_cache", lambda: None)
    monkeypatch.setattr(run.stopping, "before_leaving", lambda release: None)
    monkeypatch.setattr(run.loop, "train", lambda *a, **k: pytest.fail("the training began"))
    monkeypatch.setattr(run, "make_doctor", lambda trainer: pytest.fail("the doctor looked at the data first"))
    flags = types.SimpleNamespace(config=config, workdir=str(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run.train(flags, 0.0)
