"""A tiny autoencoder in a folder beside images with captions, and a config that trains on their latents."""

import json

import jax
import numpy as np
from PIL import Image

from configs import common
from src.codecs.vae import Vae, VaeConfig
from src.codecs.vae_files import write_vae

TINY = VaeConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)  # one latent for 2 x 2 pixels


def write_tiny(folder):
    """The autoencoder of random numbers."""
    draw = lambda leaf: np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32) / 3
    write_vae(folder, Vae(TINY), jax.tree.map(draw, Vae(TINY).shapes()))


def make_folder(folder, count):
    """`vae` and `pictures`, images of 16 x 20 pixels."""
    write_tiny(folder / "vae")
    (folder / "pictures").mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
    lines = [json.dumps({"image": f"{i}.png", "caption": f"picture {i}"}) for i in range(count)]
    (folder / "pictures" / "captions.jsonl").write_text("\n".join(lines))
    return folder


def config_of(folder, batch=8, vae="vae", **codec):
    """One task `draw` of the images of such a folder."""
    config = common.base()
    image = common.image(16, 16, 3)
    image["codec"]["frozen"] = {"name": "vae_latents", "path": str(folder / vae), "factor": 2, "rows": 2} | codec
    with config.unlocked():
        config.fields = {"text": common.text(name="text:Bytes"), "image": image}
        config.tasks = {
            "draw": {
                "weight": 1.0,
                "source": {"name": "captions", "folder": str(folder / "pictures")},
                "template": {"name": "caption_to_image", "length": 16},
                "objectives": {"diffusion": common.diffusion()},
            }
        }
    config = common.debug(config)
    config.batch, config.mesh.data = batch, -1
    return config
