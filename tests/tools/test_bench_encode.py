"""The bench of the frozen encoders: operations as counted by hand, rates that agree, and no step is compiled for it."""

import jax
import pytest

from src.tools import bench as tool
from src.tools.benchmarks import parts
from tests.helpers import runs
from tests.helpers.autoencoder import config_of, write_tiny


@pytest.mark.faults
def test_figures_of_an_encoder_and_of_its_latents(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "start", None)
    write_tiny(tmp_path / "vae")
    found = tool.bench(config_of(tmp_path, rows=4), ("encode",), steps=2, peak_size=64)["encode"]
    image, latents = found["image"], found["image latents"]
    assert found["assumed"] == "nothing" and set(found) == {"assumed", "image", "image latents", "where"}
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


def test_a_config_without_frozen_encoders_is_told():
    with pytest.raises(ValueError, match=r"no frozen encoder: .*fields\.<name>\.codec\.frozen"):
        tool.bench(runs.config_of(), ("encode",))
