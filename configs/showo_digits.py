"""Show-o (arXiv 2408.12528) on handwritten digits: image tokens are ids that are unmasked, words are read one by one.

    python -m src.main --config=configs/showo_digits.py --workdir=runs/showo_digits

Two CPU cores, about two minutes. A patch of 2 x 2 pixels is one of 64 codes (k-means); the process replaces codes by a
mask, and sampling keeps the most confident codes first (MaskGIT, arXiv 2202.04200), in 16 steps with guidance 1.5.
248,128 parameters. Expect digit_accuracy 0.97, fdpx 0.36 to 0.38 and caption_accuracy 0.93 (docs/systems/showo.md).
"""

from configs import common


def get_config(name: str | None = None):
    """Variants: learned (codes that are trained with the network, in place of k-means), debug."""
    image = common.image(8, 8, 1) | common.masked_ids(gumbel=6.0)
    image["embed"] = {"name": "tokens", "init": "normal:0.125", "positions": "sincos"}
    image["codec"]["codes"] = {"name": "kmeans", "codes": 64}
    config = common.words_and_digits(common.base(), image, {}, common.unmask())
    config.steps = 1500
    config.decode.image.steps = 16
    config.guidance.scale = 1.5
    return common.variant(config, name, learned=learned)


def learned(config):
    """A vector quantiser over the whole image."""
    with config.unlocked():
        del config.fields.image.codec["codes"]
        config.fields.image.learned = {"name": "vector_quantizer", "codes": 64}
        for task in config.tasks.values():
            task.objectives.codec = {"name": "codec", "names": ("image",), "weight": 1.0}
    return config
