"""LatentLM (arXiv 2412.08635) on handwritten digits: patches are generated one by one, like words, each by a small
diffusion head that reads the hidden state before it.

    python -m src.main --config=configs/latentlm_digits.py --workdir=runs/latentlm_digits

It took 455 s on two CPU cores beside other work. An image is 16 patches of 2 x 2 pixels, each sampled in 16 steps.
579,716 parameters. Expect digit_accuracy 0.98 and caption_accuracy 0.98 (README.md).
"""

from configs import common


def get_config(name: str | None = None):
    """Variants: debug."""
    image = common.image(8, 8, 1)
    for part in ("process", "step", "time_token"):
        image.pop(part)
    image["head"] = {"name": "token_diffusion", "mlp_width": 128, "depth": 3, "draws": 4, "steps": 16}
    segment = {"role": "clean", "blocks": "causal"}
    config = common.words_and_digits(common.base(), image, segment, common.next_token("image"))
    with config.unlocked():
        config.decode.image = {"name": "left_to_right"}
    return common.variant(config, name)
