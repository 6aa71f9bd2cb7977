"""MonoFormer on class-conditional ImageNet 256 x 256 (arXiv 2409.16280, table 1: FID 2.57, IS 272.6).

    python -m src.main --config=configs/imagenet256.py --workdir=gs://…/imagenet256

1,121,673,248 parameters: TinyLlama 1.1B with four more tokens, and 21.6M for images. The folder holds images.npy
[n, 32, 32, 4] (SD-VAE latents x 0.18215), labels.npy and names.json; the tokenizer is TinyLlama's tokenizer.model.

Arithmetic: a row has 32 prompt + 1 time + 256 image + 2 tail = 291 tokens, and a step of 1024 rows 297,984. A step is
1.77e15 FLOPs (the text head is not used). Weights, average and moments are 18 GB in float32, over fsdp=16 chips 1.1 GiB
each; with 16 rows a chip the step takes 6.4 GiB. Predicted by `src.tools.aot` for 500,000 steps on 64 chips, from
perfect overlap to none: v5e 0.8 to 1.6 days, v5p 0.35 to 0.6, v6e 0.2 to 0.6 (docs/performance.md). With fewer than
16 chips: --config.mesh.fsdp=8.
Variants: `official` (the released code), `paper` (adaLN before the trunk, batch 1024), `debug`.
"""

from configs import common


def get_config(name: str | None = None):
    """The fixed default: the paper's recipe with a time token that learns."""
    config = common.base()
    config.steps, config.batch = 500_000, 1024
    config.text_codec.update({"name": "text:Llama", "path": "data/tinyllama/tokenizer.model"})
    config.model.trunk.update({"width": 2048, "depth": 22, "heads": 32, "kv_heads": 4, "mlp_width": 5632})
    config.model.trunk.remat = "dots"
    config.model.dtype = "bfloat16"
    config.tasks = {
        "class_prompt_to_image": {
            "share": 1.0,
            "data": {
                "name": "arrays:ClassPromptToImage",
                "folder": "data/imagenet256",
                "height": 32,
                "width": 32,
                "channels": 4,
                "prompt_length": 32,
            },
            "objectives": {"diffusion": common.denoise(times="times:Grid")},
        }
    }
    config.process = common.ddpm()
    config.model.image_head.update({"variance": "learned", "init": "normal:0.02", "adaln_init": "normal:0.02"})
    config.mesh.update({"data": -1, "fsdp": 16})
    config.optim.max_norm = 2.0
    config.sample.image.update({"sampler": {"name": "gaussian:Ancestral"}, "steps": 250})
    config.sample.image.guidance.scale = 1.5
    config.checkpoint.every = 10_000
    return common.variant(config, name, official=official, paper=paper)


def official(config):
    """The released code: batch 256, dead time token, 20 steps, guidance on 3 channels, a newline in the tail."""
    config = common.official(config)
    config.batch = 256
    config.tasks.class_prompt_to_image.data.newline = True
    return config


def paper(config):
    """The paper's text: adaLN with the time before the trunk, instead of a token."""
    with config.unlocked():
        config.model.conditioning = {"name": "conditioning:AdaLNBeforeTrunk", "init": "normal:0.02"}
    return config
