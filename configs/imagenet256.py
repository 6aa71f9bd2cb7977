"""MonoFormer on class-conditional ImageNet 256 x 256 (arXiv 2409.16280, table 1: FID 2.57, IS 272.6).

    python -m src.main --config=configs/imagenet256.py --workdir=gs://…/imagenet256

1,121,673,248 parameters: TinyLlama 1.1B with four more tokens, and 21.6M for images. It needs three folders, which two
commands make of the downloads (docs/imagenet.md): data/tinyllama (src.tools.convert), data/sd-vae (as published)
and data/imagenet256, the moments of all images' latents (src.tools.latents).

Arithmetic: a row has 32 prompt + 1 time + 256 image + 2 tail = 291 tokens, and a step of 1024 rows 297,984. A step is
1.77e15 FLOPs (the text head is not used). Weights, average and moments are 18 GB in float32, over fsdp=16 chips 1.1 GiB
each; with 16 rows a chip the step takes 6.4 GiB. Predicted by `src.tools.aot` for 500,000 steps on 64 chips, from
perfect overlap to none: v5e 0.8 to 1.6 days, v5p 0.35 to 0.6, v6e 0.2 to 0.6 (docs/performance.md). With fewer than
16 chips: --config.mesh.fsdp=8.
Expect the loss to fall fast at first and slowly for the rest of the run; the goal is table 1. It was not trained here.
The text head learns nothing, as published: the doctor says so.
Variants: `official` (the released code), `paper` (adaLN before the trunk), `pixels` (images of a folder, encoded in
training), `debug`.
"""

from configs import common


def get_config(name: str | None = None):
    """The fixed default: the paper's recipe with a time token that learns."""
    config = common.tinyllama(common.base())
    config.steps, config.batch = 500_000, 1024
    config.tasks = {
        "class_prompt_to_image": {
            "share": 1.0,
            "data": {
                "name": "imagenet:ClassPromptToImage",
                "records": "data/imagenet256",  # what src.tools.latents wrote; or "" and a folder: see `pixels`
                "folder": "",
                "names": "",  # classes by id, {"n01440764": "tench", …}: the records have them
                "ambiguous": "words",  # "crane" and "maillot" are two classes each: words tell them apart, or keep
                "held_out": 0,  # images for the panels, spread over the classes
                "size": 32,
                "channels": 8,  # mean and log-variance of 4 each
                "prompt_length": 32,
                "phrases": "fixed",
                "newline": False,
            },
            "objectives": {"diffusion": common.diffusion(times="timesteps:Grid")},
        }
    }
    config = common.sd_latents(config)
    config.sample.image.steps = 250
    config.sample.image.guidance.scale = 1.5
    config.checkpoint.every = 10_000
    others = {"paper": common.adaln_before_trunk, "pixels": pixels}
    return common.variant(config, name, official=official, **others, debug=debug)


def official(config):
    """The released code: batch 256, dead time token, 20 steps, guidance on 3 channels, its phrases, a newline."""
    config = common.official(config)
    config.batch = 256
    config.tasks.class_prompt_to_image.data.update({"newline": True, "phrases": "official", "ambiguous": "keep"})
    return config


def pixels(config):
    """ImageNet's own files, `data/imagenet/train/<wnid>/*.JPEG`, encoded by the autoencoder in every step."""
    data = {"records": "", "folder": "data/imagenet/train", "names": "data/imagenet/names.json"}
    config.tasks.class_prompt_to_image.data.update(data | {"size": 256, "channels": 3})
    return config


def debug(config):
    """The same system, tiny: 8 x 8 pixels and an autoencoder that makes one latent of 2 x 2."""
    config = common.debug(common.tiny_latents(config))
    data = config.tasks.class_prompt_to_image.data
    data.size, data.prompt_length = 8 if data.channels == 3 else 4, 64
    return config
