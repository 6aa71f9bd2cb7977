"""LatentLM (arXiv 2412.08635) at a published size: words and vectors of images on one causal trunk, next to next.

    python -m src.main --config=configs/latentlm.py --workdir=gs://…/latentlm

It needs data/llama/tokenizer.model, data/images (images with captions), data/texts (documents, docs/documents.md) and
data/sd-vae. An image of 256 x 256 is 256 vectors of 16 numbers.

1,947,947,008 parameters. The trunk and the head are Transformer-XL of the published code: 24 blocks of width 2,048, and
3 blocks of the head, as wide. Norms of the trunk have learned scales here. Latents of Stable Diffusion's autoencoder,
two by two, stand for those of the sigma-VAE, whose weights were not published. It was not trained here.

`src.tools.aot` for v5e:8x8: 10.12 of 16 GiB a chip (docs/systems/latentlm.md).

Arithmetic: 12 rows of 128 + 256 + 2 tokens with images to be made, 4 with images to be described and 8 of 512 tokens of
text, times 32; four noise draws for each vector. For 64 chips (mesh.fsdp=64). Sampling takes 20 steps of DPM-Solver a
vector, with guidance 4.
Variants: `debug`. A small one with figures: latentlm_digits.py.
"""

from configs import common, papers


def get_config(name: str | None = None):
    """Variants: debug."""
    config = common.base()
    config.steps, config.batch = 500_000, 768
    config.model.trunk.update({"width": 2048, "depth": 24, "heads": 16, "kv_heads": 16, "mlp_width": 8192})
    config.model.trunk.remat = "dots"
    config.model.dtype = "bfloat16"
    config.mesh.update({"data": -1, "fsdp": 64})
    config = papers.sd_latents(config)
    config.fields = {
        "text": common.text(name="text:Llama", path="data/llama/tokenizer.model", pieces=32_000, reserved=0),
        "image": {"codec": config.fields.image.codec, "embed": config.fields.image.embed, "head": head()},
    }
    pairs = {"name": "captions", "folder": "data/images"}
    segment = {"role": "clean", "blocks": "causal"}
    config.tasks = {
        "caption_to_image": {
            "weight": 12,
            "source": pairs,
            "template": {"name": "caption_to_image", "length": 128, "segment": segment},
            "objectives": {"image": common.next_token("image")},
        },
        "image_to_caption": {
            "weight": 4,
            "source": pairs,
            "template": {"name": "image_to_caption", "length": 128, "blocks": "causal"},
            "objectives": {"text": common.next_token("text.caption")},
        },
        "texts": {
            "weight": 8,
            "source": {"name": "documents", "folder": "data/texts"},
            "template": {"name": "packed", "length": 512},
            "objectives": {"text": common.next_token("text")},
        },
    }
    config.optim.update({"lr": 1e-4, "schedule": "cosine", "warmup": 100, "b2": 0.98, "weight_decay": 0.01})
    config.decode.image = {"name": "left_to_right"}
    config.decode.text.max_new_tokens = 128
    config.guidance.scale = 4.0
    config.checkpoint.every = 10_000
    return common.variant(config, name, debug=debug)


def head() -> dict:
    """The published head: noise prediction of cosine betas, four draws for each state."""
    network = {"mlp_width": 2048, "depth": 3, "norm": "rms", "mlp": "swiglu", "inner": 8192, "bias": False}
    process = {"schedule": {"name": "schedules:CosineBetas"}, "parameterization": "eps"}
    sampler = {"sampler": "dpm", "spacing": "linspace", "steps": 20}
    return (
        {"name": "token_diffusion", "draws": 4, "timesteps": {"name": "timesteps:Grid"}} | network | process | sampler
    )


def debug(config):
    """The same system, tiny: patches of 8 x 8 pixels, not of an autoencoder's latents."""
    config = common.debug(config)
    with config.unlocked():
        config.fields.image.codec = common.image(8, 8, 3)["codec"]
        config.fields.text.codec = {"name": "text:Bytes"}
    config.fields.image.head.update({"mlp_width": 32, "inner": 64, "depth": 1, "steps": 2})
    config.batch, config.mesh.fsdp = 48, 1
    for task in config.tasks.values():
        task.template.length = 64
    return config
