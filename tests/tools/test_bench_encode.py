"""The bench of the frozen encoders: operations as counted by hand, rates that agree, and no step is compiled for it."""

import jax
import numpy as np
import pytest

from configs import common
from src.codecs.vae import Vae, VaeConfig
from src.codecs.vae_files import write_vae
from src.tools import bench as tool
from src.tools.benchmarks import parts

TINY = VaeConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)  # one latent for 2 x 2 pixels


def config_of(folder):
    config = common.base()
    config.text_codec.name = ""
    data = {"name": "imagenet:ClassToImage", "folder": str(folder), "size": 16, "classes": 5}
    config.tasks = {"draw": {"share": 1.0, "data": data, "objectives": {"diffusion": common.diffusion()}}}
    with config.unlocked():
        config.image_codec = {"name": "vae_latents", "path": str(folder / "vae"), "factor": 2, "rows": 4}
    return common.debug(config)


@pytest.mark.faults
def test_figures_of_an_encoder_and_of_its_latents(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "start", None)
    draw = lambda leaf: np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32)
    write_vae(tmp_path / "vae", Vae(TINY), jax.tree.map(draw, Vae(TINY).shapes()))
    found = tool.bench(config_of(tmp_path), ("encode",), steps=2, peak_size=64)["encode"]
    image, latents = found["image"], found["latents"]
    assert found["assumed"] == "nothing" and "vision" not in found
    # 3 x 3 windows that touch the image: 3 n - 2 along a side of n, where a half of the side is taken 3 n - 1
    convolutions = 46**2 * (3 * 8 + 2 * 64) + 23**2 * 64 + 22**2 * (2 * 64 + 4 * 64 + 64) + 64 * 64
    attention = 64 * 4 * 64 + 2 * 64 * 64 * 8
    assert image["flops_per_image"] == 2 * (convolutions + attention)
    assert image["rows"] == 2 and image["seconds"]["count"] == image["share_of_matmul_peak"]["count"] == 2
    assert image["images_per_second"] == pytest.approx(2 / image["seconds"]["median"])
    assert latents["images"] == 2 * 2 * jax.device_count(), "two calls of all devices"
    slower, faster = latents["seconds_per_image"], latents["seconds_per_image_without_network"]
    assert latents["share_of_network"] == pytest.approx(1 - faster / slower) and 0 < faster < slower
    assert latents["images_per_second_without_network"] == pytest.approx(1 / faster)
    assert "share_of_matmul_peak" in tool.table(found)


def test_a_config_without_frozen_networks_is_told(tmp_path):
    config = config_of(tmp_path)
    config.image_codec.name = ""
    with pytest.raises(ValueError, match="no frozen network: set image_codec or vision"):
        tool.bench(config, ("encode",))
