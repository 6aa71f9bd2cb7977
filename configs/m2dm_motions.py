"""M2DM (arXiv 2308.14480) on motion curves: words -> codes of windows of a motion, important windows noised last.

    python -m src.main --config=configs/m2dm_motions.py --workdir=runs/m2dm_motions

A window of 4 frames is one of 64 codes (k-means). A code is masked, or in a tenth of the cases replaced by any other,
and a window keeps its code the longer, the more motions move there: so sampling begins with the moving windows. The
judge knows all curves that fit the words. docs/systems/m2dm.md has the figures.
Variants: `plain` (one schedule for all windows: VQ-Diffusion's kernel, the baseline), `humanml3d` (published sizes),
`debug`.
"""

from configs import common

MOVES = (0.375, 0.625, 0.875)  # shares of the windows in which motions of the three lengths move
STEPS = (2, 4, 8, 16, 32)


def get_config(name: str | None = None):
    """Variants: plain, humanml3d, debug."""
    config = common.base()
    config.steps, config.batch = 1500, 64
    config.model.trunk.update({"width": 64, "depth": 4, "heads": 4, "kv_heads": 4, "mlp_width": 192})
    config.model.trunk.update({"qk_norm": True, "init": "lecun_normal"})
    config.model.time.init = "lecun_normal"
    config.fields = {"text": common.text("normal:0.125"), "motion": motion(16, 8)}
    loss = {"name": "posterior_kl", "steps": 100, "auxiliary": 0.1}
    config.tasks = {
        "words_to_motion": {
            "weight": 1.0,
            "source": {"name": "motions", "windows": 16, "frames": 4, "channels": 2},
            "template": {"name": "caption_to_image", "image": "motion"},
            "objectives": {"motion": common.diffusion("motion", timesteps="timesteps:Stratified") | {"loss": loss}},
        }
    }
    config.decode.motion = {"name": "blocks", "steps": 16}
    config.optim.update({"lr": 3e-3, "schedule": "cosine", "warmup": 100, "b2": 0.98})
    config.ema.update({"decay": 0.99, "warmup": True})
    config.guidance.scale = 1.0
    modes = {f"steps_{steps}": {"name": "blocks", "steps": steps} for steps in STEPS}
    config.eval.evaluators = {"motions": {"name": "judged", "task": "words_to_motion", "rows": 480, "modes": modes}}
    config.checkpoint.every = 500
    return common.variant(config, name, plain=plain, humanml3d=humanml3d)


def motion(windows: int, numbers: int) -> dict:
    """Ids of windows of so many numbers, one below the other."""
    # What is lost without a window: the number of lengths with which it moves.
    importance = tuple(sum(round(share * windows) > window for share in MOVES) for window in range(windows))
    process = {"name": "categorical", "mask": 0.9, "absorbing": True}
    process["schedule"] = {"name": "keep:ByPlace", "importance": importance, "strength": 0.3}
    field = common.image(windows, 1, numbers, patch=1) | {
        "embed": {"name": "tokens", "init": "normal:0.125", "positions": "sincos"},
        "process": process,
        "head": {"name": "linear", "init": "normal:0.02"},
        "step": {"name": "ancestral"},
        "time_token": True,
    }
    field["codec"]["codes"] = {"name": "kmeans", "codes": 64}
    return field


def plain(config):
    """One schedule for all windows."""
    config.fields.motion.process.schedule.strength = 0.0
    return config


def humanml3d(config):
    """Motions of 196 frames with 263 numbers as in HumanML3D, 512 codes that are trained with the network, and the
    trunk of VQ-Diffusion's text-to-image network. The motions are generated all the same."""
    config.steps, config.batch = 100_000, 128
    config.model.trunk.update({"width": 1024, "depth": 19, "heads": 16, "kv_heads": 16, "mlp_width": 4096})
    config.model.dtype = "bfloat16"
    with config.unlocked():
        config.fields.motion = motion(49, 4 * 263)
        del config.fields.motion.codec["codes"]
        config.fields.motion.learned = {"name": "vector_quantizer", "codes": 512, "numbers": 512}
        task = config.tasks.words_to_motion
        task.source.update({"windows": 49, "channels": 263})
        task.objectives.codec = {"name": "codec", "names": ("motion",), "weight": 1.0}
    return config
