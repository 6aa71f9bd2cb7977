"""Copilot4D (arXiv 2311.01017) on moving digits: frames of ids are predicted from past ones by discrete diffusion.

    python -m src.main --config=configs/copilot4d_digits.py --workdir=runs/copilot4d_digits

A clip has 3 frames of 16 ids (patches of 2 x 2 pixels, k-means of 64 codes), and a direction, which is what the camera
does. Ids are masked, and of those left some are wrong; all are predicted, so that sampling takes tokens back. A frame
sees itself and the frames before it. Three tasks are trained together: a frame is given and the others predicted,
all are denoised together, and each is denoised alone. docs/systems/copilot4d.md has the figures.
Variants: `maskgit` (no wrong ids, the loss on masks, known tokens stay: the baseline), `debug`.
"""

from configs import common

FRAME, GIVEN = 16, 16  # tokens of a frame, and of the frames that are given


def get_config(name: str | None = None):
    """Variants: maskgit, debug."""
    config = common.base()
    config.steps, config.batch = 1000, 40
    config.model.trunk.update({"width": 64, "depth": 4, "heads": 4, "kv_heads": 4, "mlp_width": 192})
    config.model.trunk.update({"qk_norm": True, "init": "lecun_normal"})
    config.model.conditioning, config.model.time.init = {"name": "conditioning:AdaLNPerLayer"}, "lecun_normal"
    config.fields = {"image": image(), "label": common.label(4)}
    config.tasks = {
        "predict": task(20, given=GIVEN),
        "together": task(16),
        "alone": task(4, markov=True),
    }
    config.tasks.predict.objectives.image.update({"given": True, "per": "block"})
    config.optim.update({"lr": 3e-3, "schedule": "cosine", "warmup": 100, "b2": 0.98})
    config.ema.update({"decay": 0.99, "warmup": True})
    config.guidance.scale = 2.0
    config.decode.image.steps = 10
    config.eval.evaluators = {"moving_digits": {"name": "moving_digits", "clips": 360}}
    config.checkpoint.every = 500
    return common.variant(config, name, maskgit=maskgit, debug=debug)


def image() -> dict:
    """Ids of patches of all frames, which lie below each other."""
    field = common.image(24, 8, 1) | {
        "embed": {"name": "tokens", "init": "normal:0.125", "positions": "sincos"},
        "process": {"name": "mask_and_uniform:MaskAndWrong", "wrong": 0.2, "carry_over": False},
        "step": {"name": "categorical:Confidence", "gumbel": 1.0, "masks": True, "revise": True},
        "head": {"name": "linear", "init": "normal:0.02"},
        "time_token": False,
    }
    field["codec"]["codes"] = {"name": "kmeans", "codes": 64, "iterations": 20}
    return field


def task(rows: int, given: int = 0, **segment) -> dict:
    """Clips of which some first tokens are given."""
    loss = {"name": "cross_entropy", "on": "all", "smoothing": 0.1}
    return {
        "weight": rows,
        "source": {"name": "moving_digits"},
        "template": {"name": "class_label", "given": given, "segment": {"blocks": f"block:{FRAME}"} | segment},
        "objectives": {"image": common.diffusion(timesteps="timesteps:Stratified") | {"loss": loss}},
    }


def maskgit(config):
    """Masks alone, which are all that is trained on and sampled."""
    image = config.fields.image
    image.process.update({"wrong": 0.0, "carry_over": True})
    image.step.revise = False
    for each in config.tasks.values():
        each.objectives.image.loss = {"name": "cross_entropy", "on": "changed"}
    return config


def debug(config):
    """The same system, tiny."""
    config = common.debug(config)
    config.fields.image.codec.codes.update({"codes": 16, "iterations": 5})
    config.eval.evaluators.moving_digits.clips = 8
    return config
