"""CausalFusion (Deng et al. 2024) on handwritten digits: one checkpoint, from autoregression to diffusion.

    python -m src.main --config=configs/causalfusion_digits.py --workdir=runs/causalfusion_digits

A digit is 16 patches of 2 x 2 pixels. In training each row has its own random order and 1, 2, 4, 8 or 16 blocks of it;
each block is denoised, given the clean blocks before it. So the number of blocks is chosen when sampling: 1 is plain
diffusion, 16 is next-token prediction of patches. 237,700 parameters; 231 s of processor time on two CPU cores.
docs/systems/causalfusion.md has the figures.
Variants: `diffusion` (one block in training too, the baseline), `published` (CausalFusion-XL on ImageNet latents, as
its public code trains it), `debug`.
"""

from configs import common

TOKENS = 16
STEPS = {1: 20, 2: 10, 4: 10, 8: 8, 16: 8}  # of each block, by the number of blocks


def get_config(name: str | None = None):
    """Variants: diffusion, published, debug."""
    config = common.base()
    config.steps, config.batch = 1500, 64
    config.model.trunk.update({"width": 64, "depth": 4, "heads": 4, "kv_heads": 4, "mlp_width": 192})
    config.model.trunk.update({"qk_norm": True, "init": "lecun_normal", "rope": False})
    config.model.conditioning = {"name": "conditioning:AddBeforeTrunk"}
    config.model.time.init = "lecun_normal"
    image = common.image(8, 8, 1) | {"head": {"name": "linear", "init": "zeros"}, "time_token": False}
    config.fields = {"image": image, "label": label(10, 4, "normal:0.125")}
    segment = {"role": "copies", "order": "random", "splits": tuple(STEPS)}
    config.tasks = {
        "label_to_image": {
            "weight": 1.0,
            "source": {"name": "digits", "shift": 0},
            "template": {"name": "class_label", "segment": segment},
            "objectives": {"image": common.diffusion() | {"per": "block"}},
        }
    }
    config.decode.image = blocks(4)
    config.optim.update({"lr": 4e-3, "schedule": "cosine", "warmup": 100, "b2": 0.98})
    config.ema.update({"decay": 0.995, "warmup": True})
    config.guidance.scale = 1.0
    modes = {f"blocks_{number}": blocks(number) for number in STEPS}
    config.eval.evaluators = {"labels": {"name": "labels", "images": 500, "modes": modes}}
    config.checkpoint.every = 500
    return common.variant(config, name, diffusion=diffusion, published=published, debug=debug)


def label(count: int, tokens: int, init: str) -> dict:
    """Classes as tokens in front of the image."""
    codec = {"name": "classes", "count": count, "tokens": tokens}
    return {"codec": codec, "embed": {"name": "tokens", "init": init}}


def blocks(number: int) -> dict:
    """A decoder of so many blocks of one size."""
    return {"name": "blocks", "steps": STEPS[number], "blocks": TOKENS // number}


def diffusion(config):
    """One block for all rows: plain diffusion with the same transformer and budget."""
    config.tasks.label_to_image.template.segment.splits = (1,)
    config.decode.image = blocks(1)
    with config.unlocked():
        config.eval.evaluators.labels.modes = {"blocks_1": blocks(1)}
    return config


def published(config):
    """CausalFusion-XL: 256 latents of 16 channels, 64 class tokens, numbers of blocks with a chance proportional to
    0.9^(n - 1), noise prediction with 1000 linear betas, weights of the loss from 2 to 1."""
    config.steps, config.batch = 500_000, 2048
    config.model.trunk.update({"width": 1280, "depth": 32, "heads": 20, "kv_heads": 20, "mlp_width": 5120})
    config.model.trunk.update({"norm": "layer", "mlp": "gelu", "bias": True, "init": "xavier_uniform", "remat": "full"})
    config.model.dtype = "bfloat16"
    config.model.time.init = "xavier_uniform"
    image = common.image(256, 256, 3, patch=1)
    # of MAR, as diffusers has an AutoencoderKL, with the scale 0.2325
    image["codec"]["frozen"] = {"name": "vae_latents", "path": "data/mar-vae", "channels": 16, "factor": 16}
    image["embed"]["positions"] = "trained"
    image |= {"process": common.ddpm() | {"variance": "fixed_large"}, "step": {"name": "ancestral"}}
    image |= {"head": {"name": "linear", "init": "zeros"}, "time_token": False}
    with config.unlocked():
        config.fields = {"image": image, "label": label(1000, 64, "normal:0.02")}
        task = config.tasks.label_to_image
        task.source = {"name": "records", "folder": "data/imagenet256-mar", "moments": True}
        task.template.segment = {"role": "copies", "order": "random", "splits": 0.9}
        noise = common.diffusion(timesteps="timesteps:Grid") | {"first_weight": 2.0}
        task.objectives.image = noise
        config.decode.image = {"name": "blocks", "steps": 250, "blocks": 0}
        config.eval.evaluators = {}
    config.mesh.update({"data": -1, "fsdp": 16})
    config.optim.update({"lr": 8e-4, "schedule": "constant", "warmup": 25_000, "b2": 0.95, "eps": 1e-15})
    config.ema.update({"decay": 0.9999, "warmup": False})
    config.guidance.scale = 4.0
    config.checkpoint.every = 12_500
    return config


def debug(config):
    """The same system, tiny."""
    config = common.debug(config)
    for evaluator in config.eval.evaluators.values():
        for mode in evaluator.modes.values():
            mode.steps = 2
    if "frozen" in config.fields.image.codec:
        config.fields.image.codec.host.update({"height": 64, "width": 64})
        config.fields.label.codec.update({"count": 1000, "tokens": 2})
        config.mesh.fsdp = 1
    return config
