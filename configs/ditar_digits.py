"""DiTAR (arXiv 2502.03930) on handwritten digits: patches of 4 x 4 pixels are generated one by one, each by a small
transformer that reads the hidden state before it and the patch before.

    python -m src.main --config=configs/ditar_digits.py --workdir=runs/ditar_digits

The publication makes speech; here the four rows of a patch stand for its frames. docs/systems/ditar.md has the figures.
Variants: `mlp` (LatentLM's head on the same patches, the baseline), `debug`.
"""

from configs import common, latentlm_digits


def get_config(name: str | None = None):
    """Variants: mlp, debug."""
    config = common.base()
    image = common.image(8, 8, 1, patch=4)
    for part in ("process", "step", "time_token"):
        image.pop(part)
    image["embed"] = {"name": "aggregate", "parts": 4, "depth": 1, "heads": 4}
    image["head"] = {"name": "local_transformer", "parts": 4, "past": 1, "mlp_width": 64, "depth": 2, "heads": 4}
    image["head"] |= {"draws": 2, "steps": 10, "sampler": "dpm", "drop": 0.1, "tau": 1.0, "guidance": 1.0}
    segment = {"role": "clean", "blocks": "causal"}
    config = common.words_and_digits(config, image, segment, common.next_token("image"))
    with config.unlocked():
        config.decode.image = {"name": "left_to_right"}
    return common.variant(config, name, mlp=mlp)


def mlp(config):
    """A linear layer for the aggregation, and an MLP that makes a patch of the state alone."""
    head = dict(latentlm_digits.get_config().fields.image.head)
    head |= {"schedule": {"name": "schedules:GVP"}, "steps": 10, "sampler": "dpm", "drop": 0.1}
    with config.unlocked():
        config.fields.image.update({"embed": {"name": "patches", "init": "xavier_uniform"}, "head": head})
    return config
