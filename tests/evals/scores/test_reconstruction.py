"""What codecs lose: PSNR and SSIM against scikit-image 0.26.0, and images through the chains of configs."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from src.codecs.chain import build_chain
from src.data.sources.digits import Digits
from src.evals.frechet import frechet_distance
from src.evals.scores import networks, reconstruction
from src.evals.scores.similarity import psnr, ssim, window
from src.interfaces import Field
from src.tools import reconstruct
from tests.helpers.autoencoder import write_tiny
from tests.helpers.tasks import nothing

# structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=2)
SSIM = [0.9685561297936319, 0.9711016458174386, 0.9744058048883871]
PSNR = [23.275039702571895, 23.326307624100057, 23.597165902675762]


def pairs():
    random = np.random.RandomState(0)
    x = random.randint(0, 256, (3, 20, 23, 3)).astype(np.uint8)
    return x, np.clip(x.astype(int) + random.randint(-30, 31, x.shape), 0, 255).astype(np.uint8)


def test_similarity_is_that_of_scikit_image():
    x, y = pairs()
    np.testing.assert_allclose(ssim(x, y), SSIM, rtol=1e-12)
    np.testing.assert_allclose(psnr(x, y), PSNR, rtol=1e-12)
    np.testing.assert_allclose(ssim(x, x), 1)
    assert psnr(x, x).tolist() == psnr(x, np.where(np.arange(x[0].size).reshape(x[0].shape) == 7, x ^ 1, x)).tolist()


def test_similarity_of_even_images_is_that_of_their_means():
    """Without variance SSIM is (2 a b + C1) / (a² + b² + C1); a window larger than the image is cut to an odd side."""
    x, y = np.full((1, 8, 10, 1), 100, np.uint8), np.full((1, 8, 10, 1), 160, np.uint8)
    np.testing.assert_allclose(ssim(x, y), (2 * 100 * 160 + 2.55**2) / (100**2 + 160**2 + 2.55**2))
    assert [window(*size) for size in ((8, 10), (9, 9), (11, 300), (1, 5))] == [7, 9, 11, 1]


def test_an_autoencoder_gives_the_scores_of_what_comes_back(tmp_path):
    write_tiny(tmp_path / "vae")
    links = [
        {"name": "pixels", "height": 8, "width": 12},
        {"name": "vae_latents", "path": str(tmp_path / "vae"), "factor": 2, "rows": 2},
        {"name": "patch", "size": 2},
    ]
    chain = build_chain(links, "fields.image.codec", nothing)
    field = Field("image", chain.spec, chain)
    (tmp_path / "images/inner").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(5):
        pixels = random.integers(0, 256, (9, 13, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/inner/{number}.png")
    (tmp_path / "images/9.png").write_bytes(b"no image")
    source = reconstruction.ImageFiles(str(tmp_path / "images"))
    blocks = list(reconstruction.source_images(source, field, "train", 50, block=2))
    images = np.concatenate(blocks)
    assert images.shape == (5, 8, 12, 3) and [len(block) for block in blocks] == [2, 2, 1]
    back = reconstruction.through_codec(field)
    vae = chain.frozen.network
    floats = jnp.asarray(images) / 127.5 - 1
    expected = jax.jit(lambda params, x: jnp.clip(vae.decode(params, vae.encode(params, x)), -1, 1))
    expected = expected(chain.frozen.params, floats)
    made = back(images)
    assert np.abs(made - (expected + 1) * 127.5).max() < 0.51, "rounded to the nearest"
    found = reconstruction.reconstruction_scores(iter(blocks), back, networks.pixels(8, 12))
    flat = lambda values: values.reshape(len(values), -1) / 255
    assert found["rfid"] == pytest.approx(frechet_distance(flat(images), flat(made)), rel=1e-5)
    assert found["psnr"] == pytest.approx(psnr(images, made).mean()) and found["count"] == 5
    assert found["ssim"] == pytest.approx(ssim(images, made).mean()) and found["exact"] == 0


def test_the_codes_of_digits_by_the_command(tmp_path, capsys):
    flags = ["--config=configs/showo_digits.py", "--network=pixels", "--count=40", f"--json={tmp_path}/codec.json"]
    assert reconstruct.main(["reconstruct", *flags]) == 0
    report, said = json.loads((tmp_path / "codec.json").read_text()), capsys.readouterr().out
    assert 18 < report["scores"]["psnr"] < 30 and 0.9 < report["scores"]["ssim"] < 1 and report["scores"]["rfid"] > 0
    assert report["images"] == {"task": "caption_to_image", "source": "Digits", "split": "test", "count": 40}
    assert len(report["codec"]["KMeans"]) == 16 and report["setting"]["ssim_window"] == 7
    assert "ssim_window" in said and "psnr" in said
    assert reconstruct.main(["reconstruct", "--config=configs/blackout_digits.py", "--count=40"]) == 0
    assert "exact       1.0000" in capsys.readouterr().out, "17 levels lose nothing"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--field=text"], "fields.text.codec gives back no images"),
        (["--field=picture"], "there is no field 'picture'; this config has"),
        (["--task=image_to_caption"], "is none that makes the field image .--field.; the config has caption_to_image"),
        (["--network=inception"], "give --weights=pt_inception"),
        (["--network=inception", "--weights=none.pth"], "none.pth does not exist: download pt_inception"),
        (["--images={f}"], "has no images: give a folder"),
    ],
)
def test_what_is_wrong_is_one_sentence(flags, told, tmp_path, capsys):
    flags = [flag.format(f=tmp_path) for flag in flags]
    assert reconstruct.main(["reconstruct", "--config=configs/showo_digits.py", *flags]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(told, said)


def test_latents_and_large_pixels_are_refused():
    source = Digits()
    source.holds = "moments"
    with pytest.raises(ValueError, match=r"tasks\.x\.source has moments of latents and no images"):
        reconstruction.check_source(source, "tasks.x.source")
    with pytest.raises(ValueError, match=r"196,608 x 196,608 numbers: give --network=inception"):
        networks.pixels(256, 256)
