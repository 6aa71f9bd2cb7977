"""MonoFormer on class-conditional ImageNet 256 x 256 (arXiv 2409.16280, table 1: FID 2.57, IS 272.6).

    python -m src.main --config=configs/imagenet256.py --workdir=gs://…/imagenet256

1,121,673,248 parameters: TinyLlama 1.1B with four more tokens, and 21.6M for images. It needs three folders; two
commands make them from the downloads (docs/imagenet.md): data/tinyllama (src.tools.convert), data/sd-vae (as published)
and data/imagenet256, the moments of all images' latents (src.tools.latents).

Arithmetic: a row has 32 prompt + 1 time + 256 image + 2 tail = 291 tokens, and a step of 1024 rows 297,984. A step is
1.77e15 FLOPs (the text head is not used). Weights, average and moments are 18 GB in float32, over fsdp=16 chips 1.1 GB
each; with 16 rows a chip the step takes 6.4 GiB. Predicted by `src.tools.aot` for 500,000 steps on 64 chips, from
perfect overlap to none: v5e 0.8 to 1.6 days, v5p 0.35 to 0.6, v6e 0.2 to 0.6 (docs/performance.md). With fewer than
16 chips: --config.mesh.fsdp=8.
Expect the loss to fall fast at first and slowly for the rest of the run; the goal is table 1. It was not trained here.
The text head gets no gradient, as published; the checks before the first step warn of it (docs/checks.md).
Variants: `official` (the released code), `paper` (adaLN before the trunk), `pixels` (images of a folder, encoded in
training), `debug`.
"""

from configs import common, papers


def get_config(name: str | None = None):
    """The fixed default: the paper's recipe with a time token that learns."""
    config = papers.tinyllama(common.base())
    config.steps, config.batch = 500_000, 1024
    config.tasks = {
        "class_prompt_to_image": {
            "weight": 1.0,
            "source": {
                "name": "records",  # what src.tools.latents wrote; or a folder of images: see `pixels`
                "folder": "data/imagenet256",
                "moments": True,  # mean and log-variance of the latents
                "ambiguous": "words",  # "crane" and "maillot" are two classes each: words tell them apart, or keep
                "held_out": 0,  # rows for the held-out losses, spread over the classes
            },
            "template": {"name": "class_prompt", "length": 32, "phrases": "fixed", "newline": False},
            "objectives": {"diffusion": common.diffusion(timesteps="timesteps:Grid")},
        }
    }
    config = papers.sd_latents(config)
    config.decode.image.steps = 250
    config.guidance.scale = 1.5
    config.checkpoint.every = 10_000
    others = {"paper": papers.adaln_before_trunk, "pixels": pixels}
    return common.variant(config, name, official=official, **others, debug=debug)


def official(config):
    """The released code: batch 256, a constant time token, 20 steps, guidance on 3 channels, its phrases, a newline."""
    config = common.official(config)
    config.batch = 256
    config.tasks.class_prompt_to_image.template.update({"newline": True, "phrases": "official"})
    config.tasks.class_prompt_to_image.source.ambiguous = "keep"
    return config


def pixels(config):
    """ImageNet's own files, `data/imagenet/train/<wnid>/*.JPEG`, encoded by the autoencoder in every step."""
    task = config.tasks.class_prompt_to_image
    kept = {name: task.source[name] for name in ("ambiguous", "held_out")}
    files = {"folder": "data/imagenet/train", "names": "data/imagenet/names.json"}
    with config.unlocked():
        task.source = {"name": "image_folders"} | files | kept
    return config


def debug(config):
    """The same system, tiny: 8 x 8 pixels and an autoencoder that makes one latent of 2 x 2."""
    config = common.debug(papers.tiny_latents(config))
    config.tasks.class_prompt_to_image.template.length = 64
    return config
