"""MonoFormer on handwritten digits: words -> image, image -> words and sentences about numbers, in one transformer.

    python -m src.main --config=configs/digits.py --workdir=runs/digits

Two CPU cores, about two minutes. Expect digit_accuracy 0.99, caption_accuracy 0.97 and text_accuracy 1.0 (three seeds
are in docs/reproduce.md). A step has 32 images to generate, 24 captions and 32 sentences: 1,776 tokens.
"""

from configs import common


def get_config(name: str | None = None):
    """Variants: debug, official."""
    config = common.base()
    config.steps, config.batch = 1500, 88
    config.model.trunk.update({"width": 64, "depth": 4, "heads": 4, "kv_heads": 4, "mlp_width": 192})
    config.model.trunk.update({"qk_norm": True, "init": "lecun_normal"})
    config.model.time.init = "lecun_normal"
    config.model.conditioning = {"name": "conditioning:TimeToken", "init": "fixed"}
    config.fields = {"text": common.text("normal:0.125"), "image": common.image(8, 8, 1)}
    config.tasks = {
        "caption_to_image": {
            "weight": 32,
            "source": {"name": "digits", "shift": 0},
            "template": {"name": "caption_to_image", "row_length": 25},
            "objectives": {"diffusion": common.diffusion()},
        },
        "image_to_caption": {
            "weight": 24,
            "source": {"name": "digits"},
            "template": {"name": "image_to_caption", "row_length": 25},
            "objectives": {"text": common.next_token("text.caption", weight=0.2)},
        },
        "number_sentences": {
            "weight": 32,
            "source": {"name": "numbers", "relations": ("sum", "successor", "larger")},
            "template": {"name": "text"},
            "objectives": {"text": common.next_token("text.sentence", weight=1.0)},
        },
    }
    config.optim.update({"lr": 4e-3, "schedule": "cosine", "warmup": 100, "b2": 0.98, "weight_decay": 0.1})
    config.ema.update({"decay": 0.995, "warmup": True})
    config.guidance.scale = 1.5  # 2.0 makes clearer but less varied digits
    config.eval.evaluators = {"digits": {"name": "digits", "images": 690, "captions": 360, "sentences": 200}}
    config.checkpoint.every = 500
    return common.variant(config, name, official=official)


def official(config):
    """As published; the one channel is guided, and the tokens of a given image are causal."""
    with config.unlocked():
        config.tasks.image_to_caption.template.blocks = "causal"
    return common.official(config, channels=1, guided=0)
