"""The paper's ablations and one of our own, on handwritten digits: the runs of `python -m src.tools.reproduce`.

    python -m src.main --config=configs/ablations_digits.py:causal --workdir=runs/causal

The system of configs/digits.py, trained for fewer steps, with held-out losses every 100 steps. Without a variant it is
what the others are compared with: from scratch, bidirectional images, a time token that is trained. Results are in
docs/reproduce.md.
"""

from configs import common, digits


def get_config(name: str | None = None):
    """Variants: text (sentences alone, no images), pretrained (starts from the weights of such a run, which
    `init_from.path` names), causal (image tokens attend to those before them), dead (a time token that stays a
    constant, as published), debug."""
    config = digits.get_config()
    with config.unlocked():
        config.steps, config.log.every, config.checkpoint.every = 600, 50, 300
        config.doctor.update({"every": 0, "panels": 100, "drawings": 0})
        config.eval.evaluators.digits.update({"images": 690, "captions": 360, "sentences": 200})
    return common.variant(config, name, text=text, pretrained=pretrained, causal=causal, dead=dead)


def text(config):
    """A small language model: the sentences about numbers alone, as many of them in a step."""
    with config.unlocked():
        for task in ("caption_to_image", "image_to_caption"):
            del config.tasks[task]
        del config.fields["image"]
        config.steps, config.batch = 400, config.tasks.number_sentences.weight
        config.eval.evaluators.digits.update({"draw": None, "caption": None})
    return config


def pretrained(config):
    """From a run of `text` that `python -m src.tools.convert --initial` converted; parts for images start at random."""
    config.init_from.path = "runs/ablations/text-0/initial"
    return config


def causal(config):
    """Image tokens attend to those before them alone, in images that are made and that are read."""
    with config.unlocked():
        config.tasks.caption_to_image.template.segment = {"blocks": "causal"}
        config.tasks.image_to_caption.template.blocks = "causal"
    return config


def dead(config):
    """Both linears of the time token start at zero, so that it has no time in it; the image head still has."""
    config.model.conditioning.init = "official"
    return config
