"""Muse (arXiv 2301.00704) on handwritten digits: words -> coarse image tokens -> fine ones, unmasked by confidence.

    python -m src.main --config=configs/muse_digits.py --workdir=runs/muse_digits

A digit is 2 x 2 tokens of 4 x 4 pixels, and 4 x 4 tokens of 2 x 2 pixels (k-means of 64 codes each). One transformer
makes the coarse tokens from the words, and the fine ones from both: the second stage (super-resolution) is the same
recipe with the coarse tokens in front. docs/systems/muse.md has the figures.
Variants: `direct` (the fine tokens alone, the baseline), `published` (grids of 512 x 512 pixels, 2.6e9 parameters),
`debug`.
"""

from configs import common


def get_config(name: str | None = None):
    """Variants: direct, published, debug."""
    config = common.base()
    config.steps, config.batch = 1000, 64
    config.model.trunk.update({"width": 64, "depth": 4, "heads": 4, "kv_heads": 4, "mlp_width": 192})
    config.model.trunk.update({"qk_norm": True, "init": "lecun_normal"})
    text = common.text("normal:0.125")
    del text["head"]  # words are only read
    config.fields = {"text": text, "coarse": image(8, 1, 4), "image": image(8, 1, 2)}
    for field in ("coarse", "image"):
        config.fields[field].codec.codes = {"name": "kmeans", "codes": 64}
    config.tasks = {
        "caption_to_image": {
            "weight": 1.0,
            "source": {"name": "digits", "shift": 0},
            "template": {"name": "caption_to_image", "coarse": ("coarse",)},
            "objectives": {"coarse": common.unmask("coarse"), "image": common.unmask("image")},
        }
    }
    config.decode.coarse, config.decode.image.steps = {"name": "blocks", "steps": 4}, 8
    config.optim.update({"lr": 3e-3, "schedule": "cosine", "warmup": 100, "b2": 0.98})
    config.ema.update({"decay": 0.99, "warmup": True})
    config.guidance.update({"scale": 1.5, "ramp": 1.0})
    config.eval.evaluators = {"digits": {"name": "digits", "images": 500, "caption": None, "complete": None}}
    config.checkpoint.every = 500
    return common.variant(config, name, direct=direct, published=published)


def image(size: int, channels: int, patch: int) -> dict:
    """Ids of patches that are masked, more of them the nearer t is to 1."""
    embed = {"name": "tokens", "init": "normal:0.125", "positions": "sincos"}
    return common.image(size, size, channels, patch) | common.masked_ids(gumbel=6.0) | {"embed": embed}


def direct(config):
    """The fine tokens from the words, in as many steps as both stages have."""
    with config.unlocked():
        del config.fields["coarse"], config.tasks.caption_to_image.objectives["coarse"], config.decode["coarse"]
        del config.tasks.caption_to_image.template["coarse"]
    config.decode.image.steps = 12
    return config


def published(config):
    """Grids of 16 x 16 and 64 x 64 tokens of an image of 512 x 512 pixels, 8,192 codes each, which are trained with the
    network; 24 and 8 steps. One trunk of 48 layers of width 2,048 stands for the two."""
    config.steps, config.batch = 1_000_000, 512
    config.model.trunk.update({"width": 2048, "depth": 48, "heads": 16, "kv_heads": 16, "mlp_width": 8192})
    config.model.trunk.update({"norm": "layer", "mlp": "gelu", "remat": "dots"})
    config.model.dtype = "bfloat16"
    with config.unlocked():
        config.fields.text.codec = {"name": "text:Llama", "path": "data/llama/tokenizer.model", "pieces": 32_000}
        task = config.tasks.caption_to_image
        for name, patch, numbers in (("coarse", 32, 256), ("image", 8, 64)):
            codes = {"name": "vector_quantizer", "codes": 8192, "numbers": numbers, "hidden": 0}
            config.fields[name] = image(512, 3, patch) | {"learned": codes}
            task.objectives[f"{name}_codec"] = {"name": "codec", "names": (name,), "weight": 1.0}
        task.source = {"name": "captions", "folder": "data/captions"}
        task.template.length = 128
        config.decode.coarse.steps, config.decode.image.steps = 24, 8
        config.eval.evaluators = {}
    return config
