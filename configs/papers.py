"""Fragments that the papers' configs share: TinyLlama, latents of Stable Diffusion's autoencoder, JourneyDB."""

from ml_collections import ConfigDict

from configs import common


def tinyllama(config: ConfigDict) -> ConfigDict:
    """MonoFormer's model: TinyLlama 1.1B, begun from its weights, with a time token; AdamW at 1e-4 for a pod."""
    config.init_from.path = "data/tinyllama"  # what src.tools.convert wrote
    with config.unlocked():
        words = {"pieces": 32_000, "reserved": 0}  # reserved: rows of words that the weights have and the file lacks
        config.fields.text = common.text(name="text:Llama", path="data/tinyllama/tokenizer.model", **words)
    config.model.trunk.update({"width": 2048, "depth": 22, "heads": 32, "kv_heads": 4, "mlp_width": 5632})
    config.model.trunk.remat = "dots"
    config.model.dtype = "bfloat16"
    config.mesh.update({"data": -1, "fsdp": 16})
    config.optim.grad_clip = 2.0
    return config


def sd_latents(config: ConfigDict, size: int = 256) -> ConfigDict:
    """Images as latents of Stable Diffusion's autoencoder, noised as DDPM does, with a learned variance."""
    field = common.image(size, size, 3)
    vae = {"name": "vae_latents", "path": "data/sd-vae", "channels": 4, "factor": 8}
    field["codec"]["frozen"] = vae | {"dtype": "float32"}  # or bfloat16, see docs/performance.md
    field["head"] = {"name": "adaln", "init": "normal:0.02", "adaln_init": "normal:0.02"}
    field["process"], field["step"] = common.ddpm(), {"name": "ancestral"}
    with config.unlocked():
        config.fields.image = field
    return config


def adaln_before_trunk(config: ConfigDict) -> ConfigDict:
    """The conditioning that the MonoFormer paper describes: adaLN with the time, once, before the trunk."""
    with config.unlocked():
        config.model.conditioning = {"name": "conditioning:AdaLNBeforeTrunk", "init": "normal:0.02"}
    return config


def text_to_image(config: ConfigDict) -> ConfigDict:
    """Latents, drawn as for the paper's figures: 250 steps, guidance 4."""
    config = sd_latents(config)
    config.decode.image.steps = 250
    config.guidance.scale = 4.0
    config.checkpoint.every = 10_000
    return config


def journeydb(weight: float) -> dict:
    """Text to image on JourneyDB, from moments of latents."""
    return {
        "weight": weight,
        "source": {"name": "records", "folder": "data/journeydb256", "moments": True},  # what src.tools.latents wrote
        "template": {
            "name": "caption_to_image",
            "caption": "prompt",
            "phrase": "Please generate an image of {}",
            "length": 128,
            "newline": False,
        },
        "objectives": {"diffusion": common.diffusion(timesteps="timesteps:Grid")},
    }


def released_journeydb(config: ConfigDict) -> ConfigDict:
    """The released scripts: prompts of 128 tokens with <s>, before <|im_start|>, and a line break behind the image."""
    config.tasks.caption_to_image.template.update({"length": 129, "newline": True})
    return config


def journeydb_pixels(config: ConfigDict) -> ConfigDict:
    """JourneyDB's own files instead of moments."""
    files = {"annotations": "data/journeydb/train_anno.jsonl", "images": "data/journeydb/imgs"}
    with config.unlocked():
        config.tasks.caption_to_image.source = {"name": "journeydb"} | files
    return config


def tiny_latents(config: ConfigDict) -> ConfigDict:
    """For `debug`: images of 8 x 8 pixels, an autoencoder that makes one latent of 2 x 2, any number of devices."""
    config.fields.image.codec.host.update({"height": 8, "width": 8})
    config.fields.image.codec.frozen.factor, config.mesh.fsdp = 2, 1
    return config


def tiny_journeydb(config: ConfigDict) -> ConfigDict:
    """For `debug`: short prompts and tiny latents."""
    config = tiny_latents(config)
    config.tasks.caption_to_image.template.length = 64
    return config
