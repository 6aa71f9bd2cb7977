"""Blackout diffusion (arXiv 2305.11089) of handwritten digits, beside next-token prediction of words.

    python -m src.main --config=configs/blackout_digits.py --workdir=runs/blackout_digits

Two CPU cores, two to three minutes. Pixels are counts from 0 to 16 that lose their units one by one; the network
predicts how many are missing, and sampling adds them again in 40 steps. 277,636 parameters. Expect digit_accuracy 0.97
and caption_accuracy 0.98 (README.md).
"""

from configs import common


def get_config(name: str | None = None):
    """Variants: debug."""
    image = common.image(8, 8, 1) | {
        "process": {"name": "counts", "rounding": "stochastic", "end": 7.0, "scale": 2.0},
        "head": {"name": "adaln", "init": "zeros", "adaln_init": "zeros"},
        "step": {"name": "ancestral"},
    }
    image["codec"]["codes"] = {"name": "levels", "levels": 17}
    objective = common.diffusion(timesteps="timesteps:Stratified") | {"loss": {"name": "poisson"}}
    config = common.words_and_digits(common.base(), image, {}, objective)
    config.steps = 1500
    config.decode.image.steps = 40
    config.guidance.scale = 1.5
    return common.variant(config, name)
