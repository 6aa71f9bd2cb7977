"""Show-o (arXiv 2408.12528) at its published size: image ids that are unmasked beside words, on one trunk.

    python -m src.main --config=configs/showo.py --workdir=gs://…/showo

It needs data/phi/tokenizer.model, a tokenizer of 50,301 pieces in sentencepiece's form, data/images (images with
captions), data/texts (documents, docs/documents.md) and data/magvitv2/model.safetensors, whose 13 signs are 8,192 ids:
an image of 256 x 256 is 256 ids.

1,448,018,944 parameters: those of the published network without the scales and shifts of its norms, the text head's
biases and the row of the head for the mask id, 157,826 in all. The trunk has the sizes of Phi-1.5, 24 blocks of width
2,048, with normalised queries and keys as Show-o's. Phi's blocks compute attention and feed-forward layers side by side
and rotate half of each head; here they follow each other, and all of it is rotated. Ids of images have a table and a
head of their own.

`src.tools.aot` for v5e:8x8: 8.45 of 16 GiB a chip (docs/systems/showo.md). It was not trained here.

Arithmetic: 10 rows of 128 + 256 + 2 tokens with images to be made, 2 with images to be described and 4 of 256 tokens of
text, times 64: loss weights 1, 1 and 0.1. For 64 chips (mesh.fsdp=64). Sampling takes 18 steps with guidance 5.
Variants: `debug`. A small one with figures: showo_digits.py.
"""

from configs import common


def get_config(name: str | None = None):
    """Variants: debug."""
    config = common.base()
    config.steps, config.batch = 500_000, 1024
    config.model.trunk.update({"width": 2048, "depth": 24, "heads": 32, "kv_heads": 32, "mlp_width": 8192})
    config.model.trunk.update({"norm": "layer", "mlp": "gelu", "bias": True, "qk_norm": True, "remat": "dots"})
    config.model.dtype = "bfloat16"
    config.mesh.update({"data": -1, "fsdp": 64})
    config.fields = {
        "text": common.text(name="text:Llama", path="data/phi/tokenizer.model", pieces=50_301, reserved=0),
        "image": image(),
    }
    pairs = {"name": "captions", "folder": "data/images"}
    config.tasks = {
        "caption_to_image": {
            "weight": 10,
            "source": pairs,
            "template": {"name": "caption_to_image", "length": 128},
            "objectives": {"image": common.unmask()},
        },
        "image_to_caption": {
            "weight": 2,
            "source": pairs,
            "template": {"name": "image_to_caption", "length": 128},
            "objectives": {"text": common.next_token("text.caption")},
        },
        "texts": {
            "weight": 4,
            "source": {"name": "documents", "folder": "data/texts"},
            "template": {"name": "packed", "length": 256},
            "objectives": {"text": common.next_token("text", weight=0.1)},
        },
    }
    config.decode.image.steps = 18
    config.decode.text.max_new_tokens = 128
    config.guidance.scale = 6.0  # (1 + s) c - s u of the publication with s = 5
    config.optim.update({"lr": 1e-4, "schedule": "cosine", "warmup": 5000, "weight_decay": 0.01})
    config.checkpoint.every = 10_000
    return common.variant(config, name, debug=debug)


def image() -> dict:
    """MAGVIT-v2's ids of images of 256 x 256, replaced by one mask id."""
    own = {
        "codec": {
            "host": {"name": "pixels", "height": 256, "width": 256, "channels": 3},
            "frozen": {"name": "vq_latents", "path": "data/magvitv2", "channels": 13, "factor": 16},
            "codes": {"name": "codebook:Signs"},
        },
        "embed": {"name": "tokens", "init": "normal:0.02"},
    }
    return common.image(256, 256, 3) | common.masked_ids(gumbel=1.0, compound=True) | own


def debug(config):
    """The same system, tiny: the ids are the signs of 8 x 8 pixels, not of the tokenizer's latents."""
    config = common.debug(config)
    pixels = {"name": "pixels", "height": 8, "width": 8, "channels": 3}
    with config.unlocked():
        config.fields.image.codec = {"host": pixels, "codes": {"name": "codebook:Signs"}}
        config.fields.text.codec = {"name": "text:Bytes"}
    config.batch, config.mesh.fsdp = 32, 1
    for task in config.tasks.values():
        task.template.length = 64
    return config
