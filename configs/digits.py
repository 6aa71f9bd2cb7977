"""MonoFormer on handwritten digits: words -> image, image -> words and sentences about numbers, in one transformer.

    python -m src.main --config=configs/digits.py --workdir=runs/digits

Two CPU cores, about two minutes. Expect digit_accuracy 0.98, caption_accuracy 0.97 and text_accuracy 0.98 or more
(three seeds are in docs/reproduce.md). A step has 32 drawings, 24 captions and 32 sentences: 1,776 tokens.
"""

from configs import common


def get_config(name: str | None = None):
    """Variants: debug, official."""
    config = common.base()
    config.steps, config.batch = 1500, 88
    config.model.trunk.update({"width": 64, "depth": 4, "heads": 4, "kv_heads": 4, "mlp_width": 192})
    config.model.trunk.update({"qk_norm": True, "init": "lecun_normal"})
    config.model.time.init = "lecun_normal"
    config.model.text.init = "normal:0.125"
    config.model.conditioning = {"name": "conditioning:TimeToken", "init": "fixed"}
    config.tasks = {
        "caption_to_image": {
            "share": 32,
            "data": {"name": "digits:CaptionToImage", "length": 25, "shift": 0},
            "objectives": {"diffusion": common.diffusion()},
        },
        "image_to_caption": {
            "share": 24,
            "data": {"name": "digits:ImageToCaption", "length": 25},
            "objectives": {"text": common.next_token("caption", weight=0.2)},
        },
        "number_sentences": {
            "share": 32,
            "data": {"name": "digits:NumberSentences", "relations": ("sum", "successor", "larger")},
            "objectives": {"text": common.next_token("sentence", weight=1.0)},
        },
    }
    config.optim.update({"lr": 4e-3, "schedule": "cosine", "warmup": 100, "b2": 0.98, "weight_decay": 0.1})
    config.ema.update({"decay": 0.995, "warmup": True})
    config.sample.image.guidance.scale = 1.5  # 2.0 draws clearer but less varied digits
    config.eval.evaluators = {"digits": {"name": "digits", "images": 690, "captions": 360, "sentences": 200}}
    config.checkpoint.every = 500
    return common.variant(config, name, official=official)


def official(config):
    """As published; the one channel is guided, and an image that is given is read causally."""
    with config.unlocked():
        config.tasks.image_to_caption.data.image_mode = "causal"
    return common.official(config, channels=0)
